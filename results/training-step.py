"""Images per second of a training step: our neuron against SpikingJelly's in the same network.

    python results/training-step.py --json results/training-step-gpu.json   # batch 64 and 256
    python results/training-step.py --device cpu                            # small, eager

The network is the project's Spiking ResNet-18; for SpikingJelly only BatchNormLIF is another class:
PyTorch's batch norm, the add, its LIF on an fp32 potential, which its fused kernels want; the back
end that ran is read after the timed steps. Same weights and images; in fp64 the losses must agree.
A step is forward, cross-entropy, backward and SGD, on images that lie on the device: launched one
kernel at a time (eager), compiled by torch.compile, or recorded once and replayed (a CUDA graph).
"""

import importlib.metadata
import importlib.util
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils import benchmark

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project, from wherever this is started
import transfer_init  # noqa: E402
from kernels import bench  # noqa: E402
from train_teacher import Parser, memory_format, number, output, recorded  # noqa: E402

NEURON = dict(T=4, **bench.NEURON)
SAME_LOSS = 1e-6  # relative, in fp64, where rounding flips no spike


def parse_args(argv=None):
    p = Parser(__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    p.add_argument("--batch", type=number(int, 2), nargs="+", metavar="B",
                   help="images a step (default 64 256, on a CPU 16)")
    p.add_argument("--width", type=number(int, 1), help="default 64, on a CPU 16")
    p.add_argument("--mode", nargs="+", choices=("recorded", "eager", "compiled"),
                   help="default all three, on a CPU eager")
    p.add_argument("--seconds", type=number(float, 0.01), default=5,
                   help="for each figure (default 5)")
    p.add_argument("--json", type=output, metavar="FILE", help="write every figure to FILE")
    args = p.parse_args(argv)

    on_gpu = args.device == "cuda"
    if on_gpu and not gpu:
        p.error("argument --device: cuda asked for, and PyTorch sees no GPU")
    args.batch = args.batch or ([64, 256] if on_gpu else [16])
    args.width = args.width or (64 if on_gpu else 16)
    args.mode = args.mode or (["recorded", "eager", "compiled"] if on_gpu else ["eager"])
    if "recorded" in args.mode and not on_gpu:
        p.error("argument --mode: recorded: a CUDA graph needs --device cuda")
    return args


class BatchNormSpikingJelly(transfer_init.BatchNormLIF):
    """BatchNormLIF's parameters and place, with PyTorch's batch norm and SpikingJelly's neuron."""

    def __init__(self, channels, neuron):
        super().__init__(channels, neuron)
        self.lif = bench.spikingjelly()

    def forward(self, x, residual=None, static=False):
        x = nn.BatchNorm2d.forward(self, x)
        if residual is not None:
            x = x + residual
        if static:  # (B, C, H, W) -> (T, B, C, H, W), the same current at each step
            x = x.expand(self.neuron.T, *x.shape).contiguous()
        else:  # (T*B, C, H, W) -> (T, B, C, H, W)
            x = x.unflatten(0, (self.neuron.T, -1))
        return self.lif(x).flatten(0, 1)  # -> (T*B, C, H, W)


NEURONS = [transfer_init.BatchNormLIF]
if importlib.util.find_spec("spikingjelly"):
    NEURONS.append(BatchNormSpikingJelly)


def network(neuron, width):
    """Spiking ResNet-18 in training mode; the same weights whichever the neuron."""
    torch.manual_seed(0)
    with mock.patch.object(transfer_init, "BatchNormLIF", neuron):
        return transfer_init.SpikingResNet(18, width=width, **NEURON)


def images(batch):
    """Noise in place of normalised images (B, 3, 32, 32), and labels (B,)."""
    torch.manual_seed(1)
    return torch.randn(batch, 3, 32, 32), torch.randint(100, (batch,))


def check(width):
    """The first loss with each neuron, in fp64 on the CPU; ends the program where they differ.

    Of ours alone where SpikingJelly is not installed.
    """
    x, y = images(4)
    losses = []
    for neuron in NEURONS:
        with torch.no_grad():
            scores = network(neuron, width).double()(x.double())  # (T, B, K)
        losses.append(F.cross_entropy(scores.mean(0), y).item())
    if not abs(losses[-1] / losses[0] - 1) <= SAME_LOSS:
        sys.exit(f"first loss {losses[0]:.8f} with ours, {losses[-1]:.8f} with SpikingJelly's: "
                 "another network, nothing was timed")
    return losses


def images_per_second(neuron, batch, mode, args):
    """(images per second, loss of the first step)."""
    on_gpu = args.device == "cuda"
    layout = memory_format(torch.device(args.device), args.width)
    net = network(neuron, args.width).to(args.device, memory_format=layout)
    x, y = images(batch)
    x, y = x.to(args.device, memory_format=layout), y.to(args.device)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=1e-4, fused=on_gpu)
    forward = torch.compile(net) if mode == "compiled" else net
    autocast = torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()

    def step():
        optimizer.zero_grad()
        with autocast:
            loss = F.cross_entropy(forward(x).mean(0), y)  # (T, B, K) -> (B, K)
        loss.backward()
        optimizer.step()
        return loss

    loss = step().item()
    # as in the training stages: bf16 on one GPU is recorded
    how = SimpleNamespace(graph=mode == "recorded", precision="bf16")
    run = recorded(step, how, torch.device(args.device))
    for _ in range(5):  # `recorded` calls the step three times, records it and replays it
        run()
    # waits for the GPU; on a CPU one thread's own time, which other programs do not lengthen
    clock = time.process_time if torch.get_num_threads() == 1 and not on_gpu else benchmark.timer
    timer = benchmark.Timer("run()", globals=dict(run=run), timer=clock,
                            num_threads=torch.get_num_threads())
    return batch / timer.blocked_autorange(min_run_time=args.seconds).median, loss


def main(argv=None):
    args = parse_args(argv)
    argv = sys.argv[1:] if argv is None else argv
    torch.backends.cudnn.benchmark = True  # as training has it
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    precision = "bf16" if args.device == "cuda" else "fp32"
    names = filter(importlib.util.find_spec, ("torch", "triton", "spikingjelly"))
    versions = {name: importlib.metadata.version(name) for name in names}
    result = dict(command=" ".join(["training-step.py", *argv]), device=device,
                  threads=torch.get_num_threads(), versions=versions, width=args.width,
                  precision=precision, losses_fp64=check(args.width), rows=[])
    console.print(f"{device}, {result['threads']} threads, {result['versions']}")
    console.print(f"first loss in fp64, ours and SpikingJelly's: {result['losses_fp64']}")

    t = Table("batch", "mode", "ours", "SpikingJelly", "ours faster by", "first losses",
              title=f"images per second of a training step of Spiking ResNet-18, T = 4, width "
              f"{args.width}, 32x32 pixels, {precision}", box=box.MARKDOWN, title_justify="left")
    for batch in args.batch:
        for mode in args.mode:
            row = dict(batch=batch, mode=mode)
            result["rows"].append(row)
            ours, loss = images_per_second(transfer_init.BatchNormLIF, batch, mode, args)
            row["ours"], row["loss"] = ours, loss
            if len(NEURONS) == 1:
                t.add_row(str(batch), mode, f"{ours:,.0f}", "not installed", "", f"{loss:.3f}")
                continue
            try:  # that a peer cannot be compiled or recorded is a result
                theirs, their_loss = images_per_second(BatchNormSpikingJelly, batch, mode, args)
                row["spikingjelly"], row["spikingjelly_loss"] = theirs, their_loss
                row["backend"] = bench.spikingjelly_backend(torch.device(args.device))
                peer = [f"{theirs:,.0f}", f"{ours / theirs:.2f}", f"{loss:.3f}, {their_loss:.3f}"]
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"
                peer = ["failed", "", f"{loss:.3f}"]
                console.print(f"SpikingJelly, batch {batch}, {mode}: {row['failed']}", markup=False)
            t.add_row(str(batch), mode, f"{ours:,.0f}", *peer)
            if args.json:  # after each row: the figures so far survive the next one's failure
                Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    console.print(t)
    if len(NEURONS) > 1:
        backend = bench.spikingjelly_backend(torch.device(args.device))
        console.print(f"SpikingJelly: PiecewiseQuadratic, back end {backend}")


if __name__ == "__main__":
    main()
