"""Stage 3: loss, firing rates, inheritance, ablations."""
import importlib
import json
import math
import re
from pathlib import Path

import pytest
import torch

import train_idsnn
import train_teacher
import transfer_init
from test_teacher import make_folder
from train_idsnn import FiringRates, distillation, objective, warn
from train_teacher import load_checkpoint
from transfer_init import BatchNormLIF, SpikingResNet


def test_distillation_by_hand():
    # temperature 2, scores (2 ln 3, 0) against the teacher's (0, 0): q_s = (3/4, 1/4), q_t = (1/2, 1/2)
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    scores, teacher = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    assert distillation(scores, teacher, 2.0).item() == pytest.approx(4 * kl)
    both = distillation(torch.cat([scores, teacher]), torch.zeros(2, 2), 2.0)  # mean over the batch
    assert both.item() == pytest.approx(2 * kl)


def by_hand(scores, target, teacher, ce="mean", kd="mean", alpha=0.3, self_kd=0.0, temperature=4.0, label_smoothing=0.0):
    """Parts of the loss for one image, straight from eq. 5 to 8: scores (T, K), target (K,), teacher (K,)."""
    softmax = lambda s: [math.exp(v) / sum(math.exp(u) for u in s) for v in s]
    soft = lambda s: softmax([v / temperature for v in s])
    kl = lambda p, q: temperature ** 2 * sum(a * math.log(a / b) for a, b in zip(p, q))
    entropy = lambda p, s: -sum(a * math.log(b) for a, b in zip(p, softmax(s)))
    mean = [sum(column) / len(scores) for column in zip(*scores)]
    asked = dict(mean=[mean], steps=scores)
    average = lambda values: sum(values) / len(values)
    smooth = [(1 - label_smoothing) * v + label_smoothing / len(target) for v in target]
    return dict(ce=average([entropy(smooth, s) for s in asked[ce]]), kd=average([kl(soft(teacher), soft(s)) for s in asked[kd]]),
                self_kd=average([kl(soft(mean), soft(s)) for s in scores]))


@pytest.mark.parametrize("flags", [{}, dict(ce="steps"), dict(kd="steps"), dict(ce="steps", kd="steps", self_kd=0.7), dict(label_smoothing=0.2)])
def test_objective_by_hand(flags):
    g = torch.Generator().manual_seed(3)
    scores, teacher = torch.randn(3, 2, 4, generator=g, dtype=torch.float64), torch.randn(2, 4, generator=g, dtype=torch.float64)
    target = torch.tensor([[0, 1.0, 0, 0], [0.25, 0, 0, 0.75]], dtype=torch.float64)
    args = train_idsnn.parse_args([])
    vars(args).update(train_idsnn.PAPER | flags)
    parts, loss = objective(scores.requires_grad_(), target, teacher, args)
    images = [by_hand(scores[:, i].tolist(), target[i].tolist(), teacher[i].tolist(), **flags) for i in range(2)]
    for name, part in parts.items():
        assert part.item() == pytest.approx((images[0][name] + images[1][name]) / 2), name
    assert parts.keys() == {"ce", "kd"} | ({"self_kd"} if "self_kd" in flags else set())
    weight = dict(ce=1, kd=0.3, self_kd=flags.get("self_kd", 0))
    assert loss.item() == pytest.approx(sum(weight[name] * part.item() for name, part in parts.items()))
    assert objective(scores, target, None, args)[0].keys() == parts.keys() - {"kd"}


def test_the_mean_teaches_the_steps_and_not_they_it():
    scores = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]], requires_grad=True)  # their mean says nothing: it must not move
    args = train_idsnn.parse_args([])
    vars(args).update(train_idsnn.PAPER | dict(self_kd=1.0))
    parts, _ = objective(scores, torch.tensor([[0.5, 0.5]]), None, args)
    gradient, = torch.autograd.grad(parts["self_kd"], scores)
    # d/ds of temperature^2 * KL(q || softmax(s / temperature)), mean over 2 steps: temperature / 2 * (softmax(s / temperature) - q)
    soft = torch.softmax(scores / 4, -1)
    assert torch.allclose(gradient, 4 / 2 * (soft - 0.5))


def test_firing_rates_count_what_evaluation_sees():
    torch.manual_seed(0)
    net = SpikingResNet(width=2, num_classes=3, T=2)
    firing, seen = FiringRates(net), {}
    for name, m in net.named_modules():
        if isinstance(m, BatchNormLIF):
            m.register_forward_hook(lambda m, i, spikes, name=name: seen.setdefault(name, []).append(spikes.clone()))
    net(torch.randn(4, 3, 8, 8))  # in training: not counted
    seen.clear()
    net.eval()
    for size in (3, 1):  # unequal batches: the mean is over images
        net(torch.randn(size, 3, 8, 8))
    rates = firing.read()
    assert rates == pytest.approx({name: torch.cat(s).mean().item() for name, s in seen.items()})
    assert all(math.isnan(r) for r in firing.read().values())  # starts anew


def test_warnings_name_dead_and_saturated_layers():
    assert list(warn({"bn1": 0.2, "layer1.0.bn1": 0.999})) == []
    dead, saturated = warn({"bn1": 0.0, "layer1.0.bn1": 0.0, "layer4.1.bn2": 1.0, "layer1.0.bn2": 0.3})
    assert "bn1 never fires (as do 1 more)" in dead and "--v-th" in dead
    assert "layer4.1.bn2 always fires:" in saturated and "--v-th" in saturated


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_folder(folder / "set", train=8, test=3, size=(8, 8))
        train_teacher.main(["--dataset", "set", "--width", "2", "--depth", "18", "--epochs", "1", "--batch-size", "8", "--no-flip"])
        transfer_init.main(["--src", "r34.pt", "--T", "3", "--decay", "0.5"])
    return folder


def train(*flags):
    """Stage 3 without a step that changes much: what it starts from shows in what it ends with."""
    train_idsnn.main(["--epochs", "1", "--lr", "1e-12", "--weight-decay", "0", "--batch-size", "8", "--out", "x.pt", "--fresh", *flags])
    return load_checkpoint("x.pt", "idsnn")


def test_stage_3_inherits_and_flags_override(stages, monkeypatch):
    monkeypatch.chdir(stages)
    made = train()
    assert made["config"]["dataset"] == "set" and made["config"]["crop_padding"] == 4
    assert (made["arch"]["T"], made["arch"]["decay"], made["arch"]["width"]) == (3, 0.5, 2)
    assert made["provenance"]["parents"]["init"]["path"] == "snn_init.pt" and made["provenance"]["parents"]["teacher"]["path"] == "r34.pt"
    made = train("--T", "2", "--v-th", "0.7")
    assert (made["arch"]["T"], made["arch"]["v_th"], made["arch"]["decay"]) == (2, 0.7, 0.5)


def test_ablations(stages, monkeypatch):
    monkeypatch.chdir(stages)
    init = load_checkpoint("snn_init.pt")["model"]["layer2.0.conv1.weight"]
    close = lambda made: torch.allclose(made["model"]["layer2.0.conv1.weight"], init, atol=1e-6)
    full, no_init, no_kd, baseline = train(), train("--no-init"), train("--no-kd"), train("--no-init", "--no-kd")
    assert close(full) and close(no_kd) and not close(no_init) and not close(baseline)
    last = lambda made: made["metrics"]["history"][-1]
    for made in (full, no_init):
        assert last(made)["kd"] > 0 and last(made)["loss"] == pytest.approx(last(made)["ce"] + 0.3 * last(made)["kd"], rel=1e-5)
    for made in (no_kd, baseline):
        assert "kd" not in last(made) and last(made)["loss"] == pytest.approx(last(made)["ce"], rel=1e-5)
        assert "teacher" not in made["provenance"]["parents"]


def test_log_and_history_are_the_same(stages, monkeypatch):
    monkeypatch.chdir(stages)
    made = train("--epochs", "2")
    lines = [json.loads(line) for line in open("x.pt.jsonl")]
    assert lines[1:] == made["metrics"]["history"] and [row["epoch"] for row in lines[1:]] == [1, 2]
    best = max(row["test_acc"] for row in lines[1:])
    assert lines[made["metrics"]["best_epoch"]]["test_acc"] == best
    assert set(lines[1]["rates"]) == {name for name, m in SpikingResNet(width=2).named_modules() if isinstance(m, BatchNormLIF)}


def test_a_half_precision_run_keeps_fp32_weights(stages, monkeypatch):
    monkeypatch.chdir(stages)
    start = load_checkpoint("snn_init.pt")["model"]
    train_idsnn.main(["--epochs", "1", "--batch-size", "8", "--precision", "bf16", "--out", "half.pt"])
    made = load_checkpoint("half.pt")
    assert all(v.dtype == torch.float32 for k, v in made["model"].items() if "num_batches" not in k)
    assert not torch.equal(made["model"]["layer3.0.conv1.weight"], start["layer3.0.conv1.weight"])
    assert math.isfinite(made["metrics"]["history"][-1]["loss"])


def test_a_recipe_fills_what_no_flag_says(stages, monkeypatch):
    monkeypatch.chdir(stages)
    for recipe, values in train_idsnn.RECIPES.items():
        assert values.keys() == train_idsnn.PAPER.keys()
        made = train("--recipe", recipe)["config"]
        told = {"epochs", "lr", "weight_decay", "batch_size"}
        assert {k: made[k] for k in values if k not in told} == {k: v for k, v in values.items() if k not in told}
    assert train("--recipe", "best", "--self-kd", "0")["config"]["self_kd"] == 0


def test_every_command_of_the_readme_is_understood():
    readme = (Path(train_idsnn.__file__).parent / "README.md").read_text().replace("$S", "0")
    commands = re.findall(r"python (train_teacher|transfer_init|train_idsnn|eval)\.py([^`&;|#\n]*)", readme)
    assert len(commands) > 20
    for script, flags in commands:
        args = importlib.import_module(script).parse_args(re.sub(r"--plot \S+", "", flags).split())  # which needs matplotlib
        if script == "train_idsnn":
            train_teacher.fill_defaults(args, train_idsnn.RECIPES, train_idsnn.DIGITS)


@pytest.fixture
def renamed(tmp_path, monkeypatch):
    """A teacher and an initialised student of classes cat, dog, owl, and the same images with another order of the names."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "set", size=(8, 8))
    train_teacher.main("--dataset set --width 2 --depth 18 --epochs 1 --batch-size 4 --device cpu".split())
    transfer_init.main("--src r34.pt --T 2".split())
    for split in ("train", "test"):
        (tmp_path / "set" / split / "cat").rename(tmp_path / "set" / split / "yak")


@pytest.mark.parametrize("command", [
    lambda: train_idsnn.main("--epochs 1 --batch-size 4 --device cpu".split()),
    lambda: train_idsnn.main("--epochs 1 --batch-size 4 --device cpu --no-kd".split()),
    lambda: transfer_init.main("--src r34.pt --dataset set --classifier transfer --out other.pt".split()),
    lambda: importlib.import_module("eval").main("r34.pt --device cpu".split())])
def test_labels_that_mean_something_else_are_refused(renamed, capsys, command):
    with pytest.raises(SystemExit) as end:
        command()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "knows class 0 as 'cat', the data set as 'dog'" in error and error.count("\n") == 1
