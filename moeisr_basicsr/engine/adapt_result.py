"""What came of adapting a network: how far to go from its own weights to the trained ones, measured.

A network that is trained on for other factors becomes better there and, at its own, worse. Weights between its own and
the trained ones keep most of the gain at a part of the loss (Wortsman et al., Robust fine-tuning of zero-shot models,
CVPR 2022). The network's own weights are the baseline, its image resampled: decoders start at zero.
"""

from copy import deepcopy
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import yaml
from basicsr.archs import build_network

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.archs.encoders import resolve_network
from moeisr_basicsr.archs.moeisr_arch import MoEISR
from moeisr_basicsr.atomic_file import write_atomic
from moeisr_basicsr.checkpoint import convert, load_any, read_model, save_model
from moeisr_basicsr.errors import ExitCode, UserError
from moeisr_basicsr.options import parse_options

from .test_loop import RESULTS_FILE, test

FACTORS = (2, 3, 3.3, 4)  # of the comparison
SHARES = (0.25, 0.5, 1.0)  # of the way from the network's own weights to the trained ones
TOLERATED = 0.02  # dB that a factor may lose for the sake of the mean


class Compared(NamedTuple):
    """One row of the comparison at the end."""

    network: str
    psnr: dict[str, float]  # factor, such as 'x3.3' -> mean PSNR of luma in dB
    macs: dict[str, float]  # factor -> thousand multiply-adds per output pixel, encoder included; none for bicubic


def write_better(opt: dict[str, Any], out: Path) -> tuple[list[Compared], float]:
    """Compare the run's weights, and those on the way to them, with the network's own; write the best to `out`.

    Args:
        opt: Options of the run, which has ended.
        out: Model file to write.

    Returns:
        The comparison, and the share of the way to the trained weights that was best in the mean of all factors
        without losing more than `TOLERATED` at any; 0 writes the network with its own image, resampled.
    """
    models = Path('experiments', opt['name'], 'models')
    baseline = {'type': 'FixedScale', 'encoder': opt['network_g']['encoder']}
    start = build_network(deepcopy(baseline))
    bicubic, resampled = measure(opt, baseline, None, f'{opt["name"]}_resampled', 'resampled')
    trained = models / 'trained.safetensors'
    convert(models / 'net_g_latest.pth', trained)
    files = {share: models / f'share_{share:g}.safetensors' for share in SHARES}
    rows, best = [bicubic, resampled], (fmean(resampled.psnr.values()), 0.0)
    for share, file in files.items():
        net = load_any(trained)
        go_back(net, start, share)
        save_model(file, net, read_model(trained).network_opt)
        label = f'adapted {share:.0%}'
        (row,) = measure(opt, opt['network_g'], file, f'{opt["name"]}_share_{share:g}', label)
        rows.append(row)
        losses = [own - value for own, value in zip(resampled.psnr.values(), row.psnr.values())]
        if max(losses) <= TOLERATED:
            best = max(best, (fmean(row.psnr.values()), share))
    share = best[1]
    if share:
        write_atomic(out, lambda stream: stream.write(files[share].read_bytes()))
    else:
        save_model(out, start, resolve_network(baseline, start))
    return rows, share


@torch.no_grad()
def go_back(net: MoEISR, start: MoEISR, share: float) -> None:
    """Leave `share` of the way from `start` that training went, in the encoder's weights and the decoders' output."""
    own = start.encoder.state_dict()
    for name, trained in net.encoder.state_dict().items():
        if trained.is_floating_point():
            trained.copy_(own[name].lerp(trained, share))
    net.decoder.pool.scale_output(share)


def measure(opt: dict[str, Any], network_g: dict, weights: Path | None, name: str, label: str) -> list[Compared]:
    """One network on the validation images, at `FACTORS`; before the one without trained weights, bicubic."""
    images = {key: value for key, value in opt['datasets']['val'].items() if key not in ('name', 'scale')}
    data = {
        'name': name,
        'model_type': opt['model_type'],
        'num_gpu': opt['num_gpu'],
        'network_g': network_g,
        'datasets': {
            f'test_{number}': {**images, 'name': f'val_x{factor}', 'scale': factor}
            for number, factor in enumerate(FACTORS)
        },
        'path': {'pretrain_network_g': str(weights)} if weights else {},
        'val': {
            **{key: value for key, value in opt['val'].items() if key != 'val_freq'},
            'needs_weights': weights is not None,
            'bicubic_baseline': weights is None,
        },
    }
    path = Path('experiments', f'test_{name}.yml')
    write_text(path, yaml.safe_dump(data, sort_keys=False))
    code = test(options_of(path, is_train=False))
    if code not in (ExitCode.OK, ExitCode.IMAGES_FAILED):
        raise UserError(f'the comparison at the end was stopped (exit code {code}); the same command goes on with it.')
    file = Path('results', name, RESULTS_FILE)
    rows = [row for row in schema.load(file)['rows'] if row['case'] == 'mean']  # a damaged image is in none of them
    if len(rows) < len(FACTORS):
        raise UserError(f'the comparison at the end has no image that can be used at every factor: see {file}.')
    factors = [schema.scale_label(row['scale']) for row in rows]
    macs = {at: row['macs']['total'] / 1e3 for at, row in zip(factors, rows)}
    own_row = Compared(label, {at: row['metrics']['psnr'] for at, row in zip(factors, rows)}, macs)
    if weights is not None:
        return [own_row]
    return [Compared('bicubic', {at: row['metrics']['bicubic_psnr'] for at, row in zip(factors, rows)}, {}), own_row]


def options_of(path: Path, is_train: bool = True, auto_resume: bool = False) -> dict[str, Any]:
    """The checked options of a file, as the commands get them."""
    arguments = SimpleNamespace(opt=str(path), force_yml=None, launcher='none', auto_resume=auto_resume, debug=False)
    return parse_options(arguments, str(Path.cwd()), is_train)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(f'{text}\n'.encode()))
