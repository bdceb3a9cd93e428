"""The data: digits, CIFAR by torchvision, image folders; in one process and in several."""
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import threading
import tracemalloc
from contextlib import redirect_stderr
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import set_forkserver_preload

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from test_teacher import make_folder, tiny_data
from torch.overrides import TorchFunctionMode

import train_teacher
from train_teacher import Images, load_checkpoint, load_data


def load(root):
    """The folder `root`, its cache beside it."""
    return load_data(str(root), root.parent / "cache")


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def never_decoded(monkeypatch):
    """Call it: from then on, decoding fails the test."""
    def fail(files):
        pytest.fail("decoded again")
    return lambda: monkeypatch.setattr(train_teacher, "decode", fail)


@pytest.fixture
def refused(capsys):
    """refused(root, words...): it ends with code 2 and one line on stderr with these words."""
    def check(root, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            load(root)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1, error
        for word in (f"--dataset {root}", *words):
            assert str(word) in error
    return check


# ------------------------------------------------------------------------------- digits, statistics
def test_digits_are_the_uci_digits():
    data = load_data("digits", "nowhere")
    assert str(data).startswith("digits: 1,437 + 360 images of 1x8x8, 10 classes")
    assert data.train_x.max() == 255 and data.train_x.min() == 0
    # the first image of the set, a zero, is held out; its first row is 0 0 5 13 9 1 0 0 of 16
    assert data.test_y[0] == 0
    assert data.test_x[0, 0, :, 0].tolist() == [v * 255 // 16 for v in (0, 0, 5, 13, 9, 1, 0, 0)]
    # recorded in checkpoints: another one, and no run on the digits could be resumed
    assert data.sha256.startswith("08def5d750cb")


def test_statistics_are_those_of_the_direct_formula():
    x = torch.randint(0, 256, (30, 7, 5, 3), dtype=torch.uint8)
    x[..., 1] = 77                                                 # a channel without variance
    data = Images("x", ["a", "b"], x, torch.arange(30) % 2, x[:2] // 2, torch.arange(2))
    direct = x.double().div(255).flatten(0, 2)                     # (N*H*W, C)
    assert data.mean == pytest.approx(direct.mean(0).tolist(), rel=1e-13)
    std = direct.std(0, correction=0).tolist()
    assert data.std == pytest.approx([std[0], 1 / 255, std[2]], rel=1e-13)


def test_a_view_is_the_same_data_as_its_copy():
    planes = torch.randint(0, 256, (4, 3, 6, 5), dtype=torch.uint8)
    x, y = planes.permute(0, 2, 3, 1), torch.arange(4) % 2         # as torchvision's CIFAR has it
    view = Images("x", ["a", "b"], x, y, x, y)
    copy = Images("x", ["a", "b"], x.contiguous(), y, x.contiguous(), y)
    pixels, labels = x.contiguous().numpy().tobytes(), y.numpy().tobytes()
    expected = hashlib.sha256(pixels + labels + pixels + labels).hexdigest()
    assert view.sha256 == copy.sha256 == expected


def test_normalised_training_set_has_zero_mean_and_unit_variance():
    data = tiny_data(n=50)
    x = data.normalize(data.train_x.permute(0, 3, 1, 2))
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


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


def test_decoding_and_the_cache_hold_the_pixels_once(tmp_path):
    picture = tmp_path / "teal.png"
    save(picture, Image.new("RGB", (600, 600), "teal"))
    for split, n in (("train", 50), ("test", 10)):
        for name in "ab":
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(n // 2):
                (tmp_path / "set" / split / name / f"{i}.png").symlink_to(picture)
    Image.init()  # the plugins' modules are not counted
    for _ in ("decoded and kept", "read from the cache"):
        tracemalloc.start()
        data = load(tmp_path / "set")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(data.train_y) + len(data.test_y) == 60
        assert peak < 1.5 * 60 * 600 * 600 * 3


# ------------------------------------------------------------------------------------------ folders
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_folder_is_read_cached_and_read_again(tmp_path, mode, monkeypatch, never_decoded):
    pixels = make_folder(tmp_path / "set", mode=mode)
    data = load(tmp_path / "set")
    assert data.shape == ({"RGB": 3, "L": 1}[mode], 6, 5) and data.classes == ["cat", "dog", "owl"]
    assert data.train_y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.test_y.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(data.train_x[5].numpy().squeeze(), pixels["train", "dog"][1])
    assert np.array_equal(data.test_x[5].numpy().squeeze(), pixels["test", "owl"][1])
    never_decoded()
    assert load(tmp_path / "set").describe() == data.describe()
    monkeypatch.undo()
    Image.fromarray(255 - pixels["train", "cat"][0]).save(tmp_path / "set/train/cat/0.png")
    assert load(tmp_path / "set").sha256 != data.sha256            # a changed image is noticed


def test_another_spelling_of_the_path_is_the_same_data(tmp_path, monkeypatch, never_decoded):
    make_folder(tmp_path / "set")
    data = load(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    os.symlink("set", "link")
    never_decoded()
    for spelling in ("set", "./set/", "cache/../set", "set/../set"):
        assert load_data(spelling, "cache").sha256 == data.sha256
    monkeypatch.undo()
    assert load(tmp_path / "link").sha256 == data.sha256


def test_a_cache_that_is_damaged_or_cannot_be_kept(tmp_path, capsys):
    make_folder(tmp_path / "set")
    sha256 = load(tmp_path / "set").sha256
    assert capsys.readouterr() == ("", "")
    cache, = (tmp_path / "cache").iterdir()
    good = cache.read_bytes()
    middle = len(good) // 2
    for bad in (good[:middle], b"", good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:]):
        cache.write_bytes(bad)
        assert load(tmp_path / "set").sha256 == sha256
        assert cache.read_bytes() == good
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [cache.name]
    (tmp_path / "file").write_text("")
    assert load_data(str(tmp_path / "set"), tmp_path / "file").sha256 == sha256
    assert "not kept" in capsys.readouterr().err


def test_an_edited_reader_does_not_get_the_old_cache(tmp_path, monkeypatch):
    make_folder(tmp_path / "set")
    data, read_image = load(tmp_path / "set"), train_teacher.read_image
    monkeypatch.setattr(train_teacher, "read_image", lambda path: 255 - read_image(path))
    assert torch.equal(load(tmp_path / "set").train_x, 255 - data.train_x)


def test_links_are_followed_and_relabelling_or_replacing_behind_them_is_noticed(tmp_path):
    root, store = tmp_path / "set", tmp_path / "store"
    pixels = make_folder(store / "set", classes=["cat", "dog"], train=3)
    for split in ("train", "test"):
        (root / split / "cat").mkdir(parents=True)
        for path in (store / "set" / split / "cat").iterdir():
            (root / split / "cat" / path.name).symlink_to(path)
        (root / split / "dog").symlink_to(store / "set" / split / "dog")  # a whole class
    data = load(root)
    assert np.array_equal(data.train_x[4], pixels["train", "dog"][1])

    # another label, the same files in the same order
    os.unlink(root / "train/cat/2.png")
    (root / "train/dog/-.png").symlink_to(store / "set/train/cat/2.png")
    relabelled = load(root)
    assert relabelled.train_y.tolist() == [0, 0, 1, 1, 1, 1]
    assert torch.equal(relabelled.train_x, data.train_x)

    # other pixels in a file of the same size and time
    target = store / "set/train/cat/0.png"
    before, other = target.stat(), 255 - pixels["train", "cat"][0]
    Image.fromarray(other).save(store / "new.png")
    padding = max(before.st_size - (store / "new.png").stat().st_size, 0)
    with open(store / "new.png", "ab") as file:
        file.write(bytes(padding))                                 # after the end of the picture
    os.utime(store / "new.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(store / "new.png", target)
    assert np.array_equal(load(root).train_x[0], other)


def test_subfolders_of_a_class_belong_to_it(tmp_path):
    make_folder(tmp_path / "set", train=2)
    flat = load(tmp_path / "set")
    for folder in ("1/2", "more"):
        (tmp_path / "set/train/cat" / folder).mkdir(parents=True)
    os.rename(tmp_path / "set/train/cat/0.png", tmp_path / "set/train/cat/1/2/x.png")
    nested = load(tmp_path / "set")
    assert nested.sha256 == flat.sha256 and nested.train_y.tolist() == [0, 0, 1, 1, 2, 2]


def test_what_is_skipped_is_said_with_its_count(tmp_path, capsys):
    root = tmp_path / "set"
    make_folder(root)
    expected = load(root).sha256
    for name in ("Thumbs.db", "train/desktop.ini", "train/cat/Thumbs.db", "test/dog/labels.csv",
                 "train/cat/.DS_Store", "train/cat/._0.png", "train/x.png",
                 "train/owl/.ipynb_checkpoints/0.png"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / "train/cat/0.png", root / name)
    os.symlink("nowhere", root / "train/cat/notes.txt")
    os.rename(root / "train/cat/1.png", root / "train/cat/1.PNG")
    capsys.readouterr()
    for _ in ("decoded", "from the cache"):
        assert load(root).sha256 == expected
        note = capsys.readouterr().err
        assert note.count("\n") == 1 and "skipped 8," in note and "train/cat/.DS_Store" in note


def test_names_that_the_console_cannot_show(tmp_path, monkeypatch):
    make_folder(tmp_path / "猫", classes=["\udcff", "#1 [x] 犬?"])  # the first is no UTF-8
    (tmp_path / "猫/train/\udcff/犬.txt").write_text("")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(shown, "ascii", "backslashreplace"))
    assert load(tmp_path / "猫").classes == ["#1 [x] 犬?", "\udcff"]
    assert b"\\u72ac.txt" in shown.getvalue()


def test_val_in_place_of_test(tmp_path):
    make_folder(tmp_path / "set")
    expected = load(tmp_path / "set").sha256
    os.rename(tmp_path / "set/test", tmp_path / "set/val")
    assert load(tmp_path / "set").sha256 == expected


def test_folders_that_do_not_fit(tmp_path, refused):
    root = tmp_path / "set"
    make_folder(root)
    shutil.copytree(root, tmp_path / "good")

    def changed(change, *words):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(tmp_path / "good", root)
        change()
        refused(root, *words)

    cat, owl = root / "train/cat", root / "test/owl"
    small = Image.new("RGB", (9, 4))
    changed(lambda: shutil.rmtree(root / "train"), "no folder train/", "train/<class>")
    changed(lambda: shutil.rmtree(root / "test"), "no folder test/", "val/<class>")
    changed(lambda: shutil.rmtree(root), "cifar100", "train/<class>")
    changed(lambda: os.rename(owl, root / "test/yak"), "'owl'")
    changed(lambda: [path.unlink() for path in owl.iterdir()], "'owl'", "no images in test/")
    changed(lambda: os.symlink("nowhere", cat / "7.png"), "train/cat/7.png", "points nowhere")
    changed(lambda: os.symlink("..", cat / "up"), "train/cat/up", "link to a folder")
    changed(lambda: save(cat / "7.png", small), "train/cat/7.png", "9x4", "5x6", "one size")


# ---------------------------------------------------------------------------------- kinds of images
GREY = np.arange(30, dtype=np.uint8).reshape(6, 5) * 8 + 3
COLOUR = np.stack([GREY, 255 - GREY, GREY // 3], -1)
PALETTE = np.stack([255 - GREY, GREY // 2, GREY], -1)


def with_alpha(pixels, alpha):
    return Image.fromarray(np.dstack([pixels, np.broadcast_to(np.uint8(alpha), (6, 5))]))


def cmyk():
    return Image.fromarray(np.dstack([255 - COLOUR, np.zeros_like(GREY)]), "CMYK")


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


def two_frames():
    return dict(save_all=True, append_images=[Image.fromarray(COLOUR[::-1].copy())])


@pytest.mark.parametrize("suffix,image,options,expected", [
    ("png", Image.fromarray(GREY), {}, GREY),
    ("png", Image.fromarray(GREY.astype(np.uint16) * 257), {}, GREY),
    ("png", Image.fromarray(GREY > 99), {}, 255 * (GREY > 99)),
    ("png", with_alpha(GREY, 255), {}, GREY),
    ("png", with_alpha(COLOUR, 255), {}, COLOUR),
    ("PNG", Image.fromarray(COLOUR), {}, COLOUR),
    ("png", palette(), {}, PALETTE),
    ("gif", palette(), {}, PALETTE),
    ("tif", cmyk(), {}, COLOUR),
    ("png", Image.fromarray(np.rot90(COLOUR).copy()), dict(exif=turned()), COLOUR),
    ("ppm", Image.fromarray(COLOUR), {}, COLOUR),
    ("bmp", Image.fromarray(COLOUR), {}, COLOUR),
    ("webp", Image.fromarray(COLOUR), dict(lossless=True), COLOUR),
], ids=lambda value: getattr(value, "mode", None))
def test_images_are_read_as_what_they_are(tmp_path, suffix, image, options, expected):
    for split in ("train", "test"):
        for name in "ab":
            save(tmp_path / "set" / split / name / f"0.{suffix}", image, **options)
    data = load(tmp_path / "set")
    assert data.shape[0] == (3 if expected.ndim == 3 else 1)
    assert np.array_equal(data.train_x[0].numpy().squeeze(), expected)


@pytest.mark.parametrize("name,image,options,words", [
    ("x.png", with_alpha(COLOUR, GREY), {}, "transparent"),
    ("x.png", with_alpha(GREY, GREY), {}, "transparent"),
    ("x.png", palette(), dict(transparency=int(GREY[0, 0])), "transparent"),
    ("x.gif", Image.fromarray(COLOUR), two_frames(), "2 frames"),
    ("x.png", Image.fromarray(COLOUR), two_frames(), "2 frames"),
    ("x.tif", Image.fromarray(GREY.astype(np.uint16)), {}, "I;16"),
    ("x.tif", Image.fromarray(GREY.astype(np.int32)), {}, "mode I"),
    ("x.tif", Image.fromarray(GREY.astype(np.float32)), {}, "mode F"),
])
def test_what_is_no_plain_image_is_refused_by_name(tmp_path, refused, name, image, options, words):
    make_folder(tmp_path / "set")
    save(tmp_path / "set/test/owl" / name, image, **options)
    refused(tmp_path / "set", f"test/owl/{name}", words, "replace or remove")


def test_a_damaged_image_is_refused_by_name(tmp_path, refused):
    make_folder(tmp_path / "set")
    path = tmp_path / "set/train/dog/2.png"
    good = path.read_bytes()
    for content in (good[:len(good) // 2], b"0,1\n", b""):
        path.write_bytes(content)
        refused(tmp_path / "set", "train/dog/2.png", "replace or remove")


@pytest.mark.parametrize("odd", ["train/cat/0.png", "train/owl/3.png", "test/owl/1.png"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_grey_only_if_all_are_grey(tmp_path, mode, odd):
    pixels = make_folder(tmp_path / "set", mode=mode)
    Image.fromarray(GREY if mode == "RGB" else COLOUR).save(tmp_path / "set" / odd)
    data = load(tmp_path / "set")
    assert data.shape == (3, 6, 5)
    changed = data.test_x[-1] if "test" in odd else data.train_x[-1 if "owl" in odd else 0]
    assert np.array_equal(changed, np.dstack([GREY] * 3) if mode == "RGB" else COLOUR)
    other = pixels["train", "dog"][0]
    assert np.array_equal(data.train_x[4], other if mode == "RGB" else np.dstack([other] * 3))


# -------------------------------------------------------------------------------------------- CIFAR
def stand_in(name, url):
    """(archive, attributes that make torchvision take it for CIFAR, pixels and labels by file)."""
    from torchvision import datasets
    source, rng = getattr(datasets, name.upper()), np.random.default_rng(len(name))
    K, key = (10, "labels") if name == "cifar10" else (100, "fine_labels")
    content, files = {}, {}
    for file, _ in source.train_list + source.test_list:
        x, y = rng.integers(0, 256, (40, 3072), dtype=np.uint8), rng.integers(0, K, 40).tolist()
        content[file], files[file] = (x, y), pickle.dumps({"data": x, key: y})
    classes = [f"class {k}" for k in range(K)]
    files[source.meta["filename"]] = pickle.dumps({source.meta["key"]: classes})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for file, pickled in files.items():
            member = tarfile.TarInfo(f"{source.base_folder}/{file}")
            member.size = len(pickled)
            archive.addfile(member, io.BytesIO(pickled))
    md5 = {file: hashlib.md5(pickled).hexdigest() for file, pickled in files.items()}
    attributes = dict(
        url=f"{url}/{source.filename}", tgz_md5=hashlib.md5(buffer.getvalue()).hexdigest(),
        train_list=[[file, md5[file]] for file, _ in source.train_list],
        test_list=[[file, md5[file]] for file, _ in source.test_list],
        meta=source.meta | dict(md5=md5[source.meta["filename"]]))
    return source.filename, buffer.getvalue(), attributes, content


@pytest.fixture(scope="module")
def cifar():
    """A server of both archives: .attributes and .content by name, .requests of paths so far."""
    pytest.importorskip("torchvision")
    from torchvision import datasets

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path[1:])
            body = server.archives[self.path[1:]]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with (ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
          pytest.MonkeyPatch.context() as patch):
        patch.setenv("no_proxy", "127.0.0.1")
        url = f"http://127.0.0.1:{server.server_port}"
        server.requests, server.archives, server.attributes, server.content = [], {}, {}, {}
        for name in ("cifar10", "cifar100"):
            file, server.archives[file], attributes, content = stand_in(name, url)
            server.attributes[name], server.content[name] = attributes, content
            for key, value in attributes.items():
                patch.setattr(getattr(datasets, name.upper()), key, value)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("name,n", [("cifar10", 200), ("cifar100", 40)])
def test_cifar_is_downloaded_once_and_read_right(cifar, tmp_path, name, n):
    cifar.requests.clear()
    data = load_data(name, tmp_path / "new" / "data")
    requests = len(cifar.requests)
    assert requests and load_data(name, tmp_path / "new" / "data").sha256 == data.sha256
    assert len(cifar.requests) == requests
    *train, (test_x, test_y) = cifar.content[name].values()
    planes = np.concatenate([x for x, _ in train])                 # (N, C*H*W)
    x = planes.reshape(n, 3, 32, 32).transpose(0, 2, 3, 1)         # (N, H, W, C)
    assert np.array_equal(data.train_x, x)
    assert data.train_y.tolist() == sum((y for _, y in train), [])
    assert data.test_x[3, 5, 7, 2] == test_x[3].reshape(3, 32, 32)[2, 5, 7]
    assert data.test_y.tolist() == test_y
    assert data.classes[:2] == ["class 0", "class 1"] and data.shape == (3, 32, 32)
    direct = x.astype(np.float64) / 255
    assert data.mean == pytest.approx(direct.mean((0, 1, 2)))
    assert data.std == pytest.approx(direct.std((0, 1, 2)))


def test_the_papers_command(cifar, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_teacher.main("--epochs 1 --width 2 --depth 18 --batch-size 20 --device cpu".split())
    made = load_checkpoint("r34.pt")
    assert made["data"]["name"] == "cifar100" and made["data"]["train"] == 40
    assert made["arch"]["num_classes"] == len(made["data"]["classes"]) == 100


def test_cifar_that_cannot_be_had(cifar, tmp_path, monkeypatch, capsys):
    from torchvision import datasets
    monkeypatch.setattr(datasets.CIFAR100, "url", "http://127.0.0.1:9/cifar.tar.gz")
    unreachable = ["not in", str(tmp_path), "http://127.0.0.1:9", "digits"]
    for words in (unreachable, ["torchvision", "imported"]):
        with pytest.raises(SystemExit) as end:
            load_data("cifar100", tmp_path)
        error = capsys.readouterr().err.splitlines()[-1]
        assert end.value.code == 1 and all(word in error for word in words)
        monkeypatch.setitem(sys.modules, "torchvision", None)


# ------------------------------------------------------------------------- several processes, nodes
def observed(load, decoded):
    """What `load` gives in this process: how often it decoded, how it ended, what it printed."""
    before, printed = len(decoded), io.StringIO()
    with redirect_stderr(printed):
        try:
            end = load().sha256
        except SystemExit as stop:
            end = stop.code
    errors = [line for line in printed.getvalue().splitlines() if "error:" in line]
    return dict(end=end, decoded=len(decoded) - before, errors=errors)


def worker(rank, folder, attributes):
    """One of four processes on two nodes, each with a folder of its own and one that both share."""
    node = rank // 2
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank % 2), WORLD_SIZE="4")
    torch.set_num_threads(1)
    from torchvision import datasets
    for name, values in attributes.items():
        for key, value in values.items():
            setattr(getattr(datasets, name.upper()), key, value)
    decode, decoded = train_teacher.decode, []
    train_teacher.decode = lambda files: decoded.append(1) or decode(files)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=4)
    own, shared = folder / f"node{node}", folder / "shared"
    cases = dict(
        cifar_shared=lambda: load_data("cifar10", shared),
        cifar_own=lambda: load_data("cifar100", own),
        folder_shared=lambda: load_data(str(shared / "set"), shared),
        folder_own=lambda: load_data(str(own / "set"), own),
        cache_not_kept=lambda: load_data(str(shared / "set"), shared / "file"),
        first_fails=lambda: load_data(str(shared / "nothing"), shared),
        second_node_fails=lambda: load_data(str(own / "only0"), own))
    result = {name: observed(load, decoded) for name, load in cases.items()}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def four(cifar, tmp_path_factory):
    """{case: what each of four processes saw}, and how often each archive was downloaded."""
    folder = tmp_path_factory.mktemp("four")
    for node in ("node0", "node1", "shared"):
        make_folder(folder / node / "set")
    make_folder(folder / "node0/only0")
    (folder / "shared/file").write_text("")
    cifar.requests.clear()
    load_data("cifar10", folder / "alone")
    alone = len(cifar.requests)  # torchvision asks more than once, for redirects
    cifar.requests.clear()
    set_forkserver_preload(["test_data", "torchvision"])  # imported once for all four
    mp.start_processes(worker, (folder, cifar.attributes), nprocs=4, start_method="forkserver")
    seen = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]
    downloads = {path: cifar.requests.count(path) / alone for path in cifar.archives}
    return {case: [one[case] for one in seen] for case in seen[0]} | dict(downloads=downloads)


def test_one_process_of_the_run_downloads_or_decodes(four, tmp_path):
    make_folder(tmp_path / "set")
    sha256 = load(tmp_path / "set").sha256
    assert four["downloads"]["cifar-10-python.tar.gz"] == 1
    assert len({one["end"] for one in four["cifar_shared"]}) == 1
    assert [one["decoded"] for one in four["folder_shared"]] == [1, 0, 0, 0]
    for one in four["folder_shared"] + four["folder_own"] + four["cache_not_kept"]:
        assert one["end"] == sha256 and one["errors"] == []


def test_nodes_that_share_no_folder_get_the_data_themselves(four):
    assert four["downloads"]["cifar-100-python.tar.gz"] == 2
    assert len({one["end"] for one in four["cifar_own"]}) == 1
    assert [one["decoded"] for one in four["folder_own"]] == [1, 0, 1, 0]


def test_a_failure_ends_every_process_with_one_line(four):
    cases = [("first_fails", 0, "nothing"), ("second_node_fails", 2, "only0")]
    for case, failing, missing in cases:
        for process, seen in enumerate(four[case]):
            assert seen["end"] == (2 if process == failing else 1)
            assert len(seen["errors"]) == (1 if process == failing else 0)
        assert missing in four[case][failing]["errors"][0]
