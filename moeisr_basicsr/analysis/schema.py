"""The one format of results.

`basicsr test`, `basicsr profile` and `scripts/benchmark_decode.py` write it, `basicsr report` reads it.

A results file is JSON, one object:

- `format`: 'moeisr_basicsr.results'; `version`: 1; `command`: what wrote it ('test', 'profile', 'benchmark').
- `environment`: where it ran, from `environment.environment`: versions, `cpu`, `threads`, `device`, `device_name`,
  `kernel` (which code decoded) and the environment variables that matter.
- `model`: `name`; `file` (null for random weights); `network_g` (its options); `parameters`: number of them in
  `encoder`, `mapper`, `shared` (LTE's convolutions, a shared first layer), `experts` (a list), `total`. Null in a
  benchmark, whose networks are its own, and in a profile of the loader, which has none.
- `rows`: a list; each row is one measurement with these keys, all optional but `case`:

  - `case`: name of the row ('test', 'mean' of one dataset's images, 'profile', 'train', 'data-stages',
    'data-workers-N', or the benchmark's case).
  - `dataset`, `image`: what was measured on; null or absent for made-up input. `count`: number of images.
  - `protocol`: how the LR images were made. `metric_protocols`: metric -> what it compares and what it leaves out.
  - `lq_size`, `size`: [rows, columns] of input and output. `scale`: [row factor, column factor], as asked for.
  - `precision`: fp32, bf16, fp16. `budget`, `cost_weight`: the control of the routing, null where none was set.
    `shuffle_experts`: true where the chosen experts were permuted over the pixels of each image, a control experiment.
  - `pictures`: `result`, `expert_map`, `truth`, `bicubic` -> the saved file, relative to the results file's folder.
  - `metrics`: name -> value, for example {"psnr_y": 32.24}; null for a value that is not finite.
  - `time_ms`: stage -> median milliseconds. Upscaling: `encode`, `map`, `decode` (LR tables and experts), `total`,
    `dense_folded`, `dense_plain`; a 'test' has the first four, and its `total` includes what is in no stage, such as
    the skip image. Training: `encoder`, `mapper`, `tables`, `chosen_experts`, `unchosen_experts`, `other`, `backward`,
    `optimizer`, `total`. `repeats`: number of runs behind each median. Of 'data-stages', means of one item without
    workers: `read`, `resize`, `queries`, `tensor`, `collate`, `other`, `total`; of datasets that are not this
    package's only the last three.
  - `peak_mib`: the same stages -> highest memory beyond what was in use before, MiB; null where the system cannot say.
  - `macs`: multiply-adds, see `complexity`: `encoder`, `mapper`, `tables`, `experts` (mean of the chosen ones), `total`
    (all of these), `dense_folded`, `dense_plain` (decoders without encoder), all per output pixel; `each_expert`: a
    list, per output pixel sent to it.
  - `routing`: `loads` (each expert's share of the pixels), `mean_cost` (1 = all to the heaviest),
    `texture_correlation` (Spearman, depth of the chosen expert against the truth's local gradient energy, the
    output's where there is no truth; null where unknown).
  - `data`: the training loader with `workers` processes (0: none besides the training's own), in batches of
    `batch_size`: `items_per_second`; `items_per_cpu_second`, of all its processes, null where the system cannot say;
    `needed_items_per_second` for the step time that was asked about, null without one.
  - `ratio`: how many times faster than the row's `baseline` (a case name).
  - `difference`: largest difference to the reference on the [0, 1] scale. `notes`: one line for people.

`SCHEMA` says the same in JSON Schema (the subset that `problems` checks).
"""

import json
import math
from os import PathLike
from pathlib import Path
from typing import Any

from moeisr_basicsr.atomic_file import write_atomic
from moeisr_basicsr.errors import UserError

FORMAT = 'moeisr_basicsr.results'
VERSION = 1


def _object(required: tuple[str, ...] = (), extra: Any = False, **properties: Any) -> dict:
    return {'type': 'object', 'required': list(required), 'properties': properties, 'additionalProperties': extra}


def _list(items: dict, **more: Any) -> dict:
    return {'type': 'array', 'items': items, **more}


_TEXT, _TEXT_OR_NULL = {'type': 'string'}, {'type': ['string', 'null']}
_FLAG = {'type': 'boolean'}
_COUNT = {'type': 'integer', 'minimum': 0}
_NUMBER, _NUMBER_OR_NULL = {'type': 'number'}, {'type': ['number', 'null']}
_AMOUNT, _AMOUNT_OR_NULL = {'type': 'number', 'minimum': 0}, {'type': ['number', 'null'], 'minimum': 0}
_SIZE = _list({'type': 'integer', 'minimum': 1}, minItems=2, maxItems=2)

_ENVIRONMENT = _object(
    ('torch', 'threads', 'cpu', 'device', 'kernel'),
    moeisr_basicsr=_TEXT,
    torch=_TEXT,
    python=_TEXT,
    platform=_TEXT,
    cpu=_TEXT,
    cpu_count=_COUNT,
    threads=_COUNT,
    device=_TEXT,
    device_name=_TEXT,
    kernel=_TEXT,
    variables=_object(extra=_TEXT),
)
_MODEL = {
    **_object(
        ('name', 'parameters'),
        name=_TEXT,
        file=_TEXT_OR_NULL,
        network_g=_object(extra=True),
        parameters=_object(
            ('total',), encoder=_COUNT, mapper=_COUNT, shared=_COUNT, experts=_list(_COUNT), total=_COUNT
        ),
    ),
    'type': ['object', 'null'],
}
_ROW = _object(
    ('case',),
    case=_TEXT,
    dataset=_TEXT_OR_NULL,
    image=_TEXT_OR_NULL,
    protocol=_TEXT_OR_NULL,
    count=_COUNT,
    metric_protocols=_object(extra=_TEXT),
    pictures=_object(extra=_TEXT),
    lq_size=_SIZE,
    size=_SIZE,
    scale=_list(_AMOUNT, minItems=2, maxItems=2),
    precision=_TEXT,
    budget=_AMOUNT_OR_NULL,
    cost_weight=_NUMBER_OR_NULL,
    shuffle_experts=_FLAG,
    metrics=_object(extra=_NUMBER_OR_NULL),
    time_ms=_object(extra=_AMOUNT),
    repeats=_COUNT,
    peak_mib=_object(extra=_AMOUNT_OR_NULL),
    macs=_object(
        encoder=_AMOUNT,
        mapper=_AMOUNT,
        tables=_AMOUNT,
        experts=_AMOUNT,
        total=_AMOUNT,
        dense_folded=_AMOUNT,
        dense_plain=_AMOUNT,
        each_expert=_list(_AMOUNT),
    ),
    routing=_object(loads=_list(_AMOUNT), mean_cost=_AMOUNT_OR_NULL, texture_correlation=_NUMBER_OR_NULL),
    data=_object(
        workers=_COUNT,
        batch_size=_COUNT,
        items_per_second=_AMOUNT,
        items_per_cpu_second=_AMOUNT_OR_NULL,
        needed_items_per_second=_AMOUNT_OR_NULL,
    ),
    ratio=_AMOUNT,
    baseline=_TEXT,
    difference=_AMOUNT_OR_NULL,
    notes=_TEXT,
)
SCHEMA = {
    '$schema': 'https://json-schema.org/draft/2020-12/schema',
    'title': FORMAT,
    **_object(
        ('format', 'version', 'command', 'environment', 'rows'),
        format={'enum': [FORMAT]},
        version={'enum': [VERSION]},
        command=_TEXT,
        environment=_ENVIRONMENT,
        model=_MODEL,
        rows=_list(_ROW),
    ),
}

_TYPES = {
    'object': dict,
    'array': list,
    'string': str,
    'integer': int,
    'number': (int, float),
    'null': type(None),
    'boolean': bool,
}


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


def problems(value: Any, schema: dict = SCHEMA, where: str = 'results') -> list[str]:
    """What in `value` does not fit the schema; empty if all fits."""
    if 'enum' in schema:
        return [] if value in schema['enum'] else [f'{where} must be {schema["enum"][0]!r}; got {value!r}']
    names = schema['type'] if isinstance(schema['type'], list) else [schema['type']]
    types = tuple(
        kind for name in names for kind in (_TYPES[name] if isinstance(_TYPES[name], tuple) else (_TYPES[name],))
    )
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        return [f'{where} must be {" or ".join(names)}; got {type(value).__name__}']
    found = []
    if isinstance(value, dict):
        known, extra = schema['properties'], schema['additionalProperties']
        found += [f'{where} lacks {name!r}' for name in schema['required'] if name not in value]
        for name, entry in value.items():
            inner = known.get(name, extra)
            if inner is False:
                found.append(f'{where} has the unknown key {name!r}')
            elif inner is not True:
                found += problems(entry, inner, f'{where}.{name}')
    elif isinstance(value, list):
        least, most = schema.get('minItems', 0), schema.get('maxItems', math.inf)
        if not least <= len(value) <= most:
            found.append(f'{where} must have {least} entries; got {len(value)}')
        for place, entry in enumerate(value):
            found += problems(entry, schema['items'], f'{where}[{place}]')
    elif isinstance(value, (int, float)) and value < schema.get('minimum', -math.inf):
        found.append(f'{where} must be at least {schema["minimum"]}; got {value}')
    return found


def finite(value: Any) -> Any:
    """A copy with null in place of infinities and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(path: str | PathLike, results: dict) -> None:
    """Write a results document: complete or not at all.

    Raises:
        ValueError: It does not fit the schema.
        OSError: The file cannot be written.
    """
    results = finite(results)
    found = problems(results)
    if found:
        raise ValueError(f'results do not fit the format: {found[0]}.')
    content = (json.dumps(results, indent=1, allow_nan=False) + '\n').encode()
    write_atomic(path, lambda file: file.write(content))


def load(path: str | PathLike) -> dict:
    """Read a results document.

    Raises:
        UserError: There is no such file, it is no JSON, or it does not fit the schema.
    """
    try:
        results = json.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise UserError(f'{path}: cannot read these results: {error.strerror}.') from error
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path}: this is no results file: it is no JSON ({error}).') from error
    found = problems(results)
    if found:
        raise UserError(f'{path}: this is no results file of moeisr_basicsr: {found[0]}.')
    return results
