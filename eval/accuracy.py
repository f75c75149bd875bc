"""Accuracy gate: the frames of every fast path against those of a float32 reference.

    python eval/accuracy.py                               # three frames of the demo clip
    python eval/accuracy.py --data DATA/val --frames 5    # the first frames of each clip

The reference is float32 with the attention as it is defined (`kernels/reference.py`, every pair),
whole frames, one window after the other, without `mana_triton.engine`. The paths are those of the
stream: its tolerance, decoder tiles, several workers, batches, half precision, the automatic
choice, on a GPU both backends; and the ONNX file run by ONNX Runtime.

Clips are cropped to multiples of 4 and shrunk by MATLAB's bicubic to 8 bits, as in an evaluation.
A path meets the gate if its worst frame, before rounding to 8 bits, reaches 50 dB in half precision
or 80 dB (RMS a fortieth of an 8-bit step) in float32 against the reference, and if no clip's mean
PSNR against the originals, in RGB or luma, moves by 0.02 dB. `python eval/run.py --bench` prints
the same table. The last line of stdout is one JSON object; the exit code is 1 if a path misses.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from eval import bench
from eval.datasets import console, find_clips
from eval.timing import Row, show
from mana_triton import MANA, export, load
from mana_triton.checkpoint import CheckpointError
from mana_triton.engine.upscaler import EngineOptions, Upscaler
from mana_triton.engine.window import window_numbers
from mana_triton.metrics import psnr
from mana_triton.resize import SCALE
from mana_triton.training.clips import DataError
from mana_triton.training.degradation import degrade

LEAST = {"fp32": 80.0, "bf16": 50.0, "fp16": 50.0}  # dB between the outputs
MOST = 0.02  # dB by which the PSNR against the originals may move
FRAMES = 3
BAND = 128 << 20  # bytes of the reference's logits at once
TILE = 32  # of the path in tiles: small, so that there are many seams


class Clip(NamedTuple):
    """The first frames of a clip."""

    name: str
    originals: np.ndarray  # [T, 4H, 4W, 3] uint8
    lr: Tensor  # [T, 3, H, W] in [0, 1]


class Fast(NamedTuple):
    """A fast path."""

    precision: str
    run: Callable[[Tensor], Tensor]  # [T, 3, H, W] -> [T, 3, 4H, 4W], both in [0, 1]


def clip_of(name: str, frames: np.ndarray) -> Clip:
    """A clip of original frames [T, H, W, 3] uint8."""
    height, width = (n // SCALE * SCALE for n in frames.shape[1:3])
    originals = frames[:, :height, :width]
    lr = degrade(torch.from_numpy(originals.copy())).float() / 255
    return Clip(name, originals, rearrange(lr, "t h w c -> t c h w"))


def demo(frames: int = FRAMES) -> list[Clip]:
    """The demo clip at its own size."""
    return [clip_of("demo", bench.demo_frames((180, 320), frames))]


def clips_in(folder: Path, frames: int) -> Iterator[Clip]:
    """The first frames of every clip below a folder, one clip at a time."""
    for source in find_clips(folder):
        yield clip_of(source.name, np.stack(list(islice(source.frames(), frames))))


def windows(length: int, frames: int) -> list[list[int]]:
    """The numbers of the frames around each one of a clip, mirrored at its ends."""
    return [window_numbers(center, 0, length - 1, frames) for center in range(length)]


@torch.no_grad()
def reference_frames(model: MANA, lr: Tensor) -> Tensor:
    """[T, 3, 4H, 4W] of a clip [T, 3, H, W]: dense attention in bands of rows, nothing else."""
    t, _, height, width = lr.shape
    rows = max(BAND // (4 * model.config.frames * height * width**2), 1)
    encoded = [model.encode(frame[None]) for frame in lr]
    results = []
    for center, numbers in enumerate(windows(t, model.config.frames)):
        k, v = (torch.stack([getattr(encoded[i], x) for i in numbers], 1) for x in "kv")
        f, _, _, *norm = encoded[center]
        q = model.queries(f, *norm)
        bands = zip(range(0, height, rows), f.split(rows, 2), q.split(rows, 1), strict=True)
        z = [model.fuse(f_y, q_y, k, v, y, backend="reference") for y, f_y, q_y in bands]
        results.append(model.decode(torch.cat(z, 2)) + model.skip(lr[center : center + 1]))
    return torch.cat(results).clamp(0, 1)


def paths(model: MANA, device: torch.device) -> dict[str, Fast]:
    """Every fast path by its name; a GPU has a second backend."""
    plain = EngineOptions(device, "fp32", tile=0, scene_cuts=False, batch=1, workers=1)

    def streamed(**changes: Any) -> Fast:
        upscaler = Upscaler(model, replace(plain, **changes))
        return Fast(
            upscaler.precision, lambda lr: torch.stack([x for _, x in upscaler.stream(lr.cpu())])
        )

    gpu = {"fp32, tiled": streamed(backend="tiled")} if device.type == "cuda" else {}
    automatic = dict.fromkeys(("precision", "tile", "batch", "workers"), "auto")
    return {
        "fp32": streamed(),
        **gpu,
        f"fp32, decoder tiles of {TILE}": streamed(tile=TILE),
        "fp32, 2 workers": streamed(workers=2),
        "fp32, batches of 3": streamed(batch=3),
        "bf16": streamed(precision="bf16"),
        "fp16": streamed(precision="fp16"),
        f"bf16, tiles of {TILE}, 2 workers": streamed(precision="bf16", tile=TILE, workers=2),
        "as the command chooses": streamed(**automatic),
        "ONNX file, ONNX Runtime": Fast("fp32", partial(exported, model)),
    }


@lru_cache(maxsize=1)
def _exported(model: MANA, height: int, width: int) -> Callable[[Tensor], Tensor]:
    return export.open_onnx(export.export(model, height, width, ".onnx", {})[0])


def exported(model: MANA, lr: Tensor) -> Tensor:
    """A clip by ONNX Runtime on the CPU, from the exported file."""
    run, lr = _exported(model, *lr.shape[2:]), lr.cpu()
    results = [run(lr[numbers][None]) for numbers in windows(len(lr), model.config.frames)]
    return torch.cat(results).clamp(0, 1)


def check(clips: Iterable[Clip], model: MANA, candidates: dict[str, Fast]) -> list[Row]:
    """A row for each path: the worst of all clips, and whether that meets the gate."""
    device = next(model.parameters()).device
    mse: dict[str, list[float]] = {name: [] for name in candidates}  # of each frame
    moves: dict[str, list[float]] = {name: [] for name in candidates}
    refused: dict[str, str] = {}
    for clip in clips:
        console.print(f"{clip.name}: reference")
        with torch.backends.cudnn.flags(  # else a GPU convolves in TF32
            enabled=True, allow_tf32=False
        ):
            truth = reference_frames(model, clip.lr.to(device)).cpu()
        scores = _scores(clip, truth)
        for name in [name for name in candidates if name not in refused]:
            console.print(f"{clip.name}: {name}")
            try:
                frames = candidates[name].run(clip.lr)
            except export.ExportError as error:
                refused[name] = f"not run: {error}"
                continue
            mse[name] += (frames.double() - truth).square().mean((1, 2, 3)).tolist()
            pairs = zip(_scores(clip, frames), scores, strict=True)
            moves[name] += [fast - exact for fast, exact in pairs]
    return [
        {"what": name, "dtype": fast.precision, "note": refused[name], "gate": None}
        if name in refused
        else {"what": name} | _judged(fast.precision, mse[name], moves[name])
        for name, fast in candidates.items()
    ]


def _scores(clip: Clip, frames: Tensor) -> list[float]:
    """The evaluation's means over the frames of a clip: PSNR in RGB and in luma."""
    rounded = rearrange(frames.clamp(0, 1) * 255, "t c h w -> t h w c").round().byte().numpy()
    pairs = list(zip(rounded, clip.originals, strict=True))
    return [float(np.mean([psnr(a, b, y_channel=y) for a, b in pairs])) for y in (False, True)]


def _judged(precision: str, mse: list[float], moves: list[float]) -> Row:
    worst, moved = float(np.max(mse)), max(moves, key=abs)  # nan is the largest to numpy
    met = worst <= 10 ** (-LEAST[precision] / 10) and abs(moved) < MOST
    row: Row = {"dtype": precision, "moved_db": moved, "gate": "met" if met else "missed"}
    if not math.isfinite(worst):
        return row | {"moved_db": None, "note": "values that are not finite"}
    return row | ({"psnr_db": -10 * math.log10(worst)} if worst else {"note": "bit for bit"})


def missed(rows: list[Row]) -> list[str]:
    """The paths that miss the gate."""
    return [row["what"] for row in rows if row["gate"] == "missed"]


def gate(clips: Iterable[Clip], weights: str, device: torch.device, title: str) -> list[Row]:
    """Check and show all paths with these weights."""
    model = load(weights).to(device)
    rows = check(clips, model, paths(model, device))
    show(rows, f"Accuracy: {title}, {weights}", "against the float32 reference")
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="clips (default: the demo clip)")
    add("--frames", type=_positive, default=FRAMES, help="of each clip (default: %(default)s)")
    add("--weights", default="tiny", help="shipped name or file (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    clips = clips_in(args.data, args.frames) if args.data else demo(args.frames)
    title = f"first {args.frames} frames of {args.data.name if args.data else 'the demo clip'}"
    try:
        rows = gate(clips, args.weights, device, title)
    except (DataError, CheckpointError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    summary = {
        "rows": rows, "clips": title, "weights": args.weights, "device": device.type,
        "least_db": LEAST, "most_moved_db": MOST, "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(summary, allow_nan=False))
    if missed(rows):
        sys.exit(f"error: the accuracy gate is missed by: {', '.join(missed(rows))}")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number >= 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
