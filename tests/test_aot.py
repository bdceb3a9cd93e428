"""What the compiler makes of the kernels, for GPUs that aren't here: access widths, bytes moved, registers, no FMA.

Run as a script (without Triton's interpreter) this file compiles every case of `cases()` and prints one JSON object.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ITEM = {"bf16": 2, "fp16": 2, "fp32": 4, "u8": 1}
STEPS = (1, 2, 3, 4, 6, 8, 16, 32)


def lif_cases():
    """(name, kernel, argument types, constants, names divisible by 16, compute capability, warps)"""
    K = importlib.import_module("kernels.lif")
    kernels = {"forward": (K._forward_kernel, {"SAVE": True}), "inference": (K._forward_kernel, {"SAVE": False}),
               "backward": (K._backward_kernel, {}), "backward_full": (K._backward_full_kernel, {})}

    def case(which, dtype, cc, divisible, T):
        kernel, constants = kernels[which]
        types = dict.fromkeys(("X", "F", "G", "DX"), f"*{dtype}") | dict.fromkeys(("step", "g_step", "x_step"), "i32")
        types |= dict.fromkeys(("decay", "v_th", "lens", "inv"), "fp32") | {"Bits": "*u8", "N": "i64"}
        aligned = ["X", "F", "G", "DX", "Bits", *["N"] * divisible]
        block = K.block_size(ITEM[dtype], T) if which == "backward_full" else K.block_size(ITEM[dtype])
        constants = constants | {"T": T, "BLOCK": block}
        name = f"lif {which} {dtype} sm{cc} {'vector' if divisible else 'scalar'} T{T}"
        return name, kernel, types, constants, aligned, cc, 4

    for dtype in ("bf16", "fp32"):
        for which in kernels:
            yield from (case(which, dtype, cc, True, 4) for cc in ((80, 90, 100) if dtype == "bf16" else (90,)))
            yield case(which, dtype, 90, False, 4)
    for T in STEPS:
        if T != 4:
            yield from (case(which, "bf16", 90, True, T) for which in ("forward", "backward"))
        if T > 4:
            yield case("backward_full", "bf16", 90, True, T)


def bn_lif_cases():
    """As above; channels-last memory with C divisible by 16, unless the name says contiguous."""
    K = importlib.import_module("kernels.bn_lif")
    forward, backward = K._forward_kernel, K._backward_kernel
    kernels = {  # constants, and the pointers that are None
        "stats": (K._stats_kernel, {"BR": 32}, ""),
        "forward": (forward, {"STATIC": False}, ""), "inference": (forward, {"STATIC": False}, "Bits Residual"),
        "static": (forward, {"STATIC": True}, "Residual"),
        "reduce": (backward, {"STATIC": False}, "DX DResidual Means Residual"),
        "apply": (backward, {"STATIC": False}, "Parts Residual"),
        "apply_static": (backward, {"STATIC": True}, "Parts Residual DResidual"),
        "reduce_full": (backward, {"STATIC": False}, "DX DResidual Means Bits"),
        "apply_full": (backward, {"STATIC": False}, "Parts Bits")}

    def case(which, dtype, cc, T=4, contiguous=False):
        kernel, constants, none = kernels[which]
        tile = 2048 if which == "stats" else 4096 // max(T, 4) if "full" in which else 1024
        types = dict.fromkeys(("X", "Residual", "F", "G", "DX", "DResidual"), f"*{dtype}")
        types |= dict.fromkeys(("Weight", "Bias", "Mean", "Var"), "*fp32") | dict.fromkeys(("R", "C", "S"), "i32")
        types |= dict.fromkeys(("eps", "decay", "v_th", "lens", "inv"), "fp32")
        types |= {"Bits": "*u8", "N": "i64", "Means": "*fp64", "Parts": "*fp64" if which == "stats" else "*fp32"}
        aligned = [name for name, kind in types.items() if kind[0] == "*"] + ["N", "S" if contiguous else "C"]
        shape = {"BR": tile, "BC": 1} if contiguous else {"BR": tile // 64, "BC": 64, "S": 1}
        constants = {"T": T} | constants | shape | dict.fromkeys(none.split())
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        name = f"bn_lif {which} {dtype} sm{cc} {'contiguous' if contiguous else 'vector'} T{T}"
        return name, kernel, types, constants, aligned, cc, 4

    for which in ("stats", "forward", "inference", "reduce", "apply"):
        yield from (case(which, "bf16", cc) for cc in (80, 90, 100))
        yield case(which, "fp32", 90)
    yield from (case(which, "bf16", 90) for which in ("static", "apply_static", "reduce_full", "apply_full"))
    yield from (case(which, "bf16", 90, contiguous=True) for which in ("forward", "reduce", "apply"))
    yield from (case(which, "bf16", 90, 8) for which in ("forward", "reduce", "apply"))
    yield from (case(which, "fp32", 90, 8) for which in ("apply", "reduce_full", "apply_full"))
    yield from (case(which, "bf16", 90, 3) for which in ("forward", "apply"))


def cases():
    yield from lif_cases()
    yield from bn_lif_cases()


def compile_case(kernel, types, constants, aligned, cc, warps):
    """Compile for compute capability cc; count bytes a thread moves by access width, spilled bytes, instructions."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
    from triton.tools.disasm import get_sass

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n] for n in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32),
                              options={"num_warps": warps, "enable_fp_fusion": False})
    ptx = compiled.asm["ptx"]
    moved = {"ld": Counter(), "st": Counter()}
    for op, vector, bits in re.findall(r"\b(ld|st)\.global[\w:.]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        width = int(vector or 1) * int(bits) // 8
        moved[op][width] += width
    with tempfile.TemporaryDirectory() as tmp:
        file = Path(tmp, "kernel.ptx")
        file.write_text(ptx)
        arch = f"sm_{cc}a" if cc >= 90 else f"sm_{cc}"
        log = subprocess.run([get_ptxas(cc).path, "-v", "--fmad=false", f"--gpu-name={arch}", file, "-o",
                              file.with_suffix(".cubin")], capture_output=True, text=True, check=True).stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)))
    sass = get_sass(compiled.asm["cubin"]) if cc == 80 else ""  # half a second each, so for one GPU only
    count = lambda pattern, text: len(re.findall(pattern, text))  # noqa: E731
    return {**moved, "spills": spills, "registers": int(re.search(r"Used (\d+) registers", log)[1]),
            "fma": count(r"\bfma\.", ptx) + count(r"\bFFMA\b", sass), "ptx_fma": count(r"\bfma\.", ptx),
            "multiplies": count(r"\bFMUL\b", sass),
            "disassembled": bool(sass), "ftz": count(r"\.ftz\b", ptx), "divisions": count(r"\bdiv\.", ptx),
            "per_thread": constants.get("BLOCK", 0) / (32 * warps), "T": constants.get("T")}


def main():
    json.dump({name: compile_case(*rest) for name, *rest in cases()}, sys.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    run = subprocess.run([sys.executable, __file__], env=env, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def of(compiled, *words):
    found = {name: c for name, c in compiled.items() if set(words) <= set(name.split())}
    assert found, f"no case named {words}"
    return found.items()


def test_no_kernel_contracts_divides_flushes_or_spills(compiled):
    for name, c in compiled.items():
        assert c["multiplies"] or not c["disassembled"], name
        assert c["ptx_fma"] == c["ftz"] == 0, (name, c)
        if name.startswith("lif"):
            assert c["fma"] == c["divisions"] == c["spills"] == 0, (name, c)
        else:  # divides once a channel: exactly, by a call that multiplies and adds and may cost a pair of registers
            assert c["spills"] <= 16, (name, c)


def test_lif_moves_16_bytes_at_a_time(compiled):
    for name, c in of(compiled, "lif", "vector"):
        if c["T"] > 8 and "backward_full" in name:  # fewer neurons a thread, narrower access
            continue
        item = ITEM[name.split()[2]]
        expect_ld = {"16": c["T"] * 16} if "backward_full" not in name else {"16": 2 * c["T"] * 16}
        expect_st = {"16": c["T"] * 16}
        bits = {str(16 // item): (c["T"] + 3) // 4 * 16 // item}  # one byte a neuron, as wide as the neurons of a thread
        if " forward " in name:
            expect_st |= bits
        if " backward " in name:
            expect_ld |= bits
        assert c["ld"] == expect_ld and c["st"] == expect_st, (name, c)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("form", ["vector", "scalar"])
def test_lif_bytes_per_neuron_step(compiled, dtype, form):
    item, got = ITEM[dtype], {}
    for name, c in of(compiled, "lif", dtype, form, "sm90", "T4"):
        per = c["per_thread"] * c["T"]
        got[name.split()[1]] = sum(c["ld"].values()) / per, sum(c["st"].values()) / per
    assert got == {"forward": (item, item + 0.25), "inference": (item, item), "backward": (item + 0.25, item),
                   "backward_full": (2 * item, item)}


def test_bn_lif_moves_16_bytes_at_a_time(compiled):
    """A thread's 8 neurons a time-step: x, g, residual, spikes, gradients. Narrower: per-channel vectors and bits."""
    planes = {"forward": (2, 1), "inference": (1, 1), "reduce": (2, 0), "apply": (2, 2), "static": (0, 1),
              "apply_static": (1, 0), "stats": (0, 0)}
    for name, c in of(compiled, "bn_lif", "vector"):
        which, item, T = name.split()[1], ITEM[name.split()[2]], c["T"] or 0
        if "full" in which:
            continue
        ld, st = planes[which]
        once_ld, once_st = {"static": (1, 0), "apply_static": (1, 1), "stats": (4, 0)}.get(which, (0, 0))
        vectors = {"forward": 4, "static": 4, "inference": 4, "reduce": 2, "apply": 3, "apply_static": 3}.get(which, 0)
        assert c["ld"].get("16", 0) >= (T * ld + once_ld) * 8 * item, (name, c)
        assert c["st"].get("16", 0) == (T * st + once_st) * 8 * item, (name, c)
        if which != "stats":
            # per-channel vectors and bits are all that's narrower, and there's no second read of anything
            assert sum(c["ld"].values()) <= (T * ld + once_ld) * 8 * item + vectors * 8 * 4 + 2 * 8 * 8 + T // 4 * 8 + 8
            assert not set(c["st"]) - {"16"} - ({"8"} if which in ("forward", "static") else {"4"}), (name, c)


if __name__ == "__main__":
    main()
