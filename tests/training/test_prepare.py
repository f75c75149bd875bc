"""python -m mana_triton.training.prepare: scenes, parts, what is skipped, going on, checksums."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_data import textured, write_pictures, write_video

from mana_triton.training import clips as data
from mana_triton.training import prepare
from mana_triton.training.prepare import parse_args, prepare_all

COLORS = ((200, 30, 30), (30, 160, 60), (40, 60, 220))


def scenes(*lengths: int, size: tuple[int, int] = (64, 80)) -> np.ndarray:
    """Scenes of another color and texture each, one after the other."""
    rng = np.random.default_rng(0)
    shots = []
    for number, length in enumerate(lengths):
        shot = 0.3 * textured(rng, 1, *size) + 0.7 * np.array(COLORS[number % 3])
        shots.append(np.repeat(shot.astype(np.uint8), length, 0))
    return np.concatenate(shots)


def run(out: Path, *sources: Path, more: tuple[str, ...] = ()) -> dict:
    paths = [str(path) for path in sources]
    return prepare_all(
        parse_args(["prepare", *paths, "--out", str(out), "--smallest", "32", *more])
    )


def details(out: Path) -> list[tuple[str, str, str]]:
    items = json.loads((out / prepare.REPORT).read_text())["details"]
    return [(Path(item["source"]).name, item["what"], item["why"]) for item in items]


def test_videos_are_split_into_scenes(tmp_path):
    """And no sample ever mixes two of them."""
    frames = scenes(9, 4, 12)
    write_video(tmp_path / "film.mkv", frames)
    report = run(tmp_path / "out", tmp_path / "film.mkv")
    clips = data.open_clips([tmp_path / "out"], tmp_path / "unused")
    assert [np.array(clip.frames).tolist() for clip in clips] == [
        frames[:9].tolist(), frames[13:].tolist()
    ]  # fmt: skip
    assert (report["sources"], report["clips"], report["frames"]) == (1, 2, 21)
    assert details(tmp_path / "out") == [
        ("film.mkv", "frames 9 to 12", "a scene of fewer than 7 frames")
    ]
    sampler = data.Sampler(clips, [], crop=8, batch=1, seed=0)
    for n in range(30):
        lr, _ = sampler.sample(n, 0)
        colors = lr.float().mean(dim=(1, 2))
        assert (colors - colors[0]).abs().max() < 1


def test_long_scenes_become_files_of_bounded_size(tmp_path, monkeypatch):
    frames = scenes(40)
    monkeypatch.setattr(prepare, "PART", 16 * frames[0].nbytes)
    write_video(tmp_path / "film.mkv", frames)
    run(tmp_path / "out", tmp_path / "film.mkv")
    clips = data.open_clips([tmp_path / "out"], tmp_path / "unused")
    parts = sorted((int(clip.name.split("-")[1]), clip) for clip in clips)
    assert np.array_equal(np.concatenate([clip.frames for _, clip in parts]), frames)
    lengths = [clip.shape[0] for _, clip in parts]
    assert min(lengths) >= 7 and max(lengths) <= 16 and len(lengths) > 2


@pytest.mark.parametrize("fit", [5, 7, 9, 12, 13, 16])
def test_no_part_is_larger_than_a_file_or_too_short(monkeypatch, fit):
    """Where fewer than 13 frames fit, as of 1080p, a last part of up to 13 was too large."""
    frames = [np.full((2, 2, 3), number, np.uint8) for number in range(60)]
    monkeypatch.setattr(prepare, "PART", fit * frames[0].nbytes)
    for length in range(1, 40):
        parts = list(prepare._parts([*frames[:length], None, *frames[length:]]))
        for first, part in parts:
            assert [int(frame[0, 0, 0]) for frame in part] == [*range(first, first + len(part))]
            assert len(part) >= min(7, length) and len(part) <= max(7, fit)
            assert first >= length or first + len(part) <= length, "across the cut"
        held = {first + n for first, part in parts for n in range(len(part))}
        assert held == set(range(60))
        assert len({first for first, _ in parts}) == len(parts)


def test_files_that_must_be_too_large_are_counted(tmp_path, monkeypatch):
    frames = scenes(9)
    write_video(tmp_path / "film.mkv", frames)
    monkeypatch.setattr(prepare, "PART", 7 * frames[0].nbytes - 1)
    report = run(tmp_path / "out", tmp_path / "film.mkv")
    assert (report["clips"], report["clips_over_56_mib"]) == (2, 2)
    monkeypatch.setattr(prepare, "PART", 7 * frames[0].nbytes)
    assert run(tmp_path / "out", tmp_path / "film.mkv")["clips_over_56_mib"] == 0


def test_seven_pictures_may_have_a_cut(tmp_path):
    """Only the sequences of Vimeo-90K are known to have none."""
    write_pictures(tmp_path / "pictures", scenes(3, 4))
    assert run(tmp_path / "out", tmp_path / "pictures")["clips"] == 0
    whats = [what for _, what, _ in details(tmp_path / "out")]
    assert whats == ["frames 0 to 2", "frames 3 to 6"]


def test_vimeo_and_reds(tmp_path):
    vimeo, reds = tmp_path / "vimeo", tmp_path / "REDS" / "train_sharp"
    # seven frames of a list are one clip, whatever they look like
    for name, count in (("00001/0001", 7), ("00001/0002", 6), ("00002/0001", 7)):
        write_pictures(vimeo / "sequences" / name, scenes(3, 4)[:count])
        for i in range(count):
            picture = sorted((vimeo / "sequences" / name).glob("[0-9]*.png"))[0]
            picture.rename(picture.with_name(f"im{i + 1}.png"))
    (vimeo / "sep_trainlist.txt").write_text("00001/0001\n00001/0002\n")
    (vimeo / "sep_testlist.txt").write_text("00002/0001\n")
    for name in ("000", "001"):
        write_pictures(reds / name, scenes(8))
    report = run(tmp_path / "out", vimeo, reds)
    clips = data.open_clips([tmp_path / "out"], tmp_path / "unused")
    assert {clip.name for clip in clips} == {"00001-0001-0", "001-0"}
    assert not any(clip.cuts for clip in clips)
    assert report["sources"] == 4
    assert sorted(details(tmp_path / "out")) == [
        ("000", "all", "one of REDS4, which tests are made of"),
        ("0002", "all", "im7.png is missing"),
    ]
    with pytest.raises(data.DataError, match="it holds train and --split is test; pass another"):
        run(tmp_path / "out", vimeo, more=("--split", "test"))
    run(tmp_path / "test", vimeo, more=("--split", "test"))
    [clip] = data.open_clips([tmp_path / "test"], tmp_path / "unused")
    assert clip.name == "00002-0001-0"


def test_what_cannot_be_used_is_reported(tmp_path):
    films = tmp_path / "films"
    films.mkdir()
    write_video(films / "good.mkv", scenes(8))
    write_video(films / "small.mkv", scenes(8, size=(24, 80)))
    (films / "broken.mkv").write_bytes(b"nothing")
    report = run(tmp_path / "out", films, more=("--jobs", "2"))
    assert report["clips"] == 1 and len(report["skipped"]) == 2
    broken, small = sorted(details(tmp_path / "out"))
    assert broken[:2] == ("broken.mkv", "all") and "must be a readable video" in broken[2]
    assert small == ("small.mkv", "80x24", "a side of fewer than 32 pixels")


def test_another_smallest_side_is_looked_at_again(tmp_path):
    """What was too small stayed left out."""
    write_video(tmp_path / "film.mkv", scenes(8))
    for smallest, clips in (("256", 0), ("64", 1), ("65", 0)):
        report = run(tmp_path / "out", tmp_path / "film.mkv", more=("--smallest", smallest))
        assert (report["clips"], report["made_now"]) == (clips, 1)
    report = run(tmp_path / "out", tmp_path / "film.mkv", more=("--smallest", "65"))
    assert report["made_now"] == 0


def test_stopped_work_goes_on_and_new_sources_join(tmp_path, monkeypatch):
    films, out = tmp_path / "films", tmp_path / "out"
    films.mkdir()
    for name in ("a", "b", "c"):
        write_video(films / f"{name}.mkv", scenes(8))
    write = prepare._write

    def failing(source, *args):
        if source.name == "b":
            raise KeyboardInterrupt
        return write(source, *args)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_write", failing)
        with pytest.raises(KeyboardInterrupt):
            run(out, films)
    assert [clip.name for clip in data.open_clips([out], out)] == ["a-0"]
    assert run(out, films)["made_now"] == 2
    assert run(out, films)["made_now"] == 0
    write_video(films / "d.mkv", scenes(8))
    report = run(out, films)
    assert (report["made_now"], report["clips"]) == (1, 4)


def test_a_damaged_file_is_found_and_made_anew(tmp_path):
    write_video(tmp_path / "film.mkv", scenes(9))
    out = tmp_path / "out"
    run(out, tmp_path / "film.mkv")
    [clip] = data.open_clips([out], out)
    [entry] = json.loads((out / data.INDEX).read_text()).values()
    good = clip.path.read_bytes()
    assert entry["sha256"] == prepare.checksum(clip.path)
    clip.path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert run(out, tmp_path / "film.mkv")["made_now"] == 0
    assert run(out, tmp_path / "film.mkv", more=("--verify",))["made_now"] == 1
    assert clip.path.read_bytes() == good


def test_the_command(tmp_path):
    write_video(tmp_path / "film.mkv", scenes(9, 3))
    command = [
        sys.executable,
        "-m",
        "mana_triton.training.clips",
        "prepare",
        str(tmp_path / "film.mkv"),
    ]
    command += ["--out", str(tmp_path / "out"), "--smallest", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["clips"] == 1
    assert "skipped 1: a scene of fewer than 7 frames" in done.stderr
    command[4] = str(tmp_path / "missing")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: ")
