"""Ends vLLM's processes when the server dies, even by SIGKILL.

vLLM's worker is a child of its engine core, which is a child of the server. PR_SET_PDEATHSIG fires when
the starting thread ends, not when the server's process ends. So each worker watches its ancestors through pidfds, which
are never reused, unlike process ids. If one ends, the worker kills the others.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Sequence

SERVER_PID_VARIABLE = "POISE_GENERATION_SERVER_PID"


def end_with_server() -> None:
    """Start a thread that watches the processes from this one up to the server that the environment names."""
    import psutil

    ancestors = [parent.pid for parent in psutil.Process().parents()]
    server = int(os.environ[SERVER_PID_VARIABLE])
    if server not in ancestors:  # the server died while this process started
        os.kill(os.getpid(), signal.SIGKILL)
    watched = [os.pidfd_open(pid) for pid in ancestors[: ancestors.index(server) + 1]]
    threading.Thread(target=_watch, args=(watched,), name="orphan-watch", daemon=True).start()


def _watch(pidfds: Sequence[int]) -> None:
    """Wait until one of these processes exits. Then kill the other ancestors and this process.

    The last pidfd is the server's; it is never killed.
    """
    poll = select.poll()
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
    poll.poll()
    for pidfd in pidfds[:-1]:
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            continue
    os.kill(os.getpid(), signal.SIGKILL)
