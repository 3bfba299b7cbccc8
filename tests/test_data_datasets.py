"""The arbitrary-scale datasets: what an item holds, that it can be made again, and what awkward input gives."""

import copy
import math
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader, build_dataset
from data_cases import SIZES, differs, locate, make_lmdb, noise, options, same
from helpers import shared_data, write_image
from PIL import Image
from torch.utils.data import DataLoader

from moeisr_basicsr.core.coords import make_coord
from moeisr_basicsr.data import cache as cache_module
from moeisr_basicsr.data.resize import imresize, pil_resize
from moeisr_basicsr.errors import UserError


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / 'hr'
    root.mkdir()
    for seed, (name, size) in enumerate(SIZES.items()):
        write_image(root / f'{name}.png', noise(*size, seed))
    return root


@pytest.mark.parametrize('asymmetric', [False, True])
@pytest.mark.parametrize('downsample', ['matlab', 'pil'])
def test_a_training_item_is_what_its_coordinates_say(folder, asymmetric, downsample):
    """The HR patch is found again by its colours; the LR patch, coordinates and cells must all follow from it."""
    dataset = build_dataset(
        options(folder, asymmetric=asymmetric, downsample=downsample, use_flip=False, use_rot=False)
    )
    scales = []
    for index in range(24):
        item = dataset[index]
        image = noise(*SIZES['abc'[index % 3]], index % 3)
        size = np.rint(item['scale'].numpy() * 8).astype(int)  # of the HR patch
        np.testing.assert_allclose(item['cell'], np.broadcast_to(2 / size, (50, 2)), rtol=1e-6)
        position = locate(image, item['gt'])
        in_patch = np.rint((item['coord'].numpy() + 1) / 2 * size - 0.5).astype(int)
        corner = position - in_patch
        assert (corner == corner[0]).all()
        assert len(set(map(tuple, position.tolist()))) == 50  # without replacement
        top, left = corner[0]
        assert top >= 0 and left >= 0 and (corner[0] + size <= image.shape[:2]).all()
        patch = image[top : top + size[0], left : left + size[1]]
        shrink = pil_resize if downsample == 'pil' else lambda x, s: imresize(x, size=s)
        np.testing.assert_array_equal(item['lq'].permute(1, 2, 0) * 255, shrink(patch, (8, 8)))
        coord = make_coord(tuple(size.tolist()))
        assert torch.equal(item['coord'], coord[torch.from_numpy(in_patch[:, 0] * size[1] + in_patch[:, 1])])
        scales.append(item['scale'])
    scales = torch.stack(scales)
    assert scales.min() >= 1 and scales.max() <= 4 and len(set(scales[:, 0].tolist())) > 8
    assert bool((scales[:, 0] == scales[:, 1]).all()) != asymmetric


def test_flips_and_transpose_move_image_and_queries_alike(folder):
    """An item with augmentation is the item without, turned: the LR pixel below each query has the same colour."""
    plain = build_dataset(options(folder, asymmetric=True, use_flip=False, use_rot=False))
    turned = build_dataset(options(folder, asymmetric=True))
    seen = set()
    for index in range(40):
        before, after = plain[index], turned[index]
        kinds = [(rows, cols, transpose) for rows in (0, 1) for cols in (0, 1) for transpose in (0, 1)]
        for rows, cols, transpose in kinds:
            lq = before['lq'].flip([1] * rows + [2] * cols)
            lq = lq.transpose(1, 2) if transpose else lq
            if torch.equal(lq, after['lq']):
                break
        else:
            raise AssertionError('the LR patch is no flip or transpose of the plain one')
        seen.add((rows, cols, transpose))
        image = noise(*SIZES['abc'[index % 3]], index % 3)
        position, coord = locate(image, after['gt']), after['coord'].numpy()
        if transpose:
            coord = coord[:, ::-1]
        coord = coord * np.array([1 - 2 * rows, 1 - 2 * cols])
        scale = after['scale'].numpy()[::-1] if transpose else after['scale'].numpy()
        np.testing.assert_array_equal(scale, before['scale'].numpy())
        size = np.rint(scale * 8)
        corner = position - np.rint((coord + 1) / 2 * size - 0.5)
        assert (corner == corner[0]).all()
        np.testing.assert_allclose(after['cell'][0], before['cell'][0].flip(0) if transpose else before['cell'][0])
    assert len(seen) == 8


def test_an_item_is_a_function_of_seed_epoch_and_index(folder):
    first, again = build_dataset(options(folder)), build_dataset(options(folder))
    assert all(same(first[index], again[index]) for index in (0, 1, 2, 3, 300))
    assert differs(first[0], first[3])  # the same image, its next repeat
    epoch_0 = first[1]
    first.set_epoch(5)
    assert differs(first[1], epoch_0) and same(again[1], epoch_0)
    first.set_epoch(0)
    assert same(first[1], epoch_0)
    assert differs(build_dataset(options(folder, manual_seed=1))[1], epoch_0)
    for _ in range(3):  # other generators neither matter nor move
        np.random.seed(0)
        torch.manual_seed(0)
        assert same(again[1], epoch_0)
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize('method, cache', [('fork', 'none'), ('fork', 'memory'), ('spawn', 'memory')])
def test_workers_make_the_same_items_and_see_the_epoch(folder, method, cache):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f'no {method} on this system')
    dataset = build_dataset(options(folder, cache=cache))
    alone = build_dataset(options(folder))
    dataset[0]  # opened in this process as well
    loader = DataLoader(
        dataset,
        batch_size=3,
        sampler=range(12),  # four repeats of the three images
        num_workers=2 if method == 'fork' else 1,
        multiprocessing_context=method,
        persistent_workers=True,
    )
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        alone.set_epoch(epoch)
        for number, batch in enumerate(loader):
            for place in range(3):
                item = {key: value[place] for key, value in batch.items()}
                assert same(item, alone[3 * number + place])
    assert number == 3


def test_basicsr_builds_and_loads_it(folder):
    opt = options(folder, batch_size_per_gpu=2, num_worker_per_gpu=0)
    before = copy.deepcopy(opt)
    dataset = build_dataset(opt)
    loader = build_dataloader(dataset, opt, num_gpu=0, dist=False, sampler=None, seed=3)
    batches = list(loader)
    assert opt == before and len(batches) == 1  # the odd one is dropped
    assert batches[0]['lq'].shape == (2, 3, 8, 8) and batches[0]['gt'].shape == (2, 50, 3)
    assert batches[0]['scale'].shape == (2, 2) and batches[0]['scale'].dtype == torch.float32
    assert same(pickle.loads(pickle.dumps(dataset))[4], dataset[4])


@pytest.mark.parametrize(
    'scale, lq_size, size',
    [
        (2, (160, 240), (320, 480)),
        (3, (107, 160), (321, 480)),
        (4, (80, 120), (320, 480)),
        (2.5, (128, 192), (320, 480)),
        (3.3, (97, 145), (320, 479)),
        ([2, 3.5], (160, 137), (320, 480)),
        (1, (321, 481), (321, 481)),
        (12, (26, 40), (312, 480)),
    ],
)
def test_validation_sizes(scale, lq_size, size):
    root = shared_data('BSDS500_train')
    dataset = build_dataset(options(root, 'val', scale=scale))
    index = next(i for i, name in enumerate(dataset.names) if Image.open(root / name).size == (481, 321))
    item = dataset[index]
    assert tuple(item['lq'].shape[1:]) == lq_size and tuple(item['gt'].shape[1:]) == size
    truth = np.asarray(Image.open(item['gt_path']).convert('RGB'))[: size[0], : size[1]]
    np.testing.assert_array_equal(item['gt'].permute(1, 2, 0) * 255, truth)
    np.testing.assert_array_equal(item['lq'].permute(1, 2, 0) * 255, imresize(truth, size=lq_size))
    np.testing.assert_allclose(item['scale'], [size[0] / lq_size[0], size[1] / lq_size[1]], rtol=1e-6)
    factors = scale if isinstance(scale, list) else [scale, scale]
    assert lq_size == tuple(math.floor(n / s) for n, s in zip((321, 481), factors))


def test_validation_ends_and_takes_pil(folder):
    dataset = build_dataset(options(folder, 'test', downsample='pil'))
    items = list(dataset)  # stops by itself
    assert len(items) == len(dataset) == 3
    np.testing.assert_array_equal(items[1]['lq'].permute(1, 2, 0) * 255, pil_resize(noise(52, 44, 1), (26, 22)))


def test_a_small_image_gets_the_largest_factor_it_allows(tmp_path):
    write_image(tmp_path / 'small.png', noise(20, 30))
    dataset = build_dataset(options(tmp_path, scale_range=[2, 4]))
    scales = torch.stack([dataset[index]['scale'] for index in range(30)])
    assert scales.max() == 20 / 8 and scales.min() < 2.4 and (scales[:, 0] == scales[:, 1]).all()
    scales = torch.stack(
        [build_dataset(options(tmp_path, scale_range=[2, 4], asymmetric=True))[index]['scale'] for index in range(30)]
    )
    assert scales.max() == 30 / 8
    write_image(tmp_path / 'small.png', noise(15, 30))
    with pytest.raises(UserError, match=r'small.png: 15 x 30 pixels .* too small.*need 16 x 16'):
        dataset[0]
    with pytest.raises(UserError, match='small.png.*need 24 x 24'):
        build_dataset(options(tmp_path, scale=3))[0]
    with pytest.raises(UserError, match='small.png.*leaves no LR pixel'):
        build_dataset(options(tmp_path, 'val', scale=16))[0]


def test_a_fixed_scale_in_training_and_a_scale_range_beside_it(folder):
    assert {
        tuple(build_dataset(options(folder, scale=[2, 2.5], use_rot=False))[index]['scale'].tolist())
        for index in range(5)
    } == {(2.0, 2.5)}
    dataset = build_dataset(options(folder, scale=2, scale_range=[3, 4]))  # a run's own scale is set on every dataset
    assert all(dataset[index]['scale'].min() > 2.9 for index in range(5))


@pytest.mark.parametrize(
    'change, words',
    [
        ({'dataroot_gt': None}, "images: the key 'dataroot_gt' is missing"),
        ({'dataroot_gt': '/nowhere'}, 'there is no folder /nowhere'),
        ({'scale_range': [4, 1]}, r'scale_range must rise; got \[4, 1\]'),
        ({'scale_range': [0.5, 2]}, 'at least 1'),
        ({'scale_range': [2]}, 'scale_range must be a list of 2 entries'),
        ({'scale_range': [1, float('inf')]}, 'at least 1'),
        ({'scale': 0.5}, 'scale must be a number of at least 1, or a list of 2 entries.*; got 0.5'),
        ({'scale': [2, 3, 4]}, 'scale must be a number of at least 1, or a list of 2 entries'),
        ({'sample_q': 65}, 'sample_q must be at most the 64 pixels of the LR patch'),
        ({'sample_q': 0}, 'at least 1'),
        ({'lq_size': 2.5}, 'whole number'),
        ({'downsample': 'matlb'}, "Did you mean 'matlab'"),
        ({'cache': 'ram'}, 'none, memory'),
        ({'phase': 'trian'}, "Did you mean 'train'"),
        ({'lq_size': [8, 0]}, r'lq_size must be .* a list of 2 entries.*; got \[8, 0\]'),
        ({'lq_size': [8, 10], 'use_rot': True}, 'use_rot must be false with patches of 8 x 10'),
        ({'dataroot_gt': []}, "the key 'dataroot_gt' is missing"),
        ({'io_backend': {'type': 'lmbd'}}, "Did you mean 'lmdb'"),
        ({'io_backend': {'type': 'lmdb'}}, 'is not an LMDB'),
        ({'meta_info_file': '/nowhere.txt'}, '/nowhere.txt cannot be read'),
        ({'phase': 'val'}, "the key 'scale' is missing"),
    ],
)
def test_wrong_options(folder, change, words):
    with pytest.raises(UserError, match=words) as caught:
        build_dataset({**options(folder), **change})
    assert '\n' not in str(caught.value)


def test_folders_without_images_and_other_files(tmp_path, folder):
    (folder / 'notes.txt').write_text('no image')
    (folder / '.hidden.png').write_text('no image')
    assert len(build_dataset(options(folder))) == 3
    with pytest.raises(UserError, match='has no image directly in it'):
        build_dataset(options(tmp_path))


def test_grey_items(folder):
    """The luma of colours, rounded; grey files keep their values; both bicubics and the cache agree."""
    luma = np.rint(noise(52, 44, 1) @ [0.299, 0.587, 0.114])
    colours = build_dataset(options(folder))
    for cache in ('none', 'memory'):
        dataset = build_dataset(options(folder, grey=True, cache=cache))
        item, coloured = dataset[1], colours[1]
        assert item['lq'].shape == (1, 8, 8) and item['gt'].shape == (50, 1)
        assert torch.equal(item['coord'], coloured['coord'])
        np.testing.assert_allclose(
            item['gt'][:, 0] * 255, coloured['gt'] @ torch.tensor([76.245, 149.685, 29.07]), atol=0.51
        )
    for downsample, shrink in (('pil', pil_resize), ('matlab', lambda image, size: imresize(image, size=size))):
        item = build_dataset(options(folder, 'val', grey=True, downsample=downsample))[1]
        np.testing.assert_array_equal(item['gt'][0] * 255, luma)
        np.testing.assert_array_equal(item['lq'][0] * 255, shrink(luma.astype(np.uint8), (26, 22)))
    Image.fromarray(noise(40, 40)[..., 0]).save(folder / 'd.png')
    item = build_dataset(options(folder, 'val', grey=True, scale=1))[3]
    np.testing.assert_array_equal(item['gt'][0] * 255, noise(40, 40)[..., 0])


def test_rectangular_patches(folder):
    """4 rows of 9 LR pixels; the HR patch is found again by its colours. Not transposed unless asked, which fails."""
    dataset = build_dataset(options(folder, lq_size=[4, 9], sample_q=36, asymmetric=True, use_flip=False))
    for index in range(12):
        item = dataset[index]
        assert item['lq'].shape == (3, 4, 9)
        image = noise(*SIZES['abc'[index % 3]], index % 3)
        size = np.rint(item['scale'].numpy() * [4, 9]).astype(int)
        np.testing.assert_allclose(item['cell'], np.broadcast_to(2 / size, (36, 2)), rtol=1e-6)
        position = locate(image, item['gt'])
        corner = position - np.rint((item['coord'].numpy() + 1) / 2 * size - 0.5).astype(int)
        assert (corner == corner[0]).all()
        top, left = corner[0]
        patch = image[top : top + size[0], left : left + size[1]]
        np.testing.assert_array_equal(item['lq'].permute(1, 2, 0) * 255, pil_resize(patch, (4, 9)))
    square = [build_dataset(options(folder, use_rot=use_rot))[1] for use_rot in (None, True, False)]
    assert same(square[0], square[1])
    with pytest.raises(UserError, match='c.png: 90 x 41 .* lq_size 4 x 42 and the least factor need 4 x 42'):
        build_dataset(options(folder, lq_size=[4, 42], sample_q=36))[2]


def test_several_roots_and_folders_below(folder, tmp_path):
    """Equal names in two roots, and in folders below; hidden folders and circles of links are left out."""
    second = tmp_path / 'second'
    for below in ('', 'deep', 'deep/er', '.thumbnails'):
        (second / below).mkdir(exist_ok=True)
        write_image(second / below / 'a.png', noise(30, 30 + len(below)))
    (second / 'deep' / 'circle').symlink_to(second)
    assert len(build_dataset(options(second))) == 1
    assert [item['gt'].shape[2] for item in build_dataset(options(second, 'val', recursive=True))] == [30, 34, 36]
    dataset = build_dataset({**options(folder, 'val', recursive=True), 'dataroot_gt': [str(folder), str(second)]})
    assert [item['gt_path'] for item in dataset][3:] == [
        str(second / name) for name in ('a.png', 'deep/a.png', 'deep/er/a.png')
    ]
    np.testing.assert_array_equal(dataset[0]['gt'].permute(1, 2, 0) * 255, noise(60, 74 + 1, 0)[:, :74])
    (second / 'a.png').unlink()
    with pytest.raises(UserError, match='no image directly in it .* The folders below it have some: set recursive'):
        build_dataset(options(second))
    with pytest.raises(UserError, match='meta_info_file lists the images of one folder; got 2'):
        build_dataset({**options('', meta_info_file='x'), 'dataroot_gt': [str(folder), str(second)]})


def test_an_lmdb_without_its_backend_gets_a_hint(folder, tmp_path):
    root = tmp_path / 'images.lmdb'
    root.mkdir()
    make_lmdb(root, folder, 'abc')
    with pytest.raises(UserError, match=r'images.lmdb is an LMDB: set io_backend: \{type: lmdb\}') as error:
        build_dataset(options(root))
    assert '\n' not in str(error.value)


def test_names_with_blanks_in_lists(folder, tmp_path):
    """BasicSR's form, a name alone, and the lines 'HR, LR' that other tools write."""
    names = ['my photo (2).png', 'a b.c 3.png', 'my photo.png']
    for place, name in enumerate(names):
        write_image(folder / name, noise(40, 40 + place))
    listed = tmp_path / 'list.txt'
    listed.write_text('my photo (2).png\na b.c 3.png (40,41,3) 1\n  my photo.png, my photo_x2.png\n')
    dataset = build_dataset(options(folder, 'val', meta_info_file=str(listed)))
    assert [item['gt_path'] for item in dataset] == [str(folder / name) for name in names]
    root, keys = tmp_path / 'images.lmdb', [name.removesuffix('.png') for name in names]
    root.mkdir()
    make_lmdb(root, folder, keys)
    for lines in (''.join(f'{key}.png (1,1,3) 1\n' for key in keys), '\n'.join(keys)):
        listed.write_text(lines)
        opt = options(root, 'val', io_backend={'type': 'lmdb'}, meta_info_file=str(listed))
        assert [item['gt'].shape for item in build_dataset(opt)] == [item['gt'].shape for item in dataset]
    listed.write_text('my phot.png\n')
    with pytest.raises(UserError, match="list.txt: my phot.png is not in .*Did you mean 'my photo.png'"):
        build_dataset(options(folder, meta_info_file=str(listed)))


def test_meta_info_files(folder, tmp_path):
    listed = tmp_path / 'list.txt'
    listed.write_text('c.png (90,41,3)\n\na.png (60,75,3) 1\n')
    dataset = build_dataset(options(folder, 'val', meta_info_file=str(listed)))
    assert [item['gt'].shape[1] for item in dataset] == [90, 60]
    listed.write_text('z.png\n')
    with pytest.raises(UserError, match='list.txt: z.png is not in'):
        build_dataset(options(folder, meta_info_file=str(listed)))
    listed.write_text('\n')
    with pytest.raises(UserError, match='lists no image'):
        build_dataset(options(folder, meta_info_file=str(listed)))


@pytest.mark.parametrize('cache', ['none', 'memory'])
def test_lmdb_gives_what_the_folder_gives(folder, tmp_path, cache):
    root = tmp_path / 'images.lmdb'
    root.mkdir()
    make_lmdb(root, folder, 'abc')
    disk = build_dataset(options(folder))
    dataset = build_dataset(options(root, io_backend={'type': 'lmdb'}, cache=cache))
    for index in range(4):
        assert same({**dataset[index], 'gt_path': '', 'lq_path': ''}, {**disk[index], 'gt_path': '', 'lq_path': ''})
    listed = tmp_path / 'list.txt'
    listed.write_text('b.png (1,1,3)\n')
    assert len(build_dataset(options(root, io_backend={'type': 'lmdb'}, meta_info_file=str(listed)))) == 1
    listed.write_text('bb\n')
    with pytest.raises(UserError, match='list.txt: bb is not in'):
        build_dataset(options(root, io_backend={'type': 'lmdb'}, meta_info_file=str(listed)))
    second = build_dataset(options(root, 'val', io_backend={'type': 'lmdb'}))  # two datasets of one LMDB, both open
    assert torch.equal(second[1]['gt'], build_dataset(options(folder, 'val'))[1]['gt'])
    for _ in range(2):
        loader = DataLoader(dataset, batch_size=3, num_workers=2)  # forked where the system can
        assert torch.equal(next(iter(loader))['lq'][2], disk[2]['lq'])
    assert torch.equal(second[2]['gt'], build_dataset(options(folder, 'val'))[2]['gt'])


def test_a_damaged_file_or_record_names_itself(folder, tmp_path):
    whole = (folder / 'b.png').read_bytes()
    (folder / 'b.png').write_bytes(whole[: len(whole) // 2])
    dataset = build_dataset(options(folder))
    with pytest.raises(UserError, match=str(folder / 'b.png')):
        dataset[1]
    with pytest.raises(UserError, match='b.png'):  # the error crosses the border of a worker process
        list(DataLoader(dataset, num_workers=1, batch_size=3, sampler=[0, 1, 2]))
    (folder / 'b.png').unlink()
    with pytest.raises(UserError, match='b.png: cannot be read .No such file'):
        dataset[1]
    (folder / 'b.png').write_bytes(b'')
    with pytest.raises(UserError, match='b.png: the file is empty'):
        dataset[1]
    with pytest.raises(UserError, match='b.png: the file is empty'):
        build_dataset(options(folder, cache='memory'))
    (folder / 'b.png').write_bytes(whole[: len(whole) // 2])
    root = tmp_path / 'images.lmdb'
    root.mkdir()
    make_lmdb(root, folder, 'abc')
    (root / 'meta_info.txt').write_text('a.png (1,1,3) 1\nb.png (1,1,3) 1\nd.png (1,1,3) 1\n')
    dataset = build_dataset(options(root, io_backend={'type': 'lmdb'}))
    with pytest.raises(UserError, match='images.lmdb: record b: the image is damaged'):
        dataset[1]
    with pytest.raises(UserError, match='images.lmdb: record d: the LMDB has no such record'):
        dataset[2]


def test_images_of_every_kind_train(tmp_path):
    """Grey, grey with alpha, RGBA, palette, 16-bit and CMYK images all become RGB items."""
    colours = noise(40, 40)
    Image.fromarray(colours[..., 0]).save(tmp_path / 'a_grey.png')
    write_image(tmp_path / 'b_grey_alpha.png', colours, colours[..., 0], grey=True)
    write_image(tmp_path / 'c_rgba.png', colours, colours[..., 1])
    Image.fromarray(colours).quantize(16).save(tmp_path / 'd_palette.png')
    write_image(tmp_path / 'e_sixteen.png', colours.astype(np.uint16) * 257 - (colours > 99), bit_depth=16)
    Image.fromarray(colours).convert('CMYK').save(tmp_path / 'f_cmyk.jpg')
    for cache in ('none', 'memory'):
        dataset = build_dataset(options(tmp_path, cache=cache, downsample='pil'))
        for index in range(6):
            item = dataset[index]
            assert item['lq'].shape == (3, 8, 8) and item['gt'].shape == (50, 3)
            assert item['gt'].min() >= 0 and item['gt'].max() <= 1
        assert (dataset[0]['gt'] == dataset[0]['gt'][:, :1]).all() and (dataset[0]['lq'] == dataset[0]['lq'][:1]).all()
        sixteen = dataset[4]['gt'] * 65535
        torch.testing.assert_close(sixteen, sixteen.round(), rtol=0, atol=0.01)
        assert not torch.allclose(sixteen / 257, (sixteen / 257).round(), atol=1e-4)  # not cut to 8 bits


def test_the_memory_cache_reads_each_image_once(folder, monkeypatch):
    dataset = build_dataset(options(folder, cache='memory'))
    first = [dataset[index] for index in range(3)]
    for path in folder.iterdir():
        path.unlink()
    assert all(same(dataset[index], first[index]) for index in range(3))
    with pytest.raises(ValueError, match='read-only'):
        dataset.images.rgb(str(folder / 'a.png'))[:] = 0
    usage = type('Usage', (), {'free': 1000})
    monkeypatch.setattr(cache_module.shutil, 'disk_usage', lambda _: usage)
    write_image(folder / 'a.png', noise(60, 75))
    with pytest.raises(UserError, match='/dev/shm has .* --shm-size'):
        build_dataset(options(folder, cache='memory'))
    usage.free = 10**9
    usage.free = 3 * len(build_dataset(options(folder, cache='memory')).images.pixels)
    build_dataset(options(folder, cache='memory'))
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    with pytest.raises(UserError, match='on each of 4 ranks'):  # each would see room for itself
        build_dataset(options(folder, cache='memory'))
