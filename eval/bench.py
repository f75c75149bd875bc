"""Speed of this device: `run.py --bench`, milliseconds per frame against the paper's 59.

Attention is timed against what PyTorch offers, each first checked against the definition; then
whole frames, against the official code's way (seven encodes per frame, dense attention), and the
stages of a frame. The roofline is the work at this device's own fastest matrix product.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from eval import baselines
from eval.timing import Roofline, Row, extra_mib, find_roofline, measure, summarize
from mana_triton import MANA, MANAConfig, cross_frame_attention, load
from mana_triton.attention import STREAM_TOLERANCE, TOLERANCE
from mana_triton.checkpoint import named_weights
from mana_triton.engine.upscaler import EngineOptions, Upscaler
from mana_triton.kernels import reference
from mana_triton.model import PRECISIONS
from mana_triton.resize import SCALE

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo.mp4"
PAPER = {"what": "paper, 2080 Ti, published", "ms": 59.0, "note": "precision not published"}
SIZE = (64, 112)  # low-resolution rows and columns of the paper's 448x256 frames
SMALL_SIZES = ((16, 28), (32, 56), SIZE)
LARGE_SIZES = ((144, 180), (270, 480), (540, 960))
FRAMES, CHANNELS, SIGMA = 7, 64, 4.0  # of the attention by itself
SECONDS = 20.0  # of a table, without --full


class BenchError(Exception):
    """The result that was to be timed is wrong."""


@dataclass(frozen=True)
class Device:
    """What all measurements of a run share."""

    device: torch.device
    precision: str
    roofline: Roofline
    seconds: float = 20.0  # of one table

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]


# ---- the attention by itself


def contestants(backend: str, inputs: list[Tensor]) -> dict[str, Callable[..., Tensor]]:
    """Functions of q, k, v, sigma and scale that compute the same attention.

    FlexAttention is compiled, which takes minutes on a CPU, so it runs on GPUs only.
    """

    def ours(q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor) -> Tensor:
        return cross_frame_attention(q, k, v, sigma, scale=scale, backend=backend)

    functions: dict[str, Callable[..., Tensor]] = {
        "dense": baselines.dense,
        "SDPA, mask": baselines.masked_sdpa,
        "SDPA, extra columns": baselines.augmented_sdpa,
        f"ours, {backend}": ours,
    }
    if backend == "triton":
        from mana_triton.kernels import cross_frame

        q, k, v, sigma, scale = inputs
        visited = cross_frame.forward(
            q, k, v, sigma, scale,
            gaussian="bias", offsets=False, tolerance=TOLERANCE[q.dtype], first_row=0,
        )  # fmt: skip
        mask = baselines.block_mask(visited.window_radius, *q.shape[1:3])
        flex = partial(baselines.flex, attend=torch.compile(flex_attention, dynamic=False))
        functions |= {"FlexAttention": flex, "FlexAttention, same tiles": partial(flex, mask=mask)}
    return functions


def attention_inputs(size: tuple[int, int], dtype: torch.dtype, device: torch.device):
    """Random q, k, v of one clip, sigma and scale."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, t, *size, CHANNELS, generator=generator, device=device).to(dtype)
        for t in (1, FRAMES, FRAMES)
    )
    sigma, scale = torch.tensor([SIGMA, CHANNELS**-0.5], device=device)
    return [q[:, 0], k, v, sigma, scale]


@torch.no_grad()
def check_attention(name: str, actual: Tensor, inputs: list[Tensor], dense: Tensor) -> float:
    """Relative error in two rows; BenchError if it exceeds rounding plus the certificate.

    Args:
        name: of the variant, for the message.
        actual, dense: [1, T, H, W, D] its result, and that of `baselines.dense` in the same type.
        inputs: what both were computed from.
    """
    q, k, v, sigma, scale = inputs
    rows = slice(q.shape[1] // 2, q.shape[1] // 2 + 2)
    exact = reference.cross_frame_attention(
        q[:, rows].double(), k[:, :1].double(), v[:, :1].double(), sigma.double(), scale.double(),
        first_row=rows.start,
    ).o  # fmt: skip
    actual, dense = (x[:, :1, rows].double() for x in (actual, dense))
    error, usual = ((x - exact).abs().max() for x in (actual, dense))
    allowed = 16 * (usual + torch.finfo(q.dtype).eps / 2 * exact.abs().max())
    allowed += TOLERANCE[q.dtype] * (v.abs().max() + exact.abs().max())
    if not error <= allowed:
        raise BenchError(
            f"{name} must be within {allowed:.1e} of the definition, is {error:.1e} off; "
            "nothing was timed: run pytest tests/kernels/test_attention.py"
        )
    return float((actual - exact).norm() / exact.norm())


def attention_rows(
    size: tuple[int, int], backend: str, on: Device, backward: bool = False
) -> list[Row]:
    """Ours and what PyTorch offers, checked, then timed; with `backward`, forward and backward.

    FLOP are those of the pairs that a variant visits: 4 D each forward, 14 D with the backward
    pass, as FlashAttention counts.
    """
    inputs = attention_inputs(size, on.dtype, on.device)
    q, k, v, sigma, scale = inputs
    with torch.no_grad():
        density = cross_frame_attention(
            q, k, v, sigma, scale=scale, backend=backend, return_density=True
        )[1]
        dense = baselines.dense(q, k, v, sigma, scale)
    runs: dict[str, Callable[[], Any]] = {}
    rows: dict[str, Row] = {}
    for name, function in contestants(backend, inputs).items():
        run = partial(_both_passes if backward else _forward, function, inputs)
        try:
            error = check_attention(name, _forward(function, inputs), inputs, dense)
            rows[name] = {"extra_mib": extra_mib(run, on.device), "relative_error": error}
        except RuntimeError as error:  # PyTorch cannot run it here, or the memory is too small
            if name.startswith("ours"):
                raise
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            rows[name] = {"what": name, "ms": None, "note": f"not run: {reason}"}
            continue
        runs[name] = run
    del dense
    ms = measure(runs, on.device, on.seconds)
    for name, times in ms.items():
        visited = density if name.startswith("ours") or name.endswith("same tiles") else 1.0
        flop = (14 if backward else 4) * CHANNELS * FRAMES * visited * (size[0] * size[1]) ** 2
        rows[name] |= summarize(name, times, ms.get("dense")) | _rates(flop, times, on)
        if visited < 1:
            rows[name]["note"] = f"visits {visited:.2g} of the pairs"
    baselines.squared_distances.cache_clear()
    return list(rows.values())


def _rates(flop: float, ms: list[float], on: Device) -> Row:
    """TFLOP/s, and its share of the device's fastest matrix product."""
    rate = flop / median(ms)
    share = 100 * rate / on.roofline.flop_per_ms
    return {"tflop_per_s": rate / 1e9, "percent_of_roofline": share}


@torch.no_grad()
def _forward(function: Callable, inputs: list[Tensor]) -> Tensor:
    return function(*inputs)


def _both_passes(function: Callable, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    return torch.autograd.grad(function(*leaves, inputs[4]), leaves, inputs[1])


# ---- whole frames


def network(preset: str) -> MANA:
    """The shipped weights; without any, random ones with W_z other than zero."""
    if preset in named_weights():
        return load(preset)
    torch.manual_seed(0)
    model = MANA(MANAConfig.preset(preset))
    torch.nn.init.normal_(model.w_z.weight, std=0.01)
    return model


def naive_network(config: MANAConfig, device: torch.device, dtype: torch.dtype) -> MANA:
    """A network of this size whose attention is the official code's."""
    torch.manual_seed(0)
    official = replace(config, gaussian="gate", match="dot", offsets=False, logit_scale=1.0)
    return MANA(official).eval().to(device, dtype)


@torch.inference_mode()
def naive_frame(model: MANA, window: Tensor) -> Tensor:
    """A frame as the official code makes it, from [1, T, 3, H, W]: T encodes, dense attention."""
    center = window.shape[1] // 2
    f, k, v, *norm = model.encode(window[0])
    f, *norm = (x[center : center + 1] for x in (f, *norm))
    q = model.queries(f, *norm)
    one = torch.ones((), device=window.device)
    x = baselines.dense(q, k[None], v[None], model.sigma, one, gaussian="gate")
    return model.decode(model.combine(f, q, x, None)) + model.skip(window[:, center])


def demo_frames(size: tuple[int, int], count: int) -> np.ndarray:
    """[count, H, W, 3] uint8 of the demo clip, resized: the attention depends on the content."""
    import av

    with av.open(str(DEMO)) as source:
        decoded = (x.reformat(size[1], size[0], "rgb24") for x in source.decode(video=0))
        return np.stack([x.to_ndarray() for x in itertools.islice(decoded, count)])


def window_of(frames: np.ndarray) -> Tensor:
    """[T, H, W, 3] uint8 -> [1, T, 3, H, W] in [0, 1]."""
    return rearrange(torch.from_numpy(frames), "t h w c -> 1 t c h w") / 255


def frame_rows(preset: str, frames: np.ndarray, on: Device) -> list[Row]:
    """Milliseconds per frame: the official way, one window, and streamed.

    One streamed frame at a time is the latency, as many as the plan takes are the throughput.
    """
    model, size = network(preset), frames.shape[1:3]
    options = EngineOptions(on.device, on.precision, scene_cuts=False)
    one, several = Upscaler(model, replace(options, batch=1, workers=1)), Upscaler(model, options)
    window = window_of(frames).to(on.device)
    variants: dict[str, Callable] = {}
    if size[0] * size[1] <= SIZE[0] * SIZE[1]:  # larger ones need many GB for the dense tables
        for name in dict.fromkeys(("fp32", on.precision)):  # the official code has float32
            naive = naive_network(model.config, on.device, PRECISIONS[name])
            variants[f"naive, {name}"] = partial(naive_frame, naive, window.to(PRECISIONS[name]))
        variants["ours, 7 encodes"] = lambda: one.model(
            window.to(on.dtype), backend=one.backend, tolerance=STREAM_TOLERANCE
        )
    stream = one.stream(itertools.cycle(frames))
    variants["ours, latency"] = lambda: next(stream)
    plan = several.plan(*size)
    together = max(plan.batch, plan.workers)
    if together > 1:
        streams = several.stream(itertools.cycle(frames))
        variants["ours, throughput"] = lambda: [next(streams) for _ in range(together)]
    with torch.inference_mode():
        memory = {name: extra_mib(run, on.device) for name, run in variants.items()}
        ms = measure(variants, on.device, on.seconds)
    baselines.squared_distances.cache_clear()
    if together > 1:
        ms["ours, throughput"] = [time / together for time in ms["ours, throughput"]]
    rows = [
        summarize(name, times, ms.get("naive, fp32"))
        | {"fps": 1000 / median(times), "extra_mib": memory[name]}
        for name, times in ms.items()
    ]
    for row in rows:
        if row["what"] == "ours, throughput":
            row["note"] = f"{together} frames at once"
    return rows


def flops(config: MANAConfig, size: tuple[int, int], density: float) -> dict[str, float]:
    """FLOP of each stage of a streamed frame: convolutions, projections and visited pairs."""
    height, width = size
    with torch.device("meta"):
        model = MANA(config)
        frame = torch.empty(1, 3, height, width)
        z = torch.empty(1, config.channels, height, width)
        x = torch.empty(1, model.w_z.in_channels, height, width)
    counted = {}

    def encode() -> None:
        f, _, _, *norm = model.encode(frame)
        model.queries(f, *norm)

    stages = {"encode": encode, "fuse": lambda: model.w_z(x), "decode": lambda: model.decode(z)}
    for name, run in stages.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        counted[name] = float(counter.get_total_flops())
    pixels, d = height * width, config.channels // 2
    counted["fuse"] += (4 * d * config.memory_slots + 2 * d * config.channels) * pixels
    counted["fuse"] += 4 * d * config.frames * density * pixels**2
    return counted


@torch.inference_mode()
def stage_rows(preset: str, frames: np.ndarray, on: Device) -> list[Row]:
    """The stages of a frame with all features encoded: encode, fuse (both attentions), decode."""
    upscaler = Upscaler(network(preset), EngineOptions(on.device, on.precision))
    model, size = upscaler.model, frames.shape[1:3]
    attention = {"backend": upscaler.backend, "tolerance": STREAM_TOLERANCE}
    x = window_of(frames)[0].to(on.device, on.dtype)
    center = slice(len(x) // 2, len(x) // 2 + 1)
    f, k, v, *norm = model.encode(x)
    f, *norm = (y[center] for y in (f, *norm))
    q, k, v = model.queries(f, *norm), k[None], v[None]
    z = model.fuse(f, q, k, v, **attention)
    match = torch.nn.functional.normalize(q, dim=-1) if model.config.match == "cosine" else q
    density = cross_frame_attention(
        match, k, v, model.sigma,
        gaussian=model.config.gaussian, scale=model.scale, return_density=True, **attention,
    )[1]  # fmt: skip

    def encode() -> None:
        features = model.encode(x[center])
        model.queries(features.f, features.scale, features.shift)

    stages = {
        "encode": encode,
        "fuse": lambda: model.fuse(f, q, k, v, **attention),
        "decode": lambda: model.decode(z) + model.skip(x[center]),
    }
    work = flops(model.config, size, density)
    rows = []
    for name, times in measure(stages, on.device, on.seconds / 3).items():
        rows.append(summarize(name, times) | _rates(work[name], times, on))
    rows[1]["note"] = f"visits {density:.2g} of the pairs"
    return rows


# ---- all tables


def tables(
    device: torch.device, precision: str, backend: str, full: bool
) -> Iterator[tuple[str, str, list[Row]]]:
    """Title, caption and rows of each table, as soon as it is measured."""
    roofline, rows = find_roofline(device, PRECISIONS[precision])
    yield "Roofline of this device", precision, [{"part": "roofline", **row} for row in rows]
    on = Device(device, precision, roofline, seconds=60.0 if full else SECONDS)

    def labeled(rows: list[Row], part: str, size: tuple[int, int], **more: Any) -> list[Row]:
        shape = {"width": SCALE * size[1], "height": SCALE * size[0]}
        return [{"part": part, **shape, "dtype": precision, **more, **row} for row in rows]

    for backward in (False, True) if full or device.type == "cuda" else (False,):
        what = "forward + backward" if backward else "forward"
        rows = attention_rows(SIZE, backend, on, backward)
        title = f"Attention, {what}: {SIZE[0]}x{SIZE[1]}, T={FRAMES}, D={CHANNELS}, sigma={SIGMA:g}"
        caption = f"normal random q, k, v, tolerance {TOLERANCE[on.dtype]:g}, {precision}"
        yield title, caption, labeled(rows, "attention", SIZE, passes=what)
    for preset in ("paper", "tiny"):
        weights = "shipped" if preset in named_weights() else "random"
        caption = f"{weights} weights, frames of the demo clip, {precision}"
        for size in (SMALL_SIZES if preset == "tiny" else (SIZE,)) + LARGE_SIZES * full:
            frames = demo_frames(size, FRAMES)
            more = {"preset": preset, "weights": weights}
            rows = labeled(frame_rows(preset, frames, on), "frame", size, **more)
            if (preset, size) == ("paper", SIZE):
                rows += labeled([PAPER], "frame", size, preset=preset, dtype=None)
            name = f"{preset}, {SCALE * size[1]}x{SCALE * size[0]} output"
            yield f"Frame: {name}", caption, rows
            if size == SIZE:
                rows = labeled(stage_rows(preset, frames, on), "stage", size, **more)
                yield f"Stages of a streamed frame: {name}", caption, rows
