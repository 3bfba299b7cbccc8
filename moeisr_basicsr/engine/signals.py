"""SIGTERM and SIGINT ask for an orderly end; a second one ends the process at once."""

import multiprocessing
import os
import signal
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# torchrun passes the signal on to workers that the terminal or the scheduler has already sent it to: that copy is not
# a second request. A user's second Ctrl-C comes later.
DUPLICATE_WINDOW_S = 5.0
DUPLICATE_WINDOW_ALONE_S = 0.3


class StopRequest:
    """Remembers the first signal while it is entered as a context; handlers are restored afterwards."""

    def __init__(self):
        self.signal = 0  # number of the signal that asks for the end; 0 for none
        self._since = 0.0
        self._window = DUPLICATE_WINDOW_S if 'TORCHELASTIC_RUN_ID' in os.environ else DUPLICATE_WINDOW_ALONE_S
        self._previous = {}

    def __enter__(self) -> 'StopRequest':
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal != 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._since = int(number), now
            os.write(2, b'\nStopping after this step, then saving. Signal again to exit at once.\n')
        elif now - self._since > self._window:
            os._exit(128 + number)  # as shells report a process that a signal has ended


def shield_worker(worker: int = 0) -> None:
    """Let a loader worker outlive the signals that its whole process group receives: a `worker_init_fn`.

    Ctrl-C is ignored. SIGTERM ends it only where the parent has sent it: the scheduler's copy is the parent's business.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, 'sigwaitinfo'):  # macOS, Windows: no way to know who has sent it
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(parent.pid,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
