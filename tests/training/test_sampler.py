"""Random samples, and synthetic motion of stills."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from footage import film, textured, write_pictures, write_video

from mana_triton.training import motion
from mana_triton.training import sampler as sampling
from mana_triton.training.clips import Clip, DataError, open_clips
from mana_triton.training.degradation import LowClip, Recipe, degrade
from mana_triton.training.sampler import Sampler


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> Path:
    """Two videos, and three stills, of noise that moves by two pixels a frame."""
    root = tmp_path_factory.mktemp("footage")
    rng = np.random.default_rng(0)
    (root / "videos").mkdir()
    for name, T in (("a", 9), ("b", 16)):
        frame = textured(rng, 66, 75)
        write_video(
            root / "videos" / f"{name}.mkv", np.stack([np.roll(frame, 2 * t, 1) for t in range(T)])
        )
    write_pictures(root / "stills", np.stack([textured(rng, 70, 90) for _ in range(3)]))
    return root


@pytest.fixture(scope="module")
def clips(footage) -> list[Clip]:
    return open_clips([footage / "videos"], footage / "cache" / "clips")


@pytest.fixture(scope="module")
def stills(footage) -> list[Clip]:
    return open_clips([footage / "stills"], footage / "cache" / "stills", kind="still")


def sampler(clips, stills, **options: Any) -> Sampler:
    options = {"crop": 8, "batch": 3, "seed": 5} | options
    return Sampler(clips, stills, **options)


@pytest.mark.parametrize("degraded", [False, True])
def test_no_sample_goes_across_a_cut(tmp_path, degraded):
    """Scenes too short for a sample are left out; every window of the others is drawn."""
    write_video(tmp_path / "film.mkv", film(9, 6, 15))
    [clip] = open_clips([tmp_path / "film.mkv"], tmp_path / "cache")
    np.save(tmp_path / "low.npy", clip.frames[:, ::4, ::4])
    low = {clip.path: [LowClip(tmp_path / "low.npy", Recipe())]} if degraded else None
    source = sampler([clip], [], low=low)
    assert source.short_scenes == 1
    for n in range(60):
        lr, hr = source.sample(n, 0)
        assert (lr == lr[0, 0, 0]).all() and (hr == lr[0, 0, 0]).all()
    rng = np.random.default_rng(0)
    drawn = [sorted(sampling._choose_times(clip.scenes, rng).tolist()) for _ in range(1000)]
    starts = {stride: {t[0] for t in drawn if t[1] - t[0] == stride} for stride in (1, 2)}
    assert starts == {1: {*range(3), *range(15, 24)}, 2: {*range(15, 18)}}


def test_clips_without_a_scene_long_enough_are_left_out(tmp_path):
    short = Clip("short", "clip", tmp_path, (12, 64, 64, 3), cuts=(6,))
    long = Clip("long", "clip", tmp_path, (12, 64, 64, 3))
    source = sampler([short, long], [])
    assert (source.clips, source.short_scenes) == ([long], 2)
    with pytest.raises(DataError, match="a scene of at least 7 frames, none of 1 has; pass"):
        sampler([short], [])


def test_short_and_small_clips_are_named(tmp_path):
    short = Clip("short", "clip", tmp_path, (6, 64, 64, 3))
    small = Clip("small", "clip", tmp_path, (7, 64, 60, 3))
    with pytest.raises(DataError, match="at least 7 frames, short has 6"):
        sampler([short], [])
    with pytest.raises(DataError, match="at least 64 pixels each way, small has 60x64"):
        sampler([small], [], crop=16)
    with pytest.raises(DataError, match="at least one clip or still"):
        sampler([], [])


@pytest.mark.parametrize("method", ["matlab_bicubic", "pil_bicubic"])
def test_batches_have_the_layout_and_range_of_the_network(clips, stills, method):
    lr, hr = sampler(clips, stills, degradation=method).load(0)
    assert lr.shape == (3, 7, 3, 8, 8) and hr.shape == (3, 3, 32, 32)
    for x in (lr, hr):
        assert x.dtype == torch.float32 and x.is_contiguous()
        levels = x * 255
        assert (levels - levels.round()).abs().max() < 1e-4
        assert x.min() >= 0 and x.max() <= 1 and x.std() > 0.05


def test_samples_depend_on_seed_iteration_and_index_alone(clips, stills):
    one, other = sampler(clips, stills), sampler(clips, stills, batch=1)
    lr, hr = one.load(7)
    other.load(3)
    assert torch.equal(other.load(7)[0][0], lr[0])
    reference = [one.load(n) for n in range(4, 9)]
    assert torch.equal(reference[3][1], hr)
    for workers in (1, 3):
        batches = list(one.batches(4, 9, workers))
        for actual, expected in zip(batches, reference, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    everything = torch.cat([hr for _, hr in reference])
    assert len({x.numpy().tobytes() for x in everything}) == 15
    assert not torch.equal(sampler(clips, stills, seed=6).load(7)[1], hr)


def test_an_error_in_the_background_reaches_the_caller(clips):
    failing = sampler(clips, [])
    failing.degradation = "none"
    with pytest.raises(ValueError, match="method must be"):
        next(failing.batches(0, 4))


@pytest.mark.parametrize("kind", ["clips", "stills"])
def test_lr_is_the_degraded_hr(clips, stills, kind):
    """Also after flips and turns: the degradation commutes with them exactly."""
    source = sampler(clips if kind == "clips" else [], stills if kind == "stills" else [])
    for n in range(30):
        lr, hr = source.sample(n, 0)
        inside = degrade(hr)[2:-2, 2:-2]
        assert torch.equal(lr[3, 2:-2, 2:-2], inside)


def test_crops_look_as_inside_the_picture():
    """Away from the picture's edges, a crop equals the same part of the degraded whole."""
    rng = np.random.default_rng(8)
    picture = torch.from_numpy(textured(rng, 90, 90))
    for _ in range(50):
        rows, cols = (sampling._choose_span(90, 90, 8, rng) for _ in range(2))
        part = picture[rows.start : rows.start + rows.length, cols.start : cols.start + cols.length]
        crop = degrade(part)[rows.margin : rows.margin + 8, cols.margin : cols.margin + 8]
        y, x = rows.start % 4, cols.start % 4
        whole = degrade(picture[y : y + (90 - y) // 4 * 4, x : x + (90 - x) // 4 * 4])
        top, left = rows.start // 4 + rows.margin, cols.start // 4 + cols.margin
        assert torch.equal(crop, whole[top : top + 8, left : left + 8])


def test_frames_of_a_clip_are_consecutive(tmp_path):
    """Stride 1 or 2, forwards or backwards, and every start is possible."""
    frames = np.arange(14, dtype=np.uint8)[:, None, None, None].repeat(40, 1).repeat(40, 2)
    frames = frames.repeat(3, 3)
    np.save(tmp_path / "x.npy", frames)
    source = sampler([Clip("x", "clip", tmp_path / "x.npy", frames.shape)], [])
    seen = set()
    for n in range(300):
        lr, hr = source.sample(n, 0)
        times = lr[:, 0, 0, 0].int().tolist()
        assert len(set(np.diff(times))) == 1
        assert (hr == times[3]).all()
        seen.add((times[0], times[1] - times[0]))
    assert {step for _, step in seen} == {-2, -1, 1, 2}
    assert {start for start, step in seen if step == 1} == set(range(8))


def test_warping_by_whole_pixels_is_a_shift():
    texture = torch.from_numpy(textured(np.random.default_rng(10), 30, 40)).movedim(-1, 0).float()
    maps = np.tile(np.eye(2, 3), (7, 1, 1))
    maps[:, :, 2] = np.arange(7)[:, None] * (2, 1)  # x, y
    warped = motion._warp(texture, maps, 12, 16, "reflection")
    for t in range(7):
        expected = texture[:, t : t + 12, 2 * t : 2 * t + 16]
        assert (warped[t] - expected).abs().max() < 0.05


def test_synthetic_motion_moves_and_keeps_the_center_frame(stills):
    rng = np.random.default_rng(11)
    moving = 0
    for _ in range(100):
        maps = motion._motion(rng, 64, 64)
        np.testing.assert_allclose(maps[3], np.eye(2, 3), atol=1e-12)
        moving += np.abs(maps[6, :, 2]).max() > 1
    assert moving > 50
    source = sampler([], stills)
    changed = [not torch.equal(*source.sample(n, 0)[0][2:4]) for n in range(40)]
    assert sum(changed) > 20


def test_a_sprite_is_pasted_where_it_lies_and_moves(monkeypatch):
    """A white rectangle on black: one in each frame, moving by the motion's shift."""
    shift = np.arange(-3, 4)[:, None] * np.array([3.0, -2.0])

    def fixed(rng, height, width):
        maps = np.tile(np.eye(2, 3), (7, 1, 1))
        maps[:, :, 2] = shift
        return maps

    monkeypatch.setattr(motion, "_motion", fixed)
    sprite = torch.cat([torch.full((3, 15, 21), 255.0), torch.ones(1, 15, 21)])
    for seed in range(20):
        frames = torch.zeros(7, 3, 60, 70)
        motion._paste(frames, sprite, np.random.default_rng(seed))
        corner = np.random.default_rng(seed).integers((-11, -8), (60, 53))
        for t in range(7):
            x, y = (corner - shift[t]).astype(int)
            expected = torch.zeros(60, 70)
            expected[max(0, y) : max(0, y + 15), max(0, x) : max(0, x + 21)] = 255
            assert (frames[t] - expected).abs().max() < 0.5
