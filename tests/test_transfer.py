"""Stage 2: the transfer by hand, the Spiking ResNet, weights from elsewhere, edited neurons."""
import importlib
import re
from dataclasses import make_dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import call
from torch import nn

import transfer_init
from kernels import lif
from kernels.lif import lif_reference
from train_teacher import ResNet, load_checkpoint
from transfer_init import BatchNormLIF, Neuron, SpikingResNet, loop, source_block, transfer


def state(**kind):
    """A ResNet's weights, every number random, so that no equality is an accident."""
    kind = dict(depth=18, num_classes=10, width=2) | kind
    g = torch.Generator().manual_seed(0)
    return {name: torch.rand(value.shape, generator=g)
            for name, value in ResNet(**kind).state_dict().items()}


def made(flags):
    """The checkpoint that the script makes."""
    call(f"transfer_init.py {flags}")
    return load_checkpoint("snn_init.pt", "init")


# ---------------------------------------------------------------------------------------- transfer
def test_loop_interpolation_by_hand():
    vector = torch.tensor([1.0, 2, 3])
    assert loop(vector, (7,)).tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert loop(vector, (2,)).tolist() == [1, 2]
    # three channels from two
    kernel = torch.tensor([[10.0, 11], [20, 21], [30, 31]])[..., None, None]
    assert loop(kernel, (4, 3, 1, 1)).squeeze().tolist() == [
        [10, 11, 10], [20, 21, 20], [30, 31, 30], [10, 11, 10]]


@pytest.mark.parametrize("m,n,spread,first", [
    (2, 6, [0, 5], [0, 1]),  # ResNet-34 to 18: first to first, last to last
    (6, 2, [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]),
    (4, 8, [0, 2, 5, 7], [0, 1, 2, 3]),
    (1, 5, [0], [0]),
])
def test_block_maps_by_hand(m, n, spread, first):
    assert [source_block(j, m, n, "spread") for j in range(m)] == spread
    assert [source_block(j, m, n, "first") for j in range(m)] == first


@pytest.mark.parametrize("teacher,student,flags,blocks,fresh", [
    # narrower and shallower; a stem of another kernel size stays fresh with its batch norm
    (dict(depth=34, width=3, stem="7x7"), dict(), dict(),
     ["02", "03", "05", "02"], r"(fc|conv1|bn1)\..*"),
    (dict(depth=34, width=1), dict(), dict(block_map="first"), ["01"] * 4, r"fc\..*"),
    # wider and deeper, for other images, with the classifier, without the shortcuts
    (dict(depth=18, in_channels=2), dict(depth=34, width=5, in_channels=4, block="sew"),
     dict(shortcut="fresh", classifier="transfer"),
     ["011", "0011", "000111", "011"], r".*\.downsample\..*"),
    (dict(depth=101, width=1), dict(depth=50), dict(),
     ["012", "0123", [0, 4, 9, 13, 18, 22], "012"], r"fc\..*"),
    # between equals: a copy
    (dict(), dict(), dict(classifier="transfer"), ["01"] * 4, "nothing"),
])
def test_every_layer_is_filled_as_asked(teacher, student, flags, blocks, fresh):
    """blocks: for each stage, which of the teacher's blocks fills block 0, 1, ..."""
    student = dict(depth=18, width=2, num_classes=10) | student
    source, net = state(**teacher), SpikingResNet(**student)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    rows = {layer: (origin, how) for layer, origin, how in transfer(net, source, **flags)}
    assert rows.keys() == {name.rpartition(".")[0] for name in before}
    for name, value in net.state_dict().items():
        layer, _, part = name.rpartition(".")
        if part == "num_batches_tracked":
            continue
        if re.fullmatch(fresh, name):
            assert rows[layer] == ("", "fresh") and torch.equal(value, before[name])
            continue
        origin = layer
        if name.startswith("layer"):
            stage, j, rest = layer.split(".", 2)
            origin = f"{stage}.{blocks[int(stage[-1]) - 1][int(j)]}.{rest}"
        given = source[f"{origin}.{part}"]
        # target[i, j] = source[i % C_out, j % C_in]
        expected = given[[i % len(given) for i in range(len(value))]]
        if value.dim() > 1:
            expected = expected[:, [j % given.shape[1] for j in range(value.shape[1])]]
        assert torch.equal(value, expected), name
        assert rows[layer][0] == origin and ("copied" in rows[layer][1]) == (teacher == {})


# --------------------------------------------------------------------------------- spiking network
def lively(net):
    """Batch norms as after training, so that neurons fire now and then; fp64, where no rounding
    flips a spike."""
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.3, 0.3)
            nn.init.uniform_(m.running_var, 0.05, 0.15)
            nn.init.uniform_(m.bias, -0.1, 0.5)
    return net.double().eval()


def test_the_neurons_constants_reach_it():
    bn = BatchNormLIF(2, Neuron(T=3, decay=0.6, v_th=0.4, lens=0.3, detach_reset=False))
    torch.manual_seed(0)
    x = torch.randn(3 * 4, 2, 5, 5, requires_grad=True)  # (T*B, C, H, W)
    g = torch.randn(x.shape)
    currents = F.batch_norm(x, None, None, training=True).unflatten(0, (3, 4))
    expected = lif_reference(currents, 0.6, 0.4, 0.3, False).flatten(0, 1)
    assert torch.equal(bn(x), expected)
    for found, true in zip(*(torch.autograd.grad(y, x, g) for y in (bn(x), expected))):
        torch.testing.assert_close(found, true)


@torch.no_grad()
def test_a_sew_block_adds_spikes_to_spikes():
    """Figure 1c, with neurons on a downsampling shortcut, too. (Others: test_eval, by NIR.)"""
    net = lively(SpikingResNet(18, width=4, T=3, block="sew", decay=0.6, v_th=0.4))
    block, x = net.layer2[0], (torch.rand(3 * 2, 4, 8, 8) < 0.5).double()  # (T*B, C, H, W)

    def fire(conv, bn, x):
        x = F.batch_norm(conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias)
        return lif_reference(x.unflatten(0, (3, 2)), 0.6, 0.4).flatten(0, 1)

    spikes = fire(block.conv2, block.bn2, fire(block.conv1, block.bn1, x))
    sums = spikes + fire(*block.downsample, x)
    assert torch.equal(block(x), sums) and set(sums.unique().tolist()) == {0, 1, 2}


@pytest.mark.parametrize("training", [False, True])
def test_direct_encoding_is_the_same_image_at_every_step(training):
    net = lively(SpikingResNet(num_classes=7, width=2, T=3, stem="7x7")).train(training)
    x = torch.randn(2, 3, 16, 16).double()
    scores = net(x)
    assert scores.shape == (3, 2, 7) and not torch.equal(scores[0], scores[1])
    torch.testing.assert_close(scores, net(x.expand(3, -1, -1, -1, -1)), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="2 time-steps, where neuron.T is 3"):
        net(torch.ones(2, 3, 3, 8, 8).double())  # the batch comes first


def test_a_poisson_spike_has_probability_pixel_over_255():
    net = SpikingResNet(width=2, encoder="poisson", T=16)
    pixels = torch.tensor([0, 1, 51, 128, 254, 255], dtype=torch.uint8)
    x = pixels.view(6, 1, 1, 1).expand(-1, -1, 40, 40)
    spikes = [torch.manual_seed(seed) and net.encode(x, None) for seed in (3, 3, 4)]
    assert torch.equal(spikes[0], spikes[1]) and not torch.equal(spikes[0], spikes[2])
    assert spikes[0].shape == (16, 6, 1, 40, 40) and set(spikes[0].unique().tolist()) == {0, 1}
    rates = spikes[0].mean((0, 2, 3, 4)).tolist()
    assert rates == pytest.approx((pixels / 255).tolist(), abs=0.01)
    assert rates[0] == 0 and rates[-1] == 1  # black never fires, white always


def test_the_student_is_like_the_teacher_and_flags_override(here, capsys):
    teacher = load_checkpoint("r34.pt", "teacher")
    init, other = made("--src r34.pt"), made("--src r34.pt --seed 1")
    assert init.keys() == {
        "stage", "arch", "model", "config", "data", "history", "parents", "torch"}
    assert init["arch"] == dict(
        depth=18, num_classes=10, in_channels=1, width=teacher["arch"]["width"], stem="3x3",
        block="basic", encoder="direct", T=4, decay=0.25, v_th=0.5, lens=0.5, detach_reset=True)
    assert init["data"] == teacher["data"] and init["history"] == []
    assert init["parents"] == dict(teacher="r34.pt") and init["config"]["src"] == "r34.pt"
    # the seed decides only what stays fresh
    differs = [k for k, value in init["model"].items() if not torch.equal(value, other["model"][k])]
    assert differs == ["fc.weight", "fc.bias"]
    out = capsys.readouterr().out
    assert re.search(r"^layer3.1.conv2 +layer3.5.conv2 +copied$", out, re.M)
    assert out.endswith("python train_idsnn.py --init snn_init.pt\n")
    arch = dict(init["arch"], depth=34, width=5, block="sew", encoder="poisson", T=6, decay=0.5,
                v_th=1.0, lens=0.25, detach_reset=False)
    init = made("--src r34.pt --depth 34 --width 5 --block sew --encoder poisson --T 6 --decay 0.5 "
                "--v-th 1 --lens 0.25 --no-detach-reset --block-map first --shortcut fresh "
                "--classifier transfer")
    assert init["arch"] == arch
    torch.manual_seed(0)  # the default of --seed
    expected = SpikingResNet(**arch)
    transfer(expected, teacher["model"], "first", "fresh", "transfer")
    assert all(torch.equal(w, init["model"][name]) for name, w in expected.state_dict().items())


# -------------------------------------------------------------------------- weights from elsewhere
@pytest.mark.parametrize("kind,depth", [
    ("plain", 50), ("module", 34), ("state_dict", 34), ("safetensors", 34)])
def test_weights_as_people_have_them(here, kind, depth):
    arch = dict(depth=depth, num_classes=10, in_channels=3, width=2, stem="7x7")
    weights, path = state(**arch), "w.pth"
    if kind == "safetensors":
        path = "w.safetensors"
        pytest.importorskip("safetensors.torch").save_file(weights, path)
    else:
        module = {f"module.{name}": value for name, value in weights.items()}
        state_dict = dict(epoch=90, state_dict=weights)
        torch.save(dict(plain=weights, module=module, state_dict=state_dict)[kind], path)
    assert transfer_init.load_source(path)["arch"] == arch  # told by the tensors
    with pytest.raises(SystemExit, match="--dataset"):  # the file does not say what it learned
        made(f"--src {path} --depth {depth}")
    init = made(f"--src {path} --depth {depth} --dataset digits --classifier transfer")
    for name in ("layer4.2.conv2.weight", "layer4.2.bn2.running_var", "fc.weight"):
        assert torch.equal(init["model"][name], weights[name])
    assert init["arch"].items() >= dict(in_channels=1, width=2, stem="3x3").items()
    assert init["parents"] == {}  # not trained on these data, it cannot teach


def test_what_does_not_fit_is_refused(here):
    def refused(error, says, weights, flags=""):
        torch.save(weights, "w.pth")
        with pytest.raises(error, match=says):
            made(f"--src w.pth --dataset digits {flags}")

    refused(SystemExit, "w.pth: no ResNet", {"features.0.weight": torch.ones(2)})
    lacking = state()
    del lacking["layer2.0.downsample.1.running_var"]
    refused(RuntimeError, "layer2.0.downsample.1.running_var", lacking)
    with pytest.raises(KeyError, match="layer2.0.downsample.1.running_var"):
        transfer(SpikingResNet(34, 10, width=2), lacking)
    # 1x1 kernels would fill 3x3 ones without a word, nine times each
    with pytest.raises(ValueError, match="layer1.0.conv1.weight.*2x2x1x1"):
        transfer(SpikingResNet(18, 10, width=2), state(depth=50))
    refused(SystemExit, "--depth 50", state(), "--depth 50")
    # a classifier serves only its own classes, in their order; a fresh one may learn any
    refused((SystemExit, ValueError), "7", state(num_classes=7), "--classifier transfer")
    teacher = load_checkpoint("r34.pt", "teacher")
    swapped = dict(data=teacher["data"] | dict(classes=list("0123456798")))
    refused(SystemExit, "w.pth: other classes", teacher | swapped, "--classifier transfer")
    made("--src w.pth --dataset digits")


# ------------------------------------------------------------------------------------------- forks
def test_a_field_added_to_the_neuron_has_its_default_in_old_checkpoints(monkeypatch):
    old = dict(depth=18, T=8, decay=0.5)
    monkeypatch.setattr(transfer_init, "Neuron", make_dataclass(
        "Neuron", [("gain", float, 2.0)], bases=(Neuron,)))
    assert transfer_init.neuron_of(old) == dict(
        T=8, decay=0.5, v_th=0.5, lens=0.5, detach_reset=True, gain=2.0)
    assert SpikingResNet(width=2, **old).neuron.gain == 2


def test_an_edited_specification_takes_effect_at_once(monkeypatch):
    def without_leak(x, decay, *neuron):
        return lif_reference(x, 1.0, *neuron)

    # 0.3 and a quarter of that stay below 0.5; 0.3 and 0.3 do not
    x, image = torch.tensor([0.3, 0.3]), torch.rand(1, 3, 8, 8).double()
    net = lively(SpikingResNet(width=2))
    spikes, scores = lif(x), net(image)
    monkeypatch.setattr(importlib.import_module("kernels.lif"), "lif_reference", without_leak)
    assert spikes.tolist() == [0, 0] and lif(x).tolist() == [0, 1]
    assert not torch.equal(net(image), scores)


@pytest.mark.parametrize("block,layers", [("basic", 17), ("sew", 20)])
def test_every_parameter_learns_and_so_can_a_decay_of_each_layer(monkeypatch, block, layers):
    class Learning(BatchNormLIF):
        def __init__(self, channels, neuron):
            super().__init__(channels, replace(neuron))  # no longer shared
            self.decay = self.neuron.decay = nn.Parameter(torch.tensor(neuron.decay))

    monkeypatch.setattr(transfer_init, "BatchNormLIF", Learning)
    torch.manual_seed(0)
    net = SpikingResNet(num_classes=10, width=4, block=block, v_th=0.7)
    assert all((m.weight == 0.7).all() for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    transfer(net, ResNet(18, 10, width=4).state_dict())  # knows no decay, and leaves it
    net(torch.randn(4, 3, 16, 16)).mean(0).square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name
    assert sum(name.endswith("decay") for name, _ in net.named_parameters()) == layers
