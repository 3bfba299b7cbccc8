"""Folders of a run. Nothing that an earlier run left is ever lost: a fresh run archives it."""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

from moeisr_basicsr.atomic_file import write_atomic

LAUNCH_FILE = '.torchrun'  # in the folder of a run: the name of the torchrun that it belongs to


class Fresh(NamedTuple):
    """A folder that a run starts with anew."""

    folder: Path
    earlier: Path | None  # where the earlier one of this name is now

    def reports(self) -> list[str]:
        """What the log says of it."""
        return [] if self.earlier is None else [f'{self.folder} already existed; it is now {self.earlier}']


def tensorboard_folder(opt: dict) -> Path:
    """Where TensorBoard's files of a run are."""
    return Path(opt.get('root_path') or os.getcwd()) / 'tb_logger' / opt['name']


def archive(folder: Path) -> Path | None:
    """Rename `folder` to `<folder>_archived_<time>`; the new name, None where there was nothing."""
    if not folder.exists():
        return None
    stem = f'{folder.name}_archived_{time.strftime("%Y%m%d_%H%M%S")}'
    target, number = folder.with_name(stem), 1
    while target.exists():  # two restarts within a second
        number += 1
        target = folder.with_name(f'{stem}_{number}')
    folder.rename(target)
    return target


def belongs_to(opt: dict, launch: str) -> bool:
    """Whether the run in the experiment's folder was begun or continued by the torchrun of this name.

    (The count of restarts that torchrun gives its processes does not tell: it differs between nodes.)
    """
    try:
        return (Path(opt['path']['experiments_root']) / LAUNCH_FILE).read_text() == launch
    except OSError:
        return False


def earlier_runs(folder: str | os.PathLike) -> str:
    """A hint at the newest archive of a run that holds a checkpoint; an empty string if there is none."""
    folder = Path(folder)
    states = folder.parent.glob(f'{folder.name}_archived_*/training_states/*.state')
    saved = sorted(state.parents[1] for state in states)
    return f' The newest checkpoint of an earlier run of this name is in {saved[-1]}.' if saved else ''


def undo(fresh: list[Fresh]) -> None:
    """After a start that failed, earlier runs are where they were, unless this one has made something already."""
    if any(_is_work(path) for folder, _ in fresh for path in folder.rglob('*')):
        return
    for folder, earlier in fresh:
        shutil.rmtree(folder, ignore_errors=True)
        if earlier is not None and not folder.exists():
            earlier.rename(folder)


def _is_work(path: Path) -> bool:
    """Whether a run without a step, or a test without a picture, does not leave such a file."""
    return path.is_file() and not (
        path.suffix in ('.log', '.yml', '.yaml') or path.name == LAUNCH_FILE or path.name.startswith('events.out.')
    )


def make_folders(opt: dict, fresh: bool, launch: str | None = None) -> list[Fresh]:
    """Folders of a run, an earlier one of the same name archived where this one starts anew.

    Args:
        opt: Reads `path` and `name`.
        fresh: False where the run continues what is there.
        launch: Name of the torchrun that the run then belongs to.

    Returns:
        The folders that begin anew; none where the run continues.
    """
    path = opt['path']
    root = Path(path['experiments_root'] if opt['is_train'] else path['results_root'])
    begun = []
    if fresh:
        begun = [
            Fresh(folder, archive(folder))
            for folder in ((root, tensorboard_folder(opt)) if opt['is_train'] else (root,))
        ]
    keys = ('models', 'training_states', 'log', 'visualization') if opt['is_train'] else ('log', 'visualization')
    for folder in (root, *(path[key] for key in keys)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    if launch is not None:
        write_atomic(root / LAUNCH_FILE, lambda file: file.write(launch.encode()))
    return begun


def copy_options(opt: dict, folder: str | os.PathLike) -> None:
    """Keep the YAML of the run beside its results, with the time and the command on top."""
    source = opt.get('opt_file')
    if source and Path(source).is_file():
        head = f'# GENERATE TIME: {time.asctime()}\n# CMD:\n# {" ".join(sys.argv)}\n\n'
        content = head.encode() + Path(source).read_bytes()
        write_atomic(Path(folder) / Path(source).name, lambda file: file.write(content))
