"""Methods that enlarge the frames of a clip: bicubic, and networks in three ways.

    bicubic             MATLAB's kernel
    mana:WEIGHTS        streamed as `mana_triton.infer` does
    center:WEIGHTS      every window is the center frame seven times: what neighbors do not add
    ensemble:WEIGHTS    mean over the eight flips and turns of a clip
    folder:PATH         frames that another program wrote; nothing to compute here

WEIGHTS is a shipped name or a file.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product, tee
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from eval.datasets import MIDDLE
from mana_triton.checkpoint import WEIGHTS, named_weights
from mana_triton.engine.scene_cuts import CutDetector
from mana_triton.engine.upscaler import EngineOptions, Upscaler
from mana_triton.files import content_hash
from mana_triton.resize import upscale_bicubic

METHODS = "bicubic, mana:WEIGHTS, center:WEIGHTS, ensemble:WEIGHTS or folder:PATH"
NETWORKS = ("mana", "center", "ensemble")
SYMMETRIES = tuple(product(range(4), (False, True)))  # quarter turns, then whether mirrored
Frames = Iterator[np.ndarray]  # [H, W, 3] uint8 each


class MethodError(ValueError):
    """A method that does not exist, or that cannot be used with these data."""


def split(method: str) -> tuple[str, str]:
    """Kind and weights or path: "mana:tiny" is ("mana", "tiny")."""
    kind, _, value = method.partition(":")
    return kind, value


@lru_cache(maxsize=8)
def upscaler_of(weights: str, device: str, precision: str) -> Upscaler:
    """The upscaler with these weights; MethodError for a device or precision that is not there."""
    try:
        return Upscaler(weights, EngineOptions(device=device, precision=precision))
    except ValueError as error:
        raise MethodError(str(error)) from error


def weights_hash(method: str) -> str | None:
    """SHA-256 of the method's weights file, None without weights; MethodError lists the methods."""
    kind, value = split(method)
    if method == "bicubic" or (kind == "folder" and value):
        return None
    if kind not in NETWORKS or not value:
        raise MethodError(f"method must be {METHODS}, got '{method}'")
    file = WEIGHTS / f"{value}.safetensors" if value in named_weights() else Path(value)
    return content_hash(file) if file.is_file() else None


def describe(method: str, device: str, precision: str) -> dict:
    """What a row says about its method."""
    kind, weights = split(method)
    if kind == "bicubic":
        return {"dtype": "uint8", "device": "cpu"}
    if kind not in NETWORKS:
        return {}
    upscaler = upscaler_of(weights, device, precision)
    return {
        "dtype": upscaler.precision,
        "device": upscaler.device.type,
        "memory_slots": upscaler.model.config.memory_slots,
    }


def enlarge(method: str, lr: Frames, scored: range, device: str, precision: str) -> Frames:
    """The enlarged frames, [4H, 4W, 3] uint8, of those that are scored, in order."""
    kind, weights = split(method)
    if kind == "bicubic":
        for index, frame in enumerate(lr):
            if index in scored:
                yield upscale_bicubic(torch.from_numpy(frame)).numpy()
        return
    upscaler = upscaler_of(weights, device, precision)
    if kind == "center":
        for index, frame in enumerate(lr):
            if index in scored:  # in a clip of one frame, all neighbors are that frame
                yield next(upscaler.stream([frame])).picture
    elif kind == "ensemble":
        yield from _enlarge_ensemble(upscaler, lr, scored)
    elif scored == MIDDLE:  # a Vimeo-90K sequence is one window, whatever happens in it
        frames = list(lr)
        yield next(upscaler.stream(frames, is_cut=lambda _: False, skip=MIDDLE[0])).picture
    else:
        for index, enlarged in enumerate(upscaler.stream(lr)):
            if index in scored:
                yield enlarged.picture


def _enlarge_ensemble(upscaler: Upscaler, lr: Frames, scored: range) -> Frames:
    """The mean over the eight symmetries of a clip, each transformed back, before rounding."""
    frames = (rearrange(torch.from_numpy(x), "h w c -> c h w").float() / 255 for x in lr)
    streams = [
        _transformed_stream(upscaler, copy, *symmetry, cuts=scored != MIDDLE)
        for copy, symmetry in zip(tee(frames, len(SYMMETRIES)), SYMMETRIES, strict=True)
    ]
    for index, results in enumerate(zip(*streams, strict=True)):
        if index in scored:
            mean = torch.stack(results).mean(dim=0) * 255
            yield rearrange(mean, "c h w -> h w c").round().byte().cpu().numpy()


def _transformed_stream(
    upscaler: Upscaler, frames: Iterator[Tensor], turns: int, mirrored: bool, cuts: bool
) -> Iterator[Tensor]:
    """Turn frames [3, H, W] in [0, 1], enlarge, turn back; cuts are found in unturned frames."""

    def turned(x: Tensor) -> Tensor:
        x = torch.rot90(x, turns, (1, 2))
        return x.flip(2) if mirrored else x

    detector = CutDetector()
    stream = upscaler.stream(frames, pixels=turned, is_cut=lambda x: cuts and detector.is_cut(x))
    for _, x in stream:
        yield torch.rot90(x.flip(2) if mirrored else x, -turns, (1, 2))
