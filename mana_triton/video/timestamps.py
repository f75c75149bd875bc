"""Timestamp discontinuities: files that were joined byte by byte, as by `cat a.ts b.ts`.

Where a recording ends and the next begins, the times of every audio and video stream jump. All
that follows is shifted by the same amount, so that times increase and audio stays in sync. Where
only some of the streams jump, nothing is shifted.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from fractions import Fraction
from math import inf
from typing import NamedTuple

from av.container import InputContainer
from av.error import FFmpegError
from av.format import Flags

from mana_triton.video.container import is_cover
from mana_triton.video.frame import Timed

# formats whose times are a table, which cannot go back, or the numbers of the frames
_IN_ORDER = {"mov", "mp4", "avi", "gif", "apng", "h264", "hevc", "m4v", "mjpeg", "obu", "dv"}
MAX_JUMPS = 1000  # of a stream; with more of them a file is damaged, and nothing is shifted


class _Jump(NamedTuple):
    """Successive packets of a stream between which a recording may end."""

    after: int  # byte position of the first packet; -1 if there is none
    at: float  # byte position of the second; infinity if there is none
    gap: Fraction | None  # seconds by which the second must be shifted to follow the first


class _Track:
    """An audio or video stream: its jumps and the end of its last packet in seconds."""

    def __init__(self):
        self.jumps: list[_Jump] = []
        self.position, self.end = -1, Fraction(0)
        self._dts, self._duration = None, Fraction(0)

    def add(self, packet: Timed, back: Fraction, ahead: float) -> None:
        """Take the next packet; a step of its dts out of [-back, ahead] seconds is a jump."""
        position = max(self.position, packet.pos or 0)  # frames of one block share it
        last, self.position = self.position, position
        if last < 0:
            self.jumps.append(_Jump(-1, position, None))
        if packet.dts is None:
            return
        dts = packet.dts * packet.time_base
        pts = dts if packet.pts is None else packet.pts * packet.time_base
        step = Fraction(0) if self._dts is None else dts - self._dts
        is_jump = not -back <= step <= ahead
        if is_jump and position > last:
            gap = max(self._duration - step, self.end - pts)
            self.jumps.append(_Jump(last, position, gap))
            self.end = pts
        if packet.duration:
            self._duration = packet.duration * packet.time_base
        elif step > 0 and not is_jump:  # transport streams often tell no duration
            self._duration = step
        self._dts, self.end = dts, max(self.end, pts + self._duration)

    def jump_over(self, position: int) -> _Jump | None:
        """The jump from a packet up to this position to one after it, if there is one."""
        index = bisect_right(self.jumps, position, key=lambda jump: jump.at)
        jump = self.jumps[index] if index < len(self.jumps) else None
        return jump if jump and jump.after <= position else None


class Discontinuities:
    """The joints of a file; reads through all of its `packets` and decodes nothing.

    Attributes:
        count: how many joints there are.
        ends: when each audio and video stream ends after shifting, in seconds.
    """

    def __init__(self, container: InputContainer, packets: Iterator[Timed]):
        self.count, self.ends = 0, dict[int, Fraction]()
        self._joints: list[tuple[int, Fraction]] = []  # byte position, shift of what follows
        if _IN_ORDER & set(container.format.name.split(",")):
            return
        timed = [s for s in container.streams if s.type in ("audio", "video") and not is_cover(s)]
        tracks = {stream.index: _Track() for stream in timed}
        # FFmpeg makes up the decoding times of other formats, and disorders them after a joint
        is_broadcast = bool(container.format.flags & Flags.ts_discont.value)
        limits = (Fraction(1, 10), 3600) if is_broadcast else (Fraction(1), inf)
        try:
            for packet in packets:
                track = tracks.get(packet.stream.index)
                if track and packet.size and len(track.jumps) <= MAX_JUMPS:
                    track.add(packet, *limits)
        except FFmpegError:
            pass  # the reader stops here, too
        if all(len(track.jumps) <= MAX_JUMPS for track in tracks.values()):
            self._find_joints(list(tracks.values()))
        self.ends = {i: track.end + self._shift(track.position) for i, track in tracks.items()}

    def _find_joints(self, tracks: list[_Track]) -> None:
        for track in tracks:
            track.jumps.append(_Jump(track.position, inf, None))
        positions = sorted({jump.after for track in tracks for jump in track.jumps})
        found = [(at, [track.jump_over(at) for track in tracks]) for at in positions]
        found = [(at, [j for j in jumps if j]) for at, jumps in found if all(jumps)]
        for (at, jumps), (limit, _) in zip(found, [*found[1:], (inf, [])], strict=True):
            # a stream that the next recording lacks jumps over it, and counts after it
            ended = [jump for jump in jumps if jump.gap is not None and jump.at <= limit]
            if gaps := [self._shift(jump.after) + (jump.gap or 0) for jump in ended]:
                self._joints.append((at, max(gaps)))
        self.count = len(self._joints)

    def _shift(self, position: int) -> Fraction:
        """Seconds by which a packet at this byte position is shifted."""
        index = bisect_left(self._joints, position, key=lambda joint: joint[0])
        return self._joints[index - 1][1] if index else Fraction(0)

    def corrected(self, packets: Iterable[Timed]) -> Iterator[Timed]:
        """The packets of a file, from its start on, with continuous times."""
        positions: dict[int, int] = {}
        for packet in packets:
            if self.count and packet.size:
                index = packet.stream.index
                positions[index] = max(positions.get(index, 0), packet.pos or 0)
                ticks = round(self._shift(positions[index]) / packet.time_base)
                packet.pts, packet.dts = _moved(packet.pts, ticks), _moved(packet.dts, ticks)
            yield packet


def _moved(time: int | None, ticks: int) -> int | None:
    """A time some ticks later; None if there is none, or none of 64 bits (in damaged files)."""
    moved = None if time is None else time + ticks
    return moved if moved is None or -(2**63) < moved < 2**63 else None
