"""What a resumed run may change: each option that differs from the saved run's is applied, or refused in one line."""

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

from basicsr.models.base_model import BaseModel

from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options.keys import options_model
from moeisr_basicsr.options.reader import KeyPath, join_keys
from moeisr_basicsr.options.registered import locate
from moeisr_basicsr.options.values import show

from .resume import networks, plain, pretrained_key

# What the saved weights and running means belong to. All else is read anew by every start.
FIXED = ('model_type', 'network_*', 'train: optim_*: type', 'path: pretrain_network_*')
SCHEDULE = ('train: optim_*', 'train: scheduler*', 'train: encoder_lr_mul')
# Of one start and not of the run: where its files are, how its processes are started.
OF_A_START = ('root_path', 'opt_file', 'launcher', 'dist', 'dist_params', 'auto_resume', 'debug', 'rank', 'world_size')
Change = tuple[KeyPath, Any, Any]  # keys, the saved run's value, this one's; None where the key is not given


def options_to_save(opt: dict, model: BaseModel) -> dict:
    """The options of a run as its training state holds them; networks as they were built."""
    path = {key: opt['path'].get(key) for key in map(pretrained_key, networks(model))}
    built = {key: value for key, value in model.opt.items() if key.startswith('network_')}
    return plain({**{key: opt[key] for key in opt if key not in OF_A_START}, **built, 'path': path})


def changes_of(saved: dict, given: dict) -> list[Change]:
    """What differs between two `options_to_save`; a value that is not given counts as the default of its key."""
    found = []
    for keys, before, now in _differences(saved, given, ()):
        before = _default(saved, keys) if before is None else before
        now = _default(given, keys) if now is None else now
        if before != now:
            found.append((keys, before, now))
    return found


def describe(change: Change) -> str:
    """A change on one line."""
    keys, before, now = change
    return f'{join_keys(keys)}: {show(before)} -> {show(now)}'


def is_of(change: Change, patterns: tuple[str, ...]) -> bool:
    """Whether the key of a change is one of `patterns` or inside a section that is."""
    keys = change[0]
    return any(fnmatch(join_keys(keys[:depth]), entry) for depth in range(1, len(keys) + 1) for entry in patterns)


def refuse_fixed(changes: list[Change]) -> None:
    """Stop where the saved state could not go on.

    Raises:
        UserError: An option has changed that must not.
    """
    # Not to name a file to start from is no wish: a resumed run has its weights from the checkpoint.
    refused = [change for change in changes if is_of(change, FIXED) and not (change[0][0] == 'path' and not change[2])]
    if refused:
        raise UserError(
            f'A resumed run cannot change {"; ".join(map(describe, refused))}. Resume with what it was, or start a new '
            'run from its weights, with path: pretrain_network_g.'
        )


def _differences(saved: Any, given: Any, keys: KeyPath) -> Iterator[Change]:
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in {**saved, **given}:
            yield from _differences(saved.get(key), given.get(key), (*keys, key))
    elif saved != given:
        yield keys, saved, given


def _default(options: dict, keys: KeyPath) -> Any:
    """The declared default of a key; None where it has none."""
    found, owner, _ = locate(options_model(options.get('model_type')), options, keys)
    field = owner.model_fields.get(str(keys[-1])) if owner is not None and found == keys else None
    default = None if field is None or field.is_required() else field.get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default
