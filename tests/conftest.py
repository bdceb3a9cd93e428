"""What the tests share: Triton's kernels on this machine, and one pipeline on the digits.

Without a GPU the Triton kernels run under Triton's interpreter, which has to be chosen before
triton is imported."""
import importlib
import importlib.util
import os
import shlex
import shutil

import pytest
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # the tensors are tiny; threads would only fight over the cores


def mend_interpreter():
    """The bounds of a kernel's range() are arrays of shape (1,) to the interpreter. Up to 3.6 it
    calls int() on them, which numpy refuses from 2.4 on; later ones squeeze them first, as here."""
    from triton.runtime import interpreter
    patch = interpreter._patch_lang_tensor

    def mended(tensor, *scope):
        patch(tensor, *scope)  # undoes itself, and with it this, after the kernel
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = mended


if os.environ.get("TRITON_INTERPRET") == "1":
    mend_interpreter()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton")
both = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=needs_triton)])
CPU = "--device cpu --precision fp32"


def call(command):
    """Run a script's main() in this process: call("train_teacher.py --epochs 1")."""
    script, *argv = shlex.split(command)
    importlib.import_module(script.removesuffix(".py")).main(argv)


@pytest.fixture
def poison():
    """Uninitialised memory is NaN, and 255 in the bits: what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def saved_bytes(function, *args, **options):
    """The bytes that autograd keeps for the backward."""
    sizes = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda tensor: sizes.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        function(*args, **options)
    return sum(sizes)


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """A folder with r34.pt, snn_init.pt and idsnn.pt: digits, width 8, two epochs. Not to be
    written to: `here` is a copy."""
    folder, before = tmp_path_factory.mktemp("stages"), os.getcwd()
    os.chdir(folder)
    call(f"train_teacher.py --dataset digits --width 8 --epochs 2 {CPU}")
    call("transfer_init.py --src r34.pt")
    call(f"train_idsnn.py --epochs 2 {CPU}")
    os.chdir(before)
    return folder


@pytest.fixture
def here(stages, tmp_path, monkeypatch):
    """An own copy of `stages`, the current folder."""
    for name in ("r34.pt", "snn_init.pt", "idsnn.pt"):
        shutil.copy(stages / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
