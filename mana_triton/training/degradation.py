"""Low-resolution frames: bicubic x1/4, or the degradations of real video.

`degrade` shrinks by one of two bicubic methods. A recipe does what real video suffers: blur,
resampling, noise, and a lossy codec. It is a function of the clip's name and a number alone. Its
frames are cached next to the decoded clips, so that training needs neither PyAV nor time for them;
a still becomes seven frames by synthetic motion first.
"""

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mana_triton.resize import SCALE, matlab_bicubic
from mana_triton.training.clips import (
    Clip,
    DataError,
    decode_progress,
    open_frames,
    read_index,
    write_frames,
    write_index,
)
from mana_triton.training.motion import still_frames

VARIANTS = 4  # recipes for each clip
KERNELS = ("matlab_bicubic", "bilinear", "area")
FPS = 25
# pixels of a side that a codec takes: x265 writes beyond its buffers in narrower pictures, and
# its packets vary from run to run up to one block of 64 pixels
SMALLEST = {"libx264": 32, "libx265": 96}


def pil_bicubic(hr: Tensor) -> Tensor:
    """Shrink by 4 with Pillow's BICUBIC: [..., H, W, 3] uint8 -> [..., H/4, W/4, 3]."""
    from PIL import Image

    H, W = hr.shape[-3:-1]
    size = (W // SCALE, H // SCALE)
    frames = hr.reshape(-1, H, W, 3).numpy()
    small = [Image.fromarray(f).resize(size, Image.Resampling.BICUBIC) for f in frames]
    lr = torch.from_numpy(np.stack([np.asarray(picture) for picture in small]))
    return lr.reshape(*hr.shape[:-3], *lr.shape[1:])


DEGRADATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "matlab_bicubic": matlab_bicubic,
    "pil_bicubic": pil_bicubic,
}


def degrade(hr: Tensor, method: str = "matlab_bicubic") -> Tensor:
    """Make low-resolution frames.

    Args:
        hr: [..., H, W, 3] uint8; H and W are multiples of 4.
        method: "matlab_bicubic", or on the CPU "pil_bicubic".

    Returns:
        [..., H/4, W/4, 3] uint8.

    Raises:
        ValueError: another method, layout, type or size.
    """
    if method not in DEGRADATIONS:
        raise ValueError(f"method must be one of {', '.join(DEGRADATIONS)}, got {method!r}")
    if hr.dtype != torch.uint8 or hr.ndim < 3 or hr.shape[-1] != 3:
        raise ValueError(f"hr must be [..., H, W, 3] uint8, got {list(hr.shape)} {hr.dtype}")
    H, W = hr.shape[-3:-1]
    if H % SCALE or W % SCALE or not H or not W:
        raise ValueError(
            f"height and width must be multiples of {SCALE}, got {H}x{W}; "
            f"crop to {H // SCALE * SCALE}x{W // SCALE * SCALE}"
        )
    return DEGRADATIONS[method](hr)


# ---- recipes


@dataclass(frozen=True)
class Recipe:
    """What happens to a clip, in this order; the defaults are plain bicubic shrinking."""

    top: int = 0  # HR pixels cut off, 0..3: where the grid of LR pixels starts
    left: int = 0
    blur: tuple[float, float, float] | None = None  # standard deviations along two axes, angle
    kernel: str = "matlab_bicubic"  # one of KERNELS, for x1/4
    noise: float = 0.0  # standard deviation, in steps of 8 bits
    gray: bool = False  # the same noise in all channels
    codec: str | None = None  # "libx264" or "libx265"
    crf: int = 0
    preset: str = "medium"
    seed: int = 0  # of the noise


VALIDATION = Recipe(codec="libx264", crf=28)


def draw(name: str, variant: int) -> Recipe:
    """The recipe of a clip by its name and the variant's number, always the same."""
    digest = hashlib.sha256(f"{name} {variant}".encode()).digest()
    seed = int.from_bytes(digest[:6], "little")
    rng = np.random.Generator(np.random.Philox(seed=seed))
    top, left = rng.integers(0, SCALE, 2).tolist()
    widths = np.exp(rng.uniform(math.log(0.3), math.log(2.5), 2)).round(3).tolist()
    blur = (*widths, round(rng.uniform(0, math.pi), 3)) if rng.random() < 0.3 else None
    kernel = KERNELS[int(rng.choice(3, p=[0.6, 0.2, 0.2]))]
    noise = round(float(rng.uniform(0.5, 6)), 2) if rng.random() < 0.25 else 0.0
    gray = bool(rng.random() < 0.4)
    codec = str(rng.choice(["libx264", "libx265"], p=[0.7, 0.3])) if rng.random() < 0.9 else None
    crf = int(rng.integers(15, 36))
    preset = str(rng.choice(["veryfast", "fast", "medium"]))
    return Recipe(top, left, blur, kernel, noise, gray, codec, crf, preset, seed)


def degrade_clip(frames: Iterable[np.ndarray], recipe: Recipe) -> Iterator[np.ndarray]:
    """Low-resolution frames [h, w, 3] uint8 of the frames [H, W, 3] uint8 of a clip."""
    small = _shrink(frames, recipe)
    return compress(small, recipe.codec, recipe.crf, recipe.preset) if recipe.codec else small


def _shrink(frames: Iterable[np.ndarray], recipe: Recipe) -> Iterator[np.ndarray]:
    rng = np.random.Generator(np.random.Philox(seed=recipe.seed))
    blur = gaussian(*recipe.blur) if recipe.blur else None
    for frame in frames:
        H = (frame.shape[0] - recipe.top) // SCALE * SCALE
        W = (frame.shape[1] - recipe.left) // SCALE * SCALE
        hr = torch.from_numpy(
            frame[recipe.top : recipe.top + H, recipe.left : recipe.left + W].copy()
        )
        if blur is not None:
            hr = _blur(hr, blur)
        lr = matlab_bicubic(hr) if recipe.kernel == "matlab_bicubic" else _resample(hr, recipe)
        if recipe.noise:
            shape = (*lr.shape[:2], 1 if recipe.gray else 3)
            noise = torch.from_numpy(rng.normal(0, recipe.noise, shape))
            lr = (lr + noise).round().clamp(0, 255).byte()
        yield lr.numpy()


def gaussian(first: float, second: float, angle: float) -> Tensor:
    """An oriented Gaussian kernel [n, n] of sum 1.

    Args:
        first, second: standard deviations along its axes, in pixels.
        angle: of the first axis, in radians.
    """
    radius = math.ceil(3 * max(first, second))
    axis = torch.arange(-radius, radius + 1).double()
    y, x = axis[:, None], axis[None, :]
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    kernel = torch.exp(-(along / first).square() / 2 - (across / second).square() / 2)
    # far below a step of 8 bits; subnormal float32 would be a hundred times slower
    kernel[kernel < 1e-9] = 0
    return kernel / kernel.sum()


def _blur(frame: Tensor, kernel: Tensor) -> Tensor:
    """Convolve [H, W, 3] uint8, mirrored at its edges."""
    radius = kernel.shape[0] // 2
    x = rearrange(frame, "h w c -> c 1 h w").float()
    x = F.pad(x, (radius, radius, radius, radius), mode="reflect")
    x = F.conv2d(x, kernel.float()[None, None])
    return rearrange(x, "c 1 h w -> h w c").round().clamp(0, 255).byte()


def _resample(frame: Tensor, recipe: Recipe) -> Tensor:
    """Shrink [H, W, 3] uint8 by 4, area or bilinear."""
    x = rearrange(frame, "h w c -> 1 c h w").float()
    if recipe.kernel == "area":
        x = F.avg_pool2d(x, SCALE)
    else:
        x = F.interpolate(x, scale_factor=1 / SCALE, mode="bilinear", antialias=True)
    return rearrange(x, "1 c h w -> h w c").round().clamp(0, 255).byte()


def compress(
    frames: Iterable[np.ndarray], codec: str, crf: int, preset: str = "medium"
) -> Iterator[np.ndarray]:
    """Encode frames [h, w, 3] uint8 as 4:2:0 video on one thread, and decode them again.

    Frames whose sides are odd or too small for the codecs are padded, and cropped afterwards.
    """
    import av

    from mana_triton.video.encoder import repeatable

    frames = iter(frames)
    first = next(frames)
    h, w, _ = first.shape
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        options = {"crf": str(crf), "preset": preset}
        if codec == "libx265":
            options["x265-params"] = "log-level=none:pools=none:frame-threads=1"
        elif codec == "libx264" and (params := repeatable()):
            options["x264-params"] = params
        stream = cast(av.VideoStream, container.add_stream(codec, FPS, options=options))
        height, width = (max(SMALLEST[codec], n + n % 2) for n in (h, w))
        stream.height, stream.width = height, width
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        for number, frame in enumerate(chain([first], frames)):
            padded = np.pad(frame, [(0, height - h), (0, width - w), (0, 0)], mode="edge")
            picture = av.VideoFrame.from_ndarray(padded, format="rgb24")
            picture = picture.reformat(format="yuv420p", threads=1)
            picture.pts, picture.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    buffer.seek(0)
    with av.open(buffer, "r") as video:
        for frame in video.decode(video=0):
            yield frame.to_ndarray(format="rgb24")[:h, :w]


# ---- the cache


@dataclass(frozen=True)
class LowClip:
    """A degraded variant of a clip; its pixel (0, 0) covers HR pixels from (top, left) on."""

    path: Path
    recipe: Recipe

    def frames(self) -> np.ndarray:
        """[T, h, w, 3] uint8, mapped from the file."""
        return open_frames(self.path)

    @property
    def top(self) -> int:
        return self.recipe.top

    @property
    def left(self) -> int:
        return self.recipe.left


def open_low_clips(
    clips: list[Clip], cache: Path, recipes: Callable[[str], list[Recipe]]
) -> dict[Path, list[LowClip]]:
    """The degraded variants of each clip or still; those missing in `cache` are made.

    Args:
        clips: decoded clips; a still's variants have seven frames.
        cache: folder for the variants; a copy of it is opened without PyAV.
        recipes: by the clip's name; the second clip of a name is called "NAME 2", and so on.

    Returns:
        The variants by the path of the clip.

    Raises:
        DataError: a variant must be made and PyAV is not installed.
    """
    cache.mkdir(parents=True, exist_ok=True)
    index = read_index(cache)
    low: dict[Path, list[LowClip]] = {}
    seen: Counter[str] = Counter()
    with decode_progress() as progress:
        for clip in progress.track(clips, description=f"degrading into {cache}"):
            low[clip.path] = []
            seen[clip.name] += 1
            # not by the file, whose name depends on where the source lies
            times = seen[clip.name]
            for recipe in recipes(clip.name if times == 1 else f"{clip.name} {times}"):
                file = _file_name(clip, recipe)
                if file not in index or not (cache / file).is_file():
                    index[file] = _make(clip, recipe, cache / file)
                    write_index(cache, index)
                low[clip.path].append(LowClip(cache / file, recipe))
    return low


def training_recipes(name: str, variants: int = VARIANTS) -> list[Recipe]:
    """The variants that training draws from."""
    return [draw(name, variant) for variant in range(variants)]


def _file_name(clip: Clip, recipe: Recipe) -> str:
    text = json.dumps([clip.shape, asdict(recipe)])
    return f"{clip.path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.npy"


def _make(clip: Clip, recipe: Recipe, path: Path) -> dict:
    """Write one variant; returns its entry of the index."""
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"{path} must be made with PyAV, which is not installed; install av, or copy "
            f"{path.parent} from where it is"
        ) from error
    frames = still_frames(clip, recipe.seed) if clip.kind == "still" else iter(clip.frames)
    shape = write_frames(path, degrade_clip(frames, recipe), str(clip.path))
    return {"clip": clip.name, "shape": list(shape), "recipe": asdict(recipe)}
