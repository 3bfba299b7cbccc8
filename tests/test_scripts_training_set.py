"""scripts/make_training_set.py: no test image enters, photographs shrink, checksums are kept; scripts/small_rows.py."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from helpers import shared_data, write_image

from moeisr_basicsr.data.image_reader import read_image

SCRIPTS = Path(__file__).resolve().parents[1] / 'scripts'
sys.path.insert(0, str(SCRIPTS))

import make_training_set  # noqa: E402
import small_rows  # noqa: E402


def picture(height, width, seed):
    """Smooth blobs and noise: large structures for the perceptual hash, detail that is not called flat."""
    rng = np.random.default_rng(seed)
    blobs = cv2.resize(rng.uniform(20, 235, (6, 8, 3)), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(blobs + rng.normal(0, 12, blobs.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / 'images'
    for folder in ('BSDS500_train', 'BSDS500_test', 'HiRes/someone', 'Set5'):
        (root / folder).mkdir(parents=True)
    write_image(root / 'BSDS500_train' / '1.png', picture(120, 160, 1))
    write_image(root / 'BSDS500_train' / '2.png', picture(120, 160, 2))
    write_image(root / 'BSDS500_test' / '3.png', picture(160, 120, 3))
    cv2.imwrite(str(root / 'HiRes' / 'someone' / 'large.jpg'), picture(1400, 2800, 4))
    write_image(root / 'Set5' / 'other.png', picture(100, 100, 5))
    return root


def made(root, tmp_path):
    output = tmp_path / 'train.lmdb'
    assert make_training_set.main([str(root), '-o', str(output), '--workers', '1']) == 0
    names = [line.split('.')[0] for line in (output / 'meta_info.txt').read_text().splitlines()]
    return names, json.loads((tmp_path / 'train.json').read_text())


def test_small_images_stay_whole_and_photographs_are_shrunk_and_cut(root, tmp_path):
    names, record = made(root, tmp_path)
    assert names[:3] == ['1', '2', '3']
    assert len(names) == 3 + 2 * 4  # 2800 x 1400 shrinks to 1400 x 700: a rest of 120 or 60 gets no square of its own
    assert sorted(record['sources']) == [
        'BSDS500_test/3.png',
        'BSDS500_train/1.png',
        'BSDS500_train/2.png',
        'HiRes/someone/large.jpg',
    ]
    assert all(len(digest) == 64 for digest in record['sources'].values())
    assert record['left_out'] == {} and record['compared_with_test_images'] == 1


def test_the_checksum_of_the_content_does_not_depend_on_the_run(root, tmp_path):
    digests = []
    for name in ('first', 'second'):
        (tmp_path / name).mkdir()
        digests.append(made(root, tmp_path / name)[1]['content_sha256'])
    assert digests[0] == digests[1]
    write_image(root / 'BSDS500_train' / '2.png', picture(120, 160, 6))
    (tmp_path / 'third').mkdir()
    assert made(root, tmp_path / 'third')[1]['content_sha256'] != digests[0]


@pytest.mark.parametrize(
    'spoil',
    [
        lambda image: image,
        lambda image: cv2.resize(image, None, fx=1.7, fy=1.7),
        lambda image: cv2.imdecode(cv2.imencode('.jpg', image)[1], cv2.IMREAD_COLOR),
        lambda image: image[2:, 3:],
    ],
    ids=['same', 'enlarged', 'jpeg', 'cropped'],
)
def test_a_test_image_does_not_enter(root, tmp_path, spoil, capsys):
    write_image(root / 'Set5' / 'taken.png', spoil(picture(120, 160, 2)))
    names, record = made(root, tmp_path)
    assert names[:3] == ['1', '3', 'someone_large_s001']
    assert record['left_out'] == {'BSDS500_train/2.png': 'Set5/taken.png'}
    assert 'BSDS500_train/2.png is left out' in capsys.readouterr().out


def test_without_test_sets_nothing_is_made(root, tmp_path, capsys):
    (root / 'Set5' / 'other.png').unlink()
    assert make_training_set.main([str(root), '-o', str(tmp_path / 'train.lmdb')]) == 2
    assert 'none of the test sets' in capsys.readouterr().err
    assert not (tmp_path / 'train.lmdb').exists()


def test_bsds500_holds_one_picture_of_the_test_sets():
    root = shared_data('BSDS500_train').parent
    shared_data('Set5')
    sources = make_training_set.images_in(root / name for name in make_training_set.WHOLE)
    tests = make_training_set.images_in(root / name for name in make_training_set.TEST_SETS)
    assert len(sources) == 400 and len(tests) == 219
    same, least = make_training_set.same_pictures(sources, tests)
    assert {source.name: Path(test).name for source, test in same.items()} == {'302003.jpg': 'woman.png'}
    assert least > 1.5 * make_training_set.SAME_PICTURE


def test_rows_are_complete_options_for_evaluation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = list(small_rows.ROWS)
    for name in names:
        (tmp_path / 'experiments' / name / 'models').mkdir(parents=True)
        (tmp_path / 'experiments' / name / 'models' / 'net_g_latest.pth').touch()
    args = small_rows.parse_arguments(['test', *names, '--sets', 'Set5', 'B100_x4', '--budget', '0.2'])
    options = {name: small_rows.test_options(name, args) for name in names}
    for opt in options.values():
        assert [entry['name'] for entry in opt['datasets'].values()].count('B100_x4') == 1
        assert len(opt['datasets']) == 9
        assert opt['val']['budget'] == 0.2 and 'precision' not in opt['val']
        assert yaml.safe_load(json.dumps(opt)) == opt
    networks = {name: opt['network_g'] for name, opt in options.items()}
    assert networks['liif_seed0'] == networks['liif_seed1'] != networks['liif_2x128_seed0']
    assert networks['ablation_mapper_1_layer']['mapper']['num_layers'] == 1
    assert networks['ablation_lr_pixel']['mapper']['granularity'] == 'lr_pixel'
    assert networks['swinir_liif']['encoder']['type'] == 'SwinIREncoder'


def test_averaged_weights_are_tested_where_they_were_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'net.pth').touch()
    options = tmp_path / 'options'
    options.mkdir()
    monkeypatch.setattr(small_rows, 'OPTIONS', options)

    def key(decay, *arguments):
        network = {'network_g': {'type': 'LIIF'}, 'model_type': 'ArbitraryScaleModel', 'train': decay}
        (options / 'small_liif.yml').write_text(yaml.safe_dump(network))
        args = small_rows.parse_arguments(['test', 'liif_seed0', '--weights', 'net.pth', *arguments])
        return small_rows.test_options('liif_seed0', args)['path']['param_key_g']

    assert key({'ema_decay': 0.99}) == 'params_ema' and key({}) == key({'ema_decay': 0}) == 'params'
    assert key({'ema_decay': 0.99}, '--param-key', 'params') == 'params'


def test_an_untrained_row_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert small_rows.main(['test', 'liif_seed0']) == 2
    assert 'net_g_latest.pth is missing: train the row first' in capsys.readouterr().err


def test_the_hash_tells_pictures_apart():
    prints = [
        make_training_set.fingerprint(path)
        for path in sorted((SCRIPTS.parent / 'assets' / 'quickstart').rglob('*.png'))
    ]
    assert len(prints) >= 9
    assert read_image(prints[0].path).rgb.ndim == 3
    differences = [(a.bits != b.bits).sum() for i, a in enumerate(prints) for b in prints[:i]]
    assert min(differences) > make_training_set.SAME_PICTURE
