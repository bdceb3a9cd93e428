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
import struct
import zipfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # endless spinning makes a busy machine ten times slower
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from kernels import BatchNorm2d, bn_lif
from train_teacher import (
    DEPTHS,
    BasicBlock,
    Bottleneck,
    Parser,
    ResNet,
    check_classes,
    check_writable,
    earlier_run,
    fail,
    list_folder,
    load_checkpoint,
    make_checkpoint,
    number,
    read,
    read_image,
    run_identity,
    run_script,
    save_checkpoint,
    sha256_file,
    world_size,
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
    """(arguments, teacher), in two passes as in timm's train.py: the file of --src decides some of
    the defaults, and --help shows them."""
    # the teacher, and the student's network
    p = Parser(description="Stage 2: initialise a Spiking ResNet from a trained ResNet.")
    p.add_argument("--src",
                   help="the teacher: a checkpoint of train_teacher.py, or a ResNet's weights "
                        "under torchvision's names, of torch.save or safetensors")
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
    p.add_argument("--seed", type=number(int, 0, 99999), default=0,
                   help="of whatever stays fresh")
    p.add_argument("--out", default="snn_init.pt", help="checkpoint to write")
    p.add_argument("--fresh", action="store_true", help="write --out anew, whatever stands there")

    # the neuron's defaults stand above; width and data are the teacher's
    p.set_defaults(**asdict(Neuron()))
    first, _ = p.parse_known_args(argv)
    teacher = None
    if first.src and (os.path.isfile(first.src) or not first.help):
        teacher = load_teacher(first.src)
        p.set_defaults(width=teacher["arch"]["width"],
                       dataset=teacher["config"].get("dataset", "cifar100"))  # elsewhere: unnamed
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
            group=dist.group.WORLD if world_size() > 1 else None)
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
    -> to" or "fresh"). Raises ValueError, before anything is copied, if the source has other blocks
    than the student, or lacks what should be copied, whole and finite.
    """
    target = student.state_dict()
    if is_bottleneck(source) != is_bottleneck(target):
        kinds = {False: "basic blocks (ResNet-18, 34)", True: "bottlenecks (ResNet-50, 101, 152)"}
        raise ValueError(f"the teacher has {kinds[is_bottleneck(source)]}, the student "
                         f"{kinds[is_bottleneck(target)]}: give --depth of the same kind")
    fresh = [] if classifier == "transfer" else ["fc."]
    if stem_kernels(source) != stem_kernels(target):  # 3x3 and 7x7 have no common index
        fresh += ["conv1.", "bn1."]

    # where every tensor comes from
    origins, rows = {}, {}  # rows: of the table, by layer
    for name, tensor in target.items():
        if name.startswith(tuple(fresh)) or (shortcut == "fresh" and ".downsample." in name):
            rows[name.rpartition(".")[0]] = ("", "fresh")
            continue
        origin = name
        if name.startswith("layer"):  # the block of the same stage that fills it (Figure 2b)
            stage, j, rest = name.split(".", 2)
            k = source_block(int(j), blocks(target, stage), blocks(source, stage), block_map)
            origin = f"{stage}.{k}.{rest}"
        if origin not in source and name.endswith("num_batches_tracked"):
            continue  # a counter that weights older than PyTorch 0.4.1 lack, and nothing reads
        if origin not in source:
            raise ValueError(f"it has no {origin}, which should fill the student's {name}")
        value = source[origin]
        if value.dim() != tensor.dim() or value.shape[2:] != tensor.shape[2:]:
            raise ValueError(f"its {origin} is {size(value)}, which cannot fill {size(tensor)}")
        if not value.isfinite().all():
            raise ValueError(f"its {origin} is not finite")
        origins[name] = origin
        how = "copied"
        if value.shape != tensor.shape:
            how = f"looped {size(value)} -> {size(tensor)}"
        # a layer's first tensor, its weight, speaks for the layer
        rows.setdefault(name.rpartition(".")[0], (origin.rpartition(".")[0], how))

    # kernel by kernel, or number by number in the four vectors of a batch norm (Figure 3)
    for name, origin in origins.items():
        target[name].copy_(loop(source[origin], target[name].shape))
    return [(layer, *row) for layer, row in rows.items()]


def stem_kernels(weights):
    """Height and width of the kernels before the first stage."""
    return [v.shape[2:] for name, v in weights.items() if name.startswith("conv1.")]


def resnet_arch(weights):
    """The arguments of the `ResNet` whose state dict this is, read off names and shapes; with
    num_classes 0 if it has no classifier.

    Tensors beyond the network's (the head of another task) are let pass. Raises ValueError where
    it is another network: stages of other lengths, other shapes (ResNeXt's grouped convolutions),
    a tensor too many or too few; and where a value is not finite.
    """
    stem = weights.get("conv1.weight", torch.empty(0))
    if stem.dim() != 4 or stem.numel() == 0:
        raise ValueError("it has no conv1.weight of four dimensions")
    # the depth is told by the kind of blocks and their number in each stage
    block = Bottleneck if is_bottleneck(weights) else BasicBlock
    counts = tuple(blocks(weights, f"layer{stage}") for stage in (1, 2, 3, 4))
    depth = next((d for d, kind in DEPTHS.items() if kind == (block, counts)), None)
    if depth is None:
        raise ValueError(f"its four stages have {counts} blocks ({block.__name__}), as no ResNet "
                         f"of {', '.join(map(str, DEPTHS))} layers")
    # stem and classifier are as wide as their tensors; size(kernel) is "3x3" or "7x7"
    head = {"fc.weight", "fc.bias"} <= weights.keys()
    arch = dict(depth=depth, num_classes=weights["fc.bias"].numel() if head else 0,
                in_channels=stem.shape[1], width=stem.shape[0], stem=size(stem[0, 0]))

    # what it should hold, name by name: shapes without memory
    with torch.device("meta"):
        expected = ResNet(**arch | dict(num_classes=arch["num_classes"] or 1)).state_dict()
    for name, tensor in expected.items():
        # what may be absent: the counter that old PyTorch did not keep, and another task's head
        value = weights.get(name)
        if name.endswith("num_batches_tracked") or (name.startswith("fc.") and not head):
            continue
        if value is None or value.shape != tensor.shape:
            found = "missing" if value is None else size(value)
            raise ValueError(f"its {name} is {found}, a ResNet-{depth}'s is {size(tensor)}: "
                             "another network (ResNeXt, a wide ResNet) or a part of one")
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"its {name} has values that are not finite floating-point numbers")
    # a tensor too many, as of squeeze-and-excitation, would change what the network computes
    for name in weights:
        if name.startswith(("conv", "bn", "layer")) and name not in expected:
            raise ValueError(f"it has {name}, a ResNet-{depth} has not: another network")
    return arch


def is_bottleneck(weights):
    # a basic block ends with its second convolution
    return "layer1.0.conv3.weight" in weights


def blocks(weights, stage):
    """How many blocks a stage has in a state dict."""
    return len({name.split(".")[1] for name in weights if name.startswith(f"{stage}.")})


def size(tensor):
    # as in a flag or a message: "64x3x7x7"
    return "x".join(map(str, tensor.shape))


# ---------------------------------------------------------------------------- files of a teacher
# torch.save's first bytes before PyTorch 1.6, and the number types of safetensors in weights
LEGACY = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
SAFETENSORS = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
                   I64=torch.int64)  # the last for num_batches_tracked


def load_teacher(path):
    """A checkpoint of train_teacher.py, or weights from elsewhere in the same form: `model` and
    `arch` as read off them, `data` None, `config` empty, and `notes` for the user."""
    if not os.path.isfile(path):
        return load_checkpoint(path, "teacher")  # which says what is wrong with it
    notes = []
    try:
        content, unchecked = read_weights(path)
        # our own format is checked where it is defined
        if isinstance(content, dict) and {"format", "stage"} <= content.keys():
            return load_checkpoint(path, "teacher")
        weights, unused = find_resnet(content)
        arch = resnet_arch(weights)
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror or error})")
    except ValueError as error:
        fail(f"{path} is not a checkpoint of train_teacher.py, nor the weights of a ResNet under "
             f"torchvision's names: {error}")
    # nothing is passed over in silence
    if unchecked:
        notes.append(f"{path} is {unchecked}, which has no checksums: damage may go unseen")
    if unused:
        notes.append(f"no part of the ResNet in {path}, not used: {listed(unused)}")
    return dict(model=weights, arch=arch, data=None, config={}, notes=notes)


def read_weights(path):
    """(content of the file, its format where that has no checksums, else None).

    Reads torch.save's archive, torch.save's format from before PyTorch 1.6, and safetensors; code
    in a file is never run. Raises ValueError that says what the file is instead.
    """
    # what a file is, its first bytes say; its name may say anything
    with open(path, "rb") as f:
        head = f.read(32)
    try:
        # weights_only: what is no tensor or plain value is refused, in the old format too
        if LEGACY in head:
            content = torch.load(path, map_location="cpu", weights_only=True)
            return content, "of torch.save from before PyTorch 1.6"
        if head[8:9] == b"{":  # the header's JSON, after its length
            return read_safetensors(path), "a safetensors file"
        # what is left is torch.save's archive, with checksums, or nothing we know;
        # torch.load hands TorchScript, which is code, to another reader, and warns
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError("a TorchScript archive")
        return read(path), None
    except Exception as error:  # zipfile, json and the unpickler raise a dozen kinds
        reason = str(error).partition("\n")[0][:100] or type(error).__name__
        # the one reason that has a remedy: the file holds an object, as torch.save(network) writes
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            reason = (f"needs Python's {refused[1]}, and only tensors and plain values are "
                      "read: save its state_dict()")
        raise ValueError(f"it begins with {head[:8]!r} and is truncated, damaged or of another "
                         f"kind ({reason})") from None


def read_safetensors(path):
    """{name: tensor}: the header's length (uint64), the header (JSON), the tensors' bytes."""
    raw = bytearray(Path(path).read_bytes())
    body = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:body])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        # bytes counted from the header's end, little-endian, in C order
        first, last = entry["data_offsets"]
        content = raw[body + first:body + last]
        flat = torch.frombuffer(content, dtype=SAFETENSORS[entry["dtype"]])
        tensors[name] = flat.view(entry["shape"])  # raises where bytes are missing
    return tensors


def find_resnet(content):
    """(state dict, names of the tensors beside it) of the one ResNet in `content`, however nested
    (`state_dict`, `model`) and prefixed (`module.`, an encoder's name).

    Raises ValueError, saying what there is, if there is none or more than one.
    """
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict of tensors")
    mark = "layer1.0.conv1.weight"  # in every ResNet, once
    found, names = [], []  # (where, prefix, its dict); all tensors, for the message
    for path, values in dicts(content):
        tensors = {str(name): v for name, v in values.items() if isinstance(v, torch.Tensor)}
        names += tensors
        # whatever stands before the mark stands before every name of this network
        for name in tensors:
            prefix, here, rest = name.rpartition(mark)
            if here and not rest and prefix[-1:] in ("", "."):
                found.append((path, prefix, tensors))
    # none: tensors of another network, or no tensors at all
    if not found:
        raise ValueError(f"it has no {mark}, but {listed(names or content)}")
    # MoCo's two encoders, timm's averaged weights: which one is meant, only the user knows
    if len(found) > 1:
        places = [path + prefix for path, prefix, _ in found]
        raise ValueError(f"it holds {len(found)} networks, {listed(places)}: save one alone")

    # what stands beside it is named: it may be the head of another task, or a surprise
    _, prefix, tensors = found[0]
    weights = {name.removeprefix(prefix): value for name, value in tensors.items()
               if name.startswith(prefix)}
    used = ("conv1.", "bn1.", "layer", "fc.weight", "fc.bias")
    unused = [name for name in tensors
              if not name.startswith(tuple(prefix + name for name in used))]
    return weights, unused


def dicts(content, path=""):
    """Every dict in a dict of dicts, after the keys that lead there."""
    yield path, content
    for key, value in content.items():
        if isinstance(value, dict):
            yield from dicts(value, f"{path}{key}/")


def listed(names, most=4):
    """The first few of many names, and how many there are."""
    names = list(map(str, names))
    rest = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


# ----------------------------------------------------------------------------------------- main
CIFAR = dict(cifar10=10, cifar100=100)  # classes, whose names only the data themselves tell


def describe_dataset(dataset, taught):
    """name, classes (None: not known here) and shape of --dataset, without reading all its pixels.

    taught: the description in the teacher's file, if it learnt from that data set.
    """
    # what cannot change, or is not here to be asked
    if taught and not os.path.isdir(dataset):
        return dict(taught)
    if dataset in CIFAR:
        return dict(name=dataset, classes=None, shape=[3, 32, 32])
    if dataset == "digits":
        return dict(name=dataset, classes=[str(d) for d in range(10)], shape=[1, 8, 8])
    # a folder's classes may have changed since the teacher saw them
    try:
        train, test = list_folder(Path(dataset), skipped=[])
        if taught:
            return taught | dict(classes=list(train))
        paths = [path for split in (train, test) for files in split.values() for path in files]
        H, W, channels = read_image(paths[0]).shape
        # as stage 3 will read them: grey only if all are grey
        if any(read_image(path).shape[2] == 3 for path in paths):
            channels = 3
    except (OSError, ValueError) as error:
        fail(f"--dataset {dataset}: {error}")
    return dict(name=dataset, classes=list(train), shape=[channels, H, W])


def main(argv=None):
    # arguments, and with them the teacher, who says what some are by default
    args, teacher = parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("runs as one process: call it without torchrun")
    weights, taught = teacher["model"], teacher["data"]
    own = "provenance" in teacher  # by train_teacher.py, and so something to distil from

    # the data: the teacher's, or those of --dataset; what its labels mean goes into the checkpoint
    same = args.dataset == teacher["config"].get("dataset")
    data = describe_dataset(args.dataset, taught if same else None)
    num_classes = len(data["classes"] or range(CIFAR[args.dataset]))

    # an earlier result of the same command stands, another's is not overwritten
    parents = {"teacher": dict(path=args.src, sha256=sha256_file(args.src), bare=not own)}
    identity = run_identity(args, "init", parents=parents)
    identity["data"] = [num_classes, data["classes"], data["shape"]]  # all that counts here
    earlier_run(args, "init", identity)

    # the teacher's classifier serves its own classes alone, in their order
    if args.classifier == "transfer":
        known = len(weights.get("fc.weight", []))
        if known != num_classes:
            fail(f"argument --classifier: transfer needs a teacher of as many classes; {args.src} "
                 f"knows {known}, {args.dataset} has {num_classes}")
        check_classes(data["classes"] or [], taught, "teacher", args.src)
        # where the names are not known here, stage 3 will have them to compare
        if taught:
            data["classes"] = taught["classes"]

    # the student: small images keep their size in the stem
    stem = args.stem
    if stem == "auto" and same:
        stem = teacher["arch"]["stem"]
    elif stem == "auto":
        stem = "3x3" if max(data["shape"][1:]) <= 64 else "7x7"
    arch = dict(depth=args.depth, num_classes=num_classes, in_channels=data["shape"][0],
                width=args.width, stem=stem, block=args.block, encoder=args.encoder,
                T=args.T, decay=args.decay, v_th=args.v_th, lens=args.lens,
                detach_reset=args.detach_reset)
    # fresh, as the seed says
    torch.manual_seed(args.seed)
    student = SpikingResNet(**arch)

    # the transfer, for which the teacher has to fit
    try:
        rows = transfer(student, weights, args.block_map, args.shortcut, args.classifier)
    except ValueError as error:
        fail(f"{args.src}: {error}")

    # save; the next stage reads all it needs to know from this file
    checkpoint = make_checkpoint("init", arch, student, args, identity, data, parents)
    save_checkpoint(args.out, checkpoint)

    # what was done, layer by layer, and what comes next
    console = Console(highlight=False, soft_wrap=True, markup=False)  # [x] in a path is a path
    table = Table("layer of the student", "from the teacher's", "how", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in teacher.get("notes", []):
        console.print(f"note: {note}")
    # how many of the numbers that training will change came from the teacher
    fresh = {layer for layer, _, how in rows if how == "fresh"}
    counts = {name: p.numel() for name, p in student.named_parameters()}
    total = sum(counts.values())
    left = sum(n for name, n in counts.items() if name.rpartition(".")[0] in fresh)
    console.print(f"{args.out}: Spiking ResNet-{args.depth} ({args.block} blocks, width "
                  f"{args.width}, T {args.T}) for {args.dataset}; {total - left:,} of {total:,} "
                  f"parameters from {args.src}, {left:,} fresh")
    # the next command; weights from elsewhere know no classes: nothing to distil from
    command = f"python train_idsnn.py --init {shlex.quote(args.out)}"
    if own:
        console.print(f"next: {command}")
    else:
        console.print(f"next: {command} --no-kd   (or --teacher, a checkpoint of train_teacher.py)")


if __name__ == "__main__":
    run_script(main)
