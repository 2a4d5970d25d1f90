"""No process of the engine outlives the server, however that dies.

vLLM's worker hangs below its engine core, and that below the server: a SIGKILL of the server reaches neither, and
PR_SET_PDEATHSIG would follow the thread that started the engine, not the process. So each worker watches its ancestors
by pidfd, which names one process for ever, unlike its number, and ends what is left.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Sequence

SERVER_PID_VARIABLE = "POISE_GENERATION_SERVER_PID"


def end_with_server() -> None:
    """Watch, on a thread, the server named in the environment and the processes between it and this one."""
    import psutil

    ancestors = [parent.pid for parent in psutil.Process().parents()]
    server = int(os.environ[SERVER_PID_VARIABLE])
    if server not in ancestors:  # it died while this process was being started
        os.kill(os.getpid(), signal.SIGKILL)
    watched = [os.pidfd_open(pid) for pid in ancestors[: ancestors.index(server) + 1]]
    threading.Thread(target=_watch, args=(watched,), name="orphan-watch", daemon=True).start()


def _watch(pidfds: Sequence[int]) -> None:
    """Wait for the first of these processes to end; end those below the last, the server, and this one."""
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
