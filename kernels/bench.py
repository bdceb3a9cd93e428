"""Check, then time, the fused neurons against their peers: python -m kernels.bench [--json FILE]

First every contestant must compute the same spikes in fp32. Then forward alone and forward +
backward are timed at the layer shapes of Spiking ResNet-18, channels-last as a convolution leaves
them; the batch makes the tensors several times larger than the cache. The contestants:

    lif      the neuron alone:        ours, SpikingJelly, snnTorch, the loop over t, that compiled
    bn_lif   batch norm + add + LIF:  ours, the same in three calls, and the peers behind batch norm

SpikingJelly runs LIFNode on the back end that it chooses, with PiecewiseQuadratic, the cheapest
surrogate that its fused kernels know (ours, the rectangle, they do not); snnTorch runs Leaky with
its fast sigmoid. "% of copy" sets the least bytes that our kernels can move for the work, over the
time measured, against a plain copy of a large tensor: it says the same of every contestant.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils import benchmark

from kernels import bn_lif, lif
from kernels.lif import lif_reference

DECAY, V_TH, LENS = 0.25, 0.5, 0.5  # of the authors' code, as everywhere
LAYERS = ((64, 32), (128, 16), (256, 8), (512, 4))  # channels, height = width of stages 1 to 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_CACHE = 32 << 20  # bytes; PyTorch does not tell a CPU's
ROUNDING = 1e-4  # share of fp32 spikes that another order of operations may flip


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        self.exit(2, f"{self.prog}: {message}\n")


def parse_args(argv=None):
    p = Parser(prog="python -m kernels.bench", description="check and time the fused neurons")
    gpu = torch.cuda.is_available()
    p.add_argument("--neuron", choices=("lif", "bn_lif"), help="time this one alone")
    p.add_argument("--T", type=int, default=4, help="time-steps, 1 to 32 (default 4)")
    p.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--batch", type=int, help="images at stage 1's shape, and twice, 4, 8 times as "
                   "many at those of stages 2 to 4 (default: several times the cache)")
    p.add_argument("--seconds", type=float, default=0.2, help="for each figure (default 0.2)")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    p.add_argument("--json", metavar="FILE", help="write every figure to FILE")
    args = p.parse_args(argv)

    # a wrong value costs a line here, not a quarter of an hour later
    if args.device == "cuda" and not gpu:
        p.error("argument --device: cuda asked for, and PyTorch sees no GPU")
    if not 1 <= args.T <= 32:
        p.error(f"argument --T: {args.T}: must be from 1 to 32")
    if args.batch is not None and args.batch < 1:
        p.error(f"argument --batch: {args.batch}: must be 1 or more")
    if not 0 < args.seconds <= 60:
        p.error(f"argument --seconds: {args.seconds}: must be above 0 and up to 60")
    if args.json and (Path(args.json).is_dir() or not Path(args.json).absolute().parent.is_dir()):
        p.error(f"argument --json: {args.json}: must be a file in a folder that exists")

    args.device = torch.device(args.device)
    if args.dtype is None:
        args.dtype = "bf16" if args.device.type == "cuda" else "fp32"
    if args.batch is None:
        args.batch = batch_beyond_cache(args)
    return args


def batch_beyond_cache(args):
    """The power of two with which the tensors of a case are several times as large as the cache."""
    # on a CPU all together, each below the 32 MiB from which malloc maps memory anew every time:
    # that would measure page faults
    wanted = CPU_CACHE // 2
    if args.device.type == "cuda":
        wanted = 4 * torch.cuda.get_device_properties(args.device).L2_cache_size
    C, size = LAYERS[0]
    image = args.T * C * size * size * DTYPES[args.dtype].itemsize  # bytes
    return 2 ** max(0, math.ceil(math.log2(wanted / image)))


# ------------------------------------------------------------------------------------- contestants
# a neuron maps the current (T, ...) to spikes, from rest. a contestant is what stands behind a
# convolution: (x, residual, weight, bias) -> spikes (T, B, C, H, W)

def our_lif(x):
    return lif(x, DECAY, V_TH, LENS)


def our_bn_lif(x, residual, weight, bias):
    return bn_lif(x, weight, bias, residual, decay=DECAY, v_th=V_TH, lens=LENS)


def loop_over_t(x):
    return lif_reference(x, DECAY, V_TH, LENS)


def spikingjelly():
    """SpikingJelly's LIF. It fires at u >= threshold, so it gets the next number above ours."""
    from spikingjelly.activation_based import neuron, surrogate

    v_th = torch.nextafter(torch.tensor(V_TH), torch.tensor(2.0)).item()
    # it knows the decay as 1 - 1/tau, and would scale the input by 1/tau too
    node = neuron.LIFNode(tau=1 / (1 - DECAY), decay_input=False, v_threshold=v_th, v_reset=0.0,
                          surrogate_function=surrogate.PiecewiseQuadratic(), detach_reset=True,
                          step_mode="m")

    def run(x):
        spikes = node(x)
        node.reset()  # its potential, and all that autograd holds with it, would outlive the call
        return spikes
    return run


def spikingjelly_backend(device):
    """Which of its implementations (cuda, triton, torch) SpikingJelly took when it ran."""
    if device.type == "cpu":
        return "torch"
    # no public name tells; its log does, and this is what the log reads
    from spikingjelly._ops.lif import _selection as selection

    return ", ".join({taken.name for taken in selection._selections.values() if taken}) or "torch"


def snntorch():
    """snnTorch's LIF, which has no multi-step form."""
    import snntorch as snn

    node = snn.Leaky(beta=DECAY, threshold=V_TH, reset_mechanism="zero", reset_delay=False,
                     spike_grad=snn.surrogate.fast_sigmoid())

    def run(x):
        node.to(x.device)
        u, spikes = torch.zeros_like(x[0]), []
        for x_t in x:
            f, u = node(x_t, u)
            spikes.append(f)
        return torch.stack(spikes)
    return run


def alone(neuron):
    def contestant(x, residual, weight, bias):
        return neuron(x)
    return contestant


def behind_batch_norm(neuron):
    def contestant(x, residual, weight, bias):
        T = x.shape[0]
        x = x.flatten(0, 1)  # (T, B, C, H, W) -> (T*B, C, H, W): statistics over T, B, H, W
        x = F.batch_norm(x, None, None, weight, bias, training=True)
        return neuron(x.unflatten(0, (T, -1)) + residual)  # -> (T, B, C, H, W)
    return contestant


def contestants(neuron, compiled):
    """{name: contestant}, ours first; a peer that is not installed is left out."""
    if neuron == "lif":
        place = alone
        found = {"ours": alone(our_lif)}
    else:
        place = behind_batch_norm
        found = {"ours": our_bn_lif, "batch norm, add, our lif": behind_batch_norm(our_lif)}
    for name, make in (("SpikingJelly", spikingjelly), ("snnTorch", snntorch)):
        if importlib.util.find_spec(name.lower()):
            found[name] = place(make())
    found["loop over t"] = place(loop_over_t)
    if compiled:
        # Inductor sees T steps unrolled and fuses them, with the add and half of the batch norm
        found["torch.compile"] = torch.compile(place(loop_over_t), dynamic=False)
    return found


# ---------------------------------------------------------------------------------------- measuring

def random_current(T, B, C, size, dtype, device):
    """What a convolution of T*B images leaves: channels-last memory, (T, B, C, H, W)."""
    x = torch.randn(T * B, C, size, size, dtype=dtype, device=device)
    return x.contiguous(memory_format=torch.channels_last).unflatten(0, (T, B))


def random_inputs(T, B, C, size, dtype, device):
    """x, residual, weight, bias: what a contestant takes. Weight and bias stay fp32 in training."""
    x, residual = (random_current(T, B, C, size, dtype, device).requires_grad_() for _ in range(2))
    weight = (1 + 0.2 * torch.randn(C, device=device)).requires_grad_()
    bias = (0.2 * torch.randn(C, device=device)).requires_grad_()
    return x, residual, weight, bias


@torch.no_grad()
def check(neuron, args):
    """Compare all contestants in fp32 with the specification: {name: share that differs}.

    Ends the program where a share is no matter of rounding: then they are not the same neuron.
    """
    found = contestants(neuron, compiled=not args.no_compile)
    C, size = LAYERS[0]
    inputs = random_inputs(args.T, 4, C, size, torch.float32, args.device)
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


def cpu_clock():
    """One thread's own time, which other programs do not lengthen; of several, the wall's."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def milliseconds(call, device, seconds):
    """(median time of one call in ms, "graph" or "eager").

    On a GPU from a CUDA graph of many calls, so that launches do not count.
    """
    if device.type == "cpu":
        timer = benchmark.Timer("call()", globals=dict(call=call), timer=cpu_clock(),
                                num_threads=torch.get_num_threads())
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
    """Bytes read plus bytes written per second by a copy that is far larger than the cache."""
    size = 1 << 30 if device.type == "cuda" else 1 << 28  # bytes
    source = torch.zeros(size // 4, device=device)  # written, so that its pages are its own
    target = torch.zeros_like(source)
    ms, _ = milliseconds(lambda: target.copy_(source), device, seconds)
    return 2 * size / (ms / 1e3)


def saved_bytes(run, inputs):
    """Bytes that autograd keeps for the backward, the inputs themselves left out."""
    known = {t.untyped_storage().data_ptr() for t in inputs}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        spikes = run(*inputs)
    del spikes  # alive until here, so that no address was given out twice
    return sum(kept.values())


def least_bytes(neuron, itemsize):
    """Least traffic per neuron-step: (forward, forward + backward). Two bits are 0.25 bytes."""
    if neuron == "lif":
        forward = 2 * itemsize + 0.25  # x, spikes, bits
        backward = 2 * itemsize + 0.25  # g, bits, dx
    else:
        forward = itemsize + 3 * itemsize + 0.25  # x: statistics; x, residual, spikes, bits
        reduce = 2 * itemsize + 0.25  # g, bits, x: the two sums over a channel
        backward = reduce + 4 * itemsize + 0.25  # g, bits, x, dx, dresidual
    return forward, forward + backward


def measure(neuron, layer, args, copy):
    """Time every contestant at one layer's shape; a list of rows (plain dicts), ours first."""
    C, size = layer
    B = args.batch * C // LAYERS[0][0]  # as many neurons in every stage
    inputs = random_inputs(args.T, B, C, size, DTYPES[args.dtype], args.device)
    g = random_current(args.T, B, C, size, DTYPES[args.dtype], args.device)
    wanted = inputs[:1] if neuron == "lif" else inputs  # autograd computes no other gradient
    least = least_bytes(neuron, g.element_size())
    found = contestants(neuron, compiled=not args.no_compile)

    rows = []
    for name, run in found.items():
        row = dict(neuron=neuron, name=name, shape=list(g.shape), dtype=args.dtype)
        rows.append(row)

        def forward():
            with torch.no_grad():
                run(*inputs)

        def both():
            torch.autograd.grad(run(*inputs), wanted, g)

        try:
            row["saved"] = saved_bytes(run, inputs) / g.numel()
            for key, call, needed in (("forward", forward, least[0]), ("both", both, least[1])):
                call()  # what is compiled is compiled now
                ms, how = milliseconds(call, args.device, args.seconds)
                speed = needed * g.numel() / (ms / 1e3)  # bytes per second
                row[key] = dict(ms=ms, how=how, bytes_per_s=speed, share_of_copy=speed / copy)
        except Exception as error:  # that a peer fails is a result; that we fail is not
            if name == "ours":
                raise
            row["failed"] = f"{type(error).__name__}: {error}"
    torch.compiler.reset()  # the next shape is compiled for itself
    return rows


# ------------------------------------------------------------------------------------------- output

def table(groups):
    """One line a layer: our figures, then how many times as long each peer takes."""
    first = groups[0]
    title = (f"{first[0]['neuron']}, {first[0]['dtype']}, T = {first[0]['shape'][0]}; the last "
             "columns: a peer's time over ours, forward / forward + backward")
    t = Table(title=title, box=box.MARKDOWN, title_justify="left")
    for column in ("B, C, H, W", "forward ms", "% of copy", "both ms", "GB/s", "% of copy",
                   "saved", *[row["name"] for row in first[1:]]):  # saved: bytes a neuron-step
        t.add_column(column, justify="right")
    for ours, *peers in groups:
        forward, both = ours["forward"], ours["both"]
        ratios = []
        for peer in peers:
            if "failed" in peer:
                ratios.append("failed")
                continue
            ratio = [peer[key]["ms"] / ours[key]["ms"] for key in ("forward", "both")]
            ratios.append("{:.2f} / {:.2f}".format(*ratio))
        t.add_row(", ".join(map(str, ours["shape"][1:])),
                  f"{forward['ms']:.3g}", f"{100 * forward['share_of_copy']:.0f}",
                  f"{both['ms']:.3g}", f"{both['bytes_per_s'] / 1e9:.0f}",
                  f"{100 * both['share_of_copy']:.0f}", f"{ours['saved']:.2f}", *ratios)
    return t


def versions():
    """Of what is compared; a peer that is not installed has none."""
    names = ("torch", "triton", "spikingjelly", "snntorch")
    installed = [name for name in names if importlib.util.find_spec(name)]
    return {name: importlib.metadata.version(name) for name in installed}


def main(argv=None):
    args = parse_args(argv)
    # a table for a README is not folded to the width of a terminal that isn't there
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    torch.manual_seed(0)
    argv = sys.argv[1:] if argv is None else argv
    device = "cpu"
    if args.device.type == "cuda":
        device = torch.cuda.get_device_name()
    result = dict(command=" ".join(["python -m kernels.bench", *argv]), device=device,
                  threads=torch.get_num_threads(), versions=versions())
    console.print(f"{device}, {result['threads']} threads, {result['versions']}")
    if args.device.type == "cpu":
        console.print("no GPU: PyTorch's paths; this says nothing about the Triton kernels")

    # the same spikes first, or no timing
    neurons = [args.neuron] if args.neuron else ["lif", "bn_lif"]
    result["differ_fp32"] = {neuron: check(neuron, args) for neuron in neurons}
    for neuron, shares in result["differ_fp32"].items():
        text = ", ".join(f"{name} {share:.1e}" for name, share in shares.items())
        console.print(f"{neuron}, share of fp32 spikes that differ from the specification: {text}")
    if "spikingjelly" in result["versions"]:
        result["spikingjelly"] = f"PiecewiseQuadratic, back end {spikingjelly_backend(args.device)}"
        console.print(f"SpikingJelly: {result['spikingjelly']}")

    # what the memory can do at best, then every layer
    result["copy_bytes_per_s"] = copy_speed(args.device, args.seconds)
    console.print(f"plain copy: {result['copy_bytes_per_s'] / 1e9:.1f} GB/s read + written\n")
    result["rows"] = []
    for neuron in neurons:
        groups = [measure(neuron, layer, args, result["copy_bytes_per_s"]) for layer in LAYERS]
        console.print(table(groups))
        rows = sum(groups, [])
        result["rows"] += rows
        for row in rows:
            if "failed" in row:
                console.print(f"{row['name']} at {row['shape']}: {row['failed']}")
        if args.json:  # after each neuron: the first one's figures survive the second's failure
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
