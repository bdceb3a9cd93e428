"""Branches of a recorded step, and a convolution whose weight gradient is one of them.

In a CUDA graph, work that does not depend on each other can run side by side, on streams of its
own, and fill the gaps that kernels leave at their ends and while they wait for memory. Time saved
in a step of this project on one H200, bf16, all gradients bit-equal (results/h200/variants.log):

                                       ResNet-34     distilled Spiking ResNet-18
                                       batch 256     batch 256     batch 64
    weight gradients on a branch         5.8%          1.8%          6.1%
    the frozen teacher on a branch                     3.3%          7.7%
"""

from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


def recording(x):
    """Whether the current stream, x's, is being captured for a CUDA graph."""
    if torch.compiler.is_compiling() or not (x.is_cuda and torch.cuda.is_initialized()):
        return False
    return torch.cuda.is_current_stream_capturing()


class Branch:
    """A second stream, whose work, begun by fork(), runs beside what follows up to join(). Outside
    of a capture the work is done in place."""

    def __init__(self):
        self.main = self.stream = None
        self.tensors = ()  # what the open branch reads; empty where there is none

    @contextmanager
    def fork(self, *tensors):
        """The `with` block runs on the branch. tensors: what it reads, kept alive until join():
        the allocator could give their memory to what follows."""
        if not recording(tensors[0]):
            yield
            return
        # remembered for join(), which autograd calls from a thread of its own
        self.main = torch.cuda.current_stream()
        self.stream = self.stream or torch.cuda.Stream()
        self.tensors += tensors
        self.stream.wait_stream(self.main)
        with torch.cuda.stream(self.stream):
            yield

    def join(self):
        """Make what follows wait for the branch."""
        if self.tensors:
            self.main.wait_stream(self.stream)
        self.tensors = ()


weight_gradients = Branch()


def _end_backward(weight, address, version):
    """Wait for the weight gradients; raise where something has added to this one before."""
    weight_gradients.join()
    g = weight.grad
    # a sum is a tensor of its own, or the next version of this one
    if g is not None and (g.data_ptr(), g._version) != (address, version):
        raise RuntimeError("a convolution's weight has a second gradient (it is used twice, or "
                           "the loss reads it), which did not wait: use nn.Conv2d")


class _Convolution(torch.autograd.Function):
    """F.conv2d whose weight gradient is computed on the branch, while the main stream goes on with
    the layer below, which needs the gradient of x alone: arithmetic beside traffic of memory."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        kernel = weight.to(x.dtype)
        ctx.save_for_backward(x, kernel)
        ctx.weight = weight
        # bias sizes, stride, padding, dilation, transposed, output padding, groups
        ctx.options = None, stride, padding, (1, 1), False, (0, 0), 1
        return F.conv2d(x, kernel, None, stride, padding)

    @staticmethod
    def backward(ctx, g):
        x, kernel = ctx.saved_tensors
        # a call for each gradient: PyTorch's one for both runs the same two kernels
        backward, dx, dw = torch.ops.aten.convolution_backward, None, None
        weight_gradients.join()  # of the layer above
        if ctx.needs_input_grad[0]:
            dx, _, _ = backward(g, x, kernel, *ctx.options, (True, False, False))
        if ctx.needs_input_grad[1]:
            with weight_gradients.fork(g, x, kernel):
                _, dw, _ = backward(g, x, kernel, *ctx.options, (False, True, False))
                dw = dw.to(ctx.weight.dtype)
            # not with dw itself: autograd would copy a tensor that somebody else holds, and at once
            end = partial(_end_backward, ctx.weight, dw.data_ptr(), dw._version)
            # before backward() returns (private, but FSDP's own way)
            torch.autograd.Variable._execution_engine.queue_callback(end)
        return dx, dw, None, None


class Conv2d(nn.Conv2d):
    """nn.Conv2d, whose weight gradient a recorded step computes on the branch `weight_gradients`:
    of a channels-last parameter without a gradient yet, without bias, dilation and groups.

    Nothing may touch a weight's gradient before backward() returns: where a hook reads it, use
    nn.Conv2d; where the layer is used twice or the loss reads its weight, backward() raises.
    """

    def _conv_forward(self, x, weight, bias):
        if not recording(x):
            return super()._conv_forward(x, weight, bias)
        plain = (
            bias is None and x.dim() == 4 and self.dilation == (1, 1) and self.groups == 1
            and self.padding_mode == "zeros" and not isinstance(self.padding, str)
            # so autograd makes its gradient .grad as it is, without reading it
            and weight.is_leaf and weight.grad is None
            and weight.is_contiguous(memory_format=torch.channels_last))
        if not plain:
            return super()._conv_forward(x, weight, bias)
        # as F.conv2d would: here, so that the backward sees the same x
        if torch.is_autocast_enabled("cuda"):
            x = x.to(torch.get_autocast_dtype("cuda"))
        return _Convolution.apply(x, weight, self.stride, self.padding)
