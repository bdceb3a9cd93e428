"""The data: digits, folders of images, CIFAR by torchvision. No pixel is misread, none is lost."""
import hashlib
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from test_teacher import make_folder, tiny_data
from torch.overrides import TorchFunctionMode

from train_teacher import Images, load_data


def load(root):
    return load_data(str(root), "nowhere")


@pytest.fixture
def refused(capsys):
    """refused(root) -> the one line on stderr with which it ends, status 2."""
    def refused(root, data_dir="nowhere"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            load_data(str(root), data_dir)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1, error
        assert f"--dataset {root}: " in error
        return error
    return refused


@pytest.fixture
def root(tmp_path):
    """A folder of colour images: train/ and test/, of cat, dog and owl."""
    make_folder(tmp_path / "set")
    return tmp_path / "set"


# ------------------------------------------------------------------------------- digits, statistics
def test_digits_are_the_uci_digits():
    data = load("digits")
    assert str(data).startswith("digits: 1,437 + 360 images of 1x8x8, 10 classes")
    assert data.train_x.max() == 255 and data.train_x.min() == 0
    # the first image of the set, a zero, is held out; its first row is 0 0 5 13 9 1 0 0 of 16
    assert data.test_y[0] == 0
    assert data.test_x[0, 0, :, 0].tolist() == [v * 255 // 16 for v in (0, 0, 5, 13, 9, 1, 0, 0)]
    # recorded in checkpoints: with another one no run on the digits could be resumed
    assert data.sha256.startswith("08def5d750cb")


def test_statistics_are_those_of_the_direct_formula():
    x = torch.randint(0, 256, (30, 7, 5, 3), dtype=torch.uint8)
    x[..., 1] = 77  # a channel without variance
    data = Images("x", ["a", "b"], x, torch.arange(30) % 2, x[:2] // 2, torch.arange(2))
    direct = x.double().div(255).flatten(0, 2)  # (N*H*W, C)
    assert data.mean == pytest.approx(direct.mean(0).tolist(), rel=1e-13)
    std = direct.std(0, correction=0).tolist()
    assert data.std == pytest.approx([std[0], 1 / 255, std[2]], rel=1e-13)


class LargestTensor(TorchFunctionMode):
    """Bytes of the largest tensor that any operation gives."""
    largest = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result


def test_statistics_make_no_tensor_larger_than_the_pixels():
    x, y = torch.randint(0, 256, (50, 16, 16, 3), dtype=torch.uint8), torch.arange(50) % 2
    with LargestTensor() as tensors:
        Images("x", ["a", "b"], x, y, x[:1], y[:1])
    assert 0 < tensors.largest <= x.numel()


def test_the_hash_is_of_pixels_and_labels_alone():
    planes = torch.randint(0, 256, (4, 3, 6, 5), dtype=torch.uint8)
    x, y = planes.permute(0, 2, 3, 1), torch.arange(4) % 2  # a view, as torchvision's CIFAR has it
    pixels, labels = x.contiguous().numpy().tobytes(), y.numpy().tobytes()
    expected = hashlib.sha256(pixels + labels + pixels + labels).hexdigest()
    for name, images in (("view", x), ("copy", x.contiguous())):
        assert Images(name, ["a", "b"], images, y, images, y).sha256 == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_normalised_training_set_has_mean_0_and_variance_1(dtype, layout):
    data = tiny_data(n=50).to("cpu", dtype, layout)
    x = data.normalize(data.train_x.permute(0, 3, 1, 2))  # (N, H, W, C) -> (N, C, H, W)
    assert x.dtype == dtype and x.is_contiguous(memory_format=layout)
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3, dtype=dtype), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3, dtype=dtype), atol=1e-5)


# ------------------------------------------------------------------------------------------ folders
@pytest.mark.parametrize("mode,channels", [("RGB", 3), ("L", 1)])
def test_a_folder_is_read_in_the_order_of_its_names(tmp_path, mode, channels):
    pixels = make_folder(tmp_path / "set", mode=mode)
    data = load(tmp_path / "set")
    assert data.shape == (channels, 6, 5) and data.classes == ["cat", "dog", "owl"]
    assert data.train_y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.test_y.tolist() == [0, 0, 1, 1, 2, 2]
    for split, x in (("train", data.train_x), ("test", data.test_x)):
        expected = sum((pixels[split, name] for name in data.classes), [])
        assert np.array_equal(x, np.stack(expected).reshape(x.shape))


def test_the_same_images_by_another_way_are_the_same_data(root, tmp_path, monkeypatch):
    """Through links, by another spelling, in subfolders, of test and in val."""
    sha256 = load(root).sha256
    (tmp_path / "links/train/cat").mkdir(parents=True)
    for name in os.listdir(root / "train/cat"):
        os.symlink(root / "train/cat" / name, tmp_path / "links/train/cat" / name)
    os.symlink(root / "train/dog", tmp_path / "links/train/dog")
    os.symlink(root / "train/owl", tmp_path / "links/train/owl")
    os.symlink(root / "test", tmp_path / "links/val")
    monkeypatch.chdir(tmp_path)
    for spelling in ("set", "./set/", "links/../set", "links"):
        assert load(spelling).sha256 == sha256
    (root / "train/cat/4/5").mkdir(parents=True)
    os.rename(root / "train/cat/3.png", root / "train/cat/4/5/3.png")
    assert load(root).sha256 == sha256


def test_test_comes_before_val(root):
    expected = load(root).sha256
    make_folder(root / "more", seed=1)
    os.rename(root / "more/test", root / "val")
    assert load(root).sha256 == expected


def test_what_is_hidden_or_no_image_is_passed_over(tmp_path):
    root = tmp_path / ".hidden/set"  # what lies above the folder is no matter
    make_folder(root)
    expected = load(root).sha256
    for name in ("Thumbs.db", "train/desktop.ini", "train/x.png", "train/cat/Thumbs.db",
                 "test/dog/labels.csv", "train/cat/._0.png", "train/.cache/0.png",
                 "train/owl/.ipynb_checkpoints/0.png"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / "train/cat/0.png", root / name)
    os.symlink("nowhere", root / "train/cat/notes.txt")
    os.rename(root / "train/cat/1.png", root / "train/cat/1.PNG")  # an image all the same
    assert load(root).sha256 == expected


def test_folders_that_do_not_fit(root, tmp_path, refused):
    def changed(change, *words):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(root, copy)
        change(copy)
        error = refused(copy)
        assert all(word in error for word in words), error

    changed(shutil.rmtree, "copy", "train/<class>/*")
    changed(lambda folder: shutil.rmtree(folder / "train"), "copy", "train/<class>/*")
    changed(lambda folder: shutil.rmtree(folder / "test"), "copy", "val/<class>/*")
    changed(lambda folder: shutil.rmtree(folder / "test/owl"), "'owl'", "train/", "test/")
    changed(lambda folder: [f.unlink() for f in (folder / "test/dog").iterdir()], " dog.")
    changed(lambda folder: os.symlink("nowhere", folder / "train/cat/7.png"), "train/cat/7.png")
    for width, height in ((9, 6), (5, 4)):
        image = Image.new("RGB", (width, height))
        changed(lambda folder: image.save(folder / "test/owl/7.png"),
                f"test/owl/7.png is {width}x{height}", "train/cat/0.png 5x6", "one size")


# ---------------------------------------------------------------------------------- kinds of images
GREY = np.arange(30, dtype=np.uint8).reshape(6, 5) * 8 + 3
COLOUR = np.stack([GREY, 255 - GREY, GREY // 3], -1)
PALETTE = np.stack([255 - GREY, GREY // 2, GREY], -1)


def palette():
    """An image of PALETTE's colours whose pixels are numbers of colours."""
    image, level = Image.fromarray(GREY, "P"), np.arange(256)
    image.putpalette(np.stack([255 - level, level // 2, level], -1).astype(np.uint8).tobytes())
    return image


def turned():
    """The EXIF data of a file that asks to be turned clockwise by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def saved(image, **options):
    """-> a function that writes the image to a path."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return lambda path: image.save(path, **options)


@pytest.mark.parametrize("name,write,expected", [
    ("grey.png", saved(GREY), GREY),
    ("bits.png", saved(GREY > 99), 255 * (GREY > 99)),
    ("palette.png", saved(palette()), PALETTE),
    ("colour.png", saved(COLOUR), COLOUR),
    ("colour.tif", saved(COLOUR), COLOUR),
    ("colour.ppm", saved(COLOUR), COLOUR),
    ("turned.png", saved(np.rot90(COLOUR).copy(), exif=turned()), COLOUR),
])
def test_images_are_read_as_what_they_show(tmp_path, name, write, expected):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        write(tmp_path / split / "cat" / name)
    data = load(tmp_path)
    assert data.shape[0] == (3 if expected.ndim == 3 else 1)
    assert np.array_equal(data.train_x[0].squeeze(), expected)


def png_of_16_bits(path):
    """COLOUR times 257, which pillow does not write."""
    def chunk(kind, body):
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    rows = (COLOUR.astype(">u2") * 257).reshape(6, 15)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", 5, 6, 16, 2, 0, 0, 0)  # 16 bits, RGB
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)
                     + chunk(b"IEND", b""))


def ppm_of_10_bits(path):
    path.write_bytes(b"P6 5 6 1023\n" + COLOUR.astype(">u2").tobytes())


@pytest.mark.parametrize("name,write,mode", [
    ("alpha.png", saved(np.dstack([COLOUR, GREY])), "RGBA"),
    ("palette.png", saved(palette(), transparency=int(GREY[0, 0])), "P"),
    ("frames.tif", saved(COLOUR, save_all=True, append_images=[Image.fromarray(COLOUR)]), "RGB"),
    ("cmyk.jpg", saved(Image.fromarray(COLOUR).convert("CMYK")), "CMYK"),
    ("deep_grey.png", saved(GREY.astype(np.uint16) * 257), "I;16"),
    ("deep.png", png_of_16_bits, "RGB"),
    ("ten_bits.ppm", ppm_of_10_bits, "RGB"),
])
def test_what_8_bits_do_not_hold_is_refused_by_name(root, refused, name, write, mode):
    write(root / "test/owl" / name)
    error = refused(root)
    assert f"test/owl/{name}: {mode}, " in error and "8 bits" in error


def test_a_damaged_image_is_refused_by_name(root, refused):
    path = root / "train/dog/2.png"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[60] ^= 4  # in the compressed pixels
    for content in (good[:len(good) // 2], flipped, b"0,1\n", b""):
        path.write_bytes(content)
        assert "train/dog/2.png: " in refused(root)


@pytest.mark.parametrize("odd", ["train/cat/0.png", "test/owl/1.png"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_grey_only_if_all_are_grey(tmp_path, mode, odd):
    pixels = make_folder(tmp_path / "set", mode=mode)
    Image.fromarray(GREY if mode == "RGB" else COLOUR).save(tmp_path / "set" / odd)
    data = load(tmp_path / "set")
    changed = data.test_x[-1] if "test" in odd else data.train_x[0]
    assert np.array_equal(changed, np.dstack([GREY] * 3) if mode == "RGB" else COLOUR)
    other = pixels["train", "dog"][0]
    assert np.array_equal(data.train_x[4], other if mode == "RGB" else np.dstack([other] * 3))


# -------------------------------------------------------------------------------------------- CIFAR
def put_cifar(name, folder):
    """The files that CIFAR's archive holds, of the same random pixels each time; -> their content:
    40 images (40, 3*32*32) and labels for each, the test set's last."""
    from torchvision import datasets
    source, rng = getattr(datasets, name.upper()), np.random.default_rng(0)
    folder = folder / source.base_folder
    folder.mkdir(parents=True)
    K, key = (10, "labels") if name == "cifar10" else (100, "fine_labels")
    content = []
    for file, _ in source.train_list + source.test_list:
        x, y = rng.integers(0, 256, (40, 3072), dtype=np.uint8), rng.integers(0, K, 40).tolist()
        content.append((x, y))
        (folder / file).write_bytes(pickle.dumps({"data": x, key: y}))
    meta = {source.meta["key"]: [f"class {k}" for k in range(K)]}
    (folder / source.meta["filename"]).write_bytes(pickle.dumps(meta))
    return content


@pytest.fixture
def cifar(monkeypatch):
    """CIFAR comes from put_cifar, not from the network; -> a list of the names downloaded."""
    from torchvision.datasets import cifar
    events = []

    def download(url, folder, **_):
        name = "cifar100" if "100" in url else "cifar10"
        events.append(name)
        put_cifar(name, Path(folder))

    monkeypatch.setattr(cifar, "download_and_extract_archive", download)
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5: os.path.exists(path))
    return events


@pytest.mark.parametrize("name,n", [("cifar10", 200), ("cifar100", 40)])
def test_cifar_is_downloaded_once_and_read_right(cifar, tmp_path, name, n):
    data = load_data(name, tmp_path)
    *train, (test_x, test_y) = put_cifar(name, tmp_path / "again")
    planes = np.concatenate([x for x, _ in train])  # (N, C*H*W)
    expected = planes.reshape(n, 3, 32, 32).transpose(0, 2, 3, 1)  # (N, H, W, C)
    # the second time without torchvision's files, and without a download
    for folder in tmp_path.glob("cifar-*"):
        shutil.rmtree(folder)
    for data in (data, load_data(name, tmp_path)):
        assert np.array_equal(data.train_x, expected)
        assert data.train_y.tolist() == sum((y for _, y in train), [])
        assert data.test_x[3, 5, 7, 2] == test_x[3].reshape(3, 32, 32)[2, 5, 7]
        assert data.test_y.tolist() == test_y
        assert data.classes[:2] == ["class 0", "class 1"] and data.shape == (3, 32, 32)
        assert str(data).startswith(f"{name}: {n} + 40 images of 3x32x32")
    assert cifar == [name]
    assert {file.name for file in tmp_path.iterdir()} == {"again", f"{name}.images"}


def test_cifar_in_a_folder_for_reading_alone(cifar, tmp_path, monkeypatch):
    put_cifar("cifar10", tmp_path)
    # root, as which tests may run, may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    before = sorted(tmp_path.rglob("*"))
    assert load_data("cifar10", tmp_path).sha256 == load_data("cifar10", tmp_path).sha256
    assert sorted(tmp_path.rglob("*")) == before and cifar == []


def test_damaged_pixels_of_cifar_are_not_read(cifar, tmp_path, capsys):
    load_data("cifar10", tmp_path)
    file = tmp_path / "cifar10.images"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # a bit of a pixel
    file.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        load_data("cifar10", tmp_path)
    assert end.value.code == 2
    assert f"{file} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("rank,expected", [(0, ["cifar10", "waits"]), (1, ["waits"])])
def test_one_process_downloads_and_the_others_read_after_it(
        cifar, tmp_path, monkeypatch, rank, expected):
    def barrier():  # at the latest now the first process has downloaded
        cifar.append("waits")
        if rank == 1:
            put_cifar("cifar10", tmp_path)

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "barrier", barrier)
    assert len(load_data("cifar10", tmp_path).train_y) == 200
    assert cifar == expected


def test_a_download_that_fails_is_one_line(cifar, tmp_path, monkeypatch, refused):
    def offline(url, folder, **_):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    assert "no route to host" in refused("cifar100", tmp_path)
