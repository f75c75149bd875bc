"""Kills at every operation on files and at random times, a full disk, 20,000 frames."""

import contextlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import faults
import media
import numpy as np
import pytest
from job_clips import ENCODER, assert_survives, command, content
from test_stop import kill_at_points

from mana_triton.jobs.options import SEGMENT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.mark.parametrize("suffix", [".mp4", ""], ids=["video", "pictures"])
@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["new", "overwrite"])
def test_killed_at_every_operation(flags, suffix, scenes, weights, runner, whole, tmp_path):
    kill_at_points(suffix, scenes, weights, runner, whole, tmp_path, 1 << 30, flags)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_stopped_at_random_times(name, scenes, weights, runner, whole, tmp_path):
    probe = tmp_path / "clip_x4.mp4"
    started = time.monotonic()
    assert runner(*command(scenes, weights, probe)).code == 0
    lasts, chance = time.monotonic() - started, random.Random(name)
    resumed = []
    for point in range(50):
        output = tmp_path / str(point) / "clip_x4.mp4"
        output.parent.mkdir()
        arguments = command(scenes, weights, output)
        run = runner(*arguments, signal=name, after=chance.uniform(0, lasts))
        if run.code == -15 and name == "SIGTERM":  # before the program could listen
            assert not any(output.parent.iterdir())
        else:
            assert run.code in ((-9, 0) if name == "SIGKILL" else (1, 0)), run
        assert "Traceback" not in run.err
        resumed.append(assert_survives(arguments, output, runner, whole[".mp4"]))
    print(f"{name} at {len(resumed)} random times, all survived: {sorted(resumed)}")


def test_full_disk(scenes, weights, runner, whole, tmp_path):
    """A small tmpfs; room is made between the runs."""
    probe = tmp_path / "probe.mp4"
    assert runner(*command(scenes, weights, probe)).code == 0
    size, disk = probe.stat().st_size, tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={4 * size}", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        output = disk / "clip_x4.mp4"
        for room in (0.1, 0.4, 0.7, 0.9, 1.5):  # of the output: first segment ... while joining
            (disk / "filler").write_bytes(bytes(int((4 - room) * size)))
            run = runner(*command(scenes, weights, output))
            assert run.code == 1, room
            assert "the disk is full; free some space" in run.err
            assert not output.exists()
            (disk / "filler").unlink()
        assert runner(*command(scenes, weights, output)).code == 0
        assert content(output) == whole[".mp4"]
        assert [file.name for file in disk.iterdir()] == [output.name]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_memory_is_constant_over_twenty_thousand_frames(weights, tmp_path):
    """The slope of the resident memory over the second half of a run is about none."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    frames = [np.roll(picture, i, axis=1) for i in range(16)] * 1250
    clip = media.write_video(tmp_path / "long.mp4", frames)
    arguments = [clip, "-o", tmp_path / "out.mkv", "-n", weights, *ENCODER]
    program = [sys.executable, "-m", "mana_triton.infer", *map(str, arguments)]
    samples = []  # frames done, MiB
    with subprocess.Popen(
        program, cwd=faults.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            time.sleep(0.5)
            status = Path(f"/proc/{process.pid}/status")
            with contextlib.suppress(OSError):  # the process ends in between
                done = SEGMENT * len(list((tmp_path / "out.mkv.parts").glob("*.packets")))
                resident = [x for x in status.read_text().splitlines() if x.startswith("VmRSS")]
                samples += [(done, int(line.split()[1]) / 1024) for line in resident]
        assert process.stdout
        assert json.loads(process.stdout.read().splitlines()[-1])["frames"] == 20000
    later = np.array([sample for sample in samples if sample[0] >= 10000])
    assert len(later) >= 10
    slope = np.polyfit(later[:, 0], later[:, 1], 1)[0] * 10000
    print(f"RSS {later[0, 1]:.0f} to {later[-1, 1]:.0f} MiB, {slope:+.2f} MiB in 10,000 frames")
    assert abs(slope) < 8  # 0.8 kB a frame
