"""Sources of clips, and the cache of decoded frames."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from footage import film, textured, write_pictures, write_video
from media import ffmpeg, rgb_to_yuv
from media import write_video as write_tagged
from PIL import Image

from mana_triton.training import clips as data
from mana_triton.training.clips import DataError, Source, find_sources, open_clips
from mana_triton.video.reader import open_reader

RNG = np.random.default_rng(0)


def picture(path: Path) -> np.ndarray:
    [frame] = Source("x", "still", path, (path,)).frames()
    return frame


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_pictures_are_rounded(tmp_path, suffix):
    gray = np.array([[0, 128, 129, 257], [32896, 33024, 33025, 65535]], np.uint16)
    Image.fromarray(gray).save(tmp_path / f"a{suffix}")
    frame = picture(tmp_path / f"a{suffix}")
    expected = np.round(gray / 257).astype(np.uint8)
    assert expected.tolist() == [[0, 0, 1, 1], [128, 128, 129, 255]]
    assert (frame == expected[:, :, None]).all() and frame.shape == (2, 4, 3)


def test_floating_point_pictures_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a.tif must be a readable picture, .* floating-point"):
        picture(tmp_path / "a.tif")


def test_untagged_hd_video_has_the_colors_of_infer(tmp_path):
    """BT.709, as players assume: it was decoded as BT.601."""
    planes = rgb_to_yuv(np.full((720, 1280, 3), [190, 189, 0]), "bt709", False)
    video = write_tagged(tmp_path / "yellow.mp4", [planes] * 2, "yuv444p", pix_fmt="yuv444p")
    with open_reader(video) as reader:
        shown = [frame.rgb for frame in reader]
    frames = list(find_sources(video)[0].frames())
    np.testing.assert_array_equal(frames, shown)
    assert np.abs(frames[0][360, 640].astype(int) - [190, 189, 0]).max() <= 2


def test_interlaced_video_is_deinterlaced_as_by_infer(tmp_path):
    video = tmp_path / "fields.mkv"
    fields = "testsrc2=s=96x64:d=0.2:r=50,interlace,setfield=tff"
    ffmpeg("-f", "lavfi", "-i", fields, "-c:v", "libx264", "-flags", "+ildct+ilme", video)
    with open_reader(video) as reader:
        shown = [frame.rgb for frame in reader]
    assert any("deinterlaced" in note for note in reader.notes)
    np.testing.assert_array_equal(list(find_sources(video)[0].frames()), shown)


def test_frames_are_in_natural_order(tmp_path):
    write_pictures(tmp_path / "walk", textured(RNG, 12, 8, 8))
    for number in range(12):
        (tmp_path / "walk" / f"{number:03d}.png").rename(tmp_path / "walk" / f"{number + 1}.png")
    [source] = find_sources(tmp_path)
    assert [file.stem for file in source.files] == [str(n) for n in range(1, 13)]


def test_hidden_and_service_folders_are_left_out(tmp_path):
    for name in ("walk", ".ipynb_checkpoints", "@eaDir", "__MACOSX", "walk/.cache"):
        write_pictures(tmp_path / name, textured(RNG, 1, 8, 8))
    (tmp_path / ".hidden.mp4").touch()
    assert [source.name for source in find_sources(tmp_path)] == ["walk"]
    assert len(data.find_stills(tmp_path)) == 1


def test_folders_of_frames_at_any_depth(tmp_path):
    frames = textured(RNG, 4, 16, 20)
    write_pictures(tmp_path / "in" / "x" / "left", frames[:2])
    write_pictures(tmp_path / "in" / "x" / "right", frames)
    found = open_clips([tmp_path / "in"], tmp_path / "cache")
    assert [(clip.name, clip.shape[0]) for clip in found] == [("x-left", 2), ("x-right", 4)]
    np.testing.assert_array_equal(found[1].frames, frames)
    assert not list((tmp_path / "cache").glob("*.part*"))


def test_vimeo_lists_choose_the_sequences(tmp_path):
    frames = textured(RNG, 7, 16, 20)
    for name in ("00001/0001", "00001/0002"):
        write_pictures(tmp_path / "sequences" / name, frames)
        for file in (tmp_path / "sequences" / name).iterdir():
            file.rename(file.with_name(f"im{int(file.stem) + 1}.png"))
    (tmp_path / "sep_trainlist.txt").write_text("00001/0002\n")
    (tmp_path / "sep_testlist.txt").write_text("00001/0001\n")
    for split, name in (("train", "00001-0002"), ("test", "00001-0001")):
        [clip] = open_clips([tmp_path], tmp_path / "cache", split=split)
        assert clip.name == name
        np.testing.assert_array_equal(clip.frames, frames)
    (tmp_path / "sequences" / "00001" / "0002" / "im4.png").unlink()
    with pytest.raises(DataError, match=r"im4\.png is missing"):
        open_clips([tmp_path], tmp_path / "cache")


# ---- the cache


def test_videos_are_decoded_losslessly_and_once(tmp_path, monkeypatch):
    frames = film(9, 4, 12)
    write_video(tmp_path / "film.mkv", frames)
    cache = tmp_path / "cache"
    [clip] = open_clips([tmp_path / "film.mkv"], cache)
    assert (clip.name, clip.shape) == ("film", frames.shape)
    assert clip.scenes == [range(9), range(9, 13), range(13, 25)]
    assert isinstance(clip.frames, np.memmap)
    np.testing.assert_array_equal(clip.frames, frames)
    monkeypatch.setattr(data, "decode", lambda *_: pytest.fail("decoded again"))
    assert open_clips([tmp_path / "film.mkv"], cache) == [clip]
    assert open_clips([cache], Path("unused")) == [clip]
    with pytest.raises(DataError, match="must list at least one still"):
        open_clips([cache], Path("unused"), kind="still")


def test_a_changed_source_is_decoded_again(tmp_path):
    frames = textured(RNG, 3, 16, 20)
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
    """What was decoded before the stop is complete; the unfinished clip is not in the cache."""
    for name in "ab":
        write_pictures(tmp_path / "in" / name, textured(RNG, 3, 16, 20))
    reader, reads = data._read_picture, []

    def failing(path: Path) -> np.ndarray:
        if path.parent.name == "b" and path.stem == "002":
            raise KeyboardInterrupt
        return reader(path)

    monkeypatch.setattr(data, "_read_picture", failing)
    with pytest.raises(KeyboardInterrupt):
        open_clips([tmp_path / "in"], tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    monkeypatch.setattr(data, "_read_picture", lambda path: reads.append(path) or reader(path))
    assert len(open_clips([tmp_path / "in"], tmp_path / "cache")) == 2
    assert {path.parent.name for path in reads} == {"b"}


def test_errors_name_the_file(tmp_path):
    empty, broken, uneven = (tmp_path / x for x in ("empty", "broken.mp4", "uneven"))
    empty.mkdir()
    broken.write_bytes(b"no video")
    write_pictures(uneven, textured(RNG, 2, 16, 20))
    Image.new("RGB", (20, 12)).save(uneven / "002.png")
    cache = tmp_path / "cache"
    for path, message in (
        (empty, "empty must hold videos .* it holds none"),
        (tmp_path / "missing", "missing must exist"),
        (broken, "broken.mp4 must be a readable video"),
        (uneven, "must have one size, frame 2 has 20x12 after 20x16"),
    ):
        with pytest.raises(DataError, match=message):
            open_clips([path], cache)
    with pytest.raises(DataError, match="empty must hold pictures"):
        open_clips([empty], cache, kind="still")
    entry = {"name": "x", "kind": "clip", "file": "x-0.npy", "shape": [7, 64, 64, 3]}
    (cache / data.INDEX).write_text(json.dumps({"x": entry}))
    with pytest.raises(DataError, match=r"lists x-0\.npy, which is missing"):
        open_clips([cache], cache)
    (cache / data.INDEX).write_text('{"half')
    with pytest.raises(DataError, match="must be JSON"):
        open_clips([cache], cache)


def test_a_damaged_video_is_refused(tmp_path):
    write_video(tmp_path / "film.mkv", textured(RNG, 30, 64, 64))
    whole = (tmp_path / "film.mkv").read_bytes()
    (tmp_path / "film.mkv").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"must be an undamaged video, got: .*; remove it"):
        open_clips([tmp_path / "film.mkv"], tmp_path / "cache")


@pytest.mark.parametrize("kept", [0, 50, -1000], ids=["empty", "header", "most"])
def test_a_truncated_file_of_a_cache_is_named(tmp_path, kept):
    write_video(tmp_path / "film.mkv", film(9))
    [clip] = open_clips([tmp_path / "film.mkv"], tmp_path / "cache")
    clip.path.write_bytes(clip.path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"film-.*\.npy must be a complete file .* delete it") as e:
        _ = clip.frames
    assert "\n" not in str(e.value)
