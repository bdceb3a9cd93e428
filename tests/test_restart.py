"""Nothing lost: kills, Ctrl-C, the same command again, other flags, pixels and parents."""
import dataclasses
import itertools
import math
import os
import runpy
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import CPU, call
from test_distributed import PROCESSES, assert_same_run, few, run_processes, train

import train_idsnn
import train_teacher
from train_teacher import TrainingRun, load_checkpoint

# two steps an epoch
TEACHER = f"train_teacher.py --dataset digits --width 2 --depth 18 --batch-size 48 {CPU}"
STUDENT = f"train_idsnn.py --batch-size 48 {CPU}"
SCRIPTS = pytest.mark.parametrize("script", [TEACHER, STUDENT], ids=["teacher", "student"])


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(train_teacher, "load_digits", few)


# --------------------------------------------------------------------------- what a run left behind
def epochs_in(path):
    """How many epochs a checkpoint holds; 0 where there is none."""
    return len(load_checkpoint(path)["history"]) if os.path.exists(path) else 0


def history(path):
    """An epoch's figures but for those that a clock gave."""
    rows = load_checkpoint(path)["history"]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in rows]


def same_weights(path, other):
    one, two = load_checkpoint(path)["model"], load_checkpoint(other)["model"]
    return one.keys() == two.keys() and all(torch.equal(v, two[name]) for name, v in one.items())


def assert_same_result(path, calm):
    """Bit for bit: weights, each epoch's loss, accuracy and learning rate; nothing else is left."""
    assert same_weights(path, calm) and history(path) == history(calm)
    assert sorted(p.name for p in Path(".").glob(f"{path}*")) == [path, f"{path}.jsonl"]
    rows = Path(f"{path}.jsonl").read_text().splitlines()
    assert len(rows) == 1 + epochs_in(path)  # the header; no epoch twice


def contents():
    return {p: p.read_bytes() for p in Path(".").rglob("*") if p.is_file()}


# -------------------------------------------------------------------------------------------- kills
MOMENTS = dict(  # the call, and whether it has been done by then
    step=(torch.optim.SGD, "step", True),
    written=(os, "replace", False),  # the new file, but it is not in its place yet
    placed=(os, "replace", True))


def hurried():
    """A clock that each look finds a minute later: every epoch is saved."""
    return itertools.count(0, 61).__next__


def killed(command, moment, count):
    """Run a script in this process, until `moment` comes for the count-th time."""
    train_teacher.load_digits, time.time = few, hurried()
    where, name, done = MOMENTS[moment]
    function, calls = getattr(where, name), itertools.count(1)

    def deadly(*args, **kwargs):
        last = next(calls) == count
        if last and not done:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(where, name, deadly)
    call(command)


@pytest.mark.skipif(os.name != "posix", reason="a signal of POSIX")
@pytest.mark.parametrize("command", [
    f"{TEACHER} --schedule cosine --nesterov",
    f"{STUDENT} --per-step",
    f"{STUDENT} --init poisson.pt --precision bf16",
], ids=["teacher", "student", "poisson in bf16"])
def test_a_killed_run_goes_on_to_the_same_weights(quick, run, command):
    call("transfer_init.py --src r34.pt --T 2 --encoder poisson --out poisson.pt")
    command += " --epochs 6 --out"
    for moment, count, kept in [
        ("written", 1, 0),  # the first epoch
        ("placed", 1, 1),
        ("step", 3, 2),     # in the third
        ("written", 4, 5),  # the result, which needs no resume state of its own
        ("placed", 1, 5),   # both stand
    ]:
        process = PROCESSES.Process(target=killed, args=(f"{command} x.pt", moment, count))
        process.start()
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
        assert epochs_in("x.pt.last") == kept, (moment, count)
    assert epochs_in("x.pt") == 6
    assert "resumed  x.pt.last, after epoch 5" in run(f"{command} x.pt").out
    call(f"{command} calm.pt")
    assert_same_result("x.pt", "calm.pt")


def press_ctrl_c(*args):
    raise KeyboardInterrupt


def interrupted(command):
    """A run that is stopped after its first epoch, which it saved: <out>.last stands."""
    end_epoch = TrainingRun.end_epoch

    def stopping(run, row):
        end_epoch(run, row)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(time, "time", hurried())
        patch.setattr(TrainingRun, "end_epoch", stopping)
        call(command)


def test_another_number_of_processes_goes_on_too(quick, here):
    command = f"{TEACHER} --precision fp64 --epochs 3 --out"
    interrupted(f"{command} two.pt")
    run_processes(2, train, f"{command} two.pt")
    call(f"{command} one.pt")
    assert_same_run("one.pt", "two.pt")


def test_the_resume_state_is_written_once_a_minute(quick, here, monkeypatch):
    now, kept = 0.0, []
    end_epoch = TrainingRun.end_epoch

    def clock():
        nonlocal now
        now += 0.01
        return now

    def twenty_five_seconds_later(run, row):
        nonlocal now
        now += 25
        end_epoch(run, row)
        kept.append(epochs_in("x.pt.last"))

    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr(TrainingRun, "end_epoch", twenty_five_seconds_later)
    call(f"{TEACHER} --epochs 9 --out x.pt")
    assert kept == [0, 0, 3, 3, 3, 6, 6, 6, 6]  # the ninth is the result's
    assert not Path("x.pt.last").exists()


@pytest.mark.parametrize("command", [
    "train_teacher.py", "transfer_init.py --src r34.pt", "train_idsnn.py", "eval.py"])
def test_ctrl_c_ends_every_script_with_one_line(here, monkeypatch, capsys, command):
    """As `python SCRIPT` runs it. That a training goes on after it, see `interrupted`."""
    script, *argv = command.split()
    monkeypatch.setattr("argparse.ArgumentParser.parse_args", press_ctrl_c)
    monkeypatch.setattr("sys.argv", [script, *argv])
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
        runpy.run_path(str(Path(train_teacher.__file__).with_name(script)), run_name="__main__")
    error = capsys.readouterr().err
    assert end.type is SystemExit and end.value.code == 130
    assert error.startswith("interrupted: ") and error.count("\n") == 1


# --------------------------------------------------------------------------- the same command again
def test_the_chain_given_again_does_nothing(run):
    """The commands of the fixture `here`: each is done, and says so."""
    before = contents()
    assert "r34.pt is finished: nothing to do (--fresh" in run(
        f"train_teacher.py --dataset digits --width 8 --epochs 2 {CPU}").out
    assert run("transfer_init.py --src r34.pt").status == 0  # anew, to the same bytes
    result = run(f"train_idsnn.py --epochs 2 {CPU}")
    assert "idsnn.pt is finished: nothing to do (--fresh" in result.out
    assert result.status == 0 and not result.err and contents() == before


@SCRIPTS
def test_fresh_starts_over(quick, run, monkeypatch, script):
    """Beside an interrupted run of other flags, beside a finished one of the same."""
    interrupted(f"{script} --epochs 3 --out x.pt")
    result = run(f"{script} --epochs 1 --out x.pt --fresh")
    assert result.status == 0 and "resumed" not in result.out
    assert epochs_in("x.pt") == 1 and not Path("x.pt.last").exists()
    # at once: one that ends in its first epoch must not be followed by the old one
    interrupted(f"{script} --epochs 3 --out y.pt")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.SGD, "step", press_ctrl_c)
        call(f"{script} --epochs 3 --out y.pt --fresh")
    assert not Path("y.pt.last").exists()

    shutil.copy("x.pt", "first.pt")
    result = run(f"{script} --epochs 1 --out x.pt --fresh")
    assert "finished" not in result.out and same_weights("x.pt", "first.pt")
    # and one beside a finished one: the same command goes on with it, not with the old result
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.SGD, "step", press_ctrl_c)
        call(f"{script} --epochs 1 --out x.pt --fresh")
    assert same_weights("x.pt", "first.pt") and epochs_in("x.pt.last") == 0
    result = run(f"{script} --epochs 1 --out x.pt")
    assert "finished" not in result.out and not Path("x.pt.last").exists()
    assert same_weights("x.pt", "first.pt")
    call(f"{script} --epochs 1 --out x.pt --fresh --seed 1")
    assert not same_weights("x.pt", "first.pt")


@pytest.fixture
def refused_untouched(refused, monkeypatch):
    """Of a command that is refused: its line has these words, no data were read (a download, it
    may be), every file is as it was."""
    def no_data(*args):
        raise AssertionError("data were read")

    def check(command, *words, data=None):
        before = contents()
        with monkeypatch.context() as patch:
            for name in ("load_digits", "load_cifar"):
                patch.setattr(train_teacher, name, data or no_data)
            line = refused(command)
        assert len(line) < 200 and contents() == before, line
        for word in words:
            assert word in line, line
    return check


@pytest.mark.parametrize("begin,left", [(interrupted, "x.pt.last"), (call, "x.pt")])
def test_other_flags_are_refused_by_name(quick, here, refused_untouched, begin, left):
    command = f"{TEACHER} --epochs 2 --out x.pt"
    begin(command)
    for flags, words in [
        ("--lr 0.1", "--lr is 0.05, not 0.1:"),
        ("--flip", "--flip is False, not True:"),
        ("--seed 7", "--seed is 0, not 7:"),
        ("--precision fp64", "--precision is fp32, not fp64:"),
        ("--width 4", "--width is 2, not 4:"),
        ("--epochs 3", "--epochs is 2, not 3:"),  # the milestones follow, which nothing reads here
        ("--dataset cifar100", "--dataset is digits, not cifar100"),
    ]:
        refused_untouched(f"{command} {flags}", f"{left} is of another run", words, "--fresh")

    # stage 3 has some of its own
    for flags, words in [
        ("--T 3", "--T is 4, not 3:"),
        ("--no-kd", "--no-kd is False, not True:"),
        ("--alpha 0.5", "--alpha is 0.3, not 0.5:"),
    ]:
        command = f"train_idsnn.py --epochs 2 {CPU} {flags}"
        refused_untouched(command, "idsnn.pt is of another run", words, "--fresh")


def test_what_auto_meant_belongs_to_the_run(quick, run, refused, monkeypatch):
    command = f"{TEACHER} --precision auto --epochs 2 --out x.pt"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    interrupted(command)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert "--precision is fp32, not bf16" in refused(command)
    assert "resumed" in run(f"{command} --precision fp32").out


# ------------------------------------------------------------------------------- pixels and parents
@pytest.mark.parametrize("begin", [interrupted, call])
def test_other_pixels_are_refused(quick, here, refused_untouched, begin):
    def other(dataset, data_dir):
        data = few(dataset, data_dir)
        return dataclasses.replace(data, test_x=data.test_x.flip(1))

    command = f"{TEACHER} --epochs 2 --out x.pt"
    begin(command)
    refused_untouched(command, "x.pt was begun with another --dataset", "--fresh", data=other)


def test_other_parents_are_refused_and_moved_ones_are_not(quick, run, refused_untouched):
    """Their content counts, not their names."""
    command = f"{STUDENT} --epochs 2 --out x.pt"
    interrupted(command)
    shutil.copy("x.pt.last", "moved.pt.last")
    os.mkdir("old")
    shutil.copy("snn_init.pt", "old/init.pt")
    shutil.move("r34.pt", "old/teacher.pt")

    call(f"{TEACHER} --epochs 1")
    refused_untouched(f"{command} --teacher r34.pt", "another --teacher", "--fresh", data=few)
    call("transfer_init.py --src r34.pt --width 8")
    refused_untouched(command, "x.pt was begun with another --init", "--fresh", data=few)

    moved = "--init old/init.pt --teacher old/teacher.pt --data-dir old --out moved.pt"
    result = run(f"{STUDENT} --epochs 2 {moved}")
    assert result.status == 0 and "resumed  moved.pt.last, after epoch 1" in result.out


def test_a_trained_student_is_trained_on(quick, run, refused_untouched):
    # not into its own file, which is what --out says
    refused_untouched(f"{STUDENT} --init idsnn.pt", "argument --out: idsnn.pt")
    result = run(f"{STUDENT} --init idsnn.pt --out next.pt --epochs 1 --lr 1e-9 --weight-decay 0")
    assert result.status == 0
    trained, on = load_checkpoint("idsnn.pt"), load_checkpoint("next.pt")
    assert on["parents"]["init"] == dict(path="idsnn.pt", sha256=trained["sha256"])
    assert on["parents"]["teacher"] == trained["parents"]["teacher"]
    for name, value in trained["model"].items():
        if "running" not in name and "batches" not in name:
            assert torch.allclose(value, on["model"][name], atol=1e-5), name


def test_moved_parents_are_found_beside_the_file(quick, run, refused):
    command = f"{STUDENT} --init there/snn_init.pt --epochs 1 --out x.pt"
    os.mkdir("there")
    shutil.move("snn_init.pt", "there")
    shutil.move("r34.pt", "there")
    assert run(command).status == 0
    parents = load_checkpoint("x.pt")["parents"]
    assert [parents[k]["path"] for k in parents] == ["there/snn_init.pt", "there/r34.pt"]

    # where it is recorded it is looked for first, and has to be the same file
    call(f"{TEACHER} --epochs 1")
    assert "r34.pt has changed since there/snn_init.pt was made" in refused(command)
    os.unlink("r34.pt")
    os.unlink("there/r34.pt")
    assert "r34.pt cannot be read" in refused(command)


# ---------------------------------------------------------------------------------- nothing to keep
def test_a_damaged_resume_state_is_refused(quick, run, refused_untouched):
    command = f"{TEACHER} --epochs 2 --out x.pt"
    interrupted(command)
    whole = Path("x.pt.last").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[:-1000], flipped):
        Path("x.pt.last").write_bytes(damaged)
        refused_untouched(command, "x.pt.last cannot be read")
    result = run(f"{command} --fresh")
    assert result.status == 0 and epochs_in("x.pt") == 2 and not Path("x.pt.last").exists()


@SCRIPTS
@pytest.mark.parametrize("rate,since", [(1e30, 2), (math.nan, 2.7)], ids=["loss", "weights"])
def test_what_is_not_finite_ends_with_one_line(quick, run, monkeypatch, script, rate, since):
    """The epochs before are kept. Weights may be alone: an epoch's last step is after its loss, and
    a spiking layer of NaNs is silent."""
    def diverge(args, epoch):
        return rate if epoch > since else 0.01

    for module in (train_teacher, train_idsnn):
        monkeypatch.setattr(module, "learning_rate", diverge)
    monkeypatch.setattr(time, "time", hurried())
    result = run(f"{script} --epochs 4 --out x.pt")
    assert result.status == 2 and result.err.count("\n") == 1
    assert "not finite in epoch 3" in result.err and "--lr" in result.err
    assert epochs_in("x.pt.last") == 2 and not Path("x.pt").exists()
    assert all(v.isfinite().all() for v in load_checkpoint("x.pt.last")["model"].values())


def test_statistics_that_are_not_finite_are_no_success(here, run, monkeypatch):
    """Weights and losses stay finite where fp16's scaler skips the step, or a layer is silent."""
    class Poisoned(train_idsnn.FiringRates):
        def __init__(self, model):
            super().__init__(model)
            self.variance = model.bn1.running_var

        def read(self, images):
            self.variance[0] = torch.nan
            return super().read(images)

    monkeypatch.setattr(train_idsnn, "FiringRates", Poisoned)
    result = run("train_idsnn.py --epochs 1 --device cpu --precision fp32 --fresh")
    assert result.status == 2 and "not finite in epoch 1" in result.err
