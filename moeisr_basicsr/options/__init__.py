"""Options: YAML to the dictionary that BasicSR's pipelines take, checked as a whole before any work.

`parse_options` stands where `basicsr.utils.options.parse_options` does and gives the same dictionary; what BasicSR
would find out in the middle of a run, or never, is reported at once.
"""

import copy
from os import path as osp
from typing import Any

from moeisr_basicsr.errors import UserError, did_you_mean
from moeisr_basicsr.safe_reading import parse_yml_value

from .check import Checker, OptionsError, known_keys
from .kinds import Choice
from .reader import Document, KeyPath, join_keys, read_yaml, split_force
from .schema import Key, Typed

__all__ = [
    'Document',
    'OptionsError',
    'check_network',
    'check_options',
    'force',
    'load_options',
    'parse_options',
    'read_yaml',
]


def load_options(path: str, force_yml: list[str] | None = None, is_train: bool = True) -> dict[str, Any]:
    """Read and check an options file, with the changes of `--force_yml`.

    Raises:
        UserError: The file cannot be read or is no plain YAML.
        OptionsError: It has mistakes; all are listed.
    """
    return check_options(read_yaml(path), force_yml, is_train)


def check_options(document: Document, force_yml: list[str] | None = None, is_train: bool = True) -> dict[str, Any]:
    """A checked copy of the document's data, with defaults filled in; `document` is not changed."""
    data = copy.deepcopy(document.data)
    forced: dict[KeyPath, str] = {}
    for entry in force_yml or []:
        forced[force(data, entry, is_train)] = f'--force_yml {entry}'
    Checker(document._replace(data=data), forced, is_train).run()
    return data


def check_network(network_opt: Any, source: str) -> None:
    """Check the options of one network, as they stand under `network_g`.

    Args:
        network_opt: The options; not changed.
        source: Where they come from, for messages.

    Raises:
        OptionsError: They have mistakes; all are listed.
    """
    data = {'network_g': copy.deepcopy(network_opt)}
    checker = Checker(Document(source, data, {}), {}, is_train=False)
    checker.value(data, 'network_g', Key(Typed('network'), ''), ('network_g',))
    checker.finish()


def force(data: dict[str, Any], entry: str, is_train: bool = True) -> tuple[str, ...]:
    """Do what one `--force_yml key:key=value` says to `data`, and return its keys.

    The key must be in the file, or be one that the tables know. Nothing is evaluated.

    Raises:
        UserError: The entry is malformed, or there is no such key.
    """
    keys, text = split_force(entry)
    section = data
    for depth, name in enumerate(keys):
        known, is_open, _, item = known_keys(data, keys[:depth], is_train)
        if name not in section and name not in known and item is None and not (is_open and depth == len(keys) - 1):
            where = f"'{join_keys(keys[:depth])}' has no key" if depth else 'there is no key'
            raise UserError(f"--force_yml {entry}: {where} '{name}'.{did_you_mean(name, [*section, *known])}")
        if depth == len(keys) - 1:
            break
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise UserError(f"--force_yml {entry}: '{join_keys(keys[: depth + 1])}' is a value, not a section.")
    value = parse_yml_value(text)
    kind = known[keys[-1]].kind if keys[-1] in known else None
    if text == 'none' and isinstance(kind, Choice) and kind.accepts('none'):
        value = 'none'  # BasicSR reads 'none' as null, but `skip` and `amp` have a choice of that name
    section[keys[-1]] = value
    return keys


def parse_options(args: Any, root_path: str, is_train: bool = True) -> dict[str, Any]:
    """BasicSR's options dictionary, from arguments that are already parsed.

    The processes of a distributed run are not started here, and a seed that the file leaves open stays open: the
    training loop does both, because a resumed run takes its seed from the checkpoint.

    Args:
        args: `opt` (path of the YAML file), `launcher`, `auto_resume`, `debug`, `force_yml`.
        root_path: Experiments and results go below it.
        is_train: For training or for testing.

    Raises:
        UserError: See `load_options`.
    """
    import torch
    from basicsr.utils.dist_util import get_dist_info

    opt = load_options(args.opt, args.force_yml, is_train)
    opt.update(
        is_train=is_train,
        root_path=root_path,
        opt_file=args.opt,
        launcher=args.launcher,
        dist=args.launcher != 'none',
        auto_resume=bool(args.auto_resume),
        debug=bool(args.debug),
    )
    opt['rank'], opt['world_size'] = get_dist_info()
    opt.setdefault('manual_seed', None)
    if args.debug and not opt['name'].startswith('debug'):
        opt['name'] = f'debug_{opt["name"]}'
    if opt['num_gpu'] == 'auto':
        opt['num_gpu'] = torch.cuda.device_count()
    for phase, dataset in opt['datasets'].items():
        dataset['phase'] = phase.split('_')[0]
        if 'scale' in opt:
            dataset['scale'] = opt['scale']
        for key in ('dataroot_gt', 'dataroot_lq'):
            if isinstance(dataset.get(key), str):
                dataset[key] = osp.expanduser(dataset[key])
    for key, value in opt['path'].items():
        if isinstance(value, str) and ('resume_state' in key or 'pretrain_network' in key):
            opt['path'][key] = osp.expanduser(value)
    add_paths(opt, root_path)
    if is_train and args.debug:  # BasicSR does this to every run with 'debug' in its name
        if opt.get('val'):
            opt['val']['val_freq'] = 8
        opt['logger'].update(print_freq=1, save_checkpoint_freq=8)
    return opt


def add_paths(opt: dict[str, Any], root_path: str) -> None:
    """The folders of the run, under BasicSR's keys."""
    if opt['is_train']:
        root = osp.join(root_path, 'experiments', opt['name'])
        opt['path'].update(
            experiments_root=root,
            models=osp.join(root, 'models'),
            training_states=osp.join(root, 'training_states'),
            log=root,
            visualization=osp.join(root, 'visualization'),
        )
    else:
        root = osp.join(root_path, 'results', opt['name'])
        opt['path'].update(results_root=root, log=root, visualization=osp.join(root, 'visualization'))
