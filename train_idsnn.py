"""Stage 3: surrogate-gradient training of the Spiking ResNet, distilled from the teacher (paper,
section 3.3)  ->  idsnn.pt

    python train_idsnn.py                          # from snn_init.pt, by the paper's recipe
    torchrun --nproc-per-node 4 train_idsnn.py     # four GPUs, the same global batch and result
    # Table 3's baseline, either flag alone the rows between; Table 4
    python train_idsnn.py --no-init --no-kd --out baseline.pt
    python train_idsnn.py --milestones 10,20,30 --epochs 100 --out table4.pt
    python train_idsnn.py --init idsnn.pt --out tuned.pt       # from a trained one, onwards

From top to bottom: the recipe, the loss, the firing rates, the teacher, main().
"""
import os
import shlex
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

# OpenMP threads that spin endlessly make a busy machine ten times slower
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.distributed as dist
import torch.nn.functional as F

import train_teacher
from kernels.conv import Branch
from kernels.lif import choose_impl
from train_teacher import (
    Batches,
    Parser,
    ResNet,
    TrainingRun,
    add_training_flags,
    average,
    average_gradients,
    earlier_run,
    evaluator,
    fail,
    grouped,
    learning_rate,
    load_checkpoint,
    load_data,
    memory_format,
    number,
    recorded,
    refuse_narrow,
    run_script,
    setup,
    world_size,
)
from transfer_init import IMPL, BatchNormLIF, Neuron, SpikingResNet, add_neuron_flags, check_classes

# ------------------------------------------------------------------------------------------ recipe
# the teacher's, and the loss of eq. 6 to 8. the paper states neither number; these are those of the
# authors' code (alpha is 0.5 in its script for distillation alone)
LOSS = dict(
    alpha=0.3,        # weight of the distillation
    temperature=4.0,  # softens the class scores of teacher and student
)
PAPER = train_teacher.PAPER | LOSS
# a low rate, because a high one erases the transferred weights: 74.64% on CIFAR-100, 87 s in epochs
# on one H200 (results/h200/idsnn-30.jsonl); 60 epochs at 0.2 have 74.92% in 167 s
FAST = train_teacher.FAST | LOSS | dict(epochs=30, lr=0.04, warmup=0.03)
DIGITS = train_teacher.DIGITS | dict(epochs=24)
RECIPES = dict(paper=PAPER, fast=FAST)
# inherited from --init, unless a flag says otherwise
NEURON = [field.name for field in fields(Neuron)]


def parse_args(argv=None):
    """(arguments, checkpoint of --init), which says what the network and its defaults are."""
    p = Parser("Stage 3: train the Spiking ResNet.")
    add = p.add_argument
    # what is trained, and who teaches it
    add("--init", type=os.path.expanduser, default="snn_init.pt",
        help="network of transfer_init.py, or a trained one to continue from")
    add("--teacher", type=os.path.expanduser,
        help="checkpoint of train_teacher.py to distil from (default: that of --init)")
    # rows of Table 3
    add("--no-init", action="store_true", help="ablation: fresh weights of the same network")
    add("--no-kd", action="store_true", help="ablation: cross-entropy alone, no teacher")
    add("--dataset", type=os.path.expanduser, help="cifar10, cifar100, digits, or a folder")
    # the loss
    add("--per-step", action="store_true", help="loss on the scores of every time-step (TET)")
    add("--alpha", type=number(float, 0), help="weight of the distillation loss, eq. 8")
    add("--temperature", type=number(float, 1e-6), help="of the softened class scores, eq. 6")
    add_neuron_flags(p)
    add_training_flags(p, out="idsnn.pt")

    # the file of --init decides defaults: read it first
    path = p.first_pass(argv).init
    init = None
    if os.path.exists(path):
        init = load_checkpoint(path, "init", "idsnn")
        p.set_defaults(**{k: init["arch"][k] for k in NEURON}, dataset=init["config"]["dataset"])
    else:  # enough for --help; a Path, because argparse would parse a str
        p.set_defaults(**dict.fromkeys([*NEURON, "dataset"], Path("as in --init")))
    args = p.parse_with_recipe(argv, RECIPES, DIGITS)
    if init is None:
        fail(f"argument --init: {path} does not exist: transfer_init.py makes it")
    refuse_out(args, args.init, args.teacher or "")
    return args, init


def refuse_out(args, *read):
    """End where --out would be written over a file that this run reads."""
    if os.path.realpath(args.out) in map(os.path.realpath, read):
        fail(f"argument --out: {args.out} is read as --init or --teacher")


# -------------------------------------------------------------------------------------------- loss
def objective(scores, labels, teacher_scores, alpha, temperature, per_step=False):
    """Cross-entropy, distillation and their weighted sum, eq. 6 to 8.

    scores: (T, B, K) of the student. labels: (B,). teacher_scores: (B, K), or None for none. The
    paper takes both of the mean over T; per_step: of every step (TET, Deng et al. 2022).
    """
    answers = scores if per_step else scores.mean(0, keepdim=True)  # (T or 1, B, K)
    steps = len(answers)
    answers = answers.flatten(0, 1)                        # -> (T*B or B, K), T outermost
    ce = F.cross_entropy(answers, labels.repeat(steps))    # labels (B,) -> (T*B or B,)
    kd = torch.zeros_like(ce)
    if teacher_scores is not None:
        kd = distillation(answers, teacher_scores.repeat(steps, 1), temperature)
    return ce, kd, ce + alpha * kd


def distillation(scores, teacher_scores, temperature):
    """temperature^2 * KL(teacher || student) of the softened class scores (B, K), eq. 6 to 8."""
    student = F.log_softmax(scores / temperature, 1)
    teacher = F.log_softmax(teacher_scores / temperature, 1)
    # eq. 7 prints the student first; the authors' code and Hinton et al. have the teacher first
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature ** 2 * kl


# ------------------------------------------------------------------------------------ firing rates
class FiringRates:
    """Mean firing rate (spikes per neuron and step) of every spiking layer, in eval mode."""

    def __init__(self, model):
        layers = {k: m for k, m in model.named_modules() if isinstance(m, BatchNormLIF)}
        self.names, self.neuron_steps = list(layers), [0] * len(layers)  # of an image
        # counted on the device, so that no batch waits for the host
        device = model.fc.weight.device
        self.spikes = torch.zeros(len(layers), dtype=torch.float64, device=device)
        for i, layer in enumerate(layers.values()):
            layer.register_forward_hook(partial(self.count, i))

    def count(self, i, module, inputs, spikes):
        self.neuron_steps[i] = module.neuron.T * spikes[0].numel()
        if not module.training:
            # exact in fp32 for an image; all in fp64 took twice as long on a CPU
            counts = spikes.sum((1, 2, 3), dtype=torch.float32)  # (T*B, C, H, W) -> (T*B,)
            self.spikes[i].add_(counts.sum(dtype=torch.float64))

    def read(self, images):
        """{layer: rate}, of as many images as all processes saw together; then count from 0."""
        if grouped():
            dist.all_reduce(self.spikes)
        spikes = (self.spikes / images).tolist()  # of an image
        self.spikes.zero_()
        return {name: s / n for name, s, n in zip(self.names, spikes, self.neuron_steps)}


def firing_warnings(rates):
    """A line on layers that never fire (no gradient passes), and one on layers that always do."""
    silent = [name for name, rate in rates.items() if rate == 0]
    if silent:
        yield (f"{silent[0]} never fires ({len(silent)} of {len(rates)} layers): "
               "try a lower --v-th, a wider --lens or a lower --lr")
    full = [name for name, rate in rates.items() if rate > 0.999]
    if full:
        yield (f"{full[0]} always fires ({len(full)} of {len(rates)} layers): "
               "try a higher --v-th or a lower --lr")


# ----------------------------------------------------------------------------------------- teacher
def check_fits(data, checkpoint, who, path, remedy):
    """End where the network in `path` is for other classes or channels than `data` have."""
    known = checkpoint["arch"]["num_classes"], checkpoint["arch"]["in_channels"]
    if known != (len(data.classes), data.shape[0]):
        fail(f"the {who} in {path} is for {known[0]} classes and {known[1]} channels, "
             f"{data.name} has {len(data.classes)} and {data.shape[0]}: {remedy}")
    check_classes(data.classes, checkpoint["data"], who, path)


def load_teacher(args, init, data):
    """(network in fp32 on the CPU, what to record of its file); ends where it does not fit."""
    parent = init["parents"].get("teacher")
    if not (args.teacher or parent):
        fail(f"{args.init} names no teacher: say --teacher, or --no-kd")
    path = args.teacher
    if not path:  # as recorded, or beside the file that records it, if both were moved
        path = parent["path"]
        beside = Path(args.init).with_name(Path(path).name)
        if not os.path.exists(path) and beside.exists():
            path = str(beside)
    refuse_out(args, path)  # with --fresh nobody has looked at the file
    checkpoint = load_checkpoint(path, "teacher")
    if not args.teacher and checkpoint["sha256"] != parent["sha256"]:
        fail(f"{path} has changed since {args.init} was made from it, or is another run's: say "
             "with --teacher which one to distil from")
    check_fits(data, checkpoint, "teacher", path, "train one on these data, or say --no-kd")
    if checkpoint["data"]["sha256"] != data.sha256:
        print(f"{path} was trained on other pixels: it sees these normalised by their own mean")
    teacher = ResNet(**checkpoint["arch"])
    teacher.load_state_dict(checkpoint["model"])
    return teacher, dict(path=path, sha256=checkpoint["sha256"])


def frozen(teacher, autocast):
    """The teacher in eval mode, without gradients, its weights cast once and not in each step."""
    teacher.eval().requires_grad_(False)
    if isinstance(autocast, torch.autocast):
        for m in teacher.modules():
            if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)):
                m.to(autocast.fast_dtype)
    return teacher


# -------------------------------------------------------------------------------------------- main
def main(argv=None):
    args, init = parse_args(argv)
    device, dtype, autocast, scaler = setup(args)
    earlier = earlier_run("idsnn", args)

    # data: the whole set as uint8 on the training device
    arch = init["arch"] | {k: getattr(args, k) for k in NEURON}  # a flag overrides the file
    layout = memory_format(device, arch["width"])
    data = load_data(args.dataset, args.data_dir)
    check_fits(data, init, "network", args.init, f"transfer_init.py --dataset {args.dataset}")
    parents = dict(init=dict(path=args.init, sha256=init["sha256"]))
    teacher = None
    if not args.no_kd:
        teacher, parents["teacher"] = load_teacher(args, init, data)
        teacher = frozen(teacher.to(device, dtype, memory_format=layout), autocast)
    data.to(device, dtype, layout)
    refuse_narrow(data, arch["stem"], args)
    batches = Batches(data, args)

    # model: initialised on the CPU (a seed gives the same weights for every device), then filled
    torch.manual_seed(args.seed)
    model = SpikingResNet(**arch)
    if not args.no_init:
        model.load_state_dict(init["model"])
    model.to(device, dtype, memory_format=layout)
    firing = FiringRates(model)

    # optimizer: its rate is a tensor, so that a recorded step reads the current one
    lr = torch.tensor(args.lr, device=device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr, args.momentum, nesterov=args.nesterov,
        weight_decay=args.weight_decay, fused=device.type == "cuda")

    # resume: weights, momentum and history of an interrupted run of the same flags
    run = TrainingRun(args, data, model, optimizer, scaler, earlier,
                      next_command=f"python eval.py {shlex.quote(args.out)}",
                      stage="idsnn", arch=arch, parents=parents)
    if run.finished:
        return

    # one training step, over buffers that are allocated once
    plan = torch.empty(4, args.batch_size // world_size(), dtype=torch.long, device=device)
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, accuracy, ce, kd
    noise_seed = torch.zeros((), dtype=torch.long, device=device)  # of Poisson spikes
    teaching = Branch()  # on a GPU the teacher runs beside the student

    def step():
        optimizer.zero_grad()
        images, labels = batches.cut(plan)                      # (B, C, H, W) uint8, (B,)
        with autocast:
            # plan[0]: which images of the data set; (B, C, H, W) or (T, B, C, H, W)
            inputs = model.encode(images, data, plan[0], noise_seed)
            teacher_scores = None
            if teacher is not None:  # sees normalised images, which are direct coding's input
                normalised = inputs if inputs.dim() == 4 else data.normalize(images)
                with torch.no_grad(), teaching.fork(normalised):
                    teacher_scores = teacher(normalised).to(dtype)  # (B, K)
            scores = model(inputs).to(dtype)                    # (T, B, K)
            teaching.join()
            ce, kd, loss = objective(
                scores, labels, teacher_scores, args.alpha, args.temperature, args.per_step)
        scaler.scale(loss).backward()  # through time: the neurons unroll over T
        average_gradients(model)
        scaler.step(optimizer)
        scaler.update()
        accuracy = (scores.mean(0).argmax(1) == labels).to(dtype).mean()
        sums.add_(torch.stack([loss.detach(), accuracy, ce.detach(), kd.detach()]))

    def predict(images, index):  # the answer is the mean over T, in the weights' precision
        with autocast:
            inputs = model.encode(images, data, index, args.seed * 10_000)
            return model(inputs).to(dtype).mean(0)  # (T, B, K) -> (B, K)

    train_step = recorded(step, args, device)  # on a GPU one launch, not hundreds
    evaluate = evaluator(predict, data, args)

    # loop
    parameters = sum(p.numel() for p in model.parameters())
    taught_by = "none (--no-kd)" if args.no_kd else parents["teacher"]["path"]
    run.header(
        student=f"Spiking ResNet-{arch['depth']} ({arch['block']} blocks, width {arch['width']}, "
                f"{arch['encoder']} encoding), {parameters:,} parameters",
        neuron=f"T {args.T}, decay {args.decay:g}, v_th {args.v_th:g}, lens {args.lens:g}, "
               f"{'reset detached' if args.detach_reset else 'gradient through the reset'}",
        start="fresh weights (--no-init)" if args.no_init else args.init,
        teacher=f"{taught_by}, alpha {args.alpha:g}, temperature {args.temperature:g}",
        loss="of every time-step" if args.per_step else "of the mean over T",
        kernels=choose_impl(model.fc.weight, args.T, IMPL) if args.detach_reset else "reference",
        data=data)
    with run.bar:
        for epoch in range(len(run.history), args.epochs):
            model.train()
            began = time.time()
            sums.zero_()
            noise_seed.fill_(args.seed * 10_000 + epoch + 1)  # another each epoch
            for i, planned in enumerate(batches.plan(epoch)):
                rate = learning_rate(args, epoch + (i + 0.5) / batches.steps)
                lr.fill_(rate)
                plan.copy_(planned)
                train_step()
                run.progress(epoch, i + 1, batches.steps, sums, began)
            average(sums)  # over the processes, each with its share of every batch
            loss, accuracy, ce, kd = (sums / batches.steps).tolist()
            trained = time.time() - began

            model.eval()
            test_acc, test_loss = evaluate()
            rates = firing.read(len(data.test_y))
            run.end_epoch(dict(
                epoch=epoch + 1, loss=loss, ce=ce, kd=kd, train_acc=100 * accuracy,
                test_loss=test_loss, test_acc=test_acc, lr=rate,
                firing=100 * sum(rates.values()) / len(rates), rates=rates,
                images_per_s=batches.steps * args.batch_size / trained,
                seconds=time.time() - began))
            for line in firing_warnings(rates):
                print(f"warning: {line}")

    run.finish()


if __name__ == "__main__":
    run_script(main)
