"""Stage 4: accuracy over time and operations by hand, comparison, predictions, NIR."""
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import call
from PIL import Image
from test_idsnn import edited
from test_transfer import lively
from torch import nn

import eval as stage4
from train_teacher import load_checkpoint, load_data
from transfer_init import BatchNormLIF, Neuron, SpikingResNet


def evaluated(command):
    """evaluated("idsnn.pt --T 2") -> what --json holds."""
    call(f"eval.py --device cpu --precision fp64 --json out.json {command}")
    return json.loads(Path("out.json").read_text())


@torch.no_grad()
def digits_and_scores(T, images):
    """The digits, and the scores (T, B, K) of idsnn.pt for some of their images (N, H, W, C)."""
    checkpoint = load_checkpoint("idsnn.pt", "idsnn")
    data = load_data("digits", "data").to("cpu", torch.float64, torch.contiguous_format)
    model = SpikingResNet(**checkpoint["arch"] | dict(T=T))
    model.load_state_dict(checkpoint["model"])
    return data, model.double().eval()(data.normalize(images.permute(0, 3, 1, 2)))


@pytest.mark.parametrize("flags,steps", [("", [1, 2, 3, 4]), ("--T 7 2 --batch-size 77", [2, 7])])
def test_accuracy_after_each_step_by_hand(here, flags, steps):
    """The answer is the mean over the steps so far, also after more of them than in training."""
    run, = evaluated(flags)["runs"]  # of idsnn.pt
    data, scores = digits_and_scores(max(steps), load_data("digits", "data").test_x)
    assert [row["T"] for row in run["steps"]] == steps
    for row in run["steps"]:
        answer = scores[:row["T"]].mean(0)
        correct = (answer.argmax(1) == data.test_y).double().mean().item()
        assert row["accuracy"] == pytest.approx(100 * correct)
        assert row["loss"] == pytest.approx(F.cross_entropy(answer, data.test_y).item())
        # microjoules; only the stem multiplies, once, on 8x8 images
        assert row["uJ"] == pytest.approx(0.9 * row["10^6 AC"] + 4.6 * row["10^6 MAC"])
        assert row["10^6 MAC"] == pytest.approx(9 * 8 * 8 * run["arch"]["width"] / 1e6)
    if not flags:  # as training itself saw it, in fp32
        last = run["history"][-1]
        assert run["steps"][-1]["loss"] == pytest.approx(last["test_loss"], rel=2e-3)
        assert run["firing"] == pytest.approx(last["rates"], rel=1e-2)


# ----------------------------------------------------------------------------- operations, by hand
class Tiny(nn.Module):
    """conv 1x1 -> LIF -> conv 3x3 -> LIF -> mean over pixels -> linear, for images of 2x2."""

    def __init__(self):
        super().__init__()
        neuron = Neuron(T=2, decay=0.5, v_th=1.0)
        self.conv1, self.bn1 = nn.Conv2d(1, 1, 1, bias=False), BatchNormLIF(1, neuron)
        self.conv2 = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.layer4 = BatchNormLIF(2, neuron)
        self.fc = nn.Linear(2, 3)
        # statistics 0 and 1: the batch norms do nothing (torch 2.11 refuses an eps of 0)
        self.bn1.eps = self.layer4.eps = 1e-12
        nn.init.ones_(self.conv1.weight)
        nn.init.zeros_(self.conv2.weight)
        self.conv2.weight.data[0, 0, 1, 1] = 2  # channel 0 repeats each spike, 1 is silent

    def forward(self, x):
        static = x.dim() == 4  # else (T, B, C, H, W)
        x = self.bn1(self.conv1(x if static else x.flatten(0, 1)), static=static)
        return self.fc(self.layer4(self.conv2(x)).mean((2, 3)))


@torch.no_grad()
def counted(*batches):
    """-> accumulates and MACs in each of Tiny's two steps, and its MACs as an ANN."""
    model = Tiny().eval()
    counter = stage4.OperationCounter(model, 2)
    for x in batches:
        model(x)
    return *counter.totals.T.tolist(), counter.dense_macs


def test_operations_by_hand():
    # a current of 1.5 is above 1 in both steps; 0.7 only in the second, 0.7/2 + 0.7 = 1.05;
    # 0.3 in neither, 0.3 and 0.45
    a = torch.tensor([[1.5, 0.7], [1.5, 0.3]]).view(1, 1, 2, 2)
    b = torch.tensor([[1.5, 0.0], [0.7, 0.0]]).view(1, 1, 2, 2)
    acs, macs, dense_macs = counted(a, b)
    # conv1: 1*1*1 * 1*2*2 = 4 MACs on each of two images, once
    assert macs == [8, 0]
    # spikes in step 1: pixels 0 and 2 of a, 0 of b; in step 2: 0, 1 and 2 of a, 0 and 2 of b.
    # conv2: 1*3*3 * 2*2*2 = 72 MACs, of which each of 4 inputs has 18, half of them padding.
    # fc: each of the 3 and 5 spikes below the mean adds 3 weights
    assert acs == [3 * 18 + 3 * 3, 5 * 18 + 5 * 3]
    assert dense_macs == 2 * (4 + 72 + 2 * 3)

    # sums of spikes, as behind a SEW block; and what is none
    x = torch.tensor([[2.0, 2, 0, 0], [0, 0, 0, 2]]).view(2, 1, 1, 2, 2)  # (T, B, C, H, W)
    # conv1: each input has one connection, so 4 and 2 accumulates. behind it, a neuron fires where
    # a 2 is, twice and once: 18 connections in conv2, 3 in fc
    acs, macs, _ = counted(x)
    assert acs == [4 + 2 * (18 + 3), 2 + 18 + 3] and macs == [0, 0]
    for other in (-x, x / 4):
        assert counted(other)[1] == [4, 4]
    assert counted(torch.ones(1, 1, 2, 2))[1] == [4, 0]  # a white image is none, either


def test_comparison_by_hand():
    # the longer baseline is the better one: 35 at epoch 4. idsnn passes that at its epoch 2
    table = [  # accuracies; then epochs, last, best, at, to_base
        ("baseline", "SNN", "cifar100", [10, 30, 20], (3, 20, 30, 2, None)),
        ("baseline", "SNN", "cifar100", [10, 20, 30, 35], (4, 35, 35, 4, 4)),
        ("init+KD", "SNN", "cifar100", [20, 36, 34, 50], (4, 50, 50, 4, 2)),
        ("init", "SNN", "cifar100", [], (0, None, None, None, None)),
        ("init+KD", "SNN", "digits", [90], (1, 90, 90, 1, None)),
        ("init+KD", "wider SNN", "cifar100", [90], (1, 90, 90, 1, None))]
    runs = [dict(name="a", network=network, method=method, T=4, data=dict(name=data),
                 history=[dict(test_acc=accuracy) for accuracy in accuracies])
            for method, network, data, accuracies, _ in table]
    for row, (*_, expected) in zip(stage4.compare(runs), table, strict=True):
        assert tuple(row.values())[-5:] == expected


def test_checkpoints_of_every_stage_side_by_side(here, capsys):
    pytest.importorskip("matplotlib")
    config = load_checkpoint("idsnn.pt", "idsnn")["config"]
    for name, no_init, no_kd in (("base", True, True), ("kd", True, False), ("i", False, True)):
        edited("idsnn.pt", f"{name}.pt", config=config | dict(no_init=no_init, no_kd=no_kd))
    call("transfer_init.py --src r34.pt --width 4 --block sew --encoder poisson --out sew.pt")
    edited("sew.pt", "sew1.pt", config=load_checkpoint("sew.pt", "init")["config"] | dict(seed=1))
    capsys.readouterr()
    result = evaluated("r34.pt base.pt kd.pt i.pt idsnn.pt sew.pt sew.pt sew1.pt --T 1 2 "
                       "--batch-size 100 --plot fig.png")
    rows, steps = result["comparison"], [run["steps"] for run in result["runs"]]
    # as the paper names them
    assert [row["name"] for row in rows[:6]] == ["r34", "base", "kd", "i", "idsnn", "sew"]
    assert [row["method"] for row in rows[:5]] == ["ANN", "baseline", "KD", "init", "init+KD"]
    assert rows[0]["network"].startswith("ResNet-34/")
    assert rows[5]["network"] == "SNN-18/4 sew poisson"
    assert capsys.readouterr().out.count(" kd ") == 1 + 2  # among the runs, and after each T
    step, = steps[0]  # of the teacher
    assert step["10^6 AC"] == 0 and step["uJ"] == step["uJ as ANN"] > steps[4][1]["uJ"]
    # Poisson spikes are seeded, and no layer multiplies
    assert steps[5] == steps[6] != steps[7] and steps[5][1]["10^6 MAC"] == 0
    with Image.open("fig.png") as image:
        assert image.width > 1600  # pixels: two columns in print


def test_every_run_is_in_the_legend_under_its_name(here):
    """Matplotlib would leave out a name that begins with _, and set $b$ as a formula."""
    pytest.importorskip("matplotlib")
    shutil.copy("idsnn.pt", "_a$b$.pt")
    stage4.main(["_a$b$.pt", "--T", "1", "--plot", "fig.svg"])
    assert "<!-- init+KD: _a$b$ -->" in Path("fig.svg").read_text()


def test_predict(here):
    x = load_data("digits", "data").test_x[3:5]  # (N, H, W, C)
    for i in (0, 1):
        Image.fromarray(x[i, :, :, 0].numpy()).save(f"{i}.png")
    teacher, student = evaluated("r34.pt idsnn.pt --T 1 6 --predict 0.png 1.png")["runs"]
    data, scores = digits_and_scores(6, x)
    rows = iter(student["predictions"])
    for i in (0, 1):
        for T in (1, 6):
            probability, label = scores[:T, i].mean(0).softmax(0).max(0)
            assert next(rows) == {"image": f"{i}.png", "T": T, "class": data.classes[label],
                                  "probability": pytest.approx(probability.item())}
    assert [row["T"] for row in teacher["predictions"]] == [1, 1]  # a teacher answers at once


@pytest.mark.parametrize("command,says", [
    ("--json idsnn.pt", "would replace a checkpoint"),  # its FILE was forgotten
    ("idsnn.pt snn_init.pt --export x.nir", "one checkpoint"),
    ("r34.pt --export x.nir", "r34.pt is not"),
    ("other.pt", "other.pt: other classes")])
def test_mistakes_cost_a_line(here, capsys, command, says):
    data = load_checkpoint("idsnn.pt", "idsnn")["data"]
    edited("idsnn.pt", "other.pt", data=data | dict(classes=list("1023456789")))
    with pytest.raises(SystemExit) as end:
        call(f"eval.py --device cpu {command}")
    assert says in f"{end.value}\n{capsys.readouterr().err}"


# --------------------------------------------------------------------------------------------- NIR
def simulate(graph, x, dt):
    """The output of every node of a NIR graph, by the formulas of NIR's documentation and Euler's
    rule. x and all else: (T, B, ...)."""
    done = dict(input=x)

    def output(name):
        if name not in done:
            i = sum(output(source) for source, target in graph.edges if target == name)
            done[name] = compute(graph.nodes[name], i)
        return done[name]

    def compute(node, i):
        kind = type(node).__name__
        if kind in ("LIF", "IF"):
            r, threshold, reset = map(torch.tensor, (node.r, node.v_threshold, node.v_reset))
            v, spikes = torch.zeros_like(i[0]), []
            for i_t in i:
                slope = r * i_t
                if kind == "LIF":
                    slope = (torch.tensor(node.v_leak) - v + slope) / torch.tensor(node.tau)
                v = v + dt * slope
                spikes.append((v > threshold).double())
                v = torch.where(v > threshold, reset, v)
            return torch.stack(spikes)
        if kind in ("Conv2d", "Affine"):
            layer = [torch.tensor(node.weight), torch.tensor(node.bias)]
        steps = dict(  # of one time-step
            Conv2d=lambda i: F.conv2d(i, *layer, tuple(node.stride), tuple(node.padding)),
            AvgPool2d=lambda i: F.avg_pool2d(i, tuple(node.kernel_size)),
            Flatten=lambda i: i.flatten(node.start_dim, node.end_dim),
            Affine=lambda i: F.linear(i, *layer),
            Output=lambda i: i)
        return torch.stack([steps[kind](i_t) for i_t in i])

    output("output")
    return done


RGB = dict(shape=[3, 16, 16], mean=[0.5] * 3, std=[0.2] * 3)


def exported(path, **arch):
    """-> a network, its NIR graph read back, and inputs (T, B, C, H, W)."""
    nir = pytest.importorskip("nir")
    model = lively(SpikingResNet(**dict(num_classes=7, width=4, T=3) | arch))
    stage4.export(path, model, RGB)
    return model, nir.read(path), torch.randn(3, 2, 3, 16, 16).double()


@pytest.mark.parametrize("arch", [
    dict(decay=0.6), dict(block="sew", decay=0.0), dict(depth=50, width=2),
    dict(depth=50, width=2, block="sew"), dict(decay=1.0, v_th=0.3)])
@torch.no_grad()
def test_nir_makes_the_same_spikes(arch, tmp_path):
    model, graph, x = exported(tmp_path / "net.nir", **arch)
    ours = {}
    for name, module in model.named_modules():
        if isinstance(module, BatchNormLIF):
            module.register_forward_hook(
                lambda *args, name=name.replace(".", "_"): ours.update({name: args[-1]}))
    scores, theirs = model(x), simulate(graph, x, float(graph.metadata["dt"]))
    for name, spikes in ours.items():
        assert torch.equal(spikes, theirs[name].flatten(0, 1)), name
    # silence would prove nothing
    assert sum(0 < spikes.mean() < 1 for spikes in ours.values()) > 0.7 * len(ours)
    torch.testing.assert_close(scores, theirs["output"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("simulator", ["snntorch", "spikingjelly"])
@pytest.mark.parametrize("block", ["basic", "sew"])
@torch.no_grad()
def test_other_simulators_read_our_file(simulator, block, tmp_path):
    pytest.importorskip("nirtorch")
    pytest.importorskip(simulator)
    model, graph, x = exported(tmp_path / "net.nir", block=block)
    if simulator == "snntorch":
        from snntorch import import_nir
        network = import_nir.import_from_nir(graph)
    else:
        from spikingjelly.activation_based import nir_exchange
        network = nir_exchange.import_from_nir(graph, dt=stage4.NIR_DT)
    state = None
    for x_t, expected in zip(x.float(), model.float()(x.float())):
        scores, state = network.float()(x_t, state)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_the_exported_file_says_how_to_feed_it(here):
    nir = pytest.importorskip("nir")
    call("eval.py idsnn.pt --T 5 --device cpu --export idsnn.nir")
    notes, data = nir.read("idsnn.nir").metadata, load_checkpoint("idsnn.pt", "idsnn")["data"]
    assert (notes["input"], notes["T"]) == ("direct encoding", 5)
    assert [notes["mean"], notes["std"]] == [data["mean"], data["std"]]


@pytest.mark.parametrize("edit,says", [
    (lambda net: net.layer3[0].add_module("extra", nn.Linear(1, 1)), "layer3_0_extra is no part"),
    (lambda net: net.layer2[0].add_module("bn2", type("Mine", (BatchNormLIF,), {})(4, Neuron())),
     "layer2_0_bn2 is no part"),
    (lambda net: setattr(net, "maxpool", nn.MaxPool2d(3, 2, 1)), "max-pool")])
def test_nir_refuses_what_it_would_lose(tmp_path, edit, says):
    pytest.importorskip("nir")
    net = SpikingResNet(18, 7, 3, 2)
    edit(net)
    with pytest.raises(SystemExit, match=says):
        stage4.export(tmp_path / "x.nir", net.eval(), RGB)
    assert not list(tmp_path.iterdir())
