"""`basicsr profile` through the command's own entry point, on tiny networks."""

import re

import pytest
import torch
import yaml
from PIL import Image

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.analysis.complexity import (
    decoder_macs,
    dense_folded_macs,
    dense_plain_macs,
    encoder_macs,
    parameters,
)
from moeisr_basicsr.archs.moeisr_arch import LIIF, LMLIIF, MoEISR
from moeisr_basicsr.checkpoint import save_model
from moeisr_basicsr.cli import main
from moeisr_basicsr.inference import upscale

MOEISR = {
    'type': 'MoEISR',
    'encoder': {'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1},
    'decoder': 'liif',
    'experts': [[16], [16, 16], [32, 32, 16]],
    'mapper': {'num_layers': 1, 'num_feat': 8},
}
LTE = {
    'type': 'LTE',
    'encoder': {'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1},
    'hidden_list': [16],
    'hidden_dim': 32,
}


@pytest.fixture(autouse=True)
def _torch_code(monkeypatch):
    monkeypatch.setenv('MOEISR_KERNELS', 'off')  # nothing is compiled here


@pytest.fixture
def options(tmp_path):
    def write(network):
        path = tmp_path / 'net.yml'
        path.write_text(yaml.safe_dump({'network_g': network}))
        return str(path)

    return write


@pytest.fixture
def profile(tmp_path):
    """The rows and results of a run on the CPU, once measured."""

    def run(*words, size='6x9'):
        target = tmp_path / 'out.json'
        size = () if {'--image', '--train'} & set(words) else ('--lq-size', size)
        assert (
            main(['profile', *words, *size, '--repeats', '1', '--device', 'cpu', '--json', str(target), '--overwrite'])
            == 0
        )
        results = schema.load(target)
        return results['rows'], results

    return run


def build(network):
    return MoEISR(**{key: value for key, value in network.items() if key != 'type'}).eval()


def test_results_agree_with_the_closed_forms(profile, options, tmp_path, capsys):
    rows, results = profile('-opt', options(MOEISR), '--scale', '2', '2x3.5', '--plot', str(tmp_path / 'out.png'))
    net = build(MOEISR)
    assert results['command'] == 'profile' and results['model']['network_g'] == MOEISR
    assert results['model']['parameters'] == parameters(net)
    assert [row['size'] for row in rows] == [[12, 18], [12, 32]]
    for row in rows:
        lq_size, size, macs = (6, 9), tuple(row['size']), row['macs']
        assert macs['encoder'] == pytest.approx(encoder_macs(net.encoder, lq_size) / (size[0] * size[1]))
        counts, shares = decoder_macs(net.decoder, lq_size, size), row['routing']['shares']
        assert macs['total'] == pytest.approx(macs['encoder'] + counts.total(shares))
        assert macs['each_expert'] == net.expert_macs
        assert macs['dense_plain'] == dense_plain_macs(net.decoder, lq_size, size)
        times, stages = row['time_ms'], {'encode', 'map', 'decode', 'other'}
        assert set(times) == {*stages, 'total', 'dense_folded', 'dense_plain'}
        assert times['total'] == pytest.approx(sum(times[stage] for stage in stages))
        assert set(row['peak_mib']) == {*stages, 'total'}
    with Image.open(tmp_path / 'out.png') as picture:
        assert picture.format == 'PNG' and picture.size[1] > 300
    shown = capsys.readouterr().out
    assert f'{parameters(net)["total"]:,}' in shown and 'x2x3.5' in shown and 'dense_plain' in shown
    numbers = re.findall(r'^│ (\d+) +│', shown.partition('hidden layers')[2], re.MULTILINE)
    assert numbers == [str(number) for number in range(1, len(net.expert_macs) + 1)]  # as in reports and pictures


def test_model_file_image_and_budget(profile, tmp_path):
    torch.manual_seed(3)
    net = build(MOEISR)
    with torch.no_grad():
        net.decoder.mapper.query_out.weight *= 50  # different pixels to different experts
    save_model(tmp_path / 'net.safetensors', net, MOEISR)
    pixels = (torch.rand(8, 10, 3) * 255).byte()
    Image.fromarray(pixels.numpy()).save(tmp_path / 'lq.png')
    files = '--model', str(tmp_path / 'net.safetensors'), '--image', str(tmp_path / 'lq.png')
    (row,), results = profile(*files, '--scale', '3', '--budget', '0.6', '--no-plain')
    lq = pixels.permute(2, 0, 1)[None] / 255
    counts = torch.bincount(upscale(net, lq, scale=3, budget=0.6).expert_map.flatten().long(), minlength=3)
    assert row['routing']['shares'] == pytest.approx((counts / counts.sum()).tolist(), abs=1e-6)
    assert abs(row['routing']['mean_cost'] - 0.6) < 0.01
    assert row['lq_size'] == [8, 10] and row['budget'] == 0.6 and 'dense_plain' not in row['time_ms']
    assert results['model']['file'].endswith('net.safetensors')


def test_dense_decoder_of_other_widths(profile, options, capsys):
    """The baseline is the dense network of those widths: its multiply-adds, and times of its own."""
    (row,), _ = profile('-opt', options(MOEISR), '--scale', '2', '--dense-hidden', '24', '16')
    liif = LIIF(MOEISR['encoder'], hidden_list=[24, 16])
    assert row['macs']['dense_plain'] == dense_plain_macs(liif.decoder, (6, 9), (12, 18))
    assert row['macs']['dense_folded'] == dense_folded_macs(liif.decoder, (6, 9), (12, 18))
    assert row['macs']['each_expert'] == build(MOEISR).expert_macs
    assert row['time_ms']['dense_plain'] > 0 and row['time_ms']['dense_folded'] > 0
    assert main(['profile', '-opt', options(MOEISR), '--train', '--dense-hidden', '8']) == 2
    assert '--dense-hidden belongs to the profile of upscaling' in capsys.readouterr().err


def test_lm_is_measured_where_its_experts_are_read(profile, options, capsys):
    """The baseline is the most expensive expert; what is left out at LR is not counted; nothing plain is timed."""
    experts = [[], {'latent': [8], 'depth': 1}, {'latent': [12], 'depth': 2}]
    network = {**MOEISR, 'decoder': 'lm', 'experts': experts, 'render_width': 4}
    (row,), _ = profile('-opt', options(network), '--scale', '2')
    decoder, density = build(network).decoder, 1 / 4
    dense = LMLIIF(MOEISR['encoder'], [12], 2, 4).decoder
    assert row['macs']['dense_plain'] == dense_plain_macs(dense, (6, 9), (12, 18))
    assert row['macs']['dense_folded'] == dense_folded_macs(dense, (6, 9), (12, 18))
    assert row['macs']['tables'] == pytest.approx(decoder.pool.table_macs(row['routing']['lr_reads']) * density)
    assert row['time_ms']['dense_folded'] > 0 and 'dense_plain' not in row['time_ms']
    assert main(['profile', '-opt', options(network), '--dense-hidden', '8']) == 2
    assert "--dense-hidden belongs to the decoders 'liif' and 'lte'" in capsys.readouterr().err


def test_shares_that_say_nothing_of_pictures_are_said_to(options, tmp_path, capsys):
    save_model(tmp_path / 'net.safetensors', build(MOEISR), MOEISR)
    Image.new('RGB', (6, 5)).save(tmp_path / 'lq.png')
    trained, untrained = ('--model', str(tmp_path / 'net.safetensors')), ('-opt', options(MOEISR))
    image = ('--image', str(tmp_path / 'lq.png'))
    for words, noise, random in (
        (trained, True, False),
        (untrained, False, True),
        ((*trained, *image), False, False),
        ((*trained, '--budget', '0.6'), False, False),
        ((*trained, '--cost-weight', '1'), False, False),
    ):
        size = () if '--image' in words else ('--lq-size', '5x6')
        assert main(['profile', *words, *size, '--scale', '2', '--repeats', '1', '--no-plain', '--device', 'cpu']) == 0
        shown = ' '.join(capsys.readouterr().out.split())
        assert ('The input is noise' in shown, 'The weights are random' in shown) == (noise, random), words


def test_dense_network_has_no_mapper(profile, options, capsys):
    (row,), _ = profile('-opt', options(LTE), '--scale', '2', '--precision', 'bf16', size='5x5')
    assert row['routing'] == {'shares': [1.0], 'mean_cost': 1.0} and row['macs']['mapper'] == 0
    assert row['macs']['tables'] + row['macs']['experts'] == row['macs']['dense_folded']
    assert set(row['time_ms']) == {'encode', 'decode', 'other', 'total', 'dense_folded', 'dense_plain'}
    shown = capsys.readouterr().out
    assert row['precision'] == 'bf16' and 'map' not in shown.split() and 'random' not in shown


def test_ltes_tables_are_counted_once(monkeypatch, profile, options):
    """Its own code makes them once per image, and a chunk of the plain decoder makes them each time."""
    from moeisr_basicsr.tools.profile import upscaling

    taken = {'lte_tables': 7.0, 'dense_plain': 10.0}
    measure = upscaling.measure_stages

    def measured(run, device, repeats):
        times, peaks = measure(run, device, repeats)
        return {**times, **taken}, peaks

    monkeypatch.setattr(upscaling, 'measure_stages', measured)
    monkeypatch.setattr(upscaling, 'CHUNK', 25)  # of 100 output pixels
    (row,), _ = profile('-opt', options(LTE), '--scale', '2', size='5x5')
    assert row['time_ms']['dense_plain'] == 7 + 4 * 3 and 'lte_tables' not in row['time_ms']


def test_training_step(profile, options, tmp_path, capsys):
    shape = '--batch', '2', '--patch', '8', '--queries', '30'
    (row,), _ = profile('-opt', options(MOEISR), '--train', *shape, '--plot', str(tmp_path / 't.png'))
    assert row['case'] == 'train' and row['lq_size'] == [8, 8] and row['count'] == 2
    assert 'unchosen experts' in capsys.readouterr().out and (tmp_path / 't.png').is_file()


@pytest.mark.parametrize(
    'more, message',
    [
        (['--lq-size', '5'], "'5' is not a size"),
        (['--scale', '0.5'], 'at least 1'),
        (['--budget', '0.01'], 'budget must lie between'),
        (['--repeats', '0'], 'whole number of at least 1'),
        (['--plot', 'out.pdf'], '.png'),
        (['--image', 'missing.png'], 'missing.png'),
        (['--device', 'tpu'], "'tpu'"),
        (['--batch', '3'], '--batch needs --train'),
    ],
)
def test_mistakes_are_one_line(options, capsys, more, message):
    assert main(['profile', '-opt', options(MOEISR), *more]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_wrong_networks(options, tmp_path, capsys):
    assert main(['profile', '-opt', options({**MOEISR, 'experts': []})]) == 2
    assert 'experts' in capsys.readouterr().err
    (tmp_path / 'empty.yml').write_text('name: nothing\n')
    assert main(['profile', '-opt', str(tmp_path / 'empty.yml')]) == 2
    assert "empty.yml has no section 'network_g'" in capsys.readouterr().err
    assert main(['profile', '-opt', options({'type': 'MSRResNet', 'upscale': 4})]) == 2
    assert 'MSRResNet has no decoder' in capsys.readouterr().err
    assert main(['profile']) == 2
    assert '--model' in capsys.readouterr().err
