"""One line in place of a bus error.

Weights are read through memory-mapped files. If another program cuts such a file off meanwhile, the
kernel ends the process where it reads beyond the end, without a word.
"""

import ctypes
import os
import signal
import threading
from pathlib import Path

_SA_SIGINFO = 4  # linux/signal.h
_ADDRESS_OFFSET = 16  # of si_addr in siginfo_t, on 64 bits


_ONE = threading.Lock()


class _Action(ctypes.Structure):
    """glibc's struct sigaction."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def tell_of_cut_files() -> None:
    """From here on end the process with one line and status 2 where a mapped file was cut off."""
    # Python's own handlers run too late: the instruction that failed would be repeated for ever.
    handler = ctypes.cast(_HANDLER, ctypes.c_void_p).value
    action = _Action(handler=handler, flags=_SA_SIGINFO)
    ctypes.CDLL(None).sigaction(signal.SIGBUS, ctypes.byref(action), None)


def _tell(_: int, information: int, __: int) -> None:
    _ONE.acquire()  # the line of another thread is enough
    address = ctypes.c_void_p.from_address(information + _ADDRESS_OFFSET).value or 0
    line = f"error: {_file_at(address)} was cut off while it was read: run this again\n"
    os.write(2, line.encode())
    os._exit(2)


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_tell)


def _file_at(address: int) -> str:
    """The file that is mapped at an address (proc(5))."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        start, stop = (int(each, 16) for each in span.split("-"))
        if start <= address < stop:
            return path
    return "a file"
