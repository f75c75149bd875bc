"""Quality of enlarging methods on clips whose originals are known.

    python eval/run.py --data val=../shared/data/val --method bicubic mana:tiny center:tiny

Methods: bicubic (MATLAB's kernel); mana:WEIGHTS streams a clip as infer does; center:WEIGHTS
repeats every frame seven times, so that the network sees no neighbors. Low-resolution frames are
made from the originals, cropped to multiples of 4, and rounded to 8 bits. Scores are means over
the frames of a clip, then over clips: PSNR and SSIM in RGB and in luma (BT.601), in dB and 1.
The last line of stdout is one JSON object {"rows": [...]}.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from einops import rearrange
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mana_triton.checkpoint import CheckpointError, load
from mana_triton.data import DEGRADATIONS, SCALE, Clip, DataError, degrade, open_clips
from mana_triton.data import upscale_bicubic as bicubic
from mana_triton.metrics import psnr, ssim
from mana_triton.model import MANA
from mana_triton.stream import Upscaler

SCORES = ("psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y")
console = Console(stderr=True, soft_wrap=True, highlight=False)
Method = Callable[[np.ndarray], Iterator[Any]]  # [T, h, w, 3] -> frames [4h, 4w, 3]


class MethodError(ValueError):
    """A method that does not exist."""


def make_method(name: str) -> Method:
    """The method of that name; MethodError lists them."""
    kind, _, weights = name.partition(":")
    if name == "bicubic":
        return lambda clip: (bicubic(torch.from_numpy(lr)).numpy() for lr in clip)
    if kind == "mana" and weights:
        return Upscaler(weights).stream
    if kind == "center" and weights:
        return partial(_center_only, load(weights))
    raise MethodError(f"method must be bicubic, mana:WEIGHTS or center:WEIGHTS, got '{name}'")


@torch.inference_mode()
def _center_only(model: MANA, clip: np.ndarray) -> Iterator[np.ndarray]:
    for frame in clip:
        lr = rearrange(torch.from_numpy(frame), "h w c -> 1 1 c h w").float() / 255
        out = model(lr.expand(-1, model.config.frames, -1, -1, -1))[0]
        yield rearrange(out.clamp(0, 1) * 255, "c h w -> h w c").round().byte().numpy()


def evaluate(method: Method, clip: Clip, degradation: str, label: str) -> dict[str, float]:
    """Mean scores of the frames of one clip."""
    height, width = (n // SCALE * SCALE for n in clip.shape[1:3])
    hr = clip.frames[:, :height, :width]
    lr = np.stack([degrade(torch.from_numpy(frame.copy()), degradation).numpy() for frame in hr])
    pairs = track(zip(method(lr), hr, strict=True), label, len(hr), console=console)
    scores = [
        [metric(enlarged, original, y_channel=y) for y in (False, True) for metric in (psnr, ssim)]
        for enlarged, original in pairs
    ]
    return dict(zip(SCORES, np.mean(scores, 0).tolist(), strict=True))


def run(args: argparse.Namespace, cache: Path) -> list[dict]:
    """One row per data set and method, each with its clips."""
    rows = []
    for name, path in args.data:
        clips = open_clips([path], cache / name, split="test")
        for method_name in args.method:
            method = make_method(method_name)
            per_clip = {
                clip.name: evaluate(method, clip, args.degradation, f"{method_name} {clip.name}")
                for clip in clips
            }
            mean = {key: float(np.mean([s[key] for s in per_clip.values()])) for key in SCORES}
            frames = sum(clip.shape[0] for clip in clips)
            row = {"dataset": name, "method": method_name, "clips": len(clips), "frames": frames}
            rows.append({**row, **mean, "per_clip": per_clip})
    return rows


def show(rows: list[dict], degradation: str) -> None:
    """The table, on stdout."""
    title = f"{degradation} x1/{SCALE}, all frames, no border cropped, 8-bit, mean of clips"
    table = Table("clip", "method", "PSNR RGB", "SSIM RGB", "PSNR Y", "SSIM Y", title=title)
    for name in dict.fromkeys(row["dataset"] for row in rows):
        of_set = [row for row in rows if row["dataset"] == name]
        for clip in [*of_set[0]["per_clip"], None]:
            for row in of_set:
                scores = row["per_clip"][clip] if clip else row
                cells = (f"{scores[key]:.{3 if 'psnr' in key else 4}f}" for key in SCORES)
                table.add_row(clip or f"mean of {name}", row["method"], *cells)
    Console(width=110).print(table)


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, got {text!r}")
    return name, Path(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", nargs="+", type=_named_path, required=True, metavar="NAME=PATH")
    add("--method", nargs="+", required=True, metavar="METHOD", help="see above")
    add("--degradation", choices=tuple(DEGRADATIONS), default="matlab_bicubic")
    add("--json", type=Path, metavar="FILE", help="also write the JSON line there")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as cache:
            rows = run(args, Path(cache))
    except (DataError, CheckpointError, MethodError, OSError) as error:
        sys.exit(f"error: {error}")
    show(rows, args.degradation)
    line = json.dumps({"rows": rows, "degradation": args.degradation, "crop_border": 0})
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
