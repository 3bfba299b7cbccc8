"""The check of a whole options file: every mistake at once, each with its file and line, and defaults filled in."""

from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from moeisr_basicsr.errors import UserError, did_you_mean

from .keys import options_model
from .reader import Document, KeyPath, join_keys
from .registered import Typed
from .rules import Problems, check_together
from .values import Section, names_in, schemas, show, words

FORCED_LAST = 10**9  # problems of the command line come after those of the file's last line
ANY = FieldInfo(annotation=Any)  # type: ignore[arg-type]  # of a key that no model declares


class OptionsError(UserError):
    """Mistakes in an options file; `problems` has one line for each."""

    def __init__(self, problems: list[str]):
        super().__init__('\n'.join(problems))
        self.problems = problems


class Place:
    """A value of an options file with what is known about it.

    Args:
        annotation: Its type.
        value: The value.
    """

    def __init__(self, annotation: Any, value: Any):
        self.value = value
        self.model: type[BaseModel] | None = None  # of a section with declared keys
        self.item: Any = None  # type of every key, where users choose the names
        for marker in getattr(annotation, '__metadata__', ()):
            if isinstance(marker, Typed):
                self.model = marker.model_of(value)
                return
        if get_origin(annotation) is dict and get_args(annotation):
            self.item = get_args(annotation)[1]
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            self.model = annotation

    @property
    def is_section(self) -> bool:
        """Whether keys below it are known or named by the user."""
        return self.model is not None or self.item is not None

    @property
    def fields(self) -> dict[str, FieldInfo]:
        """The declared keys."""
        return {} if self.model is None else self.model.model_fields

    @property
    def is_open(self) -> bool:
        """Whether a key that is not declared may stand here."""
        return self.model is None or self.model.model_config.get('extra') != 'forbid'

    def below(self, name: str | int) -> 'Place':
        """The value of one key."""
        field = self.fields.get(str(name), ANY)
        annotation = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        value = self.value.get(name) if isinstance(self.value, Mapping) else None
        return Place(self.item or annotation, value)


def check(document: Document, forced: Mapping[KeyPath, str], is_train: bool) -> dict[str, Any]:
    """The checked options with their defaults.

    Args:
        document: The file; its data is changed, so hand in a copy.
        forced: Keys that `--force_yml` set, with the entry that did.
        is_train: For training or for testing.

    Raises:
        OptionsError: It has mistakes.
    """
    data = document.data
    prepare(data, is_train)
    options, problems = validate(options_model(data.get('model_type')), data)
    raise_problems(document, forced, [*problems, *check_together(data, is_train)])
    return options


def prepare(data: dict[str, Any], is_train: bool) -> None:
    """Leave out what is switched off, and tell every dataset its phase and the run's scale."""
    if not is_train and data.get('val') is None:
        data['val'] = {}
    for section in (data.get('datasets'), data['val'].get('metrics') if isinstance(data.get('val'), dict) else None):
        for name in [name for name, value in section.items() if value is None] if isinstance(section, dict) else ():
            del section[name]  # --force_yml datasets:val_2=none
    datasets = data.get('datasets')
    for name in list(datasets) if isinstance(datasets, dict) else ():
        phase = name.split('_')[0]
        if phase == 'val' and is_train and data.get('val') is None:
            del datasets[name]  # without `val` nothing is validated: its folders need not be there
        elif isinstance(datasets[name], dict):
            datasets[name]['phase'] = phase
            if data.get('scale') is not None:
                datasets[name]['scale'] = data['scale']


def validate(model: type[Section], data: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[KeyPath, str]]]:
    """The options of a section with defaults, or the problems of its keys."""
    try:
        return model.model_validate(data).as_dict(data), []
    except ValidationError as error:
        return data, list(problems_of(error, model, data))


def problems_of(error: ValidationError, model: type[BaseModel], data: Any) -> Problems:
    """What pydantic found, in words: one problem for each value, and one for each missing file or folder."""
    told: set[Any] = set()
    for item in error.errors(include_url=False):
        keys, place = (), Place(model, data)
        owner = place
        for name in item['loc']:
            if not place.is_section:  # what follows are places in a list and members of a union
                break
            keys, owner, place = (*keys, name), place, place.below(name)
        message = message_of(item, keys[-1] if keys else '', owner)
        about = message if message.startswith('there is no') else keys if item['type'] != 'missing' else (keys, message)
        if about not in told:
            told.add(about)
            yield keys[:-1] if item['type'] == 'missing' else keys, message


def message_of(item: Mapping[str, Any], name: Any, owner: Place) -> str:
    """One of pydantic's errors at the key `name` of the section `owner`."""
    if item['type'] == 'extra_forbidden':
        known = [key for key in owner.fields if key not in owner.value]
        hint = did_you_mean(name, known) or (f' Allowed here: {", ".join(sorted(known))}.' if known else '')
        return f'unknown key.{hint}'
    if item['type'] == 'value_error':
        return str(item['ctx']['error'])
    schema = schemas(owner.model).get(name, {}) if owner.model is not None else {}
    allowed = words(schema) if schema else 'a section of keys'
    if item['type'] == 'missing':
        about = schema.get('description')
        hint = '' if allowed in ('any value', 'a section of keys') else f' It must be {allowed}.'
        return f"the key '{name}' is missing{f' ({about})' if about else ''}.{hint}"
    value = owner.value.get(name) if isinstance(owner.value, Mapping) else owner.value
    advice = schema.get('advice', '')
    if isinstance(value, (int, float)) and not isinstance(value, bool) and schema.get('type') == 'string':
        advice = ' Put it in quotes to make it text.'
    return f'must be {allowed}; got {show(value)}.{did_you_mean(str(value), names_in(schema))}{advice}'


def raise_problems(document: Document, forced: Mapping[KeyPath, str], problems: list[tuple[KeyPath, str]]) -> None:
    """Raise the problems in the order of their lines.

    Raises:
        OptionsError: There are any.
    """
    found = set()
    for keys, message in problems:
        # the value itself, a section around it, or one that an entry for a key in it has made
        made = [] if keys in document.lines or not keys else [entry for entry in forced if entry[: len(keys)] == keys]
        entries = [*(keys[:depth] for depth in range(len(keys), 0, -1)), *made]
        entry = next((entry for entry in entries if entry in forced), None)
        where = document.where(keys) if entry is None else forced[entry]
        order = document.line(keys) if entry is None else FORCED_LAST
        found.add((order, f'{where}: {f"{join_keys(keys)}: " if keys else ""}{message}'))
    if found:
        raise OptionsError([text for _, text in sorted(found, key=lambda problem: problem[0])])
