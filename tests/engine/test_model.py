"""The network: its parts do what section 3 of the paper says, alone and together."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate
from torch import Tensor

from mana_triton.model import MANA, MANAConfig

SMALL = MANAConfig(channels=16, encoder_blocks=1, decoder_blocks=2, memory_slots=6)
VARIANTS = {
    "paper": SMALL,
    "no-memory": replace(SMALL, memory_slots=0),
    "gate": replace(SMALL, gaussian="gate", logit_scale=1.0),
    "cosine": replace(SMALL, match="cosine"),
    "cosine-offsets": replace(SMALL, match="cosine", offsets=True),
    "three-frames": replace(SMALL, frames=3, offsets=True, sigma=1.5),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def build(config: MANAConfig, *, trained=True) -> MANA:
    """A network in float64; `trained` fills what starts at zero or equal with noise."""
    torch.manual_seed(0)
    model = MANA(config).double()
    if trained:
        with torch.no_grad():
            for x in model.parameters():
                if x.ndim:
                    x.add_(torch.randn_like(x), alpha=0.05)
    return model.eval().requires_grad_(False)


def clip(config: MANAConfig, batch=1, height=6, width=5, seed=1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (batch, config.frames, 3, height, width)
    return torch.rand(*size, generator=generator, dtype=torch.float64)


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize(
    ("name", "parameters"),
    # the paper reports 14.3 M
    [("paper", 14_333_892), ("official", 14_317_508), ("small", 2_111_845), ("tiny", 270_901)],
)
def test_presets(name, parameters):
    with torch.device("meta"):
        model = MANA(MANAConfig.preset(name))
    assert sum(x.numel() for x in model.parameters()) == parameters
    small = name in ("small", "tiny")
    config = model.config
    assert (config.match, config.offsets) == (("cosine", True) if small else ("dot", False))
    assert config.gaussian == ("gate" if name == "official" else "bias")
    assert config.frames == 7


def test_impossible_configurations_are_named():
    with pytest.raises(ValueError, match="one of tiny, small, paper, official, got 'large'"):
        MANAConfig.preset("large")
    with pytest.raises(ValueError, match="gaussian must be one of bias, gate, got 'other'"):
        MANAConfig(gaussian="other")
    with pytest.raises(ValueError, match="match must be one of dot, cosine, got 'other'"):
        MANAConfig(match="other")
    for channels in (30, 0):
        with pytest.raises(ValueError, match=f"positive multiple of 4, got {channels}"):
            MANAConfig(channels=channels)
    with pytest.raises(ValueError, match=r"frames must be \[B, 7, 3, H, W\], got T=5"):
        build(SMALL)(clip(SMALL)[:, :5])


def branch(block, x):
    return block.conv2(block.conv1(x).relu())


def dense(model: MANA, frames: Tensor) -> Tensor:
    """The network of section 2 of the design, one pixel of attention at a time."""
    config = model.config
    T, H, W = config.frames, *frames.shape[-2:]
    features, queries, keys, values = [], [], [], []
    for frame in frames[0]:
        x = F.leaky_relu(model.conv_first(frame[None]), 0.1)
        for block in model.encoder:
            x = x + branch(block, x)
        features.append(x)
        n = F.group_norm(
            x, config.channels // 4, model.norm.weight, model.norm.bias, model.norm.eps
        )
        queries.append(model.phi(n)[0].flatten(1).T)
        keys.append(model.theta(n)[0].flatten(1).T)
        values.append(model.g(n)[0].flatten(1).T)
    q, D = queries[T // 2], config.channels // 2
    columns = []
    for k, v in zip(keys, values, strict=True):
        rows = []
        for i in range(H * W):
            if config.match == "cosine":
                cosines = (k @ q[i]) / (k.norm(dim=1) * q[i].norm())
                logits = model.temperature * cosines
            else:
                logits = (k @ q[i]) * (config.logit_scale or 1 / math.sqrt(D))
            steps = torch.tensor(
                [[j // W - i // W, j % W - i % W] for j in range(H * W)], dtype=torch.float64
            )
            bell = torch.exp(-steps.square().sum(1) / (2 * model.sigma**2))
            if config.gaussian == "bias":
                a = logits.exp() * bell / (logits.exp() * bell).sum()
            else:
                a = logits.exp() / logits.exp().sum() * bell
            row = [a @ v, a @ steps] if config.offsets else [a @ v]
            rows.append(torch.cat(row))
        columns.append(torch.stack(rows).T.unflatten(1, (H, W)))
    z = features[T // 2] + model.w_z(torch.cat(columns)[None])
    if config.memory_slots:
        p = torch.softmax(q @ model.memory / math.sqrt(D), dim=1)
        z = z + model.w_z1((p @ model.memory.T).T.unflatten(1, (H, W))[None])
    for block in model.decoder:
        z = z + branch(block, z)
    for upconv in (model.upconv1, model.upconv2):
        z = F.leaky_relu(F.pixel_shuffle(upconv(z), 2), 0.1)
    residual = model.conv_last(F.leaky_relu(model.conv_hr(z), 0.1))
    return residual + F.interpolate(frames[:, T // 2], scale_factor=4, mode="bilinear")


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_forward_equals_the_definition(config, backend):
    model, frames = build(config), clip(config)
    enlarged = model(frames, backend=backend, tolerance=0)
    assert difference(enlarged, dense(model, frames)) < 1e-12


@pytest.mark.parametrize(("mean", "dtype"), [(30.0, torch.float32), (0.0, torch.float64)])
def test_normalization_is_group_norm(mean, dtype):
    model = build(SMALL).to(dtype)
    with torch.no_grad():
        model.norm.weight.normal_()
        model.norm.bias.normal_()
    f = torch.randn(2, SMALL.channels, 9, 13, dtype=dtype) + mean
    scale, shift = (x[..., None, None] for x in model.normalization(f))
    exact = model.double().norm(f.double())
    # the two terms cancel
    size = (scale * f).abs().max() + shift.abs().max()
    assert (scale * f + shift - exact).abs().max() <= 8 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_encoding_once_and_in_bands_equals_forward(config):
    """What a stream does: frames encoded one by one, the attention in bands of rows."""
    model, frames = build(config), clip(config, batch=2, height=9)
    t = frames.shape[1]
    encoded = [model.encode(frames[:, i]) for i in range(t)]
    center = encoded[t // 2]
    q = model.queries(center.f, center.scale, center.shift)
    k, v = (torch.stack([getattr(e, x) for e in encoded], 1) for x in "kv")
    z = torch.cat(
        [
            model.fuse(center.f[:, :, rows], q[:, rows], k, v, first_row=rows.start)
            for rows in (slice(0, 4), slice(4, 5), slice(5, 9))
        ],
        2,
    )
    output = model.decode(z) + model.skip(frames[:, t // 2])
    assert difference(output, model(frames)) < 1e-12
    # clips of a batch are independent
    assert difference(model(frames[1:]), model(frames)[1:]) < 1e-12


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_untrained_neighbors_and_memory_have_no_effect(config):
    model, frames = build(config, trained=False), clip(config)
    others = clip(config, seed=2)
    center = config.frames // 2
    others[:, center] = frames[:, center]
    assert torch.equal(model(frames), model(others))
    # with W_z other than zero they have
    with torch.no_grad():
        model.w_z.weight.fill_(0.1)
    before = model(frames)
    assert difference(before, model(others)) > 1e-4
    if config.memory_slots:
        with torch.no_grad():
            model.w_z1.weight.fill_(0.1)
        assert difference(before, model(frames)) > 1e-4


def test_cosine_starts_with_equal_projections():
    model = build(replace(SMALL, match="cosine"), trained=False)
    phi, theta = model.phi.state_dict(), model.theta.state_dict()
    assert all(torch.equal(phi[name], theta[name]) for name in ("weight", "bias"))
    assert model.temperature.item() == 12
    features = model.encode(clip(SMALL)[0])
    q = model.queries(features.f, features.scale, features.shift)
    assert difference(features.k, F.normalize(q, dim=-1)) < 1e-12
    # but they are two parameters
    with torch.no_grad():
        model.theta.weight.add_(1)
    assert not torch.equal(model.phi.weight, model.theta.weight)


def test_memory_parameters():
    model = build(VARIANTS["no-memory"])
    assert not [name for name in model.state_dict() if "memory" in name or "w_z1" in name]
    assert model.memory_parameters() == []
    model = build(SMALL)
    ids = {id(x): name for name, x in model.named_parameters()}
    names = sorted(ids[id(x)] for x in model.memory_parameters())
    assert names == ["memory", "w_z1.bias", "w_z1.weight"]


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_is_learned(config):
    model = build(config).requires_grad_()
    model(clip(config)).square().mean().backward()
    for name, x in model.named_parameters():
        assert x.grad is not None and x.grad.isfinite().all(), name
        # a constant added to all logits of a softmax changes nothing
        if (name, config.match) != ("theta.bias", "dot"):
            assert x.grad.abs().max() > 1e-9, name


def test_memory_loss():
    """Stage 2 of the training: |y - q|_1 on the center frame."""
    model, frames = build(SMALL), clip(SMALL, batch=2)
    f, _, _, *norm = model.encode(frames[:, 3])
    q = model.queries(f, *norm)
    p = torch.softmax(q @ model.memory / math.sqrt(8), dim=-1)
    expected = (p @ model.memory.T - q).abs().mean()
    assert abs(model.memory_loss(frames) - expected) < 1e-12


def test_receptive_field():
    """A pixel of the output depends on z within the receptive field, and no farther."""
    model = build(SMALL)
    reach, size = model.receptive_field, 2 * model.receptive_field + 5
    z = torch.randn(1, 16, size, 3, generator=torch.Generator().manual_seed(0)).double()
    changed = z.clone()
    changed[:, :, 0] += 1
    rows = (model.decode(z) - model.decode(changed)).abs().amax((0, 1, 3))  # [4 size]
    assert rows[: 4 * (reach - 1)].min() > 0
    assert rows[4 * (reach + 1) :].max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype):
    """As accurate as the same network with the attentions of the definition."""
    config = VARIANTS["cosine-offsets"]
    model, frames = build(config), clip(config, height=12, width=10)
    half = MANA(config)
    half.load_state_dict(model.state_dict())
    model.load_state_dict(half.to(dtype).state_dict())  # the same, rounded, weights
    exact = model(frames.to(dtype).double())
    actual = half(frames.to(dtype))
    eager = half(frames.to(dtype), backend="reference")
    assert actual.dtype == dtype
    assert_as_accurate("output", actual, eager, exact, dtype)
