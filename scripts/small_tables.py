"""The tables of RESULTS.md and README.md as Markdown, from what `scripts/small_rows.py test` left in `results`.

    python scripts/small_tables.py                  # all
    python scripts/small_tables.py differences      # one; see --help
    python scripts/small_tables.py --results DIR    # in place of results

A cell without results stays empty. Multiply-adds are those of mapper, LR tables and chosen experts per output pixel, in
per cent of the dense decoder as published.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.errors import UserError

SETS = ('Set5', 'Set14', 'B100')
SCALES = (2, 3, 4, 6, 8)
THREE = {'Set5_x2': 'Set5 x2', 'Set5_x4': 'Set5 x4', 'B100_x4': 'B100 x4'}  # of the smaller comparisons
BUDGETS = ('0.1', '0.03')  # of the ablations
MOE, MOE_LTE = 'moeisr_liif_routed', 'moeisr_lte_routed'
EQUAL_COST = 'liif_2x192'
SIZES = {
    'dense, 2 layers of 64': 'liif_2x64_seed0',
    'dense, 2 layers of 128': 'liif_2x128_seed0',
    'dense, 2 layers of 192': 'liif_2x192_seed0',
    'dense, 2 layers of 256': 'liif_2x256_seed0',
    'dense, 4 layers of 256': 'liif_seed0',
    'MoEISR, cost weight -0.2': f'{MOE}_seed0_cost_weight_-0.2',
    'MoEISR': f'{MOE}_seed0',
    'MoEISR, cost weight 1': f'{MOE}_seed0_cost_weight_1',
    'MoEISR, cost weight 2': f'{MOE}_seed0_cost_weight_2',
    'MoEISR, cost weight 4': f'{MOE}_seed0_cost_weight_4',
}
ABLATIONS = {
    'mapper fitted, as shipped': f'{MOE}_seed0',
    'mapper of 1 layer instead of 5': 'ablation_mapper_1_layer',
    'decided per output pixel instead of LR cell': 'ablation_pixel',
    'balance weight 0.0005 instead of 0.005': 'ablation_balance_0.0005',
    'balance weight 0.05': 'ablation_balance_0.05',
    'routing trained on factors up to 4 instead of 8': 'ablation_factors_to_4',
    'mapper not restarted': 'ablation_not_restarted',
    'no fit: gates weigh the losses, tau 1': 'ablation_gates',
    'the same, tau 5': 'ablation_gates_tau_5',
    'the same, tau from 5 to 0.5': 'ablation_gates_tau_annealed',
    'straight-through gradients': 'ablation_straight_through',
    'nested experts that share all hidden layers': 'sharing_all',
    'the same, they share the first': 'sharing_first',
    'the same, they share none': 'sharing_none',
}


class Results:
    """Means over the images of a dataset, of every folder `NAME/results.json` below `folder`."""

    def __init__(self, folder: Path):
        files = sorted(folder.glob('*/results.json'))
        if not files:
            raise UserError(f'{folder} has no NAME/results.json: run `scripts/small_rows.py test` first.')
        self.rows = {}
        for file in files:
            rows = schema.load(file)['rows']
            self.rows |= {(file.parent.name, row['dataset']): row for row in rows if row['case'] == 'mean'}

    def psnr(self, name: str, dataset: str, metric: str = 'psnr_y') -> float | None:
        row = self.rows.get((name, dataset))
        return row and row['metrics'][metric]

    def cost(self, name: str, dataset: str, dense: str = 'liif_seed0') -> float | None:
        """Multiply-adds of the decoder in per cent of `dense`'s as published."""
        row, baseline = self.rows.get((name, dataset)), self.rows.get((dense, dataset))
        if row is None or baseline is None:
            return None
        return 100 * (row['macs']['total'] - row['macs']['encoder']) / baseline['macs']['dense_plain']

    def seeds(self, kind: str, of) -> list[float]:
        """`of(name)` for every seed of the row `kind` that has it."""
        names = sorted(
            {
                name
                for name, _ in self.rows
                if name.rpartition('_seed')[0] == kind and name.rpartition('_seed')[2].isdigit()
            }
        )
        return [value for value in map(of, names) if value is not None]

    def scatter(self, kind: str, dataset: str) -> str:
        """Mean and half the range of the seeds."""
        values = self.seeds(kind, lambda name: self.psnr(name, dataset))
        return f'{mean(values):.2f} ± {(max(values) - min(values)) / 2:.2f}' if values else ''

    def mean_psnr(self, kind: str, dataset: str) -> str:
        values = self.seeds(kind, lambda name: self.psnr(name, dataset))
        return f'{mean(values):.2f}' if values else ''

    def mean_cost(self, kind: str, dataset: str, dense: str = 'liif_seed0') -> str:
        values = self.seeds(kind, lambda name: self.cost(name, dataset, dense))
        return percent(mean(values)) if values else ''

    def differences(self, kind: str, other: str, dataset: str) -> list[float]:
        """PSNR of `kind` minus that of `other`, seed by seed."""

        def difference(name):
            values = self.psnr(name, dataset), self.psnr(name.replace(kind, other), dataset)
            return None if None in values else values[0] - values[1]

        return self.seeds(kind, difference)


def percent(value: float | None) -> str:
    return '' if value is None else f'{value:.1f} %'


def decibel(value: float | None) -> str:
    return '' if value is None else f'{value:.2f}'


def both(psnr: float | None, cost: float | None) -> str:
    return ', '.join(filter(None, (decibel(psnr), percent(cost))))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = ['| ' + ' | '.join(line) + ' |' for line in (head, *rows)]
    return '\n'.join([lines[0], '|---' * len(head) + '|', *lines[1:]])


def columns(sets: Iterable[str] = SETS, scales: Iterable[int] = SCALES) -> Iterator[tuple[str, str]]:
    """Names of datasets, and the same for people."""
    for name in sets:
        for scale in scales:
            yield f'{name}_x{scale}', f'{name} x{scale}'


def readme(results: Results) -> str:
    head = 'luma PSNR, dB', 'bicubic', 'LIIF', 'MoEISR-LIIF', 'multiply-adds', 'LTE', 'MoEISR-LTE', 'multiply-adds'
    return table(
        head,
        (
            (
                label,
                decibel(results.psnr(f'{MOE}_seed0', key, 'bicubic_psnr_y')),
                results.mean_psnr('liif', key),
                results.mean_psnr(MOE, key),
                results.mean_cost(MOE, key),
                results.mean_psnr('lte', key),
                results.mean_psnr(MOE_LTE, key),
                results.mean_cost(MOE_LTE, key, 'lte_seed0'),
            )
            for key, label in columns(scales=(2, 3, 4))
        ),
    )


def liif(results: Results) -> str:
    head = (
        'luma PSNR, dB',
        'bicubic',
        'dense LIIF',
        'MoEISR-LIIF',
        'multiply-adds',
        'equal cost',
        'multiply-adds',
        'cost weight 2',
        'multiply-adds',
        'shuffled',
    )
    cheaper, shuffled = f'{MOE}_seed0_cost_weight_2', f'{MOE}_seed0_shuffled'
    return table(
        head,
        (
            (
                label,
                decibel(results.psnr(f'{MOE}_seed0', key, 'bicubic_psnr_y')),
                results.scatter('liif', key),
                results.scatter(MOE, key),
                results.mean_cost(MOE, key),
                results.scatter(EQUAL_COST, key),
                results.mean_cost(EQUAL_COST, key),
                decibel(results.psnr(cheaper, key)),
                percent(results.cost(cheaper, key)),
                decibel(results.psnr(shuffled, key)),
            )
            for key, label in columns()
        ),
    )


def differences(results: Results) -> str:
    """What each seed adds to the means of `liif` and `lte`, and how MoEISR routes."""

    def signed(values):
        return f'{mean(values):+.3f} ({" ".join(f"{value:+.3f}" for value in values)})' if values else ''

    def shares(key):
        routing = (results.rows.get((f'{MOE}_seed0', key)) or {}).get('routing')
        return '' if routing is None else ' '.join(f'{100 * load:.0f}' for load in routing['loads'])

    def texture(key):
        found = results.seeds(
            MOE, lambda name: (results.rows.get((name, key)) or {}).get('routing', {}).get('texture_correlation')
        )
        return ' '.join(f'{value:.2f}' for value in found)

    head = (
        'luma PSNR, dB',
        'minus dense (seeds)',
        'minus equal cost',
        'LTE minus dense',
        'shares of experts, %',
        'correlation with texture',
    )
    return table(
        head,
        (
            (
                label,
                signed(results.differences(MOE, 'liif', key)),
                signed(results.differences(MOE, EQUAL_COST, key)),
                signed(results.differences(MOE_LTE, 'lte', key)),
                shares(key),
                texture(key),
            )
            for key, label in columns()
        ),
    )


def factors(results: Results) -> str:
    """Factors that no benchmark has, and the crops of DIV2K by their own protocol (RGB, borders of scale + 6)."""
    crops = 'DIV2K_valid_crop256'
    keys = {
        f'{name}_{factor}': (f'{name} {factor}', 'psnr_y') for name in SETS for factor in ('x2.5', 'x3.3', 'x2x3.5')
    }
    keys |= {
        f'{crops}_{factor}': (f'DIV2K crops {factor}', 'psnr_rgb')
        for factor in ('x2', 'x2.5', 'x3', 'x3.3', 'x4', 'x6', 'x8', 'x2x3.5')
    }
    return table(
        ('one seed, dB', 'bicubic', 'dense LIIF', 'MoEISR-LIIF', 'multiply-adds'),
        (
            (
                label,
                decibel(results.psnr(f'{MOE}_seed0', key, f'bicubic_{metric}')),
                decibel(results.psnr('liif_seed0', key, metric)),
                decibel(results.psnr(f'{MOE}_seed0', key, metric)),
                percent(results.cost(f'{MOE}_seed0', key)),
            )
            for key, (label, metric) in keys.items()
        ),
    )


def sizes(results: Results) -> str:
    keys = list(columns(('Set5', 'B100'), (2, 4)))
    return table(
        ['one seed, PSNR and multiply-adds', *(label for _, label in keys)],
        (
            [label, *(both(results.psnr(name, key), results.cost(name, key)) for key, _ in keys)]
            for label, name in SIZES.items()
        ),
    )


def lte(results: Results) -> str:
    return table(
        ('luma PSNR, dB', 'dense LTE', 'MoEISR-LTE', 'multiply-adds'),
        (
            (
                label,
                results.scatter('lte', key),
                results.scatter(MOE_LTE, key),
                results.mean_cost(MOE_LTE, key, 'lte_seed0'),
            )
            for key, label in columns()
        ),
    )


def ablations(results: Results) -> str:

    def cell(name, key):
        found = (results.psnr(f'{name}_budget_{budget}', key) for budget in BUDGETS)
        return ' / '.join(f'{value:.3f}' for value in found if value is not None)

    return table(
        [f'PSNR at `--budget {BUDGETS[0]}` / {BUDGETS[1]}', *THREE.values()],
        ([label, *(cell(name, key) for key in THREE)] for label, name in ABLATIONS.items()),
    )


def encoders(results: Results) -> str:
    rows = {
        f'{label}, {kind}': (f'{encoder}_{suffix}', f'{encoder}_liif')
        for encoder, label in (('rdn', 'RDN'), ('swinir', 'SwinIR'))
        for suffix, kind in (('liif', 'dense LIIF'), ('moeisr_liif_routed', 'MoEISR-LIIF'))
    }
    return table(
        ['2,000 iterations', *THREE.values()],
        (
            [label, *(both(results.psnr(name, key), results.cost(name, key, dense)) for key in THREE)]
            for label, (name, dense) in rows.items()
        ),
    )


TABLES = {of.__name__: of for of in (readme, liif, differences, sizes, factors, lte, ablations, encoders)}


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
        print(f'\n{name}\n\n{TABLES[name](results)}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
