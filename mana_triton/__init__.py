"""Alignment-free 4x video super-resolution: MANA (Yu et al., CVPR 2022), exact and fast."""

from .attention import cross_frame_attention, memory_attention
from .checkpoint import load
from .model import MANA, MANAConfig
from .stream import upscale

__all__ = [
    "MANA",
    "MANAConfig",
    "cross_frame_attention",
    "load",
    "memory_attention",
    "upscale",
]
