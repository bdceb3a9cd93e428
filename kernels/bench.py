"""Check, then time, the fused neurons against their peers: python -m kernels.bench [--json FILE]

First every contestant's spikes are compared with ours on the inputs that will be timed; ours, in fp32, must equal the
specification's. Then forward alone and forward + backward are timed, on inputs rotated so that none is left in the
cache, at the layer shapes of Spiking ResNet-18 and at one size far above the cache, and last one training step of the
whole network. Contestants: SpikingJelly (its own choice of CUDA, Triton or PyTorch, named in the table), snnTorch, the
loop over t that the authors write, and torch.compile of that loop; what isn't installed is said and left out.

Bytes are the least that our kernels can move for the work; "% of copy" sets those bytes, over the time measured,
against a plain copy of a large tensor on the same device, so the number says the same of every contestant.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table

from kernels import bn_lif, lif
from kernels.bn_lif import bn_lif_reference
from kernels.lif import choose_impl, lif_reference

DECAY, V_TH, LENS = 0.25, 0.5, 0.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYERS = ((64, 32), (128, 16), (256, 8), (512, 4))  # channels, height = width
ITEM = {"fp32": 4, "bf16": 2, "fp16": 2}


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        self.exit(2, f"{self.prog}: {message}\n")


def parse_args(argv=None):
    parser = Parser(prog="python -m kernels.bench", description="check and time the fused neurons")
    parser.add_argument("--json", metavar="FILE", help="write every number to FILE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1 or cpu")
    parser.add_argument("--T", type=int, nargs="+", metavar="T", help="time-steps (default 4 8, on CPU 4)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bf16 fp32, on CPU fp32")
    parser.add_argument("--batch", type=int, help="images per layer shape (default 256, on CPU 8)")
    parser.add_argument("--neuron", nargs="+", choices=("lif", "bn_lif"), default=["lif", "bn_lif"], help="which to time")
    parser.add_argument("--seconds", type=float, help="time spent on each measurement (default 0.5, on CPU 0.1)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-network", action="store_true", help="leave the training step of the whole network out")
    args = parser.parse_args(argv)
    try:
        args.device = torch.device(args.device)
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as e:
        parser.error(f"--device {args.device}: {str(e).splitlines()[0]}")
    cuda = args.device.type == "cuda"
    args.T = args.T or ([4, 8] if cuda else [4])
    if min(args.T) < 1 or max(args.T) > 32:
        parser.error(f"--T {args.T}: 1 to 32 time-steps")
    args.dtype = args.dtype or (["bf16", "fp32"] if cuda else ["fp32"])
    args.batch = (256 if cuda else 8) if args.batch is None else args.batch
    args.seconds = (0.5 if cuda else 0.1) if args.seconds is None else args.seconds
    if args.batch < 1:
        parser.error(f"--batch {args.batch}: at least 1")
    if not args.seconds > 0:
        parser.error(f"--seconds {args.seconds}: more than 0")
    if args.json and not (Path(args.json).absolute().parent.is_dir() and not Path(args.json).is_dir()):
        parser.error(f"--json {args.json}: not a file in an existing folder")
    return args


# ------------------------------------------------------------------------------------------ contestants
# a neuron is a function of the current (T, ...) -> spikes, from rest; bn_lif's take the batch norm's parameters too.

def spikingjelly(neuron, fast=True):
    """SpikingJelly's multi-step LIF, whose threshold is inclusive and which knows decay as 1 - 1/tau."""
    from spikingjelly.activation_based import surrogate
    from spikingjelly.activation_based.neuron import LIFNode
    grad = surrogate.PiecewiseQuadratic() if fast else surrogate.Rect(alpha=1 / (2 * LENS))
    v_th = torch.nextafter(torch.tensor(V_TH), torch.tensor(2.0)).item()
    node = LIFNode(tau=1 / (1 - DECAY), decay_input=False, v_threshold=v_th, v_reset=0.0, surrogate_function=grad,
                   detach_reset=True, step_mode="m")

    def run(x):
        node.reset()
        return node(x)
    return run


def spikingjelly_path(device):
    """Which of its implementations ran, as it logged for itself."""
    with contextlib.suppress(Exception):
        chosen = importlib.import_module("spikingjelly._ops.lif")._selection._selections
        return ", ".join(sorted({c.name for c in chosen.values() if c})) or "torch"
    return "its own choice"


def snntorch(neuron):
    import snntorch as snn
    node = snn.Leaky(beta=DECAY, threshold=V_TH, reset_mechanism="zero", reset_delay=False,
                     spike_grad=snn.surrogate.fast_sigmoid())

    def run(x):
        node.to(x.device)
        mem, spikes = torch.zeros_like(x[0]), []
        for xt in x:
            spike, mem = node(xt, mem)
            spikes.append(spike)
        return torch.stack(spikes)
    return run


def contestants(neuron, args):
    """Name -> function of (x, weight, bias) that returns spikes; x is (T, B, C, H, W)."""
    def batch_norm(x, weight, bias):
        return F.batch_norm(x.flatten(0, 1), None, None, weight, bias, training=True).view_as(x)

    def behind_bn(run):
        return (lambda x, w, b: run(x)) if neuron == "lif" else (lambda x, w, b: run(batch_norm(x, w, b)))

    ours = {"lif": lambda x, w, b: lif(x, DECAY, V_TH, LENS),
            "bn_lif": lambda x, w, b: bn_lif(x, w, b, decay=DECAY, v_th=V_TH, lens=LENS)[0]}
    loop = behind_bn(lambda x: lif_reference(x, DECAY, V_TH, LENS))
    found, missing = {"ours": ours[neuron]}, {}
    if neuron == "bn_lif":
        found["batch norm, then lif"] = behind_bn(lambda x: lif(x, DECAY, V_TH, LENS))
    for name, make in (("SpikingJelly", spikingjelly), ("snnTorch", snntorch)):
        try:
            found[name] = behind_bn(make(neuron))
        except ImportError as e:
            missing[name] = f"not installed ({e})"
    found["loop over t"] = loop
    if not args.no_compile:
        found["loop, torch.compile"] = torch.compile(loop, dynamic=False)
    return found, missing


# ------------------------------------------------------------------------------------------ measuring

def seconds_each(calls, device, budget):
    """Median seconds of a call, the calls taken in turn; on CUDA by events, from CUDA graphs where they can be captured."""
    for call in (calls[0], calls[0], calls[-1]):  # compile, fill the allocator
        call()
    if device.type != "cuda":
        times, end = [], time.perf_counter() + budget
        while len(times) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            calls[len(times) % len(calls)]()
            times.append(time.perf_counter() - start)
        return statistics.median(times), "eager"
    torch.cuda.synchronize()
    how = "eager"
    try:
        graphs = []
        for call in calls:
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], pool=graphs[0].pool() if len(graphs) > 1 else None):
                call()
        calls, how = [g.replay for g in graphs], "graph"
    except Exception:  # e.g. a peer that synchronises; its launches are then part of the time
        torch.cuda.synchronize()
    for call in calls:
        call()
    torch.cuda.synchronize()
    times, end = [], time.perf_counter() + budget
    while len(times) < 20 or time.perf_counter() < end:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(20)]
        for i, (start, stop) in enumerate(events):
            start.record()
            calls[i % len(calls)]()
            stop.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(stop) / 1e3 for start, stop in events]
    return statistics.median(times), how


def cache_bytes(device):
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 << 20


def copy_bandwidth(device, budget):
    """Bytes read plus bytes written per second by a plain copy far larger than the cache."""
    n = (1 << 30 if device.type == "cuda" else 1 << 27) // 4
    pairs = [(torch.randn(n, device=device), torch.empty(n, device=device)) for _ in range(2)]
    seconds, _ = seconds_each([lambda a=a, b=b: b.copy_(a) for a, b in pairs], device, budget)
    return 2 * 4 * n / seconds


def saved_bytes(run):
    """Bytes that autograd keeps between forward and backward, each memory once; parameters and inputs included."""
    seen = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t):
        out = run()
    del out
    return sum(seen.values())


def peak_bytes(call, device):
    """Memory that a call needs beyond what was there."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def least_bytes(neuron, dtype):
    """Per neuron-step: (forward, forward + backward); two bits are a quarter of a byte."""
    b = ITEM[dtype]
    if neuron == "lif":  # X, F, bits; g, bits, dX
        return 2 * b + 0.25, 4 * b + 0.5
    return 3 * b + 0.25, 3 * b + 0.25 + 5 * b + 0.5  # x for the statistics, x, F, bits; g, bits, x; g, bits, x, dx


def measure(neuron, shape, dtype, args, bandwidth, compiled):
    """Every contestant at one shape: a list of rows, ours first."""
    device, T, C = args.device, shape[0], shape[2]
    count = math.prod(shape)
    copies = max(2, min(8, math.ceil(4 * cache_bytes(device) / (count * ITEM[dtype]))))
    inputs = [torch.randn(shape, device=device, dtype=DTYPES[dtype]) for _ in range(copies)]
    grads = [torch.randn_like(x) for x in inputs]
    weight = (1 + 0.2 * torch.randn(C, device=device)).requires_grad_()
    bias = (0.2 * torch.randn(C, device=device)).requires_grad_()
    params = [] if neuron == "lif" else [weight, bias]
    found, missing = contestants(neuron, args)
    leaves = [x.detach().requires_grad_() for x in inputs]
    least = dict(zip(("forward", "both"), least_bytes(neuron, dtype)))
    rows, want = [], None

    def forward(run, x, g):
        return run(x, weight, bias)

    def both(run, x, g):
        return torch.autograd.grad(run(x, weight, bias), [x, *params], g)

    @contextlib.contextmanager
    def failures_of(row):
        """A peer's failure is a result, ours is not."""
        try:
            yield
        except Exception as e:
            if row["name"] == "ours" and not isinstance(e, torch.OutOfMemoryError):
                raise
            row["failed"] = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:80]}"
        if device.type == "cuda":
            torch.cuda.empty_cache()

    for name, run in found.items():
        if name == "loop, torch.compile" and not compiled:
            continue
        row = dict(neuron=neuron, shape=list(shape), dtype=dtype, name=name, run=run)
        rows.append(row)
        with failures_of(row):
            with torch.no_grad():
                spikes = run(inputs[0], weight, bias)
            if want is None:
                want = spikes
                check(neuron, spikes, inputs[0], weight, bias, dtype)
            row["differ"] = (spikes != want).float().mean().item()
            del spikes
            row["saved"] = saved_bytes(lambda: forward(run, leaves[0], grads[0])) / count
            row["peak"] = peak_bytes(lambda: both(run, leaves[0], grads[0]), device)
    del want
    rounds = 1 if device.type == "cuda" else 3  # a CPU is rarely ours alone: everyone in turn, the best of three
    for row in rows * rounds:
        for key, what in (("forward", forward), ("both", both)):
            if "failed" not in row:
                with failures_of(row):
                    calls = [lambda x=x, g=g: what(row["run"], x, g) for x, g in zip(leaves, grads)]
                    seconds, how = seconds_each(calls, device, args.seconds / rounds)
                    if key not in row or seconds * 1e3 < row[key]["ms"]:
                        share = least[key] * count / seconds / bandwidth
                        row[key] = dict(ms=seconds * 1e3, bytes=least[key], share_of_copy=share, how=how)
    for row in rows:
        del row["run"]
        if row["name"] == "SpikingJelly":
            row["name"] = f"SpikingJelly ({spikingjelly_path(device)})"
    return rows, missing


def torch_path_vs_loop(shape=(4, 64, 16, 32, 32)):
    """How many times quicker lif's PyTorch path trains than the loop; best of runs taken in turn, for shared machines."""
    x, g = torch.randn(shape).requires_grad_(), torch.randn(shape)
    best = {lif: math.inf, lif_reference: math.inf}
    for run in [lif, lif_reference] * 8:
        start = time.perf_counter()
        torch.autograd.grad(run(x, DECAY, V_TH, LENS), x, g)
        best[run] = min(best[run], time.perf_counter() - start)
    return best[lif_reference] / best[lif], list(shape)


def check(neuron, spikes, x, weight, bias, dtype):
    """Our spikes against the specification: equal for lif in any dtype; for bn_lif up to the statistics' rounding."""
    with torch.no_grad():
        expect = lif_reference(x, DECAY, V_TH, LENS) if neuron == "lif" else bn_lif_reference(
            x, weight, bias, decay=DECAY, v_th=V_TH, lens=LENS)[0]
    share = (spikes != expect).float().mean().item()
    if share > (0 if neuron == "lif" else 1e-5):
        raise SystemExit(f"{neuron} {dtype} {tuple(x.shape)}: {share:.2e} of the spikes differ from the specification")


def peers_agree(args):
    """The peers in fp32, spikes and (SpikingJelly, with its rectangular surrogate) gradients, before any timing."""
    found, missing = contestants("lif", args)
    x = torch.randn(8, 100_000, device=args.device).requires_grad_()
    want = lif(x, DECAY, V_TH, LENS)
    dwant, = torch.autograd.grad(want, x, torch.ones_like(x))
    shares = {name: (run(x.detach(), None, None) != want).float().mean().item() for name, run in found.items()
              if name not in ("ours", "loop, torch.compile")}
    if "SpikingJelly" not in missing:
        got = spikingjelly("lif", fast=False)(x)
        dgot, = torch.autograd.grad(got, x, torch.ones_like(x))
        same = (got == want).all(0)  # a spike that rounding flipped changes the rest of its neuron's gradient
        error = ((dgot - dwant)[:, same].norm() / dwant.norm()).item()
        if error > 1e-5:
            raise SystemExit(f"SpikingJelly's gradient differs from ours by {error:.1e}: not the same neuron")
    for name, share in shares.items():
        if share > 1e-4:
            raise SystemExit(f"{name}: {share:.1e} of the spikes differ from ours in fp32: not the same neuron")
    return shares, missing


# ------------------------------------------------------------------------------------------ one training step
# a style makes the convolution, the batch norm of a shortcut, and batch norm + residual + neuron; all (T, B, C, H, W).

class FoldedConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class FoldedNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class StepConv(nn.Conv2d):
    """One call per time-step."""

    def forward(self, x):
        return torch.stack([super(StepConv, self).forward(xt) for xt in x])


class FusedNorm(nn.BatchNorm2d):
    """Batch norm, residual and neuron in one pass."""

    def __init__(self, channels, T):
        super().__init__(channels)
        self.T = T

    def forward(self, x, residual=None):
        x = x.expand(self.T, -1, -1, -1, -1)  # the stem's current is the same at each step
        spikes, mean, var, n = bn_lif(x, self.weight, self.bias, residual, decay=DECAY, v_th=V_TH, lens=LENS)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
        return spikes


class NormThenNeuron(nn.Module):
    def __init__(self, norm, neuron, T):
        super().__init__()
        self.norm, self.neuron, self.T = norm, neuron, T

    def forward(self, x, residual=None):
        x = self.norm(x).expand(self.T, -1, -1, -1, -1)
        return self.neuron(x.contiguous() if residual is None else x + residual)


def styles(T):
    """Name -> (conv, norm, norm + neuron, whether the stem runs once for all T)."""
    def conv(cls, **kwargs):
        return lambda c_in, c_out, k, stride: cls(c_in, c_out, k, stride, k // 2, bias=False, **kwargs)

    loop = lambda x: lif_reference(x, DECAY, V_TH, LENS)  # noqa: E731
    found = {"ours": (conv(FoldedConv), FoldedNorm, lambda c: FusedNorm(c, T), True)}
    with contextlib.suppress(ImportError):
        from spikingjelly.activation_based import layer
        norm = lambda c: layer.BatchNorm2d(c, step_mode="m")  # noqa: E731
        found["SpikingJelly"] = (conv(layer.Conv2d, step_mode="m"), norm,
                                 lambda c: NormThenNeuron(norm(c), spikingjelly("lif"), T), True)
    found["loop over t"] = (conv(StepConv), FoldedNorm, lambda c: NormThenNeuron(FoldedNorm(c), loop, T), False)
    return found


class Block(nn.Module):
    def __init__(self, style, c_in, c_out, stride):
        super().__init__()
        conv, norm, norm_act, _ = style
        self.conv1, self.bn1 = conv(c_in, c_out, 3, stride), norm_act(c_out)
        self.conv2, self.bn2 = conv(c_out, c_out, 3, 1), norm_act(c_out)
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else nn.Sequential(conv(c_in, c_out, 1, stride), norm(c_out))

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), self.shortcut(x))


class SpikingResNet18(nn.Module):
    def __init__(self, style, T, width, classes=10):
        super().__init__()
        conv, _, norm_act, once = style
        self.steps = 1 if once else T
        self.conv1, self.bn1 = conv(3, width, 3, 1), norm_act(width)
        widths = [width << i for i in range(4)]
        self.layers = nn.Sequential(*(Block(style, widths[max(i - 1, 0)] if j == 0 else widths[i], widths[i],
                                            2 if i and j == 0 else 1) for i in range(4) for j in range(2)))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x):
        x = x.expand(self.steps, *x.shape)  # (B, 3, H, W) -> (1 or T, B, 3, H, W)
        x = self.layers(self.bn1(self.conv1(x)))
        return self.fc(x.flatten(3).mean((0, 3)))  # (T, B, C, H, W) -> (B, classes)


def train_steps(batch, args):
    """Images per second and peak memory of one step (forward, backward, SGD) in each style, at T = 4."""
    device, T, cuda = args.device, 4, args.device.type == "cuda"
    width, size, rows = (64, 32, []) if cuda else (16, 16, [])
    half = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else None
    x = torch.randn(batch, 3, size, size, device=device)
    x = x.to(memory_format=torch.channels_last) if cuda else x
    y = torch.randint(10, (batch,), device=device)
    for name, style in styles(T).items():
        row = dict(name=name, batch=batch, T=T, width=width, image=size, precision="bf16" if half else "fp32")
        rows.append(row)
        try:
            torch.manual_seed(0)  # the same weights in each style
            net = SpikingResNet18(style, T, width).to(device)
            net = net.to(memory_format=torch.channels_last) if cuda else net
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

            def step():
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device.type, half, enabled=half is not None):
                    loss = F.cross_entropy(net(x), y)
                loss.backward()
                optimizer.step()
                return loss

            row["loss"] = step().item()
            step()
            row["peak"] = peak_bytes(step, device)
            times = []
            for _ in range(20 if cuda else 3):
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                step()
                if cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            row["seconds"] = statistics.median(times)
            row["images_per_s"] = batch / row["seconds"]
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        except Exception as e:
            if name == "ours":
                raise
            row["failed"] = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:80]}"
        net = optimizer = None
        if cuda:
            torch.cuda.empty_cache()
    for row in rows[1:]:
        if "failed" not in row and "loss" in rows[0] and abs(row["loss"] / rows[0]["loss"] - 1) > 0.05:
            row["failed"] = f"another network: first loss {row['loss']:.4f}, ours {rows[0]['loss']:.4f}"
    return rows


# ------------------------------------------------------------------------------------------ tables

def megabytes(n):
    return "-" if n is None else f"{n / 2**20:.0f}"


def table(title, *columns):
    t = Table(title=title, box=box.MARKDOWN if not sys.stdout.isatty() else box.SIMPLE, title_justify="left")
    for i, column in enumerate(columns):
        t.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return t


def detail_table(rows):
    first = rows[0]
    t = table(f"{first['neuron']}, {first['dtype']}, (T, B, C, H, W) = {tuple(first['shape'])}", "", "forward ms",
              "% of copy", "forward + backward ms", "% of copy", "ours faster by", "saved B/neuron-step", "peak MiB",
              "spikes that differ", "timed")
    for row in rows:
        if "failed" in row:
            t.add_row(row["name"], row["failed"], *[""] * 8)
            continue
        f, b = row["forward"], row["both"]
        t.add_row(row["name"], f"{f['ms']:.3g}", f"{100 * f['share_of_copy']:.0f}", f"{b['ms']:.3g}",
                  f"{100 * b['share_of_copy']:.0f}",
                  f"{b['ms'] / first['both']['ms']:.1f}x" if "both" in first else "-", f"{row['saved']:.2f}",
                  megabytes(row["peak"]), f"{row['differ']:.1e}" if row["differ"] else "0", b["how"])
    return t


def summary_table(groups):
    """One line a case, ours in figures, the others as factors."""
    peers = list(dict.fromkeys(row["name"] for rows in groups for row in rows[1:]))
    t = table("forward + backward; the last columns say how many times longer each peer takes", "neuron, dtype, T", "B, C, H, W",
              "forward ms", "forward + backward ms", "least B/neuron-step", "% of copy", "saved", "peak MiB", *peers)
    for rows in groups:
        ours, by_name = rows[0], {row["name"]: row for row in rows}
        if "failed" in ours:
            t.add_row(f"{ours['neuron']}, {ours['dtype']}, {ours['shape'][0]}", ours["failed"])
            continue
        b = ours["both"]
        factors = [f"{by_name[p]['both']['ms'] / b['ms']:.1f}x" if "both" in by_name.get(p, {}) else "-" for p in peers]
        t.add_row(f"{ours['neuron']}, {ours['dtype']}, {ours['shape'][0]}", ", ".join(map(str, ours["shape"][1:])),
                  f"{ours['forward']['ms']:.3g}", f"{b['ms']:.3g}", f"{b['bytes']:g}", f"{100 * b['share_of_copy']:.0f}",
                  f"{ours['saved']:.2f}", megabytes(ours["peak"]), *factors)
    return t


def network_table(rows):
    first = rows[0]
    t = table(f"one training step of Spiking ResNet-18, T = {first['T']}, width {first['width']}, {first['image']} pixels, "
              f"{first['precision']}", "", "batch", "ms", "images/s", "ours faster by", "peak MiB")
    ours = {row["batch"]: row for row in rows if row["name"] == "ours"}
    for row in rows:
        if "failed" in row:
            t.add_row(row["name"], str(row["batch"]), row["failed"], "", "", "")
            continue
        factor = row["seconds"] / ours[row["batch"]].get("seconds", math.nan)
        t.add_row(row["name"], str(row["batch"]), f"{1e3 * row['seconds']:.3g}", f"{row['images_per_s']:.0f}",
                  f"{factor:.1f}x", megabytes(row["peak"]))
    return t


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(argv=None):
    args = parse_args(argv)
    device, cuda = args.device, args.device.type == "cuda"
    console = Console(width=None if sys.stdout.isatty() else 240)
    torch.manual_seed(0)
    if cuda:
        torch.cuda.set_device(device)
    result = dict(command=" ".join(["python -m kernels.bench", *(sys.argv[1:] if argv is None else argv)]),
                  device=torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()})",
                  threads=torch.get_num_threads(), python=platform.python_version(),
                  versions={n: version(n) for n in ("torch", "triton", "spikingjelly", "snntorch")},
                  constants=dict(decay=DECAY, v_th=V_TH, lens=LENS))
    result["impl"] = choose_impl(torch.empty(1, device=device), 4, None)
    console.print(f"{result['device']}, {result['threads']} threads, {result['versions']}, ours on {result['impl']}")
    if not cuda:
        console.print("no GPU: small sizes, PyTorch paths; these figures say nothing about the kernels on a GPU")
    shares, missing = peers_agree(args)
    result["missing"], result["differ_fp32"] = missing, shares
    for name, why in missing.items():
        console.print(f"{name}: {why}")
    console.print("fp32 spikes that differ from ours: " + ", ".join(f"{n} {s:.1e}" for n, s in shares.items()))
    result["copy_bytes_per_s"] = copy_bandwidth(device, args.seconds)
    console.print(f"plain copy: {result['copy_bytes_per_s'] / 1e9:.0f} GB/s read + written")

    shapes = [(args.batch, c, s, s) for c, s in LAYERS]
    large = (2048, 64, 32, 32) if cuda else (32, 64, 32, 32)
    if cuda:  # the largest that leaves room for the loop over t, which keeps some ten tensors
        while large[0] > 256 and 4 * math.prod(large) * 4 * 12 > torch.cuda.get_device_properties(device).total_memory:
            large = (large[0] // 2, *large[1:])
    cases = [(neuron, dtype, T, shape) for neuron in args.neuron for dtype in args.dtype for T in args.T
             for shape in shapes] + [(neuron, dtype, min(args.T), large) for neuron in args.neuron for dtype in args.dtype]
    groups = []
    for neuron, dtype, T, shape in cases:
        if sys.stdout.isatty():
            console.print(f"timing {neuron} {dtype} T={T} {shape}", style="dim")
        compiled = not args.no_compile and shape in ((shapes[0], large) if cuda else (large,))
        groups.append(measure(neuron, (T, *shape), dtype, args, result["copy_bytes_per_s"], compiled)[0])
        torch.compiler.reset()
    result["cases"] = groups
    if args.json:  # the measurements so far, should the network not fit the device
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    console.print(summary_table(groups))
    for rows in groups:
        if tuple(rows[0]["shape"][1:]) == large:
            console.print(detail_table(rows))
    if not args.no_network:
        result["network"] = [row for batch in ((64, 256) if cuda else (8,)) for row in train_steps(batch, args)]
        console.print(network_table(result["network"]))
    if not cuda:
        factor, shape = torch_path_vs_loop()
        result["torch_path_vs_loop"] = dict(factor=factor, shape=shape)
        console.print(f"torch path vs naive loop: {factor:.1f}x (fp32 {shape}, forward + backward, best of 8, taken in turn)")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
