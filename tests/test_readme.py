"""What the README and the pages beside the logs say can be done: commands, snippets, links."""
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CPU, call
from torch import nn

import train_idsnn
from results import pipeline

ROOT = Path(train_idsnn.__file__).parent
# pages whose commands are for today's flags; a log's own page may name its commit instead
PAGES = ["README.md", "results/reproduction.md", "results/h200/README.md",
         "results/cifar100-width16/README.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
COMMAND = re.compile(r"\b(train_teacher|transfer_init|train_idsnn|eval)\.py([^`&;|#\n]*)")
SNIPPETS = [code for language, code in FENCED.findall((ROOT / "README.md").read_text())
            if language == "python"]


def commands(page):
    """(script, its arguments) of every command on a page, shell variables filled in.

    In fenced blocks, and between backticks, where prose and tables name flags.
    """
    text = (ROOT / page).read_text().replace("$S", "0")
    code = [code for language, code in FENCED.findall(text) if language in ("", "bash", "sh")]
    code += re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    found = [command for part in code for command in COMMAND.findall(part)]
    return [(script, shlex.split(flags)) for script, flags in found]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(here, page):
    pytest.importorskip("matplotlib")
    found = commands(page)
    assert len(found) >= 5
    # the pages are about the paper's data, whose recipe has other defaults than the digits'
    call("transfer_init.py --src r34.pt --dataset cifar100")
    for script, argv in found:
        if script == "transfer_init" and "--src" not in argv:  # a table names the flag it is about
            argv += ["--src", "r34.pt"]
        # the files that a command starts from, under the names that it uses
        for flag, stage in (("--src", "r34.pt"), ("--init", "snn_init.pt")):
            if flag in argv:
                target = here / argv[argv.index(flag) + 1]
                if not target.exists():
                    shutil.copy(here / stage, target)
        importlib.import_module(script).parse_args(argv)


def test_the_first_commands_are_the_pipeline_in_its_order():
    scripts = [script for script, argv in commands("README.md")]
    assert list(dict.fromkeys(scripts)) == ["train_teacher", "transfer_init", "train_idsnn", "eval"]


@pytest.mark.parametrize("page", PAGES)
def test_every_script_that_is_called_is_there(page):
    for script in re.findall(r"python3? ([\w./-]+\.py)", (ROOT / page).read_text()):
        assert (ROOT / script).exists(), script


def test_snippets_run(here):
    torch.manual_seed(0)
    results = {}
    for snippet in SNIPPETS:
        if "train_step()" in snippet:  # stands in a loop: below
            continue
        known = dict(
            images=torch.randn(8, 1, 8, 8),      # as of idsnn.pt: one channel, ten classes
            x=torch.randn(4, 2, 3, 8, 8),        # (T, B, C, H, W)
            residual=torch.rand(4, 2, 3, 8, 8), bn=nn.BatchNorm2d(3))
        exec(snippet, known)
        results |= known
    assert results["scores"].shape == (8, 10)
    assert results["spikes"].shape == (4, 2, 3, 8, 8)
    assert results["bn"].running_mean.abs().sum() > 0  # the batch's, as F.batch_norm leaves them


def test_the_profiling_lines_fit_the_training_loop(here, capsys):
    """Put where the README says, with the text of train_idsnn.py around them."""
    lines, = [snippet for snippet in SNIPPETS if "train_step()" in snippet]
    source = Path(train_idsnn.__file__).read_text()
    # at the depth of the line that they stand above
    place = re.search(r"\n( +)train_step\(\)\n", source)
    indented = "".join(f"{place[1]}{line}\n" for line in lines.splitlines())
    edited = source[:place.start() + 1] + indented + source[place.start() + 1:]
    # run as a module of another name, so that the real one stays as it is
    names = dict(__name__="edited", __file__=train_idsnn.__file__)
    exec(compile(edited, "train_idsnn.py", "exec"), names)
    with pytest.raises(SystemExit):
        names["main"](f"--epochs 1 --no-graph --fresh --out profiled.pt {CPU}".split())
    assert "::lif" in capsys.readouterr().out
    assert not Path("profiled.pt").exists()  # it ends there


@pytest.mark.parametrize("page", [
    "README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "results").rglob("*.md"))])
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        if "://" not in link:  # only what lies in this repository
            assert ((ROOT / page).parent / link).exists(), link


def test_the_picture_is_what_its_script_draws(tmp_path, monkeypatch):
    # it writes beside itself
    drawn = ROOT / "results" / "pipeline.svg"
    monkeypatch.setattr(pipeline, "__file__", str(tmp_path / "pipeline.py"))
    pipeline.main()
    assert (tmp_path / "pipeline.svg").read_text() == drawn.read_text()
