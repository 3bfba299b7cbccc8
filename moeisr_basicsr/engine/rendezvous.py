"""torchrun's attempts: a store that no earlier one has written to, and a name that all of them share.

torchrun gives every attempt of --max-restarts the same key-value store. torch 2.13 does not keep the attempts apart in
it: a restarted rank may read the address of a process that is dead, and every restart fails with "Connection
refused". Here the ranks of one attempt find each other by numbers that nobody can have written before, and then use a
part of the store that is theirs alone. (torchrun's own restart counter will not do: it differs between nodes.)
"""

import os
import secrets
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

POLL_S = 0.02
KEY = 'moeisr_basicsr'


def agent_store(timeout: timedelta) -> TCPStore | None:
    """torchrun's store; None where this process has another launcher, or the store is new for every attempt."""
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return None
    return TCPStore(
        os.environ['MASTER_ADDR'],
        int(os.environ['MASTER_PORT']),
        is_master=False,
        timeout=timeout,
        wait_for_workers=False,
    )


def launch_name(store: Store) -> str:
    """A name of this torchrun, the same on every rank and in every attempt of --max-restarts."""
    return store.compare_set(f'{KEY}/launch', '', secrets.token_hex(8)).decode()


def fresh_store(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """The part of `store` for the ranks that are here now.

    Rank 0 draws a name. Each other rank asks with a number of its own and takes the name only from the answer to that
    number; rank 0 answers whatever is asked, until every rank has confirmed the name.

    Raises:
        TimeoutError: Not all ranks have come.
    """
    end = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        name = secrets.token_hex(8)
        waiting = set(range(1, world_size))
        while waiting:
            for other in sorted(waiting):
                if store.check([f'{KEY}/question/{other}']):
                    question = store.get(f'{KEY}/question/{other}').decode()  # perhaps that of an earlier attempt
                    store.set(f'{KEY}/answer/{question}', name)
                if store.check([f'{KEY}/confirmed/{name}/{other}']):
                    waiting.remove(other)
            _pause(end, f'ranks {sorted(waiting)}')
    else:
        question = secrets.token_hex(8)
        store.set(f'{KEY}/question/{rank}', question)
        while not store.check([f'{KEY}/answer/{question}']):
            _pause(end, 'rank 0')
        name = store.get(f'{KEY}/answer/{question}').decode()
        store.set(f'{KEY}/confirmed/{name}/{rank}', 'yes')
    return PrefixStore(f'{KEY}/{name}', store)


def _pause(end: float, missing: str) -> None:
    if time.monotonic() > end:
        raise TimeoutError(f'torchrun: {missing} did not come in time.')
    time.sleep(POLL_S)
