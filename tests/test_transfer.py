"""Stage 2: the Spiking ResNet and its initialisation from the teacher."""
import random

import pytest
import torch
import torch.nn.functional as F

import train_teacher
import transfer_init
from kernels.lif import lif_reference
from train_teacher import DEPTHS, ResNet, load_checkpoint
from transfer_init import SpikingResNet, loop, source_block, transfer


def randomised(net, seed=0):
    """Every tensor of a network random, so that no equality is an accident."""
    g = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=g) + 0.1)
    return net


# ------------------------------------------------------------------------------------------------ loop
def test_loop_interpolation_by_hand():
    vector = torch.tensor([1.0, 2, 3])
    assert loop(vector, (7,)).tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert loop(vector, (2,)).tolist() == [1, 2]
    kernel = torch.tensor([[10.0, 11], [20, 21], [30, 31]])[..., None, None]  # 3 output, 2 input channels
    assert loop(kernel, (4, 3, 1, 1)).squeeze().tolist() == [[10, 11, 10], [20, 21, 20], [30, 31, 30], [10, 11, 10]]
    assert loop(kernel, (2, 1, 1, 1)).squeeze().tolist() == [10, 20]


def test_block_maps():
    spread = lambda m, n: [source_block(j, m, n, "spread") for j in range(m)]
    first = lambda m, n: [source_block(j, m, n, "first") for j in range(m)]
    assert spread(2, 3) == [0, 2] and spread(2, 6) == [0, 5]      # ResNet-34 to 18: first to first, last to last
    assert spread(6, 2) == [0, 0, 0, 1, 1, 1]                     # and back
    assert spread(3, 3) == [0, 1, 2] and spread(4, 8) == [0, 2, 5, 7]
    assert first(2, 6) == [0, 1] and first(6, 2) == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("seed", range(12))
def test_transfer_between_random_networks_is_the_index_formula(seed):
    r = random.Random(seed)
    basic = r.random() < 0.7
    depths = [18, 34] if basic else [50, 101]
    teacher_kind = dict(depth=r.choice(depths), width=r.randint(1, 6), num_classes=r.randint(2, 9), in_channels=r.choice([1, 3]), stem=r.choice(["3x3", "7x7"]))
    student_kind = dict(depth=r.choice(depths), width=r.randint(1, 6), num_classes=r.randint(2, 9), in_channels=r.choice([1, 3]), stem=r.choice(["3x3", "7x7"]),
                        block=r.choice(["basic", "sew"]))
    block_map, shortcut = r.choice(["spread", "first"]), r.choice(["transfer", "fresh"])
    teacher, student = randomised(ResNet(**teacher_kind), 1), randomised(SpikingResNet(**student_kind), 2)
    source, before = ({k: v.clone() for k, v in net.state_dict().items()} for net in (teacher, student))
    rows = {layer: how for layer, _, how in transfer(student, teacher.state_dict(), block_map, shortcut)}

    assert all(torch.equal(v, source[k]) for k, v in teacher.state_dict().items())  # the teacher is untouched
    n, m = (DEPTHS[kind["depth"]][1] for kind in (teacher_kind, student_kind))
    for name, tensor in student.state_dict().items():
        layer = name.rpartition(".")[0]
        assert layer in rows, f"{name} is not in the table"
        stem_differs = teacher_kind["stem"] != student_kind["stem"] and name.split(".")[0] in ("conv1", "bn1")
        if name.startswith("fc.") or stem_differs or (shortcut == "fresh" and "downsample" in name):
            assert torch.equal(tensor, before[name]) and rows[layer] == "fresh"
            continue
        origin = name
        if name.startswith("layer"):
            stage, j, rest = name.split(".", 2)
            s = int(stage[5:]) - 1
            k = min(int(j), n[s] - 1) if block_map == "first" else int(int(j) * (n[s] - 1) / (m[s] - 1) + 0.5)
            origin = f"{stage}.{k}.{rest}"
        value = source[origin]
        if tensor.dim() == 4:
            for i in range(tensor.shape[0]):
                for j in range(tensor.shape[1]):
                    assert torch.equal(tensor[i, j], value[i % value.shape[0], j % value.shape[1]])
        elif tensor.dim() == 1:
            assert tensor.tolist() == [value[i % len(value)] for i in range(len(tensor))]
        if tensor.dim():
            assert rows[layer].startswith("copied" if value.shape == tensor.shape else "looped")


def test_other_block_kinds_and_missing_tensors_are_errors():
    with pytest.raises(ValueError, match="bottleneck"):
        transfer(SpikingResNet(18, width=2), ResNet(50, width=2).state_dict())
    source = ResNet(18, width=2).state_dict()
    del source["layer2.0.bn1.running_mean"]
    with pytest.raises(KeyError, match="layer2.0.bn1.running_mean"):
        transfer(SpikingResNet(18, width=2), source)


# ------------------------------------------------------------------------------------- spiking network
def forward_step_by_step(net, x, T):
    """An independent forward pass in evaluation mode: time in a Python loop, one convolution per step, textbook batch norm."""
    n = net.neuron
    def bn(m, v): return F.batch_norm(v, m.running_mean, m.running_var, m.weight, m.bias, eps=m.eps)
    def spike(currents): return list(lif_reference(torch.stack(currents), n.decay, n.v_th, n.lens).unbind(0))
    xs = spike([bn(net.bn1, net.conv1(v)) for v in ([x] * T if x.dim() == 4 else x.unbind(0))])
    xs = [net.maxpool(v) for v in xs]
    for block in (b for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for b in stage):
        sew, pairs = "SEW" in type(block).__name__, [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        pairs += [(block.conv3, block.bn3)] if hasattr(block, "conv3") else []
        down = block.downsample
        if isinstance(down, torch.nn.Sequential):
            shortcut = [bn(down[1], down[0](v)) for v in xs]
            shortcut = spike(shortcut) if sew else shortcut
        else:
            shortcut = xs
        for conv, norm in pairs[:-1]:
            xs = spike([bn(norm, conv(v)) for v in xs])
        conv, norm = pairs[-1]
        currents = [bn(norm, conv(v)) for v in xs]
        xs = [s + r for s, r in zip(spike(currents), shortcut)] if sew else spike([c + r for c, r in zip(currents, shortcut)])
    return torch.stack([net.fc(v.mean((2, 3))) for v in xs])


@pytest.mark.parametrize("kind", [dict(depth=18), dict(depth=18, block="sew"), dict(depth=50), dict(depth=50, block="sew"), dict(depth=18, stem="7x7")],
                         ids=lambda kind: " ".join(map(str, kind.values())))
@pytest.mark.parametrize("T", [1, 3])
def test_forward_is_figure_1_step_by_step(kind, T):
    torch.manual_seed(0)
    net = SpikingResNet(width=4, num_classes=7, T=T, **kind).double()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):  # statistics that make neurons fire now and then
            torch.nn.init.uniform_(m.running_mean, -0.3, 0.3), torch.nn.init.uniform_(m.running_var, 0.2, 0.6), torch.nn.init.uniform_(m.bias, -0.1, 0.5)
    net.eval()
    for x in (torch.randn(2, 3, 16, 16), (torch.rand(T, 2, 3, 16, 16) < 0.5)):
        with torch.no_grad():
            scores = net(x.double())
            assert scores.shape == (T, 2, 7) and scores.std() > 0
            assert torch.allclose(scores, forward_step_by_step(net, x.double(), T), rtol=1e-9, atol=1e-9)


def test_time_steps_change_at_will_and_are_causal():
    torch.manual_seed(0)
    net, x = SpikingResNet(width=4, num_classes=5, T=6).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        long = net(x)
        net.neuron.T = 2
        assert torch.equal(net(x), long[:2])  # stateless: no reset to forget, no trace of the longer call


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    for block in ("basic", "sew"):
        net = SpikingResNet(width=4, num_classes=5, block=block)
        net(torch.randn(4, 3, 16, 16)).mean(0).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_batch_norm_takes_statistics_over_time():
    torch.manual_seed(0)
    net = SpikingResNet(width=2, T=3)
    inputs = {}
    net.layer1[0].bn1.register_forward_hook(lambda m, i, o: inputs.update(x=i[0].detach()))
    net(torch.randn(5, 3, 8, 8))
    x, m = inputs["x"], net.layer1[0].bn1
    assert x.shape[0] == 3 * 5
    assert torch.allclose(m.running_mean, 0.1 * x.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(m.running_var, 0.9 + 0.1 * x.var((0, 2, 3), correction=1), atol=1e-6)


def test_fresh_network_is_the_authors_baseline():
    net = SpikingResNet(width=2, v_th=0.7)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 20 and all((m.weight == 0.7).all() for m in norms)


def test_poisson_encoder():
    net = SpikingResNet(width=2, encoder="poisson", T=32)
    data = type("Data", (), {"offset": torch.zeros(1)})
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 30, 30)
    spikes = net.encode(x, data, seed=3)
    assert spikes.shape == (32, 3, 1, 30, 30) and set(spikes.unique().tolist()) == {0, 1}
    assert spikes.mean((0, 2, 3, 4)).tolist() == pytest.approx([0, 0.2, 1], abs=0.01)  # black never, white always fires
    assert torch.equal(spikes, net.encode(x, data, seed=3)) and not torch.equal(spikes, net.encode(x, data, seed=4))
    assert torch.equal(net.encode(x, data, seed=3, world=2, rank=0), net.encode(x.repeat(2, 1, 1, 1), data, seed=3)[:, :3])


# ---------------------------------------------------------------------------------------- command line
def test_torchvisions_weights_as_source(tmp_path, monkeypatch, capsys):
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    source = torchvision.models.resnet34().state_dict()
    torch.save(source, "resnet34.pth")
    transfer_init.main(["--src", "resnet34.pth"])
    out = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line.split()[-1] for line in out if line and line.split()[0].count(".") < 5}
    assert table["conv1"] == table["bn1"] == table["fc"] == "fresh" and table["layer1.0.conv1"] == "copied"
    made = load_checkpoint("snn_init.pt", "init")
    assert made["config"]["dataset"] == "cifar100" and made["arch"]["num_classes"] == 100 and made["arch"]["stem"] == "3x3"
    assert torch.equal(made["model"]["layer3.1.conv2.weight"], source["layer3.5.conv2.weight"])
    with pytest.raises(SystemExit) as end:  # a classifier of 1000 other classes is of no use
        transfer_init.main(["--src", "resnet34.pth", "--classifier", "transfer", "--fresh"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and "--classifier" in error and "1000" in error and "100" in error
    assert sum(name in made["model"] for name in source) and all(line.startswith(tuple(table)) for line in out[1:-1])


def test_student_inherits_and_flags_override(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_teacher.main(["--dataset", "digits", "--width", "2", "--epochs", "1", "--depth", "18"])
    transfer_init.main(["--src", "r34.pt"])
    made = load_checkpoint("snn_init.pt", "init")
    assert made["arch"] | dict(T=4, width=2, num_classes=10, in_channels=1, depth=18, decay=0.25, v_th=0.5, lens=0.5, detach_reset=True) == made["arch"]
    assert made["config"]["dataset"] == "digits" and made["provenance"]["parents"]["teacher"]["path"] == "r34.pt"
    teacher = load_checkpoint("r34.pt")["model"]
    for width in (2, 5):
        transfer_init.main(["--src", "r34.pt", "--out", "fc.pt", "--classifier", "transfer", "--width", str(width), "--fresh"])
        fc = load_checkpoint("fc.pt")["model"]
        assert torch.equal(fc["fc.weight"], teacher["fc.weight"][:, torch.arange(8 * width) % 16]) and torch.equal(fc["fc.bias"], teacher["fc.bias"])
    assert not torch.equal(made["model"]["fc.weight"], teacher["fc.weight"])
    transfer_init.main(["--src", "r34.pt", "--out", "wide.pt", "--width", "5", "--T", "6", "--v-th", "1", "--block", "sew", "--depth", "34", "--no-detach-reset"])
    wide = load_checkpoint("wide.pt", "init")["arch"]
    assert (wide["width"], wide["T"], wide["v_th"], wide["block"], wide["depth"], wide["detach_reset"]) == (5, 6, 1.0, "sew", 34, False)


def test_what_stays_fresh_starts_from_pytorchs_default():
    torch.manual_seed(0)
    student = SpikingResNet(18, num_classes=4)
    weight = student.layer2[0].conv2.weight  # Kaiming uniform with a = sqrt(5): uniform within 1/sqrt(fan-in)
    bound = (weight.shape[1] * 9) ** -0.5
    assert bound * 0.99 < weight.abs().max() <= bound and abs(weight.std() / (bound / 3 ** 0.5) - 1) < 0.01
    assert torch.equal(student.layer2[0].bn2.weight, torch.full((128,), 0.5))


def test_the_teacher_starts_from_kaiming():
    torch.manual_seed(0)
    weight = train_teacher.kaiming_(train_teacher.ResNet(18)).layer2[0].conv2.weight
    assert abs(weight.std() / (2 / (128 * 9)) ** 0.5 - 1) < 0.01
