"""Checkpoint files: whole or absent, damage found, the old ones removed, and no code run from any of them."""

import errno
import os
import pickle
import random

import pytest
import torch
from tiny_runs import assert_same

from moeisr_basicsr import atomic_file
from moeisr_basicsr.atomic_file import SaveError, link_or_copy, save_atomic
from moeisr_basicsr.engine.checkpoint_store import CheckpointStore, DamagedCheckpoint


@pytest.fixture
def store(tmp_path):
    for folder in ('models', 'training_states'):
        (tmp_path / folder).mkdir()
    return CheckpointStore(tmp_path / 'models', tmp_path / 'training_states')


def content(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {'net_g': {key: {'w': torch.rand(500, generator=generator)} for key in ('params', 'params_ema')}}
    return weights, {'epoch': seed, 'moment': torch.rand(500, generator=generator)}


def save(store, *iterations):
    for iteration in iterations:
        store.save(iteration, *content(iteration))


def files(store):
    return sorted(path.name for folder in (store.models, store.states) for path in folder.iterdir())


def newest(store):
    reports = []
    checkpoint = store.newest(reports.append)
    return checkpoint, reports


def test_what_is_saved_comes_back_and_basicsr_reads_the_weights(store):
    save(store, 10)
    checkpoint, reports = newest(store)
    weights, state = content(10)
    assert checkpoint.iteration == 10 and not reports
    assert_same(checkpoint.weights, weights)
    assert_same(checkpoint.state['moment'], state['moment'])
    assert_same(torch.load(store.models / 'net_g_10.pth', weights_only=True), weights['net_g'])
    assert files(store) == ['10.state', 'net_g_10.pth']  # one file each, nothing temporary


def test_a_metric_whose_name_ends_in_a_number_keeps_its_best(store):
    store.keep = 1
    save(store, 10)
    store.name_weights(content(10)[0], ['best_Set5_psnr_10'])
    save(store, 20)
    assert files(store) == ['20.state', 'net_g_20.pth', 'net_g_best_Set5_psnr_10.pth']


def test_the_newest_k_stay_and_names_stay_always(store):
    store.keep = 2
    save(store, 10)
    store.name_weights(content(10)[0], ['best_Set5_psnr', 'best_Set14_psnr'])
    save(store, 20, 30)
    store.name_weights(content(31)[0], ['latest'])
    assert files(store) == [
        '20.state',
        '30.state',
        'net_g_20.pth',
        'net_g_30.pth',
        'net_g_best_Set14_psnr.pth',
        'net_g_best_Set5_psnr.pth',
        'net_g_latest.pth',
    ]
    for name, seed in (('best_Set5_psnr', 10), ('best_Set14_psnr', 10), ('latest', 31)):
        assert_same(torch.load(store.weights_path('net_g', name)), content(seed)[0]['net_g'])


@pytest.mark.parametrize('name', ['20.state', 'net_g_20.pth'])
def test_a_truncated_newest_is_reported_and_the_one_before_used(store, name):
    save(store, 10, 20)
    path = (store.states if name.endswith('.state') else store.models) / name
    whole = path.read_bytes()
    lengths = [0, 1, len(whole) - 1] + random.Random(0).sample(range(len(whole)), 7)
    for length in lengths:
        path.write_bytes(whole[:length])
        checkpoint, reports = newest(store)
        assert checkpoint.iteration == 10, length
        assert len(reports) == 1 and 'iteration 20' in reports[0] and name in reports[0]
    path.write_bytes(whole)
    assert newest(store)[0].iteration == 20


@pytest.mark.parametrize('name', ['20.state', 'net_g_20.pth'])
def test_a_flipped_bit_is_found(store, name):
    """torch.load itself does not look at the checksums."""
    save(store, 10, 20)
    path = (store.states if name.endswith('.state') else store.models) / name
    data = bytearray(path.read_bytes())
    tensor = (content(20)[1]['moment'] if name.endswith('.state') else content(20)[0]['net_g']['params']['w']).numpy()
    data[data.index(tensor.tobytes()) + 1000] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # passes
    checkpoint, reports = newest(store)
    assert checkpoint.iteration == 10 and len(reports) == 1


def test_a_missing_weights_file_and_weights_of_another_save(store):
    save(store, 10, 20, 30)
    (store.models / 'net_g_30.pth').unlink()
    torch.save(content(5)[0]['net_g'], store.models / 'net_g_20.pth')  # whole, but not what the state was saved with
    checkpoint, reports = newest(store)
    assert checkpoint.iteration == 10
    assert 'missing' in reports[0] and 'SHA-256' in reports[1]


def test_nothing_usable(store):
    assert newest(store) == (None, [])
    (store.states / '10.state').write_bytes(b'')
    checkpoint, reports = newest(store)
    assert checkpoint is None and len(reports) == 1


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('name', ['20.state', 'net_g_20.pth'])
@pytest.mark.parametrize('form', ['zip', 'pickle'])
def test_hostile_files_run_nothing(store, tmp_path, name, form):
    save(store, 10, 20)
    path = (store.states if name.endswith('.state') else store.models) / name
    trap = {'iter': 20, 'params': Hostile(tmp_path / 'executed')}
    if form == 'zip':
        torch.save(trap, path)
    else:
        path.write_bytes(pickle.dumps(trap))
    assert newest(store)[0].iteration == 10
    with pytest.raises(DamagedCheckpoint) as error:
        store.load(store.states / '20.state')
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'executed').exists()


def test_disk_full_leaves_what_was_there(store, monkeypatch):
    """The disk fills up at every possible file and byte; nothing half-written stays and the error says why."""
    save(store, 10)
    before = {path.name: path.read_bytes() for folder in (store.models, store.states) for path in folder.iterdir()}

    class FullDisk:
        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, data):
            if len(data) > self.room:
                self.file.write(bytes(data)[: self.room])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    original = atomic_file.write_atomic
    for victim in ('net_g_20.pth', '20.state'):
        for room in (0, 100, 2000):

            def write_atomic(path, write):
                if os.path.basename(path) == victim:
                    return original(path, lambda file: write(FullDisk(file, room)))
                return original(path, write)

            monkeypatch.setattr(atomic_file, 'write_atomic', write_atomic)
            with pytest.raises(SaveError, match='No space left on device') as error:
                save(store, 20)
            assert victim in str(error.value)
            assert newest(store)[0].iteration == 10
            assert not [name for name in files(store) if name.endswith('.tmp')]
            after = {
                path.name: path.read_bytes() for folder in (store.models, store.states) for path in folder.iterdir()
            }
            assert {name: after[name] for name in before} == before
            monkeypatch.undo()
    save(store, 20)  # room again
    assert newest(store)[0].iteration == 20


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = save_atomic({'value': 1}, tmp_path / 'file')

    def interrupted(file):
        file.write(b'half')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_file.write_atomic(path, interrupted)
    assert torch.load(path) == {'value': 1} and [entry.name for entry in tmp_path.iterdir()] == ['file']


def test_leftovers_of_a_killed_process_are_removed(store):
    save(store, 10)
    (store.models / '.net_g_20.pth.4711.tmp').write_bytes(b'half')
    store.clean()
    assert files(store) == ['10.state', 'net_g_10.pth']


def test_a_branch_that_was_left_is_set_aside_and_not_lost(store):
    """Otherwise its larger iterations would count as the newest, and push out every new checkpoint."""
    store.keep = 2
    save(store, 10, 20, 30)
    assert len(store.set_aside(10)) == 2
    assert store.iterations() == []
    save(store, 12)
    assert store.iterations() == [12] and newest(store)[0].iteration == 12
    aside = sorted(path.name for folder in (store.models, store.states) for path in folder.glob('set_aside_*/*'))
    assert aside == ['20.state', '30.state', 'net_g_20.pth', 'net_g_30.pth']


def test_the_longest_name_that_a_folder_holds(tmp_path):
    path = atomic_file.write_atomic(tmp_path / ('x' * 255), lambda file: file.write(b'one'))
    link_or_copy(path, tmp_path / ('y' * 255))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ['x' * 255, 'y' * 255]


def test_link_or_copy_gives_an_independent_name(tmp_path, monkeypatch):
    source = tmp_path / 'source'
    for linked in (True, False):
        if not linked:
            monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, 'no links here')))
        source.write_bytes(b'one')
        for _ in range(2):  # also where the name already is the same file
            link_or_copy(source, tmp_path / 'name')
            assert (tmp_path / 'name').read_bytes() == b'one'
        atomic_file.write_atomic(source, lambda file: file.write(b'two'))
        assert (tmp_path / 'name').read_bytes() == b'one'
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ['name', 'source']
        (tmp_path / 'name').unlink()
