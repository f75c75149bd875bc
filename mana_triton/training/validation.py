"""How good a network in training is, and what its attentions do.

Everything is measured on whole frames of clips kept from training, by the exact metrics of
`metrics`; the statistics of the attentions come from a batch of training.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from mana_triton.attention import cross_frame_attention
from mana_triton.engine.upscaler import window_numbers
from mana_triton.metrics import psnr
from mana_triton.model import MANA
from mana_triton.resize import SCALE, upscale_bicubic
from mana_triton.training.clips import WINDOW, Clip, degrade
from mana_triton.training.degradation import LowClip

PSNR_CAP = 100.0  # dB, for frames that are reproduced exactly


class Validation:
    """Whole frames of some clips, enlarged and compared with the originals.

    Args:
        clips: any clips; their frames are cropped to multiples of 4.
        frames: how many frames of each clip, evenly spaced.
        degradation: see `data.degrade`.
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

        @torch.no_grad()
        def enlarge(lr: Tensor) -> Tensor:
            return _to_uint8(model(lr.to(device))[0].cpu())

        def enlarge_alone(lr: Tensor) -> Tensor:
            return enlarge(repeat(lr[:, WINDOW // 2], "b c h w -> b t c h w", t=WINDOW))

        return {
            "psnr_db": self._mean_psnr(enlarge),
            "center_only_psnr_db": self._mean_psnr(enlarge_alone),
            "bicubic_psnr_db": self.bicubic_psnr,
        }

    def seconds(self, model: nn.Module, device: torch.device) -> float:
        """About how long `measure` takes, from one window of the first clip."""
        began = time.monotonic()
        lr, _ = next(self._windows(self.clips[0]))
        with torch.no_grad():
            _to_uint8(model(lr.to(device))[0].cpu())
        pixels = sum(min(self.frames, c.shape[0]) * c.shape[1] * c.shape[2] for c in self.clips)
        per_pixel = (time.monotonic() - began) / (self.clips[0].shape[1] * self.clips[0].shape[2])
        return 2 * per_pixel * pixels

    @torch.no_grad()
    def picture(self, model: nn.Module, device: torch.device) -> np.ndarray:
        """Bicubic, ours and the original of the first clip side by side, [H, 3W, 3] uint8."""
        lr, hr = next(self._windows(self.clips[0]))
        bicubic = upscale_bicubic(_to_uint8(lr[0, WINDOW // 2])).numpy()
        ours = _to_uint8(model(lr.to(device))[0].cpu()).numpy()
        return np.concatenate([bicubic, ours, hr], axis=1)

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


def _to_uint8(frame: Tensor) -> Tensor:
    """[3, H, W] in [0, 1] -> [H, W, 3] uint8."""
    return rearrange(frame.float().mul(255).round().clamp(0, 255), "c h w -> h w c").byte()


@torch.no_grad()
def attention_statistics(model: MANA, lr: Tensor) -> dict[str, float | None]:
    """What the attentions do with lr [B, 7, 3, h, w] in [0, 1].

    Returns:
        sigma, in pixels, where it is finite; temperature, of cosine matching; visited, the
        fraction of the (query, key) pairs that the certificate asks for; memory_entropy, of a
        pixel's attention to the memory bank, mean over pixels, 1 for the uniform one; memory_dead,
        entries that get less than a hundredth of their share of all pixels' attention.
    """
    config = model.config
    statistics: dict[str, float | None] = {}
    if math.isfinite(model.sigma.item()):
        statistics["sigma"] = model.sigma.item()
    b = lr.shape[0]
    f, k, v, *norm = model.encode(rearrange(lr, "b t c h w -> (b t) c h w"))
    k, v = (rearrange(x, "(b t) h w d -> b t h w d", b=b) for x in (k, v))
    q = model.queries(*(x[config.frames // 2 :: config.frames] for x in (f, *norm)))
    cosine = config.match == "cosine"
    if cosine:
        statistics["temperature"] = model.temperature.item()
    _, statistics["visited"] = cross_frame_attention(
        F.normalize(q, dim=-1) if cosine else q,
        k,
        v,
        model.sigma,
        gaussian=config.gaussian,
        scale=model.scale,
        tolerance=model.tolerance,
        backend=model.backend,
        return_density=True,
    )
    if config.memory_slots > 1:
        p = torch.softmax(q.flatten(0, 2) @ model.memory * q.shape[-1] ** -0.5, dim=-1)
        entropy = torch.special.entr(p).sum(dim=-1).mean() / math.log(config.memory_slots)
        dead = p.mean(dim=0) < 0.01 / config.memory_slots
        statistics |= {"memory_entropy": entropy.item(), "memory_dead": dead.sum().item()}
    return statistics
