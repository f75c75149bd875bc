"""Inputs of the tests, and what their outputs hold."""

import hashlib
from pathlib import Path
from typing import Any

import av
import media
import numpy as np
from faults import Runner
from PIL import Image

from mana_triton.video.reader import open_reader

FAST = ("-e", "preset=ultrafast")
ENCODER = ("-e", "preset=veryfast")  # with B frames, which leave the encoder in another order
SEGMENT = ("--segment", "6")
COUNT, STARTS = 26, (0, 11, 15)  # frames of `scene_pictures`, and where its scenes start


def write_ramps(path: Path, count: int = 5, **settings: Any) -> Path:
    """A video whose frame i is gray, 20 + 5 i in its middle."""
    ramp = np.linspace(-15, 15, 16)[None, :, None] * np.ones((12, 1, 3))
    pictures = [(20 + 5 * i + ramp).clip(0).round().astype(np.uint8) for i in range(count)]
    lossless = {"preset": "ultrafast", "qp": "0"}
    return media.write_video(path, pictures, options=lossless, **settings)


def levels(path: Path) -> list[int]:
    """The numbers of the frames of `write_ramps` that a video shows."""
    numbers = [(picture.mean() - 20) / 5 for picture in read_all(path)]
    assert all(abs(number - round(number)) < 0.4 for number in numbers)
    return [round(number) for number in numbers]


def write_pictures(folder: Path) -> Path:
    folder.mkdir()
    for index, number in enumerate((1, 2, 10)):
        Image.fromarray(media.smooth_rgb(9, 14, 2 * index)).save(folder / f"frame{number}.png")
    return folder


def scene_pictures(count: int = COUNT, size: tuple[int, int] = (16, 24)) -> list[np.ndarray]:
    """Three scenes of blocks that move; one is shorter than a window."""
    rng = np.random.default_rng(5)
    block = np.ones((size[0] // 4, size[1] // 4, 1))
    scenes = [np.kron(rng.integers(0, 256, (4, 4, 3)), block) for _ in STARTS]
    frames = []
    for number in range(count):
        scene = scenes[sum(start <= number for start in STARTS) - 1]
        frames.append(np.roll(scene, number // 2, axis=1).astype(np.uint8))
    return frames


def write_scenes(path: Path) -> Path:
    """A video with sound, B frames, some key frames, and irregular times with large gaps."""
    steps = np.random.default_rng(3).choice([900, 3600, 20000], COUNT)
    return media.write_video(
        path, scene_pictures(), pts=np.cumsum(steps).tolist(),
        options={"g": "7", "bf": "2", "crf": "12"}, audio=True, color=(1, 1, 1, 1),
    )  # fmt: skip


def read_all(path: Path) -> list[np.ndarray]:
    with open_reader(path) as reader:
        return [frame.rgb for frame in reader]


def content(path: Path) -> list[Any]:
    """What a viewer gets: every picture with its time, and every packet of sound."""
    if path.is_dir():
        return [(file.name, file.read_bytes()) for file in sorted(path.iterdir())]
    with av.open(str(path)) as container:
        frames = [
            (frame.pts, hashlib.sha256(_samples(frame)).hexdigest())
            for frame in container.decode(video=0)
        ]
        sounds = len(container.streams.audio)
    return [frames, *(media.packets(path, "audio", index) for index in range(sounds))]


def _samples(frame: av.VideoFrame) -> bytes:
    if frame.format.name == "bgr0":  # which PyAV does not turn into an array
        frame = frame.reformat(format="bgr24", threads=1)
    return frame.to_ndarray().tobytes()


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def command(clip: Path, weights: Path, output: Path) -> list[object]:
    encoder = ENCODER if output.suffix else ()
    return [clip, "-o", output, "-n", weights, "--precision", "fp32", *SEGMENT, *encoder]


def put_older(output: Path) -> None:
    """Another output of the same name, which --overwrite is to replace."""
    if output.suffix:
        output.write_bytes(b"older")
    else:
        output.mkdir()
        (output / "older.png").write_bytes(b"older")


def is_older(output: Path) -> bool:
    file = output if output.suffix else output / "older.png"
    return file.is_file() and file.read_bytes() == b"older"


def assert_survives(arguments: list[object], output: Path, runner: Runner, expected: list) -> int:
    """The output is absent, whole or the older one, and the same command gives what is expected.

    Returns how many frames the second run found done.
    """
    was_done = output.exists() and not is_older(output)
    if was_done:
        assert content(output) == expected
    run = runner(*arguments)
    if was_done and "--overwrite" not in arguments:
        assert run.code == 1
        assert "exists; use --overwrite" in run.err
    else:
        assert run.code == 0, run.err
    assert content(output) == expected
    assert [file.name for file in output.parent.iterdir()] == [output.name]
    return COUNT if was_done else run.summary["resumed"]
