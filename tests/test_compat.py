"""Compat: BasicSR 1.4.2 imports, reads our YAML files, resumes and runs on several processes, all without CUDA."""

import os
import pickle
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from moeisr_basicsr import compat
from moeisr_basicsr.errors import UserError

compat.patch_basicsr()
ROOT = Path(__file__).resolve().parents[1]

MINIMAL_YAML = """
name: fixed
model_type: SRModel
num_gpu: auto
manual_seed: 1
datasets:
  train: {name: a, lr: 1e-4, eps: !!float 2e-3}
path: {pretrain_network_g: ~}
train: {optim_g: {type: Adam, lr: 1e-4}, milestones: [1, 2]}
logger: {print_freq: 10}
"""


def run_python(code, *arguments, cwd=None):
    """Run code in a fresh interpreter that finds this project; returns the completed process."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    return subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code), *map(str, arguments)],
        env=env,
        text=True,
        capture_output=True,
        cwd=cwd,
        timeout=120,
    )


def parse(tmp_path, monkeypatch, *arguments, text=MINIMAL_YAML):
    """BasicSR's own `parse_options`, patched, on a YAML file and command-line arguments."""
    from basicsr.utils.options import parse_options

    path = tmp_path / 'options.yml'
    path.write_text(text)
    monkeypatch.setattr(sys, 'argv', ['train.py', '-opt', str(path), *arguments])
    return parse_options(str(tmp_path))[0]


def test_every_module_of_basicsr_imports():
    done = run_python("""
        import importlib, pkgutil
        import sys
        import moeisr_basicsr, basicsr
        assert not {'torch._dynamo', 'scipy.stats', 'triton'} & sys.modules.keys()
        names = [info.name for info in pkgutil.walk_packages(basicsr.__path__, 'basicsr.')]
        for name in names:
            importlib.import_module(name)
        print(len(names) + 1)  # and basicsr itself
        """)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == 90


def test_what_is_imported_late_is_the_real_thing():
    import scipy.stats
    import torch._dynamo.utils
    from basicsr.data.degradations import cdf2

    roi_align = sys.modules['torchvision.ops.roi_align']  # `torchvision.ops.roi_align` is the function
    for device in ('cpu', 'cuda', 'meta'):
        assert roi_align.is_compile_supported(device) == torch._dynamo.utils.is_compile_supported(device)
    points = np.stack(np.meshgrid([-1.0, 0.0, 2.0], [0.5, 1.0, 3.0]), axis=-1)
    product = scipy.stats.norm.cdf(points).prod(axis=-1)  # of two independent normal variables
    np.testing.assert_allclose(cdf2(np.eye(2), points), product, atol=1e-6)


def test_a_module_imported_late_answers_for_the_rest():
    name = 'xml.sax.saxutils'  # any module of some size
    sys.modules.pop(name, None)
    with compat._called_later(name, 'escape'):
        from xml.sax.saxutils import escape, quoteattr

        assert sys.modules[name].__file__  # `quoteattr` has brought the real one
    assert (escape('<'), quoteattr('<')) == ('&lt;', '"&lt;"')


def test_grayscale_shim_is_torchvisions_function():
    from torchvision.transforms.functional_tensor import rgb_to_grayscale

    image = torch.rand(1, 3, 4, 5)
    weights = torch.tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)  # ITU-R 601 as torchvision rounds it
    torch.testing.assert_close(rgb_to_grayscale(image, num_output_channels=1), (image * weights).sum(1, keepdim=True))


def test_patching_twice_wraps_once():
    from basicsr.models.base_model import BaseModel

    before = BaseModel.__init__, BaseModel.model_to_device
    compat.patch_basicsr()
    assert (BaseModel.__init__, BaseModel.model_to_device) == before


def test_basicsr_reads_our_numbers(tmp_path, monkeypatch):
    opt = parse(tmp_path, monkeypatch, '--force_yml', 'logger:print_freq=5')
    assert opt['train']['optim_g'] == {'type': 'Adam', 'lr': 1e-4} and opt['logger']['print_freq'] == 5
    assert opt['datasets']['train'] == {'name': 'a', 'lr': 1e-4, 'eps': 2e-3, 'phase': 'train'}


@pytest.mark.parametrize('tag', ['!!python/object/apply:os.system ["touch {0}"]', '!!python/name:os.system', '!own 1'])
def test_yaml_runs_nothing(tmp_path, monkeypatch, tag):
    target = tmp_path / 'hacked'
    with pytest.raises(yaml.YAMLError, match='line 11'):
        parse(tmp_path, monkeypatch, text=MINIMAL_YAML + 'bad: ' + tag.format(target))
    assert not target.exists()


def model_with(opt):
    from basicsr.models.base_model import BaseModel

    return BaseModel({'num_gpu': 0, 'is_train': True, 'dist': False, 'path': {}, **opt})


class Hostile:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


def test_basicsr_loads_weights_and_runs_nothing(tmp_path):
    """By torch's own default, from 2.6 on."""
    net, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    torch.save({'params': net.state_dict()}, tmp_path / 'net.pth')
    model_with({}).load_network(other, str(tmp_path / 'net.pth'))
    assert torch.equal(other.weight, net.weight)
    torch.save({'params': Hostile(tmp_path / 'hacked')}, tmp_path / 'net.pth')
    with pytest.raises(pickle.UnpicklingError):
        model_with({}).load_network(other, str(tmp_path / 'net.pth'))
    assert not (tmp_path / 'hacked').exists()


def test_resume_state_without_cuda(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from basicsr import train
    from basicsr.models.lr_scheduler import MultiStepRestartLR

    optimizer = torch.optim.Adam(torch.nn.Linear(1, 1).parameters(), 1e-3)
    scheduler = MultiStepRestartLR(optimizer, milestones=[2, 2, 9])
    folder = tmp_path / 'experiments/run/training_states'
    folder.mkdir(parents=True)
    for iteration in (9, 10):  # 10 is the later one, although '9' sorts after it
        torch.save(
            {
                'iter': iteration,
                'epoch': 1,
                'schedulers': [scheduler.state_dict()],
                'optimizers': [optimizer.state_dict()],
            },
            folder / f'{iteration}.state',
        )
    opt = {'name': 'run', 'auto_resume': True, 'path': {'models': 'models'}, 'network_g': {}}
    state = train.load_resume_state(opt)
    assert state['iter'] == 10 and state['schedulers'][0]['milestones'] == Counter([2, 2, 9])
    assert Path(opt['path']['resume_state']).name == '10.state'
    assert opt['path']['pretrain_network_g'] == os.path.join('models', 'net_g_10.pth')  # BasicSR's check_resume ran
    opt = {'name': 'other', 'auto_resume': True, 'path': {'models': 'models', 'resume_state': str(folder / '9.state')}}
    assert train.load_resume_state(opt) is None
    opt['auto_resume'] = False
    assert train.load_resume_state(opt)['iter'] == 9


def test_model_falls_back_to_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    model = model_with({'num_gpu': 1})
    assert model.device == torch.device('cpu') and compat.default_device() == torch.device('cpu')
    assert next(model.model_to_device(torch.nn.Linear(1, 1)).parameters()).device.type == 'cpu'


DDP = """
    import sys, torch
    import moeisr_basicsr.compat as compat
    compat.patch_basicsr()
    from basicsr.utils.options import init_dist
    from basicsr.utils.dist_util import get_dist_info
    from basicsr.models.base_model import BaseModel
    import os, torch.distributed as dist
    os.environ.update(RANK=sys.argv[1], WORLD_SIZE='2', LOCAL_RANK=sys.argv[1], MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=sys.argv[2])
    init_dist('pytorch', backend='nccl')
    rank, world = get_dist_info()
    model = BaseModel({'num_gpu': 0, 'is_train': True, 'dist': True, 'rank': rank, 'world_size': world})
    net = model.model_to_device(torch.nn.Linear(1, 1, bias=False))
    net(torch.full((1, 1), float(rank + 1))).sum().backward()
    assert net.module.weight.grad.item() == 1.5, net.module.weight.grad  # the mean of 1 and 2
    loss = model.reduce_loss_dict({'l': torch.tensor(float(rank))})
    print(dist.get_backend(), type(net).__name__, loss)
    dist.barrier()  # a rank that ends while the other still works can abort gloo's threads
    del net, model
    dist.destroy_process_group()
    """


@pytest.mark.skipif(torch.cuda.is_available(), reason='shows the fallback of machines without CUDA')
def test_two_ranks_on_the_cpu():
    import socket

    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port = listener.getsockname()[1]
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    code = textwrap.dedent(DDP)
    ranks = [
        subprocess.Popen(
            [sys.executable, '-c', code, str(rank), str(port)],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    results = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], results
    assert results[0][0].split()[:2] == ['gloo', 'DistributedDataParallel'] and '0.5' in results[0][0]


def test_init_dist_says_how_to_start(monkeypatch):
    for key in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'SLURM_PROCID'):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(UserError, match='RANK.*torchrun'):
        compat.init_dist('pytorch')
    with pytest.raises(UserError, match='SLURM_PROCID.*srun'):
        compat.init_dist('slurm')
    with pytest.raises(UserError, match="'mpi'.*pytorch or slurm"):
        compat.init_dist('mpi')


def test_slurm_variables_become_torchruns(tmp_path, monkeypatch):
    scontrol = tmp_path / 'scontrol'
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2];touch hacked" ] && printf "n1\\nn2\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for key, value in {
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'SLURM_PROCID': '3',
        'SLURM_NTASKS': '4',
        'SLURM_LOCALID': '1',
        'SLURM_NODELIST': 'n[1-2];touch hacked',
    }.items():
        monkeypatch.setenv(key, value)
    for key in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'LOCAL_RANK'):
        monkeypatch.setenv(key, 'old')
    monkeypatch.delenv('MASTER_PORT')
    compat._environment_from_slurm(None)
    assert [os.environ[key] for key in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'LOCAL_RANK')] == [
        '3',
        '4',
        'n1',
        '29500',
        '1',
    ]
    assert not (tmp_path / 'hacked').exists()


def test_torchvision_names_are_defined_where_its_library_does_not_load(tmp_path):
    """A stand-in for torchvision: its names appear."""
    folder = tmp_path / 'torchvision'
    folder.mkdir()
    (folder / '__init__.py').write_text('')
    (folder / '_C.so').write_bytes(b'not a library')
    (folder / '_meta_registrations.py').write_text('f(\'torchvision::zz_new\')\ng("torchvision::nms")\n')
    done = run_python(
        """
        import sys, types, torch
        sys.path.insert(0, sys.argv[1])
        package = types.ModuleType('moeisr_basicsr')
        package.__path__ = [sys.argv[2]]
        sys.modules['moeisr_basicsr'] = package
        from moeisr_basicsr import compat
        compat._define_torchvision_operators()
        assert hasattr(torch.ops.torchvision, 'zz_new') and hasattr(torch.ops.torchvision, 'nms')
        try:
            torch.ops.torchvision.zz_new(torch.zeros(1))
        except NotImplementedError as error:
            print('no kernel')
        """,
        tmp_path,
        ROOT / 'moeisr_basicsr',
    )
    assert done.stdout.strip() == 'no kernel', done.stderr
