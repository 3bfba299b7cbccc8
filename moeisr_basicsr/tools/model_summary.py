"""What a model file is: network, size, cost and the measurements that its metadata holds."""

import hashlib
import json
from os import PathLike
from pathlib import Path
from typing import Any

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.analysis.complexity import decoder_macs, dense_folded_macs
from moeisr_basicsr.archs.moeisr_arch import MoEISR
from moeisr_basicsr.checkpoint import build, read_model
from moeisr_basicsr.errors import UserError

# Metadata that is JSON and what it holds: `scripts/ship_model.py` writes it beside plain text such as `recipe`.
SCALE_RANGE, RESULTS = 'scale_range', 'results'
STRUCTURES = {
    SCALE_RANGE: {
        'type': 'array',
        'items': {'type': 'number', 'minimum': 1, 'maximum': 1e30},
        'minItems': 2,
        'maxItems': 2,
    },
    RESULTS: {
        'type': 'array',
        'items': {**schema.SCHEMA['$defs']['row'], 'required': ['dataset', 'scale', 'count', 'metrics']},
        '$defs': schema.SCHEMA['$defs'],
    },
}
LQ_SIZE, SIZE = (180, 320), (720, 1280)  # of the published costs at x4


def summarize_model(path: str | PathLike) -> dict[str, Any]:
    """Facts of a model file, ready for JSON.

    Returns:
        `name`, `file`, `bytes`, `sha256`; `network_g`, `encoder`, `decoder` (family), `experts` (their number),
        `parameters`; `macs_x4`, the decoder's MACs per output pixel at x4: `routed` (mapper, LR tables and experts by
        the measured shares; None where those are not known) and `dense` (the most expensive expert everywhere, folded);
        `scale_range` of the training, None if unknown; `results`, rows as `results_of` gives them; `metadata`, the
        other entries. Of a network without such a decoder, what belongs to it is None.

    Raises:
        UserError: It is no model file, is damaged, or has metadata that cannot be read.
    """
    path = Path(path)
    model = read_model(path)
    net = build(model.network_opt, model.weights, str(path))
    scale_range, results = (_from_json(model.metadata, key, path) for key in (SCALE_RANGE, RESULTS))
    ours = net if isinstance(net, MoEISR) else None
    return {
        'name': path.stem,
        'file': str(path),
        'bytes': path.stat().st_size,
        'sha256': hashlib.sha256(path.read_bytes()).hexdigest(),
        'network_g': model.network_opt,
        'encoder': model.network_opt.get('encoder', {}).get('type'),
        'decoder': ours and ours.decoder.family,
        'experts': ours and ours.num_experts,
        'parameters': sum(parameter.numel() for parameter in net.parameters()),
        'macs_x4': ours and macs_x4(ours, results or []),
        'scale_range': scale_range,
        'results': results or [],
        'metadata': {key: value for key, value in model.metadata.items() if key not in (*STRUCTURES, 'network_g')},
    }


def results_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The means of every dataset in the results that `basicsr test` writes (see `schema`): what metadata holds."""
    kept = ('dataset', 'scale', 'count', 'metrics', 'routing')
    return [{key: row[key] for key in kept if key in row} for row in document['rows'] if row['case'] == 'mean']


def macs_x4(net: MoEISR, results: list[dict[str, Any]]) -> dict[str, float | None]:
    """Decoder MACs per output pixel at x4: as routed in the first measurement at x4, and dense."""
    measured = [row['routing'] for row in results if row['scale'] == [4, 4] and 'routing' in row]
    routing = [{'shares': [1.0]}] if net.num_experts == 1 else measured
    counts = decoder_macs(net.decoder, LQ_SIZE, SIZE, routing[0].get('lr_reads') if routing else None)
    return {
        'routed': counts.total(routing[0]['shares']) if routing else None,
        'dense': dense_folded_macs(net.decoder, LQ_SIZE, SIZE),
    }


def psnr_of(row: dict[str, Any]) -> tuple[float, float | None] | None:
    """PSNR of one row of results, and its gain over bicubic if that was measured; None where it has no PSNR."""
    metrics = row['metrics']
    name = next((name for name in metrics if name.startswith('psnr')), None)
    if name is None or metrics[name] is None:
        return None
    bicubic = metrics.get(f'bicubic_{name}')
    return metrics[name], None if bicubic is None else metrics[name] - bicubic


def _from_json(metadata: dict[str, str], key: str, path: Path) -> Any:
    if key not in metadata:
        return None
    try:
        value = json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its metadata '{key}' is not JSON ({error}).") from error
    if found := schema.problem(value, STRUCTURES[key], key):
        raise UserError(f'{path}: its metadata is wrong: {found}.')
    return value
