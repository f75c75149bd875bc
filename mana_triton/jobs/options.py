"""What a job is asked to do: made once from the flags, then passed down unchanged."""

from dataclasses import dataclass
from pathlib import Path

from mana_triton.engine.upscaler import EngineOptions
from mana_triton.video.encoder import EncodeOptions

SEGMENT = 250  # frames; also the distance of key frames in x264 and x265


@dataclass(frozen=True)
class JobOptions:
    """One run of the command.

    Attributes:
        input: a video, a folder of pictures, or a folder of videos.
        output: a file or folder; None for `<name>_x4.<ext>` in the folder of the input.
        model: name or file of the weights; None for the default for this kind of input.
        engine, encode: how frames are enlarged and encoded.
        start, end: seconds; frames outside are left out.
        stream: index of the video stream in the file; None for the first.
        limits: refuse very large pictures and files of very many streams.
        compare: put the bicubic enlargement to the left of the result.
        preview: write only this frame, counted from 0, as a PNG; None for the whole job.
        overwrite: replace an existing output.
        restart: delete the unfinished work of an earlier run.
        segment: frames, at least, of a segment that survives a stop.
    """

    input: Path
    output: Path | None = None
    model: str | None = None
    engine: EngineOptions = EngineOptions()
    encode: EncodeOptions = EncodeOptions()
    start: float | None = None
    end: float | None = None
    stream: int | None = None
    limits: bool = True
    compare: bool = False
    preview: int | None = None
    overwrite: bool = False
    restart: bool = False
    segment: int = SEGMENT
