"""The tables of RESULTS.md and README.md as Markdown, from what `scripts/small_rows.py test` left in `results`.

    python scripts/small_tables.py                  # all
    python scripts/small_tables.py liif             # one; see --help
    python scripts/small_tables.py --results DIR    # in place of results

A cell is PSNR in dB, with half the range where there are several seeds, and the multiply-adds of mapper, LR tables and
chosen experts per output pixel, in per cent of the dense decoder as published. It is empty where there are no results.
"""

import argparse
import re
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.errors import UserError

SETS = ('Set5', 'Set14', 'B100')
CROPS = 'DIV2K_valid_crop256'


class Model(NamedTuple):
    """What one column or row shows."""

    names: str  # of the results folders; * stands for the seed
    dense: str = 'liif_seed*'  # whose decoder as published is 100 %
    prefix: str = ''  # of the metric


class Table(NamedTuple):
    """Models by datasets; the longer list goes down the page."""

    models: dict[str, Model]
    datasets: list[str]


def datasets(sets: tuple[str, ...], *factors: float | str) -> list[str]:
    return [f'{name}_x{factor}' for name in sets for factor in factors]


def compared(family: str) -> dict[str, Model]:
    """The dense decoder, the paper's method and ours."""
    dense, label = f'{family}_seed*', family.upper()
    return {
        'bicubic': Model(dense, '', 'bicubic_'),
        f'dense {label}': Model(dense, dense),
        f'MoEISR-{label}': Model(f'moeisr_{family}_seed*', dense),
        f'MoEISR-J-{label} (ours)': Model(f'moeisr_j_{family}_seed*', dense),
    }


def controls() -> dict[str, Model]:
    """What routing is worth: other controls of it, the chosen experts in random places, smaller dense decoders."""
    models = {}
    for method, name in (('MoEISR', 'moeisr_liif'), ('MoEISR-J', 'moeisr_j_liif')):
        models[method] = Model(f'{name}_seed*')
        models[f'{method}, shuffled'] = Model(f'{name}_seed*_shuffled')
        models |= {
            f'{method}, cost weight {weight}': Model(f'{name}_seed*_cost_weight_{weight}') for weight in (-0.2, 1, 2, 4)
        }
    models |= {f'dense, 2 layers of {width}': Model(f'liif_2x{width}_seed*') for width in (64, 128, 192, 256)}
    return {**models, 'dense, 4 layers of 256': Model('liif_seed*')}


def ablations() -> dict[str, Model]:
    names = {
        'MoEISR, seed 0': 'moeisr_liif_seed0',
        'mapper of 1 layer': 'ablation_mapper_1_layer',
        'one decision per LR pixel': 'ablation_lr_pixel',
        'balance weight 0.0005': 'ablation_balance_0.0005',
        'balance weight 0.05': 'ablation_balance_0.05',
        'tau 5': 'ablation_tau_5',
        'tau from 5 to 0.5': 'ablation_tau_annealed',
        'MoEISR-J, seed 0': 'moeisr_j_liif_seed0',
        'J: mapper of 1 layer': 'ablation_j_mapper_1_layer',
        'J: one decision per output pixel': 'ablation_j_output_pixel',
        'J: experts share all hidden layers': 'ablation_j_shared_all',
        'J: experts share the first': 'ablation_j_shared_first',
        'J: experts share none': 'ablation_j_shared_none',
    }
    return {label: Model(name) for label, name in names.items()}


def encoders() -> dict[str, Model]:
    kinds = {'dense LIIF': 'liif', 'MoEISR-LIIF': 'moeisr_liif', 'MoEISR-J-LIIF': 'moeisr_j_liif'}
    return {
        f'{label}, {method}': Model(f'{encoder}_{kind}', f'{encoder}_liif')
        for encoder, label in (('rdn', 'RDN'), ('swinir', 'SwinIR'))
        for method, kind in kinds.items()
    }


FEW = ['Set5_x2', 'Set5_x4', 'B100_x4']
TABLES = {
    'liif': Table(compared('liif'), datasets(SETS, 2, 3, 4, 6, 8)),
    'lte': Table(compared('lte'), datasets(SETS, 2, 3, 4, 6, 8)),
    'controls': Table(controls(), datasets(('Set5', 'B100'), 2, 4)),
    'factors': Table(
        compared('liif'), datasets(SETS, 2.5, 3.3, '2x3.5') + datasets((CROPS,), 2, 2.5, 3, 3.3, 4, 6, 8, '2x3.5')
    ),
    'ablations': Table(ablations(), FEW),
    'encoders': Table(encoders(), FEW),
}


class Results:
    """Means over the images of a dataset, of every folder `NAME/results.json` below `folder`."""

    def __init__(self, folder: Path):
        files = sorted(folder.glob('*/results.json'))
        if not files:
            raise UserError(f'{folder} has no NAME/results.json: run `scripts/small_rows.py test` first.')
        self.rows = {
            (file.parent.name, row['dataset']): row
            for file in files
            for row in schema.load(file)['rows']
            if row['case'] == 'mean'
        }

    def seeds(self, names: str, dataset: str) -> list[dict]:
        """The rows of all folders that `names` means."""
        pattern = re.escape(names).replace(r'\*', r'\d+')
        return [row for (name, of), row in self.rows.items() if of == dataset and re.fullmatch(pattern, name)]

    def cell(self, model: Model, dataset: str) -> str:
        """'37.25 ± 0.01, 16.7 %'."""
        rows = self.seeds(model.names, dataset)
        metric = model.prefix + ('psnr_rgb' if dataset.startswith('DIV2K') else 'psnr_y')  # as each is published
        values = [value for row in rows if (value := row['metrics'].get(metric)) is not None]
        parts = [f'{mean(values):.2f}'] if values else []
        if len(values) > 1 and not model.prefix:
            parts = [f'{parts[0]} ± {(max(values) - min(values)) / 2:.2f}']
        costs = [row['macs']['total'] - row['macs']['encoder'] for row in rows if 'macs' in row]
        published = [row['macs']['dense_plain'] for row in self.seeds(model.dense, dataset) if 'macs' in row]
        if costs and published:
            parts.append(f'{100 * mean(costs) / published[0]:.1f} %')
        return ', '.join(parts)


def markdown(table: Table, results: Results) -> str:
    labels = [name.replace(CROPS, 'DIV2K crops').replace('_', ' ') for name in table.datasets]
    cells = [['PSNR, multiply-adds', *labels]]
    cells += [[label, *(results.cell(model, name) for name in table.datasets)] for label, model in table.models.items()]
    if len(table.datasets) > len(table.models):
        cells = [list(column) for column in zip(*cells)]
    lines = ['| ' + ' | '.join(row) + ' |' for row in cells]
    return '\n'.join([lines[0], '|---' * len(cells[0]) + '|', *lines[1:]])


def main(argv: list[str] | None = None) -> int:
    """0, or 2 for a mistake of the user, in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('tables', nargs='*', metavar='TABLE', help=', '.join(TABLES))
    parser.add_argument('--results', type=Path, default=Path('results'), metavar='DIR')
    args = parser.parse_args(argv)
    unknown = set(args.tables) - set(TABLES)
    if unknown:
        parser.error(f'no table is called {", ".join(sorted(unknown))}; there are {", ".join(TABLES)}')
    try:
        results = Results(args.results)
    except UserError as error:
        print(f'small_tables: {error}', file=sys.stderr)
        return 2
    for name in args.tables or TABLES:
        print(f'\n{name}\n\n{markdown(TABLES[name], results)}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
