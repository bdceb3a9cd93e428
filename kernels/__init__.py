"""The fused multi-step LIF neuron, alone and behind batch norm. See lif.py and bn_lif.py."""

from kernels.bn_lif import BatchNorm2d, bn_lif
from kernels.lif import lif

__all__ = ["BatchNorm2d", "bn_lif", "lif"]
