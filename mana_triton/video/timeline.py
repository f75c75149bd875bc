"""Files whose times begin anew in the middle, as two recordings joined byte by byte have them.

Such a place shows in every sound and video that goes on behind it: the time of its next packet is
far from that of its last one. All that follows is then moved by the same amount, so that nothing
runs backwards and sound and picture stay together. Where one stream jumps while the packets of
another go on, nothing is moved: it is that stream's own mistake.

A recording may lack a stream that others have. The stream's jump then reaches over all of that
recording, and belongs to the places at both of its ends.
"""

from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from heapq import heapify, heapreplace
from typing import Any

from av.container import InputContainer
from av.error import FFmpegError
from av.format import Flags

from mana_triton.video.frame import Timed, is_cover

# kinds of files whose times are a table, which cannot go back, or the numbers of the frames
_IN_ORDER = {"mov", "mp4", "avi", "gif", "apng", "h264", "hevc", "m4v", "mjpeg", "obu", "dv"}
MOST = 100_000  # jumps of a file's streams: more are damage, and some 50 MB of memory


@dataclass(frozen=True, eq=False, slots=True)
class _Jump:
    """Two packets of a stream in a row between which times may begin anew.

    Attributes:
        after, at: their places in the file, in bytes; what lies between is of other streams.
        begin: the number of the second among the packets of its stream.
        gap: seconds by which it must be moved to follow the first; None before the first packet
            of the stream and after the last one, where no times are.
        others: how many packets of streams without a track there were before it.
    """

    after: int
    at: float
    begin: int
    gap: Fraction | None
    others: int


@dataclass
class _Track:
    """How far a sound or video has come: its jumps, its last packet and its ends, in seconds."""

    jumps: list[_Jump] = field(default_factory=list)
    count: int = 0
    place: int = -1
    last: Fraction | None = None
    lasts: Fraction = Fraction(0)
    decoded: Fraction = Fraction(0)
    shown: Fraction = Fraction(0)


class Timeline:
    """Which packets of a file are to be moved; reads through its `packets`, but decodes nothing.

    Attributes:
        joints: how often the times begin anew.
        ends: when each sound and video ends then, in seconds.
    """

    def __init__(self, container: InputContainer, packets: Iterator[Timed]):
        self.joints = 0
        self.ends: dict[int, Fraction] = {}
        self._moves: dict[int, list[tuple[int, Fraction]]] = defaultdict(list)
        if not _IN_ORDER & set(container.format.name.split(",")):
            found = _find(container, packets)
            if found:
                self._settle(*found)

    def _settle(self, tracks: dict[int, _Track], others: array) -> None:
        """Move what lies behind each place at which all sounds and videos jump."""
        moved, settled = Fraction(0), 0
        so_far = dict.fromkeys(tracks, moved)  # how far a stream's packets before are moved
        counts: Counter[int] = Counter()
        for here in _joints(tracks):
            gaps = [so_far[i] + x.gap for i, x in here.items() if x.gap is not None]
            if not gaps:
                continue
            # packets come a little later than they stand in the file, and not all equally
            before = max(settled, min(jump.others for jump in here.values()))
            self._move(others[settled:before], counts, moved)
            moved, settled = max(gaps), before
            self.joints += 1
            for i, jump in here.items():
                self._moves[i].append((jump.begin, moved))
            so_far |= dict.fromkeys(here, moved)
        self._move(others[settled:], counts, moved)
        for i, track in tracks.items():
            ended = bisect_right(self._moves[i], track.count - 1, key=lambda move: move[0])
            self.ends[i] = track.shown + (self._moves[i][ended - 1][1] if ended else 0)

    def _move(self, others: array, counts: Counter[int], moved: Fraction) -> None:
        """Move these packets of streams without a track, of which `counts` came before."""
        for i in others:
            if not self._moves[i] or self._moves[i][-1][1] != moved:
                self._moves[i].append((counts[i], moved))
            counts[i] += 1

    def along(self, packets: Iterable[Timed]) -> Iterator[Timed]:
        """The packets, from the start of the file on, with times that go on."""
        counts: Counter[int] = Counter()
        for packet in packets:
            if self.joints and packet.size:
                moves = self._moves[packet.stream.index]
                number = counts[packet.stream.index]
                counts[packet.stream.index] += 1
                begun = bisect_right(moves, number, key=lambda move: move[0])
                ticks = round(moves[begun - 1][1] / packet.time_base) if begun else 0
                packet.pts, packet.dts = _moved(packet.pts, ticks), _moved(packet.dts, ticks)
            yield packet


def _moved(time: int | None, ticks: int) -> int | None:
    """A time some ticks later; None if there is none, or none of 64 bits."""
    moved = None if time is None else time + ticks
    return moved if moved is None or -(2**63) < moved < 2**63 else None


def _joints(tracks: dict[int, _Track]) -> Iterator[dict[int, _Jump]]:
    """The places that lie between two packets of every stream of which the second one jumps.

    Each with its jumps. A jump over a recording without this stream reaches over several places,
    and counts at the last one, where the stream is there again.
    """
    coming = {index: iter(track.jumps) for index, track in tracks.items()}
    jumps = {index: next(mine) for index, mine in coming.items()}
    ends = [(jump.at, index) for index, jump in jumps.items()]
    heapify(ends)
    begin = max((jump.after for jump in jumps.values()), default=0)
    here: dict[int, _Jump] = {}  # of the last place, those that have ended
    new = set[int]()  # streams whose jump began behind the last place
    is_place = False
    while ends:
        at, index = ends[0]
        if begin < at:
            if is_place:
                yield here
            here, new, is_place = {}, set(), True
        if index not in new and is_place:
            here[index] = jumps[index]
        jump = next(coming[index], None)
        if jump is None:
            break
        jumps[index] = jump
        new.add(index)
        begin = max(begin, jump.after)
        heapreplace(ends, (jump.at, index))
    if is_place:
        yield here | {index: jump for index, jump in jumps.items() if index not in new}


def _find(
    container: InputContainer, packets: Iterator[Timed]
) -> tuple[dict[int, _Track], array] | None:
    """Each sound and video with all places at which it jumps, begins and ends.

    Beside them the stream of each packet that is of none of them. None if there are too many jumps.
    """
    # transport streams tell decoding times; those that FFmpeg makes up are disordered behind a jump
    broadcast = bool(container.format.flags & Flags.ts_discont.value)
    back, ahead = (Fraction(1, 10), 3600) if broadcast else (1, float("inf"))
    timed = [s for s in container.streams if s.type in ("audio", "video") and not is_cover(s)]
    tracks = {stream.index: _Track() for stream in timed}
    others, jumps = array("I"), 0
    while True:
        try:
            packet = next((p for p in packets if p.size), None)
        except FFmpegError:  # the reader stops here, too
            packet = None
        if packet is None:
            break
        track = tracks.get(packet.stream.index)
        if track is None:
            others.append(packet.stream.index)
        else:
            if not track.count:
                track.jumps.append(_Jump(-1, max(packet.pos or 0, 0), 0, None, len(others)))
            place = max(track.place, packet.pos or 0)  # packets that begin in one block share it
            if packet.dts is not None:
                jumps += _follow(track, packet, place, back, ahead, len(others))
                if jumps > MOST:
                    return None
            track.count, track.place = track.count + 1, place
    for track in tracks.values():
        track.jumps.append(_Jump(track.place, float("inf"), track.count, None, len(others)))
    return tracks, others


def _follow(track: _Track, packet: Timed, place: int, back: Any, ahead: Any, others: int) -> bool:
    """Take the times of a stream's next packet; returns whether they are far from the last ones."""
    decoded = packet.dts * packet.time_base
    shown = decoded if packet.pts is None else packet.pts * packet.time_base
    step = None if track.last is None else decoded - track.last
    far = step is not None and not -back <= step <= ahead
    jumps = far and place > track.place
    if jumps:
        gap = max(track.decoded - decoded, track.shown - shown)
        track.jumps.append(_Jump(track.place, place, track.count, gap, others))
        track.shown = shown
    if packet.duration:
        track.lasts = packet.duration * packet.time_base
    elif step is not None and step > 0 and not far:  # as it mostly is in transport streams
        track.lasts = step
    track.last, track.decoded = decoded, decoded + track.lasts
    track.shown = max(track.shown, shown + track.lasts)
    return jumps
