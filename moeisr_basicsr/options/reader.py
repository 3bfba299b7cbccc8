"""YAML files as plain data with the line of every key. Nothing in a file is ever run.

BasicSR reads YAML with the full loader, through which a stranger's file can run code. Here a tag that is not plain
data is an error, and so is a key that stands twice.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from moeisr_basicsr.errors import UserError
from moeisr_basicsr.safe_reading import SCALARS, PlainLoader

KeyPath = tuple[str | int, ...]
MAX_NODES = 20_000  # an options file has hundreds; aliases of aliases could unfold into more than memory holds
MAX_DEPTH = 50


class Document(NamedTuple):
    """The content of an options file."""

    path: str  # as the user gave it
    data: dict[str, Any]
    lines: dict[KeyPath, int]  # line of each key and each list entry, from 1

    def line(self, keys: KeyPath) -> int:
        """Line of a key, or of the nearest section around it."""
        while keys and keys not in self.lines:
            keys = keys[:-1]
        return self.lines.get(keys, 1)

    def where(self, keys: KeyPath) -> str:
        """`file:line` of a key; the file alone where its options have no lines."""
        return f'{self.path}:{self.line(keys)}' if self.lines else self.path


def read_yaml(path: str | Path) -> Document:
    """Read an options file.

    Raises:
        UserError: The file is missing, is not YAML, has a key twice or a tag that is not plain data; with file and
            line.
    """
    path = str(path)
    try:
        text = Path(path).read_text(encoding='utf-8')
    except OSError as error:
        raise UserError(f'{path}: cannot read this options file: {error.strerror}.') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: this is no YAML file: byte {error.start} is not UTF-8 text.') from error
    data, lines = _read(text, path)
    if not isinstance(data, dict):
        raise UserError(f'{path}:1: an options file must consist of `key: value` lines.')
    return Document(path, data, lines)


def _read(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    try:
        loader = PlainLoader(text)
        node = loader.get_single_node()
        return (None, {}) if node is None else _Builder(loader, source).run(node)
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None) or getattr(error, 'context_mark', None)
        where = f'{source}:{mark.line + 1}' if mark is not None else source
        problem = getattr(error, 'problem', None) or str(error)
        raise UserError(f'{where}: broken YAML: {" ".join(str(problem).split())}.') from error
    except RecursionError as error:
        raise UserError(f'{source}: broken YAML: nested too deeply.') from error


class _Builder:
    """Turns YAML nodes into data, and notes lines on the way."""

    def __init__(self, loader: PlainLoader, source: str):
        self.loader = loader
        self.source = source
        self.lines: dict[KeyPath, int] = {}
        self.count = 0

    def run(self, node: yaml.Node) -> tuple[Any, dict[KeyPath, int]]:
        return self.value(node, ()), self.lines

    def fail(self, node: yaml.Node, message: str) -> UserError:
        return UserError(f'{self.source}:{node.start_mark.line + 1}: {message}')

    def value(self, node: yaml.Node, keys: KeyPath) -> Any:
        self.count += 1
        if self.count > MAX_NODES or len(keys) > MAX_DEPTH:
            raise self.fail(node, 'this file is too large or refers to itself; it cannot be an options file.')
        if isinstance(node, yaml.MappingNode):
            if node.tag != 'tag:yaml.org,2002:map':
                raise self.refuse(node)
            return self.mapping(node, keys)
        if isinstance(node, yaml.SequenceNode):
            if node.tag != 'tag:yaml.org,2002:seq':
                raise self.refuse(node)
            return [self.entry(child, (*keys, place)) for place, child in enumerate(node.value)]
        if node.tag not in SCALARS:
            raise self.refuse(node)
        try:
            return self.loader.construct_object(node)
        except (ValueError, yaml.YAMLError) as error:
            raise self.fail(node, f'broken YAML: {node.value!r} is no {node.tag.rsplit(":", 1)[-1]}.') from error

    def entry(self, node: yaml.Node, keys: KeyPath) -> Any:
        self.lines.setdefault(keys, node.start_mark.line + 1)
        return self.value(node, keys)

    def mapping(self, node: yaml.MappingNode, keys: KeyPath) -> dict[str, Any]:
        own = [(key.value if isinstance(key, yaml.ScalarNode) else None, key) for key, _ in node.value]
        self.loader.flatten_mapping(node)  # merge keys (<<) come first, so that the section's own keys win
        result: dict[str, Any] = {}
        seen: dict[str, int] = {}
        for name, key in own:
            if name is None:
                raise self.fail(key, 'a key must be plain text.')
            line = key.start_mark.line + 1
            if name in seen and name != '<<':
                raise self.fail(
                    key,
                    f'the key {".".join(map(str, (*keys, name)))} stands twice; it is already in line {seen[name]}.',
                )
            seen[name] = line
        for key, child in node.value:
            self.lines[(*keys, key.value)] = key.start_mark.line + 1
            result[key.value] = self.value(child, (*keys, key.value))
        return result

    def refuse(self, node: yaml.Node) -> UserError:
        tag = node.tag.replace('tag:yaml.org,2002:', '!!')
        return self.fail(node, f'the tag {tag} is not allowed: options are plain data, and nothing in them is run.')


def split_force(entry: str) -> tuple[tuple[str, ...], str]:
    """The keys and the text of the value of one `--force_yml` entry, `a:b=v`.

    Raises:
        UserError: There is no '=', or an empty key.
    """
    keys, sign, value = entry.partition('=')
    path = tuple(key.strip() for key in keys.split(':'))
    if not sign or not all(path):
        raise UserError(f'--force_yml {entry}: write it as key:key=value, for example train:ema_decay=0.999.')
    return path, value.strip()


def join_keys(keys: Sequence[str | int]) -> str:
    """('train', 'optim_g', 'lr') as users read it: `train: optim_g: lr`."""
    return ': '.join(str(key) for key in keys)
