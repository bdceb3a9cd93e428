"""What a user says wrong, in all four scripts: status 2 and one line on stderr that names it,
before any work, and no file is touched.

What a folder of images can have wrong is in test_data, foreign weights in test_transfer, parents
that do not fit in test_idsnn, what another run left at --out in test_restart.
"""
import os
import pickle
import random
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import call

import train_idsnn
import train_teacher
from train_teacher import load_checkpoint

# a call of each script in which nothing is wrong
SOUND = {
    "train_teacher.py": "--dataset digits --epochs 1 --out new.pt",
    "transfer_init.py": "--src r34.pt --out new.pt",
    "train_idsnn.py": "--epochs 1 --out new.pt",
    "eval.py": "idsnn.pt",
}


@pytest.fixture
def refused(refused, here, recwarn):
    """refused(command, words...): the one line has these words, and every file is as it was."""
    def check(command, *words):
        before = contents(here)
        recwarn.clear()
        line = refused(command)
        assert ": error: " in line and all(word in line for word in words), line
        assert not recwarn.list, "a second line on stderr"
        assert contents(here) == before
    return check


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.iterdir()}


# -------------------------------------------------------------------------------------------- flags
SEED = {"--seed": "-1 0.5 1" + "0" * 30}
SIZE = {"--depth": "0 20 1.5", "--width": "0 -1 1.5"}
NEURON = {"--T": "0 -1 33 1.5", "--decay": "-0.1 1.1", "--v-th": "0 -1 inf", "--lens": "0 -1 inf"}
TRAINING = SEED | {
    "--epochs": "0 -1 1.5", "--batch-size": "1 -8 1.5", "--lr": "0 -1 inf",
    "--momentum": "-0.1 1.1", "--weight-decay": "-0.1 inf", "--warmup": "-0.1 1",
    "--milestones": "1,,2", "--crop-padding": "-1 0.5"}
NUMBERS = {  # values on the wrong side of what is allowed
    "train_teacher.py": SIZE | TRAINING,
    "transfer_init.py": SIZE | NEURON | SEED,
    "train_idsnn.py": TRAINING | NEURON | {"--alpha": "-0.1 inf", "--temperature": "0 -1 inf"},
    "eval.py": {"--T": "0 -1 33 1.5 1,,2", "--batch-size": "0 -1 1.5"},
}
CHOICES = {
    "train_teacher.py": "--recipe --stem --schedule --precision --device",
    "transfer_init.py": "--block --block-map --shortcut --classifier --encoder --stem",
    "train_idsnn.py": "--recipe --schedule --precision --device",
    "eval.py": "--precision --device",
}
FILES = "--dataset --data-dir --out --src --init --teacher --json --plot --predict --export".split()


@pytest.mark.parametrize("script,flag", [(script, flag) for script in NUMBERS
                                         for flag in NUMBERS[script]])
def test_numbers_out_of_range(refused, script, flag):
    for value in [*NUMBERS[script][flag].split(), "nan", "many", "1e", "''"]:
        refused(f"{script} {SOUND[script]} {flag} {value}", f"argument {flag}: ", value)


def test_the_borders_are_allowed(here):
    """That is what was set, not a default."""
    for flags in ("--T 1 --decay 0 --momentum 0 --warmup 0 --alpha 0 --seed 0 --crop-padding 0",
                  "--T 32 --decay 1 --momentum 1 --warmup 0.99 --batch-size 2 --weight-decay 0"):
        args, _ = train_idsnn.parse_args(flags.split())
        for flag, value in zip(flags.split()[::2], flags.split()[1::2]):
            assert getattr(args, flag[2:].replace("-", "_")) == float(value), flag


@pytest.mark.parametrize("script", CHOICES)
def test_values_that_are_no_choice(refused, script):
    for flag in CHOICES[script].split():
        refused(f"{script} {SOUND[script]} {flag} other",
                f"argument {flag}: ", "'other'", "choose from")


@pytest.mark.parametrize("script", NUMBERS)
def test_no_flag_is_forgotten_here(run, script):
    takes_a_value = re.findall(r"^  (--[\w-]+) [^-\s]", run(f"{script} --help").out, re.M)
    assert set(takes_a_value) - set(FILES) == {*NUMBERS[script], *CHOICES[script].split()}


@pytest.mark.parametrize("script", SOUND)
def test_unknown_flags_and_missing_values(refused, script):
    refused(f"{script} {SOUND[script]} --tau 2", "unrecognized arguments: --tau 2")
    # no abbreviations: a later flag could change what they mean
    refused(f"{script} {SOUND[script]} --data digits", "unrecognized arguments: --data digits")
    refused(f"{script} {SOUND[script]} --dataset", "--dataset", "expected one argument")
    if script != "eval.py":
        refused(f"{script} {SOUND[script]} r34.pt", "unrecognized arguments: r34.pt")


@pytest.mark.parametrize("script", ["train_teacher.py", "train_idsnn.py"])
@pytest.mark.parametrize("flags,words", [
    ("--schedule linear --milestones 3", ["--milestones", "--schedule step", "linear"]),
    ("--nesterov --momentum 0", ["--nesterov", "--momentum"]),
])
def test_flags_that_do_not_go_together(refused, script, flags, words):
    refused(f"{script} {SOUND[script]} --device cpu {flags}", *words)


def test_files_that_must_be_named(refused, here):
    refused("transfer_init.py", "--src", "required")
    (here / "snn_init.pt").unlink()
    refused("train_idsnn.py", "--init", "snn_init.pt does not exist", "transfer_init.py")


@pytest.mark.parametrize("script", ["train_teacher.py", "transfer_init.py", "train_idsnn.py"])
def test_a_data_set_that_is_not_there(refused, script):
    refused(f"{script} {SOUND[script]} --dataset nowhere", "--dataset nowhere: is no folder of")


# -------------------------------------------------------------------------------------- the machine
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["train_teacher.py", "train_idsnn.py", "eval.py"])
def test_no_gpu(refused, script):
    refused(f"{script} {SOUND[script]} --device cuda", "--device", "GPU")


def test_processes(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for script in ("train_teacher.py", "train_idsnn.py"):
        refused(f"{script} {SOUND[script]}", "argument --batch-size: 3 processes cannot share 64")
    refused("transfer_init.py --src r34.pt", "one process", "without torchrun")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_a_rank_that_a_shell_has_left(refused, monkeypatch, name):
    """Without WORLD_SIZE there is one process, and it speaks."""
    monkeypatch.setenv(name, "1")
    refused("train_teacher.py --dataset nowhere --out new.pt --device cpu", "nowhere")
    assert train_teacher.rank(name) == 0


# ------------------------------------------------------------------------------------------- output
@pytest.mark.parametrize("out,words", [
    ("nowhere/new.pt", "argument --out: nowhere/new.pt"),
    ("r34.pt/new.pt", "argument --out: r34.pt/new.pt"),
    ("folder", "argument --out: folder"),
    ("closed/new.pt", "argument --out: closed/new.pt"),
    ("notes.txt", "notes.txt cannot be read"),  # of somebody else, kept
])
@pytest.mark.parametrize("script", ["train_teacher.py", "transfer_init.py", "train_idsnn.py"])
def test_output_that_cannot_be_written(refused, monkeypatch, script, out, words):
    monkeypatch.setattr(train_teacher, "load_data", None)  # before that
    Path("folder").mkdir()
    Path("closed").mkdir()
    may = os.access  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "closed" and may(path, mode))
    Path("notes.txt").write_text("mine")
    refused(f"{script} {SOUND[script]} --out {out}", words)


# -------------------------------------------------------------------------------------- checkpoints
class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def changed(path, legacy=False, **entries):
    content = torch.load(path, weights_only=True) | entries
    torch.save(content, "defect.pt", _use_new_zipfile_serialization=not legacy)


def flip_a_bit_of_a_weight(path):
    content = bytearray(Path(path).read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 4
    Path("defect.pt").write_bytes(content)


def an_archive(path):
    with zipfile.ZipFile("defect.pt", "w") as archive:
        archive.writestr("a.txt", "a")


DEFECTS = {  # what is done with a good checkpoint, given its path, and words of the error
    "empty": (lambda path: Path("defect.pt").touch(), "cannot be read"),
    "folder": (lambda path: Path("defect.pt").mkdir(), ""),
    "half": (lambda path: Path("defect.pt").write_bytes(Path(path).read_bytes()[:300_000]),
             "cannot be read"),
    "bit": (flip_a_bit_of_a_weight, "is damaged"),
    "text": (lambda path: Path("defect.pt").write_text("accuracy 75.41"), "cannot be read"),
    "archive": (an_archive, "cannot be read"),
    "pickle": (lambda path: Path("defect.pt").write_bytes(pickle.dumps(Malicious())),
               "cannot be read"),
    "malicious": (lambda path: changed(path, more=Malicious()), "where tensors belong"),
    "legacy": (lambda path: changed(path, legacy=True, more=Malicious()), "where tensors belong"),
    "tensor": (lambda path: torch.save(torch.zeros(3), "defect.pt"), ""),
    "stage": (lambda path: changed(path, stage="pruned"), "no checkpoint of this project's stage"),
}
READERS = [
    ("transfer_init.py --src defect.pt --out new.pt", "r34.pt"),
    ("train_idsnn.py --init defect.pt --out new.pt", "snn_init.pt"),
    ("train_idsnn.py --teacher defect.pt --device cpu --out new.pt", "r34.pt"),
    ("train_teacher.py --dataset digits --out defect.pt", "r34.pt"),  # an earlier result?
    ("eval.py idsnn.pt defect.pt", "idsnn.pt"),
]


@pytest.mark.parametrize("defect", DEFECTS)
def test_defective_checkpoints(refused, defect):
    make, words = DEFECTS[defect]
    path = Path("defect.pt")
    for command, good in READERS:
        make(good)
        refused(command, "defect.pt", words)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not Path("executed").exists()


@pytest.mark.parametrize("command,path,wanted", [
    ("transfer_init.py --src", "snn_init.pt", "teacher"),
    ("transfer_init.py --src", "idsnn.pt", "teacher"),
    ("train_idsnn.py --out new.pt --init", "r34.pt", "init or idsnn"),
    ("train_idsnn.py --out new.pt --teacher", "snn_init.pt", "teacher"),
    ("train_idsnn.py --out new.pt --teacher", "idsnn.pt", "teacher"),
    ("train_teacher.py --dataset digits --out", "idsnn.pt", "teacher"),
    ("train_idsnn.py --out", "r34.pt", "idsnn"),
])
def test_checkpoints_of_another_stage(refused, command, path, wanted):
    refused(f"{command} {path}", f"{path} is no checkpoint of this project's stage {wanted}\n")


@pytest.mark.parametrize("fresh", ["", "--fresh"])
def test_a_parent_is_not_written_over(refused, fresh):
    for flags in ("--out snn_init.pt", "--init idsnn.pt", "--teacher r34.pt --out r34.pt"):
        refused(f"train_idsnn.py {flags} {fresh}", "argument --out")
    if fresh:  # the one that --init names
        refused(f"train_idsnn.py --out r34.pt {fresh}", "argument --out")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in folders are Unix's")
def test_what_is_no_file_is_not_replaced(refused, here):
    """As /dev/null would be by a user who may, with --fresh, which takes no look at it."""
    os.mkfifo("pipe")
    refused("train_idsnn.py --out pipe --fresh", "argument --out: pipe is no regular file")
    assert Path("pipe").is_fifo()


def test_a_link_stays_one(here, refused):
    os.symlink("gone/init.pt", "dangling.pt")
    refused("transfer_init.py --src r34.pt --out dangling.pt", "argument --out: dangling.pt")
    os.mkdir("large")
    os.symlink("large/init.pt", "link.pt")
    for _ in range(2):
        call("transfer_init.py --src r34.pt --out link.pt")
        assert os.path.islink("link.pt") and os.path.isfile("large/init.pt")
    assert os.listdir("large") == ["init.pt"]


def test_a_teacher_that_is_named_is_looked_up_nowhere_else(refused):
    """r34.pt lies beside snn_init.pt: only a recorded path is searched there."""
    refused("train_idsnn.py --teacher elsewhere/r34.pt --device cpu --out new.pt",
            "elsewhere/r34.pt cannot be read")


def test_a_checkpoint_truncated_anywhere_is_refused(stages, tmp_path, capsys):
    content, path = (stages / "r34.pt").read_bytes(), tmp_path / "cut.pt"
    lengths = [1, 3, 4, 30, 100, *random.Random(0).sample(range(len(content)), 30)]
    lengths += [len(content) - n for n in (100, 23, 22, 21, 2, 1)]  # in the archive's end record
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(SystemExit):
            load_checkpoint(path, "teacher")
        assert "cut.pt" in capsys.readouterr().err


def test_a_flipped_bit_is_refused_or_changes_nothing(stages, tmp_path):
    content, path = (stages / "r34.pt").read_bytes(), tmp_path / "flipped.pt"
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
    assert passed < 60


def test_a_network_that_was_edited_since(run, monkeypatch):
    """PyTorch says itself which weights do not fit, of --init's network and of the teacher's."""
    def conv(c_in, c_out, kernel, stride=1):
        return torch.nn.Conv2d(c_in, c_out, kernel + 2, stride, kernel // 2 + 1, bias=False)

    monkeypatch.setattr(train_teacher, "conv", conv)
    for flags in ("--no-kd", ""):
        with pytest.raises(RuntimeError, match="(?s)for conv1.weight.*layer4.1.conv2.weight"):
            run(f"train_idsnn.py {SOUND['train_idsnn.py']} --device cpu {flags}")
