"""From training to one model file: the weights themselves say which network they belong to."""

import torch
from tiny_runs import run_options

from moeisr_basicsr.checkpoint import convert, load_model
from moeisr_basicsr.engine.train_loop import train
from moeisr_basicsr.errors import ExitCode


def test_weights_convert_to_the_network_that_was_trained(tmp_path):
    """Options that change no shape, as `--force_yml` may have changed them, without a YAML file in reach."""
    changes = {'network_g:skip': 'bilinear', 'network_g:encoder:res_scale': 0.5}
    assert train(run_options(tmp_path, **{'train:total_iter': 2, 'val': None, **changes})) == ExitCode.OK
    models = tmp_path / 'experiments' / 'run' / 'models'
    convert(models / 'net_g_latest.pth', tmp_path / 'model.safetensors')
    net = load_model(tmp_path / 'model.safetensors')
    assert (net.skip, net.encoder.body[0].res_scale) == ('bilinear', 0.5)
    trained = torch.load(models / 'net_g_latest.pth', weights_only=True)['params_ema']
    for name, value in net.state_dict().items():
        assert torch.equal(value, trained[name]), name
