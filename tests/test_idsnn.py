"""Stage 3: loss, firing rates, inheritance, ablations, parents that do not fit."""
import dataclasses
import json
import math

import pytest
import torch
from conftest import CPU, call
from test_distributed import few

import train_idsnn
import train_teacher
import transfer_init
from train_idsnn import FiringRates, distillation, firing_warnings, objective
from train_teacher import load_checkpoint
from transfer_init import BatchNormLIF, SpikingResNet


# -------------------------------------------------------------------------------------------- loss
def test_distillation_by_hand():
    # temperature 2, scores (2 ln 3, 0) against the teacher's (0, 0):
    # q_s = (3/4, 1/4), q_t = (1/2, 1/2)
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    scores, teacher = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    assert distillation(scores, teacher, 2.0).item() == pytest.approx(4 * kl)
    both = distillation(torch.cat([scores, teacher]), torch.zeros(2, 2), 2.0)  # mean over the batch
    assert both.item() == pytest.approx(2 * kl)


def by_hand(scores, label, taught, per_step, temperature=4.0):
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


# ------------------------------------------------------------------------------------ firing rates
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
    rates = firing.read(4)
    assert rates == pytest.approx({name: torch.cat(s).mean().item() for name, s in seen.items()})
    seen.clear()
    net(torch.randn(2, 3, 8, 8))
    again = firing.read(2)  # counts anew
    assert again == pytest.approx({name: s[0].mean().item() for name, s in seen.items()})
    assert again != pytest.approx(rates)


def test_spikes_of_16_bits_are_counted_exactly():
    net = SpikingResNet(width=2, num_classes=3, T=2).eval()
    firing, spikes = FiringRates(net), torch.ones(2, 2, 30, 30, dtype=torch.bfloat16)
    spikes[0, 0, 0, 0] = 0
    firing.count(0, net.bn1, (), spikes)
    assert firing.spikes[0] == 2 * 1800 - 1  # in bf16 3,600


def test_warnings_name_dead_and_saturated_layers():
    assert list(firing_warnings({"bn1": 0.2, "layer1.0.bn1": 0.999})) == []
    rates = {"bn1": 0.0, "layer1.0.bn1": 0.0, "layer4.1.bn2": 1.0, "layer1.0.bn2": 0.3}
    dead, saturated = firing_warnings(rates)
    assert "bn1 never fires (2 of 4 layers)" in dead and "--v-th" in dead
    assert "layer4.1.bn2 always fires (1 of 4" in saturated and "--v-th" in saturated


# ------------------------------------------------------------------------------------------- flags
@pytest.fixture
def quick(here, monkeypatch):
    """A hundred digits; the network of --init has other constants than stage 2's defaults."""
    monkeypatch.setattr(train_teacher, "load_digits", few)
    call("transfer_init.py --src r34.pt --T 3 --decay 0.5 --out three.pt")


# a step hardly changes a weight: what a run starts from shows in what it ends with
STILL = (f"train_idsnn.py --init three.pt --out x.pt --epochs 1 --batch-size 48 {CPU} "
         "--lr 1e-9 --weight-decay 0 --fresh ")


def train(flags=""):
    call(STILL + flags)
    return load_checkpoint("x.pt", "idsnn")


def test_stage_3_inherits_and_flags_override(quick):
    made = train()
    assert made["config"]["dataset"] == "digits" and made["config"]["crop_padding"] == 1
    assert (made["arch"]["T"], made["arch"]["decay"], made["arch"]["width"]) == (3, 0.5, 8)
    parents = made["parents"]
    assert (parents["init"]["path"], parents["teacher"]["path"]) == ("three.pt", "r34.pt")
    made = train("--T 2 --v-th 0.7")
    assert (made["arch"]["T"], made["arch"]["v_th"], made["arch"]["decay"]) == (2, 0.7, 0.5)


def test_ablations(quick):
    init = load_checkpoint("three.pt")["model"]["layer2.0.conv1.weight"]
    for flags in ("", "--no-init", "--no-kd", "--no-init --no-kd"):
        made = train(flags)
        row = made["history"][-1]
        started = torch.allclose(made["model"]["layer2.0.conv1.weight"], init, atol=1e-6)
        assert started == ("--no-init" not in flags)
        assert row["loss"] == pytest.approx(row["ce"] + 0.3 * row["kd"], rel=1e-5)
        assert (row["kd"] > 0) == ("--no-kd" not in flags)
        assert ("teacher" in made["parents"]) == ("--no-kd" not in flags)


def test_a_recipe_fills_what_no_flag_says(quick):
    for recipe, values in train_idsnn.RECIPES.items():
        assert values.keys() == train_idsnn.PAPER.keys()
        for dataset, more in (("cifar100", {}), ("digits", train_idsnn.DIGITS)):
            flags = f"--init three.pt --recipe {recipe} --dataset {dataset}"
            args, init = train_idsnn.parse_args(flags.split())
            assert vars(args).items() >= (values | more).items()
            assert (args.T, args.decay) == (3, 0.5) and init["stage"] == "init"
    assert train_idsnn.PAPER["alpha"] == 0.3 and train_idsnn.PAPER["temperature"] == 4


def test_help_shows_what_init_says(quick, run):
    for init, shown in (("three.pt", "time-steps (default: 3)"),
                        ("none.pt", "time-steps (default: as in --init) --decay")):
        result = run(f"train_idsnn.py --init {init} --help")
        assert result.status == 0 and shown in " ".join(result.out.split())


# ------------------------------------------------------------------------------------------- a run
def test_log_and_history_are_the_same(quick):
    made = train("--epochs 2")
    lines = [json.loads(line) for line in open("x.pt.jsonl")]
    assert lines[1:] == made["history"] and [row["epoch"] for row in lines[1:]] == [1, 2]
    layers = {k for k, m in SpikingResNet(width=2).named_modules() if isinstance(m, BatchNormLIF)}
    assert set(lines[1]["rates"]) == layers
    assert lines[1]["firing"] == pytest.approx(100 * sum(lines[1]["rates"].values()) / len(layers))


def test_a_half_precision_run_keeps_fp32_weights(quick):
    start = load_checkpoint("three.pt")["model"]
    made = train("--precision bf16 --lr 0.01")
    assert all(v.dtype == torch.float32 for k, v in made["model"].items() if "num_batches" not in k)
    assert not torch.equal(made["model"]["layer3.0.conv1.weight"], start["layer3.0.conv1.weight"])
    assert math.isfinite(made["history"][-1]["loss"])


def test_the_answer_is_the_mean_over_time_in_the_weights_precision(quick, monkeypatch):
    """In bf16 two classes of 103 would often tie."""
    answers, scores = [], []
    evaluator, forward = train_idsnn.evaluator, SpikingResNet.forward

    def spying_evaluator(predict, data, args):
        def spying(images, index):
            answers.append(predict(images, index))
            return answers[-1]
        return evaluator(spying, data, args)

    def spying_forward(model, x):
        scores.append(forward(model, x))
        return scores[-1]

    monkeypatch.setattr(train_idsnn, "evaluator", spying_evaluator)
    monkeypatch.setattr(SpikingResNet, "forward", spying_forward)
    train("--precision bf16")
    assert scores[-1].dtype == torch.bfloat16 and len(answers) == 1
    assert answers[0].dtype == torch.float32 and torch.equal(answers[0], scores[-1].float().mean(0))


def test_an_edited_neuron_runs_and_the_header_says_so(quick, run, monkeypatch):
    """As README's forking table has it."""
    from kernels import lif  # the module's function; its globals are what a forker edits
    reference, calls = lif.__globals__["lif_reference"], []
    monkeypatch.setitem(
        lif.__globals__, "lif_reference", lambda *args: calls.append(1) or reference(*args))
    for module in (transfer_init, train_idsnn):
        monkeypatch.setattr(module, "IMPL", "reference")
    out = run(STILL).out
    assert "kernels  reference\n" in out and calls


def test_a_run_warns_of_silent_layers(quick, run):
    out = run(STILL + "--v-th 1000").out
    assert "warning: bn1 never fires (17 of 17 layers): try a lower --v-th" in out


# ------------------------------------------------------------------------- parents that do not fit
def edited(source, path, **changes):
    torch.save(torch.load(source, weights_only=True) | changes, path)


def test_labels_that_mean_something_else_are_refused(quick, refused, monkeypatch):
    """The same ten names in another order: of the network's classes, or of its teacher's."""
    def swapped(dataset, data_dir):
        data = few(dataset, data_dir)
        return dataclasses.replace(data, classes=["1", "0", *data.classes[2:]])

    edited("r34.pt", "other.pt", data=swapped("digits", "data").describe())
    known = "the teacher in other.pt knows class 0 as '1', the data set as '0'"
    assert known in refused(f"{STILL} --teacher other.pt")
    monkeypatch.setattr(train_teacher, "load_digits", swapped)
    known = "the network in three.pt knows class 0 as '0', the data set as '1'"
    assert known in refused(STILL)


def test_networks_for_other_data_are_refused(quick, refused):
    """By the number of classes or of channels."""
    for stage, source, remedies in [
        ("teacher", "r34.pt", ["train one on these data", "--no-kd"]),
        ("init", "three.pt", ["transfer_init.py --dataset digits"]),
    ]:
        for other in (dict(num_classes=7), dict(in_channels=3)):
            arch = load_checkpoint(source)["arch"] | other
            edited(source, "other.pt", arch=arch)
            line = refused(f"{STILL} --{stage} other.pt")
            assert f"in other.pt is for {arch['num_classes']} classes and" in line
            assert f"{arch['in_channels']} channels, digits has 10 and 1" in line
            assert all(remedy in line for remedy in remedies), line


def test_a_network_whose_file_names_no_teacher(quick, run, refused):
    train("--no-kd")
    again = STILL.replace("three.pt", "x.pt").replace("--out x.pt", "--out y.pt")
    assert "x.pt names no teacher: say --teacher, or --no-kd" in refused(again)
    for flags in ("--teacher r34.pt", "--no-kd"):
        assert run(again + flags).status == 0
