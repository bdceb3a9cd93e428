"""What the README and the pages beside the logs say can be done: commands, snippets, links."""
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import train_idsnn
import train_teacher
import transfer_init
from results import pipeline

ROOT = Path(train_teacher.__file__).parent
README = (ROOT / "README.md").read_text()
# pages whose commands are for today's flags; a log's own page may name its commit instead
PAGES = ["README.md", "results/reproduction.md", "results/cifar100-width16/README.md"]
COMMAND = r"\b(train_teacher|transfer_init|train_idsnn|eval)\.py([^`&;|#\n]*)"


def commands(page):
    """(script, its arguments) of every command on a page, shell variables filled in.

    Whatever follows a script's name up to the end of a command counts, prose in a table does not.
    """
    text = (ROOT / page).read_text().replace("$S", "0")
    # fenced blocks without a language, and whatever stands between backticks
    code = re.findall(r"```\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text)
    found = [command for block in code for command in re.findall(COMMAND, block)]
    return [(script, shlex.split(flags)) for script, flags in found]


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """r34.pt, snn_init.pt and idsnn.pt of the digits, as small and short as can be."""
    folder = tmp_path_factory.mktemp("readme")
    # two steps of 512 images
    short = "--epochs 1 --batch-size 512 --device cpu".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_teacher.main(["--dataset", "digits", "--width", "2", "--depth", "18", *short])
        transfer_init.main(["--src", "r34.pt", "--T", "2"])
        train_idsnn.main(short)
    return folder


@pytest.fixture
def here(stages, tmp_path, monkeypatch):
    """A folder with these three files, that a test may change."""
    shutil.copytree(stages, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_understood(here, page):
    pytest.importorskip("matplotlib")
    pytest.importorskip("nir")
    found = commands(page)
    assert len(found) >= 10
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


def test_the_pipeline_of_the_first_screen_starts_the_scripts_in_order():
    # the one line that a newcomer pastes first
    line = next(line for line in README.splitlines() if "--dataset digits &&" in line)
    scripts = [command.split()[1] for command in line.split(" && ")[1:]]
    assert scripts == ["train_teacher.py", "transfer_init.py", "train_idsnn.py", "eval.py"]


def test_snippets_run(here):
    torch.manual_seed(0)
    # the third needs a loop around it, below
    reading, kernels, _ = re.findall(r"```python\n(.*?)```", README, re.S)
    # digits: one channel, ten classes
    known = dict(images=torch.randn(3, 1, 8, 8))
    exec(reading, known)
    assert known["scores"].shape == (3, 10)
    # T, B, C, H, W
    known = dict(x=torch.randn(4, 2, 3, 8, 8), residual=torch.rand(4, 2, 3, 8, 8),
                 bn=nn.BatchNorm2d(3))
    exec(kernels, known)
    assert known["spikes"].shape == (4, 2, 3, 8, 8)
    assert known["bn"].running_mean.abs().sum() > 0  # the batch's, as F.batch_norm leaves them


def test_the_profiling_lines_fit_the_training_loop(here, capsys):
    """Put where the README says, with the text of train_idsnn.py around them."""
    lines = re.findall(r"```python\n(.*?)```", README, re.S)[2]
    source = Path(train_idsnn.__file__).read_text()
    # at the depth of the line that they stand above
    place = re.search(r"\n( +)train_step\(\)\n", source)
    indented = "".join(place[1] + line + "\n" for line in lines.splitlines())
    indented = indented.replace("i == 20", "i == 1")  # an epoch here has two steps
    edited = source[:place.start() + 1] + indented + source[place.start() + 1:]
    # run as a module of another name, so that the real one stays as it is
    names = dict(__name__="edited", __file__=train_idsnn.__file__)
    exec(compile(edited, "train_idsnn.py", "exec"), names)
    argv = "--epochs 1 --batch-size 512 --device cpu --no-graph --fresh --out profiled.pt".split()
    with pytest.raises(SystemExit):
        names["main"](argv)
    assert "idsnn::lif" in capsys.readouterr().out


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
