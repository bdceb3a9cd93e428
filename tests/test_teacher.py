"""Stage 1: flags, schedules, network, training, evaluation, checkpoints, recorded steps."""
import io
import json
import math
import os
import pickle
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_data import keep_images, own_folder, refused, some_images  # noqa: F401

import train_idsnn
import train_teacher
import transfer_init
from train_teacher import Batches, ResNet, load_checkpoint, load_data, parse_args, read, save

# --deterministic needs it, and PyTorch reads it before the first matrix product of the process
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

TINY = "--dataset cifar10 --batch-size 8 --depth 18 --width 4 --device cpu --precision fp32"


def train(flags):
    train_teacher.main(f"{TINY} {flags}".split())


# ---------------------------------------------------------------------------------- flags, recipes
def test_recipe_and_data_set_fill_what_no_flag_says():
    paper = parse_args([])
    assert (paper.dataset, paper.depth, paper.width) == ("cifar100", 34, 64)
    assert (paper.epochs, paper.batch_size, paper.lr, paper.momentum) == (200, 64, 0.05, 0.9)
    assert (paper.weight_decay, paper.nesterov, paper.schedule) == (1e-4, False, "step")
    assert (paper.crop_padding, paper.flip) == (4, True)
    fast = parse_args("--lr 0.3 --recipe fast --no-nesterov".split())
    assert (fast.lr, fast.nesterov, fast.epochs, fast.batch_size) == (0.3, False, 40, 256)
    digits = parse_args("--recipe fast --dataset digits --epochs 3 --flip".split())
    assert (digits.epochs, digits.flip, digits.width, digits.crop_padding) == (3, True, 16, 1)
    assert digits.nesterov  # the digits leave that to the recipe


def test_help_shows_the_values_that_will_run(capsys):
    for flags, epochs in (("--help", 200), ("--recipe fast -h", 40), ("-h --dataset digits", 20)):
        with pytest.raises(SystemExit):
            parse_args(flags.split())
        text = " ".join(capsys.readouterr().out.split())
        assert f"passes over the training set (default: {epochs})" in text


def test_schedules():
    def rates(flags, *epochs):
        args = parse_args(f"--epochs 10 --lr 2 {flags}".split())
        return [train_teacher.learning_rate(args, epoch) for epoch in epochs]

    # the paper's 60, 120 and 160 of 200, scaled
    assert rates("", 0, 2.9, 3, 6, 8.5) == pytest.approx([2, 2, 0.2, 0.02, 0.002])
    assert rates("--milestones 1 2.5", 0.9, 1, 2.5) == pytest.approx([2, 0.2, 0.02])
    assert rates("--warmup 0.2", 0, 1.5, 2, 3) == pytest.approx([0, 1.5, 2, 0.2])
    linear = rates("--schedule linear --warmup 0.2", 0, 1, 2, 6, 10)
    assert linear == pytest.approx([0, 1, 2, 1, 0])
    cosine = rates("--schedule cosine --warmup 0.1", 0.5, 1, 4, 5.5, 10)
    assert cosine == pytest.approx([1, 2, 1.5, 1, 0], abs=1e-12)


# ------------------------------------------------------------------------------------------ network
@pytest.mark.parametrize("depth", train_teacher.DEPTHS)
def test_parameters_and_function_are_torchvisions(depth):
    import torchvision
    compared = depth in (18, 50)  # both kinds of blocks; of the others only names and shapes
    with torch.device("cpu" if compared else "meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=7).double()
        ours = ResNet(depth, num_classes=7, stem="7x7").double()
    ours.load_state_dict(theirs.state_dict())  # strict
    if compared:
        x = torch.randn(4, 3, 65, 50, dtype=torch.float64)
        assert torch.allclose(ours(x), theirs(x), rtol=1e-9)
        # after it with the statistics that training has left
        assert torch.allclose(ours.eval()(x), theirs.eval()(x), rtol=1e-9)


def test_images_up_to_64_pixels_keep_their_size_in_the_stem():
    assert [train_teacher.stem_for((1, 64, side)) for side in (64, 65)] == ["3x3", "7x7"]
    net, sizes = ResNet(18, 10, in_channels=1, width=2, stem="3x3"), []
    for stage in (net.bn1, net.layer1, net.layer2, net.layer3, net.layer4):
        stage.register_forward_hook(lambda m, i, out: sizes.append(tuple(out.shape[1:])))
    assert net(torch.randn(2, 1, 32, 24)).shape == (2, 10)
    assert sizes == [(2, 32, 24), (2, 32, 24), (4, 16, 12), (8, 8, 6), (16, 4, 3)]


# ----------------------------------------------------------------------------------------- training
def test_training_is_sgd_from_kaiming_at_the_scheduled_rate():
    """Two epochs of main() against the same in the plainest PyTorch."""
    keep_images(Path("data"), train=18)  # 4 steps an epoch
    # with such numbers every rate is exact in fp32, as the optimizer has it
    flags = ("--batch-size 4 --epochs 2 --lr 0.09375 --schedule linear --warmup 0.25 --nesterov "
             "--weight-decay 0.01 --width 2 --precision fp64 --seed 3")
    train(flags)
    made = load_checkpoint("r34.pt", "teacher")

    torch.manual_seed(3)
    net = ResNet(18, num_classes=3, width=2)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):  # He et al. 2015, by the number of outputs
            std = math.sqrt(2 / (m.out_channels * m.kernel_size[0] ** 2))
            torch.nn.init.normal_(m.weight, std=std)
    data = load_data("cifar10", "data").to("cpu", torch.float64, torch.contiguous_format)
    batches = Batches(data, parse_args(f"{TINY} {flags}".split()))
    optimizer = torch.optim.SGD(
        net.double().parameters(), momentum=0.9, nesterov=True, weight_decay=0.01)
    for epoch, row in enumerate(made["history"]):
        losses, right = [], 0
        for i, plan in enumerate(batches.plan(epoch)):
            done = (epoch + (i + 0.5) / 4) / 2  # share of the run, in the middle of the step
            rate = 0.09375 * min(done / 0.25, (1 - done) / 0.75)
            optimizer.param_groups[0]["lr"] = rate
            images, labels = batches.cut(plan)
            scores = net(data.normalize(images))
            losses.append(F.cross_entropy(scores, labels))
            right += (scores.argmax(1) == labels).sum().item()
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert row["loss"] == pytest.approx(sum(losses).item() / 4)
        assert row["train_acc"] == pytest.approx(100 * right / 16)
        assert row["lr"] == pytest.approx(rate)
    for name, weight in net.state_dict().items():  # with the statistics that evaluation uses
        assert torch.allclose(weight, made["model"][name], rtol=1e-6), name
    # the last row's test is of these weights, in eval mode
    scores = net.eval()(data.normalize(data.test_x.permute(0, 3, 1, 2)))
    assert made["history"][-1]["test_loss"] == pytest.approx(
        F.cross_entropy(scores, data.test_y).item(), rel=1e-6)


def test_what_a_run_prints_logs_and_saves(capsys):
    train("--epochs 2 --stem 7x7 --seed 4")
    lines = capsys.readouterr().out.splitlines()
    assert "      data  cifar10: 26 + 43 images of 3x8x8, 3 classes" in lines
    assert [line[:8] for line in lines if line.startswith("epoch")] == ["epoch 1:", "epoch 2:"]
    assert sorted(os.listdir()) == ["data", "r34.pt", "r34.pt.jsonl"]
    made = load_checkpoint("r34.pt", "teacher")
    header, *rows = map(json.loads, Path("r34.pt.jsonl").read_text().splitlines())
    assert header["config"] == made["config"] and made["config"]["seed"] == 4
    assert rows == made["history"] and [row["epoch"] for row in rows] == [1, 2]
    last, best = rows[-1]["test_acc"], max(row["test_acc"] for row in rows)
    assert lines[-1] == (f"r34.pt: test accuracy {last:.2f}%, best epoch {best:.2f}%; "
                         "next: python transfer_init.py --src r34.pt")
    assert made["data"]["classes"] == ["a", "b", "c"]
    ResNet(**made["arch"]).load_state_dict(made["model"])  # all that rebuilds the network
    assert (made["arch"]["width"], made["arch"]["stem"]) == (4, "7x7")


def test_what_is_not_finite_ends_with_one_line(monkeypatch):
    save("r34.pt", "an earlier result")
    keep_images(Path("data"), train=8)  # a step an epoch: its loss is older than its weights
    with pytest.raises(SystemExit, match="^loss or weights are not finite in epoch 1: .*--lr$"):
        train("--lr nan")
    # only the loss, because a constant has no gradient
    loss = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **k: loss(*args, **k) + math.inf)
    with pytest.raises(SystemExit, match="not finite in epoch 1"):
        train("")
    assert read("r34.pt") == "an earlier result"


# --------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("batch_size", [1, 4, 11, 50])
def test_evaluation_counts_every_image_once(batch_size):
    """Also where the test set is smaller than a batch, or leaves a part of one."""
    data, shown = some_images(11), []
    data.test_x, data.test_y = data.train_x, data.train_y

    def predict(images):  # says class 2, of each
        shown.extend(images.permute(0, 2, 3, 1))  # (B, C, H, W) -> (B, H, W, C)
        return torch.tensor([0, 0, 50.0]).expand(len(images), 3)

    accuracy, loss = train_teacher.evaluate(predict, data, batch_size)
    assert torch.equal(torch.stack(shown), data.test_x)
    assert accuracy == pytest.approx(100 * 3 / 11)  # the classes are 0 1 2 0 1 2 0 1 2 0 1
    assert loss == pytest.approx(50 * 8 / 11)  # a wrong one costs 50


# -------------------------------------------------------------------------------------- checkpoints
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_files_are_written_whole_also_by_two_processes_at_once(monkeypatch):
    """The second begins and ends between the first one's writing and its renaming."""
    save("x.pt", dict(x=0))
    write = torch.save

    def slow(content, path):
        write(content, path)
        assert read("x.pt") == dict(x=0)  # until then the old file stands
        monkeypatch.setattr(torch, "save", write)
        second = get_context("fork").Process(target=save, args=("x.pt", dict(x=2)))
        second.start()
        second.join()
        assert second.exitcode == 0 and read("x.pt") == dict(x=2)

    monkeypatch.setattr(torch, "save", slow)
    save("x.pt", dict(x=1))
    assert read("x.pt") == dict(x=1) and sorted(os.listdir()) == ["data", "x.pt"]


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def saved(content):
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def test_what_is_no_sound_checkpoint_of_the_stage_is_refused():
    weight = torch.randn(500)
    good = saved(dict(stage="teacher", model=weight))
    damaged = bytearray(good)
    damaged[good.index(weight.numpy().tobytes()) + 1000] ^= 4  # a bit of a weight
    for content, words in [
        (damaged, "is damaged"),
        (good[:1500], "cannot be read"),
        (b"accuracy 75.41", "cannot be read"),
        (saved(dict(stage="teacher", more=Malicious())), "cannot be read"),
        (pickle.dumps(Malicious(), protocol=2), "cannot be read"),
        (saved(dict(stage="idsnn")), "is not a checkpoint of the stage teacher"),
        (saved(dict(weight=weight)), "is not a checkpoint of the stage teacher"),
        (saved(weight), "is not a checkpoint of the stage teacher"),
    ]:
        Path("x.pt").write_bytes(content)
        with refused("x.pt", words):
            load_checkpoint("x.pt", "teacher")
    assert not Path("executed").exists()


# ----------------------------------------------------------------------------------- recorded steps
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_recorded_steps_are_plain_ones_bit_for_bit(precision, request):
    """66 steps on the digits, of the teacher and of a student that is distilled from it."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    common = f"--epochs 3 --device cuda --precision {precision} --deterministic"

    def same_both_ways(main, flags, stage):
        for way in ("graph", "no-graph"):
            main(f"{flags} {common} --{way} --out {way}.pt".split())
        recorded, plain = (load_checkpoint(f"{way}.pt", stage) for way in ("graph", "no-graph"))
        assert len(plain["history"]) == 3
        for name, weight in plain["model"].items():
            assert torch.equal(weight, recorded["model"][name]), name

    same_both_ways(train_teacher.main, "--dataset digits --depth 18", "teacher")
    transfer_init.main("--src graph.pt --out init.pt".split())
    Path("graph.pt").rename("teacher.pt")
    same_both_ways(train_idsnn.main, "--init init.pt --teacher teacher.pt", "idsnn")
