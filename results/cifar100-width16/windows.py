"""Where a Spiking ResNet passes gradients: its layers at the start and after training.

    python results/cifar100-width16/windows.py snn_init.pt idsnn.pt baseline-16.pt

A neuron-step passes a gradient where its potential lies less than `lens` from the threshold, in the
surrogate's window. First the network of the first file with fresh weights, then the files; a row
for each spiking layer, over the first 512 training images as they are, in fp32; the batch's own
statistics normalise, as in training:

    fires   % of the neuron-steps that spike
    window  % of them inside the window
    stored  % that spike where the running statistics normalise, as in evaluation
"""
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))  # the project, from wherever this is started
from train_teacher import load_checkpoint, load_data  # noqa: E402
from transfer_init import BatchNormLIF, SpikingResNet  # noqa: E402


def record(shares, name, bn, inputs, arguments, spikes):
    """Forward hook: the potentials are not kept by the network, so eq. 2 runs once more here."""
    n, (x, *residual) = bn.neuron, inputs
    stored = (None, None) if bn.training else (bn.running_mean, bn.running_var)
    current = F.batch_norm(x, *stored, bn.weight, bn.bias, training=bn.training, eps=bn.eps)
    if arguments.get("static"):
        current = current.repeat(n.T, 1, 1, 1)             # (B, C, H, W) -> (T*B, C, H, W)
    current = sum(residual, current)
    u, f, distances = 0.0, 0.0, []                         # to the threshold
    for x in current.chunk(n.T):                           # (B, C, H, W)
        u = n.decay * u * (1 - f) + x
        f = (u > n.v_th).to(u.dtype)
        distances.append(u - n.v_th)
    distance = torch.stack(distances)
    shares[name] = [
        100 * share.float().mean().item() for share in (distance > 0, distance.abs() < n.lens)]


@torch.no_grad()
def measure(path, fresh=False):
    """{layer: (fires, window, stored)} of a checkpoint of stage 2 or 3, in %."""
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    data = load_data(config["dataset"], config["data_dir"]).to("cpu", torch.float32)
    images = data.normalize(data.train_x[:512].permute(0, 3, 1, 2))
    torch.manual_seed(config["seed"])
    model, shares = SpikingResNet(**checkpoint["arch"]), {}
    if not fresh:
        model.load_state_dict(checkpoint["model"])
    for name, module in model.named_modules():
        if isinstance(module, BatchNormLIF):
            module.register_forward_hook(partial(record, shares, name), with_kwargs=True)
    model.eval()(images)
    stored = {name: fires for name, (fires, _) in shares.items()}
    model.train()(images)
    return {name: (*share, stored[name]) for name, share in shares.items()}


def main(*paths):
    tables = [measure(paths[0], fresh=True), *map(measure, paths)]
    print(f"{'':14}" + "".join(f"{name:>25}" for name in ("fresh", *paths)))
    print(f"{'layer':14}" + f"{'fires':>9}{'window':>8}{'stored':>8}" * len(tables))
    for table in tables:
        table["mean"] = torch.tensor(list(table.values())).mean(0).tolist()
    for name in tables[0]:
        print(f"{name:14}" + "".join("{:9.2f}{:8.2f}{:8.2f}".format(*t[name]) for t in tables))


if __name__ == "__main__":
    main(*sys.argv[1:])
