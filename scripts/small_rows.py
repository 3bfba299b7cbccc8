"""The comparison in RESULTS.md: every row under one recipe, trained and evaluated by name.

    python scripts/small_rows.py list
    python scripts/small_rows.py train liif_seed0 moeisr_liif_seed0 moeisr_j_liif_seed0
    python scripts/small_rows.py test liif_seed0 moeisr_liif_seed0 moeisr_j_liif_seed0
    python scripts/small_rows.py test moeisr_j_liif_seed0 --cost-weight 2 --sets Set5 B100 --suffix _cost_weight_2

Run from the folder that holds `datasets` (see options/test_small.yml and scripts/make_training_set.py). A row is an
options file with a few changes; the main rows share data, iterations and seeds. Each command is printed as the
`basicsr` command that it is. Training goes on where an interrupted run stopped.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options import force

OPTIONS = Path(__file__).resolve().parents[1] / 'options'
TEST_OPTIONS = OPTIONS / 'test_small.yml'
SEEDS = (0, 1, 2)
ITERATIONS, ENCODER_ITERATIONS = 6000, 2000
MAIN = ('liif', 'moeisr_liif', 'moeisr_j_liif', 'lte', 'moeisr_lte', 'moeisr_j_lte')  # options/small_NAME.yml
CONTROL_WIDTHS = (64, 128, 192, 256)  # of two hidden layers: dense decoders of less cost
# Experts of one to four hidden layers, whose hidden layers can be those of one network.
NESTED = 'network_g:experts=[[256], [256, 256], [256, 256, 256], [256, 256, 256, 256]]'
ENCODERS = {
    'rdn': '{type: RDNEncoder, num_feat: 32, num_block: 4, num_conv: 4, growth: 16}',
    'swinir': '{type: SwinIREncoder, embed_dim: 32, depths: [2, 2], num_heads: [4, 4], window_size: 8, mlp_ratio: 2}',
}
ABLATIONS = {  # one change of MoEISR, or of MoEISR-J; seed 0
    'mapper_1_layer': ('small_moeisr_liif', 'network_g:mapper:num_layers=1'),
    'lr_pixel': ('small_moeisr_liif', 'network_g:mapper:granularity=lr_pixel'),
    'balance_0.0005': ('small_moeisr_liif', 'train:balance_opt:loss_weight=0.0005'),
    'balance_0.05': ('small_moeisr_liif', 'train:balance_opt:loss_weight=0.05'),
    'tau_5': ('small_moeisr_liif', 'train:tau=5.0'),
    'tau_annealed': ('small_moeisr_liif', 'train:tau=[5.0, 0.5]'),
    'j_mapper_1_layer': ('small_moeisr_j_liif', 'network_g:mapper:num_layers=1'),
    'j_output_pixel': ('small_moeisr_j_liif', 'network_g:mapper:granularity=output_pixel'),
    'j_shared_all': ('small_moeisr_j_liif', NESTED, 'network_g:shared_layers=4'),
    'j_shared_first': ('small_moeisr_j_liif', NESTED, 'network_g:shared_layers=1'),
    'j_shared_none': ('small_moeisr_j_liif', NESTED, 'network_g:shared_layers=0'),
}
# Decoders on the features of a trained network that stays as it is: what each learns in a short time, at which cost.
# The checkpoint lies in the folder that the rows are run from.
FROZEN_ITERATIONS = 600
FROZEN = (
    'network_g:encoder={type: NetworkEncoder, checkpoint: networks/SMFANet_DIV2K_100w_x4SR.pth}',
    f'train:fix_encoder={FROZEN_ITERATIONS}',
    'train:ema_decay=0.98',
)
LM_EXPERTS = '[[], {latent: [16], depth: 2}, {latent: [64], depth: 4}, {latent: [208], depth: 6}]'
FROZEN_DECODERS = {
    'liif': ('small_liif',),
    'lte': ('small_lte',),
    'lm': ('small_liif', 'network_g:type=LMLIIF'),
    'moeisr_j_liif': ('small_moeisr_j_liif',),
    'moeisr_j_lm': (
        'small_moeisr_j_liif',
        'network_g:decoder=lm',
        f'network_g:experts={LM_EXPERTS}',
        'network_g:mapper={num_layers: 1, num_feat: 16, granularity: lr_pixel}',
        'train:balance_opt:target=[0.25, 0.25, 0.25, 0.25]',
    ),
}


class Row(NamedTuple):
    """One network of the comparison."""

    options: str  # options/<this>.yml
    iterations: int
    changes: tuple[str, ...] = ()  # as for --force_yml


def seeds(kind: str, options: str, *changes: str, iterations: int = ITERATIONS) -> dict[str, Row]:
    return {f'{kind}_seed{seed}': Row(options, iterations, (f'manual_seed={seed}', *changes)) for seed in SEEDS}


def all_rows() -> dict[str, Row]:
    """The main rows, smaller dense decoders, ablations, other encoders."""
    rows: dict[str, Row] = {}
    for kind in MAIN:
        rows |= seeds(kind, f'small_{kind}')
    for width in CONTROL_WIDTHS:
        rows |= seeds(f'liif_2x{width}', 'small_liif', f'network_g:hidden_list=[{width}, {width}]')
    for name, (options, *changes) in ABLATIONS.items():
        rows[f'ablation_{name}'] = Row(options, ITERATIONS, tuple(changes))
    for name, encoder in ENCODERS.items():
        for kind in ('liif', 'moeisr_liif', 'moeisr_j_liif'):
            rows[f'{name}_{kind}'] = Row(f'small_{kind}', ENCODER_ITERATIONS, (f'network_g:encoder={encoder}',))
    for kind, (options, *changes) in FROZEN_DECODERS.items():
        rows |= seeds(f'frozen_{kind}', options, *FROZEN, *changes, iterations=FROZEN_ITERATIONS)
    return rows


ROWS = all_rows()


def forced(row: Row, name: str) -> list[str]:
    return ['--force_yml', f'name={name}', f'train:total_iter={row.iterations}', *row.changes]


def basicsr(*words: str) -> int:
    print('\n$ basicsr ' + ' '.join(f'"{word}"' if ' ' in word else word for word in words), flush=True)
    return subprocess.run([sys.executable, '-m', 'moeisr_basicsr', *words]).returncode


def train(name: str, iterations: int | None) -> int:
    row = ROWS[name]
    row = row if iterations is None else row._replace(iterations=iterations)
    return basicsr('train', '-opt', str(OPTIONS / f'{row.options}.yml'), '--auto_resume', *forced(row, name))


def test_options(name: str, args: argparse.Namespace) -> dict:
    """options/test_small.yml with the row's network and weights and what the command line asks for."""
    opt = yaml.safe_load(TEST_OPTIONS.read_text())
    row = ROWS[name]
    trained = yaml.safe_load((OPTIONS / f'{row.options}.yml').read_text())
    for change in row.changes:
        force(trained, change)
    models = Path('experiments') / name / 'models'
    weights = Path(args.weights) if args.weights else models / f'net_g_{args.iterations or "latest"}.pth'
    datasets = {key: entry for key, entry in opt['datasets'].items() if wanted(entry['name'], args.sets)}
    if not datasets:
        raise UserError(f'--sets {" ".join(args.sets)}: no dataset of {TEST_OPTIONS.name} is called so.')
    if not weights.exists():
        raise UserError(f'{weights} is missing: train the row first.')
    averaged = weights.suffix == '.pth' and trained['train'].get('ema_decay', 0) > 0
    return {
        **opt,
        'name': name + args.suffix,
        'network_g': trained['network_g'],
        'model_type': trained['model_type'],
        'datasets': datasets,
        'path': {
            'pretrain_network_g': str(weights),
            'strict_load_g': True,
            'param_key_g': args.param_key or ('params_ema' if averaged else 'params'),
        },
        'val': {
            **opt['val'],
            **control(args),
            'save_img': args.pictures,
            'save_expert_map': args.pictures,
            'save_references': args.pictures,
        },
    }


def wanted(dataset: str, sets: list[str] | None) -> bool:
    """Whether `Set5_x2` is meant by one of `Set5`, `x2`, `Set5_x2`."""
    return not sets or any(entry in (dataset, dataset.rpartition('_')[0], dataset.rpartition('_')[2]) for entry in sets)


def control(args: argparse.Namespace) -> dict:
    """Keys of `val`."""
    keys = {
        'budget': args.budget,
        'cost_weight': args.cost_weight,
        'precision': args.precision,
        'shuffle_experts': args.shuffle or None,
    }
    return {key: value for key, value in keys.items() if value is not None}


def test(name: str, args: argparse.Namespace) -> int:
    """Results go to results/NAME, or results/NAMESUFFIX."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f'test_{name}.yml'
        path.write_text(json.dumps(test_options(name, args), indent=2))  # JSON is YAML
        return basicsr('test', '-opt', str(path))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('list', help='the rows')
    for command in ('train', 'test'):
        sub = commands.add_parser(command)
        sub.add_argument('rows', nargs='+', choices=list(ROWS), metavar='ROW')
        sub.add_argument('--iterations', type=int, help='train: as many in all; test: the checkpoint of that iteration')
    sub.add_argument('--weights', help='a model file of the row in place of its checkpoint')
    sub.add_argument(
        '--param-key', choices=('params', 'params_ema'), help='default: averaged weights where the row trains them'
    )
    sub.add_argument('--sets', nargs='+', help='only these, for example Set5 B100_x4 x2')
    sub.add_argument('--budget', type=float, help='decoder cost, 1 being the most expensive expert everywhere')
    sub.add_argument('--cost-weight', type=float, help='above 0: cheaper than trained')
    sub.add_argument('--precision', choices=('fp32', 'bf16'))
    sub.add_argument('--shuffle', action='store_true', help='the chosen experts in random places: a control')
    sub.add_argument('--pictures', action='store_true', help='save images and expert maps')
    sub.add_argument('--suffix', default='', help='of the name of the results folder')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0, or the exit code of the first command that failed; 2 for a mistake of the user, in one line."""
    args = parse_arguments(argv)
    if args.command == 'list':
        for name, row in ROWS.items():
            print(f'{name:32} {row.options}.yml {row.iterations:5} {" ".join(row.changes)}')
        return 0
    try:
        for name in args.rows:
            code = train(name, args.iterations) if args.command == 'train' else test(name, args)
            if code != 0:
                return code
    except UserError as error:
        print(f'small_rows: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
