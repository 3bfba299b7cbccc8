"""Checkpoints of one experiment on disk: complete or absent, the damaged ones found, the old ones removed.

A checkpoint is one weights file per network, `models/net_g_<iteration>.pth`, BasicSR's format, and one training state,
`training_states/<iteration>.state`, written last, which knows the weights' checksums.
"""

import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from basicsr.utils import get_time_str

from moeisr_basicsr.atomic_file import link_or_copy, remove_temporaries, save_atomic
from moeisr_basicsr.compat import saved_iterations
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.safe_reading import load_torch_file

Weights = dict[str, dict[str, dict[str, torch.Tensor]]]  # {'net_g': {'params': ..., 'params_ema': ...}}


class Checkpoint(NamedTuple):
    """What a run continues from."""

    iteration: int
    state: dict
    weights: Weights


class DamagedCheckpoint(Exception):
    """A checkpoint that cannot be used, and why."""


class CheckpointStore:
    """The checkpoints in the folders `models` and `states`.

    Args:
        keep: How many of the newest checkpoints stay; 0 keeps all. Best and latest weights always stay.
    """

    def __init__(self, models: str | os.PathLike, states: str | os.PathLike, keep: int = 0):
        self.models, self.states, self.keep = Path(models), Path(states), keep

    def clean(self) -> None:
        """Remove what a killed process left half-written."""
        for folder in (self.models, self.states):
            remove_temporaries(folder)

    def save(self, iteration: int, weights: Weights, state: dict) -> None:
        """Write a checkpoint, then remove those that are too old, each state first: none ever lacks its weights.

        Raises:
            SaveError: Nothing that was there before has changed.
        """
        digests = {
            label: sha256(save_atomic(content, self.weights_path(label, iteration)))
            for label, content in weights.items()
        }
        save_atomic({**state, 'iter': iteration, 'weights': digests}, self.state_path(iteration))
        for old in self.iterations()[self.keep :] if self.keep else []:
            for file in self.files(old):
                file.unlink()

    def amend(self, iteration: int, changes: dict) -> None:
        """Replace entries of a saved training state.

        Raises:
            SaveError: The state is as it was.
        """
        path = self.state_path(iteration)
        save_atomic({**load_torch_file(path), **changes}, path)

    def name_weights(self, weights: Weights, names: list[str]) -> None:
        """Keep weights under names, such as 'latest': `net_g_latest.pth`; one file with several names.

        Raises:
            SaveError: See `save`.
        """
        for label, content in weights.items():
            first, *others = (self.weights_path(label, name) for name in names)
            save_atomic(content, first)
            for other in others:
                link_or_copy(first, other)

    def newest(self, report: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole; `report` hears of every one that is not."""
        for iteration in self.iterations():
            try:
                return self.load(self.state_path(iteration))
            except DamagedCheckpoint as damage:
                report(f'Checkpoint of iteration {iteration} is not usable, going back to the one before: {damage}')
        return None

    def load(self, path: str | os.PathLike) -> Checkpoint:
        """A checkpoint by its state file, ours or BasicSR's.

        Raises:
            DamagedCheckpoint: The state or a weights file is missing, damaged, or holds more than plain values.
        """
        path = Path(path)
        state = read_whole(path)
        if not isinstance(state, dict) or not isinstance(state.get('iter'), int):
            raise DamagedCheckpoint(f'{path} is not a training state')
        folder = path.resolve().parent.parent / 'models'  # also of another experiment, whose weights lie beside it
        iteration, digests = state['iter'], state.get('weights', {'net_g': None})  # BasicSR's own states know none
        weights = {label: read_whole(folder / f'{label}_{iteration}.pth', digest) for label, digest in digests.items()}
        return Checkpoint(iteration, state, weights)

    def set_aside(self, after: int) -> list[str]:
        """Move checkpoints beyond iteration `after` out of the way, and say so: the run goes on from there.

        They are damaged, or of a branch that the user has left; counted among the newest they would push out those
        of this run.
        """
        beyond = [iteration for iteration in self.iterations() if iteration > after]
        for file in (file for iteration in beyond for file in self.files(iteration)):
            folder = file.parent / f'set_aside_{get_time_str()}'
            folder.mkdir(exist_ok=True)
            file.replace(folder / file.name)
        return [f'checkpoint of iteration {one} is beyond it and was moved to set_aside_*' for one in beyond]

    def files(self, iteration: int) -> list[Path]:
        """The state and the weights of a checkpoint; not the best ones of a metric whose name ends in a number."""
        weights = [file for file in self.models.glob(f'net_*_{iteration}.pth') if '_best_' not in file.name]
        return [self.state_path(iteration), *weights]

    def iterations(self) -> list[int]:
        """Iterations that have a state file, newest first."""
        return saved_iterations(self.states)

    def state_path(self, iteration: int) -> Path:
        """Where the training state of `iteration` is."""
        return self.states / f'{iteration}.state'

    def weights_path(self, label: str, name: int | str) -> Path:
        """Where the weights of the network `label` at an iteration, or under a name, are."""
        return self.models / f'{label}_{name}.pth'


def sha256(path: Path) -> str:
    """Checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_whole(path: Path, digest: str | None = None) -> Any:
    """Tensors and plain values of a torch.save file that passes its checksums, which torch itself does not compare.

    Raises:
        DamagedCheckpoint: See `CheckpointStore.load`.
    """
    if not path.is_file():
        raise DamagedCheckpoint(f'{path} is missing')
    if digest is not None and sha256(path) != digest:
        raise DamagedCheckpoint(f'{path} is not the file that was saved (SHA-256 differs)')
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise DamagedCheckpoint(f'{path} is damaged at {damaged}')
        return load_torch_file(path)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise DamagedCheckpoint(f'{path} is truncated or not a checkpoint ({error})') from error
    except UserError as error:
        raise DamagedCheckpoint(str(error)) from error
