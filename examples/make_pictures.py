"""The two pictures of the README: before and after, and the curve of a training run.

    python examples/make_pictures.py before-after.png
    python examples/make_pictures.py curve.svg runs/tiny/log.jsonl [MORE.jsonl ...]

A curve joins the logs of runs that continue each other.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from mana_triton import upscale
from mana_triton.resize import upscale_bicubic
from mana_triton.video.reader import open_reader

DEMO = Path(__file__).parent / "demo.mp4"
FRAME = 37
CROP = (slice(60, 290), slice(440, 785))  # of the enlarged frame


def before_after(path: Path) -> None:
    """A crop of a frame of the demo, bicubic next to ours."""
    with open_reader(DEMO) as reader:
        frames = [frame.rgb for frame in islice(reader, FRAME - 3, FRAME + 4)]
    ours = np.asarray(list(upscale(frames))[3])
    bicubic = upscale_bicubic(torch.from_numpy(frames[3].copy())).numpy()
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.9), layout="constrained")
    for axis, title, picture in zip(
        axes, ("bicubic x4", "mana_triton tiny x4"), (bicubic, ours), strict=True
    ):
        axis.imshow(picture[CROP], interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    figure.savefig(path, dpi=110)


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
    if len(sys.argv) == 2:
        before_after(Path(sys.argv[1]))
    elif len(sys.argv) > 2:
        curve(Path(sys.argv[1]), [Path(log) for log in sys.argv[2:]])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
