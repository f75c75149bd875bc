"""This device against the paper's 59 ms a frame, and against its own limits: `run.py --bench`.

Variants of one result are checked against its definition and then timed in turn, in one process;
floors are the work at the device's own fastest product and copy.
"""

import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import mana_triton.model
from eval import baselines as peers
from eval.bench import (
    SIZE,
    Row,
    demo_frames,
    eager,
    resident_peak,
    squared_distances,
    summarize,
    window_of,
    write_clip,
)
from mana_triton import MANA, MANAConfig, cross_frame_attention, host, load
from mana_triton.attention import STREAM_TOLERANCE
from mana_triton.checkpoint import named_weights
from mana_triton.engine.upscaler import DTYPES, Upscaler
from mana_triton.kernels import reference
from mana_triton.resize import SCALE
from mana_triton.video.writer import open_reader, open_writer

PAPER = {"what": "paper, 2080 Ti, published", "ms": 59.0, "note": "code path, type unpublished"}
SMALL_SIZES = ((16, 28), (32, 56), SIZE)  # low-resolution rows and columns
LARGE_SIZES = ((144, 180), (270, 480), (540, 960))
DENSE_PIXELS = 144 * 180  # beyond, visiting every pair takes minutes on a CPU
STAGES = ("encoder", "cross-frame attention", "memory", "decoder", "upsampler")
SECONDS = {"attention": 45, "paper": 110, "tiny": 24, "stages": 12}  # of one group of variants
DEADLINE = 270  # seconds after which nothing more is begun without --full
CONTENT = "frames of the demo clip"
BOUND = "SDPA, no Gaussian"
FLEX_NOTE = "not run: compiling it for a CPU takes minutes"


class BenchError(Exception):
    """The result to be timed is wrong."""


class Ceiling(NamedTuple):
    """What this device reaches: a large product, a large copy."""

    flop_per_ms: float
    bytes_per_ms: float

    def ms(self, flop: float, nbytes: float) -> float:
        """The least time of an operation."""
        return max(flop / self.flop_per_ms, nbytes / self.bytes_per_ms)


class Setting(NamedTuple):
    """What all measurements of a run share."""

    device: torch.device
    precision: str
    ceiling: Ceiling

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


class Measured(NamedTuple):
    """One group of variants, timed in turn."""

    ms: dict[str, list[float]]
    extra_mib: dict[str, float | None]  # peak, on top of weights, inputs and streams


def _mark(device: torch.device) -> Any:
    """This moment on the device: seconds, or a recorded event of a GPU's stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(begin: Any, end: Any) -> float:
    """Milliseconds between two marks; waits for the second."""
    if isinstance(begin, float):
        return 1000 * (end - begin)
    end.synchronize()
    return begin.elapsed_time(end)


def _extra_peak(run: Callable, device: torch.device) -> float | None:
    """Memory that a run needs on top of what is there; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        run()
        return None
    return resident_peak(run)


def find_ceiling(device: torch.device, dtype: torch.dtype) -> tuple[Ceiling, list[Row]]:
    """The fastest of 20 products of square matrices and of 20 copies, and rows that say so."""
    side, length = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 26)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs = {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    ms: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(20):
        for name, run in runs.items():
            begin = _mark(device)
            run()
            ms[name].append(_elapsed(begin, _mark(device)))
    product, copy = min(ms["product"]), min(ms["copy"])
    ceiling = Ceiling(2 * side**3 / product, 2 * length / copy)
    return ceiling, [
        {
            "what": f"product, {side}x{side}",
            "ms": product,
            "gflop_per_s": ceiling.flop_per_ms / 1e6,
        },
        {"what": f"copy, {length >> 20} MiB", "ms": copy, "gb_per_s": ceiling.bytes_per_ms / 1e6},
    ]


def measure(variants: dict[str, Callable], device: torch.device, seconds: float) -> Measured:
    """Time the variants in turn, a b and then b a, for about this long.

    The first round warms up and finds the memory. There are at most 30 rounds on a CPU, 200 on a
    GPU after ten more to warm up, and at least one.
    """
    most, warm = (200, 10) if device.type == "cuda" else (30, 0)
    began = time.perf_counter()
    peaks = {name: _extra_peak(run, device) for name, run in variants.items()}
    rounds: list[dict[str, float]] = []
    now, last = time.perf_counter(), 0.0
    while len(rounds) <= warm or (len(rounds) < most + warm and now + last - began < seconds):
        rounds.append({})
        for name, run in list(variants.items())[:: 1 if len(rounds) % 2 else -1]:
            begin = _mark(device)
            run()
            rounds[-1][name] = _elapsed(begin, _mark(device))
        last, now = time.perf_counter() - now, time.perf_counter()
    return Measured({name: [ms[name] for ms in rounds[warm:]] for name in variants}, peaks)


def measured_rows(measured: Measured, baseline: str, floors: dict[str, float]) -> list[Row]:
    """A row for each variant; ratios are medians of those of single rounds."""
    rows = []
    for name, ms in measured.ms.items():
        row = summarize(name, ms) | {"runs": len(ms), "extra_mib": measured.extra_mib[name]}
        if baseline in measured.ms:
            row["times_faster"] = _ratio(measured.ms[baseline], ms)
        if (same := name.removesuffix(", again")) != name:
            row["noise_percent"] = 100 * abs(_ratio(measured.ms[same], ms) - 1)
        if name in floors:
            row["percent_of_floor"] = 100 * floors[name] / statistics.median(ms)
        rows.append(row)
    return rows


def _ratio(these: list[float], those: list[float]) -> float:
    return float(np.median(np.divide(these, those)))


def floor_ms(
    config: MANAConfig, size: tuple[int, int], ceiling: Ceiling, itemsize: int,
    encodes: int = 1, visited: float = 1.0,
) -> dict[str, float]:  # fmt: skip
    """Least milliseconds of each stage, if every layer ran at the measured ceilings.

    A convolution is 2 k^2 C_in C_out FLOP per pixel, an attention 4 D per pair that is visited;
    each layer reads its input and weights once and writes its output once.
    """
    n = size[0] * size[1]
    c, d, t, slots = config.channels, config.channels // 2, config.frames, config.memory_slots

    def conv(inputs: int, outputs: int, pixels: int = n, area: int = 9) -> float:
        weights = area * inputs * outputs
        return ceiling.ms(2 * weights * pixels, itemsize * ((inputs + outputs) * pixels + weights))

    values = d + 2 if config.offsets else d
    block = 2 * conv(c, c)
    projections = 2 * conv(c, d, area=1)
    return {
        "encoder": encodes * (conv(3, c) + config.encoder_blocks * block + projections),
        "cross-frame attention": attention_floor_ms(n, d, t, ceiling, itemsize, visited),
        "memory": ceiling.ms(4 * d * slots * n, itemsize * (2 * n + slots) * d),
        "decoder": config.decoder_blocks * block,
        "upsampler": conv(c, 4 * c) + conv(c, 2 * c, 4 * n) + conv(c // 2, c // 2, 16 * n)
        + conv(c // 2, 3, 16 * n),
        "rest": conv(c, d, area=1) + conv(t * values, c, area=1) + conv(d, c, area=1),
    }  # fmt: skip


def attention_floor_ms(
    pixels: int, channels: int, frames: int, ceiling: Ceiling, itemsize: int, visited: float
) -> float:
    """Least milliseconds of the attention, if it visits this fraction of all pairs."""
    flop = 4 * channels * visited * frames * pixels**2
    return ceiling.ms(flop, itemsize * (1 + 3 * frames) * pixels * channels)


# the operation by itself, as others would write it


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(*inputs: Tensor) -> Tensor:
    return peers.flex(*inputs, attend=_compiled_flex())


def _unmasked(q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor) -> Tensor:
    """Fused attention without the Gaussian: another result, but what all pairs cost at least."""
    wide_q = (q * scale.to(q.dtype)).flatten(1, 2)[:, None].expand(-1, k.shape[1], -1, -1)
    o = F.scaled_dot_product_attention(wide_q, k.flatten(2, 3), v.flatten(2, 3), scale=1.0)
    return o.unflatten(2, k.shape[2:4])


def check_attention(name: str, actual: Tensor, inputs: list[Tensor], dense: Tensor) -> float:
    """Relative error in some rows; BenchError if it is more than rounding and the certificate.

    Args:
        name: of the variant, for the message.
        actual, dense: [1, T, H, W, D] the result, and that of dense eager in the same type.
        inputs: what it was computed from.
    """
    q, k, v, sigma, scale = inputs
    rows = slice(q.shape[1] // 2, q.shape[1] // 2 + 2)
    exact = reference.cross_frame_attention(
        q[:, rows].double(), k.double(), v.double(), sigma.double(), scale.double(),
        first_row=rows.start,
    ).o  # fmt: skip
    error, usual = ((x[:, :, rows].double() - exact).abs().max() for x in (actual, dense))
    eta = mana_triton.attention.TOLERANCE[q.dtype]
    allowed = 16 * (usual + torch.finfo(q.dtype).eps / 2 * exact.abs().max())
    allowed += eta * (v.abs().max() + exact.abs().max())
    if not error <= allowed:
        raise BenchError(
            f"{name} must be within {allowed:.1e} of the definition, is {error:.1e} off; "
            "nothing was timed: run pytest tests/kernels/test_attention.py"
        )
    return float((actual[:, :, rows].double() - exact).norm() / exact.norm())


@torch.inference_mode()
def compare_attention(
    size: tuple[int, int], backend: str, setting: Setting, seconds: float
) -> list[Row]:
    """D=64, T=7, sigma=4, logits q.k/8: ours and what else PyTorch offers, checked, then timed.

    Floors are those of the pairs that a variant visits: all, or what ours needs for these inputs.
    """
    torch.manual_seed(0)
    device, dtype = setting.device, setting.dtype
    flex = device.type == "cuda"
    q, k, v = (torch.randn(1, t, *size, 64, device=device, dtype=dtype) for t in (1, 7, 7))
    inputs = [0.6 * q[:, 0], 0.6 * k, v, *(torch.tensor(x, device=device) for x in (4.0, 0.125))]

    def ours(q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor) -> Tensor:
        return cross_frame_attention(q, k, v, sigma, scale=scale, backend=backend)

    functions = {
        "dense eager": eager,
        "SDPA + mask": peers.masked_sdpa, "SDPA augmented": peers.augmented_sdpa,
        **({"FlexAttention": _flex} if flex else {}),
        f"ours, {backend}": ours, f"ours, {backend}, again": ours,
    }  # fmt: skip
    wrong = {}
    dense = eager(*inputs)
    for name, function in functions.items():
        actual = dense if function is eager else function(*inputs)
        wrong[name] = check_attention(name, actual, inputs, dense)
    del dense
    squared_distances.cache_clear()
    visited: float = cross_frame_attention(
        *inputs[:4], scale=inputs[4], backend=backend, return_density=True
    )[1]
    variants = {
        name: functools.partial(f, *inputs) for name, f in ({BOUND: _unmasked} | functions).items()
    }
    measured = measure(variants, device, seconds)
    floors = {
        name: attention_floor_ms(
            size[0] * size[1], 64, 7, setting.ceiling, dtype.itemsize,
            visited if name.startswith("ours") else 1.0,
        )
        for name in variants
    }  # fmt: skip
    rows = measured_rows(measured, "dense eager", floors)
    for row in rows:
        row["relative_error"] = wrong.get(str(row["what"]))
        if str(row["what"]).startswith("ours"):
            row["note"] = f"visits {100 * visited:.2g} % of the pairs"
    rows[0]["note"] = "another result: a bound for all pairs"
    if not flex:
        rows.append({"what": "FlexAttention", "ms": None, "note": FLEX_NOTE})
    return rows


# the whole network


def _official(q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, **_: object) -> Tensor:
    """The official code's attention: dense, gate form, unscaled logits, frame by frame."""
    size = q.shape[1:3]
    weight = (squared_distances(*size, q.device) * (-0.5 / sigma.square())).exp_().to(q.dtype)
    q = q[0].flatten(0, 1)
    frames = [
        (torch.softmax(q @ k_t.flatten(0, 1).mT, -1) * weight) @ v_t.flatten(0, 1)
        for k_t, v_t in zip(k[0], v[0], strict=True)
    ]
    return torch.stack(frames).unflatten(1, size)[None]


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if (info := Path("/proc/meminfo")).exists():
        return int(info.read_text().split("MemAvailable:")[1].split()[0]) * 1024
    return 8 << 30  # unknown: what an ordinary machine can spare


def _network(preset: str) -> MANA:
    """The shipped weights; where there are none, random ones with W_z other than zero."""
    if preset in named_weights():
        return load(preset)
    torch.manual_seed(0)
    model = MANA(MANAConfig.preset(preset))
    torch.nn.init.normal_(model.w_z.weight, std=0.01)
    return model


def naive_network(config: MANAConfig, device: torch.device, dtype: torch.dtype) -> MANA:
    """A network of this config's size that differs from the official one only in its memory's."""
    torch.manual_seed(0)
    config = replace(config, gaussian="gate", match="dot", offsets=False, logit_scale=1.0)
    model = MANA(config).eval().to(device, dtype)
    model.backend = "reference"  # of the memory
    return model


def naive_frame(model: MANA, window: Tensor) -> Tensor:
    """A frame as the official code makes it, from [1, 7, 3, H, W]: 7 encodes, dense attention."""
    with mock.patch("mana_triton.model.cross_frame_attention", _official):
        return model(window)


def compare_frame(
    preset: str, size: tuple[int, int], setting: Setting, visited: float, seconds: float
) -> list[Row]:
    """Milliseconds per frame: the naive way, ours in steps, one frame at a time and several.

    One streamed frame is the latency, several at once are the throughput.
    """
    model, (device, precision, ceiling), dtype = _network(preset), setting, setting.dtype
    options = {"device": device, "precision": precision, "scene_cuts": False}
    one, dense = (Upscaler(model, workers=1, **options) for _ in range(2))
    dense.model.tolerance = 0.0  # every pair
    frames = demo_frames(size, 7)
    clip, window = frames[:4], window_of(frames).to(device, dtype)
    stream = one.stream(itertools.cycle(clip))
    variants: dict[str, Callable] = {}
    work: dict[str, tuple[int, float]] = {}  # encoded frames, fraction of the pairs
    notes = []
    tables = 4 * 4 * (size[0] * size[1]) ** 2
    if 2 * tables <= _free_bytes(device):
        # the official code is float32; in half precision the comparison is of the same type
        for name in dict.fromkeys(("fp32", precision)):
            naive = naive_network(model.config, device, DTYPES[name])
            variants[f"naive, {name}"] = functools.partial(
                naive_frame, naive, window.to(DTYPES[name])
            )
            work[f"naive, {name}"] = 7, 1.0
    else:
        notes.append(_skipped("naive", f"its tables take {tables >> 30} GiB"))
    if size[0] * size[1] <= DENSE_PIXELS:
        variants["ours, dense, 7 encodes"] = lambda: dense.model(window)
        variants[f"ours, {one.backend}, 7 encodes"] = lambda: one.model(window)
        work["ours, dense, 7 encodes"], work[f"ours, {one.backend}, 7 encodes"] = (
            (7, 1.0), (7, visited),
        )  # fmt: skip
    else:
        notes.append(_skipped("ours, dense", "every pair takes minutes on a CPU"))
    for name in ("ours, streamed", "ours, streamed, again"):
        variants[name], work[name] = lambda: next(stream), (1, visited)
    several, together = _several(Upscaler(model, **options), clip)
    variants |= several
    work |= dict.fromkeys(several, (1, visited))
    with torch.inference_mode():
        measured = measure(variants, device, seconds)
    for name in several:
        measured.ms[name] = [ms / together for ms in measured.ms[name]]
    squared_distances.cache_clear()
    floors = {
        name: sum(floor_ms(model.config, size, ceiling, dtype.itemsize, *of).values())
        for name, of in work.items()
    }
    rows = measured_rows(measured, "naive, fp32", floors)
    for row in rows:
        row["fps"] = 1000 / row["ms"]
        if str(row["what"]).startswith("ours, streamed"):
            row["note"] = "latency: one frame at a time"
        elif row["what"] in several:
            row["note"] = "throughput: several at once"
    return rows + notes


def _skipped(what: str, why: str) -> Row:
    return {"what": what, "ms": None, "note": f"not run: {why}"}


def _several(upscaler: Upscaler, clip: np.ndarray) -> tuple[dict[str, Callable], int]:
    """Several frames of a stream at once, and how many; nothing where one fills the device."""
    plan = upscaler.plan_for(*clip.shape[1:3])
    if plan.batch > 1:  # a GPU's graphs are made once for a stream
        stream = upscaler.stream(itertools.cycle(clip))
        name = f"ours, {plan.batch} in a batch"
        return {name: lambda: [next(stream) for _ in range(plan.batch)]}, plan.batch
    if plan.workers == 1:
        return {}, 1
    return {f"ours, {plan.workers} side by side": lambda: list(upscaler.stream(clip))}, len(clip)


def compare_stages(
    preset: str, size: tuple[int, int], setting: Setting, seconds: float
) -> tuple[list[Row], float]:
    """Where the time of a streamed frame goes; and the fraction of the pairs that is visited."""
    device, precision, ceiling = setting
    upscaler = Upscaler(
        _network(preset), device=device, precision=precision, scene_cuts=False, workers=1
    )
    model = upscaler.model
    marks: list[tuple] = []
    shares: list[float] = []
    rounds: list[dict[str, float]] = []

    def timed(stage: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            begin = _mark(device)
            result = function(*args, **kwargs)
            marks.append((stage, begin, _mark(device)))
            return result

        return run

    def attention(q: Tensor, *args, **kwargs):
        *result, share = cross_frame_attention(q, *args, **kwargs, return_density=True)
        shares.append(share * q.shape[1] / size[0])
        return result if len(result) > 1 else result[0]

    stream = upscaler.stream(itertools.cycle(demo_frames(size, 7)))

    def frame() -> None:
        marks.clear()
        shares.clear()
        began = _mark(device)
        next(stream)
        spent = dict.fromkeys((*STAGES, "decode"), 0.0)
        whole = _elapsed(began, _mark(device))
        for stage, begin, end in marks:
            spent[stage] += _elapsed(begin, end)
        spent["upsampler"] = spent.pop("decode") - spent["decoder"]
        rounds.append(spent | {"rest": whole - sum(spent.values())})

    with ExitStack() as patches:
        for owner, name, stage, function in (
            (model, "encode", "encoder", model.encode),
            (mana_triton.model, "cross_frame_attention", STAGES[1], attention),
            (mana_triton.model, "memory_attention", "memory", mana_triton.model.memory_attention),
            (model.decoder, "forward", "decoder", model.decoder.forward),
            (model, "decode", "decode", model.decode),
        ):
            patches.enter_context(mock.patch.object(owner, name, timed(stage, function)))
        measured = measure({"frame": frame}, device, seconds)
    visited = sum(shares)
    floors = floor_ms(model.config, size, ceiling, setting.dtype.itemsize, visited=visited)
    counted = rounds[-len(measured.ms["frame"]) :]
    rows = []
    for stage, floor in floors.items():
        ms = [spent[stage] for spent in counted]
        row = summarize(stage, ms) | {"runs": len(ms)}
        rows.append(row | {"percent_of_floor": 100 * floor / statistics.median(ms)})
    rows[1]["note"] = f"visits {100 * visited:.2g} % of the pairs"
    return rows, visited


def compare_video(size: tuple[int, int], frames: int = 12, rounds: int = 3) -> list[Row]:
    """Milliseconds per frame of decoding a clip of this size and of encoding its enlargement."""
    ms: dict[str, list[float]] = {"video in": [], "video out": []}
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(clip, *size, frames)
        for _ in range(1 + rounds):
            began = time.perf_counter()
            with open_reader(clip) as reader:
                decoded = list(reader)
                ms["video in"].append(1000 * (time.perf_counter() - began) / frames)
                large = [x.rgb.repeat(SCALE, 0).repeat(SCALE, 1) for x in decoded]
                began = time.perf_counter()
                height, width = large[0].shape[:2]
                with open_writer(
                    Path(folder) / "out.mp4", reader, width, height, overwrite=True
                ) as writer:
                    for rgb, frame in zip(large, decoded, strict=True):
                        writer.write(rgb, frame)
                ms["video out"].append(1000 * (time.perf_counter() - began) / frames)
    rows = [summarize(name, times[1:]) | {"runs": rounds} for name, times in ms.items()]
    rows[1]["note"] = "encodes the nearest-neighbor enlargement"
    return rows


def _conditions(preset: str, precision: str) -> dict[str, Any]:
    """What the tables of a preset are measured with."""
    weights = "shipped" if preset in named_weights() else "random"
    return {
        "weights": weights,
        "content": CONTENT,
        "tolerance": STREAM_TOLERANCE,
        "dtype": precision,
    }


def compare(
    device: torch.device, precision: str, full: bool
) -> Iterator[tuple[str, str, list[Row]]]:
    """Title, caption and rows of each table of `run.py --bench`, as soon as it is measured."""
    progress, began = Console(stderr=True, highlight=False), time.perf_counter()
    if device.type == "cpu":
        host.tune()  # as the command does
    ceiling, rows = find_ceiling(device, DTYPES[precision])
    setting = Setting(device, precision, ceiling)
    rows = [{"part": "ceiling", "dtype": precision, **row} for row in rows]
    yield "Ceilings of this device", f"fastest of 20, {precision}; floors are at these", rows
    patience = 3 if full else 1
    backend = Upscaler("tiny", device=device, precision=precision).backend

    def labeled(rows: list[Row], part: str, size: tuple[int, int], **more: Any) -> list[Row]:
        shape = {"width": SCALE * size[1], "height": SCALE * size[0]}
        return [{"part": part, **shape, "dtype": precision, **more, **row} for row in rows]

    progress.print("measuring the attention")
    rows = compare_attention(SIZE, backend, setting, patience * SECONDS["attention"])
    tolerance = mana_triton.attention.TOLERANCE[DTYPES[precision]]
    conditions = {"content": "normal random q, k, v", "tolerance": tolerance}
    yield (
        f"Attention at {SIZE[0]}x{SIZE[1]}, T=7, D=64, sigma=4",
        f"normal random q, k, v, logits q.k/8; tolerance of ours {tolerance:g}; {precision}",
        labeled(rows, "attention", SIZE, **conditions),
    )
    for preset in ("paper", "tiny"):
        conditions = _conditions(preset, precision)
        caption = "{weights} weights, {content}, tolerance of ours {tolerance:g}, {dtype}".format(
            **conditions
        )
        sizes = SMALL_SIZES if preset == "tiny" else (SIZE,)
        for size in sizes + LARGE_SIZES * full:
            name = f"{preset}, {SCALE * size[1]}x{SCALE * size[0]} output"
            if not full and time.perf_counter() - began > DEADLINE:
                late = {"what": "everything", "ms": None, "note": "not run: out of time"}
                yield name, caption, labeled([late], "frame", size, preset=preset)
                continue
            progress.print(f"measuring {name}")
            rows, visited = compare_stages(preset, size, setting, patience * SECONDS["stages"])
            if size not in SMALL_SIZES[:-1]:
                rows += compare_video(size)
                rows = labeled(rows, "stage", size, preset=preset, **conditions)
                yield f"Stages of a streamed frame: {name}", caption, rows
            seconds = patience * SECONDS[preset]
            rows = compare_frame(preset, size, setting, visited, seconds)
            rows = labeled(rows, "frame", size, preset=preset, **conditions)
            if (preset, size) == ("paper", SIZE):
                rows += labeled([PAPER], "frame", size, preset=preset, dtype=None)
            yield f"Frame: {name}", caption, rows


def plot(rows: list[Row], title: str, form: str) -> bytes:
    """Milliseconds against the size of the output, as "svg", "png" or what matplotlib offers."""
    from io import BytesIO

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    series: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("part") == "frame" and row.get("ms") and "again" not in str(row["what"]):
            point = row["width"] * row["height"], row["ms"]
            series.setdefault((row["preset"], row["what"]), []).append(point)
    colors = {what: f"C{n}" for n, what in enumerate(dict.fromkeys(what for _, what in series))}
    for (preset, what), points in series.items():
        axes.loglog(
            *zip(*sorted(points), strict=True), label=f"{preset}: {what}", color=colors[what],
            marker="o" if preset == "tiny" else "s", gid=f"series-{preset}-{what}",
        )  # fmt: skip
    sizes = sorted({(row["width"], row["height"]) for row in rows if row.get("part") == "frame"})
    axes.set_xticks([w * h for w, h in sizes])
    axes.set_xticklabels([f"{w}x{h}" for w, h in sizes], rotation=30)
    axes.minorticks_off()
    axes.set(xlabel="output frame", ylabel="ms per frame", title=title)
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    content = BytesIO()
    figure.savefig(content, format=form, metadata={"Date": None} if form == "svg" else None)
    return content.getvalue()
