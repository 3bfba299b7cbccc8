"""YAML files as plain data with the line of every key. Nothing in a file is ever run.

BasicSR reads YAML with the full loader, through which a stranger's file can run code. Here a tag that is not plain
data is an error, and so is a key that stands twice.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from moeisr_basicsr.errors import UserError
from moeisr_basicsr.safe_reading import MAX_DEPTH, MAX_NODES, SCALARS, PlainLoader, broken

KeyPath = tuple[str | int, ...]
YAML_TAG = 'tag:yaml.org,2002:'
PLAIN_TAGS = (*SCALARS, f'{YAML_TAG}map', f'{YAML_TAG}seq')


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
        UserError: The file cannot be read, or see `read_text`.
    """
    path = str(path)
    try:
        text = Path(path).read_text(encoding='utf-8')
    except OSError as error:
        raise UserError(f'{path}: cannot read this options file: {error.strerror}.') from error
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: this is no YAML file: byte {error.start} is not UTF-8 text.') from error
    data, lines = read_text(text, path)
    if not isinstance(data, dict):
        raise UserError(f'{path}:1: an options file must consist of `key: value` lines.')
    return Document(path, data, lines)


def read_text(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """The data of a YAML text, and the line of every key and list entry.

    Raises:
        UserError: It is not YAML, has a key twice or a tag that is not plain data; with `source` and line.
    """
    try:
        loader = PlainLoader(text)
        node = loader.get_single_node()
        builder = Builder(loader)
        return (None if node is None else builder.value(node, ())), builder.lines
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None) or getattr(error, 'context_mark', None)
        where = f'{source}:{mark.line + 1}' if mark is not None else source
        problem = getattr(error, 'problem', None) or str(error)
        raise UserError(f'{where}: broken YAML: {" ".join(str(problem).split())}.') from error
    except RecursionError as error:
        raise UserError(f'{source}: broken YAML: nested too deeply.') from error


class Builder:
    """Turns YAML nodes into data in which nothing is shared, and notes lines on the way."""

    def __init__(self, loader: PlainLoader):
        self.loader = loader
        self.lines: dict[KeyPath, int] = {}
        self.count = 0

    def value(self, node: yaml.Node, keys: KeyPath) -> Any:
        self.count += 1
        if self.count > MAX_NODES or len(keys) > MAX_DEPTH:
            raise broken(node, 'too large or refers to itself')
        if node.tag not in PLAIN_TAGS:
            raise broken(node, f'the tag {node.tag.replace(YAML_TAG, "!!")} is not allowed: options are plain data')
        if isinstance(node, yaml.MappingNode):
            self.check_keys(node, keys)
            self.loader.flatten_mapping(node)  # what `<<` merges in comes first, so that a section's own keys win
            return {key.value: self.entry(child, (*keys, key.value), key) for key, child in node.value}
        if isinstance(node, yaml.SequenceNode):
            return [self.entry(child, (*keys, place), child) for place, child in enumerate(node.value)]
        try:
            return self.loader.construct_object(node)
        except ValueError as error:
            kind = node.tag.removeprefix(YAML_TAG).replace('int', 'int of 64 bits')
            raise broken(node, f'{node.value!r:.40} is no {kind}') from error

    def entry(self, node: yaml.Node, keys: KeyPath, start: yaml.Node) -> Any:
        if isinstance(keys[-1], list):
            raise broken(start, 'a key must be plain text')
        self.lines[keys] = start.start_mark.line + 1
        return self.value(node, keys)

    def check_keys(self, node: yaml.MappingNode, keys: KeyPath) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            word = str(key.value)
            if word in lines and word != '<<':
                name = '.'.join(map(str, (*keys, word)))
                raise broken(key, f'the key {name} stands twice; it is already in line {lines[word]}')
            lines[word] = key.start_mark.line + 1


def join_keys(keys: Sequence[str | int]) -> str:
    """('train', 'optim_g', 'lr') as users read it: `train: optim_g: lr`."""
    return ': '.join(str(key) for key in keys)
