"""What an option may be: pydantic types with ranges, and the words that messages and the page of keys use for them.

The types also serve in signatures of registered classes, `num_feat: Positive = 64`, and in a dataset's own `Options`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    create_model,
    field_validator,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import CoreSchema, core_schema

from moeisr_basicsr.errors import did_you_mean_file
from moeisr_basicsr.shipped import find_model, names

OWN_CLASS = ' A class of your own is known with --import FILE.py.'
SHOWN_NAMES = 12  # of a longer list a message shows the first ten


def Key(about: str, default: Any = ...) -> Any:
    """A key of a section: its meaning, and its default. Without a default it is required; None: absent."""
    return Field(default, description=about)


class Section(BaseModel):
    """A section whose keys are declared. Unknown keys are mistakes, and so is `~` for a required key.

    Values are kept as written, except that a whole number may be a float (1e5); pydantic by itself would also take '5'
    and true for numbers.
    """

    model_config = ConfigDict(
        extra='forbid', allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=()
    )
    fills_defaults: ClassVar[bool] = True  # whether keys that are not given appear with their defaults

    @field_validator('*', mode='wrap')
    @classmethod
    def _as_written(cls, value: Any, validate: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if value is None and not field.is_required():  # `~` stands for 'not given'
            try:
                return validate(None)
            except ValidationError:
                return field.get_default(call_default_factory=True)
        return as_written(value, validate(value))

    def as_dict(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The checked options: the keys of `given` in their order, then defaults."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name not in given}
        defaults = {name: value for name, value in values.items() if value is not None} if self.fills_defaults else {}
        result = {name: getattr(self, name) for name in given} | defaults
        for name, value in result.items():
            if isinstance(value, Section):
                result[name] = value.as_dict(given.get(name) or {})
        return result


class Free(Section):
    """A section of any keys."""

    model_config = ConfigDict(extra='allow')


def as_written(value: Any, result: Any) -> Any:
    """`result`, what pydantic made of `value`, with lists as lists; neither text nor booleans become numbers."""
    if isinstance(value, list) and isinstance(result, Iterable) and not isinstance(result, Mapping):
        return [as_written(before, after) for before, after in zip(value, result)]
    if isinstance(value, dict) and isinstance(result, dict):
        return {name: as_written(value[name], after) if name in value else after for name, after in result.items()}
    for family in (bool, str):
        assert isinstance(value, family) == isinstance(result, family) or not isinstance(result, (str, int, float))
    return value if isinstance(value, int) and isinstance(result, float) else result  # a scale of 2 is no 2.0


@functools.lru_cache(maxsize=256)
def opened(model: type[Section]) -> type[Section]:
    """The model with unknown keys allowed."""
    return create_model(model.__name__, __base__=(model, Free))


def existing(kind: str, wanted: Callable[[Path], bool]) -> Callable[[str | list[str]], str | list[str]]:
    """A check that a path, or every path of a list, exists. `kind` is 'file' or 'folder', `wanted` tells it."""

    def check(value: str | list[str]) -> str | list[str]:
        for path in map(Path, [value] if isinstance(value, str) else value):
            if not path.expanduser().exists():
                raise ValueError(f'there is no {kind} {path}{nearest_path(path.expanduser(), wanted)}')
            if not wanted(path.expanduser()):
                raise ValueError(f'must be the path of a {kind}; {path} is none.')
        return value

    return check


def model_or_file(value: str) -> str:
    """A check that a shipped model or a file is named, and not both."""
    if value in names():
        find_model(value)
    else:
        existing('file', Path.is_file)(value)
    return value


def nearest_path(path: Path, wanted: Callable[[Path], bool]) -> str:
    """How far a missing path exists, and what is there that is spelled alike; `wanted` is Path.is_file or is_dir."""
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        path, parent, wanted = parent, parent.parent, Path.is_dir
    if not parent.is_dir():
        return '.'
    return f"; {parent.resolve()} has no '{path.name}'.{did_you_mean_file(path, wanted)}"


def one_folder_name(value: str) -> str:
    assert value.strip() and value not in ('.', '..') and not set(value) & set('/\\\0')
    return value


def no_text(value: Any) -> Any:
    assert not isinstance(value, str)
    return value


@dataclass(frozen=True, eq=False)
class OneOf:
    """A choice among what a dictionary holds by then: `Annotated[str, OneOf(FAMILIES)]`."""

    names: Mapping[str, Any]

    def check(self, value: str) -> str:
        assert value in self.names
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {'enum': list(self.names), 'type': 'string', 'advice': OWN_CLASS}


def described(words: str) -> WithJsonSchema:
    """What messages and the page of keys say of a type that its JSON schema cannot express."""
    return WithJsonSchema({'words': words, 'type': 'string'})


Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveNumber = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(ge=1)]
FactorPair = Annotated[list[Factor], Field(min_length=2, max_length=2)]
Factors = Factor | FactorPair
Text = Annotated[str, Field(min_length=1)]
FolderName = Annotated[str, AfterValidator(one_folder_name), described('text that names one folder, without / and \\')]
File = Annotated[Text, AfterValidator(existing('file', Path.is_file)), described('the path of a file')]
Weights = Annotated[
    Text,
    AfterValidator(model_or_file),
    described('the path of a file, or the name of a model that comes with the package'),
]
# of images, or an LMDB folder
Folder = Annotated[
    Text | list[Text],
    AfterValidator(existing('folder', Path.is_dir)),
    described('the path of a folder, or a list of them'),
]
NoText = Annotated[
    Any, AfterValidator(no_text), WithJsonSchema({'words': 'a number'})
]  # an argument whose default is a number


class _Words(GenerateJsonSchema):
    """JSON schema, in which types that it does not know allow anything."""

    ignored_warning_kinds: set = {'non-serializable-default', 'skipped-choice'}  # noqa: RUF012  pydantic's own form

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        return {}


@functools.lru_cache(maxsize=256)
def schemas(model: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """The JSON schema of every key of a model."""
    return model.model_json_schema(schema_generator=_Words)['properties']


def names_in(schema: Mapping[str, Any]) -> list[str]:
    """The names that a value may be, where it is a choice."""
    names = [schema['const']] if 'const' in schema else schema.get('enum', [])
    return [*map(str, names), *(name for member in schema.get('anyOf', []) for name in names_in(member))]


def words(schema: Mapping[str, Any]) -> str:
    """What the schema of a value allows, for people: 'must be ...'."""
    if 'words' in schema:
        return schema['words']
    if 'anyOf' in schema:
        return ', or '.join(dict.fromkeys(words(member) for member in schema['anyOf'] if member not in ({}, NULL)))
    if 'const' in schema or 'enum' in schema:
        names = names_in(schema)
        return names[0] if len(names) == 1 else f'one of {listing(names)}'
    kind = schema.get('type', 'ref' if '$ref' in schema else None)
    if kind == 'array':
        limits = {schema.get('minItems'), schema.get('maxItems')}
        count = f'{limits.pop()} ' if len(limits) == 1 and None not in limits else ''
        return f'a list of {count}entries, each {words(schema.get("items", {}))}'
    return KINDS.get(kind, 'any value') + bounds(schema)


NULL = {'type': 'null'}
KINDS: dict[str | None, str] = {
    'integer': 'a whole number',
    'number': 'a number',
    'boolean': 'true or false',
    'string': 'text',
    'object': 'a section of keys',
    'ref': 'a section of keys',
    'null': '~',
}


def bounds(schema: Mapping[str, Any]) -> str:
    """The limits of a number."""
    limits = {'exclusiveMinimum': 'above', 'minimum': 'of at least', 'exclusiveMaximum': 'below', 'maximum': 'at most'}
    found = [f'{term} {schema[key]:g}' for key, term in limits.items() if key in schema]
    return f' {" and ".join(found)}' if found else ''


def listing(names: list[str]) -> str:
    """Names, the first ten of many."""
    if len(names) <= SHOWN_NAMES:
        return ', '.join(names)
    return f'{", ".join(names[:10])} and {len(names) - 10} more'


def show(value: Any) -> str:
    """A value as the user wrote it, shortened."""
    if value is None:
        return '~ (nothing)'
    if isinstance(value, Mapping):
        return 'a section of keys'
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'
