"""Batch norm, residual add and the LIF neuron, fused on Triton: one pass over memory for the batch
statistics, one for all the rest.

    current[t] = x[t]*scale + shift + residual[t]      scale = weight / sqrt(var + eps)
    spikes     = LIF(current)   (paper eq. 2-4)        shift = bias - mean*scale

In training, mean and (biased) var are taken over T, B, H, W and all ranks of a process group; in
evaluation they are given. The backward first computes dcurrent from two bits per neuron-step
(lif.py); with n values per channel and xhat = (x - mean) / sqrt(var + eps),

    dbias = sum(dcurrent)    dweight = sum(dcurrent*xhat)    dresidual = dcurrent
    dx    = (dcurrent - dbias/n - xhat*dweight/n) * scale    given statistics: dcurrent * scale

Neither current nor dcurrent is written to memory. Bytes per neuron-step at T = 4, bf16 / fp32:

    forward    statistics: read x 2 / 4; then read x, write spikes and bits 4.25 / 8.25
    backward   sums: read g, bits, x 4.25 / 8.25; then read g, bits, x, write dx 6.25 / 12.25
    residual   read 2 / 4 forward, write 2 / 4 backward

`bn_lif_reference` is the specification: of the same statistics the kernels make the same spikes,
bit for bit in fp32. On PyTorch, and with detach_reset=False, bn_lif is batch norm, add, `lif`.

`bn_act` runs the same kernels for a single step, with a ReLU in place of the neuron (a teacher) or
with no activation (a shortcut's batch norm).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .lif import (
    OPS,
    check,
    check_dtype,
    choose_impl,
    lif,
    lif_reference,
    refuse_forward_mode,
    state_dtype,
    transformed,
    triton,
)

if triton is not None:
    import triton.language as tl

    from .lif import backward_step, fire, load_steps, pack


# ---------------------------------------------------------------------------- the specification

def bn_lif_reference(x, weight, bias, residual=None, mean=None, var=None, eps=1e-5, decay=0.25,
                     v_th=0.5, lens=0.5, detach_reset=True):
    """The equations in fp32 (fp64), differentiated by autograd, through the statistics, too.

    x (T, B, C, H, W) -> spikes of the same shape and dtype. mean, var (C,); None: those of x.
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

class _AllReduce(torch.autograd.Function):
    """Differentiable sum over the ranks of a process group, given by its name. Its functional
    collective is one that torch.compile can trace."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ops = group, torch.ops._c10d_functional
        return ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx, g):
        return _AllReduce.apply(g, ctx.group), None


def batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, group=None):
    """F.batch_norm of x (N, C, H, W) with the statistics of all ranks of `group`, whose x have one
    shape."""
    if group is None or group.size() == 1 or not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    ranks, name = group.size(), group.group_name
    per_channel = (-1, 1, 1)
    x_acc = x.to(state_dtype(x))
    # two messages: the variance of centred values loses no digits to a large mean
    mean = _AllReduce.apply(x_acc.mean((0, 2, 3)), name) / ranks
    centred = x_acc - mean.view(per_channel)
    var = _AllReduce.apply(centred.square().mean((0, 2, 3)), name) / ranks
    if running_mean is not None:
        n = ranks * x.numel() // x.shape[1]
        unbiased = var.detach() * (n / (n - 1))
        running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    y = centred * (var + eps).rsqrt().view(per_channel)
    if weight is not None:
        y = y * weight.view(per_channel)
    if bias is not None:
        y = y + bias.view(per_channel)
    return y.to(x.dtype)  # as F.batch_norm's


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose batch statistics are over all processes of the default group, on CPUs
    and GPUs. forward(x, residual, relu): `bn_act`.
    """

    @property
    def group(self):
        """The process group that shares the statistics; None where this process is alone."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return dist.group.WORLD

    def count_batch(self):
        """Count a batch of training -> the weight of its statistics in the running ones."""
        if self.num_batches_tracked is None or not self.track_running_stats:
            return 0.0
        self.num_batches_tracked += 1
        if self.momentum is None:  # a plain average over all batches
            return 1 / float(self.num_batches_tracked)
        return self.momentum

    def forward(self, x, residual=None, relu=False):
        self._check_input_dim(x)
        momentum = self.count_batch() if self.training else 0.0
        return bn_act(
            x, self.weight, self.bias, residual, self.running_mean, self.running_var, relu=relu,
            training=self.training or self.running_mean is None, momentum=momentum, eps=self.eps,
            group=self.group)


# ---------------------------------------------------------------------------- Triton kernels
# in memory a time-step is (rows, C), rows = B*H*W, N = rows*C. a program's tile is BR rows by BC
# channels (64, or of fewer the next power of two): a channel's constants are loaded once, its sums
# are sums over rows. T is unrolled. TX, how many steps x has in memory, is T, or 1 where the
# current is the same at every step. C and N are run-time values.

TILE = 1024  # neurons of a program: 8 for each of 128 threads, 16 bytes in bf16
REDUCE_PROGRAMS = 4 * 132  # one wave on an H100; fixed, so that sums have one order everywhere
PART_ROWS, CHANNELS = 256, 8  # tile of the kernels that combine the parts of a reduction

if triton is not None:
    # rows of Vectors (5, C)
    MEAN, VAR = tl.constexpr(0), tl.constexpr(1)
    INV_STD = tl.constexpr(2)
    SCALE, SHIFT = tl.constexpr(3), tl.constexpr(4)

    @triton.jit
    def _tile(row, C, N, BR: tl.constexpr, BC: tl.constexpr):
        """Channels (1, BC), offsets (BR, BC) and mask (BR, BC) of the tile that begins at `row`."""
        c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
        r = row + tl.arange(0, BR)[:, None]
        offsets = r.to(tl.int64) * C + c
        return c, offsets, (offsets < N) & (c < C)

    @triton.jit
    def _row(Vectors, row, c, C):
        """Row `row` of Vectors (rows, C) for the channels c: (1, BC), fp32."""
        return tl.load(Vectors + row * C + c, c < C, 0.0).to(tl.float32)

    @triton.jit
    def _store_part(Parts, row, values, c, C):
        """Column sums of `values` (BR, BC) -> row `row` of Parts (rows, programs, C)."""
        part = row * tl.num_programs(0) + tl.program_id(0)
        sums = tl.sum(values, 0, keep_dims=True)
        tl.store(Parts + part * C + c, sums, c < C)

    @triton.jit
    def _statistics_kernel(
        X, Parts, C, N: tl.int64,
        T: tl.constexpr, TX: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    ):
        """x -> Parts (3, P, C), each of every P-th tile: sum(x - m), sum((x - m)**2), m. Shifted by
        m, the first tile's mean and the same in every program, fp32 loses no digits to a large
        mean."""
        c, offsets, inside = _tile(0, C, N, BR, BC)
        x = tl.load(X + offsets, inside, 0).to(tl.float32)
        m = tl.sum(x, 0, keep_dims=True) * (1 / BR)
        s1 = tl.zeros([BR, BC], tl.float32)
        s2 = s1
        # one wave of programs takes turns: few parts are left to combine, whatever the size
        rows = tl.cdiv(N, C).to(tl.int32)
        first, stride = tl.program_id(0) * BR, tl.num_programs(0) * BR
        for row in range(first, rows, stride):
            c, offsets, inside = _tile(row, C, N, BR, BC)
            xs = load_steps(X, N, offsets, inside, TX)
            for t in tl.static_range(TX):
                d = tl.where(inside, xs[t].to(tl.float32) - m, 0.0)
                s1 += d
                s2 += d * d
        _store_part(Parts, 0, s1, c, C)
        _store_part(Parts, 1, s2, c, C)
        _store_part(Parts, 2, m, c, C)

    @triton.jit
    def _combined(Parts, P, c, C, BP: tl.constexpr, CHANNELS: tl.constexpr):
        """Rows 0 and 1 of Parts (rows, P, C), summed over P in fp64: two of (1, CHANNELS)."""
        s1 = tl.zeros([BP, CHANNELS], tl.float64)
        s2 = s1
        for first in range(0, P, BP):
            p = first + tl.arange(0, BP)[:, None]
            inside = (p < P) & (c < C)
            s1 += tl.load(Parts + p * C + c, inside, 0.0)
            s2 += tl.load(Parts + (P + p) * C + c, inside, 0.0)
        s1 = tl.sum(s1, 0, keep_dims=True)
        s2 = tl.sum(s2, 0, keep_dims=True)
        return s1, s2

    @triton.jit(do_not_specialize=["P", "n"])
    def _vectors_kernel(
        Parts, P, C, Weight, Bias, RunningMean, RunningVar, Vectors,
        n, momentum, eps,
        BP: tl.constexpr, CHANNELS: tl.constexpr,
    ):
        """Parts (3, P, C) of n values a channel -> Vectors (5, C); updates the running statistics,
        unless they are None. Without Parts, the running statistics are used as they are."""
        c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        weight = _row(Weight, 0, c, C)
        bias = _row(Bias, 0, c, C)
        if Parts is None:
            mean = _row(RunningMean, 0, c, C)
            var = _row(RunningVar, 0, c, C)
        else:
            s1, s2 = _combined(Parts, P, c, C, BP, CHANNELS)
            offset = s1 / n  # mean - m
            mean = _row(Parts, 2 * P, c, C) + offset
            var = tl.maximum(s2 / n - offset * offset, 0.0)  # negative by rounding alone
            if RunningMean is not None:
                old_mean = _row(RunningMean, 0, c, C) * (1 - momentum)
                old_var = _row(RunningVar, 0, c, C) * (1 - momentum)
                new_mean = old_mean + mean * momentum
                new_var = old_var + var * n / (n - 1) * momentum  # unbiased
                tl.store(RunningMean + c, new_mean.to(tl.float32), c < C)
                tl.store(RunningVar + c, new_var.to(tl.float32), c < C)
        mean, var = mean.to(tl.float32), var.to(tl.float32)
        # roots and quotients exactly rounded, as in PyTorch
        std = tl.sqrt_rn(var + eps)
        inv_std = tl.div_rn(1.0, std)
        scale = tl.div_rn(weight, std)
        shift = bias - mean * scale
        tl.store(Vectors + MEAN * C + c, mean, c < C)
        tl.store(Vectors + VAR * C + c, var, c < C)
        tl.store(Vectors + INV_STD * C + c, inv_std, c < C)
        tl.store(Vectors + SCALE * C + c, scale, c < C)
        tl.store(Vectors + SHIFT * C + c, shift, c < C)

    @triton.jit(do_not_specialize=["P", "n", "ranks"])
    def _means_kernel(
        Parts, P, C, Vectors, Means, n, ranks,
        BP: tl.constexpr, CHANNELS: tl.constexpr,
    ):
        """Parts (2, P, C) -> Means (4, C): dbias/n and dweight/n/std, for dx; dbias/ranks and
        dweight/ranks, the gradients of bias and weight."""
        c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        dbias, s2 = _combined(Parts, P, c, C, BP, CHANNELS)
        inv_std = _row(Vectors, INV_STD, c, C)
        dweight = s2 * inv_std
        tl.store(Means + c, dbias / n, c < C)
        tl.store(Means + C + c, dweight / n * inv_std, c < C)
        tl.store(Means + 2 * C + c, dbias / ranks, c < C)
        tl.store(Means + 3 * C + c, dweight / ranks, c < C)

    @triton.jit
    def _forward_kernel(
        X, Residual, Y, Bits, Vectors,
        ACTIVATION: tl.constexpr, decay, v_th, lens, C, N: tl.int64,
        T: tl.constexpr, TX: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    ):
        """Reads x and the residual; writes spikes, or another activation's y, and, unless Bits is
        None, two bits per neuron-step."""
        c, offsets, inside = _tile(tl.program_id(0) * BR, C, N, BR, BC)
        xs = load_steps(X, N, offsets, inside, TX)
        if Residual is not None:
            residuals = load_steps(Residual, N, offsets, inside, T)
        # of the channel, made by _vectors_kernel: no root or division here
        scale = _row(Vectors, SCALE, c, C)
        shift = _row(Vectors, SHIFT, c, C)
        carry = tl.zeros([BR, BC], tl.float32)
        code = tl.zeros([BR, BC], tl.int32)
        for t in tl.static_range(T):
            current = xs[t % TX].to(tl.float32) * scale + shift
            if Residual is not None:
                current += residuals[t].to(tl.float32)
            if ACTIVATION == "lif":
                u, fired, window = fire(carry, current, v_th, lens)
                y = tl.where(fired, 1.0, 0.0)
                carry = u * tl.where(fired, 0.0, decay)
            elif ACTIVATION == "relu":
                # with both bits alike and decay 0, backward_step is ReLU's derivative
                fired = current > 0
                window = fired
                y = tl.where(current < 0, 0.0, current)  # a NaN stays one, as in F.relu
            else:
                y = current
            tl.store(Y + t * N + offsets, y, inside)
            if Bits is not None:
                code = pack(code, fired, window, t)
                if t % 4 == 3 or t == T - 1:
                    tl.store(Bits + t // 4 * N + offsets, code, inside)
                    code = tl.zeros([BR, BC], tl.int32)

    @triton.jit
    def _reduce_kernel(
        X, G, Bits, Vectors, Parts,
        decay, height, C, N: tl.int64,
        T: tl.constexpr, TX: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    ):
        """Reads g, bits, x -> Parts (2, P, C): sum(dcurrent), sum(dcurrent*(x - mean))."""
        c, offsets, inside = _tile(0, C, N, BR, BC)
        mean = _row(Vectors, MEAN, c, C)
        s1 = tl.zeros([BR, BC], tl.float32)
        s2 = s1
        rows = tl.cdiv(N, C).to(tl.int32)
        first, stride = tl.program_id(0) * BR, tl.num_programs(0) * BR
        for row in range(first, rows, stride):
            c, offsets, inside = _tile(row, C, N, BR, BC)
            gs = load_steps(G, N, offsets, inside, T)
            if Bits is not None:
                codes = load_steps(Bits, N, offsets, inside, (T + 3) // 4)
            xs = load_steps(X, N, offsets, inside, TX)
            # back through time; the sums of batch norm's backward on the way
            du = tl.zeros([BR, BC], tl.float32)
            for t in tl.static_range(T - 1, -1, -1):
                if Bits is None:  # no activation
                    du = gs[t].to(tl.float32)
                else:
                    du = backward_step(gs[t], du, codes[t // 4], t, decay, height)
                s1 += du
                s2 += du * (xs[t % TX].to(tl.float32) - mean)
        _store_part(Parts, 0, s1, c, C)
        _store_part(Parts, 1, s2, c, C)

    @triton.jit
    def _apply_kernel(
        X, G, Bits, Vectors, Means, DX, DResidual,
        decay, height, C, N: tl.int64,
        T: tl.constexpr, TX: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    ):
        """Reads g, bits and, unless the statistics were given (Means None), x; writes dx and,
        unless None, dresidual."""
        c, offsets, inside = _tile(tl.program_id(0) * BR, C, N, BR, BC)
        gs = load_steps(G, N, offsets, inside, T)
        if Bits is not None:
            codes = load_steps(Bits, N, offsets, inside, (T + 3) // 4)
        if Means is not None:
            xs = load_steps(X, N, offsets, inside, TX)
            mean = _row(Vectors, MEAN, c, C)
            mean_d = _row(Means, 0, c, C)
            slope = _row(Means, 1, c, C)
        scale = _row(Vectors, SCALE, c, C)
        # dcurrent once more: g and the bits read again are fewer bytes than it kept in memory
        du = tl.zeros([BR, BC], tl.float32)
        total = du
        for t in tl.static_range(T - 1, -1, -1):
            if Bits is None:  # no activation
                du = gs[t].to(tl.float32)
            else:
                du = backward_step(gs[t], du, codes[t // 4], t, decay, height)
            if DResidual is not None:
                tl.store(DResidual + t * N + offsets, du, inside)
            total += du
            if t < TX:  # of one current for all steps (TX = 1) only t = 0, the last to come
                if Means is not None:
                    total = total - mean_d - (xs[t].to(tl.float32) - mean) * slope
                tl.store(DX + t * N + offsets, total * scale, inside)
                total = tl.zeros([BR, BC], tl.float32)


def tile_shape(C, T, itemsize, reducing=False):
    """(BR, BC). All T loads of a neuron stay in registers: fewer rows where they pass 16 bytes."""
    tile = TILE
    if reducing and T == 1:  # else too few loads in flight: 2.3% of a step of stage 1 on an H200
        tile *= 2
    while tile * T * itemsize > TILE * 16:
        tile //= 2
    columns = min(64, max(16, triton.next_power_of_2(C)))
    return tile // columns, columns


def _tiles(x, T, reducing):
    """Grid and tile: a program for each tile of a time-step, or REDUCE_PROGRAMS that share them."""
    C = x.shape[-1]
    rows, columns = tile_shape(C, T, x.element_size(), reducing)
    down, across = triton.cdiv(x[0].numel(), rows * C), triton.cdiv(C, columns)
    if reducing:
        down = min(down, max(1, REDUCE_PROGRAMS // across))
    return (down, across), dict(BR=rows, BC=columns)


def _launch(kernel, x, T, *args, reducing=False):
    """Launch `kernel` on x (T, B, H, W, C), contiguous; args: its arguments between x and C."""
    grid, tile = _tiles(x, T, reducing)
    with torch.cuda.device_of(x):  # no contraction: products and sums stay apart
        kernel[grid](
            x, *args, x.shape[-1], x[0].numel(), T=T, TX=len(x), **tile,
            num_warps=4, enable_fp_fusion=False)


def _combine(kernel, parts, C, *args):
    """Launch `kernel` on parts (rows, P, C), or on None; args: its arguments after C."""
    P = 1 if parts is None else parts.shape[1]
    with torch.cuda.device_of(args[0]):
        kernel[(triton.cdiv(C, CHANNELS),)](
            parts, P, C, *args, BP=PART_ROWS, CHANNELS=CHANNELS,
            num_warps=8, enable_fp_fusion=False)


# ---------------------------------------------------------------------------- operators
# x is (T, B, H, W, C), contiguous; or (1, B, H, W, C), the same current at every step. bn_vectors
# updates the running statistics in place, and so has no derivative: it gets detached tensors, and
# bn_act's derivative includes that of the statistics.

@torch.library.custom_op(
    f"{OPS}::bn_vectors", mutates_args=("running_mean", "running_var"), schema="""(
    Tensor x, Tensor weight, Tensor bias, Tensor(a!)? running_mean, Tensor(b!)? running_var,
    float momentum, float eps, str group, SymInt ranks) -> Tensor""")
def _vectors(x, weight, bias, running_mean, running_var, momentum, eps, group, ranks):
    """Vectors (5, C) of the statistics of x on all ranks; updates the running ones, if any."""
    C = x.shape[-1]
    n = x.numel() // C  # values of a channel, on this rank
    parts = _new_parts(x, len(x), 3)
    vectors = _new_vectors(weight)
    _launch(_statistics_kernel, x, len(x), parts, reducing=True)
    if group:  # gather the means and variances of all ranks; then each rank is one part
        _combine(_vectors_kernel, parts, C, weight, bias, None, None, vectors, n, momentum, eps)
        ops = torch.ops._c10d_functional
        local = vectors[:2].clone()
        gathered = ops.wait_tensor(ops.all_gather_into_tensor(local, ranks, group))
        mean, var = gathered.view(ranks, 2, C).unbind(1)  # (ranks*2, C) -> (ranks, C)
        # about m, the first rank's mean, as the kernel's parts
        offset = mean - mean[0]
        s1, s2 = n * offset, n * (var + offset.square())
        parts = torch.stack([s1, s2, mean])  # of the last the first row alone is read
    _combine(
        _vectors_kernel, parts, C, weight, bias, running_mean, running_var, vectors,
        ranks * n, momentum, eps)
    return vectors


@torch.library.custom_op(f"{OPS}::bn_constants", mutates_args=(), schema="""(
    Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps) -> Tensor""")
def _constants(weight, bias, mean, var, eps):
    """Vectors (5, C) of given statistics."""
    vectors = _new_vectors(weight)
    _combine(_vectors_kernel, None, len(weight), weight, bias, mean, var, vectors, 1, 0.0, eps)
    return vectors


@torch.library.custom_op(f"{OPS}::bn_act", mutates_args=(), schema="""(
    Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor vectors, SymInt T,
    str activation, float decay, float v_th, float lens, bool training, str group, SymInt ranks,
    bool save) -> (Tensor, Tensor)""")
def _bn_act(
    x, residual, weight, bias, vectors, T, activation, decay, v_th, lens, training, group, ranks,
    save,
):
    """Spikes (T, B, H, W, C), or another activation's output, and bits (ceil(T/4), B, H, W, C),
    none unless `save`. activation: "lif", "relu" or "" for none. weight, bias, training, group and
    ranks are for the derivative alone."""
    refuse_forward_mode(_name(activation))
    spikes, bits = _new_outputs(x, T, activation, save)
    kept = bits if len(bits) else None
    _launch(_forward_kernel, x, T, residual, spikes, kept, vectors, activation, decay, v_th, lens)
    return spikes, bits


@torch.library.custom_op(f"{OPS}::bn_act_backward", mutates_args=(), schema="""(
    Tensor g, Tensor bits, Tensor x, Tensor vectors, float decay, float lens, bool training,
    str group, SymInt ranks, bool need_dresidual) -> (Tensor, Tensor, Tensor)""")
def _bn_act_backward(g, bits, x, vectors, decay, lens, training, group, ranks, need_dresidual):
    """dx; dresidual, empty unless needed; Means (4, C), with the gradients of bias and weight."""
    dx, dresidual, means = _new_gradients(g, x, vectors, need_dresidual)
    # two passes: the means of all values have to be known before the first dx
    parts = _new_parts(x, len(g), 2)
    n = ranks * x.numel() // x.shape[-1]  # values of a channel, on all ranks
    height = 1 / (2 * lens)  # of the surrogate
    kept = bits if len(bits) else None
    data = x, len(g), g.contiguous(), kept, vectors
    _launch(_reduce_kernel, *data, parts, decay, height, reducing=True)
    if group:
        parts = _AllReduce.apply(parts.sum(1, keepdim=True), group)  # (2, P, C) -> (2, 1, C)
    _combine(_means_kernel, parts, x.shape[-1], vectors, means, n, ranks)
    _launch(
        _apply_kernel, *data,
        means if training else None,  # constant statistics have no gradient
        dx,
        dresidual if need_dresidual else None,
        decay, height)
    return dx, dresidual, means


def _name(activation):
    return "bn_lif" if activation == "lif" else "bn_act"


def _new_parts(x, T, rows):
    (programs, _), _ = _tiles(x, T, reducing=True)
    return x.new_empty(rows, programs, x.shape[-1], dtype=torch.float32)


def _new_vectors(weight):
    return weight.new_empty(5, len(weight), dtype=torch.float32)


def _new_outputs(x, T, activation, save):
    step = x.shape[1:]
    rows = (T + 3) // 4 if save and activation else 0
    bits = x.new_empty(rows, *step, dtype=torch.uint8)
    return x.new_empty(T, *step), bits


def _new_gradients(g, x, vectors, need_dresidual):
    dx = x.new_empty(x.shape)
    steps = len(g) if need_dresidual else 0
    dresidual = g.new_empty(steps, *g.shape[1:])
    return dx, dresidual, torch.empty_like(vectors[:4])


_vectors.register_fake(lambda x, weight, *_: _new_vectors(weight))
_constants.register_fake(lambda weight, *_: _new_vectors(weight))
_bn_act.register_fake(
    lambda x, r, w, b, v, T, activation, *rest: _new_outputs(x, T, activation, save=rest[-1]))
_bn_act_backward.register_fake(lambda g, bits, x, v, *rest: _new_gradients(g, x, v, rest[-1]))


def _setup(ctx, inputs, output):
    x, residual, weight, bias, vectors, *ctx.options, ctx.saved = inputs
    # the bits; or, in a graph traced without gradients, what they are computed from again
    saved = output[1:] if ctx.saved else (residual, weight, bias)
    ctx.save_for_backward(x, vectors, *saved)
    ctx.set_materialize_grads(False)  # no tensor of zeros as the bits' gradient


def _backward(ctx, g, _):
    _, activation, decay, _, lens, training, group, ranks = ctx.options
    if torch.is_grad_enabled():  # true in a backward only with create_graph=True
        remedy = "differentiate bn_lif_reference" if activation == "lif" else "use impl='torch'"
        raise RuntimeError(f"{_name(activation)} has no second derivative: {remedy}")
    x, vectors, *saved = ctx.saved_tensors
    if ctx.saved:
        bits, = saved
    else:
        _, bits = _bn_act(x, *saved, vectors, *ctx.options, True)
    need_dresidual = ctx.needs_input_grad[1]
    dx, dresidual, means = _bn_act_backward(
        g, bits, x, vectors, decay, lens, training, group, ranks, need_dresidual)
    if not need_dresidual:
        dresidual = None
    # every rank has 1/ranks of the whole gradient: summed over the ranks it is that of the sum of
    # their losses; averaged, as DDP does, of the mean loss
    dbias, dweight = means[2:]
    return dx, dresidual, dweight, dbias, *[None] * 10  # none for the vectors and the options


_bn_act.register_autograd(_backward, setup_context=_setup)


# ---------------------------------------------------------------------------- what users call

def _check_vectors(C, n, weight, bias, running_mean, running_var, training):
    """Raise where the vectors do not fit a batch norm of C channels with n values each."""
    for vector in (weight, bias, running_mean, running_var):
        if vector is not None and vector.shape != (C,):
            raise ValueError(f"weight, bias, running statistics must be ({C},): {vector.shape}")
    if (running_mean is None) != (running_var is None) or not training and running_mean is None:
        raise ValueError("give running_mean and running_var together; training=False needs them")
    if training and n == 1:
        raise ValueError("batch statistics need more than one value a channel")


def bn_lif(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None,
    running_mean: Tensor | None = None, running_var: Tensor | None = None, *,
    training: bool = True, momentum: float = 0.1, T: int | None = None, eps: float = 1e-5,
    decay: float = 0.25, v_th: float = 0.5, lens: float = 0.5, detach_reset: bool = True,
    group=None, impl: str | None = None,
) -> Tensor:
    """Spikes of LIF neurons behind a batch norm and an optional residual add; U starts at 0.

    x             (T, B, C, H, W), dtypes as in `lif`; or, with T given, (B, C, H, W), the same at
                  each of T steps
    weight, bias, running_mean, running_var   (C,), as in F.batch_norm; float32 is best, whatever
                  the dtype of x: running statistics of 16 bits are rounded at each update
    residual      (T, B, C, H, W), added behind the batch norm; Triton casts it to x's dtype
    training      True: statistics of x over T, B, H, W (with T given over B, H, W); the running
                  ones are updated in place with weight `momentum`. False: the running ones are used
    group         a process group, over which the statistics are shared: every rank holds an x of
                  the same shape. The gradients of weight and bias, summed over the ranks, are those
                  of the whole batch
    decay, v_th, lens, detach_reset, impl   as in `lif`

    Returns spikes (T, B, C, H, W), 0 or 1, in x's dtype. Triton works in channels-last memory, and
    copies what is not. x and two bits per neuron-step are kept for the backward. On PyTorch, with
    detach_reset=False and under torch.func it is F.batch_norm, the add and `lif`. Raises as `lif`,
    and ValueError for shapes that do not fit.
    """
    steps = len(x) if T is None else T
    if x.dim() == 4 and steps > 0 and T is not None:
        x = x.unsqueeze(0)  # (B, C, H, W) -> (1, B, C, H, W)
    elif x.dim() != 5 or steps < 1 or len(x) != steps:
        raise ValueError(f"x {tuple(x.shape)} is not (T, B, C, H, W), T = {T}, nor (B, C, H, W)")
    check(x, decay, v_th, lens)
    impl = choose_impl(x, steps, impl)
    shape = (steps, *x.shape[1:])
    C = x.shape[2]
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual must be {shape}, not {tuple(residual.shape)}")
    if weight is None or bias is None:
        raise ValueError("bn_lif needs a weight and a bias")
    n = x.numel() // C * (1 if group is None else group.size())  # values a channel
    _check_vectors(C, n, weight, bias, running_mean, running_var, training)

    if impl == "triton" and detach_reset and n > 0 and not transformed():
        return _fused(x, residual, weight, bias, running_mean, running_var, training, momentum, eps,
                      group, steps, "lif", decay, v_th, lens)
    # in three calls, the current in fp32 (fp64), of vectors of 16 bits, too
    acc = state_dtype(x)
    mean, var = running_mean, running_var
    if mean is not None:
        mean, var = mean.to(acc), var.to(acc)  # of fp32 the tensors themselves
    folded = x.flatten(0, 1).to(acc)  # (T, B, C, H, W) -> (T*B, C, H, W)
    current = batch_norm(
        folded, mean, var, weight.to(acc), bias.to(acc), training, momentum, eps, group)
    if training and mean is not None and mean.dtype != running_mean.dtype:
        running_mean.copy_(mean)
        running_var.copy_(var)
    current = current.unflatten(0, x.shape[:2]).expand(shape)  # -> (T, B, C, H, W)
    if residual is not None:
        current = current + residual
    return lif(current, decay, v_th, lens, detach_reset, impl).to(x.dtype)


def bn_act(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None,
    running_mean: Tensor | None = None, running_var: Tensor | None = None, *,
    relu: bool = True, training: bool = True, momentum: float = 0.1, eps: float = 1e-5, group=None,
    impl: str | None = None,
) -> Tensor:
    """relu(batch norm(x) + residual), as behind a teacher's convolution; relu=False: no ReLU.

    x, residual   (B, C, H, W), dtypes as in `lif`
    all else      as in `bn_lif`, with statistics over B, H, W

    Returns (B, C, H, W) in x's dtype. Triton keeps x for the backward and, for a ReLU, a byte a
    neuron; it has no second derivative. On PyTorch, under torch.func and without weight or bias
    (None) it is F.batch_norm, the add and F.relu. Raises TypeError for other dtypes, ValueError for
    shapes that do not fit.
    """
    check_dtype(x)
    if x.dim() != 4:
        raise ValueError(f"x must be (B, C, H, W), not {tuple(x.shape)}")
    B, C, H, W = x.shape
    n = B * H * W * (1 if group is None else group.size())  # values a channel
    _check_vectors(C, n, weight, bias, running_mean, running_var, training)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {tuple(x.shape)}, not {tuple(residual.shape)}")
    fused = choose_impl(x, 1, impl) == "triton" and weight is not None and bias is not None
    if fused and n > 0 and not transformed():
        if residual is not None:
            residual = residual.unsqueeze(0)
        y = _fused(
            x.unsqueeze(0), residual, weight, bias, running_mean, running_var, training, momentum,
            eps, group, 1, "relu" if relu else "", decay=0.0, v_th=0.0, lens=0.5)  # height 1
        return y.squeeze(0)
    y = batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps, group)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return F.relu(y) if relu else y


def _fused(x, residual, weight, bias, mean, var, training, momentum, eps, group, T, activation,
           decay, v_th, lens):
    """Batch norm, add and activation on Triton: x (T or 1, B, C, H, W) -> (T, B, C, H, W)."""
    refuse_forward_mode(_name(activation))  # before running statistics change
    x = x.permute(0, 1, 3, 4, 2).contiguous()  # -> (T, B, H, W, C), of channels-last a view
    if residual is not None:
        residual = residual.to(x.dtype).permute(0, 1, 3, 4, 2).contiguous()
    name, ranks = "", 1
    if group is not None and group.size() > 1 and training:  # there is something to share
        name, ranks = group.group_name, group.size()
    constants = weight.detach(), bias.detach(), mean, var  # their derivative is _bn_act's
    if training:
        vectors = _vectors(x.detach(), *constants, momentum, eps, name, ranks)
    else:
        vectors = _constants(*constants, eps)
    inputs = x, residual, weight, bias
    differentiable = any(v is not None and v.requires_grad for v in inputs)
    save = torch.is_grad_enabled() and differentiable
    y, _ = _bn_act(
        *inputs, vectors, T, activation, decay, v_th, lens, training, name, ranks, save)
    return y.permute(0, 1, 4, 2, 3)  # -> (T, B, C, H, W)
