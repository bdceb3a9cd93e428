"""The multi-step LIF neuron with the rectangular surrogate, fused over time (paper eq. 2-4).

    U[t]  = U[t-1] * decay * (1 - F[t-1]) + X[t],  U[-1] = 0     decay = exp(-1/tau)         (2)
    F[t]  = 1 if U[t] > v_th else 0                              strict; hard reset to 0     (3)
    dF/dU = 1/(2*lens) if |U - v_th| < lens else 0               strict; lens = half-width   (4)

Backward, from the last step to the first, with w[t] = |U[t] - v_th| < lens and dX[t] = dU[t]:

    detached reset    dU[t] = g[t]*w[t]/(2*lens) + dU[t+1]*decay*(1-F[t])
    plain derivative  dU[t] = (g[t] - dU[t+1]*U[t]*decay)*w[t]/(2*lens) + dU[t+1]*decay*(1-F[t])

With the reset detached, two bits per neuron-step are the whole saved state: F and w, packed over
T, four steps a byte (byte t//4, F in bit 2*(t%4), w in the bit above). The plain derivative saves
X and recomputes U in registers. Least traffic per neuron-step at T = 4, in bytes (bf16 / fp32):

    detached reset    forward   read X, write F and bits         4.25 / 8.25
                      backward  read g and bits, write dX        4.25 / 8.25     8.5 / 16.5 in all
    plain derivative  forward   read X, write F                  4    / 8
                      backward  read g and X, write dX           6    / 12       10  / 20   in all

`lif_reference` is the specification. What follows it computes the same numbers, bit for bit in
fp32: the state is fp32 whatever the dtype of X, the operations come in one order, nothing is
divided, no multiply-add is contracted. bn_lif.py puts a batch norm before the same neuron.
"""

import math
import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: everything runs on PyTorch
    triton = None

MAX_T = 32  # the kernels unroll over T
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton on CPU tensors, for tests


def state_dtype(x):
    """fp32 whatever the dtype of x, fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------------------- the specification

class _Spike(torch.autograd.Function):
    """Eq. 3 forward, eq. 4 backward."""

    @staticmethod
    def forward(ctx, u, v_th, lens):
        ctx.save_for_backward(u)
        ctx.v_th, ctx.lens = v_th, lens
        return (u > v_th).to(u.dtype)

    @staticmethod
    def backward(ctx, g):
        u, = ctx.saved_tensors
        window = ((u - ctx.v_th).abs() < ctx.lens).to(u.dtype)
        return g * (window * (1 / (2 * ctx.lens))), None, None


def lif_reference(x, decay=0.25, v_th=0.5, lens=0.5, detach_reset=True):
    """Paper eq. 2-4 as they stand, a loop over t, differentiated by autograd: (T, ...) -> (T, ...).

    Same dtype out; the state is fp32 for bf16 and fp16 input, fp64 for fp64. Slow; everything else
    is tested against it.
    """
    u = f = torch.zeros_like(x[0], dtype=state_dtype(x))
    spikes = []
    for t in range(x.shape[0]):
        if detach_reset:
            f = f.detach()
        u = u * decay * (1 - f) + x[t].to(u.dtype)
        f = _Spike.apply(u, v_th, lens)
        spikes.append(f.to(x.dtype))
    return torch.stack(spikes)


# ---------------------------------------------------------------------------- memory
# to the kernels every tensor is flat (T, N): the N neurons of a time-step in any dense order.

def planes_like(x, T, dtype=None):
    """Empty (T, ...), one dense plane after another, dimensions in the order that they have in
    x[0]; shape and dtype else as x."""
    N = math.prod(x.shape[1:])
    # a dense plane keeps its own order, whatever it is
    strides = torch.empty_like(x[0], device="meta").stride()
    return x.new_empty_strided((T, *x.shape[1:]), (N, *strides), dtype=dtype or x.dtype)


def flat(x, like):
    """x as flat (T, N) memory whose planes lie as those of `like`: a view where they do, or a copy.

    T-stride N, or 0 if x is expanded.
    """
    T, N = len(x), math.prod(x.shape[1:])
    dimensions = zip(x.shape[1:], x.stride()[1:], like.stride()[1:])
    # the stride of a dimension of size 1 is never used
    dense = all(stride == wanted for size, stride, wanted in dimensions if size > 1)
    if not dense or T > 1 and x.stride(0) not in (0, N):
        x = planes_like(like, T, x.dtype).copy_(x)
    return x.as_strided((T, N), (N if T == 1 else x.stride(0), 1))


# ---------------------------------------------------------------------------- PyTorch path
# every operation writes into a buffer that stays in the cache while a chunk of neurons runs
# through all its steps. masks are 0.0 and 1.0 in the dtype of the state: on CPUs bool tensors cost
# ten times as much as float ones. a product with such a mask is exact, so addcmul rounds the same
# whether or not it contracts its multiply-add.

def _chunks(x):
    N = x.shape[1]
    size = max(N, 1)
    if x.device.type == "cpu":
        size = 2**17 * torch.get_num_threads()  # neurons: half a MiB of each buffer and thread
    return (slice(i, min(i + size, N)) for i in range(0, N, size))


def _buffers(x, s, n):
    return x.new_empty(n, s.stop - s.start, dtype=state_dtype(x)).unbind()


def forward_torch(x, spikes, bits, decay, v_th, lens):
    """x (T, N) -> spikes (T, N) and, unless None, bits (ceil(T/4), N) uint8. Any float dtypes."""
    T = x.shape[0]
    for s in _chunks(x):
        leak, keep, distance, code, u_out = _buffers(x, s, 5)
        for t in range(T):
            u = x[t, s].to(leak.dtype)
            f = spikes[t, s]
            if t:
                u = torch.addcmul(u, leak, keep, out=u_out)
            torch.gt(u, v_th, out=f)
            # what the next step needs
            if t < T - 1:
                torch.mul(u, decay, out=leak)
                torch.le(u, v_th, out=keep)  # 1 - F
            # what the backward needs
            if bits is not None:
                window = torch.sub(u, v_th, out=distance).abs_().lt_(lens)
                if t % 4 == 0:
                    code.zero_()
                bit = 4 ** (t % 4)  # F's; w's is the next
                code.add_(f, alpha=bit).add_(window, alpha=2 * bit)
                if t % 4 == 3 or t == T - 1:
                    bits[t // 4, s] = code


def backward_torch(g, bits, dx, decay, lens):
    """Detached reset: g (T, N), bits (ceil(T/4), N) -> dx (T, N)."""
    T = g.shape[0]
    for s in _chunks(g):
        window, keep, next_du, du_out = _buffers(g, s, 4)
        byte, masked = bits.new_empty(2, s.stop - s.start)
        for t in reversed(range(T)):
            bit = 4 ** (t % 4)
            if t % 4 == 3 or t == T - 1:
                torch.bitwise_xor(bits[t // 4, s], 0b01010101, out=byte)  # 1 - F beside each w
            # 1/(2*lens) or 0, exactly: a power of two comes and goes
            window.copy_(torch.bitwise_and(byte, 2 * bit, out=masked))
            window.mul_(1 / (2 * lens) / (2 * bit))
            # straight to where it belongs, unless that would round the next steps too
            out = dx[t, s] if dx.dtype == keep.dtype else du_out
            du = torch.mul(g[t, s].to(keep.dtype), window, out=out)
            if t < T - 1:
                keep.copy_(torch.bitwise_and(byte, bit, out=masked))
                du.addcmul_(next_du, keep, value=1 / bit)
            if t:
                torch.mul(du, decay, out=next_du)
            if du is du_out:
                dx[t, s] = du


def backward_full_torch(g, x, dx, decay, v_th, lens):
    """Plain derivative: g (T, N), x (T, N) -> dx (T, N). Rare, so without buffers."""
    dtype = state_dtype(x)
    us, leak = [], 0
    for x_t in x.to(dtype):
        us.append(leak + x_t)
        leak = us[-1] * decay * (us[-1] <= v_th)
    du = torch.zeros_like(us[0])
    for t in reversed(range(len(us))):
        u = us[t]
        surrogate = ((u - v_th).abs() < lens).to(dtype) * (1 / (2 * lens))
        # a spike more at t is a reset of u*decay more
        g_t = g[t].to(dtype) - du * (u * decay)
        du = g_t * surrogate + du * decay * (u <= v_th)
        dx[t] = du


# ---------------------------------------------------------------------------- Triton kernels
# T is unrolled, N is a run-time value: one compiled variant for N divisible by 16 (128-bit loads
# and stores), one for the rest. masks become factors (decay or 0, inv or 0), which is the
# specification's own product.

if triton is not None:

    @triton.jit
    def load_steps(X, plane, offsets, inside, T: tl.constexpr):
        """x[0] ... x[T-1]: a tuple. Stands before the first store.

        Pointers may alias, so a load written after a store waits for it; a memory-bound kernel
        lives from loads in flight.
        """
        xs = ()
        for t in tl.static_range(T):
            xs = xs + (tl.load(X + t * plane + offsets, inside, 0),)
        return xs

    @triton.jit
    def fire(leak, x, v_th, lens):
        """One step: leak (0 after a spike) and input -> U (eq. 2), F (eq. 3), window (eq. 4)."""
        u = leak + x.to(tl.float32)
        return u, u > v_th, tl.abs(u - v_th) < lens

    @triton.jit
    def reset(u, fired, decay):
        """What is left of U for the next step: 0 after a spike."""
        return u * tl.where(fired, 0.0, decay)

    @triton.jit
    def pack(code, fired, window, t):
        """Put step t's two bits into the byte."""
        bits = fired.to(tl.int32) | (window.to(tl.int32) << 1)
        return code | (bits << (2 * (t % 4)))

    @triton.jit
    def backward_step(g, du, code, t, decay, inv):
        """dU[t+1] -> dU[t] with the reset detached, from step t's two bits."""
        code = code.to(tl.int32) >> (2 * (t % 4))
        surrogate = tl.where((code & 2) != 0, inv, 0.0)
        keep = tl.where((code & 1) != 0, 0.0, decay)
        return g.to(tl.float32) * surrogate + du * keep

    @triton.jit
    def _neurons(N, BLOCK: tl.constexpr):
        """This program's neurons, and which of them there are."""
        n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        return n, n < N

    @triton.jit(do_not_specialize=["step"])
    def _forward_kernel(X, N: tl.int64, step, F, Bits, decay, v_th, lens, T: tl.constexpr,
                        BLOCK: tl.constexpr):
        """Eq. 2-3. Reads X, writes F and, unless Bits is None, two bits per neuron-step.

        X moves on by step*N a time-step; step is 0 (the same current at every step) or 1.
        """
        n, inside = _neurons(N, BLOCK)
        xs = load_steps(X, step * N, n, inside, T)
        leak = tl.zeros([BLOCK], tl.float32)
        code = tl.zeros([BLOCK], tl.int32)
        for t in tl.static_range(T):
            u, fired, window = fire(leak, xs[t], v_th, lens)
            tl.store(F + t * N + n, tl.where(fired, 1.0, 0.0), inside)
            leak = reset(u, fired, decay)
            if Bits is not None:
                code = pack(code, fired, window, t)
                if t % 4 == 3 or t == T - 1:
                    tl.store(Bits + t // 4 * N + n, code, inside)
                    code = tl.zeros([BLOCK], tl.int32)

    @triton.jit(do_not_specialize=["step"])
    def _backward_kernel(G, N: tl.int64, step, Bits, DX, decay, inv, T: tl.constexpr,
                         BLOCK: tl.constexpr):
        """Detached reset. Reads g and two bits, writes dX. G moves on by step*N a time-step."""
        n, inside = _neurons(N, BLOCK)
        gs = load_steps(G, step * N, n, inside, T)
        codes = load_steps(Bits, N, n, inside, (T + 3) // 4)
        du = tl.zeros([BLOCK], tl.float32)
        for t in tl.static_range(T - 1, -1, -1):
            du = backward_step(gs[t], du, codes[t // 4], t, decay, inv)
            tl.store(DX + t * N + n, du, inside)

    @triton.jit(do_not_specialize=["g_step", "x_step"])
    def _backward_full_kernel(G, N: tl.int64, g_step, X, x_step, DX, decay, v_th, lens, inv,
                              T: tl.constexpr, BLOCK: tl.constexpr):
        """Plain derivative. Reads X, recomputes U into registers, reads g, writes dX."""
        n, inside = _neurons(N, BLOCK)
        xs = load_steps(X, x_step * N, n, inside, T)
        gs = load_steps(G, g_step * N, n, inside, T)
        leak = tl.zeros([BLOCK], tl.float32)
        us = ()
        for t in tl.static_range(T):
            u, fired, _ = fire(leak, xs[t], v_th, lens)
            leak = reset(u, fired, decay)
            us = us + (u,)
        du = tl.zeros([BLOCK], tl.float32)
        for t in tl.static_range(T - 1, -1, -1):
            u, g = us[t], gs[t].to(tl.float32)
            if t < T - 1:
                g = g - du * (u * decay)
            surrogate = tl.where(tl.abs(u - v_th) < lens, inv, 0.0)
            du = g * surrogate + du * tl.where(u > v_th, 0.0, decay)
            tl.store(DX + t * N + n, du, inside)


def block_size(itemsize, planes):
    """Neurons per program: 16 bytes for each of 128 threads; fewer where more than 16 planes of
    each stay in registers."""
    block = 128 * 16 // itemsize
    for limit in (16, 32):
        if planes > limit:
            block //= 2
    return block


def _step(x):
    return int(x.stride(0) != 0)  # 0: one plane, the same current each step


def _launch(kernel, planes, x, *args):
    """x (T, N), and what follows N and x's step; so many planes are loaded."""
    T, N = x.shape
    block = block_size(x.element_size(), planes)
    if N == 0:
        return
    # products and sums stay apart (no contraction), as in the specification
    grid = (triton.cdiv(N, block),)
    with torch.cuda.device_of(x):
        kernel[grid](x, N, _step(x), *args, T=T, BLOCK=block, num_warps=4, enable_fp_fusion=False)


# ---------------------------------------------------------------------------- operators
# functional, so that torch.compile may reorder them. `save` asks for the bits, where x requires a
# gradient at the call. where it does not (inference, but also vmap or a trace that is
# differentiated later) the derivative computes anew what it needs from x.

Tensor = torch.Tensor

NO_FORWARD_MODE = ("{} has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad): use "
                   "torch.func.vjp or jacrev, or lif_reference with torch.autograd.functional.jvp")


def refuse_forward_mode(name):
    """Raise under jvp and dual numbers: an operator's answer to them would be zeros, in silence.

    Called by the operators' own bodies, which see no tangents, only that somebody takes them.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        raise NotImplementedError(NO_FORWARD_MODE.format(name))


@torch.library.custom_op("idsnn::lif", mutates_args=())
def _lif(x: Tensor, decay: float, v_th: float, lens: float, detach_reset: bool, save: bool,
         impl: str) -> tuple[Tensor, Tensor]:
    """Spikes, and the bits, empty unless `save`; detach_reset concerns the derivative alone."""
    refuse_forward_mode("lif")
    spikes, bits = _lif_outputs(x, save)
    X, F = flat(x, spikes), flat(spikes, spikes)
    B = flat(bits, spikes) if save else None
    if impl == "torch":
        forward_torch(X, F, B, decay, v_th, lens)
    else:
        _launch(_forward_kernel, len(X), X, F, B, decay, v_th, lens)
    return spikes, bits


@torch.library.custom_op("idsnn::lif_backward", mutates_args=())
def _lif_backward(g: Tensor, saved: Tensor, decay: float, v_th: float, lens: float,
                  detach_reset: bool, impl: str) -> Tensor:
    """dX from g and what was saved: the bits or, for the plain derivative, x."""
    refuse_forward_mode("lif")
    dx = planes_like(saved, len(g), g.dtype)
    G, S, D = (flat(t, dx) for t in (g, saved, dx))
    inv = 1 / (2 * lens)
    if impl == "torch" and detach_reset:
        backward_torch(G, S, D, decay, lens)
    elif impl == "torch":
        backward_full_torch(G, S, D, decay, v_th, lens)
    elif detach_reset:
        _launch(_backward_kernel, len(G), G, S, D, decay, inv)
    else:
        _launch(_backward_full_kernel, 2 * len(G), G, S, _step(S), D, decay, v_th, lens, inv)
    return dx


def _lif_outputs(x, save):
    spikes = planes_like(x, len(x))
    if not save:
        return spikes, x.new_empty(0, dtype=torch.uint8)
    return spikes, planes_like(x, (len(x) + 3) // 4, torch.uint8)


_lif.register_fake(lambda x, *rest: _lif_outputs(x, save=rest[-2]))
_lif_backward.register_fake(lambda g, saved, *_: planes_like(saved, len(g), g.dtype))


# ---------------------------------------------------------------------------- derivatives

def _save(ctx, inputs, output):
    x, *ctx.neuron, ctx.bits_saved, ctx.impl = inputs
    spikes, bits = output
    ctx.save_for_backward(bits if ctx.bits_saved else x)
    ctx.set_materialize_grads(False)  # no zeros for the bits


def _gradient(g, saved, decay, v_th, lens, detach_reset, bits_saved, impl):
    """dX from the bits or, where they were not saved, from x."""
    if detach_reset and not bits_saved:
        saved = _lif(saved, decay, v_th, lens, True, True, impl)[1]
    return _lif_backward(g, saved, decay, v_th, lens, detach_reset, impl)


def no_second_derivative(name):
    raise RuntimeError(f"{name} has no second derivative: take its gradient without "
                       "create_graph=True")


def _backward(ctx, g, _):
    if torch.is_grad_enabled():  # true in a backward only with create_graph=True
        no_second_derivative("lif")
    dx = _gradient(g, *ctx.saved_tensors, *ctx.neuron, ctx.bits_saved, ctx.impl)
    return dx, *[None] * 6


_lif.register_autograd(_backward, setup_context=_save)


def over_batches(function):
    """The vmap rule of a function of (T, ...) tensors: the batch goes behind T, as more neurons."""
    def behind_T(arg, dim, batch_size):
        if not isinstance(arg, Tensor):
            return arg
        if dim is None:  # the same for the whole batch: (T, ...) -> (T, batch, ...)
            return arg.unsqueeze(1).expand(len(arg), batch_size, *arg.shape[1:])
        return arg.movedim(dim, 1)  # -> (T, batch, ...)

    def rule(info, in_dims, *args):
        batched = [behind_T(arg, dim, info.batch_size) for arg, dim in zip(args, in_dims)]
        out = function(*batched)
        if isinstance(out, tuple):
            # bits that were not asked for are empty, without a batch
            return out, tuple(1 if o.dim() > 1 else None for o in out)
        return out, 1
    return rule


for _op in (_lif, _lif_backward):
    _op.register_vmap(over_batches(_op))


class _Gradient(torch.autograd.Function):
    """dX under torch.func, which always asks for a graph of the backward; this one ends here."""
    forward = staticmethod(_gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        no_second_derivative("lif")

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(NO_FORWARD_MODE.format("lif"))


class _Transformed(torch.autograd.Function):
    """idsnn::lif under torch.func, whose grad and vjp don't take an operator's own derivative."""
    jvp = _Gradient.jvp

    @staticmethod
    def forward(x, decay, v_th, lens, detach_reset, impl):
        return _lif(x, decay, v_th, lens, detach_reset, False, impl)[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.neuron, ctx.impl = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, g):
        dx = _Gradient.apply(g, *ctx.saved_tensors, *ctx.neuron, False, ctx.impl)
        return dx, *[None] * 5


for _function in (_Gradient, _Transformed):
    _function.vmap = staticmethod(over_batches(_function.apply))


# ---------------------------------------------------------------------------- what users call

def choose_impl(x, T, impl):
    """"triton", "torch" or "reference"; raises where Triton is forced and cannot run."""
    if impl not in (None, "torch", "triton", "reference"):
        raise ValueError(f"impl must be None, 'torch', 'triton' or 'reference', not {impl!r}")
    if impl in ("torch", "reference"):
        return impl
    fits = x.dtype != torch.float64 and 1 <= T <= MAX_T
    if impl is None:
        return "triton" if triton is not None and x.is_cuda and fits else "torch"
    if triton is None:
        raise ValueError("impl='triton', but triton is not installed")
    if not (x.is_cuda or INTERPRET):
        raise ValueError(f"impl='triton' needs a CUDA tensor, x is on {x.device} "
                         "(or set TRITON_INTERPRET=1)")
    if not 1 <= T <= MAX_T:
        raise ValueError(f"impl='triton' takes 1 to {MAX_T} time-steps, not {T}")
    if x.dtype == torch.float64:
        raise TypeError("impl='triton' has no float64, use impl='torch'")
    return "triton"


def check(x, T, decay, v_th, lens, impl):
    """((decay, v_th, lens) as floats, the impl chosen); raises where one is out of range."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, not {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, not {x.dtype}")
    for name, value in (("decay", decay), ("v_th", v_th), ("lens", lens)):
        if isinstance(value, Tensor) and value.requires_grad:
            raise TypeError(f"{name} requires a gradient, but lif has none for its constants: "
                            f"give {name}.item(), or differentiate kernels.lif.lif_reference")
    decay, v_th, lens = float(decay), float(v_th), float(lens)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must lie in 0 to 1, not {decay}")
    if not -math.inf < v_th < math.inf:
        raise ValueError(f"v_th must be finite, not {v_th}")
    if not 0 < lens < math.inf:
        raise ValueError(f"lens must be positive and finite, not {lens}")
    return (decay, v_th, lens), choose_impl(x, T, impl)


def lif(x: Tensor, decay: float = 0.25, v_th: float = 0.5, lens: float = 0.5,
        detach_reset: bool = True, impl: str | None = None) -> Tensor:
    """Spikes of stateless LIF neurons over T time-steps (paper eq. 2-4); U starts at 0.

    x             (T, ...) input current, float32, bfloat16, float16 or float64; the state is fp32
                  (fp64 for fp64)
    decay         exp(-1/tau), 0 to 1
    v_th          firing threshold
    lens          half-width of the surrogate's window
    detach_reset  no gradient through the reset factor 1 - F[t-1], as in the authors' code;
                  False: the plain derivative
    impl          None: Triton on CUDA (up to 32 steps, not float64), PyTorch elsewhere; "torch" or
                  "triton" forces one; "reference": `lif_reference`, for a neuron that was edited

    Returns (T, ...) spikes, 0 or 1, in x's dtype and memory layout. x isn't copied if each
    time-step is dense, in any order of dimensions, and T is the outermost dimension or expanded.
    For the backward are kept two bits per neuron-step (x itself with detach_reset=False), without
    a gradient nothing. torch.func's vmap, grad, vjp and jacrev work. Second derivatives are refused
    with a RuntimeError, forward mode with a NotImplementedError. Raises TypeError for a wrong dtype
    or a constant that requires a gradient, ValueError for anything else out of range.
    """
    if isinstance(x, Tensor) and (x.dim() == 0 or x.shape[0] == 0):
        raise ValueError(f"x must be (T, ...) with T >= 1, not {tuple(x.shape)}")
    neuron, impl = check(x, len(x), decay, v_th, lens, impl)
    detach_reset = bool(detach_reset)
    if impl == "reference":
        return lif_reference(x, *neuron, detach_reset)
    if torch._C._are_functorch_transforms_active():
        return _Transformed.apply(x, *neuron, detach_reset, impl)
    save = detach_reset and torch.is_grad_enabled() and x.requires_grad
    return _lif(x, *neuron, detach_reset, save, impl)[0]
