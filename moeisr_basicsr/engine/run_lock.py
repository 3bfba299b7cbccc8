"""One run per folder: a file beside it names the process that holds it, also to other machines on a shared disk."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

from moeisr_basicsr.errors import ExitCode, UserError

from .distributed import Ranks

BEAT_S = 5.0
LEASE_S = 60.0  # without a heartbeat for so long a process of another machine counts as dead
PROBE_S = 1.0  # finds out about a process of this machine, by its id and start time


@contextmanager
def held(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the folder of a run until the block ends; rank 0 does it for all.

    The file lies beside the folder, which an archive may move. What a killed process left is taken over.

    Raises:
        UserError: A living process holds it.
    """
    lease = SoftFileLease(
        folder.with_name(f'.{folder.name}.lock'), lease_duration=LEASE_S, heartbeat_interval=BEAT_S, on_compromise=_lost
    )
    ranks.together(lambda: _take(lease, folder))
    try:
        yield
    finally:
        lease.release()


def _take(lease: SoftFileLease, folder: Path) -> None:
    path = Path(lease.lock_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lease.acquire(timeout=PROBE_S)
    except Timeout:
        owner, last = lease.owner, _beat(path)
        holder = 'another process' if owner is None else f'process {owner.pid} on {owner.hostname}'
        if owner is not None and owner.hostname != _this_host():
            print(f'{folder} is held by {holder}: waiting for its heartbeat, at most {LEASE_S:.0f} s.', file=sys.stderr)
            try:
                lease.acquire(timeout=LEASE_S + BEAT_S, cancel_check=lambda: _beat(path) not in (0, last))
                return
            except Timeout:
                pass
        raise UserError(f'{folder} is in use by {holder}: stop it first, or give this run another name.') from None


def _beat(path: Path) -> float:
    """When the holder last gave a sign of life, by the clock of the disk; 0 where it has let go."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _this_host() -> str:
    """The name of this machine as leases have it: a container is a machine of its own."""
    with tempfile.TemporaryDirectory() as folder, SoftFileLease(Path(folder) / 'lock') as lease:
        assert lease.owner is not None
        return lease.owner.hostname


def _lost(loss: LeaseCompromise) -> None:
    """Called by the heartbeat when the folder is no longer ours."""
    print(f'{loss.lock_file}: the hold on the folder of this run is lost ({loss.reason}).', file=sys.stderr, flush=True)
    if loss.reason == 'owner-changed':  # this process stood still for so long that another one took over
        os._exit(ExitCode.USER_ERROR)  # at once: whatever it saved would go among the files of the other run
