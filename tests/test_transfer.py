"""Stage 2: the Spiking ResNet, its initialisation from the teacher, weights from elsewhere."""
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import transfer_init
from kernels.lif import lif_reference
from train_teacher import DEPTHS, ResNet, load_checkpoint, load_data
from transfer_init import SpikingResNet, loop, noise, source_block, transfer


def randomised(net, seed=0):
    """Every tensor of a network random, so that no equality is an accident."""
    g = torch.Generator().manual_seed(seed)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=g) + 0.1)
    return net


# ------------------------------------------------------------------------------------- transfer
def test_loop_interpolation_by_hand():
    vector = torch.tensor([1.0, 2, 3])
    assert loop(vector, (7,)).tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert loop(vector, (2,)).tolist() == [1, 2]
    kernel = torch.tensor([[10.0, 11], [20, 21], [30, 31]])[..., None, None]  # 3 from 2 channels
    larger = loop(kernel, (4, 3, 1, 1)).squeeze().tolist()
    assert larger == [[10, 11, 10], [20, 21, 20], [30, 31, 30], [10, 11, 10]]
    assert loop(kernel, (2, 1, 1, 1)).squeeze().tolist() == [10, 20]


@pytest.mark.parametrize("m,n,spread,first", [
    (2, 3, [0, 2], [0, 1]),
    (2, 6, [0, 5], [0, 1]),  # ResNet-34 to 18: first to first, last to last
    (6, 2, [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]),
    (3, 3, [0, 1, 2], [0, 1, 2]),
    (4, 8, [0, 2, 5, 7], [0, 1, 2, 3]),
    (1, 5, [0], [0]),
])
def test_block_maps(m, n, spread, first):
    assert [source_block(j, m, n, "spread") for j in range(m)] == spread
    assert [source_block(j, m, n, "first") for j in range(m)] == first


def origin_by_the_paper(name, n, m, block_map):
    """Which tensor of a teacher with n blocks a stage fills `name` of a student with m."""
    if not name.startswith("layer"):
        return name
    stage, j, rest = name.split(".", 2)
    n, m, j = n[int(stage[5:]) - 1], m[int(stage[5:]) - 1], int(j)
    k = min(j, n - 1)
    if block_map == "spread":  # the nearest relative position, of two equally near the later
        k = min(range(n), key=lambda k: (abs(k / (n - 1) - j / (m - 1)), -k))
    return f"{stage}.{k}.{rest}"


@pytest.mark.parametrize("seed", range(12))
def test_transfer_is_the_index_formula(seed):
    r = random.Random(seed)
    depths = r.choice([[18, 34], [18, 34], [50, 101]])

    def kind():
        return dict(depth=r.choice(depths), width=r.randint(1, 6), num_classes=7,
                    in_channels=r.choice([1, 3]), stem=r.choice(["3x3", "7x7"]))

    old, new = kind(), kind() | dict(block=r.choice(["basic", "sew"]))
    choice = dict(block_map=r.choice(["spread", "first"]),
                  shortcut=r.choice(["transfer", "fresh"]),
                  classifier=r.choice(["transfer", "fresh"]))
    source = randomised(ResNet(**old), 1).state_dict()
    student = randomised(SpikingResNet(**new), 2)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    rows = {layer: row for layer, *row in transfer(student, source, **choice)}

    assert set(rows) == {name.rpartition(".")[0] for name in before}, "a layer is not in the table"
    n, m = (DEPTHS[kind["depth"]][1] for kind in (old, new))
    for name, tensor in student.state_dict().items():
        where, how = rows[name.rpartition(".")[0]]
        if (name.startswith("fc.") and choice["classifier"] == "fresh"
                or name.startswith(("conv1.", "bn1.")) and old["stem"] != new["stem"]
                or ".downsample." in name and choice["shortcut"] == "fresh"):
            assert torch.equal(tensor, before[name]) and (where, how) == ("", "fresh")
            continue
        origin = origin_by_the_paper(name, n, m, choice["block_map"])
        value = source[origin]
        assert where == origin.rpartition(".")[0]
        if tensor.dim() >= 2:
            index = [np.arange(size) % of for size, of in zip(tensor.shape[:2], value.shape)]
            assert np.array_equal(tensor, value.numpy()[np.ix_(*index)])
        elif tensor.dim() == 1:
            assert tensor.tolist() == [value[i % len(value)] for i in range(len(tensor))]
        if name.endswith(".weight"):
            sizes = ["x".join(map(str, v.shape)) for v in (value, tensor)]
            looped = f"looped {sizes[0]} -> {sizes[1]}"
            assert how == ("copied" if value.shape == tensor.shape else looped)


def test_what_should_be_copied_and_cannot_is_an_error():
    student, teacher = SpikingResNet(18, 10, width=2), ResNet(18, 10, width=2).state_dict()
    headless = {name: v for name, v in teacher.items() if not name.startswith("fc.")}
    transfer(student, headless)
    with pytest.raises(KeyError, match="fc.weight"):
        transfer(student, headless, classifier="transfer")
    del headless["layer4.1.bn2.bias"]
    with pytest.raises(KeyError, match="layer4.1.bn2.bias"):
        transfer(student, headless)
    # 1x1 kernels would fill 3x3 ones without a word, nine times each
    with pytest.raises((RuntimeError, ValueError)):
        transfer(student, ResNet(50, 10, width=2).state_dict())
    with pytest.raises((RuntimeError, ValueError)):
        transfer(student, teacher | {"layer1.0.conv1.weight": torch.ones(2, 2, 5, 5)})


# ----------------------------------------------------------------------------- spiking network
def forward_step_by_step(net, x, T):
    """An independent forward pass in evaluation mode: time in a Python loop, one convolution a
    step, textbook batch norm."""
    n = net.neuron

    def normed(conv, bn, xs):
        return [F.batch_norm(conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias)
                for x in xs]

    def fired(currents):
        return lif_reference(torch.stack(currents), n.decay, n.v_th, n.lens).unbind(0)

    xs = fired(normed(net.conv1, net.bn1, [x] * T if x.dim() == 4 else x))
    xs = [net.maxpool(x) for x in xs]
    for block in (*net.layer1, *net.layer2, *net.layer3, *net.layer4):
        sew = "SEW" in type(block).__name__
        shortcut = xs
        if isinstance(block.downsample, torch.nn.Sequential):
            shortcut = normed(*block.downsample, xs)
            shortcut = fired(shortcut) if sew else shortcut
        xs = normed(block.conv1, block.bn1, xs)
        xs = normed(block.conv2, block.bn2, fired(xs))
        if hasattr(block, "conv3"):
            xs = normed(block.conv3, block.bn3, fired(xs))
        if sew:
            xs = [s + r for s, r in zip(fired(xs), shortcut)]
        else:
            xs = fired([c + r for c, r in zip(xs, shortcut)])
    return torch.stack([net.fc(x.mean((2, 3))) for x in xs])


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("kind", [
    dict(depth=18), dict(depth=18, block="sew"), dict(depth=50), dict(depth=50, block="sew"),
    dict(depth=18, stem="7x7"),
], ids=lambda kind: " ".join(map(str, kind.values())))
def test_forward_is_figure_1_step_by_step(kind, T):
    torch.manual_seed(0)
    net = SpikingResNet(width=4, num_classes=7, T=T, **kind).double()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):  # statistics that make neurons fire now and then
            torch.nn.init.uniform_(m.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(m.running_var, 0.05, 0.15)
            torch.nn.init.uniform_(m.bias, -0.1, 0.5)
    net.eval()
    images, spikes = torch.randn(2, 3, 16, 16), torch.rand(T, 2, 3, 16, 16) < 0.5
    for x in (images.double(), spikes.double()):
        with torch.no_grad():
            scores = net(x)
            assert scores.shape == (T, 2, 7) and scores.std() > 0
            torch.testing.assert_close(
                scores, forward_step_by_step(net, x, T), rtol=1e-9, atol=1e-9)


def test_what_the_network_refuses():
    images, spikes = torch.ones(2, 3, 8, 8), torch.ones(4, 2, 3, 8, 8)
    poisson = SpikingResNet(width=2, encoder="poisson")
    assert poisson(spikes).shape == (4, 2, 100)
    with pytest.raises(ValueError, match="encode"):
        poisson(images)
    for net in (poisson, SpikingResNet(width=2)):
        with pytest.raises(ValueError, match="input of 2 time-steps, where neuron.T is 4"):
            net(spikes.transpose(0, 1))  # the batch comes first
        net.neuron.T = 3
        with pytest.raises(ValueError, match="input of 4 time-steps, where neuron.T is 3"):
            net(spikes)


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    for block in ("basic", "sew"):
        net = SpikingResNet(width=4, num_classes=5, block=block)
        net(torch.randn(4, 3, 16, 16)).mean(0).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_batch_norm_takes_statistics_over_time():
    torch.manual_seed(0)
    net = SpikingResNet(width=2, T=3)
    m, seen = net.layer1[0].bn1, []
    m.register_forward_hook(lambda m, inputs, spikes: seen.append((inputs[0].detach(), spikes)))
    net(torch.randn(5, 3, 8, 8))
    x, spikes = seen[0]
    assert x.shape[0] == 3 * 5
    torch.testing.assert_close(m.running_mean, 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(m.running_var, 0.9 + 0.1 * x.var((0, 2, 3), correction=1))
    assert m.num_batches_tracked == 1
    # what a hook sees is what firing rates count
    assert spikes.shape == x.shape and set(spikes.unique().tolist()) == {0, 1}
    before = m.running_mean.clone()
    net.eval()(torch.randn(5, 3, 8, 8))
    assert torch.equal(m.running_mean, before) and m.num_batches_tracked == 1


def test_statistics_of_averaged_weights():
    """update_bn asks by momentum None for a plain average over all batches."""
    torch.manual_seed(0)
    net = SpikingResNet(width=2)
    layers = net.bn1, net.layer1[0].bn1  # before T steps, and behind them
    means = {layer: [] for layer in layers}
    for layer in layers:
        layer.register_forward_hook(
            lambda layer, inputs, spikes: means[layer].append(inputs[0].mean((0, 2, 3))))
    batches = [1 + i + torch.randn(4, 3, 8, 8) for i in range(3)]
    with torch.no_grad():
        torch.optim.swa_utils.update_bn(batches, net)
    for layer in layers:
        torch.testing.assert_close(layer.running_mean, torch.stack(means[layer]).mean(0))
        assert layer.num_batches_tracked == 3 and layer.momentum == 0.1


def test_a_network_of_bfloat16():
    """net.bfloat16(), without autocast; the neuron's own arithmetic stays fp32."""
    torch.manual_seed(0)
    net, x = SpikingResNet(width=4, num_classes=5).bfloat16(), torch.randn(64, 3, 8, 8).bfloat16()
    currents, spikes = [], []
    net.conv1.register_forward_hook(lambda m, inputs, y: currents.append(y.detach().float()))
    net.bn1.register_forward_hook(lambda m, inputs, y: spikes.append(y))
    scores = net(x)
    assert scores.dtype == torch.bfloat16 and scores.shape == (4, 64, 5)
    scores.float().mean(0).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())
    mean = 0.1 * currents[0].mean((0, 2, 3))
    torch.testing.assert_close(net.bn1.running_mean, mean.bfloat16(), rtol=0.01, atol=1e-5)

    assert net.eval()(x).dtype == torch.bfloat16
    statistics = net.bn1.running_mean, net.bn1.running_var, net.bn1.weight, net.bn1.bias
    current = F.batch_norm(currents[1], *(v.detach().float() for v in statistics))
    expected = lif_reference(current.expand(4, -1, -1, -1, -1)).flatten(0, 1)
    assert torch.equal(spikes[1], expected.bfloat16()) and 0 < expected.mean() < 1


def test_fresh_network_is_the_authors_baseline():
    """PyTorch's default: uniform, with variance 1 / (3 * fan-in); Kaiming's is 2 / fan-out."""
    torch.manual_seed(0)
    for block in ("basic", "sew"):
        net = SpikingResNet(width=16, v_th=0.7, block=block)
        norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert len(norms) == 20 and all((m.weight == 0.7).all() for m in norms)
        kernels = [m.weight for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
        assert sum(w.shape[2:] == (3, 3) for w in kernels) == 17
        for w in kernels:
            bound = 1 / w[0].numel() ** 0.5  # one over the root of fan-in
            assert w.abs().max() <= bound
            assert w.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.1)


# -------------------------------------------------------------------------------------- Poisson
def splitmix64(z):
    """The hash of Steele, Lea and Flood, in Python's integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_noise_is_splitmix64():
    seed, index, shape, T = 99999 * 10000, [0, 7, 49999], (2, 3, 5), 4
    drawn = noise(seed, torch.tensor(index), T, shape).flatten(2)  # (T, B, pixels)
    for t in range(T):
        for b, i in enumerate(index):
            for pixel in (0, 1, 29):
                stream = splitmix64((splitmix64(i) + seed) % 2**64)
                z = splitmix64((stream + (1 + 30 * t + pixel) * 0x9E3779B97F4A7C15) % 2**64)
                signed = z - 2**64 if z >= 2**63 else z
                assert drawn[t, b, pixel] == signed % 255


def test_noise_is_uniform_and_independent():
    drawn = noise(3, torch.arange(64), 4, (3, 16, 16)).double()  # 196,608 integers
    counts = torch.bincount(drawn.flatten().long(), minlength=255)
    expected = drawn.numel() / 255
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert len(counts) == 255 and abs(chi2 - 254) < 5 * (2 * 254) ** 0.5
    other_seed = noise(4, torch.arange(64), 4, (3, 16, 16)).double()
    pairs = [(drawn, other_seed), (drawn[:, 1:], other_seed[:, :-1])]
    for d in range(5):  # neighbours in time, image, channel, row, column
        n = drawn.shape[d] - 1
        pairs.append((drawn.narrow(d, 1, n), drawn.narrow(d, 0, n)))
    for a, b in pairs:
        correlation = float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
        assert abs(correlation) < 5 / a.numel() ** 0.5
        together = float((a == b).double().mean())
        assert abs(together - 1 / 255) < 5 * (1 / 255 / a.numel()) ** 0.5


def test_a_spike_has_probability_pixel_over_255():
    net = SpikingResNet(width=2, encoder="poisson", T=16)
    pixels = torch.tensor([0, 1, 51, 128, 254, 255], dtype=torch.uint8)
    x = pixels.view(-1, 1, 1, 1).expand(6, 1, 40, 40)
    spikes = net.encode(x, None, torch.arange(6), seed=3)
    assert spikes.shape == (16, 6, 1, 40, 40) and spikes.dtype == torch.float32
    assert set(spikes.unique().tolist()) == {0, 1}
    rates = spikes.mean((0, 2, 3, 4))
    assert rates.tolist() == pytest.approx((pixels / 255).tolist(), abs=0.01)
    assert rates[0] == 0 and rates[-1] == 1  # black never fires, white always


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
def test_noise_knows_neither_batch_nor_time_steps_nor_device(device):
    net = SpikingResNet(width=2, encoder="poisson", T=6)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (10, 8, 8, 3), dtype=torch.uint8, generator=g).permute(0, 3, 1, 2)
    index = torch.tensor([5, 0, 49999, 3, 2, 1, 17, 8, 1000, 4])
    whole = net.encode(x, None, index, seed=1)
    net.to(device)
    some = torch.tensor([3, 9, 0])  # as in another batch, or another process's share of it
    x, index = x[some].to(device), index[some].to(device)
    for T in (1, 9):
        net.neuron.T = T
        spikes = net.encode(x, None, index, seed=1)
        assert torch.equal(spikes[:6].cpu(), whole[:T, some])
        assert not torch.equal(net.encode(x, None, index, seed=2), spikes)
        assert not torch.equal(net.encode(x, None, index + 1, seed=1), spikes)


def test_direct_coding_is_the_normalised_image():
    data = load_data("digits", "data").to("cpu", torch.float32)
    x = data.test_x[:9].permute(0, 3, 1, 2)  # uint8 (B, H, W, C) -> (B, C, H, W)
    encoded = SpikingResNet(width=2).encode(x, data, torch.arange(9), seed=0)
    torch.testing.assert_close(encoded, (x / 255 - data.mean[0]) / data.std[0])


# ------------------------------------------------------------------------------------ the script
@pytest.fixture
def script(run):
    """script("--src r34.pt") -> (the checkpoint made, what was printed)."""
    def script(flags):
        result = run(f"transfer_init.py {flags}")
        assert result.status == 0 and not result.err, result
        return load_checkpoint("snn_init.pt", "init"), result.out
    return script


@pytest.fixture
def refused(refused, here):
    """refused(flags, words...): one line has these words, and nothing has been written."""
    def check(flags, *words):
        before = {path: path.read_bytes() for path in here.glob("*.*")}
        line = refused(f"transfer_init.py {flags}")
        assert all(word in line for word in words) and len(line) < 500, line
        assert {path: path.read_bytes() for path in here.glob("*.*")} == before
    return check


@pytest.fixture
def teacher(here):
    """teacher(class names) -> the checkpoint in other.pt: the digits' teacher, but for its names
    and a stem that images of this size would not get."""
    def teacher(classes):
        checkpoint = torch.load("r34.pt")
        checkpoint["config"]["dataset"] = checkpoint["data"]["name"] = "elsewhere"
        checkpoint["data"]["classes"] = classes
        checkpoint["arch"]["stem"] = "7x7"
        torch.save(checkpoint, "other.pt")
        return checkpoint
    return teacher


def test_the_student_inherits_from_the_teacher(script):
    made, out = script("--src r34.pt")
    teacher = load_checkpoint("r34.pt")
    assert made["arch"] == dict(
        depth=18, num_classes=10, in_channels=1, width=8, stem="3x3", block="basic",
        encoder="direct", T=4, decay=0.25, v_th=0.5, lens=0.5, detach_reset=True)
    assert made["config"]["dataset"] == "digits" and made["data"] == teacher["data"]
    assert made["parents"] == dict(teacher=dict(path="r34.pt", sha256=teacher["sha256"]))
    model, source = made["model"], teacher["model"]
    assert torch.equal(model["layer3.1.conv2.weight"], source["layer3.5.conv2.weight"])
    name = "layer2.0.downsample.0.weight"
    assert torch.equal(model[name], source[name])
    assert not torch.equal(model["fc.weight"], source["fc.weight"])
    rebuilt = SpikingResNet(**made["arch"])
    rebuilt.load_state_dict(model)

    # every parameter is in the table, and the next command comes last
    lines = out.splitlines()
    layers = {line.split()[0] for line in lines[1:-2]}
    assert layers == {name.rpartition(".")[0] for name, _ in rebuilt.named_parameters()}
    assert "layer3.1.conv2           layer3.5.conv2           copied" in lines
    assert lines[-1] == "next: python train_idsnn.py --init snn_init.pt"


def test_the_file_is_written_anew_to_the_same_bytes(script, here):
    script("--src r34.pt")
    first = (here / "snn_init.pt").read_bytes()
    assert script("--src r34.pt --T 6")[0]["arch"]["T"] == 6
    script("--src r34.pt")
    assert (here / "snn_init.pt").read_bytes() == first


@pytest.mark.parametrize("file", ["r34.pt", "idsnn.pt", "notes.txt"])
def test_other_files_are_not_written_over(refused, file):
    Path("notes.txt").write_text("mine")
    refused(f"--src r34.pt --out {file}", file)


@pytest.mark.parametrize("flags,arch", [
    ("--T 6 --decay 0.5 --v-th 1 --lens 0.25 --no-detach-reset",
     dict(T=6, decay=0.5, v_th=1.0, lens=0.25, detach_reset=False)),
    ("--width 5 --depth 34 --block sew", dict(width=5, depth=34, block="sew")),
    ("--encoder poisson --stem 7x7", dict(encoder="poisson", stem="7x7")),
])
def test_flags_that_change_the_network(script, flags, arch):
    made, _ = script(f"--src r34.pt {flags}")
    assert made["arch"] == made["arch"] | arch
    SpikingResNet(**made["arch"]).load_state_dict(made["model"])


def test_flags_of_the_transfer(script, refused):
    usual = script("--src r34.pt")[0]["model"]
    source = load_checkpoint("r34.pt")["model"]
    first = script("--src r34.pt --block-map first")[0]["model"]
    assert torch.equal(first["layer3.1.conv2.weight"], source["layer3.1.conv2.weight"])
    fresh, out = script("--src r34.pt --shortcut fresh")
    name = "layer2.0.downsample.0.weight"
    assert not torch.equal(fresh["model"][name], usual[name])
    row = next(line for line in out.splitlines() if line.startswith("layer2.0.downsample.0"))
    assert row.split() == ["layer2.0.downsample.0", "fresh"]
    for width in (6, 9):
        fc = script(f"--src r34.pt --classifier transfer --width {width}")[0]["model"]
        columns = torch.arange(8 * width) % 64
        assert torch.equal(fc["fc.weight"], source["fc.weight"][:, columns])
        assert torch.equal(fc["fc.bias"], source["fc.bias"])
    other = script("--src r34.pt --seed 1")[0]["model"]
    assert not torch.equal(other["fc.weight"], usual["fc.weight"])
    refused("--src r34.pt --depth 50", "--depth", "ResNet-34", "50")


def test_help_shows_the_values_that_will_run(run):
    for flags, width, dataset in (("", "the teacher's", "the teacher's"),
                                  ("--src r34.pt", "8", "digits")):
        result = run(f"transfer_init.py --help {flags}")
        text = " ".join(result.out.split())
        assert result.status == 0
        assert "time-steps (default: 4)" in text and "eq. 3 (default: 0.5)" in text
        assert f"channels of its first stage (default: {width})" in text
        assert f"digits, or a folder (default: {dataset})" in text


def pictures(folder, mode="RGB", size=8):
    for split in ("train", "test"):
        for name in ("bird", "cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            Image.effect_noise((size, size), 50).convert(mode).save(folder / split / name / "0.png")


@pytest.mark.parametrize("dataset,data,arch", [
    ("colour", dict(classes=["bird", "cat", "dog"], shape=[3, 8, 8]), (3, 3, "3x3")),
    ("grey", dict(classes=["bird", "cat", "dog"], shape=[1, 65, 65]), (3, 1, "7x7")),
    ("digits", dict(classes=list("0123456789"), shape=[1, 8, 8]), (10, 1, "3x3")),
    # not downloaded: stage 3 does that
    ("cifar10", dict(name="cifar10", classes=None, shape=[3, 32, 32]), (10, 3, "3x3")),
    ("cifar100", dict(name="cifar100", classes=None, shape=[3, 32, 32]), (100, 3, "3x3")),
])
def test_other_data_are_described_as_far_as_known(script, teacher, here, dataset, data, arch):
    teacher(list("0123456789"))
    pictures(here / "colour")
    pictures(here / "grey", mode="L", size=65)
    made, out = script(f"--src other.pt --dataset {dataset}")
    if data["classes"]:
        data = load_data(dataset, "data").describe() | data
    assert made["data"] == data and made["config"]["dataset"] == dataset
    assert tuple(made["arch"][k] for k in ("num_classes", "in_channels", "stem")) == arch
    assert f"for {dataset}" in out


def test_the_teachers_own_data_are_as_its_file_says(script, teacher):
    """They may be on another machine; so may the names of classes that a download would tell."""
    other = teacher([f"kind {i}" for i in range(10)])
    made, _ = script("--src other.pt --classifier transfer")
    assert made["data"] == other["data"] and made["config"]["dataset"] == "elsewhere"
    assert made["arch"]["stem"] == "7x7"
    made, _ = script("--src other.pt --classifier transfer --dataset cifar10")
    assert made["data"]["classes"] == other["data"]["classes"]  # for stage 3 to compare


def test_the_classifier_serves_its_own_classes_alone(script, refused, teacher):
    other = teacher(list("0123456789"))
    made, _ = script("--src other.pt --classifier transfer --dataset digits")
    assert torch.equal(made["model"]["fc.weight"], other["model"]["fc.weight"])
    refused("--src other.pt --classifier transfer --dataset cifar100", "--classifier", "other.pt",
            "10 classes", "100")
    teacher(list("0123456798"))  # the same names in another order
    refused("--src other.pt --classifier transfer --dataset digits", "other.pt", "class 8",
            "'9'", "'8'")
    script("--src other.pt --dataset digits")  # a fresh one may learn any


# ------------------------------------------------------------------------ weights from elsewhere
def state(**kind):
    kind = dict(depth=18, num_classes=10, width=2, stem="7x7") | kind
    return dict(randomised(ResNet(**kind)).state_dict())


def prefixed(prefix):
    return {prefix + name: value for name, value in state().items()}


def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_safetensors(content, path):
    pytest.importorskip("safetensors.torch").save_file(content, path)


OPTIMIZER = dict(state={0: dict(momentum_buffer=torch.ones(1))}, param_groups=[dict(lr=0.1)])
READ = {  # how people have a ResNet's weights: content, and who writes it
    "plain": (state(), torch.save),
    "DDP": (prefixed("module."), torch.save),
    "compiled DDP": (prefixed("_orig_mod.module."), torch.save),
    "timm": (dict(arch="resnet18", state_dict=state(), optimizer=OPTIMIZER), torch.save),
    "ImageNet": (dict(epoch=90, state_dict=prefixed("module."), best_acc1=70.1), torch.save),
    "MoCo": (dict(state_dict=prefixed("module.encoder_q.")), torch.save),
    "detector": (prefixed("backbone.body.") | {"conv_head.bias": torch.ones(4)}, torch.save),
    "no counters": ({k: v for k, v in state().items() if "num_batches" not in k}, torch.save),
    "legacy": (state(), save_legacy),
    "legacy nested": (dict(state_dict=prefixed("module.")), save_legacy),
    "safetensors": (state(), save_safetensors),
    "safetensors prefixed": (prefixed("model."), save_safetensors),
}


@pytest.mark.parametrize("name", READ)
def test_weights_as_people_have_them(script, name):
    content, save = READ[name]
    path = "w.safetensors" if "safetensors" in name else "w.pth"
    save(content, path)
    made, out = script(f"--src {path} --dataset cifar10 --width 3")
    source, model = state(), made["model"]
    index = torch.arange(24) % 16
    weight = source["layer4.1.conv2.weight"][index][:, index]
    assert torch.equal(model["layer4.1.conv2.weight"], weight)
    assert torch.equal(model["layer4.1.bn2.running_var"], source["layer4.1.bn2.running_var"][index])
    assert made["arch"]["stem"] == "3x3" and made["arch"]["num_classes"] == 10
    # nothing to distil from: who runs the next stage is told
    assert made["parents"]["teacher"]["path"] == path
    last = out.splitlines()[-1]
    assert "train_idsnn.py --init snn_init.pt --no-kd " in last and "--teacher" in last


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_fp32(script, dtype):
    half = {name: v.to(dtype) if v.is_floating_point() else v for name, v in state().items()}
    torch.save(half, "w.pth")
    made, _ = script("--src w.pth --stem 7x7")
    model = made["model"]
    assert all(v.dtype == torch.float32 for v in model.values() if v.is_floating_point())
    assert torch.equal(model["conv1.weight"], half["conv1.weight"].float())
    # where the file names no data
    assert made["config"]["dataset"] == "cifar100" and made["config"]["width"] == 2


def test_without_the_package_its_name_is_said(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as Python marks what is not there
    monkeypatch.delitem(sys.modules, "safetensors.torch", raising=False)
    Path("w.safetensors").touch()
    refused("--src w.safetensors", "w.safetensors", "package safetensors")


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("head", [0, 7])
def test_a_network_is_told_by_its_tensors(depth, head, tmp_path):
    arch = dict(depth=depth, num_classes=head, in_channels=1, width=1, stem="7x7")
    weights = state(**arch | dict(num_classes=7))
    if head == 0:
        weights = {name: v for name, v in weights.items() if not name.startswith("fc.")}
    torch.save(weights, tmp_path / "w.pth")
    assert transfer_init.load_teacher(str(tmp_path / "w.pth"))["arch"] == arch


def test_a_foreign_classifier(script, refused):
    torch.save(state(), "w.pth")
    made, out = script("--src w.pth --dataset digits --classifier transfer")
    assert torch.equal(made["model"]["fc.bias"], state()["fc.bias"])
    # the file does not name its classes: what is taken for granted is said
    lines = [line for line in out.splitlines() if "names no classes" in line]
    assert len(lines) == 1 and "w.pth" in lines[0] and "0, 1, 2 ..." in lines[0]
    assert "names no classes" not in script("--src w.pth --dataset digits")[1]
    assert "names no classes" not in script("--src r34.pt --classifier transfer")[1]
    refused("--src w.pth --classifier transfer", "--classifier", "w.pth", "10 classes",
            "cifar100", "100")


# ------------------------------------------------------------------------- weights that do not fit
def unfit(change):
    """What writes a ResNet-18's weights to which `change` was done."""
    def make(path):
        weights = state()
        change(weights)
        torch.save(dict(state_dict=weights), path)
    return make


def changed(name, *shape, dtype=torch.float32):
    return unfit(lambda w: w.update({name: torch.ones(*shape, dtype=dtype)}))


def without(name):
    return unfit(lambda w: [w.pop(k) for k in list(w) if k.startswith(name)])


def truncated(save):
    def make(path):
        save(state(), path)
        path.write_bytes(path.read_bytes()[:-1000])
    return make


REFUSED = {  # what makes the file, and words of the refusal
    # a ResNet that is none of ours
    "ResNeXt": (changed("layer1.0.conv2.weight", 2, 1, 3, 3),
                ["ResNet-18", "layer1.0.conv2.weight", "[2, 1, 3, 3]", "[2, 2, 3, 3]"]),
    "5x5": (changed("conv1.weight", 2, 3, 5, 5), ["conv1.weight", "[2, 3, 5, 5]"]),
    "SE": (changed("layer1.0.se.fc1.bias", 2), ["layer1.0.se.fc1.bias"]),
    "blocks": (without("layer3.1."), ["16 layers"]),
    "stem": (without("conv1."), ["first kernels"]),
    "shortcut": (without("layer2.0.downsample.0"), ["layer2.0.downsample.0.weight"]),
    # tensors of other kinds
    "NaN": (unfit(lambda w: w["layer3.1.bn1.bias"].fill_(math.nan)), ["layer3.1.bn1.bias"]),
    "infinity": (unfit(lambda w: w["conv1.weight"].fill_(math.inf)), ["conv1.weight", "finite"]),
    "variance": (unfit(lambda w: w["bn1.running_var"].neg_()), ["bn1.running_var"]),
    "integers": (changed("bn1.weight", 2, dtype=torch.int8), ["bn1.weight"]),
    "scalar": (changed("fc.weight", ()), []),
    "no channels": (changed("conv1.weight", 2, 0, 3, 3), []),
    "sparse": (unfit(lambda w: w.update({"bn1.weight": torch.ones(2).to_sparse()})), []),
    # no ResNet, or two
    "encoders": (lambda path: torch.save(prefixed("encoder_q.") | prefixed("encoder_k."), path),
                 ["2 ResNets", "encoder_q.", "encoder_k."]),
    "averaged": (lambda path: torch.save(dict(model=state(), model_ema=state()), path),
                 ["2 ResNets", "model/", "model_ema/"]),
    "another": (lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
                ["0 ResNets", "weight, bias", "torchvision's names"]),
    # files of other kinds; what holds for every checkpoint is in test_errors
    "network": (lambda path: torch.save(ResNet(18, 10, width=1), path), ["train_teacher.ResNet"]),
    "TorchScript": (lambda path: torch.jit.script(torch.nn.ReLU()).save(path), ["TorchScript"]),
    "short legacy": (truncated(save_legacy), ["cannot be read"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(refused, here, recwarn, name):
    make, words = REFUSED[name]
    make(here / "w.pth")
    recwarn.clear()
    refused("--src w.pth", "w.pth", *words)
    assert not recwarn.list, "a second line on stderr"


def test_damaged_safetensors_are_refused(refused, here):
    truncated(save_safetensors)(here / "w.safetensors")
    refused("--src w.safetensors", "w.safetensors", "cannot be read")
