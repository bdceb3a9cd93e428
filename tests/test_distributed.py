"""Two processes compute what one computes. In fp64, because in fp32 the order in which numbers are
added flips a spike sooner or later, and from there on two runs differ."""
import os
import subprocess
import sys
from pathlib import Path

from test_data import own_folder  # noqa: F401
from test_resume import assert_same_run

import train_idsnn
import train_teacher
import transfer_init

# 3 steps an epoch; of the 43 test images the second process sees the last 11
COMMON = "--dataset cifar10 --batch-size 8 --device cpu --precision fp64 --epochs 2"


class Frozen(train_idsnn.SpikingResNet):
    """A fork that keeps transferred layers as they are."""

    def __init__(self, **arch):
        super().__init__(**arch)
        self.layer1.requires_grad_(False)


def torchrun(script, command):
    """Run it as two processes on this machine; -> what they print, line by line."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         script, *command.split()], capture_output=True, text=True,
        env=os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_two_processes_train_the_teacher_of_one():
    command = f"{COMMON} --depth 18 --width 4 --lr 0.1 --nesterov"
    printed = torchrun(train_teacher.__file__, f"{command} --out two.pt")
    train_teacher.main(f"{command} --out one.pt".split())
    assert_same_run("two.pt", "one.pt", "teacher", 1e-9)
    assert sum("next: python" in line for line in printed) == 1  # only the first one prints


def test_two_processes_train_the_student_of_one(monkeypatch):
    """Each process has a folder of its own, so that it shows which of them writes."""
    train_teacher.main(f"{COMMON} --depth 18 --width 4 --epochs 1".split())
    transfer_init.main("--src r34.pt --T 2".split())
    here = Path.cwd()
    command = (f"{COMMON} --init {here / 'snn_init.pt'} --teacher {here / 'r34.pt'} "
               f"--data-dir {here / 'data'} --per-step")
    torchrun(__file__, f"{command} --out two.pt")
    assert {path.name for path in Path("folder0").iterdir()} == {"two.pt", "two.pt.jsonl"}
    assert not list(Path("folder1").iterdir())

    monkeypatch.setattr(train_idsnn, "SpikingResNet", Frozen)
    train_idsnn.main(f"{command} --out one.pt".split())
    assert_same_run("one.pt", "folder0/two.pt", "idsnn", 1e-9)


if __name__ == "__main__":  # one of the two processes
    folder = Path(f"folder{train_teacher.rank()}")
    folder.mkdir()
    os.chdir(folder)
    train_idsnn.SpikingResNet = Frozen
    train_idsnn.main()
