"""The rows of results files as CSV, one line each, nothing left out."""

import csv
import io
from typing import Any

from .runs import Source

FIRST = ['file', 'model', 'seed', 'case', 'dataset', 'image', 'count', 'scale.0', 'scale.1', 'budget', 'cost_weight']


def rows_csv(sources: list[Source]) -> str:
    """All rows of all files; keys of keys are joined with dots, entries of lists numbered from 0."""
    lines = []
    for source in sources:
        name, seed = source.name_and_seed()
        lines += [{'file': source.path, 'model': name, 'seed': seed, **flat(row)} for row in source.results['rows']]
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(FIRST + [key for line in lines for key in line]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def flat(value: Any, name: str = '') -> dict[str, Any]:
    """{'macs.total': 3.2, 'scale.0': 2.0} of nested dictionaries and lists."""
    if not isinstance(value, dict | list):
        return {name: value}
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    return {
        key: entry
        for inner, child in entries
        for key, entry in flat(child, f'{name}.{inner}' if name else str(inner)).items()
    }
