# ruff: noqa: RUF009  (`flag` makes a field)
"""PSNR against motion: neighbor frames shifted by 0 to 40 pixels, the paper's claim tested.

    python eval/studies/motion.py --clips DATA/val --weights tiny=tiny none=B.safetensors

cuts windows out of pictures (--stills) or of evenly spaced frames of clips. The six neighbors show
the same scene shifted by a number of original pixels, each in another of six directions, with real
content and no warping. At shift 0 the neighbors are copies; otherwise they add samples between the
pixels, for a network that finds them. Each network is also given neighbors that optical flow (TV-L1
of scikit-image, on the low-resolution frames) has warped onto the center frame, and the center
frame seven times. The border that some shift leaves is never scored. The last line of stdout is one
JSON object.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mana_triton.checkpoint import CheckpointError
from mana_triton.engine.upscaler import EngineOptions, Upscaler
from mana_triton.files import write_atomically
from mana_triton.metrics import psnr, rgb_to_y
from mana_triton.resize import SCALE, upscale_bicubic
from mana_triton.training.clips import WINDOW, DataError, open_clips
from mana_triton.training.degradation import degrade
from mana_triton.training.options import flag, parse_options

SHIFTS = (0, 2, 4, 8, 12, 16, 24, 32, 40)  # original pixels
CENTER = WINDOW // 2
ALONE, ALIGNED = ", center alone", ", aligned by flow"  # after a network's name
LINES = {ALONE: ":", ALIGNED: "--"}  # of the plot


@dataclass(frozen=True)
class MotionOptions:
    """Which networks are tested, on what."""

    weights: tuple[str, ...] = flag((), "networks as NAME=FILE or FILE")
    stills: tuple[Path, ...] = flag((), "pictures")
    clips: tuple[Path, ...] = flag((), "videos or folders of frames, instead of pictures")
    pictures: int = flag(20, "how many of them, at most")
    size: int = flag(192, "original pixels of a window's side")
    border: int = flag(40, "pixels that are not scored, at least the largest shift")
    seed: int = flag(0, "of places and directions")
    no_flow: bool = flag(False, "leave out the alignment by flow, which is slow")
    cache: Path = flag(Path("cache/motion"), "decoded pictures")
    plot: Path | None = flag(None, "SVG of the curves; needs matplotlib")

    def __post_init__(self):
        if not self.weights or bool(self.stills) == bool(self.clips):
            raise ValueError("pass --weights, and one of --stills and --clips")
        if self.size % SCALE or self.size <= 2 * self.border or self.pictures < 1:
            raise ValueError(
                "--size must be a multiple of 4 above twice --border, --pictures at least 1"
            )


def window(picture: np.ndarray, shift: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Seven crops [7, size, size, 3] of a picture; the neighbors' lie `shift` pixels away.

    The six directions are evenly spread from a random one; the center crop does not depend on the
    shift.
    """
    H, W, _ = picture.shape
    most = max(SHIFTS)
    y, x = (int(rng.integers(most, n - size - most + 1)) for n in (H, W))
    turn, order = rng.uniform(0, 2 * math.pi), rng.permutation(WINDOW - 1)
    angles = turn + 2 * math.pi * order / (WINDOW - 1)
    moves = np.round(shift * np.stack([np.sin(angles), np.cos(angles)], axis=1)).astype(int)
    moves = np.insert(moves, CENTER, 0, axis=0)
    return np.stack([picture[y + dy : y + dy + size, x + dx : x + dx + size] for dy, dx in moves])


def aligned(lr: np.ndarray) -> np.ndarray:
    """Frames [7, h, w, 3] uint8 warped onto the center one along their optical flow."""
    from skimage.registration import optical_flow_tvl1
    from skimage.transform import warp

    luma = [rgb_to_y(frame).astype(np.float32) / 255 for frame in lr]
    y, x = np.mgrid[: lr.shape[1], : lr.shape[2]].astype(np.float32)
    result = lr.copy()
    for t in range(WINDOW):
        if t == CENTER:
            continue
        dy, dx = optical_flow_tvl1(luma[CENTER], luma[t])
        for c in range(3):
            moved = warp(lr[t, ..., c] / 255, np.stack([y + dy, x + dx]), order=3, mode="edge")
            result[t, ..., c] = np.clip(np.round(255 * moved), 0, 255)
    return result


def pictures(options: MotionOptions) -> list[np.ndarray]:
    """The pictures [H, W, 3] that windows are cut from; the same number from each clip."""
    needed = options.size + 2 * max(SHIFTS)
    kind = "still" if options.stills else "clip"
    clips = open_clips(options.stills or options.clips, options.cache, kind=kind)
    usable = [clip for clip in clips if min(clip.shape[1:3]) >= needed][: options.pictures]
    if not usable:
        raise DataError(
            f"pictures must have at least {needed} pixels each way, none of {len(clips)} has; "
            "lower --size"
        )
    each = options.pictures // len(usable)
    return [
        clip.frames[index]
        for clip in usable
        for T in [clip.shape[0]]
        for index in np.linspace(0, T - 1, min(each, T)).round().astype(int)
    ]


def windows(frames: list[np.ndarray], options: MotionOptions) -> Iterator[tuple[int, np.ndarray]]:
    """(shift, frames [7, size, size, 3]) of every picture; all shifts at one place."""
    for number, frame in enumerate(frames):
        for shift in SHIFTS:
            rng = np.random.Generator(np.random.Philox(seed=[options.seed, number]))
            yield shift, window(frame, shift, options.size, rng)


def network(weights: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function of low-resolution frames [7, h, w, 3] that returns [4h, 4w, 3], both uint8."""
    upscaler = Upscaler(weights, EngineOptions("cpu", "fp32", scene_cuts=False))
    return lambda lr: next(upscaler.stream(lr, skip=CENTER)).picture


def measure(options: MotionOptions) -> list[dict]:
    """One row per method: mean PSNR in dB for each shift, over the pictures."""
    frames = pictures(options)
    networks = {}
    for text in options.weights:
        name, _, weights = text.rpartition("=")
        networks[name or Path(weights).stem] = network(weights)
    scores: dict[str, dict[int, list[float]]] = {}
    for shift, hr in windows(frames, options):
        lr = degrade(torch.from_numpy(hr)).numpy()
        given = {"": lr, ALONE: np.repeat(lr[CENTER : CENTER + 1], WINDOW, 0)}
        if not options.no_flow:
            given[ALIGNED] = aligned(lr)
        results = {"bicubic": upscale_bicubic(torch.from_numpy(lr[CENTER].copy())).numpy()}
        for name, enlarge in networks.items():
            results |= {f"{name}{suffix}": enlarge(x) for suffix, x in given.items()}
        for name, result in results.items():
            row = scores.setdefault(name, {shift: [] for shift in SHIFTS})
            row[shift].append(psnr(result, hr[CENTER], crop_border=options.border))
    return [
        {"method": name, "pictures": len(frames)}
        | {"psnr_db": {str(shift): float(np.mean(values)) for shift, values in row.items()}}
        for name, row in scores.items()
    ]


def show(rows: list[dict]) -> None:
    table = Table("shift, original pixels", *map(str, SHIFTS), title="PSNR RGB, dB")
    for row in rows:
        table.add_row(row["method"], *(f"{row['psnr_db'][str(shift)]:.2f}" for shift in SHIFTS))
    Console(width=140).print(table)


def plot(rows: list[dict]) -> bytes:
    """PSNR against the shift, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colors: dict[str, str] = {}  # one for a network, whatever it is given
    for row in rows:
        name, _, _ = row["method"].partition(", ")
        line = LINES.get(row["method"].removeprefix(name), "-")
        color = colors.setdefault(name, f"C{len(colors)}")
        values = list(row["psnr_db"].values())
        axes.plot(SHIFTS, values, line, marker="o", ms=3, color=color, label=row["method"])
    axes.set(xlabel="shift of the neighbors, original pixels", ylabel="PSNR RGB, dB")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    content = BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def main() -> None:
    """Command line."""
    options = parse_options(MotionOptions, "python eval/studies/motion.py", __doc__, None)
    try:
        rows = measure(options)
        if options.plot:
            write_atomically(options.plot, plot(rows))
    except (DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    show(rows)
    about = {"size": options.size, "border": options.border, "seed": options.seed}
    print(json.dumps({"rows": rows} | about))


if __name__ == "__main__":
    main()
