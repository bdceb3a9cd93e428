"""Stage 4: accuracy per time-step, firing rates, energy; tables, curves, predictions, NIR

    python eval.py                                      # idsnn.pt on its own test set
    python eval.py idsnn.pt --T 1,2,4,8                 # more steps than it was trained with
    python eval.py r34.pt base.pt idsnn.pt              # compared (the paper's Tables 1 to 4)
    python eval.py base.pt idsnn.pt --plot fig5.png     # and the curves (Figure 5)
    python eval.py idsnn.pt --predict cat.png dog.png   # the class after each step
    python eval.py idsnn.pt --export nir idsnn.nir      # the network for other simulators

Conventions of the energy estimate, per image, batch norms folded into the convolutions:
  - a layer's MACs are dense: C_in * K * K * C_out * H_out * W_out, padding included;
  - a layer that reads spikes accumulates: an input of k spikes is k accumulates at each of its
    connections (k is 0 or 1; more behind SEW blocks, which add spikes). A step in which a share p
    of the inputs spikes once costs p * MACs;
  - a layer that reads analogue values needs its MACs. Under direct coding the first layer reads the
    same image at every step: counted once;
  - the classifier reads a mean over pixels. The mean is linear, so every spike in it adds one row
    of the classifier: K accumulates for K classes. (Non-zero means times K would be fewer
    operations, and those would be multiplications.)
  - 0.9 pJ per accumulate, 4.6 pJ per MAC: 45 nm, 32-bit floats (Horowitz, ISSCC 2014). Neurons,
    residual adds, pooling, biases and memory cost nothing here.
The same network as an ANN, with ReLU for spikes, needs every layer's MACs once.

From top to bottom: the flags, the counter of operations, the pass over the test set, predictions,
the comparison, the files, the figure, NIR, main().
"""
import copy
import csv
import importlib.util
import io
import json
import math
import os
import sys
from collections import defaultdict
from functools import cache, partial
from operator import itemgetter
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # endless spinning makes a busy machine ten times slower
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from train_idsnn import FiringRates, check_fits
from train_teacher import (
    BasicBlock,
    Bottleneck,
    Images,
    Parser,
    ResNet,
    check_writable,
    fail,
    load_checkpoint,
    load_data,
    load_network,
    number,
    read_image,
    run_script,
    setup,
    write_file,
)
from transfer_init import BatchNormLIF, SEWBasicBlock, SEWBottleneck, SpikingResNet

PJ_PER_AC, PJ_PER_MAC = 0.9, 4.6  # picojoules: see above
NIR_DT = 1e-4  # seconds: the step that snnTorch assumes when it reads NIR


# ------------------------------------------------------------------------------------------- flags
def parse_args(argv=None):
    p = Parser(description="Stage 4: evaluate checkpoints and compare them.")
    # what to evaluate, and how far
    p.add_argument("checkpoints", nargs="*", metavar="FILE",
                   help="checkpoints of any stage (default: idsnn.pt)")
    p.add_argument("--T", type=time_steps, metavar="T,T,...",
                   help="time-steps after which to report (default: 1, 2, ... to the trained T)")
    # on what, and how
    p.add_argument("--dataset",
                   help="cifar10, cifar100, digits, or a folder (default: as in training)")
    p.add_argument("--data-dir", help="where downloads are kept (default: as in training)")
    p.add_argument("--batch-size", type=number(int, 1, 1 << 20), default=500,
                   help="images per pass")
    p.add_argument("--precision", choices=["auto", "bf16", "fp16", "fp32", "fp64"], default="auto",
                   help="of the arithmetic; auto: bf16 where the device multiplies it")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                   help="auto: the GPU if there is one")
    # in place of the pass over the test set
    instead = p.add_mutually_exclusive_group()
    instead.add_argument("--recorded", action="store_true",
                         help="only show what training recorded")
    instead.add_argument("--predict", nargs="+", metavar="IMAGE",
                         help="classify these image files")
    instead.add_argument("--export", nargs=2, metavar=("nir", "FILE"),
                         help="write the network as a NIR graph")
    # what to write of it
    p.add_argument("--json", metavar="FILE", help="everything, for scripts")
    p.add_argument("--csv", metavar="FILE", help="the comparison, a row per checkpoint")
    p.add_argument("--plot", metavar="FILE.png",
                   help="curves over epochs, accuracy over T, firing rates by layer")
    p.set_defaults(deterministic=False)  # a flag of the training stages that setup() reads
    args = p.parse_args(argv)
    args.checkpoints = args.checkpoints or ["idsnn.pt"]  # --help would print brackets

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("runs as one process: call it without torchrun")
    alone = len(args.checkpoints) == 1 and not (args.json or args.csv or args.plot)
    if args.export and not (args.export[0] == "nir" and alone):
        fail("argument --export: takes the word nir, a file to write, and one checkpoint; "
             "nothing else is written")
    if args.plot and Path(args.plot).suffix not in (".png", ".pdf", ".svg"):
        fail(f"argument --plot: {args.plot}: must end in .png, .pdf or .svg")
    for flag, package in (("plot", "matplotlib"), ("export", "nir")):
        if getattr(args, flag) and not importlib.util.find_spec(package):
            fail(f"argument --{flag}: needs the package {package}: pip install {package}")

    # can every output be written? asked now, not after the pass over the test set
    outputs = dict(json=args.json, csv=args.csv, plot=args.plot)
    if args.export:
        outputs["export"] = args.export[1]
    # compared by where they are, however they are spelt
    taken = {os.path.realpath(path) for path in args.checkpoints + (args.predict or [])}
    for flag, path in outputs.items():
        if path:
            check_writable(flag, path)
            if os.path.realpath(path) in taken:  # of an input, or of another output
                fail(f"argument --{flag}: {path} is in use by this command: give another file")
            taken.add(os.path.realpath(path))
    return args


def time_steps(text):
    """An argparse type: "1,2,4" -> [1, 2, 4]."""
    one = number(int, 1, 32)
    return sorted({one(T) for T in text.split(",")})


# ------------------------------------------------------------------------------ operations, energy
class OperationCounter:
    """What every convolution and the classifier have to compute, step by step, by hooks.

    Counts stay on the device: no batch waits for the host. Inside the model tensors are (T*B, ...),
    T outermost, or (B, ...) for what is the same at every step.
    """

    def __init__(self, model, T):
        self.T, self.images = T, 0
        self.layers = {}  # in order of execution
        model.register_forward_pre_hook(self.count_images)
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(partial(self.count_convolution, name))
        # the classifier's operations are those of the spikes below the mean over pixels
        model.layer4.register_forward_hook(partial(self.count_classifier, model.fc))

    def count_images(self, model, inputs):
        self.batch = inputs[0].shape[-4]  # of images (B, C, H, W) or spikes (T, B, C, H, W)
        self.images += self.batch

    def count_convolution(self, name, conv, inputs, output):
        macs = output[0].numel() * conv.weight[0].numel()
        # of one input: the mean, since padding cuts some off at the edge
        self.add(name, inputs[0], macs, connections=macs / inputs[0][0].numel())

    def count_classifier(self, fc, layer4, inputs, spikes):
        self.add("fc", spikes, fc.weight.numel(), connections=fc.out_features)

    def add(self, name, x, macs, connections):
        steps = self.T if len(x) == self.T * self.batch else 1
        # whole numbers: exact in fp32 for an image, in fp64 for a test set
        spikes = x.flatten(1).sum(1, dtype=torch.float32)   # (steps*B, ...) -> (steps*B,)
        spikes = spikes.double().view(steps, -1).sum(1)     # -> (steps,)
        sizes = dict(macs=macs, connections=connections)
        layer = self.layers.setdefault(name, dict(sizes, spikes=0, analogue=False))
        layer["spikes"] += spikes
        layer["analogue"] |= (x != x.round()).any()

    def read(self):
        """A dict per layer, in order of execution, for one image.

        acs, macs: operations in each step. dense_macs: of one pass with ReLU.
        """
        rows = []
        for name, layer in self.layers.items():
            row = dict(name=name, acs=[], macs=[], dense_macs=layer["macs"])
            if len(layer["spikes"]) < self.T:  # the same at every step: once
                row["macs"] = [layer["macs"]]
            elif layer["analogue"]:
                row["macs"] = [layer["macs"]] * self.T
            else:
                acs = layer["spikes"] * layer["connections"] / self.images
                row["acs"] = acs.tolist()
            rows.append(row)
        return rows


def energy(layers, T):
    """Operations and joules of an image in the first T steps, over OperationCounter.read()."""
    acs = sum(sum(layer["acs"][:T]) for layer in layers)
    macs = sum(sum(layer["macs"][:T]) for layer in layers)
    dense_macs = sum(layer["dense_macs"] for layer in layers)
    joules = 1e-12 * (PJ_PER_AC * acs + PJ_PER_MAC * macs)
    return dict(acs=acs, macs=macs, joules=joules, ann_joules=1e-12 * PJ_PER_MAC * dense_macs)


# -------------------------------------------------------------------------------------- evaluation
def describe(path, checkpoint):
    """What a checkpoint says of itself: the part of a result that needs no pass over the data."""
    arch, config, stage = checkpoint["arch"], checkpoint["config"], checkpoint["stage"]
    # the network: depth/width, and what is not the default: "ResNet-34/64", "SNN-18/64 sew"
    kind = "ResNet" if stage == "teacher" else "SNN"
    words = [f"{kind}-{arch['depth']}/{arch['width']}"]
    for choice in (arch.get("block"), arch.get("encoder")):
        if choice in ("sew", "poisson"):
            words.append(choice)
    # parts of the paper's method
    parts = []
    if not config.get("no_init"):
        parts.append("init")
    if stage == "idsnn" and not config.get("no_kd"):
        parts.append("KD")
    method = "ANN" if stage == "teacher" else "+".join(parts) or "baseline"
    # a network that was never trained may know its classes and image size alone, or nothing
    data = checkpoint["data"] or {}
    return dict(
        file=path,
        name=Path(path).stem,
        dataset=Path(config["dataset"]).name,
        network=" ".join(words),
        method=method,
        T=arch.get("T"),                           # None: a teacher
        history=checkpoint["metrics"]["history"],  # a dict an epoch
        arch=arch, config=config, data=data, provenance=checkpoint["provenance"])


def scores_over_time(run, model, data, start, stop):
    """Images start..stop of the test set -> class scores (T, B, K) in the parameters' precision.

    T is 1 for a teacher.
    """
    x = data.test_x[start:stop].permute(0, 3, 1, 2)  # uint8 (B, H, W, C) -> (B, C, H, W)
    if run["T"]:
        # Poisson noise by an image's place in the set, not in a batch; the seed of training's
        # own evaluation, so that its accuracy is found again
        index = torch.arange(start, start + len(x), device=x.device)  # (B,)
        seed = run["config"]["seed"] * 10_000
        scores = model(model.encode(x, data, index, seed))
    else:
        scores = model(data.normalize(x)).unsqueeze(0)  # (B, K) -> (1, B, K)
    return scores.to(model.fc.weight.dtype)


@torch.no_grad()
def evaluate_over_time(run, model, data, steps, batch_size):
    """One pass over the test set -> what it shows after each number of time-steps in `steps`.

    The neuron is causal, so a run of the most steps holds all shorter ones: the answer after t
    steps is the mean of the first t class scores.
    """
    N, K = len(data.test_y), len(data.classes)
    device = data.test_y.device
    # sums over images
    sums = torch.zeros(len(steps), 2, dtype=torch.float64, device=device)  # correct, loss
    correct_by_class = torch.zeros(K, device=device)
    operations, firing = OperationCounter(model, steps[-1]), FiringRates(model)
    for start in track(range(0, N, batch_size), run["file"], transient=True,
                       disable=not sys.stdout.isatty()):
        y = data.test_y[start: start + batch_size]
        scores = scores_over_time(run, model, data, start, start + batch_size)
        for i, t in enumerate(steps):
            answer = scores[:t].mean(0).double()  # (T, B, K) -> (B, K)
            correct = answer.argmax(1) == y       # (B,)
            loss = F.cross_entropy(answer, y, reduction="sum")
            sums[i] += torch.stack([correct.sum(), loss])
        correct_by_class += torch.bincount(y[correct], minlength=K)  # after the last step

    layers = operations.read()
    rows = []
    for t, (accuracy, loss) in zip(steps, (sums / N).tolist()):
        row = dict(T=t, accuracy=100 * accuracy, loss=loss)
        rows.append(row | energy(layers, t))
    by_class = 100 * correct_by_class / torch.bincount(data.test_y, minlength=K)
    return dict(evaluated_on=data.describe(), steps=rows, firing=firing.read(), layers=layers,
                class_accuracy=dict(zip(data.classes, by_class.tolist())))


# -------------------------------------------------------------------------------------- predictions
def read_images(paths, described):
    """Image files as the test set of a data set without labels, of the size in `described`."""
    from PIL import Image
    C, H, W = described["shape"]
    pixels = []
    for path in paths:
        try:  # Pillow knows grey without a channel: (H, W, 1) -> (H, W)
            picture = Image.fromarray(read_image(path).squeeze())
        except ValueError as error:
            fail(f"argument --predict: {error}")
        picture = picture.convert("L" if C == 1 else "RGB").resize((W, H))
        pixels.append(torch.from_numpy(np.array(picture)).view(H, W, C))
    x = torch.stack(pixels)                        # uint8 (N, H, W, C)
    y = torch.zeros(len(x), dtype=torch.int64)     # not known
    return Images("--predict", described["classes"], x, y, x, y)


@torch.no_grad()
def predict(run, model, data, paths, steps):
    """Class and probability after each number of time-steps in `steps`: a row for each image."""
    scores = scores_over_time(run, model, data, 0, len(paths))
    rows = []
    for i, path in enumerate(paths):
        for t in steps:  # the answer after t steps, as on a test set
            probability, label = scores[:t, i].mean(0).softmax(0).max(0)  # (T, B, K) -> scalars
            rows.append({"image": path, "T": t if run["T"] else "ANN",
                         "class": data.classes[label], "probability": probability.item()})
    return rows


# --------------------------------------------------------------------------------- tables and files
def compare(runs):
    """One row per run: its setting, its accuracy in %, its convergence.

    The reference is the best run with neither initialisation nor distillation, of the same network
    and data set. to_base: the first epoch with at least the best accuracy of the reference; sooner:
    the epoch at which the reference had that, over to_base (the paper's Table 4: 192 / 14).
    """
    def setting(run):  # the same network on the same pixels and labels, wherever they lie
        return run["network"], run["data"].get("sha256")

    accuracy = itemgetter("test_acc")  # of an epoch
    baselines = defaultdict(list)      # every epoch of them, by setting
    for run in runs:
        if run["method"] == "baseline":
            baselines[setting(run)] += run["history"]

    rows = []
    for run in runs:
        history, reference = run["history"], baselines[setting(run)]
        row = dict(run=run["name"], data=run["dataset"], network=run["network"],
                   method=run["method"], T=run["T"], epochs=len(history))
        row |= dict.fromkeys(("last", "best", "at", "to_base", "sooner"))  # not known yet
        if history:
            best = max(history, key=accuracy)
            row |= dict(last=accuracy(history[-1]), best=accuracy(best), at=best["epoch"])
        if reference:
            base = max(reference, key=accuracy)
            reached = [e["epoch"] for e in history if accuracy(e) >= accuracy(base)]
            if reached:  # not every run gets there
                row |= dict(to_base=reached[0], sooner=base["epoch"] / reached[0])
        rows.append(row)
    return rows


def measured(run):
    """What the test set showed of a run, in the screen's units: a row per number of time-steps."""
    return [{"run": run["name"], "T": step["T"] if run["T"] else "ANN",
             "accuracy": step["accuracy"], "loss": step["loss"],
             "10^6 AC": step["acs"] / 1e6, "10^6 MAC": step["macs"] / 1e6,
             "uJ/image": step["joules"] * 1e6, "uJ as ANN": step["ann_joules"] * 1e6}
            for step in run["steps"]]


def show(title, rows, *notes):
    """Dicts of one layout as a table, as wide as it has to be, and lines below it."""
    def text(value):
        if value is None or value != value:  # not known; NaN is not itself
            return "-"
        if isinstance(value, float):  # two decimals, or three digits that count
            return f"{value:,.2f}" if value >= 1 else f"{value:.3g}"
        return str(value)

    lines = [list(rows[0])]  # the names of the columns
    lines += [[text(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    # words to the left, numbers to the right
    align = ["<" if all(isinstance(row[name], str) for row in rows) else ">" for name in rows[0]]
    print(title)
    for line in lines:
        cells = [f"{cell:{a}{w}}" for cell, a, w in zip(line, align, widths)]
        print("  ".join(cells).rstrip())
    print(*notes, "", sep="\n")


def write_json(path, args, runs, rows):
    content = dict(torch=str(torch.__version__), batch_size=args.batch_size,
                   pj_per_ac=PJ_PER_AC, pj_per_mac=PJ_PER_MAC, runs=runs, comparison=rows)
    # JSON has no NaN: null
    finite = json.loads(json.dumps(content), parse_constant=lambda name: None)
    write_file(path, json.dumps(finite, indent=1).encode())


def write_csv(path, runs, rows):
    """The comparison, and the accuracy after each number of time-steps."""
    lines = [row | {f"T={step['T']}": step["accuracy"] for step in run.get("steps", [])}
             for row, run in zip(rows, runs)]
    text = io.StringIO(newline="")
    # runs may differ in their time-steps: every column that any of them has
    table = csv.DictWriter(text, dict.fromkeys(name for line in lines for name in line))
    table.writeheader()
    table.writerows(lines)
    write_file(path, text.getvalue().encode())


def plot(path, runs):
    """Accuracy and loss over epochs (Figure 5); below, accuracy over T and firing rates."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    style.use("tableau-colorblind10")  # its colours, C0 to C9, can be told apart by everybody
    # over epochs a row for each data set; below, if there was a pass, a row over time-steps
    datasets = list(dict.fromkeys(run["dataset"] for run in runs if run["history"]))
    rows = len(datasets) + any("steps" in run for run in runs)
    if not rows:
        fail("argument --plot: nothing to draw: no run here was trained or evaluated")
    figure = Figure((8.3, 3.2 * rows + 0.6), layout="constrained")  # inches: the width of a page
    axes = figure.subplots(rows, 2, squeeze=False)

    legend = []  # each run once, for all of its curves
    for i, run in enumerate(runs):
        thick = dict(color=f"C{i}", marker=".")
        thin = dict(color=f"C{i}", linewidth=0.5)
        label = f"{run['name']}: {run['network']} {run['method']}"
        legend.append(Line2D([], [], label=label, **thick))
        if run["history"]:
            name = run["dataset"]
            accuracy, loss = axes[datasets.index(name)]
            accuracy.set(title=f"{name}: accuracy, % (thin: training)", xlabel="epoch")
            loss.set(title=f"{name}: cross-entropy (thin: training)", xlabel="epoch")
            # up to a little more than chance has: one wild epoch does not flatten the others
            loss.set_ylim(0, 1.2 * math.log(run["arch"]["num_classes"]))
            # a student's `loss` holds the distillation too
            train_loss = "ce" if run["T"] else "loss"
            for axis, key, line in [
                    (accuracy, "test_acc", thick), (accuracy, "train_acc", thin),
                    (loss, "test_loss", thick), (loss, train_loss, thin)]:
                # a column that an older file lacks is a gap
                values = [epoch.get(key, math.nan) for epoch in run["history"]]
                axis.plot(range(1, 1 + len(values)), values, **line)
        if "steps" in run:
            accuracy, firing = axes[-1]
            accuracy.set(title="test accuracy, %", xlabel="time-steps")
            firing.set(title="firing rate, % of the neurons per step", xlabel="spiking layer")
            T = [step["T"] for step in run["steps"]]
            accuracy.plot(T, [step["accuracy"] for step in run["steps"]], **thick)
            firing.plot([100 * rate for rate in run["firing"].values()], **thick)

    for axis in figure.axes:
        axis.xaxis.get_major_locator().set_params(integer=True)  # no half epochs or layers
        axis.grid(alpha=0.3)
    figure.legend(handles=legend, loc="outside lower center", ncols=2)
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:], dpi=200)
    write_file(path, content.getvalue())


# ---------------------------------------------------------------------------------------------- NIR
@torch.no_grad()
def to_nir(model, shape):
    """The network as a NIR graph for inputs of `shape` (C, H, W), batch norms folded.

    NIR's LIF is tau dv/dt = r*I - v; spike where v > v_threshold, then v = v_reset. A forward Euler
    step of dt makes that v <- v * (1 - dt/tau) + I * r*dt/tau: with tau = dt / (1 - decay) and
    r = 1 / (1 - decay), v <- decay * v + I, eq. 2.
    """
    import nir
    if not isinstance(model.maxpool, nn.Identity):
        fail("argument --export: NIR has no max-pool, which follows a 7x7 stem")
    # without dots: readers make modules of PyTorch of the nodes
    names = {module: name.replace(".", "_") for name, module in model.named_modules()}
    nodes, edges = {"input": nir.Input(np.array(shape))}, []

    # x, in all that follows: names of the nodes whose outputs are summed
    def add(name, node, x):
        nodes[name] = node
        edges.extend((source, name) for source in x)
        return [name]

    def layer(x, conv, bn, residual=()):
        """A convolution with its batch norm, and the neurons behind it where there are some."""
        fused = fuse_conv_bn_eval(conv, bn)
        C, H, W = map(int, nodes[x[0]].output_type["output"])
        node = nir.Conv2d(
            (H, W), fused.weight.numpy(), fused.stride, fused.padding, fused.dilation,
            fused.groups, fused.bias.numpy())
        x = add(names[conv], node, x)
        if not isinstance(bn, BatchNormLIF):
            return x
        # every neuron has its own constants in NIR: (C, H, W)
        ones = np.ones(node.output_type["output"], node.weight.dtype)
        fires = dict(v_threshold=bn.neuron.v_th * ones, v_reset=0 * ones)
        leak = 1 - bn.neuron.decay
        if leak == 0:  # tau would be infinite
            node = nir.IF(r=ones / NIR_DT, **fires)
        else:
            node = nir.LIF(tau=ones * NIR_DT / leak, r=ones / leak, v_leak=0 * ones, **fires)
        return add(names[bn], node, [*x, *residual])

    # stem and blocks
    x = layer(["input"], model.conv1, model.bn1)
    for block in model.modules():
        if not isinstance(block, (BasicBlock, Bottleneck)):
            continue
        shortcut = x
        if not isinstance(block.downsample, nn.Identity):
            shortcut = layer(x, *block.downsample)
        x = layer(x, block.conv1, block.bn1)
        last = block.conv2, block.bn2
        if isinstance(block, Bottleneck):
            x = layer(x, *last)
            last = block.conv3, block.bn3
        if isinstance(block, (SEWBasicBlock, SEWBottleneck)):
            x = layer(x, *last) + shortcut  # LIF before the add
        else:
            x = layer(x, *last, residual=shortcut)

    # mean over pixels, and classifier
    C, H, W = nodes[x[0]].output_type["output"]
    size = np.array([H, W])  # of the one window, and of its stride
    node = nir.AvgPool2d(size, size, padding=np.array([0, 0]))
    x = add("avgpool", node, x)
    # counted from the end, so that it leaves a reader's batch dimension alone
    node = nir.Flatten(np.array([C, 1, 1]), start_dim=-3)
    x = add("flatten", node, x)
    node = nir.Affine(model.fc.weight.numpy(), model.fc.bias.numpy())
    x = add("fc", node, x)
    add("output", nir.Output(np.array([model.fc.out_features])), x)

    # a layer that somebody added would be lost in silence
    for module, name in names.items():
        weighs = isinstance(module, (nn.Conv2d, nn.Linear, BatchNormLIF))
        if weighs and name not in nodes:
            fail(f"argument --export: {name} is no part of the ResNet that this exports")
    notes = dict(dt=NIR_DT, T=model.neuron.T, encoder=model.encoder, answer="mean of output over T")
    return nir.NIRGraph(nodes, edges, metadata=notes)


def export_nir(path, model, shape):
    """Write the NIR graph; say what NIR leaves open, and which readers refuse the file."""
    import nir
    content, neuron = io.BytesIO(), model.neuron
    nir.write(content, to_nir(model, shape))
    write_file(path, content.getvalue())
    feed = "the normalised image" if model.encoder == "direct" else "Poisson spikes"
    print(f"{path}: feed {feed} at each of {neuron.T} forward Euler steps of {NIR_DT:g} s;\n"
          "the answer is the mean of `output` over them")
    if neuron.decay == 0:
        print("SpikingJelly refuses decay 0")
    if neuron.decay == 1:
        print("snnTorch refuses decay 1")


# --------------------------------------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    device, dtype, autocast, _ = setup(args)

    # checkpoints of any stage, and the networks in them
    runs, models = [], []
    for path in args.checkpoints:
        checkpoint = load_checkpoint(path)
        kind = ResNet if checkpoint["stage"] == "teacher" else SpikingResNet
        model = load_network(kind, checkpoint, path, "make it again")
        run = describe(path, checkpoint)
        if args.T and run["T"]:
            model.neuron.T = args.T[-1]  # the run of the most steps holds the others
        if (args.predict or args.export) and "mean" not in run["data"]:
            fail(f"{path} was not trained on the data that it is meant for, whose mean and "
                 "deviation it records: train it first")
        models.append(model.to(device, dtype).eval())
        runs.append(run)
    # of a teacher among others --T is not asked
    if (args.T or args.export) and not any(run["T"] for run in runs):
        flag = "--T" if args.T else "--export"
        fail(f"argument {flag}: {path} is a teacher, a network without time-steps")

    # --export: there is nothing to evaluate
    if args.export:
        export_nir(args.export[1], models[0].cpu(), runs[0]["data"]["shape"])
        return

    # data, all of them before the first pass: the user's images, or test sets
    load_once = cache(load_data)  # runs may share a data set
    sets = []
    for run in runs:
        if args.predict:
            sets.append(read_images(args.predict, run["data"]))
        elif not args.recorded:
            folder = args.data_dir or run["config"].get("data_dir", "data")
            images = load_once(args.dataset or run["config"]["dataset"], folder)
            check_fits(images, run, "network", run["file"], "give its own with --dataset")
            sets.append(images)

    # one pass each
    for run, model, images in zip(runs, models, sets):
        images = copy.copy(images)  # runs share the pixels, not how they are normalised
        if "mean" in run["data"]:
            images.mean, images.std = run["data"]["mean"], run["data"]["std"]
        images.to(device, dtype)
        steps = [1]  # of a teacher
        if run["T"]:
            steps = args.T or list(range(1, run["T"] + 1))
        run |= dict(device=str(device), precision=args.precision)
        with autocast:
            if args.predict:
                run["predictions"] = predict(run, model, images, args.predict, steps)
            else:
                run |= evaluate_over_time(run, model, images, steps, args.batch_size)

    # files before the screen: nothing there can lose them
    rows = compare(runs)
    if args.json:
        write_json(args.json, args, runs, rows)
    if args.csv:
        write_csv(args.csv, runs, rows)
    if args.plot:
        plot(args.plot, runs)

    # the screen: predictions, or how the runs compare
    if args.predict:
        for run in runs:
            C, H, W = run["data"]["shape"]
            show(f"{run['file']}, images resized to {W}x{H} pixels", run["predictions"])
        return
    notes = []
    if any(row["to_base"] for row in rows):
        notes = ["to_base: the first epoch that reaches the best of all baselines here",
                 "sooner: the epoch at which that baseline had it, over to_base"]
    show("training recorded", rows, *notes)
    if args.recorded:  # there was no pass
        return
    show(f"on the test set ({device}, {args.precision})",
         [row for run in runs for row in measured(run)],
         f"energy: {PJ_PER_AC} pJ per accumulate (AC), {PJ_PER_MAC} per MAC: see eval.py")

    # of one run alone there is room for its layers and classes
    if len(runs) == 1:
        firing, by_class = run["firing"], run["class_accuracy"]
        if firing:  # a teacher has no spikes
            show(f"firing rates over {steps[-1]} time-steps",
                 [{"layer": name, "%": 100 * rate} for name, rate in firing.items()])
        worst = sorted(by_class, key=by_class.get)[:3]
        show("worst classes", [{"class": k, "accuracy": by_class[k]} for k in worst])
    for run in runs:
        if run["data"].get("sha256") not in (None, run["evaluated_on"]["sha256"]):
            print(f"note: {run['name']} was trained beside other images ({run['data']['name']})")


if __name__ == "__main__":
    run_script(main)
