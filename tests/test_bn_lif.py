"""kernels/bn_lif.py against its specification, against nn.BatchNorm2d, and against finite differences."""

import importlib
import os

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from kernels.bn_lif import bn_lif, bn_lif_reference
from kernels.lif import lif_reference, triton

module = importlib.import_module("kernels.bn_lif")  # kernels.bn_lif the attribute is the function
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(triton is None, reason="triton is not installed"))]
both = pytest.mark.parametrize("impl", IMPLS)


@pytest.fixture(autouse=True)
def poison():
    """Uninitialised memory is NaN, and 255 in the bits: what a kernel forgets to write shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3, dtype=torch.uint8).eq(255).all()
    yield
    torch.use_deterministic_algorithms(before)


def laid(x, layout):
    """x (T, B, C, H, W), same values, in another memory layout."""
    if layout == "channels_last":
        return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    if layout == "batch_outermost":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x.contiguous()


def inputs(T, B, C, H, W, layout="channels_last", residual_layout=None, dtype=torch.float32, static=False):
    """x, weight, bias, residual, all with gradients, and an upstream gradient. A third of the neurons fire."""
    vector = torch.float64 if dtype == torch.float64 else torch.float32
    new = dict(device=DEVICE, dtype=torch.float64)
    x = laid((torch.randn(1 if static else T, B, C, H, W, **new) * 1.5 + torch.randn(C, 1, 1, **new)).to(dtype), layout)
    weight, bias = (torch.rand(C, **new) + 0.5).to(vector), (torch.randn(C, **new) * 0.3).to(vector)
    residual = None
    if residual_layout:
        residual = laid((torch.rand(T, B, C, H, W, **new) < 0.2).to(dtype), residual_layout).requires_grad_()
    g = torch.randn(T, B, C, H, W, **new).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), residual, laid(g, layout)


def gradients(spikes, tensors, g):
    return torch.autograd.grad(spikes, [t for t in tensors if t is not None], g)


def close(actual, expected, bound):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape and a.dtype == e.dtype
        error = ((a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30)).item()
        assert error <= bound, f"gradient {i}: relative error {error:.2e} > {bound:.0e}"  # NaN fails too


# shape, layout, residual, neuron, dtype. rows and channels off and on the tiles' sizes; T on and off whole bytes
plain = dict(detach_reset=False)
CASES = [
    ((1, 3, 5, 7, 9), "channels_last", None, {}, torch.float32),
    ((1, 2, 3, 4, 4), "contiguous", "contiguous", plain, torch.float32),
    ((2, 2, 16, 4, 4), "channels_last", "channels_last", dict(eps=0.3), torch.float32),
    ((3, 2, 3, 5, 5), "contiguous", "contiguous", {}, torch.float32),
    ((4, 5, 2, 15, 16), "contiguous", None, {}, torch.float32),
    ((4, 3, 96, 3, 5), "channels_last", "contiguous", {}, torch.float32),
    ((4, 2, 5, 4, 4), "contiguous", "channels_last", dict(v_th=0.3, decay=0.7, lens=0.4), torch.float32),
    ((4, 2, 5, 4, 4), "contiguous", "channels_last", dict(v_th=0.3, decay=0.7, lens=0.4, **plain), torch.float32),
    ((4, 3, 3, 5, 5), "batch_outermost", "batch_outermost", {}, torch.float32),
    ((4, 9, 3, 1, 1), "contiguous", "contiguous", {}, torch.float32),
    ((5, 2, 32, 3, 3), "channels_last", "batch_outermost", dict(decay=0.9), torch.float32),
    ((6, 2, 4, 3, 3), "channels_last", "channels_last", dict(lens=2.0, **plain), torch.float32),
    ((7, 2, 2, 3, 3), "contiguous", None, {}, torch.float32),
    ((8, 2, 16, 3, 3), "channels_last", "channels_last", {}, torch.float32),
    ((8, 2, 16, 3, 3), "channels_last", None, plain, torch.float32),
    ((32, 2, 5, 3, 3), "channels_last", "channels_last", {}, torch.float32),
    ((32, 2, 5, 3, 3), "channels_last", "channels_last", plain, torch.float32),
    ((4, 3, 16, 5, 5), "channels_last", "channels_last", {}, torch.bfloat16),
    ((4, 3, 16, 5, 5), "channels_last", "channels_last", plain, torch.bfloat16),
    ((4, 3, 3, 5, 5), "contiguous", "contiguous", {}, torch.bfloat16),
    ((4, 3, 16, 5, 5), "channels_last", "channels_last", {}, torch.float16),
]


@both
@pytest.mark.parametrize("shape, layout, residual_layout, neuron, dtype", CASES, ids=lambda v: str(v).replace(" ", ""))
def test_equals_specification(shape, layout, residual_layout, neuron, dtype, impl):
    x, weight, bias, residual, g = inputs(*shape, layout, residual_layout, dtype)
    expected, mean, var, n = bn_lif_reference(x, weight, bias, residual, **neuron)
    assert 0.05 < expected.float().mean() < 0.7

    # given the same statistics: bit for bit, without a gradient and with one
    tensors = x, weight, bias, residual
    with torch.no_grad():
        assert bn_lif(*tensors, mean, var, impl=impl, **neuron)[0].equal(expected)
    constant, same_mean, same_var, same_n = bn_lif(*tensors, mean, var, impl=impl, **neuron)
    assert constant.equal(expected) and constant.dtype == dtype
    assert same_mean is mean and same_var is var and same_n == n
    fixed = bn_lif_reference(*tensors, mean, var, **neuron)[0]
    bound = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]  # half: the interpreter truncates
    close(gradients(constant, tensors, g), gradients(fixed, tensors, g), bound)

    # its own statistics. the specification takes them as constants for the spikes and as functions of x for gradients
    spikes, own_mean, own_var, own_n = bn_lif(*tensors, impl=impl, **neuron)
    torch.testing.assert_close(own_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_var, var, rtol=1e-5, atol=1e-6)
    assert own_n == n == x.numel() // shape[2] and not own_mean.requires_grad and not own_var.requires_grad
    assert spikes.equal(bn_lif_reference(*tensors, own_mean, own_var, **neuron)[0])
    if spikes.equal(expected):  # in fp32 the last bit of a statistic may flip a spike
        close(gradients(spikes, tensors, g), gradients(expected, tensors, g), bound)
    else:
        assert (spikes != expected).float().mean() < 1e-3


@both
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_sums_over_many_tiles(layout, impl, monkeypatch):
    """Programs of a reduction that take several tiles each, the last one cut; PyTorch in several chunks."""
    monkeypatch.setattr(module, "REDUCING", 3)
    monkeypatch.setattr(module, "_rows", lambda x: max(1, 700 // x[0, 0].numel()))
    x, weight, bias, residual, g = inputs(4, 5, 3, 19, 23, layout, layout)
    tensors = x, weight, bias, residual
    for detach in (True, False) if layout == "channels_last" else (True,):
        spikes, mean, var, _ = bn_lif(*tensors, impl=impl, detach_reset=detach)
        expected = bn_lif_reference(*tensors, detach_reset=detach)[0]
        torch.testing.assert_close(mean, x.double().mean((0, 1, 3, 4)).float(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(var, x.double().var((0, 1, 3, 4), correction=0).float(), rtol=1e-6, atol=0)
        assert spikes.equal(expected)
        expected = gradients(expected, tensors, g)
        close(gradients(spikes, tensors, g), expected, 1e-5)
        if impl == "torch":  # without the native kernel, as under a process group and in half precision
            monkeypatch.setattr(module, "_native_torch", plain_torch)
            close(gradients(bn_lif(*tensors, impl=impl, detach_reset=detach)[0], tensors, g), expected, 1e-5)


def plain_torch(d, x, scale, mean, inv_std):
    sums = module._sums_torch(d, x, mean, inv_std)
    return module._apply_torch(d, x, sums / (x.numel() / x.shape[2]), scale, mean, inv_std), sums


@both
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("detach", [True, False])
def test_same_current_at_every_step(detach, layout, impl):
    T, B, C, H, W = 5, 3, 3, 7, 9
    x, weight, bias, residual, g = inputs(T, B, C, H, W, layout, layout, static=True)
    options = dict(detach_reset=detach, impl=impl)
    for tensors in ((x, weight, bias, residual), (x, weight, bias, None)):
        spikes, mean, var, n = bn_lif(x[0], *tensors[1:], T=T, **options)
        assert n == B * H * W
        torch.testing.assert_close(mean, x.mean((0, 1, 3, 4)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var, x.var((0, 1, 3, 4), correction=0), rtol=1e-5, atol=1e-6)
        repeated = bn_lif_reference(x.repeat(T, 1, 1, 1, 1), *tensors[1:], detach_reset=detach)[0]
        assert spikes.equal(repeated) and spikes.stride()[1:] == x.stride()[1:]
        expected = gradients(repeated, tensors, g)
        close(gradients(spikes, tensors, g), expected, 1e-5)
    expanded, _, _, n = bn_lif(x.expand(T, -1, -1, -1, -1), weight, bias, **options)
    assert expanded.equal(spikes) and n == B * H * W
    close(gradients(expanded, tensors, g), expected, 1e-5)
    constant = bn_lif(x[0], weight, bias, None, mean, var, T=T, **options)[0]
    fixed = bn_lif_reference(x.repeat(T, 1, 1, 1, 1), weight, bias, None, mean, var, detach_reset=detach)[0]
    close(gradients(constant, tensors, g), gradients(fixed, tensors, g), 1e-5)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("detach", [True, False])
def test_float64_equals_batch_norm_module(detach, layout):
    """All of it in fp64: nn.BatchNorm2d in training and evaluation, an add, the neuron."""
    T, B, C, H, W = 4, 3, 5, 6, 7
    x, weight, bias, residual, g = inputs(T, B, C, H, W, layout, layout, torch.float64)
    bn = torch.nn.BatchNorm2d(C, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        bn.weight.copy_(weight), bn.bias.copy_(bias)
    expected = lif_reference(bn(x.flatten(0, 1)).unflatten(0, (T, B)) + residual, detach_reset=detach)
    spikes, mean, var, n = bn_lif(x, weight, bias, residual, detach_reset=detach)
    assert spikes.equal(expected) and mean.dtype == var.dtype == torch.float64
    torch.testing.assert_close(0.1 * mean, bn.running_mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(0.9 + 0.1 * var * n / (n - 1), bn.running_var, rtol=1e-12, atol=0)
    close(gradients(spikes, (x, weight, bias, residual), g),
          gradients(expected, (x, bn.weight, bn.bias, residual), g), 1e-12)
    bn.eval()
    expected = lif_reference(bn(x.flatten(0, 1)).unflatten(0, (T, B)) + residual, detach_reset=detach)
    spikes = bn_lif(x, weight, bias, residual, bn.running_mean, bn.running_var, detach_reset=detach)[0]
    assert spikes.equal(expected)
    close(gradients(spikes, (x, weight, bias, residual), g),
          gradients(expected, (x, bn.weight, bn.bias, residual), g), 1e-12)


@both
def test_statistics_equal_batch_norm(impl):
    x, weight, bias, _, _ = inputs(4, 3, 6, 8, 8)
    _, mean, var, n = bn_lif(x, weight, bias, impl=impl)
    running_mean, running_var = torch.zeros(6, device=DEVICE), torch.zeros(6, device=DEVICE)
    F.batch_norm(x.flatten(0, 1), running_mean, running_var, training=True, momentum=1.0)
    torch.testing.assert_close(mean, running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var * n / (n - 1), running_var, rtol=1e-5, atol=1e-6)


def test_gradient_equals_finite_differences():
    """Below threshold and inside the window the spike's surrogate is the slope 1/(2 lens) everywhere: the gradient is
    that of sum(g*U)/(2 lens), a smooth function, which central differences know without any of our code."""
    lens, decay, eps = 50.0, 0.6, 1e-3
    x, weight, bias, residual, g = inputs(4, 2, 3, 4, 3, residual_layout="contiguous", dtype=torch.float64)
    tensors = x, weight, bias, residual

    def loss(x, weight, bias, residual):
        flat = x.transpose(1, 2).transpose(0, 1).flatten(1)  # (C, everything)
        mean = flat.sum(1) / flat.shape[1]
        var = (flat - mean[:, None]).pow(2).sum(1) / flat.shape[1]
        y = (x - mean[:, None, None]) * (weight / (var + eps).sqrt())[:, None, None] + bias[:, None, None] + residual
        u = total = 0
        for t in range(4):
            u = u * decay + y[t]
            total = total + (g[t] * u).sum() / (2 * lens)
        return total

    spikes = bn_lif(*tensors, eps=eps, decay=decay, v_th=40.0, lens=lens)[0]
    assert spikes.sum() == 0
    with torch.no_grad():
        for i, gradient in enumerate(gradients(spikes, tensors, g)):
            step = torch.randn_like(tensors[i])
            moved = [[t + sign * 1e-4 * step if j == i else t for j, t in enumerate(tensors)] for sign in (1, -1)]
            numeric = (loss(*moved[0]) - loss(*moved[1])) / 2e-4
            assert (numeric - (gradient * step).sum()).abs() < 1e-7 * numeric.abs().clamp_min(0.1), f"gradient {i}"


@both
def test_large_mean_small_variance(impl):
    x = torch.randn(4, 5, 6, 12, 12, device=DEVICE) * 0.1 + 1000
    for layout in ("channels_last", "contiguous"):
        ones = torch.ones(6, device=DEVICE)
        _, mean, var, _ = bn_lif(laid(x, layout), ones, ones, impl=impl)
        exact_var, exact_mean = torch.var_mean(x.double(), (0, 1, 3, 4), correction=0)
        torch.testing.assert_close(mean, exact_mean.float(), rtol=1e-7, atol=0)
        torch.testing.assert_close(var, exact_var.float(), rtol=1e-4, atol=0)


@both
def test_repeats_bit_for_bit(impl):
    x, weight, bias, residual, g = inputs(4, 3, 16, 9, 9, residual_layout="channels_last")
    tensors = x, weight, bias, residual
    runs = []
    for _ in range(2):
        spikes, mean, var, _ = bn_lif(*tensors, impl=impl)
        runs.append((spikes, mean, var, *gradients(spikes, tensors, g)))
    assert all(a.equal(b) for a, b in zip(*runs))


@both
def test_upstream_gradient_in_any_layout(impl):
    x, weight, bias, residual, g = inputs(4, 3, 6, 5, 5, residual_layout="channels_last")
    tensors = x, weight, bias, residual
    spikes = bn_lif(*tensors, impl=impl)[0]
    expected = gradients(bn_lif(*tensors, impl=impl)[0], tensors, g)
    for layout in ("contiguous", "batch_outermost"):
        for a, e in zip(torch.autograd.grad(spikes, tensors, laid(g, layout), retain_graph=True), expected):
            assert a.equal(e)
    ones = bn_lif(*tensors, impl=impl)[0]
    for a, e in zip(torch.autograd.grad(spikes.sum(), tensors), gradients(ones, tensors, torch.ones_like(g))):
        assert a.equal(e)  # the gradient of a sum is expanded: all strides 0


@both
@pytest.mark.parametrize("needed", [(0,), (3,), (1, 2), (0, 3)])
def test_only_the_gradients_asked_for(needed, impl):
    x, weight, bias, residual, g = inputs(4, 2, 5, 4, 4, residual_layout="channels_last")
    tensors = x, weight, bias, residual
    statistics = x.detach().mean((0, 1, 3, 4)), x.detach().var((0, 1, 3, 4))
    for given in ((None, None), statistics):
        expected = gradients(bn_lif(*tensors, *given, impl=impl)[0], tensors, g)
        some = [t.detach().requires_grad_(i in needed) for i, t in enumerate(tensors)]
        actual = gradients(bn_lif(*some, *given, impl=impl)[0], [some[i] for i in needed], g)
        close(actual, [expected[i] for i in needed], 1e-6)


@both
def test_memory_layout_is_kept_without_a_copy(impl):
    """A channels-last convolution's output, as it comes."""
    conv = torch.nn.Conv2d(3, 16, 3, padding=1, device=DEVICE).to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 6, 6, device=DEVICE).contiguous(memory_format=torch.channels_last)
    x = conv(images).unflatten(0, (4, 2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        spikes = bn_lif(x, torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE), impl=impl)[0]
    assert x.data_ptr() in [t.data_ptr() for t in saved]
    assert spikes.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    dx, = torch.autograd.grad(spikes, x, torch.randn_like(spikes))
    assert dx.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@both
@pytest.mark.parametrize("T", [4, 6])
def test_saved_for_backward(T, impl):
    x, weight, bias, residual, _ = inputs(T, 2, 16, 8, 8, residual_layout="channels_last")
    vectors, bits = 4 * 16 * 4, x[0].numel() * ((T + 3) // 4)

    def saved(**options):
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            spikes = bn_lif(x, weight, bias, residual, impl=impl, **options)[0]
        return spikes, sum(t.numel() * t.element_size() for t in tensors)

    assert saved()[1] == x.numel() * 4 + bits + vectors
    assert saved(detach_reset=False)[1] == 2 * x.numel() * 4 + vectors
    with torch.no_grad():
        spikes, size = saved()
        assert size == 0 and not spikes.requires_grad
    x, weight, bias, residual = (t.detach() for t in (x, weight, bias, residual))
    spikes, size = saved()
    assert size == 0 and not spikes.requires_grad


@both
def test_empty_batch(impl):
    x, weight, bias, residual, g = inputs(4, 0, 3, 2, 2, "contiguous", "contiguous")
    spikes = bn_lif(x, weight, bias, residual, bias.detach(), weight.detach(), impl=impl)[0]
    dx, dweight, dbias, dresidual = gradients(spikes, (x, weight, bias, residual), g)
    assert spikes.shape == dx.shape == dresidual.shape == x.shape and not dweight.any() and not dbias.any()


@both
def test_inference_operator_writes_spikes_alone(impl):
    from torch.utils._python_dispatch import TorchDispatchMode
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    x, weight, bias, _, _ = inputs(4, 2, 5, 4, 4)
    with Watch(), torch.no_grad():
        bn_lif(x, weight, bias, None, torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE), impl=impl)
    ours = [name for name in called if name.startswith("idsnn")]
    assert ours == ["idsnn.bn_lif_infer.default"]


@both
def test_second_derivative_is_refused(impl):
    x, weight, bias, _, g = inputs(4, 2, 5, 4, 4)
    spikes = bn_lif(x, weight, bias, impl=impl)[0]
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(spikes, x, g, create_graph=True)


@both
def test_no_derivative_is_a_silent_zero(impl):
    """Forward mode, torch.func, and a trace that saved nothing for a backward."""
    x, weight, bias, residual, _ = (t if t is None else t.detach() for t in inputs(4, 2, 5, 4, 4))

    def f(x):
        return bn_lif(x, weight, bias, impl=impl)[0]

    for transform in (lambda: torch.func.vmap(f, 1, 1)(x.unsqueeze(1)), lambda: torch.func.jvp(f, (x,), (x,)),
                      lambda: torch.func.grad(lambda x: f(x).sum())(x)):
        with pytest.raises(NotImplementedError, match="torch.func"):
            transform()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        f(torch.autograd.forward_ad.make_dual(x, x))
    traced = make_fx(f)(x)
    with pytest.raises(RuntimeError, match="traced without a gradient"):
        traced(x.requires_grad_()).sum().backward()


@both
@pytest.mark.parametrize("detach, static", [(True, False), (False, True)])
def test_opcheck(detach, static, impl):
    T, C = 5, 3
    x = torch.randn(1 if static else T, 4, C, 6, device=DEVICE, requires_grad=True)
    residual, g = (torch.randn(T, 4, C, 6, device=DEVICE) for _ in range(2))
    weight, bias = (torch.rand(C, device=DEVICE, requires_grad=True) for _ in range(2))
    given = weight.detach(), bias.detach(), torch.rand(2, C, device=DEVICE) + 0.5
    neuron = [1e-5, 0.25, 0.5, 0.5]
    train = (x, residual.clone().requires_grad_(), weight, bias, given[2], T, neuron, detach, 20, "", impl)
    bits = module._train(*train)[1]
    assert bits.shape[0] == (2 if detach else 0)
    data = x.detach(), None if detach else residual, *given
    checks = dict(test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    torch.library.opcheck(module._train, train)
    torch.library.opcheck(module._train, (*train[:4], None, *train[5:]), **checks)
    torch.library.opcheck(module._stats, (data[0], impl), **checks)
    torch.library.opcheck(module._infer, (data[0], residual, *given, T, neuron, impl), **checks)
    torch.library.opcheck(module._infer, (data[0], None, *given[:2], None, T, neuron, impl), **checks)
    torch.library.opcheck(module._reduce, (g, bits, *data, neuron, impl), **checks)
    sums = torch.randn(2, C, device=DEVICE, dtype=torch.float64)
    cases = (None, 20, True, True, True), (sums, 40, True, False, False), (None, 0, False, True, False)
    for total, n, *needed in cases:  # of dx, dresidual, sums
        torch.library.opcheck(module._backward, (g, bits, *data, total, neuron, n, *needed, impl), **checks)


@both
def test_compile(impl):
    """One graph, forward and backward, dynamic shapes included, equal to eager bit for bit; autocast around it."""
    def f(x, weight, bias, residual):
        return bn_lif(x * 1, weight, bias, residual, impl=impl)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for B in (2, 3, 5):  # the second call recompiles with a dynamic batch
        x, weight, bias, residual, g = inputs(4, B, 5, 4, 4, residual_layout="channels_last")
        tensors = x, weight, bias, residual
        (eager, *statistics, n), (graph, *graph_statistics, graph_n) = f(*tensors), compiled(*tensors)
        assert graph.equal(eager) and graph.stride() == eager.stride() and graph_n == n
        assert all(a.equal(b) for a, b in zip(graph_statistics, statistics))
        assert all(a.equal(b) for a, b in zip(gradients(graph, tensors, g), gradients(eager, tensors, g)))
        with torch.no_grad():
            assert compiled(*tensors)[0].equal(eager)


@both
def test_autocast(impl):
    """bf16 from the convolution, fp32 batch-norm parameters, an fp32 residual."""
    conv = torch.nn.Conv2d(3, 16, 3, padding=1, device=DEVICE)
    weight, bias = (torch.ones(16, device=DEVICE, requires_grad=True) for _ in range(2))
    residual = torch.randn(4, 2, 16, 6, 6, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        x = conv(torch.randn(8, 3, 6, 6, device=DEVICE)).unflatten(0, (4, 2))
        spikes, mean, var, _ = bn_lif(x, weight, bias, residual, impl=impl)
    assert x.dtype == spikes.dtype == torch.bfloat16 and mean.dtype == var.dtype == torch.float32
    assert spikes.equal(bn_lif_reference(x, weight, bias, residual.bfloat16(), mean, var)[0])
    spikes.float().square().mean().backward()
    for parameter in (conv.weight, weight, bias, residual):
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() and parameter.grad.any()


def test_wrong_arguments():
    x, weight, bias, residual, _ = inputs(4, 2, 5, 4, 4, residual_layout="channels_last")
    with pytest.raises(ValueError, match="T given"):
        bn_lif(x[0], weight, bias)
    with pytest.raises(ValueError, match="T = 3"):
        bn_lif(x, weight, bias, T=3)
    with pytest.raises(ValueError, match="T must"):
        bn_lif(x[0], weight, bias, T=0)
    with pytest.raises(ValueError, match="residual"):
        bn_lif(x, weight, bias, residual[:2])
    with pytest.raises(ValueError, match="weight"):
        bn_lif(x, weight[:3], bias)
    with pytest.raises(ValueError, match="together"):
        bn_lif(x, weight, bias, mean=bias)
    with pytest.raises(ValueError, match="more than one value"):
        bn_lif(x[:1, :1, :, :1, :1], weight, bias)
    with pytest.raises(ValueError, match="lens"):
        bn_lif(x, weight, bias, lens=0)
    with pytest.raises(TypeError, match="float32"):
        bn_lif(x.int(), weight, bias)


def _rank(rank, world, folder):
    """One of `world` processes, with its share of the batch; world 1 has all of it."""
    torch.set_num_threads(1)
    group = None
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
        group = torch.distributed.group.WORLD
    data = torch.load(os.path.join(folder, "data.pt"), weights_only=True)
    x, residual, g = (t.chunk(world, 1)[rank] for t in (data["x"], data["residual"], data["g"]))
    tensors = [t.detach().requires_grad_() for t in (x, data["weight"], data["bias"], residual)]

    def f(x, weight, bias, residual):
        return bn_lif(x, weight, bias, residual, group=group)

    result = []
    for function in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        spikes, mean, var, n = function(*tensors)
        result.append(dict(spikes=spikes.detach(), mean=mean, var=var, n=n, gradients=gradients(spikes, tensors, g)))
    torch.save(result, os.path.join(folder, f"{rank}_of_{world}.pt"))
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    new = dict(dtype=torch.float64)
    scale = torch.linspace(0.5, 4, 6, **new).view(1, 6, 1, 1, 1)  # the two ranks' statistics differ
    torch.save(dict(x=torch.randn(4, 6, 5, 4, 4, **new) * scale + scale, residual=torch.rand(4, 6, 5, 4, 4, **new),
                    g=torch.randn(4, 6, 5, 4, 4, **new), weight=torch.rand(5, **new), bias=torch.rand(5, **new)),
               tmp_path / "data.pt")
    _rank(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    alone, *ranks = (torch.load(tmp_path / name, weights_only=True) for name in ("0_of_1.pt", "0_of_2.pt", "1_of_2.pt"))
    for one, *two in zip(alone, *ranks):  # eager, then compiled
        near = dict(rtol=1e-12, atol=1e-13)
        assert torch.cat([r["spikes"] for r in two], 1).equal(one["spikes"])
        for r in two:
            assert r["n"] == one["n"] == 4 * 6 * 4 * 4
            torch.testing.assert_close(r["mean"], one["mean"], **near)
            torch.testing.assert_close(r["var"], one["var"], **near)
        for i, whole in enumerate(one["gradients"]):  # x and residual: shares of the batch; parameters: summands
            parts = [r["gradients"][i] for r in two]
            torch.testing.assert_close(torch.cat(parts, 1) if i in (0, 3) else sum(parts), whole, **near)
