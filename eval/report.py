"""Rows of an evaluation, the tables on stdout, and the paper's tables with ours."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from eval.datasets import incomplete, plain
from eval.units import Unit
from mana_triton.resize import SCALE

SCORES = {  # name -> title, decimals
    "psnr_rgb": ("PSNR RGB", 3),
    "ssim_rgb": ("SSIM RGB", 4),
    "psnr_y": ("PSNR Y", 3),
    "ssim_y": ("SSIM Y", 4),
    "lpips": ("LPIPS", 4),
    "tof": ("tOF", 3),
    "warping_error": ("warping", 3),
}
PROTOCOLS = {"paper, RGB": ("psnr_rgb", "ssim_rgb", "lpips"), "field, Y": ("psnr_y", "ssim_y")}
KERNELS = {"paper": "pil_bicubic", "field": "matlab_bicubic"}  # behind their published tables
FROM_DISK, UNKNOWN = "LR from disk", "LR unknown"
PAPER = json.loads(Path(__file__).with_name("paper.json").read_text())
MEMORY_SIZES = tuple(map(int, PAPER["Table 2"]))
LISTED = 40  # clips of a set that the tables list one by one
NAMED = 5  # clips that a note lists

Results = Sequence[tuple[Unit, dict]]


# ---- rows


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def rows(results: Results, about: dict[str, dict]) -> list[dict]:
    """One row per data set and method, each with its clips.

    Args:
        results: of every clip and method.
        about: what `methods.describe` says about each method.
    """
    groups: dict[tuple[str, str], list[tuple[Unit, dict]]] = {}
    for unit, result in results:
        groups.setdefault((unit.dataset, unit.method), []).append((unit, result))
    return [_row(group) | about[method] for (_, method), group in groups.items()]


def _row(group: list[tuple[Unit, dict]]) -> dict:
    """The means of one method over the clips of one set."""
    first = group[0][0]
    per_clip = {
        unit.clip.name: {name: _mean(values) for name, values in result["scores"].items()}
        | {"perfect_frames": _perfect(result["scores"])}
        for unit, result in group
    }
    names = list(group[0][1]["scores"])
    frames = {name: [x for _, r in group for x in r["scores"][name]] for name in names}
    perfect = {"perfect_frames": _perfect(frames)}
    hashes = [result["lr_sha256"] for _, result in group]
    lr_hash = hashlib.sha256("".join(hashes).encode()).hexdigest() if all(hashes) else None
    return {
        "dataset": first.dataset,
        "method": first.method,
        "clips": len(group),
        "frames": len(frames["psnr_y"]),
        **perfect,
        "incomplete": incomplete(first.dataset, [unit.clip for unit, _ in group]),
        "degradation": _degradation(first),
        **{name: _mean([scores[name] for scores in per_clip.values()]) for name in names},
        "frame_mean": {name: _mean(values) for name, values in frames.items()} | perfect,
        "lr_sha256": lr_hash,
        "weights_sha256": first.weights,
        "per_clip": per_clip,
    }


def _perfect(scores: dict[str, list]) -> int:
    """Number of frames that equal their originals: they have no PSNR, its mean leaves them out."""
    return sum(value is None for value in scores["psnr_rgb"])


def _degradation(unit: Unit) -> str:
    """Where the low-resolution frames come from."""
    if unit.output:
        return UNKNOWN
    if unit.lr:
        return FROM_DISK
    crf = unit.protocol.crf
    return unit.protocol.degradation + (f" + x264 crf {crf}" if crf is not None else "")


# ---- tables


def columns(summary: dict) -> list[str]:
    """Names of the scores in the rows."""
    return [name for name in SCORES if name in summary["rows"][0]]


def cell(name: str, scores: dict) -> str:
    """A score as text."""
    if (value := scores[name]) is not None:
        return f"{value:.{SCORES[name][1]}f}"
    return "inf" if name.startswith("psnr") and scores["perfect_frames"] else "-"


def notes(summary: dict) -> list[str]:
    """The protocol in words."""
    lines = [
        f"low resolution: {_low_resolution(summary)}; scores of 8-bit frames, "
        f"{summary['crop_border']} pixels of border cropped; mean over frames, then over clips",
        f"window ends: {summary['padding']}",
        f"LPIPS: {summary['lpips'] or 'not computed, --lpips-backbone FILE enables it'}",
        f"commit {summary['commit'] or 'unknown'}, torch {summary['versions']['torch']}",
    ]
    for row in summary["rows"]:
        if row["lr_sha256"]:
            lines.append(f"{row['dataset']}: sha256 of the low-resolution set {row['lr_sha256']}")
        name = f"{row['dataset']}, {row['method']}"
        if "dtype" in row:
            weights = row["weights_sha256"]
            hashed = f", sha256 of the weights {weights}" if weights else ""
            lines.append(f"{name}: {row['dtype']} on {row['device']}{hashed}")
        if row["perfect_frames"]:
            clips = {clip: x["perfect_frames"] for clip, x in row["per_clip"].items()}
            named = [f"{n} of {clip}" for clip, n in clips.items() if n]
            named[NAMED:] = ["..."] * (len(named) > NAMED)
            lines.append(
                f"{name}: {row['perfect_frames']} frames equal their originals "
                f"({', '.join(named)}); they have no PSNR, its means leave them out"
            )
        if row["incomplete"]:
            lines.append(row["incomplete"])
    for whose, kernel in KERNELS.items():
        others = sorted({row["degradation"] for row in summary["rows"]} - {kernel})
        if others:
            lines.append(
                f"the {whose}'s tables are made with {kernel}: do not compare them with rows of "
                f"{', '.join(others)}"
            )
    return list(dict.fromkeys(lines))


def _low_resolution(summary: dict) -> str:
    """How the input frames of the methods were made."""
    texts = {
        FROM_DISK: f"of {', '.join(summary['lr_from_disk'])} read from disk, 8 bits",
        UNKNOWN: "of folder: methods unknown, their frames were read from disk",
    }
    kinds = dict.fromkeys(row["degradation"] for row in summary["rows"])
    for kind in kinds:
        kernel, plus, codec = kind.partition(" + ")
        texts.setdefault(kind, f"{kernel} x1/{SCALE}{plus}{codec}, 8 bits")
    return "; ".join(texts[kind] for kind in kinds)


def _stdout(width: int) -> Console:
    """A console that prints names as they are."""
    return Console(width=width, markup=False, emoji=False, highlight=False)


def show(summary: dict) -> None:
    """Scores of clips, then each set's row in the paper's and in the field's protocol."""
    names = columns(summary)
    console = _stdout(120)
    table = Table("clip", "method", *(SCORES[name][0] for name in names))
    for dataset in dict.fromkeys(row["dataset"] for row in summary["rows"]):
        of_set = [row for row in summary["rows"] if row["dataset"] == dataset]
        clips = of_set[0]["per_clip"] if of_set[0]["clips"] <= LISTED else []
        for clip in [*clips, None]:
            for row in of_set:
                scores = row["per_clip"][clip] if clip else row
                cells = (cell(name, scores) for name in names)
                table.add_row(clip or f"mean of {dataset}", row["method"], *cells)
    console.print(table)
    both = Table("set", "method", "protocol", "PSNR", "SSIM", "LPIPS", "over all frames")
    for row in summary["rows"]:
        for title, scores in PROTOCOLS.items():
            cells = [cell(name, row) for name in scores] + [""] * (3 - len(scores))
            frames = " ".join(cell(name, row["frame_mean"]) for name in scores)
            label = f"{title}, {row['degradation']}"
            both.add_row(row["dataset"], row["method"], label, *cells, frames)
    console.print(both)
    for note in notes(summary):
        console.print(note, soft_wrap=True)


# ---- the paper's tables


def _published(cells: dict[str, list[float]], dataset: str) -> str:
    if dataset not in cells:
        return "-"
    psnr, ssim, lpips = cells[dataset]
    return f"{psnr:.2f} {ssim:.4f} {lpips:.4f}"


def _measured(row: dict | None) -> str:
    if row is None:
        return "-"
    psnr = cell("psnr_rgb", row) if row["psnr_rgb"] is None else f"{row['psnr_rgb']:.2f}"
    part = f" (part: {row['clips']} clips, {row['frames']} frames)" if row["incomplete"] else ""
    return f"{psnr} {cell('ssim_rgb', row)} {cell('lpips', row)}{part}"


def paper_table(title: str, summary: dict) -> tuple[list[str], list[list[str]]]:
    """Header and lines of "Table 1" or "Table 2": the published cells, then ours.

    Table 1 lists methods. Table 2 lists sizes of the memory; ours are the mana: methods whose
    network has that size. Sets that the paper does not have become further columns.
    """
    published = PAPER[title]
    known = list(next(iter(published.values())))
    names = {plain(name): name for name in known}
    ours: dict[str, dict[str, dict]] = {}  # method -> set -> row
    for row in summary["rows"]:
        dataset = names.setdefault(plain(row["dataset"]), row["dataset"])
        ours.setdefault(row["method"], {})[dataset] = row
    sets = list(names.values())

    def here(method: str) -> list[str]:
        return [f"{method} (here)", *(_measured(ours[method].get(name)) for name in sets)]

    lines = []
    for key, cells in published.items():
        label = "MANA (paper)" if title == "Table 2" else f"{key} (paper)"
        line = [label, *(_published(cells, name) for name in sets)]
        if title == "Table 1":
            lines.append(line)
            continue
        sizes = {m: next(iter(r.values())).get("memory_slots") for m, r in ours.items()}
        fitting = [m for m, n in sizes.items() if m.startswith("mana:") and n == int(key)]
        lines += [[key, *x] for x in (line, *map(here, fitting))]
    if title == "Table 1":
        return ["method", *sets], lines + [here(method) for method in ours]
    return ["memory", "method", *sets], lines


def show_paper_table(title: str, summary: dict) -> None:
    """One of the paper's tables on stdout."""
    header, lines = paper_table(title, summary)
    table = Table(*header, title=f"{title}: PSNR, SSIM, LPIPS in RGB")
    for line in lines:
        table.add_row(*line)
    console = _stdout(160)
    console.print(table)
    console.print(
        f"The paper's low resolution is pil_bicubic x1/{SCALE}, of PFNL and TGA after a blur (BD); "
        f"here it is {_low_resolution(summary)}. Here {summary['crop_border']} pixels of border "
        "are cropped; the paper names no number.",
        soft_wrap=True,
    )
    if title == "Table 2":
        other = [
            f"{row['method']} ({row['memory_slots']})"
            for row in summary["rows"]
            if row.get("memory_slots", 0) not in MEMORY_SIZES
        ]
        if other:
            text = ", ".join(dict.fromkeys(other))
            console.print(f"other memory sizes, not in the table: {text}", soft_wrap=True)
