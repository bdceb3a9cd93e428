"""The LIF neuron: every path against the specification, the specification against numbers worked
out by hand."""

import importlib
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from kernels import bn_lif

K = importlib.import_module("kernels.lif")  # kernels.lif is the function
lif, lif_reference = K.lif, K.lif_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ODD = dict(decay=math.exp(-1 / 1.3), v_th=0.3, lens=0.37)  # none of them exact in fp32
needs_triton = pytest.mark.skipif(K.triton is None, reason="triton is not installed")
IMPLS = ["torch", pytest.param("triton", marks=needs_triton)]


@pytest.fixture(autouse=True)
def poison():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def current(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.7).to(DEVICE, dtype)


def check(x, impl, g=None, **constants):
    """Spikes and gradients equal the specification's bit for bit; same dtype. Gives the spikes."""
    g = current(*x.shape, dtype=x.dtype, seed=1) if g is None else g
    x = x.detach()  # a view's strides stay

    def run(neuron, x):
        x.requires_grad_()
        spikes = neuron(x)
        return spikes.detach(), torch.autograd.grad(spikes, x, g.to(spikes.dtype))[0]

    spikes, dx = run(lambda x: lif(x, **constants, impl=impl), x)
    # bf16 and fp16 values are exact in fp32, and so is the state: only dX is rounded, once
    wide = torch.promote_types(x.dtype, torch.float32)
    ref, dref = run(lambda x: lif_reference(x, **constants), x.detach().to(wide))
    if K.INTERPRET and impl == "triton" and x.dtype == torch.bfloat16:
        # Triton's interpreter truncates; GPUs round
        dref = (dref.view(torch.int32) & ~0xFFFF).view(torch.float32)
    assert spikes.dtype == dx.dtype == x.dtype
    assert torch.equal(spikes.to(wide), ref)
    assert torch.equal(dx, dref.to(x.dtype))
    with torch.no_grad():
        assert torch.equal(lif(x, **constants, impl=impl), spikes)
    return spikes


# -------------------------------------------------------------------- the specification itself

# decay 0.5, v_th 1, lens 1, so the surrogate is 1/2 where 0 < U < 2:
#   t   X      U      F  w
#   0   2      2      1  0   exactly on the upper edge: outside; spikes, resets
#   1   0.5    0.5    0  1
#   2   0.75   1      0  1   exactly at v_th: no spike, in the window
#   3   1      1.5    1  1   spikes, resets
#   4   1.75   1.75   1  1   spikes again
#   5   0      0      0  0   exactly on the lower edge: outside
#   6   0.25   0.25   0  1
TRACE_X = [2, 0.5, 0.75, 1, 1.75, 0, 0.25]
TRACE_F = [1, 0, 0, 1, 1, 0, 0]
TRACE_G = [2, 4, 8, 16, 32, 64, 128]  # halved by the surrogate
# detached:  64; 0 + 64/2; 16 + 0; 8 + 0; 4 + 8/2; 2 + 8/2; 0 + 0
TRACE_DX = [0, 6, 8, 8, 16, 32, 64]
# plain:     64; 32; 16 - 32*1.75/4; 8 - 2*1.5/4; 4 - 7.25*1/4 + 7.25/2;
#            2 - 5.8125*0.5/4 + 5.8125/2; 0
TRACE_DX_PLAIN = [0, 4.1796875, 5.8125, 7.25, 2, 32, 64]


@pytest.mark.parametrize("neuron", [lif_reference, lif])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("detach_reset, dx", [(True, TRACE_DX), (False, TRACE_DX_PLAIN)])
def test_hand_derived_trace(neuron, dtype, detach_reset, dx):
    x = torch.tensor(TRACE_X, dtype=dtype, device=DEVICE, requires_grad=True)
    spikes = neuron(x, 0.5, 1, 1, detach_reset)
    spikes.backward(torch.tensor(TRACE_G, dtype=dtype, device=DEVICE))
    assert spikes.tolist() == TRACE_F
    assert x.grad.tolist() == dx


# ---------------------------------------------------------------------------- paths against it

@pytest.mark.parametrize("impl", IMPLS)
def test_every_T(impl):
    for T in (*range(1, 10), 16, 17, 31, 32):
        check(current(T, 37, seed=T), impl, **ODD)
    check(current(3), impl)  # T alone, and the constants' defaults


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T, N", [(6, 1), (4, 16), (6, 2048 + 13)])
def test_dtypes_and_blocks(impl, dtype, T, N):
    check(current(T, N, dtype=dtype), impl, **ODD)


def test_pytorch_path_in_chunks():
    check(current(5, 2 * 2**17 * torch.get_num_threads() + 5), "torch", **ODD)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in Triton's interpreter
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_infinity_as_in_the_specification(impl):
    x = current(6, 64)
    x[2, :8], x[1, 8:16], x[1, 16:24] = float("nan"), float("inf"), float("-inf")
    with torch.no_grad():
        assert torch.equal(lif(x, impl=impl), lif_reference(x))


@pytest.mark.parametrize("impl", IMPLS)
def test_values_at_the_threshold_and_the_window_edges(impl):
    """Neighbours in fp32 of v_th and v_th +- lens, and those values themselves."""
    edges = torch.tensor([ODD["v_th"], ODD["v_th"] + ODD["lens"], ODD["v_th"] - ODD["lens"]])
    lower, upper = torch.nextafter(edges, edges - 1), torch.nextafter(edges, edges + 1)
    check(torch.cat([edges, lower, upper]).expand(3, 9).to(DEVICE), impl, **ODD)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    "transposed dense": lambda x: x.permute(0, 3, 1, 4, 2).contiguous().permute(0, 2, 4, 1, 3),
    "expanded over T": lambda x: x[:1].expand_as(x),
    "expanded over T, channels-last":
        lambda x: LAYOUTS["channels-last"](x[:1].contiguous()).expand_as(x),
}
COPIED = {
    "T inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "T innermost": lambda x: x.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3),
    "every second step": lambda x: x.repeat_interleave(2, 0)[::2],
    "every second column": lambda x: x.repeat_interleave(2, 4)[..., ::2],
    "expanded inside": lambda x: x[:, :, :1].expand_as(x),
    "overlapping": lambda x: x.flatten()[1:].as_strided((3, 2, 3, 4, 5), (60, 60, 20, 5, 1)),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", [*LAYOUTS, *COPIED])
def test_layouts(impl, layout):
    x = (LAYOUTS | COPIED)[layout](current(4, 2, 3, 4, 5))
    if layout in LAYOUTS:
        seen, real = [], K._lif
        K._lif = lambda flat, *rest: seen.append(flat.data_ptr()) or real(flat, *rest)
        lif(x, impl=impl), setattr(K, "_lif", real)
        assert seen == [x.data_ptr()]  # no copy
    for g_layout in ("channels-last", "expanded over T", "expanded inside"):
        g = (LAYOUTS | COPIED)[g_layout](current(*x.shape, seed=2))
        spikes = check(x, impl, g, **ODD)
    if layout in LAYOUTS:
        assert spikes.stride()[1:] == x.stride()[1:] and spikes.stride(0) == 2 * 3 * 4 * 5


@pytest.mark.parametrize("impl", IMPLS)
def test_no_neurons(impl):
    for shape in ((3, 0), (3, 2, 0, 4)):
        x = torch.zeros(shape, device=DEVICE, requires_grad=True)
        spikes = lif(x, impl=impl)
        spikes.sum().backward()
        assert spikes.shape == x.grad.shape == shape


# -------------------------------------------------------------------- autograd, compile, autocast

def saved_bytes(x, **kwargs):
    sizes = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        lif(x, **kwargs)
    return sum(sizes)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T", [1, 4, 5, 8])
def test_saved_bytes(impl, T):
    x = current(T, 100)
    assert saved_bytes(x, impl=impl) == 0
    x.requires_grad_()
    assert saved_bytes(x, impl=impl) == math.ceil(T / 4) * 100  # two bits a neuron-step
    with torch.no_grad():
        assert saved_bytes(x, impl=impl) == saved_bytes(x, impl=impl, detach_reset=False) == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_double_backward_is_refused(impl):
    x = current(4, 10).requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(lif(x, impl=impl).sum(), x, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    x = current(5, 72)
    bits = torch.randint(0, 256, (2, 72), dtype=torch.uint8, device=DEVICE)
    g, x = x.detach(), x.requires_grad_()
    for op, args in ((K._lif, (x, 0.25, 0.5, 0.5, True, impl)),
                     (K._lif, (x, 0.25, 0.5, 0.5, False, impl)),
                     (K._lif, (x[:1].expand(5, 72), 0.25, 0.5, 0.5, False, impl)),
                     (K._lif_backward, (g, bits, 0.25, 0.5, impl))):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("detach_reset", [True, False])
def test_compile_fullgraph(impl, detach_reset):
    torch.compiler.reset()

    def f(x, decay):
        return lif(x * 1.5, decay, detach_reset=detach_reset, impl=impl) * 2

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=detach_reset)
    for i, layout in enumerate(("contiguous", "channels-last")):
        x = LAYOUTS[layout](current(4, 2 + i, 3, 4, 5)).requires_grad_()
        g = current(*x.shape, seed=1)
        for decay in (0.25, 0.4):
            got, expect = compiled(x, decay), f(x, decay)
            assert torch.equal(got, expect) and got.stride() == expect.stride()
            dx, expect_dx = (torch.autograd.grad(spikes, x, g)[0] for spikes in (got, expect))
            assert torch.equal(dx, expect_dx)
        with torch.no_grad():
            assert torch.equal(compiled(x, 0.25), f(x, 0.25))


# X, and the gradient of the spikes' sum by hand: dX[t] = w[t] + dX[t+1] * decay * (1 - F[t]) with
# w = 1, 1, 1 and F = 1, 0, 0
LATER_X = [[0.75], [0.4], [0.4]]
LATER_DX = [[1.0], [1.25], [1.0]]
BATCH = dict(in_dims=1, out_dims=1)


def exported(f, x):
    class Module(torch.nn.Module):
        def forward(self, x):
            return f(x)
    return torch.export.export(Module(), (x,)).module()


LATER = {  # ways to a function that meets an x without a gradient first, and is differentiated then
    "vmap": lambda f, x: torch.func.vmap(f, **BATCH),
    "make_fx": lambda f, x: make_fx(f)(x),
    "export": exported,
    "vmap of a trace": lambda f, x: torch.func.vmap(exported(f, x[:, 0]), **BATCH),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("way", LATER)
def test_derivative_of_a_function_traced_without_one(way, impl):
    x = torch.tensor(LATER_X, device=DEVICE)
    later = LATER[way](lambda x: lif(x, impl=impl), x)
    x.requires_grad_()
    later(x).sum().backward()
    assert x.grad.tolist() == LATER_DX


@pytest.mark.parametrize("impl", IMPLS)
def test_torch_func(impl):
    func, x = torch.func, torch.tensor(LATER_X, device=DEVICE)

    def loss(x):
        return lif(x, impl=impl).sum()

    assert func.vmap(func.grad(loss), **BATCH)(x).tolist() == LATER_DX
    mapped = func.vmap(lambda x: lif(x, impl=impl), **BATCH)
    assert func.grad(lambda x: mapped(x).sum())(x).tolist() == LATER_DX
    jacobian = func.jacrev(lambda x: lif(x, impl=impl))(x)[:, 0, :, 0]
    assert jacobian.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0.25, 1]]
    x = current(5, 6, 7)
    g = current(5, 6, 7, seed=1)
    for detach_reset in (True, False):  # per sample, against all at once
        def f(x):
            return lif(x, **ODD, detach_reset=detach_reset, impl=impl)
        expect, = func.vjp(f, x)[1](g)
        y = x.clone().requires_grad_()
        assert torch.equal(expect, torch.autograd.grad(f(y), y, g)[0])
        one = func.vmap(lambda x, g: func.vjp(f, x)[1](g)[0], 2, 2)(x, g)
        assert torch.equal(one, expect)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("detach_reset", [True, False])
def test_forward_mode_is_refused(impl, detach_reset):
    """Its answer was zeros."""
    def f(x):
        return lif(x, detach_reset=detach_reset, impl=impl)
    x, forward_ad = torch.tensor(LATER_X, device=DEVICE), torch.autograd.forward_ad
    for g in (f, make_fx(f)(x), torch.func.vmap(f, **BATCH)):
        with pytest.raises(NotImplementedError):
            torch.func.jvp(g, (x,), (x,))
        with forward_ad.dual_level():
            with pytest.raises(NotImplementedError):
                g(forward_ad.make_dual(x, x))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        f(forward_ad.make_dual(x.requires_grad_(), x))


@pytest.mark.parametrize("name", ["decay", "v_th", "lens"])
def test_constants_are_numbers_without_a_gradient(name):
    x, constant = current(3, 4), torch.tensor(0.5, requires_grad=True)
    for other in (constant, torch.full([4], 0.5)):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            lif(x, **{name: other})
    assert torch.equal(lif(x, **{name: constant.detach()}), lif(x, **{name: 0.5}))


def test_default_picks_the_path_of_the_device():
    x = current(3, 50)
    assert torch.equal(lif(x), lif_reference(x))
    # float64 and long runs: PyTorch on every device
    assert torch.equal(lif(x.double()), lif_reference(x.double()))
    assert torch.equal(lif(x.repeat(20, 1)), lif_reference(x.repeat(20, 1)))


# ---------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("kwargs, error, words", [
    (dict(lens=0), ValueError, "lens"), (dict(lens=math.inf), ValueError, "lens"),
    (dict(decay=1.5), ValueError, "decay"), (dict(decay=math.nan), ValueError, "decay"),
    (dict(v_th=math.nan), ValueError, "v_th"), (dict(impl="cuda"), ValueError, "impl"),
    (dict(x=torch.zeros(())), ValueError, r"\(T, \.\.\.\)"),
    (dict(x=torch.zeros(0, 3)), ValueError, "T >= 1"),
    (dict(x=torch.zeros(4, 3, dtype=torch.int32)), TypeError, "int32"),
])
def test_errors(kwargs, error, words):
    with pytest.raises(error, match=words):
        lif(**{"x": torch.zeros(4, 3), **kwargs})


@pytest.mark.skipif(K.triton is None, reason="no triton")
def test_errors_of_forced_triton(monkeypatch):
    with pytest.raises(ValueError, match="1 to 32"):
        lif(torch.zeros(33, 3, device=DEVICE), impl="triton")
    with pytest.raises(ValueError, match="float64"):
        lif(torch.zeros(4, 3, dtype=torch.float64, device=DEVICE), impl="triton")
    monkeypatch.setattr(K, "INTERPRET", False)
    with pytest.raises(ValueError, match="CUDA"):
        lif(torch.zeros(4, 3), impl="triton")


def test_without_triton():
    """As on macOS and Windows: the import works, PyTorch computes, forcing Triton says why not."""
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
x = torch.ones(4, 3, requires_grad=True)
kernels.lif(x).sum().backward()
assert x.grad.shape == x.shape
kernels.bn_lif(torch.randn(4, 2, 3, 5, 5), x[0], x[0]).sum().backward()
try:
    kernels.lif(x, impl="triton")
except ValueError as e:
    assert "not installed" in str(e)
else:
    raise SystemExit("no error")
"""
    root = Path(__file__).resolve().parent.parent
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_specification_is_an_implementation_too():
    """Where a forker starts: an edited `lif_reference` is what `lif` and `bn_lif` then run."""
    x = torch.randn(4, 2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.ones(3), torch.zeros(3)
    assert torch.equal(lif(x, impl="reference"), lif_reference(x))
    assert torch.equal(bn_lif(x, weight, bias, impl="reference"),
                       bn_lif(x, weight, bias, impl="torch"))


def test_the_folder_is_lifted_into_another_project(tmp_path):
    """A copy under another name, inside a package, beside this one in the same process."""
    (tmp_path / "theirs").mkdir()
    source = Path(__file__).resolve().parent.parent / "kernels"
    shutil.copytree(source, tmp_path / "theirs" / "épines")  # operators have names in ASCII
    code = """
import torch, kernels
from theirs.épines import lif, bn_lif
x = torch.randn(4, 2, 3, 5, 5)
assert lif.__module__ == "theirs.épines.lif"
assert torch.equal(lif(x), kernels.lif(x))
one, zero = torch.ones(3), torch.zeros(3)
assert torch.equal(bn_lif(x, one, zero), kernels.bn_lif(x, one, zero))
"""
    path = os.pathsep.join([str(tmp_path), str(source.parent)])
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path},
                         capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
