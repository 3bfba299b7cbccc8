"""The one format of results: `results.schema.json` (JSON Schema) beside this file says what every key means.

`basicsr test`, `basicsr profile` and `scripts/benchmark_decode.py` write it, `basicsr report` reads it.
"""

import json
import math
from os import PathLike
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from moeisr_basicsr.atomic_file import write_atomic
from moeisr_basicsr.errors import UserError

SCHEMA = json.loads(Path(__file__).with_name('results.schema.json').read_text(encoding='utf-8'))
FORMAT, VERSION = SCHEMA['title'], 1


def document(command: str, environment: dict, rows: list[dict], model: dict | None = None) -> dict:
    """A results document."""
    return {
        'format': FORMAT,
        'version': VERSION,
        'command': command,
        'environment': environment,
        'model': model,
        'rows': rows,
    }


def problem(value: Any, schema: dict = SCHEMA, where: str = 'results') -> str | None:
    """What in `value` fits the schema least, as one line that names its place; None if all fits.

    Args:
        schema: `SCHEMA` or another; a `$ref` in it may only name what it holds itself.
        where: What `value` is called.
    """
    error = best_match(Draft202012Validator(schema).iter_errors(value))
    if error is None:
        return None
    words = error.message if len(error.message) < 200 else f'{error.message[:100]} ... {error.message[-60:]}'
    return ' '.join(f'{error.json_path.replace("$", where, 1)}: {words}'.split())


def finite(value: Any) -> Any:
    """A copy with null in place of infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scale_label(scale: tuple[float, float]) -> str:
    """A row's `scale` for people: 'x2', 'x3.3', or 'x2x3.5' for (rows, columns) that differ."""
    rows, cols = (f'{factor:.4g}' for factor in scale)
    return f'x{rows}' if rows == cols else f'x{rows}x{cols}'


def save(path: str | PathLike, results: dict) -> None:
    """Write a results document: complete or not at all.

    Raises:
        ValueError: It does not fit the schema.
        OSError: The file cannot be written.
    """
    results = finite(results)
    if found := problem(results):
        raise ValueError(f'results do not fit the format: {found}.')
    content = (json.dumps(results, indent=1, allow_nan=False) + '\n').encode()
    write_atomic(path, lambda file: file.write(content))


def load(path: str | PathLike) -> dict:
    """Read a results document; values that are not finite become None.

    Raises:
        UserError: There is no such file, it is no JSON, or it does not fit the schema.
    """
    try:
        text = Path(path).read_text(encoding='utf-8')
        # As a float, a whole number of hundreds of digits is infinite.
        results = finite(json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 16 else float(digits)))
        json.dumps(results, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but no text
    except OSError as error:
        raise UserError(f'{path}: cannot read these results: {error.strerror}.') from error
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: this is no results file: it is no JSON ({error}).') from error
    if found := problem(results):
        raise UserError(f'{path}: this is no results file of moeisr_basicsr: {found}.')
    return results
