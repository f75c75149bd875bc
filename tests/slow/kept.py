"""Print what each container keeps of a file that has everything.

python tests/slow/kept.py
"""

import contextlib
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2])]

import av
import media
import numpy as np

from mana_triton.video.encoder import EncodeOptions
from mana_triton.video.reader import open_reader
from mana_triton.video.writer import open_writer

TARGETS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".ts")
TEXT = "1\n00:00:00,100 --> 00:00:00,500\none\n\n2\n00:00:00,600 --> 00:00:00,900\ntwo\n"


def rich_file(folder: Path, sound: str) -> Path:
    """Ten bits, PQ, turned, oblong pixels, irregular times, and every other kind of stream."""
    steps = np.random.default_rng(0).integers(20, 60, 25)
    planes = [np.full((3, 32, 48), 400 + 5 * i, np.uint16) for i in range(25)]
    turned = media.write_video(
        folder / "picture.mkv", planes, "yuv444p10le", pix_fmt="yuv444p10le",
        pts=(45000 + 90 * np.cumsum(steps)).tolist(), color=(9, 9, 16, 1), aspect=Fraction(4, 3),
        rotation=(90, False),
    )  # fmt: skip
    (folder / "text.srt").write_text(TEXT)
    media.ffmpeg(
        *("-f", "lavfi", "-i", "sine=d=2", "-f", "lavfi", "-i", "sine=f=880:d=2"),
        *("-f", "lavfi", "-i", "smptebars=s=48x32:d=2"),
        *("-i", folder / "text.srt", "-map", 0, "-map", 1, "-map", 2, "-map", 3),
        *("-c:a", sound, "-c:v", "libvpx-vp9" if sound == "libopus" else "libx264"),
        *("-metadata:s:a:0", "language=fra", "-metadata:s:a:1", "language=spa"),
        *("-disposition:a:0", 0, "-disposition:a:1", "default+comment", folder / "rest.mkv"),
    )
    whole = folder / "whole.mkv"
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(av.open(str(f))) for f in (turned, folder / "rest.mkv"))
        with av.open(str(whole), "w") as out:
            streams: list[Any] = [a.streams.video[0], *b.streams]
            targets = {id(s): out.add_stream_from_template(s, opaque=True) for s in streams}
            for stream in streams:
                targets[id(stream)].metadata.update(stream.metadata)
                targets[id(stream)].disposition = stream.disposition
            video: Any = targets[id(streams[0])]
            video.sample_aspect_ratio = Fraction(4, 3)
            video.set_display_rotation(90)
            out.add_attachment("font.ttf", "font/ttf", b"font" * 99)
            out.metadata["title"] = "Title"
            ms = Fraction(1, 1000)
            chapters: list[Any] = [
                {"id": i, "start": 500 * i, "end": 500 * i + 500, "time_base": ms,
                 "metadata": {"title": f"Part {i}"}}
                for i in range(2)
            ]  # fmt: skip
            out.set_chapters(chapters)
            media.copy_packets((a, b), targets, out)
    return whole


def facts(path: Path) -> dict[str, Any]:
    """What is compared."""
    times = media.frame_times(path)
    with av.open(str(path)) as container, open_reader(path) as reader:
        kinds = [s.type for s in container.streams]
        sounds = container.streams.audio
        texts = [s.name for s in container.streams.subtitles]
        found = {
            "sound, packet by packet": len(sounds),
            "other videos": kinds.count("video") - 1,
            "text subtitles": texts,
            "fonts": kinds.count("attachment"),
            "chapters": len(container.chapters()),
            "title": {k.lower(): v for k, v in container.metadata.items()}.get("title"),
            "languages": [s.language for s in sounds],
            "dispositions": [int(s.disposition) for s in sounds],
            "rotation": reader.rotation,
            "pixel aspect": reader.sample_aspect_ratio,
            "matrix, primaries, transfer, range": reader.color.__class__(
                reader.color.matrix, reader.color.full_range, reader.color.primaries,
                reader.color.transfer),
            "10 bits": reader.bits,
        }  # fmt: skip
    gaps = np.diff([float(time) for time in times])
    found["times of frames"] = gaps
    found["sound in time"] = [float(media.packets(path, "audio")[i][0] - times[i]) for i in (0, -1)]
    return found


def main() -> None:
    columns = {}
    with tempfile.TemporaryDirectory() as name:
        for target in TARGETS:
            folder = Path(name) / target[1:]
            folder.mkdir()
            source = rich_file(folder, "libopus" if target == ".webm" else "aac")
            out = folder / f"out{target}"
            codec = "libvpx-vp9" if target == ".webm" else "libx264"
            with open_reader(source) as reader:
                size = 2 * reader.width, 2 * reader.height
                with open_writer(out, reader, *size, EncodeOptions(codec)) as writer:
                    for frame in reader:
                        writer.write(frame.rgb.repeat(2, 0).repeat(2, 1), frame)
            before, after = facts(source), facts(out)
            columns[target] = {key: verdict(key, before[key], after[key]) for key in before}
    print(f"| kept in | {' | '.join(target[1:] for target in TARGETS)} |")
    print("|---|" + "---|" * len(TARGETS))
    for key in columns[TARGETS[0]]:
        print(f"| {key} | {' | '.join(columns[target][key] for target in TARGETS)} |")


def verdict(key: str, before: Any, after: Any) -> str:
    if key == "text subtitles":
        return "yes" if after == before else f"as {after[0]}" if after else "no"
    if key in ("times of frames", "sound in time"):
        if len(before) != len(after):
            return "no"
        worst = max(abs(a - b) for a, b in zip(before, after, strict=True))
        return "yes" if worst <= 0.001001 else f"within {1000 * worst:.0f} ms"
    if isinstance(before, int) and isinstance(after, int) and key != "10 bits":
        return "yes" if after == before else "no" if not after else f"{after} of {before}"
    return "yes" if after == before else "no"


if __name__ == "__main__":
    main()
