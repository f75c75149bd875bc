"""python -m mana_triton.training.prepare: what is decoded, what is skipped, continuing."""

import json

import numpy as np
import pytest
from footage import film, textured, write_pictures, write_video

from mana_triton.training import prepare as program
from mana_triton.training.clips import open_clips
from mana_triton.training.prepare import PrepareOptions, prepare

RNG = np.random.default_rng(0)


def run(out, *sources, **more) -> dict:
    return prepare(PrepareOptions(sources, out, **{"smallest": 32, **more}))


def test_prepared_clips_train_and_know_their_scenes(tmp_path):
    write_video(tmp_path / "film.mkv", film(9, 4, 12))
    report = run(tmp_path / "out", tmp_path / "film.mkv")
    [clip] = open_clips([tmp_path / "out"], tmp_path / "unused")
    assert clip.scenes == [range(9), range(9, 13), range(13, 25)]
    assert report == {"sources": 1, "clips": 1, "frames": 25, "skipped": {}}


def test_vimeo_and_reds(tmp_path):
    vimeo, reds = tmp_path / "vimeo", tmp_path / "REDS" / "train_sharp"
    for name, count in (("00001/0001", 7), ("00001/0002", 6), ("00002/0001", 7)):
        folder = vimeo / "sequences" / name
        write_pictures(folder, film(3, 4)[:count])
        for file in folder.iterdir():
            file.rename(file.with_name(f"im{int(file.stem) + 1}.png"))
    (vimeo / "sep_trainlist.txt").write_text("00001/0001\n00001/0002\n")
    (vimeo / "sep_testlist.txt").write_text("00002/0001\n")
    for name in ("000", "001"):
        write_pictures(reds / name, film(8))
    report = run(tmp_path / "out", vimeo, reds)
    clips = open_clips([tmp_path / "out"], tmp_path / "unused")
    assert {clip.name for clip in clips} == {"00001-0001", "001"}
    assert not any(clip.cuts for clip in clips), "the frames of a list are one scene"
    assert report["sources"] == 4
    assert list(report["skipped"].values()) == [
        "im7.png is missing", "one of REDS4, which tests are made of"
    ]  # fmt: skip
    run(tmp_path / "test", vimeo, split="test")
    assert open_clips([tmp_path / "test"], tmp_path / "unused")[0].name == "00002-0001"


def test_what_cannot_be_used_is_skipped(tmp_path):
    films = tmp_path / "films"
    films.mkdir()
    write_video(films / "good.mkv", textured(RNG, 8, 64, 80))
    write_video(films / "short.mkv", textured(RNG, 6, 64, 80))
    write_video(films / "small.mkv", textured(RNG, 8, 24, 80))
    (films / "broken.mkv").write_bytes(b"nothing")
    skipped = run(tmp_path / "out", films, jobs=2)["skipped"]
    broken, short, small = (skipped[str(films / f"{x}.mkv")] for x in ("broken", "short", "small"))
    assert "must be a readable video" in broken
    assert (short, small) == ("fewer than 7 frames", "a side of fewer than 32 pixels")
    assert run(tmp_path / "out", films, smallest=65)["clips"] == 0
    assert run(tmp_path / "out", films, smallest=24)["clips"] == 2


def test_stopped_work_is_continued_and_new_sources_are_added(tmp_path, monkeypatch):
    films, out, made = tmp_path / "films", tmp_path / "out", []
    films.mkdir()
    for name in ("a", "b", "c"):
        write_video(films / f"{name}.mkv", textured(RNG, 8, 64, 80))
    decode = program.decode

    def noting(source, *args):
        made.append(source.name)
        if made == ["a", "b"]:
            raise KeyboardInterrupt
        return decode(source, *args)

    monkeypatch.setattr(program, "decode", noting)
    with pytest.raises(KeyboardInterrupt):
        run(out, films)
    assert [clip.name for clip in open_clips([out], out)] == ["a"]
    write_video(films / "d.mkv", textured(RNG, 8, 64, 80))
    made.clear()
    assert run(out, films)["clips"] == 4
    assert made == ["b", "c", "d"]


def test_the_command_prints_a_summary(tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "film.mkv", film(9))
    write_video(tmp_path / "short.mkv", film(3))
    sources = [str(tmp_path / "film.mkv"), str(tmp_path / "short.mkv")]
    argv = ["prepare", *sources, "--out", str(tmp_path / "out"), "--smallest", "32"]
    monkeypatch.setattr("sys.argv", argv)
    program.main()
    stdout, stderr = capsys.readouterr()
    report = json.loads(stdout)
    assert (report["clips"], report["skipped"]) == (1, {"fewer than 7 frames": 1})
    assert "short.mkv: fewer than 7 frames" in stderr
    monkeypatch.setattr("sys.argv", ["prepare", str(tmp_path / "no"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: .*no must exist"):
        program.main()
