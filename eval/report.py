"""What an evaluation shows: rows, tables on stdout, the paper's tables, and a page with pictures.

The published cells are only those that we could check; every other cell of the paper's tables is
shown as missing. The page is one file that loads nothing: pictures are inside it, crops without
loss, whole frames as JPEG of quality 95. Of a set of more than 40 clips whole frames are at most
640 pixels wide and of quality 75, and of more than 400 only the first 400 have pictures.
"""

import hashlib
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from eval.datasets import Footage, incomplete, plain
from mana_triton.resize import SCALE

if TYPE_CHECKING:
    from eval.run import Unit

SCORES = {  # name -> title, decimals, larger is better
    "psnr_rgb": ("PSNR RGB", 3, True),
    "ssim_rgb": ("SSIM RGB", 4, True),
    "psnr_y": ("PSNR Y", 3, True),
    "ssim_y": ("SSIM Y", 4, True),
    "lpips": ("LPIPS", 4, False),
    "tof": ("tOF", 3, False),
}
ROWS = {"paper, RGB": ("psnr_rgb", "ssim_rgb", "lpips"), "field, Y": ("psnr_y", "ssim_y")}
KERNELS = {"paper": "pil_bicubic", "field": "matlab_bicubic"}  # how their tables' inputs were made
FROM_DISK, UNKNOWN = "LR from disk", "LR unknown"
TABLE_SETS = ("Vimeo-90K", "Vimeo-90K-Motion", "Vid4", "SPMCS", "Parkour")
BLURRED = "inputs blurred, then shrunk (BD)"
# PSNR and SSIM in RGB; the paper's authors ran every method themselves
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "TOFlow": {"Vimeo-90K": (32.96, 0.9041)},
    f"PFNL, {BLURRED}": {},
    f"TGA, {BLURRED}": {},
    "EDVR": {"Vimeo-90K": (35.68, 0.9372)},
    "MANA": {"Vimeo-90K": (34.84, 0.9404), "Vid4": (25.21, 0.7816)},
}
MEMORY_SIZES = (0, 128, 256, 512, 1024)
MISSING = "missing"
LISTED = 40  # clips of a set that stdout lists, and that the page shows in full size
PICTURED = 400  # clips of a set whose pictures the page shows
SMALL = {"width": 640, "quality": 75, "subsampling": 2}
LARGE = {"width": None, "quality": 95, "subsampling": 0}
NAMED = 5  # clips that a note lists
CROP = 64  # pixels of the original in a crop's side
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")

Results = Sequence[tuple["Unit", dict]]


# ---- rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def rows(results: Results, about: dict[str, dict]) -> list[dict]:
    """One row per data set and method, each with its clips; see `perfect` for means of PSNR."""
    groups: dict[tuple[str, str], list[tuple[Unit, dict]]] = {}
    for unit, result in results:
        groups.setdefault((unit.dataset, unit.method), []).append((unit, result))
    table = []
    for (dataset, method), group in groups.items():
        per_clip = {
            unit.clip.name: {name: _mean(values) for name, values in result["scores"].items()}
            | {"perfect_frames": _perfect(result["scores"])}
            for unit, result in group
        }
        names = list(group[0][1]["scores"])
        perfect = {"perfect_frames": sum(_perfect(result["scores"]) for _, result in group)}
        first = group[0][0]
        frames = {name: [x for _, r in group for x in r["scores"][name]] for name in names}
        hashes = [result["lr_sha256"] for _, result in group]
        known = all(hashes)
        table.append(
            {"dataset": dataset, "method": method, "clips": len(group)}
            | {"frames": len(frames["psnr_y"]), **perfect}
            | {"incomplete": incomplete(dataset, [unit.clip for unit, _ in group])}
            | {"degradation": _made_by(first)}
            | {name: _mean([scores[name] for scores in per_clip.values()]) for name in names}
            | {"frame_mean": {name: _mean(values) for name, values in frames.items()} | perfect}
            | {"lr_sha256": hashlib.sha256("".join(hashes).encode()).hexdigest() if known else None}
            | {"weights_sha256": first.weights, **about[method], "per_clip": per_clip}
        )
    return table


def _perfect(scores: dict[str, list]) -> int:
    """Number of frames that equal their originals: they have no PSNR, and its mean lacks them."""
    return sum(value is None for value in scores["psnr_rgb"])


def _made_by(unit: "Unit") -> str:
    """Where the low-resolution frames come from."""
    if unit.output:
        return UNKNOWN
    if unit.lr:
        return FROM_DISK
    crf = unit.protocol.crf
    return unit.protocol.degradation + (f" + x264 crf {crf}" if crf is not None else "")


def _cell(name: str, scores: dict) -> str:
    if (value := scores[name]) is not None:
        return f"{value:.{SCORES[name][1]}f}"
    return "inf" if name.startswith("psnr") and scores["perfect_frames"] else "-"


def _columns(summary: dict) -> list[str]:
    """The scores that there are; LPIPS always has its column."""
    return [name for name in SCORES if name in summary["rows"][0]]


def _notes(summary: dict) -> list[str]:
    """The protocol in words."""
    lines = [
        f"low resolution: {_low_resolution(summary)}; scores of 8-bit frames, "
        f"{summary['crop_border']} pixels of border cropped; mean over frames, then over clips",
        f"window ends: {summary['padding']}",
        f"LPIPS: {summary['lpips'] or 'not computed, --lpips-backbone FILE gives it'}",
        f"commit {summary['commit'] or 'unknown'}, torch {summary['versions']['torch']}",
    ]
    for row in summary["rows"]:
        if row["lr_sha256"]:
            line = f"{row['dataset']}: sha256 of the low-resolution set {row['lr_sha256']}"
            lines += [line] if line not in lines else []
        name = f"{row['dataset']}, {row['method']}"
        if "dtype" in row:
            hashed = f", sha256 of the weights {row['weights_sha256']}"
            hashed = hashed if row["weights_sha256"] else ""
            lines.append(f"{name}: {row['dtype']} on {row['device']}{hashed}")
        if row["perfect_frames"]:
            clips = {clip: x["perfect_frames"] for clip, x in row["per_clip"].items()}
            named = [f"{n} of {clip}" for clip, n in clips.items() if n]
            named[NAMED:] = ["..."] * (len(named) > NAMED)
            lines.append(
                f"{name}: {row['perfect_frames']} frames equal their originals "
                f"({', '.join(named)}); they have no PSNR, and its means are over the others"
            )
        if row["incomplete"]:
            lines += [row["incomplete"]] if row["incomplete"] not in lines else []
    for whose, kernel in KERNELS.items():
        others = sorted({row["degradation"] for row in summary["rows"]} - {kernel})
        if others:
            lines.append(
                f"the {whose}'s tables are made with {kernel}: do not compare them with rows of "
                f"{', '.join(others)}"
            )
    return lines


def _low_resolution(summary: dict) -> str:
    """How the frames that methods were given came about."""
    texts = {
        FROM_DISK: f"of {', '.join(summary['lr_from_disk'])} read from disk, 8 bits",
        UNKNOWN: "of folder: methods unknown, their frames were read from disk",
    }
    kinds = dict.fromkeys(row["degradation"] for row in summary["rows"])
    for kind in kinds:
        kernel, plus, codec = kind.partition(" + ")
        texts.setdefault(kind, f"{kernel} x1/{SCALE}{plus}{codec}, 8 bits")
    return "; ".join(texts[kind] for kind in kinds)


# ---- tables on stdout


def _stdout(width: int) -> Console:
    """A console that prints names as they are."""
    return Console(width=width, markup=False, emoji=False, highlight=False)


def show(summary: dict) -> None:
    """Scores of clips, then each set's row as the paper states it and as the field does."""
    columns = _columns(summary)
    console = _stdout(120)
    table = Table("clip", "method", *(SCORES[name][0] for name in columns))
    for dataset in dict.fromkeys(row["dataset"] for row in summary["rows"]):
        of_set = [row for row in summary["rows"] if row["dataset"] == dataset]
        clips = of_set[0]["per_clip"] if of_set[0]["clips"] <= LISTED else []
        for clip in [*clips, None]:
            for row in of_set:
                scores = row["per_clip"][clip] if clip else row
                cells = (_cell(name, scores) for name in columns)
                table.add_row(clip or f"mean of {dataset}", row["method"], *cells)
    console.print(table)
    both = Table("set", "method", "row", "PSNR", "SSIM", "LPIPS", "over all frames")
    for row in summary["rows"]:
        for title, names in ROWS.items():
            cells = [_cell(name, row) for name in names] + [""] * (3 - len(names))
            frames = " ".join(_cell(name, row["frame_mean"]) for name in names)
            label = f"{title}, {row['degradation']}"
            both.add_row(row["dataset"], row["method"], label, *cells, frames)
    console.print(both)
    for note in _notes(summary):
        console.print(note, soft_wrap=True)


def _measured(row: dict | None) -> str:
    if row is None:
        return "not measured"
    psnr = _cell("psnr_rgb", row) if row["psnr_rgb"] is None else f"{row['psnr_rgb']:.2f}"
    part = f" (part: {row['clips']} clips, {row['frames']} frames)" if row["incomplete"] else ""
    return f"{psnr} {row['ssim_rgb']:.4f} {_cell('lpips', row)}{part}"


def table1(summary: dict) -> tuple[list[str], list[list[str]]]:
    """The paper's Table 1: published cells, then ours. PSNR and SSIM in RGB, and LPIPS."""
    lines = []
    for method, cells in PUBLISHED.items():
        found = (cells.get(name) for name in TABLE_SETS)
        texts = [f"{c[0]:.2f} {c[1]:.4f} {MISSING}" if c else MISSING for c in found]
        lines.append([f"{method} (published)", *texts])
    for method in dict.fromkeys(row["method"] for row in summary["rows"]):
        ours = {plain(r["dataset"]): r for r in summary["rows"] if r["method"] == method}
        texts = [_measured(ours.get(plain(name))) for name in TABLE_SETS]
        lines.append([f"{method} (measured)", *texts])
    return ["method", *TABLE_SETS], lines


def table2(summary: dict) -> tuple[list[str], list[list[str]]]:
    """The paper's Table 2: memory sizes. Ours are the mana: methods with a memory of that size."""
    sets = list(dict.fromkeys(row["dataset"] for row in summary["rows"]))
    lines = []
    for size in MEMORY_SIZES:
        lines.append([str(size), "paper (published)", *([MISSING] * len(sets))])
        fitting = [
            row
            for row in summary["rows"]
            if row["method"].startswith("mana:") and row["memory_slots"] == size
        ]
        for method in dict.fromkeys(row["method"] for row in fitting) or [None]:
            found = {row["dataset"]: row for row in fitting if row["method"] == method}
            texts = [_measured(found.get(name)) for name in sets]
            lines.append([str(size), f"{method} (measured)" if method else "measured", *texts])
    return ["memory", "source", *sets], lines


def show_paper_table(title: str, table: tuple[list[str], list[list[str]]], summary: dict) -> None:
    """One of the paper's tables on stdout."""
    header, lines = table
    out = Table(*header, title=f"{title}: PSNR, SSIM in RGB, LPIPS")
    for line in lines:
        out.add_row(*line)
    console = _stdout(150)
    console.print(out)
    console.print(
        f"{MISSING}: the paper's value is not in this project's records. The paper's low "
        f"resolution is pil_bicubic x1/{SCALE}, here it is {_low_resolution(summary)}. Here "
        f"{summary['crop_border']} pixels of border are cropped; the paper names no number.",
        soft_wrap=True,
    )
    other = dict.fromkeys(
        f"{row['method']} ({row['memory_slots']})"
        for row in summary["rows"]
        if row.get("memory_slots") is not None and row["memory_slots"] not in MEMORY_SIZES
    )
    if title == "Table 2" and other:
        console.print(
            f"of other memory sizes, not in the table: {', '.join(other)}", soft_wrap=True
        )


# ---- pictures


def _data_uri(frame: np.ndarray, form: str, **options) -> str:
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, form, **options)
    return f"data:image/{form};base64,{b64encode(buffer.getvalue()).decode()}"


def _whole(frame: np.ndarray, width: int | None, **options: int) -> str:
    """A frame as JPEG, shrunk if it is wider than that."""
    if width and frame.shape[1] > width:
        height = round(frame.shape[0] * width / frame.shape[1])
        frame = np.asarray(Image.fromarray(frame).resize((width, height)))
    return _data_uri(frame, "jpeg", **options)


def hardest(original: np.ndarray, enlarged: np.ndarray) -> tuple[int, int]:
    """Corner of the crop, on a grid of half its side, where the squared error is largest."""
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


def _frames_at(frames: Iterator[np.ndarray], wanted: set[int]) -> dict[int, np.ndarray]:
    found = {}
    for index, frame in enumerate(frames):
        if index in wanted:
            found[index] = frame
        if len(found) == len(wanted):
            break
    return found


def plot(series: dict[str, list[float | None]], numbers: Sequence[int], what: str) -> str:
    """Lines over frame numbers as an inline SVG; what has no value, being infinite, is on top."""
    finite = [v for values in series.values() for v in values if v is not None]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    low, high = np.floor(low), max(np.ceil(high), np.floor(low) + 1)
    first, last = numbers[0], max(numbers[-1], numbers[0] + 1)
    parts = []
    for tick in np.linspace(low, high, 5):
        y = 180 - 160 * (tick - low) / (high - low)
        parts.append(f'<path d="M44 {y:.1f}H712" class="grid"/>')
        parts.append(f'<text x="40" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in sorted({first, (first + last) // 2, last}):
        x = 44 + 668 * (tick - first) / (last - first)
        parts.append(f'<text x="{x:.1f}" y="196" text-anchor="middle">{tick}</text>')
    for color, values in zip(_colors(len(series)), series.values(), strict=True):
        points = [
            f"{44 + 668 * (n - first) / (last - first):.1f},"
            f"{180 - 160 * ((high if v is None else v) - low) / (high - low):.1f}"
            for n, v in zip(numbers, values, strict=True)
        ]
        parts.append(f'<polyline points="{" ".join(points)}" stroke="{color}"/>')
    legend = "".join(
        f'<span><i style="background:{color}"></i>{escape(name)}</span>'
        for color, name in zip(_colors(len(series)), series, strict=True)
    )
    return (
        f'<figure class="plot"><figcaption>{escape(what)} {legend}</figcaption><svg '
        f'viewBox="0 0 720 200" role="img" aria-label="{escape(what)}">{"".join(parts)}</svg>'
        "</figure>"
    )


def _colors(number: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(number)]


# ---- the page


def page(summary: dict, results: Results, originals: Callable[[Footage], Iterator]) -> str:
    """The page as one HTML document; originals gives the frames of a clip."""
    sections = []
    for dataset in dict.fromkeys(row["dataset"] for row in summary["rows"]):
        of_set = [row for row in summary["rows"] if row["dataset"] == dataset]
        sections.append(f"<h2>{escape(dataset)}</h2>{_means(of_set, summary)}")
        by_clip: dict[str, list[tuple[Unit, dict]]] = {}
        for unit, result in results:
            if unit.dataset == dataset:
                by_clip.setdefault(unit.clip.name, []).append((unit, result))
        sections.append(_clips(of_set, summary))
        if all(len(group[0][0].clip.scored) == 1 for group in by_clip.values()):
            sections.append(_set_plot(by_clip))
        form = LARGE if len(by_clip) <= LISTED else SMALL
        pictured = list(by_clip)[:PICTURED]
        sections += [_clip(name, by_clip[name], originals, form) for name in pictured]
        if len(by_clip) > PICTURED:
            sections.append(f"<p>Pictures of the first {PICTURED} of {len(by_clip)} clips.</p>")
    notes = "".join(f"<li>{escape(note)}</li>" for note in _notes(summary))
    body = f"<h1>Evaluation</h1><ul class=notes>{notes}</ul>{''.join(sections)}"
    return PAGE.replace("STYLE", STYLE).replace("SCRIPT", SCRIPT).replace("BODY", body)


def _html_table(header: Sequence[str], lines: Sequence[Sequence[str]], words: int) -> str:
    """A sortable table whose first columns are words and whose others are numbers."""
    numeric = [" class=number" if i >= words else "" for i in range(len(header))]
    buttons = "".join(
        f"<th{kind}><button>{escape(title)}</button></th>"
        for kind, title in zip(numeric, header, strict=True)
    )
    body = ""
    for line in lines:
        cells = "".join(f"<td{k}>{escape(x)}</td>" for k, x in zip(numeric, line, strict=True))
        body += f"<tr>{cells}</tr>"
    head = f"<thead><tr>{buttons}</tr></thead>"
    return f"<div class=scroll><table>{head}<tbody>{body}</tbody></table></div>"


def _means(of_set: list[dict], summary: dict) -> str:
    columns = _columns(summary)
    lines = [
        [row["method"], over, *(_cell(name, scores) for name in columns)]
        for row in of_set
        for over, scores in (("clips", row), ("frames", row["frame_mean"]))
    ]
    return _html_table(["method", "mean over", *(SCORES[n][0] for n in columns)], lines, 2)


def _clips(of_set: list[dict], summary: dict) -> str:
    columns = _columns(summary)
    lines = [
        [clip, row["method"], *(_cell(name, row["per_clip"][clip]) for name in columns)]
        for clip in of_set[0]["per_clip"]
        for row in of_set
    ]
    return _html_table(["clip", "method", *(SCORES[n][0] for n in columns)], lines, 2)


def _set_plot(by_clip: dict[str, list]) -> str:
    series: dict[str, list[float | None]] = {}
    for group in by_clip.values():
        for unit, result in group:
            series.setdefault(unit.method, []).append(result["scores"]["psnr_y"][0])
    return plot(series, range(1, len(by_clip) + 1), "PSNR Y in dB, by clip")


def _clip(
    name: str, group: list, originals: Callable[[Footage], Iterator], form: dict[str, Any]
) -> str:
    """Plot, slider, crops and worst frames of one clip; form is that of whole frames."""
    footage: Footage = group[0][0].clip
    middle = footage.middle
    wanted = {middle} | {result["worst"] for _, result in group}
    frames = _frames_at(originals(footage), wanted)
    enlarged = {
        unit.method: np.asarray(Image.open(BytesIO(unit.file(".middle.png").read_bytes())))
        for unit, _ in group
    }
    parts = [f"<h3>{escape(name)}</h3>"]
    if len(footage.scored) > 1:
        series = {unit.method: result["scores"]["psnr_y"] for unit, result in group}
        parts.append(plot(series, group[0][1]["frames"], "PSNR Y in dB, by frame"))
    parts.append(_slider({**enlarged, "original": frames[middle]}, middle, form))
    corner = hardest(frames[middle], next(iter(enlarged.values())))
    crops = {unit_name: _crop(frame, corner) for unit_name, frame in enlarged.items()}
    crops["original"] = _crop(frames[middle], corner)
    where = f"frame {middle}, {CROP} pixels square, where {next(iter(enlarged))} errs most"
    parts.append(_crops(where, crops))
    worst: dict[str, str] = {}
    for unit, result in group:
        index = result["worst"]
        frame = np.asarray(Image.open(BytesIO(unit.file(".worst.png").read_bytes())))
        value = result["scores"]["psnr_rgb"][result["frames"].index(index)]
        corner = hardest(frames[index], frame)
        psnr = "inf" if value is None else f"{value:.2f}"
        worst[f"{unit.method}, frame {index}, {psnr} dB"] = _crop(frame, corner)
        worst[f"original of that, for {unit.method}"] = _crop(frames[index], corner)
    parts.append(_crops("worst frames (PSNR RGB), where each errs most", worst))
    return f"<section>{''.join(parts)}</section>"


def _slider(frames: dict[str, np.ndarray], index: int, form: dict[str, Any]) -> str:
    """Two of the frames over each other, with a movable border between them."""
    names = list(frames)
    before, after = names[0], names[-2] if len(names) > 2 else names[-1]
    height, width = frames[before].shape[:2]
    pictures = "".join(
        f'<img src="{_whole(frame, **form)}" alt="{escape(name)}" width={width} height={height} '
        f'data-name="{escape(name)}">'
        for name, frame in frames.items()
    )

    def choice(label: str, chosen: str) -> str:
        options = "".join(
            f"<option{' selected' if name == chosen else ''}>{escape(name)}</option>"
            for name in names
        )
        return f'<select aria-label="{label}">{options}</select>'

    return (
        f"<figure class=compare><figcaption>frame {index}: {choice('left', before)} "
        f"{choice('right', after)}</figcaption><div class=stack>{pictures}</div>"
        '<input type=range min=0 max=100 value=50 aria-label="border between left and right">'
        "</figure>"
    )


def _crops(title: str, crops: dict[str, str]) -> str:
    figures = "".join(
        f'<figure><img src="{uri}" alt=""><figcaption>{escape(name)}</figcaption></figure>'
        for name, uri in crops.items()
    )
    return f"<p>{escape(title)}</p><div class=crops>{figures}</div>"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>Evaluation</title>
<style>STYLE</style>
<main>BODY</main>
<script>SCRIPT</script>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 1rem; }
section { border-top: 1px solid var(--line); margin-top: 2rem; }
.notes { font-size: .85rem; padding-left: 1.2rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
th { padding: 0; }
th button { all: unset; box-sizing: border-box; width: 100%; padding: .3rem .7rem;
  cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.number, th.number button { text-align: right; }
figure { margin: 1rem 0; }
.plot { overflow-x: auto; }
.plot svg { width: 100%; min-width: 480px; max-width: 900px; display: block; }
.plot text { font-size: 11px; fill: currentColor; }
.plot .grid { stroke: var(--line); }
.plot polyline { fill: none; stroke-width: 1.8; }
.plot span { margin-left: 1rem; white-space: nowrap; }
.plot i { display: inline-block; width: 1em; height: 3px; vertical-align: middle;
  margin-right: .3em; }
.compare { max-width: 900px; }
.compare select { font: inherit; max-width: 45%; }
.stack { position: relative; --cut: 50%; margin-top: .5rem; }
.stack img { display: none; width: 100%; height: auto; }
.stack img.left, .stack img.right { display: block; }
.stack img.right { position: absolute; top: 0; left: 0; clip-path: inset(0 0 0 var(--cut)); }
.stack::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--cut); width: 2px;
  margin-left: -1px; background: #fff; box-shadow: 0 0 2px #000; }
.stack img.left.right { position: static; clip-path: none; }
.compare input { width: 100%; margin: .5rem 0 0; }
.crops { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .8rem; }
.crops figure { margin: 0; }
.crops img { width: 100%; image-rendering: pixelated; display: block; }
.crops figcaption { font-size: .8rem; overflow-wrap: anywhere; }
@media (max-width: 600px) {
  table { font-size: .85rem; }
  td, th button { padding: .3rem .4rem; }
}
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const text = row => row.cells[column].textContent;
    const value = row => text(row) === "inf" ? Infinity : parseFloat(text(row));
    const numeric = body.rows[0].cells[column].className === "number";
    const order = numeric
      ? (a, b) => isNaN(value(a)) - isNaN(value(b)) || (value(a) - value(b) || 0) * (down ? -1 : 1)
      : (a, b) => text(a).localeCompare(text(b), undefined, {numeric: true}) * (down ? -1 : 1);
    body.append(...[...body.rows].sort(order));
  }));
}
for (const figure of document.querySelectorAll(".compare")) {
  const [left, right] = figure.querySelectorAll("select");
  const stack = figure.querySelector(".stack"), range = figure.querySelector("input");
  const show = () => {
    for (const image of stack.children) {
      image.classList.toggle("left", image.dataset.name === left.value);
      image.classList.toggle("right", image.dataset.name === right.value);
    }
    stack.style.setProperty("--cut", range.value + "%");
  };
  left.addEventListener("change", show);
  right.addEventListener("change", show);
  range.addEventListener("input", show);
  show();
}
"""
