"""Own pairs of LR and HR images: what an item holds at factors that are not whole, and pairs that do not fit."""

import logging
import re
import shutil

import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from data_cases import locate, make_lmdb, noise, options, paired, same
from helpers import shared_data, write_image
from PIL import Image

from moeisr_basicsr.core.coords import make_coord
from moeisr_basicsr.data.pairs import patch_axis
from moeisr_basicsr.errors import ImageError, UserError
from moeisr_basicsr.models.evaluation import image_names


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


def write_pairs(root, sizes):
    """HR images of the `sizes` (rows, columns, factor) and LR images of floor(HR / factor); the two folders."""
    lq, gt = root / 'lq', root / 'gt'
    lq.mkdir(parents=True)
    gt.mkdir()
    for number, (rows, cols, factor) in enumerate(sizes):
        write_image(gt / f'{number}.png', noise(rows, cols, number))
        write_image(lq / f'{number}.png', noise(int(rows / factor), int(cols / factor), number))
    return lq, gt


def test_a_rotated_image_and_one_of_another_factor_are_refused(tmp_path, caplog):
    """They are named with what the rest of their folder has; the log counts the factors."""
    logging.getLogger('basicsr').addHandler(caplog.handler)
    logging.getLogger('basicsr').setLevel(logging.INFO)
    lq, gt = write_pairs(tmp_path, [(64 + number, 96 - number, 3) for number in range(11)])
    assert len(build_dataset(paired(lq, gt))) == 11
    assert 'Dataset images: 11 pairs; 11 of factor 3.' in caplog.text
    picture = noise(21, 31, 1)
    write_image(lq / '1.png', np.ascontiguousarray(np.rot90(picture)))  # 64 x 95 / (31 x 21)
    for phase in ('train', 'val'):
        with pytest.raises(UserError) as error:
            build_dataset(paired(lq, gt, phase))
        assert '\n' not in str(error.value) and 'lq/1.png (31 x 21 rows x columns) does not fit' in str(error.value)
        assert re.search(r'gt/1.png \(65 x 95\): a factor of 2.1 x 4.5, but the other pairs of .* 3', str(error.value))
    write_image(lq / '1.png', picture)
    write_image(lq / '2.png', noise(33, 47))  # x2 among x3
    with pytest.raises(UserError, match=r'lq/2.png \(33 x 47 .* a factor of 2, but the other pairs .* have 3'):
        build_dataset(paired(lq, gt))
    dataset = build_dataset(paired(lq, gt, 'val', on_damaged='skip'))  # refused when it is asked for
    with pytest.raises(ImageError, match='lq/2.png'):
        dataset[3]  # after 10.png
    assert dataset[1]['scale'].min() > 2.9


def test_what_the_rest_of_a_folder_says(tmp_path):
    """A folder of several factors is fine, and so are two pairs that differ; every folder is judged by itself."""
    mixed = [(60, 72, 1.5), (61, 80, 2), (90, 60, 2.5), (96, 64, 3), (64, 96, 4), (80, 80, 4)]
    lq, gt = write_pairs(tmp_path / 'mixed', mixed)
    assert len(build_dataset(paired(lq, gt))) == 6
    write_image(lq / '2.png', np.ascontiguousarray(np.rot90(noise(36, 24, 2))))  # but nobody mixes both
    with pytest.raises(UserError, match='lq/2.png'):
        build_dataset(paired(lq, gt))
    lq, gt = write_pairs(tmp_path / 'two', [(60, 90, 3)] * 2)
    write_image(lq / '1.png', noise(30, 20, 1))
    assert len(build_dataset(paired(lq, gt))) == 2  # which of the two is wrong cannot be said
    # each folder by itself
    lq_2, gt_2 = write_pairs(tmp_path / 'more', [(60, 90, 2)] * 20)
    several = paired('', '')
    several.update(dataroot_gt=[str(tmp_path / 'mixed/gt'), str(gt_2)])
    several.update(dataroot_lq=[str(tmp_path / 'mixed/lq'), str(lq_2)])
    with pytest.raises(UserError, match='mixed/lq/2.png'):
        build_dataset(several)


def test_the_camera_held_sideways(tmp_path):
    """An HR photograph that EXIF turns, and an LR image that is stored upright: a pair of one factor."""
    lq, gt = write_pairs(tmp_path, [(60, 90, 3)] * 4)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(60, 90, 3)).transpose(Image.Transpose.ROTATE_90).save(gt / '3.jpg', quality=100, exif=exif)
    (gt / '3.png').unlink()
    item = build_dataset(paired(lq, gt, 'val'))[3]
    assert item['gt'].shape == (3, 60, 90) and item['scale'].tolist() == [3, 3]


def test_several_roots_and_folders_below_them(tmp_path):
    """Each LR folder belongs to one HR folder; partners lie in the same folder below. Names may be alike."""
    for place, data in enumerate(('one', 'two')):
        for below in ('', 'deep/er'):
            for kind, size in (('lq', (20, 24)), ('gt', (40, 48))):
                folder = tmp_path / data / kind / below
                folder.mkdir(parents=True, exist_ok=True)
                write_image(
                    folder / ('ax2.png' if kind == 'lq' else 'a.png'), noise(*size, seed=4 * place + len(below))
                )
    roots = {kind: [str(tmp_path / data / kind) for data in ('one', 'two')] for kind in ('lq', 'gt')}
    opt = {**paired('', '', 'val', filename_tmpl='{}x2', recursive=True), 'dataroot_lq': roots['lq']}
    opt['dataroot_gt'] = roots['gt']
    dataset = build_dataset(opt)
    assert len(dataset) == 4 and len({item['gt_path'] for item in dataset}) == 4
    for item in dataset:
        assert item['lq_path'] == item['gt_path'].replace('/gt/', '/lq/').replace('a.png', 'ax2.png')
        seed = 4 * ('/two/' in item['gt_path']) + len('deep/er') * ('deep' in item['gt_path'])
        np.testing.assert_array_equal(item['gt'].permute(1, 2, 0) * 255, noise(40, 48, seed))
        np.testing.assert_array_equal(item['lq'].permute(1, 2, 0) * 255, noise(20, 24, seed))
    names = [f'{data}__lq__{below}ax2' for data in ('one', 'two') for below in ('', 'deep__er__')]
    assert image_names(dataset) == names
    assert len(build_dataset({**opt, 'recursive': False})) == 2
    with pytest.raises(UserError, match='dataroot_lq and dataroot_gt must list as many folders; got 1 and 2'):
        build_dataset({**opt, 'dataroot_lq': roots['lq'][:1]})
    (tmp_path / 'two/lq/deep/er/ax2.png').rename(tmp_path / 'two/lq/deep/ax2.png')
    with pytest.raises(UserError, match='two/gt/deep/er/a.png has no partner deep/er/ax2 in .*two/lq'):
        build_dataset(opt)


def test_rectangular_patches_of_pairs(pair_folders):
    """5 rows of 12 LR pixels: every query lies on the LR pixel that covers it."""
    dataset = build_dataset(paired(*pair_folders, filename_tmpl='{}x', lq_size=[5, 12]))
    for index in range(20):
        item = dataset[index]
        assert item['lq'].shape == (3, 5, 12) and item['scale'].tolist() == [2.5, 3]
        position = locate(noise(80, 90, index % 2), item['gt'])
        centre = (position + 0.5) / [2.5, 3]
        row, col = np.clip(((item['coord'].numpy() + 1) / 2 * [5, 12]).astype(int), 0, [4, 11]).T
        covering = item['lq'].permute(1, 2, 0).numpy()[row, col] * 255
        inside = np.abs(centre - np.rint(centre)) > 1e-6
        np.testing.assert_allclose(covering[:, :2][inside], np.floor(centre)[inside], atol=1e-3)
    with pytest.raises(UserError, match='x.png.*too small; lq_size is 5 x 31'):
        build_dataset(paired(*pair_folders, filename_tmpl='{}x', lq_size=[5, 31]))[0]


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


def test_one_folder_for_both(pair_folders, tmp_path):
    """By mistake: a network that returns its input would be the best."""
    gt = pair_folders[1]
    (tmp_path / 'link').symlink_to(gt)
    for lq in (gt, tmp_path / 'link'):
        with pytest.raises(UserError, match='would be its own LR image: dataroot_lq must be another folder'):
            build_dataset(paired(lq, gt, filename_tmpl='{}'))
    for path in list(gt.iterdir()):
        shutil.copy(path, path.with_stem(f'{path.stem}x4'))
    names = [path.name for path in gt.iterdir() if 'x4' not in path.name]
    (tmp_path / 'list.txt').write_text('\n'.join(names))
    both = paired(gt, gt, meta_info_file=str(tmp_path / 'list.txt'), filename_tmpl='{}x4')
    assert len(build_dataset(both)) == len(names)  # partners in one folder are none of it


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
