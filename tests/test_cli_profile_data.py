"""`basicsr profile --data` through the command's entry point: lower bounds that sleeping datasets set, no speeds."""

import multiprocessing
import time

import pytest
import yaml
from basicsr.utils.registry import DATASET_REGISTRY
from PIL import Image
from tiny_runs import run_yaml, write_images

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.cli import main
from moeisr_basicsr.data import arbitrary_scale_dataset
from moeisr_basicsr.data.image_source import ImageSource

PAUSE = 0.04  # seconds; far above what a stage of a tiny item takes
OWN_DATASETS = """
import time

from basicsr.utils.registry import DATASET_REGISTRY
from torch.utils.data import Dataset


class Counting(Dataset):
    def __init__(self, opt):
        self.opt = opt

    def __len__(self):
        return 4


@DATASET_REGISTRY.register()
class SleepyDataset(Counting):
    def __getitem__(self, index):
        time.sleep(0.02)
        return {'index': index}


@DATASET_REGISTRY.register()
class BusyDataset(Counting):
    def __getitem__(self, index):
        start = time.process_time()
        while time.process_time() < start + 0.02:
            sum(range(1000))
        return {'index': index}
"""


@pytest.fixture
def profile(tmp_path):
    def run(*more, **changes):
        path = tmp_path / 'run.yml'
        path.write_text(yaml.safe_dump(run_yaml(tmp_path, **changes)))
        return main(['profile', '--data', '-opt', str(path), *more])

    return run


@pytest.fixture
def rows(profile, tmp_path):
    def run(*more, **changes):
        assert profile('--json', str(tmp_path / 'out.json'), '--overwrite', *more, **changes) == 0
        results = schema.load(tmp_path / 'out.json')
        assert results['command'] == 'profile' and results['model'] is None
        return results['rows']

    return run


def test_stages_and_workers(rows, tmp_path, capsys):
    stages, *loaders = rows(
        '--workers', '0', '2', '--items', '9', '--step-ms', '50', '--plot', str(tmp_path / 'out.png')
    )
    times = dict(stages['time_ms'])
    assert stages['case'] == 'data-stages' and stages['count'] == 12  # whole batches of 4
    total = times.pop('total')
    assert list(times) == ['read', 'resize', 'queries', 'tensor', 'collate', 'other']
    assert all(value > 0 for value in times.values()) and sum(times.values()) == pytest.approx(total)
    assert [row['case'] for row in loaders] == ['data-workers-0', 'data-workers-2']
    assert [row['count'] for row in loaders] == [12, 16]  # the same number of batches for each worker
    for row, workers in zip(loaders, (0, 2)):
        assert row['data']['workers'] == workers and row['data']['batch_size'] == 4
        assert row['data']['items_per_second'] > 0 and row['data']['needed_items_per_second'] == pytest.approx(80)
    shown = capsys.readouterr().out
    assert 'read, decode' in shown and 'each process needs 80.0 items/s' in shown and 'keeps up' in shown
    assert not multiprocessing.active_children()  # else they would disturb what is measured next
    with Image.open(tmp_path / 'out.png') as picture:
        assert picture.format == 'PNG'


@pytest.mark.parametrize(
    'slow, stage',
    [
        ((ImageSource, 'rgb'), 'read'),
        ((arbitrary_scale_dataset, 'resize'), 'resize'),
        ((arbitrary_scale_dataset, 'draw_queries'), 'queries'),
        ((arbitrary_scale_dataset, 'to_tensor'), 'tensor'),
    ],
)
def test_time_goes_to_the_stage_that_takes_it(rows, monkeypatch, slow, stage):
    original = getattr(*slow)

    def slowed(*args):
        time.sleep(PAUSE)
        return original(*args)

    monkeypatch.setattr(*slow, slowed)
    times = rows('--workers', '0', '--items', '4')[0]['time_ms']
    assert times['total'] >= times[stage] >= 1e3 * PAUSE
    del times['total']
    assert max(times, key=times.get) == stage


def test_pairs_have_no_shrinking(rows, tmp_path):
    write_images(tmp_path / 'lq', 4, (32, 36))
    times = rows(
        '--workers',
        '0',
        '--items',
        '4',
        **{
            'datasets:train': {
                'name': 'pairs',
                'type': 'ArbitraryScalePairedDataset',
                'sample_q': 64,
                'lq_size': 12,
                'dataroot_gt': str(tmp_path / 'train'),
                'dataroot_lq': str(tmp_path / 'lq'),
                'batch_size_per_gpu': 4,
                'num_worker_per_gpu': 7,
            }
        },
    )[0]['time_ms']
    assert list(times) == ['read', 'queries', 'tensor', 'collate', 'other', 'total']


def own_dataset(rows, tmp_path, name, *more):
    (tmp_path / 'own_sets.py').write_text(OWN_DATASETS)
    known = name in DATASET_REGISTRY  # from an earlier test of this process
    return rows(
        '--items',
        '8',
        *more,
        *([] if known else ['--import', str(tmp_path / 'own_sets.py')]),
        **{
            'datasets:train': {
                'name': 'own',
                'type': name,
                'batch_size_per_gpu': 4,
                'num_worker_per_gpu': 0,
                'dataset_enlarge_ratio': 3,
            }
        },
    )


def test_own_dataset_and_waiting_time(rows, tmp_path):
    """Sleeping 20 ms per item allows 50 items/s per process, and takes no CPU time to speak of."""
    stages, alone, two = own_dataset(rows, tmp_path, 'SleepyDataset', '--workers', '0', '2')
    assert list(stages['time_ms']) == ['collate', 'other', 'total'] and stages['time_ms']['other'] >= 20
    assert alone['data']['items_per_second'] <= 50
    assert two['data']['items_per_second'] <= 200  # 100, and as much again for batches that were ready before
    per_cpu = alone['data']['items_per_cpu_second']
    assert per_cpu is None or per_cpu > alone['data']['items_per_second']


def test_cpu_time_of_workers_counts(rows, tmp_path):
    """20 ms of CPU per item allow 50 items per CPU second; twice that for batches that were ready before."""
    for row in own_dataset(rows, tmp_path, 'BusyDataset', '--workers', '0', '1')[1:]:
        assert row['data']['items_per_cpu_second'] is None or row['data']['items_per_cpu_second'] <= 100


def test_options_can_be_changed_for_the_run(rows):
    stages, _ = rows('--workers', '0', '--items', '1', '--force_yml', 'datasets:train:batch_size_per_gpu=3')
    assert stages['count'] == 3


@pytest.mark.parametrize(
    'more, message',
    [
        (['--workers', '-1'], "'-1'"),
        (['--workers', 'many'], "'many' is not a whole number of at least 0"),
        (['--items', '0'], 'whole number of at least 1'),
        (['--step-ms', '0'], 'whole number of at least 1'),
        (['--train'], '--data'),
        (['--plot', 'out.pdf'], '.png'),
        (['--force_yml', 'datasets:train:lq_sise=3'], 'lq_size'),
        (['--force_yml', 'datasets:train:dataroot_gt=nowhere'], 'nowhere'),
        (['--force_yml', 'datasets:train:batch_size_per_gpu=99'], 'raise dataset_enlarge_ratio'),
        (['--force_yml', 'datasets:train:lq_size=70'], 'too small'),
    ],
)
def test_mistakes_are_one_line(profile, capsys, more, message):
    assert profile(*more) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_damaged_image_in_a_worker_is_one_line(profile, tmp_path, capsys):
    write_images(tmp_path / 'broken', 4, (64, 72))
    (tmp_path / 'broken' / '2.png').write_bytes(b'\x89PNG\r\n\x1a\nrubbish')
    assert (
        profile('--workers', '1', '--items', '8', '--force_yml', f'datasets:train:dataroot_gt={tmp_path / "broken"}')
        == 2
    )
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and '2.png' in lines[0]


@pytest.mark.parametrize(
    'words, message',
    [
        (['--data', '--model', 'x.safetensors'], '-opt instead of --model'),
        (['-opt', 'x.yml', '--workers', '2'], '--workers needs --data'),
        (['-opt', 'x.yml', '--train', '--step-ms', '9'], '--step-ms needs --data'),
        (['-opt', 'x.yml', '--force_yml', 'name=x'], '--force_yml needs --data'),
    ],
)
def test_arguments_that_do_not_go_together(capsys, words, message):
    assert main(['profile', *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
