"""Stage 1: train the teacher, an ordinary ReLU ResNet (paper, sections 3.3.2 and 4.1)  ->  r34.pt

    python train_teacher.py                           # the paper's: ResNet-34 on CIFAR-100
    python train_teacher.py --dataset digits          # half a minute on a laptop
    torchrun --nproc-per-node 4 train_teacher.py      # four GPUs, the same global batch and result

From top to bottom: recipe, data, network, evaluation, main(); then what all stages import from
here: flags and errors, device and training step, checkpoints, runs and restarts.
"""
import argparse
import ctypes
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import time
import warnings
import zipfile
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# OpenMP threads that spin endlessly make a busy machine ten times slower
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from torch import nn

from kernels import BatchNorm2d, Conv2d

# ------------------------------------------------------------------------------------------ recipe
# from the paper, sections 4.1 and 4.4 (milestones); crop and flip from the authors' code
PAPER = dict(
    epochs=200,         # passes over the training set
    batch_size=64,      # images a step, over all processes
    lr=0.05,            # peak learning rate of SGD
    momentum=0.9,
    nesterov=False,
    weight_decay=1e-4,  # L2 penalty on every parameter
    schedule="step",    # x0.1 after 30, 60, 80% of the epochs; or "linear", "cosine": down to 0
    warmup=0.0,         # share of the run in which the rate rises from 0
    crop_padding=4,     # pixels of zeros around an image before the random crop
    flip=True,          # mirror half of the training images
)
# a fifth of the epochs; batches four times as large, and the rate with them: 76.03% on CIFAR-100,
# 57 s in epochs on one H200 (results/h200/table3/teacher.jsonl)
FAST = PAPER | dict(
    epochs=40, batch_size=256, lr=0.2, nesterov=True, weight_decay=5e-4, schedule="linear",
    warmup=0.25)
# over either of them for the digits, 1,437 images of 8x8 pixels; a mirrored 2 is not a 2
DIGITS = dict(
    epochs=20, batch_size=64, lr=0.05, schedule="linear", warmup=0.25, crop_padding=1, flip=False)
RECIPES = dict(paper=PAPER, fast=FAST)


def parse_args(argv=None):
    p = Parser("Stage 1: train the teacher ResNet.")
    p.add_argument("--dataset", type=os.path.expanduser, default="cifar100",
                   help="cifar10, cifar100, digits, or a folder of train/<class>/*, test/<class>/*")
    p.add_argument("--depth", type=int, choices=DEPTHS, default=34, help="layers of the ResNet")
    p.add_argument("--width", type=number(int, 1), default=64, help="channels of its first stage")
    p.add_argument("--stem", choices=["auto", "3x3", "7x7"], default="auto",
                   help="7x7: ImageNet's, with max-pool; auto: 3x3 for images up to 64 pixels")
    add_training_flags(p, out="r34.pt")
    return p.parse_with_recipe(argv, RECIPES, DIGITS | dict(width=16))


def add_training_flags(p, out):
    """The flags that both training stages have; a recipe says the defaults of the first ones."""
    add, yes_no = p.add_argument, argparse.BooleanOptionalAction
    add("--recipe", choices=["paper", "fast"], default="paper",
        help="defaults of --epochs to --flip; fast: for tens of thousands of images, as in CIFAR")
    add("--epochs", type=number(int, 1), help="passes over the training set")
    add("--batch-size", type=number(int, 2),
        help="images per step, over all processes; scale --lr with it")
    # the optimizer and its rate
    add("--lr", type=number(float, 1e-9), help="peak learning rate of SGD")
    add("--momentum", type=number(float, 0, 1), help="momentum of SGD")
    add("--nesterov", action=yes_no, help="Nesterov's momentum")
    add("--weight-decay", type=number(float, 0), help="L2 penalty on every parameter")
    add("--schedule", choices=["step", "cosine", "linear"],
        help="step: x0.1 at milestones; others: down to 0")
    add("--milestones", type=milestones, metavar="E,E,...", help="epochs of --schedule step")
    add("--warmup", type=number(float, 0, 0.99), help="share of the run before the peak rate")
    # augmentation
    add("--crop-padding", type=number(int, 0), help="zeros around an image before its crop")
    add("--flip", action=yes_no, help="mirror half of the training images")
    # where and how it runs
    add("--precision", choices=["auto", "bf16", "fp16", "fp32", "fp64"], default="auto",
        help="auto: bf16 if the hardware multiplies it, else fp16 on GPUs, fp32 on CPUs")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any")
    add("--graph", action=yes_no, default=True, help="training steps as CUDA graphs, but for fp16")
    add("--deterministic", action="store_true", help="bit-equal runs on GPUs, too; slower")
    add("--seed", type=number(int, 0), default=0, help="of initial weights, order, augmentation")
    # files
    add("--data-dir", type=os.path.expanduser, default="data", help="where downloads are kept")
    add("--out", type=output, default=out, help="checkpoint; beside it <out>.jsonl, <out>.last")
    add("--fresh", action="store_true", help="start over, whatever an earlier run left at --out")


def learning_rate(args, epoch):
    """The rate at `epoch`, which counts fractions: linear warm-up, then the schedule."""
    done = epoch / args.epochs
    if done < args.warmup:
        return args.lr * done / args.warmup
    left = (1 - done) / (1 - args.warmup)  # 1 at the peak, 0 at the end
    if args.schedule == "step":
        return args.lr * 0.1 ** sum(epoch >= m for m in args.milestones)
    if args.schedule == "cosine":
        return args.lr * (0.5 - 0.5 * math.cos(math.pi * left))
    return args.lr * left


# -------------------------------------------------------------------------------------------- data
@dataclass
class Images:
    """A whole data set on one device: uint8 pixels (N, H, W, C), int64 labels (N,)."""
    name: str
    classes: list  # class names; a label is an index into them
    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    def __post_init__(self):
        # a view cannot be hashed
        self.train_x, self.test_x = self.train_x.contiguous(), self.test_x.contiguous()
        H, W, C = self.train_x.shape[1:]
        self.shape = (C, H, W)
        # mean and standard deviation a channel, from a histogram: exact, without a float copy
        level = torch.arange(256, dtype=torch.float64) / 255
        self.mean, self.std = [], []
        for c in range(C):
            count = torch.bincount(self.train_x[..., c].flatten(), minlength=256).double()
            mean = count @ level / count.sum()
            variance = count @ (level - mean).square() / count.sum()
            self.mean.append(mean.item())
            self.std.append(max(variance.sqrt().item(), 1 / 255))  # constant: not 0
        digest = hashlib.sha256()  # of pixels and labels alone: a moved folder is the same data
        for tensor in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(tensor.numpy())
        self.sha256 = digest.hexdigest()

    def to(self, device, dtype, layout=torch.contiguous_format):
        """Move to `device`; `normalize` then returns `dtype` in the memory format `layout`."""
        for name in ("train_x", "train_y", "test_x", "test_y"):
            setattr(self, name, getattr(self, name).to(device))
        # allocated once, because a CUDA graph keeps addresses
        levels = 255 * torch.tensor([self.mean, self.std], dtype=dtype, device=device)  # (2, C)
        self.mean_level, self.std_level = levels.view(2, -1, 1, 1)
        self.layout = layout
        return self

    def normalize(self, x):
        """uint8 (B, C, H, W) -> zero mean and unit variance a channel over the training set."""
        # in the network's memory format: all layers would inherit that of the images
        return ((x - self.mean_level) / self.std_level).clone(memory_format=self.layout)

    def describe(self):
        """What a checkpoint records of the data."""
        return dict(name=self.name, classes=self.classes, shape=list(self.shape),
                    mean=self.mean, std=self.std, sha256=self.sha256,
                    train=len(self.train_y), test=len(self.test_y))

    def __str__(self):
        size = "x".join(map(str, self.shape))
        return (f"{self.name}: {len(self.train_y):,} + {len(self.test_y):,} images of {size}, "
                f"{len(self.classes)} classes, sha256 {self.sha256[:12]}")


def load_data(dataset, data_dir):
    """The data set that --dataset names, on the CPU; ends with one line where that fails."""
    named = dict(digits=load_digits, cifar10=load_cifar, cifar100=load_cifar)
    try:
        return named.get(dataset, load_folder)(dataset, Path(data_dir))
    except (OSError, ValueError) as error:
        fail(f"--dataset {dataset}: {error}")


def load_digits(dataset, data_dir):
    """UCI's optical handwritten digits (CC BY 4.0), 8x8 pixels; every fifth image is held out."""
    raw = np.load(Path(__file__).with_name("data") / "digits.npz")
    pixels = (raw["images"].astype(np.uint16) * 255 // 16).astype(np.uint8)  # 0..16 -> 0..255
    x = torch.from_numpy(pixels)[..., None]  # (N, 8, 8) -> (N, 8, 8, 1)
    y = torch.from_numpy(raw["labels"]).long()
    test = torch.arange(len(y)) % 5 == 0  # bool (N,): every fifth
    return Images(dataset, list("0123456789"), x[~test], y[~test], x[test], y[test])


def load_cifar(dataset, data_dir):
    """CIFAR-10 or CIFAR-100. torchvision downloads it, once; its pixels and labels are kept in
    <data_dir>/<dataset>.images, which loads in 0.7 s, not 5 (results/loading-cpu.log). Delete that
    file if you change what is read here."""
    kept = data_dir / f"{dataset}.images"
    if rank() > 0:  # the first process downloads, the others read after it
        dist.barrier()
    if kept.exists():
        content, _ = read(kept)
    else:
        from torchvision import datasets  # here: a second to import, not beside every CPU build
        source = getattr(datasets, dataset.upper())
        train, test = (source(data_dir, train=split, download=True) for split in (True, False))
        # torchvision's pixels are a transposed view
        content = dict(
            classes=train.classes,
            train_x=torch.from_numpy(train.data).contiguous(),
            train_y=torch.tensor(train.targets),
            test_x=torch.from_numpy(test.data).contiguous(),
            test_y=torch.tensor(test.targets))
        if os.access(data_dir, os.W_OK):  # the folder may be read-only
            part = f"{kept}.{os.urandom(4).hex()}"  # another run may be writing it, too
            torch.save(content, part)
            os.replace(part, kept)
    if rank() == 0 and world_size() > 1:
        dist.barrier()
    return Images(dataset, **content)


def load_folder(dataset, data_dir):
    """Images of one size in train/<class>/* and test/<class>/* (or val/); grey if all are grey."""
    root = Path(dataset)
    held_out = "test" if (root / "test").is_dir() else "val"
    if not ((root / "train").is_dir() and (root / held_out).is_dir()):
        raise ValueError("is no folder of train/<class>/* and test/<class>/* (or val/<class>/*)")
    classes, train = list_images(root / "train")
    others, test = list_images(root / held_out)
    if odd := set(classes) ^ set(others):  # a label is an index into the list of classes
        raise ValueError(f"train/ and {held_out}/ differ in the class {min(odd)!r}")
    files, labels = zip(*train, *test)

    # pixels: of one size, in one mode. threads take twice as long (results/loading-cpu.log): most
    # of a small image is Python's own work, for which they queue
    images = [read_image(path) for path in files]
    H, W, C = images[0].shape
    for path, image in zip(files, images):
        h, w, c = image.shape
        if (h, w) != (H, W):
            raise ValueError(f"{path} is {w}x{h} pixels, {files[0]} {W}x{H}: make them one size")
        C = max(C, c)  # grey among colour: three equal channels
    x = np.stack([np.broadcast_to(image, (H, W, C)) for image in images])
    del images  # else a second copy of all pixels
    x, y = torch.from_numpy(x), torch.tensor(labels)
    n = len(train)
    return Images(str(root), classes, x[:n], y[:n], x[n:], y[n:])


def list_images(folder):
    """Class names and [(image file, label), ...] in `folder`, without hidden files and folders."""
    from torchvision.datasets.folder import find_classes, is_image_file, make_dataset
    classes = [name for name in find_classes(folder)[0] if name[0] != "."]
    labels = {name: i for i, name in enumerate(classes)}

    def shown(path):
        return is_image_file(path) and f"{os.sep}." not in path.removeprefix(str(folder))
    return classes, make_dataset(folder, labels, is_valid_file=shown)


def read_image(path):
    """The pixels of an image file as a viewer shows them: uint8 (H, W, 3), or (H, W, 1) if it is
    grey. Raises ValueError if it is damaged, or if 8 bits of either do not hold it exactly."""
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as im:
            # pillow calls 16 bits a channel RGB, too, and scales deeper ppm files to 8 bits
            deep = any(";16" in str(a) or codec[:3] == "ppm" for codec, _, _, a in im.tile)
            many = getattr(im, "n_frames", 1) > 1
            if im.mode not in ("1", "L", "P", "RGB") or deep or many or im.has_transparency_data:
                raise ValueError(f"{im.mode}, not one opaque image of 8 bits a channel: convert it")
            mode = "L" if im.mode in ("1", "L") else "RGB"
            pixels = np.asarray(ImageOps.exif_transpose(im).convert(mode))
    except Exception as error:  # a damaged file raises one of a dozen kinds
        raise ValueError(f"{path}: {error}") from None
    return pixels.reshape(*pixels.shape[:2], -1)  # (H, W) -> (H, W, 1)


class Batches:
    """Random batches, cropped and flipped on the data's device. All that is random is drawn on the
    CPU from (seed, epoch), for the global batch, then sliced by rank: the same on every device,
    with any number of processes, after a restart. The last batch, if incomplete, is dropped."""

    def __init__(self, data, args):
        C, H, W = data.shape
        self.data, self.args = data, args
        self.steps = len(data.train_y) // args.batch_size  # an epoch
        if self.steps == 0:
            fail(f"argument --batch-size: {args.batch_size} is more than the {len(data.train_y)} "
                 "training images: give a smaller one, and an --lr scaled likewise")
        # zeros on the raw pixels, as torchvision's RandomCrop
        pad = args.crop_padding
        self.padded = F.pad(data.train_x, (0, 0, pad, pad, pad, pad))  # (N, H, W, C)
        self.rows, self.cols = (torch.arange(n, device=self.padded.device) for n in (H, W))
        if not data.train_x.is_cuda and H * W <= 64:  # more threads would only wait
            torch.set_num_threads(1)

    def plan(self, epoch):
        """The epoch's draws, int64 (steps, 4, B / world size): index of the image, top and left of
        its crop, whether it is flipped."""
        g = torch.Generator().manual_seed(self.args.seed * 10_000 + epoch)
        n = self.steps * self.args.batch_size
        order = torch.randperm(len(self.data.train_y), generator=g)[:n]
        top, left = torch.randint(2 * self.args.crop_padding + 1, (2, n), generator=g)
        flip = torch.rand(n, generator=g) < (0.5 if self.args.flip else 0.0)
        plan = torch.stack([order, top, left, flip]).view(4, self.steps, world_size(), -1)
        return plan[:, :, rank()].transpose(0, 1).to(self.padded.device)

    def cut(self, plan):
        """(4, B) int64 -> uint8 images (B, C, H, W), channels-last, and their labels (B,)."""
        index, top, left, flip = plan
        y = top[:, None] + self.rows                                       # (B, H)
        x = torch.where(flip[:, None] > 0, self.cols.flip(0), self.cols)   # (B, W)
        x = x + left[:, None]
        images = self.padded[index[:, None, None], y[:, :, None], x[:, None, :]]  # (B, H, W, C)
        return images.permute(0, 3, 1, 2), self.data.train_y[index]


# ----------------------------------------------------------------------------------------- network
class BatchNormReLU(BatchNorm2d):
    """Batch norm, optional residual add, ReLU. In its place the student has BatchNormLIF."""

    def forward(self, x, residual=None):
        return super().forward(x, residual, relu=True)


def conv(c_in, c_out, kernel, stride=1):
    return Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)


def shortcut(c_in, c_out, stride, norm):
    """Identity, or, where the shape changes, a 1x1 convolution and batch norm."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return nn.Sequential(conv(c_in, c_out, 1, stride), norm(c_out))


class BasicBlock(nn.Module):
    """Figure 1a (1b with spikes): two 3x3 convolutions."""
    expansion = 1

    def __init__(self, c_in, c, stride, norm, norm_act):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c, 3, stride), norm_act(c)
        self.conv2, self.bn2 = conv(c, c, 3), norm_act(c)
        self.downsample = shortcut(c_in, c, stride, norm)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), self.downsample(x))


class Bottleneck(nn.Module):
    """ResNet-50 and deeper: 1x1, 3x3 (with the stride, as in torchvision), 1x1 to 4c channels."""
    expansion = 4

    def __init__(self, c_in, c, stride, norm, norm_act):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c, 1), norm_act(c)
        self.conv2, self.bn2 = conv(c, c, 3, stride), norm_act(c)
        self.conv3, self.bn3 = conv(c, 4 * c, 1), norm_act(4 * c)
        self.downsample = shortcut(c_in, 4 * c, stride, norm)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        return self.bn3(self.conv3(y), self.downsample(x))


DEPTHS = {  # layers: block, and how many of it in each of the four stages
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """ResNet under torchvision's parameter names, for teacher and student (paper, section 3.2.1).

    width: channels of the first stage. stem: "3x3", or "7x7" with max-pool. norm, norm_act: batch
    norm without and with (residual add and) activation. block: in place of the depth's own."""

    def __init__(self, depth=34, num_classes=100, in_channels=3, width=64, stem="3x3",
                 norm=BatchNorm2d, norm_act=BatchNormReLU, block=None):
        super().__init__()
        plain_block, counts = DEPTHS[depth]
        block = block or plain_block
        small = stem == "3x3"
        self.conv1 = conv(in_channels, width, 3) if small else conv(in_channels, width, 7, 2)
        self.bn1 = norm_act(width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        c_in = width
        for stage, count in enumerate(counts):
            c, blocks = width << stage, []  # channels double
            for j in range(count):
                stride = 2 if stage > 0 and j == 0 else 1  # each later stage halves the image
                blocks.append(block(c_in, c, stride, norm, norm_act))
                c_in = c * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(c_in, num_classes)

    def features(self, x):
        """Stem's activations (B, width, H, W) -> (B, features)."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.maxpool(x)))))
        return x.mean((2, 3))  # (B, C, H, W) -> (B, C)

    def forward(self, x):
        """(B, in_channels, H, W) -> class scores (B, num_classes)."""
        return self.fc(self.features(self.bn1(self.conv1(x))))


# -------------------------------------------------------------------------------------- evaluation
def evaluator(predict, data, args):
    """-> a function that returns (accuracy in %, mean cross-entropy) over the test set, of which
    each process takes a share. predict: uint8 images (B, C, H, W) and their indices in the test set
    (B,) -> class scores (B, K)."""
    N, device = len(data.test_y), data.test_y.device
    B = 4 * args.batch_size // world_size()  # no activations are kept, so there is room
    B = math.ceil(N / math.ceil(N / B))      # as equal as possible: one graph serves them all
    index = torch.empty(B, dtype=torch.long, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # correct, loss, over the images

    @torch.no_grad()
    def count(index):
        labels = data.test_y[index]
        scores = predict(data.test_x[index].permute(0, 3, 1, 2), index).double()
        loss = F.cross_entropy(scores, labels, reduction="sum")
        sums.add_(torch.stack([(scores.argmax(1) == labels).sum(), loss]))

    count_whole = recorded(partial(count, index), args, device)

    def evaluate():
        sums.zero_()
        batches = torch.arange(N, device=device).split(B)
        for batch in batches[rank()::world_size()]:
            if len(batch) == B:
                index.copy_(batch)
                count_whole()
            else:  # the last one may be shorter than what was recorded
                count(batch)
        if grouped():
            dist.all_reduce(sums)
        correct, loss = (sums / N).tolist()
        return 100 * correct, loss
    return evaluate


# -------------------------------------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    device, dtype, autocast, scaler = setup(args)
    earlier = earlier_run("teacher", args)

    # data: the whole set as uint8 on the training device
    layout = memory_format(device, args.width)
    data = load_data(args.dataset, args.data_dir).to(device, dtype, layout)
    batches = Batches(data, args)

    # model: initialised on the CPU, where a seed gives the same weights for every device
    torch.manual_seed(args.seed)
    stem = args.stem
    if stem == "auto":  # small images keep their size
        stem = "3x3" if max(data.shape) <= 64 else "7x7"
    refuse_narrow(data, stem, args)
    arch = dict(depth=args.depth, num_classes=len(data.classes), in_channels=data.shape[0],
                width=args.width, stem=stem)
    model = ResNet(**arch)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):  # He et al. 2015, for ReLU; the student keeps PyTorch's own
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    model.to(device, dtype, memory_format=layout)

    # optimizer: its rate is a tensor, so that a recorded step reads the current one
    lr = torch.tensor(args.lr, device=device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr, args.momentum, nesterov=args.nesterov,
        weight_decay=args.weight_decay, fused=device.type == "cuda")

    # resume: weights, momentum and history of an interrupted run of the same flags
    next_command = f"python transfer_init.py --src {shlex.quote(args.out)}"
    if DEPTHS[args.depth][0] is Bottleneck:  # which fills bottlenecks alone
        next_command += f" --depth {args.depth}"
    run = TrainingRun(args, data, model, optimizer, scaler, earlier, next_command,
                      stage="teacher", arch=arch, parents={})
    if run.finished:
        return

    # one training step, over buffers that are allocated once
    plan = torch.empty(4, args.batch_size // world_size(), dtype=torch.long, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, accuracy, over the steps

    def step():
        optimizer.zero_grad()
        images, labels = batches.cut(plan)                    # (B, C, H, W) uint8, (B,)
        with autocast:
            scores = model(data.normalize(images)).to(dtype)  # (B, K)
            loss = F.cross_entropy(scores, labels)
        scaler.scale(loss).backward()
        average_gradients(model)
        scaler.step(optimizer)
        scaler.update()
        accuracy = (scores.argmax(1) == labels).to(dtype).mean()
        sums.add_(torch.stack([loss.detach(), accuracy]))

    def predict(images, index):
        with autocast:
            return model(data.normalize(images))

    train_step = recorded(step, args, device)  # on a GPU one launch, not hundreds
    evaluate = evaluator(predict, data, args)

    # loop
    parameters = sum(p.numel() for p in model.parameters())
    run.header(
        teacher=f"ResNet-{args.depth}, width {args.width}, {stem} stem, {parameters:,} parameters",
        data=data)
    with run.bar:
        for epoch in range(len(run.history), args.epochs):
            model.train()
            began = time.time()
            sums.zero_()
            for i, planned in enumerate(batches.plan(epoch)):
                rate = learning_rate(args, epoch + (i + 0.5) / batches.steps)
                lr.fill_(rate)
                plan.copy_(planned)
                train_step()
                run.progress(epoch, i + 1, batches.steps, sums, began)
            average(sums)  # over the processes, each with its share of every batch
            loss, accuracy = (sums / batches.steps).tolist()
            trained = time.time() - began

            model.eval()
            test_acc, test_loss = evaluate()
            run.end_epoch(dict(
                epoch=epoch + 1, loss=loss, train_acc=100 * accuracy,
                test_loss=test_loss, test_acc=test_acc, lr=rate,
                images_per_s=batches.steps * args.batch_size / trained,
                seconds=time.time() - began))

    run.finish()


# ---------------------------------------------------------- shared by all stages: flags and errors
class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help shows the default of each flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with defaults in --help, no abbreviated flags, and an error in one line."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=Help)

    def error(self, message):
        fail(message)

    def first_pass(self, argv):
        """Parse what decides the defaults of other flags, before --help shows those."""
        argv = sys.argv[1:] if argv is None else argv
        return self.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]

    def parse_with_recipe(self, argv, recipes, digits):
        """Two passes, as timm's train.py: --help shows the values that will run."""
        first = self.first_pass(argv)
        recipe = recipes[first.recipe] | (digits if first.dataset == "digits" else {})
        epochs = first.epochs or recipe["epochs"]
        default = ",".join(f"{epochs * share:g}" for share in (0.3, 0.6, 0.8))
        self.set_defaults(**recipe, milestones=default)
        args = self.parse_args(argv)
        if first.milestones and args.schedule != "step":
            fail(f"argument --milestones: needs --schedule step, not {args.schedule}")
        if args.nesterov and not args.momentum:
            fail("argument --nesterov: needs a --momentum above 0")
        if args.batch_size % world_size():
            fail(f"argument --batch-size: {world_size()} processes cannot share {args.batch_size}")
        return args


def number(kind, low, high=10**9):
    """An argparse type: an int or float from `low` to `high`, no NaN, no infinity."""
    def parse(text):
        value = kind(text)  # argparse reports a ValueError with the flag's name
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: must be from {low:g} to {high:g}")
        return value
    parse.__name__ = kind.__name__
    return parse


def milestones(text):
    return [number(float, 0)(epoch) for epoch in text.split(",")]


def output(text):
    """An argparse type: a path at which a file can be written."""
    text = os.path.expanduser(text)  # in --out=~/r34.pt the shell leaves ~ as it is
    folders = Path(text).parent, Path(os.path.realpath(text)).parent  # where a link leads, too
    if Path(text).is_dir() or not all(f.is_dir() and os.access(f, os.W_OK) for f in folders):
        raise argparse.ArgumentTypeError(f"{text}: must be a file, in a folder that takes files")
    return text


def fail(message):
    """End with the user's mistake, in one line on stderr, said once a node."""
    if rank("LOCAL_RANK") == 0:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def run_script(main):
    """The entry point of a script: Ctrl-C ends it with one line."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: a training goes on from <out>.last, if it got that far, by the same "
              "command without --fresh", file=sys.stderr)
        raise SystemExit(130) from None  # as a shell counts what Ctrl-C ended
    finally:
        # after an error NCCL would wait here for messages that never come; the exit ends it, too
        failed = sys.exc_info()[0] is not None
        if grouped() and not (failed and dist.get_backend() == "nccl"):
            dist.destroy_process_group()


# ----------------------------------------------------------- shared by all stages: device and step
def world_size():
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank(name="RANK"):
    """Rank of this process ("LOCAL_RANK": on its node); 0 without torchrun, whatever the
    environment says."""
    return int(os.environ.get(name) or 0) if world_size() > 1 else 0


def grouped():
    """Whether this process is one of a process group, as torchrun starts them."""
    return dist.is_available() and dist.is_initialized()


def setup(args):
    """-> (device, parameters' dtype, autocast, gradient scaler); settles args.precision "auto"."""
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cpu")
    if cuda and not torch.cuda.is_available():
        fail("argument --device: cuda, but PyTorch sees no GPU")
    if cuda:
        device = torch.device("cuda", rank("LOCAL_RANK"))
        torch.cuda.set_device(device)
    elif sys.platform == "linux":
        # glibc maps and clears each tensor above 32 MB anew, a fifth of a step: keep what is freed
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)          # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes

    # processes: only the first one prints
    if world_size() > 1:
        if absent := {"RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
            fail(f"WORLD_SIZE is set in the environment, {min(absent)} is not: unset it, or start "
                 "this by torchrun")
        # before there is a group: its functions' defaults would keep it, whose threads then abort
        from torch.distributed.nn import functional  # noqa: F401
        dist.init_process_group("nccl" if cuda else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")

    # precision: bf16 where the hardware multiplies it; emulated it is slower
    if args.precision == "auto" and cuda:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if native else "fp16"
    elif args.precision == "auto":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        args.precision = "bf16" if native else "fp32"
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)  # None: not mixed
    autocast = torch.autocast(device.type, half) if half else nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    # fp32 means fp32, not TF32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    dtype = torch.float64 if args.precision == "fp64" else torch.float32
    return device, dtype, autocast, scaler


def memory_format(device, width):
    """Channels-last, which is faster, but for narrow networks on CPUs: there oneDNN (PyTorch 2.14)
    writes out of bounds in the weight gradient of a strided 1x1 convolution."""
    wide = device.type == "cuda" or width >= 16  # input channels that fill a vector register
    return torch.channels_last if wide else torch.contiguous_format


def refuse_narrow(data, stem, args):
    """End where oneDNN (PyTorch 2.14) would train on garbage: its weight gradient of a strided 3x3
    convolution, in bf16 on maps one pixel wide. Those of the last stage are a quarter as wide."""
    narrow = data.shape[2] <= (4 if stem == "3x3" else 16)
    if narrow and args.precision == "bf16" and data.train_x.device.type == "cpu":
        fail(f"images {data.shape[2]} pixels wide are too narrow for bf16 on a CPU: say "
             "--precision fp32")


def average(tensor):
    """Mean over the processes, in place."""
    if grouped():
        dist.all_reduce(tensor)  # their sum
        tensor /= dist.get_world_size()  # gloo has no average of its own


def average_gradients(model):
    """Average the gradients over the processes, in one message, of which they become views."""
    if not grouped():
        return
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]
    # as_strided: flat in memory order, channels-last or not
    flat = torch.cat([p.grad.as_strided([n], [1]) for p, n in zip(parameters, sizes)])
    average(flat)
    for p, mean in zip(parameters, flat.split(sizes)):
        p.grad = mean.as_strided(p.shape, p.stride())


def recorded(step, args, device):
    """`step` as one launch: called three times, then captured as a CUDA graph and replayed. The
    first calls do what cannot be captured: momentum buffers, Triton's compilation, cuDNN's search,
    NCCL's connections. On CPUs, and with fp16's scaler, which runs on the host, `step` itself."""
    if not args.graph or device.type != "cuda" or args.precision == "fp16":
        return step
    stream, graph, calls = torch.cuda.Stream(), torch.cuda.CUDAGraph(), 0

    def call():
        nonlocal calls, graph
        calls += 1
        if calls == 4:
            try:  # this runs nothing yet; thread_local: NCCL's watchdog may query meanwhile
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    step()
            except RuntimeError as error:  # not the step's own, which has run three times
                print(f"not recorded, each step is launched anew: {str(error).splitlines()[0]}")
                graph = None
        if calls > 3 and graph:
            graph.replay()
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
    return call


# -------------------------------------------- shared by all stages: checkpoints, runs and restarts
def save_checkpoint(path, model, **contract):
    """Write a checkpoint, whole or not at all: a plain dict of the model's weights, with `stage`,
    `arch`, `config`, `data`, `parents`, `history`, and what a restart needs."""
    path = os.path.realpath(path)  # a link stays one
    weights = {k: v.cpu().contiguous() for k, v in model.state_dict().items()}
    versions = dict(torch=str(torch.__version__), python=sys.version)
    torch.save(contract | dict(model=weights, versions=versions), f"{path}.tmp")
    os.replace(f"{path}.tmp", path)  # a kill leaves the old file or the new one


def read(path):
    """(content, sha256) of a file that torch.save wrote. No code in it can run."""
    try:
        content = Path(path).read_bytes()  # once: what is checked is what is loaded
        if zipfile.is_zipfile(io.BytesIO(content)):  # torch.load does not notice flipped bits
            if damaged := zipfile.ZipFile(io.BytesIO(content)).testzip():
                raise ValueError(f"{damaged} in it is damaged")
        with warnings.catch_warnings(action="ignore"):  # fail() says it
            loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and the unpickler raise a dozen kinds on foreign files
        refused = re.search(r"GLOBAL \S+", str(error))  # an object, as torch.save(network) writes
        reason = f"{refused[0]}, where tensors belong" if refused else str(error) or repr(error)
        fail(f"{path} cannot be read: {reason.splitlines()[0][:100]}")
    return loaded, hashlib.sha256(content).hexdigest()


def load_checkpoint(path, *stages):
    """A checkpoint of one of `stages` (default: any), with its file's sha256."""
    stages = stages or ("teacher", "init", "idsnn")
    checkpoint, sha256 = read(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("stage") not in stages:
        fail(f"{path} is no checkpoint of this project's stage {' or '.join(stages)}")
    return checkpoint | dict(sha256=sha256)


def earlier_run(stage, args):
    """What a run of the same flags left at --out: where it was interrupted, or else its result.
    None for a fresh start. Ends where the flags were others."""
    left = [file for file in (f"{args.out}.last", args.out) if os.path.exists(file)]
    if args.out in left and not os.path.isfile(args.out):
        fail(f"argument --out: {args.out} is no regular file, and a checkpoint would replace it")
    if args.fresh or not left:
        return None
    checkpoint = load_checkpoint(left[0], stage)

    # the flags, but for these
    free = ("out", "fresh", "data_dir", "device", "graph",  # where and how it runs
            "init", "teacher")                              # files, compared by their content
    if os.path.isdir(args.dataset):
        free += ("dataset",)                                # likewise, once it is loaded
    if args.schedule != "step":
        free += ("milestones",)                             # which nothing reads
    old, new = checkpoint["config"], vars(args)
    # a flag that an edit has added is in no old file, and stops nothing
    other = [k for k in new if k in old and k not in free and old[k] != new[k]]
    if other:
        k = other[0]
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        fail(f"{left[0]} is of another run, whose --{k.replace('_', '-')} is {old[k]}, not "
             f"{new[k]}{more}: say --fresh to start over, or another --out")
    return checkpoint


class TrainingRun:
    """Files and screen output of a run, by rank 0: <out>, the checkpoint; <out>.jsonl, a header and
    a line an epoch; <out>.last, the resume state, at most a minute plus an epoch old, deleted at
    the end."""
    # title and format of the table on the screen, at most 80 columns wide
    COLUMNS = dict(
        epoch=(" epoch", "6d"), loss=("   loss", "7.3f"), train_acc=(" train %", "8.2f"),
        test_loss=(" test loss", "10.3f"), test_acc=(" test %", "7.2f"),
        firing=(" firing %", "9.2f"), lr=("     lr", "7.2g"),
        images_per_s=(" images/s", "9,.0f"), seconds=(" seconds", "8.0f"))

    def __init__(self, args, data, model, optimizer, scaler, earlier, next_command, **contract):
        self.args, self.data, self.model = args, data, model
        self.next_command = next_command
        self.optimizer, self.scaler = optimizer, scaler
        self.history = []  # of rows, an epoch each
        self.contract = contract | dict(
            config=vars(args), data=data.describe(), history=self.history)
        self.last, self.saved = f"{args.out}.last", time.time()
        self.finished = False
        if earlier:
            self.go_on_from(earlier)
        elif rank() == 0:
            Path(self.last).unlink(missing_ok=True)
            if os.path.exists(args.out):  # with --fresh; a restart would take it for this run's
                self.save_last()
        self.bar = Progress("{task.description}", BarColumn(5), TimeRemainingColumn(), "left",
                            transient=True, disable=not sys.stdout.isatty())
        self.task, self.bar_moved = self.bar.add_task("", total=args.epochs), 0.0

    def go_on_from(self, earlier):
        """Resume an interrupted run; note a finished one; end where its data or parents differ."""
        files = dict(dataset=self.contract["data"], **self.contract["parents"])
        for flag, file in files.items():
            old = earlier["data"] if flag == "dataset" else earlier["parents"].get(flag)
            if old is None or any(old.get(k) != file.get(k) for k in ("sha256", "classes")):
                fail(f"{self.args.out} was begun with another --{flag}: say --fresh to start over, "
                     "or another --out")
        if "optimizer" not in earlier:
            self.finished = True
            print(f"{self.args.out} is finished: nothing to do (--fresh makes it anew); "
                  f"next: {self.next_command}")
            return
        # weights, momentum, loss scale, history
        rate = self.optimizer.param_groups[0]["lr"]
        self.model.load_state_dict(earlier["model"])
        self.optimizer.load_state_dict(earlier["optimizer"])
        self.optimizer.param_groups[0]["lr"] = rate  # the tensor that main() fills, not a copy
        self.scaler.load_state_dict(earlier["scaler"])
        self.history += earlier["history"]

    def header(self, **facts):
        """Print the facts of the run; begin the log, with the epochs of what was interrupted."""
        # what runs, and where
        args, device = self.args, self.data.train_x.device
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        facts["device"] = (f"{card}, {args.precision}, processes: {world_size()}, "
                           f"torch {torch.__version__}")
        recipe = [*PAPER, "seed"]
        if args.schedule == "step":
            recipe.append("milestones")
        facts["recipe"] = ", ".join(f"{k} {getattr(args, k)}" for k in recipe)
        if self.history:
            facts["resumed"] = f"{self.last}, after epoch {len(self.history)}"
        for name, fact in facts.items():
            print(f"{name:>10}  {fact}")
        fires = self.contract["stage"] != "teacher"  # ReLUs have no firing rate
        self.columns = {k: v for k, v in self.COLUMNS.items() if fires or k != "firing"}
        print(*[title for title, _ in self.columns.values()], flush=True)
        self.log = open(f"{args.out}.jsonl" if rank() == 0 else os.devnull, "w", buffering=1)
        # the log: the facts, then a line an epoch
        began = {k: str(v) for k, v in facts.items()}
        began |= dict(command=shlex.join(sys.argv), config=vars(args))
        for row in [began, *self.history]:
            print(json.dumps(row), file=self.log)

    def progress(self, epoch, done, steps, sums, began):
        """Move the bar, at most twice a second: reading `sums` waits for the device."""
        now = time.time()
        if self.bar.disable or now - self.bar_moved < 0.5:
            return
        self.bar_moved = now
        loss, accuracy = (sums[:2] / done).tolist()
        speed = done * self.args.batch_size / (now - began)  # images a second
        self.bar.update(
            self.task, completed=epoch + done / steps, refresh=True,
            description=f"epoch {epoch + 1} of {self.args.epochs}: loss {loss:.3f}, "
                        f"accuracy {accuracy:.1%}, {speed:,.0f} images/s")

    def end_epoch(self, row):
        """Print and log the epoch; save it if the last save is a minute old."""
        # the losses do not tell everything: a spiking layer of NaNs only falls silent, and a step
        # that fp16's scaler skips leaves its NaNs in the running statistics
        state = [v for v in self.model.state_dict().values() if v.is_floating_point()]
        norm = nn.utils.get_total_norm(state).item()
        if not math.isfinite(row["loss"] + row["test_loss"] + norm):
            fail(f"loss or weights are not finite in epoch {row['epoch']}: try a lower --lr")
        print(*[f"{row[k]:{form}}" for k, (_, form) in self.columns.items()], flush=True)
        self.history.append(row)
        print(json.dumps(row), file=self.log)
        if rank() == 0 and time.time() - self.saved > 60 and row["epoch"] < self.args.epochs:
            self.save_last()

    def save_last(self):
        """Write the resume state."""
        save_checkpoint(self.last, self.model, optimizer=self.optimizer.state_dict(),
                        scaler=self.scaler.state_dict(), **self.contract)
        self.saved = time.time()

    def finish(self):
        """Write <out>, delete <out>.last, say what comes next."""
        if rank() == 0:
            save_checkpoint(self.args.out, self.model, **self.contract)
            Path(self.last).unlink(missing_ok=True)
        accuracies = [row["test_acc"] for row in self.history]
        print(f"{self.args.out}: test accuracy {accuracies[-1]:.2f}%, "
              f"best epoch {max(accuracies):.2f}%; "
              f"next: {self.next_command}")


if __name__ == "__main__":
    run_script(main)
