"""Frames, times and colors of videos as they are read, and damage."""

import socket
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import media
import numpy as np
import pytest
from faults import FailingContainer
from PIL import Image
from roundtrip import (
    LOSSLESS,
    PICTURES,
    convert,
    read_all,
)

from mana_triton.video import reader as readers
from mana_triton.video.frame import MediaError
from mana_triton.video.reader import MAX_STREAMS, open_reader


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """40 frames at 25 per second with sound."""
    path = tmp_path_factory.mktemp("plain") / "plain.mp4"
    return media.write_video(path, PICTURES, audio=True, muxer={"movflags": "faststart"})


def test_missing_timestamps_are_filled_in(tmp_path):
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


def test_broadcast_start_time_is_removed(tmp_path):
    """A recording that starts at 10 s in its stream clock must not begin with 10 s of nothing."""
    pts = [900000 + 3600 * i for i in range(40)]
    source = media.write_video(tmp_path / "a.ts", PICTURES, pts=pts)
    convert(source, tmp_path / "b.mp4")
    assert media.frame_times(tmp_path / "b.mp4") == [Fraction(i, 25) for i in range(40)]


@pytest.mark.parametrize("suffix", [".avi", ".mkv", ".nut"])
def test_mjpeg_with_exif_is_read(suffix, tmp_path):
    """PyAV has no name for EXIF in side data, and raised for all of it."""
    source = media.write_photos(tmp_path / f"a{suffix}", PICTURES[:3])
    with open_reader(source) as reader:
        assert reader.rotation in (90, -90)
        assert reader.display_matrix is not None
        assert len(list(reader)) == 3


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


# colors

PATCHES = np.array(
    [[0, 0, 0], [255, 255, 255], [128, 128, 128], [255, 0, 0], [0, 255, 0], [0, 0, 255],
     [255, 255, 0], [0, 255, 255], [255, 0, 255], [200, 60, 90], [30, 120, 50], [16, 235, 240]],
    np.uint8,
)  # fmt: skip


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
    assert reader.color.full_range == full_range
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
def test_colors_that_change_midway_are_followed(before, after, noted, tmp_path):
    """Each frame is decoded by its own matrix and range."""
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


def write_interlaced(path: Path, **more: Any) -> Path:
    """A bar that moves by 8 pixels between the fields, which combs every frame."""
    frames = np.zeros((25, 64, 96, 3), np.uint8)
    for number in range(25):
        for field in (0, 1):
            left = 4 * (2 * number + field) % 80
            frames[number, field::2] = 40
            frames[number, field::2, left : left + 16] = 220
    params = {"x264-params": "tff=1", "preset": "ultrafast", "qp": "1"}
    return media.write_video(path, list(frames), options=params | more)


def luma(frame: av.VideoFrame) -> np.ndarray:
    """[H, W] codes."""
    return np.frombuffer(cast(Any, frame.planes[0]), np.uint8).reshape(frame.height, -1)[:, :96]


@pytest.mark.parametrize("suffix", [".ts", ".mp4"])
def test_interlaced_video_is_deinterlaced(suffix, tmp_path):
    source = write_interlaced(tmp_path / f"a{suffix}")
    reader, _ = convert(source, tmp_path / "b.mp4")
    assert "the video is interlaced; deinterlaced by bwdif, frame by frame" in reader.notes
    zero = reader.offset
    times = [time - zero for time in media.frame_times(source)]
    assert media.frame_times(tmp_path / "b.mp4") == times
    with av.open(str(source)) as container:
        combed = [luma(frame).astype(int) for frame in container.decode(video=0)]
    smooth = [frame.rgb[..., 1].astype(int) for frame in read_all(source)]
    assert len(smooth) == len(combed) == 25
    # how much lines differ from their neighbors: by all of the bar's edges in a comb
    before, after = (np.abs(np.diff(frames, axis=1)).mean() for frames in (combed, smooth))
    assert after < before / 100


def test_cut_of_interlaced_video_equals_a_slice(tmp_path):
    source = write_interlaced(tmp_path / "a.mp4", g="10")
    whole, part = read_all(source), read_all(source, 0.4, 0.8)
    wanted = [f for f in whole if Fraction(4, 10) <= f.pts * f.time_base < Fraction(8, 10)]
    assert [f.pts for f in part] == [f.pts for f in wanted]
    for a, b in zip(part, wanted, strict=True):
        assert np.array_equal(a.rgb, b.rgb)


def test_change_of_size_is_scaled(tmp_path):
    data = b""
    for size in ((48, 64), (64, 96)):
        pictures = [media.smooth_rgb(*size)] * 10
        data += media.write_video(tmp_path / "part.ts", pictures).read_bytes()
    (tmp_path / "in.ts").write_bytes(data)
    with open_reader(tmp_path / "in.ts") as reader:
        shapes = {frame.rgb.shape for frame in reader}
        assert shapes == {(48, 64, 3)}
        assert "the picture size changes; all is scaled to 64x48" in reader.notes


@pytest.mark.parametrize("first", [8, 10])
def test_change_of_bits_is_evened_out(first, tmp_path):
    """uint8 and uint16 frames in one window would stop the job, or darken it 257 times."""
    data, forms = b"", {8: "yuv420p", 10: "yuv420p10le"}
    for bits in (first, 18 - first):
        part = media.write_video(tmp_path / "part.ts", PICTURES[:10], pix_fmt=forms[bits])
        data += part.read_bytes()
    (tmp_path / "in.ts").write_bytes(data)
    with open_reader(tmp_path / "in.ts") as reader:
        frames = list(reader)
        assert f"some pictures have 8 bits, some more; all are taken with {first}" in reader.notes
    assert {frame.rgb.dtype.name for frame in frames} == {"uint8" if first == 8 else "uint16"}
    step = 1 if first == 8 else 257
    for one, other in zip(frames[:10], frames[10:], strict=True):
        assert np.abs(one.rgb.astype(int) - other.rgb).mean() < 4 * step


def test_palette_and_times_of_a_gif(tmp_path):
    frames = [Image.fromarray(picture).quantize(64) for picture in PICTURES[:4]]
    times = [40, 120, 80, 40]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=times)
    found = read_all(tmp_path / "a.gif")
    assert [frame.pts * frame.time_base * 100 for frame in found] == [0, 4, 16, 24]
    for frame, picture in zip(found, frames, strict=True):
        assert np.array_equal(frame.rgb, np.array(picture.convert("RGB")))


def test_lost_closed_captions_are_reported(tmp_path):
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


def test_truncated_last_frame_is_reported(tmp_path):
    """A transport stream has no header that could tell its length."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 96, 3), np.uint8)
    source = media.write_video(tmp_path / "a.ts", list(noise))
    with av.open(str(source)) as container:
        starts = [packet.pos or 0 for packet in container.demux(video=0) if packet.size]
    source.write_bytes(source.read_bytes()[: (starts[5] + starts[6]) // 2])
    reader, _ = convert(source, tmp_path / "out.mp4")
    assert reader.truncated == "frames damaged or missing: 1"
    assert len(media.frame_times(tmp_path / "out.mp4")) == 6


@pytest.mark.parametrize("suffix", [".mp4", ".ts"])
def test_failed_read_is_an_error(suffix, tmp_path, monkeypatch):
    """Were it taken for damage, a film could end where a network did."""
    source = media.write_video(tmp_path / f"a{suffix}", PICTURES, audio=True)
    opened, failed = readers.open_container, []
    monkeypatch.setattr(
        readers, "open_container", lambda path: FailingContainer(opened(path), 10, failed)
    )
    with pytest.raises(MediaError, match="cannot read on: Input/output error"):
        read_all(source)
    assert len(read_all(source)) == len(PICTURES)


def test_intact_file_is_not_called_truncated(plain):
    with open_reader(plain) as reader:
        assert len(list(reader)) == reader.frame_count == len(PICTURES)
    assert reader.truncated is None


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
def test_unreadable_input_is_explained(kind, message, tmp_path):
    path = make_unreadable(tmp_path, kind)
    with pytest.raises(MediaError, match=message) as caught:
        open_reader(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


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


def playlist(folder: Path, kind: str, port: int) -> Path:
    """A file that would make FFmpeg open others: `a.mp4` next to it, or a server."""
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
    """A live playlist never ends; any may name other files and servers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        path = playlist(tmp_path, kind, server.getsockname()[1])
        with pytest.raises(MediaError) as caught:
            open_reader(path)
        with pytest.raises(BlockingIOError):
            server.accept()
    said = (
        f"{path}: is of the format '{kind}', not a video that holds its own data; accepted are mov"
    )
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.flv", "flv"), ("a.wmv", "wmv2"), ("a.mpg", "mpeg2video"), ("a.m2ts", "libx264"),
     ("a.3gp", "libx264"), ("a.m4v", "libx264")],
)  # fmt: skip
def test_containers_are_accepted(name, codec, tmp_path):
    options, tick = {"b": "1000000"}, Fraction(1, 25)
    media.write_video(tmp_path / name, PICTURES[:5], codec=codec, options=options, time_base=tick)
    assert len(read_all(tmp_path / name)) == 5
