"""Stage 4: operations against numbers derived by hand, tables, figure, predictions, NIR."""
import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image
from test_errors import contents
from test_idsnn import edited
from test_teacher import make_folder
from torch import nn
from torch.nn import functional as F

import eval as stage4
from train_teacher import load_checkpoint, load_data
from transfer_init import BatchNormLIF, Neuron, SpikingResNet


@pytest.fixture
def evaluated(run):
    """evaluated("idsnn.pt --T 2") -> out, the screen, and what --json holds: runs, comparison."""
    def evaluated(command):
        result = run(f"eval.py --device cpu --precision fp32 --json out.json {command}")
        assert result.status == 0, result.err
        return SimpleNamespace(out=result.out, **json.loads(Path("out.json").read_text()))
    return evaluated


def accuracies(result):
    return [step["accuracy"] for step in result["steps"]]


def cells(text, name):
    """What stands right of `name` in each line that begins with it."""
    lines = [line.split() for line in text.splitlines()]
    return [line[1:] for line in lines if line[:1] == [name]]


# ----------------------------------------------------------------------------- operations, by hand
class Tiny(nn.Module):
    """conv 1x1 -> LIF -> conv 3x3 -> LIF -> mean over pixels -> linear, on 2x2 images.

    Threshold 1, decay 1/2.
    """

    def __init__(self, T=2):
        super().__init__()
        neuron = Neuron(T=T, decay=0.5, v_th=1.0)
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
        static = x.dim() == 4
        x = x if static else x.flatten(0, 1)
        x = self.bn1(self.conv1(x), static=static)
        return self.fc(self.layer4(self.conv2(x)).mean((2, 3)))


def counted(model, *batches, T):
    counter = stage4.OperationCounter(model, T)
    with torch.no_grad():
        for x in batches:
            model.eval()(x)
    return {layer["name"]: layer for layer in counter.read()}


def test_operations_by_hand():
    # a current of 1.5 is above 1 in both steps; 0.7 only in the second, 0.7/2 + 0.7 = 1.05;
    # 0.3 in neither, 0.3 and 0.45
    a = torch.tensor([[1.5, 0.7], [1.5, 0.3]]).view(1, 1, 2, 2)
    b = torch.tensor([[1.5, 0.0], [0.7, 0.0]]).view(1, 1, 2, 2)
    layers = counted(Tiny(), a, b, T=2)
    # spikes in step 1: pixels 0 and 2 of a, 0 of b; in step 2: 0, 1 and 2 of a, 0 and 2 of b.
    # of 4 neurons and 2 images: 3/8 and 5/8
    assert layers == dict(
        # 1*1*1 * 1*2*2 = 4 MACs on the image, once
        conv1=dict(name="conv1", dense_macs=4, macs=[4], acs=[]),
        # 1*3*3 * 2*2*2 = 72 MACs, of which 3/8 and 5/8
        conv2=dict(name="conv2", dense_macs=72, macs=[], acs=[27, 45]),
        # 2*3 = 6 MACs; each of the 3 and 5 spikes below the mean adds 3 weights, over 2 images
        fc=dict(name="fc", dense_macs=6, macs=[], acs=[4.5, 7.5]))

    # whole numbers below 0 are an image, too, at one step as well
    white_and_black = torch.tensor([[1.0, -1.0], [1.0, 1.0]]).view(1, 1, 2, 2)
    stem = counted(Tiny(T=1), white_and_black, T=1)["conv1"]
    assert stem == dict(name="conv1", dense_macs=4, macs=[4], acs=[])

    one, two = (stage4.energy(layers.values(), T) for T in (1, 2))
    assert (one["acs"], one["macs"]) == (31.5, 4)
    assert one["joules"] == pytest.approx((0.9 * 31.5 + 4.6 * 4) * 1e-12)
    assert (two["acs"], two["macs"]) == (31.5 + 52.5, 4)
    assert two["ann_joules"] == pytest.approx(4.6 * (4 + 72 + 6) * 1e-12)


def test_whole_numbers_of_an_image_are_no_spikes():
    assert counted(Tiny(), torch.ones(1, 1, 2, 2), T=2)["conv1"]["macs"] == [4]


def test_operations_on_spiking_input_by_hand():
    """Sums of two spikes, as behind a SEW block."""
    first, second = [2.0, 2, 0, 0], [0, 0, 0, 2]
    x = torch.tensor([first, second]).view(2, 1, 1, 2, 2)  # (T, B, C, H, W)
    conv1 = counted(Tiny(), x, T=2)["conv1"]
    # one connection for each of 4 inputs; two inputs of 2, then one
    assert conv1["acs"] == [4, 2] and conv1["macs"] == []


def test_multiplications_of_resnet18_on_cifar():
    # of the stem; of stage 1, four convolutions; of stages 2 to 4, each as many: the first
    # convolution from half the channels, three more, a 1x1 shortcut
    stem = 3 * 9 * 64 * 32**2
    first = 4 * 64 * 64 * 9 * 32**2
    later = (64 * 9 + 3 * 128 * 9 + 64) * 128 * 16**2
    expected = stem + first + 3 * later + 512 * 10
    assert expected == 555_422_720  # the 0.56 G of the literature
    layers = counted(SpikingResNet(18, 10, T=1), torch.rand(1, 3, 32, 32), T=1)
    assert sum(layer["dense_macs"] for layer in layers.values()) == expected


def test_a_spike_costs_its_share_of_the_multiplications(evaluated):
    r = evaluated("idsnn.pt").runs[0]
    # of stride 2; it reads the spikes of the block before
    layer, = [layer for layer in r["layers"] if layer["name"] == "layer2.0.conv1"]
    expected = 4 * r["firing"]["layer1.1.bn2"] * layer["dense_macs"]  # in four steps
    assert sum(layer["acs"]) == pytest.approx(expected)


# -------------------------------------------------------------------------------------- evaluation
def test_accuracy_is_what_training_recorded_and_shorter_runs_are_prefixes(evaluated):
    # idsnn.pt by default; in batches of training's own evaluation, so rounded likewise
    r = evaluated("--batch-size 256").runs[0]
    last = r["history"][-1]
    assert [step["T"] for step in r["steps"]] == [1, 2, 3, 4]
    assert r["steps"][3]["accuracy"] == last["test_acc"]
    assert r["steps"][3]["loss"] == pytest.approx(last["test_loss"], rel=1e-6)
    assert r["firing"] == pytest.approx(last["rates"], rel=1e-5)  # of training's own hooks

    # fp64: in fp32 other batches may round a potential across the threshold
    trained = evaluated("--precision fp64").runs[0]["steps"]
    longer = evaluated("--precision fp64 --T 1,3,8 --batch-size 77").runs[0]["steps"]
    assert [step["T"] for step in longer] == [1, 3, 8]
    assert longer[0] == pytest.approx(trained[0], rel=1e-9)
    assert longer[1] == pytest.approx(trained[2], rel=1e-9)


def test_poisson_accuracy_depends_on_neither_T_nor_batch_size(evaluated):
    call("transfer_init.py --src r34.pt --T 3 --encoder poisson --out poisson.pt")
    call("train_idsnn.py --init poisson.pt --out trained.pt --no-kd --epochs 1 --batch-size 512 "
         "--device cpu --precision fp64 --seed 1")
    whole = evaluated("trained.pt --precision fp64").runs[0]
    parts = evaluated("trained.pt --precision fp64 --T 1,2,3,5 --batch-size 77").runs[0]
    assert whole["steps"][2]["loss"] == pytest.approx(whole["history"][-1]["test_loss"], rel=1e-9)
    assert parts["steps"][:3] == [pytest.approx(step, rel=1e-9) for step in whole["steps"]]


def test_one_run_on_one_screen(evaluated):
    result = evaluated("idsnn.pt")
    r = result.runs[0]
    assert len(result.out.splitlines()) < 50
    for layer, rate in r["firing"].items():
        assert cells(result.out, layer) == [[f"{100 * rate:.2f}"]]
    for step, row in zip(r["steps"], cells(result.out, "idsnn")[1:], strict=True):
        assert row[:2] == [str(step["T"]), f"{step['accuracy']:.2f}"]
        assert row[5] == f"{1e6 * step['joules']:.3g}"


def load_network(path):
    checkpoint = load_checkpoint(path)
    model = SpikingResNet(**checkpoint["arch"])
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def test_own_image_folder_normalised_as_in_training(evaluated, refused):
    make_folder(Path("own"), "0123456789", size=(8, 8), mode="L")
    r = evaluated("idsnn.pt --dataset own").runs[0]
    own = load_data("own", "data")
    digits = load_data("digits", "data").to("cpu", torch.float32)
    with torch.no_grad():
        x = digits.normalize(own.test_x.permute(0, 3, 1, 2))
        scores = load_network("idsnn.pt")(x).mean(0)
    loss = F.cross_entropy(scores, own.test_y)
    assert r["steps"][3]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    correct = (scores.argmax(1) == own.test_y).double().mean().item()
    assert accuracies(r)[3] == pytest.approx(100 * correct)
    assert r["evaluated_on"]["name"] == "own" and r["data"]["name"] == "digits"

    make_folder(Path("other"), "0123x56789", size=(8, 8), mode="L")  # x comes last: other labels
    line = refused("eval.py idsnn.pt --dataset other --device cpu")
    assert "idsnn.pt knows class 4 as '4', the data set as '5'" in line


def test_json_has_no_nan(evaluated):
    weights = torch.load("idsnn.pt", weights_only=True)["model"]
    weights["fc.weight"] *= math.nan
    edited("idsnn.pt", "broken.pt", model=weights)
    assert evaluated("broken.pt").runs[0]["steps"][0]["loss"] is None
    assert "NaN" not in Path("out.json").read_text()


# --------------------------------------------------------------------------- comparison and figure
def finished(name, accuracies, method="init+KD", network="SNN-18/64", dataset="cifar100"):
    """What eval.py knows of a finished run."""
    history = [dict(test_acc=accuracy) for accuracy in accuracies]
    return dict(name=name, network=network, method=method, T=4, history=history,
                data=dict(sha256=dataset))


def test_comparison_by_hand():
    # the longer baseline is the better one: 35 at epoch 4. idsnn passes that at its epoch 2
    rows = stage4.compare([
        finished("short", [10, 30, 20], "baseline"),
        finished("long", [10, 20, 30, 35], "baseline"),
        finished("idsnn", [20, 36, 34, 50]),
        finished("bad", [1, 2]),
        finished("untrained", []),
        finished("other-data", [90], dataset="digits"),
        finished("wider", [90], network="SNN-18/128")])
    assert [row["to_base"] for row in rows] == [None, 4, 2, None, None, None, None]
    assert [row["last %"] for row in rows] == [20, 35, 50, 2, None, 90, 90]
    assert [row["best %"] for row in rows] == [30, 35, 50, 2, None, 90, 90]
    assert [row["at"] for row in rows] == [2, 4, 4, 2, None, 1, 1]


def baseline():
    """base.pt says of itself that its run had neither initialisation nor distillation."""
    config = torch.load("idsnn.pt", weights_only=True)["config"]
    edited("idsnn.pt", "base.pt", config=config | dict(no_init=True, no_kd=True))


def test_checkpoints_of_every_stage_side_by_side(evaluated):
    baseline()
    call("transfer_init.py --src r34.pt --depth 34 --block sew --encoder poisson --out sew.pt")
    result = evaluated("r34.pt base.pt idsnn.pt sew.pt --T 1,2,4 --batch-size 256")
    # as the paper names them
    rows = result.comparison
    assert [row["method"] for row in rows] == ["ANN", "baseline", "init+KD", "init"]
    assert [row["network"] for row in rows] == [
        "ResNet-34/8", "SNN-18/8", "SNN-18/8", "SNN-34/8 sew poisson"]
    assert [row["epochs"] for row in rows] == [2, 2, 2, 0]
    # a line of the first table, and one of the second for each step, which a teacher has not
    assert max(map(len, result.out.splitlines())) <= 80
    assert len(cells(result.out, "sew")) == 1 + 3
    assert [row[0] for row in cells(result.out, "r34")[1:]] == ["ANN"]
    assert not cells(result.out, "bn1")  # no room for firing rates
    teacher = result.runs[0]
    step, = teacher["steps"]
    assert step["accuracy"] == teacher["history"][-1]["test_acc"]
    assert step["joules"] == pytest.approx(step["ann_joules"])


def test_every_run_sees_images_normalised_as_its_own_training_did(evaluated):
    """Runs share the pixels alone."""
    checkpoint = torch.load("idsnn.pt", weights_only=True)
    darker = checkpoint["data"] | dict(mean=[0.7])
    torch.save(checkpoint | dict(data=darker), "darker.pt")
    together = [run["steps"] for run in evaluated("darker.pt idsnn.pt").runs]
    alone = [evaluated(path).runs[0]["steps"] for path in ("darker.pt", "idsnn.pt")]
    assert together == alone and alone[0] != alone[1]


def test_other_pixels_than_those_of_training_are_said(evaluated):
    data = torch.load("idsnn.pt", weights_only=True)["data"]
    edited("idsnn.pt", "elsewhere.pt", data=data | dict(sha256="0" * 64))
    assert "other pixels" not in evaluated("idsnn.pt").out
    assert "elsewhere.pt was trained on other pixels" in evaluated("elsewhere.pt").out


def test_runs_of_one_name_are_told_apart_by_their_folders(evaluated):
    for folder in ("a", "b"):
        os.mkdir(folder)
        edited("idsnn.pt", f"{folder}/idsnn.pt")
    names = [row["run"] for row in evaluated("a/idsnn.pt b/idsnn.pt --T 1").comparison]
    assert names == ["a/idsnn.pt", "b/idsnn.pt"]


def test_a_table_is_as_wide_as_what_it_says(capsys):
    stage4.show("a title", [
        {"run": "a", "T": 4, "test %": 67.754, "at": None, "n": 12345.678},
        {"run": "a_longer_one", "T": "ANN", "test %": 0.01234, "at": 3, "n": math.nan}])
    assert capsys.readouterr().out.splitlines() == [
        "a title",
        "         run    T  test %  at          n",
        "           a    4   67.75   -  12,345.68",
        "a_longer_one  ANN  0.0123   3        nan", ""]


def test_figure(evaluated):
    pytest.importorskip("matplotlib")
    baseline()
    runs = evaluated("base.pt r34.pt --T 1,4 --plot fig.png").runs
    from matplotlib import pyplot  # only now, so that eval.py chooses the backend
    with Image.open("fig.png") as image:
        assert image.width >= 1600  # pixels: two columns in print

    def history(key):
        return [[epoch[key] for epoch in run["history"]] for run in runs]

    # the curves: a thick one and a thin one for each run over epochs, then one over T and layers
    accuracy, loss, over_T, firing = (
        [line.get_ydata().tolist() for line in axis.lines] for axis in pyplot.gcf().axes)
    assert accuracy[::2] == history("test_acc")
    assert accuracy[1::2] == history("train_acc")
    assert loss[::2] == history("test_loss")
    # a student's `loss` holds the distillation too: its cross-entropy
    assert loss[1] == [epoch["ce"] for epoch in runs[0]["history"]] != history("loss")[0]
    assert loss[3] == history("loss")[1]
    assert over_T == [accuracies(run) for run in runs]
    assert firing[0] == pytest.approx([100 * rate for rate in runs[0]["firing"].values()])


def test_figure_beside_a_notebook(here):
    """Jupyter leaves its own backend in the environment, which other Pythons may not have."""
    pytest.importorskip("matplotlib")
    stage4.parse_args(["--plot", "fig.svg"])  # a third format
    command = [sys.executable, stage4.__file__, "--device", "cpu", "--plot", "fig.pdf"]
    backend = dict(MPLBACKEND="module://matplotlib_inline.backend_inline")
    subprocess.run(command, env=os.environ | backend, check=True)
    assert Path("fig.pdf").read_bytes().startswith(b"%PDF")


# -------------------------------------------------------------------------------------- predictions
def test_predict(evaluated):
    data = load_data("digits", "data").to("cpu", torch.float32)
    x = data.test_x[3:5].permute(0, 3, 1, 2).clone()  # (N, H, W, C) -> (N, C, H, W)
    x[1] = 77
    Image.fromarray(x[0, 0].numpy()).save("grey.png")
    # of one colour: any way of resizing finds the same pixels
    Image.new("RGB", (12, 16), (77, 77, 77)).save("colour.png")
    images = ["grey.png", "colour.png"]
    result = evaluated("r34.pt idsnn.pt --T 1,2,6 --predict grey.png colour.png")
    teacher, student = result.runs
    network = load_network("idsnn.pt")
    network.neuron.T = 6
    with torch.no_grad():
        scores = network(data.normalize(x))  # (T, B, K)

    rows = student["predictions"]
    assert [(row["image"], row["T"]) for row in rows] == [
        (name, T) for name in images for T in (1, 2, 6)]
    for row in rows:
        answers = scores[:row["T"], images.index(row["image"])]  # (t, K)
        probability, label = answers.mean(0).softmax(0).max(0)
        assert row["class"] == data.classes[label]
        assert row["probability"] == pytest.approx(probability.item(), rel=1e-4)
        shown = [str(row["T"]), row["class"], f"{row['probability']:.3g}"]
        assert shown in cells(result.out, row["image"])
    # in smaller passes, the same
    again, = evaluated("idsnn.pt --T 1,2,6 --predict grey.png colour.png --batch-size 1").runs
    for one, other in zip(student["predictions"], again["predictions"]):
        assert one["class"] == other["class"]
        assert one["probability"] == pytest.approx(other["probability"], rel=1e-4)
    # a teacher answers at once
    assert [row["T"] for row in teacher["predictions"]] == ["ANN", "ANN"]
    assert "8x8" in result.out and "steps" not in student


def test_images_are_made_what_the_network_was_trained_on(here):
    grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save("grey.png")
    Image.fromarray(grey).convert("RGB").save("colour.png")
    for channels in (1, 3):
        described = dict(shape=[channels, 8, 8], classes=["a", "b"])
        for pixels in stage4.read_images(["grey.png", "colour.png"], described).test_x:
            assert pixels.tolist() == [[[v] * channels for v in row] for row in grey.tolist()]


# ------------------------------------------------------------------------------------ user's errors
@pytest.mark.parametrize("command, says", [
    ("idsnn.pt nothing.pt", "nothing.pt"),
    ("--dataset nowhere", "--dataset nowhere"),
    ("--json no/such/folder.json", "--json"),
    ("--plot no/such/fig.png", "--plot"),
    ("--plot fig.txt", "--plot"),
    ("--predict none.png", "none.png"),
    ("untrained.pt --predict none.png", "untrained.pt"),
    ("untrained.pt --export nir x", "untrained.pt"),
    ("r34.pt --export nir x", "r34.pt"),
    ("idsnn.pt r34.pt --export nir x", "--export"),
    ("--export onnx x", "--export"),
    ("--export nir no/such/x.nir", "--export"),
    ("--export nir x --json y", "stand alone"),
    ("--json r34.pt", "r34.pt holds a checkpoint"),  # FILE was forgotten
    ("--export nir idsnn.pt", "idsnn.pt holds a checkpoint"),
    ("--predict none.png --plot fig.png", "stand alone")])
def test_mistakes_cost_one_line_before_any_work(refused, here, monkeypatch, command, says):
    """What all four scripts refuse alike is in test_errors."""
    pytest.importorskip("matplotlib")
    # as of CIFAR before its download: neither mean nor deviation is known
    edited("snn_init.pt", "untrained.pt", data=dict(name="cifar10", classes=None, shape=[3, 8, 8]))
    before = contents(here)
    monkeypatch.setattr(nn.Conv2d, "forward", None)
    assert says in refused(f"eval.py --device cpu {command}")
    assert contents(here) == before


def test_one_process_only(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused("eval.py --device cpu")


# ---------------------------------------------------------------------------------------------- NIR
def interpret(graph, x, dt):
    """A NIR graph on inputs (T, B, ...), by the formulas of NIR's documentation: each node's
    output over time."""
    incoming = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    potential = dict.fromkeys(graph.nodes, 0.0)
    steps = []

    def output(name):
        done = steps[-1]
        if name not in done:
            done[name] = compute(name, sum(output(source) for source in incoming[name]))
        return done[name]

    def compute(name, i):
        node = graph.nodes[name]
        kind = type(node).__name__
        if kind == "Conv2d":
            weight, bias = torch.tensor(node.weight), torch.tensor(node.bias)
            return F.conv2d(i, weight, bias, tuple(node.stride), tuple(node.padding))
        if kind == "AvgPool2d":
            return F.avg_pool2d(i, tuple(node.kernel_size), tuple(node.stride))
        if kind == "Flatten":
            return i.flatten(node.start_dim, node.end_dim)
        if kind == "Affine":
            return i @ torch.tensor(node.weight).T + torch.tensor(node.bias)
        if kind == "Output":
            return i
        v, slope = potential[name], torch.tensor(node.r) * i
        if kind == "LIF":
            slope = (torch.tensor(node.v_leak) - v + slope) / torch.tensor(node.tau)
        else:
            assert kind == "IF"
        v = v + dt * slope
        spikes = v > torch.tensor(node.v_threshold)
        potential[name] = torch.where(spikes, torch.tensor(node.v_reset), v)
        return spikes.to(v.dtype)

    for x_t in x:
        steps.append(dict(input=x_t))
        output("output")
    return {name: torch.stack([step[name] for step in steps]) for name in graph.nodes}


def lively(**arch):
    """A network with batch norms as after training, in fp64, and the digits."""
    torch.manual_seed(0)
    model = SpikingResNet(**(dict(depth=18, num_classes=10, in_channels=1, width=4, T=3) | arch))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0, 0.8)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    data = load_data("digits", "data").to("cpu", torch.float64)
    return model.double().eval(), data


def answer(model, data, images):
    """The network's input over time (T, B, C, H, W) and its class scores (T, B, K)."""
    with torch.no_grad():
        pixels = data.test_x[:images].permute(0, 3, 1, 2)
        x = model.encode(pixels, data, torch.arange(images), 0)
        scores = model(x)
    return x if x.dim() == 5 else x.expand(model.neuron.T, *x.shape), scores


@pytest.mark.parametrize("arch", [
    dict(encoder="poisson"), dict(block="sew", decay=0.0), dict(depth=50, width=2),
    dict(depth=50, width=2, block="sew"), dict(decay=1.0, v_th=0.3)])
def test_nir_makes_the_same_spikes(arch, tmp_path):
    nir = pytest.importorskip("nir")
    model, data = lively(**arch)
    nir.write(tmp_path / "net.nir", stage4.to_nir(model, data.shape))
    ours = {}
    for name, module in model.named_modules():
        if isinstance(module, BatchNormLIF):
            module.register_forward_hook(
                lambda *args, name=name.replace(".", "_"): ours.update({name: args[-1]}))
    x, scores = answer(model, data, 3)
    graph = nir.read(tmp_path / "net.nir")
    theirs = interpret(graph, x, float(graph.metadata["dt"]))
    for name, spikes in ours.items():
        assert torch.equal(spikes, theirs[name].flatten(0, 1)), name
    # silence would prove nothing
    assert np.mean([0 < spikes.mean() < 1 for spikes in ours.values()]) > 0.7
    torch.testing.assert_close(scores, theirs["output"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("simulator", ["snntorch", "spikingjelly"])
@pytest.mark.parametrize("block", ["basic", "sew"])
def test_other_simulators_read_our_file(simulator, block, tmp_path):
    nir = pytest.importorskip("nir")
    pytest.importorskip("nirtorch")
    pytest.importorskip(simulator)
    model, data = lively(block=block)
    x, expected = answer(model.float(), data.to("cpu", torch.float32), 5)
    nir.write(tmp_path / "net.nir", stage4.to_nir(model, data.shape))
    graph = nir.read(tmp_path / "net.nir")
    if simulator == "snntorch":
        from snntorch import import_nir, utils
        network = import_nir.import_from_nir(graph)
        utils.reset(network)
    else:
        from spikingjelly.activation_based import nir_exchange
        network = nir_exchange.import_from_nir(graph, dt=stage4.NIR_DT)
    state = None
    with torch.no_grad():
        for x_t, scores_t in zip(x, expected):
            scores, state = network(x_t, state)
            torch.testing.assert_close(scores, scores_t, rtol=1e-4, atol=1e-5)


def test_nir_of_a_trained_network(run):
    nir = pytest.importorskip("nir")
    command = "eval.py idsnn.pt --T 5 --precision fp64 --device cpu --export nir idsnn.nir"
    assert "mean of `output`" in run(command).out
    graph = nir.read("idsnn.nir")
    assert graph.metadata["T"] == 5
    weight = load_checkpoint("idsnn.pt")["model"]["fc.weight"].double()
    assert torch.equal(torch.tensor(graph.nodes["fc"].weight), weight)


def refusal(model, capsys):
    pytest.importorskip("nir")
    with pytest.raises(SystemExit):
        stage4.to_nir(model.eval(), (1, 8, 8))
    return capsys.readouterr().err


def test_nir_refuses_what_it_would_lose(capsys):
    model = SpikingResNet(18, 10, 1, 2)
    model.layer3.extra = nn.Linear(1, 1)
    assert "layer3_extra" in refusal(model, capsys)
    assert "max-pool" in refusal(SpikingResNet(18, 10, 1, 2, stem="7x7"), capsys)

    # any one of the neurons edited
    model, _ = lively()
    bn = model.layer2[0].bn2
    other = copy.copy(bn)
    other.neuron = Neuron(T=3, decay=0.3)
    bn.forward = other.forward
    assert "neuron was edited" in refusal(model, capsys)
