"""Stage 4: counters against numbers derived by hand, the report, the comparison, the figures, NIR."""
import csv
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import eval as stage4
import train_idsnn
import train_teacher
import transfer_init
from transfer_init import BatchNormLIF, Neuron, SpikingResNet


# -------------------------------------------------------------------------------------- counters, by hand
class Tiny(nn.Module):
    """conv 1x1 -> LIF -> conv 3x3 -> LIF -> mean over pixels -> linear, on 2x2 images, T 2, threshold 1, decay 1/2."""

    def __init__(self, adds=False):
        super().__init__()
        neuron = Neuron(T=2, decay=0.5, v_th=1.0)
        self.conv1, self.bn1 = nn.Conv2d(1, 1, 1, bias=False), BatchNormLIF(1, neuron)
        self.conv2, self.layer4 = nn.Conv2d(1, 2, 3, padding=1, bias=False), BatchNormLIF(2, neuron)
        self.fc, self.adds = nn.Linear(2, 3), adds
        self.bn1.eps = self.layer4.eps = 0.0  # statistics 0 and 1: the batch norms do nothing
        with torch.no_grad():
            self.conv1.weight.fill_(1)
            self.conv2.weight.zero_()
            self.conv2.weight[0, 0, 1, 1] = 2  # channel 0 repeats each spike, channel 1 stays silent

    def forward(self, x):
        static = x.dim() == 4
        s = self.bn1(self.conv1(x if static else x.flatten(0, 1)), static=static)
        return self.fc(self.layer4(self.conv2(s + s if self.adds else s)).mean((2, 3)))


def counted(model, *batches, T):
    counters = stage4.Counters(model, T)
    with torch.no_grad():
        for x in batches:
            model.eval()(x)
    return {layer["name"]: layer for layer in counters.read()}


@pytest.mark.parametrize("adds", [False, True])
def test_counters_by_hand(adds):
    # a current of 1.5 is above 1 in both steps; 0.7 only in the second, 0.7/2 + 0.7 = 1.05; 0.3 in neither, 0.3 and 0.45
    a = torch.tensor([[[[1.5, 0.7], [1.5, 0.3]]]])
    b = torch.tensor([[[[1.5, 0.0], [0.7, 0.0]]]])
    layers = counted(Tiny(adds), a, b, T=2)
    assert list(layers) == ["conv1", "bn1", "conv2", "layer4", "fc"]

    # spikes in step 1: pixels 0 and 2 of a, 0 of b; in step 2: pixels 0, 1 and 2 of a, 0 and 2 of b. Of 4 neurons x 2 images: 3/8, 5/8
    bn1 = layers["bn1"]
    assert bn1["neurons"] == 4 and bn1["rate"] == [3 / 8, 5 / 8]
    assert bn1["dead"] == [2, 1]        # pixels 1 and 3 at first, then 3 alone
    assert bn1["saturated"] == [1, 1]   # pixel 0; pixel 2 misses one of its four chances
    # the second LIF layer repeats them in channel 0 (current 2 or 4, above 1) and is silent in the 4 neurons of channel 1
    layer4 = layers["layer4"]
    assert layer4["neurons"] == 8 and layer4["rate"] == [3 / 16, 5 / 16]
    assert layer4["dead"] == [6, 5] and layer4["saturated"] == [1, 1]

    # conv1: 1*1*1 * 1*2*2 = 4 MACs on the image, once. conv2: 1*3*3 * 2*2*2 = 72 MACs, of which 3/8 and 5/8 in the two steps
    conv1, conv2, fc = layers["conv1"], layers["conv2"], layers["fc"]
    assert (conv1["macs"], conv1["reads"], conv1["once"], conv1["acs"]) == (4, "analogue values", True, None)
    assert conv2["macs"] == 72 and conv2["nonzero"] == [3, 5] and conv2["acs"] == [27, 45]
    assert conv2["reads"] == ("sums of spikes" if adds else "spikes")
    # fc: 2*3 = 6 MACs; each of the 3 and 5 spikes below the mean adds 3 weights, over 2 images: 4.5 and 7.5
    assert fc["macs"] == 6 and fc["reads"] == "spikes" and fc["acs"] == [4.5, 7.5]

    layers = list(layers.values())
    one, two, ann = stage4.energy(layers, 1), stage4.energy(layers, 2), stage4.as_ann(layers)
    assert (one["acs"], one["macs"]) == (27 + 4.5, 4) and math.isclose(one["joules"], (0.9 * 31.5 + 4.6 * 4) * 1e-12)
    assert (two["acs"], two["macs"]) == (31.5 + 45 + 7.5, 4) and math.isclose(two["joules"], 94.0e-12)
    assert ann["macs"] == 4 + 72 + 6 and math.isclose(ann["joules"], 377.2e-12)
    assert counted(Tiny(), torch.ones(1, 1, 2, 2), T=2)["conv1"]["reads"] == "analogue values"  # an image whose values happen to be 1


def test_counters_of_spiking_input_by_hand():
    x = torch.zeros(2, 1, 1, 2, 2)  # (T, B, C, H, W)
    x[0, 0, 0, 0, 0] = x[0, 0, 0, 0, 1] = x[1, 0, 0, 1, 1] = 2  # pixels 0 and 1 in step 1, pixel 3 in step 2
    model = Tiny()
    layers = counted(model, x, T=2)
    bn1 = layers["bn1"]
    assert bn1["rate"] == [2 / 4, 1 / 4] and bn1["dead"] == [2, 1] and bn1["saturated"] == [2, 0]
    # 4 MACs, of which 2/4 and 1/4; the values are 2, not 1
    conv1 = layers["conv1"]
    assert conv1["reads"] == "sums of spikes" and not conv1["once"] and conv1["acs"] == [2, 1]


def test_multiplications_of_resnet18_on_cifar():
    # stem 3*9*64*32^2; stage 1: 4 convolutions of 64*64*9*32^2; stages 2 to 4 each: the first half as wide, three, a 1x1 shortcut
    stage = 64 * 128 * 9 * 16**2 + 3 * 128 * 128 * 9 * 16**2 + 64 * 128 * 16**2
    expected = 3 * 9 * 64 * 32**2 + 4 * 64 * 64 * 9 * 32**2 + 3 * stage + 512 * 10
    assert expected == 555_422_720  # the 0.56 G of the literature
    layers = counted(SpikingResNet(18, 10, T=1), torch.rand(1, 3, 32, 32), T=1)
    assert stage4.as_ann(layers.values())["macs"] == expected


# ----------------------------------------------------------------------------------- the pipeline's files
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the checkpoints of a short run on the digits: r.pt, init.pt, idsnn.pt, base.pt."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_teacher.main("--dataset digits --depth 18 --width 4 --epochs 1 --warmup 0 --out r.pt".split())
        transfer_init.main("--src r.pt --T 2 --out init.pt".split())
        train_idsnn.main("--init init.pt --epochs 2 --warmup 0 --out idsnn.pt".split())
        train_idsnn.main("--init init.pt --epochs 1 --warmup 0 --no-init --no-kd --out base.pt".split())
    return folder


@pytest.fixture
def run(trained, monkeypatch, capsys):
    """run(command line) -> (what was printed, its --json)."""
    monkeypatch.chdir(trained)
    monkeypatch.setattr(stage4, "time", SimpleNamespace(perf_counter=itertools.count().__next__))  # one pass is timed, not a second's worth

    def run(command):
        capsys.readouterr()
        stage4.main(command.split() + ["--json", "out.json"])
        return capsys.readouterr().out, json.loads(Path("out.json").read_text())
    return run


def refused(command, capsys):
    """The one line on stderr of a command that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        stage4.main(command.split())
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and "error: " in err
    return err


def test_accuracy_is_what_training_recorded_and_shorter_runs_are_prefixes(run):
    out, content = run("")  # idsnn.pt by default
    r = content["runs"][0]
    assert [s["T"] for s in r["steps"]] == [1, 2]
    assert r["steps"][1]["accuracy"] == r["history"][-1]["test_acc"]
    assert r["steps"][1]["loss"] == pytest.approx(r["history"][-1]["test_loss"], rel=1e-6)
    recorded = r["history"][-1]["rates"]  # of training's own hooks
    measured = {layer["name"]: np.mean(layer["rate"]) for layer in r["layers"] if layer["kind"] == "lif"}
    assert measured == pytest.approx(recorded, rel=1e-5)
    longer = run("idsnn.pt --T 1 4 --batch-size 77")[1]["runs"][0]
    assert [s["T"] for s in longer["steps"]] == [1, 4]
    for what in ("accuracy", "loss", "acs", "joules"):
        assert longer["steps"][0][what] == pytest.approx(r["steps"][0][what], rel=1e-6)
    assert longer["joules"] == pytest.approx(r["steps"][1]["joules"], rel=1e-6)  # of a comparison: at the trained T


def test_one_screen_within_80_columns(run):
    out, content = run("idsnn.pt")
    assert max(map(len, out.splitlines())) <= 80 and len(out.splitlines()) < 50
    for layer in content["runs"][0]["layers"]:
        assert layer["kind"] != "lif" or layer["name"] in out
    teacher = content["runs"][0]["teacher"]
    assert teacher["steps"][0]["accuracy"] == teacher["last"] and f"r.pt: {teacher['last']:.2f}%" in out


def test_missing_or_changed_teacher_costs_one_line(run, trained):
    keep = (trained / "r.pt").read_bytes()
    try:
        (trained / "r.pt").unlink()
        assert "not evaluated: r.pt is not here" in run("")[0]
        (trained / "r.pt").write_bytes(keep + b"x")
        assert "not evaluated: r.pt has changed" in run("")[0]
    finally:
        (trained / "r.pt").write_bytes(keep)


def test_teacher_and_untrained_network_evaluate_too(run):
    out, content = run("r.pt")
    r = content["runs"][0]
    assert r["steps"][0]["accuracy"] == r["last"] and r["joules"] == r["ann"]["joules"] and "measured" in out
    out, content = run("init.pt")
    assert "not trained" in out and content["runs"][0]["steps"][0]["acs"] > 0


@pytest.mark.parametrize("flags", ["--decay 0.9 --v-th 0.8 --T 3", "--depth 34", "--block sew", "--encoder poisson"])
def test_modified_networks_evaluate_without_editing(run, flags):
    transfer_init.main(f"--src r.pt {flags} --out other.pt --fresh".split())
    out, content = run("other.pt")
    r = content["runs"][0]
    assert len(r["steps"]) == r["arch"]["T"] and max(map(len, out.splitlines())) <= 80 and len(out.splitlines()) < 52
    reads = {layer["name"]: layer["reads"] for layer in r["layers"] if layer["kind"] == "synapses"}
    assert ("not binary" in out) == ("sums of spikes" in reads.values()) == ("sew" in flags)
    assert reads["conv1"] == ("spikes" if "poisson" in flags else "analogue values")
    assert reads["layer1.0.conv1"] == "spikes"


def test_own_image_folder_normalised_as_in_training(run, trained):
    from PIL import Image
    data = train_teacher.load_data("digits", "data")
    for i in range(100):
        for split in ("train", "test"):
            folder = trained / "own" / split / f"{int(data.test_y[i])}"
            folder.mkdir(parents=True, exist_ok=True)
            picture = data.test_x[i, ..., 0].numpy() if split == "test" else np.full((8, 8), 255, np.uint8)  # other statistics
            Image.fromarray(picture).save(folder / f"{i}.png")
    out, content = run("idsnn.pt --dataset own --data-dir cache --T 2")
    checkpoint = torch.load(trained / "idsnn.pt", weights_only=True)
    model = SpikingResNet(**checkpoint["arch"])
    model.load_state_dict(checkpoint["model"])
    with torch.no_grad():
        x = data.to("cpu", torch.float32).normalize(data.test_x[:100].permute(0, 3, 1, 2))
        expected = (model.eval()(x).mean(0).argmax(1) == data.test_y[:100]).double().mean() * 100
    assert content["runs"][0]["steps"][0]["accuracy"] == pytest.approx(expected.item())
    assert "other images" in out


# --------------------------------------------------------------------------------- comparison and figures
def result(name, accuracies, init=True, kd=True, T=4, dataset="cifar100", classifier="fresh", teacher={}, **config):
    """What `describe` makes of a finished run of the paper's recipe."""
    history = [dict(epoch=i + 1, test_acc=a, seconds=2.0) for i, a in enumerate(accuracies)]
    best = max(history, key=lambda row: row["test_acc"])
    return dict(file=name, stage="idsnn", dataset=dataset, T=T, init=init, kd=kd, epochs=len(history), last=accuracies[-1], history=history,
                arch=dict(depth=18, width=64, block="basic", encoder="direct", T=T), best=best["test_acc"], best_epoch=best["epoch"],
                seconds=2.0 * len(history), config=train_idsnn.PAPER | dict(milestones=[60, 120, 160]) | config, data=dict(train=50_000),
                provenance=dict(parents=dict(init=dict(config=dict(classifier=classifier)), teacher=dict(config=train_teacher.PAPER | teacher))))


def test_comparison_by_hand():
    rows = stage4.compare([result("base.pt", [10, 30, 20], False, False), result("idsnn.pt", [20, 29, 30, 50]),
                           result("bad.pt", [1, 2], kd=False)])
    assert [row["epochs_to_baseline"] for row in rows] == [2, 3, None]
    assert {row["baseline"] for row in rows} == {"base.pt"}
    assert [(row["last_acc"], row["best_acc"], row["best_epoch"]) for row in rows] == [(20, 30, 2), (50, 50, 4), (2, 2, 2)]


@pytest.mark.parametrize("run, paper", [
    (result("a", [1]), (75.24, None, "Table 2")),
    (result("a", [1], T=6), (75.41, 138, "Table 2")),
    (result("a", [1], dataset="cifar10"), (94.03, None, "Table 1")),
    (result("a", [1], False, False), (71.31, 192, "Table 4")),
    (result("a", [1], True, False), (74.47, None, "Table 3")),
    (result("a", [1], False, True, dataset="cifar10"), (93.98, None, "Table 3")),
    (result("a", [1], milestones=[10, 20, 30], epochs=100), (73.02, 57, "Table 4")),
    (result("a", [1], milestones=[20, 40, 60], epochs=100), (74.45, 54, "Table 4")),
    (result("a", [1], epochs=100), None),            # the paper's 60,120,160 belongs to 200 epochs
    (result("a", [1], lr=0.1), None),
    (result("a", [1], label_smoothing=0.1), None),
    (result("a", [1], classifier="transfer"), None),
    (result("a", [1], False, classifier="transfer"), (73.71, 195, "Table 4")),  # of which --no-init leaves nothing
    (result("a", [1], teacher=dict(aug="strong")), None),
    (result("a", [1], T=5, dataset="digits"), None),
    (result("a", [1]) | dict(data=dict(train=20_000)), None),  # a part of CIFAR
])
def test_papers_row_is_that_of_the_same_setting(run, paper):
    assert stage4.reported(run) == paper


def test_comparison_table_and_csv(run, trained):
    out, content = run("base.pt idsnn.pt --csv table.csv")
    rows = list(csv.DictReader((trained / "table.csv").open()))
    assert [row["run"] for row in rows] == ["base.pt", "idsnn.pt"] and [row["initialisation"] for row in rows] == ["False", "True"]
    assert max(map(len, out.splitlines())) <= 80
    for row, r in zip(rows, content["runs"]):
        assert float(row["last_acc"]) == r["history"][-1]["test_acc"] and float(row["joules"]) == r["joules"] > 0
        assert f"{float(row['last_acc']):.2f}" in out
    out, content = run("base.pt idsnn.pt r.pt --no-energy")
    assert [row["joules"] for row in content["comparison"]] == [None] * 3 and "steps" not in content["runs"][0]


def test_figures(run, trained):
    pytest.importorskip("matplotlib")
    from PIL import Image
    out, _ = run("base.pt idsnn.pt --plot fig.png")
    for name in ("fig.png", "fig-firing.png"):
        with Image.open(trained / name) as im:
            assert im.width >= 1600 and len(im.convert("RGB").getcolors(1 << 24)) > 50 and name in out  # not blank
    run("base.pt idsnn.pt --no-energy --plot curves.png")
    assert (trained / "curves.png").exists() and not (trained / "curves-firing.png").exists()


def test_json_has_no_nan(run, trained):
    broken = torch.load(trained / "idsnn.pt", weights_only=True)
    broken["model"]["fc.weight"] *= math.nan
    torch.save(broken, trained / "broken.pt")
    out, content = run("broken.pt")
    assert content["runs"][0]["steps"][0]["loss"] is None and "NaN" not in (trained / "out.json").read_text()


# ------------------------------------------------------------------------------------------ user's errors
def test_mistakes_cost_one_line_and_overwrite_nothing(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    torch.save(dict(format=1), "foreign.pt")
    bad = torch.load("idsnn.pt", weights_only=True)
    del bad["model"]["fc.bias"]
    torch.save(bad, "lacking.pt")
    (trained / "truncated.pt").write_bytes((trained / "idsnn.pt").read_bytes()[:5000])
    (trained / "kept.csv").write_text("kept")
    before = sorted(p.name for p in trained.iterdir())
    for command, says in [
            ("nothing.pt", "nothing.pt does not exist"), ("foreign.pt", "foreign.pt is not"), ("truncated.pt", "truncated.pt"),
            ("lacking.pt", "fc.bias"), ("idsnn.pt nothing.pt --csv kept.csv", "nothing.pt"), ("--T 0", "--T"), ("--T x", "--T"),
            ("r.pt --T 4", "--T"), ("--json no/such/folder.json", "--json"), ("--csv .", "--csv"), ("--json idsnn.pt", "--json"),
            ("--plot fig.txt", "--plot"), ("--export onnx x", "--export"), ("idsnn.pt base.pt --export nir x", "--export"),
            ("--no-energy", "--no-energy"), ("--dataset cifar", "--dataset"), ("--batch-size 0", "--batch-size")]:
        assert says in refused(command, capsys), command
    monkeypatch.setattr(stage4.importlib.util, "find_spec", lambda name: None)
    assert "pip install matplotlib" in refused("--plot fig2.png", capsys) and "pip install nir" in refused("--export nir x.nir", capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in refused("", capsys)
    assert sorted(p.name for p in trained.iterdir()) == before and (trained / "kept.csv").read_text() == "kept"


@pytest.mark.parametrize("value, text", [(0, "0 J"), (0.00256, "2.56 mJ"), (9.996e-6, "10.0 µJ"), (999.7e-9, "1.00 µJ"), (47, "47.0 J")])
def test_metric_prefixes(value, text):
    assert stage4.si(value, "J") == text


# ---------------------------------------------------------------------------------------------------- NIR
def interpret(graph, x, dt):
    """A NIR graph on inputs (T, B, ...) in plain numpy, by the formulas of NIR's documentation."""
    def windows(a, k, stride, pad):  # (B, C, H, W) -> (B, C, H', W', k, k)
        a = np.pad(a, ((0, 0), (0, 0), (pad[0],) * 2, (pad[1],) * 2))
        return np.lib.stride_tricks.sliding_window_view(a, tuple(k), (2, 3))[:, :, :: stride[0], :: stride[1]]

    incoming = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    potential, outputs = {}, []
    for x_t in x:
        done = {}

        def value(name):
            if name in done:
                return done[name]
            node, kind = graph.nodes[name], type(graph.nodes[name]).__name__
            i = sum(value(source) for source in incoming[name]) if kind != "Input" else x_t
            if kind == "Conv2d":
                i = np.einsum("bchwij,ocij->bohw", windows(i, node.weight.shape[2:], node.stride, node.padding), node.weight, optimize=True)
                i = i + node.bias[:, None, None]
            elif kind == "SumPool2d":
                i = windows(i, node.kernel_size, node.stride, node.padding).sum((4, 5))
            elif kind == "AvgPool2d":
                i = windows(i, node.kernel_size, node.stride, node.padding).mean((4, 5))
            elif kind == "Threshold":
                i = (i > node.threshold).astype(float)
            elif kind == "Flatten":
                i = i.reshape(len(i), -1)
            elif kind == "Affine":
                i = i @ node.weight.T + node.bias
            elif kind in ("LIF", "IF"):
                v = potential.get(name, 0.0)
                v = v + dt * ((node.v_leak - v + node.r * i) / node.tau if kind == "LIF" else node.r * i)
                i = (v > node.v_threshold).astype(float)
                potential[name] = np.where(i == 1, node.v_reset, v)
            else:
                assert kind in ("Input", "Output"), kind
            done[name] = i
            return i

        value("output")
        outputs.append(done)
    return {name: np.stack([done[name] for done in outputs]) for name in graph.nodes}


@pytest.mark.parametrize("arch", [
    dict(), dict(block="sew"), dict(depth=50, width=2), dict(depth=50, width=2, block="sew"), dict(stem="7x7"), dict(decay=0.0),
    dict(decay=1.0, v_th=0.3), dict(encoder="poisson")])
def test_nir_makes_the_same_spikes(arch, tmp_path):
    nir = pytest.importorskip("nir")
    torch.manual_seed(0)
    model = SpikingResNet(**(dict(depth=18, num_classes=10, in_channels=1, width=4, T=3) | arch)).double().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):  # as after training
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.2, 0.6)
            m.running_mean.uniform_(-0.5, 0.5)
            m.running_var.uniform_(0.5, 2)
    data = train_teacher.load_data("digits", "data").to("cpu", torch.float64)
    said = stage4.export_nir(str(tmp_path / "net.nir"), model, data, images=3)
    ours = {}
    for name, m in model.named_modules():
        if isinstance(m, BatchNormLIF):
            m.register_forward_hook(lambda m, x, out, name=name: ours.update({name.replace(".", "_"): out.unflatten(0, (3, -1)).numpy()}))
    with torch.no_grad():
        x = model.encode(data.test_x[:3].permute(0, 3, 1, 2), data, 0)
        scores = model(x)
    graph = nir.read(tmp_path / "net.nir")
    theirs = interpret(graph, (x if x.dim() == 5 else x.expand(3, *x.shape)).numpy(), float(graph.metadata["dt"]))
    assert graph.metadata["T"] == 3
    for name, spikes in ours.items():
        assert 0 < spikes.mean() < 1 or name.startswith("layer4"), name  # silence would prove nothing
        assert np.array_equal(spikes, theirs[name]), name
    np.testing.assert_allclose(scores.numpy(), theirs["output"], rtol=1e-9, atol=1e-12)
    total = sum(spikes.size for spikes in ours.values())
    assert f"{total:,} of {total:,}" in said["NIR"]


def test_nir_refuses_what_it_would_lose(tmp_path):
    pytest.importorskip("nir")
    model = SpikingResNet(18, 10, 1, 2).eval()
    model.extra = nn.Conv2d(1, 1, 1)
    data = train_teacher.load_data("digits", "data").to("cpu", torch.float32)
    with pytest.raises(SystemExit):
        stage4.export_nir(str(tmp_path / "net.nir"), model, data, images=2)
    assert list(tmp_path.iterdir()) == []


def test_nir_file_that_disagrees_is_not_written(run, trained, monkeypatch, capsys):
    pytest.importorskip("nir")
    (trained / "old.nir").write_text("old")
    true = stage4.run_nir
    monkeypatch.setattr(stage4, "run_nir", lambda graph, x: {name: 1 - out for name, out in true(graph, x).items()})
    with pytest.raises(SystemExit) as end:
        stage4.main("idsnn.pt --T 1 --export nir old.nir".split())
    assert end.value.code == 1 and "disagrees" in capsys.readouterr().err
    assert (trained / "old.nir").read_text() == "old" and not (trained / "old.nir.tmp").exists()


def test_nir_export_of_a_trained_network(run, trained):
    nir = pytest.importorskip("nir")
    out, _ = run("idsnn.pt --T 1 --precision fp64 --export nir idsnn.nir")
    graph = nir.read(trained / "idsnn.nir")
    assert graph.metadata["T"] == 2 and graph.nodes["conv1"].weight.dtype == np.float64
    steps = " ".join(out.split()).split("the same in ")[1].split()
    assert steps[0] == steps[2] != "0"  # all of all
