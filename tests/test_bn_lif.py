"""bn_lif against its specification and against nn.BatchNorm2d."""

import importlib
import os

import conftest  # noqa: F401  spawned processes need it, too
import pytest
import torch

from kernels import BatchNorm2d, bn_act, bn_lif
from kernels.bn_lif import bn_lif_reference
from kernels.lif import INTERPRET, lif_reference, triton

module = importlib.import_module("kernels.bn_lif")  # kernels.bn_lif the attribute is the function
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")
both = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
ALL = (0, 1, 3, 4)  # T, B, H, W


@pytest.fixture(autouse=True)
def poison():
    """Uninitialised memory is NaN, and 255 in the bits: what a kernel forgets to write shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    assert torch.ones(1).new_empty(3, dtype=torch.uint8).eq(255).all()
    yield
    torch.use_deterministic_algorithms(before)


def laid(x, layout):
    """x (T, B, C, H, W), same values, in another memory layout."""
    if layout == "channels_last":
        return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    if layout == "batch_outermost":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x.contiguous()


def inputs(T, B, C, H, W, layout="channels_last", residual_layout=None, dtype=torch.float32,
           static=False):
    """x, weight, bias, residual, all with gradients, and an upstream gradient.

    A third of the neurons fire.
    """
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    new = dict(device=DEVICE, dtype=torch.float64)
    x = torch.randn(1 if static else T, B, C, H, W, **new) * 1.5 + torch.randn(C, 1, 1, **new)
    weight, bias = torch.rand(C, **new) + 0.5, torch.randn(C, **new) * 0.3
    residual = None
    if residual_layout:
        residual = (torch.rand(T, B, C, H, W, **new) < 0.2).to(dtype)
        residual = laid(residual, residual_layout).requires_grad_()
    g = torch.randn(T, B, C, H, W, **new).to(dtype)
    tensors = [laid(x.to(dtype), layout), weight.to(vector), bias.to(vector)]
    return *[t.requires_grad_() for t in tensors], residual, laid(g, layout)


def gradients(spikes, tensors, g):
    return torch.autograd.grad(spikes, [t for t in tensors if t is not None], g)


def close(actual, expected, bound):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape and a.dtype == e.dtype
        error = ((a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30)).item()
        assert error <= bound, f"gradient {i}: relative error {error:.2e} > {bound:.0e}"  # NaN too


def rows(x):
    return x.permute(0, 1, 3, 4, 2).contiguous()


def statistics(x):
    """Biased variance and mean of each channel, in fp32 or fp64."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return torch.var_mean(x, ALL, correction=0)


# ---------------------------------------------------------------------------- the kernels

# shape, layout, residual's layout, neuron, dtype. rows and channels off and on the tiles' sizes,
# T on and off whole bytes
CASES = [
    ((1, 3, 5, 7, 9), "channels_last", None, {}, torch.float32),
    ((2, 2, 16, 4, 4), "channels_last", "channels_last", dict(eps=0.3), torch.float32),
    ((4, 3, 96, 3, 5), "channels_last", "contiguous", {}, torch.float32),
    ((4, 2, 10, 4, 4), "channels_last", "channels_last", {}, torch.float32),
    ((4, 2, 5, 4, 4), "contiguous", "channels_last", dict(v_th=0.3, decay=0.7, lens=0.4),
     torch.float32),
    ((4, 3, 3, 5, 5), "batch_outermost", "batch_outermost", {}, torch.float32),
    ((8, 2, 16, 3, 3), "channels_last", None, {}, torch.float32),
    ((32, 2, 5, 3, 3), "channels_last", "channels_last", dict(decay=0.9), torch.float32),
    ((4, 3, 16, 5, 5), "channels_last", "channels_last", {}, torch.bfloat16),
    ((4, 3, 3, 5, 5), "contiguous", "contiguous", {}, torch.bfloat16),
    ((6, 3, 16, 4, 4), "channels_last", "channels_last", {}, torch.float16),
]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of half: a rounding


@needs_triton
@pytest.mark.parametrize("shape, layout, residual_layout, neuron, dtype", CASES,
                         ids=lambda v: str(v).replace(" ", ""))
def test_kernels_equal_specification(shape, layout, residual_layout, neuron, dtype):
    *tensors, g = inputs(*shape, layout, residual_layout, dtype)
    x, weight, bias, residual = tensors
    var, mean = statistics(x)
    expected = bn_lif_reference(*tensors, mean, var, **neuron)
    assert 0.05 < expected.float().mean() < 0.7

    # constant statistics: bit for bit, without a gradient and with one
    options = dict(impl="triton", **neuron)
    with torch.no_grad():
        assert bn_lif(*tensors, mean, var, training=False, **options).equal(expected)
    constant = bn_lif(*tensors, mean, var, training=False, **options)
    assert constant.equal(expected) and constant.dtype == dtype
    close(gradients(constant, tensors, g), gradients(expected, tensors, g), BOUND[dtype])

    # statistics of x: bit for bit given those that the kernels took
    eps = neuron.get("eps", 1e-5)
    vectors = module._vectors(
        rows(x.detach()), weight.detach(), bias.detach(), None, None, 0.1, eps, "", 1)
    taken_mean, taken_var = vectors[:2]
    torch.testing.assert_close(taken_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(taken_var, var, rtol=1e-5, atol=1e-6)
    spikes = bn_lif(*tensors, **options)
    assert spikes.equal(bn_lif_reference(*tensors, taken_mean, taken_var, **neuron))
    moving = bn_lif_reference(*tensors, **neuron)
    if spikes.equal(moving):  # in fp32 the last bit of a statistic may flip a spike
        close(gradients(spikes, tensors, g), gradients(moving, tensors, g), BOUND[dtype])
    else:
        assert (spikes != moving).float().mean() < 1e-3


@needs_triton
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_sums_over_many_tiles(layout, monkeypatch):
    """Programs of a reduction take several tiles each, the kernels that combine their parts two
    tiles of parts; the last one cut."""
    for name, size in dict(TILE=256, REDUCE_PROGRAMS=6, PART_ROWS=4).items():
        monkeypatch.setattr(module, name, size)
    *tensors, g = inputs(4, 5, 3, 19, 23, layout, layout)
    running = torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    spikes = bn_lif(*tensors, *running, momentum=1.0, impl="triton")
    x = tensors[0].double()
    torch.testing.assert_close(running[0], x.mean(ALL).float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(running[1], x.var(ALL).float(), rtol=1e-6, atol=0)
    expected = bn_lif_reference(*tensors)
    assert spikes.equal(expected)
    close(gradients(spikes, tensors, g), gradients(expected, tensors, g), 1e-5)


@needs_triton
def test_large_mean_small_variance():
    x = torch.randn(4, 5, 6, 12, 12, device=DEVICE) * 0.1 + 1000
    ones = torch.ones(6, device=DEVICE)
    exact_var, exact_mean = torch.var_mean(x.double(), ALL)
    for layout in ("channels_last", "contiguous"):
        mean, var = torch.zeros(6, device=DEVICE), torch.zeros(6, device=DEVICE)
        bn_lif(laid(x, layout), ones, ones, None, mean, var, momentum=1.0, impl="triton")
        torch.testing.assert_close(mean, exact_mean.float(), rtol=1e-7, atol=0)
        torch.testing.assert_close(var, exact_var.float(), rtol=1e-4, atol=0)


# ---------------------------------------------------------------------------- both paths

@pytest.mark.parametrize("detach_reset, impl", [
    (True, "torch"), (False, "torch"), pytest.param(False, "triton", marks=needs_triton)])
def test_composition_is_close_to_specification(detach_reset, impl):
    """Batch norm, add, lif: an fp32 current for bf16 input too, so hardly a spike differs."""
    options = dict(detach_reset=detach_reset, eps=0.01, decay=0.4, v_th=0.4, lens=0.6)
    *tensors, g = inputs(4, 3, 16, 16, 16, "contiguous", "contiguous", torch.bfloat16)
    for run in (tensors, [*tensors[:3], None]):
        expected = bn_lif_reference(*run, **options)
        spikes = bn_lif(*run, impl=impl, **options)
        assert spikes.dtype == torch.bfloat16
        assert (spikes != expected).float().mean() < 1e-4  # of a bf16 current three times as many
        close(gradients(spikes, run, g), gradients(expected, run, g), 0.05)


@both
@pytest.mark.parametrize("detach", [True, False])
def test_same_current_at_every_step(detach, impl):
    T, B, C, H, W = 5, 3, 3, 7, 9
    options = dict(detach_reset=detach, impl=impl)
    for layout in ("channels_last", "contiguous"):
        *tensors, g = inputs(T, B, C, H, W, layout, layout, static=True)
        x, weight, bias, residual = tensors
        for rest in ((weight, bias, residual), (weight, bias)):
            spikes = bn_lif(x[0], *rest, T=T, **options)
            expected = bn_lif_reference(x.repeat(T, 1, 1, 1, 1), *rest, detach_reset=detach)
            fused = impl == "triton" and detach  # in channels-last memory, whatever x is in
            like = laid(x, "channels_last") if fused else x
            assert spikes.equal(expected) and spikes.stride()[1:] == like.stride()[1:]
            close(gradients(spikes, (x, *rest), g), gradients(expected, (x, *rest), g), 1e-5)


@both
def test_running_statistics_as_nn_batch_norm(impl):
    bn = torch.nn.BatchNorm2d(6, momentum=0.3, device=DEVICE)
    mean, var = bn.running_mean.clone(), bn.running_var.clone()
    for layout in ("channels_last", "contiguous"):
        x, weight, bias, _, _ = inputs(4, 3, 6, 8, 8, layout)
        bn(x.detach().flatten(0, 1))
        bn_lif(x, weight, bias, None, mean, var, momentum=0.3, impl=impl)
        assert not mean.requires_grad
        torch.testing.assert_close(mean, bn.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var, bn.running_var, rtol=1e-5, atol=1e-6)
    before = mean.clone(), var.clone()
    bn_lif(x, weight, bias, None, mean, var, training=False, impl=impl)
    assert mean.equal(before[0]) and var.equal(before[1])
    x = x[0].detach()  # the same at every step: a batch of B, H, W values
    bn(x)
    bn_lif(x, weight, bias, None, mean, var, momentum=0.3, T=4, impl=impl)
    torch.testing.assert_close(var, bn.running_var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_float64_equals_batch_norm_module(detach):
    """All of it in fp64: nn.BatchNorm2d in training and evaluation, an add, the neuron."""
    T, B, C, H, W = 4, 3, 5, 6, 7
    *tensors, g = inputs(T, B, C, H, W, "channels_last", "channels_last", torch.float64)
    x, weight, bias, residual = tensors
    bn = torch.nn.BatchNorm2d(C, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        bn.weight.copy_(weight), bn.bias.copy_(bias)
    for training in (True, False):
        bn.train(training)
        statistics = bn.running_mean.clone(), bn.running_var.clone()
        current = bn(x.flatten(0, 1)).unflatten(0, (T, B)) + residual
        expected = lif_reference(current, detach_reset=detach)
        spikes = bn_lif(*tensors, *statistics, training=training, detach_reset=detach)
        assert spikes.equal(expected)
        assert statistics[0].equal(bn.running_mean) and statistics[1].equal(bn.running_var)
        close(gradients(spikes, tensors, g),
              gradients(expected, (x, bn.weight, bn.bias, residual), g), 1e-12)


@both
def test_upstream_gradient_in_any_layout(impl):
    *tensors, g = inputs(4, 3, 6, 5, 5, residual_layout="channels_last")
    spikes = bn_lif(*tensors, impl=impl)
    expected = gradients(bn_lif(*tensors, impl=impl), tensors, g)
    for layout in ("contiguous", "batch_outermost"):
        got = torch.autograd.grad(spikes, tensors, laid(g, layout), retain_graph=True)
        close(got, expected, 1e-6)
    expected = gradients(bn_lif(*tensors, impl=impl), tensors, torch.ones_like(g))
    # the gradient of a sum is expanded: all strides 0
    close(torch.autograd.grad(spikes.sum(), tensors), expected, 1e-6)


@both
@pytest.mark.parametrize("needed", [(0,), (3,), (1, 2)])
def test_only_the_gradients_asked_for(needed, impl):
    *tensors, g = inputs(4, 2, 5, 4, 4, residual_layout="channels_last")
    var, mean = statistics(tensors[0])
    for options in ({}, dict(running_mean=mean, running_var=var, training=False)):
        expected = gradients(bn_lif(*tensors, impl=impl, **options), tensors, g)
        some = [t.detach().requires_grad_(i in needed) for i, t in enumerate(tensors)]
        actual = gradients(bn_lif(*some, impl=impl, **options), [some[i] for i in needed], g)
        close(actual, [expected[i] for i in needed], 1e-6)


@both
def test_memory_layout_is_kept_without_a_copy(impl):
    """A channels-last convolution's output, as it comes."""
    conv = torch.nn.Conv2d(3, 16, 3, padding=1, device=DEVICE)
    conv = conv.to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 6, 6, device=DEVICE).contiguous(memory_format=torch.channels_last)
    x = conv(images).unflatten(0, (4, 2))
    saved, ones = [], torch.ones(16, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        spikes = bn_lif(x, ones, ones - 1, impl=impl)
    assert x.data_ptr() in [t.data_ptr() for t in saved]
    assert spikes.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    dx, = torch.autograd.grad(spikes, x, torch.randn_like(spikes))
    assert dx.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@needs_triton
@pytest.mark.parametrize("T", [4, 6])
def test_saved_for_backward(T):
    *tensors, _ = inputs(T, 2, 16, 8, 8, residual_layout="channels_last")
    x, sizes = tensors[0], []
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        bn_lif(*tensors, impl="triton")
    bits, vectors = x[0].numel() * ((T + 3) // 4), 5 * 16 * 4
    assert sum(sizes) == x.nbytes + bits + vectors


@both
def test_empty_batch(impl):
    *tensors, g = inputs(4, 0, 3, 2, 2, "contiguous", "contiguous")
    x, weight, bias, _ = tensors
    spikes = bn_lif(*tensors, bias.detach(), weight.detach(), training=False, impl=impl)
    dx, dweight, dbias, dresidual = gradients(spikes, tensors, g)
    assert spikes.shape == dx.shape == dresidual.shape == x.shape
    assert not dweight.any() and not dbias.any()


# ---------------------------------------------------------------------------- autograd, compile

@both
def test_second_derivative_is_refused(impl):
    x, weight, bias, _, g = inputs(4, 2, 5, 4, 4)
    spikes = bn_lif(x, weight, bias, impl=impl)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(spikes, x, g, create_graph=True)
    if impl == "triton":
        y = bn_act(x[0], weight, bias, impl=impl)
        with pytest.raises(RuntimeError, match="bn_act has no second derivative: use impl='torch'"):
            torch.autograd.grad(y, x, g[0], create_graph=True)


@both
def test_derivative_whoever_asks_for_it(impl):
    """torch.func, and a trace made without gradients; forward mode is refused."""
    *tensors, g = inputs(4, 2, 5, 4, 4, residual_layout="channels_last")
    expected = gradients(bn_lif(*tensors, impl=impl), tensors, g)
    tensors = [t.detach() for t in tensors]

    def f(*tensors):
        return bn_lif(*tensors, impl=impl)

    close(torch.func.vjp(f, *tensors)[1](g), expected, 1e-5)
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return f(*tensors)

    traced = torch.export.export(Module(), tuple(tensors)).module()
    tensors = [t.requires_grad_() for t in tensors]
    close(gradients(traced(*tensors), tensors, g), expected, 1e-5)

    tensors = tuple(t.detach() for t in tensors)
    for function in (f, traced):
        with pytest.raises(NotImplementedError):
            torch.func.jvp(function, tensors, tensors)
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError):
            f(torch.autograd.forward_ad.make_dual(tensors[0], tensors[0]), *tensors[1:])


@needs_triton
def test_opcheck():
    T, C = 5, 3
    x, weight, bias, residual, g = inputs(T, 2, C, 4, 4, residual_layout="channels_last")
    x, residual = (rows(t.detach()).requires_grad_() for t in (x, residual))
    g, data, given = rows(g), x.detach(), (weight.detach(), bias.detach())
    running = torch.zeros(C, device=DEVICE), torch.ones(C, device=DEVICE)
    vectors = module._vectors(data, *given, None, None, 0.1, 1e-5, "", 1)
    neuron = 0.25, 0.5, 0.5
    train = x, residual, weight, bias, vectors, T, "lif", *neuron, True, "", 1, True
    spikes, bits = module._bn_act(*train)
    assert spikes.shape == x.shape and bits.shape == (2, *x.shape[1:])
    torch.library.opcheck(module._bn_act, train)

    def check(op, *args):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_autograd_registration",
                                                    "test_faketensor"))

    check(module._bn_act, *train[:-1], False)
    check(module._bn_act, x[:1], *train[1:])  # the same current at every step
    for activation in ("relu", ""):
        check(module._bn_act, *train[:6], activation, *train[7:])
    check(module._vectors, data, *given, *running, 0.1, 1e-5, "", 1)
    check(module._vectors, data, *given, None, None, 0.1, 1e-5, "", 1)
    for training, ranks, need_dresidual in ((True, 1, True), (True, 2, False), (False, 1, True)):
        check(module._bn_act_backward, g, bits, data, vectors, 0.25, 0.5, training, "", ranks,
              need_dresidual)


# of cuDNN's batch norm two backwards differ in the last bits: its sums have no fixed order
BACKWARD = dict(cpu=0.0, cuda=1e-5)


@both
def test_compile(impl):
    """One graph, forward and backward, dynamic shapes included, equal to eager bit for bit."""
    def f(running, *tensors):
        return bn_lif(tensors[0] * 1, *tensors[1:], *running, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    eager_running, running = [[torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)]
                              for _ in range(2)]
    for B in (2, 3):  # the second call recompiles with a dynamic batch
        *tensors, g = inputs(4, B, 5, 4, 4, residual_layout="channels_last")
        eager, graph = f(eager_running, *tensors), compiled(running, *tensors)
        assert graph.equal(eager) and graph.stride() == eager.stride()
        close(gradients(graph, tensors, g), gradients(eager, tensors, g), BACKWARD[DEVICE])
        with torch.no_grad():
            assert compiled(running, *tensors).equal(f(eager_running, *tensors))
        close(running, eager_running, BACKWARD[DEVICE])


@both
def test_autocast(impl):
    """bf16 from the convolution, fp32 batch-norm parameters, an fp32 residual."""
    conv = torch.nn.Conv2d(3, 16, 3, padding=1, device=DEVICE)
    weight, bias = (torch.ones(16, device=DEVICE, requires_grad=True) for _ in range(2))
    residual = torch.randn(4, 2, 16, 6, 6, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        x = conv(torch.randn(8, 3, 6, 6, device=DEVICE)).unflatten(0, (4, 2))
        spikes = bn_lif(x, weight, bias, residual, impl=impl)
    assert x.dtype == spikes.dtype == torch.bfloat16
    expected = bn_lif_reference(x, weight, bias, residual)
    assert (spikes != expected).float().mean() < 0.01  # the kernels take the residual in bf16
    spikes.float().square().mean().backward()
    for parameter in (conv.weight, weight, bias, residual):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all() and parameter.grad.any()


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
def test_recorded_in_a_cuda_graph():
    running = torch.zeros(10, device=DEVICE), torch.ones(10, device=DEVICE)
    # leaves, warm-up and recording on one stream, which their gradients then belong to
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        *tensors, g = inputs(4, 2, 10, 4, 4, residual_layout="channels_last")

        def step():
            spikes = bn_lif(*tensors, *running, impl="triton")
            return spikes, *gradients(spikes, tensors, g)

        expected = step()  # compiles, too
    with torch.cuda.graph(graph, stream=stream):
        recorded = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(a.equal(b) for a, b in zip(recorded, expected))


@both
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [None, "channels_last", "contiguous"])
def test_bn_act_is_batch_norm_add_and_relu(residual, relu, training, impl):
    """A layer of the teacher, or of a shortcut: values, gradients, running statistics."""
    layout = residual or "channels_last"
    *tensors, g = inputs(1, 3, 70, 5, 5, layout, residual)
    x, weight, bias, added = [t if t is None or t.dim() == 1 else t[0] for t in tensors]

    def run(function, dtype):
        running = [torch.linspace(-1, 1, 70, device=DEVICE, dtype=dtype),
                   torch.linspace(0.5, 2, 70, device=DEVICE, dtype=dtype)]
        given = [t if t is None else t.to(dtype) for t in (x, weight, bias, added)]
        y = function(*given, *running)
        return y, *running, *gradients(y, [x, weight, bias, added], g[0].to(dtype))

    def composed(x, weight, bias, added, mean, var):
        y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training, 0.3)
        y = y if added is None else y + added
        return y.relu() if relu else y

    expected = run(composed, torch.float64)
    got = run(lambda *tensors: bn_act(
        *tensors, relu=relu, training=training, momentum=0.3, impl=impl), torch.float32)
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=1e-4, atol=2e-5)
    with torch.no_grad():  # and in 16 bits, as under autocast
        half = bn_act(x.bfloat16(), weight, bias, added, relu=relu, impl=impl)
        full = bn_act(x, weight, bias, added, relu=relu, impl=impl)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), full, rtol=0.03, atol=0.03)
        x[0, 0, 0, 0] = torch.nan  # as F.relu: no mistake is hidden
        assert bn_act(x, weight, bias, relu=relu, impl=impl)[:, 0].isnan().all()


@both
def test_bn_act_in_16_bits(impl):
    """As it trains a teacher: gradients of bf16 data within bf16's rounding of fp32's."""
    *tensors, g = inputs(1, 8, 16, 6, 6, residual_layout="channels_last")
    tensors = [t if t.dim() == 1 else t.detach()[0].requires_grad_() for t in tensors]
    exact = gradients(bn_act(*tensors, impl=impl), tensors, g[0])
    half = [t if t.dim() == 1 else t.detach().bfloat16().requires_grad_() for t in tensors]
    got = gradients(bn_act(*half, impl=impl), half, g[0].bfloat16())
    close([t.float() for t in got], exact, 0.1)  # a few outputs near 0 change their sign


@both
def test_a_relu_has_no_gradient_at_zero(impl):
    x = torch.tensor([-1.0, 0.0, 1.0], device=DEVICE).view(3, 1, 1, 1).requires_grad_()
    zero, one = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
    y = bn_act(x, one, zero, None, zero, one, training=False, impl=impl)
    gradient, = torch.autograd.grad(y.sum(), x)
    assert gradient.flatten().bool().tolist() == [False, False, True]


@both
def test_bn_act_of_nothing_and_what_it_refuses(impl):
    x, weight, bias, _, _ = inputs(1, 2, 5, 4, 4)
    x, vectors = x[0].detach(), (weight.detach(), bias.detach())
    constants = dict(running_mean=vectors[1], running_var=vectors[0], training=False, impl=impl)
    assert bn_act(x[:0], *vectors, **constants).shape == (0, 5, 4, 4)
    gradient = torch.func.grad(lambda x: bn_act(x, *vectors, **constants).sum())(x)
    assert gradient.shape == x.shape and gradient.any()
    for error, words, args in (
            (ValueError, "residual", (x, *vectors, x[:1])),  # would be read out of bounds
            (ValueError, "weight", (x, vectors[0][:3], vectors[1])),
            (TypeError, "int64", (x.long(), *vectors))):
        with pytest.raises(error, match=words):
            bn_act(*args, **constants)


@pytest.mark.parametrize("options", [
    {}, dict(momentum=None), dict(track_running_stats=False), dict(affine=False)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_one_process_is_pytorchs(options, training):
    ours, theirs = (kind(3, **options).to(DEVICE).train(training)
                    for kind in (BatchNorm2d, torch.nn.BatchNorm2d))
    for B in (4, 2, 0):
        x = torch.randn(B, 3, 2, 2, device=DEVICE)
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    with pytest.raises(ValueError, match="4D"):
        ours(x[:, :, 0])


def test_running_statistics_that_are_switched_off_stay():
    """As adversarial training does, after construction."""
    norm, x = BatchNorm2d(3).to(DEVICE), torch.randn(4, 3, 2, 2, device=DEVICE)
    norm.track_running_stats = False
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    y = norm(x)
    assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(3, device=DEVICE), atol=1e-6)
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)


@both
def test_a_batch_norm_without_bias(impl):
    x, weight, bias, _, _ = inputs(1, 2, 5, 4, 4)
    y = bn_act(x[0], weight, None, relu=False, impl=impl)
    torch.testing.assert_close(
        y, bn_act(x[0], weight, torch.zeros_like(bias), relu=False, impl="torch"))
    with pytest.raises(ValueError, match="needs a weight and a bias"):
        bn_lif(x, weight, None, impl=impl)


@needs_triton
def test_bn_act_keeps_a_byte_a_neuron_of_a_relu_alone():
    x, weight, bias, _, g = inputs(1, 2, 16, 8, 8)
    for relu, bits in ((True, x.numel()), (False, 0)):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            bn_act(x[0], weight, bias, relu=relu, impl="triton")
        assert sum(sizes) == x.nbytes + bits + 5 * 16 * 4


@both
def test_one_value_a_channel_has_no_variance(impl):
    x, weight, bias, _, _ = inputs(1, 1, 5, 1, 1)
    with pytest.raises(ValueError, match="more than one value"):
        bn_act(x[0], weight, bias, impl=impl)


@both
@pytest.mark.parametrize("training", [True, False])
def test_vectors_of_16_bits(training, impl):
    """net.bfloat16(): the arithmetic is fp32, what is kept is rounded."""
    x, weight, bias, _, g = inputs(4, 2, 5, 4, 4, dtype=torch.bfloat16)
    narrow = [v.detach().bfloat16().requires_grad_() for v in (weight, bias)]
    running = [torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)]
    narrow_running = [v.bfloat16() for v in running]
    spikes = bn_lif(x, *narrow, None, *narrow_running, training=training, impl=impl)
    wide = [v.detach().float().requires_grad_() for v in narrow]
    expected = bn_lif(x, *wide, None, *running, training=training, impl=impl)
    assert spikes.equal(expected)
    for a, b in zip(narrow_running, running):
        torch.testing.assert_close(a, b.bfloat16(), rtol=2**-7, atol=0)  # the interpreter truncates
    for a, b in zip(gradients(spikes, narrow, g), gradients(expected, wide, g)):
        assert a.equal(b.bfloat16())


def test_wrong_arguments():
    x, weight, bias, residual, _ = inputs(4, 2, 5, 4, 4, residual_layout="channels_last")
    for error, words, args, options in (
            (ValueError, "T = None", (x[0], weight, bias), {}),
            (ValueError, "T = 3", (x, weight, bias), dict(T=3)),
            (ValueError, "T = 4", (x.transpose(0, 1), weight, bias), dict(T=4)),
            (ValueError, "T = 0", (x[0], weight, bias), dict(T=0)),
            (ValueError, "residual", (x, weight, bias, residual[:2]), {}),
            (ValueError, "weight", (x, weight[:3], bias), {}),
            (ValueError, "together", (x, weight, bias), dict(running_mean=bias)),
            (ValueError, "training=False needs", (x, weight, bias), dict(training=False)),
            (ValueError, "more than one value", (x[:1, :1, :, :1, :1], weight, bias), {}),
            (ValueError, "lens", (x, weight, bias), dict(lens=0))):  # and as lif's
        with pytest.raises(error, match=words):
            bn_lif(*args, **options)


# ---------------------------------------------------------------------------- several processes

def _rank(rank, world, folder):
    """One of `world` processes, with its share of the batch; world 1 has all of it."""
    torch.set_num_threads(1)
    group = None
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank,
                                             world_size=world)
        group = torch.distributed.group.WORLD
    norm, images = BatchNorm2d(5).eval(), torch.arange(10.0).view(2, 5, 1, 1)
    assert norm.group == group
    torch.testing.assert_close(norm(images), images, rtol=1e-4, atol=0)  # running statistics 0, 1
    data = torch.load(os.path.join(folder, "data.pt"), weights_only=True)
    x, residual, g = (data[name].chunk(world, 1)[rank] for name in ("x", "residual", "g"))
    tensors = [t.detach().requires_grad_() for t in (x, data["weight"], data["bias"], residual)]

    def run(function, tensors, **options):
        running = [torch.zeros(5, dtype=tensors[1].dtype) for _ in range(2)]
        spikes = function(*tensors, *running, group=group, **options)
        return dict(spikes=spikes.detach(), running=torch.stack(running),
                    gradients=gradients(spikes, tensors, g.to(spikes.dtype)))

    compiled = torch.compile(bn_lif, fullgraph=True, backend="aot_eager")
    result = [run(bn_lif, tensors), run(compiled, tensors)]
    if INTERPRET:
        single = [t.detach().float().requires_grad_() for t in tensors]
        result.append(run(bn_lif, single, impl="triton"))

        def act(x, weight, bias, residual, *running, **options):  # steps are images to it
            y = bn_act(x.flatten(0, 1), weight, bias, residual.flatten(0, 1), *running, **options)
            return y.unflatten(0, x.shape[:2])
        result.append(run(act, single, impl="triton"))
    torch.save(result, os.path.join(folder, f"{rank}_of_{world}.pt"))
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    new = dict(dtype=torch.float64)
    scale = torch.linspace(0.5, 4, 6, **new).view(1, 6, 1, 1, 1)  # the ranks' statistics differ
    torch.save(dict(x=torch.randn(4, 6, 5, 4, 4, **new) * scale + scale,
                    residual=torch.rand(4, 6, 5, 4, 4, **new), g=torch.randn(4, 6, 5, 4, 4, **new),
                    weight=torch.rand(5, **new), bias=torch.rand(5, **new)), tmp_path / "data.pt")
    _rank(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    names = "0_of_1.pt", "0_of_2.pt", "1_of_2.pt"
    files = [torch.load(tmp_path / name, weights_only=True) for name in names]
    for one, *two in zip(*files, strict=True):  # eager, compiled; Triton: bn_lif, bn_act
        fp32 = one["spikes"].dtype == torch.float32
        near = dict(rtol=1e-5, atol=1e-5) if fp32 else dict(rtol=1e-12, atol=1e-13)
        spikes = torch.cat([r["spikes"] for r in two], 1)
        torch.testing.assert_close(spikes, one["spikes"], **near)
        for r in two:
            torch.testing.assert_close(r["running"], one["running"], **near)
        for i, whole in enumerate(one["gradients"]):
            # x and residual: shares of the batch; parameters: summands
            parts = [r["gradients"][i] for r in two]
            got = torch.cat(parts, 1) if i in (0, 3) else sum(parts)
            torch.testing.assert_close(got, whole, **near)
