"""Options: YAML to the dictionary that BasicSR's pipelines take, checked as a whole before any work.

`parse_options` stands where `basicsr.utils.options.parse_options` does and gives the same dictionary; what BasicSR
would find out in the middle of a run, or never, is reported at once.
"""

from os import path as osp
from typing import Any

from .check import OptionsError, check_network, check_options
from .force import force, parse_value
from .reader import Document, PlainLoader, read_yaml

__all__ = ['Document', 'OptionsError', 'PlainLoader', 'check_network', 'check_options', 'force', 'load_options']
__all__ += ['parse_options', 'parse_value', 'read_yaml']


def load_options(path: str, force_yml: list[str] | None = None, is_train: bool = True) -> dict[str, Any]:
    """Read and check an options file, with the changes of `--force_yml`.

    Raises:
        UserError: The file cannot be read or is no plain YAML; an `OptionsError` lists all its mistakes.
    """
    return check_options(read_yaml(path), force_yml, is_train)


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
    for dataset in opt['datasets'].values():
        for key in ('dataroot_gt', 'dataroot_lq'):
            if isinstance(dataset.get(key), str):
                dataset[key] = osp.expanduser(dataset[key])
    for key, value in opt['path'].items():
        if isinstance(value, str) and ('resume_state' in key or 'pretrain_network' in key):
            opt['path'][key] = osp.expanduser(value)
    root = osp.join(root_path, 'experiments' if is_train else 'results', opt['name'])
    opt['path'].update(log=root, visualization=osp.join(root, 'visualization'))
    if is_train:
        folders = {name: osp.join(root, name) for name in ('models', 'training_states')}
        opt['path'].update(experiments_root=root, **folders)
    else:
        opt['path']['results_root'] = root
    if is_train and args.debug:  # BasicSR does this to every run with 'debug' in its name
        if opt.get('val'):
            opt['val']['val_freq'] = 8
        opt['logger'].update(print_freq=1, save_checkpoint_freq=8)
    return opt
