"""N processes compute what one computes. In fp64: in fp32 one flipped spike parts two runs."""
import multiprocessing
import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_teacher import make_folder

import train_idsnn
import train_teacher
import transfer_init
from train_teacher import BatchNormReLU, Images, evaluate, load_checkpoint

# children of a server that has imported everything: a process costs no seconds for torch
PROCESSES = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
PROCESSES.set_forkserver_preload(["torch._dynamo", "test_distributed", "test_restart"])

# 63 images: 5 steps an epoch, 3 images left over; 7 test images
TRAIN = "--device cpu --dataset set --epochs 2 --precision fp64 --batch-size 12".split()
TEACHER = [*TRAIN, *"--width 2 --depth 18 --lr 0.1".split()]
STUDENTS = dict(
    direct=["--init", "direct.pt"],
    poisson=["--init", "poisson.pt"],
    steps=["--init", "direct.pt", "--per-step", "--nesterov"])


def member(rank, world, port, function, args):
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    function(*args)


def run_processes(world, function, *args):
    """Call function(*args) in `world` processes, ranks of one run; all have to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    members = [PROCESSES.Process(target=member, args=(rank, world, port, function, args))
               for rank in range(world)]
    for process in members:
        process.start()
    for process in members:
        process.join(300)
    assert [process.exitcode for process in members] == [0] * world


# --------------------------------------------------------------------------- what each process does
def seven_images():
    x = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 2, 2, 1)  # (N, H, W, C)
    y = torch.arange(7) % 3
    return Images("seven", ["a", "b", "c"], x, y, x, y)


def knows_five(images, index):
    """Right about images 0 to 4; says class 0 of 5 and 6, which are of classes 2 and 0."""
    assert torch.equal(images[:, 0, 0, 0].long(), index)
    return F.one_hot(torch.where(index < 5, index % 3, 0), 3).float()


def global_batch():
    """x, residual and the output's gradient: (B, C, H, W) each."""
    g = torch.Generator().manual_seed(5)
    return torch.randn(3, 4, 2, 3, 3, generator=g, dtype=torch.float64).unbind(0)


def batch_norm(x, residual, weight):
    """Output, gradient and running statistics for this process's share of the batch."""
    norm = BatchNormReLU(2).double()
    torch.nn.init.constant_(norm.weight, 0.7)
    x = x.clone().requires_grad_()
    y = norm(x, residual)
    (y * weight).sum().backward()
    return [y.detach(), x.grad, norm.running_mean, norm.running_var]


def train_students(n):
    for name, flags in STUDENTS.items():
        train_idsnn.main([*TRAIN, *flags, "--out", f"{name}{n}.pt"])


def one_of_two():
    warnings.simplefilter("error", FutureWarning)
    train_teacher.main([*TEACHER, "--out", "teacher2.pt"])
    train_students(2)
    shares = [t.chunk(2)[dist.get_rank()] for t in global_batch()]
    seen = dict(evaluate=evaluate(knows_five, seven_images(), batch_size=2),
                norm=batch_norm(*shares))
    torch.save(seen, f"rank{dist.get_rank()}.pt")
    # however a script ends, the process group is gone: here it finds its result finished
    with pytest.raises(SystemExit):
        train_teacher.run_script(lambda: train_teacher.main([*TEACHER, "--out", "teacher2.pt"]))
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same commands by one process and by two, in one folder."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_folder(folder / "set", classes="abcdefg", train=9, test=1, size=(8, 8))
        train_teacher.main([*TEACHER, "--out", "teacher1.pt"])
        for encoder in ("direct", "poisson"):
            flags = ["--src", "teacher1.pt", "--T", "2", "--encoder", encoder]
            transfer_init.main([*flags, "--out", f"{encoder}.pt"])
        train_students(1)
        run_processes(2, one_of_two)
    return folder


# -------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize("name", ["teacher", *STUDENTS])
def test_two_processes_give_the_weights_of_one(runs, name):
    one, two = (load_checkpoint(runs / f"{name}{n}.pt") for n in (1, 2))
    assert one["provenance"]["world_size"] == 1
    assert two["provenance"]["world_size"] == 2
    for key, value in one["model"].items():
        value, other = value.double(), two["model"][key].double()
        assert torch.dist(value, other) <= 1e-10 * value.norm(), key
    for row1, row2 in zip(one["metrics"]["history"], two["metrics"]["history"], strict=True):
        for key in ("loss", "train_acc", "test_loss", "test_acc", "lr"):
            assert row1[key] == pytest.approx(row2[key], rel=1e-9), key


@pytest.mark.parametrize("name", STUDENTS)
def test_these_runs_have_trained(runs, name):
    init = STUDENTS[name][1]
    start, end = (load_checkpoint(runs / path)["model"] for path in (init, f"{name}2.pt"))
    for key, value in start.items():
        if "conv" in key:
            assert not torch.allclose(value.double(), end[key].double(), rtol=1e-3), key


def test_a_test_set_that_does_not_divide_is_counted_exactly(runs):
    expected = evaluate(knows_five, seven_images(), batch_size=7)
    assert expected[0] == pytest.approx(100 * 6 / 7)
    for rank in range(2):
        seen = torch.load(runs / f"rank{rank}.pt", weights_only=True)
        assert seen["evaluate"] == pytest.approx(expected)


def test_batch_norm_is_over_both_processes(runs):
    whole = batch_norm(*global_batch())
    parts = [torch.load(runs / f"rank{r}.pt", weights_only=True)["norm"] for r in range(2)]
    for name, one, a, b in zip(("output", "gradient", "mean", "variance"), whole, *parts):
        two = torch.cat([a, b]) if name in ("output", "gradient") else a
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-12), name
