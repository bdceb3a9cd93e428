"""Stage 4: operations against numbers derived by hand, the tables, the figure, predictions, NIR."""
import csv
import io
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_teacher import make_folder
from torch import nn

import eval as stage4
import train_idsnn
import train_teacher
import transfer_init
from transfer_init import BatchNormLIF, Neuron, SpikingResNet


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

    # spikes in step 1: pixels 0 and 2 of a, 0 of b; in step 2: 0, 1 and 2 of a, 0 and 2 of b. of 4
    # neurons and 2 images: 3/8 and 5/8
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


# ---------------------------------------------------------------------------- the pipeline's files
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the checkpoints of a short run on the digits: r, init, idsnn, base."""
    folder = tmp_path_factory.mktemp("runs")
    short = "--warmup 0 --device cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_teacher.main(
            f"--dataset digits --depth 18 --width 4 --epochs 1 {short} --out r.pt".split())
        transfer_init.main("--src r.pt --T 2 --out init.pt".split())
        train_idsnn.main(f"--init init.pt --epochs 2 {short} --out idsnn.pt".split())
        train_idsnn.main(
            f"--init init.pt --epochs 1 {short} --no-init --no-kd --out base.pt".split())
    return folder


@pytest.fixture
def run(trained, monkeypatch, capsys):
    """run(command line) -> (what was printed, its --json)."""
    monkeypatch.chdir(trained)

    def run(command):
        capsys.readouterr()
        stage4.main(f"{command} --device cpu --json out.json".split())
        return capsys.readouterr().out, json.loads(Path("out.json").read_text())
    return run


@pytest.fixture
def refused(trained, monkeypatch, capsys):
    """refused(command line) -> the one line on stderr of a command that ends with code 2."""
    monkeypatch.chdir(trained)

    def refused(command):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            stage4.main(f"{command} --device cpu".split())
        printed = capsys.readouterr()
        assert end.value.code == 2 and printed.out == ""
        assert printed.err.count("\n") == 1 and "error: " in printed.err
        return printed.err
    return refused


def changed(path, name, **entries):
    """Write a copy of a checkpoint with other entries."""
    torch.save(torch.load(path, weights_only=True) | entries, name)


def widest(text):
    return max(map(len, text.splitlines()))


def accuracies(result):
    return [step["accuracy"] for step in result["steps"]]


def test_accuracy_is_what_training_recorded_and_shorter_runs_are_prefixes(run):
    out, content = run("")  # idsnn.pt by default
    r = content["runs"][0]
    last = r["history"][-1]
    assert [step["T"] for step in r["steps"]] == [1, 2]
    assert r["steps"][1]["accuracy"] == last["test_acc"]
    assert r["steps"][1]["loss"] == pytest.approx(last["test_loss"], rel=1e-6)
    assert r["firing"] == pytest.approx(last["rates"], rel=1e-5)  # of training's own hooks

    longer = run("idsnn.pt --T 1,4 --batch-size 77")[1]["runs"][0]
    assert [step["T"] for step in longer["steps"]] == [1, 4]
    for what in ("accuracy", "loss", "acs", "joules"):
        assert longer["steps"][0][what] == pytest.approx(r["steps"][0][what], rel=1e-6)


def test_poisson_accuracy_depends_on_neither_T_nor_batch_size(run, trained):
    transfer_init.main("--src r.pt --T 3 --encoder poisson --out poisson.pt --fresh".split())
    whole = run("poisson.pt")[1]["runs"][0]
    parts = run("poisson.pt --T 1,2,3,5 --batch-size 77")[1]["runs"][0]
    assert accuracies(whole) == accuracies(parts)[:3]
    assert len(set(accuracies(parts))) > 1
    assert whole["layers"][0]["acs"] and not whole["layers"][0]["macs"]  # it reads spikes


def test_one_screen_within_80_columns(run):
    out, content = run("idsnn.pt")
    r = content["runs"][0]
    assert widest(out) <= 80 and len(out.splitlines()) < 50
    for layer, rate in r["firing"].items():
        assert layer in out and f"{100 * rate:.2f}" in out
    assert f"{r['steps'][1]['accuracy']:.2f}" in out

    # by class, and the three worst of them on the screen
    data = train_teacher.load_data("digits", "data")
    count = torch.bincount(data.test_y).double()
    by_class = torch.tensor([r["class_accuracy"][name] for name in data.classes]).double()
    assert float(by_class @ count / count.sum()) == pytest.approx(r["steps"][-1]["accuracy"])
    worst = out.split("worst classes")[1].splitlines()[2:5]
    lowest = sorted(r["class_accuracy"].values())[:3]
    assert [float(line.split()[1]) for line in worst] == pytest.approx(lowest, abs=0.01)


def test_nothing_is_cut_from_a_table(run):
    name = "a_long_name_" * 8
    shutil.copy("idsnn.pt", f"{name}.pt")
    assert run(f"{name}.pt")[0].count(f"{name} ") == 3  # the recorded row, and one for each step


def test_help_names_the_default_as_one_types_it(capsys):
    with pytest.raises(SystemExit):
        stage4.parse_args(["--help"])
    assert "(default: idsnn.pt)" in " ".join(capsys.readouterr().out.split())


def test_teacher_and_untrained_network_evaluate_too(run):
    out, content = run("r.pt")
    r = content["runs"][0]
    assert accuracies(r) == [r["history"][-1]["test_acc"]]
    assert r["steps"][0]["joules"] == pytest.approx(r["steps"][0]["ann_joules"]) and "ANN" in out
    out, content = run("init.pt")
    assert content["runs"][0]["steps"][0]["acs"] > 0 and widest(out) <= 80


@pytest.mark.parametrize("flags", ["--decay 0.9 --v-th 0.8 --T 3", "--depth 34", "--block sew"])
def test_modified_networks_evaluate_without_editing(run, flags):
    transfer_init.main(f"--src r.pt {flags} --out other.pt --fresh".split())
    out, content = run("other.pt")
    r = content["runs"][0]
    assert len(r["steps"]) == r["arch"]["T"] and widest(out) <= 80
    layers = {layer["name"]: layer for layer in r["layers"]}
    assert layers["conv1"]["macs"] == [layers["conv1"]["dense_macs"]]  # the image, once
    assert layers["layer1.0.conv1"]["acs"] and not layers["layer1.0.conv1"]["macs"]


def digits_folder(folder, classes):
    """100 of the digits' test images as a folder; the training images are white."""
    data = train_teacher.load_data("digits", "data")
    for i in range(100):
        for split in ("train", "test"):
            place = folder / split / classes[data.test_y[i]]
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


def test_own_image_folder_normalised_as_in_training(run, trained):
    data = digits_folder(trained / "own", "0123456789")
    out, content = run("idsnn.pt --dataset own --data-dir cache --T 2 --precision fp32")
    with torch.no_grad():
        x = data.normalize(data.test_x[:100].permute(0, 3, 1, 2))
        correct = load_network("idsnn.pt")(x).mean(0).argmax(1) == data.test_y[:100]
    assert accuracies(content["runs"][0]) == [pytest.approx(100 * correct.double().mean().item())]
    assert "other images" in out
    assert list((trained / "cache").iterdir())  # --data-dir


def test_other_class_names_are_refused(refused, trained):
    digits_folder(trained / "renamed", "0123x56789")  # x comes last: the labels are others
    says = refused("idsnn.pt --dataset renamed --data-dir cache")
    assert "'4'" in says and "'5'" in says and "idsnn.pt" in says


# --------------------------------------------------------------------------- comparison and figure
def finished(name, accuracies, method="init+KD", dataset="cifar100", **arch):
    """What eval.py makes of a finished run."""
    history = [dict(epoch=i + 1, test_acc=a) for i, a in enumerate(accuracies)]
    arch = dict(depth=18, num_classes=100, width=64, block="basic", encoder="direct", T=4) | arch
    config = dict(dataset=dataset, no_init=method != "init+KD", no_kd=method != "init+KD")
    return stage4.describe(f"{name}.pt", dict(
        stage="idsnn", arch=arch, config=config, data=dict(sha256=dataset), provenance=dict(),
        metrics=dict(history=history)))


def test_comparison_by_hand():
    # the longer baseline is the better one: 35 at epoch 4. idsnn passes that at its epoch 2
    rows = stage4.compare([
        finished("short", [10, 30, 20], "baseline"), finished("long", [10, 20, 30, 35], "baseline"),
        finished("idsnn", [20, 36, 34, 50]), finished("bad", [1, 2]),
        finished("other-data", [90], dataset="digits"), finished("wider", [90], width=128)])
    assert [row["to_base"] for row in rows] == [None, 4, 2, None, None, None]
    assert [row["sooner"] for row in rows] == [None, 1, 2, None, None, None]
    assert [(row["last"], row["best"], row["at"]) for row in rows[:3]] == [
        (20, 30, 2), (35, 35, 4), (50, 50, 4)]


def test_methods_and_networks_are_named_as_the_paper_names_them(run):
    out, content = run("base.pt idsnn.pt init.pt r.pt --recorded")
    rows = content["comparison"]
    assert [row["method"] for row in rows] == ["baseline", "init+KD", "init", "ANN"]
    assert [row["network"] for row in rows] == 3 * ["SNN-18/4"] + ["ResNet-18/4"]
    assert [row["epochs"] for row in rows] == [1, 2, 0, 1]
    assert "steps" not in content["runs"][0] and widest(out) <= 90


def test_comparison_prints_the_accuracies_asked_for(run, trained):
    out, content = run("base.pt idsnn.pt r.pt --T 1,2,4 --csv table.csv")
    assert widest(out) <= 90
    rows = list(csv.DictReader((trained / "table.csv").open()))
    assert [row["run"] for row in rows] == ["base", "idsnn", "r"]
    for row, r in zip(rows, content["runs"]):
        assert float(row["last"]) == r["history"][-1]["test_acc"]
        assert all(f"{accuracy:.2f}" in out for accuracy in accuracies(r))
    for row, r in zip(rows[:2], content["runs"]):
        assert [float(row[f"T={T}"]) for T in (1, 2, 4)] == accuracies(r)


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_figure(run, trained, suffix):
    pytest.importorskip("matplotlib")
    run(f"base.pt idsnn.pt r.pt --plot fig.{suffix}")
    if suffix == "png":
        with Image.open(trained / "fig.png") as image:
            assert image.width >= 1600
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # not blank
    if suffix == "svg":
        assert (trained / "fig.svg").read_text().count("<path") > 50


def test_recorded_needs_no_images(run, trained):
    pytest.importorskip("matplotlib")
    config = torch.load("idsnn.pt", weights_only=True)["config"]
    changed("idsnn.pt", "moved.pt", config=config | dict(dataset="no/such/folder"))
    out, content = run("moved.pt --recorded --plot curves.png")
    assert content["comparison"][0]["data"] == "folder" and (trained / "curves.png").exists()


def test_json_has_no_nan(run, trained):
    weights = torch.load(trained / "idsnn.pt", weights_only=True)["model"]
    weights["fc.weight"] *= math.nan
    changed("idsnn.pt", "broken.pt", model=weights)
    out, content = run("broken.pt")
    assert content["runs"][0]["steps"][0]["loss"] is None
    assert "NaN" not in (trained / "out.json").read_text()


@pytest.mark.parametrize("encoding", ["ascii", "gbk"])
def test_a_console_that_lacks_a_character_loses_nothing(run, trained, monkeypatch, encoding):
    shutil.copy("idsnn.pt", "\N{MICRO SIGN}\N{GRINNING FACE}.pt")
    screen = io.BytesIO()
    command = "eval.py \N{MICRO SIGN}\N{GRINNING FACE}.pt --T 1 --device cpu --json kept.json"
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding=encoding))
    monkeypatch.setattr(train_teacher.signal, "signal", lambda *args: None)
    train_teacher.run_script(stage4.main)  # as the script is entered
    sys.stdout.flush()
    assert json.loads((trained / "kept.json").read_text())["runs"][0]["steps"]
    assert b"??" in screen.getvalue() and b"worst classes" in screen.getvalue()


# -------------------------------------------------------------------------------------- predictions
def test_predict(run, trained):
    data = train_teacher.load_data("digits", "data").to("cpu", torch.float32)
    grey = data.test_x[3, ..., 0].numpy()
    Image.fromarray(grey).save("grey.png")
    # as a colour image of twice the size, which shrinks to the same pixels
    Image.fromarray(grey.repeat(2, 0).repeat(2, 1)).convert("RGB").save("colour.png")
    out, content = run("idsnn.pt --T 1,2,3 --precision fp32 --predict grey.png colour.png")
    network = load_network("idsnn.pt")
    network.neuron.T = 3
    with torch.no_grad():
        scores = network(data.normalize(data.test_x[3:4].permute(0, 3, 1, 2)))[:, 0]  # (T, K)
    rows = content["runs"][0]["predictions"]
    assert [(row["image"], row["T"]) for row in rows] == [
        (name, T) for name in ("grey.png", "colour.png") for T in (1, 2, 3)]
    for row, T in zip(rows, (1, 2, 3)):
        probability, label = scores[:T].mean(0).softmax(0).max(0)
        assert row["class"] == data.classes[label]
        assert row["probability"] == pytest.approx(probability.item(), rel=1e-4)
    assert "8x8" in out and "grey.png" in out and "steps" not in content["runs"][0]
    # a teacher answers at once; two networks, one table
    rows = run("r.pt idsnn.pt --predict grey.png")[1]["runs"]
    assert [row["T"] for row in rows[0]["predictions"]] == ["ANN"]
    assert len(rows[1]["predictions"]) == 2


# ------------------------------------------------------------------------------------ user's errors
def test_mistakes_cost_one_line_and_overwrite_nothing(refused, trained, monkeypatch):
    torch.save(dict(format=1), "foreign.pt")
    weights = torch.load("idsnn.pt", weights_only=True)["model"]
    del weights["fc.bias"]
    changed("idsnn.pt", "lacking.pt", model=weights)
    changed("init.pt", "bare.pt", data=None)  # as made from torchvision's weights
    (trained / "truncated.pt").write_bytes((trained / "idsnn.pt").read_bytes()[:5000])
    (trained / "kept.csv").write_text("kept")
    (trained / "text.png").write_text("no image")
    before = sorted(path.name for path in trained.iterdir())
    for command, says in [
            ("nothing.pt", "nothing.pt does not exist"), ("foreign.pt", "foreign.pt is not"),
            ("truncated.pt", "truncated.pt"), ("lacking.pt", "fc.bias"),
            ("idsnn.pt nothing.pt --csv kept.csv", "nothing.pt"),
            ("--T 0", "--T"), ("--T 1,x", "--T"), ("--T 33", "--T"), ("r.pt --T 4", "--T"),
            ("--json no/such/folder.json", "--json"), ("--csv .", "--csv"),
            ("--json idsnn.pt", "--json"), ("--json new --csv new", "--csv"),
            ("--plot fig.txt", "--plot"), ("--export onnx x", "--export"),
            ("idsnn.pt base.pt --export nir x", "--export"),
            ("--export nir x --json y", "--export"), ("r.pt --export nir x", "--export"),
            ("bare.pt --export nir x", "bare.pt"), ("bare.pt --predict text.png", "bare.pt"),
            ("--recorded --predict text.png", "--predict"),
            ("--predict text.png", "text.png"), ("--predict none.png", "none.png"),
            ("init.pt --recorded --plot new.png", "nothing to draw"),
            ("--dataset cifar", "--dataset"), ("--batch-size 0", "--batch-size"),
            ("--precision fp8", "--precision"), ("--device tpu", "--device")]:
        assert says in refused(command), command
    monkeypatch.setattr(stage4.importlib.util, "find_spec", lambda name: None)
    assert "pip install matplotlib" in refused("--plot fig2.png")
    assert "pip install nir" in refused("--export nir x.nir")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused("")
    assert sorted(path.name for path in trained.iterdir()) == before
    assert (trained / "kept.csv").read_text() == "kept"


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
    data = train_teacher.load_data("digits", "data").to("cpu", torch.float64)
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
def test_nir_makes_the_same_spikes(arch, tmp_path, capsys):
    nir = pytest.importorskip("nir")
    model, data = lively(**arch)
    stage4.export_nir(str(tmp_path / "net.nir"), model, data.shape)
    said = capsys.readouterr().out
    ours = {}

    def keep(name, module, inputs, spikes):
        ours[name.replace(".", "_")] = spikes.unflatten(0, (3, -1)).numpy()

    for name, module in model.named_modules():
        if isinstance(module, BatchNormLIF):
            module.register_forward_hook(lambda *args, name=name: keep(name, *args))
    x, scores = answer(model, data, 3)
    graph = nir.read(tmp_path / "net.nir")
    theirs = interpret(graph, x.numpy(), float(graph.metadata["dt"]))
    assert graph.metadata["T"] == 3 and graph.nodes["conv1"].weight.dtype == np.float64
    for name, spikes in ours.items():
        assert np.array_equal(spikes, theirs[name]), name
    # silence would prove nothing
    assert np.mean([0 < spikes.mean() < 1 for spikes in ours.values()]) > 0.7
    np.testing.assert_allclose(scores.numpy(), theirs["output"], rtol=1e-9, atol=1e-12)
    # what the readers of the next test refuse
    assert ("SpikingJelly refuses decay 0" in said) == (arch.get("decay") == 0)
    assert ("snnTorch refuses decay 1" in said) == (arch.get("decay") == 1)


def read_by_snntorch(graph, x):
    from snntorch import utils
    from snntorch.import_nir import import_from_nir
    network = import_from_nir(graph)
    utils.reset(network)
    state, steps = None, []
    for x_t in x:
        scores, state = network(x_t, state)
        steps.append(scores)
    return torch.stack(steps)


def read_by_spikingjelly(graph, x):
    from spikingjelly.activation_based.nir_exchange import import_from_nir
    network, state, steps = import_from_nir(graph, dt=stage4.NIR_DT), None, []
    for x_t in x:
        scores, state = network(x_t, state)
        steps.append(scores)
    return torch.stack(steps)


@pytest.mark.parametrize("reader", [read_by_snntorch, read_by_spikingjelly])
@pytest.mark.parametrize("arch, refuser", [
    (dict(), None), (dict(block="sew"), None),
    (dict(decay=0.0), read_by_spikingjelly), (dict(decay=1.0), read_by_snntorch)])
def test_other_simulators_read_our_file(reader, arch, refuser, tmp_path):
    nir = pytest.importorskip("nir")
    pytest.importorskip("nirtorch")
    pytest.importorskip(reader.__name__.removeprefix("read_by_"))
    model, data = lively(**arch)
    model.float()
    stage4.export_nir(str(tmp_path / "net.nir"), model, data.shape)
    x, scores = answer(model, data.to("cpu", torch.float32), 5)
    graph = nir.read(tmp_path / "net.nir")
    if refuser is reader:
        with pytest.raises(Exception):
            reader(graph, x)
        return
    with torch.no_grad():
        torch.testing.assert_close(reader(graph, x), scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stem, says", [("3x3", "extra"), ("7x7", "max-pool")])
def test_nir_refuses_what_it_would_lose(stem, says, tmp_path, capsys):
    pytest.importorskip("nir")
    model = SpikingResNet(18, 10, 1, 2, stem).eval()
    model.extra = nn.Conv2d(1, 1, 1)
    with pytest.raises(SystemExit):
        stage4.export_nir(str(tmp_path / "net.nir"), model, (1, 8, 8))
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nir_export_of_a_trained_network(trained, monkeypatch, capsys):
    nir = pytest.importorskip("nir")
    monkeypatch.chdir(trained)
    stage4.main(
        "idsnn.pt --T 5 --precision fp64 --device cpu --export nir idsnn.nir".split())
    out = capsys.readouterr().out
    graph = nir.read(trained / "idsnn.nir")
    assert graph.metadata["T"] == 5 and graph.nodes["conv1"].weight.dtype == np.float64
    assert "idsnn.nir" in out and "mean of `output`" in out


def test_a_network_for_other_data_than_its_teachers(tmp_path, monkeypatch, capsys):
    """Stage 2 has read a folder; of CIFAR, not downloaded yet, mean and deviation are not known."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "set", size=(8, 8))
    train_teacher.main("--dataset digits --width 2 --depth 18 --epochs 1 --device cpu".split())
    transfer_init.main("--src r34.pt --dataset set --T 2".split())
    stage4.main("snn_init.pt --device cpu --json e.json".split())
    assert json.loads(Path("e.json").read_text())["runs"][0]["evaluated_on"]["name"] == "set"
    transfer_init.main("--src r34.pt --dataset cifar10 --T 2 --out cifar.pt".split())
    for flags in ("--predict set/train/cat/0.png", "--export nir net.nir"):
        with pytest.raises(SystemExit) as end:
            stage4.main(["cifar.pt", *flags.split()])
        error = capsys.readouterr().err
        assert end.value.code == 2 and "train it first" in error and error.count("\n") == 1


def test_a_column_of_words_and_numbers_is_one_of_numbers(capsys):
    for first, second in (("ANN", 1), (1, "ANN")):
        stage4.show("title", [{"run": "a", "T": first}, {"run": "b", "T": second}])
        assert [line[-3:] for line in capsys.readouterr().out.splitlines()[2:4]] == [
            f"{first:>3}", f"{second:>3}"]


def test_a_network_edited_since_costs_one_line(trained, monkeypatch, capsys):
    """Its constructor lacks an argument that the file names, or asks for another."""
    monkeypatch.chdir(trained)
    checkpoint = torch.load("base.pt", weights_only=True)
    for arch in (checkpoint["arch"] | dict(heads=2), checkpoint["arch"] | dict(depth=19)):
        torch.save(checkpoint | dict(arch=arch), "edited.pt")
        with pytest.raises(SystemExit) as end:
            stage4.main(["edited.pt", "--device", "cpu"])
        error = capsys.readouterr().err
        assert end.value.code == 2 and "edited.pt does not fit" in error
        assert error.count("\n") == 1
