"""Stage 3: train the Spiking ResNet with surrogate gradients and distillation (paper, section 3.3)  ->  idsnn.pt

    python train_idsnn.py                             # from snn_init.pt, by the paper's recipe
    torchrun --nproc-per-node 4 train_idsnn.py        # four GPUs, the same global batch, the same result
    python train_idsnn.py --no-init --no-kd           # Table 3's baseline; either flag alone gives the rows between
    python train_idsnn.py --milestones 10,20,30 --epochs 100   # Table 4

From top to bottom: the recipe, the loss, the firing rates, main().
"""
import time
from functools import partial

import torch
import torch.nn.functional as F

from kernels.lif import choose_impl
import train_teacher
from train_teacher import (Log, Parser, ResNet, add_training_flags, averaged, batches, check_classes, check_finite, claim, describe_run, earlier_run,
                           epoch_means, evaluate, fail, fill_defaults, init_distributed, learning_rate, load_checkpoint, load_data,
                           make_checkpoint, memory_format, number, parallel, rank, restore, resume_state, run, run_identity,
                           set_precision, sha256_file, show_defaults, weights, world_size)
from transfer_init import BatchNormLIF, SpikingResNet, add_neuron_flags

# the teacher's recipes, and the loss of eq. 5 to 8 with the authors' temperature and alpha: from a good teacher no other
# weight and no loss of every step paid in results/recipes-small
LOSS = dict(alpha=0.3, temperature=4.0, ce="mean", kd="mean", self_kd=0.0)
RECIPES = {name: recipe | LOSS for name, recipe in train_teacher.RECIPES.items()}
RECIPES["fast"]["epochs"] = 60  # more than its teacher has
PAPER = RECIPES["paper"]
DIGITS = train_teacher.DIGITS | dict(epochs=24)


def parse_args(argv=None):
    p = Parser(description="Stage 3: train the Spiking ResNet.")
    p.add_argument("--init", default="snn_init.pt", help="initialised network of transfer_init.py; also says what the network is (default snn_init.pt)")
    p.add_argument("--teacher", help="checkpoint of train_teacher.py to distil from (default: the one that --init was made from)")
    p.add_argument("--no-init", action="store_true", help="ablation: start from fresh weights of the same network")
    p.add_argument("--no-kd", action="store_true", help="ablation: cross-entropy alone, no teacher")
    p.add_argument("--dataset", help="cifar10, cifar100, digits, or a folder (default: as in --init)")
    add_neuron_flags(p, T=None, decay=None, v_th=None, lens=None, detach_reset=None)
    add_training_flags(p, RECIPES, DIGITS, out="idsnn.pt")
    by_recipe = partial(show_defaults, RECIPES, DIGITS)
    p.add_argument("--alpha", type=number(float, 0, 1e3), help=f"weight of the distillation loss, eq. 8 {by_recipe('alpha')}")
    p.add_argument("--temperature", type=number(float, 0, 1e3, above=True), help=f"of the softened class scores, eq. 6, for --self-kd too {by_recipe('temperature')}")
    p.add_argument("--ce", choices=["mean", "steps"], help=f"cross-entropy of the mean over T, eq. 5, or mean over T of every step's (TET) {by_recipe('ce')}")
    p.add_argument("--kd", choices=["mean", "steps"], help=f"the same choice for the distillation from the teacher {by_recipe('kd')}")
    p.add_argument("--self-kd", type=number(float, 0, 1e3), help=f"weight of a distillation from the mean over T to every step {by_recipe('self_kd')}")
    return p.parse_args(argv)  # main() fills what is left out: from --init, then from the recipe


def objective(scores, target, teacher_scores, args):
    """The parts of the loss and their weighted sum: class scores (T, B, K), target shares (B, K), teacher's scores (B, K) or None.

    Eq. 5 to 8 ask it of the mean over T alone. Asked of every step (--ce steps: TET, Deng et al., ICLR 2022; --kd steps and
    --self-kd: temporal-wise distillation, Yu et al., ICML 2025) the first steps learn to be right too.
    """
    asked = dict(mean=scores.mean(0, keepdim=True), steps=scores)                        # (1 or T, B, K)
    pair = lambda asked, answer: (asked.flatten(0, 1), answer.expand_as(asked).flatten(0, 1))  # -> (B or T*B, K), twice
    parts = dict(ce=F.cross_entropy(*pair(asked[args.ce], target), label_smoothing=args.label_smoothing))
    if teacher_scores is not None:
        parts["kd"] = distillation(*pair(asked[args.kd], teacher_scores), args.temperature)
    if args.self_kd:
        parts["self_kd"] = distillation(*pair(scores, asked["mean"].detach()), args.temperature)
    return parts, parts["ce"] + args.alpha * parts.get("kd", 0) + args.self_kd * parts.get("self_kd", 0)


def distillation(scores, teacher_scores, temperature):
    """temperature^2 * KL(teacher || student) of the softened class scores (B, K), mean over the batch (eq. 6-8)."""
    student, teacher = (F.log_softmax(s / temperature, 1) for s in (scores, teacher_scores))
    return temperature ** 2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


class FiringRates:
    """Mean firing rate (spikes per neuron and step) of every spiking layer, over what the network sees in eval mode."""

    def __init__(self, model):
        self.layers = [name for name, m in model.named_modules() if isinstance(m, BatchNormLIF)]
        self.totals = torch.zeros(len(self.layers), 2, dtype=torch.float64, device=model.fc.weight.device)  # spikes, neuron-steps
        for i, name in enumerate(self.layers):
            model.get_submodule(name).register_forward_hook(partial(self.count, i))

    def count(self, i, module, inputs, spikes):
        if not module.training:
            self.totals[i, 0] += spikes.sum(dtype=torch.float64)
            self.totals[i, 1] += spikes.numel()

    def read(self):
        """{layer: rate} over all processes; starts anew."""
        if world_size() > 1:
            torch.distributed.all_reduce(self.totals)
        rates = (self.totals[:, 0] / self.totals[:, 1]).tolist()
        self.totals.zero_()
        return dict(zip(self.layers, rates))


def warn(rates):
    """One line for layers that no gradient reaches because they never fire, or that say nothing because they always do."""
    for what, layers, remedy in (("never fires", [n for n, r in rates.items() if r == 0], "a lower --v-th, a wider --lens or a lower --lr"),
                                 ("always fires", [n for n, r in rates.items() if r > 0.999], "a higher --v-th or a lower --lr")):
        if layers:
            others = f" (as do {len(layers) - 1} more)" if len(layers) > 1 else ""
            yield f"[yellow]warning: {layers[0]} {what}{others}: try {remedy}[/]"


def main(argv=None):
    args = parse_args(argv)
    init = load_checkpoint(args.init, "init")
    parents = {"init": dict(path=args.init, sha256=sha256_file(args.init), config=init["config"])}
    args.dataset = args.dataset or init["config"]["dataset"]
    arch = init["arch"]
    for name in ("T", "decay", "v_th", "lens", "detach_reset"):  # inherited, unless a flag overrides
        if getattr(args, name) is None:
            setattr(args, name, arch[name])
        arch[name] = getattr(args, name)
    fill_defaults(args, RECIPES, DIGITS)
    device = init_distributed(args)
    precision, dtype, autocast, scaler = set_precision(args, device)

    teacher = checkpoint = None
    if not args.no_kd:
        recorded = init["provenance"]["parents"]["teacher"]
        path = args.teacher or recorded["path"]
        checkpoint = load_checkpoint(path, "teacher")
        parents["teacher"] = dict(path=path, sha256=sha256_file(path), config=checkpoint["config"])
        if not args.teacher and parents["teacher"]["sha256"] != recorded["sha256"]:
            fail(f"{path} has changed since {args.init} was made from it: run transfer_init.py again, or say --teacher {path}")
        teacher = ResNet(**checkpoint["arch"])
        teacher.load_state_dict(checkpoint["model"])
        teacher.to(device, dtype, memory_format=memory_format(device, checkpoint["arch"]["width"])).eval().requires_grad_(False)

    data = load_data(args.dataset, args.data_dir)
    for who, path, sizes, remedy in ([("network", args.init, arch, f"transfer_init.py --dataset {args.dataset} makes one that fits")]
                                     + ([("teacher", path, checkpoint["arch"], "train one on that data, or say --no-kd")] if teacher else [])):
        if (sizes["num_classes"], sizes["in_channels"]) != (len(data.classes), data.shape[0]):
            fail(f"the {who} in {path} is for {sizes['num_classes']} classes and {sizes['in_channels']} channels, "
                 f"{args.dataset} has {len(data.classes)} and {data.shape[0]}: {remedy}")
        check_classes(data.classes, (checkpoint if who == "teacher" else init)["data"], who, path)
    if args.batch_size > len(data.train_y):
        fail(f"argument --batch-size: {args.batch_size} is more than the {len(data.train_y)} training images")
    steps = len(data.train_y) // args.batch_size
    identity = run_identity(args, "idsnn", data, parents)
    log_file, earlier = (None, None) if args.profile else (claim(args.out), earlier_run(args, "idsnn", identity))
    layout = memory_format(device, arch["width"])
    data.to(device, dtype, layout)

    torch.manual_seed(args.seed)
    model = SpikingResNet(**arch)
    if not args.no_init:
        model.load_state_dict(init["model"])
    model.to(device, dtype, memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, nesterov=args.nesterov,
                                weight_decay=args.weight_decay, fused=device.type == "cuda")
    product, follow = averaged(model, args, steps)
    history = restore(earlier, model, product, optimizer, scaler) if earlier else []
    firing = FiringRates(product)
    net = parallel(model, args, layout)

    def noise(epoch, step):  # seed of the Poisson encoder
        return (args.seed * 10_000 + epoch) * 1_000_003 + step

    def checkpoint(resume=None):
        best = max(history, key=lambda row: row["test_acc"])["epoch"]
        return make_checkpoint("idsnn", arch, weights(product), args, identity, device,
                               data=data.describe(), parents=parents, metrics=dict(history=history, best_epoch=best)) | (resume or {})

    asked = dict(mean="the mean over T", steps="every time-step")
    log = Log(args, log_file, dict(
        student=f"Spiking ResNet-{arch['depth']} ({arch['block']} blocks, width {arch['width']}, {arch['encoder']} encoding), "
                f"{sum(p.numel() for p in model.parameters()):,} parameters -> {args.out}",
        neuron=f"T {args.T}, decay {args.decay:g}, v_th {args.v_th:g}, lens {args.lens:g}, reset {'detached' if args.detach_reset else 'in the gradient'}",
        start="fresh weights (--no-init)" if args.no_init else f"{args.init} (dataset, network and neuron too, where no flag says otherwise)",
        teacher=f"{path}, alpha {args.alpha:g}, temperature {args.temperature:g}" if teacher else "none (--no-kd)",
        loss=f"cross-entropy of {asked[args.ce]}" + f", distillation of {asked[args.kd]}" * bool(teacher)
             + f", and of every step from the mean, weight {args.self_kd:g}" * (args.self_kd > 0),
        kernels=dict(triton="Triton", torch="PyTorch")[choose_impl(torch.empty(0, dtype=dtype, device=device), args.T, None)],
        data=str(data), **describe_run(args, device, precision)), history)
    with log:
        for epoch in range(len(history), args.epochs):
            net.train()
            began, sums = time.time(), 0  # of loss, accuracy and the loss's parts
            for step, (x, target) in enumerate(batches(data, args, epoch, rank(), world_size())):
                optimizer.param_groups[0]["lr"] = learning_rate(args, epoch + (step + 0.5) / steps)
                with autocast:
                    scores = net(model.encode(x, data, noise(epoch, step), world_size(), rank())).to(dtype)  # (T, B, K)
                    teacher_scores = teacher(data.normalize(x)).to(dtype) if teacher else None               # (B, K)
                    parts, loss = objective(scores, target, teacher_scores, args)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                follow(epoch * steps + step)
                correct = (scores.mean(0).argmax(1) == target.argmax(1)).to(dtype).mean()
                sums = sums + torch.stack([loss.detach(), correct, *(part.detach() for part in parts.values())]).double()
                log.step(epoch, step + 1, steps, sums, time.time() - began)
            loss, accuracy, *means = epoch_means(sums, steps)
            seconds = time.time() - began

            product.eval()
            with autocast:
                test_acc, test_loss = evaluate(lambda x, start: product(product.encode(x, data, noise(0, start))).to(dtype).mean(0), data)
            check_finite(product, (loss, test_loss), args, epoch)
            rates = firing.read()
            history.append(dict(epoch=epoch + 1, loss=loss, **dict(zip(parts, means)), train_acc=100 * accuracy, test_loss=test_loss, test_acc=test_acc,
                                firing=sum(rates.values()) / len(rates), lr=optimizer.param_groups[0]["lr"],
                                images_per_s=steps * args.batch_size / seconds, seconds=time.time() - began, rates=rates))
            log.epoch(history[-1])
            for line in warn(rates):
                log.console.print(line)
            log.save_last(epoch + 1, lambda: checkpoint(resume_state(model, product, optimizer, scaler)))
        log.finish(checkpoint(), f"{args.out}: test accuracy {history[-1]['test_acc']:.2f}%, best epoch {max(r['test_acc'] for r in history):.2f}%")


if __name__ == "__main__":
    run(main)
