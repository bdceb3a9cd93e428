"""Stage 2: build the Spiking ResNet and fill it from the teacher (paper, section 3.2)  ->  snn_init.pt

    python transfer_init.py --src r34.pt                          # Spiking ResNet-18, T = 4, of the teacher's width
    python transfer_init.py --src r34.pt --block sew --T 6        # Spike-Element-Wise blocks, six time-steps
    python transfer_init.py --src resnet34.pth --dataset cifar10  # torchvision's or timm's ResNet weights

From top to bottom: the flags, the spiking network, the transfer, main().
"""
import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from kernels import bn_lif
from train_teacher import (DEPTHS, BasicBlock, BatchNorm2d, Bottleneck, Parser, ResNet, check_classes, earlier_run, fail, folder_classes, image,
                           load_checkpoint, make_checkpoint, number, run, run_identity, save_checkpoint, sha256_file, weights, world_size)


def parse_args(argv=None):
    p = Parser(description="Stage 2: initialise a Spiking ResNet from a trained ResNet.")
    p.add_argument("--src", required=True, help="the teacher: a checkpoint of train_teacher.py, or a ResNet's bare state dict")
    p.add_argument("--depth", type=number(int, 18, 152), default=18, choices=DEPTHS, help="layers of the Spiking ResNet (default 18)")
    p.add_argument("--width", type=number(int, 1, 4096), help="channels of its first stage (default: the teacher's)")
    p.add_argument("--block", default="basic", choices=["basic", "sew"], help="basic: LIF after the residual add (Fig. 1b, default); sew: before it (Fig. 1c)")
    p.add_argument("--block-map", default="spread", choices=["spread", "first"], help="which teacher block fills block j of a stage: at its relative position (the paper's text, default), or block min(j, n-1) (the authors' code)")
    p.add_argument("--shortcut", default="transfer", choices=["transfer", "fresh"], help="downsampling shortcuts: transferred (default), or left fresh as in the authors' code")
    p.add_argument("--classifier", default="fresh", choices=["fresh", "transfer"], help="fully connected layer: fresh, as in the paper (default), or the teacher's")
    p.add_argument("--encoder", default="direct", choices=["direct", "poisson"], help="the image as current at every step (default), or spikes of probability pixel/255 (Algorithm 1)")
    p.add_argument("--stem", default="auto", choices=["auto", "3x3", "7x7"], help="first convolution; auto: the teacher's, or by the image size of --dataset")
    add_neuron_flags(p, T=4, decay=0.25, v_th=0.5, lens=0.5, detach_reset=True)
    p.add_argument("--dataset", help="data the network is meant for (default: the teacher's; cifar100 for a bare state dict)")
    p.add_argument("--seed", type=number(int, 0, 99999), default=0, help="of whatever stays fresh (default 0)")
    p.add_argument("--out", default="snn_init.pt", help="checkpoint to write (default snn_init.pt)")
    p.add_argument("--fresh", action="store_true", help="write --out anew, whatever stands there")
    return p.parse_args(argv)


def add_neuron_flags(p, T, decay, v_th, lens, detach_reset):
    """Time-steps and constants of the neuron; defaults of None mean: inherited."""
    default = lambda value: "(default: as in --init)" if value is None else f"(default {value})"
    p.add_argument("--T", type=number(int, 1, 32), default=T, help=f"time-steps {default(T)}")
    p.add_argument("--decay", type=number(float, 0, 1), default=decay, help=f"share of the potential that a step keeps, exp(-1/tau) of eq. 2 {default(decay)}")
    p.add_argument("--v-th", type=number(float, 0, 1e3, above=True), default=v_th, help=f"firing threshold, eq. 3 {default(v_th)}")
    p.add_argument("--lens", type=number(float, 0, 1e3, above=True), default=lens, help=f"half-width of the surrogate's window around it, eq. 4 {default(lens)}")
    p.add_argument("--detach-reset", default=detach_reset, action=argparse.BooleanOptionalAction, help=f"no gradient through the reset, as in the authors' code {default(detach_reset)}")


# ---------------------------------------------------------------------------------------- spiking network
@dataclass
class Neuron:
    """The LIF neuron of eq. 2-4: one object shared by all layers of a network, so that `net.neuron.T = 8` reaches all."""
    T: int = 4
    decay: float = 0.25
    v_th: float = 0.5
    lens: float = 0.5
    detach_reset: bool = True


class BatchNormLIF(BatchNorm2d):
    """Batch norm over T, B, H, W, optional residual add, LIF: BatchNormReLU's place in the student.

    x and residual: (T*B, C, H, W), T outermost -> spikes of that shape. static=True: x is (B, C, H, W), the same current
    at every step (the stem under direct coding), normalised once. Every call starts at potential 0: there is no state to reset.
    """

    def __init__(self, channels, neuron):
        super().__init__(channels)
        self.neuron = neuron

    def forward(self, x, residual=None, static=False):
        n = self.neuron
        x, residual = (v if v is None or static else v.unflatten(0, (n.T, -1)) for v in (x, residual))  # (T*B, ...) -> (T, B, ...)
        statistics = (None, None) if self.training else (self.running_mean, self.running_var)
        spikes, mean, var, count = bn_lif(
            x, self.weight, self.bias, residual, *statistics, T=n.T if static else None, eps=self.eps, decay=n.decay, v_th=n.v_th,
            lens=n.lens, detach_reset=n.detach_reset, group=dist.group.WORLD if world_size() > 1 else None)
        if self.training:
            self.update_statistics(mean, var, count)
        return spikes.flatten(0, 1)  # (T, B, C, H, W) -> (T*B, C, H, W)


class SEWBasicBlock(BasicBlock):
    """Figure 1c: the LIF stands before the add, so identity shortcuts carry spikes unchanged; sums reach 2 and more."""

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)))) + self.downsample(x)


class SEWBottleneck(Bottleneck):
    def forward(self, x):
        return self.bn3(self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x)))))) + self.downsample(x)


SEW = {BasicBlock: SEWBasicBlock, Bottleneck: SEWBottleneck}


class SpikingResNet(ResNet):
    """The teacher's ResNet with LIF neurons in place of ReLU, under the same parameter names (paper, section 3.2.1).

    Fresh, it is the authors' baseline: PyTorch's default for convolutions, batch-norm weights equal to v_th (tdBN).
    """

    def __init__(self, depth=18, num_classes=100, in_channels=3, width=64, stem="3x3", block="basic", encoder="direct",
                 T=4, decay=0.25, v_th=0.5, lens=0.5, detach_reset=True):
        neuron = Neuron(T, decay, v_th, lens, detach_reset)
        norm_act = partial(BatchNormLIF, neuron=neuron)
        sew = dict(norm=norm_act, block=SEW[DEPTHS[depth][0]]) if block == "sew" else {}
        super().__init__(depth, num_classes, in_channels, width, stem, norm_act=norm_act, **sew)
        self.neuron, self.encoder = neuron, encoder
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.constant_(m.weight, v_th)

    def forward(self, x):
        """Analogue images (B, C, H, W), the same at every step, or spikes (T, B, C, H, W) -> class scores (T, B, K).

        The network's answer is their mean over T; `scores[:t].mean(0)` is what it would have said after t steps.
        """
        static = x.dim() == 4
        x = self.bn1(self.conv1(x if static else x.flatten(0, 1)), static=static)  # -> (T*B, width, H, W)
        return self.fc(self.features(x)).unflatten(0, (self.neuron.T, -1))         # (T*B, K) -> (T, B, K)

    def encode(self, x, data, seed, world=1, rank=0):
        """uint8 pixels (B, C, H, W) -> the network's input: normalised, or Poisson spikes (T, B, C, H, W) (Algorithm 1).

        A spike has probability pixel/255; the noise is drawn on the CPU for the batch of all `world` processes, so it is
        the same on every device and at every world size.
        """
        if self.encoder == "direct":
            return data.normalize(x)
        g = torch.Generator().manual_seed(seed)
        B, *pixel = x.shape
        noise = torch.randint(255, (world * B, self.neuron.T, *pixel), dtype=torch.uint8, generator=g)  # 0..254: P(x > noise) = x/255
        noise = noise[rank * B: (rank + 1) * B].transpose(0, 1).to(x.device)  # -> (T, B, C, H, W)
        return (x > noise).to(data.offset.dtype)


# ----------------------------------------------------------------------------------------------- transfer
def loop(source, shape):
    """Loop interpolation: target[i, j] = source[i % C_out, j % C_in] (paper, section 3.2.2, Figure 3); vectors likewise."""
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
    """Fill `student` in place from `source`, a ResNet's state dict; the classifier stays fresh (paper, sections 3.2.2, 3.3.2)
    unless classifier="transfer".

    Returns one row per layer: (name, layer of the source or "", what was done). Raises ValueError where the source has other
    blocks (basic against bottleneck), and KeyError where it lacks a tensor that should have been copied.
    """
    target = student.state_dict()
    if ("layer1.0.conv3.weight" in source) != ("layer1.0.conv3.weight" in target):
        kinds = ["basic blocks (ResNet-18, 34)", "bottlenecks (ResNet-50, 101, 152)"]
        raise ValueError(f"the teacher has {kinds['layer1.0.conv3.weight' in source]}, the student {kinds['layer1.0.conv3.weight' in target]}")
    blocks = lambda state, stage: len({k.split(".")[1] for k in state if k.startswith(stage + ".")})
    other_stem = source["conv1.weight"].shape[2:] != target["conv1.weight"].shape[2:]
    fresh = ("conv1.", "bn1.") * other_stem + ("fc.",) * (classifier == "fresh")
    rows = {}
    for name, tensor in target.items():
        layer, origin = name.rpartition(".")[0], name
        if name.startswith(fresh) or (shortcut == "fresh" and ".downsample." in name):
            rows[layer] = ("", "fresh")
            continue
        if name.startswith("layer"):
            stage, j, rest = name.split(".", 2)
            origin = f"{stage}.{source_block(int(j), blocks(target, stage), blocks(source, stage), block_map)}.{rest}"
        if origin not in source and name.endswith("num_batches_tracked"):  # absent from weights older than PyTorch 0.4.1
            continue
        value = source[origin]
        tensor.copy_(loop(value, tensor.shape))
        size = lambda t: "x".join(map(str, t.shape))
        looped = f"looped {size(value)} -> {size(tensor)}"
        if tensor.dim() and layer not in rows:
            rows[layer] = (origin.rpartition(".")[0], "copied" if value.shape == tensor.shape else looped)
    return [(layer, *row) for layer, row in rows.items()]


BUILT_IN = {"cifar10": (10, (3, 32, 32)), "cifar100": (100, (3, 32, 32)), "digits": (10, (1, 8, 8))}


def describe_dataset(dataset):
    """(number of classes, shape of an image) of --dataset, without reading more than a folder's first image."""
    if dataset in BUILT_IN:
        return BUILT_IN[dataset]
    classes = folder_classes(Path(dataset))
    first = next((f for f in sorted((Path(dataset) / "train" / classes[0]).glob("*")) if f.name[0] != "."), None)
    if first is None:
        fail(f"--dataset {dataset}: class {classes[0]!r} has no images in train/")
    try:
        pixels = image(first, None)
    except ValueError as error:
        fail(f"--dataset {dataset}: {error}")
    return len(classes), (3 if pixels.ndim == 3 else 1, *pixels.shape[:2])


def class_names(dataset):
    """The class names of --dataset, in order; None where they are known only with the data at hand (CIFAR's)."""
    return [str(d) for d in range(10)] if dataset == "digits" else None if dataset in BUILT_IN else folder_classes(Path(dataset))


def main(argv=None):
    args = parse_args(argv)
    teacher = load_checkpoint(args.src, "teacher", bare=True)
    parents = {"teacher": dict(path=args.src, sha256=sha256_file(args.src))}
    identity = run_identity(args, "init", parents=parents)
    earlier_run(args, "init", identity)

    # what the student inherits, and what --dataset says where the teacher's file is silent
    known, described, elsewhere = teacher.get("arch", {}), teacher.get("data"), args.dataset is not None
    if not known or args.dataset:
        args.dataset = args.dataset or "cifar100"
        classes, shape = describe_dataset(args.dataset)
        known = dict(num_classes=classes, in_channels=shape[0], stem="3x3" if max(shape[1:]) <= 64 else "7x7",
                     width=known.get("width", teacher["model"]["conv1.weight"].shape[0]))
    args.dataset = args.dataset or teacher["config"]["dataset"]
    arch = dict(depth=args.depth, num_classes=known["num_classes"], in_channels=known["in_channels"], width=args.width or known["width"],
                stem=known["stem"] if args.stem == "auto" else args.stem, block=args.block, encoder=args.encoder,
                T=args.T, decay=args.decay, v_th=args.v_th, lens=args.lens, detach_reset=args.detach_reset)

    if args.classifier == "transfer" and (taught := len(teacher["model"].get("fc.weight", []))) != arch["num_classes"]:
        fail(f"argument --classifier: transfer needs a teacher of as many classes; {args.src} knows {taught}, {args.dataset} has {arch['num_classes']}")

    if described and elsewhere:  # the student's labels are those of --dataset
        names = class_names(args.dataset)
        if args.classifier == "transfer" and names:
            check_classes(names, described, "teacher", args.src)
        described = described if described["name"] == args.dataset and names is None else dict(name=args.dataset, classes=names)

    torch.manual_seed(args.seed)
    student = SpikingResNet(**arch)
    try:
        rows = transfer(student, teacher["model"], args.block_map, args.shortcut, args.classifier)
    except ValueError as error:
        fail(f"{args.src}: {error}: give --depth of the same kind")
    except (KeyError, IndexError, RuntimeError) as error:
        fail(f"{args.src} does not hold the weights of a ResNet under torchvision's names ({str(error).splitlines()[0]})")

    table = Table("layer of the student", "from the teacher's", "how", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    save_checkpoint(args.out, make_checkpoint("init", arch, weights(student), args, identity, data=described, parents=parents))
    count = lambda fresh: sum(p.numel() for name, p in student.named_parameters() if (name.rpartition(".")[0] in fresh))
    fresh = {layer for layer, _, how in rows if how == "fresh"}
    total = sum(p.numel() for p in student.parameters())
    console.print(f"{args.out}: Spiking ResNet-{args.depth} ({args.block} blocks, width {arch['width']}, T {args.T}) for {args.dataset}; "
                  f"{total - count(fresh):,} of {total:,} parameters from {args.src}, {count(fresh):,} fresh")


if __name__ == "__main__":
    run(main)
