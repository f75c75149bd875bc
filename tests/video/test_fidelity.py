"""What players see: streams, depth, HDR, fields and transparency, checked by ffmpeg and ffprobe."""

import shutil
import socket
import struct
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import media
import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from test_video import (
    DEMO,
    FAST,
    LOSSLESS,
    PICTURES,
    convert,
    encode_options,
    hashes,
    read_all,
    read_subtitles,
)

from mana_triton.video import images
from mana_triton.video.frame import MediaError
from mana_triton.video.reader import MAX_STREAMS, VideoReader, open_reader
from mana_triton.video.writer import open_writer

QUICK: dict[str, dict[str, Any]] = {
    ".webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}
}
SOUNDS = {".webm": "libopus", ".ts": "mp2", ".avi": "mp3"}
TEXTS = {".mkv": "srt", ".mp4": "mov_text", ".mov": "mov_text", ".webm": "webvtt"}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Makes a file of two videos, two sounds, subtitles, chapters, a font and a timecode."""
    folder = tmp_path_factory.mktemp("everything")

    def make(suffix: str) -> Path:
        path = folder / f"in{suffix}"
        if path.exists():
            return path
        (folder / "a.srt").write_text(
            "1\n00:00:00,100 --> 00:00:00,500\n<i>eins</i>\n\n"
            "2\n00:00:00,600 --> 00:00:01,200\nzwei\n"
        )
        (folder / "font.ttf").write_bytes(b"font" * 99)
        (folder / "tags").write_text(
            ";FFMETADATA1\ntitle=Title\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=1000\ntitle=One\n"
            "[CHAPTER]\nTIMEBASE=1/1000\nSTART=1000\nEND=2000\ntitle=Two\n"
        )
        lavfi = ["testsrc2=s=64x48:d=2", "sine=d=2", "sine=d=2:f=880", "smptebars=s=48x32:d=2"]
        inputs = [part for source in lavfi for part in ("-f", "lavfi", "-i", source)]
        more = ["-i", folder / "a.srt", "-i", folder / "tags", "-map_metadata", 5]
        maps = ["-map", 0, "-map", 1, "-map", 2, "-map", 3]
        tags = ["-metadata:s:a:0", "language=deu", "-metadata:s:a:1", "language=fra"]
        codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
        kinds = ["-c:v", codec, "-c:a", SOUNDS.get(suffix, "aac")]
        if suffix in TEXTS:
            maps, kinds = [*maps, "-map", 4], [*kinds, "-c:s", TEXTS[suffix]]
        if suffix == ".mkv":
            kinds += ["-attach", folder / "font.ttf", "-metadata:s:t", "mimetype=font/ttf"]
        if suffix in (".mp4", ".mov"):
            kinds += ["-timecode", "01:00:00:00"]
        if suffix == ".avi":
            maps = maps[:6]
        media.ffmpeg(*inputs, *more, *maps, *tags, *kinds, path)
        return path

    return make


def samples(plane: Any) -> np.ndarray:
    """[height, width] codes of a plane of more than 8 bits."""
    return np.frombuffer(plane, np.uint16).reshape(plane.height, -1)[:, : plane.width]


def streams_of(path: Path) -> list[str]:
    """Kind and codec of each stream, without chapters and timecodes of mp4."""
    found = []
    for stream in media.ffprobe(path):
        if stream["codec_type"] != "data":
            found.append(f"{stream['codec_type']} {stream.get('codec_name', '')}".strip())
    return found


def delay(path: Path, kind: str, last: bool) -> Fraction:
    """When the first or last packet of sound or subtitles is due, after that of the picture."""
    at = -1 if last else 0
    return media.packets(path, kind)[at][0] - media.frame_times(path)[at]


@pytest.mark.parametrize("target", [".mkv", ".mp4", ".mov", ".webm", ".ts", ".avi"])
@pytest.mark.parametrize("source", [".mkv", ".mp4", ".mov", ".webm", ".ts", ".avi"])
def test_streams_from_every_container_to_every_other(source, target, everything, tmp_path):
    path, out = everything(source), tmp_path / f"out{target}"
    if (target == ".webm") != (source == ".webm") and target in (".webm", ".mov", ".avi"):
        sound = {".mkv": "aac", ".mp4": "aac", ".mov": "aac", ".webm": "opus", ".ts": "mp2"}
        named = (
            rf"'{target}' files cannot hold the input's audio stream 1 \({sound.get(source, 'mp3')}"
        )
        with pytest.raises(MediaError, match=named):
            convert(path, out, **QUICK.get(target, {}))
        return
    _, writer = convert(path, out, **QUICK.get(target, {}))
    kept, before = streams_of(out), streams_of(path)
    assert len(media.frame_times(out)) == len(media.frame_times(path)) == 50
    sounds = 1 if source == ".avi" else 2
    if (source, target) != (".ts", ".mp4"):  # where mp2 and mp3 have one name
        assert [s for s in kept if "audio" in s] == [s for s in before if "audio" in s]
    for index in range(sounds):
        new, old = (hashes(file, "audio", index) for file in (out, path))
        before_zero = target == ".avi" and source in (".mp4", ".mov")  # which has no place there
        assert len(new) == len(old) - before_zero > 50
        if not {source, target} & {".ts", ".avi"}:  # where AAC has other headers
            assert new == old
    videos = 1 if ".avi" in (source, target) or (source, target) == (".webm", ".ts") else 2
    assert len([s for s in kept if "video" in s]) == videos
    if videos == 2:
        new, old = (hashes(file, "video", 1) for file in (out, path))
        assert len(new) == len(old) == 50
        if not {source, target} & {".ts", ".mp4", ".mov", ".webm"}:  # where H.264 has other headers
            assert new == old
    texts = {".mkv": "subrip", ".mp4": "mov_text", ".mov": "mov_text", ".webm": "webvtt"}
    if source in TEXTS and target in TEXTS:
        kind = "webvtt" if (source, target) == (".webm", ".mkv") else texts[target]
        assert f"subtitle {kind}" in kept
        moved = round(1000 * (media.frame_times(out)[0] - media.frame_times(path)[0]))
        for old, new in zip(read_subtitles(path), read_subtitles(out), strict=True):
            assert abs(new[0] - old[0] - moved) <= 1
            assert abs(new[1] - old[1] - moved) <= 1
            # italics stay, too; mov_text does not close them at the end of a line
            assert new[2].strip().removesuffix(r"{\i0}") == old[2].removesuffix(r"{\i0}")
        assert [text.split("}")[1][:4] for *_, text in read_subtitles(out)[:1]] == ["eins"]
        chapters = [chapter["tags"]["title"] for chapter in media.ffprobe(out, "chapters")]
        assert chapters == ["One", "Two"]
    elif source in TEXTS:
        assert any("subtitle stream 4" in note and "left out" in note for note in writer.notes)
        assert any("cannot hold chapters" in note for note in writer.notes)
    if (source, target) == (".mkv", ".mkv"):
        assert "attachment" in kept[-1]
    if target not in (".avi", ".ts") and source not in (".avi", ".ts"):
        tags = [s.get("tags", {}).get("language") for s in media.ffprobe(out) if "sample_rate" in s]
        german = {".mov": "ger"}.get(target, "deu") if source != ".mov" else "und"
        assert [tag or "und" for tag in tags] == [german, "fra"]
    if ".avi" not in (source, target):
        for last in (False, True):
            assert abs(delay(out, "audio", last) - delay(path, "audio", last)) <= Fraction(1, 1000)


def test_data_is_kept_packet_by_packet_or_named(tmp_path):
    """Positions of a drone, as MPEG-TS carries them."""
    plain, source = media.write_video(tmp_path / "plain.ts", PICTURES[:5]), tmp_path / "in.ts"
    with av.open(str(plain)) as container, av.open(str(source), "w") as out:
        video: Any = out.add_stream_from_template(container.streams.video[0], opaque=True)
        data: Any = out.add_data_stream("klv")
        for packet in cast(Any, container.demux(video=0)):
            if packet.size:
                position = av.Packet(b"\x06\x0e\x2b\x34" + bytes([packet.pts % 251]) * 60)
                position.pts = position.dts = packet.pts
                position.time_base, position.stream = packet.time_base, data
                packet.stream = video
                out.mux([position, packet])
    convert(source, tmp_path / "out.ts")
    assert len(media.packets(source, "data")) == 5
    shift = media.frame_times(tmp_path / "out.ts")[0] - media.frame_times(source)[0]
    moved = [(time + shift, digest) for time, digest in media.packets(source, "data")]
    assert media.packets(tmp_path / "out.ts", "data") == moved
    _, writer = convert(source, tmp_path / "out.mkv")
    assert "data stream 1 (klv) is left out" in writer.notes


def test_timecode_is_kept(everything, tmp_path):
    convert(everything(".mov"), tmp_path / "out.mov")
    [video, *_] = media.ffprobe(tmp_path / "out.mov")
    assert video["tags"]["timecode"] == "01:00:00:00"


def test_a_stream_can_be_chosen(everything, tmp_path):
    path = everything(".mkv")
    with open_reader(path, stream=3) as reader:
        assert (reader.width, reader.height) == (48, 32)
        with open_writer(tmp_path / "out.mkv", reader, 48, 32, encode_options(FAST)) as writer:
            for frame in reader:
                writer.write(frame.rgb, frame)
    assert hashes(tmp_path / "out.mkv", "video", 1) == hashes(path, "video", 0)
    with pytest.raises(MediaError, match=r"stream 1 is not a video; choose 0 \(h264 64x48\), 3 \("):
        open_reader(path, stream=1)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_edit_lists_and_start_offsets_keep_the_sound_in_time(suffix, tmp_path):
    """A copy cut between key frames carries an edit list; its sound starts before zero."""
    media.ffmpeg(
        *("-f", "lavfi", "-i", "testsrc2=s=64x48:d=4", "-f", "lavfi", "-i", "sine=d=4"),
        *("-c:v", "libx264", "-g", 25, "-c:a", "aac", tmp_path / "whole.mp4"),
    )
    media.ffmpeg("-ss", 1.37, "-i", tmp_path / "whole.mp4", "-c", "copy", tmp_path / "cut.mp4")
    media.ffmpeg(
        *("-itsoffset", 0.437, "-i", tmp_path / "whole.mp4", "-i", tmp_path / "whole.mp4"),
        *("-map", "0:v", "-map", "1:a", "-c", "copy", tmp_path / "late.mp4"),
    )
    for name in ("cut.mp4", "late.mp4"):
        convert(tmp_path / name, tmp_path / f"{name}{suffix}")
        for last in (False, True):
            moved = delay(tmp_path / f"{name}{suffix}", "audio", last)
            moved -= delay(tmp_path / name, "audio", last)
            assert abs(moved) <= Fraction(1, 1000)
    assert media.frame_times(tmp_path / "late.mp4")[0] > Fraction(4, 10)


# colors and depth


@pytest.fixture(scope="module")
def hdr(tmp_path_factory) -> Path:
    """Ten bits, PQ, with mastering display and content light level."""
    path = tmp_path_factory.mktemp("hdr") / "hdr.mp4"
    display = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,1)"
    params = f"log-level=error:hdr10=1:master-display={display}:max-cll=1000,400"
    media.ffmpeg(
        *("-f", "lavfi", "-i", "testsrc2=s=64x48:d=0.2", "-pix_fmt", "yuv420p10le"),
        *("-c:v", "libx265", "-x265-params", params, "-color_primaries", "bt2020"),
        *("-color_trc", "smpte2084", "-colorspace", "bt2020nc", path),
    )
    return path


@pytest.mark.parametrize(
    ("codec", "suffix", "bits"),
    [("libx264", ".mp4", 10), ("libx265", ".mp4", 10), ("libsvtav1", ".mkv", 10),
     ("libvpx-vp9", ".webm", 8), ("ffv1", ".mkv", 10), ("prores_ks", ".mov", 10)],
)  # fmt: skip
def test_hdr_and_ten_bits_stay(codec, suffix, bits, hdr, tmp_path):
    out = tmp_path / f"out{suffix}"
    _, writer = convert(hdr, out, codec=codec)
    [stream] = media.ffprobe(out)
    assert ("10" in stream["pix_fmt"]) == (bits == 10)
    assert (bits == 8) == any("writes 8 of the input's 10 bits" in note for note in writer.notes)
    tags = [stream[f"color_{key}"] for key in ("space", "transfer", "primaries", "range")]
    assert tags == ["bt2020nc", "smpte2084", "bt2020", "tv"]
    with VideoReader(hdr) as before, VideoReader(out) as after:
        assert before.mastering is not None
        assert after.color.transfer == 16
        assert before.light_level == (1000, 400)
        assert before.mastering == {
            "G": (Fraction(53, 200), Fraction(69, 100)), "B": (Fraction(3, 20), Fraction(3, 50)),
            "R": (Fraction(17, 25), Fraction(8, 25)), "L": (1000, Fraction(1, 10000)),
            "WP": (Fraction(3127, 10000), Fraction(329, 1000)),
        }  # fmt: skip
        if codec not in ("libx264", "libx265", "libsvtav1"):
            assert any("HDR10 mastering metadata is left out" in note for note in writer.notes)
            assert after.mastering is None
            return
        assert after.light_level == before.light_level
        assert after.mastering is not None
        for key, pair in before.mastering.items():  # AV1 has 16 bits after the point, and 14
            for old, new in zip(pair, after.mastering[key], strict=True):
                assert abs(new - old) <= (Fraction(1, 2**14) if codec == "libsvtav1" else 0)


@pytest.mark.parametrize("transfer", ["arib-std-b67", "smpte2084"])
def test_ten_bit_codes_pass_unchanged(transfer, tmp_path):
    """The codes of every sample of flat patches come out as they went in, whatever they mean."""
    code = {"arib-std-b67": 18, "smpte2084": 16}[transfer]
    rng = np.random.default_rng(0)
    luma = rng.integers(300, 700, (6, 8)).repeat(8, 0).repeat(8, 1)
    planes = np.stack(
        [luma, rng.integers(480, 540, (6, 8)).repeat(8, 0).repeat(8, 1), luma // 2 + 250]
    )
    source = media.write_video(
        tmp_path / "a.mkv", [planes.astype(np.uint16)] * 2, "yuv444p10le", pix_fmt="yuv444p10le",
        codec="ffv1", options={"level": "3"}, color=(9, 9, code, 1),
    )  # fmt: skip
    convert(source, tmp_path / "b.mkv", codec="ffv1", pix_fmt="yuv444p10le")
    with av.open(str(tmp_path / "b.mkv")) as container:
        frame = next(container.decode(video=0))
        assert (frame.color_trc, frame.format.name) == (code, "yuv444p10le")
        for plane, wanted in zip(frame.planes, planes, strict=True):
            # 16 bits of RGB between: no code changes
            assert np.array_equal(samples(plane)[::4, ::4], wanted)


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1", "libvpx-vp9"])
@pytest.mark.parametrize("location", ["left", "center", "topleft"])
def test_chroma_location_is_kept(location, codec, tmp_path):
    media.ffmpeg(
        *("-f", "lavfi", "-i", "testsrc2=s=64x48:d=0.1", "-c:v", "libx264"),
        *("-pix_fmt", "yuv420p", "-chroma_sample_location", location, tmp_path / "a.mp4"),
    )
    reader, _ = convert(tmp_path / "a.mp4", tmp_path / "b.mkv", codec=codec)
    assert reader.color.siting == location
    assert media.ffprobe(tmp_path / "b.mkv")[0]["chroma_location"] == location


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "ffv1"])
def test_lossless_loses_nothing(codec, bits, tmp_path):
    """8 bits come back bit by bit, 10 bits as the nearest code."""
    form = "bgr0" if bits == 8 else "gbrp10le"
    rng, kind = np.random.default_rng(0), np.uint8 if bits == 8 else np.uint16
    pictures = rng.integers(0, 256 if bits == 8 else 65536, (3, 32, 48, 3)).astype(kind)
    source = tmp_path / "a.mkv"
    with av.open(str(source), "w") as container:
        stream: Any = container.add_stream("ffv1", 25, width=48, height=32, pix_fmt=form)
        for rgb in pictures:
            container.mux(stream.encode(from_rgb(rgb, form)))
        container.mux(stream.encode(None))
    if (codec, bits) == ("libvpx-vp9", 10):
        with pytest.raises(MediaError, match="has 8 bits and the input has 10; use libx265"):
            convert(source, tmp_path / "b.mkv", codec=codec, lossless=True)
        return
    _, writer = convert(source, tmp_path / "b.mkv", codec=codec, lossless=True, scale=1)
    if (codec, bits) == ("libx264", 10):  # it has no RGB of 10 bits
        assert any("rounds the colors once" in note for note in writer.notes)
        with open_reader(source) as reader, av.open(str(tmp_path / "b.mkv")) as container:
            for frame, coded in zip(reader, container.decode(video=0), strict=True):
                exact = from_rgb(frame.rgb, "yuv444p10le", reader.color)
                for a, b in zip(exact.planes, coded.planes, strict=True):
                    assert np.array_equal(samples(a), samples(b))
        return
    before, after = read_all(source), read_all(tmp_path / "b.mkv")
    assert len(after) == len(before) == 3
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(old.rgb, new.rgb)


@pytest.mark.parametrize("codec", ["libsvtav1", "prores_ks"])
def test_lossless_is_refused_where_there_is_none(codec, tmp_path):
    source = media.write_video(tmp_path / "a.mp4", PICTURES[:2])
    with pytest.raises(MediaError, match=f"{codec} cannot be lossless in full color; use one of"):
        convert(source, tmp_path / "b.mkv", codec=codec, lossless=True)


def test_palette_and_times_of_a_gif(tmp_path):
    frames = [Image.fromarray(picture).quantize(64) for picture in PICTURES[:4]]
    times = [40, 120, 80, 40]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=times)
    convert(tmp_path / "a.gif", tmp_path / "b.mp4", options=LOSSLESS | {"pix_fmt": "yuv444p"})
    assert media.frame_times(tmp_path / "b.mp4") == [
        0,
        Fraction(1, 25),
        Fraction(4, 25),
        Fraction(6, 25),
    ]
    for frame, picture in zip(read_all(tmp_path / "b.mp4"), frames, strict=True):
        wanted = np.array(picture.convert("RGB")).astype(int)
        assert np.abs(frame.rgb[::4, ::4] - wanted).max() <= 2


def test_animated_webp(tmp_path):
    frames, times = [Image.fromarray(p) for p in PICTURES[:4]], [40, 120, 80, 40]
    more = {"save_all": True, "append_images": frames[1:], "duration": times, "lossless": True}
    frames[0].save(tmp_path / "a.webp", **more)
    convert(tmp_path / "a.webp", tmp_path / "b.mkv", codec="libx264", lossless=True)
    ms = [round(1000 * time) for time in media.frame_times(tmp_path / "b.mkv")]
    assert ms == [0, 40, 160, 240]
    for frame, picture in zip(read_all(tmp_path / "b.mkv"), PICTURES, strict=False):
        assert np.array_equal(frame.rgb[::4, ::4], picture)
    assert [f.pts for f in read_all(tmp_path / "a.webp", 0.1, 0.2)] == [160]


# fields and sizes


@pytest.mark.parametrize("suffix", [".ts", ".mp4"])
def test_interlaced_video_is_deinterlaced(suffix, tmp_path):
    """A bar that moves between the fields leaves a comb of full strength without the filter."""
    source = tmp_path / f"a{suffix}"
    codec = ["-c:v", "libx264", "-x264-params", "tff=1"]
    if suffix == ".ts":
        codec = ["-c:v", "mpeg2video", "-q:v", 2, "-flags", "+ildct+ilme"]
    media.ffmpeg(
        *("-f", "lavfi", "-i", "testsrc2=s=96x64:d=1:r=50", "-vf", "interlace,setfield=tff"),
        *codec, source,
    )  # fmt: skip
    reader, _ = convert(source, tmp_path / "b.mp4")
    assert any("interlaced; deinterlaced by bwdif" in note for note in reader.notes)
    assert len(media.frame_times(tmp_path / "b.mp4")) == 25
    zero = reader.offset
    times = [time - zero for time in media.frame_times(source)]
    assert media.frame_times(tmp_path / "b.mp4") == times
    filtered = ["-vf", "bwdif=send_frame", "-pix_fmt", "gray", "-vsync", "passthrough"]
    media.ffmpeg("-i", source, *filtered, "-f", "rawvideo", tmp_path / "gray")
    wanted = np.fromfile(tmp_path / "gray", np.uint8).reshape(-1, 64, 96).astype(int)
    # both programs run the same filter; only gray is scaled to full range by one of them
    with VideoReader(source) as again:
        gray = luma_of(cast(Any, again._frames))
    with av.open(str(source)) as container:
        combed = luma_of(container.decode(video=0))
    assert len(gray) == len(combed) == 25
    spoiled = np.abs(combed - wanted) > 40  # where the fields differ
    assert spoiled.sum() > 500
    assert np.abs(gray - wanted)[spoiled].mean() < 2


def luma_of(frames: Iterable[Any]) -> np.ndarray:
    """[T, H, W] in 0..255 of frames of limited range."""
    planes = [frame.planes[0] for frame in frames]
    codes = [np.frombuffer(y, np.uint8).reshape(y.height, -1)[:, : y.width] for y in planes]
    return np.clip((np.stack(codes).astype(int) - 16) * 255 / 219, 0, 255)


def test_a_cut_of_interlaced_video_equals_a_slice(tmp_path):
    media.ffmpeg(
        *("-f", "lavfi", "-i", "testsrc2=s=64x48:d=2:r=50", "-vf", "interlace,setfield=tff"),
        *("-c:v", "libx264", "-x264-params", "tff=1", "-g", 10, tmp_path / "a.mp4"),
    )
    whole = read_all(tmp_path / "a.mp4")
    part = read_all(tmp_path / "a.mp4", 1.2, 1.6)
    wanted = [f for f in whole if Fraction(12, 10) <= f.pts * f.time_base < Fraction(16, 10)]
    assert [f.pts for f in part] == [f.pts for f in wanted]
    for a, b in zip(part, wanted, strict=True):
        assert np.array_equal(a.rgb, b.rgb)


def test_a_change_of_size_is_scaled(tmp_path):
    for name, size in (("a", "64x48"), ("b", "96x64")):
        media.ffmpeg("-f", "lavfi", "-i", f"testsrc2=s={size}:d=0.4", tmp_path / f"{name}.ts")
    joined = tmp_path / "c.ts"
    joined.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    reader, _ = convert(joined, tmp_path / "out.mp4")
    assert "the picture size changes; all is scaled to 64x48" in reader.notes
    assert len(media.frame_times(tmp_path / "out.mp4")) == len(media.frame_times(joined)) > 18
    small, large, frames = (read_all(tmp_path / name) for name in ("a.ts", "b.ts", "c.ts"))
    for frame, source in zip(frames[-len(large) :], large, strict=True):
        shrunk = Image.fromarray(source.rgb).resize((64, 48), Image.Resampling.BICUBIC)
        assert np.abs(frame.rgb - np.asarray(shrunk).astype(int)).mean() < 8
    for frame, source in zip(frames[: -len(large)], small, strict=False):
        assert np.array_equal(frame.rgb, source.rgb)


@pytest.mark.parametrize("first", [8, 10])
def test_a_change_of_bits_is_evened_out(first, tmp_path):
    """uint8 and uint16 frames in one window would end the work, or darken it 257 times."""
    data, forms = b"", {8: "yuv420p", 10: "yuv420p10le"}
    for bits in (first, 18 - first):
        media.ffmpeg(
            *("-f", "lavfi", "-i", "testsrc2=s=64x48:d=0.4", "-pix_fmt", forms[bits]),
            *("-c:v", "libx264", "-qp", 1, tmp_path / "part.ts"),
        )
        data += (tmp_path / "part.ts").read_bytes()
    (tmp_path / "in.ts").write_bytes(data)
    with open_reader(tmp_path / "in.ts") as reader:
        frames = list(reader)
        assert f"some pictures have 8 bits, some more; all are taken with {first}" in reader.notes
    assert {frame.rgb.dtype.name for frame in frames} == {"uint8" if first == 8 else "uint16"}
    assert len(frames) == 20
    step = 1 if first == 8 else 257
    for one, other in zip(frames[:10], frames[10:], strict=True):
        assert np.abs(one.rgb.astype(int) - other.rgb).mean() < 2 * step


def test_a_folder_of_8_and_16_bits_has_16(tmp_path):
    """Whichever comes first; the values of 8 bits come back when they are divided."""
    (tmp_path / "in").mkdir()
    images.write_picture(tmp_path / "in" / "1.png", PICTURES[0], PICTURES[0][..., 0])
    images.write_picture(tmp_path / "in" / "2.png", PICTURES[1].astype(np.uint16) * 256 + 7)
    with open_reader(tmp_path / "in") as reader:
        first, second = reader
        assert (reader.bits, len(reader.notes)) == (16, 1)
    assert np.array_equal(first.rgb, PICTURES[0].astype(np.uint16) * 257)
    assert np.array_equal(cast(Any, first.alpha), PICTURES[0][..., 0].astype(np.uint16) * 257)
    assert np.array_equal(second.rgb, PICTURES[1].astype(np.uint16) * 256 + 7)


# pictures


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_pictures_with_transparency(suffix, tmp_path):
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 65536, (8, 12, 3)).astype(np.uint16)
    alpha = np.linspace(0, 65535, 96).reshape(8, 12).astype(np.uint16)
    images.write_picture(tmp_path / "in" / "1.png", rgb, alpha)
    images.write_picture(tmp_path / "in" / "2.png", rgb)
    if suffix == ".tif":
        for name in ("1", "2"):
            media.ffmpeg("-i", tmp_path / "in" / f"{name}.png", tmp_path / "in" / f"{name}.tif")
            (tmp_path / "in" / f"{name}.png").unlink()
    reader, writer = convert(tmp_path / "in", tmp_path / "out")
    assert reader.bits == 16
    assert writer.notes == ["transparency is enlarged by bicubic interpolation"]
    see_through, opaque = read_all(tmp_path / "out")
    for frame in (see_through, opaque):
        assert np.array_equal(frame.rgb[::4, ::4], rgb)
    assert opaque.alpha is None
    enlarged = cast(Any, see_through.alpha)
    assert enlarged.dtype == np.uint16
    # on a slope, the four pixels around the middle of a block have its mean
    middle = enlarged.reshape(8, 4, 12, 4)[2:-2, 1:3, 2:-2, 1:3].mean((1, 3))
    assert np.abs(middle - alpha[2:-2, 2:-2]).max() <= 1
    [stream] = media.ffprobe(tmp_path / "out" / "1.png")
    assert stream["pix_fmt"] == "rgba64be"


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "uint8"), ("a.png", "uint16"), ("a.jpg", "uint8"),
    ("a.webp", "uint8"), ("a.tif", "uint8")],
)  # fmt: skip
def test_profile_and_tags_of_pictures_are_kept(name, kind, tmp_path):
    """All but what was true of the file alone; a turned picture is not turned twice."""
    (tmp_path / "in").mkdir()
    source, profile = (
        tmp_path / "in" / name,
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
    )
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0100] = 6, "Maker", 48  # turned; camera; width
    exif[0x8769] = {0x9003: "2026:01:02 03:04:05", 0xA002: 48}  # taken; width
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}  # place
    exif.load(exif.tobytes())
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6" a="b"/></x:xmpmeta>'
    more: dict[str, Any] = {"icc_profile": profile.tobytes(), "exif": exif, "xmp": xmp}
    if name == "a.png":
        tags = {"color profile": profile.tobytes(), "EXIF": exif.tobytes()[6:], "XMP": xmp}
        scale = 257 if kind == "uint16" else 1
        images.write_picture(source, PICTURES[0].astype(kind) * scale, tags=tags)
    else:
        if name == "a.tif":
            exif[700] = xmp
        Image.fromarray(PICTURES[0]).save(source, **more)
    reader, _ = convert(tmp_path / "in", tmp_path / "out")
    assert (reader.notes, reader.width, reader.height) == ([], 32, 48)
    [picture] = read_all(tmp_path / "out")
    turned = np.rot90(PICTURES[0], -1).astype(kind) * (257 if kind == "uint16" else 1)
    error = np.abs(picture.rgb[::4, ::4] - turned.astype(int)).max()
    assert error <= (0 if name in ("a.png", "a.tif") else 20)  # of a lossy format
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.size == (128, 192)
        assert image.info["icc_profile"] == profile.tobytes()
        kept = image.getexif()
        assert kept.pop(0x0112, 1) == 1
        assert dict(kept) | {0x8769: 0, 0x8825: 0} == {0x010F: "Maker", 0x8769: 0, 0x8825: 0}
        assert kept.get_ifd(0x8769) == {0x9003: "2026:01:02 03:04:05"}
        assert kept.get_ifd(0x8825)[2] == (1.0, 2.0, 3.0)
        untold = b"" if name == "a.tif" else b'tiff:Orientation="1"'
        assert image.info["xmp"] == xmp.replace(b'tiff:Orientation="6"', untold)
    if shutil.which("ffprobe"):
        assert media.ffprobe(tmp_path / "out" / "a.png")[0]["width"] == 128
    _, writer = convert(tmp_path / "in", tmp_path / "out.mkv")
    left_out = [note.split(" of ")[0] for note in writer.notes if "of pictures" in note]
    assert left_out == ["color profile", "EXIF", "XMP"]


def test_tags_that_do_not_fit_are_left_out_aloud(tmp_path, monkeypatch):
    """A profile of inks does not describe RGB; damaged EXIF does not spoil the picture."""
    (tmp_path / "in").mkdir()
    inks = bytes(16) + b"CMYK" + bytes(16) + b"acsp" + bytes(88)
    Image.fromarray(PICTURES[0]).convert("CMYK").save(tmp_path / "in" / "a.jpg", icc_profile=inks)
    with open_reader(tmp_path / "in") as reader:
        assert [dict(frame.tags) for frame in reader] == [{}]
        assert reader.notes == ["a color profile is left out: it is damaged, or not one of RGB"]
    (tmp_path / "in" / "a.jpg").unlink()
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    tags = {"EXIF": exif.tobytes()[6:]}
    images.write_picture(tmp_path / "in" / "a.png", PICTURES[0], tags=tags)

    def fail(*_: object) -> bytes:  # as Pillow does for some of the values that damage makes
        raise struct.error("required argument is not an integer")

    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    with open_reader(tmp_path / "in") as reader:
        assert [np.array_equal(frame.rgb, PICTURES[0]) for frame in reader] == [True]
        assert reader.notes == ["EXIF is damaged and left out"]


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_texts_resolution_and_color_tags_of_png_are_kept(kind, tmp_path):
    """They were dropped without a word."""
    (tmp_path / "in").mkdir()
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "hello")
    info.add_text("Author", "me", zip=True)
    info.add_itxt("Description", "\u00fcn\u00ef")
    tags = {
        b"gAMA": struct.pack(">I", 45455),
        b"cHRM": struct.pack(">8I", *[31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600]),
        b"cICP": bytes([9, 16, 0, 1]),
    }
    for name, content in tags.items():
        info.add(name, content)
    info.add(b"vpAg", b"private")
    source = tmp_path / "in" / "a.png"
    Image.fromarray(PICTURES[0]).save(source, pnginfo=info, dpi=(300, 300))
    if kind == "uint16":
        chunks = [x for x in images._chunks(source.read_bytes()) if x[0][:1].islower()]
        images.write_picture(source, PICTURES[0].astype(kind) * 257)
        data = source.read_bytes()
        kept = [x for x in images._chunks(data) if x[0] in (b"IDAT", b"IEND")]
        source.write_bytes(data[:33] + b"".join(images._chunk(*x) for x in [*chunks, *kept]))
    reader, _ = convert(tmp_path / "in", tmp_path / "out")
    assert reader.notes == ["metadata of pictures not kept: vpAg"]
    output = tmp_path / "out" / "a.png"
    found = list(images._chunks(output.read_bytes()))
    assert len({name for name, _ in found} & set(tags)) == len(tags)
    assert all(content == tags[name] for name, content in found if name in tags)
    assert [name for name, _ in found].count(b"pHYs") == 1
    with Image.open(output) as image, Image.open(source) as before:
        assert image.text == before.text == {  # pyright: ignore[reportAttributeAccessIssue]
            "Title": "hello", "Author": "me", "Description": "\u00fcn\u00ef"
        }  # fmt: skip
        assert image.info["dpi"] == before.info["dpi"]


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_huge_color_profile_is_left_out_aloud(name, tmp_path):
    """Pillow could not open what was written, and called such a PNG file damaged."""
    (tmp_path / "in").mkdir()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile += np.random.default_rng(0).bytes(1500000)
    profile = struct.pack(">I", len(profile)) + profile[4:]
    Image.fromarray(PICTURES[0]).save(tmp_path / "in" / name, icc_profile=profile)
    reader, _ = convert(tmp_path / "in", tmp_path / "out")
    assert reader.notes == ["color profiles and texts of more than 1 MiB are left out"]
    [picture], [before] = read_all(tmp_path / "out"), read_all(tmp_path / "in")
    assert np.array_equal(picture.rgb[::4, ::4], before.rgb)
    assert np.abs(before.rgb.astype(int) - PICTURES[0]).max() <= (0 if name == "a.png" else 20)


def test_what_an_animation_and_a_single_picture_have_beside(tmp_path):
    """An animation keeps it in every picture of a folder; a picture read as a video names it."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    frames = [Image.fromarray(picture) for picture in PICTURES[:3]]
    source = tmp_path / "a.webp"
    frames[0].save(source, save_all=True, append_images=frames[1:], icc_profile=profile)
    convert(source, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        with Image.open(file) as image:
            assert image.info["icc_profile"] == profile
    frames[0].save(tmp_path / "a.jpg", icc_profile=profile)
    with open_reader(tmp_path / "a.jpg") as reader:
        lost = "color profile of a single picture left out; put it into a folder"
        assert reader.notes.count(lost) == 1


def test_pictures_that_are_more_or_other_than_they_seem(tmp_path):
    """Further pages were dropped silently, 5-6-5 bits were 16, and floats damage."""
    frames = [Image.fromarray(picture) for picture in PICTURES[:3]]
    for name in ("a.webp", "b.tif", "b.jpg"):  # the last as telephones write them
        kind = {"b.jpg": "MPO"}.get(name)
        frames[0].save(tmp_path / name, kind, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "c.png")
    pixels = np.arange(32 * 48).astype("<u2").tobytes()
    head = struct.pack("<IiiHHIIiiII", 40, 48, 32, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    head += struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    size = struct.pack("<IHHI", 14 + len(head) + len(pixels), 0, 0, 14 + len(head))
    (tmp_path / "d.bmp").write_bytes(b"BM" + size + head + pixels)
    with open_reader(tmp_path) as reader:
        assert reader.bits == 8
        assert reader.notes == ["3 of the files hold several pictures; the first of each is taken"]
        photo = next(frame.rgb for frame in reader if frame.name == "b")
        assert np.abs(photo.astype(int) - PICTURES[0]).mean() < 8
    Image.fromarray(np.zeros((32, 48), np.float32)).save(tmp_path / "e.tif")
    with pytest.raises(MediaError, match=r"e\.tif: .* floating-point numbers; convert it to 16"):
        open_reader(tmp_path)


def test_tags_of_pictures_that_are_not_kept_are_named(tmp_path):
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "a.png"
    raw = PngImagePlugin.PngInfo()
    for kind in ("icc", "8bim", "APP1", "iptc"):
        raw.add_text(f"Raw profile type {kind}", "\n8bim\n 4\n00000000\n", zip=True)
    raw.add_text("Raw profile type exif", "\nexif\n 4\n00000000\n", zip=True)  # Pillow reads it
    Image.fromarray(PICTURES[0]).save(file, pnginfo=raw)
    with open_reader(tmp_path / "in") as reader:
        assert [dict(frame.tags) for frame in reader] == [{}]
        unkept = "raw profile icc, raw profile 8bim, raw profile APP1, IPTC"
        assert f"metadata of pictures not kept: {unkept}" in reader.notes
    file.unlink()
    tags = {269: "Document", 285: "Page", 33550: (1.0, 1.0, 0.0), 65000: "own"}
    Image.fromarray(PICTURES[0]).save(tmp_path / "in" / "a.tif", tiffinfo=tags)
    with open_reader(tmp_path / "in") as reader:
        (frame,) = reader
        exif = Image.Exif()
        exif.load(frame.tags["EXIF"])
        assert (exif[269], exif[285]) == ("Document", "Page")
        assert not {33550, 65000} & set(exif)
        assert reader.notes == ["metadata of pictures not kept: tag 33550, tag 65000"]


def test_many_texts_are_left_out_aloud(tmp_path, monkeypatch):
    """More of them than Pillow takes made a whole picture damaged."""
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 1000)
    texts = PngImagePlugin.PngInfo()
    for number in range(20):
        texts.add_text(f"text {number}", "x" * 90)
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png", pnginfo=texts)
    with open_reader(tmp_path) as reader:
        assert [np.array_equal(frame.rgb, PICTURES[0]) for frame in reader] == [True]
        assert reader.notes == ["color profiles and texts of more than 1 MiB are left out"]


def test_a_picture_that_changes_meanwhile_is_named(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(PICTURES[0]).save(tmp_path / name)
    with open_reader(tmp_path) as reader:
        Image.fromarray(PICTURES[0][:20]).save(tmp_path / "b.png")
        changed = r"b\.png: was 48x32 when the work began, and is 48x20 now"
        with pytest.raises(MediaError, match=changed):
            list(reader)


def test_closed_captions_are_named(tmp_path):
    """In the messages of an H.264 stream, as in American television."""
    source = media.write_video(tmp_path / "a.h264", PICTURES[:3], options={"bf": "0"})
    caption = b"\xb5\0\x31GA94\x03\xc1\xff\xfc\x94\x2c\xff"
    message = b"\0\0\0\1\x06\x04" + bytes([len(caption)]) + caption + b"\x80"
    with av.open(str(source)) as container, av.open(str(tmp_path / "b.mkv"), "w") as target:
        stream = target.add_stream_from_template(container.streams.video[0])
        for number, packet in enumerate(container.demux(video=0)):
            if packet.size:
                given = av.Packet(message * (number > 0) + bytes(packet))
                given.pts = given.dts = 40 * number
                given.time_base, given.stream = Fraction(1, 1000), stream
                given.is_keyframe = packet.is_keyframe
                target.mux(given)
    with open_reader(tmp_path / "b.mkv") as reader:
        captions = "closed captions (CEA-608, CEA-708) inside the pictures are left out"
        assert captions not in reader.notes  # the first picture has none
        assert len(list(reader)) == 3
        assert captions in reader.notes


def test_transparency_of_a_video_is_dropped_aloud(tmp_path):
    frames = [Image.fromarray(np.dstack([p, p[..., 0]])) for p in PICTURES[:3]]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    _, writer = convert(tmp_path / "a.webp", tmp_path / "b.mp4")
    assert "transparency is dropped; write a folder of PNG files to keep it" in writer.notes
    convert(tmp_path / "a.webp", tmp_path / "out")
    assert all(frame.alpha is not None for frame in read_all(tmp_path / "out"))


# limits and names


def test_limits_and_their_override(tmp_path, monkeypatch):
    source = media.write_video(tmp_path / "a.mp4", PICTURES[:2])
    monkeypatch.setattr("mana_triton.video.container.MAX_PIXELS", 48 * 32 - 1)
    with pytest.raises(MediaError, match="48x32 are larger than 1535 pixels; use --no-limits"):
        open_reader(source)
    (tmp_path / "in").mkdir()
    Image.fromarray(PICTURES[0]).save(tmp_path / "in" / "a.png")
    with pytest.raises(MediaError, match="48x32 are larger than 1535 pixels; use --no-limits"):
        open_reader(tmp_path / "in")
    with monkeypatch.context() as patch:  # and before a bomb of pixels is unpacked
        patch.setattr(Image.Image, "getexif", lambda _: pytest.fail("looked at the pixels"))
        with pytest.raises(MediaError, match="48x32 are larger than 1535 pixels"):
            open_reader(tmp_path / "in")
    for path in (source, tmp_path / "in"):
        with open_reader(path, limits=False) as reader:
            assert reader.width == 48
    monkeypatch.setattr("mana_triton.video.container.MAX_PIXELS", 2**26)
    with av.open(str(tmp_path / "many.mkv"), "w") as container:
        streams = [container.add_stream("ffv1", 25, width=16, height=16) for _ in range(101)]
        for stream in cast(Any, streams):
            container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
    with pytest.raises(MediaError, match=f"has 101 streams, more than {MAX_STREAMS}; use --no-l"):
        open_reader(tmp_path / "many.mkv")
    with open_reader(tmp_path / "many.mkv", limits=False) as reader:
        assert reader.width == 16


@pytest.mark.parametrize(
    "name", ["with space.mp4", "ünïcode 影.mp4", "-y.mp4", "a;b$(c)`d`.mp4", "100%d.mp4", "a:b.mp4"]
)
def test_odd_names_are_only_names(name, tmp_path, monkeypatch):
    """Neither a shell, nor FFmpeg's protocols and patterns, may read anything into a name."""
    monkeypatch.chdir(tmp_path)
    media.write_video(tmp_path / "plain.mp4", PICTURES[:3]).rename(tmp_path / name)
    (tmp_path / "out").mkdir()
    convert(Path(name), Path("out") / name)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name]
    assert len(media.frame_times(tmp_path / "out" / name)) == 3


def playlist(folder: Path, kind: str, port: int) -> Path:
    """A file that would make FFmpeg open others: `a.mp4` beside it, or a server."""
    url = f"http://127.0.0.1:{port}/a.ts"
    texts = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n",  # live: without an end
        "concat": "ffconcat version 1.0\nfile a.mp4\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        f"m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    }
    media.write_video(folder / "a.mp4", PICTURES[:3])
    if kind == "image2":  # its own name is a pattern of other names
        for name in ("frame%03d.png", "frame001.png"):
            Image.fromarray(PICTURES[0]).save(folder / name)
        return folder / "frame%03d.png"
    path = folder / {"hls": "in.m3u8"}.get(kind, "in.mp4")
    path.write_text(texts[kind])
    return path


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["hls", "concat", "sdp", "image2"])
def test_nothing_but_the_file_is_opened(kind, tmp_path):
    """A live playlist never ends; any may name files and servers that are nobody's business."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        path = playlist(tmp_path, kind, server.getsockname()[1])
        with pytest.raises(MediaError) as caught:
            open_reader(path)
        with pytest.raises(BlockingIOError):
            server.accept()
    said = f"{path}: is of the kind '{kind}', not a video that holds its own data; accepted are mov"
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.flv", "flv"), ("a.wmv", "wmv2"), ("a.mpg", "mpeg2video"), ("a.mxf", "mpeg2video"),
     ("a.m2ts", "libx264"), ("a.3gp", "libx264"), ("a.ogv", "libtheora"), ("a.h264", "libx264"),
     ("a.hevc", "libx265"), ("a.m4v", "libx264"), ("a.gif", "gif"), ("a.dv", "dvvideo")],
)  # fmt: skip
def test_files_that_hold_their_own_data_are_accepted(name, codec, tmp_path):
    """Those whose names a folder of videos is searched for, and more."""
    size = "720x576" if codec == "dvvideo" else "64x48"
    lavfi = ("-f", "lavfi", "-i", f"testsrc2=s={size}:d=0.2:r=25")
    media.ffmpeg(
        *lavfi, "-c:v", codec, *(["-pix_fmt", "yuv420p"] * (codec != "gif")), tmp_path / name
    )
    with open_reader(tmp_path / name) as reader:
        assert f"{reader.width}x{reader.height}" == size
        assert len(list(reader)) >= 4


def test_a_deep_picture_is_not_taken_for_a_pattern(tmp_path):
    """FFmpeg, which reads 16 bits, would read frame001.png when it is given frame%03d.png."""
    for name, code in (("frame%03d.png", 1000), ("frame001.png", 60000)):
        images.write_picture(tmp_path / name, np.full((8, 8, 3), code, np.uint16))
    assert images.read_picture(tmp_path / "frame%03d.png")[0].max() == 1000


def test_a_picture_of_another_format_is_refused(tmp_path):
    """Whatever its name says: Pillow starts Ghostscript for one of them."""
    (tmp_path / "in").mkdir()
    Image.fromarray(PICTURES[0]).save(tmp_path / "in" / "a.png", "eps")
    with pytest.raises(MediaError, match=r"a.png: cannot read the picture: cannot identify"):
        open_reader(tmp_path / "in")


def test_links_and_the_input_itself_are_refused(tmp_path):
    source = media.write_video(tmp_path / "a.mp4", PICTURES[:3])
    (tmp_path / "hard.mp4").hardlink_to(source)
    (tmp_path / "soft.mp4").symlink_to(source)
    (tmp_path / "nowhere.mp4").symlink_to(tmp_path / "missing.mp4")
    before = source.read_bytes()
    refused = {"hard": "is the input itself", "a": "is the input itself"}
    refused |= {"soft": "is a symbolic link", "nowhere": "is a symbolic link"}
    for name, why in refused.items():
        with pytest.raises(MediaError, match=why):
            convert(source, tmp_path / f"{name}.mp4", overwrite=True)
    assert source.read_bytes() == before
    assert not (tmp_path / "missing.mp4").exists()


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo clips are not here")
def test_demo_clip_with_two_of_everything(tmp_path):
    """nasa.mp4: the second video and both kinds of subtitles come through."""
    before = streams_of(DEMO / "nasa.mp4")
    for suffix in (".mp4", ".mkv"):
        out = tmp_path / f"out{suffix}"
        convert(DEMO / "nasa.mp4", out, scale=1)
        kinds = [stream.split()[0] for stream in streams_of(out)]
        assert sorted(kinds) == sorted(stream.split()[0] for stream in before)
        assert hashes(out, "video", 1) == hashes(DEMO / "nasa.mp4", "video", 1)


def test_what_is_lost_is_said(tmp_path):
    """Oblong pixels and rotation, where the output has no place for them."""
    aspect, turned = Fraction(4, 3), (90, False)
    source = media.write_video(tmp_path / "a.mkv", PICTURES[:3], aspect=aspect, rotation=turned)
    _, writer = convert(source, tmp_path / "b.webm", codec="libvpx-vp9")
    assert "pixel aspect 4/3 is left out: choose another --codec" in writer.notes
    for suffix in (".ts", ".avi"):
        _, writer = convert(source, tmp_path / f"b{suffix}")
        assert f"{suffix} files cannot hold rotation" in writer.notes
    with open_reader(tmp_path / "b.ts") as reader:
        assert (reader.sample_aspect_ratio, reader.rotation) == (aspect, 0)
