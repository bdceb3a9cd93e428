"""Stage 1: batches, network, flags and recipes, the training step and its recording."""
import math
import os
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, call
from PIL import Image

import train_teacher
from train_teacher import Batches, Images, ResNet, load_checkpoint, load_data, parse_args

# read with the first matrix product of the process, wherever that is
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def make_folder(root, classes=("cat", "dog", "owl"), train=4, test=2, size=(6, 5), mode="RGB",
                seed=0):
    """An image folder of random pixels, size: (H, W); -> {(split, class): [array]}."""
    rng, pixels = np.random.default_rng(seed), {}
    shape = size + ((3,) if mode == "RGB" else ())
    for split, count in (("train", train), ("test", test)):
        for c in classes:
            (root / split / c).mkdir(parents=True)
            for i in range(count):
                array = rng.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(array).save(root / split / c / f"{i}.png")
                pixels.setdefault((split, c), []).append(array)
    return pixels


def tiny_data(n=12, size=6):
    g = torch.Generator().manual_seed(1)
    # no zeros: zero is padding
    x = torch.randint(1, 256, (n, size, size, 3), dtype=torch.uint8, generator=g)
    y = torch.arange(n) % 3
    return Images("tiny", list("012"), x, y, x[:5], y[:5]).to("cpu", torch.float32)


# ------------------------------------------------------------------------------------------ batches
def epoch_of(data, flags, epoch=0):
    """[(images, labels)] of one epoch."""
    batches = Batches(data, parse_args(f"--dataset tiny {flags}".split()))
    return [batches.cut(plan) for plan in batches.plan(epoch)]


def test_crops_are_windows_of_the_zero_padded_image_and_flips_their_mirror():
    data, windows, seen = tiny_data(), {}, []
    padded = F.pad(data.train_x.permute(0, 3, 1, 2), (2, 2, 2, 2)).numpy()  # (N, C, 10, 10)
    for i, top, left in product(range(12), range(5), range(5)):
        window = padded[i, :, top:top + 6, left:left + 6]
        windows[window.tobytes()] = i, top, left, False
        windows[window[:, :, ::-1].tobytes()] = i, top, left, True
    for epoch in range(5):
        for images, labels in epoch_of(data, "--batch-size 4 --crop-padding 2", epoch):
            assert images.shape == (4, 3, 6, 6) and images.dtype == torch.uint8
            batch = [windows[image.numpy().tobytes()] for image in images]  # KeyError: no window
            assert labels.tolist() == [data.train_y[i] for i, *_ in batch]
            seen += batch
    _, tops, lefts, flips = map(set, zip(*seen))
    assert tops == lefts == set(range(5)) and flips == {False, True}
    assert any(top != left for _, top, left, _ in seen)


def test_an_epoch_shows_each_image_once_and_drops_the_incomplete_batch():
    data = tiny_data(n=11)
    epoch = epoch_of(data, "--batch-size 4 --crop-padding 0 --no-flip")
    shown = [tuple(x.flatten().tolist()) for images, _ in epoch for x in images]
    assert len(shown) == 8 == len(set(shown))
    # neither crop nor flip: the pixels are left alone
    assert set(shown) <= {tuple(x.permute(2, 0, 1).flatten().tolist()) for x in data.train_x}


def test_order_and_crops_are_of_seed_and_epoch():
    data, flags = tiny_data(), "--batch-size 6"
    first, again, other = (epoch_of(data, flags, epoch)[0][0] for epoch in (0, 0, 1))
    seeded = epoch_of(data, f"{flags} --seed 1")[0][0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, seeded)


def test_a_batch_larger_than_the_training_set_is_refused(refused):
    flags = "--dataset digits --batch-size 1438 --device cpu --out new.pt"
    assert "--batch-size: 1438 is more than the 1437" in refused(f"train_teacher.py {flags}")


def test_one_thread_for_tiny_images_in_training_alone():
    """Reading the digits, as an evaluation does, leaves the threads alone."""
    torch.set_num_threads(2)
    data = load_data("digits", "data").to("cpu", torch.float32)
    assert torch.get_num_threads() == 2
    Batches(data, parse_args(["--dataset", "digits"]))
    assert torch.get_num_threads() == 1


# ------------------------------------------------------------------------------------------ network
@pytest.mark.parametrize("depth", train_teacher.DEPTHS)
def test_parameters_and_function_are_torchvisions(depth):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")().eval()
    ours = ResNet(depth, num_classes=1000, stem="7x7").eval()
    ours.load_state_dict(theirs.state_dict())  # strict: names and shapes are the same
    x = torch.randn(2, 3, 65, 70)
    expected = theirs(x)
    assert torch.allclose(ours(x), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # then batch norm and ReLU are one pass
        assert torch.allclose(ours(x), expected, rtol=1e-4, atol=1e-4)


def test_the_small_stem_keeps_the_resolution():
    net, sizes = ResNet(18, 10, width=2), []
    for stage in (net.bn1, net.layer1, net.layer2, net.layer3, net.layer4):
        stage.register_forward_hook(lambda m, i, out: sizes.append(tuple(out.shape[1:])))
    net(torch.randn(2, 3, 32, 32))
    assert sizes == [(2, 32, 32), (2, 32, 32), (4, 16, 16), (8, 8, 8), (16, 4, 4)]


# ----------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("side,flag,stem", [
    (64, "", "3x3"), (65, "", "7x7"), (65, "--stem 3x3", "3x3"), (6, "--stem 7x7", "7x7")])
def test_images_up_to_64_pixels_get_the_small_stem(tmp_path, monkeypatch, side, flag, stem):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "set", train=2, test=1, size=(6, side))
    call(f"train_teacher.py --dataset set --batch-size 4 --epochs 1 --width 1 {flag} {CPU}")
    made = load_checkpoint("r34.pt")
    assert made["arch"]["stem"] == stem
    assert made["model"]["conv1.weight"].shape[2:] == ((3, 3) if stem == "3x3" else (7, 7))


def test_training_is_sgd_from_kaiming_at_the_scheduled_rate(tmp_path, monkeypatch):
    """Two epochs of main() against the same in the plainest PyTorch."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "set", train=6, size=(8, 8))  # 18 images: 4 steps an epoch
    # with such numbers every rate is exact in fp32, as the optimizer has it
    flags = ("--dataset set --batch-size 4 --epochs 2 --lr 0.09375 --schedule linear --warmup 0.25 "
             "--nesterov --weight-decay 0.01 --depth 18 --width 2 --device cpu --precision fp64")
    call(f"train_teacher.py {flags}")
    made = load_checkpoint("r34.pt")

    torch.manual_seed(0)
    net = ResNet(18, num_classes=3, width=2)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):  # He et al. 2015, by the number of outputs
            std = math.sqrt(2 / (m.out_channels * m.kernel_size[0] ** 2))
            torch.nn.init.normal_(m.weight, std=std)
    data = load_data("set", "").to("cpu", torch.float64)
    batches = Batches(data, parse_args(flags.split()))
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


def test_schedules():
    def rates(flags, *epochs):
        args = parse_args(f"--epochs 10 --lr 2 {flags}".split())
        return [train_teacher.learning_rate(args, epoch) for epoch in epochs]

    # the paper's 60, 120, 160 of 200, scaled
    assert parse_args([]).milestones == [60, 120, 160]
    assert rates("", 0, 2.9, 3, 6, 8.5) == pytest.approx([2, 2, 0.2, 0.02, 0.002])
    assert rates("--milestones 1,2.5", 0.9, 1, 2.5) == pytest.approx([2, 0.2, 0.02])
    linear = rates("--schedule linear --warmup 0.2", 0, 1, 2, 6, 10)
    assert linear == pytest.approx([0, 1, 2, 1, 0])
    assert rates("--schedule cosine", 0, 5, 10) == pytest.approx([2, 1, 0], abs=1e-12)


@pytest.mark.parametrize("n", [3, 8, 11, 16])
def test_evaluation_counts_every_image_once(n):
    """Also where the test set is smaller than a batch of 8, or leaves a part of one."""
    data, shown = tiny_data(n), []
    data.test_x, data.test_y = data.train_x, data.train_y

    def predict(images, index):  # right about images 0 to 4; says class 0 of the others
        assert torch.equal(images, data.test_x[index].permute(0, 3, 1, 2))
        shown.extend(index.tolist())
        return 50 * F.one_hot(torch.where(index < 5, data.test_y[index], 0), 3).float()

    evaluate = train_teacher.evaluator(predict, data, parse_args(["--batch-size", "2"]))
    right = sum(i < 5 or i % 3 == 0 for i in range(n))
    for _ in range(2):  # of each epoch, anew
        accuracy, loss = evaluate()
        assert accuracy == pytest.approx(100 * right / n)
        assert loss == pytest.approx(50 * (n - right) / n, abs=1e-12)  # a wrong one costs 50
    assert shown == [*range(n)] * 2


def test_evaluation_has_batches_of_one_size():
    """Of a recorded one: what is shorter is launched kernel by kernel. Two of 6, not 8 and 4."""
    data, sizes = tiny_data(12), []
    data.test_x, data.test_y = data.train_x, data.train_y

    def predict(images, index):
        sizes.append(len(index))
        return torch.zeros(len(index), 3)

    train_teacher.evaluator(predict, data, parse_args(["--batch-size", "2"]))()
    assert sizes == [6, 6]


# ---------------------------------------------------------------------------------- flags, recipes
def test_the_recipe_is_the_papers():
    args = parse_args([])
    assert (args.dataset, args.data_dir) == ("cifar100", "data")
    assert (args.depth, args.width) == (34, 64)
    assert (args.epochs, args.batch_size, args.lr, args.momentum) == (200, 64, 0.05, 0.9)
    assert (args.weight_decay, args.nesterov) == (1e-4, False)
    assert (args.crop_padding, args.flip) == (4, True)


def test_a_recipe_fills_what_no_flag_says():
    for recipe, values in train_teacher.RECIPES.items():
        assert values.keys() == train_teacher.PAPER.keys()
        assert vars(parse_args(["--recipe", recipe])).items() >= values.items()
    fast = parse_args("--recipe fast --batch-size 100 --no-nesterov".split())
    assert (fast.batch_size, fast.nesterov, fast.lr) == (100, False, train_teacher.FAST["lr"])
    digits = parse_args("--dataset digits --epochs 3".split())
    assert (digits.width, digits.crop_padding, digits.flip, digits.epochs) == (16, 1, False, 3)


def test_help_shows_the_values_that_will_run(run):
    result = run("train_teacher.py --recipe fast --epochs 10 --help")
    text = " ".join(result.out.split())
    assert result.status == 0 and "--schedule step (default: 3,6,8)" in text
    assert "before the peak rate (default: 0.25)" in text
    assert "Nesterov's momentum (default: True)" in text


def test_the_home_folder_in_a_path(tmp_path, monkeypatch):
    """In --out=~/x the shell leaves ~ as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    args = parse_args(["--out=~/x.pt", "--dataset=~/set", "--data-dir=~/data"])
    found = [os.path.normpath(path) for path in (args.out, args.dataset, args.data_dir)]
    assert found == [str(tmp_path / name) for name in ("x.pt", "set", "data")]


@pytest.mark.parametrize("absent", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_of_torchruns_environment_is_refused_by_name(monkeypatch, refused, absent):
    for name in {"WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"} - {absent}:
        monkeypatch.setenv(name, "2")
    error = refused("train_teacher.py --device cpu --dataset digits")
    assert f"WORLD_SIZE is set in the environment, {absent} is not" in error


@pytest.mark.filterwarnings("ignore:.*CUDA")
@pytest.mark.parametrize("device,native,expected", [
    ("cpu", True, "bf16"), ("cpu", False, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp16")])
def test_auto_precision_is_what_the_device_multiplies(monkeypatch, device, native, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: native or including_emulation)
    args = parse_args(["--device", device])
    _, dtype, _, _ = train_teacher.setup(args)
    assert args.precision == expected and dtype == torch.float32
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("stem,width", [("3x3", 4), ("7x7", 16)])
def test_images_too_narrow_for_bf16_on_a_cpu(refused, here, stem, width):
    make_folder(here / "set", size=(9, width))
    flags = f"--dataset set --batch-size 4 --stem {stem} --device cpu --out new.pt"
    error = refused(f"train_teacher.py {flags} --precision bf16")
    assert f"{width} pixels wide" in error and "--precision fp32" in error
    for size, precision in ((width + 1, "bf16"), (width, "fp32")):
        args = parse_args(["--precision", precision])
        train_teacher.refuse_narrow(tiny_data(size=size), stem, args)


# ------------------------------------------------------------------------------------ recorded step
@pytest.mark.parametrize("failure", [None, RuntimeError("stream is capturing\nand a long trace")])
def test_a_step_runs_three_times_is_recorded_once_and_replayed(monkeypatch, capsys, failure):
    """What cannot be recorded is launched anew each time, and a line says so."""
    log = []

    @contextmanager
    def graph(*_, **__):  # what runs while it is recorded is not run
        yield
        assert log.pop() == "step"
        log.append("record")
        if failure:
            raise failure

    stream = SimpleNamespace(wait_stream=lambda other: log.append("wait"))
    fakes = dict(
        Stream=lambda: stream, current_stream=lambda: stream, stream=lambda s: nullcontext(),
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: log.append("replay")), graph=graph)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    args = parse_args(["--precision", "bf16"])
    step = train_teacher.recorded(lambda: log.append("step"), args, torch.device("cuda"))
    for _ in range(6):
        step()
    launched = ["wait", "step", "wait"]  # the side stream for the current one, and that for it
    after = launched if failure else ["replay"]
    assert log == launched * 3 + ["record"] + after * 3
    said = "not recorded, each step is launched anew: stream is capturing\n" if failure else ""
    assert capsys.readouterr() == (said, "")


@pytest.mark.parametrize("flags,device", [
    ("", "cpu"), ("--no-graph", "cuda"), ("--precision fp16", "cuda")])
def test_what_is_not_recorded(flags, device):
    step = object()
    assert train_teacher.recorded(step, parse_args(flags.split()), torch.device(device)) is step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script", ["train_teacher.py", "train_idsnn.py"])
def test_recorded_steps_are_plain_ones_bit_for_bit(script, tmp_path, monkeypatch, request):
    """50 steps, one an epoch, under --deterministic."""
    request.addfinalizer(partial(torch.use_deterministic_algorithms, False))
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "set", train=8, size=(8, 8))
    common = "--batch-size 24 --epochs 50 --precision fp32 --deterministic"
    teacher = f"train_teacher.py --dataset set --width 16 --depth 18 {common}"
    if script == "train_idsnn.py":
        call(f"{teacher} --epochs 1")
        call("transfer_init.py --src r34.pt")
    command = teacher if script == "train_teacher.py" else f"train_idsnn.py {common}"
    for flag in ("graph", "no-graph"):
        call(f"{command} --{flag} --out={flag}.pt")
    replayed, plain = (load_checkpoint(f"{flag}.pt") for flag in ("graph", "no-graph"))
    assert len(plain["history"]) == 50
    for one, two in zip(replayed["history"], plain["history"], strict=True):
        assert (one["loss"], one["test_loss"]) == (two["loss"], two["test_loss"])
    for name, weight in replayed["model"].items():
        assert torch.equal(weight, plain["model"][name]), name
