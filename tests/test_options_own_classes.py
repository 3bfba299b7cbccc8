"""A new dataset, encoder, loss and metric in a file of the user's: trained, checked and listed, nothing else edited."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from options_cases import GOOD, line_of, swap, write
from PIL import Image

from moeisr_basicsr.cli import main

MINE = '''
from typing import Annotated, Literal

import torch
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY
from pydantic import Field

from moeisr_basicsr.core.decoder import register_family
from moeisr_basicsr.core.liif import ExpertPool
from moeisr_basicsr.options.values import Key, Positive, Section


@ARCH_REGISTRY.register()
class PlainEncoder(torch.nn.Module):
    """One convolution.

    Args:
        num_in_ch: Channels of the image.
        width: Channels of the
            features.
    """

    def __init__(self, num_in_ch: int, width: Positive = 4, kind: Literal['plain', 'fancy'] = 'plain'):
        super().__init__()
        if width % 2:
            raise ValueError(f'width must be even; got {width}.')
        self.num_feat = width
        self.conv = torch.nn.Conv2d(num_in_ch, width, 3, padding=1)

    def forward(self, x):
        return self.conv(x)


@LOSS_REGISTRY.register()
class PowerLoss(torch.nn.Module):
    def __init__(self, loss_weight: float = 1.0, power: Annotated[float, Field(gt=0, le=4)] = 2):
        super().__init__()
        self.loss_weight, self.power = loss_weight, power

    def forward(self, output, gt, weight=None):
        return self.loss_weight * (output - gt).abs().pow(self.power).mean()


class StripeOptions(Section):
    size: Positive = Key('rows and columns of the LR image', 8)
    colours: list[Positive] = Key('how many stripes')


@DATASET_REGISTRY.register()
class StripeDataset(torch.utils.data.Dataset):
    Options = StripeOptions

    def __init__(self, opt):
        self.size, self.colours = opt['size'], opt['colours']

    def __len__(self):
        return 4

    def __getitem__(self, index):
        gt = torch.linspace(0, 1, 2 * self.size).expand(3, 2 * self.size, 2 * self.size).contiguous()
        return {'lq': gt[:, ::2, ::2], 'gt': gt, 'lq_path': f'{index}.png', 'gt_path': f'{index}.png'}


@DATASET_REGISTRY.register()
class FreeDataset(StripeDataset):
    Options = None


@METRIC_REGISTRY.register()
def calculate_bias(img, img2, channel: Literal[0, 1, 2] = 0):
    return float((img - img2)[..., channel].mean())


@register_family('point')
class PointExperts(ExpertPool):
    """An expert reads the latent code of its corner and where it is.

    Args:
        gain: Factor on the relative coordinate.
    """

    def __init__(self, in_channels, out_channels, experts, gain: Positive, shared_layers=0):
        super().__init__(in_channels + 2, out_channels, experts, shared_layers)
        self.in_channels, self.gain = in_channels, gain

    def tables(self, feat, padding=1, cell_lr=None, reads=None):
        return [(feat if padding else feat[..., 1:-1, 1:-1]).flatten(2).transpose(1, 2)]

    def enter(self, j, tables, queries):
        return 0, torch.cat([queries.gather(tables[0]), self.gain * queries.rel.flatten(0, 1).to(tables[0])], dim=-1)

    def macs(self, j):
        *hidden, last = self.linears(j)
        return 4 * sum(layer.weight.numel() for layer in hidden) + last.weight.numel()

    def own_table_macs(self, j):  # expert j's alone, per LR pixel
        return 0

    def table_macs(self, reads=None):  # of all experts
        return 0
'''

COMMANDS = """
train -opt run.yml
convert experiments/run/models/net_g_latest.pth -o m.safetensors
upscale {image} --model m.safetensors -o large.png --scale 2 --expert-map
test -opt test.yml
models m.safetensors --json
profile --model m.safetensors --scale 2 --lq-size 9x8 --repeats 1 --json p.json --plot p.png
"""

DATASET = """\
    type: StripeDataset
    size: 6
    colours: [2, 3]
"""


def text(dataset=DATASET):
    """An options file that names all of them."""
    images = GOOD[GOOD.index('    type: Arb') : GOOD.index('    batch_size')]
    result = swap(images, dataset).replace('num_gpu: auto', 'num_gpu: 0').replace('total_iter: 1e2', 'total_iter: 2')
    result = result.replace(
        '    type: EDSREncoder\n    num_feat: 8\n    num_block: 1', '    type: PlainEncoder\n    width: 6'
    )
    result = result.replace('type: L1Loss', 'type: PowerLoss\n    power: 1.5')
    return result.replace('      type: calculate_psnr_sr\n      protocol: benchmark', '      type: calculate_bias')


@pytest.fixture
def mine(images_here):
    (images_here / 'mine.py').write_text(MINE)
    return images_here


def basicsr(*lines):
    """Command lines in a process of its own: what they register stays there. Exit codes and the two outputs."""
    code = f"""
from moeisr_basicsr.cli import main
print([int(main([*line.split(), '--import', 'mine.py'])) for line in {lines}])
"""
    environment = {'PYTHONPATH': str(Path(__file__).resolve().parents[1]), 'PATH': '/usr/bin:/bin'}
    command = [sys.executable, '-c', code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout, done.stderr


def test_they_train(mine):
    """Without `Options` the keys of a dataset pass as they are."""
    names = 'StripeDataset', 'FreeDataset'
    for name in names:
        write(text(DATASET.replace('StripeDataset', name)).replace('name: run', f'name: {name}'), f'{name}.yml')
    codes, _, errors = basicsr(*(f'train -opt {name}.yml --force_yml val=none' for name in names))
    assert codes == [0, 0], errors[-2000:]
    for name in names:
        records = Path(f'experiments/{name}/metrics.jsonl').read_text().splitlines()
        assert any('l_pix' in str(json.loads(record)) for record in records)


def test_their_options_are_checked(mine):
    wrong = (
        text(DATASET.replace('size: 6', 'sise: 6'))
        .replace('width: 6', 'width: 0\n    kind: fanci')
        .replace('power: 1.5', 'power: 5')
        .replace('type: calculate_bias', 'type: calculate_bias\n      channel: 3')
    )
    write(wrong)
    write(text(DATASET.replace('    colours: [2, 3]\n', '')).replace('width: 6', 'width: 5'), 'other.yml')
    write(text().replace('  encoder:', '  decoder: point\n  gian: 3\n  encoder:'), 'point.yml')
    codes, _, errors = basicsr(*(f'train -opt {name}.yml' for name in ('run', 'other', 'point')))
    expected = {
        'sise': "datasets: train: sise: unknown key. Did you mean 'size'?",
        'width': 'network_g: encoder: width: must be a whole number of at least 1; got 0.',
        'kind': "network_g: encoder: kind: must be one of plain, fancy; got 'fanci'. Did you mean 'fancy'?",
        'power': 'train: pixel_opt: power: must be a number above 0 and at most 4; got 5.',
        'channel': 'val: metrics: psnr: channel: must be one of 0, 1, 2; got 3.',
    }
    found = [line.strip() for line in errors.splitlines() if 'run.yml:' in line]
    assert codes == [2, 2, 2] and len(found) == len(expected), errors
    for line, (key, message) in zip(found, expected.items()):
        assert line.endswith(f'run.yml:{line_of(wrong, key + ":")}: {message}')
    for words in (
        "datasets: train: the key 'colours' is missing (how many stripes).",
        'network_g: MoEISR cannot be built from these options: width must be even; got 5.',
        "network_g: gian: unknown key. Did you mean 'gain'?",
        "network_g: the key 'gain' is missing (Factor on the relative coordinate",
    ):
        assert words in errors


def test_a_decoder_family_goes_through_every_command(mine):
    """Named in an options file, its own option with it; the weights of the trained network are used by the others."""
    options = text().replace('  encoder:', '  decoder: point\n  gain: 3\n  encoder:')
    network = yaml.safe_load(options)['network_g']
    (image, *_) = sorted(mine.glob('*/*.png'))
    dataset = {'name': 'Set_x2', 'type': 'ArbitraryScaleImageDataset', 'dataroot_gt': str(image.parent), 'scale': 2}
    head = {'name': 'run', 'model_type': 'MoEISRModel', 'num_gpu': 0, 'network_g': network}
    rest = {'datasets': {'test': dataset}, 'path': {'pretrain_network_g': 'experiments/run/models/net_g_latest.pth'}}
    Path('test.yml').write_text(yaml.safe_dump({**head, **rest}))
    write(options)
    lines = COMMANDS.format(image=image).strip().splitlines()
    codes, output, errors = basicsr(*(line + ' --force_yml val=none' * ('run.yml' in line) for line in lines))
    assert not any(codes), (codes, output, errors)
    row = json.loads(Path('p.json').read_text())['rows'][0]
    with Image.open('large.png') as large, Image.open(image) as small:
        assert large.size == (2 * small.width, 2 * small.height)
    # 6 features and 2 coordinates to 8 hidden values, at four corners; then 3 colours
    assert row['macs']['each_expert'][0] == 4 * (6 + 2) * 8 + 8 * 3 and 'dense_plain' not in row['time_ms']


def test_an_error_in_an_import_names_the_file(images_here, capsys):
    Path('broken_import.py').write_text('1 / 0')
    Path('json.py').write_text('')
    for name, message in (('broken_import', 'ZeroDivisionError'), ('json', 'another module is called json')):
        assert main(['models', '--import', f'./{name}.py']) == 2
        assert f'--import ./{name}.py: {message}' in capsys.readouterr().err


def test_they_are_listed(mine):
    codes, output, errors = basicsr('train --keys --markdown')
    assert codes == [0], errors[-2000:]
    for row in (
        '## network_g (PlainEncoder)',
        '| `gain` | a whole number of at least 1 | required | Factor on the relative coordinate. |',
        '| `width` | a whole number of at least 1 | 4 | Channels of the features. |',
        '| `colours` | a list of entries, each a whole number of at least 1 | required | how many stripes |',
        '| `power` | a number above 0 and at most 4 | 2 |  |',
    ):
        assert row in output


def test_every_key_is_on_the_page_with_value_and_meaning(capsys):
    assert main(['test', '--keys']) == 0
    shown = capsys.readouterr().out
    assert 'train: tau' not in shown and '  val: budget\n' in shown
    assert main(['train', '--keys', '--markdown']) == 0
    rows = [line.split(' | ') for line in capsys.readouterr().out.splitlines() if line.startswith('| `')]
    own = [row for row in rows if row[0].startswith(('| `train: ', '| `val: ', '| `logger: ', '| `path: '))]
    assert len(own) > 40 and all(len(row) == 4 and row[1] and row[3].strip(' |') for row in own)
    assert ['| `val: precision`', 'one of fp32, bf16, fp16', 'fp32', 'number format of encoder and experts |'] in rows
