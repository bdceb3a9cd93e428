"""Stage 2: the Spiking ResNet, its initialisation from the teacher, the teacher's files."""
import json
import math
import pickle
import random
import shutil
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train_idsnn
import train_teacher
import transfer_init
from kernels.lif import lif_reference
from train_teacher import DEPTHS, ResNet, load_checkpoint
from transfer_init import SpikingResNet, loop, noise, resnet_arch, source_block, transfer


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
    nearest = min(range(n), key=lambda k: (abs(k / (n - 1) - j / (m - 1)), -k))
    return f"{stage}.{min(j, n - 1) if block_map == 'first' else nearest}.{rest}"


@pytest.mark.parametrize("seed", range(12))
def test_transfer_is_the_index_formula(seed):
    r = random.Random(seed)
    depths = r.choice([[18, 34], [18, 34], [50, 101]])

    def kind():
        return dict(depth=r.choice(depths), width=r.randint(1, 6), num_classes=r.randint(2, 9),
                    in_channels=r.choice([1, 3]), stem=r.choice(["3x3", "7x7"]))

    teacher_kind, student_kind = kind(), kind() | dict(block=r.choice(["basic", "sew"]))
    if same_classes := r.random() < 0.5:
        student_kind["num_classes"] = teacher_kind["num_classes"]
    choice = dict(block_map=r.choice(["spread", "first"]),
                  shortcut=r.choice(["transfer", "fresh"]),
                  classifier=r.choice(["transfer", "fresh"]) if same_classes else "fresh")
    teacher = randomised(ResNet(**teacher_kind), 1)
    student = randomised(SpikingResNet(**student_kind), 2)
    source, before = ({name: v.clone() for name, v in net.state_dict().items()}
                      for net in (teacher, student))
    rows = {layer: row for layer, *row in transfer(student, teacher.state_dict(), **choice)}

    assert all(torch.equal(v, source[name]) for name, v in teacher.state_dict().items())
    assert set(rows) == {name.rpartition(".")[0] for name in before}, "a layer is not in the table"
    n, m = (DEPTHS[kind["depth"]][1] for kind in (teacher_kind, student_kind))
    other_stem = teacher_kind["stem"] != student_kind["stem"]
    for name, tensor in student.state_dict().items():
        where, how = rows[name.rpartition(".")[0]]
        if (name.startswith("fc.") and choice["classifier"] == "fresh"
                or name.startswith(("conv1.", "bn1.")) and other_stem
                or ".downsample." in name and choice["shortcut"] == "fresh"):
            assert torch.equal(tensor, before[name]) and (where, how) == ("", "fresh")
            continue
        origin = origin_by_the_paper(name, n, m, choice["block_map"])
        value = source[origin]
        assert where == origin.rpartition(".")[0]
        if tensor.dim() >= 2:
            for i in range(tensor.shape[0]):
                for j in range(tensor.shape[1]):
                    assert torch.equal(tensor[i, j], value[i % value.shape[0], j % value.shape[1]])
        elif tensor.dim() == 1:
            assert tensor.tolist() == [value[i % len(value)] for i in range(len(tensor))]
        if name.endswith(".weight"):
            sizes = ["x".join(map(str, v.shape)) for v in (value, tensor)]
            looped = f"looped {sizes[0]} -> {sizes[1]}"
            assert how == ("copied" if value.shape == tensor.shape else looped)


def grouped(state):
    for name in state:
        if name.endswith("conv2.weight"):
            state[name] = state[name][:, ::2]


def with_nan(state):
    state["layer3.1.bn1.running_var"][0] = math.nan


def with_infinity(state):
    state["conv1.weight"][0, 0, 0, 0] = math.inf


def quantised(state):
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].to(torch.int8)


def without_a_block(state):
    for name in list(state):
        if name.startswith("layer3.1."):
            del state[name]


# what is done to a ResNet-18's state dict -> words of the refusal
UNFIT = [
    (grouped, ["layer1.0.conv2.weight", "2x1x3x3", "2x2x3x3", "ResNeXt"]),
    (with_nan, ["layer3.1.bn1.running_var", "not finite"]),
    (with_infinity, ["conv1.weight", "not finite"]),
    (quantised, ["layer1.0.conv1.weight", "not finite floating-point"]),
    (without_a_block, ["16 layers", "18, 34, 50, 101, 152"]),
    (lambda state: state.pop("layer2.0.bn1.running_mean"), ["layer2.0.bn1.running_mean"]),
    (lambda state: state.pop("layer2.0.downsample.0.weight"), ["layer2.0.downsample.0.weight"]),
    (lambda state: state.pop("conv1.weight"), ["conv1.weight"]),
    (lambda state: state.update({"layer1.0.se.fc1.bias": torch.ones(2)}), ["layer1.0.se.fc1"]),
    (lambda state: state.update({"conv1.bias": torch.ones(2)}), ["conv1.bias"]),
    (lambda state: state.update({"conv1.weight": torch.ones(2, 3, 5, 5)}), ["conv1.weight", "5x5"]),
    (lambda state: state.update({"bn1.bias": torch.ones(3)}), ["bn1.bias", "is 3", "is 2"]),
]


@pytest.mark.parametrize("change,words", UNFIT)
def test_other_networks_are_refused(change, words):
    state = {name: v.clone() for name, v in ResNet(18, 10, width=2).state_dict().items()}
    change(state)
    with pytest.raises(ValueError) as refusal:
        resnet_arch(state)
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize("change,words", [
    (lambda state: state.pop("layer4.1.bn2.bias"), "layer4.1.bn2.bias is missing"),
    (lambda state: state.update({"bn1.weight": torch.ones(2, 2)}), "bn1.weight is 2x2"),
    (lambda state: state.update({"layer1.0.conv1.weight": torch.ones(2, 2, 1, 1)}), "2x2x3x3")])
def test_what_should_be_copied_and_cannot_is_an_error_before_anything_is(change, words):
    state = {name: v.clone() for name, v in ResNet(18, 10, width=2).state_dict().items()}
    change(state)
    student = SpikingResNet(18, 10, width=2)
    before = {name: v.clone() for name, v in student.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        transfer(student, state)
    assert all(torch.equal(v, before[name]) for name, v in student.state_dict().items())


def test_a_stem_of_two_convolutions_is_transferred():
    """As of a forked ResNet, whose names torchvision does not know."""
    def two(net):
        net.conv1 = torch.nn.Sequential(net.conv1, torch.nn.Conv2d(2, 2, 3, 1, 1, bias=False))
        return net

    torch.manual_seed(0)
    source, student = two(ResNet(18, 10, width=2)), two(SpikingResNet(18, 10, width=2))
    rows = dict((row[0], row[2]) for row in transfer(student, source.state_dict()))
    assert rows["conv1.0"] == rows["conv1.1"] == "copied"
    assert torch.equal(student.conv1[1].weight, source.conv1[1].weight)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("head", [0, 7])
def test_a_network_is_told_by_its_tensors(depth, head):
    arch = dict(depth=depth, num_classes=head, in_channels=1, width=2, stem="7x7")
    with torch.device("meta"):
        state = ResNet(**arch | dict(num_classes=7)).state_dict()
    state = {name: torch.zeros(v.shape, dtype=v.dtype) for name, v in state.items()
             if head or not name.startswith("fc.")}
    assert resnet_arch(state | {"neck.bias": torch.ones(1)}) == (arch, ["neck.bias"])


def test_the_other_kind_of_blocks_and_a_missing_classifier_are_refused():
    with pytest.raises(ValueError, match="layer1.0.conv1.weight is 2x2x1x1"):
        transfer(SpikingResNet(18, width=2), ResNet(50, width=2).state_dict())
    headless = ResNet(18, 10, width=2).state_dict()
    del headless["fc.bias"]
    with pytest.raises(ValueError, match="fc.bias is missing"):
        transfer(SpikingResNet(18, 10, width=2), headless, classifier="transfer")
    transfer(SpikingResNet(18, 10, width=2), headless)


def test_weights_from_before_batches_were_counted():
    state = {name: v for name, v in ResNet(18, width=2).state_dict().items()
             if not name.endswith("num_batches_tracked")}
    student = SpikingResNet(18, width=2)
    assert len(transfer(student, state)) == 41  # 20 convolutions and batch norms each, fc
    assert torch.equal(student.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


# ----------------------------------------------------------------------------- spiking network
def forward_step_by_step(net, x, T):
    """An independent forward pass in evaluation mode: time in a Python loop, one convolution a
    step, textbook batch norm."""
    n = net.neuron

    def bn(m, v):
        return F.batch_norm(v, m.running_mean, m.running_var, m.weight, m.bias, eps=m.eps)

    def spike(currents):
        return list(lif_reference(torch.stack(currents), n.decay, n.v_th, n.lens).unbind(0))

    xs = spike([bn(net.bn1, net.conv1(v)) for v in ([x] * T if x.dim() == 4 else x.unbind(0))])
    xs = [net.maxpool(v) for v in xs]
    stages = (net.layer1, net.layer2, net.layer3, net.layer4)
    for block in (block for stage in stages for block in stage):
        sew = "SEW" in type(block).__name__
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        pairs += [(block.conv3, block.bn3)] if hasattr(block, "conv3") else []
        down = block.downsample
        shortcut = xs
        if isinstance(down, torch.nn.Sequential):
            shortcut = [bn(down[1], down[0](v)) for v in xs]
            shortcut = spike(shortcut) if sew else shortcut
        for conv, norm in pairs[:-1]:
            xs = spike([bn(norm, conv(v)) for v in xs])
        conv, norm = pairs[-1]
        currents = [bn(norm, conv(v)) for v in xs]
        if sew:
            xs = [s + r for s, r in zip(spike(currents), shortcut)]
        else:
            xs = spike([c + r for c, r in zip(currents, shortcut)])
    return torch.stack([net.fc(v.mean((2, 3))) for v in xs])


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
            torch.testing.assert_close(scores, forward_step_by_step(net, x, T),
                                       rtol=1e-9, atol=1e-9)


def test_time_steps_change_at_will_and_are_causal():
    torch.manual_seed(0)
    net, x = SpikingResNet(width=4, num_classes=5, T=6).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        long = net(x)
        net.neuron.T = 2
        assert torch.equal(net(x), long[:2])  # no reset to forget, no trace of the longer call


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
    assert spikes.shape == x.shape and set(spikes.unique().tolist()) == {0, 1}  # firing rates
    before = m.running_mean.clone()
    net.eval()(torch.randn(5, 3, 8, 8))
    assert torch.equal(m.running_mean, before) and m.num_batches_tracked == 1


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


def test_what_a_transfer_leaves_is_fresh():
    student = SpikingResNet(18, 10, width=8, v_th=0.7, stem="7x7")
    teacher = randomised(ResNet(18, 10, width=8))
    transfer(student, teacher.state_dict(), shortcut="fresh")
    down = student.layer2[0].downsample
    for conv, norm in ((student.conv1, student.bn1), down):
        deviation = (3 * conv.weight[0].numel()) ** -0.5
        assert conv.weight.std().item() == pytest.approx(deviation, rel=0.2)
        assert (norm.weight == 0.7).all()


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
    pairs = {  # steps, images, channels, rows, columns
        **{f"dimension {d}": (drawn.narrow(d, 1, drawn.shape[d] - 1),
                              drawn.narrow(d, 0, drawn.shape[d] - 1)) for d in range(5)},
        "seeds": (drawn, other_seed),
        "seed and image": (drawn[:, 1:], other_seed[:, :-1]),
    }
    for what, (a, b) in pairs.items():
        correlation = float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
        assert abs(correlation) < 5 / a.numel() ** 0.5, what
        together = float((a == b).double().mean())
        assert abs(together - 1 / 255) < 5 * (1 / 255 / a.numel()) ** 0.5, what


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
    levels = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1)
    below = levels > torch.arange(255).view(1, 255, 1, 1)  # every value that the noise may have
    assert below.sum((1, 2, 3)).tolist() == list(range(256))


DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
def test_noise_knows_neither_batch_nor_time_steps_nor_device(device):
    net = SpikingResNet(width=2, encoder="poisson", T=6)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (10, 8, 8, 3), dtype=torch.uint8, generator=g).permute(0, 3, 1, 2)
    index = torch.tensor([5, 0, 49999, 3, 2, 1, 17, 8, 1000, 4])
    whole = net.encode(x, None, index, seed=1)
    net.to(device)
    x, index = x.to(device), index.to(device)
    for batch in (1, 3, 10):  # and so every share of a batch that a process may have
        parts = [net.encode(x[i:i + batch], None, index[i:i + batch], seed=1)
                 for i in range(0, 10, batch)]
        assert torch.equal(torch.cat(parts, 1).cpu(), whole)
    order = torch.randperm(10)
    shuffled = net.encode(x[order], None, index[order], seed=1)
    assert torch.equal(shuffled.cpu(), whole[:, order])
    for T in (1, 9):
        net.neuron.T = T
        spikes = net.encode(x, None, index, seed=1)
        assert torch.equal(spikes[:6].cpu(), whole[:T])
        assert not torch.equal(net.encode(x, None, index, seed=2), spikes)
        assert not torch.equal(net.encode(x, None, index + 1, seed=1), spikes)


def test_direct_coding_is_the_normalised_image():
    data = type("Data", (), {"normalize": staticmethod(lambda x: x / 255 - 0.5)})
    x = torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)
    encoded = SpikingResNet(width=2).encode(x, data, torch.arange(2), seed=0)
    assert torch.equal(encoded, x / 255 - 0.5)


# ------------------------------------------------------------------------------------ the script
def make_folder(root, classes, mode="RGB"):
    r = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = r.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).convert(mode)
                image.save(root / split / name / f"{i}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with image sets and a teacher of each kind."""
    folder = tmp_path_factory.mktemp("transfer")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_folder(folder / "pets", ["bird", "cat", "dog"])
        make_folder(folder / "farm", ["bird", "dog", "yak"])
        make_folder(folder / "zoo", ["ape", "bear", "cat", "dog"])
        make_folder(folder / "grey", ["day", "night"], mode="L")
        make_folder(folder / "mixed", ["day", "night"], mode="L")  # all but its last image
        night = Image.new("RGB", (8, 8), "blue")
        night.save(folder / "mixed" / "test" / "night" / "7.png")
        train_teacher.main("--dataset pets --width 2 --depth 34 --epochs 1 --batch-size 24 "
                           "--device cpu --out r34.pt".split())
    return folder


@pytest.fixture
def script(made, tmp_path, monkeypatch, capsys):
    """script(command line) -> (checkpoint, what was printed), in a copy of `made`."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")

    def call(command):
        capsys.readouterr()
        transfer_init.main(command.split())
        out = command.partition("--out ")[2].partition(" ")[0] or "snn_init.pt"
        return load_checkpoint(out, "init"), capsys.readouterr().out
    return call


@pytest.fixture
def refused(script, capsys, tmp_path):
    """refused(command line, words...): it ends with one line of these words and writes nothing."""
    def check(command, *words):
        before = sorted((tmp_path / "here").iterdir())
        with pytest.raises(SystemExit) as end:
            script(command)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and len(error) < 500, error
        assert all(str(word) in error for word in words), error
        assert sorted((tmp_path / "here").iterdir()) == before
    return check


def test_the_student_inherits_from_the_teacher(script):
    made, out = script("--src r34.pt")
    teacher = load_checkpoint("r34.pt")
    assert made["arch"] == dict(
        depth=18, num_classes=3, in_channels=3, width=2, stem="3x3", block="basic",
        encoder="direct", T=4, decay=0.25, v_th=0.5, lens=0.5, detach_reset=True)
    assert made["config"]["dataset"] == "pets" and made["config"]["width"] == 2
    assert made["data"] == teacher["data"] and made["data"]["classes"] == ["bird", "cat", "dog"]
    assert made["provenance"]["parents"]["teacher"]["path"] == "r34.pt"
    assert not made["provenance"]["parents"]["teacher"]["bare"]
    assert not torch.equal(made["model"]["fc.weight"], teacher["model"]["fc.weight"])
    model, source = made["model"], teacher["model"]
    assert torch.equal(model["layer3.1.conv2.weight"], source["layer3.5.conv2.weight"])
    assert torch.equal(model["layer2.0.downsample.0.weight"],
                       source["layer2.0.downsample.0.weight"])
    rebuilt = SpikingResNet(**made["arch"])
    rebuilt.load_state_dict(model)

    # every parameter is in the table, and the next command comes last
    lines = out.splitlines()
    layers = {line.split()[0] for line in lines[1:-2]}
    assert layers == {name.rpartition(".")[0] for name, _ in rebuilt.named_parameters()}
    assert lines[-1] == "next: python train_idsnn.py --init snn_init.pt"
    assert "note" not in out


@pytest.mark.parametrize("flags,arch", [
    ("--T 6 --decay 0.5 --v-th 1 --lens 0.25 --no-detach-reset",
     dict(T=6, decay=0.5, v_th=1.0, lens=0.25, detach_reset=False)),
    ("--width 5 --depth 34 --block sew", dict(width=5, depth=34, block="sew")),
    ("--encoder poisson --stem 7x7", dict(encoder="poisson", stem="7x7")),
])
def test_flags_that_change_the_network(script, flags, arch):
    made, _ = script(f"--src r34.pt --out other.pt {flags}")
    assert made["arch"] == made["arch"] | arch
    SpikingResNet(**made["arch"]).load_state_dict(made["model"])


def test_flags_of_the_transfer(script):
    usual = script("--src r34.pt")[0]["model"]
    source = load_checkpoint("r34.pt")["model"]
    first = script("--src r34.pt --out a.pt --block-map first")[0]["model"]
    assert torch.equal(first["layer3.1.conv2.weight"], source["layer3.1.conv2.weight"])
    fresh, out = script("--src r34.pt --out b.pt --shortcut fresh")
    name = "layer2.0.downsample.0.weight"
    assert not torch.equal(fresh["model"][name], usual[name])
    row = next(line for line in out.splitlines() if line.startswith("layer2.0.downsample.0"))
    assert row.split() == ["layer2.0.downsample.0", "fresh"]
    for width in (2, 5):
        fc = script(f"--src r34.pt --fresh --classifier transfer --width {width}")[0]["model"]
        columns = torch.arange(8 * width) % 16
        assert torch.equal(fc["fc.weight"], source["fc.weight"][:, columns])
        assert torch.equal(fc["fc.bias"], source["fc.bias"])
    other = script("--src r34.pt --out c.pt --seed 1")[0]["model"]
    again = script("--src r34.pt --out d.pt")[0]["model"]
    assert torch.equal(again["fc.weight"], usual["fc.weight"])
    assert not torch.equal(other["fc.weight"], usual["fc.weight"])


def test_help_shows_the_values_that_will_run(script, capsys):
    texts = {}
    for command in ("--help", "--help --src r34.pt", "--help --src nowhere.pt"):
        with pytest.raises(SystemExit) as end:
            script(command)
        assert end.value.code == 0
        texts[command] = " ".join(capsys.readouterr().out.split())
    text = texts["--help --src r34.pt"]
    assert "the teacher's (default: 2)" in text and "the teacher's (default: pets)" in text
    for text in texts.values():
        assert text.count("not given: the teacher's") == 2
        assert "time-steps (default: 4)" in text and "eq. 3 (default: 0.5)" in text


@pytest.mark.parametrize("dataset,described,arch", [
    ("farm", dict(name="farm", classes=["bird", "dog", "yak"], shape=[3, 8, 8]), (3, 3)),
    ("zoo", dict(name="zoo", classes=["ape", "bear", "cat", "dog"], shape=[3, 8, 8]), (4, 3)),
    ("grey", dict(name="grey", classes=["day", "night"], shape=[1, 8, 8]), (2, 1)),
    ("mixed", dict(name="mixed", classes=["day", "night"], shape=[3, 8, 8]), (2, 3)),
    ("digits", dict(name="digits", classes=list("0123456789"), shape=[1, 8, 8]), (10, 1)),
    ("cifar10", dict(name="cifar10", classes=None, shape=[3, 32, 32]), (10, 3)),
    ("cifar100", dict(name="cifar100", classes=None, shape=[3, 32, 32]), (100, 3)),
])
def test_other_data_are_described_as_far_as_known(script, dataset, described, arch):
    made, out = script(f"--src r34.pt --dataset {dataset}")
    if described["classes"]:  # CIFAR's are not read, nor downloaded: stage 3 does
        described = train_teacher.load_data(dataset, "data").describe() | described
    assert made["data"] == described and made["config"]["dataset"] == dataset
    assert (made["arch"]["num_classes"], made["arch"]["in_channels"]) == arch
    assert f"for {dataset}" in out


def test_the_classifier_serves_its_own_classes_alone(script, refused):
    refused("--src r34.pt --classifier transfer --dataset farm", "class 1", "'cat'", "'dog'",
            "r34.pt")
    refused("--src r34.pt --classifier transfer --dataset zoo", "--classifier", "r34.pt", "3",
            "zoo", "4")
    shutil.copytree("pets", "copy")
    made, _ = script("--src r34.pt --classifier transfer --dataset copy")
    assert made["data"]["classes"] == ["bird", "cat", "dog"]
    shutil.rmtree("pets")  # the teacher's own data are as its file says
    made, _ = script("--src r34.pt --out gone.pt --classifier transfer")
    assert made["data"] == load_checkpoint("r34.pt")["data"]


def test_a_class_that_was_renamed_since_is_refused_by_the_next_stage(script, capsys):
    for split in ("train", "test"):
        shutil.move(f"pets/{split}/cat", f"pets/{split}/yak")
    script("--src r34.pt --classifier transfer")
    with pytest.raises(SystemExit) as end:
        train_idsnn.main("--epochs 1 --batch-size 8 --no-kd --device cpu".split())
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert "snn_init.pt knows class 1 as 'cat', the data set as 'dog'" in error
    made, _ = script("--src r34.pt --dataset ./pets --out new.pt")  # another path is read anew
    assert made["data"]["classes"] == ["bird", "dog", "yak"]


def test_a_classifier_for_data_whose_names_are_unknown_keeps_the_teachers(script):
    teacher = load_checkpoint("r34.pt")
    names = [f"kind {i}" for i in range(10)]
    teacher["data"]["classes"], teacher["arch"]["num_classes"] = names, 10
    teacher["model"]["fc.weight"], teacher["model"]["fc.bias"] = torch.ones(10, 16), torch.ones(10)
    torch.save(teacher, "ten.pt")
    made, _ = script("--src ten.pt --dataset cifar10 --classifier transfer")
    assert made["data"]["classes"] == names  # for stage 3 to compare with the data's own


def test_a_result_is_kept(script, refused):
    script("--src r34.pt")
    with pytest.raises(SystemExit) as end:
        script("--src r34.pt")
    assert end.value.code == 0
    refused("--src r34.pt --T 6", "snn_init.pt", "--T", "--fresh")
    refused("--src r34.pt --depth 50 --out new.pt", "--depth", "ResNet-34", "bottlenecks")
    refused("--src r34.pt --dataset farm", "snn_init.pt", "--fresh")
    refused("--src r34.pt --out r34.pt --fresh", "--out", "r34.pt")
    assert script("--src r34.pt --T 6 --fresh")[0]["arch"]["T"] == 6


# ------------------------------------------------------------------------ weights from elsewhere
def state(**kind):
    kind = dict(depth=18, num_classes=10, width=2, stem="7x7") | kind
    return dict(randomised(ResNet(**kind)).state_dict())


def prefixed(prefix):
    return {prefix + name: value for name, value in state().items()}


def save_safetensors(path, tensors):
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
             torch.int64: "I64"}
    header, blobs, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, value in tensors.items():
        blobs.append(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        header[name] = dict(dtype=kinds[value.dtype], shape=list(value.shape),
                            data_offsets=[at, at + len(blobs[-1])])
        at += len(blobs[-1])
    head = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head + b"".join(blobs))


def save_legacy(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def half(kind):
    return {name: v.to(kind) if v.is_floating_point() else v for name, v in state().items()}


# writer, content
READ = {
    "plain": lambda p: torch.save(state(), p),
    "module.": lambda p: torch.save(prefixed("module."), p),
    "_orig_mod.": lambda p: torch.save(prefixed("_orig_mod."), p),
    "model.": lambda p: torch.save(prefixed("model."), p),
    "both": lambda p: torch.save(prefixed("_orig_mod.module."), p),
    "imagenet": lambda p: torch.save(dict(epoch=90, state_dict=prefixed("module."),
                                          optimizer=dict(state={0: dict(m=torch.ones(1))})), p),
    "model": lambda p: torch.save(dict(model=state(), args=None), p),
    "nested twice": lambda p: torch.save(dict(state=dict(model=state())), p),
    "encoder": lambda p: torch.save(dict(state_dict=prefixed("module.encoder_q.")), p),
    "backbone": lambda p: torch.save(prefixed("backbone.body."), p),
    "parameters": lambda p: torch.save({name: torch.nn.Parameter(v, v.is_floating_point())
                                        for name, v in state().items()}, p),
    "legacy": lambda p: save_legacy(p, state()),
    "legacy nested": lambda p: save_legacy(p, dict(state_dict=prefixed("module."))),
    "safetensors": lambda p: save_safetensors(p, state()),
    "safetensors prefixed": lambda p: save_safetensors(p, prefixed("model.")),
}


@pytest.mark.parametrize("name", READ)
def test_weights_as_people_have_them(script, name):
    READ[name]("w.pth")
    made, out = script("--src w.pth --dataset cifar10 --width 3")
    source, model = state(), made["model"]
    index = torch.arange(24) % 16
    assert torch.equal(model["layer4.1.conv2.weight"],
                       source["layer4.1.conv2.weight"][index][:, index])
    assert torch.equal(model["layer4.1.bn2.running_var"], source["layer4.1.bn2.running_var"][index])
    assert made["arch"]["stem"] == "3x3" and made["arch"]["num_classes"] == 10
    assert ("no checksums" in out) == name.startswith(("legacy", "safetensors"))
    assert out.count("no checksums") <= 1
    assert ("not used: optimizer/state/0/m (1 in all)" in out) == (name == "imagenet")
    assert ("not used" in out) == (name == "imagenet")
    # nothing to distil from: stage 3 is told
    assert made["provenance"]["parents"]["teacher"]["bare"]
    assert "--no-kd" in out.splitlines()[-1] and "--teacher" in out.splitlines()[-1]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_fp32(script, kind):
    save_safetensors("half.safetensors", half(kind))
    model = script("--src half.safetensors --stem 7x7")[0]["model"]
    assert all(v.dtype == torch.float32 for v in model.values() if v.is_floating_point())
    assert torch.equal(model["conv1.weight"], state()["conv1.weight"].to(kind).float())


def test_what_is_not_used_is_named(script):
    head = {"fc.0.weight": torch.ones(2, 2), "queue": torch.ones(3), "neck.0.bias": torch.ones(1)}
    body = {name: v for name, v in state().items() if not name.startswith("fc.")}
    torch.save(dict(state_dict=body | head), "w.pth")
    _, out = script("--src w.pth")
    note = next(line for line in out.splitlines() if "not used" in line)
    assert all(name in note for name in head)
    torch.save(body | {f"head.{i}.weight": torch.ones(1) for i in range(100)}, "w.pth")
    _, out = script("--src w.pth --fresh")
    note = next(line for line in out.splitlines() if "not used" in line)
    assert "head.0.weight" in note and "100 in all" in note and len(note) < 200


def test_a_foreign_classifier(script, refused):
    torch.save(state(), "w.pth")
    made, _ = script("--src w.pth --dataset digits --classifier transfer")
    assert torch.equal(made["model"]["fc.bias"], state()["fc.bias"])
    refused("--src w.pth --out new.pt --classifier transfer", "--classifier", "w.pth", "10",
            "cifar100", "100")  # cifar100 is the default where the file names no data


class Malicious:
    def __reduce__(self):
        return open, ("executed", "w")


def truncated(write, keep):
    def make(path):
        write(path, state())
        with open(path, "rb+") as f:
            f.truncate(int(f.seek(0, 2) * keep))
    return make


def unfit(change):
    def make(path):
        changed = state()
        change(changed)
        torch.save(dict(state_dict=changed), path)
    return make


def pickled_network(path):
    torch.save(ResNet(18, 10, width=1), path)


def other_numbers(path):
    save_safetensors(path, state())
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"F32"', b'"F8Z"'))


REFUSED = {
    **{f"unfit {i}": (unfit(change), words) for i, (change, words) in enumerate(UNFIT)},
    "moco": (lambda p: torch.save(prefixed("encoder_q.") | prefixed("encoder_k."), p),
             ["2 networks", "encoder_q.", "encoder_k."]),
    "averaged": (lambda p: torch.save(dict(state_dict=state(), state_dict_ema=state()), p),
                 ["2 networks", "state_dict/", "state_dict_ema/"]),
    "another": (lambda p: torch.save(dict(torch.nn.Linear(2, 2).state_dict()), p),
                ["layer1.0.conv1.weight", "weight, bias"]),
    "empty dict": (lambda p: torch.save({}, p), ["layer1.0.conv1.weight"]),
    "list": (lambda p: torch.save([torch.ones(2)], p), ["list"]),
    "network": (pickled_network, ["train_teacher.ResNet", "state_dict()"]),
    "legacy malicious": (lambda p: save_legacy(p, dict(state_dict=Malicious())), ["open"]),
    "malicious": (lambda p: torch.save(dict(state_dict=Malicious()), p), ["open"]),
    "pickle": (lambda p: p.write_bytes(pickle.dumps([Malicious()])), ["truncated"]),
    "torchscript": (lambda p: torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)).save(p),
                    ["TorchScript"]),
    "hdf5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), ["HDF"]),
    "text": (lambda p: p.write_text("accuracy 75.41"), ["accuracy"]),
    "empty": (lambda p: p.touch(), ["truncated"]),
    "short archive": (truncated(lambda p, s: torch.save(s, p), 0.5), ["truncated"]),
    "short legacy": (truncated(save_legacy, 0.9), ["truncated"]),
    "short safetensors": (truncated(save_safetensors, 0.9), ["truncated"]),
    "short header": (truncated(save_safetensors, 0.01), ["truncated"]),
    "eight bytes": (lambda p: p.write_bytes(bytes(8)), ["truncated"]),
    "fp8": (other_numbers, ["F8Z"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_found_is_said(refused, tmp_path, recwarn, name):
    make, words = REFUSED[name]
    make(tmp_path / "here" / "w.pth")
    recwarn.clear()
    refused("--src w.pth", "w.pth", *words)
    assert not recwarn.list, "a second line on stderr"
    assert not (tmp_path / "here" / "executed").exists()


def test_torchvisions_weights_and_resnext(script, refused):
    torchvision = pytest.importorskip("torchvision")
    source = torchvision.models.resnet34().state_dict()
    torch.save(source, "resnet34.pth")
    made, out = script("--src resnet34.pth --depth 18")
    table = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.strip()}
    assert table["conv1"] == table["bn1"] == table["fc"] == "fresh"
    assert table["layer1.0.conv1"] == "copied"
    assert made["config"]["dataset"] == "cifar100" and made["config"]["width"] == 64
    assert torch.equal(made["model"]["layer3.1.conv2.weight"], source["layer3.5.conv2.weight"])
    resnext = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [3, 4, 6, 3],
                                        groups=2, width_per_group=32)
    torch.save(resnext.state_dict(), "resnext.pth")
    refused("--src resnext.pth --depth 50 --out x.pt", "conv2.weight", "64x32x3x3", "ResNeXt")


def holding_itself():
    content = {}
    content["model"] = content
    return content


@pytest.mark.parametrize("change", [
    {"fc.bias": torch.tensor(1.0)}, {"conv1.weight": torch.tensor(1.0)},
    {"conv1.weight": torch.zeros(2)}, {"conv1.weight": torch.zeros(0, 3, 3, 3)},
    {"conv1.weight": torch.zeros(2, 0, 3, 3)}, {"bn1.weight": torch.ones(2).to_sparse()},
    holding_itself()])
def test_tensors_of_odd_shapes_cost_one_line(change, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({**ResNet(18, num_classes=10, width=2).state_dict(), **change}, "odd.pth")
    with pytest.raises(SystemExit) as end:
        transfer_init.main("--src odd.pth --dataset cifar10".split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "odd.pth" in error
    assert "unpack" not in error  # words of Python's that help nobody
    assert not (tmp_path / "snn_init.pt").exists()
