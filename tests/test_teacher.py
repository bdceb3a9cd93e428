"""Stage 1: batches, network, recorded step, flags, schedule."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train_teacher
from train_teacher import DEPTHS, Batches, Images, ResNet, evaluate, learning_rate, parse_args

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_folder(root, classes=("cat", "dog", "owl"), train=4, test=2, size=(6, 5), mode="RGB",
                seed=0):
    """An image folder of random pixels; returns {(split, class): [array]}."""
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


def tiny_data(n=12, size=6, channels=3, classes=3):
    g = torch.Generator().manual_seed(1)
    # no zeros: zero is padding
    x = torch.randint(1, 256, (n, size, size, channels), dtype=torch.uint8, generator=g)
    y = torch.arange(n) % classes
    names = [str(c) for c in range(classes)]
    return Images("tiny", names, x, y, x[:5], y[:5]).to("cpu", torch.float32)


# ------------------------------------------------------------------------------------------ batches
def epoch_of(data, *flags, epoch=0):
    """[(images, labels)] of one epoch."""
    batches = Batches(data, parse_args(["--dataset", "tiny", *flags]))
    return [batches.cut(draw) for draw in batches.plan(epoch)]


def test_crops_are_windows_of_the_zero_padded_image_and_flips_their_mirror():
    data, seen_flip, seen_shift = tiny_data(), False, False
    windows = {}
    for i, source in enumerate(data.train_x.permute(0, 3, 1, 2)):
        padded = F.pad(source, (2, 2, 2, 2))
        for top in range(5):
            for left in range(5):
                window = padded[:, top:top + 6, left:left + 6]
                windows[window.numpy().tobytes()] = (i, False, (top, left))
                windows[window.flip(2).numpy().tobytes()] = (i, True, (top, left))
    for images, labels in epoch_of(data, "--batch-size", "4", "--crop-padding", "2"):
        assert images.shape == (4, 3, 6, 6) and images.dtype == torch.uint8
        for image, label in zip(images, labels):
            # KeyError: no window of any image
            i, flipped, corner = windows[image.contiguous().numpy().tobytes()]
            assert label == data.train_y[i]
            seen_flip, seen_shift = seen_flip or flipped, seen_shift or corner != (2, 2)
    assert seen_flip and seen_shift


def test_an_epoch_shows_each_image_once_and_drops_the_incomplete_batch():
    data = tiny_data(n=11)
    flags = "--batch-size 4 --crop-padding 0 --no-flip".split()
    shown = [tuple(x.flatten().tolist()) for images, _ in epoch_of(data, *flags) for x in images]
    assert len(shown) == 8 == len(set(shown))
    # neither crop nor flip: the pixels are left alone
    assert set(shown) <= {tuple(x.permute(2, 0, 1).flatten().tolist()) for x in data.train_x}


def test_ranks_share_the_global_batch_and_every_epoch_differs(monkeypatch):
    data = tiny_data()
    whole = epoch_of(data, "--batch-size", "6")
    other = epoch_of(data, "--batch-size", "6", epoch=1)
    again = epoch_of(data, "--batch-size", "6")
    halves = []
    monkeypatch.setattr(train_teacher, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(train_teacher, "rank", lambda: rank)
        halves.append(epoch_of(data, "--batch-size", "6"))
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(images, torch.cat([half[step][0] for half in halves]))
        assert torch.equal(labels, torch.cat([half[step][1] for half in halves]))
    assert torch.equal(whole[0][0], again[0][0]) and not torch.equal(whole[0][0], other[0][0])


# ------------------------------------------------------------------------------------------ network
@pytest.mark.parametrize("depth", DEPTHS)
def test_parameters_are_torchvisions_by_name_and_shape(depth):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
        ours = ResNet(depth, num_classes=1000, stem="7x7").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("depth", [18, 50])
def test_function_is_torchvisions(depth):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")().eval()
    ours = ResNet(depth, num_classes=1000, stem="7x7").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 65, 70)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_small_stem_keeps_the_resolution():
    net, sizes = ResNet(18, 10, width=2), []
    for stage in (net.bn1, net.layer1, net.layer2, net.layer3, net.layer4):
        stage.register_forward_hook(lambda m, i, out: sizes.append(tuple(out.shape[1:])))
    net(torch.randn(2, 3, 32, 32))
    assert sizes == [(2, 32, 32), (2, 32, 32), (4, 16, 16), (8, 8, 8), (16, 4, 4)]


def test_the_teacher_starts_from_kaiming():
    torch.manual_seed(0)
    weight = train_teacher.kaiming_(ResNet(18)).layer2[0].conv2.weight  # 128 channels out, 3x3
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.01)


# ----------------------------------------------------------------------------------------- training
def test_schedules():
    def rates(*flags, epochs):
        args = parse_args(["--epochs", "10", "--lr", "2", *flags])
        return [learning_rate(args, e) for e in epochs]

    # the paper's 60, 120, 160 of 200, scaled
    assert rates(epochs=(0, 2.9, 3, 6, 8.5)) == pytest.approx([2, 2, 0.2, 0.02, 0.002])
    assert parse_args([]).milestones == [60, 120, 160]
    linear = rates("--schedule", "linear", "--warmup", "0.2", epochs=(0, 1, 2, 6, 10))
    assert linear == pytest.approx([0, 1, 2, 1, 0])
    cosine = rates("--schedule", "cosine", epochs=(0, 5, 10))
    assert cosine == pytest.approx([2, 1, 0], abs=1e-12)


def test_evaluation_counts_every_image_once():
    data = tiny_data(n=7)
    data.test_x, data.test_y = data.train_x, data.train_y

    def predict(images, index):  # knows the first five images, says class 0 of the others
        assert torch.equal(images, data.test_x[index].permute(0, 3, 1, 2))
        known = torch.where(index < 5, data.test_y[index], 0)  # the others are of classes 2 and 0
        return 50 * F.one_hot(known, 3).float()

    accuracy, loss = evaluate(predict, data, batch_size=3)
    assert accuracy == pytest.approx(100 * 6 / 7)
    assert loss == pytest.approx(50 / 7, rel=1e-6)


def test_recipe_is_the_papers():
    args = parse_args([])
    assert (args.dataset, args.depth, args.width) == ("cifar100", 34, 64)
    assert (args.epochs, args.batch_size, args.lr, args.momentum) == (200, 64, 0.05, 0.9)
    assert (args.weight_decay, args.nesterov) == (1e-4, False)
    assert (args.crop_padding, args.flip) == (4, True)


def test_a_recipe_fills_what_no_flag_says():
    for recipe, values in train_teacher.RECIPES.items():
        assert values.keys() == train_teacher.PAPER.keys()
        assert vars(parse_args(["--recipe", recipe])).items() >= values.items()
    fast = parse_args("--recipe fast --batch-size 100 --no-nesterov".split())
    assert (fast.batch_size, fast.nesterov, fast.lr) == (100, False, train_teacher.FAST["lr"])
    assert parse_args("--recipe fast --milestones 10,20".split()).schedule == "step"
    digits = parse_args("--dataset digits --epochs 3".split())
    assert (digits.width, digits.crop_padding, digits.flip, digits.epochs) == (16, 1, False, 3)
    assert learning_rate(digits, 0.75) == pytest.approx(0.05)


def test_help_shows_the_values_that_will_run(capsys):
    for flags, marks, nesterov, flip in [
        ("", "60,120,160", False, True), ("--dataset digits", "6,12,16", False, False),
        ("--recipe fast --epochs 10", "3,6,8", True, True)]:
        with pytest.raises(SystemExit) as end:
            parse_args([*flags.split(), "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert end.value.code == 0 and f"(default: {marks})" in text
        assert ("(default: 0.25)" in text) == ("--" in flags)  # the warm-up
        # on/off flags too, each once
        assert f"Nesterov's momentum (default: {nesterov})" in text
        assert f"training images (default: {flip}) --precision" in text
        assert "replay it (default: True) --compile" in text


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_is_what_the_processor_multiplies(native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    args = parse_args(["--device", "cpu"])
    _, dtype, _, _ = train_teacher.setup(args)
    assert args.precision == ("bf16" if native else "fp32") and dtype == torch.float32
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


# ------------------------------------------------------------------------------------ recorded step
@CUDA
@pytest.mark.parametrize("script", ["train_teacher", "train_idsnn"])
def test_a_recorded_step_gives_the_losses_of_a_plain_one(script, tmp_path, monkeypatch):
    """50 steps, one an epoch, under --deterministic."""
    import train_idsnn
    import transfer_init

    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "set", train=8, size=(8, 8))
    common = "--dataset set --batch-size 24 --epochs 50 --precision fp32 --deterministic".split()
    train_teacher.main([*common, "--width", "16", "--depth", "18", "--out", "r34.pt"])
    main = train_teacher.main
    if script == "train_idsnn":
        transfer_init.main(["--src", "r34.pt"])
        main = train_idsnn.main
    losses = []
    for flag in ("--graph", "--no-graph"):
        main([*common, *(["--width", "16", "--depth", "18"] if script == "train_teacher" else []),
              flag, "--out", f"{flag}.pt"])
        history = train_teacher.load_checkpoint(f"{flag}.pt")["metrics"]["history"]
        losses.append([row["loss"] for row in history])
    assert losses[0] == losses[1] and len(losses[0]) == 50


class FakeGraphs:
    """torch.cuda's streams and graphs on a CPU: what runs while recording is recorded, not run."""

    def __init__(self):
        self.log, self.recording = [], None

    def Stream(self):
        return self

    current_stream = Stream

    def wait_stream(self, other):
        self.log.append("wait")

    def CUDAGraph(self):
        return self

    def replay(self):
        self.log.append("replay")

    def stream(self, stream):
        return self

    def graph(self, graph, stream):
        self.log.append("record")
        return self

    def __enter__(self):
        return self

    def __exit__(self, *args):
        return False


def test_a_step_runs_three_times_is_recorded_once_and_replayed(monkeypatch):
    fake = FakeGraphs()
    for name in ("Stream", "current_stream", "CUDAGraph", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    args, device = parse_args(["--precision", "bf16"]), torch.device("cuda")
    step = train_teacher.recorded(lambda: fake.log.append("step"), args, device)
    for _ in range(6):
        step()
    calls = [entry for entry in fake.log if entry != "wait"]
    assert calls == ["step"] * 3 + ["record", "step", "replay", "replay", "replay"]


@pytest.mark.parametrize("flags,device", [
    ("", "cpu"), ("--no-graph", "cuda"), ("--precision fp16", "cuda")])
def test_what_is_not_recorded(flags, device):
    step = object()
    args = parse_args(flags.split())
    assert train_teacher.recorded(step, args, torch.device(device)) is step
    args = parse_args(["--precision", "bf16"])
    assert train_teacher.recorded(step, args, torch.device("cuda"), on_device=False) is step


def test_one_thread_for_tiny_images_in_training_alone():
    """An evaluation of the digits leaves the threads of what comes after it alone."""
    torch.set_num_threads(2)
    try:
        data = train_teacher.load_data("digits", "data").to(torch.device("cpu"), torch.float32)
        assert torch.get_num_threads() == 2
        Batches(data, parse_args(["--dataset", "digits"]))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
