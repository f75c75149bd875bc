"""Joined recordings: shifted as one, and only where all streams jump."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import av
import media
import numpy as np
import pytest
from roundtrip import (
    PICTURES,
    convert,
    hashes,
    read_all,
)

from mana_triton.video.reader import open_reader
from mana_triton.video.timestamps import MAX_JUMPS, Discontinuities


@pytest.mark.parametrize(("suffix", "counts"), [(".ts", (40, 30, 32)), (".mkv", (40, 30))])
def test_joined_recordings_follow_each_other(suffix, counts, tmp_path):
    """Without correction 30 frames came in half a millisecond, and copying stopped."""
    parts = [tmp_path / f"{count}{suffix}" for count in counts]
    for part, count in zip(parts, counts, strict=True):
        media.write_video(part, PICTURES[:count], audio=True, color=(1, 1, 1, 1))
    source, out = tmp_path / f"joined{suffix}", tmp_path / f"out{suffix}"
    source.write_bytes(b"".join(part.read_bytes() for part in parts))
    reader, writer = convert(source, out)
    assert (len(reader.notes), writer.notes, reader.truncated) == (1, [], None)
    places = "2 places" if len(parts) == 3 else "1 place"
    assert f"timestamps are discontinuous at {places}, as in joined" in reader.notes[0]
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
    """The audio's jump over a silent recording belongs to the joint after it."""
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
    for kind in with_sound:  # audio and video of each recording stay in sync
        alone = media.frame_times(kinds[kind])
        moved, frames = frames[0] - alone[0], frames[len(alone) :]
        heard = [time for time, _ in media.packets(kinds[kind], "audio")] if kind == "x" else []
        now, sounds = sounds[: len(heard)], sounds[len(heard) :]
        assert all(abs(b - a - moved) < Fraction(1, 1000) for a, b in zip(heard, now, strict=True))
    assert frames == sounds == []


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


def test_stream_that_begins_after_a_joint_is_shifted():
    """As subtitles of the second recording."""
    first = [(0, time) for time in range(5000, 7000, 40)]
    later = [(0, 0), (1, 10), *((0, time) for time in range(40, 2000, 40)), (1, 1990)]
    timeline, times = fake_timeline("vd", first + later)
    assert timeline.count == 1
    assert times[len(first) :] == [time + 7000 for _, time in later]


def test_too_many_jumps_are_damage():
    for count in (MAX_JUMPS - 1, MAX_JUMPS + 1):
        packets = [(0, -5000 * number) for number in range(count + 1)]
        timeline, times = fake_timeline("v", packets)
        assert timeline.count == (count if count < MAX_JUMPS else 0)
        assert (times == [time for _, time in packets]) == (count > MAX_JUMPS)


def test_stream_that_jumps_alone_shifts_nothing():
    """Nor does it hide a joint that follows."""
    video = [(0, time) for time in range(5000, 7000, 40)]
    audio = [(1, time) for time in (*range(5000, 6000, 40), *range(3000, 4000, 40))]
    first = [packet for pair in zip(video, audio, strict=True) for packet in pair]
    timeline, times = fake_timeline("va", first)
    assert (timeline.count, times) == (0, [time for _, time in first])
    later = [packet for time in range(0, 1000, 40) for packet in ((0, time), (1, time))]
    timeline, times = fake_timeline("va", first + later)
    assert timeline.count == 1
    assert times[len(first) :] == [time + 7000 for _, time in later]
