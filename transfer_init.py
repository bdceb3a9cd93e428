"""Stage 2: the Spiking ResNet, filled from the teacher (paper, section 3.2)  ->  snn_init.pt

    python transfer_init.py --src r34.pt                           # Spiking ResNet-18, T = 4
    python transfer_init.py --src r34.pt --block sew --T 6         # SEW blocks, six time-steps
    python transfer_init.py --src resnet34.pth --dataset cifar10   # torchvision's or timm's weights

From top to bottom: neuron, flags, spiking network, transfer, weights from elsewhere, main().
"""
import argparse
import hashlib
import math
import os
import re
import shlex
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

# OpenMP threads that spin endlessly make a busy machine ten times slower
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from torch import nn

from kernels import BatchNorm2d, bn_lif
from train_teacher import (
    DEPTHS,
    BasicBlock,
    Bottleneck,
    Parser,
    ResNet,
    fail,
    load_checkpoint,
    load_data,
    number,
    output,
    read,
    run_script,
    save_checkpoint,
    world_size,
)


# --------------------------------------------------------------------------------------- neuron
@dataclass
class Neuron:
    """The LIF neuron of eq. 2 to 4, with the constants of the authors' released code.

    One object is shared by all layers of a network: `net.neuron.T = 8` reaches them all.
    """
    T: int = 4                  # time-steps
    decay: float = 0.25         # share of the potential kept by a step: exp(-1/tau), tau = 0.72
    v_th: float = 0.5           # firing threshold; batch-norm weights start there too (tdBN)
    lens: float = 0.5           # half-width of the surrogate's window around it, 1/(2*lens) high
    detach_reset: bool = True   # no gradient through the reset


IMPL = None  # of bn_lif: the fastest there is; "reference" runs an edited lif_reference


# ----------------------------------------------------------------------------------------- flags
def parse_args(argv=None):
    """(arguments, the teacher's checkpoint), which decides some of the defaults."""
    p = Parser("Stage 2: initialise a Spiking ResNet from a trained ResNet.")
    add = p.add_argument
    add("--src", type=os.path.expanduser,
        help="the teacher: a checkpoint of train_teacher.py, or a ResNet's weights under "
             "torchvision's names (torch.save, safetensors)")
    add("--depth", type=int, default=18, choices=DEPTHS, help="layers of the Spiking ResNet")
    add("--width", type=number(int, 1), help="channels of its first stage")
    add("--block", default="basic", choices=["basic", "sew"],
        help="basic: LIF after the residual add (Fig. 1b); sew: before it (Fig. 1c)")
    # what is transferred, and from where (paper, section 3.2.2)
    add("--block-map", default="spread", choices=["spread", "first"],
        help="teacher's block for block j: at its relative position, or theirs, min(j, n-1)")
    add("--shortcut", default="transfer", choices=["transfer", "fresh"],
        help="downsampling shortcuts; fresh: as in the authors' code")
    add("--classifier", default="fresh", choices=["fresh", "transfer"],
        help="fully connected layer; fresh: as in the paper")
    # the student's input and its neurons
    add("--encoder", default="direct", choices=["direct", "poisson"],
        help="the image as current at every step, or spikes of probability pixel/255 (Algorithm 1)")
    add("--stem", default="auto", choices=["auto", "3x3", "7x7"],
        help="first convolution; auto: the teacher's, or by the image size of --dataset")
    add_neuron_flags(p)
    # the data and the result
    add("--dataset", type=os.path.expanduser, help="cifar10, cifar100, digits, or a folder")
    add("--data-dir", type=os.path.expanduser, default="data", help="where downloads are kept")
    add("--seed", type=number(int, 0), default=0, help="of whatever stays fresh")
    add("--out", type=output, default="snn_init.pt", help="checkpoint to write, anew each time")

    # width and data are by default the teacher's, so its file is read first; until then they are a
    # Path, because argparse would parse a str
    p.set_defaults(width=Path("the teacher's"), dataset=Path("the teacher's"), **asdict(Neuron()))
    src = p.first_pass(argv).src
    if src:
        teacher = load_source(src)
        dataset = teacher["config"].get("dataset", "cifar100")
        p.set_defaults(width=teacher["arch"]["width"], dataset=dataset)
    args = p.parse_args(argv)
    if not src:
        fail("argument --src: is required: the teacher's file")
    return args, teacher


def add_neuron_flags(p):
    """The flags of `Neuron`, for this stage and the next; their defaults are the caller's."""
    # a window of width 0 has no gradient, and at threshold 0 batch norm would start at 0
    positive = number(float, 1e-6)
    p.add_argument("--T", type=number(int, 1, 32), help="time-steps")
    p.add_argument("--decay", type=number(float, 0, 1), help="potential kept per step, eq. 2")
    p.add_argument("--v-th", type=positive, help="firing threshold, eq. 3")
    p.add_argument("--lens", type=positive, help="half-width of the surrogate's window, eq. 4")
    p.add_argument("--detach-reset", action=argparse.BooleanOptionalAction,
                   help="no gradient through the reset, as in the authors' code; with one, an "
                        "ablation, nothing is fused")


# ------------------------------------------------------------------------------ spiking network
class BatchNormLIF(BatchNorm2d):
    """Batch norm (eq. 5) over T, B, H, W, optional residual add, LIF, where the teacher has
    BatchNormReLU. The place to change the neuron and (by a hook) to observe firing rates.

    x and residual: (T*B, C, H, W), T outermost -> spikes of that shape, 0 or 1. static=True: x is
    (B, C, H, W), the same current at every step (the stem under direct coding), normalised once.
    """

    def __init__(self, channels, neuron):
        super().__init__(channels)
        self.neuron = neuron

    def forward(self, x, residual=None, static=False):
        n = self.neuron
        # for the convolutions time is folded into the batch
        if not static:
            x = x.unflatten(0, (n.T, -1))                # (T*B, C, H, W) -> (T, B, C, H, W)
        if residual is not None:
            residual = residual.unflatten(0, (n.T, -1))  # likewise
        momentum = self.count_batch() if self.training else 0.0
        spikes = bn_lif(
            x, self.weight, self.bias, residual, self.running_mean, self.running_var,
            training=self.training, momentum=momentum, eps=self.eps, group=self.group,
            T=n.T if static else None, decay=n.decay, v_th=n.v_th, lens=n.lens,
            detach_reset=n.detach_reset, impl=IMPL)
        return spikes.flatten(0, 1)                      # (T, B, C, H, W) -> (T*B, C, H, W)


class SEWBasicBlock(BasicBlock):
    """Figure 1c: LIF before the add, so identity shortcuts carry spikes; sums can exceed 1."""

    def forward(self, x):
        spikes = self.bn1(self.conv1(x))
        # a shortcut that changes the shape has neurons of its own
        return self.bn2(self.conv2(spikes)) + self.downsample(x)


class SEWBottleneck(Bottleneck):
    """The same of ResNet-50 and deeper."""

    def forward(self, x):
        spikes = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self.bn3(self.conv3(spikes)) + self.downsample(x)


SEW = {BasicBlock: SEWBasicBlock, Bottleneck: SEWBottleneck}


class SpikingResNet(ResNet):
    """The teacher's ResNet with LIF neurons for ReLU, under the same names (paper, section 3.2.1).

    depth to stem: as in `ResNet`. block: "basic" or "sew". encoder: "direct" or "poisson". The
    rest: `Neuron`. Fresh, it is the authors' baseline: PyTorch's own default for convolutions
    (their code sets none), batch-norm weights equal to v_th (tdBN).
    """

    def __init__(self, depth=18, num_classes=100, in_channels=3, width=64, stem="3x3",
                 block="basic", encoder="direct", **neuron):
        neuron = Neuron(**neuron)
        # neurons wherever the teacher has a ReLU
        lif = partial(BatchNormLIF, neuron=neuron)
        modules = dict(norm_act=lif)
        # in Figure 1c also in the downsampling shortcuts, which else only normalise
        if block == "sew":
            modules.update(norm=lif, block=SEW[DEPTHS[depth][0]])
        super().__init__(depth, num_classes, in_channels, width, stem, **modules)
        self.neuron = neuron
        self.encoder = encoder
        # the convolutions keep what nn.Conv2d gave them
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.constant_(m.weight, neuron.v_th)

    def forward(self, x):
        """Analogue images (B, C, H, W), the same at every step, or spikes (T, B, C, H, W)
        -> class scores (T, B, K). `scores[:t].mean(0)` is the answer after t steps."""
        # the same image at every step goes through the stem's convolution once, not T times
        static = x.dim() == 4
        if static and self.encoder == "poisson":
            raise ValueError("images (B, C, H, W): give spikes (T, B, C, H, W), by encode()")
        if not static and len(x) != self.neuron.T:
            raise ValueError(f"input of {len(x)} time-steps, where neuron.T is {self.neuron.T}")
        if not static:
            x = x.flatten(0, 1)                        # (T, B, C, H, W) -> (T*B, C, H, W)
        x = self.bn1(self.conv1(x), static=static)     # -> (T*B, width, H, W)
        scores = self.fc(self.features(x))             # -> (T*B, K)
        return scores.unflatten(0, (self.neuron.T, -1))  # -> (T, B, K)

    def encode(self, x, data, index, seed):
        """Pixels, uint8 (B, C, H, W) -> the network's input: normalised by `data` (B, C, H, W), or
        Poisson spikes (T, B, C, H, W) of probability pixel/255, before normalisation (Algorithm 1).

        index: (B,) int64, which images of the data set these are. A spike depends on (seed, image,
        step, pixel) alone: not on the batch, T, the process or the device.
        """
        # the first layer's neurons make spikes of the image itself
        if self.encoder == "direct":
            return data.normalize(x)
        # strict, and noise below 255: black never fires, white always
        spikes = x > noise(seed, index, self.neuron.T, x.shape[1:])
        return spikes.to(self.fc.weight.dtype)


def noise(seed, index, T, shape):
    """Integers uniform on 0 to 254, so that P(pixel > noise) = pixel/255: int64 (T, B, *shape).

    Each image has a stream of splitmix64 (Steele, Lea, Flood 2014); step and pixel are its counter.
    """
    # hashed twice, so that neighbouring images or seeds have unrelated streams
    stream = mix(mix(index) + seed).view(-1, 1, 1, 1)            # (B, 1, 1, 1)
    counter = torch.arange(1, 1 + T * math.prod(shape), device=index.device)
    counter = counter.view(T, 1, *shape)                         # (T, 1, C, H, W)
    golden_ratio = 0x9E3779B97F4A7C15 - 2**64                    # of 2^64, as a signed integer
    # 2^64 is 1 more than a multiple of 255: each remainder is as likely as another to 2^-56
    return mix(stream + counter * golden_ratio).remainder(255)   # (T, B, C, H, W)


def mix(z):
    """splitmix64's hash of int64, whose products are modulo 2^64."""
    # >> shifts the sign in: each mask keeps what an unsigned shift would leave
    z = (z ^ ((z >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return z ^ ((z >> 31) & (2**33 - 1))


# ------------------------------------------------------------------------------------- transfer
def loop(source, shape):
    """Loop interpolation (paper, section 3.2.2, Figure 3), for vectors likewise:
    target[i, j] = source[i % C_out, j % C_in]."""
    # the first two dimensions are channels, out and in; what follows is the kernel
    for dim in range(min(2, len(shape))):
        source = source.index_select(dim, torch.arange(shape[dim]) % source.shape[dim])
    return source


def source_block(j, m, n, block_map):
    """Which of the teacher's n blocks fills block j of m in the same stage (Figure 2b)."""
    if block_map == "first":
        return min(j, n - 1)
    return int(j * (n - 1) / max(m - 1, 1) + 0.5)  # spread: first to first, last to last


@torch.no_grad()
def transfer(student, source, block_map="spread", shortcut="transfer", classifier="fresh"):
    """Fill `student` in place from `source`, a ResNet's state dict (paper, sections 3.2.2, 3.3.2).

    Returns a row for each layer of the student: (name, the source's layer or "", "copied", "looped
    from -> to" or "fresh"). Raises where a layer is missing or has kernels of another size.
    """
    target = student.state_dict()
    fresh = [] if classifier == "transfer" else ["fc."]
    if stem_kernels(source) != stem_kernels(target):  # 3x3 and 7x7 have no common index
        fresh += ["conv1.", "bn1."]

    # where every tensor comes from
    rows = {}  # of the table, by layer
    for name, tensor in target.items():
        layer = name.rpartition(".")[0]
        if name.startswith(tuple(fresh)) or (shortcut == "fresh" and ".downsample." in name):
            rows[layer] = ("", "fresh")
            continue
        if name.endswith("num_batches_tracked"):
            continue  # nothing reads this counter, and old weights lack it
        origin = name
        if name.startswith("layer"):  # the block of the same stage that fills it (Figure 2b)
            stage, j, rest = name.split(".", 2)
            m, n = num_blocks(target, stage), num_blocks(source, stage)
            origin = f"{stage}.{source_block(int(j), m, n, block_map)}.{rest}"
        value = source[origin]
        if value.shape[2:] != tensor.shape[2:]:  # copy_ would broadcast a 1x1 kernel
            raise ValueError(f"{origin} is {size(value)}, {name} {size(tensor)}")
        # kernel by kernel, or number by number in the four vectors of a batch norm (Figure 3)
        tensor.copy_(loop(value, tensor.shape))
        same = value.shape == tensor.shape
        how = "copied" if same else f"looped {size(value)} -> {size(tensor)}"
        # a layer's first tensor, its weight, stands for it in the table
        rows.setdefault(layer, (origin.rpartition(".")[0], how))
    return [(layer, *row) for layer, row in rows.items()]


def stem_kernels(weights):
    return {name: v.shape[2:] for name, v in weights.items() if name.startswith("conv1.")}


def num_blocks(weights, stage):
    return len({name.split(".")[1] for name in weights if name.startswith(stage)})


def size(tensor):
    return "x".join(map(str, tensor.shape))  # "64x3x7x7"


# ------------------------------------------------------------------------- weights from elsewhere
def load_source(path):
    """A checkpoint of train_teacher.py, or weights of a ResNet from elsewhere in the same form:
    `arch` read off their shapes, `data` None, `config` empty."""
    reader = read_safetensors if path.endswith(".safetensors") else read
    content, sha256 = reader(path)
    if isinstance(content, dict) and "stage" in content:
        return load_checkpoint(path, "teacher")

    # as published, {"state_dict": {"module.conv1.weight": ...}}: all names have one prefix
    mark = "layer1.0.conv1.weight"
    tensors = dict(flatten(content))
    found = [name for name in tensors if name.endswith(mark)]
    if len(found) != 1:  # of MoCo's two encoders or timm's averages only the user knows which
        fail(f"{path} holds {len(found)} ResNets under torchvision's names ({listed(found)}) and "
             f"{len(tensors)} tensors ({listed(tensors)}): save the state_dict() of one")
    prefix = found[0].removesuffix(mark)
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    # a ResNet's number counts its first convolution, those of its blocks, and the classifier
    depth = 2 + len([k for k in weights if re.fullmatch(r"layer\d\.\d+\.conv\d\.weight", k)])
    stem = weights.get("conv1.weight", torch.empty(0)).shape
    if depth not in DEPTHS or 0 in stem:
        fail(f"{path} is a network of {depth} layers, whose first kernels are {tuple(stem)}")

    # a network without memory of its own takes them, and tells what does not fit
    try:
        classes = len(weights.get("fc.weight", ()))  # 0: the head of another task, or none
        arch = dict(depth=depth, num_classes=classes, in_channels=stem[1], width=stem[0],
                    stem="3x3" if stem[2] == 3 else "7x7")
        with torch.device("meta"):
            net = ResNet(**arch | dict(num_classes=max(classes, 1)))
        missing, extra = net.load_state_dict(weights, strict=False, assign=True)
        wrong = [k for k in missing if k[:3] != "fc."]
        # squeeze-and-excitation, say, would change what the network computes
        wrong += [k for k in extra if k.startswith(("conv", "bn", "layer"))]
        wrong += [k for k, v in weights.items() if not v.isfinite().all()]
        wrong += [k for k, v in weights.items() if k.endswith("running_var") and v.min() < 0]
    except Exception as error:  # other shapes, as a ResNeXt's; sparse or quantised tensors
        fail(f"{path} is no ResNet-{depth}: {' '.join(str(error).split())[:300]}")
    if wrong:
        fail(f"{path} is no ResNet-{depth}: missing, too many or not finite: {listed(wrong)}")
    return dict(model=weights, arch=arch, data=None, config={}, sha256=sha256)


def read_safetensors(path):
    """({name: tensor}, the file's sha256), by a package that users of such files have."""
    try:
        from safetensors.torch import load
        content = Path(path).read_bytes()
        return load(content), hashlib.sha256(content).hexdigest()
    except Exception as error:  # the package has its own kinds; it may be missing too
        fail(f"{path} cannot be read by the package safetensors: {error}")


def flatten(content, path=""):
    """(name, tensor) for every tensor in a dict of dicts: "state_dict/module.fc.bias"."""
    if isinstance(content, torch.Tensor):
        yield path, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from flatten(value, f"{path}/{key}".lstrip("/"))


def listed(names):
    return ", ".join(list(names)[:3]) + (" ..." if len(names) > 3 else "") or "none"


def check_classes(classes, described, who, path):
    """End where a checkpoint's `data` (`described`) has other classes or another order of them."""
    known = (described or {}).get("classes") or classes  # None: a bare state dict names none
    for i, (ours, theirs) in enumerate(zip(classes, known)):
        if ours != theirs:
            fail(f"the {who} in {path} knows class {i} as {theirs!r}, the data set as {ours!r}: "
                 "their labels mean different things")


# ------------------------------------------------------------------------------------------ main
CIFAR = dict(cifar10=10, cifar100=100)  # classes; their names can wait for the download


def main(argv=None):
    args, teacher = parse_args(argv)
    known, taught = teacher["arch"], teacher["data"]  # what taught it; None: from elsewhere
    if world_size() > 1:
        fail("runs as one process: call it without torchrun")
    if os.path.exists(args.out):  # written over, if it is this stage's
        load_checkpoint(args.out, "init")
    if DEPTHS[args.depth][0] is not DEPTHS[known["depth"]][0]:
        fail(f"argument --depth: blocks of a ResNet-{known['depth']} cannot fill {args.depth}'s")

    # data: what the network is for. the next stage compares the class names with those it loads
    inherited = args.dataset == teacher["config"].get("dataset")
    if inherited:
        data = taught
    elif args.dataset in CIFAR:
        data = dict(name=args.dataset, classes=None, shape=[3, 32, 32])
    else:
        data = load_data(args.dataset, args.data_dir).describe()
    num_classes = len(data["classes"] or range(CIFAR[args.dataset]))

    # classifier: the teacher's serves its own classes alone, in their order
    if args.classifier == "transfer":
        if known["num_classes"] != num_classes:
            fail(f"argument --classifier: {args.src} knows {known['num_classes']} classes, "
                 f"{args.dataset} has {num_classes}")
        check_classes(data["classes"] or [], taught, "teacher", args.src)
        if taught:
            data = data | dict(classes=taught["classes"])  # of CIFAR they were not known

    # student: fresh, from the seed
    stem = args.stem
    if stem == "auto" and inherited:
        stem = known["stem"]
    elif stem == "auto":  # small images keep their size
        stem = "3x3" if max(data["shape"]) <= 64 else "7x7"
    neuron = {field: getattr(args, field) for field in asdict(Neuron())}
    arch = dict(depth=args.depth, num_classes=num_classes, in_channels=data["shape"][0],
                width=args.width, stem=stem, block=args.block, encoder=args.encoder, **neuron)
    torch.manual_seed(args.seed)
    student = SpikingResNet(**arch)

    # transfer
    rows = transfer(student, teacher["model"], args.block_map, args.shortcut, args.classifier)

    # save: the next stage reads all it needs to know from this file
    source = "teacher" if taught else "source"  # foreign weights are no teacher of these data
    parents = {source: dict(path=args.src, sha256=teacher["sha256"])}
    save_checkpoint(args.out, student, stage="init", arch=arch, config=vars(args), data=data,
                    parents=parents, history=[])

    # report: what was done, layer by layer, and what comes next
    if args.classifier == "transfer" and not taught:
        print(f"{args.src} names no classes: those of {args.dataset} are taken to be its own, in "
              f"this order: {listed(data['classes'] or ['as torchvision has them'])}")
    for row in [("layer of the student", "from the teacher's", "how"), *rows]:
        print("{:<25}{:<25}{}".format(*row))
    print(f"{args.out}: Spiking ResNet-{args.depth} ({args.block} blocks, width {args.width}, "
          f"T {args.T}) for {args.dataset}, from {args.src}")
    if not taught:
        print("no teacher of these data is known: train one and say --teacher, or --no-kd")
    hint = "" if taught else " --no-kd"
    print(f"next: python train_idsnn.py --init {shlex.quote(args.out)}{hint}")


if __name__ == "__main__":
    run_script(main)
