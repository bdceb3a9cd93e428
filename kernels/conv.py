"""Branches of a recorded step, and a convolution whose weight gradient is one of them.

A step that is recorded as a CUDA graph may fork: what does not depend on each other runs side by
side, and fills the gaps that kernels leave at their ends and where they wait for memory. So much
less time takes a step on one H200 in bf16, the numbers the same (results/h200/variants.log):

                                       stage 1, batch 256    stage 3, batch 256    batch 64
    weight gradients on a branch              5.8%                  1.8%             6.1%
    the teacher on a branch                                         3.3%             7.7%
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


def recording(x):
    """Whether what is done with x becomes part of a CUDA graph."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return False
    return torch.cuda.is_current_stream_capturing()


class Branch:
    """Work that a recorded step does beside what follows, until join(). In a step that is not
    recorded it is done in place."""

    def __init__(self):
        self.stream, self.tensors = None, ()

    @contextmanager
    def beside(self, *tensors):
        """tensors: what it reads. They are kept until join(): else others were given their memory
        while it is still read."""
        if not recording(tensors[0]):
            yield
            return
        self.stream, self.tensors = self.stream or torch.cuda.Stream(), tensors
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def join(self):
        """What follows waits for the branch."""
        if self.tensors:
            torch.cuda.current_stream().wait_stream(self.stream)
        self.tensors = ()


weight_gradients = Branch()


class _Convolution(torch.autograd.Function):
    """F.conv2d whose weight gradient is computed beside the backward of the layer below, which
    waits for the gradient of x alone: one is arithmetic, the other mostly memory."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        kernel = weight.to(x.dtype)
        ctx.save_for_backward(x, kernel)
        ctx.dtype = weight.dtype
        # no bias; dilation, transposed, output padding, groups
        ctx.options = None, stride, padding, (1, 1), False, (0, 0), 1
        return F.conv2d(x, kernel, None, stride, padding)

    @staticmethod
    def backward(ctx, g):
        x, kernel = ctx.saved_tensors
        weight_gradients.join()  # of the layer above
        backward, dx = torch.ops.aten.convolution_backward, None
        if ctx.needs_input_grad[0]:
            dx, _, _ = backward(g, x, kernel, *ctx.options, (True, False, False))
        with weight_gradients.beside(g, x, kernel):
            _, dw, _ = backward(g, x, kernel, *ctx.options, (False, True, False))
            dw = dw.to(ctx.dtype)
        return dx, dw, None, None


class Conv2d(nn.Conv2d):
    """nn.Conv2d, whose weight gradient a recorded step computes on a branch where there is no bias,
    dilation or group: `weight_gradients.join()` before anyone reads gradients."""

    def forward(self, x):
        plain = self.bias is None and self.dilation == (1, 1) and self.groups == 1
        if not (plain and recording(x)):
            return super().forward(x)
        if torch.is_autocast_enabled("cuda"):
            x = x.to(torch.get_autocast_dtype("cuda"))
        return _Convolution.apply(x, self.weight, self.stride, self.padding)
