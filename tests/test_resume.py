"""Interrupted runs go on to the same weights, and only where --resume asks for it; what it
finds has to be the same run. A state is saved once a minute, so the tests turn the clock."""
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_data import files, keep_images, own_folder, refused  # noqa: F401

import train_idsnn
import train_teacher
import transfer_init
from train_teacher import load_checkpoint

COMMON = "--dataset cifar10 --batch-size 8 --device cpu --precision fp32 --epochs 4 --out x.pt"


def teacher(flags=""):
    train_teacher.main(f"{COMMON} --depth 18 --width 4 --schedule cosine {flags}".split())


def student(flags=""):
    train_idsnn.main(f"{COMMON} {flags}".split())


@pytest.fixture
def parents():
    """r34.pt and, filled from it, snn_init.pt."""
    teacher("--epochs 1 --out r34.pt")
    transfer_init.main("--src r34.pt --T 2".split())


def press_ctrl_c():
    raise KeyboardInterrupt


def interrupted(train, flags="", after=2, seconds=61, stop=press_ctrl_c):
    """A run that is stopped in the epoch after `after`; each look at the clock takes `seconds`."""
    module = train_teacher if train is teacher else train_idsnn
    evaluate, epochs = module.evaluate, itertools.count()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(time, "perf_counter", itertools.count(0, seconds).__next__)
        patch.setattr(module, "evaluate", lambda *args: (
            stop() if next(epochs) == after else evaluate(*args)))
        train(flags)


def epochs_in(path, stage="teacher"):
    return len(load_checkpoint(path, stage)["history"])


def assert_same_run(path, other, stage, tolerance=0):
    """The same weights and the same figures of each epoch; the log has no epoch twice."""
    one, two = load_checkpoint(path, stage), load_checkpoint(other, stage)
    for name, weight in one["model"].items():
        assert torch.allclose(weight, two["model"][name], tolerance, tolerance), name
    for row, same in zip(one["history"], two["history"], strict=True):
        for key in row.keys() - {"seconds", "images_per_s"}:
            assert row[key] == pytest.approx(same[key], tolerance, tolerance), key
    _, *rows = map(json.loads, Path(f"{path}.jsonl").read_text().splitlines())
    assert rows == one["history"] and not os.path.exists(f"{path}.last")


KILL = "import os, test_resume as t; t.interrupted(t.teacher, stop=lambda: os.kill(os.getpid(), 9))"


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX's")
def test_a_killed_teacher_goes_on_to_the_same_weights():
    killed = subprocess.run([sys.executable, "-c", KILL], env=os.environ | dict(
        PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1"))
    assert killed.returncode == -9
    assert epochs_in("x.pt.last") == 2 and not os.path.exists("x.pt")
    teacher("--resume")
    teacher("--out calm.pt")
    assert_same_run("x.pt", "calm.pt", "teacher")


@pytest.mark.parametrize("encoder,flags", [
    ("direct", "--nesterov"),
    ("poisson", "--precision fp16"),  # random spikes, and a scale for gradients that has changed
])
def test_a_stopped_student_goes_on_to_the_same_weights(parents, encoder, flags):
    transfer_init.main(f"--src r34.pt --T 2 --encoder {encoder}".split())
    interrupted(student, flags, after=1)
    interrupted(student, f"{flags} --resume", after=2)
    assert epochs_in("x.pt.last", "idsnn") == 3
    student(f"{flags} --resume")
    student(f"{flags} --out calm.pt")
    assert_same_run("x.pt", "calm.pt", "idsnn")


# ------------------------------------------------------------------------------- the same run again
def test_an_interrupted_run_is_neither_lost_nor_continued_unasked():
    interrupted(teacher)
    with refused("x.pt.last is an interrupted run", "--resume", "delete"):
        teacher()


def test_resume_with_nothing_there_starts():
    interrupted(teacher, seconds=1)  # in its first minute, which saves nothing
    assert set(os.listdir()) == {"data", "x.pt.jsonl"}
    teacher("--resume")
    assert epochs_in("x.pt") == 4


@pytest.mark.parametrize("train", [teacher, student])
def test_a_finished_run_is_left_as_it_is(parents, capsys, train):
    train()
    before = files()
    with pytest.raises(SystemExit) as end:
        train("--resume")
    assert not end.value.code and files() == before  # a chain of stages goes on
    assert capsys.readouterr().out.endswith("x.pt is finished: nothing to do\n")


def test_without_resume_a_new_run_replaces_a_finished_one_at_its_end():
    def seed():
        return load_checkpoint("x.pt", "teacher")["config"]["seed"]

    teacher()
    interrupted(teacher, "--seed 1")
    assert seed() == 0
    teacher("--seed 1 --resume")  # goes on with the interrupted one, not with the finished one
    assert seed() == 1
    teacher()
    assert seed() == 0


# ---------------------------------------------------------------------------- what is another run
def test_other_flags_are_refused_by_name():
    interrupted(teacher)
    for flags, words in [
        ("--lr 0.1", "its lr was 0.05, not 0.1"),
        ("--seed 7", "its seed was 0, not 7"),
        ("--precision fp64", "its precision was fp32, not fp64"),
        ("--milestones 2", "its milestones was None, not [2.0]"),
    ]:
        with refused("x.pt.last is of another run", words, "without --resume"):
            teacher(f"{flags} --resume")
    # where the files lie does not matter
    os.rename("data", "moved")
    os.rename("x.pt.last", "y.pt.last")
    teacher("--resume --out y.pt --data-dir moved --no-graph")
    assert epochs_in("y.pt") == 4
    with refused("y.pt is of another run", "lr was 0.05, not 0.1"):
        teacher("--resume --out y.pt --data-dir moved --lr 0.1")


@pytest.mark.parametrize("change", [
    # the parameters have the same names and shapes in both kinds of blocks
    lambda: transfer_init.main("--src r34.pt --T 2 --block sew".split()),
    lambda: transfer_init.main("--src moved.pt --T 2".split()),
    lambda: transfer_init.main("--src r34.pt --T 2 --seed 1".split()),
    lambda: keep_images(Path("data"), seed=1),
], ids=["blocks", "teacher", "weights", "pixels"])
def test_a_run_that_began_with_something_else_is_refused(parents, change):
    os.link("r34.pt", "moved.pt")
    interrupted(student)
    change()
    with refused("x.pt.last is of another run", "without --resume"):
        student("--resume")
