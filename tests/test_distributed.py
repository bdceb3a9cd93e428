"""N processes compute what one process computes. In fp64: in fp32 one flipped spike parts two runs within a step."""
import os

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

import train_idsnn
import train_teacher
import transfer_init
from test_teacher import make_folder
from train_teacher import BatchNormReLU, Images, evaluate, load_checkpoint

TRAIN = ["--epochs", "2", "--precision", "fp64", "--batch-size", "12", "--dataset", "set"]  # 5 steps an epoch; 7 test images

MORE = "--aug strong --ema 0.2 --nesterov --label-smoothing 0.1 --ce steps --kd steps --self-kd 1".split()


def seven_images():
    x = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1).expand(7, 2, 2, 1).contiguous()
    return Images("seven", ["a", "b", "c"], x, torch.arange(7) % 3, x, torch.arange(7) % 3)


def sees_images_below_five(x, start):  # right about 0, 1, 2, 3, 4 (classes 0 1 2 0 1), says 0 for 5 (2) and 6 (0)
    assert int(x[0, 0, 0, 0]) == start
    n = x[:, 0, 0, 0].long()
    return F.one_hot(torch.where(n < 5, n % 3, 0), 3).float()


def batch_norm_gradients(x, residual, weight):
    """Output, running statistics and gradients of this process's share of a fixed global batch."""
    bn = BatchNormReLU(2).double()
    torch.nn.init.constant_(bn.weight, 0.7)
    x = x.clone().requires_grad_()
    y = bn(x, residual)
    (y * weight).sum().backward()
    return [y.detach(), x.grad, bn.running_mean, bn.running_var]


def global_batch():
    g = torch.Generator().manual_seed(5)
    return torch.randn(3, 4, 2, 3, 3, generator=g, dtype=torch.float64).unbind(0)


def worker(rank, port):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    result = dict(evaluate=evaluate(sees_images_below_five, seven_images(), batch_size=2),
                  norm=batch_norm_gradients(*(t.chunk(2)[rank] for t in global_batch())))
    torch.save(result, f"rank{rank}.pt")
    train_teacher.main(TRAIN + ["--width", "2", "--depth", "18", "--lr", "0.1", "--out", "teacher2.pt"])
    torch.distributed.barrier()
    for encoder in ("direct", "poisson"):
        train_idsnn.main(TRAIN + ["--init", f"{encoder}.pt", "--out", f"{encoder}2.pt"])
    train_idsnn.main(TRAIN + MORE + ["--init", "direct.pt", "--out", "more2.pt"])
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same commands by one process and by two, in one folder."""
    before, folder = os.getcwd(), tmp_path_factory.mktemp("runs")
    os.chdir(folder)
    make_folder(folder / "set", classes="abcdefg", train=9, test=1, size=(8, 8))
    train_teacher.main(TRAIN + ["--width", "2", "--depth", "18", "--lr", "0.1", "--out", "teacher1.pt"])
    for encoder in ("direct", "poisson"):
        transfer_init.main(["--src", "teacher1.pt", "--encoder", encoder, "--T", "2", "--out", f"{encoder}.pt"])
        train_idsnn.main(TRAIN + ["--init", f"{encoder}.pt", "--out", f"{encoder}1.pt"])
    train_idsnn.main(TRAIN + MORE + ["--init", "direct.pt", "--out", "more1.pt"])
    port = 29400 + os.getpid() % 500
    mp.spawn(worker, (port,), nprocs=2)
    yield folder
    os.chdir(before)


@pytest.mark.parametrize("name", ["teacher", "direct", "poisson", "more"])
def test_two_processes_give_the_weights_of_one(runs, name):
    one, two = (load_checkpoint(runs / f"{name}{n}.pt") for n in (1, 2))
    assert one["provenance"]["world_size"] == 1 and two["provenance"]["world_size"] == 2
    start = load_checkpoint(runs / f"{name.replace('more', 'direct')}.pt")["model"] if name != "teacher" else None
    for key, value in one["model"].items():
        assert torch.dist(value.double(), two["model"][key].double()) <= 1e-10 * value.double().norm(), key
        if start and "conv" in key:
            assert not torch.allclose(value, start[key].double(), rtol=1e-3), f"{key} was not trained"
    for row1, row2 in zip(one["metrics"]["history"], two["metrics"]["history"]):
        for key in ("loss", "train_acc", "test_loss", "test_acc"):
            assert row1[key] == pytest.approx(row2[key], rel=1e-9), key


def test_a_test_set_that_does_not_divide_is_counted_exactly(runs):
    expected = evaluate(sees_images_below_five, seven_images(), batch_size=7)
    assert expected[0] == pytest.approx(100 * 6 / 7)
    for rank in range(2):
        assert torch.load(runs / f"rank{rank}.pt", weights_only=True)["evaluate"] == pytest.approx(expected)


def test_batch_norm_is_over_both_processes(runs):
    whole = batch_norm_gradients(*global_batch())
    parts = [torch.load(runs / f"rank{rank}.pt", weights_only=True)["norm"] for rank in range(2)]
    for name, one, a, b in zip(("output", "gradient", "mean", "variance"), whole, *parts):
        two = torch.cat([a, b]) if name in ("output", "gradient") else a
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-12), name
