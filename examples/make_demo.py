"""Make demo.mp4: three seconds of low-resolution video to enlarge, with sound.

    python examples/make_demo.py [OUTPUT]

A camera pans, zooms and turns over three photographs that come with scikit-image, all free of
copyright restrictions: coffee (Rachel Michetti, CC0), Eileen Collins (NASA, public domain) and
Chelsea the cat (Stefan van der Walt, CC0). 320x180, 25 fps, H.264 in BT.709, AAC melody.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from einops import rearrange, reduce

WIDTH, HEIGHT, FPS, SCENE_FRAMES = 320, 180, 25, 25
SUBPIXELS = 4  # samples per pixel and axis: their mean is what a sensor sees, free of aliasing
AUDIO_RATE = 48000
MELODY = (523.25, 659.26, 783.99, 1046.5, 783.99, 659.26)  # Hz, half a second each


@dataclass
class View:
    """What the camera sees: the picture's pixels x, y at its center, rotated by degrees."""

    x: float
    y: float
    pixels_per_pixel: float
    degrees: float


# picture, first view, last view
SCENES = (
    ("coffee", View(268, 225, 1.45, -4), View(325, 180, 1.15, 3)),
    ("astronaut", View(266, 225, 1.45, 3), View(236, 150, 1.20, -3)),
    ("chelsea", View(236, 165, 1.25, -3), View(205, 135, 1.00, 3)),
)


def render(picture: np.ndarray, view: View) -> np.ndarray:
    """One [HEIGHT, WIDTH, 3] uint8 frame of a [H, W, 3] uint8 picture."""
    ys, xs = (
        (torch.arange(size * SUBPIXELS) + 0.5) / SUBPIXELS - size / 2 for size in (HEIGHT, WIDTH)
    )
    angle = torch.deg2rad(torch.tensor(view.degrees))
    dy, dx = torch.meshgrid(ys, xs, indexing="ij")
    x = view.x + view.pixels_per_pixel * (dx * torch.cos(angle) - dy * torch.sin(angle))
    y = view.y + view.pixels_per_pixel * (dx * torch.sin(angle) + dy * torch.cos(angle))
    height, width = picture.shape[:2]
    grid = torch.stack([2 * x / width - 1, 2 * y / height - 1], dim=-1)[None]
    samples = F.grid_sample(
        rearrange(torch.from_numpy(picture), "h w c -> 1 c h w").float(),
        grid,
        mode="bicubic",
        padding_mode="reflection",
        align_corners=False,
    )
    frame = reduce(samples, "1 c (h a) (w b) -> h w c", "mean", a=SUBPIXELS, b=SUBPIXELS)
    return frame.round().clamp(0, 255).byte().numpy()


def frames() -> Iterator[np.ndarray]:
    for name, first, last in SCENES:
        picture = getattr(skimage.data, name)()
        for i in range(SCENE_FRAMES):
            # eased, each at its own pace: the motion is neither constant nor straight
            t = i / (SCENE_FRAMES - 1)
            pan, tilt, zoom = ((1 - np.cos(np.pi * t**p)) / 2 for p in (0.8, 1.0, 1.2))
            yield render(
                picture,
                View(
                    first.x + (last.x - first.x) * pan,
                    first.y + (last.y - first.y) * tilt,
                    first.pixels_per_pixel
                    * (last.pixels_per_pixel / first.pixels_per_pixel) ** zoom,
                    first.degrees + (last.degrees - first.degrees) * tilt,
                ),
            )


def melody() -> np.ndarray:
    """[1, samples] float32 in [-1, 1], as long as the video."""
    seconds = len(SCENES) * SCENE_FRAMES / FPS
    t = np.arange(round(seconds * AUDIO_RATE)) / AUDIO_RATE
    note_seconds = seconds / len(MELODY)
    since_note = t % note_seconds
    hz = np.array(MELODY)[(t / note_seconds).astype(int)]
    fade = np.minimum(since_note / 0.01, 1) * np.exp(-5 * since_note)
    return (0.3 * fade * np.sin(2 * np.pi * hz * since_note))[None].astype(np.float32)


def write(path: Path) -> None:
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        # one thread, no mbtree: the same bytes in every run
        video.codec_context.options = {"crf": "18", "preset": "veryslow", "x264-params": "mbtree=0"}
        video.codec_context.thread_count = 1
        video.codec_context.colorspace = Colorspace.ITU709
        video.codec_context.color_range = ColorRange.MPEG
        video.codec_context.color_primaries = ColorPrimaries.BT709
        video.codec_context.color_trc = ColorTrc.BT709
        audio = container.add_stream("aac", rate=AUDIO_RATE, layout="mono")
        audio.codec_context.bit_rate = 64000

        for i, rgb in enumerate(frames()):
            # the encoder would convert by BT.601 whatever the stream says
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.BICUBIC
                | Interpolation.ACCURATE_RND
                | Interpolation.BITEXACT,
            )
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode())

        sound = av.AudioFrame.from_ndarray(melody(), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = AUDIO_RATE, 0
        container.mux(audio.encode(sound))
        container.mux(audio.encode())


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("demo.mp4"))
