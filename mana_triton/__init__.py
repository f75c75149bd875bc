"""Alignment-free 4x video super-resolution: MANA (Yu et al., CVPR 2022), exact and fast."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mana_triton.attention import cross_frame_attention, memory_attention
    from mana_triton.checkpoint import load
    from mana_triton.engine.upscaler import EngineOptions, Upscaler, upscale
    from mana_triton.model import MANA, MANAConfig

    __version__: str

__all__ = [
    "MANA",
    "EngineOptions",
    "MANAConfig",
    "Upscaler",
    "__version__",
    "cross_frame_attention",
    "load",
    "memory_attention",
    "upscale",
]

_MODULES = {
    "MANA": "model",
    "EngineOptions": "engine.upscaler",
    "MANAConfig": "model",
    "Upscaler": "engine.upscaler",
    "cross_frame_attention": "attention",
    "load": "checkpoint",
    "memory_attention": "attention",
    "upscale": "engine.upscaler",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use: commands configure OpenMP before torch is imported."""
    if name == "__version__":
        from importlib.metadata import version

        return version("mana-triton")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
