"""Stage 1: train the teacher, an ordinary ReLU ResNet (paper, sections 3.3.2 and 4.1)  ->  r34.pt

    python train_teacher.py                           # the paper's: ResNet-34 on CIFAR-100
    python train_teacher.py --dataset digits          # half a minute on a laptop
    torchrun --nproc-per-node 4 train_teacher.py      # four GPUs, the same global batch and result

From top to bottom: the recipe, the data, the network, main(); below it what all stages share
(flags and errors, device and precision, checkpoints, runs and restarts), imported from here.
"""
import argparse
import ast
import errno
import hashlib
import inspect
import io
import json
import math
import os
import signal
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # endless spinning makes a busy machine ten times slower
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from torch import nn

from kernels import BatchNorm2d

try:
    import fcntl
except ImportError:  # Windows: two runs are not kept from writing one file
    fcntl = None

# ------------------------------------------------------------------------------------------ recipe
# paper, section 4.1; where it is silent (milestones, crop, flip) the authors' code
PAPER = dict(
    epochs=200,         # passes over the training set
    batch_size=64,      # images a step, over all processes
    lr=0.05,            # peak learning rate of SGD
    momentum=0.9,
    nesterov=False,
    weight_decay=1e-4,  # L2 penalty on every parameter
    schedule="step",    # x0.1 at 30, 60 and 80% of the epochs; or "linear", "cosine": to 0
    warmup=0.0,         # share of the run in which the rate rises from 0
    crop_padding=4,     # pixels of zeros around an image before the random crop
    flip=True,          # mirror half of the training images
)
# five times fewer epochs of larger batches at the same rate an image. in results/recipes-small a
# teacher with this weight decay and momentum helped its student most; not measured on a GPU yet
FAST = PAPER | dict(
    epochs=40, batch_size=256, lr=0.2, nesterov=True, weight_decay=5e-4,
    schedule="linear", warmup=0.25,
)
# over either of them: 1,437 images of 8x8 pixels, in half a minute; a mirrored 2 is no 2
DIGITS = dict(
    epochs=20, batch_size=64, lr=0.05, schedule="linear", warmup=0.25,
    crop_padding=1, flip=False,
)
RECIPES = dict(paper=PAPER, fast=FAST)


def parse_args(argv=None):
    p = Parser(description="Stage 1: train the teacher ResNet.")
    p.add_argument("--dataset", default="cifar100",
                   help="cifar10, cifar100, digits, or a folder of train/<class>/* and "
                        "test/<class>/* (or val/<class>/*), all images of one size")
    p.add_argument("--depth", type=number(int, 18, 152), choices=DEPTHS, default=34,
                   help="layers of the ResNet")
    p.add_argument("--width", type=number(int, 1, 4096), default=64,
                   help="channels of its first stage, which scales all others")
    p.add_argument("--stem", choices=["auto", "3x3", "7x7"], default="auto",
                   help="first convolution; auto: 3x3 for images up to 64 pixels, "
                        "else ImageNet's 7x7 and max-pool")
    add_training_flags(p, out="r34.pt")
    return p.parse_with_recipe(argv, RECIPES, DIGITS | dict(width=16))


def add_training_flags(p, out):
    """The flags that both training stages have; a recipe says their defaults."""
    p.add_argument("--recipe", choices=["paper", "fast"], default="paper",
                   help="the set of defaults; digits has some of its own")
    p.add_argument("--epochs", type=number(int, 1, 9999), help="passes over the training set")
    p.add_argument("--batch-size", type=number(int, 2, 1 << 20),
                   help="images per step over all processes")
    p.add_argument("--lr", type=number(float, 0, 1e3, above=True), help="peak learning rate of SGD")
    p.add_argument("--momentum", type=number(float, 0, 1), help="momentum of SGD")
    p.add_argument("--nesterov", action=argparse.BooleanOptionalAction, help="Nesterov's momentum")
    p.add_argument("--weight-decay", type=number(float, 0, 1), help="L2 penalty on every parameter")
    p.add_argument("--schedule", choices=["step", "cosine", "linear"],
                   help="fall of the learning rate: x0.1 at each milestone, or to 0 along a curve")
    p.add_argument("--milestones", type=milestones, metavar="E,E,...",
                   help="epochs at which --schedule step multiplies the rate by 0.1")
    p.add_argument("--warmup", type=number(float, 0, 0.99),
                   help="share of the run in which the rate rises from 0 to --lr")
    p.add_argument("--crop-padding", type=number(int, 0, 256),
                   help="pixels of zeros around an image before the random crop")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction,
                   help="mirror half of the training images")
    p.add_argument("--precision", choices=["auto", "bf16", "fp16", "fp32", "fp64"], default="auto",
                   help="auto: bf16 where the device multiplies it, else fp16 on GPUs, "
                        "fp32 on CPUs")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                   help="auto: the GPU if there is one")
    p.add_argument("--graph", action=argparse.BooleanOptionalAction, default=True,
                   help="on one GPU, record the training step once and replay it")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile the network: slower start, faster steps")
    p.add_argument("--deterministic", action="store_true",
                   help="bit-equal runs on a GPU too, at some cost in speed")
    p.add_argument("--seed", type=number(int, 0, 99999), default=0,
                   help="of initialisation, order and augmentation")
    p.add_argument("--data-dir", default="data", help="where downloads and decoded images are kept")
    p.add_argument("--out", default=out,
                   help="checkpoint to write; <out>.last while it trains, <out>.jsonl its log")
    p.add_argument("--fresh", action="store_true",
                   help="start over, whatever an earlier run left at --out")


def learning_rate(args, epoch):
    """The rate at `epoch`, a float that counts fractions: warm-up, then the schedule's fall."""
    done = epoch / args.epochs
    if done < args.warmup:
        return args.lr * done / args.warmup
    left = (1 - done) / (1 - args.warmup)
    if args.schedule == "step":
        return args.lr * 0.1 ** sum(epoch >= m for m in args.milestones)
    if args.schedule == "cosine":
        return args.lr * (0.5 - 0.5 * math.cos(math.pi * left))
    return args.lr * left


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
        # in the network's own memory format: the images' would be kept by all that follows
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
    """The data set that --dataset names, as `Images` on the CPU, the same in every process.

    Rank 0 of the whole run goes first and downloads or decodes into `data_dir`; then one process
    of each other node, which finds that in a shared folder or makes its own; then all others.
    Data that are not there or do not fit end every process, with one line.
    """
    named = dict(digits=load_digits, cifar10=load_cifar, cifar100=load_cifar)
    load = named.get(dataset, load_folder)
    # 0: the first process of the run, 1: the first ones of other nodes, 2: all others
    turn = (rank() > 0) + (int(os.environ.get("LOCAL_RANK", 0)) > 0)
    data, failure = None, None
    for current in range(3):
        if current == turn:
            try:
                data = load(dataset, Path(data_dir))
            except (Exception, SystemExit) as error:
                failure = error
        # the others wait here, and must not wait for one that has failed
        failed = any(all_gather(failure is not None))
        if failure:
            raise failure
        if failed:
            raise SystemExit(1)
    return data


def load_digits(dataset, data_dir):
    """UCI's optical handwritten digits (CC BY 4.0), 8x8 pixels; every fifth image is held out."""
    raw = np.load(Path(__file__).with_name("data") / "digits.npz")
    pixels = (raw["images"].astype(np.uint16) * 255 // 16).astype(np.uint8)  # 0..16 -> 0..255
    x = torch.from_numpy(pixels)[..., None]  # (N, 8, 8) -> (N, 8, 8, 1)
    y = torch.from_numpy(raw["labels"]).long()
    test = torch.arange(len(y)) % 5 == 0  # bool (N,)
    return Images(dataset, list("0123456789"), x[~test], y[~test], x[test], y[test])


def load_cifar(dataset, data_dir):
    """CIFAR-10 or CIFAR-100 by torchvision, which downloads what is not in `data_dir`."""
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
        if skipped:
            names = ", ".join(str(path.relative_to(root)) for path in skipped[:3])
            note(f"--dataset {dataset}: skipped {len(skipped)}, not images by name: {names}")
        files = [path for split in (train, test) for paths in split.values() for path in paths]
        # threads cannot end the process, so all of this raises, and ends below
        x = decode_once(files, data_dir / f"{root.resolve().name}-{fingerprint(files)}.npz")
    except (OSError, ValueError) as error:
        fail(f"--dataset {dataset}: {error}")
    x, labels = torch.from_numpy(x), torch.arange(len(train))  # (N, H, W, C), (K,)
    # classes follow each other, (K,) -> (N,)
    train_y = labels.repeat_interleave(torch.tensor([len(paths) for paths in train.values()]))
    test_y = labels.repeat_interleave(torch.tensor([len(paths) for paths in test.values()]))
    n = len(train_y)
    return Images(str(root), list(train), x[:n], train_y, x[n:], test_y)


def note(text):
    """One line of rank 0. On stderr, which escapes what the console cannot show in file names."""
    if rank() == 0:
        print(f"note: {text}", file=sys.stderr, flush=True)


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
            if not path.is_dir() or path.name.startswith("."):
                skipped.append(path)
                continue
            found[path.name] = list_images(path, skipped)
            if not found[path.name]:
                raise ValueError(f"class {path.name!r} has no images in {split}/")
    # labels are places in the list of classes: one list for both
    if odd := train.keys() ^ test.keys():
        raise ValueError(f"train/ and {held_out}/ differ in the class {min(odd)!r}")
    if len(train) < 2:
        raise ValueError(f"needs two classes or more, found {len(train)} in train/")
    return train, test


def list_images(folder, skipped):
    """Image files in `folder` and below, sorted; what is hidden or none by name fills `skipped`."""
    from PIL import Image
    images = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            if path.is_symlink():  # it could lead round in a circle
                raise ValueError(f"{path} is a link to a folder: put the folder in its place")
            continue
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in Image.registered_extensions():
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


def decode_once(files, cache):
    """decode(files), kept in the file `cache` for the next run."""
    try:
        with np.load(cache) as arrays:  # zipped, so with a checksum
            return arrays["images"]
    except Exception:  # absent, or damaged in one of many ways
        x = decode(files)
    # straight to disk, since a copy in memory may not fit; under its name only when complete
    temporary = Path(f"{cache}.{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, images=x)
        temporary.replace(cache)
    except OSError as error:
        note(f"the decoded images were not kept in {cache} ({error.strerror}); "
             "the next run decodes them again")
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return x


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


class Batches:
    """Batches of an epoch: drawn at random, then cropped, flipped and stacked on the data's device.

    Everything is drawn for the global batch on the CPU from (seed, epoch), then sliced by rank:
    the same on every device, at every world size, after every restart. Incomplete batches are
    dropped. The tensors that `cut` reads are made once: a recorded step remembers addresses.
    """

    def __init__(self, data, args):
        C, H, W = data.shape
        self.data, self.args, pad = data, args, args.crop_padding
        self.steps = len(data.train_y) // args.batch_size  # an epoch
        # zeros on the raw pixels, as torchvision's RandomCrop
        self.padded = F.pad(data.train_x, (0, 0, pad, pad, pad, pad))
        self.rows, self.cols = (torch.arange(n, device=self.padded.device) for n in (H, W))
        # layers of images as small as the digits gain nothing from a second thread, which waits
        # ten times as long as it works where other programs want the cores
        if not data.train_x.is_cuda and H * W <= 64:
            torch.set_num_threads(1)

    def plan(self, epoch):
        """(steps, 4, B / world) int64: index of the image, top and left of its crop, flipped."""
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
    """Batch norm, optional residual add, ReLU: the seam at which the student puts spikes."""

    def forward(self, x, residual=None):
        x = super().forward(x)
        return F.relu(x if residual is None else x + residual)


def conv(c_in, c_out, kernel, stride=1):
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)


def shortcut(c_in, c_out, stride, norm):
    """Identity, or where the shape changes a 1x1 convolution and batch norm."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return nn.Sequential(conv(c_in, c_out, 1, stride), norm(c_out))


class BasicBlock(nn.Module):
    """Figure 1a (1b with spikes): two 3x3 convolutions.

    norm_act normalises, adds the residual and activates; norm only normalises.
    """
    expansion = 1

    def __init__(self, c_in, c, stride, norm, norm_act):
        super().__init__()
        self.conv1, self.bn1 = conv(c_in, c, 3, stride), norm_act(c)
        self.conv2, self.bn2 = conv(c, c, 3), norm_act(c)
        self.downsample = shortcut(c_in, c, stride, norm)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), self.downsample(x))


class Bottleneck(nn.Module):
    """The block of ResNet-50 and deeper: 1x1, 3x3, 1x1 to four times the channels.

    The stride is in the 3x3 convolution, as in torchvision.
    """
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

    depth: 18, 34, 50, 101 or 152. width: channels of the first stage. stem: "3x3", or "7x7" with
    max-pool. norm, norm_act: classes called with a channel count, for batch norm without and with
    (residual add and) activation. block: replaces the block class that belongs to the depth.
    """

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
            c, blocks = width << stage, []
            for j in range(count):
                stride = 2 if stage > 0 and j == 0 else 1  # each later stage halves the image
                blocks.append(block(c_in, c, stride, norm, norm_act))
                c_in = c * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(c_in, num_classes)

    def features(self, x):
        """Stem's activations (B, width, H, W) -> (B, features)."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.maxpool(x)))))
        return x.mean((2, 3))

    def forward(self, x):
        """(B, in_channels, H, W) -> class scores (B, num_classes)."""
        return self.fc(self.features(self.bn1(self.conv1(x))))


def default_stem(shape):
    """--stem auto, for images (C, H, W): small ones keep their size."""
    return "3x3" if max(shape[1:]) <= 64 else "7x7"


def kaiming_(model):
    """He et al. 2015, for the teacher's ReLU; what is fresh in the student keeps PyTorch's own."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return model


# -------------------------------------------------------------------------------------------- main
@torch.no_grad()
def evaluate(predict, data, batch_size=500):
    """(accuracy in %, mean cross-entropy) over the test set, which the processes share.

    predict: uint8 images (B, C, H, W) and their index in the test set (B,) -> class scores (B, K).
    """
    sums = torch.zeros(2, dtype=torch.float64, device=data.test_x.device)
    batches = torch.arange(len(data.test_y), device=sums.device).split(batch_size)
    for index in batches[rank()::world_size()]:
        labels = data.test_y[index]
        scores = predict(data.test_x[index].permute(0, 3, 1, 2), index).double()
        loss = F.cross_entropy(scores, labels, reduction="sum")
        sums += torch.stack([(scores.argmax(1) == labels).sum(), loss])
    if world_size() > 1:
        dist.all_reduce(sums)
    correct, loss = (sums / len(data.test_y)).tolist()
    return 100 * correct, loss


def main(argv=None):
    args = parse_args(argv)
    device, dtype, autocast, scaler = setup(args)

    # data: the whole set as uint8 on the training device
    layout = memory_format(device, args.width)
    data = load_data(args.dataset, args.data_dir).to(device, dtype, layout)
    run = TrainingRun("teacher", args, data)  # finds what an earlier run of this command left
    batches = Batches(data, args)

    # model: drawn on the CPU, so that a seed means the same weights everywhere
    torch.manual_seed(args.seed)
    stem = default_stem(data.shape) if args.stem == "auto" else args.stem
    arch = dict(depth=args.depth, num_classes=len(data.classes), in_channels=data.shape[0],
                width=args.width, stem=stem)
    model = kaiming_(ResNet(**arch)).to(device, dtype, memory_format=layout)
    net = parallel(model, args, layout)

    # optimizer: its rate is a tensor, which a recorded step reads anew at each replay
    lr = torch.tensor(args.lr, device=device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr, args.momentum, nesterov=args.nesterov,
        weight_decay=args.weight_decay, fused=device.type == "cuda")

    # resume: weights, momentum and scaler of an interrupted run
    epochs_done = run.restore(arch, model, optimizer, scaler)

    # one training step, over buffers that are made once
    plan = torch.empty(4, args.batch_size // world_size(), dtype=torch.long, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, accuracy, over the steps

    def step():
        images, labels = batches.cut(plan)                  # (B, C, H, W) uint8, (B,)
        with autocast:
            scores = net(data.normalize(images)).to(dtype)  # (B, K)
            loss = F.cross_entropy(scores, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        accuracy = (scores.argmax(1) == labels).to(dtype).mean()
        sums.add_(torch.stack([loss.detach(), accuracy]))

    train_step = recorded(step, args, device)

    # loop
    parameters = sum(p.numel() for p in model.parameters())
    run.header(
        teacher=f"ResNet-{args.depth}, width {args.width}, {stem} stem, {parameters:,} parameters",
        data=data)
    with run:
        for epoch in range(epochs_done, args.epochs):
            net.train()
            began = time.time()
            sums.zero_()
            for i, planned in enumerate(batches.plan(epoch)):
                rate = learning_rate(args, epoch + (i + 0.5) / batches.steps)
                lr.fill_(rate)
                plan.copy_(planned)
                train_step()
                run.progress(epoch, i + 1, batches.steps, sums, began)
            loss, accuracy = run.means(sums, batches.steps)
            trained = time.time() - began

            model.eval()
            with autocast:
                test_acc, test_loss = evaluate(
                    lambda images, index: model(data.normalize(images)), data)
            row = dict(
                epoch=epoch + 1, loss=loss, train_acc=100 * accuracy,
                test_loss=test_loss, test_acc=test_acc, lr=rate,
                images_per_s=batches.steps * args.batch_size / trained,
                seconds=time.time() - began)
            run.end_epoch(row)

        # save: the last weights; then what to run next
        run.finish(f"python transfer_init.py --src {args.out}")


# ----------------------------------------------------------------------- shared: flags and errors
class Parser(argparse.ArgumentParser):
    """argparse whose error is one line, without the usage; abbreviated flags are refused.

    Here -h is a flag like others: a first pass, parse_known_args, reads what decides defaults.
    """

    class Formatter(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):  # no default: the flag says what happens without it
            silent = action.default is None or action.const is True
            return action.help if silent else super()._get_help_string(action)

    def __init__(self, **kwargs):
        super().__init__(
            add_help=False, allow_abbrev=False, formatter_class=self.Formatter, **kwargs)
        self.add_argument("-h", "--help", action="store_true", help="show this and end")

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        if args.help:
            self.print_help()
            raise SystemExit(0)
        del args.help
        return args

    def parse_with_recipe(self, argv, recipes, digits):
        """Two passes: the first reads what decides the defaults, the second everything.

        So --help shows the values that will run. Ends where flags contradict each other.
        """
        first, _ = self.parse_known_args(argv)
        recipe = recipes[first.recipe] | (digits if first.dataset == "digits" else {})
        epochs = first.epochs or recipe["epochs"]
        marks = ",".join(f"{epochs * share:g}" for share in (0.3, 0.6, 0.8))
        self.set_defaults(**recipe, milestones=marks)
        if first.milestones:
            self.set_defaults(schedule="step")
        args = self.parse_args(argv)
        if first.milestones and args.schedule != "step":
            fail(f"argument --milestones: needs --schedule step, not {args.schedule}")
        if args.nesterov and not args.momentum:
            fail("argument --momentum: 0: must be above 0 with Nesterov's (--no-nesterov)")
        if args.batch_size % world_size():
            fail(f"argument --batch-size: {args.batch_size}: {world_size()} processes share it: "
                 f"must be a multiple of {world_size()}")
        check_writable("out", args.out)
        return args

    def error(self, message):
        fail(message)


def number(kind, low, high, above=False):
    """An argparse type: an int or float from `low` (excluded where `above`) to `high`, no NaN."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high or (value == low and not above)):
            what = "a whole number" if kind is int else "a number"
            least = f"above {low:g} and up" if above else f"from {low:g}"
            raise argparse.ArgumentTypeError(f"{text!r}: must be {what} {least} to {high:.7g}")
        return value
    return parse


def milestones(text):
    try:
        epochs = [float(e) for e in text.split(",")]
    except ValueError:
        epochs = [0.0]
    if epochs != sorted(set(epochs)) or not 0 < epochs[0] <= epochs[-1] < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be rising epochs, as in 60,120,160")
    return epochs


def check_writable(flag, path):
    """End before any work where `path` is a folder, or lies in none that can be written."""
    if rank() > 0:
        return
    try:
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        tempfile.TemporaryFile(dir=Path(path).parent).close()
    except OSError as error:
        fail(f"argument --{flag}: cannot write {path} ({error.strerror}): "
             "give a file in a folder that exists and can be written")


def fail(message, code=2, every=False):
    """End with one line on stderr: code 2 for the user's mistake, 1 for the environment's.

    What all processes find, one of each node says; every: what this one alone has met.
    """
    if every or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def run_script(main):
    """The entry point of a script: whatever ends it says so in one line.

    A training run notes on what ends it what is kept.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="replace")  # no character of ours ends a run
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt as error:
        kept = getattr(error, "__notes__", ["nothing new is kept: give the same command again"])
        if rank() == 0:
            print("interrupted", *kept, sep="; ", file=sys.stderr, flush=True)
        os._exit(130)  # at once: no other process and no GPU is waited for
    except OSError as error:  # screen or log: a full disk, a pipe that nobody reads any more
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes it once more at its end
        what = f"cannot write what the run says ({error.strerror})"
        fail("; ".join([what, *getattr(error, "__notes__", [])]), 1)
    except RuntimeError as error:  # want of memory; on CPUs it has no class of its own
        if "allocate" not in str(error):
            raise
        what = f"rank {rank()} is out of memory ({str(error).splitlines()[0][:120]}): " \
               "lower --batch-size, --width or --T"
        fail("; ".join([what, *getattr(error, "__notes__", [])]), 1, every=True)
    finally:  # a finished result and an error end here too
        if dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------- shared: processes, device and precision
def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def all_gather(value):
    """The `value` of every process, in the order of their ranks."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def setup(args):
    """Processes, device and precision, from torchrun's environment, --device and --precision.

    Returns (device, dtype of the parameters, autocast context, gradient scaler), and leaves in
    args.precision what "auto" meant here, which is part of a run's identity.
    """
    cuda = torch.cuda.is_available() if args.device == "auto" else args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        fail("argument --device: cuda asked for, and PyTorch sees no GPU")
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        # torchrun's store outlives its workers: restarted ones may read the addresses of the dead
        # unless every attempt has a prefix. several nodes don't count their attempts alike: there
        # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is the remedy
        alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if alone else ""
        store, _, _ = next(dist.rendezvous("env://"))
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=dist.PrefixStore(attempt, store),
            rank=rank(), world_size=world_size(), timeout=timedelta(hours=2))  # a long download

    if args.precision == "auto":  # bf16 where it is multiplied as it is: emulated it is slower
        if cuda:
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        full = "fp16" if cuda else "fp32"
        args.precision = "bf16" if native else full
    torch.backends.cudnn.benchmark = not args.deterministic
    # fp32 means fp32, not TF32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
    autocast = torch.autocast(device.type, half) if half else nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    dtype = torch.float64 if args.precision == "fp64" else torch.float32
    return device, dtype, autocast, scaler


def device_name(device):
    cuda = device.type == "cuda"
    return f"{device} ({torch.cuda.get_device_name(device)})" if cuda else "cpu"


def memory_format(device, width):
    """Channels-last, the faster one, but for narrow networks on CPUs.

    There oneDNN (in PyTorch 2.14) writes out of bounds in the weight gradient of a strided 1x1
    convolution with fewer input channels than a vector register holds.
    """
    lanes = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    wide = device.type == "cuda" or width >= lanes
    return torch.channels_last if wide else torch.contiguous_format


def parallel(model, args, layout):
    """Compiled where asked for; gradients averaged over the processes where there are several."""
    if args.compile:  # the memory format is ours to choose, see above
        options = dict(layout_optimization=layout == torch.channels_last)
        model = torch.compile(model, options=options)
    if world_size() > 1:
        ids = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=ids)
        # statistics agree already: DDP need not send them. the argument of this name warns since
        # torch 2.13, the attribute means the same in every version
        model.broadcast_buffers = False
    return model


def recorded(step, args, device, on_device=True):
    """`step` as one launch: run as it is three times, recorded as a CUDA graph, then replayed.

    The first calls settle what a graph cannot: momentum buffers, Triton's compilation, cuDNN's
    search. They run on the stream that records, so that memory is not shared with another.
    Several processes, fp16's scaler and a step that is not all on_device need the host in its
    middle: there, on CPUs and under --no-graph, this is `step` itself.
    """
    alone = world_size() == 1 and args.precision != "fp16"
    if not (args.graph and device.type == "cuda" and alone and on_device):
        return step
    stream, graph, calls = torch.cuda.Stream(), torch.cuda.CUDAGraph(), 0

    def call():
        nonlocal calls
        calls += 1
        if calls <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            return
        if calls == 4:  # recording runs nothing
            with torch.cuda.graph(graph, stream=stream):
                step()
        graph.replay()
    return call


# ------------------------------------------------------------------------- shared: checkpoints
FORMAT = 1  # raised when a reader of the old one would misread the new
STAGES = {"teacher": "train_teacher.py", "init": "transfer_init.py", "idsnn": "train_idsnn.py"}


def write_file(path, content, remains="what stood there before is intact"):
    """Bytes to a file, whole or not at all, even if killed; one line where they find no room."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        fail(f"cannot write {path} ({error.strerror}); {remains}", 1)
    finally:
        Path(temporary).unlink(missing_ok=True)


def save_checkpoint(path, checkpoint, **remains):
    write_file(path, serialise(checkpoint), **remains)


def serialise(checkpoint):
    """torch.save to memory: a disk that is full is met by plain bytes."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getbuffer()


def read(path):
    """(torch.load of tensors and plain values alone, sha256 of the file).

    After the archive's checksums: torch.load takes most flipped bits for data.
    """
    content = Path(path).read_bytes()  # once: what is checked and hashed is what is loaded
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(damaged)
    loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return loaded, hashlib.sha256(content).hexdigest()


def load_checkpoint(path, stage=None, remedy="copy or make it again"):
    """Read a checkpoint of `stage` (a key of STAGES; None: any); CRCs, format, stage are checked.

    weights_only: a stranger's file cannot run code. Every defect ends in one line that names
    the file. Beside what was saved the dict has the file's `sha256`.
    """
    wanted = f"a checkpoint of {STAGES[stage] if stage else 'this project'}"
    try:
        checkpoint, digest = read(path)
    except FileNotFoundError:
        remedy = f"{STAGES[stage]} makes it" if stage else "give a checkpoint of any stage"
        fail(f"{path} does not exist: {remedy}")
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror or error})")
    except Exception:  # zipfile and the unpickler raise a dozen kinds on damaged and foreign files
        fail(f"{path} is truncated, damaged or not {wanted}: {remedy}")
    keys = {"format", "stage", "arch", "model", "config", "data", "metrics", "provenance"}
    if not isinstance(checkpoint, dict) or not keys <= checkpoint.keys():
        fail(f"{path} is not {wanted}: {remedy}")
    if checkpoint["format"] != FORMAT:
        fail(f"{path} has checkpoint format {checkpoint['format']}, this program reads {FORMAT}: "
             "update the program, or make the file again")
    if checkpoint["stage"] not in ([stage] if stage else STAGES):
        made_by = STAGES.get(checkpoint["stage"], checkpoint["stage"])
        fail(f"{path} was made by {made_by}, needed is {wanted}: {remedy}")
    return checkpoint | dict(sha256=digest)


def make_checkpoint(stage, arch, model, args, identity, data, parents=None, history=()):
    """The contract between stages: a plain dict of tensors, numbers, strings, lists and dicts."""
    # on the CPU, in fp32 (fp64 in an fp64 run)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    best = max(history, key=lambda row: row["test_acc"], default={}).get("epoch")
    versions = dict(python=sys.version.split()[0], torch=str(torch.__version__))
    return dict(
        format=FORMAT, stage=stage, arch=arch, model=weights, config=dict(vars(args)),
        data=data, metrics=dict(history=list(history), best_epoch=best),
        provenance=dict(
            identity=identity, parents=parents or {}, versions=versions,
            device=device_name(next(model.parameters()).device), argv=sys.argv[1:],
            world_size=world_size(), seed=args.seed))


def load_state(target, state, path, remedy):
    """target.load_state_dict; ends where the state in `path` is of a network edited since."""
    try:
        target.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:160]
        fail(f"{path} does not fit the network as it is now ({why}): {remedy}")


def load_network(kind, checkpoint, path, remedy):
    """The network in `checkpoint`, of class `kind`; ends where that was edited since."""
    try:
        network = kind(**checkpoint["arch"])
    except (TypeError, KeyError) as error:
        fail(f"{path} does not fit the network as it is now ({error}): {remedy}")
    load_state(network, checkpoint["model"], path, remedy)
    return network


def sha256_file(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# --------------------------------------------------------------------------------- shared: runs
# what does not decide a run's result, or is compared by content: data and parents by their hashes
NOT_COMPARED = ("out", "fresh", "data_dir", "device", "graph", "dataset", "src", "init", "teacher")


def run_identity(args, stage, data=None, parents=None):
    """All that decides the result of a run, to tell whether an earlier one was the same."""
    # this stage's sources and those of the stages before, without comments and spaces
    here, scripts = Path(__file__).parent, list(STAGES.values())
    kernels = {f"kernels/{path.name}" for path in (here / "kernels").glob("*.py")}
    used = sorted(kernels - {"kernels/bench.py"}) + scripts[: 1 + scripts.index(STAGES[stage])]
    sources = {name: ast.unparse(ast.parse((here / name).read_bytes())) for name in used}
    return dict(
        config={k: v for k, v in vars(args).items() if k not in NOT_COMPARED}, argv=sys.argv[1:],
        sources={k: hashlib.sha256(text.encode()).hexdigest() for k, text in sources.items()},
        data=data and data.sha256,
        parents={name: parent["sha256"] for name, parent in (parents or {}).items()})


def differences(old, new):
    """What differs between two identities, in the user's own flags; edited sources aside."""
    words = " ".join([*old.get("argv", []), *new["argv"]])
    given = {k for k in new["config"] if f"-{k.replace('_', '-')}" in words}  # --flip, --no-flip
    changed = {k: (old["config"].get(k), v) for k, v in new["config"].items()
               if old["config"].get(k) != v and (k in old["config"] or k in given)}
    # defaults follow from flags: what nobody gave counts only if nothing given differs
    named = [k for k in changed if k in given] or list(changed)
    told = [f"--{k.replace('_', '-')} was {changed[k][0]}, is {changed[k][1]}" for k in named]
    if old["data"] != new["data"]:
        told.append("--dataset has other images or labels")
    told += [f"the {name} is another file" for name, digest in new["parents"].items()
             if old["parents"].get(name) != digest]
    return told


def earlier_run(args, stage, identity):
    """Resume state that the same command left at <out>.last, or None; ends if <out> is finished.

    Another run's files are refused. An edited source is welcome: a resumed run only says so, a
    finished result asks for --fresh.
    """
    if os.path.isfile(args.out) and sha256_file(args.out) in identity["parents"].values():
        fail(f"argument --out: {args.out} is what this run starts from: give another name")
    last = f"{args.out}.last"
    candidates = [last, args.out]
    # torchrun starts its workers again with the same command: they go on
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if args.fresh:
        candidates = [last] if restarted else []
    path = next((path for path in candidates if os.path.exists(path)), None)

    # every process reads for itself: what lies on one node alone would split the run
    found = path and sha256_file(path), identity["data"], identity["parents"]
    if any(others != found for others in all_gather(found)):
        fail(f"{args.out}, its parents or the data differ between the nodes: give paths to a "
             "folder that all of them share", 1)
    if args.fresh and not restarted and rank() == 0:
        Path(last).unlink(missing_ok=True)
    if path is None:
        return None

    checkpoint = load_checkpoint(path, stage, remedy="--fresh starts over, another --out keeps it")
    old = checkpoint["provenance"]["identity"]
    if changed := differences(old, identity):
        fail(f"{path} is of another run ({'; '.join(changed)}): "
             "--fresh starts over, another --out keeps both")
    edited = ", ".join(k for k, v in identity["sources"].items() if old["sources"].get(k) != v)
    if path == last:
        if edited:
            note(f"{edited} was edited since {last} was written; going on")
        return checkpoint
    if edited:
        fail(f"{path} was made before {edited} was edited: "
             "--fresh makes it anew, another --out keeps both")
    if rank() == 0:
        print(f"{path} is finished, by the same command and source: nothing to do "
              "(--fresh makes it anew)")
    raise SystemExit(0)


class TrainingRun:
    """What a training run leaves behind, and what it shows; rank 0 alone writes and prints.

    <out>        the checkpoint, when all epochs are done
    <out>.last   resume state: of every printed epoch, written when writing stays under a fiftieth
                 of the run's time, and else when the run is interrupted; deleted at the end
    <out>.jsonl  a header, then one line an epoch; its lock keeps two runs from writing one file

    history: one dict an epoch.
    """
    # an epoch's row on the screen: title, key, format; 80 columns with the student's firing rate
    COLUMNS = (("epoch", "epoch", "d"), ("loss", "loss", ".3f"), ("train %", "train_acc", ".2f"),
               ("test loss", "test_loss", ".3f"), ("test %", "test_acc", ".2f"),
               ("firing %", "firing", ".2f"), ("lr", "lr", ".2g"),
               ("images/s", "images_per_s", ",.0f"), ("seconds", "seconds", ".0f"))

    def __init__(self, stage, args, data, parents=None):
        if args.batch_size > len(data.train_y):
            fail(f"argument --batch-size: {args.batch_size} is more than the {len(data.train_y)} "
                 "training images")
        self.stage, self.args, self.data, self.parents = stage, args, data, parents
        self.log = None  # of rank 0
        if rank() == 0:
            try:
                self.log = open(f"{args.out}.jsonl", "ab", buffering=0)
                if fcntl:
                    fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fail(f"argument --out: another run is writing {args.out}: wait for it, or give "
                     "another name")
            except OSError as error:
                fail(f"argument --out: cannot write {args.out}.jsonl ({error.strerror})")
        self.identity = run_identity(args, stage, data, parents)
        self.earlier = earlier_run(args, stage, self.identity)
        self.history = self.earlier["metrics"]["history"] if self.earlier else []
        self.epochs_before = self.saved = len(self.history)  # epochs that <out>.last holds
        self.pending = None  # (epochs, bytes): the state of a later one, not written yet
        self.began, self.writing = time.time(), 0.0  # seconds
        self.bar = Progress(
            "{task.description}", BarColumn(5), TimeRemainingColumn(), "left", transient=True,
            disable=rank() > 0 or not sys.stdout.isatty())
        self.task = self.bar.add_task("", total=args.epochs, completed=self.epochs_before)
        self.bar_moved = 0.0

    def restore(self, arch, model, optimizer, scaler):
        """Take what the run will save, after putting an interrupted run's state into it; returns
        how many epochs are done."""
        self.arch, self.model, self.optimizer, self.scaler = arch, model, optimizer, scaler
        if self.earlier:
            path, remedy = f"{self.args.out}.last", "--fresh starts over"
            lr, state = optimizer.param_groups[0]["lr"], self.earlier["resume"]
            load_state(model, self.earlier["model"], path, remedy)
            load_state(optimizer, state["optimizer"], path, remedy)
            optimizer.param_groups[0]["lr"] = lr  # the tensor that main() sets, not a copy
            scaler.load_state_dict(state["scaler"])
        self.earlier = None  # its tensors are not kept twice
        return self.epochs_before

    def header(self, **facts):
        """Print the facts of the run; write the log anew from the history: no epoch twice."""
        args, device = self.args, device_name(self.data.train_x.device)
        processes = "1 process" if world_size() == 1 else f"{world_size()} processes"
        recipe = [*PAPER, "milestones", "seed"] if args.schedule == "step" else [*PAPER, "seed"]
        facts["device"] = f"{device}, {args.precision}, {processes}, torch {torch.__version__}"
        facts["recipe"] = ", ".join(f"{k} {getattr(args, k)}" for k in recipe)
        if self.epochs_before:
            facts["resumed"] = f"{args.out}.last, after epoch {self.epochs_before}"
        for name, fact in facts.items():
            self.say(f"{name:>10}  {fact}")
        if self.log:
            self.log.truncate(0)
        facts["command"] = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        self.write_log(dict(run={name: str(fact) for name, fact in facts.items()}))
        for row in self.history:
            self.write_log(row)

    def write_log(self, row):
        if self.log:
            self.log.write((json.dumps(row) + "\n").encode())

    def progress(self, epoch, done, steps, sums, began):
        """Move the bar, at most twice a second: reading `sums` waits for the device."""
        now = time.time()
        if self.bar.disable or now - self.bar_moved < 0.5:
            return
        self.bar_moved = now
        loss, accuracy = (sums[:2] / done).tolist()
        speed = done * self.args.batch_size / (now - began)
        self.bar.update(
            self.task, completed=epoch + done / steps, refresh=True,
            description=f"epoch {epoch + 1} of {self.args.epochs}: loss {loss:.3f}, "
                        f"accuracy {accuracy:.1%}, {speed:,.0f} images/s")

    def means(self, sums, steps):
        """An epoch's sums over its steps -> means over steps and processes."""
        total = sums.clone()
        if world_size() > 1:
            dist.all_reduce(total)
        return (total / steps / world_size()).tolist()

    def end_epoch(self, row):
        """Keep the epoch's state, then print it: an epoch that was printed is kept.

        Ends the run where a loss or a weight stopped being finite (a spiking layer of NaNs is
        merely silent).
        """
        bad = [k for k in ("loss", "test_loss") if not math.isfinite(row[k])]
        bad += [k for k, v in self.model.state_dict().items() if not torch.isfinite(v).all()]
        if bad:
            fail(f"{bad[0]} is not finite in epoch {row['epoch']}: try {self.remedies()}", 1)
        self.history.append(row)
        if self.log:
            state = dict(
                optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())
            content = serialise(self.checkpoint() | dict(resume=state))
            self.pending = len(self.history), content
            if 50 * self.writing <= time.time() - self.began:
                self.write_pending()
        self.write_log(row)
        columns = [column for column in self.COLUMNS if column[1] in row]
        if len(self.history) == self.epochs_before + 1:
            self.say("  ".join(f"{title:>6}" for title, _, _ in columns))
        self.say("  ".join(
            f"{row[key]:>{max(6, len(title))}{form}}" for title, key, form in columns))

    def say(self, text):
        """A line on the screen, above the bar."""
        if rank() == 0:
            print(text, flush=True)

    def remedies(self):
        """What this run can change about a divergence."""
        tips = [f"--lr below {self.args.lr:g}"]
        if self.args.warmup < 0.05:
            tips.append("--warmup 0.05")
        if self.args.precision in ("bf16", "fp16"):
            tips.append("--precision fp32")
        return " or ".join(tips)

    def checkpoint(self):
        return make_checkpoint(
            self.stage, self.arch, self.model, self.args, self.identity, self.data.describe(),
            self.parents, self.history)

    def write_pending(self):
        """<out>.last, if there is an epoch that it does not hold."""
        if self.pending is None:
            return
        began, (epochs, content) = time.time(), self.pending
        try:
            write_file(f"{self.args.out}.last", content, self.kept())
        except SystemExit:  # no room: not tried again on the way out
            self.pending = None
            raise
        self.pending, self.saved = None, epochs
        self.writing += time.time() - began

    def kept(self):
        """Words for what the same command goes on from."""
        if self.saved is None:
            return f"{self.args.out} is finished"
        if not self.saved:
            return "no epoch is kept yet: the same command starts again"
        again = "the same command" + (" without --fresh" if self.args.fresh else "")
        epochs = "1 epoch" if self.saved == 1 else f"{self.saved} epochs"
        return f"{self.args.out}.last holds {epochs}: {again} goes on"

    def finish(self, next_command):
        """Write <out>, delete <out>.last, say what comes next."""
        last, best = self.history[-1], max(row["test_acc"] for row in self.history)
        if self.log:
            self.write_pending()  # <out> may not find room
            save_checkpoint(self.args.out, self.checkpoint(), remains=self.kept())
            Path(f"{self.args.out}.last").unlink(missing_ok=True)
            self.saved = None  # all of it is in <out>
        self.bar.stop()  # it would break a long line: nobody could copy the command
        guessing = math.log(len(self.data.classes))
        if last["test_loss"] > 10 * guessing:
            fail(f"{self.args.out} was written, but its test loss is {last['test_loss']:,.0f} "
                 f"where guessing has {guessing:.1f}: try {self.remedies()}", 1)
        self.say(
            f"{self.args.out}: test accuracy {last['test_acc']:.2f}%, best epoch {best:.2f}%; "
            f"next: {next_command}")

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, kind, error, trace):
        if kind is KeyboardInterrupt:  # terminal and torchrun both send one: let this one write
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, signal.SIG_IGN)
        self.bar.stop()
        if self.log and error is not None:  # interrupted, out of memory, not finite
            self.write_pending()
            error.add_note(self.kept())
        if self.log:
            self.log.close()


if __name__ == "__main__":
    run_script(main)
