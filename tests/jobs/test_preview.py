"""Previews: the frame that the whole job would show."""

import itertools

import media
import numpy as np
import pytest
from job_clips import FAST, errors, read_all, scene_pictures, write_ramps
from PIL import Image

from mana_triton.engine.upscaler import Upscaler, upscale
from mana_triton.jobs import preview
from mana_triton.video.frame import Frame
from mana_triton.video.reader import open_reader


@pytest.mark.parametrize("number", [0, 10, 12, 25])
def test_preview_shows_a_frame_of_the_whole_job(number, weights, tmp_path, cli):
    """Also at a cut and at both ends."""
    lossless = {"preset": "ultrafast", "qp": "0"}
    clip = media.write_video(tmp_path / "clip.mkv", scene_pictures(), options=lossless)
    expected = list(upscale(read_all(clip), weights))[number]
    with open_reader(clip) as reader:
        lr, shown = preview.enlarged_frame(reader, Upscaler(weights), number)
    assert np.array_equal(lr, read_all(clip)[number])
    assert np.array_equal(shown, expected)
    code, summary, _ = cli(clip, "--preview", number)
    output = tmp_path / f"clip_x4_preview_{number}.png"
    assert (code, summary["output"], summary["frames"]) == (0, str(output), 1)
    assert set(tmp_path.iterdir()) == {clip, output}
    picture = np.asarray(Image.open(output))
    # the first zoomed crop holds the pixels of the enlarged frame
    side = min(*lr.shape[:2], 16)
    ((y, x),) = preview.detailed(lr, side, 1)
    zoom = -(-preview.ZOOMED // (4 * side))
    crop = expected[4 * y : 4 * (y + side), 4 * x : 4 * (x + side)]
    square = crop.repeat(zoom, 0).repeat(zoom, 1)[4:-4, 4:-4]  # without its colored edge
    left = 2 * preview.GAP + 3 * (square.shape[0] + 8) + 2 * preview.GAP + 4
    bottom = picture.shape[0] - preview.GAP - 4
    found = picture[bottom - square.shape[0] : bottom, left : left + square.shape[1]]
    assert np.array_equal(found, square)


def test_preview_enlarges_one_frame(weights, monkeypatch):
    """Not the frames before it, which are only context."""
    enlarged = []
    upscaler = Upscaler(weights)
    decode = upscaler.model.decode
    monkeypatch.setattr(upscaler.model, "decode", lambda *z: enlarged.append(1) or decode(*z))

    class Reader(list):
        path = "clip"

    frames = Reader(Frame(rgb, i, media.MS) for i, rgb in enumerate(scene_pictures()))
    preview.enlarged_frame(frames, upscaler, 5)  # pyright: ignore[reportArgumentType]
    assert len(enlarged) <= upscaler.plan(16, 24).workers + 1


def test_detailed_finds_the_details():
    rgb = np.full((60, 90, 3), 128, np.uint8)
    rng = np.random.default_rng(0)
    rgb[30:46, 50:66] = rng.integers(0, 256, (16, 16, 3))
    rgb[2:18, 4:20] = rng.integers(96, 160, (16, 16, 3))
    first, second, third = preview.detailed(rgb, 16, 3)
    assert np.abs(np.subtract(first, (30, 50))).max() <= 1
    assert np.abs(np.subtract(second, (2, 4))).max() <= 1
    for one, other in itertools.combinations((first, second, third), 2):
        assert np.abs(np.subtract(one, other)).max() >= 16


def test_preview_of_sixteen_bits_is_that_of_eight():
    small, large = (media.smooth_rgb(height, 2 * height) for height in (24, 96))
    deep = [picture.astype(np.uint16) * 257 for picture in (small, large)]
    assert preview.sheet(*deep).tobytes() == preview.sheet(small, large).tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preview", "5"], "{}/clip.mp4: has 5 frames, numbered from 0; there is no 5"),
        (["--preview", "9" * 20], "{}/clip.mp4: has 5 frames, numbered from 0; there is no 9"),
        (["--preview", "1", "-o", "{}/x.mp4"], "{}/x.mp4: must end in .png, as --preview writes"),
        (["--preview", "1", "-o", "{}/old.png"], "{}/old.png: exists; use --overwrite"),
    ],
)
def test_impossible_preview_is_one_line(arguments, message, clip, cli, tmp_path):
    (tmp_path / "old.png").write_text("precious")
    before = sorted(tmp_path.iterdir())
    code, _, stderr = cli(clip, *(argument.format(tmp_path) for argument in arguments))
    assert code == 1
    assert errors(stderr)[0].startswith("error: " + message.format(*[tmp_path] * 2))
    assert sorted(tmp_path.iterdir()) == before


def test_preview_is_not_written_over_its_input(folder, cli):
    picture = folder / "frame2.png"
    before = picture.read_bytes()
    code, _, stderr = cli(folder, "--preview", "0", "-o", picture, "--overwrite")
    assert (code, picture.read_bytes()) == (1, before)
    assert errors(stderr) == [f"error: {picture}: is the input itself; choose another output"]
    link = folder.parent / "link.png"
    link.symlink_to(picture)
    code, _, stderr = cli(folder, "--preview", "0", "-o", link, "--overwrite")
    assert (code, link.is_symlink()) == (1, True)
    assert errors(stderr) == [f"error: {link}: is a symbolic link; give the file's own name"]


def test_names_may_be_as_long_as_names_can_be(cli, tmp_path):
    """255 bytes, of characters of three each: temporary names must not be longer."""
    clip = write_ramps(tmp_path / f"{'影' * 79}.mp4", 3)
    code, summary, _ = cli(clip, "--preview", 1)
    assert (code, summary["output"]) == (0, str(tmp_path / f"{clip.stem}_x4_preview_1.png"))
    assert cli(clip, *FAST)[0] == 0
    assert len(list(tmp_path.iterdir())) == 3
    clip = clip.rename(tmp_path / f"{'影' * 83}.mp4")
    for arguments in (["--preview", 1], FAST, ["-o", tmp_path / f"{'x' * 300}.mp4"]):
        code, _, stderr = cli(clip, *arguments)
        (line,) = errors(stderr)
        assert code == 1
        assert "the name is too long; choose a shorter one" in line
