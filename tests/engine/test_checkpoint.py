"""Weights on disk: what is saved comes back, the official layout is understood, nothing else is."""

import json
import math
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

import mana_triton
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


@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, memory_slots=0, match="dot"), replace(CONFIG, logit_scale=0.3)],
    ids=["cosine", "no-memory", "logit-scale"],
)
def test_round_trip_is_bit_exact(config, tmp_path):
    model = random_network(config)
    save(model, tmp_path / "a.safetensors", iterations="90000", psnr_db="25.07", note="Grüße")
    again = load(tmp_path / "a.safetensors")
    assert again.config == config
    assert not again.training
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, x in model.state_dict().items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name], x), name
    info = checkpoint.metadata(tmp_path / "a.safetensors")
    assert (info["iterations"], info["psnr_db"], info["note"]) == ("90000", "25.07", "Grüße")
    assert info["format"] == "mana_triton/1"
    assert json.loads(info["config"]) == asdict(config)
    frames = torch.rand(1, 7, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(frames), model(frames))


def test_half_precision_halves_the_file(tmp_path):
    model = random_network(replace(CONFIG, channels=32))
    save(model, tmp_path / "full.safetensors")
    save(model, tmp_path / "half.safetensors", dtype=torch.float16)
    full, half = ((tmp_path / f"{x}.safetensors").stat().st_size for x in ("full", "half"))
    assert 0.5 < half / full < 0.53
    stored = load_file(tmp_path / "half.safetensors")
    again = load(tmp_path / "half.safetensors").state_dict()
    for name, x in model.state_dict().items():
        assert stored[name].dtype == torch.float16
        assert torch.equal(again[name], x.half().float()), name


def test_save_replaces_a_file_and_leaves_it_readable_to_all(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    save(random_network(CONFIG), str(path))
    assert load(str(path)).config == CONFIG
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", ["metadata", "disk"])
def test_a_failed_save_leaves_nothing_behind(failure, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save(random_network(CONFIG), path, note="first")
    before = path.read_bytes()
    if failure == "metadata":
        with pytest.raises(Exception, match="int"):
            save(random_network(CONFIG), path, note=3)  # pyright: ignore[reportArgumentType]
    else:

        def full_disk(state, name, info):
            Path(name).write_bytes(b"half a fi")
            raise OSError("no space left on device")

        monkeypatch.setattr(checkpoint, "save_file", full_disk)
        with pytest.raises(OSError, match="no space left"):
            save(random_network(CONFIG), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_named_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WEIGHTS", tmp_path)
    assert checkpoint.named_weights() == []
    with pytest.raises(CheckpointError, match=r"a shipped name \(none\) or an existing file"):
        load("tiny")
    save(random_network(CONFIG), tmp_path / "tiny.safetensors")
    save(random_network(replace(CONFIG, channels=12)), tmp_path / "small.safetensors")
    (tmp_path / "README.md").write_text("")
    assert checkpoint.named_weights() == ["small", "tiny"]
    assert mana_triton.load("tiny").config == CONFIG
    assert load("small").config.channels == 12
    with pytest.raises(
        CheckpointError,
        match=r"^weights must be a shipped name \(small, tiny\) or an existing file, got 'paper'$",
    ):
        load("paper")


@pytest.mark.parametrize("name", checkpoint.named_weights())
def test_shipped_weights(name):
    """They load, are small, have a card, and enlarge a picture better than bicubic does."""
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


WRONG = {
    "missing-tensor": (
        {"state": {"phi.weight": None}},
        r"has no tensor phi\.weight, expected \[4, 8, 1, 1\]",
    ),
    "extra-tensor": (
        {"state": {"psi.weight": torch.ones(2, 3)}},
        r"holds psi\.weight \[2, 3\], which this model does not have",
    ),
    "wrong-shape": (
        {"state": {"decoder.1.conv2.weight": torch.ones(8, 4, 3, 3)}},
        r"tensor decoder\.1\.conv2\.weight must have shape \[8, 8, 3, 3\], got \[8, 4, 3, 3\]",
    ),
    "nan": (
        {"state": {"sigma": torch.tensor(math.nan)}},
        "tensor sigma holds values that are not finite",
    ),
    "infinite": (
        {"state": {"w_z.bias": torch.full((8,), math.inf)}},
        r"tensor w_z\.bias holds values that are not finite",
    ),
    "no-format": (
        {"info": {"format": None}},
        r"\(mana_triton/1 in its metadata\), got format None",
    ),
    "newer-format": ({"info": {"format": "mana_triton/2"}}, "got format mana_triton/2"),
    "no-config": ({"info": {"config": None}}, r"holds no readable configuration \('config'\)"),
    "config-not-json": ({"info": {"config": "{"}}, "holds no readable configuration"),
    "config-not-an-object": ({"info": {"config": "[1]"}}, "holds no readable configuration"),
    "config-of-a-later-version": (
        {"info": changed(flow=True)},
        r"holds no readable configuration .*unexpected keyword argument 'flow'",
    ),
    "config-bad-form": (
        {"info": changed(gaussian="box")},
        r"holds no readable configuration \(gaussian must be one of bias, gate, got 'box'\)",
    ),
    "config-bad-number": ({"info": changed(channels=6)}, r"multiple of 4, got 6\)"),
    "config-bad-type": ({"info": changed(channels="8")}, "holds no readable configuration"),
    "config-bad-blocks": ({"info": changed(decoder_blocks=1.5)}, "holds no readable config"),
    "config-bad-sigma": ({"info": changed(sigma=None)}, "holds no readable configuration"),
    "config-negative": ({"info": changed(memory_slots=-2)}, "holds no readable configuration"),
    "config-larger": (
        {"info": changed(channels=16)},
        r"tensor memory must have shape \[8, 3\], got \[4, 3\]",
    ),
    "config-more-blocks": (
        {"info": changed(decoder_blocks=3)},
        r"has no tensor decoder\.2\.conv1\.weight, expected \[8, 8, 3, 3\]",
    ),
}


def assert_one_line(error: pytest.ExceptionInfo, path: Path) -> None:
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 500


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_gets_one_clear_line(change, message, tmp_path):
    path = broken(tmp_path, **change)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert_one_line(error, path)


def test_an_intact_file_is_not_refused(tmp_path):
    """What `broken` changes nothing in is fine, so that the refusals above are for the change."""
    assert load(broken(tmp_path)).config == CONFIG


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"", "is not a safetensors file"),
        ("a.safetensors", b"not weights at all, but a text", "is not a safetensors file"),
        ("a.safetensors", b"\x02\0\0\0\0\0\0\0{}", "must be a checkpoint of mana_triton"),
        ("a.pt", b"", "must be a .safetensors file or a PyTorch file of plain tensors"),
        ("a.pt", b"not weights at all, but a text", "must be a .safetensors file or a PyTorch"),
        ("a.mp4", b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "must be a .safetensors file or"),
        ("a.pth", b"PK\x03\x04 broken archive", "must be a .safetensors file or a PyTorch file"),
    ],
    ids=["empty", "text", "no-tensors", "pt-empty", "pt-text", "video", "zip"],
)
def test_another_kind_of_file(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert_one_line(error, path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="existing file, got '") as error:
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
    for name, inputs, outputs in (
        ("g", channels, D),
        ("W_z", 7 * D, channels),
        ("theta", channels, D),
        ("phi", channels, D),
        ("W_z1", D, channels),
    ):
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
    state |= conv("upconv1", channels, 4 * channels, 3)
    state |= conv("upconv2", channels, 2 * channels, 3)
    state |= conv("conv_hr", D, D, 3)
    state |= conv("conv_last", D, 3, 3)
    return state


def official_forward(state: dict[str, Tensor], frames: Tensor) -> Tensor:
    """The network that the layout's names describe, dense, by functions of plain tensors.

    Written from the description of the layout: 32 groups at 128 channels, unscaled logits, the
    Gaussian exp(-D / (2 std^2)) after the softmax, the 7 frames concatenated frame by frame.
    """

    def conv(name, x):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def blocks(part, x):
        for i in range(sum(name.startswith(part) for name in state) // 4):
            x = x + conv(f"{part}.{i}.conv2", F.relu(conv(f"{part}.{i}.conv1", x)))
        return x

    b, _, _, h, w = frames.shape
    features = [
        blocks("encoder", F.leaky_relu(conv("conv_first", frames[:, t]), 0.1)) for t in range(7)
    ]
    normed = [
        F.group_norm(
            x,
            x.shape[1] // 4,
            state["nonloc_spatial.norm.weight"],
            state["nonloc_spatial.norm.bias"],
            1e-6,
        )
        for x in features
    ]
    distance = torch.tensor(
        [
            [(i // w - j // w) ** 2 + (i % w - j % w) ** 2 for j in range(h * w)]
            for i in range(h * w)
        ],
        dtype=frames.dtype,
    )
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
    z = (
        features[3]
        + conv("nonloc_spatial.W_z", torch.cat(outputs, 1))
        + conv("nonloc_spatial.W_z1", y.transpose(1, 2).reshape(b, -1, h, w))
    )
    x = blocks("decoder", z)
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


def test_every_tensor_of_the_official_layout_matters():
    """A swapped or lost tensor shows in the output: none is without influence.

    The bias of theta adds one number to all logits of a softmax: it is compared by value.
    """
    wide = {name: x.double() for name, x in official_state(channels=16).items()}
    for x in wide.values():
        x.requires_grad_()
    official_forward(wide, official_frames(torch.float64)).square().mean().backward()
    for name, x in wide.items():
        if name in ("nonloc_spatial.theta.bias", "nonloc_spatial.D"):
            continue
        assert x.grad is not None and x.grad.norm() > 1e-4, name


def test_official_names_are_mapped_one_to_one(tmp_path):
    state = official_state(channels=16)
    torch.save(state, tmp_path / "a.pt")
    ours = load(tmp_path / "a.pt").state_dict()
    assert torch.equal(ours["theta.bias"], state["nonloc_spatial.theta.bias"])
    assert len(ours) == len(state) - 1  # D is a table of distances
    assert ours["sigma"].shape == ()


def test_sign_of_the_official_std_means_nothing(tmp_path):
    """Only its square enters that network; training can take it through zero."""
    state = official_state(channels=16)
    state["nonloc_spatial.std"] *= -1
    torch.save(state, tmp_path / "a.pt")
    with torch.no_grad():
        actual = load(tmp_path / "a.pt")(official_frames())
    assert (actual - official_forward(state, official_frames())).abs().max() < 1e-5


WRAPPINGS = {
    "parallel": lambda state: {f"module.{name}": x for name, x in state.items()},
    "parallel-twice": lambda state: {f"module.module.{name}": x for name, x in state.items()},
    "state-dict": lambda state: {"state_dict": state, "epoch": 3, "best": 25.1},
    "nested": lambda state: {"model": {"state_dict": {f"module.{n}": x for n, x in state.items()}}},
    "params": lambda state: {"params": state},
    "ema-first": lambda state: {
        "params": {"conv_first.weight": torch.ones(1)},
        "params_ema": state,
    },
    "half": lambda state: {name: x.half() for name, x in state.items()},
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


def test_official_weights_can_be_saved_as_ours(tmp_path):
    torch.save(official_state(channels=16), tmp_path / "a.pt")
    model = load(tmp_path / "a.pt")
    save(model, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(again(official_frames()), model(official_frames()))


class Payload:
    """What a malicious file holds: a call at the moment it is read."""

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


OFFICIAL_WRONG = {
    "not-a-dict": (
        lambda state: list(state.values()),
        "must hold a state dict of tensors, got list",
    ),
    "a-tensor": (lambda state: state["conv_first.weight"], "state dict of tensors, got Tensor"),
    "other-values": (lambda state: state | {"epoch": 3}, "must hold a state dict of tensors"),
    "other-keys": (lambda state: {0: state["conv_first.weight"]}, "state dict of tensors"),
    "empty": (lambda state: {}, r"not in MANA's official layout: it has no conv_first\.weight"),
    "other-network": (
        lambda state: {"conv_first.weight": state["conv_first.weight"], "body": torch.ones(2)},
        r"not in MANA's official layout: it has no nonloc_spatial\.std",
    ),
    "no-phi": (
        without("nonloc_spatial.phi.weight"),
        r"has no tensor phi\.weight, expected \[8, 16, 1, 1\]",
    ),
    "no-memory": (
        without("nonloc_spatial.mb"),
        r"holds w_z1\.weight \[16, 8, 1, 1\], which this model",
    ),
    "no-first-conv": (
        without("conv_first.bias"),
        r"has no tensor conv_first\.bias, expected \[16\]",
    ),
    "gap-in-blocks": (
        without("decoder.0.conv2.weight"),
        r"has no tensor decoder\.0\.conv2\.weight",
    ),
    "extra": (
        with_tensor("nonloc_spatial.psi.weight", 3),
        r"holds psi\.weight \[3\], which this model",
    ),
    "five-frames": (
        with_tensor("nonloc_spatial.W_z.weight", 16, 40, 1, 1),
        r"tensor w_z\.weight must have shape \[16, 56, 1, 1\], got \[16, 40, 1, 1\]",
    ),
    "two-sigmas": (
        with_tensor("nonloc_spatial.std", 2),
        r"tensor sigma must have shape \[\], got \[2\]",
    ),
    "memory-rank": (with_tensor("nonloc_spatial.mb", 8), r"memory must have shape .*, got \[8\]"),
    "memory-transposed": (
        with_tensor("nonloc_spatial.mb", 5, 8),
        r"tensor memory must have shape \[8, 8\], got \[5, 8\]",
    ),
    "no-channels": (
        with_tensor("conv_first.weight"),
        r"conv_first\.weight must have shape .*got \[\]",
    ),
    "odd-channels": (
        with_tensor("conv_first.weight", 18, 3, 3, 3),
        r"conv_first\.weight must have shape .*, got \[18, 3, 3, 3\]",
    ),
    "bare-name": (
        with_tensor("nonloc_spatial", 2),
        r"holds nonloc_spatial \[2\], which this model",
    ),
    "far-block": (
        with_tensor("decoder.99999999.conv1.bias", 16),
        r"has no tensor decoder\.2\.conv1\.w",
    ),
    "nan": (
        lambda state: state | {"conv_last.bias": torch.full((3,), math.nan)},
        r"tensor conv_last\.bias holds values that are not finite",
    ),
}


@pytest.mark.parametrize(("change", "message"), OFFICIAL_WRONG.values(), ids=OFFICIAL_WRONG)
def test_a_wrong_official_file_gets_one_clear_line(change, message, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(change(official_state(channels=16)), path)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert_one_line(error, path)


# a damaged header may claim another pickle protocol
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
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
