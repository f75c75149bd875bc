"""Media fidelity: what goes in beside the pixels comes out, and the pixels mean the same colors."""

import os
import queue
import re
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from time import process_time
from types import SimpleNamespace
from typing import Any, cast

import av
import media
import numpy as np
import pytest
from av.stream import Disposition
from faults import FailingContainer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from mana_triton.video import reader as readers
from mana_triton.video.encoder import EncodeOptions
from mana_triton.video.frame import Frame, MediaError
from mana_triton.video.image_reader import ImageFolderReader
from mana_triton.video.reader import open_reader
from mana_triton.video.timestamps import Discontinuities
from mana_triton.video.writer import VideoWriter, open_writer

ROOT = Path(__file__).parents[2]
DEMO = ROOT.parent / "shared" / "data" / "demo"
FAST = {"preset": "ultrafast"}
LOSSLESS = {"preset": "ultrafast", "qp": "0"}
PICTURES = [media.smooth_rgb(32, 48, phase / 5) for phase in range(40)]


def enlarge(rgb: np.ndarray, scale: int = 4) -> np.ndarray:
    """The identity network: every pixel becomes a block of itself."""
    return rgb.repeat(scale, axis=0).repeat(scale, axis=1)


def encode_options(options: dict[str, str] | None = None, **settings: Any) -> EncodeOptions:
    return EncodeOptions(options=tuple((options or {}).items()), **settings)


def convert(source: Path, target: Path, scale: int = 4, start=None, end=None, **settings):
    """Run the identity network over a file; returns reader and writer for their notes."""
    settings.setdefault("options", {} if "codec" in settings else FAST)
    with open_reader(source, start, end) as reader:
        size = scale * reader.width, scale * reader.height
        overwrite = settings.pop("overwrite", False)
        encode = encode_options(**settings) if target.suffix else EncodeOptions()
        with open_writer(target, reader, *size, encode, overwrite=overwrite) as writer:
            for frame in reader:
                writer.write(enlarge(frame.rgb, scale), frame)
    return reader, writer


def read_all(path: Path, start=None, end=None) -> list[Frame]:
    """All frames of a file or folder."""
    with open_reader(path, start, end) as reader:
        return list(reader)


def read_subtitles(path: Path, index: int = 0) -> list[tuple[int, int, str]]:
    """Begin and end in milliseconds, and words, of one stream of text."""
    lines = []
    with av.open(str(path)) as container:
        stream: Any = container.streams.subtitles[index]
        for packet in cast(Any, container.demux(stream)):
            for line in stream.codec_context.decode(packet) if packet.size else ():
                begin = round(packet.pts * packet.time_base * 1000)
                end = round((packet.pts + packet.duration) * packet.time_base * 1000)
                lines.append((begin, end, line.dialogue.decode()))
    return [line for line in lines if line[2]]


def hashes(path: Path, kind: str = "audio", index: int = 0) -> list[str]:
    """Packet hashes of one stream."""
    return [digest for _, digest in media.packets(path, kind, index)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """40 frames at 25 per second with sound; the index of the mp4 is at its start."""
    path = tmp_path_factory.mktemp("plain") / "plain.mp4"
    return media.write_video(path, PICTURES, audio=True, muxer={"movflags": "faststart"})


@pytest.fixture(scope="module", params=["mp4", "mkv"])
def rich(request, tmp_path_factory) -> Path:
    """Everything at once: irregular times from 0.5 s, rotation, aspect, sound, chapters, tags."""
    steps = np.random.default_rng(3).integers(18, 100, len(PICTURES))  # milliseconds
    return media.write_video(
        tmp_path_factory.mktemp("rich") / f"rich.{request.param}",
        PICTURES,
        pts=(45037 + 90 * np.cumsum(steps)).tolist(),
        aspect=Fraction(4, 3),
        rotation=(90, False),
        audio=True,
        metadata={"title": "Über uns", "my_own_key": "kept"},
        chapters=[(0, 1000, "Eins"), (1000, 2000, "Zwei ü")],
        muxer={"movie_timescale": "90000"} if request.param == "mp4" else {},  # exact start
    )


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_round_trip_keeps_all_but_the_pixels(rich, suffix, tmp_path):
    target = tmp_path / f"out{suffix}"
    reader, _ = convert(rich, target)
    assert reader.truncated is None
    # Matroska has no negative times, so sound that starts 21 ms early moves everything alike
    moved = media.packets(target, "audio")[0][0] - media.packets(rich, "audio")[0][0]
    assert moved == 0 or suffix == ".mkv"
    rounding = 0 if suffix != ".mkv" else Fraction(1, 1000)
    before, after = media.frame_times(rich), media.frame_times(target)
    assert len(before) == len(after) == len(PICTURES)
    assert all(abs(b + moved - a) <= rounding for b, a in zip(before, after, strict=True))
    assert hashes(rich) == hashes(target)
    if suffix == rich.suffix == ".mp4":  # the last frame is shown as long as before
        with av.open(str(rich)) as old, av.open(str(target)) as new:
            assert old.streams.video[0].duration == new.streams.video[0].duration
    with av.open(str(rich)) as old, av.open(str(target)) as new:
        picture, sound = new.streams.video[0], new.streams.audio[0]
        assert (picture.width, picture.height) == (4 * 48, 4 * 32)
        assert picture.sample_aspect_ratio == Fraction(4, 3)
        assert next(new.decode(video=0)).rotation == 90
        assert [s.type for s in new.streams if s.type != "data"] == ["video", "audio"]
        tags = {key.lower(): value for key, value in new.metadata.items()}
        assert tags["title"] == "Über uns"
        assert ("my_own_key" in tags) == (
            rich.suffix == ".mkv"
        )  # as the input was made, mp4 lost it
        if {suffix, rich.suffix} == {".mkv"}:  # mp4 has no such flag
            assert sound.disposition == old.streams.audio[0].disposition
            assert sound.disposition & Disposition.comment
        if suffix != ".mov":  # QuickTime's language codes are not read back
            assert sound.language == old.streams.audio[0].language == "deu"
        assert "Ton" in (sound.metadata.get("title"), sound.metadata.get("name"))
        chapters = [
            (c["start"] * c["time_base"], c["end"] * c["time_base"], c["metadata"]["title"])
            for c in cast(list[Any], new.chapters())
        ]
        assert chapters == [(0, 1, "Eins"), (1, 2, "Zwei ü")]


def test_custom_tags_survive_in_mp4(tmp_path):
    source = media.write_video(tmp_path / "a.mkv", PICTURES[:2], metadata={"MY_KEY": "kept"})
    convert(source, tmp_path / "b.mp4")
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert container.metadata["MY_KEY"] == "kept"
    convert(tmp_path / "b.mp4", tmp_path / "c.mp4")
    with av.open(str(tmp_path / "c.mp4")) as container:
        assert container.metadata["MY_KEY"] == "kept"


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_every_orientation_survives(degrees, mirrored, tmp_path):
    source = media.write_video(tmp_path / "a.mp4", PICTURES[:2], rotation=(degrees, mirrored))
    convert(source, tmp_path / "b.mp4")
    matrices = []
    for name in ("a.mp4", "b.mp4"):
        with av.open(str(tmp_path / name)) as container:
            data = next(container.decode(video=0)).side_data.get("DISPLAYMATRIX")
            matrices.append(None if data is None else np.frombuffer(data, np.int32).tolist())
    assert matrices[0] == matrices[1]
    assert (matrices[0] is None) == (degrees == 0 and not mirrored)


@pytest.mark.parametrize("suffix", [".avi", ".mkv", ".nut"])
def test_photos_with_exif_are_read(suffix, tmp_path):
    """PyAV has no name for EXIF beside a frame, and could tell nothing then, not even the turn."""
    source = media.write_photos(tmp_path / f"a{suffix}", PICTURES[:3])
    with open_reader(source) as reader:
        assert reader.rotation in (90, -90)
        assert reader.display_matrix is not None
        assert len(list(reader)) == 3


def test_subtitles_fonts_and_covers(tmp_path):
    lines = [(100, 500, "eins"), (600, 1200, "zwei äöü")]
    source = media.write_video(tmp_path / "v.mkv", PICTURES, audio=True, attachment=b"font" * 99)
    source = media.add_subtitles(tmp_path / "s.mkv", source, lines) and source
    convert(source, tmp_path / "font.mkv")
    with av.open(str(tmp_path / "font.mkv")) as container:
        fonts = [bytes(cast(Any, s).data) for s in container.streams if s.type == "attachment"]
    assert fonts == [b"font" * 99]
    _, writer = convert(source, tmp_path / "font.mp4")
    assert any("attachment stream" in note and "left out" in note for note in writer.notes)

    subbed = tmp_path / "s.mkv"
    convert(subbed, tmp_path / "sub.mkv")
    assert media.packets(subbed, "subtitle") == media.packets(tmp_path / "sub.mkv", "subtitle")
    assert len(media.packets(subbed, "subtitle")) == 2
    _, writer = convert(subbed, tmp_path / "sub.mp4")
    assert any("(srt) is converted to mov_text" in note for note in writer.notes)
    assert read_subtitles(tmp_path / "sub.mp4") == [(100, 500, "eins"), (600, 1200, "zwei äöü")]
    convert(tmp_path / "sub.mp4", tmp_path / "back.mkv")
    # Matroska has no negative times, so sound that starts early moves everything alike
    moved = round(1000 * media.frame_times(tmp_path / "back.mkv")[0])
    wanted = [(100 + moved, 500 + moved, "eins"), (600 + moved, 1200 + moved, "zwei äöü")]
    assert read_subtitles(tmp_path / "back.mkv") == wanted
    _, writer = convert(subbed, tmp_path / "sub.avi")
    assert any("subtitle stream" in note and "left out" in note for note in writer.notes)

    cover = media.write_video(tmp_path / "c.mp4", PICTURES[:4], cover=True)
    convert(cover, tmp_path / "cover.mp4")
    assert hashes(cover, "video", 1) == hashes(tmp_path / "cover.mp4", "video", 1)


def test_sound_is_interleaved(tmp_path):
    """Fails if packets are copied in one piece at the end, which players cannot stream."""
    source = media.write_video(tmp_path / "a.mkv", PICTURES, rate=2, audio=True)  # 20 seconds
    convert(source, tmp_path / "b.mkv", options=FAST | {"tune": "zerolatency"})
    newest = {"video": 0.0, "audio": 0.0}
    with av.open(str(tmp_path / "b.mkv")) as container:
        for packet in cast(Any, container.demux()):
            if packet.size:
                newest[packet.stream.type] = float(packet.pts * packet.time_base)
                assert abs(newest["video"] - newest["audio"]) < 1.1
    assert min(newest.values()) > 19


def test_missing_timestamps_are_made_up(tmp_path):
    """A bare H.264 stream has none; a frame without one would stop the encoder."""
    source = media.write_video(tmp_path / "a.h264", PICTURES)
    convert(source, tmp_path / "b.mp4")
    assert media.frame_times(tmp_path / "b.mp4") == [Fraction(i, 25) for i in range(40)]


def test_wrong_timestamps_are_corrected(tmp_path):
    """H.264 with B frames in AVI comes with times that go back and forth."""
    source = media.write_video(
        tmp_path / "a.avi", PICTURES, options={"bf": "2"}, time_base=Fraction(1, 25)
    )
    assert media.frame_times(source) != sorted(media.frame_times(source))
    reader, _ = convert(source, tmp_path / "b.mp4")
    times = media.frame_times(tmp_path / "b.mp4")
    assert len(times) == len(set(times)) == 40
    assert any("ran backwards" in note for note in reader.notes)


@pytest.mark.parametrize(("suffix", "counts"), [(".ts", (40, 30, 32)), (".mkv", (40, 30))])
def test_joined_recordings_follow_each_other(suffix, counts, tmp_path):
    """Times that begin anew gave 30 frames in half a millisecond, and ended the copying."""
    parts = [tmp_path / f"{count}{suffix}" for count in counts]
    for part, count in zip(parts, counts, strict=True):
        media.write_video(part, PICTURES[:count], audio=True, color=(1, 1, 1, 1))
    source, out = tmp_path / f"joined{suffix}", tmp_path / f"out{suffix}"
    source.write_bytes(b"".join(part.read_bytes() for part in parts))
    reader, writer = convert(source, out)
    assert (len(reader.notes), writer.notes, reader.truncated) == (1, [], None)
    places = "2 places" if len(parts) == 3 else "1 place"
    assert f"times begin anew at {places}, as of joined recordings; what" in reader.notes[0]
    assert hashes(out) == [digest for part in parts for digest in hashes(part)]
    frames: Any = np.array(media.frame_times(out))
    sounds: Any = np.array([time for time, _ in media.packets(out, "audio")])
    for part in parts:
        times, heard = media.frame_times(part), [time for time, _ in media.packets(part, "audio")]
        now, later = np.split(frames, [len(times)]), np.split(sounds, [len(heard)])
        moved = {new - old for new, old in zip(now[0], times, strict=True)}
        moved |= {new - old for new, old in zip(later[0], heard, strict=True)}
        assert max(moved) - min(moved) <= Fraction(1, 1000)
        for before, (*_, last) in ((now[1], now[0]), (later[1], later[0])):
            assert not len(before) or 0 < before[0] - last < Fraction(1, 10)
        frames, sounds = now[1], later[1]
    assert len(frames) == len(sounds) == 0
    with open_reader(source) as reader:
        wanted = [
            frame.pts for frame in reader
            if 19 <= 10 * (frame.pts * frame.time_base - reader.offset) < 24
        ]  # fmt: skip
    assert [frame.pts for frame in read_all(source, 1.9, 2.4)] == wanted
    assert len(wanted) >= 10


@pytest.mark.parametrize("with_sound", ["oxx", "xox", "xxo", "xoox", "oxo"])
def test_joined_recordings_without_sound_in_some(with_sound, tmp_path):
    """The jump of sound over a silent recording was taken for that of the picture before it."""
    kinds = {
        kind: media.write_video(tmp_path / f"{kind}.ts", PICTURES[:count], audio=kind == "x")
        for kind, count in (("x", 40), ("o", 30))
    }
    source = tmp_path / "joined.ts"
    source.write_bytes(b"".join(kinds[kind].read_bytes() for kind in with_sound))
    with av.open(str(source)) as container:
        timeline = Discontinuities(container, container.demux())
    assert timeline.count == len(with_sound) - 1
    times: dict[str, list[list[Fraction]]] = {"video": [[]], "audio": [[]]}
    with av.open(str(source)) as container:
        for packet in timeline.corrected(container.demux()):
            if packet.size and packet.pts is not None:
                times[packet.stream.type][-1].append(packet.pts * packet.stream.time_base)
    [frames], [sounds] = ([sorted(x) for x in times[kind]] for kind in ("video", "audio"))
    steps = [after - before for before, after in pairwise(frames)]
    assert min(steps) > 0
    assert max(steps) < Fraction(1, 10)
    assert timeline.ends[0] == frames[-1] + Fraction(1, 25)
    for kind in with_sound:  # each recording's sound beside its pictures, as it was
        alone = media.frame_times(kinds[kind])
        moved, frames = frames[0] - alone[0], frames[len(alone) :]
        heard = [time for time, _ in media.packets(kinds[kind], "audio")] if kind == "x" else []
        now, sounds = sounds[: len(heard)], sounds[len(heard) :]
        assert all(abs(b - a - moved) < Fraction(1, 1000) for a, b in zip(heard, now, strict=True))
    assert frames == sounds == []


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts"])
def test_sound_that_begins_late_is_kept(suffix, tmp_path, monkeypatch):
    """FFmpeg tells no rate of it at first, and it was refused with an advice of no use."""
    silent = media.write_video(tmp_path / "o.ts", PICTURES)
    part = media.write_video(tmp_path / "x.ts", PICTURES, audio="mp2")
    source, out = tmp_path / "joined.ts", tmp_path / f"out{suffix}"
    source.write_bytes(silent.read_bytes() + 2 * part.read_bytes())
    with av.open(str(source)) as container:
        assert container.streams.audio[0].codec_context.sample_rate == 0
    _, writer = convert(source, out)
    assert not any("left out" in note for note in writer.notes)
    assert hashes(out) == 2 * hashes(part)
    with av.open(str(out)) as container:
        context = container.streams.audio[0].codec_context
        assert (context.sample_rate, context.layout.name) == (48000, "stereo")
    monkeypatch.setattr("mana_triton.video.remux._first_sound", lambda *_: None)
    _, writer = convert(source, out, overwrite=True)
    assert [note for note in writer.notes if "nothing of it can be decoded" in note]
    with av.open(str(out)) as container:
        assert not container.streams.audio


def test_a_stream_that_jumps_alone_spoils_no_place_behind_it(tmp_path):
    """The next place at which all begin anew was taken for a part of it, and nothing was moved."""
    first = media.write_video(tmp_path / "a.ts", PICTURES, audio=True)
    later = media.write_video(tmp_path / "b.ts", PICTURES, pts=range(144000, 288000, 3600))
    packets = [first.read_bytes()[i : i + 188] for i in range(0, first.stat().st_size, 188)]
    again = [packet for packet in packets if packet[1] & 31 == 1 and packet[2] == 1]  # of 0x101
    source = tmp_path / "joined.ts"
    start, end = later.read_bytes()[: 20 * 188], later.read_bytes()[20 * 188 :]
    source.write_bytes(first.read_bytes() + start + b"".join(again) + end + first.read_bytes())
    with av.open(str(source)) as container:
        assert Discontinuities(container, container.demux()).count == 1


class CountedList(list):
    """Counts how often one of its items is looked at."""

    looks = 0

    def __getitem__(self, key):
        self.looks += 1
        return super().__getitem__(key)

    def __reversed__(self):
        for number in range(len(self) - 1, -1, -1):
            yield self[number]


def test_places_are_found_in_a_moment(tmp_path):
    """Every packet looked at every place before it: 20,000 places took minutes."""
    packets = [SimpleNamespace(size=1, pts=0, dts=0, time_base=Fraction(1, 25),
        stream=SimpleNamespace(index=0)) for _ in range(20000)]  # fmt: skip
    timeline = cast(Any, Timeline.__new__(Timeline))
    moves = [(number, Fraction(number, 25)) for number in range(20000)]
    timeline.count, timeline._moves = len(moves), {0: CountedList(moves)}
    assert [packet.pts for packet in timeline.corrected(packets)] == list(range(20000))
    assert timeline._moves[0].looks < 20 * 20000


def fake_timeline(kinds: str, packets: list[tuple[int, int]]) -> tuple[Discontinuities, list[int]]:
    """The timeline of (stream, milliseconds) packets, and their times; of data, audio, video."""
    types = {"d": "data", "a": "audio", "v": "video"}
    streams = [
        SimpleNamespace(index=index, type=types[kind], disposition=0)
        for index, kind in enumerate(kinds)
    ]
    container: Any = SimpleNamespace(
        format=SimpleNamespace(name="matroska", flags=0), streams=streams
    )

    def demuxed() -> Iterator[Any]:
        for place, (index, time) in enumerate(packets):
            times = {"pts": time, "dts": time, "time_base": media.MS, "duration": 40}
            yield SimpleNamespace(stream=streams[index], pos=place, size=1, **times)

    timeline = Discontinuities(container, demuxed())
    return timeline, [packet.pts for packet in timeline.corrected(demuxed())]


def test_a_stream_that_begins_behind_a_joint_is_moved():
    """Only streams that had come before it were: subtitles of a second recording came too early."""
    first = [(0, time) for time in range(5000, 7000, 40)]
    later = [(0, 0), (1, 10), *((0, time) for time in range(40, 2000, 40)), (1, 1990)]
    timeline, times = fake_timeline("vd", first + later)
    assert timeline.count == 1
    assert times[len(first) :] == [time + 7000 for _, time in later]


def test_too_many_jumps_are_damage(monkeypatch):
    """Nothing is moved then, and no more of them is kept."""
    monkeypatch.setattr("mana_triton.video.timeline.MOST", 50)
    for count, joints in ((50, 50), (51, 0)):
        packets = [(0, -5000 * number) for number in range(count + 1)]
        timeline, times = fake_timeline("v", packets)
        assert timeline.count == joints
        assert (times == [time for _, time in packets]) == (joints == 0)


@pytest.mark.parametrize("kinds", ["v" + 99 * "d", "v" + 99 * "a"], ids=["data", "tracks"])
def test_many_jumps_of_many_streams_take_little(kinds):
    """Every jump held a number for each stream: 1.4 MB took 1.6 GB.

    It holds a few numbers, and fractions of two each: 10 objects of 100 bytes.
    """
    turns = [(index, 0) for index in range(100)]
    alone = [(0, -5000 * number) for number in range(1, 10001)]
    together = [(index, -5000 * turn) for turn in range(1, 101) for index in range(100)]
    packets = turns + (alone if "d" in kinds else together)
    tracemalloc.start()
    began = process_time()
    try:
        timeline, _ = fake_timeline(kinds, packets)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert timeline.count > 9900
    assert peak < 10000 * 1000
    assert process_time() - began < 30


def test_a_stream_that_jumps_alone_moves_nothing_else(tmp_path):
    """Sound that begins anew while the picture goes on; the copying ended there."""
    first = media.write_video(tmp_path / "a.ts", PICTURES, audio=True).read_bytes()
    later = media.write_video(tmp_path / "b.ts", PICTURES, pts=range(144000, 288000, 3600))
    source = tmp_path / "joined.ts"
    packets = [first[i : i + 188] for i in range(0, len(first), 188)]
    again = [packet for packet in packets if packet[1] & 31 == 1 and packet[2] == 1]  # of 0x101
    start, end = later.read_bytes()[: 20 * 188], later.read_bytes()[20 * 188 :]
    source.write_bytes(first + start + b"".join(again) + end)
    reader, writer = convert(source, tmp_path / "out.ts")
    assert "times of stream 1 that ran backwards were corrected" in writer.notes
    assert not any("anew" in note for note in reader.notes)
    assert hashes(tmp_path / "out.ts") == 2 * hashes(tmp_path / "a.ts")
    before, after = (media.frame_times(path) for path in (source, tmp_path / "out.ts"))
    assert len({new - old for new, old in zip(after, before, strict=True)}) == 1


def test_broadcast_start_time_is_removed(tmp_path):
    """A recording that starts at 10 s in its stream clock must not begin with 10 s of nothing."""
    pts = [900000 + 3600 * i for i in range(40)]
    source = media.write_video(tmp_path / "a.ts", PICTURES, pts=pts)
    convert(source, tmp_path / "b.mp4")
    assert media.frame_times(tmp_path / "b.mp4") == [Fraction(i, 25) for i in range(40)]


# colors

PATCHES = np.array(
    [
        *([0, 0, 0], [255, 255, 255], [128, 128, 128], [255, 0, 0], [0, 255, 0], [0, 0, 255]),
        *(
            [255, 255, 0],
            [0, 255, 255],
            [255, 0, 255],
            [200, 60, 90],
            [30, 120, 50],
            [16, 235, 240],
        ),
    ],
    np.uint8,
)


def patches(height: int = 48) -> np.ndarray:
    """[H, 192, 3]: twelve flat stripes."""
    return np.broadcast_to(PATCHES.repeat(16, axis=0), (height, 192, 3)).copy()


@pytest.mark.parametrize(
    ("codec", "form", "bits"), [("libx264", "yuv444p", 8), ("ffv1", "yuv444p10le", 10)]
)
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt2020"])
def test_known_colors_decode(matrix, full_range, codec, form, bits, tmp_path):
    code = media.CODE[matrix]
    source = media.write_video(
        tmp_path / "a.mkv",
        [media.rgb_to_yuv(patches(), matrix, full_range, bits)],
        form,
        pix_fmt=form,
        codec=codec,
        options=LOSSLESS if codec == "libx264" else {"level": "3"},
        color=(code, code, 1, 2 if full_range else 1),
    )
    with open_reader(source) as reader:
        decoded = next(iter(reader)).rgb / (1 if bits == 8 else 257)
    assert (reader.color.name, reader.color.guessed) == (matrix, False)
    assert ("full" if reader.color.full_range else "limited") == (
        "full" if full_range else "limited"
    )
    assert np.abs(decoded - patches()).max() <= 2 / 2 ** (bits - 8)


@pytest.mark.parametrize(
    ("before", "after", "noted"),
    [
        ((1, 1, 1, 1), (6, 6, 6, 1), 2),
        ((6, 6, 6, 1), (6, 6, 6, 2), 1),
        ((1, 1, 1, 2), (1, 1, 1, 1), 1),
        ((1, 1, 1, 1), (9, 9, 16, 1), 2),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0),
    ],
    ids=["matrix", "to full", "to limited", "to PQ", "none"],
)
def test_colors_that_change_midway(before, after, noted, tmp_path):
    """All were decoded by the matrix and range of the first frame."""
    names = {1: "bt709", 6: "bt601", 9: "bt2020"}
    parts = []
    for number, color in enumerate((before, after)):
        planes = media.rgb_to_yuv(patches(), names[color[0]], color[3] == 2)
        parts.append(tmp_path / f"{number}.ts")
        media.write_video(parts[-1], [planes] * 20, "yuv444p", pix_fmt="yuv444p",
            options=LOSSLESS, color=color)  # fmt: skip
    source = tmp_path / "joined.ts"
    source.write_bytes(b"".join(part.read_bytes() for part in parts))
    with open_reader(source) as reader:
        decoded = [frame.rgb.astype(int) for frame in reader]
    assert len(decoded) == 40
    assert max(np.abs(rgb - patches()).max() for rgb in decoded) <= 2
    assert len([note for note in reader.notes if "of the colors change" in note]) == noted


@pytest.mark.parametrize(
    ("height", "matrix"), [(704, "bt601"), (720, "bt709")], ids=["small", "hd"]
)
def test_untagged_colors_are_guessed_by_size_and_then_tagged(height, matrix, tmp_path):
    planes = media.rgb_to_yuv(patches(height), matrix, False)
    source = media.write_video(
        tmp_path / "a.mp4", [planes], "yuv444p", pix_fmt="yuv444p", options=LOSSLESS
    )
    reader, _ = convert(source, tmp_path / "b.mp4", options=LOSSLESS | {"pix_fmt": "yuv444p"})
    assert reader.color.guessed
    assert any(matrix in note for note in reader.notes)
    [out] = read_all(tmp_path / "b.mp4")
    assert np.abs(out.rgb[::4, ::4].astype(int) - patches(height)).max() <= 2
    with av.open(str(tmp_path / "b.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (media.CODE[matrix], 1)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    "tags", [(1, 1, 1, 1), (6, 6, 6, 1), (5, 5, 6, 2), (9, 9, 16, 1), (1, 1, 13, 2)]
)
def test_color_tags_are_kept(tags, suffix, tmp_path):
    source = media.write_video(tmp_path / "a.mp4", PICTURES[:2], color=tags)
    convert(source, tmp_path / f"b{suffix}")
    with av.open(str(tmp_path / f"b{suffix}")) as container:
        context = container.streams.video[0].codec_context
        frame = next(container.decode(video=0))
    kept = context.colorspace, context.color_primaries, context.color_trc, context.color_range
    assert kept == tags
    assert (frame.colorspace, frame.color_range) == (tags[0], tags[3])


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p"])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
def test_colors_survive_the_whole_way(matrix, full_range, pix_fmt, tmp_path):
    """Fails with PyAV's own conversion when encoding, which is BT.601 whatever the tags say.

    Full range may lose one level more: there, swscale rounds chroma down, by one code at most.
    """
    bound = 2 + full_range + (pix_fmt == "yuv420p")
    rgb = media.smooth_rgb(96, 128)
    code, span = media.CODE[matrix], 2 if full_range else 1
    planes = media.rgb_to_yuv(rgb, matrix, full_range)
    source = media.write_video(
        tmp_path / "a.mp4",
        [planes],
        "yuv444p",
        pix_fmt="yuv444p",
        options=LOSSLESS,
        color=(code, code, code, span),
    )
    convert(source, tmp_path / "b.mkv", options=LOSSLESS | {"pix_fmt": pix_fmt})
    with av.open(str(tmp_path / "b.mkv")) as container:
        frame = next(container.decode(video=0))
        luma = np.frombuffer(cast(Any, frame.planes[0]), np.uint8).reshape(
            -1, frame.planes[0].line_size
        )
        luma = luma[: frame.height : 4, : frame.width : 4]
    assert np.abs(luma.astype(int) - planes[0]).max() <= 1  # the file itself, by formula
    [out] = read_all(tmp_path / "b.mkv")
    assert np.abs(out.rgb[::4, ::4].astype(int) - rgb).max() <= bound


@pytest.mark.parametrize(
    ("codec", "suffix", "bound"),
    [
        ("ffv1", ".mkv", 3),
        ("libx264rgb", ".mkv", 8),
        ("prores_ks", ".mov", 8),
        ("libx265", ".mp4", 12),
        ("libsvtav1", ".mp4", 12),
        ("libvpx-vp9", ".webm", 12),
    ],
)
def test_other_encoders(codec, suffix, bound, tmp_path, capfd):
    source = media.write_video(tmp_path / "a.mp4", PICTURES[:6], color=(1, 1, 1, 1))
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {codec}")
    target = tmp_path / f"b{suffix}"
    convert(source, target, codec=codec)
    before, after = read_all(source), read_all(target)
    assert [f.pts * f.time_base for f in before] == [f.pts * f.time_base for f in after]
    for old, new in zip(before, after, strict=True):
        unit = 257 if codec == "prores_ks" else 1  # it has 10 bits
        assert np.abs(new.rgb[2::4, 2::4] / unit - old.rgb).max() <= bound
    assert capfd.readouterr() == ("", "")
    if codec == "libx265":
        with av.open(str(target)) as container:
            assert container.streams.video[0].codec_context.codec_tag == "hvc1"


# cutting, damage, memory


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_cut_equals_a_slice(suffix, tmp_path):
    """Fails if seeking loses frames before a key frame or the sound is not cut with them."""
    pictures = [media.smooth_rgb(32, 48, phase / 9) for phase in range(100)]
    options = {"preset": "fast", "g": "30", "bf": "3"}
    source = media.write_video(tmp_path / f"a{suffix}", pictures, options=options, audio=True)
    with open_reader(source) as reader:
        whole, zero = list(reader), int(reader.offset / reader.time_base)
    for start, end in [
        (0.5, 1.3),
        (1.2, None),
        (None, 0.9),
        (1.21, 3.0),
        (3.96, None),
        (2.4, 2.5),
        (2.3, 2.6),
    ]:
        wanted = [
            frame
            for frame in whole
            if Fraction(str(start or 0))
            <= (frame.pts - zero) * frame.time_base
            < Fraction(str(end or 99))
        ]
        part = read_all(source, start, end)
        assert [f.pts for f in part] == [f.pts for f in wanted]
        for got, want in zip(part, wanted, strict=True):
            assert np.array_equal(got.rgb, want.rgb)
    convert(source, tmp_path / "b.mkv", scale=1, start=1.2, end=2.4)
    assert media.frame_times(tmp_path / "b.mkv")[0] == 0
    assert len(media.frame_times(tmp_path / "b.mkv")) == 30
    with open_reader(source, start=1.2) as cut:
        offset = cut.offset  # of the first frame that is kept
    sound = [
        (time - offset, digest)
        for time, digest in media.packets(source, "audio")
        if offset <= time < Fraction(12, 5) + reader.offset
    ]
    kept = media.packets(tmp_path / "b.mkv", "audio")
    if suffix != ".ts":  # there, ADTS headers are stripped on the way
        assert [digest for _, digest in kept] == [digest for _, digest in sound]
    assert len(kept) == len(sound)
    for (time, _), (wanted, _) in zip(kept, sound, strict=True):
        assert abs(time - wanted) < Fraction(2, 1000)


def test_cut_moves_chapters(rich, tmp_path):
    reader, _ = convert(rich, tmp_path / "out.mkv", start=1.2, end=1.9)
    with av.open(str(tmp_path / "out.mkv")) as container:
        [chapter] = cast(list[Any], container.chapters())
    assert chapter["metadata"]["title"] == "Zwei ü"
    assert chapter["start"] == 0
    length = chapter["end"] * chapter["time_base"]
    assert abs(length - (Fraction(19, 10) - reader.offset)) < Fraction(1, 500)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_data_beside_chapters_are_kept_or_named(suffix, tmp_path):
    """A camera's measurements were taken for chapters, which mp4 stores as such data, too."""
    plain, source = tmp_path / "plain.mp4", tmp_path / "a.mp4"
    media.write_video(plain, PICTURES[:5])
    with av.open(str(plain)) as pictures, av.open(str(source), "w") as out:
        video: Any = pictures.streams.video[0]
        copy, data = out.add_stream_from_template(video), out.add_data_stream("bin_data")
        mark: Any = {"id": 1, "start": 0, "end": 200, "time_base": media.MS, "metadata": {}}
        out.set_chapters([mark | {"metadata": {"title": "x"}}])
        for number, packet in enumerate(p for p in pictures.demux(video) if p.size):
            measured = av.Packet(bytes([number]) * 9)
            measured.pts = measured.dts = packet.dts
            measured.time_base, measured.stream, packet.stream = packet.time_base, data, copy
            out.mux([packet, measured])
    with av.open(str(source)) as container:
        assert len(container.streams.data) == 2  # one of them is the chapters
    _, writer = convert(source, tmp_path / f"b{suffix}")
    if suffix == ".mp4":
        measured = [digest for _, digest in media.packets(source, "data")]
        assert [digest for _, digest in media.packets(tmp_path / "b.mp4", "data")] == measured
        assert measured
    else:
        assert "data stream 1 (bin_data) is left out" in writer.notes
    with av.open(str(tmp_path / f"b{suffix}")) as container:
        assert len(container.chapters()) == 1


@pytest.mark.parametrize("kept", [0.5, 0.9])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_truncated_file_gives_what_can_be_decoded(suffix, kept, tmp_path):
    muxer = {"movflags": "faststart"} if suffix == ".mp4" else {}
    source = media.write_video(tmp_path / f"a{suffix}", PICTURES, audio=True, muxer=muxer)
    data = source.read_bytes()
    damaged = tmp_path / f"damaged{suffix}"
    damaged.write_bytes(data[: int(kept * len(data))])
    reader, _ = convert(damaged, tmp_path / "out.mp4")
    count = len(media.frame_times(tmp_path / "out.mp4"))
    assert 5 < count < len(PICTURES)
    assert "instead of 1.60 s" in str(reader.truncated)
    whole = read_all(source)
    for got, want in zip(read_all(damaged)[: count - 1], whole, strict=False):
        assert np.array_equal(got.rgb, want.rgb)


@pytest.mark.parametrize("tenth", [3, 6, 9])
def test_damage_is_reported_and_skipped(tenth, tmp_path):
    """At nine tenths, fails with frame threads, which lose what they hold when the last is bad."""
    source = media.write_video(tmp_path / "a.mp4", PICTURES, muxer={"movflags": "faststart"})
    data = bytearray(source.read_bytes())
    start = tenth * len(data) // 10
    data[start : start + 300] = np.random.default_rng(tenth - 3).bytes(300)
    source.write_bytes(data)
    reader, _ = convert(source, tmp_path / "out.mp4")
    assert "damaged or missing" in str(reader.truncated)
    assert len(media.frame_times(tmp_path / "out.mp4")) == len(PICTURES) - 2


def test_half_a_last_picture_is_reported(tmp_path):
    """A transport stream has no header that could tell its length."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 96, 3), np.uint8)
    source = media.write_video(tmp_path / "a.ts", list(noise))
    with av.open(str(source)) as container:
        starts = [packet.pos or 0 for packet in container.demux(video=0) if packet.size]
    source.write_bytes(source.read_bytes()[: (starts[5] + starts[6]) // 2])
    reader, _ = convert(source, tmp_path / "out.mp4")
    assert reader.truncated == "frames damaged or missing: 1"
    assert len(media.frame_times(tmp_path / "out.mp4")) == 6


def test_damaged_sound_does_not_stop_the_work(tmp_path):
    """Fails with 'invalid data' when a broken AAC header reaches the mp4 muxer."""
    source = media.write_video(tmp_path / "a.ts", PICTURES, audio=True)
    data = bytearray(source.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 600] = np.random.default_rng(0).bytes(600)
    source.write_bytes(data)
    _, writer = convert(source, tmp_path / "out.mp4")
    assert any("damaged sound" in note for note in writer.notes)
    assert len(media.packets(tmp_path / "out.mp4", "audio")) > 60
    assert len(media.frame_times(tmp_path / "out.mp4")) >= len(PICTURES) - 3


@pytest.mark.parametrize("suffix", [".mp4", ".ts"])
@pytest.mark.parametrize("passes", [True, False])
def test_a_failed_read_is_no_damage(passes, suffix, tmp_path, monkeypatch):
    """It was taken for damage, so that a film could end where a network did.

    A demuxer may say the same of damage: then it says so at the same place each time.
    """
    source = media.write_video(tmp_path / f"a{suffix}", PICTURES, audio=True)
    opened, failed = readers.open_container, []

    def failing(path: Path) -> Any:
        return FailingContainer(opened(path), 10, failed if passes else [])

    monkeypatch.setattr(readers, "open_container", failing)
    if passes:
        with pytest.raises(MediaError, match="cannot read on: Input/output error"):
            read_all(source)
        assert len(read_all(source)) == len(PICTURES)
    else:
        with open_reader(source) as reader:
            assert 0 < len(list(reader)) <= 10
        assert "reading stopped" in str(reader.truncated)


def test_an_intact_file_is_not_called_truncated(rich, plain):
    for source in (rich, plain):
        with open_reader(source) as reader:
            count = sum(1 for _ in reader)
        assert reader.truncated is None
        assert count == len(PICTURES)
    assert reader.frame_count == len(PICTURES)


@pytest.mark.parametrize(
    ("size", "options", "depth"),
    [
        ((192, 128), {}, 40),
        ((3840, 2160), {}, 5),
        ((5120, 2880), {}, 3),
        ((3840, 2160), {"preset": "ultrafast"}, None),  # looks ahead at nothing
        ((3840, 2160), {"preset": "veryfast", "rc-lookahead": "12"}, 12),
    ],
    ids=["small", "large", "huge", "large-fast", "asked"],
)
def test_encoder_memory_is_bounded(size, options, depth, plain, tmp_path):
    """The encoder writes into the stream what it really uses."""
    width, height = size
    with (
        open_reader(plain) as reader,
        VideoWriter(
            tmp_path / "out.mp4", reader, size[0], size[1], encode_options(options)
        ) as writer,
    ):
        frame = next(iter(reader))
        writer.write(np.zeros((size[1], size[0], 3), np.uint8), frame)
    written = (tmp_path / "out.mp4").read_bytes()
    used = re.search(rb"rc_lookahead=(\d+)", written)
    bounds = {5: range(5, 10), 3: range(2, 5)}  # by the number of cores
    assert (int(used[1]) if used else None) in bounds.get(depth, [depth])
    assert bool(writer.notes) == (depth in bounds)
    assert (b"bframes=1 " in written) == (depth == 3)


def test_reading_and_writing_in_two_threads(plain, tmp_path):
    frames: queue.Queue = queue.Queue(maxsize=2)
    with (
        open_reader(plain) as reader,
        open_writer(tmp_path / "out.mp4", reader, 192, 128, encode_options(FAST)) as writer,
    ):

        def decode() -> None:
            for frame in reader:
                frames.put(frame)
            frames.put(None)

        thread = threading.Thread(target=decode)
        thread.start()
        while frame := frames.get():
            writer.write(enlarge(frame.rgb), frame)
        thread.join()
    assert media.frame_times(tmp_path / "out.mp4") == media.frame_times(plain)
    assert hashes(tmp_path / "out.mp4") == hashes(plain)


# errors


def make_unreadable(tmp_path: Path, kind: str) -> Path:
    """An input that cannot be read, of the kind the test is named after."""
    path = tmp_path / "in.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("no video at all\n" * 100)
    elif kind == "empty":
        path.touch()
    elif kind == "sound only":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", 48000)
            container.mux(stream.encode(media._noise(0, 1024)))
            container.mux(stream.encode(None))
    elif kind == "cover only":  # an album track
        whole = media.write_video(tmp_path / "whole.mp4", PICTURES[:2], audio=True, cover=True)
        with av.open(str(whole)) as source, av.open(str(path), "w") as container:
            kept = [s for s in source.streams if s is not source.streams.video[0]]
            targets = {s.index: container.add_stream_from_template(s, opaque=True) for s in kept}
            for stream in kept:
                targets[stream.index].disposition = stream.disposition
            for packet in source.demux(*kept):
                if packet.size:
                    packet.stream = targets[packet.stream.index]
                    container.mux(packet)
    elif kind == "no index":  # an mp4 whose recording was interrupted
        whole = media.write_video(tmp_path / "whole.mp4", PICTURES[:5])
        path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("folder", "holds no pictures"),
        ("text", "not a video, or it is damaged"),
        ("empty", "not a video, or it is damaged"),
        ("sound only", "no video stream"),
        ("cover only", "no video stream"),
        ("no index", "not a video, or it is damaged"),
    ],
)
def test_unreadable_input(kind, message, tmp_path):
    path = make_unreadable(tmp_path, kind)
    with pytest.raises(MediaError, match=message) as caught:
        open_reader(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_range_without_frames(plain):
    with pytest.raises(MediaError, match=r"no frame .* from 5 s to the end; it ends at 1.60 s"):
        open_reader(plain, start=5)
    with pytest.raises(MediaError, match="no frame"):
        open_reader(plain, start=1.0, end=1.0)


def test_permission_denied(plain, tmp_path):
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        pytest.skip("needs a user whom permissions bind")
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    with open_reader(plain) as reader, pytest.raises(MediaError, match="permission denied"):
        open_writer(locked / "out.mp4", reader, 192, 128)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("out.xyz", {}, r"cannot write '\.xyz' files; use one of .*\.mp4"),
        ("out.mp4", {"codec": "h266"}, "unknown video encoder 'h266'; use for example libx264"),
        ("out.mp4", {"codec": "aac"}, "unknown video encoder 'aac'"),
        ("out.webm", {}, "'.webm' files cannot hold libx264 video"),
        ("out.webm", {"codec": "libvpx-vp9"}, r"cannot hold the input's audio stream 1 \(aac"),
        ("out.mp4", {"options": {"prest": "fast"}}, "libx264 has no option prest"),
        ("out.mp4", {"options": {"preset": "fats"}}, r"libx264 refuses 192x128 .*preset=fats"),
        ("out.mp4", {"options": {"crf": "good"}}, "refuses .* crf=good"),
        ("out.mp4", {"pix_fmt": "yuv999p"}, "cannot write pix_fmt 'yuv999p'; use one of yuv420p"),
        ("out.mp4", {"width": 40000, "height": 40000}, "libx264 refuses 40000x40000"),
        ("out.mp4", {"width": 191}, "libx264 refuses 191x128 yuv420p"),
        ("missing/out.mp4", {}, "there is no folder .*missing; create it first"),
        ("there.mp4", {}, "there.mp4: exists; use --overwrite"),
        ("in.mp4", {"overwrite": True}, "is the input itself"),
        ("folder.mp4", {}, "is a folder; give a file name"),
        ("frames", {"options": {"preset": "fast"}}, "takes no encoder options"),
        ("full", {}, "holds other things than PNG files"),
    ],
)
def test_unwritable_output(name, settings, message, plain, tmp_path, capfd):
    source = tmp_path / "in.mp4"
    source.write_bytes(plain.read_bytes())
    (tmp_path / "there.mp4").write_text("precious")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    overwrite = settings.pop("overwrite", False)
    width, height = settings.pop("width", 192), settings.pop("height", 128)
    with open_reader(source) as reader, pytest.raises(MediaError, match=message) as caught:
        encode = encode_options(**settings)
        open_writer(tmp_path / name, reader, width, height, encode, overwrite=overwrite)
    assert "\n" not in str(caught.value)
    assert ".part" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.mp4").read_text() == "precious"


def test_wrong_picture_is_a_value_error(plain, tmp_path):
    with (
        open_reader(plain) as reader,
        pytest.raises(ValueError, match=r"a picture must be \[128, 192, 3\]"),
        open_writer(tmp_path / "out.mp4", reader, 192, 128) as writer,
    ):
        frame = next(iter(reader))
        writer.write(frame.rgb, frame)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv", "out"])
def test_failure_leaves_nothing_and_spares_the_old(name, plain, tmp_path):
    target = tmp_path / name
    with (
        open_reader(plain) as reader,
        pytest.raises(RuntimeError, match="the network failed"),
        open_writer(target, reader, 192, 128) as writer,
    ):
        for frame in reader:
            writer.write(enlarge(frame.rgb), frame)
            if frame.pts > 36000:
                raise RuntimeError("the network failed")
    assert not list(tmp_path.iterdir())
    convert(plain, target)
    old = sorted(p.stat().st_size for p in [target, *target.rglob("*")])
    with open_reader(plain) as reader:
        writer = open_writer(target, reader, 192, 128, overwrite=True)
        writer.write(np.zeros((128, 192, 3), np.uint8), next(iter(reader)))
        assert len(list(tmp_path.iterdir())) == 2  # the old file and a hidden one
        writer.abort()
        writer.close()  # does nothing any more
    assert list(tmp_path.iterdir()) == [target]
    assert sorted(p.stat().st_size for p in [target, *target.rglob("*")]) == old
    convert(plain, target, overwrite=True)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a file size limit")
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_full_disk(suffix, plain, tmp_path):
    script = """
        import resource, signal, sys
        import numpy as np
        from mana_triton.video.encoder import EncodeOptions
        from mana_triton.video.frame import MediaError
        from mana_triton.video.reader import open_reader
        from mana_triton.video.writer import open_writer
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))
        noise = np.random.default_rng(0)
        try:
            with open_reader(sys.argv[1]) as reader:
                with open_writer(sys.argv[2], reader, 192, 128, EncodeOptions(crf=1)) as writer:
                    for frame in reader:
                        writer.write(noise.integers(0, 255, (128, 192, 3), np.uint8), frame)
        except MediaError as error:
            sys.exit(f"caught: {error}")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), plain, tmp_path / f"out{suffix}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.startswith("caught: "), done.stderr
    assert "disk full" in done.stderr
    assert not list(tmp_path.iterdir())


# folders of pictures


def write_pictures(folder: Path, names: list[str], size=(12, 8)) -> list[np.ndarray]:
    """Random pictures under these names."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (size[1], size[0], 3), np.uint8) for _ in names]
    for name, array in zip(names, arrays, strict=True):
        Image.fromarray(array).save(folder / name)
    return arrays


def test_folder_round_trip_is_exact_and_in_natural_order(tmp_path):
    names = ["f10.png", "f2.bmp", "f1.tiff", "g0.png"]
    arrays = write_pictures(tmp_path / "in", names)
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    (tmp_path / "in" / ".hidden.png").write_text("not a picture either")
    reader, _ = convert(tmp_path / "in", tmp_path / "out")
    assert reader.frame_count == 4
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "f1.png",
        "f10.png",
        "f2.png",
        "g0.png",
    ]
    frames = read_all(tmp_path / "out")
    assert [f.name for f in frames] == ["f1", "f2", "f10", "g0"]
    for frame, index in zip(frames, [2, 1, 0, 3], strict=True):
        assert np.array_equal(frame.rgb, enlarge(arrays[index]))


def test_folder_to_video_and_back(tmp_path):
    arrays = write_pictures(tmp_path / "in", [f"{i}.png" for i in range(1, 13)])
    lossless = {"codec": "libx264rgb", "options": {"qp": "0"}}
    convert(tmp_path / "in", tmp_path / "video.mkv", **lossless)
    assert media.frame_times(tmp_path / "video.mkv") == [Fraction(i, 25) for i in range(12)]
    convert(tmp_path / "video.mkv", tmp_path / "back", scale=1)
    assert sorted(p.name for p in (tmp_path / "back").iterdir())[-1] == "00000011.png"
    for frame, array in zip(read_all(tmp_path / "back"), arrays, strict=True):
        assert np.array_equal(frame.rgb, enlarge(array))
    part = read_all(tmp_path / "in", start=0.08, end=0.2)
    assert [f.name for f in part] == ["3", "4", "5"]


def test_gray_alpha_palette_and_turned_pictures(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    gray = np.arange(96, dtype=np.uint8).reshape(8, 12)
    Image.fromarray(gray).save(folder / "1.png")
    rgba = np.dstack([gray, gray + 9, gray + 99, gray])
    Image.fromarray(rgba).save(folder / "2.png")
    Image.fromarray(rgba[..., :3]).quantize(256).save(folder / "3.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned
    Image.fromarray(np.rot90(rgba[..., :3]).copy()).save(folder / "4.png", exif=exif)
    with ImageFolderReader(folder) as reader:
        frames = list(reader)
    expected = [np.dstack([gray] * 3), rgba[..., :3], rgba[..., :3], rgba[..., :3]]
    for frame, want in zip(frames, expected, strict=True):
        assert np.array_equal(frame.rgb, want)
    assert [frame.alpha is None for frame in frames] == [True, False, True, True]
    assert np.array_equal(cast(Any, frames[1].alpha), gray)


def test_pictures_that_do_not_fit(tmp_path):
    folder = tmp_path / "in"
    write_pictures(folder, ["a.png", "b.png"])
    Image.fromarray(np.zeros((9, 12, 3), np.uint8)).save(folder / "c.png")
    with pytest.raises(MediaError, match=r"c\.png: is 12x9, but a\.png is 12x8"):
        open_reader(folder)
    (folder / "c.png").write_text("not a picture")
    with pytest.raises(MediaError, match=r"c\.png: cannot read the picture"):
        open_reader(folder)
    (folder / "c.png").unlink()
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(folder / "a.bmp")
    with (
        open_reader(folder) as reader,
        pytest.raises(MediaError, match="two pictures are called 'a'"),
    ):
        open_writer(tmp_path / "out", reader, 48, 32)


# properties and real files


@settings(max_examples=12, deadline=None)
@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    count=st.integers(1, 9),
    suffix=st.sampled_from([".mp4", ".mkv", ""]),
)
def test_count_order_and_size_hold(width, height, count, suffix, tmp_path_factory):
    """Each frame carries its number as its brightness, through any size and length."""
    folder = tmp_path_factory.mktemp("property")
    pictures = [np.full((height, width, 3), 20 + 25 * i, np.uint8) for i in range(count)]
    source = media.write_video(folder / "a.mkv", pictures, options=LOSSLESS, pix_fmt="yuv444p")
    convert(source, folder / f"b{suffix}")
    frames = read_all(folder / f"b{suffix}")
    assert [round((f.rgb.mean() - 20) / 25) for f in frames] == list(range(count))
    assert {f.rgb.shape for f in frames} == {(4 * height, 4 * width, 3)}


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo clips are not here")
@pytest.mark.parametrize(
    ("name", "frames", "sounds", "left_out"),
    [
        ("friday.mp4", 185, 1, 0),  # the sound comes first
        ("nasa.mp4", 325, 2, 0),  # two video, two audio, two subtitle streams
        ("walk.mkv", 89, 0, 0),  # no frame count in the header
    ],
)
def test_demo_clip(name, frames, sounds, left_out, tmp_path):
    reader, writer = convert(DEMO / name, tmp_path / name, scale=1)
    assert reader.truncated is None
    assert abs(reader.frame_count - frames) <= 1
    assert len(writer.notes) == left_out
    assert media.frame_times(tmp_path / name) == media.frame_times(DEMO / name)
    assert len(media.frame_times(tmp_path / name)) == frames
    for index in range(sounds):
        before = media.packets(DEMO / name, "audio", index)
        assert media.packets(tmp_path / name, "audio", index) == before
    with av.open(str(tmp_path / name)) as container:
        assert len(container.streams.audio) == sounds


@pytest.mark.parametrize(
    ("name", "message"), [("notes.txt", "holds other things"), ("0.png", "exists; use --overwrite")]
)
def test_what_came_into_the_output_folder_meanwhile_stays(name, message, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    Image.new("RGB", (4, 3)).save(source / "0.png")
    with open_reader(source) as reader:
        writer = open_writer(out, reader, 16, 12)
        for frame in reader:
            writer.write(np.zeros((12, 16, 3), np.uint8), frame)
    out.mkdir()
    (out / name).write_text("precious")
    with pytest.raises(MediaError, match=message):
        writer.close()
    writer.abort()
    assert [file.read_text() for file in out.iterdir()] == ["precious"]


def test_named_profiles_of_pictures_do_no_harm(tmp_path):
    """PyAV frees the profile's name twice: a process that asks for it dies sooner or later."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (16, 12)).save(tmp_path / "picture.png", icc_profile=profile)
    code = """
    import sys
    from mana_triton.video.reader import open_reader

    for _ in range(100):
        with open_reader(sys.argv[1]) as reader:
            assert len(list(reader)) == 1
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "picture.png")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
