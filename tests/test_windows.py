"""results/cifar100-width16/windows.py: its potentials are the network's."""
import importlib.util
from pathlib import Path

import pytest
import torch

import train_teacher
import transfer_init
from train_idsnn import FiringRates

PATH = Path(__file__).parents[1] / "results" / "cifar100-width16" / "windows.py"


@pytest.mark.parametrize("flags", [[], ["--block", "sew"], ["--decay", "0.9"]])
def test_they_fire_as_the_network_does(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    train_teacher.main("--dataset digits --width 2 --depth 18 --epochs 1 --batch-size 512 "
                       "--device cpu --precision fp32".split())
    transfer_init.main(["--src", "r34.pt", "--T", "3", *flags])
    spec = importlib.util.spec_from_file_location("windows", PATH)
    windows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(windows)

    checkpoint = torch.load("snn_init.pt", weights_only=True)
    shares = {}
    for lens in (1e-9, 0.5, 1e9):  # a window that nothing lies in, the usual, one that holds all
        checkpoint["arch"]["lens"] = lens
        torch.save(checkpoint, "x.pt")
        shares[lens] = windows.measure("x.pt")

    model = transfer_init.SpikingResNet(**checkpoint["arch"]).eval()
    model.load_state_dict(checkpoint["model"])
    data = train_teacher.load_data("digits", "data").to("cpu", torch.float32)
    rates = FiringRates(model)
    with torch.no_grad():
        model(data.normalize(data.train_x[:512].permute(0, 3, 1, 2)))
    for name, rate in rates.read().items():
        fires, window, stored = shares[0.5][name]
        assert stored == pytest.approx(100 * rate, abs=1e-2)
        assert shares[1e-9][name][1] < 1e-2 < window < 100 == shares[1e9][name][1]
