"""Stage 4: operations against numbers derived by hand, tables, figure, predictions, NIR."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image
from torch import nn

import eval as stage4
from train_teacher import load_data
from transfer_init import BatchNormLIF, Neuron, SpikingResNet


@pytest.fixture
def evaluated(run):
    """evaluated("idsnn.pt --T 2") -> the screen, and what --json holds."""
    def evaluated(command):
        result = run(f"eval.py --device cpu --precision fp32 --json out.json {command}")
        assert result.status == 0, result.err
        return result.out, json.loads(Path("out.json").read_text())
    return evaluated


def changed(path, name, **entries):
    """Write a copy of a checkpoint with other entries."""
    torch.save(torch.load(path, weights_only=True) | entries, name)


def accuracies(result):
    return [step["accuracy"] for step in result["steps"]]


def widest(text):
    return max(map(len, text.splitlines()))


def cells(text, name):
    """What stands right of `name` in each line that begins with it."""
    lines = [line.split() for line in text.splitlines()]
    return [line[1:] for line in lines if line[:1] == [name]]


# ----------------------------------------------------------------------------- operations, by hand
class Tiny(nn.Module):
    """conv 1x1 -> LIF -> conv 3x3 -> LIF -> mean over pixels -> linear, on 2x2 images.

    T 2, threshold 1, decay 1/2. `adds`: the second convolution reads the sum of two spikes.
    """

    def __init__(self, adds=False):
        super().__init__()
        neuron = Neuron(T=2, decay=0.5, v_th=1.0)
        self.conv1, self.bn1 = nn.Conv2d(1, 1, 1, bias=False), BatchNormLIF(1, neuron)
        self.conv2 = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        self.layer4 = BatchNormLIF(2, neuron)
        self.fc, self.adds = nn.Linear(2, 3), adds
        self.bn1.eps = self.layer4.eps = 0.0  # statistics 0 and 1: the batch norms do nothing
        with torch.no_grad():
            self.conv1.weight.fill_(1)
            self.conv2.weight.zero_()
            self.conv2.weight[0, 0, 1, 1] = 2  # channel 0 repeats each spike, channel 1 is silent

    def forward(self, x):
        static = x.dim() == 4
        s = self.bn1(self.conv1(x if static else x.flatten(0, 1)), static=static)
        return self.fc(self.layer4(self.conv2(s + s if self.adds else s)).mean((2, 3)))


def counted(model, *batches, T):
    counter = stage4.OperationCounter(model, T)
    with torch.no_grad():
        for x in batches:
            model.eval()(x)
    return {layer["name"]: layer for layer in counter.read()}


@pytest.mark.parametrize("adds", [False, True])
def test_operations_by_hand(adds):
    # a current of 1.5 is above 1 in both steps; 0.7 only in the second, 0.7/2 + 0.7 = 1.05;
    # 0.3 in neither, 0.3 and 0.45
    a = torch.tensor([[[[1.5, 0.7], [1.5, 0.3]]]])
    b = torch.tensor([[[[1.5, 0.0], [0.7, 0.0]]]])
    layers = counted(Tiny(adds), a, b, T=2)
    assert list(layers) == ["conv1", "conv2", "fc"]

    # spikes in step 1: pixels 0 and 2 of a, 0 of b; in step 2: 0, 1 and 2 of a, 0 and 2 of b.
    # of 4 neurons and 2 images: 3/8 and 5/8
    # conv1: 1*1*1 * 1*2*2 = 4 MACs on the image, once
    assert layers["conv1"]["macs"] == [4] and layers["conv1"]["acs"] == []
    # conv2: 1*3*3 * 2*2*2 = 72 MACs, of which 3/8 and 5/8; a sum of two spikes is two accumulates
    assert layers["conv2"]["dense_macs"] == 72 and layers["conv2"]["macs"] == []
    assert layers["conv2"]["acs"] == ([54, 90] if adds else [27, 45])
    # fc: 2*3 = 6 MACs; each of the 3 and 5 spikes below the mean adds 3 weights, over 2 images
    assert layers["fc"]["dense_macs"] == 6 and layers["fc"]["acs"] == [4.5, 7.5]

    one, two = (stage4.energy(layers.values(), T) for T in (1, 2))
    acs = 54 + 4.5 if adds else 27 + 4.5
    assert (one["acs"], one["macs"]) == (acs, 4)
    assert one["joules"] == pytest.approx((0.9 * acs + 4.6 * 4) * 1e-12)
    assert (two["acs"], two["macs"]) == (acs + (97.5 if adds else 52.5), 4)
    assert two["ann_joules"] == pytest.approx(4.6 * (4 + 72 + 6) * 1e-12)


def test_whole_numbers_of_an_image_are_no_spikes():
    assert counted(Tiny(), torch.ones(1, 1, 2, 2), T=2)["conv1"]["macs"] == [4]


def test_operations_on_spiking_input_by_hand():
    x = torch.zeros(2, 1, 1, 2, 2)  # (T, B, C, H, W)
    x[0, 0, 0, 0, 0] = x[0, 0, 0, 0, 1] = x[1, 0, 0, 1, 1] = 2  # pixels 0 and 1, then 3
    layers = counted(Tiny(), x, T=2)
    # one connection for each of 4 inputs; two inputs of 2, then one
    assert layers["conv1"]["acs"] == [4, 2] and layers["conv1"]["macs"] == []


def test_multiplications_of_resnet18_on_cifar():
    # stem 3*9*64*32^2; stage 1: 4 convolutions of 64*64*9*32^2; stages 2 to 4 each: the first half
    # as wide, three more, a 1x1 shortcut
    stage = 64 * 128 * 9 * 16**2 + 3 * 128 * 128 * 9 * 16**2 + 64 * 128 * 16**2
    expected = 3 * 9 * 64 * 32**2 + 4 * 64 * 64 * 9 * 32**2 + 3 * stage + 512 * 10
    assert expected == 555_422_720  # the 0.56 G of the literature
    layers = counted(SpikingResNet(18, 10, T=1), torch.rand(1, 3, 32, 32), T=1)
    assert sum(layer["dense_macs"] for layer in layers.values()) == expected


def test_a_spike_costs_its_share_of_the_multiplications(evaluated):
    r = evaluated("idsnn.pt")[1]["runs"][0]
    layers = {layer["name"]: layer for layer in r["layers"]}
    # a convolution, one of stride 2 and the shortcut beside it: whose spikes they read
    for name, source in [("layer1.1.conv1", "layer1.0.bn2"), ("layer2.0.conv1", "layer1.1.bn2"),
                         ("layer2.0.downsample.0", "layer1.1.bn2")]:
        expected = 4 * r["firing"][source] * layers[name]["dense_macs"]  # in four steps
        assert sum(layers[name]["acs"]) == pytest.approx(expected)


# -------------------------------------------------------------------------------------- evaluation
def test_accuracy_is_what_training_recorded_and_shorter_runs_are_prefixes(evaluated):
    # idsnn.pt by default; in batches of training's own evaluation, so rounded likewise
    out, content = evaluated("--batch-size 256")
    r = content["runs"][0]
    last = r["history"][-1]
    assert [step["T"] for step in r["steps"]] == [1, 2, 3, 4]
    assert r["steps"][3]["accuracy"] == last["test_acc"]
    assert r["steps"][3]["loss"] == pytest.approx(last["test_loss"], rel=1e-6)
    assert r["firing"] == pytest.approx(last["rates"], rel=1e-5)  # of training's own hooks

    # fp64: in fp32 other batches may round a potential across the threshold
    trained, longer = (evaluated(f"--precision fp64 {flags}")[1]["runs"][0]["steps"]
                       for flags in ("", "--T 1,3,8 --batch-size 77"))
    assert [step["T"] for step in longer] == [1, 3, 8]
    assert longer[0] == pytest.approx(trained[0], rel=1e-9)
    assert longer[1] == pytest.approx(trained[2], rel=1e-9)


def test_poisson_accuracy_depends_on_neither_T_nor_batch_size(evaluated):
    call("transfer_init.py --src r34.pt --T 3 --encoder poisson --out poisson.pt")
    call("train_idsnn.py --init poisson.pt --out trained.pt --no-kd --epochs 1 --batch-size 512 "
         "--device cpu --precision fp64")
    whole, parts = (evaluated(f"trained.pt --precision fp64 {flags}")[1]["runs"][0]
                    for flags in ("", "--T 1,2,3,5 --batch-size 77"))
    assert accuracies(whole)[2] == whole["history"][-1]["test_acc"]
    assert parts["steps"][:3] == [pytest.approx(step, rel=1e-9) for step in whole["steps"]]
    assert len({step["loss"] for step in parts["steps"]}) == 4
    assert whole["layers"][0]["acs"] and not whole["layers"][0]["macs"]  # it reads spikes


def test_one_screen_within_80_columns(evaluated):
    out, content = evaluated("idsnn.pt")
    r = content["runs"][0]
    assert widest(out) <= 80 and len(out.splitlines()) < 50
    for layer, rate in r["firing"].items():
        assert cells(out, layer) == [[f"{100 * rate:.2f}"]]
    for step, row in zip(r["steps"], cells(out, "idsnn")[1:], strict=True):
        assert row[:2] == [str(step["T"]), f"{step['accuracy']:.2f}"]
        assert row[5] == f"{1e6 * step['joules']:.3g}"


def test_teacher_and_untrained_network_evaluate_too(evaluated):
    out, content = evaluated("r34.pt snn_init.pt --batch-size 256")
    teacher, init = content["runs"]
    assert accuracies(teacher) == [teacher["history"][-1]["test_acc"]]
    assert teacher["steps"][0]["joules"] == pytest.approx(teacher["steps"][0]["ann_joules"])
    assert "ANN" in out and teacher["firing"] == {}
    assert init["steps"][0]["acs"] > 0 and init["history"] == []


@pytest.mark.parametrize("flags", ["--decay 0.9 --v-th 0.8 --T 3", "--depth 34", "--block sew"])
def test_modified_networks_evaluate_without_editing(evaluated, flags):
    call(f"transfer_init.py --src r34.pt {flags} --out other.pt")
    r = evaluated("other.pt")[1]["runs"][0]
    assert len(r["steps"]) == r["arch"]["T"]
    layers = {layer["name"]: layer for layer in r["layers"]}
    assert layers["conv1"]["macs"] == [layers["conv1"]["dense_macs"]]  # the image, once
    assert layers["layer1.0.conv1"]["acs"] and not layers["layer1.0.conv1"]["macs"]


def digits_folder(folder, classes):
    """100 of the digits' test images as a folder; the training images are white."""
    data = load_data("digits", "data")
    for i in range(100):
        for split in ("train", "test"):
            place = Path(folder, split, classes[data.test_y[i]])
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.full((8, 8), 255, np.uint8)
            if split == "test":
                pixels = data.test_x[i, ..., 0].numpy()
            Image.fromarray(pixels).save(place / f"{i}.png")
    return data.to("cpu", torch.float32)


def load_network(path):
    checkpoint = torch.load(path, weights_only=True)
    model = SpikingResNet(**checkpoint["arch"])
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def test_own_image_folder_normalised_as_in_training(evaluated):
    data = digits_folder("own", "0123456789")
    r = evaluated("idsnn.pt --dataset own")[1]["runs"][0]
    with torch.no_grad():
        x = data.normalize(data.test_x[:100].permute(0, 3, 1, 2))
        scores = load_network("idsnn.pt")(x).mean(0)
    loss = nn.functional.cross_entropy(scores, data.test_y[:100])
    assert r["steps"][3]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    correct = (scores.argmax(1) == data.test_y[:100]).sum().item()  # of 100: percent
    assert accuracies(r)[3] == pytest.approx(correct)
    assert r["evaluated_on"]["name"] == "own" and r["data"]["name"] == "digits"


@pytest.mark.parametrize("classes, says", [
    ("0123x56789", "knows class 4 as '4', the data set as '5'"),  # x comes last: other labels
    ("0123356789", "10 classes and 1 channels, own has 9")])
def test_other_classes_are_refused(refused, classes, says):
    digits_folder("own", classes)
    error = refused("eval.py idsnn.pt --dataset own --device cpu")
    assert says in error and "idsnn.pt" in error


def test_json_has_no_nan(evaluated):
    weights = torch.load("idsnn.pt", weights_only=True)["model"]
    weights["fc.weight"] *= math.nan
    changed("idsnn.pt", "broken.pt", model=weights)
    assert evaluated("broken.pt")[1]["runs"][0]["steps"][0]["loss"] is None
    assert "NaN" not in Path("out.json").read_text()


# --------------------------------------------------------------------------- comparison and figure
def finished(name, accuracies, method="init+KD", dataset="cifar100", **arch):
    """What eval.py makes of a finished run."""
    history = [dict(epoch=i + 1, test_acc=a) for i, a in enumerate(accuracies)]
    arch = dict(depth=18, width=64, block="basic", encoder="direct", T=4) | arch
    config = dict(no_init=method != "init+KD", no_kd=method != "init+KD")
    return stage4.describe(f"{name}.pt", dict(
        stage="idsnn", arch=arch, config=config, data=dict(sha256=dataset), parents={},
        history=history))


def test_comparison_by_hand():
    # the longer baseline is the better one: 35 at epoch 4. idsnn passes that at its epoch 2
    rows = stage4.compare([
        finished("short", [10, 30, 20], "baseline"), finished("long", [10, 20, 30, 35], "baseline"),
        finished("idsnn", [20, 36, 34, 50]), finished("bad", [1, 2]), finished("untrained", []),
        finished("other-data", [90], dataset="digits"), finished("wider", [90], width=128)])
    assert [row["to_base"] for row in rows] == [None, 4, 2, None, None, None, None]
    assert [(row["last %"], row["best %"], row["at"]) for row in rows[:5]] == [
        (20, 30, 2), (35, 35, 4), (50, 50, 4), (2, 2, 2), (None, None, None)]


def baseline(name="base.pt"):
    """A file that says of itself that its run had neither initialisation nor distillation."""
    config = torch.load("idsnn.pt", weights_only=True)["config"]
    changed("idsnn.pt", name, config=config | dict(no_init=True, no_kd=True))


def test_methods_and_networks_are_named_as_the_paper_names_them(evaluated):
    baseline()
    call("transfer_init.py --src r34.pt --block sew --encoder poisson --out sew.pt")
    out, content = evaluated("base.pt idsnn.pt sew.pt r34.pt --T 1,2,4")
    rows = content["comparison"]
    assert [row["method"] for row in rows] == ["baseline", "init+KD", "init", "ANN"]
    assert [row["network"] for row in rows] == [
        "SNN-18/8", "SNN-18/8", "SNN-18/8 sew poisson", "ResNet-34/8"]
    assert [row["epochs"] for row in rows] == [2, 2, 0, 2]
    # the tables: a line of the first for each run, of the second for each of its steps
    assert widest(out) <= 80
    for run in content["runs"]:
        assert [row[1] for row in cells(out, run["name"])[1:]] == [
            f"{accuracy:.2f}" for accuracy in accuracies(run)]


def test_a_table_is_as_wide_as_what_it_says(capsys):
    stage4.show("a title", [
        {"run": "a", "T": 4, "test %": 67.754, "at": None, "n": 12345.678},
        {"run": "a_longer_one", "T": "ANN", "test %": 0.01234, "at": 3, "n": math.nan}])
    assert capsys.readouterr().out.splitlines() == [
        "a title",
        "         run    T  test %  at          n",
        "           a    4   67.75   -  12,345.68",
        "a_longer_one  ANN  0.0123   3        nan", ""]


@pytest.mark.parametrize("suffix, begins", [("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figure(evaluated, monkeypatch, suffix, begins):
    figures = pytest.importorskip("matplotlib.figure")
    drawn, savefig = [], figures.Figure.savefig

    def spy(figure, *args, **kwargs):
        drawn.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(figures.Figure, "savefig", spy)
    baseline()
    runs = evaluated(f"base.pt r34.pt --T 1,4 --plot fig.{suffix}")[1]["runs"]
    assert Path(f"fig.{suffix}").read_bytes().startswith(begins)
    # the curves: a thick one and a thin one for each run over epochs, then one over T and layers
    accuracy, loss, over_T, firing = (
        [line.get_ydata().tolist() for line in axis.lines] for axis in drawn[0].axes)

    def history(key):
        return [[epoch[key] for epoch in run["history"]] for run in runs]
    assert accuracy[::2] == history("test_acc") and accuracy[1::2] == history("train_acc")
    # a student's `loss` holds the distillation too: its cross-entropy
    assert loss[::2] == history("test_loss")
    assert loss[1] == [epoch["ce"] for epoch in runs[0]["history"]] != history("loss")[0]
    assert loss[3] == history("loss")[1]
    assert over_T == [accuracies(run) for run in runs]
    assert firing == [pytest.approx([100 * rate for rate in run["firing"].values()])
                      for run in runs]


def test_figure_beside_a_notebook(here):
    """Jupyter leaves its own backend in the environment, which other Pythons may not have."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, stage4.__file__, "--device", "cpu", "--plot", "fig.png"]
    backend = dict(MPLBACKEND="module://matplotlib_inline.backend_inline")
    subprocess.run(command, env=os.environ | backend, check=True)
    with Image.open("fig.png") as image:
        assert image.width >= 1600  # pixels: two columns in print
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # not blank


# -------------------------------------------------------------------------------------- predictions
def test_predict(evaluated):
    data = load_data("digits", "data").to("cpu", torch.float32)
    x = data.test_x[3:5].permute(0, 3, 1, 2).clone()  # (N, H, W, C) -> (N, C, H, W)
    x[1] = 77
    Image.fromarray(x[0, 0].numpy()).save("grey.png")
    # of one colour: any way of resizing finds the same pixels
    Image.new("RGB", (12, 16), (77, 77, 77)).save("colour.png")
    out, content = evaluated("idsnn.pt --T 1,2,6 --predict grey.png colour.png")
    network = load_network("idsnn.pt")
    network.neuron.T = 6
    with torch.no_grad():
        scores = network(data.normalize(x))  # (T, B, K)
    rows = content["runs"][0]["predictions"]
    images = ["grey.png", "colour.png"]
    assert [(row["image"], row["T"]) for row in rows] == [
        (name, T) for name in images for T in (1, 2, 6)]
    for row in rows:
        answers = scores[:row["T"], images.index(row["image"])]  # (t, K)
        probability, label = answers.mean(0).softmax(0).max(0)
        assert row["class"] == data.classes[label]
        assert row["probability"] == pytest.approx(probability.item(), rel=1e-4)
    assert cells(out, "grey.png") == [
        [str(row["T"]), row["class"], f"{row['probability']:.3g}"] for row in rows[:3]]
    assert "8x8" in out and "steps" not in content["runs"][0]

    # a teacher answers at once; of two networks, both
    teacher, student = evaluated("r34.pt idsnn.pt --predict grey.png")[1]["runs"]
    assert [row["T"] for row in teacher["predictions"]] == ["ANN"]
    assert [row["T"] for row in student["predictions"]] == [1, 2, 3, 4]


def test_predict_in_colour(evaluated):
    """A network of colour images sees grey ones as grey in all three channels."""
    checkpoint = torch.load("snn_init.pt", weights_only=True)
    arch = checkpoint["arch"] | dict(in_channels=3)
    data = checkpoint["data"] | dict(shape=[3, 8, 8], mean=[0.2, 0.4, 0.6], std=[0.5] * 3)
    changed("snn_init.pt", "rgb.pt", arch=arch, model=SpikingResNet(**arch).state_dict(), data=data)
    grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save("grey.png")
    Image.fromarray(np.stack([grey] * 3, 2)).save("colour.png")
    rows = evaluated("rgb.pt --predict grey.png colour.png")[1]["runs"][0]["predictions"]
    assert [row["probability"] for row in rows[:4]] == [row["probability"] for row in rows[4:]]


# ------------------------------------------------------------------------------------ user's errors
@pytest.mark.parametrize("command, says", [
    ("nothing.pt", "nothing.pt"), ("idsnn.pt nothing.pt", "nothing.pt"),
    ("truncated.pt", "truncated.pt"), ("foreign.pt", "foreign.pt is no checkpoint"),
    ("--T 0", "--T"), ("--T 1,x", "--T"), ("--T 33", "--T"),
    ("--json no/such/folder.json", "--json"), ("--json .", "--json"),
    ("--plot fig.txt", "--plot"), ("--plot no/such/fig.png", "--plot"),
    ("--predict none.png", "none.png"), ("--predict text.png", "text.png"),
    ("untrained.pt --predict text.png", "untrained.pt"),
    ("untrained.pt --export nir x", "untrained.pt"), ("r34.pt --export nir x", "r34.pt"),
    ("--export onnx x", "--export"), ("idsnn.pt r34.pt --export nir x", "--export"),
    ("--export nir no/such/x.nir", "--export"),
    ("--dataset cifar", "--dataset cifar"), ("--batch-size 0", "--batch-size"),
    ("--precision fp8", "--precision"), ("--device tpu", "--device"), ("--vth 1", "--vth")])
def test_mistakes_cost_one_line_before_any_work(refused, here, monkeypatch, command, says):
    pytest.importorskip("matplotlib")
    torch.save(dict(format=1), "foreign.pt")
    Path("truncated.pt").write_bytes(Path("idsnn.pt").read_bytes()[:5000])
    Path("text.png").write_text("no image")
    # as of CIFAR before its download: neither mean nor deviation is known
    changed("snn_init.pt", "untrained.pt", data=dict(name="cifar10", classes=None, shape=[3, 8, 8]))
    before = {path: path.stat().st_mtime_ns for path in here.iterdir()}

    def work(*args):
        raise AssertionError("a network was asked")
    monkeypatch.setattr(nn.Conv2d, "forward", work)
    assert says in refused(f"eval.py --device cpu {command}")
    assert {path: path.stat().st_mtime_ns for path in here.iterdir()} == before


def test_one_process_only(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused("eval.py --device cpu")


# ---------------------------------------------------------------------------------------------- NIR
def interpret(graph, x, dt):
    """A NIR graph on inputs (T, B, ...) in plain numpy, by the formulas of NIR's documentation."""
    def windows(a, k, stride, pad):  # (B, C, H, W) -> (B, C, H', W', k, k)
        a = np.pad(a, ((0, 0), (0, 0), (pad[0],) * 2, (pad[1],) * 2))
        a = np.lib.stride_tricks.sliding_window_view(a, tuple(k), (2, 3))
        return a[:, :, :: stride[0], :: stride[1]]

    incoming = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    potential, outputs = {}, []

    def step(name, x_t, done):
        if name in done:
            return done[name]
        node, kind = graph.nodes[name], type(graph.nodes[name]).__name__
        i = x_t
        if kind != "Input":
            i = sum(step(source, x_t, done) for source in incoming[name])
        if kind == "Conv2d":
            i = windows(i, node.weight.shape[2:], node.stride, node.padding)
            i = np.einsum("bchwij,ocij->bohw", i, node.weight, optimize=True)
            i = i + node.bias[:, None, None]
        elif kind == "AvgPool2d":
            i = windows(i, node.kernel_size, node.stride, node.padding).mean((4, 5))
        elif kind == "Flatten":
            assert node.start_dim == -3 and node.end_dim == -1
            i = i.reshape(*i.shape[:-3], -1)
        elif kind == "Affine":
            i = i @ node.weight.T + node.bias
        elif kind in ("LIF", "IF"):
            v = potential.get(name, 0.0)
            slope = node.r * i
            if kind == "LIF":
                slope = (node.v_leak - v + node.r * i) / node.tau
            v = v + dt * slope
            i = (v > node.v_threshold).astype(float)
            potential[name] = np.where(i == 1, node.v_reset, v)
        else:
            assert kind in ("Input", "Output"), kind
        done[name] = i
        return i

    for x_t in x:
        outputs.append({})
        step("output", x_t, outputs[-1])
    return {name: np.stack([done[name] for done in outputs]) for name in graph.nodes}


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
    dict(), dict(block="sew"), dict(depth=50, width=2), dict(depth=50, width=2, block="sew"),
    dict(decay=0.0), dict(decay=1.0, v_th=0.3), dict(encoder="poisson")])
def test_nir_makes_the_same_spikes(arch, tmp_path):
    nir = pytest.importorskip("nir")
    model, data = lively(**arch)
    nir.write(tmp_path / "net.nir", stage4.to_nir(model, data.shape))
    ours = {}

    def keep(name, module, inputs, spikes):
        ours[name.replace(".", "_")] = spikes.unflatten(0, (3, -1)).numpy()

    for name, module in model.named_modules():
        if isinstance(module, BatchNormLIF):
            module.register_forward_hook(lambda *args, name=name: keep(name, *args))
    x, scores = answer(model, data, 3)
    graph = nir.read(tmp_path / "net.nir")
    theirs = interpret(graph, x.numpy(), float(graph.metadata["dt"]))
    for name, spikes in ours.items():
        assert np.array_equal(spikes, theirs[name]), name
    # silence would prove nothing
    assert np.mean([0 < spikes.mean() < 1 for spikes in ours.values()]) > 0.7
    np.testing.assert_allclose(scores.numpy(), theirs["output"], rtol=1e-9, atol=1e-12)


def read_by_snntorch(graph):
    from snntorch import utils
    from snntorch.import_nir import import_from_nir
    network = import_from_nir(graph)
    utils.reset(network)
    return network


def read_by_spikingjelly(graph):
    from spikingjelly.activation_based.nir_exchange import import_from_nir
    return import_from_nir(graph, dt=stage4.NIR_DT)


@pytest.mark.parametrize("reader", [read_by_snntorch, read_by_spikingjelly])
@pytest.mark.parametrize("arch", [dict(), dict(block="sew")])
def test_other_simulators_read_our_file(reader, arch, tmp_path):
    nir = pytest.importorskip("nir")
    pytest.importorskip("nirtorch")
    pytest.importorskip(reader.__name__.removeprefix("read_by_"))
    model, data = lively(**arch)
    x, expected = answer(model.float(), data.to("cpu", torch.float32), 5)
    nir.write(tmp_path / "net.nir", stage4.to_nir(model, data.shape))
    network, state = reader(nir.read(tmp_path / "net.nir")), None
    with torch.no_grad():
        for x_t, scores_t in zip(x, expected):
            scores, state = network(x_t, state)
            torch.testing.assert_close(scores, scores_t, rtol=1e-4, atol=1e-5)


def test_nir_of_a_trained_network(run):
    nir = pytest.importorskip("nir")
    command = "eval.py idsnn.pt --T 5 --precision fp64 --device cpu --export nir idsnn.nir"
    assert "mean of `output`" in run(command).out
    graph = nir.read("idsnn.nir")
    assert graph.metadata["T"] == 5 and graph.nodes["conv1"].weight.dtype == np.float64
    network = load_network("idsnn.pt").double()
    network.neuron.T = 5
    x, scores = answer(network, load_data("digits", "data").to("cpu", torch.float64), 2)
    theirs = interpret(graph, x.numpy(), stage4.NIR_DT)["output"]
    np.testing.assert_allclose(scores.numpy(), theirs, rtol=1e-9, atol=1e-12)


def refusal(model, capsys):
    with pytest.raises(SystemExit):
        stage4.to_nir(model.eval(), (1, 8, 8))
    return capsys.readouterr().err


def test_nir_refuses_what_it_would_lose(capsys):
    pytest.importorskip("nir")
    model = SpikingResNet(18, 10, 1, 2)
    model.layer3.extra = nn.Linear(1, 1)
    assert "layer3.extra" in refusal(model, capsys).replace("_", ".")
    assert "max-pool" in refusal(SpikingResNet(18, 10, 1, 2, stem="7x7"), capsys)


def soft_reset(bn, x, residual=None, static=False):
    """BatchNormLIF.forward as somebody may edit it: a spike takes v_th off the potential."""
    n, spikes, u, f = bn.neuron, [], 0.0, 0.0
    x = nn.BatchNorm2d.forward(bn, x)
    for current in x.chunk(n.T):
        u = n.decay * (u - n.v_th * f) + current
        f = (u > n.v_th).to(u.dtype)
        spikes.append(f)
    return torch.cat(spikes)


@pytest.mark.parametrize("layer", ["bn1", "layer2.0.bn2", "layer4.1.bn2"])
def test_nir_refuses_an_edited_neuron(layer, capsys):
    pytest.importorskip("nir")
    model, _ = lively()
    bn = model.get_submodule(layer)
    bn.forward = MethodType(soft_reset, bn)
    assert "neuron was edited" in refusal(model, capsys)
