"""What the compiler makes of the kernels, for GPUs that aren't here: access widths, bytes moved,
loads before stores, registers, spills, no contraction, no division.

Run as a script (without Triton's interpreter) this file compiles every case of `cases()` and
prints one JSON object.
"""

import importlib
import inspect
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
ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}
CAPABILITIES = 80, 90, 100
LIF_SIGNATURE = {"Bits": "*u8", "N": "i64"}
BN_LIF_SIGNATURE = {"Bits": "*u8", "N": "i64", "P": "i32", "C": "i32", "n": "i32",
                    "ranks": "i32"}


def signature(kernel, dtype, table):
    """Pointers begin with a capital letter: planes in `dtype`, vectors in fp32; the rest: fp32."""
    planes = "X", "F", "Y", "Residual", "G", "DX", "DResidual"

    def kind(name):
        if name in table:
            return table[name]
        if name in planes:
            return f"*{dtype}"
        return "*fp32" if name[0].isupper() else "fp32"
    return {name: kind(name) for name in kernel.arg_names}


def lif_cases():
    """(name, kernel, argument types, constants, names divisible by 16, compute capability)"""
    K = importlib.import_module("kernels.lif")
    kernels = {"forward": (K._forward_kernel, {}), "inference": (K._forward_kernel, {"Bits": None}),
               "backward": (K._backward_kernel, {})}

    def case(which, dtype, cc, T=4, form="vector"):
        kernel, constants = kernels[which]
        types = signature(kernel, dtype, LIF_SIGNATURE)
        block = 128 * (16 if T <= 16 else 8) // ITEM[dtype]
        aligned = [name for name, kind in types.items() if kind[0] == "*"]
        aligned += ["N"] * (form == "vector")
        name = f"lif {which} {dtype} sm{cc} T{T} {form}"
        return name, kernel, types, constants | {"T": T, "BLOCK": block}, aligned, cc

    for which in kernels:
        yield from (case(which, "bf16", cc) for cc in CAPABILITIES)
        yield case(which, "fp32", 90)
        yield case(which, "bf16", 90, form="scalar")
        yield case(which, "fp32", 90, form="scalar")
    for T in (6, 32):
        yield from (case(which, "bf16", 90, T) for which in ("forward", "backward"))
        yield from (case(which, "fp32", 90, T) for which in ("forward", "backward"))


def bn_lif_cases():
    """As above."""
    K = importlib.import_module("kernels.bn_lif")
    kernels = {  # constants (planes of x, where not T; Triton makes one of 1) and pointers to None
        "statistics": (K._statistics_kernel, {}, ""),
        "relu_statistics": (K._statistics_kernel, {"T": 1, "TX": 1}, ""),
        "forward": (K._forward_kernel, {}, ""),
        "inference": (K._forward_kernel, {}, "Bits Residual"),
        "static": (K._forward_kernel, {"TX": 1}, "Residual"),
        "reduce": (K._reduce_kernel, {}, ""),
        "apply": (K._apply_kernel, {}, ""),
        "apply_static": (K._apply_kernel, {"TX": 1}, "DResidual"),
        "vectors": (K._vectors_kernel, {}, ""),
        "means": (K._means_kernel, {}, ""),
        "relu": (K._forward_kernel, {"T": 1, "TX": 1, "ACTIVATION": "relu"}, ""),
        "relu_frozen": (K._forward_kernel, {"T": 1, "TX": 1, "ACTIVATION": "relu"}, "Bits"),
        "shortcut": (K._forward_kernel, {"T": 1, "TX": 1, "ACTIVATION": ""}, "Bits Residual"),
        "relu_reduce": (K._reduce_kernel, {"T": 1, "TX": 1}, ""),
        "relu_apply": (K._apply_kernel, {"T": 1, "TX": 1}, ""),
        "shortcut_reduce": (K._reduce_kernel, {"T": 1, "TX": 1}, "Bits"),
        "shortcut_apply": (K._apply_kernel, {"T": 1, "TX": 1}, "Bits DResidual"),
        "vectors_alone": (K._vectors_kernel, {}, "RunningMean RunningVar"),
        "vectors_of_constants": (K._vectors_kernel, {}, "Parts"),
        "vectors_of_one_channel": (K._vectors_kernel, {"C": 1}, ""),
        "means_of_one_channel": (K._means_kernel, {"C": 1}, ""),
        "statistics_of_one_channel": (K._statistics_kernel, {"C": 1}, ""),
        "narrow": (K._forward_kernel, {"BC": 16, "BR": 64}, "")}

    def case(which, dtype, cc, T=4, form="vector"):
        kernel, given, none = kernels[which]
        types = signature(kernel, dtype, BN_LIF_SIGNATURE)
        aligned = [name for name, kind in types.items() if kind[0] == "*"]
        aligned += ["C", "N"] * (form == "vector")
        T = given.get("T", T)
        reducing = kernel in (K._statistics_kernel, K._reduce_kernel)
        rows, columns = K.tile_shape(64, T, ITEM[dtype], reducing)
        tiles = {"T": T, "TX": T, "BR": rows, "BC": columns, "ACTIVATION": "lif"}
        channels = {"BP": K.PART_ROWS, "CHANNELS": K.CHANNELS}
        constants = tiles | channels | given | dict.fromkeys(none.split())
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        name = f"bn_lif {which} {dtype} sm{cc} T{T} {form}"
        return name, kernel, types, constants, aligned, cc

    for which in ("statistics", "forward", "inference", "reduce", "apply"):
        yield from (case(which, "bf16", cc) for cc in CAPABILITIES)
        yield case(which, "fp32", 90)
    yield from (case(which, "bf16", 90) for which in kernels
                if which.startswith(("static", "apply_static", "relu", "shortcut", "narrow")))
    yield from (case(which, "fp32", 90) for which in kernels
                if which.startswith(("vectors", "means")))
    for which in ("forward", "reduce", "apply"):
        yield case(which, "bf16", 90, form="scalar")  # memory that 16 bytes don't divide
        yield case(which, "bf16", 90, 8)
        yield case(which, "fp32", 90, 8)
        if which != "reduce":  # whose 32 steps of g and x spill with Triton 3.6
            yield case(which, "fp32", 90, 32)


def compile_case(kernel, types, constants, aligned, cc):
    """Compile for compute capability cc. Counts bytes a thread moves by access width, registers,
    spilled bytes, instructions; says whether a load follows a store."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
    from triton.tools.disasm import get_sass

    names, warps = kernel.arg_names, 8 if "BP" in constants else 4
    types = {n: "constexpr" if n in constants else types[n] for n in names}
    aligned = set(aligned) - set(constants)
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in aligned}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()}, attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32),
                              options={"num_warps": warps, "enable_fp_fusion": False})
    ptx = compiled.asm["ptx"]
    moved, order = {"ld": Counter(), "st": Counter()}, ""
    access = r"\b(ld|st)\.global[\w:.]*?(?:\.v(\d))?\.[bfsu](\d+)\b"
    for op, vector, bits in re.findall(access, ptx):
        width = int(vector or 1) * int(bits) // 8
        moved[op][width] += width
        order += op
    with tempfile.TemporaryDirectory() as tmp:
        file = Path(tmp, "kernel.ptx")
        file.write_text(ptx)
        arch = f"sm_{cc}a" if cc >= 90 else f"sm_{cc}"
        ptxas = get_ptxas(cc) if inspect.signature(get_ptxas).parameters else get_ptxas()
        log = subprocess.run([ptxas.path, "-v", "--fmad=false", f"--gpu-name={arch}", file,
                              "-o", file.with_suffix(".cubin")],
                             capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)
    # half a second each, and says so on stderr: one GPU only
    sass = get_sass(compiled.asm["cubin"]) if cc == 80 else ""

    def count(pattern, text):
        return len(re.findall(pattern, text))

    return {**moved, "spills": sum(map(int, spills)), "load_after_store": "stld" in order,
            "registers": int(re.search(r"Used (\d+) registers", log)[1]),
            "fma": count(r"\bfma\.", ptx) + count(r"\bFFMA\b", sass),
            "multiplies": count(r"\bFMUL\b", sass), "disassembled": bool(sass),
            "ftz": count(r"\.ftz\b", ptx),
            "divisions": count(r"\b(?:div|sqrt|rcp)\.(?:rn|full|approx)", ptx),
            "per_thread": constants.get("BLOCK", 0) / (32 * warps), "T": constants.get("T")}


def main():
    json.dump({name: compile_case(*rest) for name, *rest in (*lif_cases(), *bn_lif_cases())},
              sys.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cache = str(tmp_path_factory.mktemp("triton"))
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": cache}
    run = subprocess.run([sys.executable, __file__], env=env, cwd=ROOT, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def of(compiled, *words):
    found = {name: c for name, c in compiled.items() if set(words) <= set(name.split())}
    assert found, f"no case named {words}"
    return found.items()


def test_no_kernel_contracts_flushes_or_spills(compiled):
    for name, c in compiled.items():
        assert c["multiplies"] or not c["disassembled"], name
        assert c["fma"] == 0, (name, c)
        assert c["spills"] == 0, (name, c)
        # Triton 3.5 has no other roots and quotients, of which there is one a channel
        assert c["ftz"] == 0 or name.startswith("bn_lif vectors"), (name, c)


def test_nothing_is_divided_where_neurons_are(compiled):
    for name, c in compiled.items():  # the ends of the statistics divide, once a channel
        once = name.split()[1].startswith(("statistics", "vectors", "means"))
        assert c["divisions"] == 0 or once, name


def test_every_load_stands_before_the_first_store(compiled):
    for name, c in compiled.items():
        assert not c["load_after_store"], name


def test_reductions_fill_a_multiprocessor_four_times(compiled):
    """REDUCE_PROGRAMS counts on it: 65,536 registers, 4 programs of 128 threads."""
    for which in ("statistics", "reduce"):
        for name, c in of(compiled, "bn_lif", which, "T4"):
            assert c["registers"] <= 128, (name, c)


def test_lif_moves_16_bytes_at_a_time(compiled):
    for name, c in of(compiled, "lif", "vector"):
        which, item, T = name.split()[1], ITEM[name.split()[2]], c["T"]
        if T > 16:  # fewer neurons a thread, narrower access
            continue
        loads = {"16": T * 16}
        stores = {"16": T * 16}
        # one byte a neuron, as wide as the neurons of a thread
        bits = {str(16 // item): (T + 3) // 4 * 16 // item}
        if which == "forward":
            stores |= bits
        if which == "backward":
            loads |= bits
        assert c["ld"] == loads and c["st"] == stores, (name, c)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("form", ["vector", "scalar"])
def test_lif_bytes_per_neuron_step(compiled, dtype, form):
    item, got = ITEM[dtype], {}
    for name, c in of(compiled, "lif", dtype, form, "sm90", "T4"):
        per = c["per_thread"] * c["T"]
        got[name.split()[1]] = sum(c["ld"].values()) / per, sum(c["st"].values()) / per
    assert got == {"forward": (item, item + 0.25), "inference": (item, item),
                   "backward": (item + 0.25, item)}


def test_bn_lif_moves_16_bytes_at_a_time(compiled):
    """A thread's 8 neurons a time-step (16 in a sum of one alone): x, g, residual, spikes,
    gradients. Narrower are only per-channel vectors and bits, and nothing is read twice."""
    planes = {  # read and written a step, read and written once, per-channel vectors
        "statistics": (1, 0, 1, 0, 0), "relu_statistics": (1, 0, 1, 0, 0),
        "forward": (2, 1, 0, 0, 2), "inference": (1, 1, 0, 0, 2),
        "relu": (2, 1, 0, 0, 2), "relu_frozen": (2, 1, 0, 0, 2), "relu_reduce": (2, 0, 0, 0, 2),
        "relu_apply": (2, 2, 0, 0, 4), "shortcut": (1, 1, 0, 0, 2),
        "shortcut_reduce": (2, 0, 0, 0, 2), "shortcut_apply": (2, 1, 0, 0, 4),
        "static": (0, 1, 1, 0, 2), "reduce": (2, 0, 0, 0, 2),
        "apply": (2, 2, 0, 0, 4), "apply_static": (1, 0, 1, 1, 4)}
    for name, c in of(compiled, "bn_lif", "vector"):
        which, T = name.split()[1], c["T"]
        if which not in planes or T * ITEM[name.split()[2]] > 16:  # fewer neurons a thread
            continue
        neurons = 16 if which in ("relu_statistics", "relu_reduce", "shortcut_reduce") else 8
        step = neurons * ITEM[name.split()[2]]
        load, store, load_once, store_once, vectors = planes[which]
        loads, stores = (T * load + load_once) * step, (T * store + store_once) * step
        bits = neurons * ((T + 3) // 4)
        assert c["ld"].get("16", 0) >= loads, (name, c)
        assert sum(c["ld"].values()) <= loads + vectors * neurons * 4 + bits, (name, c)
        stored = Counter({"16": stores})
        if which in ("forward", "static", "relu"):
            stored[str(neurons)] += bits
        parts = Counter({"4": c["st"].get("4", 0)})
        assert Counter(c["st"]) == +stored + parts, (name, c)


if __name__ == "__main__":
    main()
