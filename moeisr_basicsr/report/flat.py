"""The rows of results documents as CSV, one line each, nothing left out."""

import csv
import io
from typing import Any

from .collect import Source, model_name

FIRST = (
    'file',
    'model',
    'seed',
    'case',
    'dataset',
    'image',
    'count',
    'scale.0',
    'scale.1',
    'budget',
    'cost_weight',
    'precision',
)


def flat_csv(sources: list[Source]) -> str:
    """All rows of all files; keys of keys are joined with dots, entries of lists numbered from 0."""
    lines = []
    for source in sources:
        name, seed = model_name(source)
        lines += [{'file': source.path, 'model': name, 'seed': seed, **flat(row)} for row in source.results['rows']]
    columns = list(dict.fromkeys([*FIRST, *(key for line in lines for key in line)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval='', lineterminator='\n')
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def is_flat_csv(content: bytes) -> bool:
    """Whether a file's content is a table of `flat_csv`."""
    return content.startswith(','.join(FIRST).encode())


def flat(value: Any, name: str = '') -> dict[str, Any]:
    """{'macs.total': 3.2, 'scale.0': 2.0} of nested dictionaries and lists; null is empty."""
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    else:
        return {name: '' if value is None else value}
    return {
        key: entry
        for inner, child in entries
        for key, entry in flat(child, f'{name}.{inner}' if name else str(inner)).items()
    }
