"""results/cifar100-width16/windows.py: its potentials are the network's."""
import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import call

from train_teacher import load_data
from transfer_init import BatchNormLIF, SpikingResNet

PATH = Path(__file__).parents[1] / "results" / "cifar100-width16" / "windows.py"


@pytest.mark.parametrize("flags", ["", "--block sew", "--decay 0.9"])
def test_they_fire_as_the_network_does(here, flags):
    call(f"transfer_init.py --src r34.pt --T 3 {flags}")
    spec = importlib.util.spec_from_file_location("windows", PATH)
    windows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(windows)

    checkpoint = torch.load("snn_init.pt", weights_only=True)
    shares = {}
    for lens in (1e-9, 0.5, 1e9):  # a window that nothing lies in, the usual, one that holds all
        checkpoint["arch"]["lens"] = lens
        torch.save(checkpoint, "x.pt")
        shares[lens] = windows.measure("x.pt")

    model = SpikingResNet(**checkpoint["arch"]).eval()
    model.load_state_dict(checkpoint["model"])
    rates = {}
    for name, module in model.named_modules():
        if isinstance(module, BatchNormLIF):
            module.register_forward_hook(
                lambda *args, name=name: rates.update({name: args[-1].mean().item()}))
    data = load_data("digits", "data").to("cpu", torch.float32)
    with torch.no_grad():
        model(data.normalize(data.train_x[:512].permute(0, 3, 1, 2)))
    assert rates.keys() == shares[0.5].keys()
    for name, rate in rates.items():
        fires, window, stored = shares[0.5][name]
        assert stored == pytest.approx(100 * rate, abs=1e-2)
        assert shares[1e-9][name][1] < 1e-2 < window < 100 == shares[1e9][name][1]
