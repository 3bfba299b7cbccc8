"""Reading what a stranger may have written, YAML and weights: as plain data or not at all. Nothing in a file is run."""

import math
import mmap
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from itertools import count
from typing import Any

import torch
import yaml

from moeisr_basicsr.errors import UserError

OPTIONS = 'network_g_json'  # in our model files, a tensor of the network's options, a byte of JSON per element
SCALARS = tuple(f'tag:yaml.org,2002:{name}' for name in ('null', 'bool', 'int', 'float', 'str'))
MERGE = 'tag:yaml.org,2002:merge'
MAX_NODES = 20_000  # options have hundreds; aliases of aliases could unfold into more than memory holds
MAX_DEPTH = 50
# With a point or an exponent. As in YAML 1.2; in 1.1, which PyYAML reads, 1e-4 and -.5 are strings.
_FLOAT = re.compile(r'^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$')


class PlainLoader(yaml.SafeLoader):
    """YAML of plain data; 1e-4 is a number and a date is text.

    Not the faster CSafeLoader: very deep nesting ends the whole process there.
    """

    merged = 0  # entries that `<<` has brought in so far

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges of merges multiply, so what is merged is counted before it is copied."""
        for key, value in node.value:
            if key.tag == MERGE:
                for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(part, yaml.MappingNode):
                        self.flatten_mapping(part)
                        self.merged += len(part.value)
                if self.merged > MAX_NODES:
                    raise broken(node, 'too large')
        super().flatten_mapping(node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """What fits into 64 bits; Python's own limit is thousands of digits.

        Raises:
            ValueError: It does not.
        """
        return whole_number(super().construct_yaml_int(node))


def broken(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    """The error of a node that is well-formed and still not allowed."""
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def whole_number(value: int) -> int:
    """`value`.

    Raises:
        ValueError: It does not fit into 64 bits, and so into no tensor.
    """
    if not -(2**63) <= value < 2**63:
        raise ValueError('a whole number that does not fit into 64 bits')
    return value


PlainLoader.add_constructor('tag:yaml.org,2002:int', PlainLoader.construct_yaml_int)
PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (*SCALARS, MERGE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PlainLoader.add_implicit_resolver('tag:yaml.org,2002:float', _FLOAT, list('-+.0123456789'))


def load_torch_file(path: str | os.PathLike) -> Any:
    """`torch.load` to the CPU, of tensors and plain containers; anything else in a file is rejected, never run.

    Raises:
        UserError: The file is damaged, unfolds in memory, or holds objects other than tensors and plain containers.
        OSError: The file is missing or cannot be read.
    """
    if unfolds(path):
        raise UserError(
            f'{path} is compressed or makes more of itself in memory: `torch.save` writes no such checkpoint.'
        )
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


def unfolds(path: str | os.PathLike) -> bool:
    """Whether a checkpoint may take far more memory than it has bytes: zeros compress well, and `bytearray(10**11)`,
    which torch allows in a pickle, is short.
    """
    with open(path, 'rb') as file:
        if file.seek(0, os.SEEK_END) and mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ).find(b'bytearray') >= 0:
            return True
        try:
            with zipfile.ZipFile(file) as archive:
                return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        except (zipfile.BadZipFile, NotImplementedError):
            return False  # a pickle, or damaged


def plain_options(value: Any, source: str) -> dict[str, Any]:
    """A copy of a section of options that a file holds, of dictionaries, lists, text, numbers, booleans and None only.

    Raises:
        UserError: They hold something else, are nested too deeply, too large, or have a number that no network takes.
    """
    nodes = count(1)

    def copy(value: Any, depth: int) -> Any:
        if depth > MAX_DEPTH or next(nodes) > MAX_NODES:
            raise ValueError('they are nested too deeply or too large')
        if isinstance(value, Mapping):
            return {str(key): copy(entry, depth + 1) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [copy(entry, depth + 1) for entry in value]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f'{value} is no number')
        if value is None or isinstance(value, (bool, float, str)):
            return value
        if isinstance(value, int):
            return whole_number(value)
        raise ValueError(f'they hold a {type(value).__name__}')

    try:
        if not isinstance(value, Mapping):
            raise ValueError('they must be a section of keys')
        return copy(value, 0)
    except ValueError as error:
        raise UserError(f'{source}: the options of its network cannot be read: {error}.') from error
