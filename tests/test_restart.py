"""Nothing lost: kills, signals, dying workers, full disks, edited sources, divergence. `python tests/test_restart.py 20` kills 20 times."""
import contextlib
import gc
import hashlib
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

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for `python tests/test_restart.py`

import train_idsnn  # noqa: E402
import train_teacher  # noqa: E402
import transfer_init  # noqa: E402
from test_teacher import make_folder  # noqa: E402
from train_teacher import load_checkpoint  # noqa: E402

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
DRIVER = '''
"""python driver.py SCRIPT MOMENT ARGUMENT...: run the script's main(), saving after every epoch; SIGKILL itself at MOMENT.

MOMENT: "never", or NAME:COUNT@RANK, of the first attempt: the COUNT-th "fsync" (the new file is half done), "replace" (not yet in
place), "replaced" (in place) or optimizer "step" of that process."""
import glob, importlib, os, shutil, signal, sys
import torch
import train_teacher

script, moment, *argv = sys.argv[1:]
sys.argv = [f"{script}.py", *argv]
train_teacher.SAVE_EVERY = 0

def die():
    for last in glob.glob("*.last") if moment.startswith("step") else []:
        shutil.copy(last, f"saved-{last}")
    os.kill(os.getpid(), signal.SIGKILL)

def dying(function, count, after):
    calls = 0
    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and not after:
            die()
        result = function(*args, **kwargs)
        if calls == count:
            die()
        return result
    return wrapper

if moment != "never":
    name, count, rank = moment.replace("@", ":").split(":")
    where, attribute = dict(fsync=(os, "fsync"), replace=(os, "replace"), replaced=(os, "replace"), step=(torch.optim.SGD, "step"))[name]
    if int(rank) == int(os.environ.get("RANK", 0)) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        setattr(where, attribute, dying(getattr(where, attribute), int(count), name == "replaced"))
module = importlib.import_module(script)
module.run(module.main)
'''


def start(folder, script, flags, moment="never", launcher=()):
    (folder / "driver.py").write_text(DRIVER)
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, *launcher, "driver.py", script, moment, *flags.split()], cwd=folder, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_until(process, pattern):
    """Follow the output to a line that matches, or to its end; returns the line or ""."""
    return next((line for line in process.stdout if re.search(pattern, line)), "")


def finish(process):
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


def weights(path):
    return load_checkpoint(str(path))["model"]


def sha256(path):
    digest = hashlib.sha256()
    for name, tensor in weights(path).items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def epochs_saved(path):
    return len(load_checkpoint(str(path))["metrics"]["history"]) if path.exists() else 0


def kill(folder, script, flags, out, moment, say):
    """Run the command, SIGKILL it: at a moment of saving, or `moment` seconds after training began. False: it was done before."""
    before = epochs_saved(folder / f"{out}.last")
    by_itself = isinstance(moment, str)
    process = start(folder, script, f"{flags} --out {out}", moment if by_itself else "never")
    if not by_itself and read_until(process, "recipe"):
        time.sleep(moment)
        process.kill()
    _, error = process.communicate(timeout=300)
    killed = process.returncode == -signal.SIGKILL
    assert killed or (process.returncode == 0 and not by_itself), error
    after = epochs_saved(folder / f"{out}.last")  # reads it, checksums and all
    when = moment.replace(":", " number ").replace("@0", "") if by_itself else f"{moment:5.2f} s after training began"
    what = f"SIGKILL at {when}" if killed else f"finished before {when}"
    say(f"{script}.py resumed from epoch {before}, {what}; {after} epochs are saved")
    return killed


def kill_and_compare(folder, script, flags, moments, say=lambda line: None):
    """Kill a run at every one of `moments` and let it end; its weights must be those of an undisturbed run."""
    killed = sum([kill(folder, script, flags, "killed.pt", moment, say) for moment in moments])
    last = epochs_saved(folder / "killed.pt.last")
    output = finish(start(folder, script, f"{flags} --out killed.pt"))
    say(f"{script}.py was finished" if "is finished" in output else f"{script}.py resumed from epoch {last} and ended")
    with contextlib.redirect_stdout(None):
        MAIN[script](f"{flags} --out calm.pt".split())
    calm, disturbed = sha256(folder / "calm.pt"), sha256(folder / "killed.pt")
    say(f"{script}.py undisturbed: weights {calm}")
    say(f"{script}.py killed {killed} times: weights {disturbed}")
    assert calm == disturbed
    assert f"resumed  killed.pt.last, after epoch {last}" in output or not last
    leftovers = sorted(p.name for p in folder.glob("killed.pt*"))
    assert leftovers == ["killed.pt", "killed.pt.jsonl"], leftovers
    rows = (folder / "killed.pt.jsonl").read_text().splitlines()
    assert len(rows) == 1 + len(load_checkpoint(str(folder / "killed.pt"))["metrics"]["history"])  # the header; no epoch twice
    return killed


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """An image set, a teacher and what stage 2 made of it, in a folder of its own."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path)
    train_teacher.load_data("set", "data")  # into the cache, whose key holds the path
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    before, folder = os.getcwd(), tmp_path_factory.mktemp("made")
    os.chdir(folder)
    make_folder(folder / "set", train=32, test=4, size=(8, 8))
    train_teacher.main(f"{TEACHER} --epochs 1".split())
    transfer_init.main(["--src", "r34.pt", "--T", "2"])
    os.chdir(before)
    return folder


TEACHER = "--device cpu --dataset set --width 1 --depth 18 --batch-size 48"
STUDENT = "--device cpu --batch-size 48"
MAIN = {"train_teacher": train_teacher.main, "train_idsnn": train_idsnn.main}
FLAGS = {"train_teacher": TEACHER, "train_idsnn": STUDENT}


# ------------------------------------------------------------------------------------------------------ kills
@posix
@pytest.mark.parametrize("script,moments", [
    ("train_teacher", ["fsync:2@0", 0.3 * random.random(), "replace:1@0"]),
    ("train_idsnn", [0.5 * random.random(), "replaced:2@0"]),
    ("train_idsnn --ema 0.2 --aug strong", [0.5 * random.random(), "replaced:3@0"]),
])
def test_a_killed_run_goes_on_to_the_same_weights(folder, script, moments):
    script, *flags = script.split()
    assert kill_and_compare(folder, script, " ".join([FLAGS[script], "--epochs 12", *flags]), moments, print) >= len(moments) - 1


@posix
def test_killed_between_the_result_and_the_end(folder, monkeypatch):
    """Both <out> and <out>.last stand: the same command tidies up."""
    monkeypatch.setattr(train_teacher, "SAVE_EVERY", 0)
    keep, unlink = [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **k: keep.append(path) if path.suffix == ".last" else unlink(path, **k))
    train_teacher.main(f"{TEACHER} --epochs 2 --out x.pt".split())
    monkeypatch.undo()
    os.chdir(folder)
    assert keep and Path("x.pt.last").exists()
    before = sha256("x.pt")
    train_teacher.main(f"{TEACHER} --epochs 2 --out x.pt".split())
    assert sha256("x.pt") == before and not Path("x.pt.last").exists()


@posix
def test_signals_end_a_run_with_one_line_and_a_second_run_is_refused(folder, capsys):
    flags = f"{TEACHER} --epochs 60 --out x.pt"
    for number, (name, epoch) in enumerate([("SIGTERM", 2), ("SIGINT", 5)]):
        process = start(folder, "train_teacher", flags)
        assert read_until(process, rf"^ +{epoch} .*\d")
        if number == 0:
            with pytest.raises(SystemExit) as end:
                train_teacher.main(flags.split() + ["--fresh"])
            error = capsys.readouterr().err
            assert end.value.code == 2 and "another run is writing x.pt" in error and len(error.splitlines()) == 1
            assert process.poll() is None and Path("x.pt.last").exists()
        process.send_signal(getattr(signal, name))
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130
        assert re.fullmatch(r"interrupted; x\.pt\.last holds \d+ epochs: the same command goes on\n", error), error
        assert epochs_saved(Path("x.pt.last")) >= epoch - 1
        assert not Path("x.pt").exists() and not Path("x.pt.last.tmp").exists()


@posix
def test_a_dying_worker_and_other_numbers_of_processes(folder):
    """Two processes, one dies, the run goes on by itself; what the two had saved continues on one and on three; all as one process."""
    flags = f"{STUDENT} --precision fp64 --epochs 3"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "3", "--nproc-per-node"]
    train_idsnn.main(f"{flags} --out one.pt".split())
    output = finish(start(folder, "train_idsnn", f"{flags} --out two.pt", "step:3@1", [*torchrun, "2"]))  # epoch 2, two steps an epoch
    assert "resumed  two.pt.last, after epoch 1" in output
    assert epochs_saved(folder / "saved-two.pt.last") == 1
    for n in ("1", "3"):
        shutil.copy("saved-two.pt.last", f"on{n}.pt.last")
    train_idsnn.main(f"{flags} --out on1.pt".split())
    output = finish(start(folder, "train_idsnn", f"{flags} --out on3.pt", "never", [*torchrun, "3"]))
    assert "resumed  on3.pt.last, after epoch 1" in output
    one = weights("one.pt")
    for out, world in (("two.pt", 2), ("on1.pt", 1), ("on3.pt", 3)):
        checkpoint = load_checkpoint(out)
        assert checkpoint["provenance"]["world_size"] == world
        for name, value in one.items():
            assert torch.dist(value.double(), checkpoint["model"][name].double()) <= 1e-10 * value.double().norm(), (out, name)


# -------------------------------------------------------------------------------------------------- full disks
@pytest.fixture(params=["tmpfs", "limit"])
def full_disk(request, folder, monkeypatch):
    """(folder whose disk is full after the first save, function that makes room)"""
    resource = pytest.importorskip("resource")
    train_teacher.main(f"{TEACHER} --epochs 1 --out probe.pt".split())
    size = os.path.getsize("probe.pt")  # without the optimizer's state; <out>.last is larger
    if request.param == "tmpfs":
        (folder / "disk").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 3}", "tmpfs", str(folder / "disk")]
        if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("only root may mount")
        yield folder / "disk", lambda: subprocess.run([*mount[:3], "-o", "remount,size=9M", *mount[5:]], check=True)
        subprocess.run(["umount", str(folder / "disk")], check=True)
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        fsync = os.fsync

        def fsync_then_limit(fd):
            fsync(fd)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
        monkeypatch.setattr(os, "fsync", fsync_then_limit)

        def make_room():
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            monkeypatch.setattr(os, "fsync", fsync)
        yield folder, make_room
        make_room()


def test_full_disk(full_disk, monkeypatch, capsys):
    disk, make_room = full_disk
    monkeypatch.setattr(train_teacher, "SAVE_EVERY", 0)
    command = f"{TEACHER} --epochs 3 --out {disk / 'x.pt'}".split()
    with pytest.raises(SystemExit) as end:
        train_teacher.main(command)
    error = capsys.readouterr().err
    assert end.value.code == 1 and len(error.splitlines()) == 1
    assert "cannot write" in error and "x.pt.last" in error and "intact" in error
    assert sorted(p.name for p in disk.glob("x.pt*")) == ["x.pt.jsonl", "x.pt.last"]  # no stray files
    assert epochs_saved(disk / "x.pt.last") == 1
    make_room()
    train_teacher.main(command)
    assert "resumed" in capsys.readouterr().out
    train_teacher.main(f"{TEACHER} --epochs 3 --out calm.pt".split())
    assert sha256(disk / "x.pt") == sha256("calm.pt")


@posix
def test_full_disk_at_the_log_and_at_the_transfer(folder, capsys):
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for main, command, name in ((train_teacher.main, f"{TEACHER} --epochs 2 --out x.pt", "x.pt.jsonl"),
                                (transfer_init.main, "--src r34.pt --T 3 --out y.pt", "y.pt"),
                                (transfer_init.main, "--src r34.pt --T 3 --fresh", "snn_init.pt")):
        before = sha256("snn_init.pt")
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
        try:
            with pytest.raises(SystemExit) as end:
                main(command.split())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        error = capsys.readouterr().err
        assert end.value.code == 1 and len(error.splitlines()) == 1 and f"cannot write {name}" in error and "Traceback" not in error
        assert sha256("snn_init.pt") == before and not list(folder.glob("*.tmp")) and not (folder / "y.pt").exists()


# --------------------------------------------------------------------------------------------- the same command again
def test_a_finished_run_is_reported_and_kept(folder, capsys):
    for main, command, out in ((train_teacher.main, f"{TEACHER} --epochs 1", "r34.pt"), (transfer_init.main, "--src r34.pt --T 2", "snn_init.pt"),
                               (train_idsnn.main, f"{STUDENT} --epochs 1", "idsnn.pt")):
        if out == "idsnn.pt":
            main(command.split())
        files = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.glob(f"{out}*")}
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(command.split())
        printed = capsys.readouterr()
        assert end.value.code == 0 and not printed.err
        assert f"{out} is finished" in printed.out and "--fresh" in printed.out and len(printed.out.splitlines()) == 1
        assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.glob(f"{out}*")} == files
        del end
        gc.collect()  # the exception held the lock on --out, where a process would have ended
        main([*command.split(), "--fresh"])
        now = load_checkpoint(out)
        assert Path(out).stat().st_mtime_ns > files[folder / out][1] and now["config"]["fresh"]
        anew = sha256(out)
        Path(out).write_bytes(files[folder / out][0])  # the next stage knows this file, with its own date and durations
        assert sha256(out) == anew  # determinism: the same weights


@pytest.mark.parametrize("script", MAIN)
def test_another_seed_gives_other_weights(folder, script):
    for seed in (0, 1):
        MAIN[script](f"{FLAGS[script]} --epochs 1 --seed {seed} --out seed{seed}.pt".split())
    assert sha256("seed0.pt") != sha256("seed1.pt")


def test_a_half_finished_run_of_another_configuration(folder, monkeypatch, capsys):
    """It is refused, named and kept; --fresh starts over; a damaged one is refused too."""
    stop_after_one_epoch(monkeypatch, f"{TEACHER} --epochs 4 --out x.pt")
    kept = Path("x.pt.last").read_bytes()
    for change, words in (("--lr 0.1", "--lr was 0.05, is 0.1"), ("--no-flip", "--flip was True, is False"), ("--precision fp64", "--precision was auto, is fp64")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            train_teacher.main(f"{TEACHER} --epochs 4 --out x.pt {change}".split())
        error = capsys.readouterr().err
        assert end.value.code == 2 and words in error and "x.pt.last" in error and "--fresh" in error and len(error.splitlines()) == 1
        assert Path("x.pt.last").read_bytes() == kept and not Path("x.pt").exists()
        del end
        gc.collect()
    Path("x.pt.last").write_bytes(kept[:-1000])
    with pytest.raises(SystemExit) as end:
        train_teacher.main(f"{TEACHER} --epochs 4 --out x.pt".split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and "x.pt.last is truncated" in error and "--fresh" in error
    del end
    gc.collect()
    train_teacher.main(f"{TEACHER} --epochs 2 --out x.pt --fresh".split())
    assert "resumed" not in capsys.readouterr().out
    assert len(load_checkpoint("x.pt")["metrics"]["history"]) == 2 and not Path("x.pt.last").exists()


def stop_after_one_epoch(monkeypatch, command):
    """Leave <out>.last as it is after the first epoch, in this process."""
    class Stop(Exception):
        pass

    def save_and_stop(path, checkpoint, save=train_teacher.save_checkpoint):
        save(path, checkpoint)
        raise Stop
    with monkeypatch.context() as patch:
        patch.setattr(train_teacher, "SAVE_EVERY", 0)
        patch.setattr(train_teacher, "save_checkpoint", save_and_stop)
        with pytest.raises(Stop):
            train_teacher.main(command.split())
    gc.collect()


def test_fresh_under_torchrun(folder, monkeypatch, capsys):
    """A restarted worker goes on although the command says --fresh, and an older result at --out doesn't stop it."""
    stop_after_one_epoch(monkeypatch, f"{TEACHER} --epochs 3 --out r34.pt --fresh")  # r34.pt is of a run of one epoch
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train_teacher.main(f"{TEACHER} --epochs 3 --out r34.pt --fresh".split())
    assert "resumed  r34.pt.last, after epoch 1" in capsys.readouterr().out
    assert len(load_checkpoint("r34.pt")["metrics"]["history"]) == 3
    train_teacher.main(f"{TEACHER} --epochs 2 --out r34.pt --fresh".split())  # died before the first save
    assert len(load_checkpoint("r34.pt")["metrics"]["history"]) == 2


def test_an_edited_source_is_refused(folder):
    copy = folder / "copy"
    copy.mkdir()
    shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for script in ("train_teacher.py", "transfer_init.py"):
        shutil.copy(ROOT / script, copy)
    before = Path("snn_init.pt").read_bytes()
    with open(copy / "kernels" / "lif.py", "a") as f:
        f.write("# edited\n")
    done = subprocess.run([sys.executable, str(copy / "transfer_init.py"), "--src", "r34.pt", "--T", "2"], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"transfer_init\.py: error: snn_init\.pt .*kernels/lif\.py was edited.*--fresh.*\n", done.stderr), done.stderr
    assert Path("snn_init.pt").read_bytes() == before


# --------------------------------------------------------------------------------------------- false progress
@pytest.mark.parametrize("script", MAIN)
def test_divergence_ends_the_run_in_its_epoch(folder, script, capsys, monkeypatch):
    def diverge(args, epoch):
        return 0.01 if epoch < 2 else 1e30
    monkeypatch.setattr(sys.modules[script], "learning_rate", diverge)  # epochs 1 and 2 are fine
    monkeypatch.setattr(train_teacher, "SAVE_EVERY", 0)
    with pytest.raises(SystemExit) as end:
        MAIN[script](f"{FLAGS[script]} --epochs 4 --out x.pt".split())
    printed = capsys.readouterr()
    assert end.value.code == 1 and len(printed.err.splitlines()) == 1
    assert "is not finite in epoch 3" in printed.err and "x.pt.last keeps an earlier epoch" in printed.err and "--lr" in printed.err
    last = load_checkpoint("x.pt.last")
    assert len(last["metrics"]["history"]) == 2 and all(v.isfinite().all() for v in last["model"].values())
    assert not Path("x.pt").exists()


def test_a_huge_learning_rate_is_no_success(folder, capsys):
    with pytest.raises(SystemExit) as end:
        train_teacher.main(f"{TEACHER} --epochs 40 --lr 1000 --weight-decay 1 --out x.pt".split())
    error = capsys.readouterr().err
    assert end.value.code == 1 and "is not finite in epoch 1; no earlier epoch was saved" in error and len(error.splitlines()) == 1
    assert not Path("x.pt").exists()


def test_a_dead_layer_is_reported_in_the_first_epoch(folder, capsys):
    train_idsnn.main(f"{STUDENT} --epochs 1 --v-th 900 --out x.pt".split())
    warning = next(line for line in capsys.readouterr().out.splitlines() if "warning" in line)
    assert "bn1 never fires (as do 16 more)" in warning and "--v-th" in warning


def test_the_header_says_what_runs_where(folder, capsys):
    train_idsnn.main(f"{STUDENT} --epochs 1 --T 3 --out x.pt".split())
    header = capsys.readouterr().out
    digest = load_checkpoint("x.pt")["data"]["sha256"][:12]
    for words in ("cpu, fp32, 1 process", "PyTorch", f"96 + 12 images of 3x8x8, 3 classes, sha256 {digest}", "snn_init.pt", "r34.pt", "T 3, decay 0.25"):
        assert words in header


# ------------------------------------------------------------------------------------------ many kills in a row
def main(kills):
    """Half of the kills in stage 1, half in stage 3, on the digits; two in three at random moments, one in three while saving."""
    torch.set_num_threads(1)
    r, say = random.Random(0), lambda line: print(line, flush=True)
    sources = ["kernels/lif.py", "kernels/bn_lif.py", "train_teacher.py", "transfer_init.py", "train_idsnn.py"]
    git = lambda *command: subprocess.run(["git", *command, "--", *sources], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    commit = git("log", "-1", "--format=%h") + " (edited since)" * bool(git("status", "--short"))
    versions = f"scripts and kernels of commit {commit}, python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.machine()}, one CPU thread"
    say(f"$ python tests/test_restart.py {kills}\n{versions}")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        done = 0
        for script, flags, seconds in (("train_teacher", "--device cpu --dataset digits --width 4 --depth 18 --epochs 30", 3.0),
                                       ("train_idsnn", "--device cpu --init init.pt --epochs 24", 6.0)):
            say(f"$ python {script}.py {flags} --out killed.pt   # and again after each kill")
            moments = [f"{['fsync', 'replace', 'replaced'][i // 3 % 3]}:1@0" if i % 3 == 2 else seconds * r.random() for i in range(kills // 2)]
            done += kill_and_compare(Path(folder), script, flags, moments, say)
            if script == "train_teacher":
                os.rename("killed.pt", "r34.pt")
                say("$ python transfer_init.py --src r34.pt --T 2 --out init.pt")
                subprocess.run([sys.executable, str(ROOT / "transfer_init.py"), *"--src r34.pt --T 2 --out init.pt".split()], check=True, stdout=subprocess.DEVNULL)
                for p in Path(".").glob("*.pt*"):
                    if p.name not in ("r34.pt", "init.pt"):
                        p.unlink()
        say(f"{done} kills, the same weights")
        os.chdir(ROOT)


if __name__ == "__main__":
    main(int(sys.argv[1]))
