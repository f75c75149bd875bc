"""Files whose times begin anew in the middle, as two recordings joined byte by byte have them.

Such a place shows in every sound and video that goes on behind it: the time of its next packet is
far from that of its last one. All that follows is then moved by the same amount, so that nothing
runs backwards and sound and picture stay together. Where one stream jumps and the others do not,
nothing is moved: it is that stream's own mistake.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

from av.container import InputContainer
from av.error import FFmpegError
from av.format import Flags

from .frame import Timed, is_cover

# kinds of files whose times are a table, which cannot go back, or the numbers of the frames
_IN_ORDER = {"mov", "mp4", "avi", "gif", "apng", "h264", "hevc", "m4v", "mjpeg", "obu", "dv"}


@dataclass
class _Joint:
    """A place where times may begin anew, by stream: what came before it, and by how much it jumps.

    `gaps` are the seconds that a stream's packets from number `begins` on must be moved to follow
    its last one; `counts` are all streams' packets before the first stream jumped.
    """

    counts: Counter[int]
    begins: dict[int, int] = field(default_factory=dict)
    gaps: dict[int, Fraction] = field(default_factory=dict)


@dataclass
class _Track:
    """How far a stream has come: its joints, its last decoding time, and its ends, in seconds."""

    joints: int = 0
    last: Fraction | None = None
    decoded: Fraction = Fraction(0)
    shown: Fraction = Fraction(0)


class Timeline:
    """Which packets of a file are to be moved; reads through the file, but decodes nothing.

    Attributes:
        joints: how often the times begin anew.
        ends: when each sound and video ends then, in seconds.
    """

    def __init__(self, container: InputContainer):
        self.joints = 0
        self.ends: dict[int, Fraction] = {}
        self._moves: dict[int, list[tuple[int, Fraction]]] = defaultdict(list)
        if not _IN_ORDER & set(container.format.name.split(",")):
            self._settle(*_find(container))

    def _settle(
        self, joints: list[_Joint], counts: Counter[int], tracks: dict[int, _Track]
    ) -> None:
        """Keep the joints at which every sound and video that goes on has jumped."""
        moved = Fraction(0)
        for joint, after in pairwise([*joints, _Joint(counts)]):
            going_on = {i for i in tracks if after.counts[i] > joint.counts[i] > 0}
            if not going_on <= joint.begins.keys():
                continue
            moved += max(joint.gaps.values())
            self.joints += 1
            for i in counts:
                self._moves[i].append((joint.begins.get(i, joint.counts[i]), moved))
        self.ends = {i: track.shown + moved for i, track in tracks.items()}

    def along(self, packets: Iterable[Timed]) -> Iterator[Timed]:
        """The packets, from the start of the file on, with times that go on."""
        counts: Counter[int] = Counter()
        for packet in packets:
            if self.joints and packet.size:
                moves = self._moves[packet.stream.index]
                number = counts[packet.stream.index]
                counts[packet.stream.index] += 1
                by = next((by for begin, by in reversed(moves) if number >= begin), 0)
                ticks = round(by / packet.time_base)
                packet.pts = None if packet.pts is None else packet.pts + ticks
                packet.dts = None if packet.dts is None else packet.dts + ticks
            yield packet


def _find(container: InputContainer) -> tuple[list[_Joint], Counter[int], dict[int, _Track]]:
    """All places where a stream jumps, the packets of each stream, and each sound and video."""
    # transport streams tell decoding times; those that FFmpeg makes up are disordered behind a jump
    broadcast = bool(container.format.flags & Flags.ts_discont.value)
    back, ahead = (Fraction(1, 10), 3600) if broadcast else (1, float("inf"))
    timed = [s for s in container.streams if s.type in ("audio", "video") and not is_cover(s)]
    counts: Counter[int] = Counter()
    tracks = {stream.index: _Track() for stream in timed}
    joints: list[_Joint] = []
    packets: Any = container.demux()
    while True:
        try:
            packet = next((p for p in packets if p.size), None)
        except FFmpegError:  # the reader stops here, too
            packet = None
        if packet is None:
            return joints, counts, tracks
        index, track = packet.stream.index, tracks.get(packet.stream.index)
        if track and packet.dts is not None:
            decoded = packet.dts * packet.time_base
            shown = decoded if packet.pts is None else packet.pts * packet.time_base
            if track.last is not None and not -back <= decoded - track.last <= ahead:
                if track.joints == len(joints):  # no other stream has jumped before
                    joints.append(_Joint(counts.copy()))
                track.joints = len(joints)
                joints[-1].begins[index] = counts[index]
                joints[-1].gaps[index] = max(track.decoded - decoded, track.shown - shown)
                track.shown = shown
            lasts = (packet.duration or 0) * packet.time_base
            track.last, track.decoded = decoded, decoded + lasts
            track.shown = max(track.shown, shown + lasts)
        counts[index] += 1
