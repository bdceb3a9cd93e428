"""Stage 4: accuracy per time-step, firing rates, energy, comparison tables, curves, export to NIR

    python eval.py                                              # idsnn.pt on its own test set: one screen of numbers
    python eval.py idsnn.pt --T 1 2 4 8                         # more steps than it was trained with
    python eval.py base.pt kd.pt init.pt idsnn.pt               # one table (the paper's Tables 1 to 4)
    python eval.py base.pt idsnn.pt --plot fig5.png             # and the curves (Figure 5); fig5-firing.png beside them
    python eval.py idsnn.pt --json idsnn.json --export nir idsnn.nir

Conventions of the energy estimate, per image, batch norms folded:
  - a layer's MACs are dense: C_in * K * K * C_out * H_out * W_out, padding included;
  - a layer that reads spikes needs, in step t, (share of its inputs that are not 0 in step t) * MACs accumulate operations;
  - a layer that reads analogue values needs its MACs: the first one once, as direct coding repeats the image;
  - the classifier reads a mean over pixels. The mean is linear, so every spike in it adds one row of the classifier: K
    accumulates per spike. (Non-zero means times K would count fewer operations, and those would be multiplications.)
  - 0.9 pJ per accumulate, 4.6 pJ per MAC: 45 nm, 32-bit floats (Horowitz 2014). Neurons, memory and biases cost nothing here.
The same network as an ANN needs every layer's MACs once.

From top to bottom: the flags, the paper's numbers, the counters, the evaluation, the report, the comparison, the figures,
the NIR graph, main().
"""
import copy
import csv
import importlib.util
import io
import json
import math
import os
import sys
import time
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import nn

from train_idsnn import PAPER, warn
from train_teacher import PAPER as TEACHER
from train_teacher import (BasicBlock, Bottleneck, Parser, ResNet, check_classes, device_name, fail, init_distributed, load_checkpoint, load_data,
                           number, run, set_precision, sha256_file)
from transfer_init import BatchNormLIF, SEWBasicBlock, SEWBottleneck, SpikingResNet


def parse_args(argv=None):
    p = Parser(description="Stage 4: evaluate checkpoints; several of them are compared in one table.")
    p.add_argument("checkpoints", nargs="*", default=["idsnn.pt"], metavar="FILE", help="of any stage (default idsnn.pt)")
    p.add_argument("--T", type=number(int, 1, 32), nargs="+", metavar="STEPS", help="time-steps to report (default 1, 2, ... to its T)")
    p.add_argument("--dataset", help="cifar10, cifar100, digits, or a folder (default: what the checkpoint was trained on)")
    p.add_argument("--data-dir", help="where downloads and decoded folders are kept (default: as in training)")
    p.add_argument("--batch-size", type=number(int, 1, 1 << 20), default=500, help="images per pass, also that of images/s (default 500)")
    p.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32", "fp64"], help="auto: bf16 on a GPU, else fp32")
    p.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: the GPU if there is one")
    p.add_argument("--no-energy", action="store_true", help="compare by what training recorded, without a pass over the test set")
    p.add_argument("--json", metavar="FILE", help="write everything, for scripts")
    p.add_argument("--csv", metavar="FILE", help="write the comparison table")
    p.add_argument("--plot", metavar="FILE.png", help="draw the curves over epochs, and FILE-firing.png: rates by layer, accuracy over T")
    p.add_argument("--export", nargs=2, metavar=("nir", "FILE"), help="write the network as NIR, read back and run to the same spikes")
    p.set_defaults(deterministic=False)  # a flag of the training stages that set_precision reads
    args = p.parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("runs as one process: call it without torchrun")
    if args.no_energy and len(args.checkpoints) == 1:
        fail("argument --no-energy: is for comparing several checkpoints")
    if args.export and (args.export[0] != "nir" or len(args.checkpoints) > 1):
        fail("argument --export: takes the word nir, a file to write, and one checkpoint")
    if args.plot and Path(args.plot).suffix not in (".png", ".pdf", ".svg"):
        fail(f"argument --plot: {args.plot}: must end in .png, .pdf or .svg")
    for flag, package in (("plot", "matplotlib"), ("export", "nir")):
        if getattr(args, flag) and not importlib.util.find_spec(package):
            fail(f"argument --{flag}: needs the package {package}: pip install {package}")
    for flag, path in (("json", args.json), ("csv", args.csv), ("plot", args.plot), ("export", args.export and args.export[1])):
        taken = path and (Path(path).is_dir() or path in args.checkpoints)
        if taken or path and not os.access(path if Path(path).exists() else Path(path).parent, os.W_OK):
            fail(f"argument --{flag}: cannot write {path}")  # now, not after the pass over the test set
    return args


# ------------------------------------------------------------------------------------- the paper's numbers
# (data set, initialisation, distillation, T, first milestone of the learning rate): accuracy in %, its epoch, the table.
# Tables 3 and 4 do not state T (their full method's number is that of Table 2 at T = 6): None stands for any.
REPORTED = {
    ("cifar10", True, True, 4, 60): (94.03, None, "Table 1"), ("cifar10", True, True, 6, 60): (94.22, None, "Table 1"),
    ("cifar100", True, True, 4, 60): (75.24, None, "Table 2"), ("cifar100", True, True, 6, 60): (75.41, 138, "Table 2"),
    ("cifar10", False, False, None, 60): (93.54, None, "Table 3"), ("cifar10", True, False, None, 60): (93.64, None, "Table 3"),
    ("cifar10", False, True, None, 60): (93.98, None, "Table 3"), ("cifar10", True, True, None, 60): (94.22, None, "Table 3"),
    ("cifar100", True, False, None, 60): (74.47, None, "Table 3"),
    ("cifar100", False, False, None, 60): (71.31, 192, "Table 4"), ("cifar100", False, True, None, 60): (73.71, 195, "Table 4"),
    ("cifar100", True, True, None, 60): (75.41, 138, "Table 4"), ("cifar100", False, False, None, 20): (68.96, 74, "Table 4"),
    ("cifar100", False, True, None, 20): (70.35, 49, "Table 4"), ("cifar100", True, True, None, 20): (74.45, 54, "Table 4"),
    ("cifar100", False, False, None, 10): (63.95, 85, "Table 4"), ("cifar100", False, True, None, 10): (66.02, 37, "Table 4"),
    ("cifar100", True, True, None, 10): (73.02, 57, "Table 4"),
}


def reported(r):
    """The paper's number for the setting of run `r`, as (accuracy, epoch, table), or None where it has none."""
    config, arch, milestones = r["config"], r["arch"], r["config"].get("milestones")
    parents = {name: parent.get("config", {}) for name, parent in r["provenance"]["parents"].items()}  # empty in older files
    same = (r["stage"] == "idsnn" and (not r["init"] or parents.get("init", {}).get("classifier", "fresh") == "fresh")
            and all(parents.get("teacher", {}).get(name, value) == value for name, value in TEACHER.items())
            and (arch["depth"], arch["width"], arch["block"]) == (18, 64, "basic")
            and all(config.get(name, value) == value for name, value in PAPER.items() if name != "epochs")
            and milestones in ([60, 120, 160], [20, 40, 60], [10, 20, 30]) and (milestones[0] < 60 or config["epochs"] == 200)
            and (r["data"] or {}).get("train") == 50_000)
    keys = [(r["dataset"], r["init"], r["kd"], T, milestones[0]) for T in (arch["T"], None)] if same else []
    return next((REPORTED[key] for key in keys if key in REPORTED), None)


# ----------------------------------------------------------------------------------------------- counters
PJ_PER_AC, PJ_PER_MAC = 0.9, 4.6


class Counters:
    """Spikes of every neuron, and non-zero inputs of every convolution and linear layer, counted in forward hooks.

    The counts are integers for each time-step, kept on the device: no batch waits for the host. The model takes images
    (B, C, H, W) or spikes (T, B, C, H, W); inside it, tensors are (T*B, ...), or (B, ...) for what is the same at every step.
    """

    def __init__(self, model, T):
        self.T, self.images, self.layers, self.before_mean = T, 0, {}, None  # layers: in order of execution
        self.hooks = [model.register_forward_pre_hook(self.count_images)]
        for name, m in model.named_modules():
            if isinstance(m, BatchNormLIF):
                self.hooks.append(m.register_forward_hook(partial(self.count_spikes, name)))
            elif isinstance(m, (nn.Conv2d, nn.Linear)):
                self.hooks.append(m.register_forward_hook(partial(self.count_inputs, name)))
        if hasattr(model, "layer4"):
            self.hooks.append(model.layer4.register_forward_hook(lambda m, x, out: setattr(self, "before_mean", out)))

    def count_images(self, model, x):
        self.batch = x[0].shape[-4]
        self.images += self.batch

    def count_spikes(self, name, m, x, out):
        count = out.unflatten(0, (self.T, -1)).ne(0).sum(1, dtype=torch.int32)  # (T*B, C, H, W) -> (T, C, H, W)
        self.layers.setdefault(name, dict(kind="lif", count=torch.zeros_like(count)))["count"] += count

    def count_inputs(self, name, m, x, out):
        x, macs = x[0], out[0].numel() * m.weight[0].numel()
        fan_out = macs / x[0].numel()
        if isinstance(m, nn.Linear) and self.before_mean is not None:
            x = self.before_mean
        steps = 1 if x.shape[0] == self.batch else self.T
        count = x.unflatten(0, (steps, -1)).ne(0).flatten(1).sum(1)            # (steps*B, ...) -> (steps,)
        reads = (x != x.ne(0)).any().int().maximum(2 * (x != x.round()).any())  # an index of READS
        layer = self.layers.setdefault(name, dict(kind="synapses", macs=macs, fan_out=fan_out, count=torch.zeros_like(count), reads=reads))
        layer["count"] += count
        layer["reads"] = layer["reads"].maximum(reads)

    def read(self):
        """One dict per layer, in order of execution; takes the hooks off. Lists run over the time-steps. `dead`: neurons that
        fired on no image in the first 1..T steps; `saturated`: that fired on every image in each of them."""
        for hook in self.hooks:
            hook.remove()
        layers = []
        for name, layer in self.layers.items():
            count = layer["count"].flatten(1) if layer["kind"] == "lif" else layer["count"]
            if layer["kind"] == "lif":
                upto, most = count.cumsum(0), self.images * torch.arange(1, self.T + 1, device=count.device).unsqueeze(1)
                row = dict(neurons=count.shape[1], rate=(count.sum(1) / (count.shape[1] * self.images)).tolist(),
                           dead=(upto == 0).sum(1).tolist(), saturated=(upto == most).sum(1).tolist())
            else:
                once, reads = len(count) < self.T, int(layer["reads"])  # once: the image, the same at every step
                acs = None if once or reads == 2 else [n * layer["fan_out"] / self.images for n in count.tolist()]
                row = dict(macs=layer["macs"], reads=READS[2 if once else reads], once=once, nonzero=count.tolist(), acs=acs)
            layers.append(dict(name=name, kind=layer["kind"], **row))
        return layers


READS = ("spikes", "sums of spikes", "analogue values")


def energy(layers, T):
    """Operations and joules of one image in the first T steps, over the layers of `Counters.read`."""
    layers = [layer for layer in layers if layer["kind"] == "synapses"]
    acs = sum(sum(layer["acs"][:T]) for layer in layers if layer["acs"])
    macs = sum(layer["macs"] * (1 if layer["once"] else T) for layer in layers if not layer["acs"])
    return dict(acs=acs, macs=macs, joules=1e-12 * (PJ_PER_AC * acs + PJ_PER_MAC * macs))


def as_ann(layers):
    """The same for the network with ReLU in place of spikes."""
    macs = sum(layer["macs"] for layer in layers if layer["kind"] == "synapses")
    return dict(acs=0, macs=macs, joules=1e-12 * PJ_PER_MAC * macs)


# --------------------------------------------------------------------------------------------- evaluation
def build(path, checkpoint):
    """The network in a checkpoint, ResNet or SpikingResNet, in fp32 on the CPU, in eval mode."""
    try:
        model = (ResNet if checkpoint["stage"] == "teacher" else SpikingResNet)(**checkpoint["arch"])
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        fail(f"{path}: the weights do not fit the network that it describes ({' '.join(str(error).split())[:160]})")
    return model.eval()


def describe(path, checkpoint):
    """What a checkpoint says of itself: the part of a result that needs no pass over the data."""
    config, history, stage = checkpoint["config"], checkpoint["metrics"]["history"], checkpoint["stage"]
    best = max(history, key=lambda row: row["test_acc"], default={})
    return dict(file=str(path), stage=stage, dataset=Path(config["dataset"]).name if "dataset" in config else None, arch=checkpoint["arch"],
                T=checkpoint["arch"].get("T"), init=None if stage == "teacher" else not config.get("no_init"),
                kd=None if stage == "teacher" else stage == "idsnn" and not config["no_kd"], epochs=len(history),
                last=history[-1]["test_acc"] if history else None, best=best.get("test_acc"), best_epoch=best.get("epoch"),
                seconds=sum(row["seconds"] for row in history) if history else None,
                config=config, data=checkpoint["data"], provenance=checkpoint["provenance"], history=history)


def open_data(r, args, cache, device, dtype):
    """The data set of result `r`, or --dataset, normalised as in the training of `r`."""
    name = args.dataset or r["config"]["dataset"]
    if name not in cache:
        cache[name] = load_data(name, args.data_dir or r["config"].get("data_dir", "data"))
    data = copy.copy(cache[name])
    for has, what, key in ((len(data.classes), "classes", "num_classes"), (data.shape[0], "channels", "in_channels")):
        if has != r["arch"][key]:
            fail(f"argument --dataset: {name} has {has} {what}, the network in {r['file']} {r['arch'][key]}")
    check_classes(data.classes, r["data"], "network", r["file"])
    r["evaluated_on"] = data.describe()
    if r["data"]:
        data.mean, data.std = r["data"]["mean"], r["data"]["std"]
    return data.to(device, dtype)


@torch.no_grad()
def evaluate(r, checkpoint, data, steps, args, device, dtype, autocast, console):
    """Add to result `r` what one pass over the test set shows after each number of time-steps in `steps`.

    The neuron is causal, so a run of the most steps holds the shorter ones: accuracy after t is that of `scores[:t].mean(0)`.
    """
    model, T = build(r["file"], checkpoint).to(device, dtype, memory_format=torch.channels_last), steps[-1]
    if r["T"]:
        model.neuron.T = T
    seed = r["config"].get("seed", 0) * 10_000 * 1_000_003  # the Poisson noise of training's evaluation

    def forward(start):
        x = data.test_x[start: start + args.batch_size].permute(0, 3, 1, 2)
        with autocast:
            return model(model.encode(x, data, seed + start)) if r["T"] else model(data.normalize(x)).unsqueeze(0)  # (T, B, K)

    counters, sums = Counters(model, T), torch.zeros(T, 2, dtype=torch.float64, device=device)  # correct, loss
    starts = range(0, len(data.test_y), args.batch_size)
    for start in track(starts, r["file"], console=console, transient=True, disable=not console.is_terminal):
        scores, y = forward(start), data.test_y[start: start + args.batch_size]
        for t in range(T):
            mean = scores[: t + 1].to(dtype).mean(0).double()
            sums[t] += torch.stack([(mean.argmax(1) == y).sum(), F.cross_entropy(mean, y, reduction="sum")])
    layers, sums = counters.read(), (sums / len(data.test_y)).tolist()

    forward(0)  # now without the counters: a pass to warm up, then a second's worth
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    batch, passes, began = min(args.batch_size, len(data.test_y)), 0, time.perf_counter()
    while not passes or time.perf_counter() - began < 1:
        forward(0).sum().item()  # waits for the device
        passes += 1
    speed = dict(batch=batch, images_per_s=passes * batch / (time.perf_counter() - began), peak_bytes=peak_memory(device))
    r.update(steps=[dict(T=t, accuracy=100 * sums[t - 1][0], loss=sums[t - 1][1], **energy(layers, t)) for t in steps], layers=layers,
             ann=as_ann(layers), speed=speed, joules=energy(layers, min(r["T"] or 1, T))["joules"])


def peak_memory(device):
    """Bytes: on a GPU what PyTorch held since the last reset, else the peak of the whole process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def find_teacher(r):
    """(path, checkpoint) of the teacher that run `r` learnt from, or (None, one line that says why not)."""
    recorded = r["provenance"]["parents"].get("teacher")
    if not recorded:
        return None, "none: trained without distillation"
    path = next((p for p in (Path(recorded["path"]), Path(r["file"]).with_name(Path(recorded["path"]).name)) if p.is_file()), None)
    if path is None:
        return None, f"not evaluated: {recorded['path']} is not here"
    if sha256_file(path) != recorded["sha256"]:
        return None, f"not evaluated: {path} has changed since"
    teacher = load_checkpoint(path, "teacher", bare=True)
    if [teacher.get("arch", {}).get(key) for key in ("num_classes", "in_channels")] != [r["arch"]["num_classes"], r["arch"]["in_channels"]]:
        return None, f"not evaluated: {path} has no classifier for these data"
    return path, teacher


# ------------------------------------------------------------------------------------------------- report
def si(value, unit=""):
    """Three digits and a metric prefix: si(0.00256, "J") = "2.56 mJ"."""
    if not value:
        return f"0 {unit}".strip()
    value = float(f"{value:.3g}")
    power = min(max(math.floor(math.log10(abs(value)) / 3), -4), 4)
    value /= 1000.0 ** power
    return f"{value:.{2 - int(math.log10(abs(value)))}f} {'pnµm kMGT'[power + 4].strip()}{unit}".strip()


def network(r):
    a = r["arch"]
    return (f"Spiking ResNet-{a['depth']}, width {a['width']}, {a['block']} blocks, {a['encoder']} encoding" if r["T"]
            else f"ResNet-{a['depth']}, width {a['width']}")


def columns(*names, left=1, gap=2, **kwargs):
    """A bare table whose first `left` columns are text, the others numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold", title_style="bold", title_justify="left", **kwargs)
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold")
    return table


def print_facts(console, facts):
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", style="bold", no_wrap=True)
    for name, text in facts.items():
        if text:
            table.add_row(name, escape(text))
    console.print(table)


def by_lif(layers):
    """{row of the terminal: its layers}: a LIF layer with the synapses that feed it; beyond 21 rows, a block's together."""
    rows, waiting = {}, []
    for layer in layers:
        waiting.append(layer)
        if layer["kind"] == "lif" or layer is layers[-1]:
            rows[layer["name"]], waiting = waiting, []
    if len(rows) > 21:
        blocks = {}
        for name, members in rows.items():
            blocks.setdefault(".".join(name.split(".")[:2]) if name.startswith("layer") else name, []).extend(members)
        rows = blocks
    return rows


def report(console, r, teacher, notes):
    """One screen about one checkpoint."""
    layers, ann, speed, on, last = r["layers"], r["ann"], r["speed"], r["evaluated_on"], r["steps"][-1]
    T, at_T = last["T"], f" at T {last['T']}" if r["T"] else ""
    memory = "not measured" if speed["peak_bytes"] is None else f"{speed['peak_bytes'] / 2**20:,.0f} MiB"
    print_facts(console, dict(
        checkpoint=r["file"], network=network(r),
        neuron=r["T"] and f"trained with T {r['T']}, decay {r['arch']['decay']:g}, v_th {r['arch']['v_th']:g}",
        data=f"{on['name']}: {on['test']:,} test images of {'x'.join(map(str, on['shape']))}, {len(on['classes'])} classes",
        teacher=teacher, recorded=f"{r['last']:.2f}% after training, best {r['best']:.2f}% (epoch {r['best_epoch']})" if r["epochs"] else
        "not trained: accuracy is chance, firing rates are those that training starts from",
        measured=None if r["T"] else f"{last['accuracy']:.2f}%, loss {last['loss']:.3f}",
        speed=f"{speed['images_per_s']:,.0f} images/s{at_T}, batch {speed['batch']}, {r['device']}",
        memory=f"{memory} at its peak, {'GPU, data set included' if r['device'].startswith('cuda') else 'the whole process'}"))
    as_relu = f"{si(ann['macs'])} MACs, {si(ann['joules'], 'J')}"
    if not r["T"]:
        return print_facts(console, {"energy": f"{as_relu} an image ({PJ_PER_MAC} pJ per MAC)"} | dict(note="\n".join(notes)))

    table = columns("T", "accuracy", "loss", "accumulates", "MACs", "energy/image", "ANN's energy / ours", left=0)
    for s in r["steps"]:
        table.add_row(str(s["T"]), f"{s['accuracy']:.2f}%", f"{s['loss']:.3f}", si(s["acs"]), si(s["macs"]), si(s["joules"], "J"),
                      f"{ann['joules'] / s['joules']:.2f}" if s["joules"] else "-")
    console.print()
    console.print(table)

    table = columns(f"at T {T}", "neurons", "firing", "dead", "saturated", "MACs", "operations", "energy", gap=1)
    firing = {layer["name"]: sum(layer["rate"][:T]) / T for layer in layers if layer["kind"] == "lif"}
    for name, members in (by_lif(layers) | {"whole network": layers}).items():
        lif, e = [m for m in members if m["kind"] == "lif"], energy(members, T)
        neurons = sum(m["neurons"] for m in lif)
        share = lambda counts: f"{100 * sum(counts) / neurons:.1f}%" if neurons else ""
        table.add_row(escape(name), f"{neurons:,}" if neurons else "", share(m["neurons"] * firing[m["name"]] for m in lif),
                      share(m["dead"][T - 1] for m in lif), share(m["saturated"][T - 1] for m in lif), si(as_ann(members)["macs"]),
                      f"{si(e['acs'])} AC " if e["acs"] else f"{si(e['macs'])} MAC", si(e["joules"], "J"),
                      style="bold" if members is layers else None)
    console.print()
    console.print(table)
    console.print()
    once = [layer for layer in layers if layer.get("once")]
    each = last["joules"] + 1e-12 * PJ_PER_MAC * (T - 1) * sum(layer["macs"] for layer in once)
    sums = [layer["name"] for layer in layers if layer.get("reads") == "sums of spikes"]
    print_facts(console, {
        "as an ANN": f"{as_relu}; {PJ_PER_AC} pJ per accumulate (AC), {PJ_PER_MAC} pJ per MAC (45 nm), batch norms folded",
        "image": once and f"{once[0]['name']} reads it: {si(once[0]['macs'])} MACs, counted once; at each of {T} steps: "
                          f"{si(T * once[0]['macs'])} MACs, {si(each, 'J')} in all",
        "not binary": sums and f"{len(sums)} layers, from {sums[0]} on, read sums of spikes (0, 1, 2, ...), as these blocks add after "
                               "the LIF; an input that is not 0 counts as one accumulate",
        "note": "\n".join(notes)})
    for line in warn(firing):
        console.print(line)


# --------------------------------------------------------------------------------------------- comparison
def compare(results):
    """One row per run: settings, accuracy, epochs to the baseline's best, wall time, energy, and the paper's number."""
    rows = []
    for r in results:
        plain = [b for b in results if b["stage"] == "idsnn" and not b["init"] and not b["kd"] and b["dataset"] == r["dataset"]]
        baseline = max(plain, key=lambda b: b["best"], default=None) if r["T"] else None
        reached = next((row["epoch"] for row in r["history"] if row["test_acc"] >= baseline["best"]), None) if baseline else None
        acc, epoch, table = reported(r) or (None, None, None)
        rows.append(dict(
            run=r["file"], dataset=r["dataset"], network=network(r), initialisation=r["init"], distillation=r["kd"], T=r["T"],
            epochs=r["epochs"], last_acc=r["last"], best_acc=r["best"], best_epoch=r["best_epoch"], baseline=baseline and baseline["file"],
            epochs_to_baseline=reached, seconds=r["seconds"], joules=r.get("joules"), paper_acc=acc, paper_epoch=epoch, paper_table=table))
    return rows


def show_comparison(console, rows):
    def text(value, form="{}"):
        return "-" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else form.format(value)

    def accuracy(value, epoch):
        return text(value, "{:.2f}") + (f" ({epoch})" if epoch else "")

    names = [Path(row["run"]).stem for row in rows]
    for group in dict.fromkeys((row["dataset"], row["network"]) for row in rows):
        table = columns("run", "init", "KD", "T", "epochs", "last %", "best % (ep.)", "to base", "time", "energy", "paper", gap=1,
                        title=", ".join(map(str, group)))
        for row, name in zip(rows, names):
            if (row["dataset"], row["network"]) == group:
                s = row["seconds"]
                clock = s and (f"{s:.0f}s" if s < 100 else f"{s / 60:.0f}m" if s < 6000 else f"{s // 3600:.0f}h{s % 3600 // 60:02.0f}")
                table.add_row(
                    escape(name if names.count(name) == 1 else row["run"]), text(row["initialisation"]), text(row["distillation"]),
                    text(row["T"]), text(row["epochs"]), text(row["last_acc"], "{:.2f}"), accuracy(row["best_acc"], row["best_epoch"]),
                    text(row["epochs_to_baseline"]), text(clock), text(row["joules"] and si(row["joules"], "J")),
                    accuracy(row["paper_acc"], row["paper_epoch"]))
        console.print(table)
        console.print()
    tables = sorted({row["paper_table"] for row in rows if row["paper_table"]})
    bases = sorted({row["baseline"] for row in rows if row["baseline"]})
    print_facts(console, {
        "to base": bases and f"epochs until the best accuracy of {', '.join(bases)}, without initialisation and distillation",
        "energy": any(row["joules"] for row in rows) and f"a test image; {PJ_PER_AC} pJ per accumulate, {PJ_PER_MAC} pJ per MAC (45 nm)",
        "paper": tables and f"best accuracy in {', '.join(tables)}{'; Tables 3 and 4 do not state T' * (tables[-1] > 'Table 2')}"})


# ------------------------------------------------------------------------------------------------ figures
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: safe for colour blindness


def plot(path, results):
    """Figure 5 of all runs, a column per data set; and FILE-firing: firing rates by layer, accuracy over T. Yields what was drawn."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
                         "legend.frameon": False, "figure.constrained_layout.use": True, "savefig.dpi": 200, "lines.markersize": 3})
    for i, r in enumerate(results):
        method = " + ".join(["initialisation"] * bool(r["init"]) + ["distillation"] * bool(r["kd"])) or "baseline"
        how = f"{method}, T {r['T']}" if r["T"] else "ANN"
        r["style"] = dict(color=PALETTE[i % 7], linestyle=("-", "--", ":")[i // 7 % 3], label=f"{Path(r['file']).stem}: {how}")

    def save(fig, path):
        handles = {h.get_label(): h for ax in fig.axes for h in ax.get_legend_handles_labels()[0]}
        fig.legend(handles=handles.values(), loc="outside lower center", ncols=2)
        buffer = io.BytesIO()
        fig.savefig(buffer, format=Path(path).suffix[1:])
        write(path, buffer.getvalue())
        return str(path)

    trained = [r for r in results if r["epochs"]]
    sets = list(dict.fromkeys(r["dataset"] for r in trained))
    if sets:
        shape = (1, 2) if len(sets) == 1 else (2, len(sets))
        fig, axes = plt.subplots(*shape, squeeze=False, figsize=(8.3, 3.9 if len(sets) == 1 else 6.3))
        for name, (top, bottom) in zip(sets, axes if len(sets) == 1 else axes.T):
            runs = [r for r in trained if r["dataset"] == name]
            for r in runs:
                epochs, thin = [row["epoch"] for row in r["history"]], dict(lw=0.8, alpha=0.5, color=r["style"]["color"])
                dots = dict(marker="o") if len(epochs) < 20 else {}
                for ax, key, train in ((top, "test_acc", "train_acc"), (bottom, "test_loss", "ce" if r["T"] else "loss")):
                    ax.plot(epochs, [row[key] for row in r["history"]], lw=1.6, **r["style"], **dots)
                    ax.plot(epochs, [row[train] for row in r["history"]], **thin)
            top.set(title=f"{name}: accuracy (thin: training)", xlabel="epoch", ylabel="%")
            bottom.set(title=f"{name}: cross-entropy (thin: training)", xlabel="epoch")
            bottom.set_ylim(0, 1.2 * np.nanquantile([row["test_loss"] for r in runs for row in r["history"]], 0.9))  # a wild epoch runs off
            for ax in (top, bottom):
                ax.xaxis.get_major_locator().set_params(integer=True)
        yield save(fig, path)

    fired = [r for r in results if r["T"] and "steps" in r]
    if fired:
        fig, (left, right) = plt.subplots(1, 2, figsize=(8.3, 4.2), width_ratios=(3, 2))
        for r in fired:
            lif, T = [layer for layer in r["layers"] if layer["kind"] == "lif"], r["steps"][-1]["T"]
            left.plot([100 * sum(layer["rate"][:T]) / T for layer in lif], marker="o", lw=1.2, **r["style"])
            right.plot([s["T"] for s in r["steps"]], [s["accuracy"] for s in r["steps"]], marker="o", **r["style"])
        names = {tuple(layer["name"] for layer in r["layers"] if layer["kind"] == "lif") for r in fired}
        if len(names) == 1 and len(min(names)) <= 40:
            left.set_xticks(range(len(min(names))), min(names), rotation=90, fontsize=7)
        left.set(title="firing rate by layer (spikes per neuron and step)", ylabel="%", ylim=(0, None),
                 xlabel="" if len(names) == 1 else "spiking layer, from the input")
        right.set(title="test accuracy over T", ylabel="%", xlabel="time-steps", xticks=sorted({s["T"] for r in fired for s in r["steps"]}))
        yield save(fig, Path(path).with_stem(Path(path).stem + "-firing"))


def write(path, content):
    """Bytes to a file, whole or not at all."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path} ({error.strerror}); what stood there before is intact", 1)


# ---------------------------------------------------------------------------------------------------- NIR
NIR_DT = 1e-4  # seconds: the step that snnTorch assumes when it reads NIR


@torch.no_grad()
def to_nir(model, shape):
    """The network as a NIR graph for inputs of `shape`, batch norms folded; edges that meet in a node are summed.

    NIR's LIF is tau dv/dt = r*I - v; spike where v > v_threshold, then v = v_reset. A forward Euler step of dt makes that
    v <- v * (1 - dt/tau) + I * r*dt/tau: with tau = dt / (1 - decay) and r = 1 / (1 - decay), v <- decay * v + I, eq. 2.
    """
    import nir
    nodes, edges, exported = {"input": nir.Input(input_type=np.array(shape))}, [], {model.fc}

    def add(name, node, sources):
        nodes[name] = node
        edges.extend((source, name) for source in sources)
        return [name]

    def size(sources):
        return tuple(int(n) for n in nodes[sources[0]].output_type["output"])

    def folded(name, conv, bn, sources):
        exported.update((conv, bn))
        scale = bn.weight.double() * torch.rsqrt(bn.running_var.double() + bn.eps)
        bias = bn.bias.double() + scale * ((0 if conv.bias is None else conv.bias.double()) - bn.running_mean.double())
        weight, bias = (v.to(conv.weight.dtype).numpy() for v in (conv.weight.double() * scale.view(-1, 1, 1, 1), bias))
        return add(name, nir.Conv2d(size(sources)[1:], weight, conv.stride, conv.padding, conv.dilation, conv.groups, bias), sources)

    def lif(name, bn, sources):
        full = lambda value: np.full(size(sources), value, bn.weight.numpy().dtype)
        n, same = bn.neuron, dict(v_threshold=full(bn.neuron.v_th), v_reset=full(0))
        if n.decay == 1:  # no leak
            return add(name, nir.IF(r=full(1 / NIR_DT), **same), sources)
        return add(name, nir.LIF(tau=full(NIR_DT / (1 - n.decay)), r=full(1 / (1 - n.decay)), v_leak=full(0), **same), sources)

    x = lif("bn1", model.bn1, folded("conv1", model.conv1, model.bn1, ["input"]))
    if not isinstance(model.maxpool, nn.Identity):  # NIR has no max-pool; the largest of some spikes is 1 where their sum is above 0
        c, *hw = size(x)
        x = add("maxpool_sum", nir.SumPool2d(kernel_size=np.array([3, 3]), stride=np.array([2, 2]), padding=np.array([1, 1])), x)
        x = add("maxpool", nir.Threshold(np.full((c, *((n + 1) // 2 for n in hw)), 0.5, np.float32)), x)
    for name, block in model.named_modules():
        if not isinstance(block, (BasicBlock, Bottleneck)):
            continue
        name, sew, shortcut = name.replace(".", "_"), isinstance(block, (SEWBasicBlock, SEWBottleneck)), x
        if not isinstance(block.downsample, nn.Identity):
            shortcut = folded(f"{name}_downsample_0", *block.downsample, x)
            shortcut = lif(f"{name}_downsample_1", block.downsample[1], shortcut) if sew else shortcut
        depth = sum(isinstance(m, nn.Conv2d) for m in block.children())
        for i in range(1, depth + 1):
            bn = getattr(block, f"bn{i}")
            x = folded(f"{name}_conv{i}", getattr(block, f"conv{i}"), bn, x)
            x = lif(f"{name}_bn{i}", bn, x + shortcut if i == depth and not sew else x)
        x = x + shortcut if sew else x
    c, *hw = size(x)
    x = add("avgpool", nir.AvgPool2d(kernel_size=np.array(hw), stride=np.array(hw), padding=np.array([0, 0])), x)
    x = add("flatten", nir.Flatten(input_type=np.array([c, 1, 1]), start_dim=0), x)
    x = add("fc", nir.Affine(model.fc.weight.numpy(), model.fc.bias.numpy()), x)
    add("output", nir.Output(output_type=np.array([model.fc.out_features])), x)
    for name, m in model.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) and m not in exported:
            fail(f"argument --export: {name} is no part of the ResNet in transfer_init.py that this exports")
    return nir.NIRGraph(nodes, edges, metadata=dict(dt=NIR_DT, T=model.neuron.T, encoder=model.encoder, answer="mean of output over T"))


@torch.no_grad()
def run_nir(graph, x):
    """Run a NIR graph in forward Euler steps on inputs x (T, B, C, H, W) -> {node: its outputs (T, B, ...)}."""
    sources = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    order, v, out = list(TopologicalSorter(sources).static_order()), {}, {name: [] for name in graph.nodes}
    tensor, pair = torch.from_numpy, lambda a: tuple(int(n) for n in a)
    for x_t in x:
        for name in order:
            node = graph.nodes[name]
            y = sum(out[s][-1] for s in sources[name]) if sources[name] else x_t
            match type(node).__name__:
                case "Conv2d":
                    y = F.conv2d(y, tensor(node.weight), tensor(node.bias), pair(node.stride), pair(node.padding), pair(node.dilation),
                                 int(node.groups))
                case "LIF" | "IF" as kind:
                    u = v.get(name, torch.zeros_like(y))
                    dv = (tensor(node.v_leak) - u + tensor(node.r) * y) / tensor(node.tau) if kind == "LIF" else tensor(node.r) * y
                    u = u + NIR_DT * dv
                    y = (u > tensor(node.v_threshold)).to(y.dtype)
                    v[name] = torch.where(y > 0, tensor(node.v_reset), u)
                case "SumPool2d" | "AvgPool2d" as kind:
                    y = F.avg_pool2d(y, pair(node.kernel_size), pair(node.stride), pair(node.padding),
                                     divisor_override=1 if kind == "SumPool2d" else None)
                case "Threshold":
                    y = (y > tensor(node.threshold)).to(y.dtype)
                case "Flatten":
                    y = y.flatten(1)
                case "Affine":
                    y = F.linear(y, tensor(node.weight), tensor(node.bias))
            out[name].append(y)
    return {name: torch.stack(values) for name, values in out.items()}


@torch.no_grad()
def export_nir(path, model, data, images=16):
    """Write the graph, read it back, run it beside the network on test images -> what agrees, and what NIR leaves open."""
    import nir
    temporary, ours = f"{path}.tmp", {}
    for name, m in model.named_modules():
        if isinstance(m, BatchNormLIF):
            m.register_forward_hook(lambda m, x, out, name=name: ours.update({name.replace(".", "_"): out}))
    x = model.encode(data.test_x[:images].permute(0, 3, 1, 2), data, 0).contiguous()
    answers = model(x).mean(0).argmax(1)
    try:
        nir.write(temporary, to_nir(model, data.shape))
        graph = nir.read(temporary)
        theirs = run_nir(graph, x if x.dim() == 5 else x.expand(model.neuron.T, *x.shape))
        outputs = sum(s.numel() for s in ours.values())
        differ = sum(int((s != theirs[name].flatten(0, 1)).sum()) for name, s in ours.items())
        if differ > 0.01 * outputs:
            fail(f"argument --export: the exported graph disagrees in {differ:,} of {outputs:,} neuron-steps; {path} was not written", 1)
        os.replace(temporary, path)
    except OSError as error:
        fail(f"cannot write {path} ({error.strerror or error}); what stood there before is intact", 1)
    finally:
        Path(temporary).unlink(missing_ok=True)
    agree = int((answers == theirs["output"].mean(0).argmax(1)).sum())
    why = " (rounding, where a potential all but meets the threshold: --precision fp64 writes doubles)" if differ else ""
    feed = "the normalised image at every step" if model.encoder == "direct" else "Poisson spikes"
    return dict(NIR=f"{path}: {len(graph.nodes)} nodes, {len(graph.edges)} edges; read back and run on {len(answers)} test images: the "
                    f"same in {outputs - differ:,} of {outputs:,} neuron-steps{why}, the same answer to {agree} of {len(answers)} images",
                outside=f"NIR has no time-step: take {NIR_DT:g} s, forward Euler, {model.neuron.T} steps (in the file's metadata). Nor an "
                        f"encoder: feed {feed}. The answer is the mean of `output` over the steps. A simulator that fires at "
                        "v = v_threshold too departs from NIR, and from us")


# --------------------------------------------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    device = init_distributed(args)
    precision, dtype, autocast, _ = set_precision(args, device)
    console, notes, cache = Console(highlight=False), [], {}

    results, checkpoints = [], [load_checkpoint(path) for path in args.checkpoints]  # all of them, before any work starts
    for path, checkpoint in zip(args.checkpoints, checkpoints):
        build(path, checkpoint)
        results.append(describe(path, checkpoint) | dict(device=f"{device_name(device)}, {precision}"))
    r, single = results[0], len(results) == 1
    if single and not r["T"] and (args.T or args.export):
        fail(f"argument {'--T' if args.T else '--export'}: {r['file']} is a teacher, a network without time-steps")

    for r, checkpoint in zip(results, checkpoints):
        if args.no_energy:
            continue
        data = open_data(r, args, cache, device, dtype)
        steps = sorted(set(args.T or range(1, r["T"] + 1))) if r["T"] else [1]
        evaluate(r, checkpoint, data, steps, args, device, dtype, autocast, console)
        if r["data"] and r["data"]["sha256"] != r["evaluated_on"]["sha256"]:
            notes.append(f"{r['file']} was trained beside other images ({r['data']['name']}) than those it was evaluated on")

    if single:
        path, teacher = find_teacher(r) if r["T"] else (None, None)
        if path:
            t = r["teacher"] = describe(path, teacher)
            evaluate(t, teacher, data, [1], args, device, dtype, autocast, console)
            s = t["steps"][0]
            teacher = f"{path}: {s['accuracy']:.2f}%, loss {s['loss']:.3f}, {network(t)}, {si(s['joules'], 'J')} an image"
        report(console, r, teacher, notes)
    rows = compare(results)
    if not single:
        show_comparison(console, rows)
        print_facts(console, dict(note="\n".join(notes)))

    if args.json:
        content = dict(torch=str(torch.__version__), device=results[0]["device"], batch_size=args.batch_size, pj_per_ac=PJ_PER_AC,
                       pj_per_mac=PJ_PER_MAC, runs=results, comparison=rows)
        finite = json.loads(json.dumps(content), parse_constant=lambda name: None)  # JSON has no NaN
        write(args.json, json.dumps(finite, indent=1).encode())
    if args.csv:
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        write(args.csv, table.getvalue().encode())
    if args.plot:
        drawn = list(plot(args.plot, results))
        print_facts(console, dict(figures=", ".join(drawn) or "none: no run here was trained or evaluated"))
    if args.export:
        print_facts(console, export_nir(args.export[1], build(r["file"], checkpoint).to(dtype), data.to("cpu", dtype)))


if __name__ == "__main__":
    run(main)
