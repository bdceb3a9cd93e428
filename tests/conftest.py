"""Without a GPU the Triton kernels run under Triton's interpreter, which has to be chosen before
triton is imported."""
import os

import torch

if not torch.cuda.is_available():
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
    try:
        mend_interpreter()
    except ImportError:  # no triton here: its tests are skipped
        pass
