"""The benchmark of the kernels: what it checks, counts and refuses; not the times."""
import json

import pytest
import torch

from kernels import bench

CPU = ["--device", "cpu", "--no-compile", "--batch", "1", "--seconds", "0.001"]


def inputs():
    return bench.random_inputs(4, 2, 16, 8, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("neuron", ["lif", "bn_lif"])
def test_all_contestants_compute_the_same_spikes(neuron):
    assert max(bench.check(neuron, bench.parse_args(CPU)).values()) <= bench.ROUNDING


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        bench.parse_args(["--device", "cuda"])
    assert end.value.code == 2 and "sees no GPU" in capsys.readouterr().err


def test_another_neuron_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "our_lif", lambda x: (x > 0.5).to(x.dtype))  # forgets everything
    with pytest.raises(SystemExit, match="not the same neuron"):
        bench.main([*CPU, "--neuron", "lif"])


def test_spikingjelly_does_not_fire_at_the_threshold():
    pytest.importorskip("spikingjelly")
    x = torch.tensor([[0.5], [0.5], [0.5001]])  # our u: 0.5, 0.625, 0.5001 after the reset
    assert bench.spikingjelly()(x).tolist() == bench.our_lif(x).tolist() == [[0], [1], [1]]


def test_spikingjelly_gets_its_potential_in_fp32(monkeypatch):
    """In bf16 it would leave its fused kernels for a loop, in silence."""
    functional = pytest.importorskip("spikingjelly.activation_based.functional")
    multi_step, seen = functional.lif_multi_step, []

    def spy(x, v, **neuron):
        seen.append((x.dtype, v.dtype))
        return multi_step(x, v, **neuron)

    monkeypatch.setattr(functional, "lif_multi_step", spy)
    bench.spikingjelly()(torch.ones(4, 3, dtype=torch.bfloat16))
    assert seen == [(torch.bfloat16, torch.float32)]


def test_inputs_are_channels_last_as_training_runs_them():
    for tensor in inputs()[:2]:
        assert tensor.shape == (4, 2, 16, 8, 8)
        assert tensor.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


def test_tensors_are_several_times_larger_than_the_cache():
    args = bench.parse_args(["--device", "cpu"])
    x = args.T * args.batch * 64 * 32 * 32 * 4  # bytes; spikes, gradient and its result beside it
    assert 4 * x >= 2 * bench.CPU_CACHE and x < 2 ** 25  # from which malloc maps memory anew


def test_the_saved_state_of_the_neuron_is_two_bits_a_step():
    x, *_ = tensors = inputs()
    assert bench.saved_bytes(bench.alone(bench.our_lif), tensors) == x.numel() / 4
    assert bench.saved_bytes(bench.alone(bench.loop_over_t), tensors) > 4 * x.numel()
    assert bench.saved_bytes(bench.alone(torch.square), tensors) == 0  # its input is kept anyway


def test_least_bytes_are_those_that_the_equations_need():
    assert bench.least_bytes("lif", 2) == (4.25, 8.5)
    assert bench.least_bytes("lif", 4) == (8.25, 16.5)
    assert bench.least_bytes("bn_lif", 2) == (8.25, 20.75)  # with a residual


def test_every_figure_is_in_the_table_and_the_file(tmp_path, capsys):
    file = tmp_path / "bench.json"
    bench.main([*CPU, "--T", "2", "--neuron", "bn_lif", "--json", str(file)])
    result, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert result["rows"][-1]["shape"] == [2, 8, 512, 4, 4]  # as many neurons as in the first stage
    assert "1, 64, 32, 32" in printed and "8, 512, 4, 4" in printed
    ours, *peers = [row for row in result["rows"] if row["shape"] == [2, 1, 64, 32, 32]]
    assert ours["name"] == "ours"
    assert {"batch norm, add, our lif", "loop over t"} <= {row["name"] for row in peers}
    # 4 bytes for x and 3 * 4.0625 for x, residual, spikes and two bits, then two passes back
    for key, least in (("forward", 16.25), ("both", 40.75)):
        for row in (ours, *peers):
            speed = least * 2 * 64 * 1024 / (row[key]["ms"] / 1e3)  # bytes a second
            assert row[key]["bytes_per_s"] == pytest.approx(speed)
            share = speed / result["copy_bytes_per_s"]
            assert row[key]["share_of_copy"] == pytest.approx(share)
    for peer in peers:
        ratios = [f"{peer[key]['ms'] / ours[key]['ms']:.2f}" for key in ("forward", "both")]
        assert " / ".join(ratios) in printed


def test_that_a_peer_fails_is_a_result_that_ours_fails_is_not(monkeypatch):
    def fails(x):
        raise ValueError("no such kernel")

    args = bench.parse_args(CPU)
    monkeypatch.setattr(bench, "loop_over_t", fails)
    rows = bench.measure("lif", bench.LAYERS[3], args, copy=1)
    assert rows[-1]["failed"] == "ValueError: no such kernel" and "failed" not in rows[0]
    assert list(bench.table([rows]).columns[-1].cells) == ["failed"]
    monkeypatch.setattr(bench, "our_lif", fails)
    with pytest.raises(ValueError, match="no such kernel"):
        bench.measure("lif", bench.LAYERS[3], args, copy=1)


@pytest.mark.parametrize("flag,value", [
    ("--T", "33"), ("--dtype", "fp8"), ("--batch", "0"), ("--json", "no/where.json")])
def test_a_wrong_flag_gets_one_line(flag, value, capsys):
    with pytest.raises(SystemExit) as end:
        bench.parse_args([*CPU, flag, value])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1, error
    assert f"{flag}: " in error and value in error
