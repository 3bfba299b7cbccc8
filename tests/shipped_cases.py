"""Stand-ins for shipped models, and what every shipped file must be."""

import hashlib
import json
from pathlib import Path

import torch
from basicsr.archs import build_network

from moeisr_basicsr.checkpoint import load_model, read_model, save_model
from moeisr_basicsr.errors import UserError

LIMIT = 10_000_000  # bytes, all models and cards together
METADATA = (
    'source',
    'param_key',
    'recipe',
    'iterations',
    'scale_range',
    'training_data',
    'license',
    'summary',
    'results',
)
HEADINGS = ('## Data', '## Recipe', '## Results', '## License', '## Limits')
NETWORK = {
    'type': 'MoEISR',
    'encoder': {'type': 'EDSREncoder', 'num_feat': 4, 'num_block': 1},
    'experts': [[4], [4, 4]],
    'mapper': {'num_layers': 1, 'num_feat': 4},
    'skip': 'bicubic',
}
RESULTS = [
    {
        'dataset': 'Set5_x4',
        'scale': [4.0, 4.0],
        'count': 5,
        'metrics': {'psnr': 30.5, 'bicubic_psnr': 28.25},
        'routing': {'shares': [0.75, 0.25], 'mean_cost': 0.6},
    }
]
NOTES = {
    'source': 'net_g_latest.pth',
    'param_key': 'params_ema',
    'recipe': 'tiny.yml',
    'iterations': '7',
    'scale_range': '[1, 4]',
    'training_data': 'none',
    'license': 'none',
    'summary': 'A stand-in.',
    'results': json.dumps(RESULTS),
}


def stand_in(folder, name, network=NETWORK, **notes):
    """An untrained model and a card, as a shipped model has them; returns the model file."""
    path = Path(folder) / f'{name}.safetensors'
    torch.manual_seed(len(name))
    net = build_network(network)
    save_model(path, net, network, **{**NOTES, **notes})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix('.md').write_text('\n'.join([f'# {name}', digest, f'{count(net):,}', *HEADINGS]))
    return path


def count(net):
    """Its parameters."""
    return sum(value.numel() for value in net.parameters())


def problems(folder, default):
    """What is wrong with a folder of shipped models, one readable line each."""
    files = sorted(folder.iterdir())
    models = [path for path in files if path.suffix == '.safetensors']
    found = [
        f'{path.name} belongs to no model'
        for path in files
        if path not in models and path.with_suffix('.safetensors') not in models
    ]
    total = sum(path.stat().st_size for path in files)
    if total > LIMIT:
        found.append(f'all files take {total} bytes; {LIMIT} are allowed')
    if default not in [path.stem for path in models]:
        found.append(f'the default {default} is not there')
    return found + [line for path in models for line in problems_of(path)]


def problems_of(path):
    try:
        net, metadata = load_model(path), read_model(path).metadata
    except UserError as error:
        return [str(error)]
    found = [f'{path.name}: metadata {key} is missing' for key in METADATA if not metadata.get(key)]
    if metadata.get('param_key') != 'params_ema':
        found.append(f'{path.name}: these are not the averaged weights')
    card = path.with_suffix('.md')
    if not card.is_file():
        return [*found, f'{card.name} is missing']
    text = card.read_text(encoding='utf-8')
    facts = {
        'SHA-256': hashlib.sha256(path.read_bytes()).hexdigest(),
        'parameters': f'{count(net):,}',
        'title': f'# {path.stem}\n',
        **{heading: heading for heading in HEADINGS},
    }
    return found + [f'{card.name}: {what} is missing or wrong' for what, words in facts.items() if words not in text]
