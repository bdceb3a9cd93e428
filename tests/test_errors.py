"""Bad input, all four scripts: exit code 2 (1 for the environment's failures), one line that names culprit and remedy, nothing written."""
import gc
import hashlib
import os
import pickle
import random
import shutil
import urllib.error
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval as evaluation
import train_idsnn
import train_teacher
import transfer_init
from test_teacher import make_folder
from train_teacher import load_checkpoint

MAIN = {"teacher": train_teacher.main, "init": transfer_init.main, "idsnn": train_idsnn.main, "eval": evaluation.main}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an image set and what the stages make of it."""
    folder, before = tmp_path_factory.mktemp("made"), os.getcwd()
    os.chdir(folder)
    make_folder(Path("set"), train=8, test=3, size=(8, 8))
    make_folder(Path("grey"), train=8, test=3, size=(8, 8), mode="L")
    make_folder(Path("more"), classes="abcd", train=8, test=3, size=(8, 8))
    for data in ("grey", "more"):
        train_teacher.load_data(data, "data")  # into the cache
    short = ["--epochs", "1", "--batch-size", "8"]
    train_teacher.main(["--dataset", "set", "--width", "1", "--depth", "18", *short])
    transfer_init.main(["--src", "r34.pt"])
    train_idsnn.main(short)
    os.chdir(before)
    return folder


def contents(folder):
    return {str(p): p.is_file() and hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*"))}


@pytest.fixture
def refused(made, monkeypatch, capsys):
    """refused(script, command line, words...): it ends with `code` and one line with these words; the folder stays as it was."""
    monkeypatch.chdir(made)

    def check(script, command, *words, code=2):
        argv = command.split() if isinstance(command, str) else command
        before = contents(".")
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            MAIN[script](argv)
        error = capsys.readouterr().err
        assert end.value.code == code, error
        assert 1 <= len(error.splitlines()) <= 2 and ": error: " in error and len(error) < 500, error
        assert all(str(word) in error for word in words), error
        assert contents(".") == before
        return error
    yield check
    assert not torch.distributed.is_initialized()


# ------------------------------------------------------------------------------------------------------ flags
TRAINING = ["--epochs", "--batch-size", "--lr", "--momentum", "--weight-decay", "--milestones", "--warmup", "--label-smoothing", "--ema",
            "--crop-padding", "--seed"]
NEURON = ["--T", "--decay", "--v-th", "--lens"]
NUMERIC = {"teacher": ["--depth", "--width", *TRAINING], "init": ["--depth", "--width", "--seed", *NEURON],
           "idsnn": ["--alpha", "--temperature", "--self-kd", *NEURON, *TRAINING], "eval": ["--T", "--batch-size"]}
MAY_BE_0 = {"--momentum", "--weight-decay", "--warmup", "--label-smoothing", "--ema", "--crop-padding", "--seed", "--decay", "--alpha",
            "--self-kd"}
MAY_BE_HUGE = {"--milestones"}  # one that is never reached


VALUES = ["0", "-1", "1" + "0" * 30, "nan", "inf", "many", "", "1e"]


@pytest.mark.parametrize("script,flag,value", [(s, f, v) for s, flags in NUMERIC.items() for f in flags for v in VALUES
                                               if not (v == "0" and f in MAY_BE_0 or v == VALUES[2] and f in MAY_BE_HUGE)])
def test_numeric_flags(refused, script, flag, value):
    argv = ["--src", "r34.pt"] * (script == "init") + [flag, value]
    assert "must be" in refused(script, argv, flag, repr(value))


@pytest.mark.parametrize("script,command,words", [
    ("teacher", "--depth 20", ["--depth", "20", "34"]),
    ("teacher", "--width 1.5", ["--width", "1.5", "whole number"]),
    ("teacher", "--batch-size 1", ["--batch-size", "from 2 to 1048576"]),  # batch norm needs two
    ("teacher", "--milestones 60,20", ["--milestones", "60,20", "rising"]),
    ("teacher", "--warmup 1", ["--warmup", "from 0 to 0.99"]),
    ("teacher", "--schedule constant", ["--schedule", "constant", "cosine"]),
    ("teacher", "--recipe slow", ["--recipe", "slow", "fast"]),
    ("teacher", "--recipe fast --momentum 0", ["--no-nesterov", "--momentum"]),
    ("teacher", "--schedule linear --milestones 3", ["--milestones", "step", "linear"]),
    ("teacher", "--aug mixup", ["--aug", "mixup", "strong"]),
    ("teacher", "--precision fp8", ["--precision", "fp8", "bf16"]),
    ("teacher", "--device tpu", ["--device", "tpu", "cuda"]),
    ("teacher", "--stem 5x5", ["--stem", "5x5", "7x7"]),
    ("teacher", "--learning-rate 1", ["--learning-rate"]),
    ("teacher", "--ep 3", ["--ep"]),  # no abbreviations: a later flag would change their meaning
    ("teacher", "--epochs", ["--epochs", "expected one argument"]),
    ("teacher", "r34.pt", ["r34.pt"]),
    ("init", "", ["--src"]),
    ("init", "--src r34.pt --block plain", ["--block", "plain", "sew"]),
    ("init", "--src r34.pt --block-map last", ["--block-map", "last", "spread"]),
    ("init", "--src r34.pt --encoder rate", ["--encoder", "rate", "poisson"]),
    ("init", "--src r34.pt --shortcut no", ["--shortcut", "no", "fresh"]),
    ("init", "--src r34.pt --depth 50 --out new.pt", ["r34.pt", "bottleneck", "--depth"]),
    ("init", "--src r34.pt --classifier no", ["--classifier", "no", "transfer"]),
    ("idsnn", "--tau 2", ["--tau"]),
    ("idsnn", "--recipe slow", ["--recipe", "slow", "fast"]),
    ("idsnn", "--ce all", ["--ce", "all", "steps"]),
    ("eval", "--T 4 0", ["--T", "'0'"]),
    ("eval", "r34.pt --T 4", ["--T", "r34.pt", "teacher"]),
    ("eval", "--no-energy", ["--no-energy"]),
    ("eval", "--plot curves.xyz", ["--plot", "curves.xyz", ".png"]),
    ("eval", "--export onnx idsnn.onnx", ["--export", "nir"]),
    ("eval", "--json no/where.json", ["--json", "no/where.json"]),
    ("eval", "--csv set", ["--csv", "set"]),
    ("eval", "--json idsnn.pt", ["--json", "idsnn.pt"]),
])
def test_other_flags(refused, script, command, words):
    refused(script, command, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["teacher", "idsnn", "eval"])
def test_no_gpu(refused, script):
    refused(script, "--device cuda", "--device", "no GPU")


# ------------------------------------------------------------------------------------------------ checkpoints
class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def changed(path, **entries):
    torch.save(torch.load(path, weights_only=True) | entries, "defect.pt")


def flip_a_bit_of_a_weight(path):
    content = bytearray(Path(path).read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 4
    Path("defect.pt").write_bytes(content)


def without(path, key):
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[key]
    torch.save(checkpoint, "defect.pt")


DEFECTS = {  # what is done to a good checkpoint, given its path -> words of the error
    "missing": (lambda path: None, ["does not exist"]),
    "empty": (lambda path: Path("defect.pt").touch(), ["damaged"]),
    "folder": (lambda path: Path("defect.pt").mkdir(), ["cannot be read"]),
    "half": (lambda path: Path("defect.pt").write_bytes(Path(path).read_bytes()[: os.path.getsize(path) // 2]), ["truncated"]),
    "bit": (flip_a_bit_of_a_weight, ["damaged"]),
    "text": (lambda path: Path("defect.pt").write_text("accuracy 75.41"), ["not a checkpoint of"]),
    "archive": (lambda path: zipfile.ZipFile("defect.pt", "w").writestr("a.txt", "a"), ["not a checkpoint of"]),
    "pickle": (lambda path: Path("defect.pt").write_bytes(pickle.dumps(Malicious())), ["not a checkpoint of"]),
    "malicious": (lambda path: changed(path, metrics=Malicious()), ["not a checkpoint of"]),
    "module": (lambda path: torch.save(torch.nn.Linear(2, 2), "defect.pt"), ["not a checkpoint of"]),
    "tensor": (lambda path: torch.save(torch.zeros(3), "defect.pt"), ["not a checkpoint of"]),
    "state": (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), "defect.pt"), ["not a checkpoint of"]),
    "without": (lambda path: without(path, "config"), ["not a checkpoint of"]),
    "newer": (lambda path: changed(path, format=99), ["format 99", "update the program"]),
    "stage": (lambda path: changed(path, stage="pruned"), ["pruned", "needed is a checkpoint of"]),
}
READERS = [("init", "--src defect.pt --out new.pt", "r34.pt"), ("idsnn", "--init defect.pt --out new.pt", "snn_init.pt"),
           ("idsnn", "--teacher defect.pt --out new.pt", "r34.pt"), ("eval", "defect.pt", "idsnn.pt"), ("eval", "idsnn.pt defect.pt --no-energy", "r34.pt")]


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("script,command,good", READERS)
def test_defective_checkpoints(refused, script, command, good, defect):
    make, words = DEFECTS[defect]
    make(good)
    try:
        refused(script, command, "defect.pt", *words)
        assert not Path("executed").exists()
    finally:
        shutil.rmtree("defect.pt") if Path("defect.pt").is_dir() else Path("defect.pt").unlink(missing_ok=True)


@pytest.mark.parametrize("script,command,words", [
    ("init", "--src snn_init.pt --out new.pt", ["snn_init.pt", "transfer_init.py", "train_teacher.py"]),
    ("init", "--src idsnn.pt --out new.pt", ["idsnn.pt", "train_idsnn.py", "train_teacher.py"]),
    ("idsnn", "--init r34.pt --out new.pt", ["r34.pt", "train_teacher.py", "transfer_init.py"]),
    ("idsnn", "--init idsnn.pt --out new.pt", ["idsnn.pt", "train_idsnn.py", "transfer_init.py"]),
    ("idsnn", "--teacher snn_init.pt --out new.pt", ["snn_init.pt", "transfer_init.py", "train_teacher.py"]),
    ("idsnn", "--teacher idsnn.pt --out new.pt", ["idsnn.pt", "train_idsnn.py", "train_teacher.py"]),
])
def test_wrong_stage(refused, script, command, words):
    refused(script, command, *words)


def test_a_checkpoint_truncated_anywhere_is_refused(made, tmp_path, capsys):
    content, path = (made / "r34.pt").read_bytes(), tmp_path / "cut.pt"
    for length in [1, 3, 4, 30, 100] + random.Random(0).sample(range(len(content)), 30) + [len(content) - n for n in (100, 23, 22, 21, 2, 1)]:
        path.write_bytes(content[:length])
        with pytest.raises(SystemExit):
            load_checkpoint(path, "teacher")
        assert "cut.pt" in capsys.readouterr().err


def test_a_flipped_bit_is_refused_or_changes_nothing(made, tmp_path, capsys):
    content, path = (made / "r34.pt").read_bytes(), tmp_path / "flipped.pt"
    path.write_bytes(content)
    good, r, passed = load_checkpoint(path, "teacher"), random.Random(0), 0
    rest = {k: v for k, v in good.items() if k != "model"}
    for i in range(120):
        where = r.randrange(len(content)) if i % 2 else len(content) - 1 - r.randrange(len(content) // 8)  # half of them in the directory
        path.write_bytes(content[:where] + bytes([content[where] ^ (1 << r.randrange(8))]) + content[where + 1:])
        try:
            flipped = load_checkpoint(path, "teacher")
        except SystemExit:
            continue
        passed += 1  # padding, dates and the like
        assert {k: v for k, v in flipped.items() if k != "model"} == rest
        assert all(torch.equal(v, flipped["model"][k]) for k, v in good["model"].items())
    assert passed < 100


@pytest.mark.parametrize("state,words", [
    (lambda: torch.nn.Sequential().state_dict() | {"conv1.weight": torch.zeros(6, 1, 5, 5)}, ["weights of a ResNet"]),  # LeNet
    (lambda: {k: v for k, v in train_teacher.ResNet(18, 10, width=2).state_dict().items() if k != "layer3.0.conv2.weight"}, ["layer3.0.conv2.weight"]),
    (lambda: {k: v.flatten() if k == "layer1.0.conv1.weight" else v for k, v in train_teacher.ResNet(18, 10, width=2).state_dict().items()}, ["ResNet"]),
    (lambda: {f"module.{k}": v for k, v in train_teacher.ResNet(18, 10, width=2).state_dict().items()}, ["train_teacher.py"]),
])
def test_foreign_weights(refused, state, words):
    torch.save(state(), "foreign.pt")
    try:
        refused("init", "--src foreign.pt --dataset digits --out new.pt", "foreign.pt", *words)
    finally:
        os.remove("foreign.pt")


def test_a_teacher_that_moved_or_changed(refused):
    content = Path("r34.pt").read_bytes()
    os.rename("r34.pt", "moved.pt")
    try:
        refused("idsnn", "--out new.pt", "r34.pt", "does not exist")
        changed("moved.pt", metrics=dict(history=[]))
        os.rename("defect.pt", "r34.pt")
        refused("idsnn", "--out new.pt", "r34.pt", "changed", "--teacher")
    finally:
        Path("r34.pt").write_bytes(content)
        os.remove("moved.pt")


# ------------------------------------------------------------------------------------------------------- data
def one_class(root):
    make_folder(root, classes=["cat"])


def unequal_sizes(root):
    make_folder(root)
    Image.new("RGB", (9, 4)).save(root / "train/dog/x.png")


def class_missing_in_test(root):
    make_folder(root)
    shutil.rmtree(root / "test/owl")


def class_missing_in_train(root):
    make_folder(root)
    shutil.rmtree(root / "train/owl")


def corrupt(root):
    make_folder(root)
    good = (root / "train/dog/2.png").read_bytes()
    (root / "train/dog/2.png").write_bytes(good[: len(good) // 2])


def all_corrupt(root):
    make_folder(root)
    for path in root.rglob("*.png"):
        path.write_bytes(b"png")


def no_image(root):
    make_folder(root)
    (root / "train/dog/labels.csv").write_text("0,1\n")


def no_images(root):
    make_folder(root)
    for path in (root / "test/dog").iterdir():
        path.unlink()


def no_split(root):
    make_folder(root)
    os.rename(root / "test", root / "val")


def empty(root):
    (root / "train").mkdir(parents=True)
    (root / "test").mkdir()


def no_folder(root):
    root.write_text("train")


@pytest.mark.parametrize("make,words", [
    (one_class, ["two classes", "1"]), (unequal_sizes, ["x.png", "9x4", "5x6", "one size"]), (class_missing_in_test, ["'owl'"]),
    (class_missing_in_train, ["'owl'"]), (corrupt, ["dog/2.png", "replace"]), (all_corrupt, [".png", "replace"]), (no_image, ["labels.csv", "remove"]),
    (no_images, ["'dog'", "test/"]), (no_split, ["test/<class>"]), (empty, ["two classes"]), (no_folder, ["train/<class>"]), (lambda root: None, ["train/<class>"]),
])
@pytest.mark.parametrize("script", ["teacher", "idsnn", "eval"])
def test_folders_that_do_not_fit(refused, tmp_path, script, make, words):
    make(tmp_path / "bad")
    refused(script, ["--dataset", str(tmp_path / "bad")] + ["--out", "new.pt"] * (script != "eval"), "--dataset", tmp_path / "bad", *words)


@pytest.mark.parametrize("make,words", [(one_class, ["two classes"]), (class_missing_in_test, ["'owl'"]), (all_corrupt, ["cat/0.png"]), (no_folder, ["train/<class>"])])
def test_folders_that_do_not_fit_the_transfer(refused, tmp_path, make, words):
    make(tmp_path / "bad")
    refused("init", ["--src", "r34.pt", "--out", "new.pt", "--dataset", str(tmp_path / "bad")], "--dataset", tmp_path / "bad", *words)


@pytest.mark.parametrize("script,command,words", [
    ("idsnn", "--dataset more", ["snn_init.pt", "3 classes", "more", "4", "transfer_init.py"]),
    ("idsnn", "--dataset grey", ["snn_init.pt", "3 channels", "grey", "1", "transfer_init.py"]),
    ("eval", "--dataset more", ["idsnn.pt", "3", "more", "4", "classes"]),
    ("eval", "r34.pt --dataset grey", ["r34.pt", "3", "grey", "1", "channels"]),
    ("teacher", "--dataset set --batch-size 25", ["--batch-size", "25", "24"]),
    ("idsnn", "--batch-size 25", ["--batch-size", "25", "24"]),
])
def test_data_that_do_not_fit_the_checkpoint(refused, script, command, words):
    refused(script, command + " --out new.pt" * (script != "eval"), *words)


def test_a_teacher_for_other_data(refused):
    try:
        transfer_init.main("--src r34.pt --dataset more --out more.pt".split())
        refused("idsnn", "--init more.pt --out new.pt", "teacher", "r34.pt", "3 classes", "more", "--no-kd")
    finally:
        os.remove("more.pt")


@pytest.mark.parametrize("script", ["teacher", "idsnn"])
def test_no_network_and_no_file(refused, tmp_path, monkeypatch, script):
    torchvision = pytest.importorskip("torchvision")

    def download(self):
        raise urllib.error.URLError("no route")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", download)
    for name in ("cifar10", "cifar100"):
        refused(script, ["--dataset", name, "--data-dir", str(tmp_path), "--out", "new.pt"], name, tmp_path, "no route", "https://", "digits", code=1)


@pytest.mark.parametrize("script", ["teacher", "idsnn", "eval"])
def test_world_sizes_that_do_not_fit(refused, monkeypatch, script):
    monkeypatch.setenv("WORLD_SIZE", "3")
    if script == "eval":
        refused(script, "", "torchrun")
    else:
        refused(script, "--batch-size 64", "--batch-size", "64", "3 processes", "multiple of 3")


# ----------------------------------------------------------------------------------------------------- output
OUT = {"teacher": "--dataset set --batch-size 8 --width 1 --depth 18", "init": "--src r34.pt", "idsnn": "--batch-size 8"}


@pytest.mark.parametrize("fresh", ["", " --fresh"])
@pytest.mark.parametrize("out", ["nowhere/new.pt", "r34.pt/new.pt", "set"])
@pytest.mark.parametrize("script", OUT)
def test_output_that_cannot_be_written(refused, script, out, fresh):
    environment = script == "init" and (out != "set" or fresh)  # found when it writes: its work takes a second
    refused(script, f"{OUT[script]} --out {out}{fresh}", out, code=1 if environment else 2)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("script", OUT)
def test_a_folder_without_permission(refused, script):
    Path("locked").mkdir(mode=0o500)
    try:
        refused(script, f"{OUT[script]} --out locked/new.pt", "locked/new.pt", "Permission", code=1 if script == "init" else 2)
    finally:
        os.rmdir("locked")


@pytest.mark.parametrize("script,command,words", [
    ("init", "--src r34.pt --out r34.pt", ["--out", "r34.pt"]),
    ("init", "--src r34.pt --out r34.pt --fresh", ["--out", "r34.pt"]),
    ("idsnn", "--batch-size 8 --out snn_init.pt --fresh", ["--out", "snn_init.pt"]),
    ("idsnn", "--batch-size 8 --out r34.pt --fresh", ["--out", "r34.pt"]),
    ("teacher", OUT["teacher"] + " --out idsnn.pt", ["idsnn.pt", "train_idsnn.py", "--fresh"]),
    ("teacher", OUT["teacher"] + " --out r34.pt", ["r34.pt", "--epochs was 1, is 200", "--fresh"]),
    ("init", "--src r34.pt --T 6", ["snn_init.pt", "--T was 4, is 6", "--fresh"]),
    ("idsnn", "--epochs 1 --batch-size 8 --no-kd", ["idsnn.pt", "--no-kd was False, is True", "--fresh"]),
])
def test_output_that_holds_something_else(refused, script, command, words):
    log = Path(command.partition("--out ")[2].partition(" ")[0] + ".jsonl") if "--out" in command else Path("idsnn.pt.jsonl")
    existed = script == "init" or log.exists()
    log.touch()
    gc.collect()  # tracebacks of earlier cases hold the lock on --out; a process would have ended
    refused(script, command, *words)
    if not existed:
        log.unlink()


def test_a_foreign_file_as_output_is_kept(refused):
    Path("notes.txt").write_text("mine")
    Path("notes.txt.jsonl").touch()
    for script in OUT:
        gc.collect()
        refused(script, f"{OUT[script]} --out notes.txt", "notes.txt", "--fresh")
    os.remove("notes.txt")
    os.remove("notes.txt.jsonl")
