"""Put a trained model into the package: `moeisr_basicsr/weights/NAME.safetensors` and its card `NAME.md`.

    basicsr convert experiments/NAME/models/net_g_latest.pth -o NAME.safetensors --store fp16
    basicsr test -opt options/test_NAME.yml --force_yml path:pretrain_network_g=NAME.safetensors
    python scripts/ship_model.py NAME.safetensors --name NAME --recipe options/NAME.yml \\
        --results results/test_NAME/results.json

Measured is the file that is shipped. The first step may be left out and the checkpoint named in its place. The recipe
says factors and iterations, --force_yml what the training changed of it. The card follows scripts/model_card.md: change
the text there, and run this again. `moeisr_basicsr/shipped.py` names the default model; the tests check every file.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jinja2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

from moeisr_basicsr import shipped
from moeisr_basicsr.analysis import schema
from moeisr_basicsr.atomic_file import link_or_copy, write_atomic
from moeisr_basicsr.checkpoint import STORES, convert
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options import force, read_yaml
from moeisr_basicsr.tools.model_summary import psnr_of, results_of, summarize_model

# What the metadata and the card say of every model that is shipped.
NOTES = {
    'summary': 'General-purpose upscaling of photographs by any factor.',
    'training_data': 'BSDS500 (training and test splits) and high-resolution photographs',
    'license': 'Apache-2.0, as the code. The training images have terms of their own, see Data; whether those reach '
    'weights that were trained on them is for every user to judge.',
}


def main(argv: list[str] | None = None) -> int:
    """Ship one model; returns the exit code."""
    args = parse_arguments(argv)
    try:
        path = ship(args)
    except (UserError, OSError) as error:
        print(f'ship_model: error: {error}', file=sys.stderr)
        return 2
    together = sum(file.stat().st_size for file in shipped.FOLDER.iterdir())
    print(f'{path} and {path.with_suffix(".md").name}; all shipped models take {together / 2**20:.2f} MiB')
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='model file, or .pth of the training')
    parser.add_argument('--name', required=True, help='what users write after --model')
    parser.add_argument('--recipe', required=True, metavar='YAML', help='options file of the training')
    parser.add_argument('--results', required=True, metavar='JSON', help='results.json of `basicsr test` on this model')
    parser.add_argument('--force_yml', nargs='+', default=[], metavar='KEY:KEY=VALUE', help='its changes of the recipe')
    parser.add_argument('--store', choices=STORES, default='fp16', help='number format in the file (default fp16)')
    return parser.parse_args(argv)


def ship(args: argparse.Namespace) -> Path:
    """Write model file and card; both are made in full before either is put into the package.

    Raises:
        UserError: An argument is wrong, the results are those of another network, or the checkpoint lacks something.
    """
    document = schema.load(args.results)
    notes = {**NOTES, **recipe_notes(args.recipe, args.force_yml), 'results': json.dumps(results_of(document))}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f'{args.name}.safetensors'
        convert(args.checkpoint, made, store=args.store, notes=notes)
        summary = summarize_model(made)
        if document['model'] is None or document['model']['parameters']['total'] != summary['parameters']:
            raise UserError(f'{args.results}: these are the results of another network.')
        text = card(summary, args.store)
        shipped.FOLDER.mkdir(exist_ok=True)
        path = link_or_copy(made, shipped.FOLDER / made.name)
    write_atomic(path.with_suffix('.md'), lambda file: file.write(text.encode()))
    return path


def recipe_notes(recipe: str, changes: list[str]) -> dict[str, str]:
    """What the metadata says of the training.

    Raises:
        UserError: The recipe cannot be read, or does not say the factors or the iterations.
    """
    data = read_yaml(recipe).data
    for entry in changes:
        force(data, entry)
    try:
        scale_range, iterations = data['datasets']['train']['scale_range'], data['train']['total_iter']
    except (KeyError, TypeError) as error:
        raise UserError(f'{recipe} needs datasets: train: scale_range, and train: total_iter.') from error
    name = ' '.join([Path(recipe).name, *(['with', *changes] if changes else [])])
    return {'recipe': name, 'iterations': str(int(iterations)), 'scale_range': json.dumps(scale_range)}


def card(summary: dict[str, Any], store: str) -> str:
    """The model card's text.

    Raises:
        UserError: The checkpoint does not say which of its weights these are.
    """
    if 'param_key' not in summary['metadata']:
        raise UserError(
            'the file does not say whether these are the averaged weights (params_ema): convert the '
            'checkpoint of the training.'
        )
    text = Path(__file__).with_name('model_card.md').read_text(encoding='utf-8')
    template = jinja2.Template(text, trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return template.render(summary, store=store, psnr_of=psnr_of)


if __name__ == '__main__':
    sys.exit(main())
