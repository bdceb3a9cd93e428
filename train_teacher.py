"""Stage 1: train the teacher, an ordinary ReLU ResNet (paper, section 3.3.2 and 4.1)  ->  r34.pt

    python train_teacher.py                                 # the paper's: ResNet-34 on CIFAR-100, 200 epochs
    python train_teacher.py --dataset digits                # half a minute on a laptop
    torchrun --nproc-per-node 4 train_teacher.py            # four GPUs, the same global batch, the same result

From top to bottom: the recipe, the data, the network, main(); below it the machinery that all stages share (flags and
errors, processes and precision, checkpoints and restarts, the log), which later stages import from here.
"""
import argparse
import copy
import hashlib
import inspect
import io
import json
import math
import os
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.autograd import DeviceType

try:
    import fcntl
except ImportError:  # Windows: two runs are not kept from writing one file
    fcntl = None

# ------------------------------------------------------------------------------------------------------------- recipe
# paper: section 4.1 and, where it is silent (crop, flip, milestones), the authors' code
PAPER = dict(epochs=200, batch_size=64, lr=0.05, momentum=0.9, nesterov=False, weight_decay=1e-4, schedule="step", warmup=0.0,
             label_smoothing=0.0, ema=0.0, aug="basic", crop_padding=4, flip=True)
RECIPES = dict(
    paper=PAPER,
    # meant for all stages within ten minutes on one large GPU: not measured on one yet
    fast=PAPER | dict(epochs=40, batch_size=256, lr=0.2, nesterov=True, weight_decay=5e-4, schedule="linear", warmup=0.25),
    # meant for the highest accuracy with crop and flip alone: not measured on one yet either
    best=PAPER | dict(batch_size=128, lr=0.1, nesterov=True, weight_decay=5e-4, schedule="cosine", warmup=0.02))
# whatever the recipe: for 1,437 images of 8x8 pixels, in half a minute; a mirrored 2 is no 2
DIGITS = dict(epochs=20, batch_size=64, lr=0.05, schedule="linear", warmup=0.25, crop_padding=1, flip=False)


def parse_args(argv=None):
    p = Parser(description="Stage 1: train the teacher ResNet.")
    p.add_argument("--dataset", default="cifar100", help="cifar10, cifar100, digits, or a folder of train/<class>/* and test/<class>/*")
    p.add_argument("--depth", type=number(int, 18, 152), default=34, choices=DEPTHS, help="layers of the ResNet (default 34)")
    p.add_argument("--width", type=number(int, 1, 4096), help="channels of the first stage, which scales all others (default 64, digits 16)")
    p.add_argument("--stem", default="auto", choices=["auto", "3x3", "7x7"], help="first convolution; auto: 3x3 for images up to 64 pixels, else ImageNet's 7x7 and max-pool")
    add_training_flags(p, RECIPES, DIGITS, out="r34.pt")
    args = p.parse_args(argv)
    fill_defaults(args, RECIPES, DIGITS, width=16 if args.dataset == "digits" else 64)
    return args


def add_training_flags(p, recipes, digits, out):
    """The flags that both training stages have. A default of None is filled from the recipe by `fill_defaults`."""
    by_recipe = partial(show_defaults, recipes, digits)
    p.add_argument("--recipe", default="paper", choices=list(recipes), help="the set of defaults that the parentheses below speak of; digits has some of its own, whatever the recipe (default paper)")
    p.add_argument("--epochs", type=number(int, 1, 9999), help=f"passes over the training set {by_recipe('epochs')}")
    p.add_argument("--batch-size", type=number(int, 2, 1 << 20), help=f"images per step over all processes {by_recipe('batch_size')}")
    p.add_argument("--lr", type=number(float, 0, 1e3, above=True), help=f"peak learning rate of SGD {by_recipe('lr')}")
    p.add_argument("--momentum", type=number(float, 0, 1), help=f"momentum of SGD {by_recipe('momentum')}")
    p.add_argument("--nesterov", action=argparse.BooleanOptionalAction, help=f"Nesterov's momentum {by_recipe('nesterov')}")
    p.add_argument("--weight-decay", type=number(float, 0, 1), help=f"L2 penalty on every parameter {by_recipe('weight_decay')}")
    p.add_argument("--schedule", choices=["step", "cosine", "linear"], help=f"fall of the learning rate: x0.1 at each milestone, or to 0 along a cosine or a line {by_recipe('schedule')}")
    p.add_argument("--milestones", type=milestones, metavar="E,E,...", help="epochs at which `step` multiplies the rate by 0.1 (default 30%%, 60%% and 80%% of the epochs: 60,120,160)")
    p.add_argument("--warmup", type=number(float, 0, 0.99), help=f"share of the run in which the rate rises from 0 to --lr {by_recipe('warmup')}")
    p.add_argument("--label-smoothing", type=number(float, 0, 0.99), help=f"share of the target that is spread over all classes {by_recipe('label_smoothing')}")
    p.add_argument("--ema", type=number(float, 0, 1), help=f"report and save the exponential mean of the weights, over this share of the run's steps; 0: the last weights {by_recipe('ema')}")
    p.add_argument("--aug", choices=["basic", "strong"], help=f"basic: crop and flip; strong: CutMix on half of the images too {by_recipe('aug')}")
    p.add_argument("--crop-padding", type=number(int, 0, 256), help=f"zero pixels around an image before the random crop {by_recipe('crop_padding')}")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, help=f"mirror half of the training images {by_recipe('flip')}")
    p.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32", "fp64"], help="auto: bf16 where the GPU or the processor multiplies it; else fp16 on a GPU, fp32 on a CPU")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: the GPU if there is one")
    p.add_argument("--compile", action="store_true", help="torch.compile the network: slower start, faster steps")
    p.add_argument("--deterministic", action="store_true", help="bit-equal runs on a GPU too, at some cost in speed")
    p.add_argument("--seed", type=number(int, 0, 99999), default=0, help="of initialisation, order and augmentation (default 0)")
    p.add_argument("--data-dir", default="data", help="where downloads and decoded folders are kept (default data)")
    p.add_argument("--out", default=out, help=f"checkpoint to write; <out>.last while it trains, <out>.jsonl its log (default {out})")
    p.add_argument("--fresh", action="store_true", help="start over, whatever an earlier run left at --out")
    p.add_argument("--profile", action="store_true", help="print where the time of a training step goes, and end there")


def show_defaults(recipes, digits, name):
    """The default of a flag for --help: the paper's, and those of other recipes that differ."""
    values = {recipe: values[name] for recipe, values in recipes.items()} | ({"digits": digits[name]} if name in digits else {})
    others = {k: v for k, v in values.items() if v != values["paper"]}
    if others and "digits" in values:
        others["digits"] = values["digits"]
    text = lambda v: ("no", "yes")[v] if isinstance(v, bool) else f"{v:g}" if isinstance(v, float) else v
    return ", ".join([f"(default {text(values['paper'])}"] + [f"{k} {text(v)}" for k, v in others.items()]) + ")"


def fill_defaults(args, recipes, digits, **others):
    """Set every flag that the user left out: from the recipe, or from what suits the 8x8 digits."""
    if args.milestones and args.schedule is None:
        args.schedule = "step"
    for name, value in (recipes[args.recipe] | (digits if args.dataset == "digits" else {}) | others).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.nesterov and not args.momentum:
        fail("argument --momentum: 0: must be above 0 with Nesterov's (--no-nesterov)")
    if args.milestones and args.schedule != "step":
        fail(f"argument --milestones: needs --schedule step, not {args.schedule}")
    if args.milestones is None:
        args.milestones = [args.epochs * share for share in (0.3, 0.6, 0.8)]


def learning_rate(args, epoch):
    """The rate at `epoch`, a float that counts fractions: warm-up, then the schedule's fall."""
    done = epoch / args.epochs
    if done < args.warmup:
        return args.lr * done / args.warmup
    left = (1 - done) / (1 - args.warmup)
    return args.lr * {"step": 0.1 ** sum(epoch >= m for m in args.milestones),
                      "cosine": 0.5 - 0.5 * math.cos(math.pi * left),
                      "linear": left}[args.schedule]


# --------------------------------------------------------------------------------------------- data
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
        # torchvision's CIFAR is a transposed view, and a view cannot be hashed
        self.train_x, self.test_x = self.train_x.contiguous(), self.test_x.contiguous()
        H, W, C = self.train_x.shape[1:]
        self.shape = (C, H, W)
        # mean and deviation of the training set, from a histogram: exact, and no float copy
        level = torch.arange(256, dtype=torch.float64) / 255
        self.mean, self.std = [], []
        for c in range(C):
            count = torch.bincount(self.train_x[..., c].flatten(), minlength=256).double()
            mean = count @ level / count.sum()
            variance = count @ (level - mean).square() / count.sum()
            self.mean.append(mean.item())
            self.std.append(max(variance.sqrt().item(), 1 / 255))  # a constant channel has none
        # of pixels and labels alone, wherever they lie
        digest = hashlib.sha256()
        for tensor in (self.train_x, self.train_y, self.test_x, self.test_y):
            digest.update(tensor.numpy())
        self.sha256 = digest.hexdigest()

    def to(self, device, dtype, layout=torch.contiguous_format):
        """Move to `device`; `normalize` will give `dtype` in the memory format `layout`."""
        for name in ("train_x", "train_y", "test_x", "test_y"):
            setattr(self, name, getattr(self, name).to(device))
        # (C, 1, 1) of 0..255; made once, because a recorded CUDA graph remembers addresses
        self.offset = 255 * torch.tensor(self.mean, dtype=dtype, device=device).view(-1, 1, 1)
        self.scale = 255 * torch.tensor(self.std, dtype=dtype, device=device).view(-1, 1, 1)
        self.layout = layout
        return self

    def normalize(self, x):
        """uint8 (B, C, H, W) -> zero mean and unit variance a channel over the training set."""
        return ((x - self.offset) / self.scale).clone(memory_format=self.layout)

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
    """The data set `dataset` (see --dataset) as `Images` on the CPU; one line and exit if it isn't there or doesn't fit."""
    if dataset == "digits":  # UCI optical handwritten digits, CC BY 4.0; every fifth image is held out
        raw = np.load(Path(__file__).with_name("data") / "digits.npz")
        x = torch.from_numpy((raw["images"].astype(np.uint16) * 255 // 16).astype(np.uint8))[..., None]  # 0..16 -> 0..255
        y = torch.from_numpy(raw["labels"]).long()
        test = torch.arange(len(y)) % 5 == 0
        return Images(dataset, [str(d) for d in range(10)], x[~test], y[~test], x[test], y[test])
    if dataset in ("cifar10", "cifar100"):
        import torchvision  # here alone: a second to import, and absent from some CPU builds
        source = getattr(torchvision.datasets, dataset.upper())
        if int(os.environ.get("LOCAL_RANK", 0)) != 0:
            dist.barrier()  # one process of a machine downloads
        try:
            train, test = (source(data_dir, train=train, download=True) for train in (True, False))
        except Exception as error:  # torchvision's loader raises OSError, RuntimeError, URLError, EOFError, ...
            fail(f"--dataset {dataset}: not in {data_dir}/ and cannot be downloaded ({error}). Put the archive from "
                 f"{source.url} there, or give --dataset digits, or a folder of images", 1)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 and dist.is_initialized():
            dist.barrier()
        pixels = (torch.from_numpy(np.ascontiguousarray(split.data)) for split in (train, test))  # CIFAR10.data is a transposed view
        return Images(dataset, train.classes, next(pixels), torch.tensor(train.targets), next(pixels), torch.tensor(test.targets))
    try:
        # here alone: it takes a second to import, and does not beside every CPU build of torch
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        fail(f"--dataset {dataset}: torchvision is needed and cannot be imported ({error})", 1)
    source = getattr(datasets, dataset.upper())
    try:
        train = source(data_dir, train=True, download=True)
        test = source(data_dir, train=False, download=True)
    except Exception as error:  # of many kinds: OSError, RuntimeError, URLError, EOFError
        fail(f"--dataset {dataset}: not in {data_dir}/ and cannot be downloaded ({error}). Put the "
             f"archive from {source.url} there, or give --dataset digits, or a folder of images", 1)
    return Images(dataset, train.classes, torch.from_numpy(train.data), torch.tensor(train.targets),
                  torch.from_numpy(test.data), torch.tensor(test.targets))


def load_folder(dataset, data_dir):
    """Images of one size in train/<class>/* and test/<class>/* (or val/), subfolders included.

    Grey if every file is grey, else RGB. Decoded once, then read from a cache in `data_dir`.
    """
    root, skipped = Path(dataset), []
    try:
        train, test = list_folder(root, skipped)
        if skipped and rank() == 0:
            names = ", ".join(str(path.relative_to(root)) for path in skipped[:3])
            print(f"note: --dataset {dataset}: skipped {len(skipped)}, not images by name: {names}")
        files = [path for split in (train, test) for paths in split.values() for path in paths]
        cache = data_dir / f"{root.resolve().name}-{fingerprint(files)}.npz"
        x = read_cache(cache)
        if x is None:  # threads cannot end the process, so all of this raises, and ends below
            x = decode(files)
            write_cache(cache, x)
    except (OSError, ValueError) as error:
        fail(f"--dataset {dataset}: {error}")
    x, labels = torch.from_numpy(x), torch.arange(len(train))  # (N, H, W, C), (K,)
    # classes follow each other, (K,) -> (N,)
    train_y = labels.repeat_interleave(torch.tensor([len(paths) for paths in train.values()]))
    test_y = labels.repeat_interleave(torch.tensor([len(paths) for paths in test.values()]))
    n = len(train_y)
    return Images(str(root), list(train), x[:n], train_y, x[n:], test_y)


def list_folder(root, skipped):
    """({class: image files} of train/, the same of test/ or val/), sorted; fills `skipped`."""
    layout = "train/<class>/* and test/<class>/* (or val/<class>/*)"
    if not root.is_dir():
        raise ValueError(f"neither cifar10, cifar100 or digits nor a folder with {layout}")
    # where both are there, val/ is for tuning
    held_out = "val" if (root / "val").is_dir() and not (root / "test").is_dir() else "test"
    train, test = {}, {}
    for split, found in (("train", train), (held_out, test)):
        if not (root / split).is_dir():
            raise ValueError(f"it has no folder {split}/: images belong in {layout}")
        for path in sorted((root / split).iterdir()):
            if path.is_dir() and not path.name.startswith("."):
                found[path.name] = list_images(path, skipped)
            else:
                skipped.append(path)
    # labels are places in the list of classes: one list for both
    if train.keys() != test.keys():
        odd = min(train.keys() ^ test.keys())
        raise ValueError(f"train/ and {held_out}/ differ in the class {odd!r}")
    if len(train) < 2:
        raise ValueError(f"needs two classes or more, found {len(train)} in train/")
    for split, found in (("train", train), (held_out, test)):
        if empty := [name for name, paths in found.items() if not paths]:
            raise ValueError(f"class {empty[0]!r} has no images in {split}/")
    return train, test


def list_images(folder, skipped):
    """Image files in `folder` and below, sorted; what is hidden or none by name fills `skipped`."""
    from PIL import Image
    images = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            skipped.append(path)
        elif path.is_dir():
            if path.is_symlink():  # it could lead round in a circle
                raise ValueError(f"{path} is a link to a folder: put the folder in its place")
            images += list_images(path, skipped)
        elif path.suffix.lower() not in Image.registered_extensions():
            skipped.append(path)
        elif not path.is_file():
            raise ValueError(f"{path} is a link that points nowhere: mend or remove it")
        else:
            images.append(path)
    return images


def fingerprint(files):
    """Changes with each file's place and time, behind links too, and with how it is read."""
    # an edited reader must not be given what the old one has read
    seen = hashlib.sha256(inspect.getsource(read_image).encode())
    for path in files:
        stat = path.stat()
        # ctime too: a copy may bring along the time of the file it replaces
        times = stat.st_mtime_ns, stat.st_ctime_ns
        seen.update(repr((os.path.realpath(path), stat.st_size, *times)).encode())
    return seen.hexdigest()[:12]


def read_cache(path):
    """The decoded images at `path`, or None."""
    try:
        with np.load(path) as arrays:  # zipped, so with a checksum
            return arrays["images"]
    except Exception:  # absent, or damaged in one of many ways: decoded again
        return None


def write_cache(path, x):
    """Straight to disk, since a copy in memory may not fit; under its name only when complete."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                np.savez(file, images=x)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if rank() == 0:
            print(f"note: the decoded images were not kept in {path} ({error.strerror}); "
                  "the next run decodes them again")


def decode(files):
    """uint8 (N, H, W, C) of image files of one size, each decoded straight into its place."""
    H, W, _ = read_image(files[0]).shape
    # ends at the first colour file; in a grey set it reads every file once more
    C = 3 if any(read_image(path).shape[2] == 3 for path in files) else 1
    x = np.empty((len(files), H, W, C), np.uint8)

    def fill(i):
        pixels = read_image(files[i])
        h, w, _ = pixels.shape
        if (h, w) != (H, W):
            raise ValueError(f"{files[i]} is {w}x{h} pixels, others {W}x{H}: "
                             "resize them to one size")
        x[i] = pixels  # (H, W, 1) fills all channels

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(fill, range(len(files))):  # raises what a thread has raised
            pass
    return x


def read_image(path):
    """What a viewer shows of an image file: uint8 (H, W, 3), or (H, W, 1) for one saved as grey.

    Turned as its EXIF entry says; a palette or CMYK becomes RGB; of 16 bits the upper 8 are kept.
    ValueError names a file that is damaged, or that 8 bits of grey or RGB cannot hold: transparent
    pixels, several frames, other 16-bit formats than PNG, 32-bit and floating-point pixels.
    """
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as im:
            # which one is the image? a camera's MPO is a JPEG, what follows in it are previews
            if getattr(im, "n_frames", 1) > 1 and im.format != "MPO":
                raise ValueError(f"it has {im.n_frames} frames")
            ImageOps.exif_transpose(im, in_place=True)
            # what is below transparent pixels was never meant to be seen
            if im.has_transparency_data and im.convert("RGBA").getextrema()[3][0] < 255:
                raise ValueError("it has transparent pixels")
            if im.mode.startswith("I") and im.format == "PNG":  # the upper byte, as of 16-bit RGB
                pixels = (np.asarray(im) >> 8).astype(np.uint8)
            elif im.mode[0] in "IF":  # their white may be any number
                raise ValueError(f"it has pixels of Pillow's mode {im.mode}, not of 8 bits")
            else:
                pixels = np.asarray(im.convert("L" if im.mode in ("1", "L", "LA") else "RGB"))
    except Exception as error:  # of many kinds where a file is damaged
        raise ValueError(f"{path} is no image that can be read as it is ({error}): "
                         "replace or remove it") from None
    return pixels.reshape(*pixels.shape[:2], -1)  # (H, W) -> (H, W, 1)


def batches(data, args, epoch, rank, world):
    """One epoch of training batches: uint8 `(B / world, C, H, W)`, channels-last, cropped and flipped, and their targets
    `(B / world, K)`, the share of each class in the image.

    Order, crops, flips and boxes are drawn for the global batch on the CPU from (seed, epoch) and then sliced by rank: the
    same on every device, at every world size, after every restart. The incomplete last batch is dropped.
    """
    C, H, W = data.shape
    device, pad, steps = data.train_x.device, args.crop_padding, len(data.train_y) // args.batch_size
    g = torch.Generator().manual_seed(args.seed * 10_000 + epoch)
    order = torch.randperm(len(data.train_y), generator=g)[: steps * args.batch_size]
    top, left = torch.randint(2 * pad + 1, (2, len(order)), generator=g)
    flip = torch.rand(len(order), generator=g) < (0.5 if args.flip else 0.0)
    draws = torch.stack([order, top, left, flip]).view(4, steps, -1)
    if args.aug == "strong":  # the image before it in the global batch, and where that shows through
        draws = torch.cat([draws, draws.roll(1, 2), cutmix_boxes(len(order), H, W, g).view(4, steps, -1)])
    draws = draws.unflatten(2, (world, -1))[:, :, rank].to(device)  # (4 or 12, steps, B / world)
    padded = F.pad(data.train_x, (0, 0, pad, pad, pad, pad))  # zeros on the raw pixels, as torchvision's RandomCrop
    rows, cols = torch.arange(H, device=device), torch.arange(W, device=device)
    one_hot = torch.eye(len(data.classes), dtype=data.offset.dtype, device=device)

    def cut(index, top, left, flip):
        y = top[:, None] + rows                                                 # (B, H)
        x = left[:, None] + torch.where(flip[:, None] > 0, W - 1 - cols, cols)  # (B, W)
        return padded[index[:, None, None], y[:, :, None], x[:, None, :]], one_hot[data.train_y[index]]  # (B, H, W, C), (B, K)

    for draw in draws.unbind(1):
        image, target = cut(*draw[:4])
        if args.aug == "strong":
            other_image, other_target = cut(*draw[4:8])
            first_row, last_row, first_col, last_col = draw[8:, :, None]
            in_rows, in_cols = (rows >= first_row) & (rows < last_row), (cols >= first_col) & (cols < last_col)  # (B, H), (B, W)
            inside = in_rows[:, :, None] & in_cols[:, None, :]                                                 # (B, H, W)
            image = torch.where(inside[..., None], other_image, image)
            target = torch.lerp(target, other_target, inside.to(target.dtype).mean((1, 2))[:, None])
        yield image.permute(0, 3, 1, 2), target


def cutmix_boxes(n, H, W, g):
    """CutMix (Yun et al. 2019): (4, n) first row, last row (excluded), first and last column of a box anywhere in an H x W image.

    Half of the boxes are empty; the area of the others, before the image's edge cuts it off, is uniform from 0 to H*W.
    """
    side = torch.rand(n, generator=g).sqrt() * (torch.rand(n, generator=g) < 0.5)
    edges = []
    for size in (H, W):
        middle = torch.rand(n, generator=g)
        edges += [((middle + sign * side / 2).clamp(0, 1) * size).round().long() for sign in (-1, 1)]
    return torch.stack(edges)


# ------------------------------------------------------------------------------------------------------------ network
class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with statistics over all processes (nn.SyncBatchNorm refuses CPU tensors)."""

    def forward(self, x):
        if not self.training or world_size() == 1:
            return super().forward(x)
        x32 = x if x.dtype == torch.float64 else x.float()
        mean = AllReduceMean.apply(x32.mean((0, 2, 3)))
        var = AllReduceMean.apply((x32 - mean.view(-1, 1, 1)).square().mean((0, 2, 3)))
        self.update_statistics(mean, var, world_size() * x.numel() // x.shape[1])
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (x32 * scale.view(-1, 1, 1) + (self.bias - mean * scale).view(-1, 1, 1)).to(x.dtype)

    @torch.no_grad()
    def update_statistics(self, mean, var, n):
        """Running mean and unbiased variance, from a batch of n values a channel with biased variance `var`."""
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_((var * (n / max(n - 1, 1))).to(self.running_var), self.momentum)


class BatchNormReLU(BatchNorm2d):
    """Batch norm, optional residual add, ReLU: the seam at which the student puts spikes."""

    def forward(self, x, residual=None):
        x = super().forward(x)
        return F.relu(x if residual is None else x + residual)


class AllReduceMean(torch.autograd.Function):
    """Mean over processes, forward and backward."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x / world_size()

    @staticmethod
    def backward(ctx, grad):
        return AllReduceMean.forward(None, grad)


def conv(c_in, c_out, kernel, stride=1):
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Figure 1a (1b with spikes): two 3x3 convolutions; `norm_act` normalises and activates, `norm` only normalises."""
    expansion = 1

    def __init__(self, c_in, c, stride, norm, norm_act):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c, 3, stride), norm_act(c)
        self.conv2, self.bn2 = conv(c, c, 3), norm_act(c)
        self.downsample = nn.Sequential(conv(c_in, c, 1, stride), norm(c)) if stride != 1 or c_in != c else nn.Identity()

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), self.downsample(x))


class Bottleneck(nn.Module):
    """The block of ResNet-50 and deeper: 1x1, 3x3 (with the stride, as in torchvision), 1x1 to four times the channels."""
    expansion = 4

    def __init__(self, c_in, c, stride, norm, norm_act):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c, 1), norm_act(c)
        self.conv2, self.bn2 = conv(c, c, 3, stride), norm_act(c)
        self.conv3, self.bn3 = conv(c, 4 * c, 1), norm_act(4 * c)
        self.downsample = nn.Sequential(conv(c_in, 4 * c, 1, stride), norm(4 * c)) if stride != 1 or c_in != 4 * c else nn.Identity()

    def forward(self, x):
        return self.bn3(self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x))))), self.downsample(x))


DEPTHS = {18: (BasicBlock, (2, 2, 2, 2)), 34: (BasicBlock, (3, 4, 6, 3)),
          50: (Bottleneck, (3, 4, 6, 3)), 101: (Bottleneck, (3, 4, 23, 3)), 152: (Bottleneck, (3, 8, 36, 3))}


class ResNet(nn.Module):
    """ResNet under torchvision's parameter names, for teacher and student alike (paper, section 3.2.1).

    depth: 18, 34, 50, 101 or 152. width: channels of the first stage. stem: "3x3", or "7x7" with max-pool.
    norm, norm_act: classes called with a channel count, for batch norm without and with (residual add and) activation.
    block: replaces the block class that belongs to the depth. (B, in_channels, H, W) -> (B, num_classes).
    """

    def __init__(self, depth=34, num_classes=100, in_channels=3, width=64, stem="3x3",
                 norm=BatchNorm2d, norm_act=BatchNormReLU, block=None):
        super().__init__()
        plain_block, counts = DEPTHS[depth]
        block = block or plain_block
        self.conv1 = conv(in_channels, width, 3) if stem == "3x3" else conv(in_channels, width, 7, 2)
        self.bn1 = norm_act(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "7x7" else nn.Identity()
        c_in = width
        for stage, count in enumerate(counts):
            c, blocks = width << stage, []
            for j in range(count):
                blocks.append(block(c_in, c, 2 if stage > 0 and j == 0 else 1, norm, norm_act))
                c_in = c * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(c_in, num_classes)

    def features(self, x):
        """Stem's activations (B, width, H, W) -> (B, features)."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.maxpool(x)))))
        return x.mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(self.bn1(self.conv1(x))))


def kaiming_(model):
    """He et al. 2015, for the ReLU of the teacher; the student's convolutions keep PyTorch's default, as in the authors' code."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return model


# --------------------------------------------------------------------------------------------------------------- main
@torch.no_grad()
def evaluate(predict, data, batch_size=500):
    """(accuracy in %, mean loss) over the test set, shared by the processes.

    predict: (uint8 images (B, C, H, W), index of the first one) -> class scores (B, K)."""
    sums = torch.zeros(2, dtype=torch.float64, device=data.test_x.device)
    for start in range(rank() * batch_size, len(data.test_y), world_size() * batch_size):
        x, y = (t[start: start + batch_size] for t in (data.test_x, data.test_y))
        logits = predict(x.permute(0, 3, 1, 2), start).double()
        sums += torch.stack([(logits.argmax(1) == y).sum(), F.cross_entropy(logits, y, reduction="sum")])
    if world_size() > 1:
        dist.all_reduce(sums)
    correct, loss = (sums / len(data.test_y)).tolist()
    return 100 * correct, loss


def main(argv=None):
    args = parse_args(argv)
    device = init_distributed(args)
    precision, dtype, autocast, scaler = set_precision(args, device)

    data = load_data(args.dataset, args.data_dir)
    if args.batch_size > len(data.train_y):
        fail(f"argument --batch-size: {args.batch_size} is more than the {len(data.train_y)} training images")
    steps = len(data.train_y) // args.batch_size
    identity = run_identity(args, "teacher", data)
    log_file, earlier = (None, None) if args.profile else (claim(args.out), earlier_run(args, "teacher", identity))
    layout = memory_format(device, args.width)
    data.to(device, dtype, layout)

    torch.manual_seed(args.seed)
    stem = args.stem if args.stem != "auto" else "3x3" if max(data.shape[1:]) <= 64 else "7x7"
    arch = dict(depth=args.depth, num_classes=len(data.classes), in_channels=data.shape[0], width=args.width, stem=stem)
    model = kaiming_(ResNet(**arch)).to(device, dtype, memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, nesterov=args.nesterov,
                                weight_decay=args.weight_decay, fused=device.type == "cuda")
    product, follow = averaged(model, args, steps)
    history = restore(earlier, model, product, optimizer, scaler) if earlier else []
    net = parallel(model, args, layout)

    def checkpoint(resume=None):
        best = max(history, key=lambda row: row["test_acc"])["epoch"]
        return make_checkpoint("teacher", arch, weights(product), args, identity, device,
                               data=data.describe(), metrics=dict(history=history, best_epoch=best)) | (resume or {})

    log = Log(args, log_file, dict(
        teacher=f"ResNet-{args.depth}, width {args.width}, {stem} stem, {sum(p.numel() for p in model.parameters()):,} parameters -> {args.out}",
        data=str(data), **describe_run(args, device, precision)), history)
    with log:
        for epoch in range(len(history), args.epochs):
            net.train()
            began, sums = time.time(), torch.zeros(2, dtype=torch.float64, device=device)  # loss, accuracy
            for step, (x, target) in enumerate(batches(data, args, epoch, rank(), world_size())):
                optimizer.param_groups[0]["lr"] = learning_rate(args, epoch + (step + 0.5) / steps)
                with autocast:
                    logits = net(data.normalize(x)).to(dtype)
                    loss = F.cross_entropy(logits, target, label_smoothing=args.label_smoothing)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                follow(epoch * steps + step)
                sums += torch.stack([loss.detach(), (logits.argmax(1) == target.argmax(1)).to(dtype).mean()])
                log.step(epoch, step + 1, steps, sums, time.time() - began)
            loss, accuracy = epoch_means(sums, steps)
            seconds = time.time() - began

            product.eval()
            with autocast:
                test_acc, test_loss = evaluate(lambda x, _: product(data.normalize(x)), data)
            check_finite(product, (loss, test_loss), args, epoch)
            history.append(dict(epoch=epoch + 1, loss=loss, train_acc=100 * accuracy, test_loss=test_loss, test_acc=test_acc,
                                lr=optimizer.param_groups[0]["lr"], images_per_s=steps * args.batch_size / seconds, seconds=time.time() - began))
            log.epoch(history[-1])
            log.save_last(epoch + 1, lambda: checkpoint(resume_state(model, product, optimizer, scaler)))
        log.finish(checkpoint(), f"{args.out}: test accuracy {history[-1]['test_acc']:.2f}%, best epoch {max(r['test_acc'] for r in history):.2f}%")


# ------------------------------------------------------------------------------------------- shared: flags and errors
class Parser(argparse.ArgumentParser):
    """argparse whose error is one line, without the usage; abbreviated flags are refused."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        fail(message)


def number(kind, low, high, above=False):
    """An argparse type: an int or a float from `low` (itself excluded where `above`) to `high`; NaN is neither."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high or (value == low and not above)):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}: must be {what} {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:.7g}")
        return value
    return parse


def milestones(text):
    try:
        epochs = [int(e) for e in text.split(",")]
    except ValueError:
        epochs = [0]
    if epochs != sorted(set(epochs)) or epochs[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be rising whole numbers, as in 60,120,160")
    return epochs


def fail(message, code=2):
    """End with one line on stderr: code 2 for the user's mistake, 1 for the environment's failure."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def run(main):
    """The entry point of a script: SIGTERM and Ctrl-C end it at once, with one line; so does want of memory."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: the same command starts again", file=sys.stderr, flush=True)
        os._exit(130)
    except RuntimeError as error:  # on GPUs torch.OutOfMemoryError, on CPUs no kind of its own
        if "allocate" not in str(error):
            raise
        fail(f"out of memory ({str(error).splitlines()[0][:120]}): lower --batch-size, --width or --T", 1)


# ------------------------------------------------------------------------------------ shared: processes and precision
def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(args):
    """torchrun's environment (or its absence) and --device -> the device of this process."""
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        fail("argument --device: cuda asked for, and PyTorch sees no GPU")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world:
        fail(f"argument --batch-size: {args.batch_size} images cannot be shared by {world} processes: give a multiple of {world}")
    if world > 1 and not dist.is_initialized():
        # torchrun's store outlives its workers: restarted ones may read the addresses of the dead, unless
        # every attempt has a prefix. several nodes don't count alike: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is the remedy
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if os.environ.get("GROUP_WORLD_SIZE") == "1" else ""
        store, _, _ = next(dist.rendezvous("env://"))
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.PrefixStore(attempt, store), rank=rank(), world_size=world)
    return device


def device_name(device):
    device = torch.device(device)
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"


def set_precision(args, device):
    """(dtype of the parameters, autocast context, gradient scaler) for --precision; also the flags of cuDNN."""
    precision = args.precision
    if precision == "auto":
        gpu_has = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if gpu_has or device.type == "cpu" and cpu_multiplies_bf16() else "fp16" if device.type == "cuda" else "fp32"
    args.precision = precision  # what auto meant here belongs to the run's identity
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    autocast = torch.autocast(device.type, half) if half else nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    return precision, torch.float64 if precision == "fp64" else torch.float32, autocast, scaler


def cpu_multiplies_bf16():
    """Whether this processor has bf16 instructions (AVX512_BF16, AMX): 1.5 to 2 times as fast as fp32; emulated, bf16 is slower."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def memory_format(device, width):
    """Channels-last, the faster one, but for narrow networks on CPUs: there oneDNN (in PyTorch 2.14) writes out of bounds in
    the weight gradient of a strided 1x1 convolution with fewer input channels than a vector register holds."""
    lanes = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    return torch.channels_last if device.type == "cuda" or width >= lanes else torch.contiguous_format


def parallel(model, args, layout):
    """Compiled where asked for; gradients averaged over the processes where there are several."""
    if args.compile:
        model = torch.compile(model, options=dict(layout_optimization=layout == torch.channels_last))  # not by itself, see above
    if world_size() > 1:
        ids = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)  # statistics agree already
    return model


def averaged(model, args, steps):
    """(the network that is evaluated and saved, a function to call after each step of the run with its number): `model` itself,
    or with --ema a copy of it whose weights and statistics follow as an exponential mean over that share of the run."""
    if args.ema == 0:
        return model, lambda step: None
    product, span = copy.deepcopy(model), max(args.ema * args.epochs * steps, 1)
    mine, theirs = ([v for v in m.state_dict().values() if v.is_floating_point()] for m in (product, model))
    return product, lambda step: torch._foreach_lerp_(mine, theirs, 1 / min(step + 1, span))  # at first the plain mean: no share of the start


def epoch_means(sums, steps):
    """An epoch's sums over its steps -> means over steps and processes."""
    if world_size() > 1:
        dist.all_reduce(sums)
    return (sums / steps / world_size()).tolist()


def check_finite(model, losses, args, epoch):
    """End the run after an epoch in which a loss or a weight stopped being finite (a spiking layer of NaNs is merely silent)."""
    bad = ["the loss"] * (not math.isfinite(sum(losses))) + [k for k, v in model.state_dict().items() if not torch.isfinite(v).all()]
    if bad:
        kept = f"{args.out}.last keeps an earlier epoch" if os.path.exists(f"{args.out}.last") else "no earlier epoch was saved"
        fail(f"{bad[0]} is not finite in epoch {epoch + 1}; {kept}. Try a smaller --lr, --warmup 0.05, or --precision fp32", 1)


# ----------------------------------------------------------------------------------- shared: checkpoints and restarts
FORMAT = 1  # of the checkpoint: raised when a reader of the old one would misread the new
SAVE_EVERY = 30  # seconds, at least, between two writes of <out>.last
STAGES = {"teacher": "train_teacher.py", "init": "transfer_init.py", "idsnn": "train_idsnn.py"}


def write_atomically(path, payload):
    """torch.save to memory, write beside the target, fsync, replace: a kill leaves the old file or the new one."""
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(buffer.getbuffer())
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read(path):
    """torch.load of tensors and plain values alone, after the archive's checksums: torch.load takes most flipped bits for data."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(damaged)
    return torch.load(path, map_location="cpu", weights_only=True)


def save_checkpoint(path, checkpoint):
    try:
        write_atomically(path, checkpoint)
    except OSError as error:
        fail(f"cannot write {path} ({error.strerror}); what stood there before is intact", 1)


def load_checkpoint(path, stage=None, bare=False, remedy="copy or make it again"):
    """Read a checkpoint of `stage` (a key of STAGES; None: any), checked: its CRCs, its format, its stage.

    weights_only: a stranger's file cannot run code. bare=True lets a plain state dict (torchvision's) through.
    Every defect ends in one line that names the file.
    """
    wanted = f"a checkpoint of {STAGES[stage]}" if stage else "a checkpoint of this project"
    try:
        checkpoint = read(path)
    except FileNotFoundError:
        fail(f"{path} does not exist: {f'{STAGES[stage]} makes it' if stage else 'give a checkpoint'}")
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror or error})")
    except Exception:  # zipfile and the unpickler raise a dozen kinds on truncated, foreign and malicious files
        fail(f"{path} is truncated, damaged or not {wanted}: {remedy}")
    if not isinstance(checkpoint, dict):
        checkpoint = {}
    if bare and isinstance(checkpoint.get("conv1.weight"), torch.Tensor):
        return {"format": FORMAT, "stage": stage, "model": checkpoint}
    if checkpoint.get("format", FORMAT) != FORMAT:
        fail(f"{path} has checkpoint format {checkpoint['format']}, this program reads {FORMAT}: update the program, or make the file again")
    if not {"format", "stage", "arch", "model", "config", "data", "metrics", "provenance"} <= checkpoint.keys():
        fail(f"{path} is not {wanted}: {remedy}")
    if checkpoint["stage"] not in ([stage] if stage else STAGES):
        fail(f"{path} was made by {STAGES.get(checkpoint['stage'], checkpoint['stage'])}, needed is {wanted}: {remedy}")
    return checkpoint


def check_classes(classes, described, who, path):
    """End the run where `described`, the `data` of a checkpoint, names other classes, or the same ones in another order."""
    known = (described or {}).get("classes") or classes  # None: a bare state dict names none
    for i, (ours, theirs) in enumerate(zip(classes, known)):
        if ours != theirs:
            fail(f"the {who} in {path} knows class {i} as {theirs!r}, the data set as {ours!r}: their labels mean different things")


def sha256_file(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def make_checkpoint(stage, arch, model, args, identity, device="cpu", *, data=None, parents=None, metrics=None):
    """The contract between stages: a plain dict of tensors, numbers, strings, lists and dicts."""
    versions = dict(python=sys.version.split()[0], torch=str(torch.__version__))
    return dict(format=FORMAT, stage=stage, arch=arch, model=model, config=dict(vars(args)), data=data, metrics=metrics or dict(history=[]),
                provenance=dict(identity=identity, parents=parents or {}, versions=versions, device=device_name(device),
                                argv=sys.argv[1:], world_size=world_size(), seed=args.seed))


def weights(model):
    """state_dict on the CPU, without the prefixes of DDP and torch.compile; fp32 (fp64 in an fp64 run)."""
    names = ((k.removeprefix("module.").removeprefix("_orig_mod."), v) for k, v in model.state_dict().items())
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in names}


def resume_state(model, product, optimizer, scaler):
    """What <out>.last holds beyond a checkpoint. The data need nothing: they are drawn from (seed, epoch)."""
    rng = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    raw = dict(model=weights(model)) if product is not model else {}
    return dict(resume=dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), rng=rng) | raw)


def restore(checkpoint, model, product, optimizer, scaler):
    """Put the state of <out>.last in place; returns the history so far."""
    product.load_state_dict(checkpoint["model"])
    model.load_state_dict(checkpoint["resume"].get("model", checkpoint["model"]))
    optimizer.load_state_dict(checkpoint["resume"]["optimizer"])
    scaler.load_state_dict(checkpoint["resume"]["scaler"])
    torch.set_rng_state(checkpoint["resume"]["rng"][0])
    if torch.cuda.is_available() and len(checkpoint["resume"]["rng"]) > 1:
        torch.cuda.set_rng_state(checkpoint["resume"]["rng"][1])
    return checkpoint["metrics"]["history"]


def run_identity(args, stage, data=None, parents=None):
    """All that decides the result of a run, for telling whether an earlier one was the same."""
    here, scripts = Path(__file__).parent, list(STAGES.values())
    sources = ["kernels/lif.py", "kernels/bn_lif.py", *scripts[: 1 + scripts.index(STAGES[stage])]]
    return dict(config={k: v for k, v in vars(args).items() if k not in ("out", "fresh", "profile", "data_dir", "device")},
                sources={s: sha256_file(here / s) for s in sources if (here / s).exists()},
                data=data and data.sha256, parents={name: parent["sha256"] for name, parent in (parents or {}).items()})


def earlier_run(args, stage, identity):
    """Resume state that the same command left at <out>.last, or None. Ends here if <out> is finished, refuses if it differs."""
    if os.path.isfile(args.out) and sha256_file(args.out) in identity["parents"].values():
        fail(f"argument --out: {args.out} is what this run starts from: give another name")
    if args.fresh and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # a restarted worker goes on all the same
        if rank() == 0 and os.path.exists(f"{args.out}.last"):
            os.unlink(f"{args.out}.last")
        return None
    for path in [f"{args.out}.last"] + [args.out] * (not args.fresh):
        if not os.path.exists(path):
            continue
        checkpoint = load_checkpoint(path, stage, remedy="--fresh starts over, another --out keeps it")
        old = checkpoint["provenance"]["identity"]
        changed = [f"--{k.replace('_', '-')} was {old['config'].get(k)}, is {v}" for k, v in identity["config"].items() if old["config"].get(k) != v]
        changed += [f"{s} was edited" for s, h in identity["sources"].items() if old["sources"].get(s) != h]
        changed += ["the data set changed"] * (old["data"] != identity["data"])
        changed += [f"the {p} changed" for p, h in identity["parents"].items() if old["parents"].get(p) != h]
        if changed:
            fail(f"{path} is of another run ({'; '.join(changed)}): --fresh starts over, another --out keeps both")
        if path == args.out:
            if rank() == 0:
                print(f"{args.out} is finished, by the same command and source: nothing to do (--fresh makes it anew)")
            raise SystemExit(0)
        return checkpoint
    return None


# ---------------------------------------------------------------------------------------------------- shared: the log
def claim(out):
    """Open <out>.jsonl for this run alone: a second run with the same --out refuses, and so does a folder that cannot be written."""
    if rank() != 0:
        return None
    if os.path.isdir(out):
        fail(f"argument --out: {out} is a folder: give a file")
    try:
        file = open(f"{out}.jsonl", "a")
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in (out, f"{out}.last"):
            open(f"{path}.tmp", "wb").close()  # can a checkpoint be written here? and away with what a killed run left
            os.unlink(f"{path}.tmp")
    except BlockingIOError:
        fail(f"argument --out: another run is writing {out}: wait for it, or give another name")
    except OSError as error:
        fail(f"argument --out: cannot write {out} ({error.strerror}): give a file in a folder that exists and can be written")
    return file


def describe_run(args, device, precision):
    """Header lines of a training run: where it computes, and by what recipe."""
    schedule = f"x0.1 at {', '.join(f'{m:g}' for m in args.milestones)}" if args.schedule == "step" else args.schedule
    return dict(device=f"{device_name(device)}, {precision}, {world_size()} process{'es' * (world_size() > 1)}, torch {torch.__version__}",
                recipe=f"{args.epochs} epochs, batch {args.batch_size}, SGD lr {args.lr:g}, {schedule}, warm-up {args.warmup:g}, "
                       f"{'Nesterov ' * args.nesterov}momentum {args.momentum:g}, weight decay {args.weight_decay:g}, "
                       + f"label smoothing {args.label_smoothing:g}, " * (args.label_smoothing > 0)
                       + f"weights averaged over {args.ema:.0%} of the run, " * (args.ema > 0) + f"seed {args.seed}",
                images=f"crop padding {args.crop_padding}, flip {'yes' if args.flip else 'no'}{', CutMix' * (args.aug == 'strong')}")


def shares(events, step, steps, gpu):
    """Rows (ms a step, what) of a profile over `steps` steps of `step` ms: the kernels of a GPU, or the operations of a CPU."""
    here = DeviceType.CUDA if gpu else DeviceType.CPU  # a GPU's time stands at its kernels, and again at the operations behind them
    spent = {f"{e.key}, {e.count / steps:.0f} calls": (e.self_device_time_total if gpu else e.self_cpu_time_total) / 1000 / steps
             for e in events if e.device_type == here and not (gpu and e.is_user_annotation)}
    large = sorted(((ms, what) for what, ms in spent.items() if ms > 0.01 * step), reverse=True)
    return large + [(sum(spent.values()) - sum(ms for ms, _ in large), "what takes less than 1% each"),
                    (step - sum(spent.values()), "nothing computes: Python, or waiting")]


class Log:
    """A run's header, progress bar, one row an epoch, the same rows in <out>.jsonl, and its last words."""

    def __init__(self, args, file, header, history):
        self.args, self.file, self.saved, self.saved_at, self.drawn_at = args, file, len(history), time.time(), 0.0
        self.console = Console(quiet=rank() != 0, highlight=False, soft_wrap=True)
        if file:
            file.truncate(0)  # written anew from the history: no epoch twice after a restart
            for row in [dict(run=header | dict(command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])))] + history:
                self.write(row)
        for name, text in header.items():
            self.console.print(f"[bold]{name:>10}[/]  {escape(text)}")
        if history:
            self.console.print(f"[bold]   resumed[/]  {args.out}.last, after epoch {len(history)}")
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[status]}"), TimeRemainingColumn(),
                            console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("", total=args.epochs, completed=len(history), status="")
        self.titled = False

    def write(self, row):
        try:
            os.write(self.file.fileno(), (json.dumps(row) + "\n").encode())  # unbuffered: nothing is left that could fail in close()
        except OSError as error:
            fail(f"cannot write {self.file.name} ({error.strerror}); the checkpoints are intact: the same command goes on", 1)

    def step(self, epoch, done, steps, sums, seconds):
        """Move the bar, at most twice a second: reading `sums` (of loss and accuracy over the steps done) waits for the device."""
        if self.args.profile:
            self.profile(done, steps)
        if not self.bar.disable and time.time() - self.drawn_at > 0.5:
            self.drawn_at = time.time()
            loss, accuracy = (sums[:2] / done).tolist()
            self.bar.update(self.task, completed=epoch + done / steps, description=f"epoch {epoch + 1}", refresh=True,
                            status=f"loss {loss:.3f}  {100 * accuracy:.1f}%  {done * self.args.batch_size / seconds:,.0f} images/s")

    def profile(self, done, steps, warmup=10, active=10):
        """Called after each step of an epoch: print the operations' shares of the time of `active` steps, and end the run."""
        if steps < warmup + active:
            fail(f"argument --profile: needs {warmup + active} steps an epoch, these are {steps}: lower --batch-size")
        if done not in (warmup, warmup + active):
            return
        if gpu := torch.cuda.is_initialized():
            torch.cuda.synchronize()
        if done == warmup:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its own reports of starting and stopping
            self.profiler = torch.profiler.profile()
            self.profiler.start()
            self.profiled_at = time.time()
            return
        step = 1000 * (time.time() - self.profiled_at) / active  # ms
        self.profiler.stop()
        for ms, what in shares(self.profiler.key_averages(), step, active, gpu):
            self.console.print(f"{ms:9.2f} ms {ms / step:6.1%}  {escape(what)}")
        self.console.print(f"{step:9.2f} ms         a step: {1000 * self.args.batch_size / step:,.0f} images/s with the profiler on")
        raise SystemExit(0)

    def epoch(self, row):
        """One line of the table, whose columns are the row's own keys, and one of the .jsonl."""
        shown = {k: v for k, v in row.items() if not isinstance(v, (list, dict))}
        form = {"images_per_s": ",.0f", "lr": ".4g", "epoch": "d"}
        if not self.titled:
            self.console.print("  ".join(f"{k:>7}" for k in shown), style="bold")
            self.titled = True
        self.console.print("  ".join(f"{v:>{max(7, len(k))}{form.get(k, '.2f')}}" for k, v in shown.items()))
        if self.file:
            self.write(row)

    def save_last(self, epochs_done, make_checkpoint):
        """<out>.last, at the end of an epoch, at most every SAVE_EVERY seconds."""
        if rank() == 0 and time.time() - self.saved_at > SAVE_EVERY:
            save_checkpoint(f"{self.args.out}.last", make_checkpoint())
            self.saved, self.saved_at = epochs_done, time.time()

    def finish(self, checkpoint, last_words):
        if rank() == 0:
            save_checkpoint(self.args.out, checkpoint)
            Path(f"{self.args.out}.last").unlink(missing_ok=True)
        self.console.print(last_words)

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, kind, error, trace):
        self.bar.stop()
        if self.file:
            self.file.close()
        if kind is KeyboardInterrupt:
            again = f"the same command{' without --fresh' * self.args.fresh} goes on"
            kept = f"{self.args.out}.last holds {self.saved} epochs: {again}" if self.saved else "no epoch was saved yet: the same command starts again"
            if rank() == 0:
                print(f"interrupted; {kept}", file=sys.stderr, flush=True)
            os._exit(130)  # at once: the other processes and the GPU are not waited for


if __name__ == "__main__":
    run(main)
