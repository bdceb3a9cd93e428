"""Stage 3: the loss and training steps by hand, firing rates, ablations, teachers, refusals."""
import json
import math

import pytest
import torch
from conftest import CPU, call
from test_transfer import lively

import train_teacher
from train_idsnn import FiringRates, distillation, objective
from train_teacher import Images, ResNet, load_checkpoint
from transfer_init import SpikingResNet

digits = train_teacher.load_digits


def few():
    """The digits, but only 96 and 48 of them."""
    d = digits()
    return Images("digits", d.classes, d.train_x[:96], d.train_y[:96], d.test_x[:48], d.test_y[:48])


@pytest.fixture
def train(here, monkeypatch):
    """train("--no-kd") -> x.pt, trained from three.pt, whose neuron is not stage 2's default."""
    monkeypatch.setattr(train_teacher, "load_digits", few)
    call("transfer_init.py --src r34.pt --T 3 --decay 0.5 --out three.pt")

    def train(flags=""):
        # a step hardly changes a weight: what a run starts from shows in what it ends with
        call(f"train_idsnn.py --init three.pt --out x.pt --epochs 1 --batch-size 48 {CPU} "
             f"--lr 1e-9 --weight-decay 0 {flags}")
        return load_checkpoint("x.pt", "idsnn")
    return train


def edited(source, path, **changes):
    torch.save(torch.load(source, weights_only=True) | changes, path)


# -------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("per_step", [False, True])
def test_objective_and_distillation_by_hand(per_step):
    # two steps' scores (B, K) for an image, whose mean is (0, 0), as the teacher's are: no distance
    scores = torch.tensor([[[2 * math.log(3), 0.0]], [[-2 * math.log(3), 0.0]]])
    label, taught, ce, kl = torch.tensor([0]), torch.zeros(1, 2), math.log(2), 0
    if per_step:  # probabilities (9/10, 1/10), then (1/10, 9/10). at temperature 2: 3/4 and 1/4
        ce = (math.log(10 / 9) + math.log(10)) / 2
        kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)  # of the teacher's 1/2 and 1/2
        assert distillation(scores[0], taught, 2.0).item() == pytest.approx(4 * kl)
    loss, terms = objective(scores, label, taught, 0.3, 2.0, per_step)
    found = [loss.item(), terms["ce"].item(), terms["kd"].item()]
    assert found == pytest.approx([ce + 0.3 * 4 * kl, ce, 4 * kl], abs=1e-6)
    loss, terms = objective(scores, label, None, 0.3, 2.0, per_step)
    assert terms.keys() == {"ce"} and loss.item() == pytest.approx(ce)


@torch.no_grad()
def test_firing_rates_count_what_evaluation_sees():
    net = lively(SpikingResNet(width=2, num_classes=3, T=2)).train()
    firing, seen = FiringRates(net), []
    net.layer1[0].bn1.register_forward_hook(lambda m, x, spikes: seen.append(spikes))
    net(torch.randn(4, 3, 8, 8).double())  # in training: not counted
    for sizes in ((3, 1), (2,)):  # unequal batches: the mean is over images; then it counts anew
        seen.clear()
        for size in sizes:
            net.eval()(torch.randn(size, 3, 8, 8).double())
        rates = firing.read()
        assert len(rates) == 17
        assert 0 < rates["layer1.0.bn1"] == pytest.approx(torch.cat(seen).mean().item())


# ------------------------------------------------------------------------------------------- a run
@pytest.mark.parametrize("per_step", [False, True])
def test_two_steps_by_hand(train, per_step):
    """Each is an epoch of all 96 images, in fp64, where their order changes nothing. That the
    second step's kd fits, too, says that the teacher is frozen, its statistics as well."""
    flags = "--lr 0.05 --weight-decay 0.01 --schedule step --milestones 1 --warmup 0"
    flags += " --alpha 0.4 --temperature 3 --per-step" if per_step else ""
    made = train(f"--epochs 2 --batch-size 96 --crop-padding 0 --precision fp64 {flags}")
    alpha, temperature = (0.4, 3) if per_step else (0.3, 4)  # the paper's
    data = few().to("cpu", torch.float64, torch.contiguous_format)
    inputs = data.normalize(data.train_x.permute(0, 3, 1, 2))  # (N, H, W, C) -> (N, C, H, W)
    init, taught = load_checkpoint("three.pt", "init"), load_checkpoint("r34.pt", "teacher")
    model, teacher = SpikingResNet(**init["arch"]), ResNet(**taught["arch"])
    model.load_state_dict(init["model"])
    teacher.load_state_dict(taught["model"])
    model.double().train()
    p = (teacher.double().eval()(inputs).detach() / temperature).softmax(1)
    velocity = [0] * len(list(model.parameters()))
    for row, lr in zip(made["history"], (0.05, 0.005), strict=True):
        scores = model(inputs)
        answers = scores if per_step else scores.mean(0, keepdim=True)
        ce = -answers.log_softmax(2)[:, torch.arange(96), data.train_y].mean()
        kl = (p * (p.log() - (answers / temperature).log_softmax(2))).sum(2).mean()
        loss = ce + alpha * temperature ** 2 * kl
        accuracy = 100 * (scores.mean(0).argmax(1) == data.train_y).double().mean()
        terms = dict(loss=loss, ce=ce, kd=temperature ** 2 * kl, train_acc=accuracy)
        assert {name: row[name] for name in terms} == pytest.approx(
            {name: term.item() for name, term in terms.items()})
        grads = torch.autograd.grad(loss, model.parameters())
        with torch.no_grad():
            for i, (weight, grad) in enumerate(zip(model.parameters(), grads)):
                velocity[i] = 0.9 * velocity[i] + grad + 0.01 * weight
                weight -= lr * velocity[i]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(made["model"][name], value, rtol=1e-7, atol=1e-9)


def test_every_epoch_is_logged_with_its_rates(train, capsys):
    made = train("--epochs 2")
    header, *lines = [json.loads(line) for line in open("x.pt.jsonl")]
    assert lines == made["history"] and [row["epoch"] for row in lines] == [1, 2]
    assert "T 3" in header["network"] and header["teacher"] == "r34.pt"
    rates = lines[0]["rates"]
    assert len(rates) == 17 and all(0 <= rates[layer] <= 1 for layer in ("bn1", "layer4.1.bn2"))
    assert lines[0]["firing"] == pytest.approx(100 * sum(rates.values()) / len(rates))
    train("--v-th 1000")
    assert "warning: no spike in bn1, layer1.0.bn1, " in capsys.readouterr().out


def test_poisson_spikes_are_others_in_every_epoch_and_seeded(train, monkeypatch):
    call("transfer_init.py --src r34.pt --encoder poisson --T 2 --out three.pt")
    # whole epochs in one step and one order, and weights that stay: only the spikes differ
    plan = torch.stack([torch.arange(96), *torch.zeros(3, 96, dtype=torch.int64)])[None]
    monkeypatch.setattr(train_teacher.Batches, "plan", lambda *args: plan)
    first, again, other = (
        [row["loss"] for row in train(
            f"--batch-size 96 --lr 0 --no-kd --epochs 2 --seed {seed}")["history"]]
        for seed in (0, 0, 1))
    assert first == again and len({*first, *other}) == 4


def test_the_neuron_is_as_in_the_file_and_flags_override(train):
    made = train()
    arch, config = made["arch"], made["config"]
    assert (arch["T"], arch["decay"], arch["v_th"], arch["detach_reset"]) == (3, 0.5, 0.5, True)
    # the recipe of the paper, and what else holds for the digits
    assert config["dataset"] == "digits" and config["crop_padding"] == 1
    assert (config["alpha"], config["temperature"], config["momentum"]) == (0.3, 4, 0.9)
    arch = train("--T 2 --v-th 0.7 --no-detach-reset")["arch"]
    assert (arch["T"], arch["decay"], arch["v_th"], arch["detach_reset"]) == (2, 0.5, 0.7, False)


@pytest.mark.parametrize("flags", ["", "--no-init", "--no-kd", "--no-init --no-kd"])
def test_ablations(train, flags):
    made, name = train(flags), "layer2.0.conv1.weight"
    given = load_checkpoint("three.pt", "init")["model"][name]
    assert torch.allclose(made["model"][name], given, atol=1e-6) == ("--no-init" not in flags)
    kd = "--no-kd" not in flags
    assert ("kd" in made["history"][0]) == kd
    assert made["parents"] == dict(init="three.pt") | (dict(teacher="r34.pt") if kd else {})


def test_a_trained_network_can_be_trained_on(train):
    train("--lr 0.01")
    train("--init x.pt --out y.pt")
    tuned, before = load_checkpoint("y.pt", "idsnn"), load_checkpoint("x.pt", "idsnn")
    assert torch.allclose(tuned["model"]["fc.weight"], before["model"]["fc.weight"], atol=1e-6)
    assert tuned["parents"] == dict(init="x.pt", teacher="r34.pt")  # the teacher is in x.pt, too


def test_a_teacher_can_be_named(train):
    edited("three.pt", "orphan.pt", parents={})
    edited("r34.pt", "other.pt")
    for init in ("three.pt", "orphan.pt"):
        made = train(f"--init {init} --teacher other.pt")
        assert made["parents"] == dict(init=init, teacher="other.pt")


@pytest.mark.parametrize("flags,says", [
    ("--init none.pt", "none.pt does not exist"),
    ("--init orphan.pt", "orphan.pt names no teacher"),
    ("--out three.pt", "--out three.pt would replace"),
    ("--out r34.pt", "--out r34.pt would replace"),
    # the same ten names in another order: of the network's classes, or of its teacher's
    ("--init swapped.pt", "swapped.pt: other classes"),
    ("--teacher swapped-r34.pt", "swapped-r34.pt: other classes")])
def test_what_does_not_fit_is_refused(train, flags, says):
    data = few().describe() | dict(classes=list("1023456789"))
    edited("three.pt", "orphan.pt", parents={})
    edited("three.pt", "swapped.pt", data=data)
    edited("r34.pt", "swapped-r34.pt", data=data)
    with pytest.raises(SystemExit, match=says):
        train(flags)
