"""Stage 1: data, augmentation, network, schedule."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.autograd import DeviceType

import train_teacher
from train_teacher import DEPTHS, BatchNorm2d, Images, ResNet, batches, evaluate, learning_rate, load_checkpoint, load_data, parse_args, shares


def make_folder(root, classes=("cat", "dog", "owl"), train=4, test=2, size=(6, 5), mode="RGB", seed=0):
    """An image folder of random pixels; returns {(split, class): [array]}."""
    rng, pixels = np.random.default_rng(seed), {}
    for split, count in (("train", train), ("test", test)):
        for c in classes:
            (root / split / c).mkdir(parents=True)
            for i in range(count):
                array = rng.integers(0, 256, size + ((3,) if mode == "RGB" else ()), dtype=np.uint8)
                Image.fromarray(array).save(root / split / c / f"{i}.png")
                pixels.setdefault((split, c), []).append(array)
    return pixels


def tiny_data(n=12, size=6, channels=3, classes=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(1, 256, (n, size, size, channels), dtype=torch.uint8, generator=g)  # no zeros: zero is padding
    y = torch.arange(n) % classes
    return Images("tiny", [str(c) for c in range(classes)], x, y, x[:5], y[:5]).to("cpu", torch.float32)


# --------------------------------------------------------------------------------------- augmentation
def augment(data, *flags, epoch=0, rank=0, world=1):
    args = parse_args(["--dataset", "tiny", *flags])
    return list(batches(data, args, epoch, rank, world))


def test_crops_are_windows_of_the_zero_padded_image_and_flips_their_mirror():
    data = tiny_data()
    seen_flip = seen_shift = False
    for x, y in augment(data, "--batch-size", "4", "--crop-padding", "2"):
        for image, label in zip(x, y):
            windows = {}
            for i, source in enumerate(data.train_x.permute(0, 3, 1, 2)):
                padded = F.pad(source, (2, 2, 2, 2))
                for top in range(5):
                    for left in range(5):
                        window = padded[:, top:top + 6, left:left + 6]
                        windows[window.numpy().tobytes()] = (i, False, (top, left))
                        windows[window.flip(2).numpy().tobytes()] = (i, True, (top, left))
            i, flipped, corner = windows[image.contiguous().numpy().tobytes()]  # KeyError: no window of any image
            assert label.tolist() == F.one_hot(data.train_y[i], 3).tolist()
            seen_flip, seen_shift = seen_flip or flipped, seen_shift or corner != (2, 2)
    assert seen_flip and seen_shift


def test_an_epoch_shows_each_image_once_and_drops_the_incomplete_batch():
    data = tiny_data(n=11)
    shown = [tuple(x.flatten().tolist()) for b, _ in augment(data, "--batch-size", "4", "--crop-padding", "0", "--no-flip") for x in b]
    assert len(shown) == 8 == len(set(shown))
    assert set(shown) <= {tuple(x.permute(2, 0, 1).flatten().tolist()) for x in data.train_x}


@pytest.mark.parametrize("aug", ["basic", "strong"])
def test_ranks_share_the_global_batch_and_every_epoch_differs(aug):
    data = tiny_data()
    whole = augment(data, "--batch-size", "6", "--aug", aug)
    halves = [augment(data, "--batch-size", "6", "--aug", aug, rank=r, world=2) for r in range(2)]
    for step, (x, y) in enumerate(whole):
        assert torch.equal(x, torch.cat([halves[r][step][0] for r in range(2)]))
        assert torch.equal(y, torch.cat([halves[r][step][1] for r in range(2)]))
    same, other = (augment(data, "--batch-size", "6", "--aug", aug, epoch=epoch) for epoch in (0, 1))
    assert torch.equal(whole[0][0], same[0][0]) and not torch.equal(whole[0][0], other[0][0])


def test_no_crop_no_flip_leaves_the_pixels_alone():
    data = tiny_data()
    originals = {x.permute(2, 0, 1).numpy().tobytes() for x in data.train_x}
    assert all(image.contiguous().numpy().tobytes() in originals
               for x, _ in augment(data, "--batch-size", "4", "--crop-padding", "0", "--no-flip") for image in x)


def test_cutmix_shows_a_box_of_the_image_before_and_shares_the_target():
    n, K, S = 400, 7, 6
    x = torch.arange(n).view(n, 1, 1, 1).expand(n, S, S, 1) // torch.tensor([256, 1]) % 256  # two channels: the image's own number
    y = torch.arange(n) % K
    data = Images("tiny", list(range(K)), x.to(torch.uint8).contiguous(), y, x[:1].to(torch.uint8), y[:1]).to("cpu", torch.float64)
    shares = []
    mixed, plain = (augment(data, "--batch-size", "20", "--crop-padding", "0", "--aug", aug) for aug in ("strong", "basic"))
    for (x, target), (unmixed, _) in zip(mixed, plain):                    # order, crops and flips are the same
        number, own = (v[:, 0].long() * 256 + v[:, 1] for v in (x, unmixed))  # (B, H, W): which image a pixel is of
        own = own[:, 0, 0]
        for i in range(20):
            box = number[i] == own[i - 1]
            assert (box | (number[i] == own[i])).all()
            assert box.sum() == box.any(1).sum() * box.any(0).sum()        # a rectangle
            share = box.double().mean()
            expected = (1 - share) * F.one_hot(y[own[i]], K) + share * F.one_hot(y[own[i - 1]], K)
            assert torch.allclose(target[i], expected)
            shares.append(share.item())
    boxed = [s for s in shares if s > 0]
    assert 0.35 * n < len(boxed) < 0.55 * n and max(boxed) > 0.6           # about half; the smallest round to nothing
    assert 0.25 < sum(boxed) / len(boxed) < 0.5                            # 1/2, less what the edges cut off


# --------------------------------------------------------------------------------------------- network
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


def test_statistics_update_as_nn_batch_norm_does():
    x, ours, theirs = torch.randn(4, 3, 2, 2), BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    for _ in range(2):
        theirs(x)
        ours.update_statistics(x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0), 16)
    for key, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[key], value, rtol=1e-6), key


# -------------------------------------------------------------------------------------------- training
def test_schedules():
    rate = lambda *flags: lambda e: learning_rate(parse_args(["--epochs", "10", "--lr", "2", *flags]), e)
    step = rate()  # the paper's 60, 120, 160 of 200, scaled
    assert [step(e) for e in (0, 2.9, 3, 6, 8.5)] == pytest.approx([2, 2, 0.2, 0.02, 0.002])
    assert parse_args([]).milestones == [60, 120, 160]
    linear = rate("--schedule", "linear", "--warmup", "0.2")
    assert [linear(e) for e in (0, 1, 2, 6, 10)] == pytest.approx([0, 1, 2, 1, 0])
    cosine = rate("--schedule", "cosine")
    assert [cosine(e) for e in (0, 5, 10)] == pytest.approx([2, 1, 0], abs=1e-12)


def test_evaluation_counts_every_image_once():
    data = tiny_data(n=7)
    data.test_x, data.test_y = data.train_x, data.train_y
    right = {x.permute(2, 0, 1).numpy().tobytes(): int(y) for x, y in zip(data.train_x[:5], data.train_y)}

    def predict(x, start):  # knows the first five images, is sure of class 0 about the others: of classes 2 and 0
        return 50 * F.one_hot(torch.tensor([right.get(i.contiguous().numpy().tobytes(), 0) for i in x]), 3).float()

    accuracy, loss = evaluate(predict, data, batch_size=3)
    assert accuracy == pytest.approx(100 * 6 / 7)
    assert loss == pytest.approx(50 / 7, rel=1e-6)


def test_recipe_is_the_papers():
    args = parse_args([])
    assert (args.dataset, args.depth, args.width, args.epochs, args.batch_size) == ("cifar100", 34, 64, 200, 64)
    assert (args.lr, args.momentum, args.weight_decay, args.crop_padding, args.flip) == (0.05, 0.9, 1e-4, 4, True)
    digits = parse_args(["--dataset", "digits", "--epochs", "3"])
    assert (digits.width, digits.crop_padding, digits.flip, digits.epochs) == (16, 1, False, 3)
    assert math.isclose(learning_rate(digits, 0.75), 0.05)
    assert (args.nesterov, args.label_smoothing, args.ema, args.aug) == (False, 0, 0, "basic")


def test_a_recipe_fills_what_no_flag_says():
    fast = parse_args(["--recipe", "fast", "--batch-size", "100", "--no-nesterov"])
    assert parse_args(["--recipe", "fast", "--milestones", "10,20"]).schedule == "step"
    assert (fast.batch_size, fast.nesterov, fast.lr) == (100, False, train_teacher.RECIPES["fast"]["lr"])
    for recipe, values in train_teacher.RECIPES.items():
        assert values.keys() == train_teacher.PAPER.keys()
        assert vars(parse_args(["--recipe", recipe])).items() >= values.items()
        assert (values["aug"], values["crop_padding"], values["flip"]) == ("basic", 4, True)  # rows of strong augmentation stand apart


def test_the_average_of_the_weights_is_what_is_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "set", train=8, size=(8, 8))
    seen, step = [], torch.optim.SGD.step

    def spy(self, *args):
        step(self, *args)
        seen.append(self.param_groups[0]["params"][0].detach().clone())  # conv1

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    command = ["--dataset", "set", "--width", "2", "--depth", "18", "--epochs", "3", "--batch-size", "8", "--out"]
    train_teacher.main([*command, "plain.pt"])
    plain, seen[:] = list(seen), []
    train_teacher.main([*command, "ema.pt", "--ema", "0.5"])
    assert len(plain) == len(seen) == 9 and all(map(torch.equal, plain, seen))  # it does not touch training
    for n, value in enumerate(seen, 1):  # the plain mean of the first steps, later an exponential one over 0.5 * 9 of them
        mean = value if n == 1 else mean + (value - mean) / min(n, 4.5)
    made, last = load_checkpoint("ema.pt"), load_checkpoint("plain.pt")["model"]
    assert torch.allclose(made["model"]["conv1.weight"], mean, rtol=1e-5) and torch.equal(last["conv1.weight"], seen[-1])
    assert not torch.equal(made["model"]["bn1.running_mean"], last["bn1.running_mean"])
    net, data = ResNet(**made["arch"]).eval(), load_data("set", "data").to("cpu", torch.float32)
    net.load_state_dict(made["model"])
    row = made["metrics"]["history"][-1]
    assert evaluate(lambda x, _: net(data.normalize(x)), data) == pytest.approx((row["test_acc"], row["test_loss"]), rel=1e-5)


def test_profile_accounts_for_the_whole_step_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "set", train=32, size=(8, 8))
    command = ["--dataset", "set", "--width", "2", "--depth", "18", "--device", "cpu", "--profile", "--batch-size"]
    with pytest.raises(SystemExit) as end:
        train_teacher.main([*command, "4"])
    rows = [line.split("ms", 1) for line in capsys.readouterr().out.splitlines() if " ms " in line]
    parts, (total, last) = [float(ms) for ms, _ in rows[:-1]], rows[-1]
    assert end.value.code == 0 and "images/s" in last
    assert sum(parts) == pytest.approx(float(total), rel=0.02) and any("convolution_backward, 20 calls" in what for _, what in rows)
    with pytest.raises(SystemExit) as end:
        train_teacher.main([*command, "8"])
    assert end.value.code == 2 and "--profile: needs 20 steps" in capsys.readouterr().err
    assert {f.name for f in tmp_path.iterdir()} == {"set", "data"}


def test_profile_of_a_gpu_counts_its_kernels_once():
    event = lambda key, device, cpu, gpu, mark=False: SimpleNamespace(key=key, count=20, device_type=device, self_cpu_time_total=cpu,
                                                                      self_device_time_total=gpu, is_user_annotation=mark)
    events = [event("aten::conv", DeviceType.CPU, 1000, 60_000), event("sm90_kernel", DeviceType.CUDA, 0, 60_000),
              event("aten::add", DeviceType.CPU, 500, 300), event("add_kernel", DeviceType.CUDA, 0, 300), event("step", DeviceType.CUDA, 0, 60_300, True)]
    assert shares(events, 10.0, 10, gpu=True) == [(6.0, "sm90_kernel, 2 calls"), (pytest.approx(0.03), "what takes less than 1% each"),
                                                  (pytest.approx(3.97), "nothing computes: Python, or waiting")]
    assert shares(events, 2.0, 1, gpu=False) == [(1.0, "aten::conv, 20 calls"), (0.5, "aten::add, 20 calls"),
                                                 (0, "what takes less than 1% each"), (0.5, "nothing computes: Python, or waiting")]


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_is_what_the_processor_multiplies(native, monkeypatch):
    monkeypatch.setattr(train_teacher, "cpu_multiplies_bf16", lambda: native)
    args = train_teacher.parse_args([])
    precision, dtype, _, _ = train_teacher.set_precision(args, torch.device("cpu"))
    assert args.precision == precision == ("bf16" if native else "fp32") and dtype == torch.float32
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_a_run_resumed_under_another_precision_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_teacher, "SAVE_EVERY", -1)
    command = "--dataset digits --width 2 --depth 18 --epochs 2 --device cpu".split()
    monkeypatch.setattr(train_teacher, "cpu_multiplies_bf16", lambda: False)
    finish = train_teacher.Log.finish
    monkeypatch.setattr(train_teacher.Log, "finish", lambda *args: None)  # leaves <out>.last behind
    train_teacher.main(command)
    monkeypatch.setattr(train_teacher.Log, "finish", finish)
    monkeypatch.setattr(train_teacher, "cpu_multiplies_bf16", lambda: True)
    with pytest.raises(SystemExit):
        train_teacher.main(command)
    assert "--precision was fp32, is bf16" in capsys.readouterr().err
