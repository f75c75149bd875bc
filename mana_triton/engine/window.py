"""Which frames a window holds: those around its center, mirrored at the ends of the scene."""


def mirror(index: int, first: int, last: int) -> int:
    """The frame in first .. last that stands in for `index`; end frames are not repeated."""
    period = max(2 * (last - first), 1)
    offset = (index - first) % period
    return first + min(offset, period - offset) if last > first else first


def window_numbers(center: int, first: int, last: int, length: int) -> list[int]:
    """Numbers of the `length` frames of a window, in a scene of the frames first .. last."""
    start = center - length // 2
    return [mirror(i, first, last) for i in range(start, start + length)]
