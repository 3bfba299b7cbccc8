"""Folders of a run, and where it starts. Nothing that an earlier run left is ever lost: a fresh run archives it."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from basicsr.utils import get_time_str

from moeisr_basicsr.atomic_file import write_atomic
from moeisr_basicsr.errors import UserError

from .checkpoint_store import Checkpoint, CheckpointStore, DamagedCheckpoint
from .distributed import Ranks

LAUNCH_FILE = '.torchrun'  # in the folder of a run: the name of the torchrun that it belongs to
WORK = ('.pth', '.state', '.jsonl', '.json', '.png')  # what a run without a step does not leave
FOLDERS = ('experiments_root', 'results_root', 'models', 'training_states', 'log', 'visualization')


class Start(NamedTuple):
    """Where a training run starts."""

    checkpoint: Checkpoint | None
    fresh: bool  # whether an earlier run of the same name is to be archived
    notes: list[str]  # for the log


def find_start(opt: dict, ranks: Ranks, store: CheckpointStore) -> Start:
    """What to continue from: `path: resume_state`, or with --auto_resume and after torchrun's restarts the newest.

    Raises:
        UserError: The given state cannot be used.
    """
    # Known by its launch where that has a name: the count of restarts differs between nodes.
    restarts = ranks.largest(int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)))

    def find() -> Start:
        notes: list[str] = []
        root, given, checkpoint = Path(opt['path']['experiments_root']), opt['path'].get('resume_state'), None
        restarted = restarts > 0 if ranks.launch is None else _launch_of(root) == ranks.launch
        if opt.get('auto_resume') or restarted:
            checkpoint = store.newest(notes.append)
        if checkpoint is None and given:
            try:
                checkpoint = store.load(given)
            except DamagedCheckpoint as damage:
                raise UserError(f'path: resume_state: {damage}.') from damage
        if checkpoint is None and opt.get('auto_resume'):
            notes.append(f'--auto_resume: {root} has no checkpoint; starting from iteration 0.{_earlier_runs(root)}')
        return Start(checkpoint, checkpoint is None and not restarted, notes)

    return ranks.together(find)


def _launch_of(root: Path) -> str | None:
    """Name of the torchrun that began or continued the run in this folder."""
    return (root / LAUNCH_FILE).read_text() if (root / LAUNCH_FILE).is_file() else None


def _earlier_runs(root: Path) -> str:
    """A hint at the newest archive of a run that holds a checkpoint; an empty string if there is none."""
    saved = sorted(state.parents[1] for state in root.parent.glob(f'{root.name}_archived_*/training_states/*.state'))
    return f' The newest checkpoint of an earlier run of this name is in {saved[-1]}.' if saved else ''


@contextmanager
def run_folders(opt: dict, ranks: Ranks, fresh: bool) -> Iterator[list[str]]:
    """The folders of a run; a mistake of the user that ends it before any work leaves an earlier run where it was.

    With `fresh` an earlier run of the same name is archived first. Yields what the log should say of it.
    """
    archived = ranks.together(lambda: make_folders(opt, fresh, ranks.launch))
    try:
        yield [f'{folder} already existed; it is now {earlier}' for folder, earlier in archived.items() if earlier]
    except UserError:
        if ranks.is_main and not any(path.suffix in WORK for folder in archived for path in folder.rglob('*')):
            for folder, earlier in archived.items():
                shutil.rmtree(folder, ignore_errors=True)
                if earlier is not None and not folder.exists():
                    earlier.rename(folder)
        raise


def make_folders(opt: dict, fresh: bool, launch: str | None = None) -> dict[Path, Path | None]:
    """Make the folders of a run, with the YAML in them; the fresh ones, and where the earlier ones are now."""
    path, root = opt['path'], root_of(opt)
    begun = (root, tensorboard_folder(opt)) if opt['is_train'] else (root,)
    archived = {folder: archive(folder) for folder in begun} if fresh else {}
    for folder in (Path(path[key]) for key in FOLDERS if key in path):
        folder.mkdir(parents=True, exist_ok=True)
    if launch is not None:
        write_atomic(root / LAUNCH_FILE, lambda file: file.write(launch.encode()))
    source = opt.get('opt_file')
    if source and Path(source).is_file():
        head = f'# GENERATE TIME: {time.asctime()}\n# CMD:\n# {" ".join(sys.argv)}\n\n'
        content = head.encode() + Path(source).read_bytes()
        write_atomic(root / Path(source).name, lambda file: file.write(content))
    return archived


def root_of(opt: dict) -> Path:
    """The folder of a run: experiments/NAME, or results/NAME of a test."""
    return Path(opt['path']['experiments_root' if opt['is_train'] else 'results_root'])


def tensorboard_folder(opt: dict) -> Path:
    """Where TensorBoard's files of a run are."""
    return Path(opt.get('root_path') or os.getcwd()) / 'tb_logger' / opt['name']


def archive(folder: Path) -> Path | None:
    """Rename `folder` to `<folder>_archived_<time>`; the new name, None where there was nothing.

    BasicSR's `mkdir_and_rename` fails where two runs start within a second.
    """
    if not folder.exists():
        return None
    target = folder.with_name(f'{folder.name}_archived_{get_time_str()}')
    while target.exists():
        target = target.with_name(f'{target.name}_')
    return folder.rename(target)
