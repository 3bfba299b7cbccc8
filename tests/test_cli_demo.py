"""`basicsr demo`: what the page shows, without a browser; `scripts/try_demo.py` drives the page itself."""

import ast
import importlib.util
import math
import socket
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from helpers import write_image
from PIL import Image

from moeisr_basicsr.analysis.pictures import bicubic, expert_colours
from moeisr_basicsr.cli import main
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.inference import encode_whole, upscale, upscale_strips
from moeisr_basicsr.tools import demo

PACKAGE = Path(demo.__file__).resolve().parents[1]
ENCODER = {'type': 'EDSREncoder', 'num_feat': 6, 'num_block': 1}
NETWORK = {
    'type': 'MoEISR',
    'encoder': ENCODER,
    'experts': [[4], [4, 4], [8] * 3],
    'mapper': {'num_layers': 1, 'num_feat': 4},
    'skip': 'bicubic',
}
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec('gradio') is None, reason='the page itself needs the extra [demo], 220 MB of packages'
)


@pytest.fixture(scope='module')
def net():
    """Its mapper gives pixels to every expert."""
    for seed in range(100):
        torch.manual_seed(seed)
        net = build_network(NETWORK).eval()
        for expert in net.decoder.pool.experts:
            expert.layers[-1].reset_parameters()  # a bicubic skip starts with zero
        torch.nn.init.normal_(net.decoder.mapper.query_out.weight, std=3)
        torch.nn.init.normal_(net.decoder.mapper.query_in.weight)
        if len(upscale(net, demo.as_tensor(noise((20, 24, 3)))[None], scale=3).expert_map.unique()) == 3:
            return net
    raise AssertionError('no seed uses all experts')


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 255, shape, np.uint8, endpoint=True)


def luma_psnr(image, truth, shave):
    """Of RGB in [0, 255], in plain steps."""
    weights = np.array([65.738, 129.057, 25.064]) / 256
    error = ((image.astype(float) - truth.astype(float)) @ weights)[shave:-shave, shave:-shave]
    return 20 * math.log10(255) - 10 * math.log10((error**2).mean())


@pytest.mark.parametrize(('factor', 'cost_weight'), [(3.3, 0.0), (3.3, 1.5), (1, 0.0)])
def test_the_view_is_what_upscale_makes(net, factor, cost_weight):
    rgb = noise((20, 24, 3))
    view = demo.render(net, demo.encode(net, rgb), factor, cost_weight)
    lq = torch.from_numpy(rgb / np.float32(255)).permute(2, 0, 1)[None]
    truth = upscale(net, lq, scale=factor, cost_weight=cost_weight)
    wanted = truth.image[0].permute(1, 2, 0).numpy().clip(0, 1) * 255
    assert np.abs(view.image - wanted).max() <= 0.501
    expert_map = truth.expert_map[0].numpy()
    shares = [float((expert_map == j).mean()) for j in range(3)]
    assert view.shares == pytest.approx(shares)
    assert view.cost == pytest.approx(np.dot(shares, net.expert_costs.numpy()), abs=1e-6)
    smooth = bicubic(lq[0], wanted.shape[:2]).permute(1, 2, 0).numpy() * 255
    assert np.abs(view.bicubic - smooth).max() <= 0.01
    grey = view.image @ np.array([0.299, 0.587, 0.114])
    colours = expert_colours(3, net.expert_costs.tolist())[:, ::-1].astype(float)
    assert np.abs(view.overlay - (grey[..., None] + colours[expert_map]) / 2).max() <= 1.51  # rounded twice
    assert view.psnr is None and view.truth_factor == ''


def test_sliders_do_not_run_the_encoder(net, tmp_path):
    for name in 'ab':
        write_image(tmp_path / f'{name}.png', noise((20, 24, 3), ord(name)))
    runs = []
    hook = net.encoder.register_forward_hook(lambda *_: runs.append(1))
    page = demo.Page(net, tmp_path, 'fp32')
    counts = []
    for picture, factor, cost in (('a', 2, 0.0), ('a', 3.7, 0.0), ('a', 3.7, 2.0), ('b', 3.7, 2.0), ('a', 2, 0.0)):
        page.show(str(tmp_path / f'{picture}.png'), factor, cost, None)
        counts.append(len(runs))
    hook.remove()
    assert counts == [1, 1, 1, 2, 3]  # the last picture only is kept


def test_pictures_get_new_addresses_and_do_not_pile_up(net, tmp_path):
    write_image(tmp_path / 'a.png', noise((20, 24, 3)))
    page, shown = demo.Page(net, tmp_path, 'fp32'), []
    picture, truth = page.shrink(str(tmp_path / 'a.png'), 1.2, None)
    for call in range(demo.KEPT_VIEWS + 3):
        shown += page.show(picture, 1.2, call / 4, truth)[0]
    assert len(set(shown)) == len(shown)
    assert [Path(path).exists() for path in shown] == [False] * 6 + [True] * 2 * demo.KEPT_VIEWS
    assert Path(picture).exists() and Path(truth).exists()  # what it shows is made of these


def test_codes_of_the_whole_image_serve_as_the_tiles_do(net):
    lq = demo.as_tensor(noise((40, 36, 3)))[None]
    encoded = encode_whole(net, lq)
    for size, cost_weight in (((80, 72), 0.0), ((101, 90), 1.0)):
        strips = list(upscale_strips(net, lq, size, cost_weight, encoded=encoded))
        image = torch.cat([strip.image for strip in strips], dim=1)
        torch.testing.assert_close(image, upscale(net, lq, size=size, cost_weight=cost_weight, tile=16).image[0])


def test_psnr_against_a_truth(net):
    truth = noise((61, 73, 3), 1)
    source = demo.encode(net, noise((20, 24, 3)))
    view = demo.render(net, source, 3.0, truth=truth)  # x3.05 and x3.04: the slider's 3 is the nearest
    assert view.image.shape == truth.shape
    assert view.psnr == pytest.approx([luma_psnr(image, truth, 4) for image in (view.bicubic, view.image)], abs=0.02)
    text = demo.facts(net, view)
    assert f'{view.psnr[0]:.2f} dB' in text and f'{view.psnr[1]:.2f} dB' in text and '73 x 61 pixels' in text
    other = demo.render(net, source, 4.0, truth=truth)
    assert other.psnr is None and other.image.shape == (80, 96, 3)
    assert 'only at the size of the original, x3.05' in demo.facts(net, other)
    assert 'x3.05 in rows and x2 in columns' in demo.facts(net, demo.render(net, source, 3.0, truth=truth[:, :48]))


def test_legend_goes_from_cheapest_to_most_expensive(net):
    view = demo.render(net, demo.encode(net, noise((20, 24, 3))), 2.0)
    text = demo.legend(net, view)
    places = [text.index(word) for word in ('rgb(255,220,0)', 'cheapest', 'most expensive', 'rgb(220,40,40)')]
    assert places[0] < places[1] < places[3] < places[2]
    assert all(demo.percent(share) in text for share in view.shares)
    assert (demo.percent(0.0018), demo.percent(0.283), demo.percent(1)) == ('0.18 %', '28 %', '100 %')


def test_a_picture_is_shrunk_as_the_benchmarks_do(tmp_path, net):
    large = noise((67, 100, 3))
    small, truth = demo.shrink(large, 3.3)
    assert small.shape == (20, 30, 3)  # floor(67 / 3.3), floor(100 / 3.3)
    np.testing.assert_array_equal(truth, large[:66, :99])  # round(20 * 3.3), round(30 * 3.3)
    assert demo.output_size(small.shape[:2], 3.3, None) == truth.shape[:2]
    with pytest.raises(UserError, match='100 x 67 pixels, too few to shrink it by 5'):
        demo.shrink(large, 5)
    page = demo.Page(net, tmp_path, 'fp32')
    write_image(tmp_path / 'large.png', large)
    picture, original = page.shrink(str(tmp_path / 'large.png'), 3.3, None)
    np.testing.assert_array_equal(cv2.imread(picture)[..., ::-1], small)
    picture, original = page.shrink(picture, 2, original)
    assert cv2.imread(picture).shape == (33, 49, 3)  # anew from the original
    assert demo.fitting_factor(picture, original, 9) == 2 and demo.fitting_factor(picture, None, 9) == 9
    with pytest.raises(UserError, match='Put a picture in first'):
        page.shrink(None, 2, None)


def test_limits_say_what_is_allowed(tmp_path, net):
    Image.new('L', (1100, 1000)).save(tmp_path / 'big.png')
    Image.new('L', (3000, 3000)).save(tmp_path / 'huge.png')
    with pytest.raises(UserError, match=r'^big.png has 1100 x 1000 pixels; this page takes 1 million.*basicsr upscale'):
        demo.read_picture(tmp_path / 'big.png')
    with pytest.raises(UserError, match='x12 makes 9216 x 6144 pixels; this page stops at 8 million.*at most 4.6 '):
        demo.output_size((512, 768), 12, None)
    rows, cols = demo.output_size((512, 768), 4.6, None)
    assert rows * cols <= demo.MAX_OUTPUT < round(512 * 4.7) * round(768 * 4.7)
    with pytest.raises(UserError, match='this page takes 8 million'):
        demo.Page(net, tmp_path, 'fp32').show(str(tmp_path / 'a.png'), 2, 0, str(tmp_path / 'huge.png'))
    (tmp_path / 'text.png').write_bytes(b'no image')
    with pytest.raises(UserError, match=r'^text.png: not an image'):
        demo.Page(net, tmp_path, 'fp32').show(str(tmp_path / 'text.png'), 2, 0, None)


def test_files_of_the_page(net, tmp_path):
    """16 bit with transparency in, 8-bit PNG out; nothing in, nothing out."""
    rgb = noise((20, 24, 3)).astype(np.uint16) * 257
    write_image(tmp_path / 'deep.png', rgb, rgb[..., 0], bit_depth=16)
    page = demo.Page(net, tmp_path, 'fp32')
    (before, after), text, experts, key, download = page.show(str(tmp_path / 'deep.png'), 2.5, 0, None)
    view = demo.render(net, demo.encode(net, noise((20, 24, 3))), 2.5)
    for path, picture in ((before, view.bicubic), (after, view.image), (experts, view.overlay)):
        stored = cv2.imread(path, cv2.IMREAD_UNCHANGED)
        assert stored.dtype == np.uint8
        assert np.abs(stored[..., ::-1].astype(int) - picture).max() <= 1
    assert download == after and Path(after).name == 'deep_x2.5.png'
    assert '60 x 50 pixels' in text and 'cheapest' in key
    assert page.show(None, 2, 0, None) == (None, '', None, '', None)


def test_one_expert_has_no_map(tmp_path):
    dense = build_network({'type': 'LIIF', 'encoder': ENCODER, 'hidden_list': [4]}).eval()
    view = demo.render(dense, demo.encode(dense, noise((20, 24, 3))), 2, cost_weight=3.0)
    assert view.overlay is None and view.cost == 1 and 'work of the experts' not in demo.facts(dense, view)


def test_the_example_comes_with_the_installation():
    small, truth = demo.shrink(demo.example(), demo.FIRST_FACTOR)
    assert small.shape == (110, 120, 3) and truth.shape == (330, 360, 3)


def test_only_the_page_imports_gradio():
    importing = set()
    for path in PACKAGE.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ''] if isinstance(node, ast.ImportFrom) else []
            if any(name.split('.')[0] == 'gradio' for name in names):
                importing.add(path.relative_to(PACKAGE).as_posix())
    assert importing == {'tools/demo.py'}


def test_without_gradio_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert main(['demo']) == 2
    error = capsys.readouterr().err
    assert (
        error == 'basicsr: error: basicsr demo needs the package gradio, which is not installed: pip install gradio\n'
    )


@needs_gradio
def test_layout_and_an_address_that_is_taken(net, tmp_path):
    config = demo.Page(net, tmp_path, 'fp32').layout('tiny').config
    kinds = {part['type'] for part in config['components']}
    assert {'image', 'imageslider', 'slider', 'downloadbutton'} <= kinds and not config['analytics_enabled']
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f'--host 127.0.0.1 --port {port} cannot be used: '):
            demo.serve(net, 'tiny', '127.0.0.1', port, 'fp32')
