"""Signals that ask a process to stop: remembered, and looked at where it is safe to stop."""

import signal
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What batch systems, torchrun and Ctrl-C send."""

_received: list[signal.Signals] = []


def catch_signals() -> None:
    """Remember signals from now on; a second Ctrl-C interrupts at once."""
    _received.clear()
    for each in STOPPING:
        signal.signal(each, _remember)


def received_signal() -> str:
    """Name of the first signal that has come since `catch_signals`, or nothing."""
    return _received[0].name if _received else ""


def _remember(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and signal.SIGINT in _received:
        raise KeyboardInterrupt
    _received.append(signal.Signals(number))
