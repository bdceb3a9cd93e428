"""Bad input in the three stages: exit code 2 (1 for what the environment lacks), one line on
stderr that names culprit and remedy, before any work, nothing overwritten.

What a folder of images can have wrong is in test_data, foreign weights in test_transfer.
"""
import hashlib
import os
import pickle
import random
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from test_teacher import make_folder

import eval as evaluation
import train_idsnn
import train_teacher
import transfer_init
from train_teacher import load_checkpoint

MAIN = dict(teacher=train_teacher.main, init=transfer_init.main, idsnn=train_idsnn.main,
            eval=evaluation.main)
# what each stage needs to run at all, and as a run of one epoch
NEEDED = dict(
    teacher="--device cpu --dataset set --width 1 --depth 18 --batch-size 8 --epochs 1",
    init="--src r34.pt",
    idsnn="--device cpu --batch-size 8 --epochs 1")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with image sets and what the stages make of one."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_folder(Path("set"), train=8, test=3, size=(8, 8))
        make_folder(Path("grey"), train=8, test=3, size=(8, 8), mode="L")
        make_folder(Path("more"), classes="abcd", train=8, test=3, size=(8, 8))
        for dataset in ("grey", "more"):
            train_teacher.load_data(dataset, "data")  # into the cache
        for script, command in NEEDED.items():
            patch.setattr(sys, "argv", [script, *command.split()])
            MAIN[script]()
    return folder


def contents(folder):
    """Every file's hash, but for the empty logs of refused runs, which hold the lock."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files
            if p.suffix != ".jsonl" or p.stat().st_size}


@pytest.fixture
def refused(made, monkeypatch, capsys):
    """refused(script, command, words...): it ends with `code` and one line that has these words."""
    monkeypatch.chdir(made)

    def check(script, command, *words, code=2):
        argv = command.split() if isinstance(command, str) else command
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
        before = contents(made)
        capsys.readouterr()
        try:
            ended = MAIN[script]()
        except SystemExit as end:
            ended = end.code
        error = capsys.readouterr().err
        assert ended == code, (command, error)
        assert error.count("\n") == 1 and ": error: " in error and len(error) < 500, error
        for word in words:
            assert str(word) in error, (command, error)
        assert contents(made) == before, command
    yield check
    assert not torch.distributed.is_initialized()


# -------------------------------------------------------------------------------------------- flags
TRAINING = ["--epochs", "--batch-size", "--lr", "--momentum", "--weight-decay", "--milestones",
            "--warmup", "--crop-padding", "--seed"]
NEURON = ["--T", "--decay", "--v-th", "--lens"]
NUMBERS = dict(
    teacher=["--depth", "--width", *TRAINING],
    init=["--depth", "--width", "--seed", *NEURON],
    idsnn=["--alpha", "--temperature", *NEURON, *TRAINING])
CHOICES = dict(
    teacher=["--recipe", "--stem", "--schedule", "--precision", "--device"],
    init=["--block", "--block-map", "--shortcut", "--classifier", "--encoder", "--stem"],
    idsnn=["--recipe", "--schedule", "--precision", "--device"])
NAMES = ["--dataset", "--data-dir", "--out", "--src", "--init", "--teacher"]  # below
WRONG = ["0", "-1", "1" + "0" * 30, "nan", "inf", "many", "", "1e"]
MAY_BE_0 = ["--momentum", "--weight-decay", "--warmup", "--crop-padding", "--seed", "--decay",
            "--alpha"]
MAY_BE_HUGE = ["--milestones"]  # one that is never reached


@pytest.mark.parametrize("script", NUMBERS)
def test_values_out_of_range(refused, script):
    for flag in NUMBERS[script]:
        for value in WRONG:
            allowed = value == "0" and flag in MAY_BE_0 or value[2:] and flag in MAY_BE_HUGE
            if not allowed or value in ("nan", "inf", "many"):
                argv = [*NEEDED[script].split(), flag, value]
                refused(script, argv, f"argument {flag}: ", repr(value), "must be")


@pytest.mark.parametrize("script", CHOICES)
def test_values_that_are_no_choice(refused, script):
    for flag in CHOICES[script]:
        command = f"{NEEDED[script]} {flag} other"
        refused(script, command, f"argument {flag}: ", "'other'", "choose from")


@pytest.mark.parametrize("script", NUMBERS)
def test_no_flag_is_forgotten_here(made, monkeypatch, capsys, script):
    monkeypatch.chdir(made)
    with pytest.raises(SystemExit):
        MAIN[script](["--help"])
    values = re.findall(r"^  (--[\w-]+) [^-\s]", capsys.readouterr().out, re.M)
    assert set(values) - set(NAMES) == {*NUMBERS[script], *CHOICES[script]}


@pytest.mark.parametrize("script,command,words", [
    ("teacher", "--depth 20", ["--depth", "20", "34"]),
    ("teacher", "--width 1.5", ["--width", "1.5", "whole number"]),
    ("teacher", "--batch-size 1", ["--batch-size", "from 2 to 1048576"]),  # batch norm needs two
    ("teacher", "--milestones 60,20", ["--milestones", "60,20", "rising"]),
    ("teacher", "--warmup 1", ["--warmup", "from 0 to 0.99"]),
    ("teacher", "--recipe fast --momentum 0", ["--momentum", "0", "--no-nesterov"]),
    ("teacher", "--schedule linear --milestones 3", ["--milestones", "step", "linear"]),
    ("teacher", "--learning-rate 1", ["--learning-rate"]),
    ("teacher", "--ep 3", ["--ep"]),  # no abbreviations: a later flag would change their meaning
    ("teacher", "--epochs", ["--epochs", "expected one argument"]),
    ("teacher", "r34.pt", ["r34.pt"]),
    ("init", "", ["--src"]),
    ("init", "--src r34.pt --depth 50 --out new.pt", ["r34.pt", "bottleneck", "--depth"]),
    ("idsnn", "--tau 2", ["--tau"]),
    ("idsnn", "--kd steps", ["--kd"]),
])
def test_other_mistakes_in_flags(refused, script, command, words):
    refused(script, command, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["teacher", "idsnn", "eval"])
def test_no_gpu(refused, script):
    refused(script, "--device cuda", "--device", "no GPU")


def test_a_batch_that_the_processes_cannot_share(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for script in ("teacher", "idsnn"):
        refused(script, "--batch-size 64", "--batch-size", "64", "3 processes", "multiple of 3")


# -------------------------------------------------------------------------------------- checkpoints
class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def changed(path, **entries):
    torch.save(torch.load(path, weights_only=True) | entries, "defect.pt")


def without_config(path):
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["config"]
    torch.save(checkpoint, "defect.pt")


def flip_a_bit_of_a_weight(path):
    content = bytearray(Path(path).read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 4
    Path("defect.pt").write_bytes(content)


def half(path):
    content = Path(path).read_bytes()
    Path("defect.pt").write_bytes(content[:len(content) // 2])


def an_archive(path):
    with zipfile.ZipFile("defect.pt", "w") as archive:
        archive.writestr("a.txt", "a")


NO_CHECKPOINT = "not a checkpoint of"
DEFECTS = {  # what is done with a good checkpoint, given its path, and words of the error
    "missing": (lambda path: None, "does not exist"),
    "empty": (lambda path: Path("defect.pt").touch(), "damaged"),
    "folder": (lambda path: Path("defect.pt").mkdir(), "cannot be read"),
    "half": (half, "truncated"),
    "bit": (flip_a_bit_of_a_weight, "damaged"),
    "text": (lambda path: Path("defect.pt").write_text("accuracy 75.41"), NO_CHECKPOINT),
    "archive": (an_archive, NO_CHECKPOINT),
    "pickle": (lambda path: Path("defect.pt").write_bytes(pickle.dumps(Malicious())),
               NO_CHECKPOINT),
    "malicious": (lambda path: changed(path, metrics=Malicious()), NO_CHECKPOINT),
    "module": (lambda path: torch.save(torch.nn.Linear(2, 2), "defect.pt"), NO_CHECKPOINT),
    "tensor": (lambda path: torch.save(torch.zeros(3), "defect.pt"), NO_CHECKPOINT),
    "state": (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), "defect.pt"),
              NO_CHECKPOINT),
    "without": (without_config, NO_CHECKPOINT),
    "newer": (lambda path: changed(path, format=99), "update the program"),
    "stage": (lambda path: changed(path, stage="pruned"), "pruned"),
}
READERS = [
    ("init", "--src defect.pt --out new.pt", "r34.pt"),
    ("idsnn", "--init defect.pt --out new.pt", "snn_init.pt"),
    ("idsnn", "--teacher defect.pt --out new.pt", "r34.pt"),
    ("teacher", f"{NEEDED['teacher']} --out defect.pt", "r34.pt"),  # an earlier result?
    ("eval", "defect.pt", "idsnn.pt")]


@pytest.mark.parametrize("defect", DEFECTS)
def test_defective_checkpoints(refused, defect):
    make, words = DEFECTS[defect]
    path = Path("defect.pt")
    for script, command, good in READERS:
        if script == "teacher" and defect in ("missing", "folder"):
            continue  # the first is no mistake, the second stands below
        make(good)
        try:
            # transfer_init.py reads weights of many kinds and has words of its own
            refused(script, command, "defect.pt", *([] if script == "init" else [words]))
        finally:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert not Path("executed").exists()


@pytest.mark.parametrize("script,flag,wanted,paths", [
    ("init", "--src", "train_teacher.py", ["snn_init.pt", "idsnn.pt"]),
    ("idsnn", "--init", "transfer_init.py", ["r34.pt", "idsnn.pt"]),
    ("idsnn", "--teacher", "train_teacher.py", ["snn_init.pt", "idsnn.pt"])])
def test_checkpoints_of_another_stage(refused, script, flag, wanted, paths):
    stages = {"r34.pt": "train_teacher.py", "snn_init.pt": "transfer_init.py",
              "idsnn.pt": "train_idsnn.py"}
    for path in paths:
        refused(script, f"{flag} {path} --out new.pt", f"{path} was made by {stages[path]}", wanted)


def test_a_checkpoint_truncated_anywhere_is_refused(made, tmp_path, capsys):
    content, path = (made / "r34.pt").read_bytes(), tmp_path / "cut.pt"
    lengths = [1, 3, 4, 30, 100, *random.Random(0).sample(range(len(content)), 30)]
    lengths += [len(content) - n for n in (100, 23, 22, 21, 2, 1)]  # in the archive's end record
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(SystemExit):
            load_checkpoint(path, "teacher")
        assert "cut.pt" in capsys.readouterr().err


def test_a_flipped_bit_is_refused_or_changes_nothing(made, tmp_path):
    content, path = (made / "r34.pt").read_bytes(), tmp_path / "flipped.pt"
    path.write_bytes(content)
    good, r, passed = load_checkpoint(path, "teacher"), random.Random(0), 0
    weights = good.pop("model")
    for i in range(120):
        where = r.randrange(len(content))
        if i % 2:  # the archive's directory, at its end
            where = len(content) - 1 - r.randrange(len(content) // 8)
        flipped = bytearray(content)
        flipped[where] ^= 1 << r.randrange(8)
        path.write_bytes(flipped)
        try:
            checkpoint = load_checkpoint(path, "teacher")
        except SystemExit:
            continue
        passed += 1  # padding, dates and the like
        model = checkpoint.pop("model")
        assert checkpoint == good | dict(sha256=checkpoint["sha256"])
        assert all(torch.equal(value, model[name]) for name, value in weights.items())
    assert passed < 100


def test_a_network_that_was_edited_since(refused, monkeypatch):
    """Between the stages: the weights of --init, then those of the teacher, fit no longer."""
    def conv(c_in, c_out, kernel, stride=1):
        return torch.nn.Conv2d(c_in, c_out, kernel + 2, stride, kernel // 2 + 1, bias=False)

    monkeypatch.setattr(train_teacher, "conv", conv)
    command = f"{NEEDED['idsnn']} --out new.pt"
    refused("idsnn", f"{command} --no-kd", "snn_init.pt", "does not fit", "conv1.weight")
    refused("idsnn", command, "r34.pt", "does not fit", "conv1.weight")


# ------------------------------------------------------------------------------------------ parents
def test_a_teacher_that_is_gone_or_changed(refused):
    os.rename("r34.pt", "moved.pt")
    try:
        refused("idsnn", f"{NEEDED['idsnn']} --out new.pt", "the teacher r34.pt",
                "named in snn_init.pt", "--teacher", "--no-kd")
        changed("moved.pt", metrics=dict(history=[]))
        os.rename("defect.pt", "r34.pt")
        refused("idsnn", f"{NEEDED['idsnn']} --out new.pt", "r34.pt has changed", "--teacher")
    finally:
        os.replace("moved.pt", "r34.pt")


def test_parents_are_found_beside_the_file_that_names_them(made, tmp_path, monkeypatch):
    """Recorded as r34.pt, which is not here: the folder is another than when it was made."""
    monkeypatch.chdir(tmp_path)
    command = f"{NEEDED['idsnn']} --init {made / 'snn_init.pt'} --dataset {made / 'set'}"
    train_idsnn.main(command.split())
    parents = load_checkpoint("idsnn.pt")["provenance"]["parents"]
    assert parents["teacher"]["path"] == str(made / "r34.pt")


def test_bare_weights_cannot_be_distilled_from(refused):
    weights = train_teacher.ResNet(18, num_classes=3, width=1).state_dict()
    torch.save(weights, "resnet18.pth")
    transfer_init.main("--src resnet18.pth --dataset set --out bare.pt".split())
    refused("idsnn", f"{NEEDED['idsnn']} --init bare.pt --out new.pt",
            "bare.pt", "resnet18.pth", "--no-kd", "--teacher")


# --------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize("script,command,words", [
    ("idsnn", "--dataset more", ["snn_init.pt", "3 classes", "more", "4", "transfer_init.py"]),
    ("idsnn", "--dataset grey", ["snn_init.pt", "3 channels", "grey", "1", "transfer_init.py"]),
    ("idsnn", "--batch-size 25", ["--batch-size", "25", "24"]),
    ("idsnn", "--dataset nowhere", ["--dataset", "nowhere", "train/<class>"]),
    ("init", "--src r34.pt --dataset nowhere", ["--dataset", "nowhere", "train/<class>"]),
    ("init", "--src r34.pt --dataset more --classifier transfer", ["--classifier", "3", "4"]),
    ("teacher", "--dataset nowhere", ["--dataset", "nowhere", "train/<class>"]),
    ("teacher", "--dataset set --batch-size 25", ["--batch-size", "25", "24"]),
])
def test_data_that_do_not_fit(refused, script, command, words):
    refused(script, f"{command} --out new.pt", *words)


def test_a_teacher_for_other_data(refused):
    transfer_init.main("--src r34.pt --dataset more --out more.pt".split())
    refused("idsnn", f"{NEEDED['idsnn']} --init more.pt --out new.pt",
            "the teacher in r34.pt", "3 classes", "more", "--no-kd")


# ------------------------------------------------------------------------------------------- output
@pytest.mark.parametrize("fresh", ["", " --fresh"])
@pytest.mark.parametrize("out", ["nowhere/new.pt", "r34.pt/new.pt", "set"])
@pytest.mark.parametrize("script", NEEDED)
def test_output_that_cannot_be_written(refused, script, out, fresh, monkeypatch):
    """Before any work: no data are read."""
    monkeypatch.setattr(train_teacher, "load_data", None)
    refused(script, f"{NEEDED[script]} --out {out}{fresh}", "--out", out)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("script", NEEDED)
def test_a_folder_without_permission(refused, script):
    Path("locked").mkdir(mode=0o500)
    try:
        refused(script, f"{NEEDED[script]} --out locked/new.pt", "locked/new.pt", "Permission")
    finally:
        os.rmdir("locked")


@pytest.mark.parametrize("script,flags,words", [
    ("init", "--out r34.pt", ["--out", "r34.pt", "starts from"]),
    ("init", "--out r34.pt --fresh", ["--out", "r34.pt", "starts from"]),
    ("idsnn", "--out snn_init.pt --fresh", ["--out", "snn_init.pt", "starts from"]),
    ("idsnn", "--out r34.pt --fresh", ["--out", "r34.pt", "starts from"]),
    ("teacher", "--out idsnn.pt", ["idsnn.pt", "train_idsnn.py", "--fresh"]),
    ("teacher", "--out r34.pt --lr 1", ["r34.pt", "--lr was 0.05, is 1.0", "--fresh"]),
    ("init", "--T 6", ["snn_init.pt", "--T was 4, is 6", "--fresh"]),
    ("init", "--dataset more", ["snn_init.pt", "--dataset has other images", "--fresh"]),
    ("idsnn", "--no-kd", ["idsnn.pt", "--no-kd was False, is True", "--fresh"]),
])
def test_output_that_holds_something_else(refused, script, flags, words):
    refused(script, f"{NEEDED[script]} {flags}", *words)


def test_a_foreign_file_as_output_is_kept(refused):
    Path("notes.txt").write_text("mine")
    for script in NEEDED:
        refused(script, f"{NEEDED[script]} --out notes.txt", "notes.txt", "--fresh")
