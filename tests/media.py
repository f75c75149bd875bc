"""Small videos for the tests, made with PyAV alone and colored by formula, not by swscale."""

import hashlib
import io
import json
import shutil
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

KR_KB = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
CODE = {"bt601": 6, "bt709": 1, "bt2020": 9, None: 2}
TICK, MS = Fraction(1, 90000), Fraction(1, 1000)


def smooth_rgb(height: int, width: int, phase: float = 0.0) -> np.ndarray:
    """[H, W, 3] uint8 waves, slow enough that halving the chroma loses nothing visible."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 40 + phase), np.cos(y / 37 - phase), np.sin((x + y) / 53 + 2 * phase)]
    return (128 + 90 * np.stack(waves, axis=-1)).round().astype(np.uint8)


def rgb_to_yuv(rgb: np.ndarray, matrix: str, full_range: bool, bits: int = 8) -> np.ndarray:
    """[H, W, 3] uint8 RGB to [3, H, W] Y, Cb, Cr by the definitions in H.273, section 8.3."""
    kr, kb = KR_KB[matrix]
    r, g, b = np.moveaxis(rgb / 255.0, -1, 0)
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    unit = 2 ** (bits - 8)
    if full_range:
        top = 2**bits - 1
        planes = np.stack([top * y, top * cb + 128 * unit, top * cr + 128 * unit])
    else:
        planes = unit * np.stack([219 * y + 16, 224 * cb + 128, 224 * cr + 128])
    return planes.round().clip(0, 2**bits - 1).astype(np.uint8 if bits == 8 else np.uint16)


def to_frame(picture: np.ndarray, form: str) -> av.VideoFrame:
    """The frame of an RGB array, or of [3, H, W] planes of a 4:4:4 format, without conversion."""
    if not form.startswith("yuv444p"):
        return av.VideoFrame.from_ndarray(picture, form)
    frame = av.VideoFrame(picture.shape[2], picture.shape[1], form)
    for plane, values in zip(frame.planes, picture, strict=True):
        rows = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
        rows[:, : plane.width] = values
        plane.update(rows.tobytes())
    return frame


def write_video(
    path: Path,
    pictures: Sequence[np.ndarray],
    form: str = "rgb24",
    *,
    pix_fmt: str = "yuv420p",
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
    time_base: Fraction = TICK,
    rate: int = 25,
    color: tuple[int, int, int, int] = (2, 2, 2, 0),
    aspect: Fraction | None = None,
    rotation: tuple[float, bool] | None = None,
    audio: bool | str = False,
    metadata: dict[str, str] | None = None,
    chapters: Sequence[tuple[int, int, str]] = (),
    cover: bool = False,
    attachment: bytes | None = None,
    muxer: dict[str, str] | None = None,
) -> Path:
    """Encode pictures (arrays or planes in `form`); color = matrix, primaries, transfer, range."""
    with av.open(str(path), "w", container_options=muxer or {}) as container:
        stream: Any = container.add_stream(
            codec, rate, options or {"preset": "ultrafast", "crf": "12"}
        )
        context = stream.codec_context
        first = to_frame(pictures[0], form)
        context.width, context.height, context.pix_fmt = first.width, first.height, pix_fmt
        context.time_base = stream.time_base = time_base
        context.colorspace, context.color_primaries, context.color_trc, context.color_range = color
        if aspect:
            context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation[0], hflip=rotation[1])
        kind = audio if isinstance(audio, str) else "aac"
        sound: Any = container.add_stream(kind, 48000) if audio else None
        image: Any = None
        if sound:
            sound.metadata.update(language="deu", title="Ton")
            sound.disposition = Disposition.comment
        if cover:
            image = container.add_stream("mjpeg", 1, width=32, height=32, pix_fmt="yuvj420p")
            image.disposition = Disposition.attached_pic
        if attachment:
            container.add_attachment("font.ttf", "font/ttf", attachment)
        container.metadata.update(metadata or {})
        marks: list[Any] = [
            {"id": i, "start": a, "end": b, "time_base": MS, "metadata": {"title": title}}
            for i, (a, b, title) in enumerate(chapters)
        ]
        container.set_chapters(marks)
        if cover:
            picture = av.VideoFrame.from_ndarray(smooth_rgb(32, 32), "rgb24")
            container.mux(image.encode(picture.reformat(format="yuvj420p")))
            container.mux(image.encode(None))
        period = int(1 / (rate * time_base))
        for index, picture in enumerate(pictures):
            frame = to_frame(picture, form)
            frame.pts, frame.time_base = pts[index] if pts else index * period, time_base
            container.mux(stream.encode(frame))
            if sound:
                container.mux(sound.encode(_noise(index, 48000 // rate)))
        container.mux(stream.encode(None))
        if sound:
            container.mux(sound.encode(None))
    return path


def write_photos(path: Path, pictures: Sequence[np.ndarray]) -> Path:
    """An MJPEG video as cameras make them: EXIF in every frame, here an artist and a turn by 90."""
    exif = Image.Exif()
    exif[274], exif[315] = 6, "artist"
    with av.open(str(path), "w") as container:
        height, width = pictures[0].shape[:2]
        stream: Any = container.add_stream("mjpeg", 25, width=width, height=height)
        stream.pix_fmt = "yuvj420p"
        for number, picture in enumerate(pictures):
            photo = io.BytesIO()
            Image.fromarray(picture).save(photo, "jpeg", exif=exif)
            packet = av.Packet(photo.getvalue())
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 25), stream, True
            container.mux(packet)
    return path


def _noise(index: int, samples: int) -> av.AudioFrame:
    values = np.random.default_rng(index).uniform(-0.1, 0.1, (2, samples)).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(values, "fltp", "stereo")
    frame.sample_rate, frame.pts, frame.time_base = 48000, index * samples, Fraction(1, 48000)
    return frame


def add_subtitles(path: Path, source: Path, lines: Sequence[tuple[int, int, str]]) -> Path:
    """Copy `source` to `path` (Matroska) with a SubRip stream; times in milliseconds."""
    clock = "00:00:{:02d},{:03d}".format
    blocks = [
        f"{number}\n{clock(*divmod(start, 1000))} --> {clock(*divmod(end, 1000))}\n{line}\n"
        for number, (start, end, line) in enumerate(lines, 1)
    ]
    script = path.with_suffix(".srt")
    script.write_text("\n".join(blocks), encoding="utf-8")
    with av.open(str(source)) as video, av.open(str(script)) as srt, av.open(str(path), "w") as out:
        inputs = [*video.streams, *srt.streams]
        targets = {id(s): out.add_stream_from_template(s, opaque=True) for s in inputs}
        copy_packets((video, srt), targets, out)
    return path


def copy_packets(sources: Sequence[Any], targets: dict[int, Any], out: Any) -> None:
    """All packets of some containers into another one, by the id of their stream."""
    for container in sources:
        for packet in container.demux():
            if packet.size:
                packet.stream = targets[id(packet.stream)]
                out.mux(packet)


def frame_times(path: Path) -> list[Fraction]:
    """Presentation times of the first video stream, in seconds."""
    with av.open(str(path)) as container:
        frames: Any = container.decode(video=0)
        return [frame.pts * frame.time_base for frame in frames]


def packets(path: Path, kind: str, index: int = 0) -> list[tuple[Any, str]]:
    """Time in seconds (None for a cover) and hash of every packet of one stream."""
    with av.open(str(path)) as container:
        stream: Any = [s for s in container.streams if s.type == kind][index]
        return [
            (
                None if packet.pts is None else packet.pts * stream.time_base,
                hashlib.sha256(bytes(packet)).hexdigest(),
            )
            for packet in container.demux(stream)
            if packet.size
        ]


def ffmpeg(*arguments: object) -> None:
    """Run the ffmpeg program of the system."""
    _program("ffmpeg", "-v", "error", "-y", *arguments)


def ffprobe(path: Path, what: str = "streams", *arguments: object) -> Any:
    """What the ffprobe program says of a file's streams, frames, packets or chapters."""
    found = _program("ffprobe", "-v", "error", f"-show_{what}", "-of", "json", *arguments, path)
    return json.loads(found)[what]


def _program(name: str, *arguments: object) -> str:
    if not shutil.which(name):
        pytest.skip(f"needs the program {name} (apt install ffmpeg)")
    command = [name, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
