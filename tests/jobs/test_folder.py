"""Folders of videos: every video in turn, one that fails stops nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from job_clips import FAST, errors, read_all, write_ramps

from mana_triton.infer import parse_options
from mana_triton.jobs import folder as folders
from mana_triton.jobs import job


@pytest.fixture
def films(tmp_path) -> Path:
    """Two videos, a file that is none, and files of the system."""
    folder = tmp_path / "films"
    folder.mkdir()
    for name in ("a.mp4", "c.mkv"):
        write_ramps(folder / name, 3)
    (folder / "b.mp4").write_text("not a video")
    for name in ("notes.txt", ".DS_Store", "._a.mp4", "Thumbs.db"):
        (folder / name).write_text("not a video either")
    return folder


def test_bad_video_does_not_stop_the_rest(films, cli):
    code, summary, stderr = cli(films, *FAST)
    assert code == 1
    assert (summary["output"], summary["frames"]) == (str(films), 6)
    assert (summary["width"], summary["height"]) == (64, 48)
    assert summary["failed"] == [str(films / "b.mp4")]
    outputs = [str(films / "a_x4.mp4"), str(films / "c_x4.mkv")]
    assert [file["output"] for file in summary["files"]] == outputs
    assert [len(read_all(Path(output))) for output in outputs] == [3, 3]
    assert errors(stderr) == [
        f"error: {films / 'b.mp4'}: cannot read it as a video: it is not a video, or it is damaged"
    ]


def test_finished_videos_are_skipped(films, cli):
    assert cli(films, *FAST)[0] == 1
    done = (films / "a_x4.mp4").read_bytes()
    (films / "c_x4.mkv").unlink()
    code, summary, stderr = cli(films, *FAST)
    assert (code, summary["failed"]) == (1, [str(films / "b.mp4")])
    assert summary["done_before"] == [str(films / "a_x4.mp4")]
    assert [file["output"] for file in summary["files"]] == [str(films / "c_x4.mkv")]
    assert (films / "a_x4.mp4").read_bytes() == done
    table = [line for line in stderr.splitlines() if "│" in line]
    assert [line.split("│")[1].strip() for line in table] == ["a.mp4", "b.mp4", "c.mkv"]
    assert ["done before" in table[0], "failed" in table[1], "c_x4.mkv" in table[2]] == [True] * 3
    (films / "b.mp4").unlink()
    code, summary, _ = cli(films, *FAST)
    assert (code, len(summary["done_before"]), summary["frames"]) == (0, 2, 0)


def test_results_go_to_another_folder(films, cli, tmp_path):
    (films / "b.mp4").unlink()
    results = tmp_path / "results" / "today"
    code, summary, _ = cli(films, "-o", results, *FAST)
    assert (code, summary["output"], summary["failed"]) == (0, str(results), [])
    assert {file.name for file in results.iterdir()} == {"a_x4.mp4", "c_x4.mkv"}
    for output in (tmp_path / "one.mp4", films / "a.mp4"):
        code, _, stderr = cli(films, "-o", output)
        assert code == 1
        assert stderr == f"error: {output}: must be a folder, as {films} holds 2 videos\n"
    assert not (tmp_path / "one.mp4").exists()


def test_videos_named_as_results_are_left_alone_only_in_the_same_folder(films, tmp_path, capfd):
    write_ramps(films / "d_x4.mp4", 2)
    options = parse_options([str(films)])
    assert [x.name for x in folders.inputs(options)] == ["a.mp4", "b.mp4", "c.mkv"]
    folders.plan_folder(folders.inputs(options), options)
    assert "note: taken for results and left alone: d_x4.mp4" in capfd.readouterr().err
    options = parse_options([str(films), "-o", str(tmp_path / "results")])
    tasks = folders.plan_folder(folders.inputs(options), options)
    assert tasks[-1][1].name == "d_x4_x4.mp4"


def test_inputs_that_map_to_the_same_output_fail(cli, tmp_path):
    """Their previews, too."""
    for name in ("a.avi", "a.mkv", "a.mp4", "b.mp4"):
        write_ramps(tmp_path / name, 2)
    code, summary, stderr = cli(tmp_path, *FAST)
    assert (code, summary["failed"]) == (1, [str(tmp_path / name) for name in ("a.avi", "a.mkv")])
    assert [Path(done["output"]).name for done in summary["files"]] == ["a_x4.mp4", "b_x4.mp4"]
    assert errors(stderr) == [
        f"error: {tmp_path / 'a.avi'}: would become a_x4.mkv, as would a.mkv; rename one of them",
        f"error: {tmp_path / 'a.mkv'}: would become a_x4.mkv, as would a.avi; rename one of them",
    ]
    assert not (tmp_path / "a_x4.mkv").exists()
    code, summary, stderr = cli(tmp_path, "--preview", "0")
    assert (code, len(summary["failed"])) == (1, 3)
    assert "would become a_x4_preview_0.png, as would a.mkv, a.mp4; rename" in stderr
    assert [path.name for path in tmp_path.glob("*.png")] == ["b_x4_preview_0.png"]


def test_previews_of_a_folder(films, cli):
    """A later run makes the missing ones and skips the others."""
    (films / "b.mp4").unlink()
    assert cli(films, "--preview", 1)[0] == 0
    first, second = (films / f"{name}_x4_preview_1.png" for name in "ac")
    before = first.read_bytes()
    first.write_bytes(b"an older one")
    second.unlink()
    code, summary, stderr = cli(films, "--preview", 1)
    assert (code, summary["failed"], summary["done_before"]) == (0, [], [str(first)])
    assert (first.read_bytes(), second.exists()) == (b"an older one", True)
    assert "done before" in stderr
    assert cli(films, "--preview", 1, "--overwrite")[1]["done_before"] == []
    assert first.read_bytes() == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["Python", "GPU", "CPU"],
)
def test_too_large_video_does_not_stop_the_rest(error, films, cli, monkeypatch):
    (films / "b.mp4").write_bytes((films / "a.mp4").read_bytes())
    work = job.enlarge

    def fail(source: Path, *rest: Any) -> dict:
        if source.name == "b.mp4":
            raise error
        return work(source, *rest)

    monkeypatch.setattr(job, "enlarge", fail)
    code, summary, stderr = cli(films, *FAST)
    assert (code, summary["failed"], len(summary["files"])) == (1, [str(films / "b.mp4")], 2)
    advice = "the memory is too small for this frame size, even in the smallest parts"
    assert errors(stderr) == [f"error: {films / 'b.mp4'}: {advice}"]
    code, _, stderr = cli(films / "b.mp4")
    assert (code, errors(stderr)) == (1, [f"error: {films / 'b.mp4'}: {advice}"])
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):  # a bug is not hidden
        cli(films, *FAST)
