"""Folders of pictures: order, bits, transparency, orientation and metadata."""

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import media
import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from roundtrip import (
    PICTURES,
    convert,
    enlarge,
    read_all,
)

from mana_triton.video import images
from mana_triton.video.frame import MediaError
from mana_triton.video.image_reader import ImageFolderReader
from mana_triton.video.reader import open_reader
from mana_triton.video.writer import open_writer


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


def test_folder_of_8_and_16_bits_has_16(tmp_path):
    """Whichever comes first."""
    (tmp_path / "in").mkdir()
    images.write_picture(tmp_path / "in" / "1.png", PICTURES[0], PICTURES[0][..., 0])
    images.write_picture(tmp_path / "in" / "2.png", PICTURES[1].astype(np.uint16) * 256 + 7)
    with open_reader(tmp_path / "in") as reader:
        first, second = reader
        assert (reader.bits, len(reader.notes)) == (16, 1)
    assert np.array_equal(first.rgb, PICTURES[0].astype(np.uint16) * 257)
    assert np.array_equal(cast(Any, first.alpha), PICTURES[0][..., 0].astype(np.uint16) * 257)
    assert np.array_equal(second.rgb, PICTURES[1].astype(np.uint16) * 256 + 7)


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


def test_sixteen_bit_pictures_with_transparency(tmp_path):
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 65536, (8, 12, 3)).astype(np.uint16)
    alpha = np.linspace(0, 65535, 96).reshape(8, 12).astype(np.uint16)
    images.write_picture(tmp_path / "in" / "1.png", rgb, alpha)
    images.write_picture(tmp_path / "in" / "2.png", rgb)
    reader, writer = convert(tmp_path / "in", tmp_path / "out")
    assert (reader.bits, writer.notes) == (
        16,
        ["transparency is enlarged by bicubic interpolation"],
    )
    see_through, opaque = read_all(tmp_path / "out")
    for frame in (see_through, opaque):
        assert np.array_equal(frame.rgb[::4, ::4], rgb)
    assert opaque.alpha is None
    enlarged = cast(Any, see_through.alpha)
    assert enlarged.dtype == np.uint16
    # on a slope, the four pixels around the middle of a block have its mean
    middle = enlarged.reshape(8, 4, 12, 4)[2:-2, 1:3, 2:-2, 1:3].mean((1, 3))
    assert np.abs(middle - alpha[2:-2, 2:-2]).max() <= 1


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
    _, writer = convert(tmp_path / "in", tmp_path / "out.mkv")
    left_out = [note.split(" of ")[0] for note in writer.notes if "of pictures" in note]
    assert left_out == ["color profile", "EXIF", "XMP"]


def test_unfit_profile_and_damaged_exif_are_reported(tmp_path, monkeypatch):
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
    (tmp_path / "in").mkdir()
    chunks = {
        b"gAMA": struct.pack(">I", 45455),
        b"cHRM": struct.pack(">8I", *[31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600]),
        b"cICP": bytes([9, 16, 0, 1]),
    }
    texts = {"Title": "hello", "Description": "\u00fcn\u00ef"}
    tags = {"color tags": chunks, "texts": texts, "resolution": (300, 300)}
    scale = 257 if kind == "uint16" else 1
    images.write_picture(tmp_path / "in" / "a.png", PICTURES[0].astype(kind) * scale, tags=tags)
    reader, _ = convert(tmp_path / "in", tmp_path / "out")
    assert reader.notes == []
    for folder in ("in", "out"):
        with Image.open(tmp_path / folder / "a.png") as image:
            assert cast(Any, image).text == texts
            assert [round(dpi) for dpi in image.info["dpi"]] == [300, 300]
        found = list(images._chunks((tmp_path / folder / "a.png").read_bytes()))
        assert {k: chunk[8:-4] for k, chunk in found if k in chunks} == chunks
        assert [k for k, _ in found].count(b"pHYs") == 1


def test_huge_color_profile_is_left_out(tmp_path):
    """Pillow could not open the output."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile += np.random.default_rng(0).bytes(1500000)
    profile = struct.pack(">I", len(profile)) + profile[4:]
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.jpg", icc_profile=profile)
    with open_reader(tmp_path) as reader:
        assert [dict(frame.tags) for frame in reader] == [{}]
        assert reader.notes == ["color profiles of more than 1 MiB are left out"]


def test_unusual_pictures(tmp_path):
    """Further pages are reported, 5-6-5 bits are 8, and floats are refused."""
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


def test_lost_metadata_of_pictures_are_reported(tmp_path):
    raw = PngImagePlugin.PngInfo()
    raw.add_text("Raw profile type iptc", "\n8bim\n 4\n00000000\n", zip=True)
    raw.add_text("Raw profile type exif", "\nexif\n 4\n00000000\n", zip=True)  # Pillow reads it
    raw.add(b"vpAg", b"private")
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png", pnginfo=raw)
    with open_reader(tmp_path) as reader:
        assert [dict(frame.tags) for frame in reader] == [{}]
        unkept = "metadata of pictures not kept: raw profile type iptc, vpAg"
        assert unkept in reader.notes
    (tmp_path / "a.png").unlink()
    tags = {269: "Document", 285: "Page", 33550: (1.0, 1.0, 0.0), 65000: "own"}
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.tif", tiffinfo=tags)
    with open_reader(tmp_path) as reader:
        (frame,) = reader
        exif = Image.Exif()
        exif.load(frame.tags["EXIF"])
        assert (exif[269], exif[285]) == ("Document", "Page")
        assert not {33550, 65000} & set(exif)
        assert reader.notes == ["metadata of pictures not kept: tag 33550, tag 65000"]


def test_profile_of_a_single_picture_is_reported(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.jpg", icc_profile=profile)
    with open_reader(tmp_path / "a.jpg") as reader:
        lost = "color profile of a single picture left out; put it into a folder"
        assert reader.notes.count(lost) == 1


def test_picture_that_changes_meanwhile_is_an_error(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(PICTURES[0]).save(tmp_path / name)
    with open_reader(tmp_path) as reader:
        Image.fromarray(PICTURES[0][:20]).save(tmp_path / "b.png")
        with pytest.raises(MediaError, match=r"b\.png: has changed from 48x32 to 48x20"):
            list(reader)


def test_name_of_a_deep_picture_is_no_pattern(tmp_path):
    """FFmpeg, which reads 16 bits, would read frame001.png when it is given frame%03d.png."""
    for name, code in (("frame%03d.png", 1000), ("frame001.png", 60000)):
        images.write_picture(tmp_path / name, np.full((8, 8, 3), code, np.uint16))
    assert images.read_picture(tmp_path / "frame%03d.png")[0].max() == 1000


def test_picture_of_another_format_is_refused(tmp_path):
    """Whatever its name says: Pillow starts Ghostscript for one of them."""
    (tmp_path / "in").mkdir()
    Image.fromarray(PICTURES[0]).save(tmp_path / "in" / "a.png", "eps")
    with pytest.raises(MediaError, match=r"a.png: cannot read the picture: cannot identify"):
        open_reader(tmp_path / "in")


def test_lost_transparency_is_reported(tmp_path):
    images.write_picture(tmp_path / "a.png", PICTURES[0], PICTURES[0][..., 0])
    _, writer = convert(tmp_path, tmp_path.with_suffix(".mp4"))
    assert writer.notes == ["transparency is dropped; write a folder of PNG files to keep it"]
