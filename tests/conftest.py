"""Without a GPU the Triton kernels run under Triton's interpreter, which has to be chosen before
triton is imported."""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # the tensors are tiny; threads would only fight over the cores
