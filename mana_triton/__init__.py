"""Alignment-free 4x video super-resolution: MANA (Yu et al., CVPR 2022), exact and fast."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mana_triton.attention import cross_frame_attention, memory_attention
    from mana_triton.checkpoint import load
    from mana_triton.engine.upscaler import upscale
    from mana_triton.model import MANA, MANAConfig

__all__ = [
    "MANA",
    "MANAConfig",
    "cross_frame_attention",
    "load",
    "memory_attention",
    "upscale",
]

_HOME = {
    "MANA": "model",
    "MANAConfig": "model",
    "cross_frame_attention": "attention",
    "load": "checkpoint",
    "memory_attention": "attention",
    "upscale": "engine.upscaler",
}


def __getattr__(name: str):
    """Public names load on first use: commands set OpenMP up before torch is imported."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
