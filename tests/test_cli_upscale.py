"""`basicsr upscale`: sizes, alpha, 16 bit, grey, expert maps, folders, and files that are never half written."""

import os

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from helpers import write_image
from PIL import Image, ImageCms

from moeisr_basicsr.checkpoint import load_model, save_model
from moeisr_basicsr.cli import main, upscale_run
from moeisr_basicsr.cli.expert_map import ExpertMapPicture
from moeisr_basicsr.data.image_reader import read_image
from moeisr_basicsr.data.resize import resize
from moeisr_basicsr.inference import upscale

NETWORK = {
    'type': 'MoEISR',
    'encoder': {'type': 'EDSREncoder', 'num_feat': 6, 'num_block': 1},
    'experts': [[4], [4, 4], [4] * 3, [4] * 4],
    'mapper': {'num_layers': 1, 'num_feat': 4},
    'skip': 'bicubic',
}


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """A model file whose mapper gives pixels to every expert."""
    path = tmp_path_factory.mktemp('model') / 'm.safetensors'
    for seed in range(100):
        torch.manual_seed(seed)
        net = build_network(NETWORK)
        for expert in net.decoder.pool.experts:
            expert.layers[-1].reset_parameters()  # a bicubic skip starts with zero
        torch.nn.init.normal_(net.decoder.mapper.query_out.weight, std=3)
        torch.nn.init.normal_(net.decoder.mapper.query_in.weight)
        if len(upscale(net, as_tensor(noise((12, 7, 3))), scale=3).expert_map.unique()) == 4:
            break
    save_model(path, net, NETWORK)
    return str(path)


def test_a_checkpoint_upscales_without_conversion(model, capsys):
    """As training writes it, with the network that it belongs to."""
    write_image('in.png', noise((6, 5, 3)))
    weights = load_model(model).state_dict()
    torch.save({'params': weights, 'network_g': NETWORK}, 'net_g_latest.pth')
    assert run(model, 'in.png', '-o', 'a.png', '--scale', 2) == 0
    assert run('net_g_latest.pth', 'in.png', '-o', 'b.png', '--scale', 2) == 0
    np.testing.assert_array_equal(read('a.png'), read('b.png'))
    weights['encoder.conv_first.weight'][0, 0, 0, 0] = float('nan')
    torch.save({'params': weights, 'network_g': NETWORK}, 'nan.pth')
    capsys.readouterr()
    assert run('nan.pth', 'in.png', '-o', 'c.png', '--scale', 2) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and 'nan.pth: encoder.conv_first.weight has values that are NaN' in error
    assert not os.path.exists('c.png')


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def noise(shape, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def read(path):
    """As stored: (R, S), or (R, S, C) with BGR turned into RGB."""
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None, path
    if image.ndim == 2:
        return image
    return np.concatenate([image[..., 2::-1], image[..., 3:]], axis=2)


def run(model, *argv):
    return main(['upscale', *map(str, argv), '--model', model])


def as_tensor(rgb, depth=255):
    return torch.from_numpy(rgb.astype(np.float32) / np.float32(depth)).permute(2, 0, 1)[None]


def expected(model, rgb, depth=255, **target):
    """Before rounding; grey where all three channels of `rgb` are equal."""
    image = upscale(load_model(model), as_tensor(rgb, depth), **target).image[0].permute(1, 2, 0).numpy()
    if (rgb == rgb[..., :1]).all():
        image = image @ np.array([0.299, 0.587, 0.114], np.float32)  # BT.601
    return image.clip(0, 1) * depth


@pytest.mark.parametrize(
    ('argv', 'target', 'size'),
    [
        (['--scale', '3.3'], {'scale': 3.3}, (40, 23)),
        (['--scale', '2.5x4'], {'scale': (2.5, 4)}, (30, 28)),
        (['--scale', '1'], {'scale': 1}, (12, 7)),
        (['--size', '31x17'], {'size': (17, 31)}, (17, 31)),
        (['--scale', '2', '--cost-weight', '0.7'], {'scale': 2, 'cost_weight': 0.7}, (24, 14)),
        (['--scale', '2', '--budget', '0.6'], {'scale': 2, 'budget': 0.6}, (24, 14)),
    ],
)
def test_size_and_pixels(model, argv, target, size):
    rgb = noise((12, 7, 3))
    cv2.imwrite('a.png', rgb[..., ::-1])
    assert run(model, 'a.png', '-o', 'out.png', *argv) == 0
    output = read('out.png')
    assert output.shape == (*size, 3) and output.dtype == np.uint8
    assert np.abs(output - expected(model, rgb, **target)).max() <= 0.501


def test_tiles_and_16_bit_precision_change_little(model):
    rgb = cv2.GaussianBlur(noise((40, 36, 3)), (0, 0), 2)
    cv2.imwrite('a.png', rgb[..., ::-1])
    assert run(model, 'a.png', '-o', 'whole.png', '--scale', '2', '--tile', '0') == 0
    assert run(model, 'a.png', '-o', 'tiles.png', '--scale', '2', '--tile', '16') == 0
    assert run(model, 'a.png', '-o', 'bf16.png', '--scale', '2', '--precision', 'bf16') == 0
    whole = read('whole.png').astype(int)
    assert np.abs(whole - read('tiles.png')).max() <= 1
    assert 0 < np.abs(whole - read('bf16.png')).mean() < 3


@pytest.mark.parametrize('extension', ['png', 'tif'])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('kind', ['rgb', 'rgba', 'grey', 'grey alpha'])
def test_depth_alpha_and_grey_survive(model, kind, dtype, extension):
    if kind == 'grey alpha':
        if dtype == np.uint16 and extension == 'tif':
            pytest.skip('nothing at hand reads 16-bit grey with alpha from TIFF')
        source = noise((12, 7, 2), dtype)
        grey_rgb = np.repeat(source[..., :1], 3, axis=2)
        write_image('a.png', grey_rgb, source[..., 1], 8 * dtype().itemsize, grey=True)  # OpenCV cannot
    else:
        source = noise({'rgb': (12, 7, 3), 'rgba': (12, 7, 4), 'grey': (12, 7)}[kind], dtype)
        stored = source if source.ndim == 2 else np.concatenate([source[..., 2::-1], source[..., 3:]], axis=2)
        cv2.imwrite('a.png', stored)
    assert run(model, 'a.png', '-o', f'out.{extension}', '--scale', '2x3') == 0
    depth = np.iinfo(dtype).max
    grey = kind.startswith('grey')
    colours = np.repeat(source.reshape(12, 7, -1)[..., :1], 3, axis=2) if grey else source[..., :3]
    wanted = expected(model, colours, depth, scale=(2, 3))
    if dtype == np.uint8:  # OpenCV multiplies the alpha of a TIFF into its colours, and drops that of grey
        output = np.asarray(Image.open(f'out.{extension}'))
    elif kind == 'grey alpha':
        image = read_image(f'out.{extension}')
        assert image.was_grey
        output = np.stack([image.rgb[..., 0], image.alpha], axis=2)
    else:
        output = read(f'out.{extension}')
    assert output.dtype == dtype and output.shape[:2] == (24, 21)
    has_alpha = kind in ('rgba', 'grey alpha')
    assert output.reshape(24, 21, -1).shape[2] == (1 if grey else 3) + has_alpha
    colours = output[..., :-1] if has_alpha else output
    assert np.abs(colours.reshape(wanted.shape) - wanted).max() <= (0.51 if dtype == np.uint8 else 1)
    if has_alpha:
        np.testing.assert_array_equal(output[..., -1], resize(source[..., -1], (24, 21)))


def test_colour_profile_and_camera_survive(model):
    profile, exif = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes(), Image.Exif()
    exif.update({271: 'Camera', 274: 6})  # make; to be turned by 90 degrees
    Image.fromarray(noise((12, 7, 3))).save('a.jpg', icc_profile=profile, exif=exif.tobytes())
    for target in ('out.png', 'out.jpg', 'out.webp', 'out.tif'):
        assert run(model, 'a.jpg', '-o', target, '--scale', '2') == 0
        with Image.open(target) as output:
            assert output.size == (24, 14) and output.info['icc_profile'] == profile
            assert output.getexif().get(271) == (None if target == 'out.tif' else 'Camera')
            assert output.getexif().get(274, 1) == 1


def test_what_a_format_cannot_hold_is_an_error_and_not_lost(model, capsys):
    cv2.imwrite('alpha.png', noise((8, 8, 4)))
    cv2.imwrite('deep.png', noise((8, 8, 3), np.uint16))
    assert run(model, 'alpha.png', '-o', 'out.jpg', '--scale', '2') == 2
    assert 'JPEG cannot hold transparency' in capsys.readouterr().err
    assert run(model, 'deep.png', '-o', 'out.webp', '--scale', '2') == 2
    assert 'WEBP cannot hold 16 bits' in capsys.readouterr().err
    assert sorted(os.listdir()) == ['alpha.png', 'deep.png']
    for extension, quality in (('jpg', cv2.IMWRITE_JPEG_QUALITY), ('webp', cv2.IMWRITE_WEBP_QUALITY)):
        cv2.imwrite('plain.png', cv2.GaussianBlur(noise((16, 16, 3)), (0, 0), 3))
        assert run(model, 'plain.png', '-o', f'out.{extension}', '--scale', '2') == 0
        run(model, 'plain.png', '-o', 'out.png', '--scale', '2', '--overwrite')
        # A random network's pixels are noise, of which a lossy format loses much: compare with OpenCV's own coder.
        coded = cv2.imencode(f'.{extension}', read('out.png')[..., ::-1], [quality, 95])[1]
        coded = cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1]
        assert np.abs(read(f'out.{extension}').astype(int) - coded).mean() < 2


def test_expert_map(model, capsys):
    rgb = noise((12, 7, 3))
    cv2.imwrite('a.png', rgb[..., ::-1])
    assert run(model, 'a.png', '-o', '.', '--scale', '3', '--expert-map') == 0
    expert_map = upscale(load_model(model), as_tensor(rgb), scale=3).expert_map[0].numpy()
    assert len(np.unique(expert_map)) == 4
    picture = read('a_x3_experts.png')
    colours = [picture[:36, :21][expert_map == expert] for expert in range(4)]
    assert all((found == found[0]).all() for found in colours)
    yellow, green, blue, red = (
        found[0].astype(int) for found in colours
    )  # cheapest to most expensive, as in the paper
    assert yellow[0] > 200 and yellow[1] > 200 and yellow[2] < 100
    assert green.argmax() == 1 and blue.argmax() == 2 and red.argmax() == 0 and red[1] < 100
    shares = ' '.join(f'{(expert_map == expert).mean():.1%}' for expert in range(4))
    assert f'experts {shares}' in capsys.readouterr().out
    for colour in (yellow, green, blue, red):  # the legend has a box of each
        assert (picture[36:] == colour).all(axis=-1).sum() >= 25


def test_colours_go_by_cost_and_the_legend_says_the_shares():
    picture = ExpertMapPicture(400, [1.0, 0.1])  # the first expert is the expensive one
    rows = picture.rows(np.array([[0, 1, 1, 1]], np.uint8))
    assert rows.shape == (1, picture.width, 3)
    assert rows[0, 0].argmax() == 0 and rows[0, 0, 1] < 100 and rows[0, 1, 1] > 200  # red, yellow
    assert picture.shares() == [0.25, 0.75]
    assert picture.text(1, 0.75) == '2: 75.0% (cost 0.10)'
    assert picture.legend().shape == (picture.legend_rows, picture.width, 3)


@pytest.mark.parametrize('count', [1, 2, 3, 4, 7])
def test_any_number_of_experts_has_colours_of_its_own(count):
    picture = ExpertMapPicture(10, list(np.linspace(0.1, 1, count)))
    assert len({tuple(colour) for colour in picture.colours.tolist()}) == count
    assert picture.width >= 10


def test_folder(model, capsys):
    os.mkdir('in')
    for name in ('b.png', 'a.jpg', 'c.tif'):
        cv2.imwrite(f'in/{name}', noise((9, 8, 3)))
    open('in/notes.txt', 'w').write('no image')
    open('in/bad.png', 'wb').write(open('in/b.png', 'rb').read()[:60])
    assert run(model, 'in', '-o', 'out/deeper', '--scale', '1.5x2') == 2
    output, error = capsys.readouterr()
    assert error.count('basicsr: error: ') == 1 and 'bad.png' in error
    names = ['a_x1.5x2.png', 'b_x1.5x2.png', 'c_x1.5x2.png']
    assert sorted(os.listdir('out/deeper')) == names and all(name in output for name in names)
    assert read('out/deeper/a_x1.5x2.png').shape == (14, 16, 3)
    assert run(model, 'in/a.jpg', 'in/c.tif', '-o', 'out', '--size', '16x20', '--ext', 'webp') == 0
    assert sorted(os.listdir('out')) == ['a_16x20.webp', 'c_16x20.webp', 'deeper']


def test_existing_files_are_kept_unless_told(model, capsys, monkeypatch):
    os.mkdir('in')
    for name in ('a', 'b'):
        cv2.imwrite(f'in/{name}.png', noise((9, 8, 3)))
    os.mkdir('out')
    open('out/a_x2.png', 'w').write('mine')
    assert run(model, 'in', '-o', 'out', '--scale', '2') == 2
    assert 'out/a_x2.png already exists: give --overwrite' in capsys.readouterr().err
    assert os.listdir('out') == ['a_x2.png']
    assert run(model, 'in', '-o', 'out', '--scale', '2', '--resume') == 0
    assert open('out/a_x2.png').read() == 'mine' and read('out/b_x2.png').shape == (18, 16, 3)
    assert run(model, 'in', '-o', 'out', '--scale', '2', '--resume', '--expert-map') == 0  # the maps are missing
    assert read('out/a_x2.png').shape == (18, 16, 3) and len(os.listdir('out')) == 4
    assert run(model, 'in', '-o', 'out', '--scale', '2', '--resume') == 0
    assert 'Nothing to do' in capsys.readouterr().out
    assert run(model, 'in', '-o', 'out', '--scale', '2', '--overwrite') == 0


def test_two_images_of_one_name(model, capsys):
    os.mkdir('in')
    for name in ('a.png', 'a.jpg'):
        cv2.imwrite(f'in/{name}', noise((9, 8, 3)))
    assert run(model, 'in', '-o', 'out', '--scale', '2') == 2
    assert 'would both become out/a_x2.png' in capsys.readouterr().err
    assert not os.path.exists('out')


def test_an_image_that_is_given_twice_is_done_once(model, capsys):
    os.mkdir('in')
    for name in ('a.png', 'b.png'):
        cv2.imwrite(f'in/{name}', noise((9, 8, 3)))
    os.symlink('a.png', 'in/link.png')
    assert (
        run(model, 'in/b.png', 'in', './in/../in/a.png', os.path.abspath('in/b.png'), '-o', 'out', '--scale', '2') == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ['in/b.png', 'in/a.png', 'in/link.png']
    assert sorted(os.listdir('out')) == ['a_x2.png', 'b_x2.png', 'link_x2.png']
    assert run(model, 'in/a.png', 'in/a.png', '-o', 'one.png', '--scale', '2') == 0 and os.path.isfile('one.png')


def test_processes_share_the_images(model, monkeypatch):
    os.mkdir('in')
    for name in 'abcde':
        cv2.imwrite(f'in/{name}.png', noise((5, 5, 3)))
    monkeypatch.setenv('WORLD_SIZE', '2')
    done = []
    for rank in ('0', '1'):
        monkeypatch.setenv('RANK', rank)
        assert run(model, 'in', '-o', 'out', '--scale', '2', *(['--resume'] if rank == '1' else [])) == 0
        done.append(len(os.listdir('out')))
    assert done == [3, 5]


def test_a_folder_takes_its_own_results(model, capsys):
    os.mkdir('in')
    for name in 'ab':
        cv2.imwrite(f'in/{name}.png', noise((5, 5, 3)))
    assert run(model, 'in', '-o', 'in', '--scale', '2', '--expert-map') == 0
    before = sorted(os.listdir('in'))
    os.remove('in/b_x2.png')
    assert run(model, 'in', '-o', 'in', '--scale', '2', '--expert-map', '--resume') == 0
    assert (
        sorted(os.listdir('in'))
        == before
        == ['a.png', 'a_x2.png', 'a_x2_experts.png', 'b.png', 'b_x2.png', 'b_x2_experts.png']
    )
    assert run(model, 'in', '-o', 'in', '--scale', '2', '--expert-map', '--overwrite') == 2
    assert 'a_x2.png is an input: it would be overwritten' in capsys.readouterr().err


@pytest.mark.parametrize('extension', ['png', 'jpg'])
@pytest.mark.parametrize(
    ('error', 'code', 'words'),
    [
        (RuntimeError('out of memory'), 2, 'not enough memory'),
        (KeyboardInterrupt(), 130, 'interrupted'),
        (ValueError('a slip of ours'), 1, 'this is a bug'),
    ],
)
def test_a_failure_in_the_middle_leaves_no_file(model, monkeypatch, capsys, extension, error, code, words):
    """It comes after the first strip: neither the image nor its map may appear, and an old file stays."""
    cv2.imwrite('a.png', noise((12, 7, 3)))
    open(f'out.{extension}', 'w').write('old')
    whole = upscale_run.upscale_strips

    def failing(*args):
        yield next(whole(*args))
        raise error

    monkeypatch.setattr(upscale_run, 'upscale_strips', failing)
    argv = ['a.png', '-o', f'out.{extension}', '--scale', '2', '--overwrite', '--expert-map']
    assert run(model, *argv) == code and words in capsys.readouterr().err
    assert sorted(os.listdir()) == ['a.png', f'out.{extension}'] and open(f'out.{extension}').read() == 'old'


def test_only_a_lack_of_memory_is_called_so(model, monkeypatch, capsys):
    def failing(*args):
        raise RuntimeError('CUDA error: an illegal memory access was encountered')
        yield

    cv2.imwrite('a.png', noise((12, 7, 3)))
    monkeypatch.setattr(upscale_run, 'upscale_strips', failing)
    assert run(model, 'a.png', '-o', 'out.png', '--scale', '2') == 1
    assert 'illegal memory access' in capsys.readouterr().err


def test_a_full_disk_is_one_line(model, monkeypatch, capsys):
    from moeisr_basicsr import atomic_file

    os.mkdir('in')
    for name in 'abc':
        cv2.imwrite(f'in/{name}.png', noise((12, 7, 3)))

    def full(handle):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(atomic_file.os, 'fsync', full)
    assert run(model, 'in', '-o', 'out', '--scale', '2') == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all('No space left on device' in line for line in lines)
    assert os.listdir('out') == []


def test_one_pixel_and_more_than_one_frame(model, capsys):
    cv2.imwrite('one.png', noise((1, 1, 3)))
    assert run(model, 'one.png', '-o', 'out.png', '--scale', '5x2') == 0
    assert read('out.png').shape == (5, 2, 3)
    frames = [Image.fromarray(noise((8, 8, 3), seed=seed)) for seed in (0, 1)]
    frames[0].save('two.tif', save_all=True, append_images=frames[1:])
    assert run(model, 'two.tif', '-o', 'two.png', '--scale', '2') == 0
    assert 'only the first of 2 frames is upscaled' in capsys.readouterr().err
