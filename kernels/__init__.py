"""The fused multi-step LIF neuron, alone and behind batch norm, and a convolution for recorded
steps. See lif.py, bn_lif.py and conv.py."""

# the functions hide modules of their names: `from kernels.lif import ...` still finds those
from .bn_lif import BatchNorm2d, bn_act, bn_lif
from .conv import Conv2d
from .lif import lif

__all__ = ["BatchNorm2d", "Conv2d", "bn_act", "bn_lif", "lif"]
