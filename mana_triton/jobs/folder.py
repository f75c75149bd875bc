"""Which files a run is about, and a folder of videos: each in turn, one bad file stops nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from mana_triton.engine.upscaler import Upscaler
from mana_triton.files import WRITABLE_VIDEOS, is_picture, is_video, visible
from mana_triton.jobs import job, preview
from mana_triton.jobs.options import JobOptions
from mana_triton.jobs.resume import remove_leftovers
from mana_triton.resize import SCALE
from mana_triton.video.frame import MediaError, explained

Task = tuple[Path, Path]  # input, output


def videos_in(folder: Path) -> list[Path]:
    """The videos of a folder, in natural order; none if it is no folder."""
    if not folder.is_dir():
        return []
    return [file for file in visible(folder) if is_video(file) and file.is_file()]


def inputs(options: JobOptions) -> list[Path]:
    """The videos of a folder that are to be enlarged; none if the input is something else.

    Videos that are named as our results are left out if results come to the same folder.
    """
    output = options.output or options.input
    is_same = output.resolve() == options.input.resolve()
    found = videos_in(options.input)
    return [x for x in found if not (is_same and x.stem.endswith(f"_x{SCALE}"))]


def choose_weights(options: JobOptions) -> tuple[str, str]:
    """Name or file of the weights, and why."""
    if options.model:
        return options.model, "as -n says"
    if is_picture(options.input) or (options.input.is_dir() and not inputs(options)):
        return "tiny", "the default for pictures"
    return "real", "the default for video files; -n chooses others"


def run(options: JobOptions) -> tuple[dict[str, Any], int]:
    """Do what the options ask for; returns the summary and the exit code.

    Raises:
        MediaError, CheckpointError, OSError, MemoryError, RuntimeError: nothing could be done.
    """
    videos = inputs(options)
    tasks = plan_folder(videos, options) if videos else []
    model, why = choose_weights(options)
    upscaler = job.make_upscaler(options, model)
    job.say(f"weights {model}: {why}")
    if videos:
        summary, code = _run_folder(tasks, upscaler, options)
    else:
        output = options.output or job.default_output(options.input, options.encode.codec)
        if options.preview is not None:
            output = options.output or preview.default_path(output, options.preview)
        summary, code = _run_one((options.input, output), upscaler, options), 0
    return summary | {
        "peak_mib": job.peak_mib(),
        "backend": upscaler.backend,
        "device": str(upscaler.device),
        "precision": upscaler.precision,
        "weights": model,
    }, code


def plan_folder(videos: Sequence[Path], options: JobOptions) -> list[Task]:
    """The videos of a folder and what they become.

    Raises:
        MediaError: the output is a file.
    """
    source, folder = options.input, options.output or options.input
    if folder.suffix.lower() in WRITABLE_VIDEOS or folder.is_file():
        raise MediaError(f"{folder}: must be a folder, as {source} holds {len(videos)} videos")
    if left := [video.name for video in videos_in(source) if video not in videos]:
        job.say(f"note: taken for results and left alone: {', '.join(left)}")
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(x, folder / job.default_output(x, options.encode.codec).name) for x in videos]
    if options.preview is None:
        return tasks
    return [(video, preview.default_path(output, options.preview)) for video, output in tasks]


def _run_one(task: Task, upscaler: Upscaler, options: JobOptions) -> dict[str, Any]:
    work = job.enlarge if options.preview is None else preview.write_preview
    return work(*task, upscaler, options)


def _run_folder(
    tasks: Sequence[Task], upscaler: Upscaler, options: JobOptions
) -> tuple[dict[str, Any], int]:
    """Every video in turn; exit code 1 if any failed. Inputs that map to the same output fail."""
    done, failed, before = [], [], []
    table = Table("video", "result", "frames", "ms/frame", title=escape(str(options.input)))
    for source, output in tasks:
        name = escape(source.name)
        try:
            _check_name(source, output, tasks)
            with explained(output, "write"):
                is_done = output.exists() and not options.overwrite
            if is_done:
                remove_leftovers(output)
                before.append(str(output))
                table.add_row(name, "done before", "", "")
                continue
            row = _run_one((source, output), upscaler, options)
        except (MediaError, OSError, MemoryError, RuntimeError) as error:
            job.say(f"error: {job.in_one_line(error, source)}")
            failed.append(str(source))
            table.add_row(name, "[red]failed[/], see above", "", "")
        else:
            done.append(row)
            result = escape(Path(row["output"]).name)
            table.add_row(name, result, str(row["frames"]), str(row["ms_per_frame"]))
    job.console.print(table)
    total = {key: sum(row[key] for row in done) for key in ("frames", "seconds")}
    new = total["frames"] - sum(row.get("resumed", 0) for row in done)
    return {
        "output": str(options.output or options.input), **total, "files": done, "failed": failed,
        "done_before": before,
        "width": max((row["width"] for row in done), default=0),
        "height": max((row["height"] for row in done), default=0),
        "ms_per_frame": round(1000 * total["seconds"] / max(new, 1), 2),
    }, 1 if failed else 0  # fmt: skip


def _check_name(source: Path, output: Path, tasks: Sequence[Task]) -> None:
    """MediaError if another video would become the same file."""
    if others := [x.name for x, result in tasks if result == output and x != source]:
        raise MediaError(
            f"{source}: would become {output.name}, as would {', '.join(others)};"
            " rename one of them"
        )
