"""Draw curves.png of this folder's logs:  python results/h200/figure.py"""
import json
import os
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # files alone, no window
here = Path(__file__).parent
sys.path.insert(0, str(here.parents[1]))  # the project, from wherever this is started
from eval import plot  # noqa: E402

teacher, idsnn = json.loads((here / "eval.json").read_text())["runs"]
runs = [teacher, idsnn | dict(name="idsnn-60")]
for name in ("idsnn-30", "per-step-14"):  # of these eval.py was not asked: what their logs say
    _, *history = map(json.loads, (here / f"{name}.jsonl").read_text().splitlines())
    runs.append(idsnn | dict(
        name=name, history=history, firing=history[-1]["rates"],
        steps=[dict(T=4, accuracy=history[-1]["test_acc"])]))
plot(here / "curves.png", runs)
