"""The report of an evaluation as one HTML file that loads nothing else.

Pictures are embedded: crops losslessly, full frames as JPEG of quality 95. In a set of more than 40
clips full frames have at most 640 pixels in width and quality 75, and only the first 400 clips have
pictures.
"""

from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from html import escape
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.datasets import TestClip
from eval.report import LISTED, SCORES, Results, cell, columns, notes
from eval.units import MIDDLE_PICTURE, WORST_PICTURE, Unit

PICTURED = 400  # clips of a set that have pictures
SMALL = {"width": 640, "quality": 75, "subsampling": 2}
LARGE = {"width": None, "quality": 95, "subsampling": 0}
CROP = 64  # pixels of the original in a crop's side
TEMPLATE = Path(__file__).with_name("page.html")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")

Originals = Callable[[TestClip], Iterator[np.ndarray]]


# ---- pictures


def _data_uri(frame: np.ndarray, form: str, **options) -> str:
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, form, **options)
    return f"data:image/{form};base64,{b64encode(buffer.getvalue()).decode()}"


def _full(frame: np.ndarray, width: int | None, **options: int) -> str:
    """A frame as JPEG, shrunk if it is wider than `width`."""
    if width and frame.shape[1] > width:
        height = round(frame.shape[0] * width / frame.shape[1])
        frame = np.asarray(Image.fromarray(frame).resize((width, height)))
    return _data_uri(frame, "jpeg", **options)


def hardest(original: np.ndarray, enlarged: np.ndarray) -> tuple[int, int]:
    """Top left corner of the crop, on a grid of half its side, with the largest squared error."""
    error = ((original.astype(float) - enlarged) ** 2).sum(axis=-1)
    sums = np.pad(error.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    height, width = (min(CROP, n) for n in error.shape)
    tops = np.arange(0, error.shape[0] - height + 1, CROP // 2)
    lefts = np.arange(0, error.shape[1] - width + 1, CROP // 2)
    t, l = tops[:, None], lefts[None]
    boxes = sums[t + height, l + width] - sums[t, l + width] - sums[t + height, l] + sums[t, l]
    top, left = np.unravel_index(boxes.argmax(), boxes.shape)
    return int(tops[top]), int(lefts[left])


def _crop(frame: np.ndarray, corner: tuple[int, int]) -> str:
    top, left = corner
    return _data_uri(np.ascontiguousarray(frame[top : top + CROP, left : left + CROP]), "png")


def plot(series: dict[str, list[float | None]], numbers: Sequence[int], title: str) -> str:
    """Lines over frame numbers as inline SVG; None, an infinite PSNR, is drawn at the top."""
    finite = [v for values in series.values() for v in values if v is not None]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    low, high = np.floor(low), max(np.ceil(high), np.floor(low) + 1)
    first, last = numbers[0], max(numbers[-1], numbers[0] + 1)

    def x_of(n: float) -> str:
        return f"{44 + 668 * (n - first) / (last - first):.1f}"

    def y_of(value: float | None) -> float:
        return 180 - 160 * ((high if value is None else value) - low) / (high - low)

    parts = []
    for tick in np.linspace(low, high, 5):
        parts.append(f'<path d="M44 {y_of(tick):.1f}H712" class="grid"/>')
        parts.append(f'<text x="40" y="{y_of(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in sorted({first, (first + last) // 2, last}):
        parts.append(f'<text x="{x_of(tick)}" y="196" text-anchor="middle">{tick}</text>')
    legend = ""
    for i, (name, values) in enumerate(series.items()):
        color = COLORS[i % len(COLORS)]
        points = (f"{x_of(n)},{y_of(v):.1f}" for n, v in zip(numbers, values, strict=True))
        parts.append(f'<polyline points="{" ".join(points)}" stroke="{color}"/>')
        legend += f'<span><i style="background:{color}"></i>{escape(name)}</span>'
    return (
        f'<figure class="plot"><figcaption>{escape(title)} {legend}</figcaption>'
        f'<svg viewBox="0 0 720 200" role="img">{"".join(parts)}</svg></figure>'
    )


# ---- the page


def render(summary: dict, results: Results, originals: Originals) -> str:
    """The page as one HTML document; originals gives the frames of a clip."""
    sections = []
    for dataset in dict.fromkeys(row["dataset"] for row in summary["rows"]):
        of_set = [row for row in summary["rows"] if row["dataset"] == dataset]
        by_clip: dict[str, list[tuple[Unit, dict]]] = {}
        for unit, result in results:
            if unit.dataset == dataset:
                by_clip.setdefault(unit.clip.name, []).append((unit, result))
        sections += [f"<h2>{escape(dataset)}</h2>", *_tables(of_set, columns(summary))]
        if all(len(group[0][0].clip.scored) == 1 for group in by_clip.values()):
            series: dict[str, list[float | None]] = {}
            for unit, result in (pair for group in by_clip.values() for pair in group):
                series.setdefault(unit.method, []).append(result["scores"]["psnr_y"][0])
            sections.append(plot(series, range(1, len(by_clip) + 1), "PSNR Y in dB, by clip"))
        form = LARGE if len(by_clip) <= LISTED else SMALL
        for name in list(by_clip)[:PICTURED]:
            sections.append(_clip(name, by_clip[name], originals, form))
        if len(by_clip) > PICTURED:
            sections.append(f"<p>Pictures of the first {PICTURED} of {len(by_clip)} clips.</p>")
    items = "".join(f"<li>{escape(note)}</li>" for note in notes(summary))
    body = f"<h1>Evaluation</h1><ul class=notes>{items}</ul>{''.join(sections)}"
    return TEMPLATE.read_text().replace("BODY", body)


def _tables(of_set: list[dict], names: list[str]) -> Iterator[str]:
    """Means of the methods, then every clip."""
    titles = [SCORES[name][0] for name in names]
    means = [
        [row["method"], over, *(cell(name, scores) for name in names)]
        for row in of_set
        for over, scores in (("clips", row), ("frames", row["frame_mean"]))
    ]
    yield _table(["method", "mean over", *titles], means)
    clips = [
        [clip, row["method"], *(cell(name, row["per_clip"][clip]) for name in names)]
        for clip in of_set[0]["per_clip"]
        for row in of_set
    ]
    yield _table(["clip", "method", *titles], clips)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A sortable table: two columns of words, then numbers."""
    kinds = ["", "", *[" class=number"] * (len(header) - 2)]
    heads = zip(kinds, header, strict=True)
    head = "".join(f"<th{kind}><button>{escape(title)}</button></th>" for kind, title in heads)
    body = ""
    for line in lines:
        cells = (f"<td{kind}>{escape(x)}</td>" for kind, x in zip(kinds, line, strict=True))
        body += f"<tr>{''.join(cells)}</tr>"
    return f"<div class=scroll><table><thead><tr>{head}<tbody>{body}</tbody></table></div>"


def _clip(name: str, group: list, originals: Originals, form: dict[str, Any]) -> str:
    """Plot, slider, crops and worst frames of one clip; form is that of full frames."""
    clip: TestClip = group[0][0].clip
    wanted = {clip.middle} | {result["worst"] for _, result in group}
    shown = enumerate(islice(originals(clip), max(wanted) + 1))
    frames = {i: frame for i, frame in shown if i in wanted}
    enlarged = {unit.method: _kept(unit, MIDDLE_PICTURE) for unit, _ in group}
    parts = [f"<h3>{escape(name)}</h3>"]
    if len(clip.scored) > 1:
        series = {unit.method: result["scores"]["psnr_y"] for unit, result in group}
        parts.append(plot(series, group[0][1]["frames"], "PSNR Y in dB, by frame"))
    everything = {**enlarged, "original": frames[clip.middle]}
    parts.append(_slider(everything, clip.middle, form))
    corner = hardest(frames[clip.middle], next(iter(enlarged.values())))
    where = f"frame {clip.middle}, {CROP} pixels square, where {next(iter(enlarged))} errs most"
    parts.append(_crops(where, {method: _crop(x, corner) for method, x in everything.items()}))
    worst: dict[str, str] = {}
    for unit, result in group:
        index = result["worst"]
        frame = _kept(unit, WORST_PICTURE)
        value = result["scores"]["psnr_rgb"][result["frames"].index(index)]
        corner = hardest(frames[index], frame)
        psnr = "inf" if value is None else f"{value:.2f}"
        worst[f"{unit.method}, frame {index}, {psnr} dB"] = _crop(frame, corner)
        worst[f"original of that, for {unit.method}"] = _crop(frames[index], corner)
    parts.append(_crops("worst frames (PSNR RGB), where each errs most", worst))
    return f"<section>{''.join(parts)}</section>"


def _kept(unit: Unit, suffix: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(unit.file(suffix).read_bytes())))


def _slider(frames: dict[str, np.ndarray], index: int, form: dict[str, Any]) -> str:
    """Two of the frames on top of each other, with a movable border between them."""
    names = list(frames)
    left, right = names[0], names[-2] if len(names) > 2 else names[-1]
    height, width = frames[left].shape[:2]
    pictures = "".join(
        f'<img src="{_full(frame, **form)}" alt="{escape(name)}" width={width} height={height} '
        f'data-name="{escape(name)}">'
        for name, frame in frames.items()
    )

    def choice(side: str, chosen: str) -> str:
        options = (
            f"<option{' selected' if name == chosen else ''}>{escape(name)}</option>"
            for name in names
        )
        return f'<select aria-label="{side}">{"".join(options)}</select>'

    return (
        f"<figure class=compare><figcaption>frame {index}: {choice('left', left)} "
        f"{choice('right', right)}</figcaption><div class=stack>{pictures}</div>"
        '<input type=range min=0 max=100 value=50 aria-label="border"></figure>'
    )


def _crops(title: str, crops: dict[str, str]) -> str:
    figures = "".join(
        f'<figure><img src="{uri}" alt=""><figcaption>{escape(name)}</figcaption></figure>'
        for name, uri in crops.items()
    )
    return f"<p>{escape(title)}</p><div class=crops>{figures}</div>"
