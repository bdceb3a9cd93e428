"""The data: the digits, folders of images, CIFAR as it is kept; normalisation, crops and flips."""
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from train_teacher import Batches, Images, load_data, parse_args, read_image


def keep_images(folder, train=26, test=43, classes="abc", size=(8, 8), seed=0):
    """Random pixels in the file that `--dataset cifar10 --data-dir FOLDER` reads in place of a
    download: the smallest data set that a whole stage runs on."""
    g, content = torch.Generator().manual_seed(seed), dict(classes=list(classes))
    for split, n in (("train", train), ("test", test)):
        content[f"{split}_x"] = torch.randint(256, (n, *size, 3), generator=g).byte()
        content[f"{split}_y"] = torch.arange(n) % len(classes)
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "cifar10.images")


def files():
    """{path: bytes} of all that lies in the current folder."""
    return {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}


@contextmanager
def refused(*words):
    """What runs inside ends in one line that contains these words, and touches no file."""
    before = files()
    with pytest.raises(SystemExit) as end:
        yield
    line = end.value.code
    assert isinstance(line, str) and "\n" not in line, line
    assert all(word in line for word in words), line
    assert files() == before


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """The current folder of each test, with such a data set in data/."""
    monkeypatch.chdir(tmp_path)
    keep_images(Path("data"))


# ------------------------------------------------------------------------------- digits, statistics
def test_digits_are_the_uci_digits():
    data = load_data("digits", "nowhere")
    assert str(data) == "digits: 1,437 + 360 images of 1x8x8, 10 classes"
    # the first image of the set, a zero, is held out; its first row is 0 0 5 13 9 1 0 0 of 16
    assert data.test_x[0, 0, :, 0].tolist() == [v * 255 // 16 for v in (0, 0, 5, 13, 9, 1, 0, 0)]
    # so is the sixth, a 5; what lies between is trained on
    assert data.train_y[:5].tolist() == [1, 2, 3, 4, 6] and data.test_y[:2].tolist() == [0, 5]


def test_the_training_set_is_normalised_to_mean_0_and_variance_1():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (30, 7, 5, 3), generator=g).byte()
    x[..., 1] = 77  # a channel without variance, which nothing must be divided by
    data = Images("x", ["a", "b"], x, torch.arange(30) % 2, x[:2] // 2, torch.arange(2))
    direct = x.double().div(255).flatten(0, 2)  # (N*H*W, C)
    std = direct.std(0, correction=0).tolist()
    assert data.mean == pytest.approx(direct.mean(0).tolist(), rel=1e-12)
    assert data.std == pytest.approx([std[0], 1 / 255, std[2]], rel=1e-12)
    # the test set, with the mean of the training set
    for layout in (torch.contiguous_format, torch.channels_last):
        data.to("cpu", torch.float64, layout)
        shown = data.normalize(data.test_x.permute(0, 3, 1, 2))  # (N, H, W, C) -> (N, C, H, W)
        assert shown.dtype == torch.float64 and shown.is_contiguous(memory_format=layout)
        value = (data.test_x[1, 2, 3, 0].item() / 255 - data.mean[0]) / data.std[0]
        assert shown[1, 0, 2, 3].item() == pytest.approx(value, rel=1e-12)


# ------------------------------------------------------------------------------------------ folders
def write_image(path, mode="RGB", size=(5, 6), seed=0):
    """Random pixels as an image file, size: (W, H); -> what RGB makes of them, (H, W, 3)."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return np.asarray(image.convert("RGB"))


def test_a_folder_is_read_as_rgb_in_the_order_of_its_names():
    """Also where the first image is grey, and where images lie in folders of their own."""
    grey = write_image(Path("set/train/cat/0.png"), mode="L")
    deep = write_image(Path("set/train/cat/1/2/3.jpg"), seed=1)
    palette = write_image(Path("set/train/owl/x.png"), mode="P", seed=2)
    held_out = [write_image(Path(f"set/val/{c}/0.png"), seed=3) for c in ("cat", "owl")]
    data = load_data("set", "nowhere")
    assert data.name == "set" and data.classes == ["cat", "owl"] and data.shape == (3, 6, 5)
    assert np.array_equal(data.train_x[[0, 2]], [grey, palette])
    assert np.abs(data.train_x[1].numpy().astype(int) - deep).mean() < 60  # JPEG is inexact
    assert np.array_equal(data.test_x, held_out)
    assert data.train_y.tolist() == [0, 0, 1] and data.test_y.tolist() == [0, 1]
    # test/ comes before val/, where both are there
    Path("set/val").rename("set/test")
    write_image(Path("set/val/cat/0.png"), seed=4)
    assert np.array_equal(load_data("set", "nowhere").test_x, held_out)


@pytest.mark.parametrize("mode,options", [
    ("I;16", {}), ("F", {}), ("RGBA", {}), ("LA", {}), ("P", dict(transparency=0))])
def test_what_8_bits_of_rgb_do_not_hold_is_refused_by_name(mode, options):
    path = "7.tif" if mode == "F" else "7.png"
    Image.new(mode, (5, 6)).save(path, **options)
    with refused(path, "8 bits"):
        read_image(path)


def test_folders_that_do_not_fit():
    for name in ("train/cat", "train/owl", "test/cat", "test/owl"):
        write_image(Path("set", name, "0.png"))
    with refused("--dataset set/train: not digits, cifar10, cifar100", "train/"):
        load_data("set/train", "nowhere")
    write_image(Path("set/test/owl/7.png"), size=(5, 7))
    with refused("set: ", "different sizes", "(6, 5), (7, 5)"):
        load_data("set", "nowhere")
    Path("set/test/owl/7.png").unlink()
    Path("set/test/owl").rename("set/test/ant")  # as many classes, but other labels
    with refused("set: train/ and test/ have different classes"):
        load_data("set", "nowhere")


# -------------------------------------------------------------------------------------------- CIFAR
def test_cifar_is_downloaded_once_and_kept(tmp_path, monkeypatch):
    asked, pixels = [], np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)

    def cifar100(folder, train, download):
        asked.append((folder, train, download))
        return SimpleNamespace(data=pixels + train, targets=[train, 0], classes=["apple", "baby"])

    monkeypatch.setattr("torchvision.datasets.CIFAR100", cifar100)
    for _ in range(2):
        data = load_data("cifar100", str(tmp_path))
        assert np.array_equal(data.train_x, pixels + 1) and np.array_equal(data.test_x, pixels)
        assert data.train_y.tolist() == [1, 0] and data.test_y.tolist() == [0, 0]
        assert data.classes == ["apple", "baby"]
    assert asked == [(tmp_path, True, True), (tmp_path, False, True)]


# ------------------------------------------------------------------------------------------ batches
def some_images(n=12, size=(6, 5)):
    g = torch.Generator().manual_seed(1)
    # no pixel is 0, because zeros are the padding
    x = torch.randint(1, 256, (n, *size, 3), dtype=torch.uint8, generator=g)
    y = torch.arange(n) % 3
    return Images("some", list("012"), x, y, x[:5], y[:5])


def epoch_of(data, flags, epoch=0):
    """[(images, labels)] of one epoch."""
    batches = Batches(data, parse_args(f"--dataset some {flags}".split()))
    return [batches.cut(plan) for plan in batches.plan(epoch)]


def test_crops_are_windows_of_the_zero_padded_image_and_flips_their_mirror():
    data, windows, seen = some_images(), {}, []
    padded = F.pad(data.train_x.permute(0, 3, 1, 2), (2, 2, 2, 2)).numpy()  # (N, C, 10, 9)
    for i, top, left in product(range(12), range(5), range(5)):
        window = padded[i, :, top:top + 6, left:left + 5]
        windows[window.tobytes()] = i, top, left, False
        windows[window[:, :, ::-1].tobytes()] = i, top, left, True
    for epoch in range(8):
        for images, labels in epoch_of(data, "--batch-size 4 --crop-padding 2", epoch):
            assert images.shape == (4, 3, 6, 5) and images.dtype == torch.uint8
            assert images.is_contiguous(memory_format=torch.channels_last)
            batch = [windows[image.numpy().tobytes()] for image in images]  # KeyError: no window
            assert labels.tolist() == [data.train_y[i] for i, *_ in batch]
            seen += batch
    _, tops, lefts, flips = zip(*seen)
    assert set(tops) == set(lefts) == set(range(5)) and tops != lefts
    assert 0.3 < sum(flips) / len(seen) < 0.7


def test_each_epoch_shows_each_image_once_in_an_order_of_its_own():
    """But for an incomplete last batch. Without crops and flips the pixels are left as they are."""
    data, orders = some_images(n=11), set()
    pixels = {tuple(x.permute(2, 0, 1).flatten().tolist()) for x in data.train_x}
    for epoch, seed in ((0, 0), (0, 0), (1, 0), (0, 1)):
        batches = epoch_of(data, f"--batch-size 4 --crop-padding 0 --no-flip --seed {seed}", epoch)
        shown = [tuple(x.flatten().tolist()) for images, _ in batches for x in images]
        assert len(shown) == len(set(shown)) == 8 and set(shown) <= pixels
        orders.add(tuple(shown))
    assert len(orders) == 3  # one for each seed and epoch, whenever it is drawn


def test_the_processes_share_the_batches_of_one(monkeypatch):
    """What two of them see in a step, one after the other, is what one alone sees."""
    data, flags = some_images(), "--batch-size 4"
    alone = epoch_of(data, flags)
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(epoch_of(data, flags))
    for whole, first, second in zip(alone, *shares, strict=True):
        for one, *two in zip(whole, first, second):
            assert torch.equal(one, torch.cat(two))


def test_batch_sizes_that_do_not_fit(monkeypatch):
    assert len(epoch_of(some_images(), "--batch-size 12")) == 1
    with refused("--batch-size 13 does not fit", "12 training images"):
        epoch_of(some_images(), "--batch-size 13")
    monkeypatch.setenv("WORLD_SIZE", "5")
    with refused("--batch-size 12 does not fit", "5 processes"):
        epoch_of(some_images(), "--batch-size 12")
