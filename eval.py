"""Stage 4: accuracy per time-step, firing rates, energy; tables, curves, predictions, NIR

    python eval.py                                      # idsnn.pt on its own test set
    python eval.py idsnn.pt --T 1,2,4,8                 # more steps than it was trained with
    python eval.py r34.pt base.pt idsnn.pt              # compared (the paper's Tables 1 to 4)
    python eval.py base.pt idsnn.pt --plot fig5.png     # and the curves (Figure 5)
    python eval.py idsnn.pt --predict cat.png dog.png   # the class after each step
    python eval.py idsnn.pt --export nir idsnn.nir      # the network for other simulators

Conventions of the energy estimate, per image, batch norms folded into the convolutions:
  - a layer's MACs are dense: C_in * K * K * C_out * H_out * W_out, padding included;
  - a layer that reads spikes accumulates: k spikes at an input are k accumulates for each of its
    connections (k is 0 or 1; more behind SEW blocks, which add spikes). A step in which a share p
    of the inputs spikes once costs p * MACs;
  - a layer that reads analogue values needs its MACs. Under direct coding the first layer reads the
    same image at every step: counted once;
  - the classifier reads a mean over pixels. The mean is linear, so every spike in it adds one row
    of the classifier: K accumulates for K classes;
  - 0.9 pJ per accumulate, 4.6 pJ per MAC: 45 nm, 32-bit floats (Horowitz, ISSCC 2014). Neurons,
    residual adds, pooling, biases and memory cost nothing here.
The same network as an ANN, with ReLU for spikes, needs every layer's MACs once.

From top to bottom: flags, operations, evaluation, predictions, comparison, figure, NIR, main().
"""
import copy
import json
import math
import os
import sys
import zipfile
from functools import cache, partial
from pathlib import Path

# OpenMP threads that spin endlessly make a busy machine ten times slower
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.nn.functional as F
from rich.markup import escape
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
    fail,
    load_checkpoint,
    load_data,
    memory_format,
    number,
    output,
    read_image,
    run_script,
    setup,
    world_size,
)
from transfer_init import BatchNormLIF, SEWBasicBlock, SEWBottleneck, SpikingResNet

PJ_PER_AC, PJ_PER_MAC = 0.9, 4.6  # picojoules: see above
# of a figure's lines: colours that everybody can tell apart (Okabe and Ito 2008)
COLORS = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000", "#F0E442"
NIR_DT = 1e-4  # seconds: the step that snnTorch assumes when it reads NIR


# ------------------------------------------------------------------------------------------- flags
def parse_args(argv=None):
    p = Parser("Stage 4: evaluate checkpoints and compare them.")
    add = p.add_argument
    add("checkpoints", nargs="*", type=os.path.expanduser, metavar="FILE",
        help="checkpoints of any stage (default: idsnn.pt)")
    add("--T", type=time_steps, metavar="T,T,...",
        help="time-steps after which to report (default: 1 to the T of training)")
    add("--dataset", type=os.path.expanduser,
        help="cifar10, cifar100, digits, or a folder (default: as in training)")
    add("--data-dir", type=os.path.expanduser,
        help="where downloads are kept (default: as in training)")
    add("--batch-size", type=number(int, 1), default=250, help="images per pass")
    add("--precision", choices=["auto", "bf16", "fp16", "fp32", "fp64"], default="auto",
        help="auto: bf16 if the hardware multiplies it, else fp16 on GPUs, fp32 on CPUs")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any")
    # what to make of it
    add("--json", type=output, metavar="FILE", help="write all results as JSON")
    add("--plot", type=output, metavar="FILE.png", help="draw curves over epochs, T and layers")
    add("--predict", nargs="+", type=os.path.expanduser, metavar="IMAGE",
        help="classify image files instead")
    add("--export", nargs=2, type=nir_or_output, metavar=("nir", "FILE"),
        help="write the network of one checkpoint as a NIR graph instead")
    p.set_defaults(deterministic=False)  # a flag of the training stages that setup() reads
    args = p.parse_args(argv)
    args.checkpoints = args.checkpoints or ["idsnn.pt"]

    # what would fail, or do harm, after the pass over the test set should fail now
    if world_size() > 1:
        fail("runs as one process: call it without torchrun")
    if args.export and (args.export[0] != "nir" or len(args.checkpoints) > 1):
        fail("argument --export: takes the word nir, a file to write, and one checkpoint")
    alone = "--predict and --export stand alone: neither evaluates, so that --plot has nothing"
    if args.export and (args.predict or args.plot or args.json):
        fail(alone)
    if args.predict and args.plot:
        fail(alone)
    for file in (args.json, args.export and args.export[1]):
        if file and zipfile.is_zipfile(file):  # as torch.save writes
            fail(f"{file} holds a checkpoint, and would be written over: name another file")
    if args.plot:
        os.environ["MPLBACKEND"] = "agg"  # files alone; a notebook leaves its own backend there
        import matplotlib  # noqa: F401  a missing package shows now, not after the pass
        if Path(args.plot).suffix not in (".png", ".pdf", ".svg"):
            fail(f"argument --plot: {args.plot} must end in .png, .pdf or .svg")
    return args


def nir_or_output(text):
    """An argparse type: the word nir, or a path at which a file can be written."""
    return text if text == "nir" else output(text)


def time_steps(text):
    """An argparse type: "1,2,4" -> [1, 2, 4]."""
    return sorted(set(map(number(int, 1, 32), text.split(","))))


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
        # of one input, on average: padding cuts some off at the edges
        x, = inputs
        self.add(name, x, macs, connections=macs / x[0].numel())

    def count_classifier(self, fc, layer4, inputs, spikes):
        self.add("fc", spikes, fc.weight.numel(), connections=fc.out_features)

    def add(self, name, x, macs, connections):
        steps = self.T if len(x) == self.T * self.batch else 1
        # whole numbers: exact in fp32 for an image, in fp64 for a test set
        spikes = x.flatten(1).sum(1, dtype=torch.float32)   # (steps*B, ...) -> (steps*B,)
        spikes = spikes.double().view(steps, -1).sum(1)     # -> (steps,)
        new = dict(macs=macs, connections=connections, spikes=0, analogue=False)
        layer = self.layers.setdefault(name, new)
        layer["spikes"] += spikes
        layer["analogue"] |= ((x != x.round()) | (x < 0)).any()

    def read(self):
        """A dict per layer, for one image: acs and macs a step, dense_macs a pass with ReLU."""
        rows = []
        for name, layer in self.layers.items():
            acs, macs = [], []
            if len(layer["spikes"]) < self.T:  # the same at every step: once
                macs = [layer["macs"]]
            elif layer["analogue"]:
                macs = [layer["macs"]] * self.T
            else:
                acs = (layer["spikes"] * layer["connections"] / self.images).tolist()
            rows.append(dict(name=name, acs=acs, macs=macs, dense_macs=layer["macs"]))
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
    """What a checkpoint says of itself: all that needs no pass over the data."""
    arch, config, stage = checkpoint["arch"], checkpoint["config"], checkpoint["stage"]
    # the network: depth/width, and what is not the default: "ResNet-34/64", "SNN-18/64 sew"
    network = "ResNet" if stage == "teacher" else "SNN"
    network += f"-{arch['depth']}/{arch['width']}"
    for choice in (arch.get("block"), arch.get("encoder")):
        if choice in ("sew", "poisson"):
            network += f" {choice}"
    # parts of the paper's method
    parts = []
    if not config.get("no_init"):
        parts.append("init")
    if stage == "idsnn" and not config.get("no_kd"):
        parts.append("KD")
    method = "ANN" if stage == "teacher" else "+".join(parts) or "baseline"
    # a network that was never trained may know its classes and image size alone, or nothing
    return dict(
        file=path, name=Path(path).stem, network=network, method=method,
        T=arch.get("T"),                # None: a teacher
        history=checkpoint["history"],  # a dict an epoch
        arch=arch, config=config, data=checkpoint["data"] or {}, parents=checkpoint["parents"])


def scores_over_time(run, model, data, start, stop):
    """Images start..stop of the test set -> class scores (T, B, K), T = 1 of a teacher, in the
    parameters' precision."""
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
    """One pass over the test set -> results after each number of time-steps in `steps`: the neuron
    is causal, so the answer after t steps is the mean of the first t class scores."""
    N = len(data.test_y)
    # correct, loss: sums over images
    sums = torch.zeros(len(steps), 2, dtype=torch.float64, device=data.test_y.device)
    operations, firing = OperationCounter(model, steps[-1]), FiringRates(model)
    for start in track(range(0, N, batch_size), escape(run["file"]), transient=True,
                       disable=not sys.stdout.isatty()):
        y = data.test_y[start: start + batch_size]
        scores = scores_over_time(run, model, data, start, start + batch_size)
        for i, t in enumerate(steps):
            answer = scores[:t].mean(0).double()  # (T, B, K) -> (B, K)
            correct = (answer.argmax(1) == y).sum()
            loss = F.cross_entropy(answer, y, reduction="sum")
            sums[i] += torch.stack([correct, loss])

    layers = operations.read()
    rows = []
    for t, (accuracy, loss) in zip(steps, (sums / N).tolist()):
        row = dict(T=t, accuracy=100 * accuracy, loss=loss)
        rows.append(row | energy(layers, t))
    return dict(evaluated_on=data.describe(), steps=rows, firing=firing.read(N), layers=layers)


# -------------------------------------------------------------------------------------- predictions
def read_images(paths, described):
    """Image files as the test set of a data set without labels, of the size in `described`."""
    from PIL import Image
    C, H, W = described["shape"]
    pixels = []
    for path in paths:
        try:
            image = read_image(path)
        except ValueError as error:
            fail(f"argument --predict: {error}")
        # Pillow knows grey without a channel: (H, W, 1) -> (H, W)
        picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
        picture = picture.convert("L" if C == 1 else "RGB").resize((W, H))
        pixels.append(torch.from_numpy(np.array(picture)).view(H, W, C))
    x = torch.stack(pixels)                     # uint8 (N, H, W, C)
    y = torch.zeros(len(x), dtype=torch.int64)  # not known
    return Images("--predict", described["classes"], x, y, x, y)


@torch.no_grad()
def predict(run, model, data, paths, steps, batch_size):
    """Class and probability after each number of time-steps in `steps`: a row for each image."""
    scores = torch.cat([
        scores_over_time(run, model, data, start, start + batch_size)
        for start in range(0, len(paths), batch_size)], 1)
    rows = []
    for i, path in enumerate(paths):
        for t in steps:  # the answer after t steps, as on a test set
            probability, label = scores[:t, i].mean(0).softmax(0).max(0)  # (T, B, K) -> scalars
            rows.append({"image": path, "T": t if run["T"] else "ANN",
                         "class": data.classes[label], "probability": probability.item()})
    return rows


# ------------------------------------------------------------------------------ comparison, tables
def compare(runs):
    """One row per run. to_base: the first epoch with at least the best accuracy of all runs here
    with neither initialisation nor distillation, of the same network and data (Table 4)."""
    rows = []
    for run in runs:
        curve = [epoch["test_acc"] for epoch in run["history"]]
        setting = run["network"], run["data"].get("sha256"), "baseline"
        base = [epoch["test_acc"] for other in runs for epoch in other["history"]
                if (other["network"], other["data"].get("sha256"), other["method"]) == setting]
        reached = [i + 1 for i, accuracy in enumerate(curve) if base and accuracy >= max(base)]
        row = {"run": run["name"], "network": run["network"], "method": run["method"],
               "T": run["T"], "epochs": len(curve)}
        row |= dict.fromkeys(["last %", "best %", "at", "to_base"])  # not known yet
        if curve:
            best = max(curve)
            row |= {"last %": curve[-1], "best %": best, "at": 1 + curve.index(best)}
        if reached:
            row["to_base"] = reached[0]
        rows.append(row)
    return rows


def show(title, rows):
    """Dicts of one layout as a table, as wide as it has to be."""
    def text(value):
        if isinstance(value, float):  # two decimals, or three digits that count
            return f"{value:,.2f}" if value >= 1 else f"{value:.3g}"
        return "-" if value is None else str(value)

    lines = [list(rows[0])]  # the names of the columns
    lines += [[text(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(title)
    for line in lines:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)))
    print()


# ------------------------------------------------------------------------------------------ figure
def plot(path, runs):
    """Accuracy and loss over epochs (Figure 5); below, accuracy over T and firing rates."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 2, figsize=(8.3, 7), layout="constrained")  # a page's width
    (accuracy, loss), (over_T, firing) = axes
    accuracy.set(title="test accuracy, % (thin: training)", xlabel="epoch")
    loss.set(title="cross-entropy (thin: training)", xlabel="epoch")
    over_T.set(title="test accuracy, %", xlabel="time-steps")
    firing.set(title="firing rate, % of the neurons per step", xlabel="spiking layer")
    # up to a little above chance, so that one wild epoch does not flatten the rest
    classes = max(run["arch"]["num_classes"] for run in runs)
    loss.set_ylim(0, 1.2 * math.log(classes))
    for i, run in enumerate(runs):
        color = COLORS[i % len(COLORS)]
        thick = dict(color=color, marker=".", label=f"{run['name']}: {run['method']}")
        thin = dict(color=color, linewidth=0.5)
        # a student's `loss` holds the distillation too
        train_loss = "ce" if run["T"] else "loss"
        for axis, key, line in [
                (accuracy, "test_acc", thick), (accuracy, "train_acc", thin),
                (loss, "test_loss", thick), (loss, train_loss, thin)]:
            values = [epoch[key] for epoch in run["history"]]
            axis.plot(range(1, 1 + len(values)), values, **line)
        over_T.plot([step["T"] for step in run["steps"]],
                    [step["accuracy"] for step in run["steps"]], **thick)
        firing.plot([100 * rate for rate in run["firing"].values()], **thick)
    for axis in figure.axes:
        axis.xaxis.get_major_locator().set_params(integer=True)  # no half epochs or layers
        axis.grid(alpha=0.3)
    figure.legend(*over_T.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=200)


# --------------------------------------------------------------------------------------------- NIR
@torch.no_grad()
def to_nir(model, shape):
    """The network as a NIR graph for inputs of `shape` (C, H, W), batch norms folded.

    NIR's LIF is tau dv/dt = r*I - v; spike where v > v_threshold, then v = v_reset. A forward Euler
    step of dt makes that v <- v * (1 - dt/tau) + I * r*dt/tau: with tau = dt / (1 - decay) and
    r = 1 / (1 - decay), v <- decay * v + I, eq. 2.
    """
    import nir
    for module in model.modules():
        if isinstance(module, BatchNormLIF):
            check_neuron(module)
    if not isinstance(model.maxpool, nn.Identity):
        fail("--export: NIR has no max-pool, which follows a 7x7 stem")
    # without dots: readers make modules of PyTorch of the nodes
    names = {module: name.replace(".", "_") for name, module in model.named_modules()}
    nodes, edges = {"input": nir.Input(np.array(shape))}, []

    # x, from here on: the names of the nodes whose outputs are summed
    def add(name, node, x):
        nodes[name] = node
        edges.extend((source, name) for source in x)
        return [name]

    def layer(x, conv, bn, residual=()):
        """A convolution with its batch norm, and the neurons behind it where there are some."""
        if not isinstance(conv, nn.Conv2d):
            fail(f"--export: {names[conv]} is no part of the ResNet that this exports")
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
    x = add("avgpool", nir.AvgPool2d(size, size, padding=np.array([0, 0])), x)
    # counted from the end, so that it leaves a reader's batch dimension alone
    means = np.array([C, 1, 1])
    x = add("flatten", nir.Flatten(means, start_dim=-3), x)
    weight, bias = model.fc.weight.numpy(), model.fc.bias.numpy()
    x = add("fc", nir.Affine(weight, bias), x)
    add("output", nir.Output(np.array(bias.shape)), x)

    # a layer that somebody added would be lost in silence
    for module, name in names.items():
        weighs = isinstance(module, (nn.Conv2d, nn.Linear, BatchNormLIF))
        if weighs and name not in nodes:
            fail(f"--export: {name} is no part of the ResNet that this exports")
    notes = dict(dt=NIR_DT, T=model.neuron.T, encoder=model.encoder, answer="mean of output over T")
    return nir.NIRGraph(nodes, edges, metadata=notes)


def check_neuron(bn):
    """End where the neuron was edited: NIR's LIF is that of eq. 2 to 4 alone."""
    neuron, std = bn.neuron, bn.running_var.sqrt()
    # currents of twice the usual spread, for an image of 16x16 pixels
    x = torch.randn(neuron.T, 16, 16, bn.num_features, dtype=std.dtype)
    x = (bn.running_mean + 2 * std * x).permute(0, 3, 1, 2)  # (T, H, W, C) -> (T, C, H, W)
    currents = nn.BatchNorm2d.forward(bn, x)
    u = spikes = wrong = 0
    for current, ours in zip(currents, bn(x)):
        u = u * neuron.decay * (1 - spikes) + current
        spikes = (u > neuron.v_th).to(x.dtype)
        wrong += (spikes != ours).sum()
    if wrong > 1e-3 * x.numel():  # fewer are a matter of rounding
        fail("--export: the neuron was edited, and NIR knows that of eq. 2 to 4 alone")


# -------------------------------------------------------------------------------------------- main
def main(argv=None):
    args = parse_args(argv)
    device, dtype, autocast, _ = setup(args)

    # checkpoints of any stage, and the networks in them
    runs, models = [], []
    for path in args.checkpoints:
        checkpoint = load_checkpoint(path)
        kind = ResNet if checkpoint["stage"] == "teacher" else SpikingResNet
        model = kind(**checkpoint["arch"])
        model.load_state_dict(checkpoint["model"])
        run = describe(path, checkpoint)
        if args.T and run["T"]:
            model.neuron.T = args.T[-1]  # the run of the most steps holds the others
        if (args.predict or args.export) and "mean" not in run["data"]:
            fail(f"{path} does not record the mean and deviation of its data: train it first")
        layout = memory_format(device, run["arch"]["width"])
        models.append(model.to(device, dtype, memory_format=layout).eval())
        runs.append(run)
    if args.export and not run["T"]:
        fail(f"{path} is a teacher, a network without time-steps")
    if len({run["name"] for run in runs}) < len(runs):  # of several folders
        for run in runs:
            run["name"] = run["file"]

    # --export: there is nothing to evaluate
    if args.export:
        import nir
        nir.write(args.export[1], to_nir(model.cpu(), run["data"]["shape"]))
        fed = "spikes of the image (poisson encoding)"
        if model.encoder == "direct":
            fed = "(pixel / 255 - mean) / std of the checkpoint's data (direct encoding)"
        print(f"{args.export[1]}: feed {fed}\n"
              f"at each of {model.neuron.T} forward Euler steps of {NIR_DT:g} s; "
              "the answer is the mean of `output` over them")
        return

    # one pass for each, over the given images or the test set
    load_once = cache(load_data)  # runs may share a data set
    for run, model in zip(runs, models):
        if args.predict:
            images = read_images(args.predict, run["data"])
        else:
            folder = args.data_dir or run["config"].get("data_dir", "data")
            images = load_once(args.dataset or run["config"]["dataset"], folder)
            check_fits(images, run, "network", run["file"], "give its own with --dataset")
            if run["data"].get("sha256", images.sha256) != images.sha256:
                print(f"{run['file']} was trained on other pixels than those of {images.name}")
        images = copy.copy(images)  # runs share the pixels, not how they are normalised
        if "mean" in run["data"]:
            images.mean, images.std = run["data"]["mean"], run["data"]["std"]
        images.to(device, dtype, memory_format(device, run["arch"]["width"]))
        steps = [1]  # of a teacher
        if run["T"]:
            steps = args.T or list(range(1, run["T"] + 1))
        run |= dict(device=str(device), precision=args.precision)
        with autocast:
            if args.predict:
                run["predictions"] = predict(
                    run, model, images, args.predict, steps, args.batch_size)
            else:
                run |= evaluate_over_time(run, model, images, steps, args.batch_size)

    # files before the screen, where nothing can go wrong with them
    rows = compare(runs)
    if args.json:
        content = dict(torch=str(torch.__version__), pj_per_ac=PJ_PER_AC, pj_per_mac=PJ_PER_MAC,
                       runs=runs, comparison=rows)
        # JSON has no NaN: null
        finite = json.loads(json.dumps(content), parse_constant=lambda name: None)
        Path(args.json).write_text(json.dumps(finite, indent=1))
    if args.plot and not args.predict:
        plot(args.plot, runs)

    # the screen: predictions, or how the runs compare
    if args.predict:
        for run in runs:
            C, H, W = run["data"]["shape"]
            show(f"{run['file']}, images resized to {W}x{H} pixels", run["predictions"])
        return
    show("training recorded; to_base: epochs to the best of a baseline here", rows)
    show(f"on the test set ({device}, {args.precision})", [
        {"run": run["name"], "T": step["T"] if run["T"] else "ANN",
         "test %": step["accuracy"], "loss": step["loss"],
         "10^6 AC": step["acs"] / 1e6, "10^6 MAC": step["macs"] / 1e6,
         "uJ/image": step["joules"] * 1e6, "uJ as ANN": step["ann_joules"] * 1e6}
        for run in runs for step in run["steps"]])

    # of one run alone there is room for its layers
    if len(runs) == 1 and run["firing"]:  # a teacher has no spikes
        show(f"firing rates over {steps[-1]} time-steps",
             [{"layer": name, "%": 100 * rate} for name, rate in run["firing"].items()])


if __name__ == "__main__":
    run_script(main)
