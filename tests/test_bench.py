"""The benchmark of the kernels: what it checks, counts and refuses; not the times."""
import json

import pytest
import torch

from kernels import bench


def args(*flags):
    return bench.parse_args(["--device", "cpu", "--no-compile", "--batch", "1", *flags])


def test_every_figure_is_in_the_table_and_the_file(tmp_path, capsys):
    file = tmp_path / "bench.json"
    bench.main(["--device", "cpu", "--no-compile", "--batch", "1", "--seconds", "0.001", "--T", "2",
                "--neuron", "bn_lif", "--json", str(file)])
    result = json.loads(file.read_text())
    assert result["rows"][0]["shape"] == [2, 1, 64, 32, 32]
    assert result["rows"][-1]["shape"] == [2, 8, 512, 4, 4]  # as many neurons as in the first stage
    names = {row["name"] for row in result["rows"]}
    assert {"ours", "batch norm, add, our lif", "loop over t"} <= names
    for row in result["rows"]:
        assert row["both"]["ms"] > 0 and "failed" not in row
        # 4 bytes for x and 3 * 4.0625 for x, residual, spikes and two bits, then two passes back
        assert row["forward"]["bytes_per_s"] * row["forward"]["ms"] / 1e3 == pytest.approx(
            16.25 * 2 * 64 * 1024)
    printed = capsys.readouterr().out
    assert "1, 64, 32, 32" in printed and "8, 512, 4, 4" in printed


def test_another_neuron_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "our_lif", lambda x: (x >= bench.V_TH).to(x.dtype))
    with pytest.raises(SystemExit, match="not the same neuron"):
        bench.check("lif", args())


@pytest.mark.parametrize("neuron", ["lif", "bn_lif"])
def test_all_contestants_compute_the_same_spikes(neuron):
    assert max(bench.check(neuron, args()).values()) <= bench.ROUNDING


def test_spikingjelly_does_not_fire_at_the_threshold():
    pytest.importorskip("spikingjelly")
    x = torch.tensor([[0.5], [0.5], [0.5001]])  # our u: 0.5, 0.625, 0.5001 after the reset
    assert bench.spikingjelly()(x).tolist() == bench.our_lif(x).tolist() == [[0], [1], [1]]


def test_inputs_are_channels_last_as_training_runs_them():
    x = bench.random_current(4, 2, 16, 8, torch.float32, torch.device("cpu"))
    assert x.shape == (4, 2, 16, 8, 8)
    assert x.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_the_saved_state_of_the_neuron_is_two_bits_a_step():
    x, *_ = inputs = bench.random_inputs(4, 1, 16, 8, torch.float32, torch.device("cpu"))
    assert bench.saved_bytes(bench.alone(bench.our_lif), inputs) == x.numel() / 4
    assert bench.saved_bytes(bench.alone(bench.loop_over_t), inputs) > 4 * x.numel()


def test_least_bytes_are_those_of_the_design():
    assert bench.least_bytes("lif", 2) == (4.25, 8.5)
    assert bench.least_bytes("lif", 4) == (8.25, 16.5)
    assert bench.least_bytes("bn_lif", 2) == (8.25, 20.75)  # with a residual


def test_tensors_are_several_times_larger_than_the_cache():
    a = bench.parse_args(["--device", "cpu"])
    x = a.T * a.batch * 64 * 32 * 32 * 4  # bytes; spikes, gradient and its result beside it
    assert 4 * x >= 2 * bench.CPU_CACHE and x < 2 ** 25  # from which malloc maps memory anew


@pytest.mark.parametrize("flags, words", [
    (["--T", "33"], "--T: 33"), (["--batch", "0"], "--batch: 0"), (["--seconds", "0"], "--seconds"),
    (["--seconds", "nan"], "--seconds"), (["--json", "no/where.json"], "--json: no/where.json"),
    (["--dtype", "fp8"], "--dtype")])
def test_a_wrong_flag_gets_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        args(*flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
