"""From training to one model file: the weights themselves say which network they belong to."""

import torch
from tiny_runs import run_options

from moeisr_basicsr.checkpoint import load_model
from moeisr_basicsr.convert import convert
from moeisr_basicsr.engine.train_loop import train
from moeisr_basicsr.errors import ExitCode


def test_weights_convert_to_the_network_that_was_trained_whatever_the_options_file_says(tmp_path):
    """`--force_yml` may have changed the network: same shapes, another granularity, another skip."""
    options = run_options(
        tmp_path,
        **{'train:total_iter': 2, 'network_g:skip': 'bilinear', 'val': None, 'network_g:mapper:granularity': 'cell'},
    )
    (tmp_path / 'run.yml').unlink()
    assert train({**options, 'opt_file': None} if options.get('opt_file') is None else options) == ExitCode.OK
    models = tmp_path / 'experiments' / 'run' / 'models'
    for copy in (tmp_path / 'experiments' / 'run').glob('*.yml'):
        copy.write_text(copy.read_text().replace('cell', 'pixel').replace('bilinear', 'none'))
    convert(models / 'net_g_latest.pth', tmp_path / 'model.safetensors')
    net = load_model(tmp_path / 'model.safetensors', 'cpu')
    assert (net.skip, net.decoder.mapper.granularity) == ('bilinear', 'cell')
    trained = torch.load(models / 'net_g_latest.pth', weights_only=True)['params_ema']
    for name, value in net.state_dict().items():
        assert torch.equal(value, trained[name]), name
