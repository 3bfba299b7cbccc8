"""Own pairs of LR and HR images: what an item holds at factors that are not whole, and pairs that do not fit."""

import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from data_cases import locate, make_lmdb, noise, options, paired, same
from helpers import shared_data

from moeisr_basicsr.core.coords import make_coord
from moeisr_basicsr.data.image_writer import write_image
from moeisr_basicsr.data.pairs import patch_axis
from moeisr_basicsr.errors import UserError


@pytest.fixture
def pair_folders(tmp_path):
    """HR images of 80 x 90; LR images of 32 x 30, factors 2.5 and 3, whose pixels hold their own row and column."""
    lq, gt = tmp_path / 'lq', tmp_path / 'gt'
    lq.mkdir()
    gt.mkdir()
    row, col = np.mgrid[0:32, 0:30]
    for seed, name in enumerate('ab'):
        write_image(gt / f'{name}.png', noise(80, 90, seed))
        write_image(lq / f'{name}x.png', np.stack([row, col, row * 0 + seed], axis=-1).astype(np.uint8))
    return lq, gt


def test_a_paired_item_fits_its_partner(pair_folders):
    """Each query lies, by its coordinate, on the LR pixel that covers its HR pixel; also after flips and transpose."""
    dataset = build_dataset(paired(*pair_folders, filename_tmpl='{}x'))
    scales = set()
    for index in range(60):
        item = dataset[index]
        position = locate(noise(80, 90, index % 2), item['gt'])
        centre = (position + 0.5) / [2.5, 3]  # of each query, in LR pixels of the whole image
        coord = item['coord'].numpy()
        row, col = np.clip(((coord + 1) / 2 * 8).astype(int), 0, 7).T  # in the LR patch
        covering = item['lq'].permute(1, 2, 0).numpy()[row, col] * 255
        inside = np.abs(centre - np.rint(centre)) > 1e-6  # not where a centre lies on the border of two LR pixels
        np.testing.assert_allclose(covering[:, :2][inside], np.floor(centre)[inside], atol=1e-3)
        assert inside.mean() > 0.5
        # Exactly: distances between queries along both axes, in the patch and in the image.
        order = np.array([[1, 2.5], [0, 3]])[:: 1 if item['scale'][0] == 2.5 else -1]
        for axis, (source, factor) in enumerate(order):
            along = np.abs(np.diff(coord[:, axis])) * 4 * factor  # 8 LR pixels are 2 units
            np.testing.assert_allclose(along, np.abs(np.diff(position[:, 1 - int(source)])), atol=1e-4)
            np.testing.assert_allclose(item['cell'][:, axis], 2 / (8 * factor), rtol=1e-6)
        scales.add(tuple(item['scale'].tolist()))
        assert item['lq_path'].endswith('x.png') and len(set(map(tuple, position.tolist()))) == 50
    assert scales == {(2.5, 3.0), (3.0, 2.5)}
    assert same(build_dataset(paired(*pair_folders, filename_tmpl='{}x'))[7], dataset[7])


@pytest.mark.parametrize('n_lr, n_hr', [(10, 10), (10, 20), (12, 30), (7, 23), (9, 9 * 4), (48, 49), (31, 100)])
def test_patch_axis_against_the_definition(n_lr, n_hr):
    for count in (1, 3, n_lr):
        for first in range(n_lr - count + 1):
            axis = patch_axis(first, count, n_lr, n_hr)
            inside = [i for i in range(n_hr) if 2 * first * n_hr <= (2 * i + 1) * n_lr < 2 * (first + count) * n_hr]
            assert inside == list(range(axis.start, axis.stop)) and len(inside) >= count
            centres = [((i + 0.5) * n_lr / n_hr - first) / count * 2 - 1 for i in inside]
            np.testing.assert_allclose(axis.coord, centres, atol=1e-6)
            assert axis.cell == pytest.approx(2 * n_lr / n_hr / count)
    whole = patch_axis(0, n_lr, n_lr, n_hr)
    assert torch.equal(whole.coord, make_coord((n_hr, 1))[:, 0])


def test_paired_validation(pair_folders):
    item = build_dataset(paired(*pair_folders, 'val', filename_tmpl='{}x'))[1]
    np.testing.assert_array_equal(item['gt'].permute(1, 2, 0) * 255, noise(80, 90, 1))
    assert item['lq'].shape == (3, 32, 30) and item['scale'].tolist() == [2.5, 3]
    item = build_dataset(paired(*pair_folders, 'val', filename_tmpl='{}x', scale=[2.4, 2.9]))[1]
    assert item['gt'].shape == (3, 77, 87)
    for scale, named in (3, '3'), ([2.5, 1.5], '2.5 x 1.5'):  # the second would cut off half of the HR image
        words = f'ax.png .32 x 30.* does not fit .*a.png .80 x 90.: a factor of 2.5 x 3, but the scale .* is {named}. '
        with pytest.raises(UserError, match=words + '.* 1 more'):
            build_dataset(paired(*pair_folders, 'val', filename_tmpl='{}x', scale=scale))
    with pytest.raises(UserError, match='b.png .80 x 90.*smaller than its LR image .*bx.png .32 x 30. times the scale'):
        build_dataset(paired(*pair_folders, 'val', filename_tmpl='{}x', scale=[2.55, 3]))[1]


def test_a_rest_that_the_lr_image_lacks_is_cut_off(tmp_path):
    lq, gt = tmp_path / 'lq', tmp_path / 'gt'
    lq.mkdir()
    gt.mkdir()
    write_image(lq / 'a.png', noise(20, 24))
    write_image(gt / 'a.png', noise(41, 49))
    item = build_dataset(paired(lq, gt, 'val'))[0]
    assert item['gt'].shape == (3, 40, 48) and item['scale'].tolist() == [2, 2]
    training = build_dataset(paired(lq, gt, use_flip=False, use_rot=False))[0]
    assert training['scale'].tolist() == [2, 2]
    assert set(training['coord'].flatten().tolist()) <= set(make_coord((16, 16)).flatten().tolist())


def test_pairs_that_do_not_fit(pair_folders):
    lq, gt = pair_folders
    with pytest.raises(UserError, match=r"a.png has no partner a in .*Nearest: 'ax.png'; check filename_tmpl"):
        build_dataset(paired(lq, gt))
    with pytest.raises(UserError, match=r"must hold '\{\}'"):
        build_dataset(paired(lq, gt, filename_tmpl='x'))
    with pytest.raises(UserError, match="the key 'dataroot_lq' is missing"):
        build_dataset(paired(lq, gt, dataroot_lq=None))
    with pytest.raises(UserError, match='x.png.*too small; lq_size is 31'):
        build_dataset(paired(lq, gt, filename_tmpl='{}x', lq_size=31))[0]
    write_image(gt / 'a.png', noise(20, 90))
    with pytest.raises(UserError, match='a.png .20 x 90.*smaller than its LR image .*ax.png .32 x 30'):
        build_dataset(paired(lq, gt, filename_tmpl='{}x'))[0]
    (lq / 'ax.jpg').write_bytes((lq / 'ax.png').read_bytes())
    with pytest.raises(UserError, match='could both be the partner'):
        build_dataset(paired(lq, gt, filename_tmpl='{}x'))


def test_two_hr_images_of_one_partner(pair_folders, tmp_path):
    lq, gt = pair_folders
    for folder in 'ab':
        (gt / folder).mkdir()
        write_image(gt / folder / '1.png', noise(80, 90))
    (lq / 'ax.png').rename(lq / '1.png')
    (tmp_path / 'list.txt').write_text('a/1.png\nb/1.png\n')
    with pytest.raises(UserError, match='b/1.png and .*a/1.png would both have the partner .*lq/1.png'):
        build_dataset(paired(lq, gt, meta_info_file=str(tmp_path / 'list.txt')))
    (tmp_path / 'list.txt').write_text('a/1.png\na/1.png\n')  # one image twice is a choice
    assert len(build_dataset(paired(lq, gt, meta_info_file=str(tmp_path / 'list.txt')))) == 2


def test_paired_lmdb(pair_folders, tmp_path):
    lq, gt = pair_folders
    for name, _folder in (('lq', lq), ('gt', gt)):
        (tmp_path / f'{name}.lmdb').mkdir()
    for name in 'ab':
        (lq / f'{name}x.png').rename(lq / f'{name}.png')
    make_lmdb(tmp_path / 'lq.lmdb', lq, 'ab')
    make_lmdb(tmp_path / 'gt.lmdb', gt, 'ab')
    disk = build_dataset(paired(lq, gt))
    dataset = build_dataset(paired(tmp_path / 'lq.lmdb', tmp_path / 'gt.lmdb', io_backend={'type': 'lmdb'}))
    for index in range(4):
        assert all(torch.equal(dataset[index][key], disk[index][key]) for key in ('lq', 'gt', 'coord'))


def test_published_pairs_train_and_validate():
    """Set5 at x2 as published: own folders, names with a suffix."""
    folders = shared_data('Set5_LRx2_reference'), shared_data('Set5')
    dataset = build_dataset(paired(*folders, 'val', filename_tmpl='{}x2'))
    made = build_dataset(options(shared_data('Set5'), 'val', scale=2))
    for index in range(5):
        assert torch.equal(dataset[index]['gt'], made[index]['gt'])
        assert torch.equal(dataset[index]['lq'], made[index]['lq'])
