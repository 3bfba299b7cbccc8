"""Building a network from the options of a file that a stranger may have written.

Such options may ask for a network of any size beside weights of a few bytes, and may name any registered class, some of
which open files or fetch weights when they are built. Here only networks for images are built, and none that takes much
more memory or work than its weights are worth.
"""

import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from basicsr.archs import build_network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from moeisr_basicsr.errors import UserError, did_you_mean
from moeisr_basicsr.options import check_network
from moeisr_basicsr.options.registered import OWN_CLASS, is_basicsr, registered

# Of BasicSR's networks those that upscale one image and neither open a file nor fetch one when they are built.
IMAGE_NETWORKS = ('ECBSR', 'EDSR', 'MSRResNet', 'RCAN', 'RIDNet', 'RRDBNet', 'SRVGGNetCompact', 'SwinIR')
FILE_KEYS = ('checkpoint', 'weights')  # by which an encoder of ours takes its weights from another file
# Measured: SwinIR makes 2 elements per element of its weights (the rest are masks), other networks 1; ECBSR, whose
# convolutions are many and tiny, takes 74 operations per tensor, others up to 8. An encoder may also run once.
ELEMENTS = 1 << 26  # beyond 4 per byte of the file
OPERATIONS = (100, 2000)  # per tensor of the file, and beyond


def build_bounded(network_opt: Mapping[str, Any], weights: Mapping[str, Tensor], source: str) -> nn.Module:
    """The network of `network_opt`, still without `weights`, whose size bounds what its construction may take.

    Raises:
        UserError: The options are wrong, name what no model file may name, or ask for a much larger network.
    """
    check_names(network_opt, source)
    check_network(network_opt, source)
    try:
        with Bounded(weights.values()):
            return build_network(dict(network_opt))
    except Exception as error:  # options that are sound one by one can fail together in any way
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UserError(f'{source}: {network_opt["type"]} cannot be built from its options: {reason:.300}') from error


def check_names(options: Any, source: str) -> None:
    """Every `type` in the options names a network that a file may name, and none is to read another file.

    Raises:
        UserError: One does not.
    """
    if not isinstance(options, Mapping):
        return
    for key, value in options.items():
        if key in FILE_KEYS and value is not None:
            raise UserError(
                f"{source}: '{key}' of its network names the file {value!r:.80}; a model file stands alone."
            )
        check_names(value, source)
    name = options.get('type')
    known = [name for name, entry in registered('ARCH').items() if not is_basicsr(entry) or name in IMAGE_NETWORKS]
    if isinstance(name, str) and name not in known and not is_spandrel(name):
        raise UserError(
            f'{source} names the network {name!r:.80}; a model file may name {", ".join(known)}.'
            f'{did_you_mean(name, known)}{OWN_CLASS}'
        )


def is_spandrel(name: str) -> bool:
    """Whether a dotted name is that of a network of the spandrel package; the modules there only define classes."""
    if not re.fullmatch(r'spandrel\.architectures(\.\w+)+', name):
        return False
    module, _, last = name.rpartition('.')
    try:
        entry = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError):
        return False
    return isinstance(entry, type) and issubclass(entry, nn.Module) and entry.__module__.startswith('spandrel.')


class Bounded(TorchDispatchMode):
    """Ends a construction that makes many more elements, or takes many more operations, than a file's weights suggest.

    Each operation is asked on the meta device first how much it would make.
    """

    def __init__(self, weights: Iterable[Tensor]):
        super().__init__()
        sizes = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in weights}  # views share it
        self.elements = 4 * sum(sizes.values()) + ELEMENTS
        self.operations = OPERATIONS[0] * len(sizes) + OPERATIONS[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # `for x in tensor` is one operation that makes as many tensors as there are x
        self.operations -= args[0].shape[(*args, 0)[1]] if func is torch.ops.aten.unbind.int else 1
        if not func._schema.is_mutable and not any(result.alias_info for result in func._schema.returns):  # no view
            self.elements -= elements(func, args, kwargs)
        if self.elements < 0 or self.operations < 0:
            raise ValueError('it would be much larger than the weights of the file')
        return func(*args, **kwargs)


def elements(func: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    """How many elements an operation makes."""
    args, kwargs = tree_map_only(Tensor, lambda value: value.to('meta'), (args, kwargs))
    if any(argument.name == 'device' for argument in func._schema.arguments):
        kwargs['device'] = 'meta'
    try:
        made = func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # it reads values, and makes no more elements than it reads
        return 0
    return sum(value.numel() for value in tree_leaves(made) if isinstance(value, Tensor))
