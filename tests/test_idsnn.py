"""Stage 3: loss, firing rates, inheritance, ablations."""
import importlib
import json
import math

import pytest
import torch
from test_teacher import make_folder

import train_idsnn
import train_teacher
import transfer_init
from train_idsnn import FiringRates, distillation, firing_warnings, objective
from train_teacher import load_checkpoint
from transfer_init import BatchNormLIF, SpikingResNet


def test_distillation_by_hand():
    # temperature 2, scores (2 ln 3, 0) against the teacher's (0, 0):
    # q_s = (3/4, 1/4), q_t = (1/2, 1/2)
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    scores, teacher = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    assert distillation(scores, teacher, 2.0).item() == pytest.approx(4 * kl)
    both = distillation(torch.cat([scores, teacher]), torch.zeros(2, 2), 2.0)  # mean over the batch
    assert both.item() == pytest.approx(2 * kl)


def by_hand(scores, label, taught, per_step, alpha=0.3, temperature=4.0):
    """Cross-entropy and distillation of one image, straight from eq. 5 to 8.

    scores: T lists of K. label: a class. taught: K scores of the teacher.
    """
    def softmax(values):
        return [math.exp(v) / sum(math.exp(u) for u in values) for v in values]

    def kd(answer):
        p = softmax([v / temperature for v in taught])
        q = softmax([v / temperature for v in answer])
        return temperature ** 2 * sum(a * math.log(a / b) for a, b in zip(p, q))

    mean = [sum(column) / len(scores) for column in zip(*scores)]
    answers = scores if per_step else [mean]
    ces = [-math.log(softmax(answer)[label]) for answer in answers]
    kds = [kd(answer) for answer in answers]
    return sum(ces) / len(ces), sum(kds) / len(kds)


@pytest.mark.parametrize("per_step", [False, True])
def test_objective_by_hand(per_step):
    g = torch.Generator().manual_seed(3)
    scores = torch.randn(3, 2, 4, generator=g, dtype=torch.float64)  # (T, B, K)
    taught = torch.randn(2, 4, generator=g, dtype=torch.float64)
    labels = torch.tensor([1, 3])
    ce, kd, loss = objective(scores, labels, taught, 0.3, 4.0, per_step)
    images = [by_hand(scores[:, i].tolist(), labels[i].item(), taught[i].tolist(), per_step)
              for i in range(2)]
    assert ce.item() == pytest.approx((images[0][0] + images[1][0]) / 2)
    assert kd.item() == pytest.approx((images[0][1] + images[1][1]) / 2)
    assert loss.item() == pytest.approx(ce.item() + 0.3 * kd.item())
    alone, none, total = objective(scores, labels, None, 0.3, 4.0, per_step)
    assert alone == ce == total and none == 0


def test_firing_rates_count_what_evaluation_sees():
    torch.manual_seed(0)
    net = SpikingResNet(width=2, num_classes=3, T=2)
    firing, seen = FiringRates(net), {}
    names = {m: name for name, m in net.named_modules() if isinstance(m, BatchNormLIF)}

    def keep(m, inputs, spikes):
        seen.setdefault(names[m], []).append(spikes.clone())

    for m in names:
        m.register_forward_hook(keep)
    net(torch.randn(4, 3, 8, 8))  # in training: not counted
    seen.clear()
    net.eval()
    for size in (3, 1):  # unequal batches: the mean is over images
        net(torch.randn(size, 3, 8, 8))
    rates = firing.read()
    assert rates == pytest.approx({name: torch.cat(s).mean().item() for name, s in seen.items()})
    assert all(math.isnan(r) for r in firing.read().values())  # starts anew


def test_warnings_name_dead_and_saturated_layers():
    assert list(firing_warnings({"bn1": 0.2, "layer1.0.bn1": 0.999})) == []
    rates = {"bn1": 0.0, "layer1.0.bn1": 0.0, "layer4.1.bn2": 1.0, "layer1.0.bn2": 0.3}
    dead, saturated = firing_warnings(rates)
    assert "bn1 never fires (2 of 4 layers)" in dead and "--v-th" in dead
    assert "layer4.1.bn2 always fires (1 of 4" in saturated and "--v-th" in saturated


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_folder(folder / "set", train=8, test=3, size=(8, 8))
        train_teacher.main("--dataset set --width 2 --depth 18 --epochs 1 --batch-size 8 --no-flip "
                           "--device cpu".split())
        transfer_init.main("--src r34.pt --T 3 --decay 0.5".split())
    return folder


def train(*flags):
    """Stage 3 without a step that changes much: what it starts from shows in what it ends with."""
    train_idsnn.main(["--device", "cpu", "--epochs", "1", "--lr", "1e-12", "--weight-decay", "0",
                      "--batch-size", "8", "--out", "x.pt", "--fresh", *flags])
    return load_checkpoint("x.pt", "idsnn")


def test_stage_3_inherits_and_flags_override(stages, monkeypatch):
    monkeypatch.chdir(stages)
    made = train()
    assert made["config"]["dataset"] == "set" and made["config"]["crop_padding"] == 4
    assert (made["arch"]["T"], made["arch"]["decay"], made["arch"]["width"]) == (3, 0.5, 2)
    parents = made["provenance"]["parents"]
    assert (parents["init"]["path"], parents["teacher"]["path"]) == ("snn_init.pt", "r34.pt")
    made = train("--T", "2", "--v-th", "0.7")
    assert (made["arch"]["T"], made["arch"]["v_th"], made["arch"]["decay"]) == (2, 0.7, 0.5)


def test_ablations(stages, monkeypatch):
    monkeypatch.chdir(stages)
    init = load_checkpoint("snn_init.pt")["model"]["layer2.0.conv1.weight"]
    for flags in ("", "--no-init", "--no-kd", "--no-init --no-kd"):
        made = train(*flags.split())
        row = made["metrics"]["history"][-1]
        started = torch.allclose(made["model"]["layer2.0.conv1.weight"], init, atol=1e-6)
        assert started == ("--no-init" not in flags)
        assert row["loss"] == pytest.approx(row["ce"] + 0.3 * row["kd"], rel=1e-5)
        assert (row["kd"] > 0) == ("--no-kd" not in flags)
        assert ("teacher" in made["provenance"]["parents"]) == ("--no-kd" not in flags)


def test_log_and_history_are_the_same(stages, monkeypatch):
    monkeypatch.chdir(stages)
    made = train("--epochs", "2")
    lines = [json.loads(line) for line in open("x.pt.jsonl")]
    assert lines[1:] == made["metrics"]["history"] and [row["epoch"] for row in lines[1:]] == [1, 2]
    best = max(row["test_acc"] for row in lines[1:])
    assert lines[made["metrics"]["best_epoch"]]["test_acc"] == best
    layers = {k for k, m in SpikingResNet(width=2).named_modules() if isinstance(m, BatchNormLIF)}
    assert set(lines[1]["rates"]) == layers


def test_a_half_precision_run_keeps_fp32_weights(stages, monkeypatch):
    monkeypatch.chdir(stages)
    start = load_checkpoint("snn_init.pt")["model"]
    train_idsnn.main("--device cpu --epochs 1 --batch-size 8 --precision bf16 "
                     "--out half.pt".split())
    made = load_checkpoint("half.pt")
    assert all(v.dtype == torch.float32 for k, v in made["model"].items() if "num_batches" not in k)
    assert not torch.equal(made["model"]["layer3.0.conv1.weight"], start["layer3.0.conv1.weight"])
    assert math.isfinite(made["metrics"]["history"][-1]["loss"])


def test_a_recipe_fills_what_no_flag_says(stages, monkeypatch):
    monkeypatch.chdir(stages)
    for recipe, values in train_idsnn.RECIPES.items():
        args, init = train_idsnn.parse_args(["--recipe", recipe])
        assert values.keys() == train_idsnn.PAPER.keys() and vars(args).items() >= values.items()
        assert (args.T, args.decay, args.dataset) == (3, 0.5, "set") and init["stage"] == "init"
    assert train_idsnn.PAPER["alpha"] == 0.3 and train_idsnn.PAPER["temperature"] == 4


def test_help_shows_what_init_says(stages, monkeypatch, capsys):
    monkeypatch.chdir(stages)
    for flags, shown in (("", "time-steps (default: 3)"),
                         ("--init none.pt", "time-steps (default: as in --init) --decay")):
        with pytest.raises(SystemExit) as end:
            train_idsnn.parse_args([*flags.split(), "--help"])
        assert end.value.code == 0 and shown in " ".join(capsys.readouterr().out.split())


def test_the_answer_is_the_mean_over_time_in_the_weights_precision(stages, monkeypatch):
    monkeypatch.chdir(stages)
    seen = []
    evaluate = train_idsnn.evaluate

    def spy(predict, data, **kwargs):
        def wrapped(images, index):
            scores = predict(images, index)
            seen.append(scores.dtype)
            return scores
        return evaluate(wrapped, data, **kwargs)

    monkeypatch.setattr(train_idsnn, "evaluate", spy)
    train("--precision", "bf16")
    assert set(seen) == {torch.float32}


def test_compiled_networks_train_to_the_same_losses(stages, monkeypatch):
    """Student and teacher through Dynamo; Inductor's own arithmetic is not what is tested."""
    monkeypatch.chdir(stages)
    compiled, compile = [], torch.compile

    def eager(model, options=None):
        compiled.append(type(model).__name__)
        return compile(model, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    plain, made = train("--precision", "fp64"), train("--precision", "fp64", "--compile")
    assert sorted(compiled) == ["ResNet", "SpikingResNet"]
    losses = [c["metrics"]["history"][0]["loss"] for c in (plain, made)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.fixture
def renamed(tmp_path, monkeypatch):
    """Teacher and student of cat, dog, owl; the same images with another order of the names."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "set", size=(8, 8))
    train_teacher.main("--dataset set --width 2 --depth 18 --epochs 1 --batch-size 4 "
                       "--device cpu".split())
    transfer_init.main("--src r34.pt --T 2".split())
    for split in ("train", "test"):
        (tmp_path / "set" / split / "cat").rename(tmp_path / "set" / split / "yak")


@pytest.mark.parametrize("script,flags", [
    ("train_idsnn", "--epochs 1 --batch-size 4 --device cpu"),
    ("train_idsnn", "--epochs 1 --batch-size 4 --device cpu --no-kd"),
    ("transfer_init", "--src r34.pt --dataset ./set --classifier transfer --out other.pt"),
    ("eval", "r34.pt --device cpu")])
def test_labels_that_mean_something_else_are_refused(renamed, capsys, script, flags):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main(flags.split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert "knows class 0 as 'cat', the data set as 'dog'" in error
