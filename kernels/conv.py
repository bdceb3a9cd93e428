"""Branches of a recorded step, and a convolution whose weight gradient is one of them.

A step that is recorded as a CUDA graph may fork: what does not depend on each other runs side by
side, and fills the gaps that kernels leave at their ends and where they wait for memory. Time saved
of a step of this project on one H200 in bf16, all gradients bit-equal (results/h200/variants.log):

                                       ResNet-34     distilled Spiking ResNet-18
                                       batch 256     batch 256     batch 64
    weight gradients on a branch         5.8%          1.8%          6.1%
    the frozen teacher on a branch                     3.3%          7.7%
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


def recording(x):
    """Whether what is done with x becomes part of a CUDA graph."""
    if torch.compiler.is_compiling() or not (x.is_cuda and torch.cuda.is_initialized()):
        return False
    return torch.cuda.is_current_stream_capturing()


class Branch:
    """Work that a recorded step does beside what follows, from fork() to join(), on a stream of its
    own. In a step that is not recorded it is done in place."""

    def __init__(self):
        self.main = self.stream = None
        self.tensors = ()  # what the open branch reads; empty where there is none

    @contextmanager
    def fork(self, *tensors):
        """`with` it, on the branch. tensors: what is read there, kept until join(): the allocator
        would give their memory to what follows while the branch still reads it."""
        if not recording(tensors[0]):
            yield
            return
        # the stream that join() makes wait: autograd calls it from a thread of its own
        self.main = torch.cuda.current_stream()
        self.stream = self.stream or torch.cuda.Stream()
        self.tensors += tensors
        self.stream.wait_stream(self.main)
        with torch.cuda.stream(self.stream):
            yield

    def join(self):
        """What follows waits for the branch."""
        if self.tensors:
            self.main.wait_stream(self.stream)
        self.tensors = ()


weight_gradients = Branch()
_branched = []  # (weight, address and version of its gradient), of the backward that runs


def _end_backward():
    """Wait for the weight gradients; raise where something added to one before that."""
    weight_gradients.join()
    branched = _branched.copy()
    _branched.clear()
    for weight, *made in branched:
        g = weight.grad
        if g is not None and [g.data_ptr(), g._version] != made:
            raise RuntimeError("a convolution's weight has a second gradient (it is used twice, or "
                               "the loss reads it), which did not wait: use nn.Conv2d")


class _Convolution(torch.autograd.Function):
    """F.conv2d whose weight gradient is computed beside the backward of the layer below, nearer the
    input, which waits for the gradient of x alone: one is arithmetic, the other mostly memory."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        kernel = weight.to(x.dtype)
        ctx.save_for_backward(x, kernel)
        ctx.weight = weight
        # no bias; dilation, transposed, output padding, groups
        ctx.options = None, stride, padding, (1, 1), False, (0, 0), 1
        return F.conv2d(x, kernel, None, stride, padding)

    @staticmethod
    def backward(ctx, g):
        x, kernel = ctx.saved_tensors
        # one call of cuDNN's for each gradient, in place of one for both: the same kernels
        backward, dx, dw = torch.ops.aten.convolution_backward, None, None
        weight_gradients.join()  # of the layer above
        if ctx.needs_input_grad[0]:
            dx, _, _ = backward(g, x, kernel, *ctx.options, (True, False, False))
        if ctx.needs_input_grad[1]:
            with weight_gradients.fork(g, x, kernel):
                _, dw, _ = backward(g, x, kernel, *ctx.options, (False, True, False))
                dw = dw.to(ctx.weight.dtype)
            _branched.append((ctx.weight, dw.data_ptr(), dw._version))
            # before backward() returns (private, but FSDP's own way)
            torch.autograd.Variable._execution_engine.queue_callback(_end_backward)
        return dx, dw, None, None


class Conv2d(nn.Conv2d):
    """nn.Conv2d, whose weight gradient a recorded step computes on the branch `weight_gradients`:
    of a channels-last parameter without a gradient yet, without bias, dilation and groups.

    Nothing may touch a weight's gradient before backward() returns: where a hook reads it, use
    nn.Conv2d; where the layer is used twice or the loss reads its weight, backward() raises.
    """

    def _conv_forward(self, x, weight, bias):
        plain = (
            bias is None and x.dim() == 4 and self.dilation == (1, 1) and self.groups == 1
            and self.padding_mode == "zeros" and not isinstance(self.padding, str)
            # its gradient has its layout and becomes .grad as it is: nothing reads it
            and weight.is_leaf and weight.grad is None
            and weight.is_contiguous(memory_format=torch.channels_last))
        if not (plain and recording(x)):
            return super()._conv_forward(x, weight, bias)
        # F.conv2d would do so; here what is saved has to be what it sees
        if torch.is_autocast_enabled("cuda"):
            x = x.to(torch.get_autocast_dtype("cuda"))
        return _Convolution.apply(x, weight, self.stride, self.padding)
