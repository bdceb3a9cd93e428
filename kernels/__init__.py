"""The fused multi-step LIF neuron, alone and behind batch norm. See lif.py and bn_lif.py."""

# the functions hide modules of their names: `from kernels.lif import ...` still finds those
from .bn_lif import BatchNorm2d, bn_act, bn_lif
from .lif import lif

__all__ = ["BatchNorm2d", "bn_act", "bn_lif", "lif"]
