"""Stage 2: the Spiking ResNet, filled from the teacher (paper, section 3.2)  ->  snn_init.pt

    python transfer_init.py --src r34.pt                           # Spiking ResNet-18, T = 4
    python transfer_init.py --src r34.pt --block sew --T 6         # SEW blocks, six time-steps
    python transfer_init.py --src resnet34.pth --dataset cifar10   # torchvision's or timm's weights

From top to bottom: the neuron, the flags, the spiking network, the transfer, the files that the
teacher's weights may come in, main().
"""
import argparse
import json
import math
import os
import re
import shlex
import warnings
import zipfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # endless spinning makes a busy machine ten times slower
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
    check_writable,
    default_stem,
    earlier_run,
    fail,
    load_checkpoint,
    load_data,
    make_checkpoint,
    number,
    read,
    run_identity,
    run_script,
    save_checkpoint,
    sha256_file,
)


# --------------------------------------------------------------------------------------- neuron
@dataclass
class Neuron:
    """The LIF neuron of eq. 2 to 4, with the constants of the authors' released code.

    One object is shared by all layers of a network: `net.neuron.T = 8` reaches them all.
    """
    T: int = 4                  # time-steps
    decay: float = 0.25         # share of the potential that a step keeps: exp(-1/tau), tau = 0.72
    v_th: float = 0.5           # firing threshold; batch-norm weights start there too (tdBN)
    lens: float = 0.5           # half-width of the surrogate's window around it, 1/(2*lens) high
    detach_reset: bool = True   # their reset has no gradient


# ---------------------------------------------------------------------------------------- flags
def parse_args(argv=None):
    """(arguments, teacher), whose file decides some of the defaults, which --help shows."""
    # the teacher, and the student's network
    p = Parser(description="Stage 2: initialise a Spiking ResNet from a trained ResNet.")
    p.add_argument("--src", help="the teacher: a checkpoint of train_teacher.py, or a ResNet's "
                                 "weights under torchvision's names, of torch.save or safetensors")
    p.add_argument("--depth", type=number(int, 18, 152), default=18, choices=DEPTHS,
                   help="layers of the Spiking ResNet")
    p.add_argument("--width", type=number(int, 1, 4096),
                   help="channels of its first stage; not given: the teacher's")
    p.add_argument("--block", default="basic", choices=["basic", "sew"],
                   help="basic: LIF after the residual add (Fig. 1b); sew: before it (Fig. 1c)")
    # what is transferred, and from where (paper, section 3.2.2)
    p.add_argument("--block-map", default="spread", choices=["spread", "first"],
                   help="the teacher's block for block j of a stage: at its relative position (the "
                        "paper's text), or block min(j, n-1) (the authors' code)")
    p.add_argument("--shortcut", default="transfer", choices=["transfer", "fresh"],
                   help="downsampling shortcuts: transferred, or fresh as in the authors' code")
    p.add_argument("--classifier", default="fresh", choices=["fresh", "transfer"],
                   help="fully connected layer: fresh, as in the paper, or the teacher's")
    # the student's input and its neurons
    p.add_argument("--encoder", default="direct", choices=["direct", "poisson"],
                   help="the image as current at every step, or spikes of probability pixel/255 "
                        "(Algorithm 1)")
    p.add_argument("--stem", default="auto", choices=["auto", "3x3", "7x7"],
                   help="first convolution; auto: the teacher's, or by the image size of --dataset")
    add_neuron_flags(p)
    # the data and the result
    p.add_argument("--dataset",
                   help="what the network is meant for: cifar10, cifar100, digits, or a folder of "
                        "images; not given: the teacher's")
    p.add_argument("--data-dir", default="data", help="where downloads and decoded images are kept")
    p.add_argument("--seed", type=number(int, 0, 99999), default=0, help="of whatever stays fresh")
    p.add_argument("--out", default="snn_init.pt", help="checkpoint to write")
    p.add_argument("--fresh", action="store_true", help="write --out anew, whatever stands there")

    # the neuron's defaults stand above; width and data are the teacher's, if its file names any
    p.set_defaults(**asdict(Neuron()))
    first, _ = p.parse_known_args(argv)
    teacher = None
    if first.src and (os.path.isfile(first.src) or not first.help):
        teacher = load_teacher(first.src)
        dataset = teacher["config"].get("dataset", "cifar100")
        p.set_defaults(width=teacher["arch"]["width"], dataset=dataset)
    args = p.parse_args(argv)
    if not args.src:
        fail("argument --src: is required: the teacher's file")
    check_writable("out", args.out)
    return args, teacher


def add_neuron_flags(p):
    """The flags of `Neuron`, for this stage and the next; their defaults are the caller's."""
    # a window of width 0 has no gradient, and at threshold 0 batch norm would start at 0
    positive = number(float, 0, 1e3, above=True)
    p.add_argument("--T", type=number(int, 1, 32), help="time-steps")
    p.add_argument("--decay", type=number(float, 0, 1),
                   help="share of the potential that a step keeps, exp(-1/tau) of eq. 2")
    p.add_argument("--v-th", type=positive, help="firing threshold, eq. 3")
    p.add_argument("--lens", type=positive,
                   help="half-width of the surrogate's window around it, eq. 4")
    p.add_argument("--detach-reset", action=argparse.BooleanOptionalAction,
                   help="no gradient through the reset, as in the authors' code")


# ------------------------------------------------------------------------------ spiking network
class BatchNormLIF(BatchNorm2d):
    """Batch norm over T, B, H, W, optional residual add, LIF: BatchNormReLU's place in the student.

    Here the neuron can be changed, and here firing rates are observed (a hook on the output).
    x and residual: (T*B, C, H, W), T outermost -> spikes of that shape, 0 or 1. static=True: x is
    (B, C, H, W), the same current at every step (the stem under direct coding), normalised once.
    Every call starts at potential 0: there is no state to reset.
    """

    def __init__(self, channels, neuron):
        super().__init__(channels)
        self.neuron = neuron

    def forward(self, x, residual=None, static=False):
        n = self.neuron
        # convolutions know no time: it is folded into their batch
        if not static:
            x = x.unflatten(0, (n.T, -1))                # (T*B, C, H, W) -> (T, B, C, H, W)
        if residual is not None:
            residual = residual.unflatten(0, (n.T, -1))  # likewise
        if self.training:
            self.num_batches_tracked += 1
        spikes = bn_lif(
            x, self.weight, self.bias, residual, self.running_mean, self.running_var,
            training=self.training, momentum=self.momentum, T=n.T if static else None, eps=self.eps,
            decay=n.decay, v_th=n.v_th, lens=n.lens, detach_reset=n.detach_reset,
            group=self.group)
        return spikes.flatten(0, 1)                      # (T, B, C, H, W) -> (T*B, C, H, W)


class SEWBasicBlock(BasicBlock):
    """Figure 1c: LIF before the add, so identity shortcuts carry spikes; sums reach 2 and more."""

    def forward(self, x):
        spikes = self.bn1(self.conv1(x))
        # added after the neuron: a shortcut of its own fires too
        return self.bn2(self.conv2(spikes)) + self.downsample(x)


class SEWBottleneck(Bottleneck):
    """The same of ResNet-50 and deeper."""

    def forward(self, x):
        spikes = self.bn1(self.conv1(x))
        spikes = self.bn2(self.conv2(spikes))
        return self.bn3(self.conv3(spikes)) + self.downsample(x)


SEW = {BasicBlock: SEWBasicBlock, Bottleneck: SEWBottleneck}


class SpikingResNet(ResNet):
    """The teacher's ResNet with LIF neurons for ReLU, under the same names (paper, section 3.2.1).

    depth, num_classes, in_channels, width, stem: as in `ResNet`. block: "basic" or "sew". encoder:
    "direct" or "poisson". The rest: `Neuron`.

    Fresh, it is the authors' baseline: PyTorch's own default for convolutions (their code sets
    none; the teacher has Kaiming's), batch-norm weights equal to v_th (tdBN). Whatever no transfer
    reaches stays so.
    """

    def __init__(self, depth=18, num_classes=100, in_channels=3, width=64, stem="3x3",
                 block="basic", encoder="direct", T=Neuron.T, decay=Neuron.decay,
                 v_th=Neuron.v_th, lens=Neuron.lens, detach_reset=Neuron.detach_reset):
        neuron = Neuron(T, decay, v_th, lens, detach_reset)
        # the neuron stands wherever the teacher has its ReLU
        lif = partial(BatchNormLIF, neuron=neuron)
        kind = dict(norm_act=lif)
        # and in Figure 1c in a downsampling shortcut, which else only normalises
        if block == "sew":
            kind.update(norm=lif, block=SEW[DEPTHS[depth][0]])
        super().__init__(depth, num_classes, in_channels, width, stem, **kind)
        self.neuron = neuron
        self.encoder = encoder
        # the convolutions keep what nn.Conv2d gave them
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.constant_(m.weight, v_th)

    def forward(self, x):
        """Analogue images (B, C, H, W), the same at every step, or spikes (T, B, C, H, W)
        -> class scores (T, B, K).

        The network's answer is their mean over T; `scores[:t].mean(0)` is what it would have said
        after t steps.
        """
        # of the same current at every step the stem needs one convolution, not T
        static = x.dim() == 4
        if not static:
            x = x.flatten(0, 1)                        # (T, B, C, H, W) -> (T*B, C, H, W)
        x = self.bn1(self.conv1(x), static=static)     # -> (T*B, width, H, W)
        scores = self.fc(self.features(x))             # -> (T*B, K)
        return scores.unflatten(0, (self.neuron.T, -1))  # -> (T, B, K)

    def encode(self, x, data, index, seed):
        """Pixels, uint8 (B, C, H, W) -> the network's input: normalised by `data` (B, C, H, W), or
        Poisson spikes (T, B, C, H, W) of probability pixel/255, before normalisation (Algorithm 1).

        index: (B,) int64 on x's device, which images of the data set these are. A spike depends on
        (seed, image, step, pixel) alone: not on the batch, T, the process or the device.
        """
        # the first layer's neurons make spikes of the image itself
        if self.encoder == "direct":
            return data.normalize(x)
        # strict, and noise below 255: black never fires, white always
        spikes = x > noise(seed, index, self.neuron.T, x.shape[1:])
        return spikes.to(self.fc.weight.dtype)


def noise(seed, index, T, shape):
    """Integers uniform on 0 to 254, so that P(pixel > noise) = pixel/255: int64 (T, B, *shape).

    Each image has a stream of splitmix64 (Steele, Lea, Flood 2014), of which step and pixel are
    the counter: nothing is drawn in any order.
    """
    # hashed twice, so that neither images nor seeds next to each other share a stream
    stream = mix(mix(index) + seed).view(-1, 1, 1, 1)            # (B, 1, 1, 1)
    counter = torch.arange(1, 1 + T * math.prod(shape), device=index.device)
    counter = counter.view(T, 1, *shape)                         # (T, 1, C, H, W)
    golden_ratio = 0x9E3779B97F4A7C15 - 2**64                    # of 2^64, as a signed integer
    # 2^64 is 1 more than a multiple of 255: each remainder is as likely as another to 2^-56
    return mix(stream + counter * golden_ratio).remainder(255)   # (T, B, C, H, W)


def mix(z):
    """splitmix64's hash of int64, whose products are modulo 2^64."""
    # the sign must not be shifted in: each mask keeps what an unsigned shift leaves
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

    Fresh stay the classifier and, with shortcut="fresh", the downsampling shortcuts; the stem where
    the two have kernels of other sizes.

    Returns one row a layer of the student: (name, the source's layer or "", "copied", "looped from
    -> to" or "fresh"). Raises ValueError, before anything is copied, if what should be copied is
    missing or has other kernels.
    """
    target = student.state_dict()
    fresh = [] if classifier == "transfer" else ["fc."]
    if stem_kernels(source) != stem_kernels(target):  # 3x3 and 7x7 have no common index
        fresh += ["conv1.", "bn1."]

    # where every tensor comes from
    copies, rows = [], {}  # rows: of the table, by layer
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
            k = source_block(int(j), m, n, block_map)
            origin = f"{stage}.{k}.{rest}"
        value = source.get(origin)
        if value is None or value.dim() != tensor.dim() or value.shape[2:] != tensor.shape[2:]:
            raise ValueError(f"its {origin} is {size(value)}, which cannot fill the student's "
                             f"{name}, {size(tensor)}")
        copies.append((tensor, value))
        how = "copied"
        if value.shape != tensor.shape:
            how = f"looped {size(value)} -> {size(tensor)}"
        # a layer's first tensor, its weight, speaks for the layer
        rows.setdefault(layer, (origin.rpartition(".")[0], how))

    # kernel by kernel, or number by number in the four vectors of a batch norm (Figure 3)
    for tensor, value in copies:
        tensor.copy_(loop(value, tensor.shape))
    return [(layer, *row) for layer, row in rows.items()]


def stem_kernels(weights):
    """Height and width of the kernels before the first stage."""
    return [v.shape[2:] for name, v in weights.items() if name.startswith("conv1.")]


def num_blocks(weights, stage):
    return len({name.split(".")[1] for name in weights if name.startswith(f"{stage}.")})


def size(tensor):
    # as in a message: "64x3x7x7"
    return "missing" if tensor is None else "x".join(map(str, tensor.shape))


# ---------------------------------------------------------------------------- files of a teacher
def load_teacher(path):
    """A checkpoint of train_teacher.py, or weights from elsewhere in the same form: `model` and
    `arch` as read off them, `data` None, `config` empty, and `notes` for the user."""
    try:
        content = read_weights(path)
        # our own format is checked where it is defined
        if isinstance(content, dict) and {"format", "stage"} <= content.keys():
            return load_checkpoint(path, "teacher")
        weights, others = find_resnet(content)
        arch, unused = resnet_arch(weights)
    except OSError:
        return load_checkpoint(path, "teacher")  # which says why it cannot be read
    except (ValueError, RecursionError) as error:  # the latter: a dict that holds itself
        fail(f"{path} is not a checkpoint of train_teacher.py, nor the weights of a ResNet under "
             f"torchvision's names: {error}")
    # nothing is passed over in silence
    notes = []
    if not zipfile.is_zipfile(path):
        notes.append(f"the format of {path} has no checksums: damage may go unseen")
    if others + unused:
        notes.append(f"no part of the ResNet in {path}, not used: {listed(others + unused)}")
    return dict(model=weights, arch=arch, data=None, config={}, notes=notes,
                sha256=sha256_file(path))


def read_weights(path):
    """The content of a file of torch.save, from before PyTorch 1.6 too, or of safetensors.

    Code in a file is never run. Raises ValueError that says what the file is instead.
    """
    with open(path, "rb") as f:
        head = f.read(9)  # they say what a file is; its name may say anything
    try:
        with warnings.catch_warnings(action="ignore"):  # about what it refuses in the next moment
            if zipfile.is_zipfile(path):
                return read(path)[0]
            if head[8:] == b"{":  # the header's JSON, after its length
                return read_safetensors(path)
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, json and the unpickler raise a dozen kinds
        # what the unpickler refuses is an object, as torch.save(network) writes
        refused = re.search(r"GLOBAL \S+", str(error))
        reason = refused[0] if refused else repr(error)[:100]
        raise ValueError(f"it begins with {head[:8]!r} and is truncated, damaged or holds more "
                         f"than the tensors of a state_dict() ({reason})") from None


def read_safetensors(path):
    """{name: tensor}: the header's length (uint64), the header (JSON), the tensors' bytes."""
    dtypes = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
                  I64=torch.int64)  # the last for num_batches_tracked
    raw = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        # bytes counted from the header's end, little-endian, in C order
        first, last = entry["data_offsets"]
        flat = torch.frombuffer(raw[start + first:start + last], dtype=dtypes[entry["dtype"]])
        tensors[name] = flat.view(entry["shape"])  # raises where bytes are missing
    return tensors


def find_resnet(content):
    """(state dict, names of the tensors beside it) of the one ResNet in `content`, however nested
    (`state_dict`, `model`) and prefixed (`module.`, an encoder's name).

    Raises ValueError, saying what there is, if there is none or more than one.
    """
    tensors = dict(flatten(content))
    # whatever stands before a name that each ResNet has once stands before all of its names
    mark = re.compile(r"(|.*[./])layer1\.0\.conv1\.weight")
    prefixes = [found[1] for found in map(mark.fullmatch, tensors) if found]
    if not prefixes:
        raise ValueError(f"the {type(content).__name__} in it has no layer1.0.conv1.weight; "
                         f"its tensors are: {listed(tensors)}")
    # MoCo's two encoders, timm's averaged weights: which one is meant, only the user knows
    if len(prefixes) > 1:
        raise ValueError(f"it holds {len(prefixes)} networks, {listed(prefixes)}: save one alone")
    prefix = prefixes[0]
    weights = {name.removeprefix(prefix): value for name, value in tensors.items()
               if name.startswith(prefix)}
    return weights, [name for name in tensors if not name.startswith(prefix)]


def flatten(content, path=""):
    """Every tensor in a dict of dicts, after its name: "state_dict/module.fc.bias"."""
    if isinstance(content, torch.Tensor) and content.layout == torch.strided:  # not sparse
        yield path, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from flatten(value, f"{path}/{key}".lstrip("/"))


def resnet_arch(weights):
    """(arguments of the `ResNet` whose state dict this is, names of what is no part of it).

    Read off names and shapes; num_classes is 0 without a classifier. Raises ValueError where it is
    another network (a tensor too many, too few, or as ResNeXt's kernels of another shape), and
    where a value is not finite.
    """
    # a ResNet's number counts its first convolution, those of its blocks, and the classifier
    conv = re.compile(r"layer\d\.\d+\.conv\d\.weight")
    depth = 2 + len([name for name in weights if conv.fullmatch(name)])
    if depth not in DEPTHS:
        raise ValueError(f"it has {depth} layers, not {', '.join(map(str, DEPTHS))}")
    # stem and classifier are as wide as their tensors
    kernels = weights.get("conv1.weight", torch.empty(0))
    if kernels.dim() != 4 or kernels.numel() == 0:
        raise ValueError("it has no conv1.weight of four dimensions")
    width, channels, *kernel = kernels.shape
    classes = weights["fc.bias"].numel() if "fc.bias" in weights else 0
    stem = "3x3" if kernel == [3, 3] else "7x7"

    # what it should hold, name by name: shapes without memory
    with torch.device("meta"):
        net = ResNet(depth, classes or 1, channels, width, stem)
    if not classes:
        net.fc = nn.Identity()  # the head of another task is no part of it
    expected = net.state_dict()
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):
            continue  # a counter that old PyTorch did not keep
        value = weights.get(name)
        if value is None or value.shape != tensor.shape:
            raise ValueError(f"its {name} is {size(value)}, a ResNet-{depth}'s is {size(tensor)}: "
                             "another network (ResNeXt, a wide ResNet) or a part of one")
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"its {name} has values that are not finite floating-point numbers")
    unused = [name for name in weights if name not in expected]
    for name in unused:  # squeeze-and-excitation, say, would change what the network computes
        if name.startswith(("conv", "bn", "layer")):
            raise ValueError(f"it has {name}, a ResNet-{depth} has not: another network")
    arch = dict(depth=depth, num_classes=classes, in_channels=channels, width=width, stem=stem)
    return arch, unused


def listed(names):
    """The first few of many names, and how many there are."""
    return f"{', '.join(map(str, list(names)[:4]))} ({len(names)} in all)"


def check_classes(classes, described, who, path):
    """End where `described`, the `data` of a checkpoint, has other classes or another order."""
    known = (described or {}).get("classes") or classes  # None: a bare state dict names none
    for i, (ours, theirs) in enumerate(zip(classes, known)):
        if ours != theirs:
            fail(f"the {who} in {path} knows class {i} as {theirs!r}, the data set as {ours!r}: "
                 "their labels mean different things")


# ----------------------------------------------------------------------------------------- main
CIFAR = dict(cifar10=10, cifar100=100)  # classes; their names can wait for the download


def main(argv=None):
    # arguments, and with them the teacher, who says what some are by default
    args, teacher = parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("runs as one process: call it without torchrun")
    known, taught = teacher["arch"], teacher["data"]  # what it learnt from; None: from elsewhere
    if DEPTHS[args.depth][0] is not DEPTHS[known["depth"]][0]:
        fail(f"argument --depth: {args.depth}: {args.src} is a ResNet-{known['depth']}, and basic "
             "blocks (18, 34) and bottlenecks (50, 101, 152) cannot fill each other")

    # data: what the network is meant for. the next stage compares the class names with the images
    inherited = args.dataset == teacher["config"].get("dataset")
    if inherited:
        data = taught
    elif args.dataset in CIFAR:
        data = dict(name=args.dataset, classes=None, shape=[3, 32, 32])
    else:
        data = load_data(args.dataset, args.data_dir).describe()
    num_classes = len(data["classes"] or range(CIFAR[args.dataset]))

    # earlier result: one of the same command stands, another's is not overwritten
    parents = dict(teacher=dict(path=args.src, sha256=teacher["sha256"], bare=taught is None))
    identity = run_identity(args, "init", parents=parents)
    identity["data"] = [num_classes, data["classes"], data["shape"]]  # all that counts here
    earlier_run(args, "init", identity)

    # classifier: the teacher's serves its own classes alone, in their order
    if args.classifier == "transfer":
        if known["num_classes"] != num_classes:
            fail(f"argument --classifier: transfer needs a teacher of as many classes; {args.src} "
                 f"knows {known['num_classes']}, {args.dataset} has {num_classes}")
        check_classes(data["classes"] or [], taught, "teacher", args.src)
        if taught:
            data = data | dict(classes=taught["classes"])  # of CIFAR they were not known

    # student: fresh, as the seed says
    stem = args.stem
    if stem == "auto":
        stem = known["stem"] if inherited else default_stem(data["shape"])
    arch = dict(depth=args.depth, num_classes=num_classes, in_channels=data["shape"][0],
                width=args.width, stem=stem, block=args.block, encoder=args.encoder, T=args.T,
                decay=args.decay, v_th=args.v_th, lens=args.lens, detach_reset=args.detach_reset)
    torch.manual_seed(args.seed)
    student = SpikingResNet(**arch)

    # transfer
    try:
        rows = transfer(student, teacher["model"], args.block_map, args.shortcut, args.classifier)
    except ValueError as error:  # one of the two networks was edited
        fail(f"{args.src}: {error}")

    # save: the next stage reads all it needs to know from this file
    checkpoint = make_checkpoint("init", arch, student, args, identity, data, parents)
    save_checkpoint(args.out, checkpoint)

    # report: what was done, layer by layer, and what comes next
    for row in [("layer of the student", "from the teacher's", "how"), *rows]:
        print("{:<25}{:<25}{}".format(*row))
    for line in teacher.get("notes", []):
        print(f"note: {line}")
    print(f"{args.out}: Spiking ResNet-{args.depth} ({args.block} blocks, width {args.width}, "
          f"T {args.T}) for {args.dataset}, from {args.src}")
    command = f"next: python train_idsnn.py --init {shlex.quote(args.out)}"
    if not taught:
        command += " --no-kd   (or --teacher, a checkpoint of train_teacher.py)"
    print(command, flush=True)  # a full disk or a closed pipe is met here, not at Python's end


if __name__ == "__main__":
    run_script(main)
