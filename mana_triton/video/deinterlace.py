"""Deinterlacing by FFmpeg's bwdif, one progressive frame for each frame."""

from collections import deque
from collections.abc import Iterator
from fractions import Fraction

import av.filter

from mana_triton.video.frame import Timed


class Deinterlacer:
    """Deinterlaces frames of one size and format; progressive ones pass unchanged.

    A frame depends on itself and its two neighbors alone, so that decoding may start anywhere:
    the filter is told that all frames are interlaced, and it gets `before`, the frame before the
    first, if there was one. Told which are progressive, it would treat the next interlaced one
    otherwise at the start of a file than in its middle.
    """

    def __init__(self, frame: Timed, time_base: Fraction, before: Timed):
        self._kind, self._time_base = (frame.width, frame.height, frame.format.name), time_base
        self._graph = av.filter.Graph()
        width, height, form = self._kind
        source = self._graph.add_buffer(
            width=width, height=height, format=form, time_base=time_base
        )
        bwdif = self._graph.add("bwdif", "mode=send_frame:deint=all")
        sink = self._graph.add("buffersink")
        source.link_to(bwdif)
        bwdif.link_to(sink)
        self._graph.configure()
        self._held: deque[Timed] = deque()  # frames in the filter; None in place of `before`
        if before is not None and self.takes(before):
            self._graph.vpush(before)
            self._held.append(None)

    def takes(self, frame: Timed) -> bool:
        """Whether a frame has the size and format of the first."""
        return (frame.width, frame.height, frame.format.name) == self._kind

    def push(self, frame: Timed) -> Iterator[Timed]:
        """Put in one frame, None at the end, and take out what is ready."""
        self._graph.vpush(frame)
        if frame is not None:
            self._held.append(frame)
        while True:
            try:
                done: Timed = self._graph.vpull()
            except (BlockingIOError, EOFError):
                return
            held = self._held.popleft()
            if held is None:
                continue
            if not held.interlaced_frame:
                yield held
                continue
            done.pts, done.duration, done.time_base = held.pts, held.duration, self._time_base
            yield done
