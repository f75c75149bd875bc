"""Losses: the paper's for each stage, and those of perceptual training.

Pictures are [B, 3, H, W] RGB in [0, 1].
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from mana_triton.model import MANA

SHIFTS = 8  # of the LPIPS crop, in pixels
STATIC = 0.03  # originals that differ more along the flow are occluded
LUMA = np.array([0.299, 0.587, 0.114])


class StageLoss(nn.Module):
    """Mean loss of one of the paper's stages (section 3.4): L1, in stage 2 |y - q|_1."""

    def __init__(self, model: MANA, stage: int, backend: str = "auto"):
        super().__init__()
        self.model, self.stage, self.backend = model, stage, backend

    def forward(self, lr: Tensor, hr: Tensor) -> Tensor:
        """Lr [B, 7, 3, h, w] and the center's hr [B, 3, 4h, 4w] -> []."""
        if self.stage == 2:
            return self.model.memory_loss(lr, backend=self.backend)
        return F.l1_loss(self.model(lr, backend=self.backend), hr)


class PatchDiscriminator(nn.Sequential):
    """Logits that patches of some 40 pixels are originals: [B, 3, H, W] -> [B, 1, H/8, W/8].

    Every convolution has spectral normalization (Miyato et al., 2018).
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 128)):
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip((3, *widths), widths, strict=False)):
            kernel, stride = (3, 1) if i == 0 else (4, 2)
            layers.append(spectral_norm(nn.Conv2d(before, after, kernel, stride, padding=1)))
            layers.append(nn.LeakyReLU(0.2))
        super().__init__(*layers, spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1)))


def shifted_lpips(lpips: nn.Module, s: Tensor, y: Tensor) -> Tensor:
    """Mean LPIPS of crops shifted by a random 0..7 pixels.

    AlexNet's first stride is 4, as our factor: without the shift its grid shows in the pictures.
    """
    dy, dx = torch.randint(0, SHIFTS, (2,)).tolist()
    return lpips(s[..., dy:, dx:] * 2 - 1, y[..., dy:, dx:] * 2 - 1).mean()


def optical_flow(hr: np.ndarray) -> tuple[Tensor, Tensor]:
    """Flow between neighboring originals, and where it holds.

    Args:
        hr: [B, 2, H, W, 3] uint8.

    Returns:
        [B, H, W, 2] (dx, dy) in pixels from each first to its second original, and
        [B, 1, H, W], 0 where the second one is outside or differs, else 1.
    """
    from skimage.registration import optical_flow_ilk  # slow to import

    luma = hr.astype(np.float32) @ LUMA.astype(np.float32) / 255
    flow = [optical_flow_ilk(a, b, radius=7, num_warp=4, dtype=np.float32) for a, b in luma]
    flow = np.stack(flow)[:, ::-1].copy()  # (dy, dx) -> (dx, dy)
    flow = torch.from_numpy(flow).permute(0, 2, 3, 1)
    first, second = (torch.from_numpy(luma[:, i, None]) for i in (0, 1))
    moved, inside = warp(second, flow)
    return flow, (inside * ((moved - first).abs() < STATIC)).float()


def warp(x: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """X [B, C, H, W] at each pixel's place plus flow [B, H, W, 2]; [B, 1, H, W], true inside."""
    H, W = x.shape[2:]
    rows, cols = (torch.arange(n, device=x.device).float() for n in (H, W))
    place = torch.stack(torch.meshgrid(cols, rows, indexing="xy"), -1) + flow
    unit = (2 * place + 1) / torch.tensor([W, H], device=x.device) - 1
    inside = (unit.abs() <= 1).all(-1)[:, None]
    return F.grid_sample(x, unit, align_corners=False, padding_mode="border"), inside


def temporal_loss(s: Tensor, y: Tensor, flow: Tensor, mask: Tensor) -> Tensor:
    """Mean change of the error along the flow: what flickers costs, what moves along does not.

    Args:
        s, y: [B, 2, 3, H, W] neighboring outputs and their originals.
        flow, mask: of `optical_flow`.
    """
    error = s - y
    return ((warp(error[:, 1], flow)[0] - error[:, 0]).abs() * mask).mean()
