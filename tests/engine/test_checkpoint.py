"""Weights files: saved models come back, the official layout is read, all else is refused."""

import json
import math
import os
import pickle
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import skimage.data
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import random_network
from safetensors.torch import load_file, save_file
from torch import Tensor

from mana_triton import checkpoint
from mana_triton.checkpoint import CheckpointError, load, save
from mana_triton.metrics import psnr
from mana_triton.model import MANAConfig
from mana_triton.resize import matlab_bicubic, upscale_bicubic

CONFIG = MANAConfig(
    channels=8, encoder_blocks=1, decoder_blocks=2, memory_slots=3, match="cosine", offsets=True
)


pytestmark = pytest.mark.usefixtures("one_thread")


# --- our own files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip_is_bit_exact(dtype, tmp_path):
    path, config = tmp_path / "a.safetensors", replace(CONFIG, channels=32, logit_scale=0.3)
    model = random_network(config)
    save(model, path, dtype=dtype, psnr_db="25.07", note="Grüße")
    assert path.stat().st_size < 1.06 * dtype.itemsize * sum(x.numel() for x in model.parameters())
    again = load(path)
    assert again.config == config
    assert not again.training
    for name, x in model.state_dict().items():
        assert again.state_dict()[name].dtype == torch.float32
        assert torch.equal(again.state_dict()[name], x.to(dtype).float()), name
    info = checkpoint.metadata(path)
    assert (info["format"], info["psnr_db"], info["note"]) == ("mana_triton/1", "25.07", "Grüße")
    assert json.loads(info["config"]) == asdict(config)


def test_save_replaces_a_file_with_the_usual_permissions(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    os.umask(umask := os.umask(0))
    save(random_network(CONFIG), str(path))
    assert load(str(path)).config == CONFIG
    assert path.stat().st_mode & 0o444 == 0o444 & ~umask
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save(random_network(CONFIG), path, note="first")
    before = path.read_bytes()
    with pytest.raises(Exception, match="int"):
        save(random_network(CONFIG), path, note=3)  # pyright: ignore[reportArgumentType]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_named_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    with pytest.raises(CheckpointError, match=r"a shipped name \(none\) or an existing file"):
        load("tiny")
    for name, channels in (("tiny", 8), ("small", 12)):
        save(random_network(replace(CONFIG, channels=channels)), tmp_path / f"{name}.safetensors")
    (tmp_path / "README.md").write_text("")
    assert checkpoint.named_weights() == ["small", "tiny"]
    assert load("small").config.channels == 12
    message = r"^weights must be a shipped name \(small, tiny\) or an existing file, got 'paper'$"
    with pytest.raises(CheckpointError, match=message):
        load("paper")


@pytest.mark.parametrize("name", checkpoint.named_weights())
def test_shipped_weights(name):
    """They load, are small, have a card, and beat bicubic."""
    path = checkpoint.WEIGHTS / f"{name}.safetensors"
    assert path.stat().st_size <= 10_000_000
    assert all(x.dtype == torch.float16 for x in load_file(path).values())
    assert f"\n## {name}.safetensors\n" in (checkpoint.WEIGHTS / "README.md").read_text()
    hr = torch.from_numpy(skimage.data.astronaut()[100:260, 150:350].copy())
    lr = matlab_bicubic(hr)
    frames = repeat(lr, "h w c -> 1 t c h w", t=7).float() / 255
    with torch.no_grad():
        out = rearrange(load(name)(frames)[0].mul(255).round().clamp(0, 255), "c h w -> h w c")
    gain = psnr(out.byte().numpy(), hr.numpy()) - psnr(upscale_bicubic(lr).numpy(), hr.numpy())
    assert gain > 0.3, f"{gain:.2f} dB above bicubic"


def broken(tmp_path: Path, *, state=None, info=None) -> Path:
    """A file of ours with other tensors or other metadata; None in `info` removes an entry."""
    path = tmp_path / "broken.safetensors"
    config = json.dumps(asdict(CONFIG))
    entries = {"format": "mana_triton/1", "config": config} | (info or {})
    tensors = random_network(CONFIG).state_dict() | (state or {})
    save_file(
        {name: x for name, x in tensors.items() if x is not None},
        path,
        {name: x for name, x in entries.items() if x is not None},
    )
    return path


def changed(**fields) -> dict[str, str]:
    return {"config": json.dumps(asdict(CONFIG) | fields)}


WRONG = [
    ({"state": {"phi.weight": None}}, r"has no tensor phi\.weight, expected \[4, 8, 1, 1\]"),
    ({"state": {"psi.weight": torch.ones(2, 3)}}, r"holds psi\.weight \[2, 3\], which this model"),
    (
        {"state": {"decoder.1.conv2.weight": torch.ones(8, 4, 3, 3)}},
        r"tensor decoder\.1\.conv2\.weight must have shape \[8, 8, 3, 3\], got \[8, 4, 3, 3\]",
    ),
    ({"state": {"sigma": torch.tensor(math.nan)}}, "tensor sigma holds values that are not finite"),
    ({"state": {"w_z.bias": torch.full((8,), math.inf)}}, "bias holds values that are not finite"),
    ({"info": {"format": None}}, r"\(mana_triton/1 in its metadata\), got format None"),
    ({"info": {"format": "mana_triton/2"}}, "got format mana_triton/2"),
    ({"info": {"config": None}}, r"holds no readable configuration \('config'\)"),
    ({"info": {"config": "{"}}, "holds no readable configuration"),
    ({"info": {"config": "[1]"}}, "holds no readable configuration"),
    ({"info": changed(flow=True)}, "holds no readable configuration .*argument 'flow'"),
    ({"info": changed(gaussian="box")}, r"\(gaussian must be one of bias, gate, got 'box'\)"),
    ({"info": changed(channels=6)}, r"multiple of 4, got 6\)"),
    ({"info": changed(channels="8")}, "holds no readable configuration"),
    ({"info": changed(decoder_blocks=1.5)}, "holds no readable configuration"),
    ({"info": changed(sigma=None)}, "holds no readable configuration"),
    ({"info": changed(memory_slots=-2)}, "holds no readable configuration"),
    ({"info": changed(channels=16)}, r"tensor memory must have shape \[8, 3\], got \[4, 3\]"),
    ({"info": changed(decoder_blocks=3)}, r"has no tensor decoder\.2\.conv1\.weight, expected"),
]


def assert_one_line(error: pytest.ExceptionInfo, path: Path) -> None:
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 500


@pytest.mark.parametrize(("change", "message"), WRONG, ids=str)
def test_a_wrong_file_gets_one_clear_line(change, message, tmp_path):
    path = broken(tmp_path, **change)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert_one_line(error, path)


def test_a_file_without_a_newer_field_takes_its_default(tmp_path):
    fields = asdict(CONFIG)
    del fields["logit_scale"], fields["frames"]
    assert load(broken(tmp_path, info={"config": json.dumps(fields)})).config == CONFIG


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"", "is not a safetensors file"),
        ("a.safetensors", b"not weights at all, but a text", "is not a safetensors file"),
        ("a.safetensors", b"\x02\0\0\0\0\0\0\0{}", "must be a checkpoint of mana_triton"),
        ("a.pt", b"", "must be a .safetensors file or a PyTorch file of plain tensors"),
        ("a.mp4", b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "must be a .safetensors file or"),
        ("a.pth", b"PK\x03\x04 broken archive", "must be a .safetensors file or a PyTorch file"),
    ],
)  # fmt: skip
def test_other_files_are_refused(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert_one_line(error, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_truncated_file(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save(official_state(), path)
    else:
        save(random_network(CONFIG), path)
    content = path.read_bytes()
    for size in (4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError) as error:
            load(path)
        assert_one_line(error, path)


# --- the official layout


def official_state(
    channels=128, encoder=1, decoder=2, slots=5, size=4, seed=0
) -> dict[str, Tensor]:
    """A state dict as the official training code saves it, with random weights, none of them 0."""
    generator = torch.Generator().manual_seed(seed)
    D = channels // 2

    def conv(name, inputs, outputs, kernel):
        fan = inputs * kernel * kernel
        weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator) / fan**0.5
        return {
            f"{name}.weight": weight,
            f"{name}.bias": 0.2 * torch.randn(outputs, generator=generator),
        }

    state = conv("conv_first", 3, channels, 3)
    for part, count in (("encoder", encoder), ("decoder", decoder)):
        for i in range(count):
            state |= conv(f"{part}.{i}.conv1", channels, channels, 3)
            state |= conv(f"{part}.{i}.conv2", channels, channels, 3)
    parts = {"g": (channels, D), "theta": (channels, D), "phi": (channels, D)}
    parts |= {"W_z": (7 * D, channels), "W_z1": (D, channels)}
    for name, (inputs, outputs) in parts.items():
        state |= conv(f"nonloc_spatial.{name}", inputs, outputs, 1)
    # logits are not scaled by 1 / sqrt(D) in this layout
    for name in ("phi", "theta"):
        state[f"nonloc_spatial.{name}.weight"] *= 0.4
    state["nonloc_spatial.norm.weight"] = 1 + 0.3 * torch.randn(channels, generator=generator)
    state["nonloc_spatial.norm.bias"] = 0.3 * torch.randn(channels, generator=generator)
    state["nonloc_spatial.std"] = torch.tensor([1.7])
    state["nonloc_spatial.mb"] = torch.randn(D, slots, generator=generator)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    p = torch.stack([y.flatten(), x.flatten()], 1).float()
    state["nonloc_spatial.D"] = (p[:, None] - p[None]).square().sum(-1)
    for name, outputs in (("upconv1", 4 * channels), ("upconv2", 2 * channels)):
        state |= conv(name, channels, outputs, 3)
    state |= conv("conv_hr", D, D, 3) | conv("conv_last", D, 3, 3)
    return state


def official_forward(state: dict[str, Tensor], frames: Tensor) -> Tensor:
    """The network that the layout describes, dense, by functions of plain tensors.

    32 groups at 128 channels, unscaled logits, the Gaussian exp(-D / (2 std^2)) after the softmax,
    the 7 frames concatenated frame by frame.
    """

    def conv(name, x):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def blocks(part, x):
        for i in range(sum(name.startswith(part) for name in state) // 4):
            x = x + conv(f"{part}.{i}.conv2", F.relu(conv(f"{part}.{i}.conv1", x)))
        return x

    b, _, _, h, w = frames.shape
    scale, shift = (state[f"nonloc_spatial.norm.{x}"] for x in ("weight", "bias"))
    features, normed = [], []
    for t in range(7):
        x = blocks("encoder", F.leaky_relu(conv("conv_first", frames[:, t]), 0.1))
        features.append(x)
        normed.append(F.group_norm(x, x.shape[1] // 4, scale, shift, 1e-6))
    place = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    distance = (place[:, None] - place).square().sum(-1)
    gate = torch.exp(-distance / (2 * state["nonloc_spatial.std"] ** 2))
    phi = conv("nonloc_spatial.phi", normed[3]).flatten(2).transpose(1, 2)  # [B, HW, D]
    outputs = []
    for n in normed:
        theta = conv("nonloc_spatial.theta", n).flatten(2)  # [B, D, HW]
        g = conv("nonloc_spatial.g", n).flatten(2).transpose(1, 2)
        o = torch.softmax(phi @ theta, dim=-1) * gate @ g
        outputs.append(o.transpose(1, 2).reshape(b, -1, h, w))
    memory = state["nonloc_spatial.mb"]
    y = torch.softmax(phi @ memory / memory.shape[0] ** 0.5, dim=-1) @ memory.T
    y = y.transpose(1, 2).reshape(b, -1, h, w)
    z = features[3] + conv("nonloc_spatial.W_z", torch.cat(outputs, 1))
    x = blocks("decoder", z + conv("nonloc_spatial.W_z1", y))
    x = F.leaky_relu(F.pixel_shuffle(conv("upconv1", x), 2), 0.1)
    x = F.leaky_relu(F.pixel_shuffle(conv("upconv2", x), 2), 0.1)
    x = conv("conv_last", F.leaky_relu(conv("conv_hr", x), 0.1))
    return x + F.interpolate(frames[:, 3], scale_factor=4, mode="bilinear", align_corners=False)


def official_frames(dtype=torch.float32) -> Tensor:
    return torch.rand(2, 7, 3, 6, 5, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("counts", [(1, 2, 5), (2, 1, 8)], ids=str)
def test_official_layout_gives_the_official_output(counts, tmp_path):
    encoder, decoder, slots = counts
    state = official_state(encoder=encoder, decoder=decoder, slots=slots)
    torch.save(state, tmp_path / "checkpt.pt")
    model = load(tmp_path / "checkpt.pt")
    assert model.config == MANAConfig(
        channels=128, encoder_blocks=encoder, decoder_blocks=decoder, memory_slots=slots,
        gaussian="gate", logit_scale=1.0,
    )  # fmt: skip
    assert not model.training
    with torch.no_grad():
        actual = model(official_frames())
        expected = official_forward(state, official_frames())
    assert (actual - expected).abs().max() < 1e-5
    assert expected.std() > 0.1


def test_only_the_square_of_the_official_std_counts(tmp_path):
    """Training can take it through zero."""
    state = official_state(channels=16)
    state["nonloc_spatial.std"] *= -1
    torch.save(state, tmp_path / "a.pt")
    with torch.no_grad():
        actual = load(tmp_path / "a.pt")(official_frames())
    assert (actual - official_forward(state, official_frames())).abs().max() < 1e-5


WRAPPINGS = {
    "parallel": lambda state: {f"module.module.{name}": x for name, x in state.items()},
    "nested": lambda state: {"model": {"state_dict": {f"module.{n}": x for n, x in state.items()}}},
    "ema-first": lambda state: {"params": {"conv_first.bias": torch.ones(1)}, "params_ema": state},
    "half": lambda state: {"state_dict": {name: x.half() for name, x in state.items()}, "epoch": 3},
    "no-table": lambda state: {n: x for n, x in state.items() if n != "nonloc_spatial.D"},
    "scalar-std": lambda state: state | {"nonloc_spatial.std": torch.tensor(1.7)},
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_wrappers_and_prefixes(name, tmp_path):
    state = official_state(channels=16)
    torch.save(state, tmp_path / "plain.pth")
    torch.save(WRAPPINGS[name](state), tmp_path / "wrapped.pth")
    plain, wrapped = (load(tmp_path / f"{x}.pth") for x in ("plain", "wrapped"))
    assert wrapped.config == plain.config
    for key, x in plain.state_dict().items():
        expected = x.half().float() if name == "half" else x
        assert torch.equal(wrapped.state_dict()[key], expected), key


class Payload:
    """A call that unpickling would run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
def test_code_in_a_pickle_is_not_run(legacy, tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "a.pt"
    content = official_state(channels=16) | {"extra": Payload(victim)}
    if legacy:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(
        CheckpointError, match=r"must be a \.safetensors file or a PyTorch"
    ) as error:
        load(path)
    assert_one_line(error, path)
    assert not victim.exists()


def without(name: str):
    return lambda state: {key: x for key, x in state.items() if key != name}


def with_tensor(name: str, *shape: int):
    return lambda state: state | {name: torch.ones(shape)}


OFFICIAL_WRONG = [
    (lambda state: list(state.values()), "must hold a state dict of tensors, got list"),
    (lambda state: state | {"epoch": 3}, "must hold a state dict of tensors"),
    (lambda state: {0: state["conv_first.weight"]}, "must hold a state dict of tensors"),
    (lambda state: {}, r"not in MANA's official layout: it has no conv_first\.weight"),
    (
        without("nonloc_spatial.std"),
        r"not in MANA's official layout: it has no nonloc_spatial\.std",
    ),
    (without("nonloc_spatial.phi.weight"), r"has no tensor phi\.weight, expected \[8, 16, 1, 1\]"),
    (without("nonloc_spatial.mb"), r"holds w_z1\.weight \[16, 8, 1, 1\], which this model"),
    (without("decoder.0.conv2.weight"), r"has no tensor decoder\.0\.conv2\.weight"),
    (with_tensor("nonloc_spatial.psi.weight", 3), r"holds psi\.weight \[3\], which this model"),
    (
        with_tensor("nonloc_spatial.W_z.weight", 16, 40, 1, 1),
        r"tensor w_z\.weight must have shape \[16, 56, 1, 1\], got \[16, 40, 1, 1\]",
    ),
    (with_tensor("nonloc_spatial.std", 2), r"tensor sigma must have shape \[\], got \[2\]"),
    (with_tensor("nonloc_spatial.mb", 8), r"memory must have shape .*, got \[8\]"),
    (with_tensor("nonloc_spatial.mb", 5, 8), r"memory must have shape \[8, 8\], got \[5, 8\]"),
    (with_tensor("conv_first.weight"), r"conv_first\.weight must have shape .*got \[\]"),
    (with_tensor("conv_first.weight", 18, 3, 3, 3), r"must have shape .*, got \[18, 3, 3, 3\]"),
    (with_tensor("nonloc_spatial", 2), r"holds nonloc_spatial \[2\], which this model"),
    (with_tensor("decoder.99999999.conv1.bias", 16), r"has no tensor decoder\.2\.conv1\.w"),
    (
        lambda state: state | {"conv_last.bias": torch.full((3,), math.nan)},
        r"tensor conv_last\.bias holds values that are not finite",
    ),
]


@pytest.mark.parametrize(("change", "message"), OFFICIAL_WRONG)
def test_a_wrong_official_file_gets_one_clear_line(change, message, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(change(official_state(channels=16)), path)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert_one_line(error, path)


# a damaged header may claim another pickle protocol
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(
    max_examples=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    suffix=st.sampled_from([".pt", ".pth", ".safetensors"]),
    start=st.one_of(st.just(0), st.integers(0, 4000)),
    noise=st.binary(min_size=1, max_size=60),
)
def test_damaged_files_never_end_in_a_traceback(suffix, start, noise, tmp_path):
    """Bytes overwritten anywhere: either the weights are still readable or the error is ours."""
    path = tmp_path / f"a{suffix}"
    original = tmp_path / f"original{suffix}"
    if not original.exists():
        if suffix == ".safetensors":
            save(random_network(CONFIG), original)
        else:
            archive = suffix == ".pt"  # or the older form, a bare pickle
            state = official_state(channels=4, decoder=1)
            torch.save(state, original, _use_new_zipfile_serialization=archive)
    content = bytearray(original.read_bytes())
    content[start : start + len(noise)] = noise
    path.write_bytes(content)
    try:
        load(path)
    except CheckpointError as error:
        assert re.match(re.escape(str(path)), str(error)) and "\n" not in str(error)
