"""Kinds of values that an option may have. A kind says what is wrong with a value, in words for the user."""

import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeisr_basicsr.errors import did_you_mean, did_you_mean_file


@dataclass(frozen=True)
class Kind:
    """Anything goes; the base of all kinds."""

    def words(self) -> str:
        """What is allowed, for messages: 'must be ...'."""
        return 'any value'

    def accepts(self, value: Any) -> bool:
        """Whether `value` is allowed."""
        return True

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, or None."""
        return None if self.accepts(value) else f'must be {self.words()}; got {show(value)}.'

    def convert(self, value: Any) -> Any:
        """The form in which an accepted `value` is handed on."""
        return value


@dataclass(frozen=True)
class Bool(Kind):
    """true or false."""

    def words(self) -> str:
        return 'true or false'

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class Number(Kind):
    """A number within limits."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    noun = 'a number'

    def words(self) -> str:
        limits = []
        if self.above is not None:
            limits.append(f'above {self.above:g}')
        if self.least is not None:
            limits.append(f'of at least {self.least:g}')
        if self.most is not None:
            limits.append(f'at most {self.most:g}' if limits else f'of at most {self.most:g}')
        return ' '.join([self.noun, ' and '.join(limits)]).strip()

    def accepts(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        return (
            (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
        )


@dataclass(frozen=True)
class Int(Number):
    """A whole number within limits; 1e5 counts as one."""

    noun = 'a whole number'

    def accepts(self, value: Any) -> bool:
        return super().accepts(value) and value == value // 1

    def convert(self, value: Any) -> int:
        return int(value)  # 1e5 is a float in YAML


@dataclass(frozen=True)
class Text(Kind):
    """Text that is not empty."""

    def words(self) -> str:
        return 'text'

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and bool(value.strip())

    def problem(self, value: Any) -> str | None:
        problem = super().problem(value)
        if problem and isinstance(value, (int, float)):
            return f'{problem} Put it in quotes to make it text.'
        return problem


class FolderName(Text):
    """Text that names one folder."""

    def words(self) -> str:
        return 'text that names one folder, without / and \\'

    def accepts(self, value: Any) -> bool:
        return super().accepts(value) and value not in ('.', '..') and not set(value) & set('/\\\0')


@dataclass(frozen=True)
class Choice(Kind):
    """One of some names; `names` may be a function, for registries that fill up later."""

    names: Sequence[str] | Callable[[], Sequence[str]]
    noun: str = 'one of'
    advice: str = ''  # after the message

    def known(self) -> list[str]:
        """The names."""
        return list(self.names() if callable(self.names) else self.names)

    def words(self) -> str:
        known = self.known()
        shown = ', '.join(known) if len(known) <= 12 else f'{", ".join(known[:10])} and {len(known) - 10} more'
        return f'{self.noun} {shown}'

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value in self.known()

    def problem(self, value: Any) -> str | None:
        problem = super().problem(value)
        return problem and problem + did_you_mean(str(value), self.known()) + self.advice


@dataclass(frozen=True)
class ListOf(Kind):
    """A list of one kind."""

    item: Kind = field(default_factory=Kind)
    length: int | None = None

    def words(self) -> str:
        count = '' if self.length is None else f'{self.length} '
        return f'a list of {count}entries, each {self.item.words()}'

    def accepts(self, value: Any) -> bool:
        return (
            isinstance(value, (list, tuple))
            and (self.length is None or len(value) == self.length)
            and all(self.item.accepts(entry) for entry in value)
        )

    def convert(self, value: Any) -> list:
        return [self.item.convert(entry) for entry in value]


@dataclass(frozen=True)
class AnyOf(Kind):
    """One of several kinds."""

    kinds: tuple[Kind, ...]

    def words(self) -> str:
        return ', or '.join(kind.words() for kind in self.kinds)

    def accepts(self, value: Any) -> bool:
        return any(kind.accepts(value) for kind in self.kinds)

    def convert(self, value: Any) -> Any:
        return next(kind for kind in self.kinds if kind.accepts(value)).convert(value)


@dataclass(frozen=True)
class Null(Kind):
    """~ (nothing)."""

    def words(self) -> str:
        return '~'

    def accepts(self, value: Any) -> bool:
        return value is None


@dataclass(frozen=True)
class File(Text):
    """A file that exists."""

    def words(self) -> str:
        return 'the path of a file'

    def problem(self, value: Any) -> str | None:
        problem = super().problem(value)
        if problem is None and Path(value).expanduser().is_dir():
            return f'{value} is a folder; must be {self.words()}.'
        if problem is None and not Path(value).expanduser().is_file():
            return f'there is no file {value}{nearest_path(value, Path.is_file)}'
        return problem


@dataclass(frozen=True)
class Data(Text):
    """A folder of images, an LMDB folder, or a list of folders."""

    def words(self) -> str:
        return 'the path of a folder'

    def problem(self, value: Any) -> str | None:
        if isinstance(value, list) and value:
            problems = [self.problem(entry) for entry in value]
            return next((problem for problem in problems if problem), None)
        problem = super().problem(value)
        if problem is None and Path(value).expanduser().is_file():
            return f'{value} is a file; must be {self.words()}, of images or an LMDB.'
        if problem is None and not Path(value).expanduser().is_dir():
            return f'there is no folder {value}{nearest_path(value, Path.is_dir)}'
        return problem


@dataclass(frozen=True)
class Block(Kind):
    """A section whose keys are free."""

    def words(self) -> str:
        return 'a section of keys'

    def accepts(self, value: Any) -> bool:
        return isinstance(value, Mapping)


@dataclass(frozen=True)
class NotText(Kind):
    """Anything but text; for parameters whose default is a number."""

    def words(self) -> str:
        return 'a number'

    def accepts(self, value: Any) -> bool:
        return not isinstance(value, str)


def show(value: Any) -> str:
    """A value as the user wrote it, shortened."""
    if value is None:
        return '~ (nothing)'
    if isinstance(value, Mapping):
        return 'a section of keys'
    text = {True: 'true', False: 'false'}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def nearest_path(value: str, wanted: Callable[[Path], bool]) -> str:
    """How far a missing path exists, and what is there that is spelled alike; `wanted` is Path.is_file or is_dir."""
    path = Path(value).expanduser()
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        path, parent, wanted = parent, parent.parent, Path.is_dir
    if not parent.is_dir():
        return '.'
    return f"; {parent.resolve()} has no '{path.name}'.{did_you_mean_file(path, wanted)}"


def kind_of(parameter: inspect.Parameter, annotation: Any) -> Kind:
    """The kind of a constructor's parameter, from its annotation or else from its default."""
    if annotation is inspect.Parameter.empty:
        numeric = isinstance(parameter.default, (int, float)) and not isinstance(parameter.default, bool)
        return NotText() if numeric else Kind()
    return _kind_of_annotation(annotation)


def _kind_of_annotation(annotation: Any) -> Kind:
    simple = {bool: Bool(), int: Int(), float: Number(), str: Text(), type(None): Null(), dict: Block()}
    if annotation in simple:
        return simple[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return AnyOf(tuple(_kind_of_annotation(argument) for argument in arguments))
    if origin is typing.Literal:
        return Choice(arguments)
    if origin is dict:
        return Block()
    if inspect.isclass(origin) and issubclass(origin, Sequence):
        return ListOf(_kind_of_annotation(arguments[0]) if arguments else Kind())
    return Kind()
