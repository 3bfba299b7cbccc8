"""Checkpoints of one experiment on disk: complete or absent, the damaged ones found, the old ones removed.

A checkpoint is one weights file per network, `models/net_g_<iteration>.pth`, BasicSR's format, and one training state,
`training_states/<iteration>.state`, written last, which knows the weights' checksums.
"""

import hashlib
import io
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from moeisr_basicsr.atomic_file import link_or_copy, remove_temporaries, save_atomic, write_atomic
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
    """The checkpoints of one experiment.

    Args:
        models: Folder of the weights.
        states: Folder of the training states.
        keep: How many of the newest checkpoints stay; 0 keeps all. Best and latest weights always stay.
    """

    def __init__(self, models: str | os.PathLike, states: str | os.PathLike, keep: int = 0):
        self.models = Path(models)
        self.states = Path(states)
        self.keep = keep

    def clean(self) -> None:
        """Remove what a killed process left half-written."""
        for folder in (self.models, self.states):
            remove_temporaries(folder)

    def save(self, iteration: int, weights: Weights, state: dict) -> None:
        """Write a checkpoint, then remove those that are too old.

        Raises:
            SaveError: Nothing that was there before has changed.
        """
        digests = {
            label: save_hashed(content, self.weights_path(label, iteration)) for label, content in weights.items()
        }
        save_atomic({**state, 'iter': iteration, 'weights': digests}, self.state_path(iteration))
        for old in self.iterations()[self.keep :] if self.keep else []:
            self.remove(old)

    def name_weights(self, weights: Weights, names: list[str], saved: int | None = None) -> None:
        """Give weights further names, such as 'latest': `net_g_latest.pth`.

        Args:
            weights: What to keep.
            names: The names.
            saved: The iteration under which `save` has just written these weights; None if it has not.

        Raises:
            SaveError: See `save`.
        """
        for label, content in weights.items():
            source = None if saved is None else self.weights_path(label, saved)
            for name in names:
                target = self.weights_path(label, name)
                if source is None:
                    source = save_atomic(content, target)
                else:
                    link_or_copy(source, target)

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
        folder = self.models
        if path.resolve().parent != self.states.resolve():  # a state of another experiment has its weights beside it
            folder = path.resolve().parent.parent / 'models'
        weights = {}
        for label, digest in state.get('weights', {'net_g': None}).items():
            file = folder / f'{label}_{state["iter"]}.pth'
            weights[label] = read_whole(file, digest)
        return Checkpoint(state['iter'], state, weights)

    def set_aside(self, after: int) -> list[str]:
        """Move checkpoints beyond iteration `after` out of the way: the run goes on from there and makes them anew.

        They are damaged, or of a branch that the user has left; counted among the newest they would push out those
        of this run.

        Returns:
            What was moved, for the log.
        """
        moved = []
        for iteration in [iteration for iteration in self.iterations() if iteration > after]:
            for file in (self.state_path(iteration), *self.weights_files(iteration)):
                folder = file.parent / f'set_aside_{time.strftime("%Y%m%d_%H%M%S")}'
                folder.mkdir(exist_ok=True)
                file.replace(folder / file.name)
            moved.append(f'checkpoint of iteration {iteration} is beyond it and was moved to set_aside_*')
        return moved

    def remove(self, iteration: int) -> None:
        """Remove a checkpoint, its state first: no state ever stands without its weights."""
        self.state_path(iteration).unlink(missing_ok=True)
        for file in self.weights_files(iteration):
            file.unlink()

    def weights_files(self, iteration: int) -> list[Path]:
        """The weights of a checkpoint; not the best ones of a metric whose name ends in a number."""
        return [file for file in self.models.glob(f'net_*_{iteration}.pth') if '_best_' not in file.name]

    def iterations(self) -> list[int]:
        """Iterations that have a state file, newest first."""
        return saved_iterations(self.states)

    def state_path(self, iteration: int) -> Path:
        """Where the training state of `iteration` is."""
        return self.states / f'{iteration}.state'

    def weights_path(self, label: str, name: int | str) -> Path:
        """Where the weights of the network `label` at an iteration, or under a name, are."""
        return self.models / f'{label}_{name}.pth'


def save_hashed(content: object, path: Path) -> str:
    """torch.save to a whole file; its SHA-256."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, lambda file: file.write(buffer.getbuffer()))
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def read_whole(path: Path, digest: str | None = None) -> object:
    """Tensors and plain values of a torch.save file that passes its checksums.

    torch itself does not compare the zip checksums: a flipped bit would pass.

    Raises:
        DamagedCheckpoint: See `CheckpointStore.load`.
    """
    if not path.is_file():
        raise DamagedCheckpoint(f'{path} is missing')
    if digest is not None and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise DamagedCheckpoint(f'{path} is not the file that was saved (SHA-256 differs)')
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise DamagedCheckpoint(f'{path} is truncated or not a checkpoint ({error})') from error
    if damaged is not None:
        raise DamagedCheckpoint(f'{path} is damaged at {damaged}')
    try:
        return load_torch_file(path)
    except UserError as error:
        raise DamagedCheckpoint(str(error)) from error
