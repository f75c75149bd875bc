"""A network that only repeats pixels, run over files, and what the outputs hold."""

from pathlib import Path
from typing import Any, cast

import av
import media
import numpy as np

from mana_triton.video.encoder import EncodeOptions
from mana_triton.video.frame import Frame
from mana_triton.video.reader import Reader, open_reader
from mana_triton.video.writer import Writer, open_writer

FAST = {"preset": "ultrafast"}
LOSSLESS = {"preset": "ultrafast", "qp": "0"}
PICTURES = [media.smooth_rgb(32, 48, phase / 5) for phase in range(40)]


def enlarge(rgb: np.ndarray, scale: int = 4) -> np.ndarray:
    """Every pixel becomes a block of itself."""
    return rgb.repeat(scale, axis=0).repeat(scale, axis=1)


def encode_options(options: dict[str, str] | None = None, **others: Any) -> EncodeOptions:
    return EncodeOptions(options=tuple((options or {}).items()), **others)


def convert(
    source: Path,
    target: Path,
    scale: int = 4,
    start: float | None = None,
    end: float | None = None,
    overwrite: bool = False,
    **options: Any,
) -> tuple[Reader, Writer]:
    """Enlarge a file; returns reader and writer for their notes."""
    options.setdefault("options", {} if "codec" in options else FAST)
    encode = encode_options(**options) if target.suffix else EncodeOptions()
    with open_reader(source, start, end) as reader:
        size = scale * reader.width, scale * reader.height
        with open_writer(target, reader, *size, encode, overwrite=overwrite) as writer:
            for frame in reader:
                writer.write(enlarge(frame.rgb, scale), frame)
    return reader, writer


def read_all(path: Path, start: float | None = None, end: float | None = None) -> list[Frame]:
    """All frames of a file or folder."""
    with open_reader(path, start, end) as reader:
        return list(reader)


def read_subtitles(path: Path) -> list[tuple[int, int, str]]:
    """Begin and end in milliseconds, and text, of the first stream of subtitles."""
    lines = []
    with av.open(str(path)) as container:
        stream: Any = container.streams.subtitles[0]
        for packet in cast(Any, container.demux(stream)):
            for line in stream.codec_context.decode(packet) if packet.size else ():
                begin = round(packet.pts * packet.time_base * 1000)
                end = round((packet.pts + packet.duration) * packet.time_base * 1000)
                lines.append((begin, end, line.dialogue.decode()))
    return [line for line in lines if line[2]]


def hashes(path: Path, kind: str = "audio", index: int = 0) -> list[str]:
    """Packet hashes of one stream."""
    return [digest for _, digest in media.packets(path, kind, index)]
