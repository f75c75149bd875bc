"""MANA: memory-augmented non-local attention for video super-resolution (Yu et al., CVPR 2022).

Every pixel of the center frame attends to seven frames (section 3.2) and to a learned memory
bank (section 3.3); a deep decoder turns that into detail. Names map to the paper's: q = phi(center
frame), k = theta(frames), v = g(frames), y = memory output, z = what the decoder sees.

`MANA.forward` enlarges the center frame of a window. Its four steps, `encode`, `fuse`, `decode`
and the bilinear `skip`, are public: a stream encodes every frame once and decodes tile by tile.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mana_triton.attention import GAUSSIANS, cross_frame_attention, memory_attention, memory_loss
from mana_triton.resize import SCALE

MATCHES = ("dot", "cosine")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NORM_PIXELS = 1 << 15  # summed at once


@dataclass(frozen=True)
class MANAConfig:
    """Shape of the network; the defaults are the paper's."""

    channels: int = 128  # C; attention works on D = C / 2
    encoder_blocks: int = 5
    decoder_blocks: int = 40
    memory_slots: int = 512  # N; 0 leaves the memory branch out
    frames: int = 7  # T
    gaussian: str = "bias"  # or "gate", the form of the official code
    match: str = "dot"  # or "cosine": QK norm with a learned temperature
    offsets: bool = False  # W_z also sees each frame's expected displacement
    sigma: float = 4.0  # initial width of the Gaussian, in low-resolution pixels; inf: none
    logit_scale: float | None = None  # of dot matching; None is 1 / sqrt(D)

    def __post_init__(self):
        for field, allowed in (("gaussian", GAUSSIANS), ("match", MATCHES)):
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {value!r}")
        if self.channels <= 0 or self.channels % 4:
            raise ValueError(f"channels must be a positive multiple of 4, got {self.channels}")

    @classmethod
    def preset(cls, name: str) -> "MANAConfig":
        """A named configuration.

        Raises:
            ValueError: there is no such name; the message lists them.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return PRESETS[name]


_PAPER = MANAConfig()
PRESETS = {
    "tiny": replace(
        _PAPER, channels=32, encoder_blocks=3, decoder_blocks=8, memory_slots=128,
        match="cosine", offsets=True, sigma=2.0,
    ),
    "small": replace(
        _PAPER, channels=64, decoder_blocks=20, memory_slots=256, match="cosine", offsets=True
    ),
    "paper": _PAPER,
    "official": replace(_PAPER, gaussian="gate", memory_slots=256, logit_scale=1.0),
}  # fmt: skip


class Features(NamedTuple):
    """Features of N encoded frames."""

    f: Tensor  # [N, C, H, W] of the encoder
    k: Tensor  # [N, H, W, D]
    v: Tensor  # [N, H, W, D]
    scale: Tensor  # [N, C] of GroupNorm, see `MANA.normalization`
    shift: Tensor  # [N, C]


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), 3 x 3, no normalization."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        # a deep stack starts near the identity
        nn.init.kaiming_normal_(self.conv1.weight)
        nn.init.kaiming_normal_(self.conv2.weight)
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        # in place: on a CPU new memory costs more than the arithmetic
        return self.conv2(F.relu(self.conv1(x), inplace=True)).add_(x)


def _zero_projection(inputs: int, outputs: int) -> nn.Conv2d:
    """A 1 x 1 convolution that starts at zero."""
    project = nn.Conv2d(inputs, outputs, 1)
    nn.init.zeros_(project.weight)
    nn.init.zeros_(project.bias)  # pyright: ignore[reportArgumentType]
    return project


class MANA(nn.Module):
    """The network; weights as built are untrained (see `mana_triton.load`)."""

    def __init__(self, config: MANAConfig):
        super().__init__()
        c, d, t = config.channels, config.channels // 2, config.frames
        values = d + 2 if config.offsets else d
        self.config = config
        self.conv_first = nn.Conv2d(3, c, 3, padding=1)
        self.encoder = nn.Sequential(*(ResidualBlock(c) for _ in range(config.encoder_blocks)))
        self.norm = nn.GroupNorm(c // 4, c, eps=1e-6)
        self.phi, self.theta, self.g = (nn.Conv2d(c, d, 1) for _ in range(3))
        self.w_z = _zero_projection(t * values, c)
        # with sigma = infinity, plain attention, there is no width to learn
        wide = math.isinf(config.sigma)
        self.sigma = nn.Parameter(torch.tensor(float(config.sigma)), requires_grad=not wide)
        if config.match == "cosine":
            self.temperature = nn.Parameter(torch.tensor(12.0))
            self.theta.load_state_dict(self.phi.state_dict())
        if config.memory_slots:
            self.memory = nn.Parameter(torch.randn(d, config.memory_slots))  # M
            self.w_z1 = _zero_projection(d, c)
        self.decoder = nn.Sequential(*(ResidualBlock(c) for _ in range(config.decoder_blocks)))
        self.upconv1 = nn.Conv2d(c, 4 * c, 3, padding=1)
        self.upconv2 = nn.Conv2d(c, 2 * c, 3, padding=1)
        self.conv_hr = nn.Conv2d(c // 2, c // 2, 3, padding=1)
        self.conv_last = nn.Conv2d(c // 2, 3, 3, padding=1)

    @property
    def scale(self) -> Tensor | float:
        """Factor s of q . k in the cross-frame attention; of unit vectors the temperature."""
        if self.config.match == "cosine":
            return self.temperature
        given = self.config.logit_scale
        return (self.config.channels // 2) ** -0.5 if given is None else given

    @property
    def receptive_field(self) -> int:
        """Pixels of z on each side that an output pixel of `decode` depends on."""
        return 2 * self.config.decoder_blocks + 3

    def memory_parameters(self) -> list[nn.Parameter]:
        """Parameters of the memory branch, which training stage 2 learns (section 3.4)."""
        return [self.memory, *self.w_z1.parameters()] if self.config.memory_slots else []

    def forward(
        self, frames: Tensor, *, backend: str = "auto", tolerance: float | None = None
    ) -> Tensor:
        """Enlarge the center frame of each window.

        Args:
            frames: [B, T, 3, H, W] in [0, 1].
            backend: of both attentions, see `cross_frame_attention`.
            tolerance: of the cross-frame attention, see there.

        Returns:
            [B, 3, 4H, 4W], not clamped.

        Raises:
            ValueError: another number of frames than the model's T.
        """
        b, t = frames.shape[:2]
        if t != self.config.frames:
            raise ValueError(f"frames must be [B, {self.config.frames}, 3, H, W], got T={t}")
        encoded = self.encode(rearrange(frames, "b t c h w -> (b t) c h w"))
        f, k, v, scale, shift = (rearrange(x, "(b t) ... -> b t ...", b=b) for x in encoded)
        f, scale, shift = (x[:, t // 2] for x in (f, scale, shift))
        q = self.queries(f, scale, shift)
        z = self.fuse(f, q, k, v, backend=backend, tolerance=tolerance)
        return self.decode(z) + self.skip(frames[:, t // 2])

    def memory_loss(self, frames: Tensor, *, backend: str = "auto") -> Tensor:
        """Stage 2's loss |y - q|_1 on the center frame of frames [B, T, 3, H, W]."""
        center = frames[:, self.config.frames // 2]
        f = self.extract(center)
        q = self.queries(f, *self.normalization(f))
        return memory_loss(q, self.memory.to(q.dtype), backend=backend)

    def encode(self, frames: Tensor) -> Features:
        """Features of single frames [N, 3, H, W] in [0, 1]."""
        f = self.extract(frames)
        norm = self.normalization(f)
        return Features(f, *self.keys_values(f, *norm), *norm)

    def extract(self, frames: Tensor) -> Tensor:
        """Encoder features [N, C, H, W] of single frames [N, 3, H, W] in [0, 1]."""
        return self.encoder(F.leaky_relu(self.conv_first(frames), 0.1, inplace=True))

    def normalization(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """GroupNorm of single frames as a scale and a shift of each channel.

        Args:
            f: [N, C, H, W] features of whole frames.

        Returns:
            scale, shift [N, C], in float32 or wider.
        """
        groups, work = self.norm.num_groups, torch.promote_types(f.dtype, torch.float32)
        pixels = rearrange(f, "n c h w -> n (h w) c")
        # channel sums first, part by part: in memory order they are ten times faster on a CPU
        parts = pixels.split(NORM_PIXELS, 1)
        sums = torch.stack([x.sum(1, keepdim=True, dtype=work) for x in parts]).sum(0)
        mean = sums / pixels.shape[1]
        sums = torch.stack([(x - mean).square().sum(1) for x in parts]).sum(0)
        square = sums / pixels.shape[1]
        mean = rearrange(mean, "n 1 (g c) -> n g c", g=groups)
        square = rearrange(square, "n (g c) -> n g c", g=groups)
        center = mean.mean(2, keepdim=True)
        variance = (square + (mean - center).square()).mean(2, keepdim=True)
        deviation = (variance + self.norm.eps).sqrt()
        each = self.norm.num_channels // groups
        mean, deviation = (x[..., 0].repeat_interleave(each, 1) for x in (center, deviation))
        scale = self.norm.weight / deviation
        return scale, self.norm.bias - mean * scale

    def keys_values(self, f: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, of length one with cosine matching, and values.

        Args:
            f: [N, C, h, W] rows of features, not normalized.
            scale, shift: [N, C] the normalization of the whole frames.

        Returns:
            k, v [N, h, W, D].
        """
        k, v = self._projected(f, scale, shift, self.theta, self.g)
        return F.normalize(k, dim=-1) if self.config.match == "cosine" else k, v

    def queries(self, f: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Queries [N, h, W, D], not of length one; arguments as of `keys_values`."""
        return self._projected(f, scale, shift, self.phi)[0]

    def _projected(
        self, f: Tensor, scale: Tensor, shift: Tensor, *layers: nn.Conv2d
    ) -> tuple[Tensor, ...]:
        """One matrix product for all layers, with the scale folded into its weights."""
        weight = torch.cat([layer.weight[:, :, 0, 0] for layer in layers]).to(scale.dtype)
        bias = torch.cat([layer.bias for layer in layers])  # pyright: ignore[reportArgumentType]
        bias = torch.addmm(bias.to(scale.dtype), shift, weight.mT)
        folded = (weight * scale[:, None]).mT
        pixels = rearrange(f, "n c h w -> n (h w) c")
        projected = torch.baddbmm(bias[:, None].to(f.dtype), pixels, folded.to(f.dtype))
        pattern = "n (h w) (j d) -> j n h w d"
        return rearrange(projected, pattern, h=f.shape[2], j=len(layers)).unbind()

    def fuse(
        self,
        f: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first_row: int = 0,
        order: list[int] | None = None,
        *,
        backend: str = "auto",
        tolerance: float | None = None,
    ) -> Tensor:
        """What the decoder sees: z = F + W_z(concat_t x_t) + W_z1(y).

        Args:
            f: [B, C, h, W] features of the center frame, rows first_row .. first_row + h - 1.
            q: [B, h, W, D] its queries, the same rows.
            k, v: [B, S, H, W, D] keys and values of the frames of the window.
            first_row: see f; the whole frame when 0 and h = H.
            order: index of the frame at each of the T places of the window; None when S = T.
            backend, tolerance: as of `forward`.

        Returns:
            [B, C, h, W].
        """
        config = self.config
        cosine = config.match == "cosine"
        attended = cross_frame_attention(
            F.normalize(q, dim=-1) if cosine else q,
            k,
            v,
            self.sigma,
            gaussian=config.gaussian,
            scale=self.scale,
            tolerance=tolerance,
            offsets=config.offsets,
            backend=backend,
            first_row=first_row,
        )
        x, displacement = attended if config.offsets else (attended, None)
        return self.combine(f, q, x, displacement, order, backend=backend)

    def combine(
        self,
        f: Tensor,
        q: Tensor,
        x: Tensor,
        displacement: Tensor | None,
        order: list[int] | None = None,
        *,
        backend: str = "auto",
    ) -> Tensor:
        """`fuse` from the attention's x [B, S, h, W, D] and displacement [B, S, h, W, 2]."""
        if displacement is not None:
            x = torch.cat([x, displacement.to(x.dtype)], -1)
        if order is not None:
            x = x[:, order]
        z = f + self.w_z(rearrange(x, "b t h w d -> b (t d) h w"))
        if self.config.memory_slots:
            y = memory_attention(q, self.memory.to(q.dtype), backend=backend)
            z = z + self.w_z1(rearrange(y, "b h w d -> b d h w"))
        return z

    def decode(self, z: Tensor) -> Tensor:
        """The residual over bilinear interpolation: [B, C, h, w] -> [B, 3, 4h, 4w]."""
        x = self.decoder(z)
        x = F.pixel_shuffle(F.leaky_relu(self.upconv1(x), 0.1, inplace=True), 2)
        x = F.pixel_shuffle(F.leaky_relu(self.upconv2(x), 0.1, inplace=True), 2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.1, inplace=True))

    @staticmethod
    def skip(frames: Tensor) -> Tensor:
        """Bilinear x4 of [B, 3, H, W]."""
        return F.interpolate(frames, scale_factor=SCALE, mode="bilinear", align_corners=False)
