"""Degradations, the cache of decoded clips, and random samples."""

import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mana_triton.resize import upscale_bicubic
from mana_triton.training import clips as data
from mana_triton.training.clips import DataError, Sampler, degrade, open_clips
from mana_triton.training.degradation import LowClip, Recipe

FIXTURE = Path(__file__).parents[3] / "shared" / "data" / "metrics" / "matlab_imresize_x4.npz"


def textured(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Smooth noise with detail at all scales, uint8 [*shape, 3]."""
    x = rng.normal(size=(*shape, 3))
    for axis in (-3, -2):
        x = x + 2 * np.roll(x, 1, axis) + 2 * np.roll(x, 3, axis)
    return np.clip(128 + 14 * x, 0, 255).astype(np.uint8)


def write_video(path: Path, frames: np.ndarray) -> None:
    """A lossless RGB video."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_pictures(folder: Path, frames: np.ndarray) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i:03d}.png")


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
def clips(footage) -> list[data.Clip]:
    return open_clips([footage / "videos"], footage / "cache" / "clips")


@pytest.fixture(scope="module")
def stills(footage) -> list[data.Clip]:
    return open_clips([footage / "stills"], footage / "cache" / "stills", kind="still")


def sampler(clips, stills, **options: Any) -> Sampler:
    options = {"crop": 8, "batch": 3, "seed": 5} | options
    return Sampler(clips, stills, **options)


# ---- degradations


@pytest.mark.skipif(not FIXTURE.is_file(), reason="the recorded MATLAB output is not here")
def test_matlab_bicubic_reproduces_matlab():
    with np.load(FIXTURE) as fixture:
        hr, lr = torch.from_numpy(fixture["hr"]), fixture["lr"]
    np.testing.assert_array_equal(degrade(hr, "matlab_bicubic").numpy(), lr)
    np.testing.assert_array_equal(degrade(hr.expand(2, 3, -1, -1, -1)).numpy()[1, 2], lr)


def exact_bicubic_row(row: list[int], factor: Fraction, length: int) -> list[Fraction]:
    """Keys' cubic in rational numbers, one output pixel after the other."""
    stretch = max(Fraction(1), 1 / factor)
    out = []
    for i in range(length):
        center = (i + Fraction(1, 2)) / factor - Fraction(1, 2)
        total = norm = Fraction(0)
        for j in range(int(center - 2 * stretch) - 2, int(center + 2 * stretch) + 3):
            x = abs(center - j) / stretch
            if x >= 2:
                continue
            if x <= 1:
                weight = (3 * x**3 - 5 * x**2 + 2) / 2
            else:
                weight = (-(x**3) + 5 * x**2 - 8 * x + 4) / 2
            mirrored = -1 - j if j < 0 else 2 * len(row) - 1 - j if j >= len(row) else j
            total += weight * row[mirrored]
            norm += weight
        out.append(total / norm)
    return out


@pytest.mark.parametrize("factor", [Fraction(1, 4), Fraction(4)], ids=["shrink", "enlarge"])
def test_resizing_equals_rational_arithmetic(factor):
    """The float computation is exact, also at ties, where a last bit decides the rounding."""
    H, W = (16, 20) if factor < 1 else (5, 6)
    picture = np.random.default_rng(1).choice([0, 128, 255], (H, W, 3)).astype(np.uint8)
    resize = degrade if factor < 1 else upscale_bicubic
    actual = resize(torch.from_numpy(picture)).numpy()
    for channel in range(3):
        rows = picture[:, :, channel].tolist()
        rows = [exact_bicubic_row(row, factor, int(W * factor)) for row in rows]
        columns = zip(*rows, strict=True)
        columns = [exact_bicubic_row(list(c), factor, int(H * factor)) for c in columns]
        exact = [[min(255, max(0, int((x + Fraction(1, 2)) // 1))) for x in c] for c in columns]
        np.testing.assert_array_equal(actual[:, :, channel], np.array(exact).T)


def test_pil_bicubic_is_pillows():
    from PIL import Image

    hr = textured(np.random.default_rng(2), 3, 24, 32)
    expected = np.asarray(Image.fromarray(hr[1]).resize((8, 6), Image.Resampling.BICUBIC))
    actual = degrade(torch.from_numpy(hr), "pil_bicubic").numpy()
    np.testing.assert_array_equal(actual[1], expected)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_gray_of_16_bits_is_divided(tmp_path, suffix):
    gray = np.array([[0, 128, 129, 257], [32896, 33024, 33025, 65535]], np.uint16)
    Image.fromarray(gray).save(tmp_path / f"a{suffix}")
    picture = data._read_picture(tmp_path / f"a{suffix}")
    expected = np.round(gray / 257).astype(np.uint8)
    assert expected.tolist() == [[0, 0, 1, 1], [128, 128, 129, 255]]
    assert (picture == expected[:, :, None]).all() and picture.shape == (2, 4, 3)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pictures_of_32_bits_are_refused(tmp_path, kind):
    Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a.tif must have 8 or 16 bits per channel, has 32"):
        data._read_picture(tmp_path / "a.tif")


def test_a_constant_picture_stays_constant():
    hr = torch.full((2, 16, 12, 3), 77, dtype=torch.uint8)
    for method in data.DEGRADATIONS:
        assert (degrade(hr, method) == 77).all()
    assert (upscale_bicubic(hr) == 77).all()


@pytest.mark.parametrize(
    ("hr", "method", "message"),
    [
        (torch.zeros(10, 16, 3, dtype=torch.uint8), "matlab_bicubic", "10x16; crop to 8x16"),
        (torch.zeros(0, 16, 3, dtype=torch.uint8), "matlab_bicubic", "multiples of 4"),
        (torch.zeros(8, 16, 3), "matlab_bicubic", "uint8, got .* torch.float32"),
        (torch.zeros(3, 8, 16, dtype=torch.uint8), "matlab_bicubic", r"got \[3, 8, 16\]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "cubic", "one of matlab_bicubic, pil_bicubic"),
    ],
)
def test_degrade_explains_wrong_input(hr, method, message):
    with pytest.raises(ValueError, match=message):
        degrade(hr, method)


# ---- the cache


def test_videos_are_decoded_losslessly_and_once(footage, clips, monkeypatch):
    assert [(clip.name, clip.shape) for clip in clips] == [
        ("a", (9, 66, 75, 3)),
        ("b", (16, 66, 75, 3)),
    ]
    frames = clips[1].frames
    assert isinstance(frames, np.memmap) and frames.shape == clips[1].shape
    np.testing.assert_array_equal(np.roll(frames[0], 2 * 15, 1), frames[15])
    monkeypatch.setattr(data, "_decode_one", lambda *_: pytest.fail("decoded again"))
    assert open_clips([footage / "videos"], footage / "cache" / "clips") == clips


def test_a_cache_is_opened_without_its_sources(footage, clips, stills):
    assert open_clips([footage / "cache" / "clips"], Path("unused")) == clips
    assert open_clips([footage / "cache" / "stills"], Path("unused"), kind="still") == stills
    with pytest.raises(DataError, match="must list at least one still"):
        open_clips([footage / "cache" / "clips"], Path("unused"), kind="still")


def test_folders_of_frames_at_any_depth(tmp_path):
    frames = textured(np.random.default_rng(3), 4, 16, 20)
    write_pictures(tmp_path / "in" / "x" / "left", frames[:2])
    write_pictures(tmp_path / "in" / "x" / "right", frames)
    found = open_clips([tmp_path / "in"], tmp_path / "cache")
    assert [(clip.name, clip.shape[0]) for clip in found] == [("x-left", 2), ("x-right", 4)]
    np.testing.assert_array_equal(found[1].frames, frames)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_vimeo_lists_choose_the_sequences(tmp_path):
    from PIL import Image

    frames = textured(np.random.default_rng(4), 7, 16, 20)
    for name in ("00001/0001", "00001/0002"):
        folder = tmp_path / "sequences" / name
        folder.mkdir(parents=True)
        for i, frame in enumerate(frames, 1):
            Image.fromarray(frame).save(folder / f"im{i}.png")
    (tmp_path / "sep_trainlist.txt").write_text("00001/0002\n")
    (tmp_path / "sep_testlist.txt").write_text("00001/0001\n")
    for split, name in (("train", "00001-0002"), ("test", "00001-0001")):
        [clip] = open_clips([tmp_path], tmp_path / "cache", split=split)
        assert clip.name == name
        np.testing.assert_array_equal(clip.frames, frames)
    (folder / "im4.png").unlink()
    with pytest.raises(DataError, match=r"im4\.png is missing"):
        open_clips([tmp_path], tmp_path / "cache")


def test_a_changed_source_is_decoded_again(tmp_path):
    frames = textured(np.random.default_rng(5), 3, 16, 20)
    video = tmp_path / "v.mkv"
    write_video(video, frames)
    [before] = open_clips([video], tmp_path / "cache")
    assert before.frames[0, 0, 0, 0] == frames[0, 0, 0, 0]
    write_video(video, 255 - frames[:2])
    [after] = open_clips([video], tmp_path / "cache")
    np.testing.assert_array_equal(after.frames, 255 - frames[:2])
    # the same size, a new time
    os.utime(video, ns=(0, 0))
    after.path.write_bytes(b"stale")
    [again] = open_clips([video], tmp_path / "cache")
    np.testing.assert_array_equal(again.frames, 255 - frames[:2])


def test_interrupted_decoding_is_continued(tmp_path, monkeypatch):
    """What was decoded before the stop is complete; the clip that was being written is not seen."""
    frames = textured(np.random.default_rng(6), 3, 16, 20)
    for name in "ab":
        write_pictures(tmp_path / "in" / name, frames)
    reader = data._read_picture

    def failing(path: Path) -> np.ndarray:
        if path.parent.name == "b" and path.stem == "002":
            raise KeyboardInterrupt
        return reader(path)

    monkeypatch.setattr(data, "_read_picture", failing)
    with pytest.raises(KeyboardInterrupt):
        open_clips([tmp_path / "in"], tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    assert not list((tmp_path / "cache").glob("*.part"))
    reads = []
    monkeypatch.setattr(data, "_read_picture", lambda path: reads.append(path) or reader(path))
    assert len(open_clips([tmp_path / "in"], tmp_path / "cache")) == 2
    assert {path.parent.name for path in reads} == {"b"}


def test_errors_name_the_file(tmp_path, footage):
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    uneven = textured(np.random.default_rng(7), 2, 16, 20)
    write_pictures(tmp_path / "uneven", uneven)
    write_pictures(tmp_path / "extra", uneven[:1, :12])
    (tmp_path / "extra" / "000.png").rename(tmp_path / "uneven" / "002.png")
    cache = tmp_path / "cache"
    for path, message in (
        (empty, "empty must hold videos .* it holds none"),
        (tmp_path / "missing", "missing must exist"),
        (broken, "broken.mp4 must be a readable video"),
        (tmp_path / "uneven", "must have one size, frame 2 has 20x12 after 20x16"),
    ):
        with pytest.raises(DataError, match=message):
            open_clips([path], cache)
    with pytest.raises(DataError, match="empty must hold pictures"):
        open_clips([empty], cache, kind="still")
    cache.mkdir(exist_ok=True)
    (cache / data.INDEX).write_text('{"half')
    with pytest.raises(DataError, match="must be JSON"):
        open_clips([footage / "videos"], cache)


def test_a_missing_file_of_a_cache_is_named(tmp_path):
    entry = {"name": "x", "kind": "clip", "file": "x-0.npy", "shape": [7, 64, 64, 3]}
    (tmp_path / data.INDEX).write_text(json.dumps({"x": entry}))
    with pytest.raises(DataError, match=r"lists x-0\.npy, which is missing"):
        open_clips([tmp_path], tmp_path)


def film(*lengths: int) -> np.ndarray:
    """Scenes of one color each: [T, 40, 40, 3]."""
    colors = np.array([(200, 30, 30), (30, 160, 60), (40, 60, 220)], np.uint8)
    frames = [np.tile(colors[i % 3], (n, 40, 40, 1)) for i, n in enumerate(lengths)]
    return np.concatenate(frames)


def test_cuts_are_found_once_and_kept(tmp_path, monkeypatch):
    """Also in caches of older versions, whose index says nothing of them."""
    write_video(tmp_path / "film.mkv", film(9, 4, 12))
    cache = tmp_path / "cache"
    [clip] = open_clips([tmp_path / "film.mkv"], cache)
    assert clip.scenes == [range(9), range(9, 13), range(13, 25)]
    index = data.read_index(cache)
    for entry in index.values():
        del entry["cuts"]
    for path in (cache, tmp_path / "film.mkv"):
        data.write_index(cache, index)
        assert open_clips([path], cache) == [clip]
        with monkeypatch.context() as patch:
            patch.setattr(data, "_find_cuts", lambda _: pytest.fail("looked for again"))
            assert open_clips([path], cache) == [clip]


@pytest.mark.parametrize("kept", [0, 50, 128, -1000], ids=["none", "header", "no-pixels", "most"])
def test_a_truncated_file_of_a_cache_is_named(tmp_path, kept):
    """It was a traceback in the middle of training."""
    write_video(tmp_path / "film.mkv", film(9))
    [clip] = open_clips([tmp_path / "film.mkv"], tmp_path / "cache")
    clip.path.write_bytes(clip.path.read_bytes()[:kept])
    data._open_npy.cache_clear()
    with pytest.raises(
        DataError, match=r"film-.*\.npy must be a whole file .* delete it"
    ) as caught:
        sampler([clip], []).load(0)
    assert "\n" not in str(caught.value)


# ---- samples


@pytest.mark.parametrize("degraded", [False, True])
def test_no_sample_goes_across_a_cut(tmp_path, degraded):
    """Scenes too short for a sample are left out; every window of the others is drawn."""
    write_video(tmp_path / "film.mkv", film(9, 6, 15))
    [clip] = open_clips([tmp_path / "film.mkv"], tmp_path / "cache")
    low = {clip.path: [LowClip(lambda: clip.frames[:, ::4, ::4], Recipe())]} if degraded else None
    source = sampler([clip], [], low=low)
    assert source.short_scenes == 1
    for n in range(60):
        lr, hr = source.sample(n, 0)
        assert (lr == lr[0, 0, 0]).all() and (hr == lr[0, 0, 0]).all()
    rng = np.random.default_rng(0)
    drawn = [sorted(data._choose_times(clip.scenes, rng).tolist()) for _ in range(1000)]
    starts = {stride: {t[0] for t in drawn if t[1] - t[0] == stride} for stride in (1, 2)}
    assert starts == {1: {*range(3), *range(15, 24)}, 2: {*range(15, 18)}}


def test_clips_without_a_scene_long_enough_are_left_out(tmp_path):
    short = data.Clip("short", "clip", tmp_path, (12, 64, 64, 3), cuts=(6,))
    long = data.Clip("long", "clip", tmp_path, (12, 64, 64, 3))
    source = sampler([short, long], [])
    assert (source.clips, source.short_scenes) == ([long], 2)
    with pytest.raises(DataError, match="a scene of at least 7 frames, none of 1 has; pass"):
        sampler([short], [])


def test_short_and_small_clips_are_named(tmp_path):
    short = data.Clip("short", "clip", tmp_path, (6, 64, 64, 3))
    small = data.Clip("small", "clip", tmp_path, (7, 64, 60, 3))
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_degrades_bit_for_bit_alike(clips, stills):
    s = sampler(clips, stills)
    for n in range(10):
        expected = s.load(n)
        for actual, x in zip(s.assemble(s.cuts(n), torch.device("cuda")), expected, strict=True):
            assert torch.equal(actual.cpu(), x)


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
        rows, cols = (data._choose_span(90, 90, 8, rng) for _ in range(2))
        part = picture[rows.start : rows.start + rows.length, cols.start : cols.start + cols.length]
        crop = degrade(part)[rows.margin : rows.margin + 8, cols.margin : cols.margin + 8]
        y, x = rows.start % 4, cols.start % 4
        whole = degrade(picture[y : y + (90 - y) // 4 * 4, x : x + (90 - x) // 4 * 4])
        top, left = rows.start // 4 + rows.margin, cols.start // 4 + cols.margin
        assert torch.equal(crop, whole[top : top + 8, left : left + 8])


@pytest.mark.parametrize(("full", "scaled"), [(32, 32), (33, 33), (70, 48), (500, 371)])
def test_spans_stay_in_the_picture(full, scaled):
    rng = np.random.default_rng(9)
    for _ in range(200):
        span = data._choose_span(full, scaled, 8, rng)
        assert span.start >= 0 and span.start + span.length <= scaled
        assert span.length % 4 == 0 and span.length >= 4 * (8 + span.margin)
        first, last = span.source(span.start, span.start + span.length)
        assert 0 <= first < last <= full


def test_frames_of_a_clip_are_consecutive(tmp_path):
    """Stride 1 or 2, forwards or backwards, and every start is possible."""
    frames = np.arange(14, dtype=np.uint8)[:, None, None, None].repeat(40, 1).repeat(40, 2)
    frames = frames.repeat(3, 3)
    np.save(tmp_path / "x.npy", frames)
    source = sampler([data.Clip("x", "clip", tmp_path / "x.npy", frames.shape)], [])
    seen = set()
    for n in range(300):
        lr, hr = source.sample(n, 0)
        times = lr[:, 0, 0, 0].int().tolist()
        assert len(set(np.diff(times))) == 1
        assert (hr == times[3]).all()
        seen.add((times[0], times[1] - times[0]))
    assert {step for _, step in seen} == {-2, -1, 1, 2}
    assert {start for start, step in seen if step == 1} == set(range(8))


def test_share_of_stills(clips, stills):
    source = sampler(clips, stills, still_fraction=0.25)
    calls = []
    source._moving_still = lambda clip, rows, cols, rng: (
        calls.append(clip) or torch.zeros(7, rows.length, cols.length, 3, dtype=torch.uint8)
    )
    for n in range(400):
        source.sample(n, 0)
    assert 70 <= len(calls) <= 130
    assert all(clip.kind == "still" for clip in calls)


def test_warping_by_whole_pixels_is_a_shift():
    texture = torch.from_numpy(textured(np.random.default_rng(10), 30, 40)).movedim(-1, 0).float()
    maps = np.tile(np.eye(2, 3), (7, 1, 1))
    maps[:, :, 2] = np.arange(7)[:, None] * (2, 1)  # x, y
    warped = data._warp(texture, maps, 12, 16, "reflection")
    for t in range(7):
        expected = texture[:, t : t + 12, 2 * t : 2 * t + 16]
        assert (warped[t] - expected).abs().max() < 0.05


def test_synthetic_motion_moves_and_keeps_the_center_frame(stills):
    rng = np.random.default_rng(11)
    moving = 0
    for _ in range(100):
        maps = data._motion(rng, 64, 64)
        np.testing.assert_allclose(maps[3], np.eye(2, 3), atol=1e-12)
        moving += np.abs(maps[6, :, 2]).max() > 1
    assert moving > 50
    source = sampler([], stills)
    changed = [not torch.equal(*source.sample(n, 0)[0][2:4]) for n in range(40)]
    assert sum(changed) > 20


def test_a_sprite_is_pasted_where_it_lies_and_moves(monkeypatch):
    """A white rectangle on black: one in each frame, moving by the motion's shift."""
    shift = np.arange(-3, 4)[:, None] * np.array([3.0, -2.0])

    def motion(rng, height, width):
        maps = np.tile(np.eye(2, 3), (7, 1, 1))
        maps[:, :, 2] = shift
        return maps

    monkeypatch.setattr(data, "_motion", motion)
    sprite = torch.cat([torch.full((3, 15, 21), 255.0), torch.ones(1, 15, 21)])
    for seed in range(20):
        frames = torch.zeros(7, 3, 60, 70)
        data._paste(frames, sprite, np.random.default_rng(seed))
        corner = np.random.default_rng(seed).integers((-11, -8), (60, 53))
        for t in range(7):
            x, y = (corner - shift[t]).astype(int)
            expected = torch.zeros(60, 70)
            expected[max(0, y) : max(0, y + 15), max(0, x) : max(0, x + 21)] = 255
            assert (frames[t] - expected).abs().max() < 0.5
