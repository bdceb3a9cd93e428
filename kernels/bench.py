"""Check, then time, the fused neurons against their peers: python -m kernels.bench [--json FILE]

First every contestant must compute the same spikes in fp32. Then forward alone and forward +
backward are timed at the layer shapes of Spiking ResNet-18, channels-last as a convolution leaves
them; the batch makes the tensors several times larger than the cache. The contestants:

    lif      the neuron alone:        ours, SpikingJelly, snnTorch, the loop over t, that compiled
    bn_lif   batch norm + add + LIF:  ours, the same in three calls, and the peers behind batch norm

SpikingJelly runs the function behind LIFNode: with PiecewiseQuadratic, the cheapest surrogate that
its fused kernels support (they lack ours, the rectangle); with an fp32 potential, because without
one it silently falls back to a loop; and in the faster of channels-last and contiguous layout.
snnTorch runs Leaky with its fast sigmoid. "% of copy" is the least number of bytes that our kernels
can move for the work, over the time measured, relative to a copy kernel on a large tensor; the
bytes are the same for every contestant.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils import benchmark

from . import bn_lif, lif
from .lif import lif_reference

NEURON = dict(decay=0.25, v_th=0.5, lens=0.5)  # of the authors' code, as everywhere
LAYERS = ((64, 32), (128, 16), (256, 8), (512, 4))  # channels, height = width of stages 1 to 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_CACHE = 32 << 20  # bytes; PyTorch does not tell a CPU's
ROUNDING = 1e-4  # share of fp32 spikes that another order of operations may flip


def parse_args(argv=None):
    p = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="time the fused neurons")
    gpu = torch.cuda.is_available()
    p.add_argument("--neuron", choices=("lif", "bn_lif"), help="time this one alone")
    p.add_argument("--T", type=int, choices=range(1, 33), default=4, metavar="1..32",
                   help="time-steps (default 4)")
    p.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--batch", type=int, help="images at stage 1's shape, and twice, 4, 8 times as "
                   "many at those of stages 2 to 4 (default: several times the cache)")
    p.add_argument("--seconds", type=float, default=0.2, help="for each figure (default 0.2)")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    p.add_argument("--json", metavar="FILE", help="write every figure")
    args = p.parse_args(argv)
    if args.batch is not None and args.batch < 1:
        p.error(f"argument --batch: {args.batch}: must be at least 1")
    if not args.seconds > 0:
        p.error(f"argument --seconds: {args.seconds}: must be above 0")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        p.error(f"argument --json: {args.json}: must be a file in a folder that exists")
    if args.device == "cuda" and not gpu:
        p.error("argument --device: cuda, but PyTorch sees no GPU")
    args.device = torch.device(args.device)
    args.dtype = args.dtype or {"cuda": "bf16", "cpu": "fp32"}[args.device.type]
    args.batch = args.batch or batch_beyond_cache(args)
    return args


def batch_beyond_cache(args):
    """The power of two with which the tensors of a case are several times as large as the cache."""
    # on a CPU all together, each below 32 MiB, from which malloc maps memory every time
    wanted = CPU_CACHE // 2
    if args.device.type == "cuda":
        wanted = 4 * torch.cuda.get_device_properties(args.device).L2_cache_size
    C, size = LAYERS[0]
    image = args.T * C * size * size * DTYPES[args.dtype].itemsize  # bytes
    return 2 ** max(0, math.ceil(math.log2(wanted / image)))


# ------------------------------------------------------------------------------------- contestants
# a neuron maps the current (T, ...) to spikes, from rest. a contestant is what stands behind a
# convolution: (x, residual, weight, bias) -> spikes (T, B, C, H, W)

our_lif = partial(lif, **NEURON)
loop_over_t = partial(lif_reference, **NEURON)


def our_bn_lif(x, residual, weight, bias):
    return bn_lif(x, weight, bias, residual, **NEURON)


def spikingjelly():
    """SpikingJelly's LIF. It fires at u >= threshold, so it gets the next number above ours."""
    from spikingjelly.activation_based import functional, surrogate

    v_th = torch.nextafter(torch.tensor(NEURON["v_th"]), torch.tensor(2.0)).item()
    # it knows the decay as 1 - 1/tau, and would scale the input by 1/tau too
    neuron = dict(tau=1 / (1 - NEURON["decay"]), decay_input=False, v_threshold=v_th, v_reset=0.0,
                  surrogate_function=surrogate.PiecewiseQuadratic(), detach_reset=True)

    def run(x):
        # LIFNode casts its potential to x's dtype, which in bf16 its fused kernels do not take
        v = torch.zeros_like(x[0], dtype=torch.float32)
        return functional.lif_multi_step(x, v, **neuron)[0]
    return run


def spikingjelly_backend(device):
    """What SpikingJelly ran (cuda, triton, torch), so far: to be asked after the timed call."""
    if device.type == "cpu":
        return "torch"
    # what its log reads; a key with a reason is of a call that fell back to the loop in PyTorch
    from spikingjelly._ops.lif import _selection

    taken = _selection._selections
    reasons = [f"torch ({key[1]})" for key in taken if isinstance(key, tuple)]
    return ", ".join(reasons + [found.name for found in taken.values() if found])


def snntorch():
    """snnTorch's LIF, which has no multi-step form."""
    import snntorch as snn
    node = snn.Leaky(beta=NEURON["decay"], threshold=NEURON["v_th"], reset_mechanism="zero",
                     reset_delay=False, spike_grad=snn.surrogate.fast_sigmoid())

    def run(x):
        node.to(x.device)
        u, spikes = torch.zeros_like(x[0]), []
        for x_t in x:
            f, u = node(x_t, u)
            spikes.append(f)
        return torch.stack(spikes)
    return run


def alone(neuron):
    return lambda x, residual, weight, bias: neuron(x)


def behind_batch_norm(neuron):
    def contestant(x, residual, weight, bias):
        folded = x.flatten(0, 1)  # (T, B, C, H, W) -> (T*B, C, H, W): statistics over T, B, H, W
        folded = F.batch_norm(folded, None, None, weight, bias, training=True)
        return neuron(folded.view_as(x) + residual)
    return contestant


def contestants(neuron, compiled):
    """{name: contestant}, ours first; a peer that is not installed is left out."""
    place, found = alone, {"ours": alone(our_lif)}
    if neuron == "bn_lif":
        place = behind_batch_norm
        found = {"ours": our_bn_lif, "batch norm, add, our lif": place(our_lif)}
    for name, make in dict(SpikingJelly=spikingjelly, snnTorch=snntorch).items():
        if importlib.util.find_spec(name.lower()):
            found[name] = place(make())
    found["loop over t"] = place(loop_over_t)
    if compiled:
        # Inductor sees T steps unrolled and fuses them, with the add and half of the batch norm
        found["torch.compile"] = torch.compile(place(loop_over_t), dynamic=False)
    return found


# --------------------------------------------------------------------------------------- measuring

def random_current(T, B, C, size, dtype, device):
    """What a convolution of T*B images leaves: channels-last memory, (T, B, C, H, W)."""
    x = torch.randn(T * B, C, size, size, dtype=dtype, device=device)
    return x.contiguous(memory_format=torch.channels_last).unflatten(0, (T, B))


def random_inputs(T, B, C, size, dtype, device):
    """x, residual, weight, bias: what a contestant takes. Weight and bias stay fp32 in training."""
    x, residual = (random_current(T, B, C, size, dtype, device) for _ in range(2))
    weight, bias = 0.2 * torch.randn(2, C, device=device)
    return [tensor.requires_grad_() for tensor in (x, residual, 1 + weight, bias.clone())]


@torch.no_grad()
def check(neuron, args):
    """{name: share of a contestant's fp32 spikes that differ from the specification}; ends the
    program where that is no matter of rounding: then they are not the same neuron."""
    found = contestants(neuron, compiled=not args.no_compile)
    inputs = random_inputs(args.T, 4, *LAYERS[0], torch.float32, args.device)
    specified = found["loop over t"](*inputs)
    shares = {}
    for name, run in found.items():
        shares[name] = (run(*inputs) != specified).float().mean().item()
        # behind batch norm the order of its sums may flip a spike; the bare neuron is exact
        allowed = 0 if (neuron, name) == ("lif", "ours") else ROUNDING
        if shares[name] > allowed:
            sys.exit(f"{neuron}, {name}: {shares[name]:.1e} of the fp32 spikes differ from the "
                     "specification: not the same neuron, nothing was timed")
    return shares


def milliseconds(call, device, seconds):
    """(median time of a call in ms, "graph" or "eager"); on a GPU launches do not count."""
    call()  # what is compiled is compiled now
    if device.type == "cpu":
        # one thread's own time, which other programs do not lengthen; of several, the wall's
        threads = torch.get_num_threads()
        clock = time.process_time if threads == 1 else time.perf_counter
        timer = benchmark.Timer("call()", globals=dict(call=call), timer=clock, num_threads=threads)
        return 1e3 * timer.blocked_autorange(min_run_time=seconds).median, "eager"

    from triton.testing import do_bench, do_bench_cudagraph

    try:  # it replays its graph ten times
        return do_bench_cudagraph(call, rep=100 * seconds, return_mode="median"), "graph"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a peer that synchronises cannot be recorded: its launches count
        torch.cuda.synchronize()
        return do_bench(call, rep=1000 * seconds, return_mode="median"), "eager"


def copy_speed(device, seconds):
    """Bytes read plus written per second by a kernel on what is far larger than the cache."""
    size = 1 << 30 if device.type == "cuda" else 1 << 28  # bytes
    source = torch.zeros(size // 4, device=device)  # written, so that its pages are its own
    target = torch.zeros_like(source)
    # copy_ would be recorded as a memcpy node, which is slower than kernels are
    ms, _ = milliseconds(lambda: torch.add(source, 0, out=target), device, seconds)
    return 2e3 * size / ms


def saved_bytes(run, inputs):
    """Bytes that autograd keeps for the backward, the inputs themselves left out."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        spikes = run(*inputs)
    del spikes  # alive until here, so that no address was given out twice
    known = [tensor.untyped_storage().data_ptr() for tensor in inputs]
    return sum(size for address, size in kept.items() if address not in known)


def least_bytes(neuron, itemsize):
    """Least traffic per neuron-step: (forward, forward + backward). Two bits are 0.25 bytes."""
    if neuron == "lif":  # x, spikes, bits; g, bits, dx
        return 2 * itemsize + 0.25, 4 * itemsize + 0.5
    forward = itemsize + 3 * itemsize + 0.25  # x: statistics; x, residual, spikes, bits
    reduce = 2 * itemsize + 0.25  # g, bits, x: the two sums over a channel
    return forward, forward + reduce + 4 * itemsize + 0.25  # g, bits, x, dx, dresidual


def timed(run, inputs, count, g, args):
    """Milliseconds, and how they were measured, {forward, both}: with `count` inputs' gradients."""
    def both():
        torch.autograd.grad(run(*inputs), inputs[:count], g)

    forward = torch.no_grad()(lambda: run(*inputs))
    calls = dict(forward=forward, both=both)
    return {key: milliseconds(call, args.device, args.seconds) for key, call in calls.items()}


def measure(neuron, layer, args, copy):
    """Time every contestant at one layer's shape."""
    C, size = layer
    B = args.batch * C // LAYERS[0][0]  # as many neurons in every stage
    shape = args.T, B, C, size, DTYPES[args.dtype], args.device
    inputs, g = random_inputs(*shape), random_current(*shape)
    count = 1 if neuron == "lif" else 4  # autograd computes no other gradient
    least = dict(zip(("forward", "both"), least_bytes(neuron, g.element_size())))
    rows = []  # of plain dicts, ours first
    for name, run in contestants(neuron, compiled=not args.no_compile).items():
        rows.append(row := dict(neuron=neuron, name=name, shape=list(g.shape), dtype=args.dtype))
        try:
            row["saved"] = saved_bytes(run, inputs) / g.numel()
            times = timed(run, inputs, count, g, args)
            if name == "SpikingJelly":  # which layout its kernels prefer, it does not say
                dense = [t.detach().contiguous().requires_grad_() for t in inputs]
                other = timed(run, dense, count, g.contiguous(), args)
                row["layout"] = "channels-last"
                if other["both"] < times["both"]:
                    times, row["layout"] = other, "contiguous"
                row["backend"] = spikingjelly_backend(args.device)
        except Exception as error:  # that a peer fails is a result; that we fail is not
            if name == "ours":
                raise
            row["failed"] = f"{type(error).__name__}: {error}"
            continue
        for key, (ms, how) in times.items():
            speed = least[key] * g.numel() / (ms / 1e3)  # bytes per second
            row[key] = dict(ms=ms, how=how, bytes_per_s=speed, share_of_copy=speed / copy)
    torch.compiler.reset()  # the next shape is compiled for itself
    return rows


# ------------------------------------------------------------------------------------------ output

def table(groups):
    """One line a layer: our figures, then how many times as long each peer takes."""
    first, *peers = groups[0]
    title = (f"{first['neuron']}, {first['dtype']}, T = {first['shape'][0]}; the last columns: "
             "a peer's time over ours, forward / forward + backward")
    t = Table(title=title, box=box.MARKDOWN, title_justify="left")
    for column in ("B, C, H, W", "forward ms", "% of copy", "both ms", "GB/s", "% of copy",
                   "saved", *[peer["name"] for peer in peers]):  # saved: bytes a neuron-step
        t.add_column(column, justify="right")
    for ours, *peers in groups:
        forward, both = ours["forward"], ours["both"]
        cells = [", ".join(map(str, ours["shape"][1:])), f"{forward['ms']:.3g}",
                 f"{100 * forward['share_of_copy']:.0f}", f"{both['ms']:.3g}",
                 f"{both['bytes_per_s'] / 1e9:.0f}", f"{100 * both['share_of_copy']:.0f}",
                 f"{ours['saved']:.2f}"]
        for peer in peers:
            ratios = [f"{peer[key]['ms'] / ours[key]['ms']:.2f}"
                      for key in ("forward", "both") if key in peer]
            cells.append(" / ".join(ratios) or "failed")
        t.add_row(*cells)  # peers: forward / both
    return t


def main(argv=None):
    args = parse_args(argv)
    # not folded to the width of a terminal that isn't there
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    torch.manual_seed(0)
    device = "cpu, which says nothing about the Triton kernels"
    if args.device.type == "cuda":
        device = torch.cuda.get_device_name()
    names = filter(importlib.util.find_spec, ("torch", "triton", "spikingjelly", "snntorch"))
    versions = {name: importlib.metadata.version(name) for name in names}
    result = dict(argv=argv or sys.argv[1:], device=device, threads=torch.get_num_threads(),
                  versions=versions)

    # the same spikes first, or no timing
    neurons = [args.neuron] if args.neuron else ("lif", "bn_lif")
    result["differ_fp32"] = {neuron: check(neuron, args) for neuron in neurons}
    result["copy_bytes_per_s"] = copy_speed(args.device, args.seconds)
    for key, value in result.items():
        console.print(f"{key}: {value}")

    result["rows"] = []
    for neuron in neurons:
        groups = [measure(neuron, layer, args, result["copy_bytes_per_s"]) for layer in LAYERS]
        console.print(table(groups))
        for row in sum(groups, []):
            result["rows"].append(row)
            for key in {"backend", "layout", "failed"} & row.keys():
                console.print(f"{row['name']} at {row['shape']}, {key}: {row[key]}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
