"""What a test has measured so far, so that the same command goes on where an interrupted one was.

Every rank appends a line for every image to a file of its own in the results folder; they are removed when all images
are measured. Lines count only for the same weights, options, environment and image files.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moeisr_basicsr.analysis.environment import environment
from moeisr_basicsr.analysis.schema import finite
from moeisr_basicsr.atomic_file import write_atomic
from moeisr_basicsr.models.evaluation import Evaluated

from .distributed import Ranks

FILES = 'progress_{}.jsonl'
# No result depends on these options.
OF_THE_RUN: tuple[str, ...] = ('root_path', 'opt_file', 'launcher', 'dist', 'dist_params', 'auto_resume', 'debug')
OF_THE_RUN += ('rank', 'world_size', 'logger', 'path')
OF_THE_LOADER = ('num_worker_per_gpu', 'pin_memory', 'persistent_workers', 'prefetch_mode', 'num_prefetch_queue')
Stamp = list[list[int] | None]


class Found(NamedTuple):
    """What an earlier test of the same name has left."""

    head: dict[str, Any]  # `identity` of the test that is to run
    rows: list[dict]  # {'row': of a results document, 'files': Stamp}
    notes: list[str]  # for the log


def identity(opt: dict) -> dict[str, Any]:
    """What must be the same for rows to be of one test."""
    options = deepcopy({key: value for key, value in opt.items() if key not in OF_THE_RUN})
    options['path'] = {key: opt['path'].get(key) for key in ('strict_load_g', 'param_key_g')}
    options.get('val', {}).pop('pbar', None)
    for dataset in options['datasets'].values():
        for key in OF_THE_LOADER:
            dataset.pop(key, None)
    named = {key: value for key, value in opt['path'].items() if key.startswith('pretrain_network') and value}
    encoder = opt['network_g'].get('encoder') or {}
    named |= {key: encoder[key] for key in ('checkpoint', 'weights') if encoder.get(key)}
    weights = {
        key: hashlib.sha256(Path(value).read_bytes()).hexdigest() if Path(value).is_file() else value
        for key, value in named.items()
    }
    device = 'cuda' if torch.cuda.is_available() and opt.get('num_gpu') != 0 else 'cpu'
    return json.loads(
        json.dumps({'options': options, 'weights': weights, 'environment': environment('', device)}, default=str)
    )


def find_progress(opt: dict) -> Found:
    """What to go on with: nothing where there is none, or where it is of another test."""
    folder, wanted, rows = Path(opt['path']['results_root']), identity(opt), []
    for path in sorted(folder.glob(FILES.format('*'))):
        lines = [entry for line in path.read_text(encoding='utf-8').splitlines() if (entry := _parsed(line))]
        if not lines:
            continue
        differ = [key for key in wanted if lines[0].get(key) != wanted[key]]
        if differ:
            return Found(
                wanted, [], [f'the interrupted test of this name had other {" and ".join(differ)}: starting anew']
            )
        rows += lines[1:]
    note = f'going on with an interrupted test: {len(rows)} images are measured already'
    return Found(wanted, rows, [note] if rows else [])


class Progress:
    """Keeps rows, and gives those that are known: the journal of `run_validation`.

    Args:
        opt: The whole options.
        ranks: This process among all.
        found: What `find_progress` has found.
        save: Called with the results of the datasets that are done, after each.
    """

    def __init__(self, opt: dict, ranks: Ranks, found: Found, save: Callable[[list[Evaluated]], None]):
        self.folder, self.save, self.results = Path(opt['path']['results_root']), save, list[Evaluated]()
        self.path = self.folder / FILES.format(ranks.rank)
        self.head = found.head
        self.rows = {(entry['row']['dataset'], entry['row']['image']): entry for entry in found.rows}
        if found.rows:
            ranks.together(self._rewrite)

    def _rewrite(self) -> None:
        """All that is known in one file: the earlier test may have had more ranks, and a half-written last line."""
        text = ''.join(_line(entry) for entry in (self.head, *self.rows.values()))
        write_atomic(self.path, lambda file: file.write(text.encode()))
        for path in set(self.folder.glob(FILES.format('*'))) - {self.path}:
            path.unlink()

    def known(self, dataset: str, image: str, files: list[str]) -> dict | None:
        """The row of an image whose files have not changed since."""
        entry = self.rows.get((dataset, image))
        return entry['row'] if entry is not None and entry['files'] == stamp(files) else None

    def add(self, row: Mapping, files: list[str]) -> None:
        """Keep the row of one image."""
        head = '' if self.path.exists() else _line(self.head)
        with open(self.path, 'a', encoding='utf-8') as file:
            file.write(head + _line({'row': row, 'files': stamp(files)}))

    def done(self, result: Evaluated) -> None:
        """A dataset is done."""
        self.results.append(result)
        self.save(self.results)

    def remove(self) -> None:
        """The test is complete."""
        for path in self.folder.glob(FILES.format('*')):
            path.unlink()


def stamp(files: list[str]) -> Stamp:
    """Size and time of change of every file; those of its LMDB for a record."""
    found: Stamp = []
    for path in map(Path, files):
        path = path if path.exists() else path.with_name('data.mdb')
        found.append([path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None)
    return found


def _line(entry: Mapping) -> str:
    return json.dumps(finite(entry)) + '\n'


def _parsed(line: str) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:
        return None  # the half-written last line of a killed test
