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

from kernels.lif import (
    check,
    lif,
    lif_reference,
    no_second_derivative,
    refuse_forward_mode,
    state_dtype,
    triton,
)

if triton is not None:
    import triton.language as tl

    from kernels.lif import backward_step, fire, load_steps, pack, reset

Tensor, Maybe = torch.Tensor, torch.Tensor | None


# ---------------------------------------------------------------------------- the specification

def bn_lif_reference(x, weight, bias, residual=None, mean=None, var=None, eps=1e-5, decay=0.25,
                     v_th=0.5, lens=0.5, detach_reset=True):
    """The equations as they stand, in fp32 (fp64), differentiated by autograd, statistics too.

    x (T, B, C, H, W) -> spikes of x's shape and dtype. mean, var (C,): of x if None.
    """
    acc, per_channel = state_dtype(x), (-1, 1, 1)
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
# functional collectives, which torch.compile can trace. groups go by their names.

def _all_reduce(x, group):
    """Sum over the ranks."""
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
    x_acc = x.to(state_dtype(x))
    # two rounds of messages: squares of what is centred lose no digits to a large mean
    mean = _AllReduce.apply(x_acc.mean((0, 2, 3)), name) / ranks
    centred = x_acc - mean.view(per_channel)
    var = _AllReduce.apply(centred.square().mean((0, 2, 3)), name) / ranks
    if running_mean is not None:
        n = ranks * x.numel() // x.shape[1]
        unbiased = var * (n / (n - 1))
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    y = centred * (var + eps).rsqrt().view(per_channel)
    if weight is not None:
        y = y * weight.view(per_channel) + bias.view(per_channel)
    return y.to(x.dtype)


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose batch statistics are over all processes of torch.distributed, forward
    and backward, on CPUs and GPUs (nn.SyncBatchNorm refuses CPU tensors)."""

    @property
    def group(self):
        """The process group that shares the statistics; None where this process is alone."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return dist.group.WORLD if several else None

    def forward(self, x):
        if self.group is None or not self.training:
            return super().forward(x)
        momentum = self.momentum
        if self.track_running_stats:
            self.num_batches_tracked += 1
            if momentum is None:  # a plain average over all batches, as in nn.BatchNorm2d
                momentum = 1 / float(self.num_batches_tracked)
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True,
                          momentum, self.eps, self.group)


# ---------------------------------------------------------------------------- Triton kernels
# to the kernels a time-step is (O, C) in channels-last memory, O = B*H*W, and any C is read 16
# bytes at a time: its N = O*C values are cut into rows of W, the least multiple of 64 and of C, the
# last one perhaps short. in a row channel c stands W/C times; per-channel vectors are written as
# often side by side, and partial sums of the copies are just more parts.
#
# a tile is BR rows by 64 columns, so that a channel's vectors are read once a program and its sums
# are sums over rows. T is unrolled; TX is the number of planes of x, T or, where the current is the
# same at every step, 1. the rest are run-time values. row numbers have 32 bits, offsets 64.

TILE = 1024  # neurons of a program: 8 for each of 128 threads, 16 bytes in bf16
COLUMNS = 64
# programs of a reduction: 4 on each of an H100's 132 multiprocessors run at once, one whole wave,
# with all the registers they need (128 a thread). a fixed number, so that sums don't depend on the
# device.
REDUCING = 4 * 132
PARTS, CHANNELS = 256, 8  # tile of the kernels that combine the parts of a reduction

if triton is not None:
    BC = tl.constexpr(COLUMNS)
    # rows of `vectors` (5, W), fp32: what is the same for all of a channel
    MEAN, VAR, INV_STD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
    SCALE, SHIFT = tl.constexpr(3), tl.constexpr(4)

    @triton.jit
    def _columns():
        return tl.program_id(1) * BC + tl.arange(0, BC)[None, :]

    @triton.jit
    def _tile(row, W, N, BR: tl.constexpr):  # offsets, mask: the rows from `row` on
        r = row + tl.arange(0, BR)[:, None]
        offsets = r.to(tl.int64) * W + _columns()
        return offsets, offsets < N

    @triton.jit
    def _channels(Vectors, row, W):  # (rows, W) -> (1, BC)
        return tl.load(Vectors + row * W + _columns())

    @triton.jit
    def _store_part(Parts, row, values, W):  # sums of the columns -> Parts (rows, programs, W)
        part = (row * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
        tl.store(Parts + part * W + _columns(), tl.sum(values, 0, keep_dims=True))

    @triton.jit
    def _statistics_kernel(X, Parts, W, N: tl.int64, T: tl.constexpr, BR: tl.constexpr):
        """Parts (4, P, W) of every P-th tile: count, shift, sum(x - shift), sum((x - shift)**2).

        Reads x. shift is the mean of the first tile: fp32 loses nothing to a large common mean.
        """
        first = tl.program_id(0) * BR
        rows = tl.cdiv(N, W).to(tl.int32)
        offsets, inside = _tile(first, W, N, BR)
        x = tl.load(X + offsets, inside, 0).to(tl.float32)
        # beyond the end of a short last row there is nothing, not even a mean
        seen = tl.maximum(tl.sum(inside.to(tl.float32), 0, keep_dims=True), 1)
        shift = tl.sum(x, 0, keep_dims=True) / seen
        count = tl.zeros([BR, BC], tl.float32)
        s1 = count
        s2 = count
        for row in range(first, rows, tl.num_programs(0) * BR):
            offsets, inside = _tile(row, W, N, BR)
            xs = load_steps(X, N, offsets, inside, T)
            for t in tl.static_range(T):
                d = tl.where(inside, xs[t].to(tl.float32) - shift, 0.0)
                s1 += d
                s2 += d * d
            count += tl.where(inside, 1.0, 0.0)
        _store_part(Parts, 0, count * T, W)
        _store_part(Parts, 1, shift, W)
        _store_part(Parts, 2, s1, W)
        _store_part(Parts, 3, s2, W)

    @triton.jit
    def _part(Parts, row, p, P, c, C):  # a tile of Parts (rows, P, C)
        offsets = (row * P + p).to(tl.int64) * C + c
        # fp64: the sums of many programs
        return tl.load(Parts + offsets, (p < P) & (c < C), 0.0).to(tl.float64)

    @triton.jit
    def _store_channels(Vectors, row, value, c, C, W):  # (1, CHANNELS) -> (rows, W)
        # side by side, for every copy of a channel in a row
        for column in range(0, W, C):
            tl.store(Vectors + row * W + column + c, value, c < C)

    @triton.jit
    def _vectors_kernel(Parts, P, C, W, Weight, Bias, RunningMean, RunningVar, Vectors, momentum,
                        eps, BP: tl.constexpr, CHANNELS: tl.constexpr):
        """Parts (4, P, C) -> Vectors (5, W) and, unless None, the running statistics.

        In fp64, about m, the shift of the first part, where d = s - m for a part shifted by s:
        sum(x - m) = sum(x - s) + count*d, sum((x-m)**2) = sum((x-s)**2) + d*(2*sum(x-s) + count*d).
        """
        c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        weight = tl.load(Weight + c, c < C, 0.0).to(tl.float32)
        bias = tl.load(Bias + c, c < C, 0.0).to(tl.float32)
        m = _part(Parts, 1, tl.zeros([1, 1], tl.int32), P, c, C)
        counts = tl.zeros([BP, CHANNELS], tl.float64)
        sums = counts
        squares = counts
        for first in range(0, P, BP):
            p = first + tl.arange(0, BP)[:, None]
            count = _part(Parts, 0, p, P, c, C)
            d = _part(Parts, 1, p, P, c, C) - m
            s1 = _part(Parts, 2, p, P, c, C)
            s2 = _part(Parts, 3, p, P, c, C)
            counts += count
            sums += s1 + count * d
            squares += s2 + d * (2 * s1 + count * d)
        # nothing was counted where c >= C
        n = tl.maximum(tl.sum(counts, 0, keep_dims=True), 1.0)
        # mean - m and, rounding apart never negative, var
        offset = tl.sum(sums, 0, keep_dims=True) / n
        var = tl.sum(squares, 0, keep_dims=True) / n - offset * offset
        var = tl.maximum(var, 0.0)
        mean = m + offset
        if RunningMean is not None:
            old_mean = tl.load(RunningMean + c, c < C, 0.0) * (1 - momentum)
            old_var = tl.load(RunningVar + c, c < C, 0.0) * (1 - momentum)
            unbiased = var * (n / tl.maximum(n - 1, 1.0))
            tl.store(RunningMean + c, old_mean + mean * momentum, c < C)
            tl.store(RunningVar + c, old_var + unbiased * momentum, c < C)
        mean = mean.to(tl.float32)
        var = var.to(tl.float32)
        # roots and quotients exactly rounded, as in PyTorch
        std = tl.sqrt_rn(var + eps)
        scale = tl.div_rn(weight, std)
        _store_channels(Vectors, MEAN, mean, c, C, W)
        _store_channels(Vectors, VAR, var, c, C, W)
        _store_channels(Vectors, INV_STD, tl.div_rn(1.0, std), c, C, W)
        _store_channels(Vectors, SCALE, scale, c, C, W)
        _store_channels(Vectors, SHIFT, bias - mean * scale, c, C, W)

    @triton.jit
    def _forward_kernel(X, Residual, Spikes, Bits, Vectors, decay, v_th, lens, W, N: tl.int64,
                        T: tl.constexpr, TX: tl.constexpr, BR: tl.constexpr):
        """Reads x and the residual, writes spikes and, unless Bits is None, two bits."""
        offsets, inside = _tile(tl.program_id(0) * BR, W, N, BR)
        xs = load_steps(X, N, offsets, inside, TX)
        if Residual is not None:
            residuals = load_steps(Residual, N, offsets, inside, T)
        scale = _channels(Vectors, SCALE, W)
        shift = _channels(Vectors, SHIFT, W)
        leak = tl.zeros([BR, BC], tl.float32)
        code = tl.zeros([BR, BC], tl.int32)
        for t in tl.static_range(T):
            current = xs[t % TX].to(tl.float32) * scale + shift
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
    def _reduce_kernel(G, Bits, X, Vectors, Parts, decay, inv, W, N: tl.int64, T: tl.constexpr,
                       TX: tl.constexpr, BR: tl.constexpr):
        """Parts (2, P, W) of every P-th tile: sums of dcurrent and of dcurrent*(x - mean).

        Reads g, bits and x.
        """
        mean = _channels(Vectors, MEAN, W)
        s1 = tl.zeros([BR, BC], tl.float32)
        s2 = s1
        rows = tl.cdiv(N, W).to(tl.int32)
        for row in range(tl.program_id(0) * BR, rows, tl.num_programs(0) * BR):
            offsets, inside = _tile(row, W, N, BR)
            gs = load_steps(G, N, offsets, inside, T)
            codes = load_steps(Bits, N, offsets, inside, (T + 3) // 4)
            xs = load_steps(X, N, offsets, inside, TX)
            du = tl.zeros([BR, BC], tl.float32)
            for t in tl.static_range(T - 1, -1, -1):
                du = backward_step(gs[t], du, codes[t // 4], t, decay, inv)
                s1 += du
                s2 += du * (xs[t % TX].to(tl.float32) - mean)
        _store_part(Parts, 0, s1, W)
        _store_part(Parts, 1, s2, W)

    @triton.jit
    def _means_kernel(Parts, P, C, W, Vectors, Sums, Means, n, ranks, BP: tl.constexpr,
                      CHANNELS: tl.constexpr):
        """Parts (2, P, C) -> Sums (2, C), dbias and dweight over the number of ranks, and Means
        (2, W), dbias/n and dweight/n/std."""
        c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        s1 = tl.zeros([BP, CHANNELS], tl.float64)
        s2 = s1
        for first in range(0, P, BP):
            p = first + tl.arange(0, BP)[:, None]
            s1 += _part(Parts, 0, p, P, c, C)
            s2 += _part(Parts, 1, p, P, c, C)
        inv_std = tl.load(Vectors + INV_STD * W + c, c < C, 0.0)
        dbias = tl.sum(s1, 0, keep_dims=True)
        dweight = tl.sum(s2, 0, keep_dims=True) * inv_std
        tl.store(Sums + c, dbias / ranks, c < C)
        tl.store(Sums + C + c, dweight / ranks, c < C)
        _store_channels(Means, 0, dbias / n, c, C, W)
        _store_channels(Means, 1, dweight / n * inv_std, c, C, W)

    @triton.jit
    def _apply_kernel(G, Bits, X, Vectors, Means, DX, DResidual, decay, inv, W, N: tl.int64,
                      T: tl.constexpr, TX: tl.constexpr, BR: tl.constexpr):
        """Reads g, bits and, unless Means is None (constant statistics), x; writes dx and, unless
        None, dresidual."""
        offsets, inside = _tile(tl.program_id(0) * BR, W, N, BR)
        gs = load_steps(G, N, offsets, inside, T)
        codes = load_steps(Bits, N, offsets, inside, (T + 3) // 4)
        if Means is not None:
            xs = load_steps(X, N, offsets, inside, TX)
            mean = _channels(Vectors, MEAN, W)
            mean_d = _channels(Means, 0, W)
            slope = _channels(Means, 1, W)
        scale = _channels(Vectors, SCALE, W)
        du = tl.zeros([BR, BC], tl.float32)
        total = du
        for t in tl.static_range(T - 1, -1, -1):
            du = backward_step(gs[t], du, codes[t // 4], t, decay, inv)
            if DResidual is not None:
                tl.store(DResidual + t * N + offsets, du, inside)
            total += du
            if t < TX:  # the first step of those that plane t of x serves
                if Means is not None:
                    total = total - mean_d - (xs[t].to(tl.float32) - mean) * slope
                tl.store(DX + t * N + offsets, total * scale, inside)
                total = tl.zeros([BR, BC], tl.float32)


# ---------------------------------------------------------------------------- launches

def _rows(x):
    """(T, B, C, H, W) -> dense (T, B, H, W, C): a view of channels-last memory, else a copy."""
    return x.permute(0, 1, 3, 4, 2).contiguous()


def _planes(x, T, dtype=None):
    """Empty (T, B, C, H, W) in channels-last memory, shape and dtype else as x."""
    _, B, C, H, W = x.shape
    memory = x.new_empty(T, B, H, W, C, dtype=dtype or x.dtype)
    return memory.permute(0, 1, 4, 2, 3)


def _width(C):  # columns of a row: whole tiles, whole sets of channels
    return math.lcm(COLUMNS, C)


def tile_size(T, itemsize):
    """Neurons of a program: fewer where a neuron's loads of all steps, which stay in registers,
    take more than 16 bytes a plane."""
    tile = TILE
    while tile * T * itemsize > TILE * 16:
        tile //= 2
    return tile


def _grid(x, T, programs=None):
    """Tiles down and across a time-step of x, or about so many programs if there are more tiles."""
    across = _width(x.shape[2]) // COLUMNS
    down = triton.cdiv(x[0].numel(), tile_size(T, x.element_size()) * across)
    if programs is not None:
        # min() would be a guard on the shape, where torch.compile traces it
        down = torch.sym_min(down, max(1, programs // across))
    return down, across


def _launch(kernel, x, T, *args, programs=None, **constants):
    grid = _grid(x, T, programs)
    rows = tile_size(T, x.element_size()) // COLUMNS
    W, N = _width(x.shape[2]), x[0].numel()
    # products and sums stay apart (no contraction), as in the specification
    with torch.cuda.device_of(x):
        kernel[grid](*args, W, N, T=T, BR=rows, num_warps=4, enable_fp_fusion=False, **constants)


def _launch_combine(kernel, parts, *args):  # over channels, where _launch is over tiles
    _, P, C = parts.shape
    grid = (triton.cdiv(C, CHANNELS),)
    with torch.cuda.device_of(parts):
        kernel[grid](parts, P, C, _width(C), *args, BP=PARTS, CHANNELS=CHANNELS, num_warps=8,
                     enable_fp_fusion=False)


# what the operators return, and their fakes in a trace

def _new_parts(x, T, rows):  # (rows, P, C)
    C = x.shape[2]
    # one of each program and of each copy of a channel in a row
    programs, _ = _grid(x, T, REDUCING)
    return x.new_empty(rows, programs * (_width(C) // C), C, dtype=torch.float32)


def _new_vectors(parts, rows):
    return parts.new_empty(rows, _width(parts.shape[2]), dtype=torch.float32)


def _new_outputs(x, T, save):
    return _planes(x, T), _planes(x, (T + 3) // 4 if save else 0, torch.uint8)


def _new_gradients(g, x, need_dresidual):
    sums = x.new_empty(2, x.shape[2], dtype=torch.float32)
    return _planes(x, len(x)), _planes(x, len(g) if need_dresidual else 0), sums


# ---------------------------------------------------------------------------- operators
# x is (T, B, C, H, W), or (1, B, C, H, W) for the same current at every step. sums leave their
# operator before the next one takes them up, so that they can go to other ranks where torch.compile
# sees it. what updates the running statistics has no derivative: it takes no x, and what takes x
# gets its result.

@torch.library.custom_op("idsnn::bn_lif_statistics", mutates_args=())
def _statistics(x: Tensor) -> Tensor:
    """Parts (4, P, C) of the statistics of x."""
    refuse_forward_mode("bn_lif")
    parts = _new_parts(x, len(x), 4)
    _launch(_statistics_kernel, x, len(x), _rows(x), parts, programs=REDUCING)
    return parts


@torch.library.custom_op("idsnn::bn_lif_vectors", mutates_args=("running_mean", "running_var"))
def _vectors(parts: Tensor, weight: Tensor, bias: Tensor, running_mean: Maybe, running_var: Maybe,
             momentum: float, eps: float) -> Tensor:
    """Vectors (5, W) of the statistics in the parts; updates the running ones, if given."""
    vectors = _new_vectors(parts, 5)
    _launch_combine(_vectors_kernel, parts, weight, bias, running_mean, running_var, vectors,
                    momentum, eps)
    return vectors


@torch.library.custom_op("idsnn::bn_lif", mutates_args=())
def _bn_lif(x: Tensor, residual: Maybe, weight: Tensor, bias: Tensor, vectors: Tensor, T: int,
            decay: float, v_th: float, lens: float, training: bool, group: str, ranks: int,
            save: bool) -> tuple[Tensor, Tensor]:
    """Spikes and bits (ceil(T/4), B, C, H, W), none unless `save`.

    For the derivative are weight and bias, which the vectors hold already, training (False: the
    statistics are constants) and the process group's name and size.
    """
    refuse_forward_mode("bn_lif")
    spikes, bits = _new_outputs(x, T, save)
    if residual is not None:
        residual = _rows(residual)
    _launch(_forward_kernel, x, T, _rows(x), residual, spikes, bits if save else None,
            vectors, decay, v_th, lens, TX=len(x))
    return spikes, bits


@torch.library.custom_op("idsnn::bn_lif_reduce", mutates_args=())
def _reduce(g: Tensor, bits: Tensor, x: Tensor, vectors: Tensor, decay: float,
            lens: float) -> Tensor:
    """Parts (2, P, C) of the sums of dcurrent and of dcurrent*(x - mean)."""
    refuse_forward_mode("bn_lif")
    parts = _new_parts(x, len(g), 2)
    _launch(_reduce_kernel, x, len(g), _rows(g), bits, _rows(x), vectors, parts, decay,
            1 / (2 * lens), programs=REDUCING, TX=len(x))
    return parts


@torch.library.custom_op("idsnn::bn_lif_backward", mutates_args=())
def _backward(g: Tensor, bits: Tensor, x: Tensor, vectors: Tensor, parts: Tensor, decay: float,
              lens: float, training: bool, ranks: int,
              need_dresidual: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dresidual, empty unless needed, and (2, C): dbias and dweight, each
    over the number of ranks."""
    dx, dresidual, sums = _new_gradients(g, x, need_dresidual)
    means = _new_vectors(parts, 2)
    n = ranks * x.numel() // x.shape[2]
    _launch_combine(_means_kernel, parts, vectors, sums, means, n, ranks)
    _launch(_apply_kernel, x, len(g), _rows(g), bits, _rows(x), vectors,
            means if training else None, dx, dresidual if need_dresidual else None, decay,
            1 / (2 * lens), TX=len(x))
    return dx, dresidual, sums


_statistics.register_fake(lambda x: _new_parts(x, len(x), 4))
_vectors.register_fake(lambda parts, *_: _new_vectors(parts, 5))
_reduce.register_fake(lambda g, bits, x, *_: _new_parts(x, len(g), 2))
_bn_lif.register_fake(
    lambda x, residual, weight, bias, vectors, T, *rest: _new_outputs(x, T, save=rest[-1]))
_backward.register_fake(lambda g, bits, x, *rest: _new_gradients(g, x, need_dresidual=rest[-1]))


def _setup(ctx, inputs, output):
    x, residual, weight, bias, vectors, *ctx.options, ctx.save = inputs
    # the bits; or, in what was traced without a gradient, that from which they come anew
    saved = output[1:] if ctx.save else (residual, weight, bias)
    ctx.save_for_backward(x, vectors, *saved)
    ctx.set_materialize_grads(False)


def _autograd(ctx, g, _):
    if torch.is_grad_enabled():  # true in a backward only with create_graph=True
        no_second_derivative("bn_lif")
    x, vectors, *saved = ctx.saved_tensors
    bits = saved[0] if ctx.save else _bn_lif(x, *saved, vectors, *ctx.options, True)[1]
    _, decay, _, lens, training, group, ranks = ctx.options
    need_dresidual = ctx.needs_input_grad[1]
    parts = _reduce(g, bits, x, vectors, decay, lens)
    if group:
        parts = _all_reduce(parts.sum(1, keepdim=True), group)  # (2, P, C) -> (2, 1, C)
    dx, dresidual, sums = _backward(g, bits, x, vectors, parts, decay, lens, training, ranks,
                                    need_dresidual)
    # on every rank the same share of the whole: their sum is right, and so is DDP's mean
    dbias, dweight = sums
    return dx, dresidual if need_dresidual else None, dweight, dbias, *[None] * 9


_bn_lif.register_autograd(_autograd, setup_context=_setup)


# ---------------------------------------------------------------------------- what users call

def _as_parts(n, mean, var):
    """Parts of statistics (4, P, C): mean and var (P, C), each of n values."""
    count, zero = torch.full_like(mean, n), torch.zeros_like(mean)
    return torch.stack([count, mean, zero, var * n])


def _gather(parts, n, group):
    """Parts of all ranks (4, ranks, C) from this rank's (4, P, C), n values a channel."""
    C, ops = parts.shape[2], torch.ops._c10d_functional
    # only a mean and a variance travel; what weight and bias make of them goes nowhere
    ones = parts.new_ones(C)
    own = _vectors(parts, ones, ones, None, None, 0.0, 1.0)[:2, :C].contiguous()
    every = ops.all_gather_into_tensor(own, group.size(), group.group_name)
    every = ops.wait_tensor(every).unflatten(0, (-1, 2))  # (ranks*2, C) -> (ranks, 2, C)
    mean, var = every.unbind(1)
    return _as_parts(n, mean, var)


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
    residual      (T, B, C, H, W), added to the normed x, in x's dtype on Triton
    running_mean, running_var  (C,), as in F.batch_norm. training=True: statistics of x over T, B,
                  H, W, which update the running ones, if given, in place (variance unbiased);
                  training=False: the running ones are the statistics
    momentum      weight of the new value in the running statistics
    eps           added to the variance
    group         a process group whose ranks share their statistics; each holds an x of one shape.
                  gradients of weight and bias sum over the ranks to those of the whole batch
    decay, v_th, lens, detach_reset, impl   as in `lif`

    Returns spikes (T, B, C, H, W), 0 or 1, in x's dtype; in channels-last memory on Triton, else in
    x's layout.

    Triton works on channels-last memory, as training on GPUs does: (T*B, C, H, W) channels-last
    unflattened to (T, B) is taken as it is, any other x or residual copied. For the backward are
    kept x, two bits per neuron-step and per-channel vectors; without a gradient nothing. On
    PyTorch, with detach_reset=False and under torch.func it is F.batch_norm, the add and `lif`.
    Second derivatives and forward mode are refused. Raises TypeError for a wrong dtype, ValueError
    for anything else that doesn't fit.
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
    if group is not None and (group.size() == 1 or not training):
        group = None  # there is nothing to share
    ranks = 1 if group is None else group.size()
    if training and ranks * x.numel() < 2 * C:
        raise ValueError("batch statistics need more than one value a channel, x is "
                         f"{tuple(x.shape)}")

    fused = impl == "triton" and detach_reset and x.numel() > 0
    if not fused or torch._C._are_functorch_transforms_active():
        # in three steps; the current is fp32 for bf16 and fp16 too
        folded = x.flatten(0, 1).to(state_dtype(x))  # (T, B, C, H, W) -> (T*B, C, H, W)
        current = batch_norm(folded, running_mean, running_var, weight, bias, training, momentum,
                             eps, group)
        current = current.unflatten(0, x.shape[:2]).expand(shape)  # -> (T, B, C, H, W)
        if residual is not None:
            current = current + residual
        return lif(current, *neuron, bool(detach_reset), impl).to(x.dtype)

    # once, and not again in each operator that reads x
    x = _rows(x).permute(0, 1, 4, 2, 3)
    if residual is not None:
        residual = residual.to(x.dtype)
    # the derivative is idsnn::bn_lif's alone, that of the statistics included
    constant = weight.detach(), bias.detach()
    if training:
        parts = _statistics(x.detach())
    else:
        # those of a single value that is the mean; and nothing to update
        parts = _as_parts(1, running_mean[None], running_var[None])
        running_mean = running_var = None
    name = ""
    if group is not None:
        name = group.group_name
        parts = _gather(parts, x.numel() // C, group)
    vectors = _vectors(parts, *constant, running_mean, running_var, momentum, eps)
    inputs = x, residual, weight, bias
    save = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)
    return _bn_lif(*inputs, vectors, T, *neuron, training, name, ranks, save)[0]
