"""N processes compute what one computes. In fp64: in fp32 one flipped spike parts two runs."""
import multiprocessing
import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import call

import train_teacher
from train_teacher import BatchNormReLU, Images, average_gradients, evaluator, load_checkpoint

# children of a server that has imported torch: a process costs no seconds
PROCESSES = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
PROCESSES.set_forkserver_preload(["pytest", "torch._dynamo", "train_idsnn"])
load_digits = train_teacher.load_digits


def few(dataset, data_dir):
    """99 of the digits, of which batches of 24 or 48 leave three over, and 61 to test on."""
    data = load_digits(dataset, data_dir)
    return Images(dataset, data.classes, data.train_x[:99], data.train_y[:99],
                  data.test_x[:61], data.test_y[:61])


def member(rank, world, port, function, args):
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train_teacher.run_script(lambda: function(*args))
    assert not dist.is_initialized()


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
def train(command):
    train_teacher.load_digits = few
    if train_teacher.rank() > 0:
        train_teacher.save_checkpoint = None  # the first one alone writes
    call(command)


def seven_images():
    x = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 2, 2, 1)  # (N, H, W, C)
    y = torch.arange(7) % 3
    return Images("seven", ["a", "b", "c"], x, y, x, y)


def knows_five(images, index):
    """Right about images 0 to 4; says class 0 of 5 and 6, which are of classes 2 and 0."""
    assert torch.equal(images[:, 0, 0, 0].long(), index)
    return F.one_hot(torch.where(index < 5, index % 3, 0), 3).float()


def accuracy_and_loss(batch_size):
    args = SimpleNamespace(batch_size=batch_size, graph=True, precision="fp64")
    return evaluator(knows_five, seven_images(), args)()


def global_batch():
    """x, residual and the output's gradient: (B, C, H, W) each."""
    g = torch.Generator().manual_seed(5)
    return torch.randn(3, 4, 2, 3, 3, generator=g, dtype=torch.float64).unbind(0)


def batch_norm(x, residual, weight, bias=True):
    """Output, gradient and running statistics for this process's share of the batch."""
    norm = BatchNormReLU(2).double()
    torch.nn.init.constant_(norm.weight, 0.7)
    if not bias:  # a flag of nn.BatchNorm2d since PyTorch 2.14
        norm.bias = None
    x = x.clone().requires_grad_()
    y = norm(x, residual)
    (y * weight).sum().backward()
    return [y.detach(), x.grad, norm.running_mean, norm.running_var]


def averaged(layout):
    """Gradients of a convolution. Before their mean the i-th number of a parameter has i * rank."""
    model = torch.nn.Conv2d(3, 4, 2).to(memory_format=layout)
    for p in model.parameters():
        numbers = torch.arange(float(p.numel())).view(p.shape)
        (p * numbers * train_teacher.rank()).sum().backward()
    average_gradients(model)
    return [p.grad for p in model.parameters()]


def one_of_two():
    train_teacher.setup(train_teacher.parse_args(["--device", "cpu", "--precision", "fp64"]))
    rank = train_teacher.rank()
    torch.save(dict(
        evaluate=accuracy_and_loss(batch_size=1),
        norm=batch_norm(*[t.chunk(2)[rank] for t in global_batch()]),
        norm_without_bias=batch_norm(*[t.chunk(2)[rank] for t in global_batch()], bias=False),
        gradients=[averaged(f) for f in (torch.contiguous_format, torch.channels_last)],
    ), f"rank{rank}.pt")


# -------------------------------------------------------------------------------------------- tests
# the second process tests on 13 of 61 images, and on none where the batch is larger
TRAIN = "--dataset digits --device cpu --precision fp64 --batch-size 24 --epochs 2"
RUNS = dict(
    teacher=f"train_teacher.py {TRAIN} --width 2 --depth 18 --lr 0.1",
    direct=f"train_idsnn.py {TRAIN} --init direct.pt",
    poisson=f"train_idsnn.py {TRAIN} --init poisson.pt",
    steps=f"train_idsnn.py {TRAIN} --init direct.pt --batch-size 48 --per-step --nesterov")


@pytest.fixture(scope="module")
def runs(stages, tmp_path_factory):
    """The same commands by one process and by two, in one folder."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train_teacher, "load_digits", few)
        for encoder in ("direct", "poisson"):
            call(f"transfer_init.py --src {stages / 'r34.pt'} --width 2 --T 2 "
                 f"--encoder {encoder} --out {encoder}.pt")
        for name, command in RUNS.items():
            call(f"{command} --out {name}1.pt")
            run_processes(2, train, f"{command} --out {name}2.pt")
        run_processes(2, one_of_two)
    return folder


def assert_same_run(one, two):
    """In fp64: what is left is the order in which numbers were added."""
    one, two = load_checkpoint(one), load_checkpoint(two)
    for key, value in one["model"].items():
        value, other = value.double(), two["model"][key].double()
        assert torch.dist(value, other) <= 1e-10 * value.norm(), key
    for row1, row2 in zip(one["history"], two["history"], strict=True):
        for key in row1.keys() - {"seconds", "images_per_s"}:
            assert row1[key] == pytest.approx(row2[key], rel=1e-9), key


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_weights_of_one(runs, name):
    assert_same_run(runs / f"{name}1.pt", runs / f"{name}2.pt")


@pytest.mark.parametrize("name", ["direct", "poisson"])
def test_these_runs_have_trained(runs, name):
    start, end = (load_checkpoint(runs / f"{file}.pt")["model"] for file in (name, f"{name}2"))
    for key, value in start.items():
        if "conv" in key:
            assert not torch.allclose(value.double(), end[key].double(), rtol=1e-3), key


@pytest.fixture
def seen(runs):
    """What each of two processes saw."""
    return [torch.load(runs / f"rank{r}.pt", weights_only=True) for r in range(2)]


def test_a_test_set_that_does_not_divide_is_counted_exactly(seen):
    expected = accuracy_and_loss(batch_size=7)
    assert expected[0] == pytest.approx(100 * 6 / 7)
    for process in seen:
        assert process["evaluate"] == pytest.approx(expected)


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_is_over_both_processes(seen, bias):
    parts = [process["norm" if bias else "norm_without_bias"] for process in seen]
    whole = batch_norm(*global_batch(), bias=bias)
    for name, one, a, b in zip(("output", "gradient", "mean", "variance"), whole, *parts):
        two = torch.cat([a, b]) if name in ("output", "gradient") else a
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-12), name


def test_gradients_are_averaged_number_by_number(seen):
    """Channels-last too, where the order in memory is another."""
    for process in seen:
        for gradients in process["gradients"]:
            for grad in gradients:
                mean = torch.arange(grad.numel()) * (0 + 1) / 2
                assert torch.equal(grad, mean.view(grad.shape))


@pytest.mark.parametrize("script", ["train_teacher.py --dataset digits --width 8 --depth 18",
                                    "train_idsnn.py"])
@pytest.mark.parametrize("device", [
    "cpu", pytest.param("cuda", marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a GPU"))])
def test_a_group_of_one_changes_nothing(here, script, device):
    """On a GPU its all-reduce is recorded with the step."""
    command = f"{script} --epochs 2 --device {device} --precision fp32 --deterministic"
    call(f"{command} --out alone.pt")
    dist.init_process_group("nccl" if device == "cuda" else "gloo",
                            f"file://{here}/rendezvous", rank=0, world_size=1)
    try:
        call(f"{command} --out grouped.pt")
    finally:
        dist.destroy_process_group()
        torch.use_deterministic_algorithms(False)
    alone, shared = load_checkpoint("alone.pt"), load_checkpoint("grouped.pt")
    losses = [[row["loss"] for row in run["history"]] for run in (alone, shared)]
    assert losses[0] == losses[1]
    assert all(torch.equal(v, shared["model"][k]) for k, v in alone["model"].items())
