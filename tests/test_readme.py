"""What the README says can be done: its commands, its snippet, its links, its trained network."""
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import eval as stage4

ROOT = Path(stage4.__file__).parent
PAGES = ["README.md", "results/reproduction.md"]  # whose commands are for today's flags
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
COMMAND = re.compile(r"\b(train_teacher|transfer_init|train_idsnn|eval)\.py([^`&;|#\n]*)")


def commands(page):
    """(script, its arguments) of each command on a page: in fenced blocks and between backticks."""
    text = (ROOT / page).read_text().replace("$S", "0")
    code = [code for language, code in FENCED.findall(text) if language == ""]
    code += re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    found = [command for part in code for command in COMMAND.findall(part)]
    return [(script, shlex.split(flags)) for script, flags in found]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(here, page):
    pytest.importorskip("matplotlib")
    found = commands(page)
    assert len(found) >= 8
    for script, argv in found:
        if script == "transfer_init" and "--src" not in argv:  # the text is about another flag
            argv += ["--src", "r34.pt"]
        if "--init" in argv:  # the file that it starts from, under the name that it uses
            start = here / argv[argv.index("--init") + 1]
            if not start.exists():
                shutil.copy(here / "snn_init.pt", start)
        importlib.import_module(script).parse_args(argv)


def test_the_first_commands_are_the_pipeline_in_its_order():
    scripts = [script for script, argv in commands("README.md")]
    assert list(dict.fromkeys(scripts)) == ["train_teacher", "transfer_init", "train_idsnn", "eval"]


def test_the_snippet_runs():
    snippet, = [code for language, code in FENCED.findall((ROOT / "README.md").read_text())
                if language == "python"]
    results = {}
    exec(snippet, results)
    assert results["spikes"].shape == results["x"].shape == (4, 8, 64, 16, 16)
    assert set(results["spikes"].unique().tolist()) == {0, 1}
    assert results["bn"].running_mean.abs().sum() > 0  # updated, as F.batch_norm would


@pytest.mark.parametrize("page", [
    "README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "results").rglob("*.md"))])
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        if "://" not in link:  # only what lies in this repository
            assert ((ROOT / page).parent / link).exists(), link

def test_the_trained_network_names_what_the_images_show(tmp_path):
    """The README's command: the images are named by what they show, "cat.png"."""
    script, argv = next(c for c in commands("README.md") if c[0] == "eval" and "--predict" in c[1])
    files = [str(ROOT / word) if word.startswith("results/") else word for word in argv]
    stage4.main([*files, "--json", str(tmp_path / "all.json")])
    run, = json.loads((tmp_path / "all.json").read_text())["runs"]
    last = [row for row in run["predictions"] if row["T"] == 4]
    assert len(last) >= 3
    assert [row["class"] for row in last] == [Path(row["image"]).stem for row in last]
