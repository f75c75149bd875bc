"""A larger network that computes what a trained smaller one does (Net2Net, Chen et al. 2016).

Wider: channel i of the larger network is channel i mod C of the smaller one, so that every group
of the GroupNorm, and every four channels that a pixel shuffle takes, repeats whole. Weights on r
equal inputs share the old one unevenly: w / r plus noise of sum zero, which keeps the function and
gives the equal channels different gradients. Deeper: the added residual blocks end in zeros.

With r times the channels D of the attention and s times the memory entries:

    q.k / (|q| |k|)          is unchanged, both are r times as much; for dot matching W_k makes up
    softmax(q M / sqrt(D))   is unchanged with M / sqrt(r); s equal entries share one's part
    w_z1 y                   is unchanged with w_z1 sqrt(r), as y is made of M

Equal entries of the memory would stay equal, so noise parts them: the one change of the function.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from mana_triton.model import MANA, MANAConfig

SPLIT = 0.5  # deviation of the noise of sum zero, relative to the weights it is added to
PART = 0.02  # deviation of the noise of the memory, likewise


class GrowthError(ValueError):
    """A network cannot grow into another; the message says why."""


@torch.no_grad()
def grow(model: MANA, config: MANAConfig, part: float = PART) -> MANA:
    """A network of `config` with the function of `model`.

    Args:
        model: the smaller network.
        config: with a multiple of its channels and memory entries, as many or more blocks; apart
            from where sigma starts, the rest must be equal. sigma is the smaller network's.
        part: deviation of the memory's noise, relative to its entries; 0 for the same function.

    Raises:
        GrowthError: `config` is not larger in every respect.
    """
    _refuse_smaller(model.config, config)
    r = config.channels // model.config.channels
    grown = MANA(config)
    state = grown.state_dict()
    for name, x in model.state_dict().items():
        y = state[name]
        if x.ndim < 2:
            y.copy_(_repeat(x, y.shape))
        elif name == "memory":
            y.copy_(_repeat(x, y.shape) / math.sqrt(r))
            y.add_(torch.randn_like(y), alpha=part * _size(y))
        elif name == "w_z.weight":  # the two offsets of a frame are not repeated
            d = model.config.channels // 2
            values, new = (n.unflatten(1, (config.frames, -1)) for n in (x, y))
            rows = values[torch.arange(len(y)) % len(x)]
            new[:, :, : r * d] = _split(rows[:, :, :d].transpose(1, 2), r).transpose(1, 2)
            new[:, :, r * d :] = rows[:, :, d:]
        else:
            rows = x[torch.arange(len(y)) % len(x)]
            y.copy_(_split(rows, y.shape[1] // x.shape[1]))
    grown.theta.weight.mul_(_key_factor(config, r))
    grown.theta.bias.mul_(_key_factor(config, r))  # pyright: ignore[reportOptionalMemberAccess]
    if model.config.memory_slots:
        grown.w_z1.weight.mul_(math.sqrt(r))
    for part_name in ("encoder", "decoder"):
        old, new = getattr(model, part_name), getattr(grown, part_name)
        for block in new[len(old) :]:
            block.conv2.weight.zero_()
            block.conv2.bias.zero_()
    return grown


def _repeat(x: Tensor, shape: torch.Size) -> Tensor:
    """Entry i of every axis is entry i mod its old length."""
    for axis, length in enumerate(shape):
        x = x.index_select(axis, torch.arange(length) % x.shape[axis])
    return x


def _split(x: Tensor, copies: int) -> Tensor:
    """Weights [n, c, ...] on [n, copies * c, ...] equal inputs, with the same sums."""
    if copies == 1:
        return x
    shares = torch.stack([x / copies] * copies, dim=1)  # [n, copies, c, ...]
    noise = torch.randn_like(shares) * (SPLIT * _size(shares))
    return (shares + noise - noise.mean(dim=1, keepdim=True)).flatten(1, 2)


def _size(x: Tensor) -> float:
    """Root of the mean square."""
    return x.square().mean().sqrt().item()


def _key_factor(config: MANAConfig, r: int) -> float:
    """What keys are multiplied by, so that logits of r times the channels stay as they were."""
    if config.match == "cosine":
        return 1.0
    return 1 / math.sqrt(r) if config.logit_scale is None else 1 / r


def _refuse_smaller(old: MANAConfig, new: MANAConfig) -> None:
    for name in ("channels", "memory_slots"):
        a, b = getattr(old, name), getattr(new, name)
        if b % max(a, 1) or b < a:
            raise GrowthError(f"{name} must be a multiple of {a} to grow, got {b}")
    for name in ("encoder_blocks", "decoder_blocks"):
        a, b = getattr(old, name), getattr(new, name)
        if b < a:
            raise GrowthError(f"{name} must be at least {a} to grow, got {b}")
    sizes = ("channels", "memory_slots", "encoder_blocks", "decoder_blocks")
    kept = replace(old, **{name: getattr(new, name) for name in sizes})
    if math.isinf(old.sigma) == math.isinf(new.sigma):
        kept = replace(kept, sigma=new.sigma)
    if kept != new:
        raise GrowthError(f"apart from its size the network must stay {kept}, got {new}")
