"""Branches of a recorded step, on a CPU: what they compute, what waits for them."""
from contextlib import contextmanager

import pytest
import torch
from conftest import call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_idsnn
import train_teacher
from kernels import conv


class FakeStream:
    """A stream that says what waits for what."""
    log = []

    def __init__(self, name="branch"):
        self.name = name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def fake_recording(monkeypatch):
    """On a CPU: branches are taken, and `log` says what they and the main stream do."""
    log = FakeStream.log = []

    @contextmanager
    def stream(s):
        log.append(f"on {s.name}")
        yield
        log.append("back")

    fakes = dict(Stream=FakeStream, current_stream=lambda: FakeStream("main"), stream=stream)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(conv, "recording", lambda x: True)
    autocast = torch.is_autocast_enabled, torch.get_autocast_dtype
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: autocast[0]("cpu"))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: autocast[1]("cpu"))
    return log


def test_a_branch_keeps_what_it_reads_until_it_is_waited_for(fake_recording, monkeypatch):
    log, branch = fake_recording, conv.Branch()
    one, two = torch.ones(1), torch.ones(2)
    with branch.fork(one):
        log.append("work")
    with branch.fork(two):
        log.append("more")
    assert branch.tensors[0] is one and branch.tensors[1] is two
    branch.join()
    branch.join()  # of nothing
    begin = ["branch waits for main", "on branch"]
    assert log == [*begin, "work", "back", *begin, "more", "back", "main waits for branch"]
    assert not branch.tensors
    log.clear()
    monkeypatch.setattr(conv, "recording", lambda x: False)
    with branch.fork(one):
        log.append("in place")
    branch.join()
    assert log == ["in place"]


ODD = [dict(bias=True), dict(dilation=2), dict(groups=2), dict(padding_mode="circular"),
       dict(padding="same", stride=1)]


@pytest.mark.parametrize("options", [
    dict(), dict(stride=2), dict(kernel_size=1, padding=0), dict(kernel_size=7, padding=3), *ODD])
@pytest.mark.parametrize("half", [False, True])
def test_a_recorded_convolution_is_pytorchs_bit_for_bit(fake_recording, options, half):
    """Values and gradients, of 16 bits, too, as autocast computes them; what it does not know, and
    a weight that is not channels-last, is left to PyTorch."""
    options = dict(kernel_size=3, padding=1, bias=False) | options
    ours, theirs = (kind(4, 8, **options) for kind in (conv.Conv2d, torch.nn.Conv2d))
    theirs.load_state_dict(ours.state_dict())
    for layout in (torch.channels_last, torch.contiguous_format):
        results = []
        for layer in (ours.to(memory_format=layout), theirs.to(memory_format=layout)):
            layer.zero_grad()
            fake_recording.clear()
            x = torch.ones(2, 4, 9, 9).cumsum(2).cos().to(memory_format=layout).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                y = layer(x)
            (y.float() * torch.ones_like(y.float()).cumsum(3).sin()).sum().backward()
            results.append([y, x.grad, layer.weight.grad])
            if layer is ours:
                branched = "on branch" in fake_recording
                channels_last = layer.weight.is_contiguous(memory_format=torch.channels_last)
                odd = any(key in options for key in ("dilation", "groups", "padding_mode"))
                odd = odd or options["bias"] or options["padding"] == "same"
                assert branched == (channels_last and not odd)
        for a, b in zip(*results):
            assert a.dtype == b.dtype and torch.equal(a, b)


def test_the_branch_of_a_weight_gradient_keeps_all_that_it_reads(fake_recording, monkeypatch):
    kept, join = [], conv.Branch.join
    monkeypatch.setattr(
        conv.Branch, "join", lambda self: kept.append(self.tensors) or join(self))
    layer = train_teacher.conv(4, 8, 3, 2).to(memory_format=torch.channels_last)
    layer(torch.randn(2, 4, 6, 6)).sum().backward()
    gradient, images, weight = kept[-1]
    assert gradient.shape == (2, 8, 3, 3) and images.shape == (2, 4, 6, 6)
    assert torch.equal(weight, layer.weight)


def test_models_are_stacked_under_vmap():
    """torch.func's ensembles: vmap takes no question about a memory format."""
    models = [train_teacher.ResNet(18, 3, 1, 2).eval() for _ in range(2)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(2, 1, 8, 8)

    def scores(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    together = torch.vmap(scores)(parameters, buffers)
    for one, model in zip(together, models):
        torch.testing.assert_close(one, model(x))


def test_a_frozen_convolution_has_no_branch(fake_recording):
    layer = train_teacher.conv(4, 8, 3).to(memory_format=torch.channels_last).requires_grad_(False)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None and fake_recording == []


def test_a_gradient_that_something_adds_to_is_refused(fake_recording):
    """Its sum with another one would not wait for the branch: an error, not a wrong sum."""
    layer = train_teacher.conv(4, 4, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 5)

    def used_once():
        return layer(x).square().sum()

    def used_twice():
        return layer(layer(x)).square().sum()

    def penalty():
        return used_once() + layer.weight.square().sum()

    def penalty_first():
        return layer.weight.square().sum() + used_once()

    for loss in (used_twice, penalty, penalty_first, used_once):
        layer.zero_grad()
        if loss is used_once:  # nothing is left of the errors before
            loss().backward()
            continue
        with pytest.raises(RuntimeError, match="second gradient"):
            loss().backward()
    # nor of a backward that failed before its end
    layer.zero_grad()
    broken = x.clone().requires_grad_()
    broken.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer(broken).sum().backward()
    layer.zero_grad()
    used_once().backward()
    layer.zero_grad()
    twice = used_once()
    twice.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second gradient"):
        twice.backward()
    # the caller's own, not .grad
    layer.zero_grad()
    gradient, = torch.autograd.grad(used_once(), [layer.weight])
    used_once().backward()
    assert torch.equal(gradient, layer.weight.grad)


class Race(TorchDispatchMode):
    """Of operators outside a branch, those that touch what it wrote and nobody has waited for."""

    def __init__(self, log):
        super().__init__()
        self.log, self.seen, self.inside, self.found = log, 0, 0, []
        self.written = {}  # storages, kept: a stream does not get another one's memory

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        for event in self.log[self.seen:]:
            self.inside += {"on branch": 1, "back": -1}.get(event, 0)
            if event == "main waits for branch":
                self.written.clear()
        self.seen = len(self.log)
        result = operator(*args, **(kwargs or {}))

        def memory(tree):
            storages = [t.untyped_storage() for t in tree_leaves(tree) if torch.is_tensor(t)]
            return {storage.data_ptr(): storage for storage in storages}
        if self.inside:
            self.written |= memory(result)
        elif operator._opname != "detach" and memory((args, kwargs)).keys() & self.written:
            self.found.append(str(operator))
        return result


@pytest.mark.parametrize("module", [train_teacher, train_idsnn])
def test_nothing_reads_what_a_branch_has_not_finished(
        module, fake_recording, tmp_path, monkeypatch):
    """A whole step of either stage: teacher and weight gradients are waited for in time."""
    monkeypatch.chdir(tmp_path)
    flags = "--dataset digits --epochs 1 --batch-size 1024 --device cpu --precision fp32"
    with monkeypatch.context() as before:
        before.setattr(conv, "recording", lambda x: False)
        call(f"train_teacher.py {flags} --width 16 --depth 18")
        call("transfer_init.py --src r34.pt")
    races = []

    def recorded(step, args, device):
        def call():
            with Race(fake_recording) as race:
                step()
            races.append(race)
        return call

    monkeypatch.setattr(module, "recorded", recorded)
    monkeypatch.setattr(module, "evaluator", lambda *_: lambda: (0.0, 0.0))
    fake_recording.clear()
    width = "--width 16 --depth 18" if module is train_teacher else ""
    call(f"{module.__name__}.py {flags} {width} --out again.pt")
    assert len(races) == 1 and not races[0].found
    branches = fake_recording.count("on branch")
    assert branches == 20 + (module is train_idsnn)  # convolutions of a ResNet-18; the teacher
    # each branch ends before the next begins, the last one in the step
    waits = [event for event in fake_recording if "waits" in event]
    assert waits == ["branch waits for main", "main waits for branch"] * branches
