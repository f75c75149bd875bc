"""Fixtures of the jobs' tests: networks, inputs, and ways to run the command."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import job_clips as clips
import pytest
import torch
from faults import Runner
from torch import nn

from mana_triton import checkpoint, infer
from mana_triton.model import MANA, MANAConfig


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A tiny random network in which neighbors matter."""
    torch.manual_seed(0)
    config = MANAConfig(
        channels=8, encoder_blocks=1, decoder_blocks=1, memory_slots=8, match="cosine",
        offsets=True,
    )  # fmt: skip
    model = MANA(config)
    for layer in (model.w_z, model.w_z1):
        nn.init.normal_(layer.weight, std=0.3)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    checkpoint.save(model, path)
    return path


@pytest.fixture(scope="session")
def bilinear(tmp_path_factory) -> Path:
    """A network that adds nothing to bilinear interpolation."""
    model = MANA(MANAConfig(channels=8, encoder_blocks=1, decoder_blocks=1, memory_slots=8))
    nn.init.zeros_(model.conv_last.weight)
    nn.init.zeros_(model.conv_last.bias)  # pyright: ignore[reportArgumentType]
    path = tmp_path_factory.mktemp("weights") / "bilinear.safetensors"
    checkpoint.save(model, path)
    return path


@pytest.fixture
def cli(monkeypatch, capfd, weights):
    """Run the command in this process: (exit code, last line of stdout as JSON, stderr)."""

    def run(*arguments: object, model: Path = weights) -> tuple[int, dict, str]:
        capfd.readouterr()
        argv = ["infer", *map(str, arguments)]
        if "-n" not in argv:
            argv += ["-n", str(model)]
        monkeypatch.setattr(sys, "argv", argv)
        threads = threading.active_count()
        with pytest.raises(SystemExit) as stopped:
            infer.main()
        deadline = time.monotonic() + 30
        while threading.active_count() > threads:  # decoder, network and progress end
            assert time.monotonic() < deadline
            time.sleep(0.005)
        out, err = capfd.readouterr()
        code = stopped.value.code
        if isinstance(code, str):  # what the interpreter prints at exit
            code, err = 1, f"{err}{code}\n"
        assert isinstance(code, int)
        assert "Traceback" not in err
        return code, json.loads(out.splitlines()[-1]) if out else {}, err

    return run


@pytest.fixture
def clip(tmp_path) -> Path:
    """Five frames, see `clips.write_ramps`."""
    return clips.write_ramps(tmp_path / "clip.mp4")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pictures frame1, frame2, frame10: natural order is not alphabetical."""
    return clips.write_pictures(tmp_path / "frames")


@pytest.fixture(scope="session")
def runner(tmp_path_factory) -> Iterator[Runner]:
    """Forks runs; their operations on files below the tests' folders are counted."""
    runner = Runner(tmp_path_factory.getbasetemp())
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A video of three scenes, see `clips.write_scenes`."""
    return clips.write_scenes(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="session")
def whole(scenes, weights, runner, tmp_path_factory) -> dict[str, list]:
    """The results of runs that nothing stopped, by the output's suffix."""
    results = {}
    for suffix in (".mp4", ""):
        output = tmp_path_factory.mktemp("whole") / f"clip_x4{suffix}"
        run = runner(*clips.command(scenes, weights, output))
        assert (run.code, run.summary["frames"]) == (0, clips.COUNT), run.err
        assert [file.name for file in output.parent.iterdir()] == [output.name]
        results[suffix] = clips.content(output)
    return results


@pytest.fixture
def started(scenes, weights, runner, tmp_path) -> list[object]:
    """A command whose run was stopped when 15 frames were done."""
    source = tmp_path / "in.mp4"
    source.write_bytes(scenes.read_bytes())
    arguments = clips.command(source, weights, tmp_path / "clip_x4.mp4")
    assert runner(*arguments, encode=20).code == 1
    return arguments
