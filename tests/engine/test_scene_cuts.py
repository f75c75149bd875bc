"""Scene cuts of synthetic clips and of real videos."""

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import pan, texture

from mana_triton.engine.scene_cuts import CutDetector
from mana_triton.video.reader import open_reader

DEMO = Path(__file__).parents[2].parent / "shared" / "data" / "demo"


def find_cuts(frames) -> list[int]:
    detector = CutDetector()
    return [i for i, frame in enumerate(frames) if detector.is_cut(frame)]


@pytest.mark.parametrize("seed", range(3))
def test_cuts_are_found_in_every_type_of_frame(seed):
    scenes = [pan(10 * seed + i, length) for i, length in enumerate((9, 4, 1, 12, 6))]
    frames = np.concatenate(scenes)
    tensors = torch.from_numpy(frames).movedim(-1, 1) / 255
    for clip in (frames, frames.astype(np.uint16) * 257, tensors):
        assert find_cuts(clip) == [9, 13, 14, 26]


@pytest.mark.parametrize("speed", [0, 1, 3])
@pytest.mark.parametrize("size", [(48, 64), (180, 120), (5, 7)])
def test_a_smooth_pan_is_one_scene(speed, size):
    assert find_cuts(pan(3, 40, *size, speed=speed)) == []


def test_a_shaking_camera_is_one_scene():
    """Two frames in a row differ as much as at a cut, but so do those before them."""
    picture = texture(4).round().astype(np.uint8)
    tops = [100 + round(min(1.25**i, 12)) * (-1) ** i for i in range(40)]
    frames = [picture[top : top + 96, 100:228] for top in tops]
    assert find_cuts(frames) == []
    assert find_cuts(frames[-2:]) == [1]


def test_a_slow_fade_is_one_scene():
    frame = texture(5)[:48, :64]
    assert find_cuts((frame * (1 - i / 30)).astype(np.uint8) for i in range(31)) == []


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo clips are not here")
@pytest.mark.parametrize(
    ("name", "end", "cuts"),
    [
        ("bikes-five-cuts.mp4", None, [30, 76, 137, 187, 242]),
        ("nasa.mp4", None, [202]),
        ("car-detection.mp4", 8, []),
        ("friday.mp4", None, []),
        ("walk.mkv", None, []),
    ],
)
def test_cuts_of_real_videos(name, end, cuts):
    with open_reader(DEMO / name, end=end) as reader:
        assert find_cuts(frame.rgb for frame in reader) == cuts
