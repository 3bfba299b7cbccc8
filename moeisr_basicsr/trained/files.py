"""Networks of others, from their files and from options. Nothing in a file is ever run."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from moeisr_basicsr.errors import UserError, did_you_mean, did_you_mean_file
from moeisr_basicsr.options.registered import OWN_CLASS, registered
from moeisr_basicsr.safe_reading import OPTIONS, load_torch_file

SPANDREL = 'spandrel.architectures.'
# Where checkpoints of other code have their weights, best first.
WRAPPERS = ('params_ema', 'params', 'state_dict', 'model_state_dict', 'model', 'net')
PREFIXES = ('module.', 'netG.', '_orig_mod.')


def read_weights(path: str) -> dict[str, Tensor]:
    """The state dict in a .pth or .safetensors file, averaged weights first.

    Raises:
        UserError: There is no such file, it is damaged, holds code, no weights, or those of a network of ours.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = 'is a folder' if file.is_dir() else 'is no file' if file.exists() else 'does not exist'
        raise UserError(
            f'the checkpoint {path} {what}; a .pth or .safetensors file is needed.{did_you_mean_file(file)}'
        )
    content: Any
    if file.suffix == '.safetensors':
        try:
            content = safetensors.torch.load_file(file, device='cpu')
        except (safetensors.SafetensorError, ValueError) as error:
            raise UserError(
                f'{path} is no whole safetensors file: it is damaged or was cut short ({error}).'
            ) from error
    else:
        content = load_torch_file(file)
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(one, Tensor) for one in content.values()):
        raise UserError(f'{path} holds no weights of a network.')
    for prefix in PREFIXES:
        if all(str(name).startswith(prefix) for name in content):
            content = {str(name).removeprefix(prefix): value for name, value in content.items()}
    if any(str(name).startswith('decoder.pool.') or name == OPTIONS for name in content):
        raise UserError(
            f'{path} takes any factor already: use it with `basicsr upscale`, or train it on with `basicsr train` and '
            'path: pretrain_network_g.'
        )
    return dict(content)


def from_spandrel(weights: dict[str, Tensor], path: str) -> tuple[dict[str, Any], nn.Module]:
    """The network that spandrel recognises by its weights, and the options that make it anew: see `build_arch`.

    Raises:
        UserError: It knows none, or one for another purpose than super-resolution.
    """
    from spandrel import MAIN_REGISTRY, ImageModelDescriptor, UnsupportedModelError

    try:
        found = MAIN_REGISTRY.load(weights)
    except UnsupportedModelError:
        raise UserError(
            f'{path}: spandrel knows no architecture with these weights (such as {next(iter(weights))}). Name a '
            'registered one by `arch` and the file by `weights`.'
        ) from None
    except Exception as error:  # weights that look like those of an architecture, and are not
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{path}: spandrel cannot read these weights: {type(error).__name__}: {reason}.') from error
    kind = f'{path} is a network of {found.architecture.name} for '
    if not isinstance(found, ImageModelDescriptor) or found.purpose != 'SR':
        purpose = {'FaceSR': 'faces', 'Inpainting': 'inpainting'}.get(found.purpose, 'restoration at the same size')
        raise UserError(f'{kind}{purpose}; only super-resolution networks can be used.')
    network = found.model
    options = {'type': f'{type(network).__module__}.{type(network).__qualname__}', **network.hyperparameters}
    try:
        json.dumps(options)
    except TypeError as error:
        raise UserError(f'{kind}which a model file cannot describe: {error}.') from error
    return options, network


def build_arch(options: Mapping[str, Any]) -> nn.Module:
    """A network from its options, with random weights.

    Args:
        options: `type`, a name in BasicSR's ARCH_REGISTRY or a class below `spandrel.architectures`, and its arguments.

    Raises:
        UserError: There is no such network, or it cannot be built from the arguments.
    """
    name, arguments = options.get('type'), {key: value for key, value in options.items() if key != 'type'}
    if not isinstance(name, str):
        raise UserError(f"arch needs a type, for example {{'type': 'EDSR'}}; got {dict(options)!r}.")
    # A model file names networks too: none that opens further files or fetches its weights.
    paths = [key for key in arguments if key.endswith('path')]
    if paths or name in ('VGGFeatureExtractor', 'NetworkEncoder'):
        raise UserError(f'arch {name}{"".join(f" with {key}" for key in paths)} is not allowed here.')
    entry = _spandrel_class(name) if name.startswith(SPANDREL) else _registered(name)
    try:
        return entry(**arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError, NotImplementedError, KeyError) as error:
        raise UserError(f'arch {name} cannot be built: {" ".join(str(error).split())}') from error


def _registered(name: str) -> Any:
    known = registered('ARCH')
    if name not in known:
        raise UserError(f'arch {name} is no registered network.{did_you_mean(name, known)}{OWN_CLASS}')
    return known[name]


def _spandrel_class(name: str) -> Any:
    module, _, kind = name.rpartition('.')
    try:
        entry = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError) as error:
        raise UserError(f'arch {name}: the installed spandrel has no such network ({error}).') from error
    if not (isinstance(entry, type) and issubclass(entry, nn.Module) and entry.__module__ == module):
        raise UserError(f'arch {name} is no network of spandrel.')
    return entry


def fill(network: nn.Module, weights: Mapping[str, Tensor], path: str) -> None:
    """Load a state dict.

    Raises:
        UserError: Names or shapes differ; `path` is named.
    """
    own = network.state_dict()
    found = {
        'missing': sorted(own.keys() - weights.keys()),
        'unknown': sorted(weights.keys() - own.keys()),
        'of another shape': sorted(
            name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape
        ),
    }
    if any(found.values()):
        problems = [f'{len(names)} {what} (such as {names[0]})' for what, names in found.items() if names]
        raise UserError(f'{path}: the weights do not fit {type(network).__name__}: {", ".join(problems)}.')
    network.load_state_dict(dict(weights))
