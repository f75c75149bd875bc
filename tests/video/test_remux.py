"""Everything but the pixels: audio, subtitles, chapters, tags, in every container."""

from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import media
import numpy as np
import pytest
from av.stream import Disposition
from roundtrip import (
    FAST,
    PICTURES,
    convert,
    encode_options,
    hashes,
    read_subtitles,
)

from mana_triton.video.frame import MediaError
from mana_triton.video.reader import open_reader
from mana_triton.video.writer import open_writer


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
        assert ("my_own_key" in tags) == (rich.suffix == ".mkv")  # the input's mp4 has lost it
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


CODECS = {".webm": ("libvpx-vp9", "libopus"), ".ts": ("libx264", "mp2"), ".avi": ("libx264", "mp3")}
SUFFIXES = [".mkv", ".mp4", ".mov", ".webm", ".ts", ".avi"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """A file of each container with video, audio and two chapters."""
    folder, found = tmp_path_factory.mktemp("sources"), {}
    for suffix in SUFFIXES:
        codec, sound = CODECS.get(suffix, ("libx264", "aac"))
        fast = {"deadline": "realtime"} if suffix == ".webm" else FAST | {"bf": "0"}
        base = Fraction(1, 25) if suffix == ".avi" else media.TICK
        found[suffix] = media.write_video(
            folder / f"in{suffix}", PICTURES[:10], codec=codec, options=fast, audio=sound,
            time_base=base, chapters=[(0, 200, "One"), (200, 400, "Two")],
        )  # fmt: skip
    return found


@pytest.mark.parametrize("target", SUFFIXES)
@pytest.mark.parametrize("source", SUFFIXES)
def test_streams_from_every_container_to_every_other(source, target, sources, tmp_path):
    path, out = sources[source], tmp_path / f"out{target}"
    sound = CODECS.get(source, ("libx264", "aac"))[1]
    options: dict[str, Any] = {}
    if target == ".webm":
        options = {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}
    is_refused = (target == ".webm") != (source == ".webm") and target in (".webm", ".mov", ".avi")
    if is_refused:
        named = rf"'{target}' files cannot hold the input's audio stream 1 \({sound[-4:]}"
        with pytest.raises(MediaError, match=named):
            convert(path, out, **options)
        return
    _, writer = convert(path, out, **options)
    assert len(media.frame_times(out)) == len(media.frame_times(path)) == 10
    kept, before = hashes(out), hashes(path)
    starts_early = target == ".avi" and sound == "aac"  # which avi cannot hold
    assert len(kept) == len(before) - starts_early > 10
    if not {source, target} & {".ts", ".avi"}:  # where AAC has other headers
        assert kept == before
    has_chapters = source not in (".ts", ".avi")
    with av.open(str(out)) as container:
        titles = [chapter["metadata"]["title"] for chapter in cast(Any, container.chapters())]
    assert titles == (["One", "Two"] if has_chapters and target not in (".ts", ".avi") else [])
    if target in (".ts", ".avi") and has_chapters:
        assert f"{target} files cannot hold chapters" in writer.notes


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


def test_audio_is_interleaved(tmp_path):
    """Fails if packets are copied all at once at the end, which players cannot stream."""
    source = media.write_video(tmp_path / "a.mkv", PICTURES, rate=2, audio=True)  # 20 seconds
    convert(source, tmp_path / "b.mkv", options=FAST | {"tune": "zerolatency"})
    newest = {"video": 0.0, "audio": 0.0}
    with av.open(str(tmp_path / "b.mkv")) as container:
        for packet in cast(Any, container.demux()):
            if packet.size:
                newest[packet.stream.type] = float(packet.pts * packet.time_base)
                assert abs(newest["video"] - newest["audio"]) < 1.1
    assert min(newest.values()) > 19


def test_cut_moves_chapters(rich, tmp_path):
    reader, _ = convert(rich, tmp_path / "out.mkv", start=1.2, end=1.9)
    with av.open(str(tmp_path / "out.mkv")) as container:
        [chapter] = cast(list[Any], container.chapters())
    assert chapter["metadata"]["title"] == "Zwei ü"
    assert chapter["start"] == 0
    length = chapter["end"] * chapter["time_base"]
    assert abs(length - (Fraction(19, 10) - reader.offset)) < Fraction(1, 500)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_data_next_to_chapters_are_kept_or_reported(suffix, tmp_path):
    """mp4 stores both a camera's measurements and chapters as data."""
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


def test_damaged_audio_does_not_stop_the_job(tmp_path):
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


def test_audio_without_sample_rate_is_reported(tmp_path):
    """As of a silent recording that another one is joined to."""
    silent = media.write_video(tmp_path / "o.ts", PICTURES)
    part = media.write_video(tmp_path / "x.ts", PICTURES, audio="mp2")
    (tmp_path / "in.ts").write_bytes(silent.read_bytes() + 2 * part.read_bytes())
    _, writer = convert(tmp_path / "in.ts", tmp_path / "out.mkv")
    assert "is left out: FFmpeg finds no sample rate near its start" in writer.notes[0]


def test_a_stream_can_be_chosen(tmp_path):
    source = tmp_path / "two.mkv"
    with av.open(str(source), "w") as container:
        streams: Any = [
            container.add_stream("ffv1", 25, width=w, height=h, pix_fmt="yuv420p")
            for w, h in ((64, 48), (48, 32))
        ]
        for stream in streams:
            for packet in stream.encode(av.VideoFrame(stream.width, stream.height, "yuv420p")):
                container.mux(packet)
    with open_reader(source, stream=1) as reader:
        assert (reader.width, reader.height) == (48, 32)
        with open_writer(tmp_path / "out.mkv", reader, 48, 32, encode_options(FAST)) as writer:
            for frame in reader:
                writer.write(frame.rgb, frame)
    assert hashes(tmp_path / "out.mkv", "video", 1) == hashes(source, "video", 0)
    with pytest.raises(MediaError, match=r"stream 2 is not a video; choose 0 \(ffv1 64x48\), 1 \("):
        open_reader(source, stream=2)
