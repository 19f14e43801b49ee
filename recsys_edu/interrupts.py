"""Ctrl-C ends a program with one line and status 130, also while it imports, waits for other ranks, or hangs.

    end_at_once()                    # first thing in a program: until further notice, an interrupt is the end
    with ends_when_interrupted():    # a KeyboardInterrupt, so that files are closed; then one line, status 130
        main()

For programs only. In a notebook an interrupt stays what it is, an exception like any other.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

INTERRUPTED = 130  # what a shell reports for a program that was ended by Ctrl-C
GRACE_S = 3.0  # for closing files; a rank that waits for another one in C++ hears of no exception


def end_at_once() -> None:
    """Until further notice an interrupt ends the process on the spot: nothing has begun yet, nothing is to be closed.

    While a program imports, a KeyboardInterrupt would show fifty lines of other people's modules, or be swallowed.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


@contextmanager
def ends_when_interrupted(grace_s: float = GRACE_S) -> Iterator[None]:
    """Around a program's main: after a KeyboardInterrupt the process ends, at the latest `grace_s` seconds later.

    A second interrupt ends it at once, and so does one after main has returned.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()  # not os.pipe: Windows takes only sockets for this
    for end in (ours, theirs):
        end.setblocking(end is ours)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    if hasattr(os, "register_at_fork"):  # a child that is interrupted too is no second interrupt
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_later, args=(grace_s, ours, theirs), name="interrupts", daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        _end()  # not sys.exit: gloo's threads may abort an interpreter that shuts down, or keep it waiting
    finally:
        end_at_once()


def _end_later(grace_s: float, ours: socket.socket, theirs: socket.socket) -> None:
    """A thread of its own, because the main one runs no Python while it waits in C++; `theirs` is kept from closing."""
    while ours.recv(1)[0] != signal.SIGINT:
        pass
    ours.settimeout(grace_s)
    with suppress(TimeoutError):
        ours.recv(1)
    _end()


def _end(*_: object) -> NoReturn:
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"\n{program_name()}: interrupted\n")):
        try:
            stream.write(text)
            stream.flush()
        except (OSError, RuntimeError, ValueError):  # closed, or the interrupt came while it was being written to
            continue
    os._exit(INTERRUPTED)


def program_name() -> str:
    """What was started, and as which rank: "train_dlrm, rank 0"."""
    path = sys.argv[0].removesuffix(".exe")
    if path == "-m":  # the module is still being looked for
        path = sys.orig_argv[sys.orig_argv.index("-m") + 1].replace(".", "/")
    if os.path.basename(path) == "__main__.py":
        path = os.path.dirname(path)
    name = os.path.basename(path).removesuffix(".py")
    return f"{name}, rank {os.environ['RANK']}" if "RANK" in os.environ else name
