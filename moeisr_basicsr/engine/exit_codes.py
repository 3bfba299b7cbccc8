"""Exit codes of `basicsr train` and `basicsr test`, for schedulers and scripts."""

import signal

OK = 0
SAVE_FAILED = 1  # a checkpoint could not be written
USER_ERROR = 2  # wrong options or files; returned by the command line
NON_FINITE = 3  # a loss or gradient was not finite
INTERRUPTED = 128 + signal.SIGINT  # 130: Ctrl-C; the state was saved after the running step
TERMINATED = 128 + signal.SIGTERM  # 143: preempted; the state was saved after the running step


def of_signal(number: int) -> int:
    """The shell's code for a process that a signal ended."""
    return 128 + number
