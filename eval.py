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
"""
import copy
import csv
import importlib.util
import io
import json
import math
import os
from functools import partial
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # endless spinning makes a busy machine ten times slower
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import nn

from train_teacher import (
    Images,
    Parser,
    ResNet,
    check_classes,
    fail,
    load_checkpoint,
    load_data,
    number,
    read_image,
    run_script,
    setup,
)
from transfer_init import BatchNormLIF, SEWBasicBlock, SEWBottleneck, SpikingResNet


def parse_args(argv=None):
    p = Parser(description="Stage 4: evaluate checkpoints and compare them.")
    # what to evaluate, and how far
    p.add_argument("checkpoints", nargs="*", default=["idsnn.pt"], metavar="FILE",
                   help="checkpoints of any stage")
    p.add_argument("--T", type=time_steps, metavar="T,T,...",
                   help="time-steps after which to report (default 1, 2, ... to the trained T)")
    p.add_argument("--recorded", action="store_true",
                   help="show what training recorded, without a pass over the test set")
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
    # what to make of it
    p.add_argument("--json", metavar="FILE", help="write everything, for scripts")
    p.add_argument("--csv", metavar="FILE", help="write the comparison, a row per checkpoint")
    p.add_argument("--plot", metavar="FILE.png",
                   help="draw the curves over epochs, accuracy over T, firing rates by layer")
    p.add_argument("--predict", nargs="+", metavar="IMAGE",
                   help="classify these image files in place of the test set")
    p.add_argument("--export", nargs=2, metavar=("nir", "FILE"),
                   help="write the network as a NIR graph in place of evaluating it")
    p.set_defaults(deterministic=False)  # a flag of the training stages that setup() reads
    args = p.parse_args(argv)

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("runs as one process: call it without torchrun")
    if args.export and (args.export[0] != "nir" or len(args.checkpoints) > 1):
        fail("argument --export: takes the word nir, a file to write, and one checkpoint")
    if args.plot and Path(args.plot).suffix not in (".png", ".pdf", ".svg"):
        fail(f"argument --plot: {args.plot}: must end in .png, .pdf or .svg")
    for flag, package in (("plot", "matplotlib"), ("export", "nir")):
        if getattr(args, flag) and not importlib.util.find_spec(package):
            fail(f"argument --{flag}: needs the package {package}: pip install {package}")

    # can every output be written? asked now, not after the pass over the test set
    outputs = dict(json=args.json, csv=args.csv, plot=args.plot)
    if args.export:
        outputs["export"] = args.export[1]
    taken = {os.path.realpath(path) for path in args.checkpoints + (args.predict or [])}
    for flag, path in outputs.items():
        if not path:
            continue
        real = os.path.realpath(path)
        where = real if os.path.exists(real) else os.path.dirname(real)
        if real in taken or os.path.isdir(real) or not os.access(where, os.W_OK):
            fail(f"argument --{flag}: cannot write {path}: give another file")
        taken.add(real)
    return args


def time_steps(text):
    """An argparse type: "1,2,4" -> [1, 2, 4]."""
    one = number(int, 1, 32)
    return sorted({one(T) for T in text.split(",")})


# ---------------------------------------------------------------------------------------- counters
PJ_PER_AC, PJ_PER_MAC = 0.9, 4.6  # picojoules


class Counters:
    """Spikes out of every neuron layer and into every convolution and linear layer, by hooks.

    Counts stay on the device: no batch waits for the host. Inside the model tensors are (T*B, ...),
    T outermost, or (B, ...) for what is the same at every step.
    """

    def __init__(self, model, T):
        self.T, self.images = T, 0
        self.layers = {}  # in order of execution
        self.hooks = [
            model.register_forward_pre_hook(self.count_images),
            model.layer4.register_forward_hook(self.keep_last_spikes)]
        for name, module in model.named_modules():
            count = None
            if isinstance(module, BatchNormLIF):
                count = self.count_output
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                count = self.count_input
            if count:
                self.hooks.append(module.register_forward_hook(partial(count, name)))

    def count_images(self, model, inputs):
        self.batch = inputs[0].shape[-4]  # of images (B, C, H, W) or spikes (T, B, C, H, W)
        self.images += self.batch

    def keep_last_spikes(self, layer4, inputs, spikes):
        self.last_spikes = spikes

    def count_output(self, name, module, inputs, spikes):
        self.add(name, spikes, neurons=spikes[0].numel())

    def count_input(self, name, module, inputs, output):
        x = inputs[0]
        macs = output[0].numel() * module.weight[0].numel()
        # of one input: the mean, since padding cuts some off at the edge
        connections = macs / x[0].numel()
        if isinstance(module, nn.Linear):
            x = self.last_spikes  # below the mean over pixels
        self.add(name, x, dense_macs=macs, connections=connections)

    def add(self, name, x, **sizes):
        steps = self.T if len(x) == self.T * self.batch else 1
        # whole numbers: exact in fp32 for an image, in fp64 for a test set
        count = x.flatten(1).sum(1, dtype=torch.float32)  # (steps*B, ...) -> (steps*B,)
        count = count.double().view(steps, -1).sum(1)     # -> (steps,)
        analogue = (x != x.round()).any()
        if name in self.layers:
            count = count + self.layers[name]["count"]
            analogue = analogue | self.layers[name]["analogue"]
        self.layers[name] = dict(sizes, count=count, analogue=analogue)

    def read(self):
        """A dict per layer, in order of execution; takes the hooks off. Lists run over the steps.

        acs and macs: operations of an image in each step, dense_macs: of one pass with ReLU. Only
        of spiking layers: neurons, and rate in spikes per neuron and step.
        """
        for hook in self.hooks:
            hook.remove()
        rows = []
        for name, layer in self.layers.items():
            row = dict(name=name, acs=[], macs=[])
            row["dense_macs"] = layer.get("dense_macs", 0)  # none in a spiking layer
            count = layer["count"] / self.images            # spikes of an image, in each step
            if "neurons" in layer:
                row["neurons"] = layer["neurons"]
                row["rate"] = (count / layer["neurons"]).tolist()
            elif len(count) < self.T:  # the same at every step: once
                row["macs"] = [layer["dense_macs"]]
            elif layer["analogue"]:
                row["macs"] = [layer["dense_macs"]] * self.T
            else:
                row["acs"] = (count * layer["connections"]).tolist()
            rows.append(row)
        return rows


def energy(layers, T):
    """Operations and joules of one image in the first T steps, over layers of Counters.read()."""
    acs = sum(sum(layer["acs"][:T]) for layer in layers)
    macs = sum(sum(layer["macs"][:T]) for layer in layers)
    dense_macs = sum(layer["dense_macs"] for layer in layers)
    joules = 1e-12 * (PJ_PER_AC * acs + PJ_PER_MAC * macs)
    return dict(acs=acs, macs=macs, joules=joules, ann_joules=1e-12 * PJ_PER_MAC * dense_macs)


# -------------------------------------------------------------------------------------- evaluation
def build(path, checkpoint):
    """The network in a checkpoint, ResNet or SpikingResNet, in eval mode."""
    kind = ResNet if checkpoint["stage"] == "teacher" else SpikingResNet
    try:
        model = kind(**checkpoint["arch"])
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        fail(f"{path}: the weights do not fit the network that it describes ({reason})")
    return model.eval()


def describe(path, checkpoint):
    """What a checkpoint says of itself: the part of a result that needs no pass over the data."""
    config, stage = checkpoint["config"], checkpoint["stage"]
    parts = []  # of the paper's method
    if not config.get("no_init"):
        parts.append("init")
    if stage == "idsnn" and not config.get("no_kd"):
        parts.append("KD")
    method = "ANN" if stage == "teacher" else "+".join(parts) or "baseline"
    # a network that was never trained may know its classes and image size alone, or nothing
    data = checkpoint["data"] or {}
    run = {key: checkpoint[key] for key in ("arch", "config", "provenance")}
    return run | dict(
        data=data,
        file=path, name=Path(path).stem, dataset=config["dataset"], method=method,
        # the same pixels and labels, wherever they lie
        images=data.get("sha256"),
        T=checkpoint["arch"].get("T"), history=checkpoint["metrics"]["history"])


def check_data(run, data):
    """Refuse a data set that is not what the network in `run` was made for."""
    has = len(data.classes), data.shape[0]
    wants = run["arch"]["num_classes"], run["arch"]["in_channels"]
    if has != wants:
        fail(f"argument --dataset: {data.name} has {has[0]} classes and {has[1]} channels, "
             f"the network in {run['file']} {wants[0]} and {wants[1]}")
    check_classes(data.classes, run["data"], "network", run["file"])


def scores_over_time(run, model, data, start, stop):
    """Images start..stop of the test set -> class scores (T, B, K) in the parameters' precision.

    T is 1 for a teacher.
    """
    x = data.test_x[start:stop].permute(0, 3, 1, 2)  # uint8 (B, H, W, C) -> (B, C, H, W)
    if run["T"]:
        # Poisson noise by an image's place in the set, not in a batch; the seed of training's
        # own evaluation, so that its accuracy is found again
        index = torch.arange(start, start + len(x), device=x.device)
        seed = run["config"]["seed"] * 10_000
        scores = model(model.encode(x, data, index, seed))
    else:
        scores = model(data.normalize(x)).unsqueeze(0)  # (B, K) -> (1, B, K)
    return scores.to(model.fc.weight.dtype)


@torch.no_grad()
def evaluate(run, model, data, steps, batch_size, console):
    """One pass over the test set -> what it shows after each number of time-steps in `steps`.

    The neuron is causal, so a run of the most steps holds all shorter ones: the answer after t
    steps is the mean of the first t class scores.
    """
    images, K = len(data.test_y), len(data.classes)
    device = data.test_y.device
    # sums over images, read once at the end
    sums = torch.zeros(len(steps), 2, dtype=torch.float64, device=device)  # correct, loss
    correct_by_class = torch.zeros(K, device=device)
    counters = Counters(model, steps[-1])
    for start in track(range(0, images, batch_size), run["file"], console=console,
                       transient=True, disable=not console.is_terminal):
        y = data.test_y[start: start + batch_size]
        scores = scores_over_time(run, model, data, start, start + batch_size)
        for i, t in enumerate(steps):
            answer = scores[:t].mean(0).double()  # (T, B, K) -> (B, K)
            correct = answer.argmax(1) == y
            loss = F.cross_entropy(answer, y, reduction="sum")
            sums[i] += torch.stack([correct.sum(), loss])
        correct_by_class += torch.bincount(y[correct], minlength=K)  # after the last step

    layers = counters.read()
    # spikes per neuron and step, over all steps
    firing = {layer["name"]: np.mean(layer["rate"]).item() for layer in layers if "rate" in layer}
    rows = []
    for t, (accuracy, loss) in zip(steps, (sums / images).tolist()):
        rows.append(dict(T=t, accuracy=100 * accuracy, loss=loss) | energy(layers, t))
    by_class = 100 * correct_by_class / torch.bincount(data.test_y, minlength=K)
    return dict(evaluated_on=data.describe(), steps=rows, firing=firing, layers=layers,
                class_accuracy=dict(zip(data.classes, by_class.tolist())))


# ------------------------------------------------------------------------------------------ tables
def compare(runs):
    """One row per run: its setting, its accuracy in %, its convergence.

    The reference is the best run with neither initialisation nor distillation, of the same network
    and data set. to_base: the first epoch with at least the best accuracy of the reference; sooner:
    the epoch at which the reference had that, over to_base (the paper's Table 4: 192 / 14).
    """
    def accuracy(epoch):
        return epoch["test_acc"]

    # every epoch of the baselines, by network and data set
    baselines = {}
    for run in runs:
        if run["method"] == "baseline":
            epochs = baselines.setdefault(setting(run), [])
            epochs += run["history"]

    rows = []
    for run in runs:
        history, name = run["history"], Path(run["dataset"]).name
        row = dict(run=run["name"], data=name, network=network(run), method=run["method"])
        row |= dict(T=run["T"], epochs=len(history))
        row |= dict.fromkeys(("last", "best", "at", "to_base", "sooner"))  # not known yet
        if history:
            best = max(history, key=accuracy)
            row |= dict(last=accuracy(history[-1]), best=accuracy(best), at=best["epoch"])
        if baselines.get(setting(run)):
            base = max(baselines[setting(run)], key=accuracy)
            reached = [e["epoch"] for e in history if accuracy(e) >= accuracy(base)]
            if reached:
                row |= dict(to_base=reached[0], sooner=base["epoch"] / reached[0])
        rows.append(row)
    return rows


def setting(run):
    """What runs must share to be compared."""
    return network(run), run["images"]


def network(run):
    """Depth / width, and what is not the default: "ResNet-34/64", "SNN-18/64 sew"."""
    arch = run["arch"]
    name = f"SNN-{arch['depth']}" if run["T"] else f"ResNet-{arch['depth']}"
    name += f"/{arch['width']}"
    for choice in (arch.get("block"), arch.get("encoder")):
        if choice not in (None, "basic", "direct"):
            name += f" {choice}"
    return name


def measured(run):
    """What the test set showed of a run: a row per number of time-steps."""
    return [{"run": run["name"], "T": step["T"] if run["T"] else "ANN",
             "accuracy": step["accuracy"], "loss": step["loss"]} | operations(step)
            for step in run["steps"]]


def by_layer(run):
    """Rates and energy of a run: a row per spiking layer with the convolutions that feed it."""
    T = run["steps"][-1]["T"]
    rows, members = [], []
    for layer in run["layers"]:
        members.append(layer)
        if "rate" in layer or layer is run["layers"][-1]:  # the classifier has no neurons
            row = {"layer": layer["name"], "neurons": layer.get("neurons"), "firing %": None}
            if "rate" in layer:
                row["firing %"] = 100 * run["firing"][layer["name"]]
            rows.append(row | operations(energy(members, T)))
            members = []
    return rows


def operations(cost):
    """What `energy` found, in the units of the screen."""
    return {"10^6 AC": cost["acs"] / 1e6, "10^6 MAC": cost["macs"] / 1e6,
            "uJ/image": cost["joules"] * 1e6, "uJ as ANN": cost["ann_joules"] * 1e6}


def show(console, title, rows):
    """Dicts of one layout as a table; a dash for what is not known."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        cells = []
        for value in row.values():
            if value is None or value != value:  # NaN is not itself
                cells.append("-")
            elif isinstance(value, float):
                cells.append(f"{value:,.2f}" if value >= 1 else f"{value:.3g}")
            else:
                cells.append(escape(str(value)))
        table.add_row(*cells)
    console.print(title, style="bold", markup=False)
    console.print(table)
    console.print()


# ------------------------------------------------------------------------------------------ figure
# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot(path, runs):
    """Figure 5, a row per data set; below, accuracy over T and firing rates by layer."""
    import matplotlib
    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot
    datasets = list(dict.fromkeys(run["images"] for run in runs if run["history"]))
    fired = any(run.get("firing") for run in runs)
    rows = len(datasets) + fired
    if not rows:
        fail("argument --plot: nothing to draw: no run here was trained or evaluated")
    size = 8.3, 3.2 * rows + 0.6  # inches: the width of a page
    figure, axes = pyplot.subplots(rows, 2, squeeze=False, figsize=size, layout="constrained")
    if fired:
        left, right = axes[-1]
        left.set(title="test accuracy", xlabel="time-steps", ylabel="%")
        right.set(title="firing rate", xlabel="spiking layer, from the input")
        right.set_ylabel("% of the neurons, per step")

    for i, run in enumerate(runs):
        label = f"{run['name']}: {run['method']}"
        if run["T"]:
            label += f", T {run['T']}"
        color = COLOURS[i % len(COLOURS)]
        dash = ("-", "--", ":")[i // len(COLOURS) % 3]
        style = dict(label=label, color=color, linestyle=dash, marker=".")
        if run["history"]:
            left, right = axes[datasets.index(run["images"])]
            name = Path(run["dataset"]).name
            # a student's `loss` holds the distillation too
            train_loss = "ce" if run["T"] else "loss"
            left.set(title=f"{name}: accuracy (thin: training)", xlabel="epoch", ylabel="%")
            right.set(title=f"{name}: cross-entropy (thin: training)", xlabel="epoch")
            # a column that an older file lacks is a gap
            curve = {key: [epoch.get(key, math.nan) for epoch in run["history"]]
                     for key in ("epoch", "test_acc", "train_acc", "test_loss", train_loss)}
            left.plot(curve["epoch"], curve["test_acc"], **style)
            left.plot(curve["epoch"], curve["train_acc"], color=color, linewidth=0.5)
            right.plot(curve["epoch"], curve["test_loss"], **style)
            right.plot(curve["epoch"], curve[train_loss], color=color, linewidth=0.5)
            # up to a little more than chance has: one wild epoch does not flatten the others
            right.set_ylim(0, 1.2 * math.log(run["arch"]["num_classes"]))
        if run.get("firing"):
            left, right = axes[-1]
            steps = run["steps"]
            left.plot([s["T"] for s in steps], [s["accuracy"] for s in steps], **style)
            right.plot([100 * rate for rate in run["firing"].values()], **style)

    legend = {}  # each run once
    for axis in figure.axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:], dpi=200)
    pyplot.close(figure)
    write(path, buffer.getvalue())


def write(path, content):
    """Bytes to a file, whole or not at all."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fail(f"cannot write {path} ({error.strerror}); what stood there before is intact", 1)


# -------------------------------------------------------------------------------------- predictions
def read_images(paths, described):
    """Image files as the test set of a data set without labels, of the size in `described`."""
    from PIL import Image
    C, H, W = described["shape"]
    pixels = []
    for path in paths:
        try:
            picture = Image.fromarray(read_image(path).squeeze())
        except ValueError as error:
            fail(f"argument --predict: {error}")
        picture = picture.convert("L" if C == 1 else "RGB").resize((W, H))
        pixels.append(torch.from_numpy(np.array(picture)).view(H, W, C))
    x = torch.stack(pixels)
    y = torch.zeros(len(x), dtype=torch.int64)  # not known
    return Images("--predict", described["classes"], x, y, x, y)


@torch.no_grad()
def predict(run, model, data, paths, steps):
    """Class and probability after each number of time-steps in `steps`: a row for each image."""
    scores = scores_over_time(run, model, data, 0, len(paths))
    rows = []
    for i, path in enumerate(paths):
        for t in steps:
            probability, label = scores[:t, i].mean(0).softmax(0).max(0)  # (T, B, K) -> scalars
            rows.append({"image": path, "T": t if run["T"] else "ANN",
                         "class": data.classes[label], "probability": probability.item()})
    return rows


# ---------------------------------------------------------------------------------------------- NIR
NIR_DT = 1e-4  # seconds: the step that snnTorch assumes when it reads NIR


@torch.no_grad()
def to_nir(model, shape):
    """The network as a NIR graph for inputs of `shape`, batch norms folded; what meets is summed.

    NIR's LIF is tau dv/dt = r*I - v; spike where v > v_threshold, then v = v_reset. A forward Euler
    step of dt makes that v <- v * (1 - dt/tau) + I * r*dt/tau: with tau = dt / (1 - decay) and
    r = 1 / (1 - decay), v <- decay * v + I, eq. 2.
    """
    import nir
    nodes, edges = {"input": nir.Input(input_type=np.array(shape))}, []
    exported = {model.fc}

    # x, in all that follows: names of the nodes whose outputs are summed
    def add(name, node, x):
        nodes[name] = node
        edges.extend((source, name) for source in x)
        return [name]

    def size(x):
        return tuple(int(n) for n in nodes[x[0]].output_type["output"])

    def add_conv(name, conv, bn, x):
        exported.update((conv, bn))
        scale = bn.weight.double() * torch.rsqrt(bn.running_var.double() + bn.eps)
        bias = bn.bias.double() - scale * bn.running_mean.double()
        if conv.bias is not None:
            bias += scale * conv.bias.double()
        weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
        dtype = conv.weight.dtype
        C, H, W = size(x)
        node = nir.Conv2d((H, W), weight.to(dtype).numpy(), conv.stride, conv.padding,
                          conv.dilation, conv.groups, bias.to(dtype).numpy())
        return add(name, node, x)

    def add_lif(name, bn, x):
        def full(value):
            return np.full(size(x), value, bn.weight.numpy().dtype)

        fires = dict(v_threshold=full(bn.neuron.v_th), v_reset=full(0))
        leak = 1 - bn.neuron.decay
        if leak == 0:
            return add(name, nir.IF(r=full(1 / NIR_DT), **fires), x)
        lif = nir.LIF(tau=full(NIR_DT / leak), r=full(1 / leak), v_leak=full(0), **fires)
        return add(name, lif, x)

    # stem
    x = add_conv("conv1", model.conv1, model.bn1, ["input"])
    x = add_lif("bn1", model.bn1, x)
    if not isinstance(model.maxpool, nn.Identity):
        # NIR has no max-pool: the largest of some spikes is 1 where their sum is above 0
        C, H, W = size(x)
        window = dict(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
        window = {name: np.array(pair) for name, pair in window.items()}
        x = add("maxpool_sum", nir.SumPool2d(**window), x)
        half = np.full((C, (H + 1) // 2, (W + 1) // 2), 0.5, np.float32)
        x = add("maxpool", nir.Threshold(half), x)

    # blocks
    for name, block in model.named_modules():
        if not hasattr(block, "downsample"):
            continue
        name, shortcut = name.replace(".", "_"), x
        sew = isinstance(block, (SEWBasicBlock, SEWBottleneck))  # LIF before the add, not after it
        if not isinstance(block.downsample, nn.Identity):
            conv, bn = block.downsample
            shortcut = add_conv(f"{name}_downsample_0", conv, bn, x)
            if sew:
                shortcut = add_lif(f"{name}_downsample_1", bn, shortcut)
        last = 3 if hasattr(block, "conv3") else 2
        for i in range(1, last + 1):
            conv, bn = getattr(block, f"conv{i}"), getattr(block, f"bn{i}")
            x = add_conv(f"{name}_conv{i}", conv, bn, x)
            if i == last and not sew:
                x = x + shortcut
            x = add_lif(f"{name}_bn{i}", bn, x)
        if sew:
            x = x + shortcut

    # mean over pixels, and classifier
    C, H, W = size(x)
    pixels = np.array([H, W])
    x = add("avgpool", nir.AvgPool2d(pixels, pixels, np.array([0, 0])), x)
    # counted from the end, so that it leaves a reader's batch dimension alone
    flatten = nir.Flatten(np.array([C, 1, 1]), start_dim=-3)
    x = add("flatten", flatten, x)
    weight, bias = model.fc.weight.numpy(), model.fc.bias.numpy()
    x = add("fc", nir.Affine(weight, bias), x)
    add("output", nir.Output(np.array([model.fc.out_features])), x)

    # a layer that somebody added would be lost in silence
    for name, module in model.named_modules():
        layer = isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))
        if layer and module not in exported:
            fail(f"argument --export: {name} is no part of the ResNet that this exports")
    notes = dict(dt=NIR_DT, T=model.neuron.T, encoder=model.encoder, answer="mean of output over T")
    return nir.NIRGraph(nodes, edges, metadata=notes)


def export_nir(path, model, shape):
    """Write the NIR graph -> lines on what NIR leaves open, and which readers refuse the file."""
    import nir
    buffer, neuron = io.BytesIO(), model.neuron
    nir.write(buffer, to_nir(model, shape))
    write(path, buffer.getvalue())
    feed = "the normalised image" if model.encoder == "direct" else "Poisson spikes"
    notes = [f"{path}: feed {feed} at each of {neuron.T} forward Euler steps of {NIR_DT:g} s;",
             "the answer is the mean of `output` over them."]
    if not isinstance(model.maxpool, nn.Identity):
        notes.append("snnTorch and SpikingJelly refuse the Threshold that stands for max-pool")
    if neuron.decay == 0:
        notes.append("SpikingJelly refuses decay 0")
    if neuron.decay == 1:
        notes.append("snnTorch refuses decay 1")
    return notes


# --------------------------------------------------------------------------------------------- main
def main(argv=None):
    # whatever is wrong with the flags or a checkpoint ends here, before any work
    args = parse_args(argv)
    device, dtype, autocast, _ = setup(args)
    models, runs = [], []
    for path in args.checkpoints:
        checkpoint = load_checkpoint(path)
        models.append(build(path, checkpoint).to(device, dtype))
        runs.append(describe(path, checkpoint))
    single = len(runs) == 1
    for run, model in zip(runs, models):
        if single and not run["T"] and (args.T or args.export):
            flag = "--T" if args.T else "--export"
            fail(f"argument {flag}: {run['file']} is a teacher, a network without time-steps")
        if (args.predict or args.export) and "mean" not in run["data"]:
            fail(f"{run['file']} was not trained on the data that it is meant for, whose mean and "
                 "deviation it records: train it first")
        if run["T"] and args.T:
            model.neuron.T = args.T[-1]

    # the data, all of it before the first pass: test sets, or the user's images
    use_test_set = not (args.recorded or args.predict or args.export)
    datasets, data = {}, []
    for run in runs:
        if args.predict:
            data.append(read_images(args.predict, run["data"]))
        elif use_test_set:
            name = args.dataset or run["dataset"]
            if name not in datasets:
                folder = args.data_dir or run["config"].get("data_dir", "data")
                datasets[name] = load_data(name, folder)
            check_data(run, datasets[name])
            data.append(datasets[name])

    # one pass each
    console = Console(highlight=False)
    for run, model, images in zip(runs, models, data):
        run |= dict(device=str(device), precision=args.precision)
        images = copy.copy(images)  # runs share the pixels, not how they are normalised
        if "mean" in run["data"]:
            images.mean, images.std = run["data"]["mean"], run["data"]["std"]
        images.to(device, dtype)
        steps = [1]
        if run["T"]:
            steps = args.T or list(range(1, run["T"] + 1))
        with autocast:
            if args.predict:
                run["predictions"] = predict(run, model, images, args.predict, steps)
            else:
                run |= evaluate(run, model, images, steps, args.batch_size, console)

    # files before the screen: nothing there can lose them
    rows = compare(runs)
    notes = []  # the screen's last lines
    if args.json:
        content = dict(torch=str(torch.__version__), batch_size=args.batch_size,
                       pj_per_ac=PJ_PER_AC, pj_per_mac=PJ_PER_MAC, runs=runs, comparison=rows)
        # JSON has no NaN
        finite = json.loads(json.dumps(content), parse_constant=lambda name: None)
        write(args.json, json.dumps(finite, indent=1).encode())
    if args.csv:
        lines = [row | {f"T={step['T']}": step["accuracy"] for step in run.get("steps", [])}
                 for row, run in zip(rows, runs)]
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, dict.fromkeys(name for line in lines for name in line))
        table.writeheader()
        table.writerows(lines)
        write(args.csv, text.getvalue().encode())
    if args.plot:
        plot(args.plot, runs)
    if args.export:
        shape = runs[0]["data"]["shape"]  # (C, H, W)
        notes = export_nir(args.export[1], models[0].cpu(), shape)

    # the screen
    if args.predict:
        for run in runs:
            C, H, W = run["data"]["shape"]
            show(console, f"{run['file']}, images resized to {W}x{H} pixels", run["predictions"])
    if args.recorded or use_test_set:
        show(console, "training recorded", rows)
        if not single and any(row["to_base"] for row in rows):
            notes += ["to_base: the first epoch that reaches the best of all baselines here",
                      "sooner: the epoch at which that baseline had it, over to_base"]
    if use_test_set:
        show(console, f"on the test set ({device}, {args.precision})",
             [row for run in runs for row in measured(run)])
        notes.append(f"energy: {PJ_PER_AC} pJ per accumulate (AC), {PJ_PER_MAC} per MAC (45 nm), "
                     "an image; conventions: see eval.py")
    if use_test_set and single:
        run, rates = runs[0], runs[0]["class_accuracy"]
        if run["T"]:
            show(console, f"layers, at T = {steps[-1]}", by_layer(run))
        worst = sorted(rates, key=rates.get)[:3]
        show(console, "worst classes", [{"class": k, "accuracy": rates[k]} for k in worst])
        if run["images"] not in (None, run["evaluated_on"]["sha256"]):
            notes.append(f"note: trained beside other images ({run['data']['name']})")
    for note in notes:
        console.print(note, markup=False)


if __name__ == "__main__":
    run_script(main)
