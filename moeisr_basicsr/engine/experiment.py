"""Folders of a run. Nothing that an earlier run left is ever lost: a fresh run archives it."""
import os
import sys
import time
from pathlib import Path

from moeisr_basicsr.atomic_file import write_atomic

LAUNCH_FILE = '.torchrun'  # in the folder of a run: the name of the torchrun that it belongs to


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


def make_folders(opt: dict, fresh: bool, launch: str | None = None) -> list[str]:
    """Folders of a run, an earlier one of the same name archived where this one starts anew.

    Args:
        opt: Reads `path` and `name`.
        fresh: False where the run continues what is there.
        launch: Name of the torchrun that the run then belongs to.

    Returns:
        What was archived, for the log.
    """
    path = opt['path']
    root = Path(path['experiments_root'] if opt['is_train'] else path['results_root'])
    moved = []
    if fresh:
        for folder in (root, tensorboard_folder(opt)) if opt['is_train'] else (root,):
            target = archive(folder)
            if target is not None:
                moved.append(f'{folder} already existed; it is now {target}')
    keys = ('models', 'training_states', 'log', 'visualization') if opt['is_train'] else ('log', 'visualization')
    for folder in (root, *(path[key] for key in keys)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    if launch is not None:
        write_atomic(root / LAUNCH_FILE, lambda file: file.write(launch.encode()))
    return moved


def copy_options(opt: dict, folder: str | os.PathLike) -> None:
    """Keep the YAML of the run beside its results, with the time and the command on top."""
    source = opt.get('opt_file')
    if source and Path(source).is_file():
        head = f'# GENERATE TIME: {time.asctime()}\n# CMD:\n# {" ".join(sys.argv)}\n\n'
        content = head.encode() + Path(source).read_bytes()
        write_atomic(Path(folder) / Path(source).name, lambda file: file.write(content))
