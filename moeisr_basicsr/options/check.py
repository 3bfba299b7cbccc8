"""The check of a whole options file: every mistake at once, each with its file and line, and defaults filled in."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from moeisr_basicsr.errors import UserError, did_you_mean

from .force import force
from .keys import OneNetwork, options_model
from .reader import Document, KeyPath, join_keys
from .registered import locate
from .rules import Problems, check_together
from .values import names_in, schemas, show, words

FORCED_LAST = 10**9  # problems of the command line come after those of the file's last line


class OptionsError(UserError):
    """Mistakes in an options file; `problems` has one line for each."""

    def __init__(self, problems: list[str]):
        super().__init__('\n'.join(problems))
        self.problems = problems


def check_options(document: Document, force_yml: list[str] | None = None, is_train: bool = True) -> dict[str, Any]:
    """A checked copy of the document's data, with the changes of `--force_yml` and with defaults.

    Raises:
        OptionsError: It has mistakes; all are listed.
    """
    data = copy.deepcopy(document.data)
    # model_type first: it decides which keys there are
    entries = sorted(force_yml or [], key=lambda entry: not entry.startswith('model_type='))
    forced: dict[KeyPath, str] = {force(data, entry): f'--force_yml {entry}' for entry in entries}
    prepare(data, is_train)
    model, rules = options_model(data.get('model_type')), list(check_together(data, is_train))
    try:
        options = model.model_validate(data).as_dict(data)
    except ValidationError as error:
        options, rules = data, [*problems_of(error, model, data), *rules]
    raise_problems(document, forced, rules)
    return options


def check_network(network_opt: Any, source: str) -> None:
    """Check the options of one network, as they stand under `network_g`; they are not changed.

    Args:
        network_opt: The options.
        source: Where they come from, for messages.

    Raises:
        OptionsError: They have mistakes; all are listed.
    """
    data = {'network_g': network_opt}
    try:
        OneNetwork.model_validate(data)
    except ValidationError as error:
        raise_problems(Document(source, data, {}), {}, problems_of(error, OneNetwork, data))


def prepare(data: dict[str, Any], is_train: bool) -> None:
    """Leave out what is switched off, and tell every dataset its phase and the run's scale."""
    if not is_train and data.get('val') is None:
        data['val'] = {}
    datasets: Any = data.get('datasets')
    for name, dataset in list(datasets.items()) if isinstance(datasets, dict) else ():
        phase = name.split('_')[0]
        # without `val` nothing is validated: its folders need not be there
        if dataset is None or (phase == 'val' and is_train and data.get('val') is None):
            del datasets[name]
        elif isinstance(dataset, dict):
            dataset.update({'phase': phase} if data.get('scale') is None else {'phase': phase, 'scale': data['scale']})
    metrics = data['val'].get('metrics') if isinstance(data.get('val'), dict) else None
    if isinstance(metrics, dict):
        data['val']['metrics'] = {name: metric for name, metric in metrics.items() if metric is not None}


def problems_of(error: ValidationError, model: type[BaseModel], data: Any) -> Problems:
    """What pydantic found, in words: one problem for each value, and one for each missing file or folder."""
    told: set[Any] = set()
    for item in error.errors(include_url=False):
        keys, owner, section = locate(model, data, item['loc'])
        message = message_of(item, keys, owner, section)
        if message.startswith('there is no'):
            about: Any = message
        else:
            about = (
                ('scale',) if keys[-1:] == ('scale',) and ('scale',) in told else keys
            )  # a run's scale is everyone's
        if about not in told:
            told.add(about)
            yield keys[:-1] if item['type'] == 'missing' else keys, message


def message_of(item: Mapping[str, Any], keys: KeyPath, owner: type[BaseModel] | None, section: Any) -> str:
    """One of pydantic's errors at `keys`, the last of which stands in `section`; `owner` declares its keys."""
    if item['type'] == 'value_error':
        return str(item['ctx']['error'])
    name = str(keys[-1]) if keys else ''
    declared = {} if owner is None else schemas(owner)
    if item['type'] == 'extra_forbidden':
        known = [key for key in declared if key not in section]
        hint = did_you_mean(name, known) or (f' Allowed here: {", ".join(sorted(known))}.' if known else '')
        return f'unknown key.{hint}'
    schema = declared.get(name, {'words': 'a section of keys'})
    allowed = words(schema)
    if item['type'] == 'missing':
        about = f' ({schema["description"]})' if schema.get('description') else ''
        hint = '' if allowed in ('any value', 'a section of keys') else f' It must be {allowed}.'
        return f"the key '{name}' is missing{about}.{hint}"
    value = section.get(name) if isinstance(section, Mapping) else section
    advice = schema.get('advice', '')
    if isinstance(value, (int, float)) and not isinstance(value, bool) and schema.get('type') == 'string':
        advice = ' Put it in quotes to make it text.'
    return f'must be {allowed}; got {show(value)}.{did_you_mean(str(value), names_in(schema))}{advice}'


def raise_problems(document: Document, forced: Mapping[KeyPath, str], problems: Iterable[tuple[KeyPath, str]]) -> None:
    """Raise the problems in the order of their lines, each with its place in the file or its `--force_yml` entry.

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
