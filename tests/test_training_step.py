"""results/training-step.py: the network with SpikingJelly's neuron is the same network."""
import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("spikingjelly")
spec = importlib.util.spec_from_file_location(
    "training_step", Path(__file__).parents[1] / "results" / "training-step.py")
training_step = importlib.util.module_from_spec(spec)
spec.loader.exec_module(training_step)


def test_another_threshold_is_another_network(monkeypatch):
    ours, theirs = training_step.check(width=4)
    assert ours == pytest.approx(theirs, rel=1e-6)
    monkeypatch.setitem(training_step.bench.NEURON, "v_th", 0.51)  # SpikingJelly's alone
    with pytest.raises(SystemExit, match="another network"):
        training_step.check(width=4)


def test_images_per_second_of_both_in_table_and_file(tmp_path, capsys):
    file = tmp_path / "step.json"
    training_step.main(["--device", "cpu", "--batch", "2", "--width", "4", "--seconds", "0.01",
                        "--json", str(file)])
    row, = json.loads(file.read_text())["rows"]
    assert row["ours"] > 0 and row["spikingjelly"] > 0
    assert row["loss"] == pytest.approx(row["spikingjelly_loss"], rel=0.05)
    assert "eager" in capsys.readouterr().out


def test_a_graph_on_a_cpu_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        training_step.parse_args(["--device", "cpu", "--mode", "recorded"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--mode" in error and error.count("\n") == 1
