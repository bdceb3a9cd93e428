"""Batch norm, residual add and the LIF neuron in one pass over memory, for training and inference.

    current[t] = x[t]*scale + shift + residual[t]       scale = weight / sqrt(var + eps),  shift = bias - mean*scale
    spikes     = LIF(current)                           lif.py: paper eq. 2-4

mean and (biased) var are taken over T, B, H and W and over all ranks of a process group, or are given (evaluation).
Backward, from dcurrent, which the neuron's recurrence gives from two bits per neuron-step, with n values per channel:

    dbias = sum(dcurrent)    dweight = sum(dcurrent*xhat)    xhat = (x - mean) / sqrt(var + eps)    dresidual = dcurrent
    dx    = (dcurrent - dbias/n - xhat*dweight/n) * scale    dbias and dweight summed over ranks here; without the two
                                                             means where mean and var are constants

So the current never lies in memory, nor, on Triton, does dcurrent. Bytes per neuron-step at T = 4, bf16 / fp32:

    forward     statistics: read x 2 / 4;  then read x, write spikes and bits 4.25 / 8.25;  residual: read 2 / 4
    backward    sums: read g, bits, x 4.25 / 8.25;  then read g, bits, x, write dx 6.25 / 12.25;  residual: write 2 / 4
    inference   read x, write spikes 4 / 8;  residual: read 2 / 4

Forward and backward 16.75 / 32.75 bytes, 20.75 / 40.75 with a residual. With the same current at every step (`T=`,
direct coding's stem) x is read, and dx written, once instead of T times.

`bn_lif_reference` is the specification. Given the same statistics the spikes equal its own bit for bit in fp32:
products and sums in one order, none contracted, and only exactly rounded roots and quotients (so no rsqrt).

Inside, every layout is one: contiguous (T, O, C, S), where channels-last memory is O = B*H*W, S = 1 and plain
contiguous memory O = B, S = H*W. Statistics pass as fp64 (count, mean, sum of squared deviations), combined by Chan's formula
over chunks, programs and ranks, always in the same order: no atomics, so a run repeats bit for bit.
"""

import torch

from kernels.lif import (backward_full_torch, backward_torch, check_neuron, choose_impl, forward_torch, lif_reference,
                         refuse_forward_mode, refuse_second_derivative, triton)

if triton is not None:
    import triton.language as tl

    from kernels.lif import backward_step, fire, pack


# ---------------------------------------------------------------------------------------------- the specification

def bn_lif_reference(x, weight, bias, residual=None, mean=None, var=None, eps=1e-5, decay=0.25, v_th=0.5, lens=0.5,
                     detach_reset=True):
    """The equations as they stand, in fp32 (fp64), differentiated by autograd, statistics too; x (T, B, C, H, W)."""
    acc = torch.promote_types(x.dtype, torch.float32)
    x_acc, per_channel = x.to(acc), (-1, 1, 1)
    if mean is None:
        var, mean = torch.var_mean(x_acc, (0, 1, 3, 4), correction=0)
    scale = weight.to(acc) / (var.to(acc) + eps).sqrt()
    shift = bias.to(acc) - mean.to(acc) * scale
    current = x_acc * scale.view(per_channel) + shift.view(per_channel)
    if residual is not None:
        current = current + residual.to(acc)
    spikes = lif_reference(current, decay, v_th, lens, detach_reset).to(x.dtype)
    return spikes, mean.detach(), var.detach(), x.numel() // x.shape[2]


# ---------------------------------------------------------------------------------------------- PyTorch path
# chunks of O keep temporaries in the cache. smaller ones lose to the cost of a call. per-channel vectors are (C, 1).

def _rows(x):
    """How many of x's (C, S) slices make a chunk of 2**18 elements a thread."""
    size = 2**18 * torch.get_num_threads() if x.device.type == "cpu" else x.numel()
    return max(1, size // max(1, x.shape[-2] * x.shape[-1]))


def _split(x):
    """(T, O, C, S) -> contiguous chunks (o, C, S): sums over them are several times quicker than over slices of O."""
    return x.flatten(0, 1).split(_rows(x))


def _affine(weight, bias, mean, var, eps):
    std = (var + eps).sqrt()
    scale = weight.to(mean.dtype) / std
    return [v.view(-1, 1) for v in (scale, bias.to(mean.dtype) - mean * scale, mean, 1 / std)]


def _stats_torch(x):
    """Count, mean and sum of squared deviations of each chunk, (P, 3, C) fp64; sums as in _stats_kernel."""
    parts, shift = [], None
    for part in _split(x):
        part = part.to(_accumulator(x))
        count = part.numel() // part.shape[1]
        shift = part.sum((0, 2)) / count if shift is None else shift
        d = part - shift.view(-1, 1)
        s1 = d.sum((0, 2)).double()
        m2 = d.square_().sum((0, 2)).double() - s1 * s1 / count
        parts.append(torch.stack((torch.full_like(s1, count), shift + s1 / count, m2.clamp_min(0))))
    return torch.stack(parts)


def _combine_torch(parts, n):
    """Chan's formula: (P, 3, C) of the parts -> (2, C), mean and biased variance of the whole, n values a channel."""
    count, mean, m2 = parts.unbind(1)
    whole = (count * mean).sum(0) / n
    return torch.stack((whole, (m2 + count * (mean - whole).square()).sum(0) / n))


def _currents(x, residual, T, scale, shift):
    """Chunks s of O, each with its input current (T, neurons)."""
    for o in range(0, x.shape[1], _rows(x)):
        s = slice(o, o + _rows(x))
        current = (x[:, s].to(scale.dtype) * scale).add_(shift)
        if residual is not None:
            current = current.add_(residual[:, s]) if len(x) == T else current + residual[:, s]
        yield s, current.expand(T, -1, -1, -1).flatten(1)


def _forward_torch(x, residual, spikes, bits, scale, shift, decay, v_th, lens):
    for s, current in _currents(x, residual, len(spikes), scale, shift):
        save = None if bits is None else bits[:, s].flatten(1)
        forward_torch(current, spikes[:, s].flatten(1), save, decay, v_th, lens)


def _dcurrent_torch(g, bits, x, residual, scale, shift, decay, v_th, lens):
    """Gradient of the input current, (T, O, C, S) in fp32 (fp64)."""
    dcurrent = torch.empty_like(g, dtype=scale.dtype)
    if bits is not None:
        backward_torch(g.flatten(1), bits.flatten(1), dcurrent.flatten(1), decay, lens)
    else:
        for s, current in _currents(x, residual, len(g), scale, shift):
            backward_full_torch(g[:, s].flatten(1), current, dcurrent[:, s].flatten(1), decay, v_th, lens)
    return dcurrent


def _sums_torch(d, x, mean, inv_std):
    """Sums of d and of d*xhat, (2, C) fp64."""
    sums = torch.zeros(2, x.shape[2], dtype=torch.float64, device=x.device)
    for d, part in zip(_split(d), _split(x)):
        sums[0] += d.sum((0, 2))
        sums[1] += (part.to(d.dtype) - mean).mul_(d).sum((0, 2))
    sums[1] *= inv_std.view(-1)
    return sums


def _apply_torch(d, x, means, scale, mean, inv_std):
    """dx from d, dcurrent (summed over T where x is the same at every step), and the two means, if they move with x."""
    dx = torch.empty_like(x)
    if means is not None:
        a, b = means.to(scale.dtype).unsqueeze(-1)
        a, b = -scale * a, -scale * inv_std * b
    for d, part, out in zip(_split(d), _split(x), _split(dx)):
        d = d * scale if means is None else torch.addcmul(a, d, scale).addcmul_(part.to(d.dtype) - mean, b)
        out.copy_(d)
    return dx


def _native_torch(d, x, scale, mean, inv_std):
    """dx and the sums at once, by nn.BatchNorm2d's own kernel: quicker on CPUs, which take images channels-last too."""
    C, S = x.shape[2:]
    images = (lambda y: y.view(-1, C).t()[None, :, :, None]) if S == 1 else (lambda y: y.flatten(0, 1).unsqueeze(-1))
    weight, mean, inv_std = (v.view(-1) for v in (scale / inv_std, mean, inv_std))
    dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        images(d), images(x), weight, None, None, mean, inv_std, True, 0.0, [True, True, True])
    return (dx[0, :, :, 0].t() if S == 1 else dx).reshape(x.shape), torch.stack((dbias, dweight)).double()


# ---------------------------------------------------------------------------------------------- Triton kernels
# a tile is BR rows (o, s) by BC channels, so that a channel's vectors are read once a program and its sums are sums
# over rows; 16-byte accesses run along c for S = 1, along s otherwise (BC = 1). T is unrolled, the rest are run-time
# values. a row number fits 32 bits, which makes its division by S cheap; offsets in memory have 64.

if triton is not None:

    @triton.jit
    def _tile(row, R, C, S, BR: tl.constexpr, BC: tl.constexpr):
        """Offsets and mask of the rows from `row` on, in this program's channels: (o, c, s) lies at (o*C + c)*S + s."""
        r = row + tl.arange(0, BR)[:, None]
        c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
        return ((r // S).to(tl.int64) * C + c) * S + r % S, (r < R) & (c < C)

    @triton.jit
    def _channels(Vector, C, other, BC: tl.constexpr):
        c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
        return tl.load(Vector + c, c < C, other).to(tl.float32)

    @triton.jit
    def _affine_kernel(Weight, Bias, Mean, Var, eps, C, BC: tl.constexpr):
        """scale, shift, mean and 1/std of this program's channels, by exactly rounded operations, as in PyTorch."""
        mean, std = _channels(Mean, C, 0.0, BC), tl.sqrt_rn(_channels(Var, C, 1.0, BC) + eps)
        scale = tl.div_rn(_channels(Weight, C, 0.0, BC), std)
        return scale, _channels(Bias, C, 0.0, BC) - mean * scale, mean, tl.div_rn(1.0, std)

    @triton.jit
    def _stats_kernel(X, Parts, R, C, S, BR: tl.constexpr, BC: tl.constexpr):
        """Parts[p] = count, mean and sum of squared deviations of every P-th tile. Reads x. R runs over T as well.

        The sums are of x - shift, shift the mean of the first tile: fp32 loses nothing to a large common mean.
        """
        first = tl.program_id(0) * BR
        offs, inside = _tile(first, R, C, S, BR, BC)
        shift = tl.sum(tl.load(X + offs, inside, 0).to(tl.float32), 0, keep_dims=True) / tl.minimum(R - first, BR)
        s1, s2 = tl.zeros([BR, BC], tl.float32), tl.zeros([BR, BC], tl.float32)
        count = 0
        for row in range(first, R, tl.num_programs(0) * BR):
            offs, inside = _tile(row, R, C, S, BR, BC)
            d = tl.where(inside, tl.load(X + offs, inside, 0).to(tl.float32) - shift, 0.0)
            s1, s2, count = s1 + d, s2 + d * d, count + tl.minimum(R - row, BR)
        total = tl.sum(s1, 0, keep_dims=True).to(tl.float64)
        m2 = tl.sum(s2, 0, keep_dims=True).to(tl.float64) - total * total / count
        c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
        Parts += tl.program_id(0).to(tl.int64) * 3 * C + c
        tl.store(Parts, tl.zeros([1, BC], tl.float64) + count, c < C)
        tl.store(Parts + C, shift.to(tl.float64) + total / count, c < C)
        tl.store(Parts + 2 * C, tl.maximum(m2, 0.0), c < C)

    @triton.jit
    def _combine_kernel(Parts, Stats, P, n, C, BP: tl.constexpr, BC: tl.constexpr):
        """Chan's formula in fp64: Parts (P, 3, C) -> Stats (2, C), mean and biased variance."""
        c = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
        total = tl.zeros([BP, BC], tl.float64)
        for first in range(0, P, BP):
            p = first + tl.arange(0, BP)[:, None]
            part = Parts + p * 3 * C + c
            inside = (p < P) & (c < C)
            total += tl.load(part, inside, 0.0) * tl.load(part + C, inside, 0.0)
        mean = tl.sum(total, 0, keep_dims=True) / n
        total = tl.zeros([BP, BC], tl.float64)
        for first in range(0, P, BP):
            p = first + tl.arange(0, BP)[:, None]
            part = Parts + p * 3 * C + c
            inside = (p < P) & (c < C)
            d = tl.load(part + C, inside, 0.0) - mean
            total += tl.load(part + 2 * C, inside, 0.0) + tl.load(part, inside, 0.0) * d * d
        tl.store(Stats + c, mean, c < C)
        tl.store(Stats + C + c, tl.sum(total, 0, keep_dims=True) / n, c < C)

    @triton.jit
    def _forward_kernel(X, Residual, F, Bits, Weight, Bias, Mean, Var, eps, R, C, S, N: tl.int64, decay, v_th, lens,
                        T: tl.constexpr, STATIC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
        """Reads x and the residual, writes spikes and, unless Bits is None, two bits per neuron-step."""
        offs, inside = _tile(tl.program_id(0) * BR, R, C, S, BR, BC)
        scale, shift, _, _ = _affine_kernel(Weight, Bias, Mean, Var, eps, C, BC)
        leak = tl.zeros([BR, BC], tl.float32)
        code = tl.zeros([BR, BC], tl.int32)
        for t in tl.static_range(T):
            if t == 0 or not STATIC:
                bn = tl.load(X + t * N + offs, inside, 0).to(tl.float32) * scale + shift
            current = bn
            if Residual is not None:
                current += tl.load(Residual + t * N + offs, inside, 0).to(tl.float32)
            u, fired, window = fire(leak, current, v_th, lens)
            tl.store(F + t * N + offs, tl.where(fired, 1.0, 0.0), inside)
            leak = u * tl.where(fired, 0.0, decay)
            if Bits is not None:
                code = pack(code, fired, window, t)
                if t % 4 == 3 or t == T - 1:
                    tl.store(Bits + t // 4 * N + offs, code, inside)
                    code = tl.zeros([BR, BC], tl.int32)

    @triton.jit
    def _potentials(X, Residual, offs, inside, scale, shift, N, decay, v_th, T: tl.constexpr, STATIC: tl.constexpr,
                    BR: tl.constexpr, BC: tl.constexpr):
        """U of all steps, recomputed into registers: a tuple."""
        leak = tl.zeros([BR, BC], tl.float32)
        us = ()
        for t in tl.static_range(T):
            if t == 0 or not STATIC:
                bn = tl.load(X + t * N + offs, inside, 0).to(tl.float32) * scale + shift
            current = bn
            if Residual is not None:
                current += tl.load(Residual + t * N + offs, inside, 0).to(tl.float32)
            u, fired, _ = fire(leak, current, v_th, 0.0)
            leak = u * tl.where(fired, 0.0, decay)
            us = us + (u,)
        return us

    @triton.jit
    def _backward_kernel(G, Bits, X, Residual, Means, Parts, DX, DResidual, Weight, Bias, Mean, Var, eps, R, C, S,
                         N: tl.int64, decay, v_th, lens, inv, T: tl.constexpr, STATIC: tl.constexpr,
                         BR: tl.constexpr, BC: tl.constexpr):
        """dcurrent from g and two bits (Bits None: from U, recomputed), over every P-th tile.

        With Parts the first pass: reads x, Parts[p] = sums of dcurrent and dcurrent*xhat. With DX or DResidual the
        second: reads x unless Means, the two sums over n, is None; writes the gradients of x and of the residual.
        """
        scale, shift, mean, inv_std = _affine_kernel(Weight, Bias, Mean, Var, eps, C, BC)
        if Means is not None:
            mean_d, mean_dxhat = _channels(Means, C, 0.0, BC), _channels(Means + C, C, 0.0, BC)
        s1, s2 = tl.zeros([BR, BC], tl.float32), tl.zeros([BR, BC], tl.float32)
        for row in range(tl.program_id(0) * BR, R, tl.num_programs(0) * BR):
            offs, inside = _tile(row, R, C, S, BR, BC)
            du, sum_t = tl.zeros([BR, BC], tl.float32), tl.zeros([BR, BC], tl.float32)
            code = tl.zeros([BR, BC], tl.int32)
            if Bits is None:
                us = _potentials(X, Residual, offs, inside, scale, shift, N, decay, v_th, T, STATIC, BR, BC)
            for t in tl.static_range(T - 1, -1, -1):
                g = tl.load(G + t * N + offs, inside, 0).to(tl.float32)
                if Bits is None:
                    u = us[t]
                    if t < T - 1:
                        g = g - du * (u * decay)
                    du = g * tl.where(tl.abs(u - v_th) < lens, inv, 0.0) + du * tl.where(u > v_th, 0.0, decay)
                else:
                    if t % 4 == 3 or t == T - 1:
                        code = tl.load(Bits + t // 4 * N + offs, inside, 0).to(tl.int32)
                    du = backward_step(g, du, code, t, decay, inv)
                if DResidual is not None:
                    tl.store(DResidual + t * N + offs, du, inside)
                d = du
                if STATIC:
                    sum_t += du
                    d = sum_t
                if not STATIC or t == 0:
                    if Parts is not None or Means is not None:
                        centred = tl.load(X + t * N + offs, inside, 0).to(tl.float32) - mean
                    if Parts is not None:
                        s1 += d
                        s2 += d * centred
                    if DX is not None:
                        if Means is not None:
                            d = d - mean_d - centred * inv_std * mean_dxhat
                        tl.store(DX + t * N + offs, d * scale, inside)
        if Parts is not None:
            c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
            Parts += tl.program_id(0).to(tl.int64) * 2 * C + c
            tl.store(Parts, tl.sum(s1, 0, keep_dims=True), c < C)
            tl.store(Parts + C, tl.sum(s2, 0, keep_dims=True) * inv_std, c < C)


REDUCING = 1024  # programs of a reduction: a fixed number, so that sums don't depend on the device


def _grid(x, planes, tile, programs=None):
    """The grid over `planes` planes of x in tiles of BR rows by BC channels, and what all kernels over tiles take."""
    _, O, C, S = x.shape
    R = planes * O * S
    if R >= 2**30:
        raise ValueError(f"impl='triton' takes fewer than 2**30 values a channel, not {R}")
    BC = 1 if S > 1 else min(64, triton.next_power_of_2(C))
    BR, across = tile // BC, triton.cdiv(C, BC)
    P = triton.cdiv(R, BR)
    P = P if programs is None else min(P, max(1, programs // across))
    return (P, across), dict(R=R, C=C, S=S, BR=BR, BC=BC, num_warps=4, enable_fp_fusion=False)


def _stats_triton(x, n):
    grid, args = _grid(x, len(x), 2048, REDUCING)
    parts = x.new_empty(grid[0], 3, args["C"], dtype=torch.float64)
    stats = x.new_empty(2, args["C"], dtype=torch.float64)
    with torch.cuda.device_of(x):
        _stats_kernel[grid](x, parts, **args)
        _combine_kernel[(triton.cdiv(args["C"], 8),)](parts, stats, len(parts), n, args["C"], BP=128, BC=8)
    return stats


def _forward_triton(x, residual, spikes, bits, vectors, eps, decay, v_th, lens):
    grid, args = _grid(x, 1, 1024)
    with torch.cuda.device_of(x):
        _forward_kernel[grid](x, residual, spikes, bits, *vectors, eps, N=x[0].numel(), decay=decay, v_th=v_th,
                              lens=lens, T=len(spikes), STATIC=len(x) < len(spikes), **args)


def _backward_triton(g, bits, x, residual, means, dx, dresidual, vectors, eps, decay, v_th, lens):
    """Writes dx and dresidual; where both are None, returns the sums instead: (2, C) fp64."""
    reduce = dx is None and dresidual is None
    if not x.numel():
        return x.new_zeros(2, x.shape[2], dtype=torch.float64) if reduce else None
    # U of all steps takes registers: fewer neurons a thread
    tile = 1024 if bits is not None else min(1024, 4096 // triton.next_power_of_2(len(g)))
    grid, args = _grid(x, 1, tile, REDUCING if reduce else None)
    parts = x.new_empty(grid[0], 2, args["C"], dtype=torch.float32) if reduce else None
    with torch.cuda.device_of(x):
        _backward_kernel[grid](g, bits, x, residual, means, parts, dx, dresidual, *vectors, eps, N=x[0].numel(),
                               decay=decay, v_th=v_th, lens=lens, inv=1 / (2 * lens), T=len(g),
                               STATIC=len(x) < len(g), **args)
    return parts.sum(0, dtype=torch.float64) if reduce else None


# ---------------------------------------------------------------------------------------------- operators
# functional, over contiguous (T, O, C, S); x (1, O, C, S) with T > 1 is the same current at every step. each way is one
# operator, bn_lif_train and bn_lif_backward: a call costs as much as a small layer. under a process group the sums must
# leave for the other ranks, where torch.compile sees it: bn_lif_stats and bn_lif_reduce are the first halves alone.
# constants are eps, decay, v_th, lens.

Tensor, Maybe = torch.Tensor, torch.Tensor | None


def _accumulator(x):
    return torch.promote_types(x.dtype, torch.float32)


def _statistics(x, impl):
    n = x.numel() // x.shape[2]
    return _combine_torch(_stats_torch(x), n) if impl == "torch" else _stats_triton(x, n)


def _forward(x, residual, bits, weight, bias, stats, T, constants, impl):
    """Spikes, and the statistics, or nothing if they were given."""
    spikes, own = x.new_empty(T, *x.shape[1:]), x.new_empty(0, dtype=_accumulator(x))
    if stats is None:
        stats = own = _statistics(x, impl).to(own.dtype)
    vectors = weight, bias, *stats
    if impl == "torch":
        scale, shift, _, _ = _affine(*vectors, constants[0])
        _forward_torch(x, residual, spikes, bits, scale, shift, *constants[1:])
    elif x.numel():
        _forward_triton(x, residual, spikes, bits, vectors, *constants)
    return spikes, own


@torch.library.custom_op("idsnn::bn_lif_stats", mutates_args=())
def _stats(x: Tensor, impl: str) -> Tensor:
    """(2, C) fp64: mean and biased variance of this process's x."""
    return _statistics(x, impl)


@torch.library.custom_op("idsnn::bn_lif_infer", mutates_args=())
def _infer(x: Tensor, residual: Maybe, weight: Tensor, bias: Tensor, stats: Maybe, T: int, constants: list[float],
           impl: str) -> tuple[Tensor, Tensor]:
    """Spikes, and the statistics (2, C), empty if given."""
    return _forward(x, residual, None, weight, bias, stats, T, constants, impl)


@torch.library.custom_op("idsnn::bn_lif_train", mutates_args=())
def _train(x: Tensor, residual: Maybe, weight: Tensor, bias: Tensor, stats: Maybe, T: int, constants: list[float],
           detach_reset: bool, n: int, group: str, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Bits too, empty if the reset is not detached. n and group are for the backward; n = 0: constant statistics."""
    bits = x.new_empty((T + 3) // 4 if detach_reset else 0, *x.shape[1:], dtype=torch.uint8)
    spikes, own = _forward(x, residual, bits if detach_reset else None, weight, bias, stats, T, constants, impl)
    return spikes, bits, own


@torch.library.custom_op("idsnn::bn_lif_reduce", mutates_args=())
def _reduce(g: Tensor, bits: Tensor, x: Tensor, residual: Maybe, weight: Tensor, bias: Tensor, stats: Tensor,
            constants: list[float], impl: str) -> Tensor:
    """(2, C) fp64: this process's sums of dcurrent and of dcurrent*xhat."""
    return _backward(g, bits, x, residual, weight, bias, stats, None, constants, 0, False, False, True, impl)[2]


@torch.library.custom_op("idsnn::bn_lif_backward", mutates_args=())
def _backward(g: Tensor, bits: Tensor, x: Tensor, residual: Maybe, weight: Tensor, bias: Tensor, stats: Tensor,
              sums: Maybe, constants: list[float], n: int, need_dx: bool, need_dresidual: bool, need_sums: bool,
              impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of the residual, and this process's sums; each empty if not needed. `sums` of all ranks, if
    there are others, make dx; without them its own do."""
    vectors, bits, dx, dresidual, own = (weight, bias, *stats), bits if len(bits) else None, None, None, None
    if impl == "torch":
        scale, shift, mean, inv_std = _affine(*vectors, constants[0])
        dcurrent = _dcurrent_torch(g, bits, x, residual, scale, shift, *constants[1:])
        d = dcurrent.sum(0, keepdim=True) if len(x) < len(g) else dcurrent
        dresidual = dcurrent.to(g.dtype) if need_dresidual else None
        if n and need_dx and sums is None and x.device.type == "cpu" and x.dtype == d.dtype:
            dx, own = _native_torch(d, x, scale, mean, inv_std)
        else:
            own = _sums_torch(d, x, mean, inv_std) if need_sums else None
            means = (own if sums is None else sums) / n if n and need_dx else None
            dx = _apply_torch(d, x, means, scale, mean, inv_std) if need_dx else None
    else:
        args = vectors, *constants
        own = _backward_triton(g, bits, x, residual, None, None, None, *args) if need_sums else None
        means = (own if sums is None else sums) / n if n and need_dx else None
        if need_dx or need_dresidual:
            dx, dresidual = torch.empty_like(x) if need_dx else None, torch.empty_like(g) if need_dresidual else None
            _backward_triton(g, bits, x, residual, means, dx, dresidual, *args)
    return tuple(x.new_empty(0) if y is None else y for y in (dx, dresidual, own))


@_stats.register_fake
def _(x, impl):
    return x.new_empty(2, x.shape[2], dtype=torch.float64)


@_infer.register_fake
def _(x, residual, weight, bias, stats, T, constants, impl):
    own = x.new_empty((2, x.shape[2]) if stats is None else 0, dtype=_accumulator(x))
    return x.new_empty(T, *x.shape[1:]), own


@_train.register_fake
def _(x, residual, weight, bias, stats, T, constants, detach_reset, n, group, impl):
    own = x.new_empty((2, x.shape[2]) if stats is None else 0, dtype=_accumulator(x))
    bits = x.new_empty((T + 3) // 4 if detach_reset else 0, *x.shape[1:], dtype=torch.uint8)
    return x.new_empty(T, *x.shape[1:]), bits, own


@_reduce.register_fake
def _(g, bits, x, residual, weight, bias, stats, constants, impl):
    return x.new_empty(2, x.shape[2], dtype=torch.float64)


@_backward.register_fake
def _(g, bits, x, residual, weight, bias, stats, sums, constants, n, need_dx, need_dresidual, need_sums, impl):
    dx, dresidual = (torch.empty_like(y) if need else x.new_empty(0) for y, need in ((x, need_dx), (g, need_dresidual)))
    return dx, dresidual, x.new_empty(2, x.shape[2], dtype=torch.float64) if need_sums else x.new_empty(0)


def _all_reduce(sums, group):
    """Sum over the ranks of the process group of this name: a functional collective, which torch.compile can trace."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(sums, "sum", group))


def _all_gather(part, ranks, group):
    """(...) -> (ranks, ...)"""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(part, ranks, group)).view(ranks, *part.shape)


def _setup(ctx, inputs, output):
    x, residual, weight, bias, stats, _, ctx.constants, detach_reset, ctx.n, ctx.group, ctx.impl = inputs
    _, bits, own = output
    ctx.save_for_backward(bits, x, None if detach_reset else residual, weight, bias, own if stats is None else stats)
    ctx.set_materialize_grads(False)


def _autograd(ctx, g, *_):
    if torch.is_grad_enabled():  # true in a backward only with create_graph=True
        refuse_second_derivative("bn_lif")
    grads = [None] * 11
    if g is None:
        return tuple(grads)
    need_dx, need_dresidual, need_dweight, need_dbias = ctx.needs_input_grad[:4]
    need_sums = need_dweight or need_dbias or bool(ctx.n) and need_dx
    (bits, *saved), g, total = ctx.saved_tensors, g.contiguous(), None
    if ctx.group and need_sums:
        sums = _reduce(g, bits, *saved, ctx.constants, ctx.impl)
        need_sums, total = False, _all_reduce(sums, ctx.group)
    dx, dresidual, own = _backward(g, bits, *saved, total, ctx.constants, ctx.n, need_dx, need_dresidual, need_sums,
                                   ctx.impl)
    sums = own if total is None else sums  # the parameters' gradients are this process's share, as in DDP
    grads[0], grads[1] = dx if need_dx else None, dresidual if need_dresidual else None
    grads[2] = sums[1].to(ctx.saved_tensors[3].dtype) if need_dweight else None
    grads[3] = sums[0].to(ctx.saved_tensors[4].dtype) if need_dbias else None
    return tuple(grads)


def _traced_without_gradient(ctx, *_):
    raise RuntimeError("bn_lif was traced without a gradient and saved nothing for one: trace it with an x that requires a "
                       "gradient, or use batch norm and lif")


_train.register_autograd(_autograd, setup_context=_setup)
_infer.register_autograd(_traced_without_gradient)

for _op in (_stats, _infer, _train, _reduce, _backward):
    refuse_forward_mode(_op)


# ---------------------------------------------------------------------------------------------- what users call

def _order(x, channels_last):
    """(T, B, C, H, W) -> contiguous (T, O, C, S); a view if the memory already lies so."""
    T, B, C, H, W = x.shape
    if channels_last:
        return x.permute(0, 1, 3, 4, 2).reshape(T, B * H * W, C, 1).contiguous()
    return x.reshape(T, B, C, H * W).contiguous()


def bn_lif(x, weight, bias, residual=None, mean=None, var=None, *, T=None, eps=1e-5, decay=0.25, v_th=0.5, lens=0.5,
           detach_reset=True, group=None, impl=None):
    """Spikes of LIF neurons behind a batch norm and an optional residual add; every call starts from U = 0.

    x             (T, B, C, H, W), a convolution's output; or, with T given, (B, C, H, W), the same at each of T steps
                  (an expanded T means the same). float32, bfloat16, float16 or float64; the arithmetic is fp32 (fp64)
    weight, bias  (C,), as a rule float32 whatever x is
    residual      (T, B, C, H, W), added to the normed x; copied if its memory layout or dtype isn't x's
    mean, var     (C,) constants, as in evaluation. None: the statistics of x, over T, B, H, W, and over all ranks of
                  `group`, a process group in which every rank holds an x of one shape
    eps           added to var
    decay, v_th, lens, detach_reset, impl   as in `lif`

    Returns (spikes, mean, var, n): spikes (T, B, C, H, W), 0 or 1, in x's dtype and layout; mean and biased var, fp32
    (fp64), detached (or as given); n, how many values of x a channel has, over all ranks of `group` with its
    statistics. Running statistics take var * n/(n-1).

    Not copied: x as (T*B, C, H, W) channels-last unflattened to (T, B), or plain contiguous. Any other x is, into
    channels-last if its channels lie closest. For the backward are kept: x, mean, var, two bits per neuron-step; with
    detach_reset=False instead of the bits the residual. Without a gradient, nothing. Second derivatives are refused
    with a RuntimeError. Raises TypeError for a wrong dtype, ValueError for anything else that doesn't fit.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, not {x.dtype}")
    if x.dim() == 4 and T is not None:
        x = x.unsqueeze(0)
    elif x.dim() != 5 or T not in (None, x.shape[0]):
        raise ValueError(f"x must be (T, B, C, H, W), or (B, C, H, W) with T given, not {tuple(x.shape)} with T = {T}")
    else:
        T = x.shape[0]
        x = x[:1] if x.stride(0) == 0 else x
    shape, C = (T, *x.shape[1:]), x.shape[2]
    if T < 1:
        raise ValueError(f"T must be at least 1, not {T}")
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual must be {shape}, not {tuple(residual.shape)}")
    if (mean is None) != (var is None):
        raise ValueError("mean and var must be given together, or neither")
    for name, vector in (("weight", weight), ("bias", bias), ("mean", mean), ("var", var)):
        if vector is not None and vector.shape != (C,):
            raise ValueError(f"{name} must be ({C},), one value a channel, not {tuple(vector.shape)}")
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError("bn_lif does not go through torch.func (vmap, grad, vjp, jvp): batch norm and lif do")
    constants = [float(eps), *check_neuron(decay, v_th, lens)]
    impl = choose_impl(x, T, impl)

    channels_last = x.stride(2) == 1 and not x.is_contiguous()
    x = _order(x, channels_last)
    if residual is not None:
        residual = _order(residual.to(x.dtype), channels_last)
    local, n, ranks, stats = x.numel() // max(C, 1), 0, "", None
    if mean is not None:
        stats = torch.stack((mean.detach(), var.detach())).to(_accumulator(x))
    else:
        n = local * (1 if group is None else group.size())
        if n < 2:
            raise ValueError(f"batch statistics need more than one value a channel, x has {n}")
        if group is not None:
            ranks = group.group_name
            own = _all_gather(_stats(x.detach(), impl), group.size(), ranks)  # (ranks, 2, C)
            parts = torch.stack((torch.full_like(own[:, 0], local), own[:, 0], own[:, 1] * local), 1)
            stats = _combine_torch(parts, n).to(_accumulator(x))
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, residual, weight, bias)):
        spikes, _, own = _train(x, residual, weight, bias, stats, T, constants, detach_reset, n, ranks, impl)
    else:
        spikes, own = _infer(x, residual, weight, bias, stats, T, constants, impl)
    if mean is None:
        mean, var = (own if stats is None else stats).detach().unbind()
    if channels_last:
        spikes = spikes.view(T, shape[1], *shape[3:], C).permute(0, 1, 4, 2, 3)
    return spikes.view(shape), mean, var, n or local
