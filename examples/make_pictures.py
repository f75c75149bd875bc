"""The two pictures of the README: before and after, and the curve of a training run.

    python examples/make_pictures.py before-after.png nasa.mp4
    python examples/make_pictures.py curve.svg runs/tiny/log.jsonl [MORE.jsonl ...]

The README shows a public-domain NASA video of 320x180. A curve joins the logs of runs that continue
each other.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

from mana_triton import upscale
from mana_triton.resize import upscale_bicubic
from mana_triton.video.reader import open_reader

FRAME = 60
CROP = (slice(200, 480), slice(500, 880))  # of the enlarged frame


def before_after(path: Path, video: Path) -> None:
    """A part of a frame of a video, bicubic and `real`, side by side at 100 %."""
    with open_reader(video) as reader:
        frames = [frame.rgb for frame in islice(reader, FRAME - 3, FRAME + 4)]
    ours = np.asarray(list(upscale(frames, "real"))[3])
    bicubic = upscale_bicubic(torch.from_numpy(frames[3].copy())).numpy()
    gap = np.full((CROP[0].stop - CROP[0].start, 6, 3), 255, np.uint8)
    Image.fromarray(np.concatenate([bicubic[CROP], gap, ours[CROP]], axis=1)).save(path)


def curve(path: Path, logs: list[Path]) -> None:
    """Validation PSNR over the iterations of consecutive runs."""
    start, points, bicubic = 0, [], 0.0
    for log in logs:
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        for entry in entries:
            if entry.get("psnr_db") is not None:
                iteration = start + entry["iteration"]
                points.append((iteration, entry["psnr_db"], entry["center_only_psnr_db"]))
                bicubic = entry["bicubic_psnr_db"]
        start += entries[-1]["iteration"]
    iterations, real, center = zip(*points, strict=True)
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    axis.plot(iterations, real, label="seven real frames")
    axis.plot(iterations, center, label="center frame seven times")
    axis.axhline(bicubic, color="gray", linestyle="--", label="bicubic")
    axis.set(xlabel="iteration", ylabel="validation PSNR RGB, dB")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    """Command line."""
    if len(sys.argv) == 3 and sys.argv[1].endswith(".png"):
        before_after(Path(sys.argv[1]), Path(sys.argv[2]))
    elif len(sys.argv) > 2:
        curve(Path(sys.argv[1]), [Path(log) for log in sys.argv[2:]])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
