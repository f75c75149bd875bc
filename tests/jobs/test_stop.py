"""Runs that are killed, stopped or fail: the same command ends with the same result.

tests/slow/test_kills.py tries every operation on files.
"""

import os
import random

import pytest
from job_clips import assert_survives, command, content, put_older, read_all, write_ramps

from mana_triton.jobs.stop import stop_signals

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def kill_at_points(suffix, clip, weights, runner, whole, tmp_path, tries, flags=()) -> None:
    """Kill runs at operations on files, spread over all of them."""
    output = tmp_path / "probe" / f"clip_x4{suffix}"
    output.parent.mkdir()
    total = runner(*command(clip, weights, output)).operations
    assert total > 20
    chosen = sorted(random.Random(1).sample(range(1, total + 1), min(tries, total)))
    resumed = []
    for point in chosen:
        output = tmp_path / str(point) / f"clip_x4{suffix}"
        output.parent.mkdir()
        if flags:
            put_older(output)
        repeated = [*command(clip, weights, output), *flags]
        run = runner(*repeated, kill_at=point)
        assert run.code == -9, (point, run)
        resumed.append(assert_survives(repeated, output, runner, whole[suffix]))
    assert resumed == sorted(resumed)  # later deaths lose no more than earlier ones
    assert max(resumed) >= 6
    print(f"killed at {len(chosen)} of {total} operations on files, all survived: {resumed}")


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["new", "overwrite"])
@pytest.mark.parametrize("suffix", [".mp4", ""], ids=["video", "pictures"])
def test_killed_run_continues(suffix, flags, scenes, weights, runner, whole, tmp_path):
    kill_at_points(suffix, scenes, weights, runner, whole, tmp_path, 3, flags)


def test_run_that_fails_again_and_again_gets_further(scenes, weights, runner, whole, tmp_path):
    output = tmp_path / "clip_x4.mp4"
    arguments = command(scenes, weights, output)
    found = []
    while (run := runner(*arguments, encode=10)).code:
        assert len(run.errors) == 1
        found.append(int(run.err.split("note: ")[-1].split()[0]))
    assert found == [6, 15, 21]
    assert content(output) == whole[".mp4"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_stops_a_run_cleanly(name, scenes, weights, runner, whole, tmp_path):
    output = tmp_path / "clip_x4.mp4"
    arguments = command(scenes, weights, output)
    run = runner(*arguments, signal=name, kill_at=44)
    assert (run.code, run.errors) == (1, ["error: stopped; the same command continues"])
    assert "Traceback" not in run.err
    kept = int(run.err.split("note: ")[-1].split()[0])
    assert kept >= 6
    assert assert_survives(arguments, output, runner, whole[".mp4"]) == kept


def test_hangup_does_not_stop_a_run_under_nohup(scenes, weights, runner, whole, tmp_path):
    output = tmp_path / "clip_x4.mp4"
    arguments = command(scenes, weights, output)
    run = runner(*arguments, signal="SIGTERM", ignored="SIGHUP", kill_at=44)
    assert run.code == 1
    run = runner(*arguments, signal="SIGHUP", ignored="SIGHUP", kill_at=12)
    assert run.operations > 12
    assert run.code == 0, run.err
    assert content(output) == whole[".mp4"]


def test_signal_waits_until_a_picture_is_written(monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # further signals stay as they are here
    done = []
    with pytest.raises(KeyboardInterrupt):
        with stop_signals:
            stop_signals._stop()
            done.append("written")
        done.append("not reached")
    assert done == ["written"]


@pytest.mark.parametrize(
    ("fault", "message", "kept"),
    [
        ({"largest": 0.1}, "cannot write: disk full or file too large", 0),
        ({"largest": 0.8}, "cannot write: disk full or file too large", 26),
        ({"read": 15, "look": 0}, "clip.mp4: cannot read on: Input/output error", 6),
        ({"read": 15, "look": 1}, "clip.mp4: cannot read on: Input/output error", 26),
        ({"encode": 20}, "cannot write: Generic error in an external library", 15),
    ],
    ids=["full disk in a segment", "full disk while joining", "reading", "copying", "encoding"],
)
def test_failure_keeps_what_is_done(fault, message, kept, scenes, weights, runner, whole, tmp_path):
    output = tmp_path / "clip_x4.mp4"
    arguments = command(scenes, weights, output)
    if "largest" in fault:
        probe = tmp_path / "probe.mp4"
        assert runner(*command(scenes, weights, probe)).code == 0
        fault = {"largest": int(fault["largest"] * probe.stat().st_size)}
        probe.unlink()
    run = runner(*arguments, **fault)
    (line,) = run.errors
    assert (run.code, message in line, "Traceback" in run.err) == (1, True, False), run.err
    assert not output.exists()
    assert assert_survives(arguments, output, runner, whole[".mp4"]) == kept


@pytest.mark.parametrize(
    ("name", "kept"), [("out.mp4", 4), ("shots", 4), ("one.mp4", 0), ("none", 0)]
)
def test_interruption_keeps_whole_segments(name, kept, cli, tmp_path, monkeypatch):
    clip = write_ramps(tmp_path / "clip.mp4", 30)  # more than the threads read ahead
    output, parts = tmp_path / name, tmp_path / f"{name}.parts"
    arguments = (clip, "-o", output, "--segment", 4 if kept else 30)
    fewer = 30 if output.suffix else 8  # at most eight pictures are a segment
    count = iter(range(100))
    enter = type(stop_signals).__enter__

    def enter_seven(self) -> None:
        if next(count) == 7:
            raise KeyboardInterrupt
        enter(self)

    with monkeypatch.context() as patch:
        patch.setattr(type(stop_signals), "__enter__", enter_seven)
        code, summary, stderr = cli(*arguments)
    assert (code, summary) == (1, {})
    assert stderr.splitlines()[-1] == "error: stopped; the same command continues"
    assert set(tmp_path.iterdir()) == ({clip, parts} if kept else {clip})
    assert (f"note: {kept} frames are kept" in stderr) == (kept > 0)
    nothing = f"note: nothing is kept: the first segment of {fewer} frames is not done"
    assert (nothing in stderr) == (kept == 0)
    code, summary, stderr = cli(*arguments)
    assert (code, summary["frames"], summary["resumed"]) == (0, 30, kept)
    assert (f"continuing after {kept} frames" in stderr) == (kept > 0)
    assert len(read_all(output)) == 30
    assert set(tmp_path.iterdir()) == {clip, output}
