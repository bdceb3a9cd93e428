"""Stage 3: surrogate-gradient training of the Spiking ResNet, distilled from the teacher (paper,
section 3.3)  ->  idsnn.pt

    python train_idsnn.py                          # from snn_init.pt, by the paper's recipe
    torchrun --nproc-per-node 4 train_idsnn.py     # four GPUs, the same global batch and result
    python train_idsnn.py --no-init --no-kd        # Table 3's baseline; either flag alone: the rest
    python train_idsnn.py --milestones 10,20,30 --epochs 100   # Table 4

From top to bottom: the recipe, the loss, the firing rates, main().
"""
import os
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # endless spinning makes a busy machine ten times slower
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.distributed as dist
import torch.nn.functional as F

import train_teacher
from kernels.lif import choose_impl
from train_teacher import (
    Batches,
    Parser,
    ResNet,
    TrainingRun,
    add_training_flags,
    evaluate,
    fail,
    learning_rate,
    load_checkpoint,
    load_data,
    load_network,
    load_state,
    memory_format,
    number,
    parallel,
    recorded,
    run_script,
    setup,
    world_size,
)
from transfer_init import BatchNormLIF, Neuron, SpikingResNet, add_neuron_flags, check_classes

# ------------------------------------------------------------------------------------------ recipe
# the teacher's, and the loss of eq. 6 to 8. the paper gives neither number: the authors' code has
# these (0.5 in its script for distillation alone)
LOSS = dict(
    alpha=0.3,        # weight of the distillation
    temperature=4.0,  # softens the class scores of teacher and student
)
PAPER = train_teacher.PAPER | LOSS
FAST = train_teacher.FAST | LOSS | dict(epochs=60)  # more than its teacher has
DIGITS = train_teacher.DIGITS | dict(epochs=24)
RECIPES = dict(paper=PAPER, fast=FAST)
# inherited from --init, unless a flag says otherwise
NEURON = [field.name for field in fields(Neuron)]


def parse_args(argv=None):
    """(arguments, checkpoint of --init), which says what the network and its defaults are."""
    p = Parser(description="Stage 3: train the Spiking ResNet.")
    p.add_argument("--init", default="snn_init.pt",
                   help="network that transfer_init.py made; also says what network it is")
    p.add_argument("--teacher", help="checkpoint of train_teacher.py to distil from "
                                     "(default: the one that --init was made from)")
    p.add_argument("--no-init", action="store_true",
                   help="ablation: start from fresh weights of the same network")
    p.add_argument("--no-kd", action="store_true", help="ablation: cross-entropy alone, no teacher")
    p.add_argument("--per-step", action="store_true",
                   help="ask the loss of every time-step, not of their mean: better cut short")
    p.add_argument("--dataset", help="cifar10, cifar100, digits, or a folder")
    p.add_argument("--alpha", type=number(float, 0, 1e3),
                   help="weight of the distillation loss, eq. 8")
    p.add_argument("--temperature", type=number(float, 0, 1e3, above=True),
                   help="of the softened class scores, eq. 6")
    add_neuron_flags(p)
    add_training_flags(p, out="idsnn.pt")

    # the file of --init decides defaults: read it first
    first, _ = p.parse_known_args(argv)
    if first.help and not os.path.exists(first.init):
        inherited = Path("as in --init")  # only shown; argparse would parse a text
        p.set_defaults(**dict.fromkeys(["dataset", *NEURON], inherited))
        return p.parse_with_recipe(argv, RECIPES, DIGITS), None
    init = load_checkpoint(first.init, "init")
    p.set_defaults(dataset=init["config"]["dataset"], **{k: init["arch"][k] for k in NEURON})
    return p.parse_with_recipe(argv, RECIPES, DIGITS), init


# -------------------------------------------------------------------------------------------- loss
def objective(scores, labels, teacher_scores, alpha, temperature, per_step=False):
    """Cross-entropy, distillation and their weighted sum, eq. 5 to 8.

    scores: (T, B, K) of the student. labels: (B,). teacher_scores: (B, K), or None for none.
    The paper asks both of the mean over T; per_step asks both of every step, so that the first ones
    learn to be right too (TET, Deng et al. 2022; temporal-wise distillation, Yu et al. 2025).
    """
    answers = scores if per_step else scores.mean(0, keepdim=True)  # (T or 1, B, K)
    steps = len(answers)
    ce = F.cross_entropy(answers.flatten(0, 1), labels.repeat(steps))
    kd = torch.zeros_like(ce)
    if teacher_scores is not None:
        kd = distillation(answers.flatten(0, 1), teacher_scores.repeat(steps, 1), temperature)
    return ce, kd, ce + alpha * kd


def distillation(scores, teacher_scores, temperature):
    """temperature^2 * KL(teacher || student) of the softened class scores (B, K), eq. 6 to 8."""
    student = F.log_softmax(scores / temperature, 1)
    teacher = F.log_softmax(teacher_scores / temperature, 1)
    # eq. 7 prints the student first; the authors' code has the teacher first, as Hinton et al.
    kl = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature ** 2 * kl


# ------------------------------------------------------------------------------------ firing rates
class FiringRates:
    """Mean firing rate (spikes per neuron and step) of every spiking layer, in eval mode."""

    def __init__(self, model):
        self.layers = [k for k, m in model.named_modules() if isinstance(m, BatchNormLIF)]
        device = model.fc.weight.device
        # spikes, neuron-steps
        self.totals = torch.zeros(len(self.layers), 2, dtype=torch.float64, device=device)
        for i, name in enumerate(self.layers):
            model.get_submodule(name).register_forward_hook(partial(self.count, i))

    def count(self, i, module, inputs, spikes):
        if not module.training:
            self.totals[i, 0] += spikes.sum(dtype=torch.float64)
            self.totals[i, 1] += spikes.numel()

    def read(self):
        """{layer: rate} over all processes; starts anew."""
        if world_size() > 1:
            dist.all_reduce(self.totals)
        rates = (self.totals[:, 0] / self.totals[:, 1]).tolist()
        self.totals.zero_()
        return dict(zip(self.layers, rates))


def firing_warnings(rates):
    """A line on layers that never fire (no gradient passes), one on layers that always do."""
    silent = [name for name, rate in rates.items() if rate == 0]
    if silent:
        yield (f"{silent[0]} never fires ({len(silent)} of {len(rates)} layers): "
               "try a lower --v-th, a wider --lens or a lower --lr")
    full = [name for name, rate in rates.items() if rate > 0.999]
    if full:
        yield (f"{full[0]} always fires ({len(full)} of {len(rates)} layers): "
               "try a higher --v-th or a lower --lr")


# -------------------------------------------------------------------------------------------- main
def check_fits(data, checkpoint, who, path, remedy):
    """End where the network in `path` is for other classes or channels than `data` have."""
    arch = checkpoint["arch"]
    if (arch["num_classes"], arch["in_channels"]) != (len(data.classes), data.shape[0]):
        fail(f"the {who} in {path} is for {arch['num_classes']} classes and {arch['in_channels']} "
             f"channels, {data.name} has {len(data.classes)} and {data.shape[0]}: {remedy}")
    check_classes(data.classes, checkpoint["data"], who, path)


def load_teacher(args, init, data):
    """(network in fp32 on the CPU, what is recorded of its file); ends where it does not fit."""
    parent = init["provenance"]["parents"]["teacher"]
    path = args.teacher or parent["path"]
    beside = Path(args.init).parent / Path(path).name  # where both files were moved
    if not args.teacher and not os.path.exists(path) and beside.exists():
        path = str(beside)
    if not args.teacher and parent.get("bare"):
        fail(f"{args.init} was made from bare weights ({path}), which know no classes: "
             "say --no-kd, or --teacher with a checkpoint of train_teacher.py")
    if not os.path.exists(path) and not args.teacher:
        fail(f"the teacher {path}, named in {args.init}, does not exist: say --teacher, or --no-kd")
    checkpoint = load_checkpoint(path, "teacher")
    if not args.teacher and checkpoint["sha256"] != parent["sha256"]:
        fail(f"{path} has changed since {args.init} was made from it: run transfer_init.py again, "
             f"or say --teacher {path}")
    check_fits(data, checkpoint, "teacher", path, "train one on these data, or say --no-kd")
    teacher = load_network(ResNet, checkpoint, path, "train it again, or say --no-kd")
    return teacher, dict(path=path, sha256=checkpoint["sha256"])


def frozen(teacher, args, autocast):
    """The teacher as each step asks it: without gradients, and compiled with --compile."""
    teacher.eval().requires_grad_(False)
    if args.precision in ("bf16", "fp16"):  # cast once, not by autocast at every step
        for m in teacher.modules():
            if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)):
                m.to(autocast.fast_dtype)
    return torch.compile(teacher) if args.compile else teacher


def main(argv=None):
    args, init = parse_args(argv)
    device, dtype, autocast, scaler = setup(args)

    # data: the whole set as uint8 on the training device
    arch = init["arch"] | {k: getattr(args, k) for k in NEURON}
    layout = memory_format(device, arch["width"])
    data = load_data(args.dataset, args.data_dir)
    check_fits(data, init, "network", args.init, f"transfer_init.py --dataset {args.dataset}")
    parents = dict(init=dict(path=args.init, sha256=init["sha256"], config=init["config"]))
    teacher = None
    if not args.no_kd:
        teacher, parents["teacher"] = load_teacher(args, init, data)
        teacher = frozen(teacher.to(device, dtype, memory_format=layout), args, autocast)
    data.to(device, dtype, layout)
    run = TrainingRun("idsnn", args, data, parents)  # finds what an earlier run left
    batches = Batches(data, args)

    # model: from the teacher's weights, or drawn on the CPU: a seed means the same everywhere
    torch.manual_seed(args.seed)
    model = SpikingResNet(**arch)
    if not args.no_init:
        load_state(model, init["model"], args.init, "run transfer_init.py again")
    model.to(device, dtype, memory_format=layout)
    firing = FiringRates(model)
    net = parallel(model, args, layout)

    # optimizer: its rate is a tensor, which a recorded step reads anew at each replay
    lr = torch.tensor(args.lr, device=device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr, args.momentum, nesterov=args.nesterov,
        weight_decay=args.weight_decay, fused=device.type == "cuda")

    # resume: weights, momentum and scaler of an interrupted run
    epochs_done = run.restore(arch, model, optimizer, scaler)

    # one training step, over buffers that are made once
    plan = torch.empty(4, args.batch_size // world_size(), dtype=torch.long, device=device)
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, accuracy, ce, kd
    noise_seed = 0  # of Poisson spikes, another each epoch

    def step():
        images, labels = batches.cut(plan)                      # (B, C, H, W) uint8, (B,)
        with autocast:
            inputs = model.encode(images, data, plan[0], noise_seed)  # (B, ...) or (T, B, ...)
            scores = net(inputs).to(dtype)                      # (T, B, K)
            taught = None
            if teacher is not None:  # sees the normalised image, which direct coding has made
                normalised = inputs if inputs.dim() == 4 else data.normalize(images)
                taught = teacher(normalised).to(dtype)          # (B, K)
            ce, kd, loss = objective(
                scores, labels, taught, args.alpha, args.temperature, args.per_step)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        accuracy = (scores.mean(0).argmax(1) == labels).to(dtype).mean()
        sums.add_(torch.stack([loss.detach(), accuracy, ce.detach(), kd.detach()]))

    # the seed of Poisson spikes is the host's
    train_step = recorded(step, args, device, on_device=arch["encoder"] == "direct")

    # loop
    parameters = sum(p.numel() for p in model.parameters())
    impl = choose_impl(model.fc.weight, args.T, None)
    teaching = "none (--no-kd)"
    if teacher is not None:
        path = parents["teacher"]["path"]
        teaching = f"{path}, alpha {args.alpha:g}, temperature {args.temperature:g}"
    run.header(
        student=f"Spiking ResNet-{arch['depth']} ({arch['block']} blocks, width {arch['width']}, "
                f"{arch['encoder']} encoding), {parameters:,} parameters",
        neuron=f"T {args.T}, decay {args.decay:g}, v_th {args.v_th:g}, lens {args.lens:g}, "
               f"{'reset detached' if args.detach_reset else 'gradient through the reset'}",
        start="fresh weights (--no-init)" if args.no_init else args.init,
        teacher=teaching,
        loss="of every time-step" if args.per_step else "of the mean over T",
        kernels=impl, data=data)
    with run:
        for epoch in range(epochs_done, args.epochs):
            net.train()
            began = time.time()
            sums.zero_()
            noise_seed = args.seed * 10_000 + epoch + 1
            for i, planned in enumerate(batches.plan(epoch)):
                rate = learning_rate(args, epoch + (i + 0.5) / batches.steps)
                lr.fill_(rate)
                plan.copy_(planned)
                train_step()
                run.progress(epoch, i + 1, batches.steps, sums, began)
            loss, accuracy, ce, kd = run.means(sums, batches.steps)
            trained = time.time() - began

            model.eval()

            def predict(images, index):  # the answer is the mean over T, in the weights' precision
                inputs = model.encode(images, data, index, args.seed * 10_000)
                return model(inputs).to(dtype).mean(0)

            with autocast:
                test_acc, test_loss = evaluate(predict, data)
            rates = firing.read()
            row = dict(
                epoch=epoch + 1, loss=loss, ce=ce, kd=kd, train_acc=100 * accuracy,
                test_loss=test_loss, test_acc=test_acc, lr=rate,
                firing=100 * sum(rates.values()) / len(rates), rates=rates,
                images_per_s=batches.steps * args.batch_size / trained,
                seconds=time.time() - began)
            run.end_epoch(row)
            for line in firing_warnings(rates):
                run.say(f"warning: {line}")

        # save: the last weights; then what to run next
        run.finish(f"python eval.py {args.out}")


if __name__ == "__main__":
    run_script(main)
