"""Batch norm, residual add and the LIF neuron, on Triton in one pass over memory.

    current[t] = x[t]*scale + shift + residual[t]      scale = weight / sqrt(var + eps)
    spikes     = LIF(current)   (paper eq. 2-4)        shift = bias - mean*scale

mean and (biased) var are taken over T, B, H, W and over all ranks of a process group, or are given
(evaluation). Backward, from dcurrent, which the neuron's recurrence gives from two bits per
neuron-step (lif.py), with n values per channel and xhat = (x - mean) / sqrt(var + eps):

    dbias = sum(dcurrent)    dweight = sum(dcurrent*xhat)    dresidual = dcurrent
    dx    = (dcurrent - dbias/n - xhat*dweight/n) * scale    sums over all ranks here; without the
                                                             means where mean and var are constants

Neither the current nor dcurrent ever lies in memory. Bytes per neuron-step at T = 4, bf16 / fp32:

    forward    statistics: read x 2 / 4; then read x, write spikes and bits 4.25 / 8.25
    backward   sums: read g, bits, x 4.25 / 8.25; then read g, bits, x, write dx 6.25 / 12.25
    inference  read x, write spikes 4 / 8
    residual   read 2 / 4 forward, write 2 / 4 backward

Forward and backward 16.75 / 32.75 bytes, 20.75 / 40.75 with a residual. With the same current at
every step (`T=`, direct coding's stem) x is read, and dx written, once instead of T times.

`bn_lif_reference` is the specification. Given the same statistics the kernels' spikes equal its
own bit for bit in fp32: products and sums in one order, none contracted, roots and quotients
exactly rounded. On PyTorch, and for the plain derivative, bn_lif is batch norm, the add, `lif`.
"""

import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from kernels.lif import check, lif, lif_reference, no_second_derivative, refuse_forward_mode, triton

if triton is not None:
    import triton.language as tl

    from kernels.lif import backward_step, fire, load_steps, pack, reset

Tensor, Maybe = torch.Tensor, torch.Tensor | None


def _accumulator(x):
    return torch.promote_types(x.dtype, torch.float32)


# ---------------------------------------------------------------------------- the specification

def bn_lif_reference(x, weight, bias, residual=None, mean=None, var=None, eps=1e-5, decay=0.25,
                     v_th=0.5, lens=0.5, detach_reset=True):
    """The equations as they stand, in fp32 (fp64), differentiated by autograd, statistics too.

    x (T, B, C, H, W) -> spikes of x's shape and dtype. mean, var (C,): of x if None.
    """
    acc, per_channel = _accumulator(x), (-1, 1, 1)
    x_acc = x.to(acc)
    if mean is None:
        var, mean = torch.var_mean(x_acc, (0, 1, 3, 4), correction=0)
    scale = weight.to(acc) / (var.to(acc) + eps).sqrt()
    shift = bias.to(acc) - mean.to(acc) * scale
    current = x_acc * scale.view(per_channel) + shift.view(per_channel)
    if residual is not None:
        current = current + residual.to(acc)
    return lif_reference(current, decay, v_th, lens, detach_reset).to(x.dtype)


# ---------------------------------------------------------------------------- batch norm, PyTorch
# functional collectives, which torch.compile can trace.

def _all_reduce(x, group):
    """Sum over the ranks of the process group of this name."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group))


class _AllReduce(torch.autograd.Function):
    """Sum over the ranks, forward and backward."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx, g):
        return _AllReduce.apply(g, ctx.group), None


def batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, group=None):
    """F.batch_norm of x (N, C, H, W) whose batch statistics are over all ranks of `group`.

    Every rank holds an x of the same shape. The result has x's dtype.
    """
    if group is None or not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    per_channel, ranks, name = (-1, 1, 1), group.size(), group.group_name
    x_acc = x.to(_accumulator(x))
    mean = _AllReduce.apply(x_acc.mean((0, 2, 3)), name) / ranks
    centred = x_acc - mean.view(per_channel)
    var = _AllReduce.apply(centred.square().mean((0, 2, 3)), name) / ranks
    if running_mean is not None:
        n = ranks * x.numel() // x.shape[1]
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (n / (n - 1))).to(running_var.dtype), momentum)
    y = centred * (var + eps).rsqrt().view(per_channel)
    if weight is not None:
        y = y * weight.view(per_channel) + bias.view(per_channel)
    return y.to(x.dtype)


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose batch statistics are over all processes of torch.distributed, forward
    and backward, on CPUs and GPUs (nn.SyncBatchNorm refuses CPU tensors)."""

    def forward(self, x):
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        if alone or not self.training:
            return super().forward(x)
        momentum = self.momentum
        if self.track_running_stats:
            self.num_batches_tracked += 1
            if momentum is None:  # a plain average over all batches, as in nn.BatchNorm2d
                momentum = 1 / float(self.num_batches_tracked)
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True,
                          momentum, self.eps, dist.group.WORLD)


# ---------------------------------------------------------------------------- Triton kernels
# to the kernels a time-step is (O, C, S) with C channels: O = B*H*W, S = 1 in channels-last
# memory, O = B, S = H*W in contiguous memory. a tile is BR rows (o, s) by BC channels, so that a
# channel's vectors are read once a program and its sums are sums over rows; 16-byte accesses run
# along c for S = 1, along s otherwise (BC = 1). T is unrolled, the rest are run-time values. a row
# number fits 32 bits, which makes its division by S cheap; offsets in memory have 64.
#
# fold: channels-last memory (O, C) is also (O/k, k*C), where channel c stands k times. With
# k*C a multiple of 64, tiles are full and accesses 16 bytes wide for every C; per-channel vectors
# are written `fold` times side by side, partial sums of the k copies are just more parts.

TILE = 1024  # neurons of a program: 8 for each of 128 threads, 16 bytes in bf16
# programs of a reduction: 4 on each of an H100's 132 multiprocessors run at once, one whole wave,
# with all the registers they need (128 a thread). a fixed number, so that sums don't depend on the
# device.
REDUCING = 4 * 132
PARTS, CHANNELS = 512, 8  # tile of the kernels that combine the parts of a reduction

if triton is not None:
    # rows of `vectors` (5, fold*C), fp32: what is the same for all of a channel
    MEAN, VAR, INV_STD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
    SCALE, SHIFT = tl.constexpr(3), tl.constexpr(4)

    @triton.jit
    def _tile(row, R, C, S, BR: tl.constexpr, BC: tl.constexpr):
        """Offsets and mask of the rows from `row` on, in this program's channels.

        (o, c, s) lies at (o*C + c)*S + s.
        """
        r = row + tl.arange(0, BR)[:, None]
        c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
        return ((r // S).to(tl.int64) * C + c) * S + r % S, (r < R) & (c < C)

    @triton.jit
    def _channels(Vectors, row, W, BC: tl.constexpr):
        """A row of (rows, W) vectors, for this program's channels."""
        c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
        return tl.load(Vectors + row * W + c, c < W, 0.0)

    @triton.jit
    def _store_part(Parts, row, value, C, BC: tl.constexpr):
        """Parts (rows, programs, C)."""
        c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
        part = (row * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * C + c
        tl.store(Parts + part, value, c < C)

    @triton.jit
    def _statistics_kernel(X, Parts, R, C, S, N: tl.int64, T: tl.constexpr, BR: tl.constexpr,
                           BC: tl.constexpr):
        """Parts (4, P, C) of every P-th tile: count, shift, sum(x - shift), sum((x - shift)**2).

        Reads x. shift is the mean of the first tile: fp32 loses nothing to a large common mean.
        """
        first = tl.program_id(0) * BR
        offsets, inside = _tile(first, R, C, S, BR, BC)
        x = tl.load(X + offsets, inside, 0).to(tl.float32)
        shift = tl.sum(x, 0, keep_dims=True) / tl.minimum(R - first, BR)
        s1, s2 = tl.zeros([BR, BC], tl.float32), tl.zeros([BR, BC], tl.float32)
        rows = 0
        for row in range(first, R, tl.num_programs(0) * BR):
            offsets, inside = _tile(row, R, C, S, BR, BC)
            xs = load_steps(X, N, offsets, inside, T)
            for t in tl.static_range(T):
                d = tl.where(inside, xs[t].to(tl.float32) - shift, 0.0)
                s1 += d
                s2 += d * d
            rows += tl.minimum(R - row, BR)
        _store_part(Parts, 0, tl.zeros([1, BC], tl.float32) + rows * T, C, BC)
        _store_part(Parts, 1, shift, C, BC)
        _store_part(Parts, 2, tl.sum(s1, 0, keep_dims=True), C, BC)
        _store_part(Parts, 3, tl.sum(s2, 0, keep_dims=True), C, BC)

    @triton.jit
    def _part(Parts, row, p, P, c, C):
        """A tile of Parts (rows, P, C), in fp64."""
        inside = (p < P) & (c < C)
        return tl.load(Parts + (row * P + p).to(tl.int64) * C + c, inside, 0.0).to(tl.float64)

    @triton.jit
    def _combine_kernel(Parts, Weight, Bias, RunningMean, RunningVar, Whole, Vectors, P, C, fold,
                        momentum, eps, BP: tl.constexpr, BC: tl.constexpr):
        """Parts (4, P, C) -> Whole, one such part, or Vectors (5, fold*C) and running statistics.

        In fp64, by sum((x-m)**2) = sum((x-s)**2) + (s-m) * (2*sum(x-s) + count*(s-m)). Parts None:
        the running statistics are the statistics.
        """
        c = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
        if Parts is None:
            mean, var = tl.load(RunningMean + c, c < C, 0.0), tl.load(RunningVar + c, c < C, 1.0)
        else:
            count, total = tl.zeros([BP, BC], tl.float64), tl.zeros([BP, BC], tl.float64)
            for first in range(0, P, BP):
                p = first + tl.arange(0, BP)[:, None]
                n = _part(Parts, 0, p, P, c, C)
                count += n
                total += n * _part(Parts, 1, p, P, c, C) + _part(Parts, 2, p, P, c, C)
            n = tl.maximum(tl.sum(count, 0, keep_dims=True), 1.0)  # 0 where c >= C
            mean = tl.sum(total, 0, keep_dims=True) / n
            total = tl.zeros([BP, BC], tl.float64)
            for first in range(0, P, BP):
                p = first + tl.arange(0, BP)[:, None]
                d = _part(Parts, 1, p, P, c, C) - mean
                cross = 2 * _part(Parts, 2, p, P, c, C) + _part(Parts, 0, p, P, c, C) * d
                total += _part(Parts, 3, p, P, c, C) + d * cross
            m2 = tl.maximum(tl.sum(total, 0, keep_dims=True), 0.0)
            var, unbiased = m2 / n, m2 / tl.maximum(n - 1, 1.0)
            if Whole is not None:
                tl.store(Whole + c, n, c < C)
                tl.store(Whole + C + c, mean, c < C)
                tl.store(Whole + 2 * C + c, tl.zeros([1, BC], tl.float64), c < C)
                tl.store(Whole + 3 * C + c, m2, c < C)
        if Vectors is not None:
            weight = tl.load(Weight + c, c < C, 0.0).to(tl.float32)
            bias = tl.load(Bias + c, c < C, 0.0).to(tl.float32)
            if Parts is not None and RunningMean is not None:
                old_mean = tl.load(RunningMean + c, c < C, 0.0) * (1 - momentum)
                old_var = tl.load(RunningVar + c, c < C, 0.0) * (1 - momentum)
                tl.store(RunningMean + c, old_mean + mean * momentum, c < C)
                tl.store(RunningVar + c, old_var + unbiased * momentum, c < C)
            mean, var = mean.to(tl.float32), var.to(tl.float32)
            std = tl.sqrt_rn(var + eps)  # roots and quotients exactly rounded, as in PyTorch
            scale = tl.div_rn(weight, std)
            shift = bias - mean * scale
            inv_std = tl.div_rn(1.0, std)
            for i in range(fold):
                at = Vectors + i * C + c
                tl.store(at + MEAN * fold * C, mean, c < C)
                tl.store(at + VAR * fold * C, var, c < C)
                tl.store(at + INV_STD * fold * C, inv_std, c < C)
                tl.store(at + SCALE * fold * C, scale, c < C)
                tl.store(at + SHIFT * fold * C, shift, c < C)

    @triton.jit
    def _forward_kernel(X, Residual, Spikes, Bits, Vectors, W, decay, v_th, lens, R, C, S,
                        N: tl.int64, T: tl.constexpr, STATIC: tl.constexpr, BR: tl.constexpr,
                        BC: tl.constexpr):
        """Reads x and the residual, writes spikes and, unless Bits is None, two bits."""
        offsets, inside = _tile(tl.program_id(0) * BR, R, C, S, BR, BC)
        xs = load_steps(X, N, offsets, inside, 1 if STATIC else T)
        if Residual is not None:
            residuals = load_steps(Residual, N, offsets, inside, T)
        scale, shift = _channels(Vectors, SCALE, W, BC), _channels(Vectors, SHIFT, W, BC)
        leak = tl.zeros([BR, BC], tl.float32)
        code = tl.zeros([BR, BC], tl.int32)
        for t in tl.static_range(T):
            current = xs[0 if STATIC else t].to(tl.float32) * scale + shift
            if Residual is not None:
                current += residuals[t].to(tl.float32)
            u, fired, window = fire(leak, current, v_th, lens)
            tl.store(Spikes + t * N + offsets, tl.where(fired, 1.0, 0.0), inside)
            leak = reset(u, fired, decay)
            if Bits is not None:
                code = pack(code, fired, window, t)
                if t % 4 == 3 or t == T - 1:
                    tl.store(Bits + t // 4 * N + offsets, code, inside)
                    code = tl.zeros([BR, BC], tl.int32)

    @triton.jit
    def _reduce_kernel(G, Bits, X, Vectors, W, Parts, decay, inv, R, C, S, N: tl.int64,
                       T: tl.constexpr, STATIC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
        """Parts (2, P, C) of every P-th tile: sums of dcurrent and dcurrent*xhat.

        Reads g, bits and x.
        """
        mean = _channels(Vectors, MEAN, W, BC)
        s1, s2 = tl.zeros([BR, BC], tl.float32), tl.zeros([BR, BC], tl.float32)
        for row in range(tl.program_id(0) * BR, R, tl.num_programs(0) * BR):
            offsets, inside = _tile(row, R, C, S, BR, BC)
            gs = load_steps(G, N, offsets, inside, T)
            codes = load_steps(Bits, N, offsets, inside, (T + 3) // 4)
            xs = load_steps(X, N, offsets, inside, 1 if STATIC else T)
            du, total = tl.zeros([BR, BC], tl.float32), tl.zeros([BR, BC], tl.float32)
            for t in tl.static_range(T - 1, -1, -1):
                du = backward_step(gs[t].to(tl.float32), du, codes[t // 4], t, decay, inv)
                total += du
                if not STATIC:
                    s2 += du * (xs[t].to(tl.float32) - mean)
            if STATIC:
                s2 += total * (xs[0].to(tl.float32) - mean)
            s1 += total
        inv_std = _channels(Vectors, INV_STD, W, BC)
        _store_part(Parts, 0, tl.sum(s1, 0, keep_dims=True), C, BC)
        _store_part(Parts, 1, tl.sum(s2, 0, keep_dims=True) * inv_std, C, BC)

    @triton.jit
    def _means_kernel(Parts, Vectors, Sums, Means, P, n, C, fold, BP: tl.constexpr,
                      BC: tl.constexpr):
        """Parts (2, P, C) -> Sums (2, C), and Means (2, fold*C), the sums over n, the second
        times 1/std besides; each unless None."""
        c = tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
        s1, s2 = tl.zeros([BP, BC], tl.float64), tl.zeros([BP, BC], tl.float64)
        for first in range(0, P, BP):
            p = first + tl.arange(0, BP)[:, None]
            s1 += _part(Parts, 0, p, P, c, C)
            s2 += _part(Parts, 1, p, P, c, C)
        s1, s2 = tl.sum(s1, 0, keep_dims=True), tl.sum(s2, 0, keep_dims=True)
        if Means is not None:
            inv_std = tl.load(Vectors + INV_STD * fold * C + c, c < C, 0.0)
        if Sums is not None:
            tl.store(Sums + c, s1, c < C)
            tl.store(Sums + C + c, s2, c < C)
        if Means is not None:
            for i in range(fold):
                tl.store(Means + i * C + c, s1 / n, c < C)
                tl.store(Means + (fold + i) * C + c, s2 / n * inv_std, c < C)

    @triton.jit
    def _apply_kernel(G, Bits, X, Vectors, Means, W, DX, DResidual, decay, inv, R, C, S,
                      N: tl.int64, T: tl.constexpr, STATIC: tl.constexpr, BR: tl.constexpr,
                      BC: tl.constexpr):
        """Reads g, bits and, unless Means is None (constant statistics), x; writes dx and
        dresidual, unless None."""
        offsets, inside = _tile(tl.program_id(0) * BR, R, C, S, BR, BC)
        gs = load_steps(G, N, offsets, inside, T)
        codes = load_steps(Bits, N, offsets, inside, (T + 3) // 4)
        if Means is not None:
            xs = load_steps(X, N, offsets, inside, 1 if STATIC else T)
            mean = _channels(Vectors, MEAN, W, BC)
            mean_d, slope = _channels(Means, 0, W, BC), _channels(Means, 1, W, BC)
        scale = _channels(Vectors, SCALE, W, BC)
        du, total = tl.zeros([BR, BC], tl.float32), tl.zeros([BR, BC], tl.float32)
        for t in tl.static_range(T - 1, -1, -1):
            du = backward_step(gs[t].to(tl.float32), du, codes[t // 4], t, decay, inv)
            if DResidual is not None:
                tl.store(DResidual + t * N + offsets, du, inside)
            total += du
            if DX is not None and (t == 0 or not STATIC):
                d = total if STATIC else du
                if Means is not None:
                    d = d - mean_d - (xs[t].to(tl.float32) - mean) * slope
                tl.store(DX + t * N + offsets, d * scale, inside)


# ---------------------------------------------------------------------------- memory and launches

def _channels_last(x):
    return x.stride(2) == 1 and not x.is_contiguous()


def _dense(x, like):
    """x (T, B, C, H, W) with the memory of a dense (T, B, H, W, C) or (T, B, C, H, W), as `like`
    has it; a copy only if it lies otherwise. The kernels see nothing of it but its memory."""
    return (x.permute(0, 1, 3, 4, 2) if _channels_last(like) else x).contiguous()


def _planes(x, T, dtype=None):
    """Empty (T, B, C, H, W), channels-last as x is or contiguous."""
    _, B, C, H, W = x.shape
    dtype = dtype or x.dtype
    if _channels_last(x):
        return x.new_empty(T, B, H, W, C, dtype=dtype).permute(0, 1, 4, 2, 3)
    return x.new_empty(T, B, C, H, W, dtype=dtype)


def _fold(C):
    """How often channels stand side by side in per-channel vectors: to a multiple of 64."""
    return 64 // math.gcd(64, C)


def tile_size(T, itemsize):
    """Neurons of a program: fewer where a neuron's loads of all steps, which stay in registers,
    take more than 16 bytes a plane."""
    return TILE * 16 // max(16, 2 ** (T * itemsize - 1).bit_length())


def _grid(x, T, programs=None):
    """The grid over tiles of one time-step of x and what all kernels over tiles take."""
    N, C, S = x[0].numel(), x.shape[2], 1 if _channels_last(x) else x.shape[3] * x.shape[4]
    O = N // (C * S)  # noqa: E741
    fold = math.gcd(_fold(C), O) if S == 1 else 1
    R, C = O * S // fold, C * fold
    if R >= 2**30:
        raise ValueError(f"impl='triton' takes fewer than 2**30 values a channel, not {R}")
    BC = 1 if S > 1 else min(64, triton.next_power_of_2(C))
    BR, across = tile_size(T, x.element_size()) // BC, triton.cdiv(C, BC)
    P = triton.cdiv(R, BR)
    if programs is not None:
        P = min(P, max(1, programs // across))
    return (P, across), dict(R=R, C=C, S=S, N=N, T=T, BR=BR, BC=BC, num_warps=4,
                             enable_fp_fusion=False)


def _launch_combine(kernel, C, *args):
    kernel[(triton.cdiv(C, CHANNELS),)](*args, BP=PARTS, BC=CHANNELS, num_warps=8,
                                        enable_fp_fusion=False)


def _combine(parts, weight, bias, running_mean, running_var, whole, vectors, momentum=0.0,
             eps=0.0):
    """parts (4, P, fold*C), or None for constant statistics -> whole or vectors, unless None."""
    C = (running_mean if parts is None else weight if whole is None else whole[0]).numel()
    P = 0 if parts is None else parts[0].numel() // C
    _launch_combine(_combine_kernel, C, parts, weight, bias, running_mean, running_var, whole,
                    vectors, P, C, _fold(C), momentum, eps)


def _statistics_parts(x):
    grid, args = _grid(x, len(x), REDUCING)
    parts = x.new_empty(4, grid[0], args["C"], dtype=torch.float32)
    _statistics_kernel[grid](_dense(x, x), parts, **args)
    return parts


def _gradient_parts(g, bits, x, vectors, decay, lens):
    grid, args = _grid(x, len(g), REDUCING)
    parts = x.new_empty(2, grid[0], args["C"], dtype=torch.float32)
    _reduce_kernel[grid](_dense(g, x), bits, _dense(x, x), vectors, vectors.shape[1], parts, decay,
                         1 / (2 * lens), STATIC=len(x) < len(g), **args)
    return parts


# ---------------------------------------------------------------------------- operators
# x (T, B, C, H, W), or (1, B, C, H, W) for the same current at every step. an operator costs the
# host as much as a small layer, so each way is one, but for the statistics: they may update the
# running ones, and what mutates has no derivative. under a process group the sums must leave for
# the other ranks, where torch.compile sees it: _whole and _reduce are the first halves alone.

@torch.library.custom_op("idsnn::bn_lif_whole", mutates_args=())
def _whole(x: Tensor) -> Tensor:
    """This process's count, mean, 0 and sum of squared deviations: (4, C) fp64."""
    whole = x.new_empty(4, x.shape[2], dtype=torch.float64)
    with torch.cuda.device_of(x):
        _combine(_statistics_parts(x), None, None, None, None, whole, None)
    return whole


@torch.library.custom_op("idsnn::bn_lif_statistics", mutates_args=("running_mean", "running_var"))
def _statistics(x: Tensor, wholes: Maybe, weight: Tensor, bias: Tensor, running_mean: Maybe,
                running_var: Maybe, momentum: float, eps: float) -> Tensor:
    """Vectors (5, fold*C) of x's statistics or those of all ranks, wholes (4, ranks, C)."""
    vectors = _new_vectors(weight)
    with torch.cuda.device_of(x):
        parts = _statistics_parts(x) if wholes is None else wholes
        _combine(parts, weight, bias, running_mean, running_var, None, vectors, momentum, eps)
    return vectors


@torch.library.custom_op("idsnn::bn_lif_constants", mutates_args=())
def _constants(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Vectors (5, fold*C) of constant statistics."""
    vectors = _new_vectors(weight)
    with torch.cuda.device_of(weight):
        _combine(None, weight, bias, mean, var, None, vectors, eps=eps)
    return vectors


@torch.library.custom_op("idsnn::bn_lif", mutates_args=())
def _bn_lif(x: Tensor, residual: Maybe, weight: Tensor, bias: Tensor, vectors: Tensor, T: int,
            n: int, decay: float, v_th: float, lens: float, group: str,
            save: bool) -> tuple[Tensor, Tensor]:
    """Spikes, and bits, empty unless `save`. For the derivative are weight and bias, which the
    vectors hold already, n, values per channel (0: constant statistics), and group."""
    spikes, bits = _outputs(x, T, save)
    if x.numel():
        grid, args = _grid(x, T)
        residual = None if residual is None else _dense(residual, x)
        with torch.cuda.device_of(x):
            _forward_kernel[grid](_dense(x, x), residual, spikes, bits if save else None, vectors,
                                  vectors.shape[1], decay, v_th, lens, STATIC=len(x) < T, **args)
    return spikes, bits


@torch.library.custom_op("idsnn::bn_lif_reduce", mutates_args=())
def _reduce(g: Tensor, bits: Tensor, x: Tensor, vectors: Tensor, decay: float,
            lens: float) -> Tensor:
    """(2, C) fp64: this process's sums of dcurrent and of dcurrent*xhat."""
    C = x.shape[2]
    sums = x.new_empty(2, C, dtype=torch.float64)
    with torch.cuda.device_of(x):
        parts = _gradient_parts(g, bits, x, vectors, decay, lens)
        _launch_combine(_means_kernel, C, parts, None, sums, None, parts[0].numel() // C, 1, C, 1)
    return sums


@torch.library.custom_op("idsnn::bn_lif_backward", mutates_args=())
def _backward(g: Tensor, bits: Tensor, x: Tensor, vectors: Tensor, sums: Maybe, n: int,
              decay: float, lens: float, need_dx: bool, need_dresidual: bool,
              need_sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of the residual, and this process's sums, (2, C); each empty if not
    needed. `sums` of all ranks (2, C), if there are others, make dx; without them its own do."""
    dx, dresidual, own = _gradients(g, x, need_dx, need_dresidual, need_sums)
    if not x.numel():
        return dx, dresidual, own.zero_()
    C, means = x.shape[2], None
    with torch.cuda.device_of(x):
        moving = n > 0 and need_dx  # statistics move with x
        if moving or need_sums:
            means = torch.empty_like(vectors[:2]) if moving else None
            parts = sums
            if sums is None:
                parts = _gradient_parts(g, bits, x, vectors, decay, lens)
            _launch_combine(_means_kernel, C, parts, vectors, own if need_sums else None, means,
                            parts[0].numel() // C, n, C, _fold(C))
        if need_dx or need_dresidual:
            grid, args = _grid(x, len(g))
            _apply_kernel[grid](_dense(g, x), bits, _dense(x, x), vectors, means,
                                vectors.shape[1], dx if need_dx else None,
                                dresidual if need_dresidual else None, decay, 1 / (2 * lens),
                                STATIC=len(x) < len(g), **args)
    return dx, dresidual, own


def _new_vectors(weight):
    C = weight.shape[0]
    return weight.new_empty(5, _fold(C) * C, dtype=torch.float32)


def _outputs(x, T, save):
    bits = _planes(x, (T + 3) // 4, torch.uint8) if save else x.new_empty(0, dtype=torch.uint8)
    return _planes(x, T), bits


def _gradients(g, x, need_dx, need_dresidual, need_sums):
    return (_planes(x, len(x)) if need_dx else x.new_empty(0),
            _planes(x, len(g)) if need_dresidual else x.new_empty(0),
            x.new_empty((2, x.shape[2]) if need_sums else 0, dtype=torch.float32))


@_whole.register_fake
def _(x):
    return x.new_empty(4, x.shape[2], dtype=torch.float64)


@_statistics.register_fake
def _(x, wholes, weight, bias, running_mean, running_var, momentum, eps):
    return _new_vectors(weight)


@_constants.register_fake
def _(mean, var, weight, bias, eps):
    return _new_vectors(weight)


@_bn_lif.register_fake
def _(x, residual, weight, bias, vectors, T, n, decay, v_th, lens, group, save):
    return _outputs(x, T, save)


@_reduce.register_fake
def _(g, bits, x, vectors, decay, lens):
    return x.new_empty(2, x.shape[2], dtype=torch.float64)


@_backward.register_fake
def _(g, bits, x, vectors, sums, n, decay, lens, need_dx, need_dresidual, need_sums):
    return _gradients(g, x, need_dx, need_dresidual, need_sums)


def _setup(ctx, inputs, output):
    x, residual, weight, bias, vectors, ctx.T, ctx.n, *ctx.neuron, ctx.group, ctx.save = inputs
    saved = (output[1],) if ctx.save else (residual, weight, bias)
    ctx.save_for_backward(x, vectors, *saved)
    ctx.dtypes = weight.dtype, bias.dtype
    ctx.set_materialize_grads(False)


def _autograd(ctx, g, _):
    if torch.is_grad_enabled():  # true in a backward only with create_graph=True
        no_second_derivative("bn_lif")
    x, vectors, *saved = ctx.saved_tensors
    decay, _, lens = ctx.neuron
    bits = saved[0] if ctx.save else _bn_lif(  # traced without a gradient: computed anew
        x, *saved, vectors, ctx.T, ctx.n, *ctx.neuron, "", True)[1]
    need_dx, need_dresidual, *need_params = ctx.needs_input_grad[:4]
    sums = own = None
    if ctx.group:
        own = _reduce(g, bits, x, vectors, decay, lens)
        sums = _all_reduce(own, ctx.group)
    dx, dresidual, alone = _backward(g, bits, x, vectors, sums, ctx.n, decay, lens, need_dx,
                                     need_dresidual, own is None and any(need_params))
    # the parameters' gradients are this process's share, as in DDP
    dbias, dweight = (alone if own is None else own).unbind() if any(need_params) else (None, None)
    grads = [dx if need_dx else None, dresidual if need_dresidual else None]
    grads += [d.to(dtype) if need else None
              for d, dtype, need in zip((dweight, dbias), ctx.dtypes, need_params)]
    return *grads, *[None] * 8


_bn_lif.register_autograd(_autograd, setup_context=_setup)

for _op in (_whole, _statistics, _constants, _bn_lif, _reduce, _backward):
    refuse_forward_mode(_op)


# ---------------------------------------------------------------------------- what users call

def _composed(x, weight, bias, residual, running_mean, running_var, training, momentum, T, eps,
              neuron, detach_reset, group, impl):
    """Batch norm, add, lif; the current is fp32 for bf16 and fp16 too."""
    current = batch_norm(x.flatten(0, 1).to(_accumulator(x)), running_mean, running_var, weight,
                         bias, training, momentum, eps, group)
    current = current.unflatten(0, x.shape[:2]).expand(T, -1, -1, -1, -1)  # (T, B, C, H, W)
    if residual is not None:
        current = current + residual
    return lif(current, *neuron, detach_reset, impl).to(x.dtype)


def _fused(x, weight, bias, residual, running_mean, running_var, training, momentum, T, eps,
           neuron, group):
    # the statistics' part of the derivative is idsnn::bn_lif's
    constant = [v.detach() for v in (x, weight, bias)]
    n, name, wholes = 0, "", None
    if not training:
        vectors = _constants(running_mean, running_var, *constant[1:], eps)
    else:
        n = x.numel() // x.shape[2]
        if group is not None:
            n, name = n * group.size(), group.group_name
            ops = torch.ops._c10d_functional
            gathered = ops.all_gather_into_tensor(_whole(constant[0]), group.size(), name)
            wholes = ops.wait_tensor(gathered).unflatten(0, (-1, 4))
            wholes = wholes.transpose(0, 1).contiguous()  # (ranks, 4, C) -> (4, ranks, C)
        vectors = _statistics(constant[0], wholes, *constant[1:], running_mean, running_var,
                              momentum, eps)
    inputs = x, residual, weight, bias
    save = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)
    return _bn_lif(*inputs, vectors, T, n, *neuron, name, save)[0]


def bn_lif(x: Tensor, weight: Tensor, bias: Tensor, residual: Maybe = None,
           running_mean: Maybe = None, running_var: Maybe = None, *, training: bool = True,
           momentum: float = 0.1, T: int | None = None, eps: float = 1e-5, decay: float = 0.25,
           v_th: float = 0.5, lens: float = 0.5, detach_reset: bool = True, group=None,
           impl: str | None = None) -> Tensor:
    """Spikes of LIF neurons behind a batch norm and an optional residual add; U starts at 0.

    x             (T, B, C, H, W), a convolution's output; or, with T given, (B, C, H, W), the same
                  at each of T steps (an expanded T means the same). float32, bfloat16, float16 or
                  float64; the arithmetic is fp32 (fp64)
    weight, bias  (C,), as a rule float32 whatever x is
    residual      (T, B, C, H, W), added to the normed x; copied if its layout or dtype isn't x's
    running_mean, running_var  (C,), as in F.batch_norm. training=True: statistics of x over T, B,
                  H, W, which update the running ones, if given, in place (variance unbiased);
                  training=False: the running ones are the statistics
    momentum      weight of the new value in the running statistics
    eps           added to the variance
    group         a process group whose ranks share their statistics; each holds an x of one shape
    decay, v_th, lens, detach_reset, impl   as in `lif`

    Returns spikes (T, B, C, H, W), 0 or 1, in x's dtype and layout.

    On Triton x is not copied as (T*B, C, H, W) channels-last unflattened to (T, B), or plain
    contiguous; any other x is. For the backward are kept x, two bits per neuron-step and
    per-channel vectors; without a gradient nothing. On PyTorch, with detach_reset=False and under
    torch.func it is F.batch_norm, the add and `lif`. Second derivatives and forward mode are
    refused. Raises TypeError for a wrong dtype, ValueError for anything else that doesn't fit.
    """
    if x.dim() == 4 and T is not None:
        x = x.unsqueeze(0)  # (B, C, H, W) -> (1, B, C, H, W)
    elif x.dim() == 5 and T in (None, x.shape[0]):
        T = x.shape[0]
        x = x[:1] if x.stride(0) == 0 else x
    else:
        raise ValueError("x must be (T, B, C, H, W), or (B, C, H, W) with T given, not "
                         f"{tuple(x.shape)} with T = {T}")
    neuron, impl = check(x, T, decay, v_th, lens, impl)
    shape, C = (T, *x.shape[1:]), x.shape[2]
    if T < 1:
        raise ValueError(f"T must be at least 1, not {T}")
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual must be {shape}, not {tuple(residual.shape)}")
    vectors = dict(weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (C,):
            raise ValueError(f"{name} must be ({C},), one value a channel, not "
                             f"{tuple(vector.shape)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together, or neither")
    if not training and running_mean is None:
        raise ValueError("training=False needs running_mean and running_var")
    group = None if group is None or group.size() == 1 or not training else group
    if training and x.numel() * (1 if group is None else group.size()) < 2 * C:
        raise ValueError("batch statistics need more than one value a channel, x is "
                         f"{tuple(x.shape)}")
    args = x, weight, bias, residual, running_mean, running_var, training, momentum, T, eps, neuron
    if impl != "triton" or not detach_reset or torch._C._are_functorch_transforms_active():
        return _composed(*args, bool(detach_reset), group, impl)
    if residual is not None:
        residual = residual.to(x.dtype)
    return _fused(x, weight, bias, residual, *args[4:], group)
