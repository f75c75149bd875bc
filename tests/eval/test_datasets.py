"""Layouts of test sets, their motion, and the frames of other programs that belong to them."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from clips import moving, write, write_black, write_lossless
from media import rgb_to_yuv, write_video
from PIL import Image

from eval import datasets
from mana_triton.training.clips import DataError

pytestmark = pytest.mark.usefixtures("one_thread")


def names_in(name: str, path: Path, cache: Path) -> list[str]:
    return [clip.name for clip in datasets.find_test_set(name, path, cache, None)]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["calendar", "city"], ["calendar", "city"]),
        (["GT/calendar", "BIx4/calendar", "GT/city"], ["calendar", "city"]),
        (["car05/truth", "car05/input4", "hdclub/a/truth"], ["car05", "hdclub-a"]),
        (["a/b/c", "a/d"], ["a-b-c", "a-d"]),
        (["clip10", "clip9"], ["clip9", "clip10"]),
        (["walk", ".ipynb_checkpoints", "@eaDir", "walk/.thumbs", "__MACOSX/walk"], ["walk"]),
        (["①", "b"], ["b", "①"]),
    ],
    ids=["vid4", "udm10", "spmcs", "nested", "numbers", "hidden", "circled-digit"],
)
def test_layouts(tmp_path, folders, expected):
    for folder in folders:
        write_black(tmp_path / "set" / folder)
    assert names_in("mine", tmp_path / "set", tmp_path) == expected


def test_reds4_is_four_clips_of_train_sharp(tmp_path):
    root = tmp_path / "REDS"
    for clip in ("000", "001", "011", "015", "020"):
        for folder in ("train/train_sharp", "train/train_sharp_bicubic/X4", "val/val_sharp"):
            write_black(root / folder / clip)
    clips = datasets.find_test_set("REDS4", root, tmp_path, None)
    sharp = root / "train" / "train_sharp"
    assert [clip.source.place for clip in clips] == [sharp / c for c in datasets.REDS4_CLIPS]
    with pytest.raises(DataError, match="lacks 000"):
        names_in("reds-4", root / "val", tmp_path)
    write_black(root / "GT" / "011")
    with pytest.raises(DataError, match="must hold one clip 011"):
        names_in("REDS4", root, tmp_path)


def test_left_out_clips_are_named(tmp_path, capsys):
    for name in ("target", "city"):  # "target" is also a name of originals
        write_black(tmp_path / "plain" / name)
        write_black(tmp_path / "pairs" / name / "truth")
        write_black(tmp_path / "pairs" / name / "input4")
    names_in("a", tmp_path / "pairs", tmp_path)
    assert not capsys.readouterr().err
    names_in("a", tmp_path / "plain", tmp_path)
    assert re.search(r"note: of .* only .* left out: city\n", capsys.readouterr().err)


def test_videos_are_decoded_as_the_command_decodes_them(tmp_path):
    """Untagged HD video is BT.709; FFmpeg's own conversion would take BT.601."""
    yellow = np.full((720, 1280, 3), (190, 189, 0), np.uint8)
    planes = rgb_to_yuv(yellow, "bt709", full_range=False)
    write_video(tmp_path / "yellow.mkv", [planes], "yuv444p", pix_fmt="yuv444p")
    (clip,) = datasets.find_test_set("a", tmp_path / "yellow.mkv", tmp_path, None)
    frame = next(clip.source.frames())
    assert clip.shape == (1, 720, 1280)
    assert np.abs(frame.astype(int) - yellow).max() <= 3


def test_truncated_video_is_refused(tmp_path):
    video = tmp_path / "clip.mkv"
    write_lossless(video, moving(40, 64, 64))
    assert datasets.find_test_set("a", video, tmp_path, None)[0].shape == (40, 64, 64)
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    with pytest.raises(DataError, match=r"clip.mkv must be a complete video, .*; copy it again"):
        datasets.find_test_set("a", video, tmp_path, None)


def test_current_folder_gives_its_name(tmp_path, monkeypatch):
    write_black(tmp_path / "dune")
    monkeypatch.chdir(tmp_path / "dune")
    assert names_in("a", Path(), tmp_path) == ["dune"]


def test_incomplete_set_is_reported(tmp_path):
    write_black(tmp_path / "set" / "walk", frames=3)
    clips = datasets.find_test_set("vid4", tmp_path / "set", tmp_path, None)
    line = datasets.incomplete("vid4", clips)
    assert line == "vid4 has 4 clips and 171 frames, here are 1 and 3: do not compare the scores"
    assert datasets.incomplete("mine", clips) is None


@pytest.fixture(scope="module")
def vimeo(tmp_path_factory) -> Path:
    """17 sequences, of which number 5 moves; 6 % of them are one."""
    root = tmp_path_factory.mktemp("vimeo")
    names = [f"00001/{n:04d}" for n in range(17)]
    for n, name in enumerate(names):
        frames = moving(7, 64, 64, speed=2 * (n == 5), seed=n)
        write(root / "sequences" / name, frames, "im{}.png", first=1)
    (root / "sep_testlist.txt").write_text("\n".join(names))
    return root


def test_vimeo_motion_is_the_fastest_6_percent(vimeo, tmp_path, monkeypatch):
    expected = ["00001-0005"]
    assert names_in("Vimeo-90K-Motion", vimeo, tmp_path) == expected
    measured, motion = [], datasets.motion
    monkeypatch.setattr(datasets, "motion", lambda s: measured.append(s.name) or motion(s))
    assert names_in("vimeo_90k_motion", vimeo, tmp_path) == expected
    assert not measured  # the cache is used
    changed = vimeo / "sequences" / "00001" / "0003" / "im4.png"
    os.utime(changed, ns=(0, 4 * 10**18))
    assert names_in("Vimeo-90K-Motion", vimeo, tmp_path) == expected
    assert measured == ["00001-0003"]


def test_measured_motion_survives_an_unreadable_frame(vimeo, tmp_path, monkeypatch):
    broken = tmp_path / "vimeo"
    shutil.copytree(vimeo, broken)
    frame = broken / "sequences" / "00001" / "0009" / "im3.png"
    content = frame.read_bytes()
    frame.write_bytes(content[:100])
    with pytest.raises(DataError, match=r"im3.png must be a readable picture"):
        names_in("Vimeo-90K-Motion", broken, tmp_path)
    frame.write_bytes(content)
    measured, motion = [], datasets.motion
    monkeypatch.setattr(datasets, "motion", lambda s: measured.append(s.name) or motion(s))
    assert names_in("Vimeo-90K-Motion", broken, tmp_path) == ["00001-0005"]
    assert measured == [f"00001-{n:04d}" for n in range(9, 17)]


@pytest.mark.parametrize(
    ("names", "by_order"),
    [
        (("one", "two"), False),
        (("Out_One", "Out_Two"), False),
        (("o-n-e", "TWO"), False),
        (("x", "y"), True),
    ],
    ids=["same-name", "contained", "punctuation", "order"],
)
def test_outputs_are_matched_to_clips(tmp_path, capsys, names, by_order):
    for name in ("one", "two"):
        write_black(tmp_path / "hr" / name)
    for name in names:
        write_black(tmp_path / "out" / name)
    clips = datasets.find_test_set("a", tmp_path / "hr", tmp_path, None)
    found = datasets.match(clips, datasets.find_clips(tmp_path / "out"), tmp_path / "out")
    places = {clip: source.place.name for clip, source in found.items()}
    assert places == dict(zip(("one", "two"), names, strict=True))
    assert ("matched in order" in capsys.readouterr().err) is by_order


def test_ambiguous_outputs_are_refused(tmp_path):
    for name in ("scene1", "scene10"):
        write_black(tmp_path / "hr" / name)
    write_black(tmp_path / "out" / "scene10-ours")
    clips = datasets.find_test_set("x", tmp_path / "hr", tmp_path, None)
    with pytest.raises(DataError, match=r"each of 2 clips, it holds 1; .* after scene1, scene10"):
        datasets.match(clips, datasets.find_clips(tmp_path / "out"), tmp_path / "out")


def test_pictures_become_clips_where_one_frame_is_scored(tmp_path):
    for name in ("00001_0005", "00001_0007"):
        (tmp_path / "out").mkdir(exist_ok=True)
        Image.new("RGB", (12, 12)).save(tmp_path / "out" / f"{name}.png")
    split = datasets.singles(datasets.find_clips(tmp_path / "out"))
    assert [source.name for source in split] == ["00001_0005", "00001_0007"]
