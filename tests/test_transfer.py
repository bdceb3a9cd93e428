"""Stage 2: the Spiking ResNet, its initialisation from the teacher, weights from elsewhere.

That the network makes the spikes of eq. 2 to 4 in every layer is in test_eval too, by NIR.
"""
import math
import re
import sys
from pathlib import Path

import pytest
import test_errors
import torch
import torch.nn.functional as F
from test_idsnn import edited
from test_teacher import make_folder
from torch import nn

import transfer_init
from kernels.lif import lif_reference
from train_teacher import DEPTHS, ResNet, conv, load_checkpoint, load_data
from transfer_init import SpikingResNet, loop, noise, source_block, transfer

refused = test_errors.refused


def state(**kind):
    """A ResNet's weights, every tensor random, so that no equality is an accident."""
    kind = dict(depth=18, num_classes=10, width=2, stem="7x7") | kind
    g = torch.Generator().manual_seed(0)
    weights = ResNet(**kind).state_dict()
    for name, value in weights.items():
        # in half precision too
        weights[name] = torch.randint(1, 129, value.shape, generator=g) / 128
    return dict(weights)


def prefixed(prefix):
    return {prefix + name: value for name, value in state().items()}


@pytest.fixture
def script(run):
    """script("--src r34.pt") -> (the checkpoint made, what was printed)."""
    def script(flags):
        result = run(f"transfer_init.py {flags}")
        assert result.status == 0 and not result.err, result
        return load_checkpoint("snn_init.pt", "init"), result.out
    return script


# ------------------------------------------------------------------------------------- transfer
def test_loop_interpolation_by_hand():
    vector = torch.tensor([1.0, 2, 3])
    assert loop(vector, (7,)).tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert loop(vector, (2,)).tolist() == [1, 2]
    # three channels from two
    kernel = torch.tensor([
        [10.0, 11],
        [20, 21],
        [30, 31]])[..., None, None]
    assert loop(kernel, (4, 3, 1, 1)).squeeze().tolist() == [
        [10, 11, 10],
        [20, 21, 20],
        [30, 31, 30],
        [10, 11, 10]]


@pytest.mark.parametrize("m,n,spread,first", [
    (2, 6, [0, 5], [0, 1]),  # ResNet-34 to 18: first to first, last to last
    (6, 2, [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]),
    (4, 8, [0, 2, 5, 7], [0, 1, 2, 3]),
    (1, 5, [0], [0]),
])
def test_block_maps_by_hand(m, n, spread, first):
    assert [source_block(j, m, n, "spread") for j in range(m)] == spread
    assert [source_block(j, m, n, "first") for j in range(m)] == first


def test_a_stem_of_two_convolutions_is_transferred():
    """A fork's one line in ResNet; a stem of another shape stays fresh."""
    teacher, student = ResNet(18, width=4), SpikingResNet(18, width=4)
    teacher.conv1 = nn.Sequential(conv(3, 6, 3), conv(6, 4, 3))
    stems = {name: how for name, _, how in transfer(student, teacher.state_dict())}
    assert stems["conv1"] == stems["bn1"] == "fresh"
    student.conv1 = nn.Sequential(conv(3, 6, 3), conv(6, 4, 3))
    stems = {name: how for name, _, how in transfer(student, teacher.state_dict())}
    assert stems["conv1.0"] == stems["conv1.1"] == stems["bn1"] == "copied"
    assert torch.equal(student.conv1[1].weight, teacher.conv1[1].weight)


@pytest.mark.parametrize("depth,width,stem,flags,fresh", [
    (34, 3, "7x7", "", "fc|conv1|bn1"),
    (34, 5, "3x3", "--width 3 --block-map first --classifier transfer", "nothing"),
    (18, 2, "3x3", "--depth 34 --width 7 --block sew --shortcut fresh", "fc|.*downsample"),
    (50, 2, "3x3", "--depth 101 --width 3", "fc"),
])
def test_every_layer_is_filled_as_the_flags_say(script, depth, width, stem, flags, fresh):
    source = state(depth=depth, width=width, stem=stem)
    torch.save(source, "w.pth")
    made, out = script(f"--src w.pth --dataset digits --seed 1 {flags}")
    torch.manual_seed(1)
    untouched = SpikingResNet(**made["arch"]).state_dict()
    # name of a layer, the teacher's, how
    table = {line[:25].strip(): (line[25:50].strip(), line[50:]) for line in out.splitlines()}
    block_map = "first" if "first" in flags else "spread"

    for name, value in made["model"].items():
        if name.endswith("num_batches_tracked"):
            continue
        where, how = table[name.rpartition(".")[0]]
        if re.match(fresh, name):
            assert (where, how) == ("", "fresh")
            assert torch.equal(value, untouched[name])
            continue
        origin = name
        if name.startswith("layer"):
            stage, j, rest = name.split(".", 2)
            number = int(stage[-1]) - 1
            m = DEPTHS[made["arch"]["depth"]][1][number]
            n = DEPTHS[depth][1][number]
            k = source_block(int(j), m, n, block_map)
            origin = f"{stage}.{k}.{rest}"
        assert where == origin.rpartition(".")[0]
        assert torch.equal(value, loop(source[origin], value.shape))
        if name.endswith(".weight"):
            same = value.shape == source[origin].shape
            assert how.split()[0] == ("copied" if same else "looped")


def test_what_should_be_copied_and_cannot_is_an_error(refused):
    student, teacher = SpikingResNet(18, 10, width=2), state(stem="3x3")
    headless = {name: v for name, v in teacher.items() if not name.startswith("fc.")}
    transfer(student, headless)
    with pytest.raises(KeyError, match="fc.weight"):
        transfer(student, headless, classifier="transfer")
    del headless["layer4.1.bn2.bias"]
    with pytest.raises(KeyError, match="layer4.1.bn2.bias"):
        transfer(student, headless)
    # 1x1 kernels would fill 3x3 ones without a word, nine times each
    with pytest.raises(ValueError, match="1x1"):
        transfer(student, state(depth=50, stem="3x3"))
    refused("transfer_init.py --src r34.pt --depth 50", "--depth", "ResNet-34", "50")


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


@pytest.mark.parametrize("depth,block,stem", [
    (18, "basic", "7x7"), (18, "sew", "3x3"), (50, "basic", "3x3"), (50, "sew", "3x3")])
def test_forward_is_figure_1_step_by_step(depth, block, stem):
    torch.manual_seed(0)
    net = SpikingResNet(depth, 7, width=4, T=3, block=block, stem=stem).double()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):  # statistics that make neurons fire now and then
            torch.nn.init.uniform_(m.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(m.running_var, 0.05, 0.15)
            torch.nn.init.uniform_(m.bias, -0.1, 0.5)
    net.eval()
    images = torch.randn(2, 3, 16, 16).double()
    spikes = (torch.rand(3, 2, 3, 16, 16) < 0.5).double()
    for x in (images, spikes):
        with torch.no_grad():
            scores = net(x)
            expected = forward_step_by_step(net, x, 3)
        assert scores.shape == (3, 2, 7)
        assert scores.std() > 0
        torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)


def test_what_the_network_refuses():
    images, spikes = torch.ones(2, 3, 8, 8), torch.ones(4, 2, 3, 8, 8)
    net = SpikingResNet(width=2, encoder="poisson")
    with pytest.raises(ValueError, match="encode"):
        net(images)
    with pytest.raises(ValueError, match="input of 2 time-steps, where neuron.T is 4"):
        net(spikes.transpose(0, 1))  # the batch comes first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the latter without autocast
@pytest.mark.parametrize("block", ["basic", "sew"])
def test_every_parameter_gets_a_gradient(block, dtype):
    torch.manual_seed(0)
    net = SpikingResNet(width=4, num_classes=5, block=block).to(dtype)
    x = torch.randn(4, 3, 16, 16).to(dtype)
    scores = net(x)
    assert scores.dtype == dtype
    scores.float().mean(0).square().sum().backward()
    for p in net.parameters():
        assert p.grad.isfinite().all()
        assert p.grad.abs().sum() > 0


def test_batch_norm_takes_statistics_over_time():
    torch.manual_seed(0)
    net = SpikingResNet(width=2, T=3)
    layers = net.bn1, net.layer1[0].bn1  # before T steps, and behind them
    means = {layer: [] for layer in layers}
    for layer in layers:
        layer.register_forward_hook(
            lambda layer, inputs, spikes: means[layer].append(inputs[0].mean((0, 2, 3)).detach()))
    x = torch.randn(5, 3, 8, 8)
    net(x)
    for layer in layers:
        torch.testing.assert_close(layer.running_mean, 0.1 * means[layer].pop())

    # update_bn, of averaged weights, asks by momentum None for a plain average over all batches
    torch.optim.swa_utils.update_bn([x, 2 + x, 4 + x], net)
    net.eval()(x)  # changes nothing
    for layer in layers:
        mean = torch.stack(means[layer][:3]).mean(0)
        torch.testing.assert_close(layer.running_mean, mean)
        assert layer.num_batches_tracked == 3


def test_fresh_network_is_the_authors_baseline():
    """PyTorch's default: uniform, with variance 1 / (3 * fan-in); Kaiming's is 2 / fan-out."""
    torch.manual_seed(0)
    for block in ("basic", "sew"):
        net = SpikingResNet(width=16, v_th=0.7, block=block)
        norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert len(norms) == 20 and all((m.weight == 0.7).all() for m in norms)
        for m in net.modules():
            if isinstance(m, torch.nn.Conv2d):
                bound = 1 / m.weight[0].numel() ** 0.5  # one over the root of fan-in
                assert m.weight.abs().max() <= bound
                assert m.weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.1)


# -------------------------------------------------------------------------------------- Poisson
def splitmix64(z):
    """The hash of Steele, Lea and Flood, in Python's integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@pytest.mark.parametrize("device", [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
])
def test_noise_is_splitmix64(device):
    """Of seed, image, step and pixel: not of the batch, T or the device."""
    seed, index = 99999 * 10000, [0, 7, 49999]
    drawn = noise(seed, torch.tensor(index, device=device), 4, (2, 3, 5))
    drawn = drawn.flatten(2)  # (T, B, pixels)
    for t in range(4):
        for b, i in enumerate(index):
            for pixel in (0, 1, 29):
                stream = splitmix64(i) + seed
                counter = 1 + 30 * t + pixel
                z = splitmix64(stream % 2**64) + counter * 0x9E3779B97F4A7C15
                z = splitmix64(z % 2**64)
                if z >= 2**63:  # signed
                    z -= 2**64
                assert drawn[t, b, pixel] == z % 255


def test_a_spike_has_probability_pixel_over_255():
    net = SpikingResNet(width=2, encoder="poisson", T=16)
    pixels = torch.tensor([0, 1, 51, 128, 254, 255], dtype=torch.uint8)
    x = pixels.view(6, 1, 1, 1).expand(-1, -1, 40, 40)
    index = torch.arange(6)
    spikes = net.encode(x, None, index, seed=3)
    assert spikes.shape == (16, 6, 1, 40, 40)
    assert set(spikes.unique().tolist()) == {0, 1}
    rates = spikes.mean((0, 2, 3, 4)).tolist()
    assert rates == pytest.approx((pixels / 255).tolist(), abs=0.01)
    assert rates[0] == 0 and rates[-1] == 1  # black never fires, white always
    for seed, shift in ((2, 0), (3, 1)):
        others = net.encode(x, None, index + shift, seed)
        assert not torch.equal(others, spikes)


# ------------------------------------------------------------------------------------ the script
def test_the_student_inherits_from_the_teacher_and_flags_override(script):
    made, out = script("--src r34.pt")
    teacher = load_checkpoint("r34.pt")
    assert made["arch"] == dict(
        depth=18, num_classes=10, in_channels=1, width=8, stem="3x3", block="basic",
        encoder="direct", T=4, decay=0.25, v_th=0.5, lens=0.5, detach_reset=True)
    assert made["config"]["dataset"] == "digits" and made["data"] == teacher["data"]
    assert made["parents"] == dict(teacher=dict(path="r34.pt", sha256=teacher["sha256"]))
    lines = out.splitlines()
    assert "layer3.1.conv2           layer3.5.conv2           copied" in lines
    assert lines[-2].endswith("(basic blocks, width 8, T 4) for digits, from r34.pt")
    assert lines[-1] == "next: python train_idsnn.py --init snn_init.pt"

    made, out = script("--src r34.pt --depth 34 --width 5 --block sew --encoder poisson --stem 7x7 "
                       "--T 6 --decay 0.5 --v-th 1 --lens 0.25 --no-detach-reset")
    assert made["arch"] == dict(
        depth=34, num_classes=10, in_channels=1, width=5, stem="7x7", block="sew",
        encoder="poisson", T=6, decay=0.5, v_th=1.0, lens=0.25, detach_reset=False)
    assert "looped 64x64x3x3 -> 40x40x3x3" in out


def test_other_stages_files_are_not_written_over(refused):
    for path in ("r34.pt", "idsnn.pt"):
        refused(f"transfer_init.py --src r34.pt --out {path}", path)


def test_help_shows_the_values_that_will_run(run):
    for flags, width, dataset in (("", "the teacher's", "the teacher's"),
                                  ("--src r34.pt", "8", "digits")):
        result = run(f"transfer_init.py --help {flags}")
        text = " ".join(result.out.split())
        assert result.status == 0 and "time-steps (default: 4)" in text
        assert f"channels of its first stage (default: {width})" in text
        assert f"digits, or a folder (default: {dataset})" in text


def elsewhere(classes):
    """Write other.pt: the digits' teacher, but for its names and a stem that images of this size
    would not get."""
    teacher = load_checkpoint("r34.pt")
    edited("r34.pt", "other.pt", config=teacher["config"] | dict(dataset="elsewhere"),
           data=teacher["data"] | dict(name="elsewhere", classes=classes),
           arch=teacher["arch"] | dict(stem="7x7"))


@pytest.mark.parametrize("mode,shape,stem", [
    ("RGB", [3, 8, 8], "3x3"), ("L", [1, 6, 65], "7x7")])
def test_a_folder_decides_classes_channels_and_stem(script, here, mode, shape, stem):
    make_folder(here / "own", size=tuple(shape[1:]), mode=mode)
    made, _ = script("--src r34.pt --dataset own")
    assert made["data"] == load_data("own", "data").describe()
    assert made["data"]["shape"] == shape
    arch = made["arch"]
    assert (arch["num_classes"], arch["in_channels"], arch["stem"]) == (3, shape[0], stem)


def test_cifar_is_described_without_a_download(script):
    made, _ = script("--src r34.pt --dataset cifar100")
    assert made["data"] == dict(name="cifar100", classes=None, shape=[3, 32, 32])
    assert made["config"]["dataset"] == "cifar100"
    assert made["arch"]["num_classes"] == 100


def test_the_teachers_own_data_are_as_its_file_says(script):
    """They may be on another machine; so may the names of classes that a download would tell."""
    names = [f"kind {i}" for i in range(10)]
    elsewhere(names)
    made, _ = script("--src other.pt --classifier transfer")
    assert made["data"]["name"] == made["config"]["dataset"] == "elsewhere"
    assert made["data"]["classes"] == names and made["arch"]["stem"] == "7x7"
    made, _ = script("--src other.pt --classifier transfer --dataset cifar10")
    assert made["data"]["classes"] == names  # for stage 3 to compare
    assert made["arch"]["stem"] == "3x3"


def test_the_classifier_serves_its_own_classes_alone(script, refused):
    other = "--src other.pt --classifier transfer"
    elsewhere(list("0123456789"))
    script(f"{other} --dataset digits")
    refused(f"transfer_init.py {other} --dataset cifar100",
            "--classifier", "other.pt", "10 classes", "100")
    elsewhere(list("0123456798"))  # the same names in another order
    refused(f"transfer_init.py {other} --dataset digits", "other.pt", "class 8", "'9'", "'8'")
    script("--src other.pt --dataset digits")  # a fresh one may learn any


# ------------------------------------------------------------------------ weights from elsewhere
def save_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_safetensors(content, path):
    pytest.importorskip("safetensors.torch").save_file(content, path)


OPTIMIZER = dict(
    state={0: dict(momentum_buffer=torch.ones(1))},
    param_groups=[dict(lr=0.1)])
# of old PyTorch, which kept no counters; the head is another task's
BACKBONE = {
    name: value for name, value in state().items()
    if "num_batches" not in name and "fc." not in name}
HEADS = {"conv_head.bias": torch.ones(4), "backbone.body.head.bias": torch.ones(4)}
READ = {  # how people have a ResNet's weights: content, and who writes it
    "half": ({name: value.half() for name, value in state().items()}, torch.save),
    "compiled DDP": (prefixed("_orig_mod.module."), torch.save),
    "timm": (dict(arch="resnet18", state_dict=state(), optimizer=OPTIMIZER), torch.save),
    "detector": (prefixed("backbone.body.") | HEADS, torch.save),
    "backbone": (BACKBONE, torch.save),
    "legacy": (dict(epoch=90, state_dict=prefixed("module.")), save_legacy),
    "safetensors": (prefixed("model."), save_safetensors),
}


@pytest.mark.parametrize("name", READ)
def test_weights_as_people_have_them(script, name):
    content, save = READ[name]
    path = "w.safetensors" if name == "safetensors" else "w.pth"
    save(content, path)
    made, out = script(f"--src {path} --dataset cifar10")
    for name in ("layer4.1.conv2.weight", "layer4.1.bn2.running_var"):
        assert torch.equal(made["model"][name], state()[name])
    assert made["arch"]["stem"] == "3x3" and made["arch"]["num_classes"] == 10
    # not trained on these data, it cannot teach: who runs the next stage is told
    assert made["parents"]["source"]["path"] == path
    *_, remark, command = out.splitlines()
    assert "--teacher" in remark
    assert command == "next: python train_idsnn.py --init snn_init.pt --no-kd"


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_network_is_told_by_its_tensors(depth, tmp_path):
    arch = dict(depth=depth, num_classes=7, in_channels=1, width=1, stem="7x7")
    path = str(tmp_path / "w.pth")
    torch.save(state(**arch), path)
    assert transfer_init.load_source(path)["arch"] == arch


def test_a_foreign_classifier(script, refused):
    torch.save(state(), "w.pth")
    _, out = script("--src w.pth --dataset digits --classifier transfer")
    # the file does not name its classes: what is taken for granted is said
    line, = [line for line in out.splitlines() if "names no classes" in line]
    assert "w.pth" in line and "0, 1, 2 ..." in line
    assert "names no classes" not in script("--src w.pth --dataset digits")[1]
    assert "names no classes" not in script("--src r34.pt --classifier transfer")[1]
    # where the file names no data
    refused("transfer_init.py --src w.pth --classifier transfer",
            "--classifier", "w.pth", "10 classes", "cifar100", "100")


# ------------------------------------------------------------------------- weights that do not fit
REFUSED = {  # a ResNet-18's tensors with other values, or without some; words of the refusal
    "ResNeXt": (
        {"layer1.0.conv2.weight": torch.ones(2, 1, 3, 3)},
        ["ResNet-18", "layer1.0.conv2.weight", "[2, 1, 3, 3]", "[2, 2, 3, 3]"]),
    "SE": (
        {"layer1.0.se.fc1.bias": torch.ones(2)}, ["layer1.0.se.fc1.bias"]),
    "depth": (
        {"layer3.1.conv1.weight": None}, ["17 layers"]),
    "no stem": (
        {"conv1.weight": None}, ["first kernels"]),
    "no channels": (
        {"conv1.weight": torch.ones(2, 0, 3, 3)}, ["first kernels"]),
    "shortcut": (
        {"layer2.0.downsample.0.weight": None}, ["layer2.0.downsample.0.weight"]),
    "NaN": (
        {"layer3.1.bn1.bias": torch.full((8,), math.nan)}, ["layer3.1.bn1.bias"]),
    "infinity": (
        {"fc.bias": torch.full((10,), math.inf)}, ["fc.bias", "finite"]),
    "variance": (
        {"bn1.running_var": torch.tensor([0.1, -0.1])}, ["bn1.running_var"]),
    "integers": (
        {"bn1.weight": torch.ones(2, dtype=torch.int8)}, ["ResNet-18"]),
    "scalar": (
        {"fc.weight": torch.ones(())}, ["ResNet-18"]),
    "averaged": (
        prefixed("ema."), ["2 ResNets", "ema.layer1.0.conv1.weight"]),
    "another": (
        {"layer1.0.conv1.weight": None}, ["0 ResNets", "bn1.weight", "torchvision's"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(refused, name):
    changes, words = REFUSED[name]
    weights = state() | changes
    torch.save({k: v for k, v in weights.items() if v is not None}, "w.pth")
    refused("transfer_init.py --src w.pth", "w.pth", *words)


def test_files_that_are_no_weights(refused):
    """What holds for every checkpoint is in test_errors."""
    torch.save(ResNet(18, 10, width=1), "w.pth")
    refused("transfer_init.py --src w.pth", "w.pth", "train_teacher.ResNet")
    torch.jit.script(torch.nn.ReLU()).save("w.pth")
    refused("transfer_init.py --src w.pth", "w.pth", "TorchScript")


def test_safetensors_that_cannot_be_read(refused, monkeypatch):
    words = ["w.safetensors cannot be read by the package safetensors"]
    Path("w.safetensors").write_bytes(b"damaged")
    refused("transfer_init.py --src w.safetensors", *words)
    # without the package its name is said
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as Python marks what is not there
    monkeypatch.delitem(sys.modules, "safetensors.torch", raising=False)
    refused("transfer_init.py --src w.safetensors", *words)
