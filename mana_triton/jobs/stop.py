"""How a run is stopped: Ctrl-C, kill and a closed terminal, one policy for all three."""

import signal

SIGNALS = [getattr(signal, x) for x in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, x)]


class StopSignals:
    """Turns the first signal into KeyboardInterrupt and ignores further ones during cleanup.

    As a context manager it delays the signal: a block under it is not interrupted.
    """

    def __init__(self):
        self._delaying = self._received = False

    def install(self) -> None:
        """Handle the signals, except those that the caller ignores, as nohup does."""
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        if self._delaying:
            self._received = True
            return
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    def __enter__(self) -> None:
        self._delaying = True

    def __exit__(self, *_: object) -> None:
        self._delaying = False
        if self._received:
            self._received = False
            self._stop()


stop_signals = StopSignals()
