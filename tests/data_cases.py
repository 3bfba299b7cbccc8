"""Images, options and comparisons that the tests of the datasets share."""

import lmdb
import numpy as np
import torch

SIZES = {'a': (60, 75), 'b': (52, 44), 'c': (90, 41)}


def noise(height, width, seed=0):
    """Every pixel another colour, as far as 24 bits go: a query's colour tells where it was taken."""
    rng = np.random.default_rng(seed)
    return rng.permutation(2**18)[: height * width].astype(np.uint32).view(np.uint8).reshape(height, width, 4)[..., :3]


def options(root, phase='train', **more):
    small = {'lq_size': 8, 'sample_q': 50} if phase == 'train' else {'scale': 2}
    return {
        'name': 'images',
        'type': 'ArbitraryScaleImageDataset',
        'phase': phase,
        'dataroot_gt': str(root),
        'io_backend': {'type': 'disk'},
        **small,
        **more,
    }


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) if torch.is_tensor(first[key]) else first[key] == second[key]
        for key in first
    )


def differs(first, second):
    return not torch.equal(first['gt'], second['gt']) and not torch.equal(first['coord'], second['coord'])


def locate(image, colours):
    """(row, column) in `image` of each of its colours."""
    codes = image.astype(np.int64) @ [1, 256, 65536]
    order = np.argsort(codes, axis=None)
    wanted = np.rint(np.asarray(colours) * 255).astype(np.int64) @ [1, 256, 65536]
    found = order[np.searchsorted(codes.ravel()[order], wanted)]
    assert (codes.ravel()[found] == wanted).all()
    return np.stack(np.unravel_index(found, codes.shape), axis=-1)


def paired(lq, gt, phase='train', **more):
    return {**options(gt, phase), 'scale': None, 'type': 'ArbitraryScalePairedDataset', 'dataroot_lq': str(lq), **more}


def make_lmdb(root, folder, names):
    environment = lmdb.open(str(root), map_size=1 << 24)
    with environment.begin(write=True) as transaction:
        for name in names:
            transaction.put(name.encode(), (folder / f'{name}.png').read_bytes())
    environment.close()
    (root / 'meta_info.txt').write_text(''.join(f'{name}.png (1,1,3) 1\n' for name in names))
