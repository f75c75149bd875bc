"""Networks and clips for tests that need no trained weights."""

import numpy as np
import torch
from torch import Tensor, nn

from mana_triton.model import MANA, MANAConfig

CONFIG = MANAConfig(
    channels=16, encoder_blocks=1, decoder_blocks=1, memory_slots=8, match="cosine", offsets=True
)
ROUNDING = 1e-5  # of float32 sums in another order, on values of about 1


def random_network(config: MANAConfig) -> MANA:
    """A network in which no parameter is zero and no two are equal."""
    torch.manual_seed(0)
    model = MANA(config)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x), alpha=0.05)
    return model


def lively_network(config: MANAConfig = CONFIG, std: float = 0.3) -> MANA:
    """A network in which neighbors and memory matter, unlike in an untrained one."""
    torch.manual_seed(0)
    model = MANA(config)
    for layer in (model.w_z, model.w_z1, model.conv_last):
        nn.init.normal_(layer.weight, std=std)
    return model.eval()


def noise(length: int, height: int, width: int) -> Tensor:
    """[T, 3, H, W] in [0, 1]; every frame looks like a new scene."""
    return torch.rand(length, 3, height, width, generator=torch.Generator().manual_seed(length))


def texture(seed: int, side: int = 400) -> np.ndarray:
    """[side, side, 3] random blobs of some 40 pixels, 0..255."""
    rng = np.random.default_rng(seed)
    picture = rng.normal(size=(side, side, 3)) + rng.normal(size=(side, side, 1))
    for axis in (0, 1):
        spectrum = np.fft.fft(picture, axis=axis)
        shape = [-1 if i == axis else 1 for i in range(3)]
        picture = np.fft.ifft(
            spectrum * np.exp(-((24 * np.pi * np.fft.fftfreq(side)) ** 2) / 2).reshape(shape),
            axis=axis,
        ).real
    level = rng.uniform(100, 150, 3)
    return np.clip(level + 45 * picture / picture.std(), 0, 255)


def pan(seed: int, length: int, height: int = 48, width: int = 64, speed: int = 1) -> np.ndarray:
    """[T, H, W, 3] uint8: a camera moving over a texture."""
    picture = texture(seed).round().astype(np.uint8)
    starts = [speed * i for i in range(length)]
    return np.stack([picture[i : i + height, i : i + width] for i in starts])
