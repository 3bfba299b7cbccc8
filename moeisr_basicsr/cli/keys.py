"""`basicsr train --keys`: the tables of the options, for people, as text or as a page of Markdown."""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from pydantic import BaseModel

from moeisr_basicsr.core.decoder import FAMILIES
from moeisr_basicsr.options.keys import Dataset, MoEISROptions, dataset_model
from moeisr_basicsr.options.registered import is_basicsr, metric_model, registered, signature_model
from moeisr_basicsr.options.values import opened, schemas, words

INTRODUCTION = """\
What an options file may say. A section with a `type` takes the options of the class that it names; those of this
package stand at the end. `~` means not given. Keys of BasicSR's own classes are the arguments of these classes."""

FAMILY_ARGUMENTS = ('type', 'in_channels', 'out_channels', 'experts', 'shared_layers')  # which the network gives it


class Row(NamedTuple):
    """One key, for people."""

    key: str
    value: str
    default: str
    meaning: str


def rows(model: type[BaseModel], title: str = '') -> Iterator[Row]:
    """The keys of a section and of the sections in it."""
    for name, field in model.model_fields.items():
        key = f'{title}: {name}' if title else name
        default: Any = '' if field.default is None or field.default_factory else field.default
        shown = (
            'required' if field.is_required() else str(default).lower() if default in (True, False) else str(default)
        )
        allowed = words(schemas(model)[name]).partition(': ')[0]  # without the names that a registry holds today
        yield Row(key, allowed, shown, field.description or '')
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from rows(field.annotation, key)


def tables(is_train: bool) -> Iterator[tuple[str, list[Row]]]:
    """(title, rows) of the whole file, of every dataset, and of each class that is not BasicSR's own."""
    yield 'The whole file', [row for row in rows(MoEISROptions) if is_train or not row.key.startswith('train: ')]
    yield 'datasets: NAME', list(rows(Dataset))
    for name, dataset in registered('DATASET').items():
        if dataset_model(dataset) is not opened(Dataset) and not is_basicsr(dataset):
            own = rows(dataset_model(dataset))
            yield f'datasets: NAME ({name})', [row for row in own if row.key not in Dataset.model_fields]
    for where, registry, model in (
        ('network_g', 'ARCH', signature_model),
        ('train: NAME_opt', 'LOSS', signature_model),
        ('val: metrics: NAME', 'METRIC', metric_model),
    ):
        for name, entry in registered(registry).items():
            if not is_basicsr(entry) and (is_train or registry != 'LOSS'):
                yield f'{where} ({name})', [row for row in rows(model(entry)) if row.key != 'type']
    for name, family in FAMILIES.items():
        if not family.__module__.startswith('moeisr_basicsr.'):  # of a user's own
            arguments = rows(signature_model(cast(Any, family)))
            yield f'network_g (decoder: {name})', [row for row in arguments if row.key not in FAMILY_ARGUMENTS]


def keys_text(is_train: bool) -> str:
    """All tables as lines of text."""
    lines = []
    for title, table in tables(is_train):
        lines.append(f'{title}:')
        for key, value, default, meaning in table:
            ending = {'': '', 'required': '. Required'}.get(default, f'; default {default}')
            about = f'{meaning.rstrip(".")}. ' if meaning else ''
            lines += [f'  {key}', f'      {about}{value[:1].upper()}{value[1:]}{ending}.']
    return '\n'.join(lines)


def keys_markdown(is_train: bool = True) -> str:
    """All tables as a page of Markdown."""
    lines = ['# Keys of an options file', '', INTRODUCTION, '']
    for title, table in tables(is_train):
        lines += [f'## {title}', '', '| key | value | default | meaning |', '|---|---|---|---|']
        lines += [
            f'| `{row.key}` | ' + ' | '.join(cell.replace('|', r'\|').replace('<', '&lt;') for cell in row[1:]) + ' |'
            for row in table
        ]
        lines.append('')
    return '\n'.join(lines)
