"""Reading what a stranger may have written, YAML and weights: as plain data or not at all. Nothing in a file is run."""

import os
import re
import warnings
from typing import Any

import torch
import yaml

from moeisr_basicsr.errors import UserError

SCALARS = tuple(f'tag:yaml.org,2002:{name}' for name in ('null', 'bool', 'int', 'float', 'str'))
# With a point or an exponent. As in YAML 1.2; in 1.1, which PyYAML reads, 1e-4 and -.5 are strings.
_FLOAT = re.compile(r'^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$')


class PlainLoader(yaml.SafeLoader):
    """YAML of plain data; 1e-4 is a number and a date is text.

    Not the faster CSafeLoader: very deep nesting ends the whole process there.
    """


PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (*SCALARS, 'tag:yaml.org,2002:merge')]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PlainLoader.add_implicit_resolver('tag:yaml.org,2002:float', _FLOAT, list('-+.0123456789'))


def load_torch_file(path: str | os.PathLike) -> Any:
    """`torch.load` to the CPU, of tensors and plain containers; anything else in a file is rejected, never run.

    Raises:
        UserError: The file is damaged, or holds objects other than tensors and plain containers.
        OSError: The file is missing or cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about pickle protocols; what cannot be read gets our own line
            return torch.load(path, map_location='cpu', weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # a damaged pickle can end in almost any exception, a cut zip in OSError
        # torch's own reason is left out: it advises to read the file with weights_only=False, which runs its code
        raise UserError(
            f'{path} is no checkpoint that can be read: it is damaged, another kind of file, or holds more '
            'than tensors and plain values. Nothing in it was run.'
        ) from error
