"""Folders of pictures as readers."""

import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Self

from PIL import Image

from mana_triton.files import PICTURES, is_picture, visible
from mana_triton.video import images
from mana_triton.video.color import Color, with_uniform_bits
from mana_triton.video.frame import Frame, MediaError, Notes, exact_seconds, explained


class ImageFolderReader:
    """The pictures of a folder as a Reader, in natural order of their names (2 before 10).

    Args:
        path: folder of PNG, JPEG, WebP, TIFF or BMP files, 8 or 16 bits, all of one size.
        start, end: seconds, as of a video with `rate` frames per second.
        rate: frames per second.
        limits: refuse pictures of more than MAX_PIXELS pixels.

    Raises:
        MediaError: no picture, an unreadable one, or different sizes.
    """

    color, offset, rotation, damaged = Color(), Fraction(0), 0, 0
    display_matrix: list[int] | None = None
    sample_aspect_ratio: Fraction | None = None
    mastering: dict[str, tuple[Fraction, ...]] | None = None
    light_level: tuple[int, int] | None = None
    truncated: str | None = None

    def __init__(
        self,
        path: str | Path,
        start: float | None = None,
        end: float | None = None,
        rate: Fraction | int = 25,
        *,
        limits: bool = True,
    ):
        self.path, self.notes, self._first = Path(path), Notes(), 0
        self.rate, self.time_base = Fraction(rate), 1 / Fraction(rate)
        with explained(self.path, "list the folder"):
            files = [file for file in visible(self.path) if is_picture(file) and file.is_file()]
        if not files:
            raise MediaError(f"{path}: holds no pictures ({' '.join(PICTURES)})")
        first = 0 if start is None else math.ceil(exact_seconds(start) * self.rate)
        last = None if end is None else math.ceil(exact_seconds(end) * self.rate)
        self.files = files[first:last]
        if not self.files:
            raise MediaError(f"{path}: has no pictures from {start or 0} s to {end or 'the end'}")
        self.frame_count: int | None = len(self.files)
        if not limits:
            Image.MAX_IMAGE_PIXELS = None  # Pillow has a limit of its own
        self._inspect(limits)

    def _inspect(self, limits: bool) -> None:
        """Look at all files now rather than after hours of work."""
        infos = []
        for file in self.files:
            with explained(file, "read the picture"):
                infos.append(images.inspect_picture(file, limits))
            if infos[-1][:2] != infos[0][:2]:
                raise MediaError(
                    "{}: is {}x{}, but {} is {}x{}; all pictures must have one size".format(
                        file, *infos[-1][:2], self.files[0].name, *infos[0][:2]
                    )
                )
        self.width, self.height = infos[0][:2]
        self.bits = max(info.bits for info in infos)
        if more := sum(info.has_more for info in infos):
            self.notes.add(f"{more} of the files hold several pictures; the first of each is taken")

    def seek(self, pts: int | None) -> None:
        """Iterate from the frame with this time on; None: from the first one."""
        self._first = pts or 0

    def __iter__(self) -> Iterator[Frame]:
        for index, file in enumerate(self.files[self._first :], self._first):
            with explained(file, "read the picture"):
                rgb, alpha, tags = images.read_picture(file, self.notes.add)
            rgb, alpha = with_uniform_bits(rgb, alpha, self.bits, self.notes)
            if rgb.shape[:2] != (self.height, self.width):
                raise MediaError(
                    f"{file}: has changed from {self.width}x{self.height} to"
                    f" {rgb.shape[1]}x{rgb.shape[0]} since the start; restore the pictures"
                )
            yield Frame(rgb, index, self.time_base, 1, file.stem, alpha, tags=tags)

    def close(self) -> None:
        """Nothing stays open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
