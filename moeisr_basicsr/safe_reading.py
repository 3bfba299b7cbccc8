"""Reading what a stranger may have written, YAML and weights: as plain data or not at all. Nothing in a file is run."""

import ast
import contextlib
import re
import warnings
from collections import Counter, OrderedDict
from typing import Any

import yaml

from moeisr_basicsr.errors import UserError

SCALARS = tuple(f'tag:yaml.org,2002:{name}' for name in ('null', 'bool', 'int', 'float', 'str'))
_INT = re.compile(r'^[-+]?[0-9]+$')
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


class OrderedPlainLoader(PlainLoader):
    """Reads mappings as OrderedDict, as BasicSR's loader does, and refuses every other tag by its line."""

    def get_single_data(self) -> Any:
        try:
            return super().get_single_data()
        except RecursionError:
            raise UserError(f'{self.name}: lists or mappings are nested too deeply.') from None

    def construct_ordered_mapping(self, node: yaml.MappingNode) -> OrderedDict:
        self.flatten_mapping(node)  # `<<: *defaults`
        pairs = self.construct_pairs(node)
        try:
            return OrderedDict(pairs)
        except TypeError:
            raise UserError(f'{_place(node)}: a key must be a plain name or number.') from None

    def refuse_tag(self, node: yaml.Node) -> None:
        raise UserError(f"{_place(node)}: the tag '{node.tag}' is not allowed; use plain values, lists and mappings.")


def _place(node: yaml.Node) -> str:
    return f'{node.start_mark.name}, line {node.start_mark.line + 1}'


OrderedPlainLoader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, OrderedPlainLoader.construct_ordered_mapping
)
OrderedPlainLoader.add_constructor(None, OrderedPlainLoader.refuse_tag)


class OrderedDumper(yaml.SafeDumper):
    """Writes an OrderedDict as a plain mapping in its own order."""


OrderedDumper.add_representer(OrderedDict, lambda dumper, data: dumper.represent_dict(data.items()))


def ordered_yaml() -> tuple[type, type]:
    """Loader and dumper in place of BasicSR's, with which a file can run code and `lr: 1e-4` is a string."""
    return OrderedPlainLoader, OrderedDumper


def parse_yml_value(value: str) -> Any:
    """Read the value of `--force_yml key=value` as BasicSR does, except that nothing is evaluated.

    Anything but None, booleans, numbers (`!!float` too), lists and mappings is a string.

    Raises:
        UserError: A list or mapping that is not well formed, or `!!float` without a number.
    """
    text = value.strip()
    if text == '~' or text.lower() in ('none', 'null'):
        return None
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    number = text.removeprefix('!!float').strip()
    if text.startswith('!!float'):
        if not (_INT.match(number) or _FLOAT.match(number)):
            raise UserError(f"--force_yml: '{value}' is not a number.")
        return float(number)
    if _INT.match(text):
        return int(text)
    if _FLOAT.match(text):
        return float(text)
    if text[:1] not in ('[', '{'):
        return text
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if text.startswith('['):
            return ast.literal_eval(text)  # BasicSR accepts Python's lists: [None, 'a']
    try:
        return yaml.load(text, Loader=OrderedPlainLoader)
    except (yaml.YAMLError, UserError):
        raise UserError(f"--force_yml: '{value:.80}' is not a list or mapping.") from None


def load_torch_file(path, map_location='cpu', **kwargs) -> Any:
    """`torch.load` of tensors and plain containers; a file that holds anything else is refused, never run.

    Raises:
        UserError: The file is damaged, or holds objects other than tensors and plain containers.
        OSError: The file is missing or cannot be read.
    """
    import torch
    from torch import _weights_only_unpickler as unpickler

    # The state of BasicSR's MultiStepRestartLR holds a Counter, which torch allows by itself from 2.5 on only.
    unpickler._get_allowed_globals().setdefault('collections.Counter', Counter)
    kwargs['weights_only'] = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about pickle protocols; what cannot be read gets our own line
            return torch.load(path, map_location=map_location, **kwargs)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # a damaged pickle can end in almost any exception, a cut zip in OSError
        # torch's own reason is left out: it advises to read the file with weights_only=False, which runs its code
        raise UserError(
            f'{path} is no checkpoint that can be read: it is damaged, another kind of file, or holds more '
            'than tensors and plain values. Nothing in it was run.'
        ) from error
