"""Validation metrics: whole frames of clips kept from training, scored as `metrics` does."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from mana_triton.engine.window import window_numbers
from mana_triton.metrics import psnr
from mana_triton.resize import SCALE, upscale_bicubic
from mana_triton.training.clips import WINDOW, Clip
from mana_triton.training.degradation import LowClip, degrade

PSNR_CAP = 100.0  # dB, for frames that are reproduced exactly


class Validation:
    """Whole frames of some clips, enlarged and compared with the originals.

    Args:
        clips: any clips; their frames are cropped to multiples of 4.
        frames: how many frames of each clip, evenly spaced.
        degradation: see `degrade`.
        low: one low-resolution variant of each clip by its path, instead of `degradation`.
    """

    def __init__(
        self,
        clips: list[Clip],
        frames: int,
        degradation: str,
        low: dict[Path, list[LowClip]] | None = None,
    ):
        self.clips, self.frames, self.degradation = clips, frames, degradation
        self.low = low
        self.bicubic_psnr = self._mean_psnr(
            lambda lr: upscale_bicubic(_to_uint8(lr[0, WINDOW // 2]))
        )

    def measure(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Mean PSNR in dB of the model, and of the model fed the center frame seven times."""

        def enlarge_alone(lr: Tensor) -> Tensor:
            center = repeat(lr[:, WINDOW // 2], "b c h w -> b t c h w", t=WINDOW)
            return _enlarge(model, center, device)

        return {
            "psnr_db": self._mean_psnr(lambda lr: _enlarge(model, lr, device)),
            "center_only_psnr_db": self._mean_psnr(enlarge_alone),
            "bicubic_psnr_db": self.bicubic_psnr,
        }

    def picture(self, model: nn.Module, device: torch.device) -> np.ndarray:
        """Bicubic, ours and the original of the first clip side by side, [H, 3W, 3] uint8."""
        lr, hr = next(self._windows(self.clips[0]))
        bicubic = upscale_bicubic(_to_uint8(lr[0, WINDOW // 2])).numpy()
        return np.concatenate([bicubic, _enlarge(model, lr, device).numpy(), hr], axis=1)

    def _mean_psnr(self, enlarge: Callable[[Tensor], Tensor]) -> float:
        """PSNR of enlarge(lr [1, 7, 3, h, w]) -> [4h, 4w, 3] uint8, over frames, then clips."""
        scores = []
        for clip in self.clips:
            frames = [
                min(PSNR_CAP, psnr(enlarge(lr).numpy(), hr)) for lr, hr in self._windows(clip)
            ]
            scores.append(np.mean(frames))
        return float(np.mean(scores))

    def _windows(self, clip: Clip) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Yield lr [1, 7, 3, h, w] float32 in [0, 1] and the center's hr [H, W, 3] uint8."""
        T, H, W, _ = clip.shape
        H, W = H // SCALE * SCALE, W // SCALE * SCALE
        for center in np.linspace(0, T - 1, min(self.frames, T)).round().astype(int):
            times = window_numbers(center, 0, T - 1, WINDOW)
            hr = clip.frames[times, :H, :W]
            if self.low:
                lr = torch.from_numpy(self.low[clip.path][0].frames()[times])
            else:
                lr = degrade(torch.from_numpy(hr), self.degradation)
            lr = rearrange(lr, "t h w c -> 1 t c h w").float() / 255
            yield lr, hr[WINDOW // 2]


@torch.no_grad()
def _enlarge(model: nn.Module, lr: Tensor, device: torch.device) -> Tensor:
    """Frames lr [1, 7, 3, h, w] -> the center frame [4h, 4w, 3] uint8, on the CPU."""
    return _to_uint8(model(lr.to(device))[0].cpu())


def _to_uint8(frame: Tensor) -> Tensor:
    """[3, H, W] in [0, 1] -> [H, W, 3] uint8."""
    return rearrange(frame.float().mul(255).round().clamp(0, 255), "c h w -> h w c").byte()
