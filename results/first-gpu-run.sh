#!/usr/bin/env bash
# The first half hour on a GPU, in steps that each fit ten minutes and print a table last.
#
#     results/first-gpu-run.sh                    lists the steps
#     results/first-gpu-run.sh kernels            runs one
#     results/first-gpu-run.sh all                runs all, one after the other
#     results/first-gpu-run.sh --rehearse all     the same, small, on a CPU: finds typos beforehand
#
# In the environment, if these do not suit:
#     OUT        where logs and figures go           (results/first-gpu-run)
#     RUNS       where checkpoints go                (data/first-gpu-run; a step that was cut off
#                after ten minutes goes on from them when it is called again)
#     CIFAR100   --dataset of steps stage1 to student100: cifar100, or a folder of images
#     CIFAR10    likewise, of teacher10 and student10
#     PYTHON     the interpreter                     (python)
#
# The predictions below come from ahead-of-time compilation for an H100, fake CUDA tensors and
# counted launches. Nothing of this was measured on a GPU when they were written.
set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "$script")/.."

STEPS="machine tests_lif tests_bn_lif tests_step ceilings kernels tiles step stage1 stage3
       teacher100 student100 teacher10 student10"
LIMIT=590  # seconds a step

rehearse=
if [ "${1:-}" = --rehearse ]; then
    rehearse=--rehearse
    shift
fi
if [ -n "$rehearse" ]; then
    : "${OUT:=data/rehearsal}" "${RUNS:=data/rehearsal/runs}"
    CIFAR100=digits CIFAR10=digits
    BATCHES="64"
    export TORCH_COMPILE_DISABLE=1  # --compile is parsed, and compiles nothing
    # flags of: kernels.bench, training-step.py, the network, all trainings, short trainings
    BENCH="--device cpu --batch 1 --seconds 0.001 --no-compile"
    STEP="--device cpu --batch 2 --width 4 --seconds 0.01"
    NETWORK="--depth 18 --width 4"
    TRAIN="--device cpu --epochs 1"
    SHORT=""
    TESTS="-k refuse"
else
    : "${OUT:=results/first-gpu-run}" "${RUNS:=data/first-gpu-run}"
    : "${CIFAR100:=cifar100}" "${CIFAR10:=cifar10}"
    BATCHES="64 256"
    BENCH="--device cuda"
    STEP="--device cuda"
    NETWORK=""
    TRAIN="--device cuda"
    TESTS=""
    SHORT="--epochs 2"  # the second is timed: the first one compiles and records
fi
python=${PYTHON:-python}
export OUT RUNS
mkdir -p "$OUT" "$RUNS"

# ------------------------------------------------------------------------------------------ steps

machine() {
    nvidia-smi 2>/dev/null || echo "no nvidia-smi"
    git log -1 --format="commit %h of %cd" 2>/dev/null || echo "no git"
    $python -c '
from kernels import bench
import torch
print(bench.versions(), "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")'
}

# The kernels against their specification, bit for bit, on a GPU for the first time. Triton compiles
# some hundred variants; what it compiled is kept, so a step that was cut off is shorter again.
tests_lif() { $python -m pytest -q $TESTS tests/test_lif.py tests/test_bench.py; }
tests_bn_lif() { $python -m pytest -q $TESTS tests/test_bn_lif.py; }

# 50 recorded steps of either stage against 50 plain ones, deterministic: the same losses; and the
# network with SpikingJelly's neuron against ours.
tests_step() {
    $python -m pytest -q tests/test_teacher.py tests/test_training_step.py -k "record or network"
}

# What the GPU can do at best. An H100 (SXM): copy 2.6 to 3.0 TB/s of 3.35, matmul 600 to 750
# TFLOP/s in bf16 of 989; the kernels' predicted times assume 3 TB/s.
ceilings() {
    $python - $BENCH <<'PYTHON'
import sys
import torch
from kernels import bench
args = bench.parse_args(sys.argv[1:])
print(f"copy    {bench.copy_speed(args.device, args.seconds) / 1e9:8.1f} GB/s read + written")
n = 8192 if args.device.type == "cuda" else 256
for dtype in (torch.bfloat16, torch.float32):
    a, b = (torch.randn(n, n, device=args.device, dtype=dtype) for _ in range(2))
    ms, _ = bench.milliseconds(lambda: a @ b, args.device, args.seconds)
    print(f"matmul  {2 * n**3 / ms / 1e9:8.2f} TFLOP/s, {dtype}, {n} x {n}")
PYTHON
}

# Aimed at: 85% of copy speed; lif 1.8 times as fast as SpikingJelly 2.0.0 and 1.1 times as fast as
# torch.compile, bn_lif 1.1 times. Predicted for bn_lif at stage 1's shape, batch 64, bf16, with a
# residual, at 3 TB/s: forward 46 us (statistics 11, the rest 35), backward 70 (24 and 46).
# With stage 1 at batch 64 a tensor is 34 MB and stays in an H100's 50 MB of L2: times look better.
kernels() {
    $python -m kernels.bench $BENCH --json "$OUT/bench.json"
    if [ -z "$rehearse" ]; then
        $python -m kernels.bench $BENCH --dtype fp32 --no-compile --json "$OUT/bench-fp32.json"
        $python -m kernels.bench $BENCH --batch 64 --no-compile --json "$OUT/bench-batch64.json"
    fi
}

# bn_lif with other tiles and other numbers of reducing programs than those in kernels/bn_lif.py:
# ms of forward / forward + backward at each stage's shape. Predicted: no tile differs by more than
# a tenth; fewer than 4 programs on each of 132 multiprocessors cannot fill the memory.
tiles() {
    $python - $BENCH --neuron bn_lif <<'PYTHON'
import importlib
import sys
from kernels import bench
kernels = importlib.import_module("kernels.bn_lif")
kernels.TILE, kernels.REDUCING  # must be there still, or the loop below would change nothing
args = bench.parse_args(sys.argv[1:])
bench.contestants = lambda neuron, compiled: {"ours": bench.our_bn_lif}
copy = bench.copy_speed(args.device, args.seconds)
print("| TILE | REDUCING |", *[f"{C} x {size} x {size} |" for C, size in bench.LAYERS])
print("|---:|---:|" + "---:|" * len(bench.LAYERS))
for tile in (512, 1024, 2048):
    for reducing in (2 * 132, 4 * 132, 8 * 132):
        kernels.TILE, kernels.REDUCING = tile, reducing
        rows = [bench.measure("bn_lif", layer, args, copy)[0] for layer in bench.LAYERS]
        ms = [f"{row['forward']['ms']:.4f} / {row['both']['ms']:.4f} |" for row in rows]
        print(f"| {tile} | {reducing} |", *ms, flush=True)
PYTHON
}

# The student's step without a teacher, ours against SpikingJelly's neuron in the same network.
step() {
    $python results/training-step.py $STEP --json "$OUT/training-step.json"
}

# Images per second of both stages as the scripts run them; what is compiled is recorded too.
# Predicted at batch 64: stage 1 540 launches a step, eager 6,000 to 10,000, recorded 19,000 to
# 27,000; stage 3 600 launches, eager 3,500 to 6,000, recorded 10,000 to 15,000. At batch 256 the
# GPU is the limit: 6.8 to 10.7 ms a step (24,000 to 38,000) and 14 to 22 ms (12,000 to 18,000).
stage1() {
    speeds stage1 $python train_teacher.py --dataset "$CIFAR100" $NETWORK
}

stage3() {
    need "$RUNS/stage1-64-recorded.pt" stage1
    $python transfer_init.py --src "$RUNS/stage1-64-recorded.pt" --fresh --out "$RUNS/init.pt"
    speeds stage3 $python train_idsnn.py --init "$RUNS/init.pt"
}

# The fast recipe. Predicted: teacher 40 epochs in 2 minutes, student 60 epochs in 3 to 5.
teacher100() { teacher "$CIFAR100" 100; }
student100() { student 100; }
teacher10() { teacher "$CIFAR10" 10; }
student10() { student 10; }

# -------------------------------------------------------------------------------- what they share

need() { # FILE STEP
    if [ ! -e "$1" ]; then
        echo "$1 is not there: step $2 makes it" >&2
        exit 2
    fi
}

speeds() { # NAME COMMAND...: one short training for each batch size and mode, then their table
    name=$1
    shift
    for batch in $BATCHES; do
        for mode in recorded eager compiled; do
            flags=
            case $mode in
                eager) flags=--no-graph ;;
                compiled) flags=--compile ;;
            esac
            "$@" $TRAIN $SHORT --batch-size "$batch" --fresh $flags \
                --out "$RUNS/$name-$batch-$mode.pt"
        done
    done
    $python - "$name" "$BATCHES" <<'PYTHON' | tee "$OUT/$name.md"
import json
import os
import sys
name, batches = sys.argv[1:]
print(f"\n| {name}: batch | mode | images/s |\n|---:|---|---:|")
modes = dict(recorded="recorded", eager="eager", compiled="compiled and recorded")
for batch in batches.split():
    for mode, shown in modes.items():
        path = f"{os.environ['RUNS']}/{name}-{batch}-{mode}.pt.jsonl"
        last = json.loads(open(path).read().splitlines()[-1])
        print(f"| {batch} | {shown} | {last['images_per_s']:,.0f} |")
PYTHON
}

teacher() { # DATASET CLASSES
    $python train_teacher.py --dataset "$1" --recipe fast $NETWORK $TRAIN --out "$RUNS/r34-$2.pt"
    cp "$RUNS/r34-$2.pt.jsonl" "$OUT/"
    $python eval.py "$RUNS/r34-$2.pt"
}

student() { # CLASSES
    need "$RUNS/r34-$1.pt" "teacher$1"
    $python transfer_init.py --src "$RUNS/r34-$1.pt" --out "$RUNS/init-$1.pt"
    $python train_idsnn.py --init "$RUNS/init-$1.pt" --recipe fast $TRAIN --out "$RUNS/idsnn-$1.pt"
    cp "$RUNS/idsnn-$1.pt.jsonl" "$OUT/"
    $python eval.py "$RUNS/r34-$1.pt" "$RUNS/idsnn-$1.pt" --json "$OUT/eval-$1.json"
}

# -------------------------------------------------------------------------------------------- main

chosen=${1:-}
if [ "${2:-}" = inside ]; then
    "$chosen"
    exit
fi
if [ "$chosen" = all ]; then
    chosen=$STEPS
fi
if [ -z "$chosen" ]; then
    echo "usage: $0 [--rehearse] STEP, or all; the steps, in order:" $STEPS
    exit
fi
for name in $chosen; do
    if [[ " $(echo $STEPS) " != *" $name "* ]]; then
        echo "$0: no step $name; there are:" $STEPS >&2
        exit 2
    fi
done
failed=
for name in $chosen; do
    echo "== $name"
    began=$SECONDS
    # SIGTERM reaches the training too, which keeps what it has; after half a minute SIGKILL
    timeout --kill-after=30 $LIMIT bash "$script" $rehearse "$name" inside 2>&1 |
        tee "$OUT/$name.log" || failed="$failed $name"
    echo "== $name: $((SECONDS - began)) s, log in $OUT/$name.log"
done
if [ -n "$failed" ]; then
    echo "failed, or cut off after $LIMIT s (call it again):$failed" >&2
    exit 1
fi
