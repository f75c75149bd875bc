"""Encoders, colors and names of outputs, and failures."""

import re
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import media
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from roundtrip import (
    LOSSLESS,
    PICTURES,
    convert,
    encode_options,
    enlarge,
    read_all,
)

from mana_triton.video.color import Color, from_planes, planes_of
from mana_triton.video.frame import MediaError
from mana_triton.video.reader import VideoReader, open_reader
from mana_triton.video.writer import VideoWriter, open_writer


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """40 frames at 25 per second with sound."""
    path = tmp_path_factory.mktemp("plain") / "plain.mp4"
    return media.write_video(path, PICTURES, audio=True, muxer={"movflags": "faststart"})


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
def test_colors_survive_the_round_trip(matrix, full_range, pix_fmt, tmp_path):
    """Fails with PyAV's own conversion when encoding, which is BT.601 whatever the tags say."""
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


@pytest.mark.parametrize(
    ("codec", "suffix", "bits"),
    [("libx264", ".mp4", 10), ("libx265", ".mp4", 10), ("libsvtav1", ".mkv", 10),
     ("libvpx-vp9", ".webm", 8), ("ffv1", ".mkv", 10), ("prores_ks", ".mov", 10)],
)  # fmt: skip
def test_hdr_and_ten_bits_are_kept(codec, suffix, bits, tmp_path):
    display = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,1)"
    params = f"log-level=error:hdr10=1:master-display={display}:max-cll=1000,400"
    # x265 corrupts the heap with 10 bits and less than 64 pixels of width
    pictures = [media.smooth_rgb(48, 64, i / 5).astype(np.uint16) * 257 for i in range(6)]
    hdr = media.write_video(
        tmp_path / "hdr.mp4", pictures, "rgb48le",
        pix_fmt="yuv420p10le", codec="libx265", options={"x265-params": params},
        color=(9, 9, 16, 1),
    )  # fmt: skip
    _, writer = convert(hdr, tmp_path / f"out{suffix}", codec=codec)
    assert (bits == 8) == any("writes 8 of the input's 10 bits" in note for note in writer.notes)
    with VideoReader(hdr) as before, VideoReader(tmp_path / f"out{suffix}") as after:
        assert (after.bits, after.color.name, after.color.transfer) == (bits, "bt2020", 16)
        assert (before.color.full_range, after.color.full_range) == (False, False)
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
        tolerance = Fraction(1, 2**14) if codec == "libsvtav1" else 0  # bits of AV1
        for key, pair in cast(Any, before.mastering).items():
            for old, new in zip(pair, cast(Any, after.mastering)[key], strict=True):
                assert abs(new - old) <= tolerance


def samples(plane: Any) -> np.ndarray:
    """[height, width] codes of a plane of more than 8 bits."""
    return np.frombuffer(plane, np.uint16).reshape(plane.height, -1)[:, : plane.width]


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


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("location", ["left", "center", "topleft"])
def test_chroma_location_is_kept(location, codec, tmp_path):
    options = {"chroma_sample_location": location, "preset": "ultrafast"}
    source = media.write_video(tmp_path / "a.mp4", PICTURES[:6], options=options)
    reader, _ = convert(source, tmp_path / "b.mkv", codec=codec)
    with open_reader(tmp_path / "b.mkv") as again:
        assert again.color.siting == reader.color.siting == location


def from_rgb(rgb: np.ndarray, form: str, color: Color) -> av.VideoFrame:
    planes = planes_of(torch.from_numpy(rgb), form, color, False)
    return from_planes([plane.numpy() for plane in planes], form)


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
            container.mux(stream.encode(from_rgb(rgb, form, Color())))
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
def test_unwritable_output_is_explained(name, settings, message, plain, tmp_path, capfd):
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr.startswith("caught: "), done.stderr
    assert "disk full" in done.stderr
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    "name", ["with space.mp4", "ünïcode 影.mp4", "-y.mp4", "a;b$(c)`d`.mp4", "100%d.mp4", "a:b.mp4"]
)
def test_special_characters_in_names(name, tmp_path, monkeypatch):
    """Neither a shell nor FFmpeg's protocols and patterns interpret a name."""
    monkeypatch.chdir(tmp_path)
    media.write_video(tmp_path / "plain.mp4", PICTURES[:3]).rename(tmp_path / name)
    (tmp_path / "out").mkdir()
    convert(Path(name), Path("out") / name)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [name]
    assert len(media.frame_times(tmp_path / "out" / name)) == 3


@pytest.mark.parametrize(
    ("name", "message"), [("notes.txt", "holds other things"), ("0.png", "exists; use --overwrite")]
)
def test_files_put_into_the_output_folder_meanwhile_stay(name, message, tmp_path):
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


def test_lost_aspect_and_rotation_are_reported(tmp_path):
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
