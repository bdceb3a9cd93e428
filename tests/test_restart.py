"""Nothing lost: kills, signals, dying workers, full disks, edited sources, divergence.

`python tests/test_restart.py 20` kills both training stages 20 times and compares the weights.
"""
import contextlib
import errno
import hashlib
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for `python tests/test_restart.py`

from test_distributed import PROCESSES, run_processes  # noqa: E402
from test_teacher import make_folder  # noqa: E402

import train_idsnn  # noqa: E402
import train_teacher  # noqa: E402
import transfer_init  # noqa: E402
from train_teacher import load_checkpoint  # noqa: E402

if os.name != "posix":
    pytest.skip("signals and limits of POSIX", allow_module_level=True)

# 96 images: two steps an epoch
TEACHER = "--device cpu --dataset set --width 1 --depth 18 --batch-size 48"
STUDENT = "--device cpu --batch-size 48"
FLAGS = dict(train_teacher=TEACHER, train_idsnn=STUDENT)
MAIN = dict(train_teacher=train_teacher.main, transfer_init=transfer_init.main,
            train_idsnn=train_idsnn.main)


# ------------------------------------------------------------------- a process, and what befalls it
MOMENTS = {  # name: the call, and whether it has been done by then
    "optimizer": (torch.optim.SGD, "__init__", True),           # before the first epoch
    "step": (torch.optim.SGD, "step", True),
    "serialise": (torch, "save", False),                        # an epoch is done, and not kept yet
    "fsync": (os, "fsync", False),                              # the new file is half done
    "replace": (os, "replace", False),                          # the new file is not in place yet
    "replaced": (os, "replace", True),                          # it is
    "printed": (train_teacher.TrainingRun, "end_epoch", True),  # an epoch's row is on the screen
}


def act(what):
    """Befall this process: a signal, or a disk without room for a checkpoint."""
    if what == "full disk":
        import resource
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        return
    for last in Path(".").glob("*.last"):  # as the signal found it
        shutil.copy(last, f"found-{last}")
    os.kill(os.getpid(), getattr(signal, what))


def plan(what, moment, count):
    """Let `what` happen at the count-th call of MOMENTS[moment]."""
    where, name, done = MOMENTS[moment]
    function, calls = getattr(where, name), 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and not done:
            act(what)
        result = function(*args, **kwargs)
        if calls == count and done:
            act(what)
        return result

    setattr(where, name, wrapper)


def slow_disk():
    """So slow that after the first epoch the budget for writing is spent."""
    fsync = os.fsync

    def slow(file):
        time.sleep(0.2)
        fsync(file)

    os.fsync = slow


def script_process(script, command, events, slow=True):
    """`python SCRIPT.py COMMAND` in this process, with its `events`; output to out.txt, err.txt."""
    for stream, path in ((1, "out.txt"), (2, "err.txt")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    # a shell's background job ignores it, and so would what it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.argv = [f"{script}.py", *command.split()]
    if slow:
        slow_disk()
    for event in events:
        plan(*event)
    train_teacher.run_script(MAIN[script])


def run(script, command, *events, slow=True):
    """Run a script as a process of its own; returns its exit code, stdout and stderr."""
    process = PROCESSES.Process(target=script_process, args=(script, command, events, slow))
    process.start()
    process.join(300)
    return SimpleNamespace(
        code=process.exitcode, out=Path("out.txt").read_text(), error=Path("err.txt").read_text())


# --------------------------------------------------------------------------- what a run left behind
def epochs_in(path):
    """How many epochs a checkpoint holds, read with its checksums; 0 where there is none."""
    return len(load_checkpoint(path)["metrics"]["history"]) if os.path.exists(path) else 0


def history(path):
    """An epoch's figures but for those that a clock gave."""
    rows = load_checkpoint(path)["metrics"]["history"]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in rows]


def sha256(path):
    digest = hashlib.sha256()
    for name, tensor in load_checkpoint(path)["model"].items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def assert_same_result(path, calm):
    """Bit for bit: weights, each epoch's loss, accuracy and learning rate; nothing else is left."""
    assert sha256(path) == sha256(calm)
    assert history(path) == history(calm)
    assert all(type(row["lr"]) is float for row in history(path))
    assert sorted(p.name for p in Path(".").glob(f"{path}*")) == [path, f"{path}.jsonl"]
    rows = Path(f"{path}.jsonl").read_text().splitlines()
    assert len(rows) == 1 + len(history(path))  # the header; no epoch twice


# ----------------------------------------------------------------------------------------- fixtures
@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_folder(folder / "set", train=32, test=4, size=(8, 8))
        train_teacher.main(f"{TEACHER} --epochs 1".split())
        transfer_init.main("--src r34.pt --T 2".split())
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """An image set, a teacher and what stage 2 made of it, in a folder of its own."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    train_teacher.load_data("set", "data")  # into the cache, which knows files by their place
    return tmp_path


@pytest.fixture
def call(folder, monkeypatch, capsys):
    """call(script, command): run it in this process; returns its exit code, stdout and stderr."""
    def call(script, command):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *command.split()])
        capsys.readouterr()
        code = 0
        try:
            train_teacher.run_script(MAIN[script])
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, error=printed.err)
    return call


class Crash(Exception):
    """A bug of the user's own, say."""


@pytest.fixture
def crash(call, monkeypatch):
    """crash(script, command, epochs=1): a run that ends after so many epochs; <out>.last stands."""
    def crash(script, command, epochs=1):
        end_epoch, done = train_teacher.TrainingRun.end_epoch, []

        def wrapper(*args):
            end_epoch(*args)
            done.append(args)
            if len(done) == epochs:
                raise Crash

        with monkeypatch.context() as patch:
            patch.setattr(train_teacher.TrainingRun, "end_epoch", wrapper)
            with pytest.raises(Crash):
                call(script, command)
        done.clear()
    return crash


def assert_refused(result, *words, code=2):
    """One line that holds `words`, and nothing on stdout."""
    assert result.code == code, result
    assert result.error.count("\n") == 1 and ": error: " in result.error, result.error
    for word in words:
        assert str(word) in result.error, result.error


# -------------------------------------------------------------------------------------------- kills
@pytest.mark.parametrize("script,flags", [
    ("train_teacher", "--schedule linear --nesterov"),
    ("train_idsnn", "--schedule cosine --per-step")])
def test_a_killed_run_goes_on_to_the_same_weights(call, script, flags):
    command = f"{FLAGS[script]} {flags} --epochs 6 --out"
    # a process writes its first epoch at once; two steps an epoch
    kills = [(("fsync", 1), 0), (("replaced", 1), 1), (("replace", 1), 1), (("step", 5), 2)]
    for moment, kept in kills:
        result = run(script, f"{command} killed.pt", ("SIGKILL", *moment))
        assert result.code == -signal.SIGKILL, result
        assert epochs_in("killed.pt.last") == kept
    assert "resumed  killed.pt.last, after epoch 2" in call(script, f"{command} killed.pt").out
    call(script, f"{command} calm.pt")
    assert_same_result("killed.pt", "calm.pt")


def test_poisson_spikes_and_half_precision_resume_too(call, crash):
    call("transfer_init", "--src r34.pt --T 2 --encoder poisson --out poisson.pt")
    command = f"{STUDENT} --init poisson.pt --precision bf16 --epochs 3 --out"
    crash("train_idsnn", f"{command} x.pt", epochs=2)
    assert "after epoch 2" in call("train_idsnn", f"{command} x.pt").out
    call("train_idsnn", f"{command} calm.pt")
    assert_same_result("x.pt", "calm.pt")


def test_killed_between_the_result_and_the_end(call):
    """Both <out> and <out>.last stand: the same command tidies up."""
    command = f"{TEACHER} --epochs 1 --out x.pt"
    run("train_teacher", command, ("SIGKILL", "replaced", 2))
    assert epochs_in("x.pt") == epochs_in("x.pt.last") == 1
    before = sha256("x.pt")
    assert call("train_teacher", command).code == 0
    assert sha256("x.pt") == before and not Path("x.pt.last").exists()


# ------------------------------------------------------------------------------------------ signals
def test_a_signal_ends_a_run_with_one_line_that_says_what_is_kept(call):
    """One run, disturbed again and again; after each first epoch writing is put off."""
    command = f"{TEACHER} --epochs 14 --out"
    nothing = "the same command starts again"
    for events, kept, words in [
        ([("SIGINT", "optimizer", 1)], 0, "nothing new is kept: give the same command again"),
        ([("SIGTERM", "step", 1)], 0, f"no epoch is kept yet: {nothing}"),
        ([("SIGTERM", "step", 3)], 1, "x.pt.last holds 1 epoch: the same command goes on"),
        # an epoch that was printed is kept, though it was not written
        ([("SIGINT", "printed", 3)], 4, "x.pt.last holds 4 epochs"),
        # the epoch before is, where the new one is not ready
        ([("SIGINT", "serialise", 3)], 6, "x.pt.last holds 6 epochs"),
        ([("SIGINT", "fsync", 1)], 7, "x.pt.last holds 7 epochs"),
        # a terminal and torchrun both send one: the second must not end the writing
        ([("SIGINT", "printed", 2), ("SIGTERM", "fsync", 2)], 9, "x.pt.last holds 9 epochs"),
    ]:
        result = run("train_teacher", f"{command} x.pt", *events)
        assert result.code == 130, result
        assert result.error.startswith("interrupted") and result.error.count("\n") == 1, result
        assert words in result.error, result.error
        assert epochs_in("x.pt.last") == kept, events
        assert not Path("x.pt").exists() and not list(Path(".").glob("*.tmp"))
    # what the second signal found: the write was under way
    assert epochs_in("found-x.pt.last") == 8
    assert call("train_teacher", f"{command} x.pt").code == 0
    call("train_teacher", f"{command} calm.pt")
    assert_same_result("x.pt", "calm.pt")


def test_interrupted_under_fresh(call):
    """The same command would begin anew again: the line says so."""
    result = run("train_idsnn", f"{STUDENT} --epochs 3 --out x.pt --fresh", ("SIGINT", "step", 4))
    assert "holds 1 epoch: the same command without --fresh goes on" in result.error
    result = call("train_idsnn", f"{STUDENT} --epochs 3 --out x.pt")
    assert result.code == 0 and "resumed" in result.out


def test_two_runs_do_not_write_one_file(call, monkeypatch):
    refused, end_epoch = [], train_teacher.TrainingRun.end_epoch

    def second_run(*args):
        monkeypatch.setattr(train_teacher.TrainingRun, "end_epoch", end_epoch)
        end_epoch(*args)
        refused.append(call("train_teacher", f"{TEACHER} --epochs 2 --out x.pt --fresh"))
        assert Path("x.pt.last").exists()

    monkeypatch.setattr(train_teacher.TrainingRun, "end_epoch", second_run)
    assert call("train_teacher", f"{TEACHER} --epochs 2 --out x.pt").code == 0
    assert_refused(refused[0], "--out", "another run is writing x.pt")


# -------------------------------------------------------------------- workers, numbers of processes
WORKER = """
import os, sys
import train_teacher
from test_restart import MAIN, plan

first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
if first and os.environ["RANK"] == "1":
    plan("SIGKILL", "step", 3)
sys.argv[0] = "train_idsnn.py"
train_teacher.run_script(MAIN["train_idsnn"])
"""


def resumed_as_one_of_three(command):
    torch.set_num_threads(1)
    sys.argv = ["train_idsnn.py", *command.split()]
    train_idsnn.main()


def test_a_dying_worker_and_other_numbers_of_processes(call):
    """Two processes, one dies, the run goes on; what the two had saved goes on with one, three."""
    command = f"{STUDENT} --precision fp64 --epochs 3 --out"
    Path("worker.py").write_text(WORKER)
    torchrun = "-m torch.distributed.run --standalone --max-restarts 2 --nproc-per-node 2"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, *torchrun.split(), "worker.py", *command.split(), "two.pt"],
        env=os.environ | dict(PYTHONPATH=paths, OMP_NUM_THREADS="1"),
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "resumed  two.pt.last, after epoch 1" in done.stdout  # two steps an epoch
    assert "FutureWarning" not in done.stderr and "destroy_process_group" not in done.stderr

    for out in ("on1.pt", "on3.pt"):
        shutil.copy("found-two.pt.last", f"{out}.last")
    call("train_idsnn", f"{command} on1.pt")
    run_processes(3, resumed_as_one_of_three, f"{command} on3.pt")
    call("train_idsnn", f"{command} one.pt")
    one = load_checkpoint("one.pt")["model"]
    for out, world in (("two.pt", 2), ("on1.pt", 1), ("on3.pt", 3)):
        checkpoint = load_checkpoint(out)
        assert checkpoint["provenance"]["world_size"] == world
        assert len(checkpoint["metrics"]["history"]) == 3
        for name, value in one.items():
            value, other = value.double(), checkpoint["model"][name].double()
            assert torch.dist(value, other) <= 1e-10 * value.norm(), (out, name)


def one_of_two_nodes(command):
    """In a folder that the other node does not see; how it ended goes into end.json."""
    torch.set_num_threads(1)
    os.chdir(f"node{os.environ['RANK']}")
    os.environ["LOCAL_RANK"] = "0"
    sys.argv = ["train_teacher.py", *command.split()]
    printed, code = io.StringIO(), 0
    with contextlib.redirect_stderr(printed):
        try:
            train_teacher.main()
        except SystemExit as end:
            code = end.code
    Path("end.json").write_text(json.dumps([code, printed.getvalue()]))


@pytest.mark.parametrize("what", ["resume state", "images", "nothing"])
def test_nodes_that_do_not_hold_the_same_files(call, crash, what):
    """Rank 0 would go on, rank 1 begin: one run of two networks, and nobody would know."""
    command = f"{HALF} --out x.pt"
    crash("train_teacher", command)
    for node in ("node0", "node1"):
        shutil.copytree("set", f"{node}/set")
        shutil.copy("x.pt.last", node)
    if what == "resume state":
        os.unlink("node1/x.pt.last")
    elif what == "images":
        shutil.copy("node1/set/train/dog/2.png", "node1/set/train/dog/1.png")
        os.unlink("node0/x.pt.last")
        os.unlink("node1/x.pt.last")
    run_processes(2, one_of_two_nodes, command)
    for node in ("node0", "node1"):
        code, error = json.loads(Path(node, "end.json").read_text())
        if what == "nothing":
            assert code == 0
        else:
            assert code == 1 and "x.pt" in error and "differ between the nodes" in error
            assert error.count("\n") == 1 and not Path(node, "x.pt").exists()


def test_fresh_under_torchrun(call, crash, monkeypatch):
    """A restarted worker goes on though the command says --fresh, beside an older result too."""
    crash("train_teacher", f"{TEACHER} --epochs 3 --fresh")  # r34.pt is of a run of one epoch
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = call("train_teacher", f"{TEACHER} --epochs 3 --fresh")
    assert "resumed  r34.pt.last, after epoch 1" in result.out and epochs_in("r34.pt") == 3
    call("train_teacher", f"{TEACHER} --epochs 2 --fresh")  # died before its first epoch was done
    assert epochs_in("r34.pt") == 2


# --------------------------------------------------------------------------------------- full disks
@pytest.mark.parametrize("event", ["printed", "step"])
def test_a_full_disk_costs_one_line_and_keeps_what_was_written(call, event):
    """At the end of the run, or when the interrupted run wants to write what was put off."""
    command = f"{TEACHER} --epochs 3 --out"
    events = [("full disk", "replaced", 1)]
    if event == "step":
        events.append(("SIGINT", "step", 5))
    result = run("train_teacher", f"{command} x.pt", *events)
    assert_refused(result, "cannot write x.pt", "x.pt.last holds 1 epoch", code=1)
    assert epochs_in("x.pt.last") == 1 and not Path("x.pt").exists()
    assert not list(Path(".").glob("*.tmp"))
    assert "after epoch 1" in call("train_teacher", f"{command} x.pt").out
    call("train_teacher", f"{command} calm.pt")
    assert_same_result("x.pt", "calm.pt")


@pytest.mark.parametrize("where", ["fsync", "log"])
def test_a_disk_that_is_full_from_the_start(call, monkeypatch, where):
    def no_room(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if where == "fsync":
            patch.setattr(os, "fsync", no_room)
        else:
            patch.setattr(train_teacher.TrainingRun, "write_log", no_room)
        result = call("train_teacher", f"{TEACHER} --epochs 2 --out x.pt")
    name = "x.pt.last" if where == "fsync" else "what the run says"
    assert_refused(result, f"cannot write {name} (No space left on device)", code=1)
    assert [p.name for p in Path(".").glob("x.pt*")] == ["x.pt.jsonl"]


@pytest.mark.parametrize("where", ["/dev/full", "a pipe that nobody reads"])
def test_a_screen_that_takes_nothing(folder, where):
    """As after `| head -3`: one line says what is kept, and no traceback, not even at the end."""
    if where == "/dev/full":
        out = os.open(where, os.O_WRONLY)
    else:
        read, out = os.pipe()
        os.close(read)
    code = f"import sys; sys.argv = 'x.py {TEACHER} --out x.pt --epochs 2'.split(); " \
           "import train_teacher as t; t.TrainingRun.header = lambda run, **facts: None; " \
           "t.run_script(t.main)"
    done = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE,
                          text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    os.close(out)
    result = SimpleNamespace(code=done.returncode, error=done.stderr)
    assert_refused(result, "cannot write", "x.pt.last holds 1 epoch: the same command", code=1)
    assert epochs_in("x.pt.last") == 1


def test_a_pipe_that_closes_after_the_last_epoch(call, monkeypatch):
    """The result is whole, and <out>.last, which the line would name, is gone."""
    say = train_teacher.TrainingRun.say

    def closed(run, text):
        if "next:" in text:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        say(run, text)

    monkeypatch.setattr(train_teacher.TrainingRun, "say", closed)
    result = call("train_teacher", f"{TEACHER} --epochs 1 --out x.pt")
    assert_refused(result, "Broken pipe", "x.pt is finished", code=1)
    assert epochs_in("x.pt") == 1 and not Path("x.pt.last").exists()


def test_a_full_disk_leaves_an_earlier_result_alone(call):
    before = Path("snn_init.pt").read_bytes()
    result = run("transfer_init", "--src r34.pt --T 3 --fresh", ("full disk", "serialise", 1))
    assert_refused(result, "cannot write snn_init.pt", "intact", code=1)
    assert Path("snn_init.pt").read_bytes() == before and not list(Path(".").glob("*.tmp"))


# ------------------------------------------------------------------------------------ out of memory
def test_memory_that_runs_out_keeps_the_epochs_before(call, monkeypatch):
    def no_room(args, epoch):
        if epoch > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return 0.01

    monkeypatch.setattr(train_teacher, "learning_rate", no_room)
    result = call("train_teacher", f"{TEACHER} --epochs 3 --out x.pt")
    assert_refused(result, "out of memory", "--batch-size", "x.pt.last holds 1 epoch", code=1)


def test_memory_that_runs_out_on_one_process_of_many(monkeypatch, capsys):
    """It alone knows, so it says so, whatever its rank."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")

    def main():
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(SystemExit) as end:
        train_teacher.run_script(main)
    error = capsys.readouterr().err
    assert end.value.code == 1 and "rank 3 is out of memory" in error and error.count("\n") == 1


# --------------------------------------------------------------------------- the same command again
@pytest.mark.parametrize("script,command,out", [
    ("train_teacher", f"{TEACHER} --epochs 1", "r34.pt"),
    ("transfer_init", "--src r34.pt --T 2", "snn_init.pt"),
    ("train_idsnn", f"{STUDENT} --epochs 1", "idsnn.pt")])
def test_a_finished_run_is_reported_and_kept(call, script, command, out):
    def files():
        return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in Path(".").glob(f"{out}*")}

    call(script, f"{command} --fresh")
    before, weights = files(), sha256(out)
    result = call(script, command)
    assert result.code == 0 and not result.error and result.out.count("\n") == 1
    assert f"{out} is finished" in result.out and "--fresh" in result.out
    assert files() == before
    call(script, f"{command} --fresh")
    assert files()[out] != before[out] and sha256(out) == weights


@pytest.mark.parametrize("script", FLAGS)
def test_another_seed_gives_other_weights(call, script):
    for seed in (0, 1):
        call(script, f"{FLAGS[script]} --epochs 1 --seed {seed} --out seed{seed}.pt")
    assert sha256("seed0.pt") != sha256("seed1.pt")


HALF = f"{TEACHER} --epochs 3"


def test_a_half_finished_run_of_another_configuration_is_refused_by_the_users_own_flags(
        call, crash):
    crash("train_teacher", f"{HALF} --out x.pt")
    kept = Path("x.pt.last").read_bytes()
    # the milestones follow from the epochs, much from the recipe: nobody gave them
    for flags, named, silent in [
        ("--lr 0.1", "--lr was 0.05, is 0.1", ()),
        ("--no-flip", "--flip was True, is False", ()),
        ("--epochs 4", "--epochs was 3, is 4", ("--milestones",)),
        ("--milestones 1,2", "--milestones was [0.9, 1.8, 2.4], is [1.0, 2.0]", ()),
        ("--recipe fast", "--recipe was paper, is fast", ("--lr", "--warmup", "--nesterov")),
        ("--precision fp64", "is fp64", ("auto",)),
        ("--width 2", "--width was 1, is 2", ()),
        ("--seed 7", "--seed was 0, is 7", ()),
    ]:
        result = call("train_teacher", f"{HALF} {flags} --out x.pt")
        assert_refused(result, "x.pt.last", named, "--fresh")
        assert not any(flag in result.error for flag in silent), result.error
        assert result.error.count(" was ") == 1, result.error
    assert Path("x.pt.last").read_bytes() == kept and not Path("x.pt").exists()

    Path("x.pt.last").write_bytes(kept[:-1000])
    result = call("train_teacher", f"{HALF} --out x.pt")
    assert_refused(result, "x.pt.last is truncated", "--fresh")
    result = call("train_teacher", f"{TEACHER} --epochs 1 --out x.pt --fresh")
    assert "resumed" not in result.out and epochs_in("x.pt") == 1
    assert not Path("x.pt.last").exists()


def test_what_auto_resolved_to_belongs_to_the_run(call, crash, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    crash("train_teacher", f"{HALF} --out x.pt")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    result = call("train_teacher", f"{HALF} --out x.pt")
    assert_refused(result, "--precision was fp32, is bf16")
    # said by a flag, it is the run that "auto" had begun
    assert "resumed" in call("train_teacher", f"{HALF} --out x.pt --precision fp32").out


def test_the_same_data_and_parents_are_the_same_under_other_names(call, crash):
    crash("train_teacher", f"{HALF} --out x.pt")
    for i, spelling in enumerate(["./set", os.path.abspath("set")]):
        shutil.copy("x.pt.last", f"{i}.pt.last")
        command = HALF.replace("--dataset set", f"--dataset {spelling} --data-dir other")
        assert "resumed" in call("train_teacher", f"{command} --out {i}.pt").out

    crash("train_idsnn", f"{STUDENT} --epochs 2 --out y.pt")
    os.rename("snn_init.pt", "init.pt")
    shutil.copy("r34.pt", "teacher.pt")
    command = f"{STUDENT} --epochs 2 --out y.pt"
    result = call("train_idsnn", f"{command} --init init.pt --teacher teacher.pt")
    assert "resumed" in result.out and result.code == 0


def test_other_data_and_parents_are_refused_under_the_same_name(call, crash):
    crash("train_teacher", f"{HALF} --out x.pt")
    crash("train_idsnn", f"{STUDENT} --epochs 2 --out y.pt")
    call("train_teacher", f"{TEACHER} --epochs 1 --seed 5 --fresh")
    result = call("train_idsnn", f"{STUDENT} --epochs 2 --out y.pt --teacher r34.pt")
    assert_refused(result, "y.pt.last", "the teacher is another file", "--fresh")
    os.replace("set/train/dog/1.png", "set/train/dog/0.png")
    shutil.copy("set/train/dog/2.png", "set/train/dog/1.png")
    result = call("train_teacher", f"{HALF} --out x.pt")
    assert_refused(result, "x.pt.last", "--dataset has other images or labels", "--fresh")


def test_the_parent_recorded_is_the_file_that_was_read(call, monkeypatch):
    """Another takes its place while the data are read, which may be minutes."""
    before = hashlib.sha256(Path("snn_init.pt").read_bytes()).hexdigest()
    load_data = train_idsnn.load_data

    def slow(*args):
        shutil.copy("r34.pt", "snn_init.pt")
        return load_data(*args)

    monkeypatch.setattr(train_idsnn, "load_data", slow)
    call("train_idsnn", f"{STUDENT} --epochs 1 --out x.pt")
    assert load_checkpoint("x.pt")["provenance"]["parents"]["init"]["sha256"] == before


# ------------------------------------------------------------------------------- editing is welcome
@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the sources which the scripts take for their own when they look for edits."""
    copy = tmp_path / "sources"
    shutil.copytree(ROOT / "kernels", copy / "kernels")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    monkeypatch.setattr(train_teacher, "__file__", str(copy / "train_teacher.py"))
    return copy


def append(path, text):
    path.write_text(path.read_text() + text)


def test_a_comment_stops_nothing_and_an_edit_only_a_finished_result(call, crash, sources):
    crash("train_teacher", f"{HALF} --out x.pt")
    crash("train_idsnn", f"{STUDENT} --epochs 2 --out y.pt")
    finished = dict(train_teacher=f"{TEACHER} --epochs 1 --out t.pt",
                    train_idsnn=f"{STUDENT} --epochs 1")
    for script, command in finished.items():
        call(script, command)

    for path in sources.rglob("*.py"):
        append(path, "\n\n# a thought\n")
    for script, command in finished.items():
        assert "is finished" in call(script, command).out
    shutil.copy("x.pt.last", "z.pt.last")
    result = call("train_teacher", f"{HALF} --out z.pt")
    assert "resumed" in result.out and "edited" not in result.out + result.error

    # only what the stage runs counts
    append(sources / "eval.py", "print('an edit')\n")
    append(sources / "train_idsnn.py", "print('an edit')\n")
    assert "is finished" in call("train_teacher", finished["train_teacher"]).out
    before = Path("idsnn.pt").read_bytes()
    result = call("train_idsnn", finished["train_idsnn"])
    assert_refused(result, "idsnn.pt", "train_idsnn.py was edited", "--fresh")
    assert Path("idsnn.pt").read_bytes() == before
    append(sources / "kernels/lif.py", "print('an edit')\n")
    assert_refused(call("train_teacher", finished["train_teacher"]), "kernels/lif.py was edited")

    # a resumed run says so, in one line, and goes on
    for script, command in (("train_teacher", f"{HALF} --out x.pt"),
                            ("train_idsnn", f"{STUDENT} --epochs 2 --out y.pt")):
        result = call(script, command)
        assert result.code == 0 and "resumed" in result.out
        notes = [line for line in (result.out + result.error).splitlines() if "edited" in line]
        assert len(notes) == 1 and "kernels/lif.py" in notes[0] and "going on" in notes[0]


def test_an_edited_recipe_is_refused_by_the_flags_name(call, crash, monkeypatch):
    crash("train_teacher", f"{HALF} --out x.pt")
    monkeypatch.setitem(train_teacher.PAPER, "weight_decay", 5e-4)
    result = call("train_teacher", f"{HALF} --out x.pt")
    assert_refused(result, "--weight-decay was 0.0001, is 0.0005", "--fresh")
    # said by a flag, it is the run that was begun
    result = call("train_teacher", f"{HALF} --out x.pt --weight-decay 1e-4")
    assert result.code == 0 and "resumed" in result.out


def test_an_edit_that_no_longer_fits_the_weights_costs_one_line(call, crash, monkeypatch):
    crash("train_teacher", f"{HALF} --out x.pt")
    kept = Path("x.pt.last").read_bytes()

    def conv(c_in, c_out, kernel, stride=1):
        return torch.nn.Conv2d(c_in, c_out, kernel + 2, stride, kernel // 2 + 1, bias=False)

    monkeypatch.setattr(train_teacher, "conv", conv)
    result = call("train_teacher", f"{HALF} --out x.pt")
    assert_refused(result, "x.pt.last", "conv1.weight", "--fresh")
    assert Path("x.pt.last").read_bytes() == kept


def test_edited_scripts_run(folder):
    """Not in this process: a copy of the sources, really edited since."""
    copy = folder / "sources"
    shutil.copytree(ROOT / "kernels", copy / "kernels")
    for script in MAIN:
        shutil.copy(ROOT / f"{script}.py", copy)
    append(copy / "kernels/bn_lif.py", "# a thought\n")
    append(copy / "transfer_init.py", "EDITED = True\n")
    done = subprocess.run(
        [sys.executable, "sources/transfer_init.py", *"--src r34.pt --T 2".split()],
        capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"transfer_init\.py: error: snn_init\.pt was made before transfer_init\.py "
                        r"was edited.*--fresh.*\n", done.stderr), done.stderr


# ----------------------------------------------------------------------------------- false progress
@pytest.mark.parametrize("script", FLAGS)
def test_a_loss_that_is_not_finite_keeps_the_epochs_before(call, script, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: time.sleep(0.2))  # the second epoch is put off

    def diverge(args, epoch):
        return 0.01 if epoch < 2 else 1e30

    monkeypatch.setattr(sys.modules[script], "learning_rate", diverge)
    result = call(script, f"{FLAGS[script]} --epochs 4 --out x.pt --precision fp32")
    assert_refused(result, "is not finite in epoch 3", "--lr", code=1)
    assert "--precision" not in result.error  # it is fp32 already
    last = load_checkpoint("x.pt.last")
    assert len(last["metrics"]["history"]) == 2 and not Path("x.pt").exists()
    assert all(value.isfinite().all() for value in last["model"].values())


def test_a_huge_learning_rate_is_no_success(call):
    command = f"{TEACHER} --epochs 40 --lr 1000 --weight-decay 1 --out x.pt"
    assert_refused(call("train_teacher", command), "is not finite in epoch 1", code=1)
    assert not Path("x.pt").exists() and not Path("x.pt.last").exists()


def test_a_huge_test_loss_is_no_success(call, monkeypatch):
    """The network guesses worse than chance by far: the file is written, the exit code is 1."""
    monkeypatch.setattr(train_teacher, "evaluate", lambda predict, data: (33.3, 53418.0))
    result = call("train_teacher", f"{TEACHER} --epochs 1 --out x.pt")
    assert_refused(result, "x.pt was written", "53,418", "--lr", code=1)
    assert epochs_in("x.pt") == 1


# ------------------------------------------------------------------------------ many kills in a row
def said(path):
    return Path(path).read_text() if os.path.exists(path) else ""


def kill(script, command, out, moment, say):
    """Run until `moment`: of MOMENTS, or seconds. Returns whether it was killed."""
    before = epochs_in(f"{out}.last")
    if isinstance(moment, tuple):
        when, killed = "at " + " number ".join(map(str, moment)), True
        result = run(script, f"{command} --out {out}", ("SIGKILL", *moment), slow=False)
        assert result.code == -signal.SIGKILL, result.error
    else:
        when = f"{moment:.2f} s after training began"
        Path("out.txt").unlink(missing_ok=True)
        arguments = (script, f"{command} --out {out}", (), False)
        process = PROCESSES.Process(target=script_process, args=arguments)
        process.start()
        while process.is_alive() and not re.search("^ *recipe ", said("out.txt"), re.M):
            process.join(0.01)
        process.join(moment)
        process.kill()
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        assert killed or process.exitcode == 0
    what = f"SIGKILL {when}" if killed else f"done before that, {when}"
    say(f"{script}.py resumed from epoch {before}, {what}; "
        f"{epochs_in(f'{out}.last')} epochs are saved")
    return killed


def main(kills):
    """Half of the kills in each training stage, on the digits; one in three while saving."""
    torch.set_num_threads(1)
    r = random.Random(0)

    def say(line):
        print(line, flush=True)

    def git(*command):
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    commit = git("log", "-1", "--format=%h")
    if git("status", "--short", "--", "kernels", "*.py"):
        commit += " (edited since)"
    say(f"$ python tests/test_restart.py {kills}")
    say(f"commit {commit}, python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.system()} {platform.machine()}, one CPU thread")
    total = 0
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for script, command, seconds in (
            ("train_teacher", "--device cpu --dataset digits --width 4 --depth 18 --epochs 40", 3),
            ("train_idsnn", "--device cpu --init init.pt --epochs 60", 6),
        ):
            say(f"$ python {script}.py {command} --out killed.pt   # and again after each kill")
            for i in range(kills // 2):
                moment = seconds * r.random()
                if i % 3 == 2:
                    moment = (["fsync", "replace", "replaced"][i // 3 % 3], 1)
                total += kill(script, command, "killed.pt", moment, say)
            for out in ("killed.pt", "calm.pt"):
                result = run(script, f"{command} --out {out}", slow=False)
                assert result.code == 0, result.error
                say(f"{script}.py, {out}: weights {sha256(out)}")
            assert_same_result("killed.pt", "calm.pt")
            if script == "train_teacher":
                os.rename("killed.pt", "r34.pt")
                say("$ python transfer_init.py --src r34.pt --T 2 --out init.pt")
                run("transfer_init", "--src r34.pt --T 2 --out init.pt")
                for path in Path(".").glob("*.pt*"):
                    if path.name not in ("r34.pt", "init.pt"):
                        path.unlink()
    say(f"{total} kills, the same weights")


if __name__ == "__main__":
    main(int(sys.argv[1]))
