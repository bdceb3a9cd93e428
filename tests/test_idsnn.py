"""Stage 3: loss, firing rates, inheritance, ablations."""
import json
import math

import pytest
import torch

import train_idsnn
import train_teacher
import transfer_init
from test_teacher import make_folder
from train_idsnn import FiringRates, distillation, warn
from train_teacher import load_checkpoint
from transfer_init import BatchNormLIF, SpikingResNet


def test_distillation_by_hand():
    # temperature 2, scores (2 ln 3, 0) against the teacher's (0, 0): q_s = (3/4, 1/4), q_t = (1/2, 1/2)
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    scores, teacher = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    assert distillation(scores, teacher, 2.0).item() == pytest.approx(4 * kl)
    both = distillation(torch.cat([scores, teacher]), torch.zeros(2, 2), 2.0)  # mean over the batch
    assert both.item() == pytest.approx(2 * kl)


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
        assert last(made)["kd"] == 0 and last(made)["loss"] == pytest.approx(last(made)["ce"], rel=1e-5)
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
