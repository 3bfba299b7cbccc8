"""Validation: metrics against sums written out by hand, file names, shared work, results documents."""

import logging
import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from basicsr.models import build_model
from tiny_runs import DENSE, NETWORK, change, parse, run_yaml, weights_of, write_images

from moeisr_basicsr.analysis import schema
from moeisr_basicsr.analysis.pictures import expert_colours
from moeisr_basicsr.analysis.routing_stats import depth_correlation
from moeisr_basicsr.data.resize import imresize
from moeisr_basicsr.engine.data_loading import evaluation_loaders
from moeisr_basicsr.engine.test_loop import test as run_test
from moeisr_basicsr.errors import ExitCode, UserError
from moeisr_basicsr.inference import upscale
from moeisr_basicsr.kernels import fused_backend
from moeisr_basicsr.models.evaluation import image_names, mean_of, mean_row, my_jobs
from moeisr_basicsr.models.image_evaluation import ImageEvaluator
from moeisr_basicsr.models.measures import describe_input, describe_metric

LUMA = torch.tensor([65.481, 128.553, 24.966]) / 255


@pytest.fixture
def root(tmp_path):
    return tmp_path


def options(root, is_train=True, **changes):
    opt = parse(root, run_yaml(root, **changes), is_train)
    return {**opt, 'dist': False, 'rank': 0, 'world_size': 1}


def psnr(sr, gt, border, luma):
    difference = (sr.clamp(0, 1) - gt).double()
    difference = difference[:, border[0] : difference.shape[1] - border[0], border[1] : difference.shape[2] - border[1]]
    if luma:
        difference = (difference * LUMA.double()[:, None, None]).sum(0)
    return -10 * math.log10(difference.square().mean())


def test_metrics_of_several_scales(root):
    """Float metrics by protocol, BasicSR's on 8 bits, bicubic beside them, each as a mean written out by hand."""
    opt = options(
        root,
        **{
            'datasets:val_2:scale': [2, 3.5],
            'datasets:val:crop_border': 5,
            'val:bicubic_baseline': True,
            'val:metrics': {
                'y': {'type': 'calculate_psnr_sr', 'protocol': 'benchmark'},
                'rgb8': {'type': 'calculate_psnr', 'crop_border': 2},
            },
        },
    )
    model = build_model(opt)
    with torch.no_grad():  # the averaged weights must be those that are evaluated
        for value in model.net_g.parameters():
            value.mul_(3)
    loaders = evaluation_loaders(opt, ('val',))
    results = model.validate(loaders, 5, None)
    assert [(result.dataset, result.scale, result.count) for result in results] == [
        ('tiny_x2', 'x2', 3),
        ('tiny_x3.3', 'x2x3.5', 3),
    ]
    for result, loader, border, border8 in zip(results, loaders, ((5, 5), (2, 4)), ((5, 5), (2, 2))):
        expected = {'y': [], 'rgb8': [], 'bicubic_y': [], 'bicubic_rgb8': []}
        loads, costs = [], []
        for item in (loader.dataset[index] for index in range(3)):
            size = tuple(item['gt'].shape[-2:])
            image, expert_map = upscale(model.net_g_ema, item['lq'][None], size=size)
            lq8 = (item['lq'].numpy().transpose(1, 2, 0) * 255).round().astype(np.uint8)
            bicubic = torch.from_numpy(imresize(lq8, size=size).transpose(2, 0, 1) / 255.0)
            for prefix, sr in (('', image[0]), ('bicubic_', bicubic)):
                expected[f'{prefix}y'].append(psnr(sr, item['gt'], border, luma=True))
                sr8 = sr.clamp(0, 1).mul(255).round() / 255
                expected[f'{prefix}rgb8'].append(psnr(sr8, item['gt'], border8, luma=False))
            loads.append([float((expert_map == j).float().mean()) for j in range(2)])
            costs.append(sum(load * float(cost) for load, cost in zip(loads[-1], model.net_g.expert_costs)))
        for name, values in expected.items():
            assert result.metrics[name] == pytest.approx(sum(values) / 3, abs=1e-3), name
        assert result.shares == pytest.approx(np.mean(loads, axis=0).tolist())
        assert result.mean_cost == pytest.approx(sum(costs) / 3)
    best = model.best_metric_results['tiny_x2']
    assert best['y'] == {'better': 'higher', 'val': results[0].metrics['y'], 'iter': 5}


def test_pictures_are_named_by_scale_and_iteration(root):
    opt = options(root, **{'val:save_expert_map': True})
    model = build_model(opt)
    model.validate(evaluation_loaders(opt, ('val',)), 7, None, save_img=True)
    folder = root / 'experiments' / 'run' / 'visualization'
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob('*.png'))
    assert names == sorted(
        f'tiny_{scale}/{image}_{scale}_7{suffix}.png'
        for scale in ('x2', 'x3.3')
        for image in range(3)
        for suffix in ('', '_experts')
    )
    # floor(26 / 3.3) = 7 rows, round(7 * 3.3) = 23; floor(33 / 3.3) = 10 columns
    assert cv2.imread(str(folder / 'tiny_x3.3/0_x3.3_7.png')).shape == (23, 33, 3)
    colors = {tuple(color) for color in cv2.imread(str(folder / 'tiny_x2/1_x2_7_experts.png')).reshape(-1, 3)}
    assert colors <= {(0, 220, 255), (40, 40, 220)}  # yellow and red, the cheapest and the most expensive of two


def test_images_of_one_name_in_two_folders(root):
    for seed, folder in enumerate('ab'):
        write_images(root / 'val' / folder, 1, (26, 33), seed=seed)
    (root / 'list.txt').write_text('a/0.png\nb/0.png\n')
    base = run_yaml(root, **{'datasets:val:meta_info_file': str(root / 'list.txt')})
    sections = {
        **{key: base[key] for key in ('name', 'model_type', 'num_gpu', 'network_g', 'path')},
        'datasets': {'test': base['datasets']['val']},
        'val': {'save_img': True, 'needs_weights': False},
    }
    assert run_test(parse(root, sections, is_train=False)) == ExitCode.OK
    rows = schema.load(root / 'results/run/results.json')['rows']
    assert [row.get('image') for row in rows] == ['a__0', 'b__0', None]
    names = sorted(path.name for path in (root / 'results/run/visualization/tiny_x2').iterdir())
    assert names == ['a__0_x2.png', 'b__0_x2.png']


def test_expert_colours_follow_the_cost():
    plain = expert_colours(4)
    assert plain.tolist() == [[0, 220, 255], [60, 180, 60], [220, 110, 30], [40, 40, 220]]
    assert expert_colours(4, [1.0, 0.2, 0.5, 0.1]).tolist() == plain[[3, 1, 2, 0]].tolist()


def test_every_image_is_one_ranks_job():
    for sizes in ([5, 3, 1], [2], [7, 7], [0, 4]):
        for world_size in (1, 2, 3, 8):
            shares = [my_jobs(sizes, rank, world_size) for rank in range(world_size)]
            for dataset, size in enumerate(sizes):
                assert sorted(index for share in shares for index in share[dataset]) == list(range(size))
            loads = [sum(map(len, share)) for share in shares]
            assert max(loads) - min(loads) <= 1  # over images x scales, not per dataset


def test_means_do_not_depend_on_the_order():
    values = [1e16, 1.0, -1e16, 3.0]
    assert mean_of(values) == mean_of(values[::-1]) == 1.0
    assert mean_of([1.0, math.inf]) == math.inf


def test_a_stop_request_ends_validation_without_results(root):
    opt = options(root)
    model = build_model(opt)
    asked = []

    def should_stop():
        asked.append(1)
        return len(asked) > 2

    assert model.validate(evaluation_loaders(opt, ('val',)), 1, None, should_stop=should_stop) is None
    assert len(asked) == 3 and not hasattr(model, 'best_metric_results')


def test_budget_of_the_yaml(root):
    for budget in (0.3, 1.0):
        opt = options(root, **{'val:budget': budget})
        model = build_model(opt)
        results = model.validate(evaluation_loaders(opt, ('val',)), 1, None)
        assert [result.mean_cost for result in results] == pytest.approx([budget, budget], abs=0.01)


def test_expert_maps_and_images_reach_tensorboard(root):
    class Writer:
        def __init__(self):
            self.images, self.scalars = {}, {}

        def add_image(self, name, image, step, dataformats):
            self.images[name] = image.shape

        def add_scalar(self, name, value, step):
            self.scalars[name] = value

    opt = options(root, **{'logger:use_tb_logger': True})
    writer = Writer()
    model = build_model(opt)
    model.validate(evaluation_loaders(opt, ('val',)), 1, writer)
    assert writer.images == {
        'tiny_x2_x2/0': (26, 32, 3),
        'tiny_x2_x2/0_experts': (26, 32, 3),
        'tiny_x3.3_x3.3/0': (23, 33, 3),
        'tiny_x3.3_x3.3/0_experts': (23, 33, 3),
    }
    assert {'metrics/tiny_x2/psnr', 'val_share/tiny_x2/expert_1', 'val_cost/tiny_x3.3'} <= writer.scalars.keys()


def test_images_without_truth_use_the_networks_scale(root):
    """BasicSR's SingleImageDataset has no gt."""
    single = {
        'name': 'single',
        'type': 'SingleImageDataset',
        'dataroot_lq': write_images(root / 'single', 2, (9, 11)),
        'io_backend': {'type': 'disk'},
    }
    base = run_yaml(root, **{'network_g:scale': 2.5})
    options_of_test = {
        **{key: base[key] for key in ('name', 'model_type', 'num_gpu', 'network_g', 'path')},
        'datasets': {'test': single},
        'val': {'save_img': True, 'needs_weights': False},
    }
    assert run_test(parse(root, options_of_test, is_train=False)) == ExitCode.OK
    picture = cv2.imread(str(root / 'results/run/visualization/single/0_x2.5.png'))
    assert picture.shape == (23, 28, 3)


@pytest.mark.parametrize('network, model_type', [(NETWORK, 'MoEISRModel'), (DENSE, 'ArbitraryScaleModel')])
def test_the_test_loop_writes_one_results_document(root, network, model_type):
    base = run_yaml(root, model_type=model_type, network_g=network)
    model = build_model({**options(root, model_type=model_type, network_g=network), 'manual_seed': 3})
    torch.save({'params': weights_of(model)}, root / 'weights.pth')
    sections = {key: base[key] for key in ('name', 'model_type', 'num_gpu', 'network_g', 'val')}
    datasets = {'test_1': base['datasets']['val'], 'test_2': base['datasets']['val_2']}
    sections.update(datasets=datasets, path={'pretrain_network_g': str(root / 'weights.pth')})
    opt = parse(root, change(sections, {'val:save_img': True, 'val:val_freq': 1}), is_train=False)
    assert run_test(opt) == ExitCode.OK
    results = schema.load(root / 'results' / 'run' / 'results.json')
    backend = fused_backend(model.get_bare_model(model.net_g).decoder, 'cpu')
    assert results['environment']['kernel'] == ('torch' if backend is None else 'FusedCPUBackend')
    images = [row for row in results['rows'] if row['case'] == 'test']
    assert [(row['dataset'], row['image']) for row in images] == [
        (f'tiny_{scale}', str(image)) for scale in ('x2', 'x3.3') for image in range(3)
    ]
    means = [row for row in results['rows'] if row['case'] == 'mean']
    for row in means:
        of_dataset = [image for image in images if image['dataset'] == row['dataset']]
        assert row['scale'] == of_dataset[0]['scale'] and row['precision'] == 'fp32' and row['count'] == 3
        for section in ('metrics', 'macs', 'time_ms'):
            assert row[section].keys() == of_dataset[0][section].keys()
            for key in row[section].keys() - {'each_expert'}:
                values = [image[section][key] for image in of_dataset]
                assert row[section][key] == pytest.approx(sum(values) / 3), (section, key)
    stages = {'encode', 'decode', 'total'}
    if model_type == 'MoEISRModel':
        stages.add('map')
        macs = images[0]['macs']
        routed = sum(load * each for load, each in zip(images[0]['routing']['shares'], macs['each_expert']))
        assert macs['experts'] == pytest.approx(routed)
        assert means[0]['routing']['shares'] == pytest.approx(
            np.mean([image['routing']['shares'] for image in images[:3]], axis=0).tolist()
        )
        assert not images[0]['shuffle_experts']
    for row in images:
        assert row['time_ms'].keys() == stages and row['repeats'] == 1
        parts = sum(value for stage, value in row['time_ms'].items() if stage != 'total')
        assert 0 < parts < row['time_ms']['total']
    assert (root / 'results' / 'run' / 'visualization' / 'tiny_x2' / '0_x2.png').is_file()
    # the same numbers as validation gives in training
    model.net_g_ema.load_state_dict(model.net_g.state_dict())
    again = model.validate(evaluation_loaders(options(root), ('val',)), 1, None)
    assert [result.metrics for result in again] == [row['metrics'] for row in means]


def test_means_leave_out_what_is_unknown():
    rows = [
        {'dataset': 'a', 'scale': [2, 2], 'routing': {'shares': [0.25, 0.75], 'texture_correlation': correlation}}
        for correlation in (None, 0.5, 0.25)
    ]
    rows[0]['routing']['shares'] = [1.0, 0.0]
    assert mean_row(rows) == {
        'case': 'mean',
        'dataset': 'a',
        'scale': [2, 2],
        'count': 3,
        'routing': {'shares': [0.5, 0.5], 'texture_correlation': 0.375},
    }
    assert mean_of([{'encode': None}, {'encode': None}]) == {'encode': None}


def test_shuffled_experts_keep_their_shares(root):
    """A control experiment of the YAML: the trained counts of each image, at other pixels, and rows that say so."""
    base = run_yaml(root)
    model = build_model({**options(root), 'manual_seed': 3})
    with torch.no_grad():  # neighbouring pixels differ in their expert
        mapper = model.net_g.decoder.mapper
        mapper.query_in.weight[:, -4:-2].mul_(8)
        mapper.query_out.weight.mul_(30)
        mapper.query_out.bias.zero_()
    torch.save({'params': weights_of(model)}, root / 'weights.pth')

    def rows(name, **val):
        sections = {
            **{key: base[key] for key in ('model_type', 'num_gpu', 'network_g')},
            'name': name,
            'datasets': {'test': base['datasets']['val']},
            'val': {'metrics': base['val']['metrics'], **val},
            'path': {'pretrain_network_g': str(root / 'weights.pth')},
        }
        assert run_test(parse(root, sections, is_train=False)) == ExitCode.OK
        return schema.load(root / 'results' / name / 'results.json')['rows']

    trained, shuffled = rows('trained'), rows('shuffled', shuffle_experts=True)
    assert [row['shuffle_experts'] for row in trained + shuffled] == [False] * 4 + [True] * 4
    for first, second in zip(trained, shuffled):
        assert first['routing']['shares'] == second['routing']['shares'] != [1, 0]
        assert first['macs'] == second['macs']
        assert first['metrics']['psnr'] != second['metrics']['psnr']
    for row, item in zip(trained, build_dataset(options(root)['datasets']['val'])):
        texture = depth_correlation(
            upscale(model.net_g, item['lq'][None], 2).expert_map[0], item['gt'], model.net_g.decoder.depths
        )
        assert row['routing']['texture_correlation'] == pytest.approx(texture, abs=0.01)
    again = rows('again', shuffle_experts=True)
    assert [row['metrics'] for row in again] == [row['metrics'] for row in shuffled]
    mixed = rows('bf16', precision='bf16')
    assert {row['precision'] for row in mixed} == {'bf16'}
    assert mixed[0]['metrics']['psnr'] == pytest.approx(trained[0]['metrics']['psnr'], abs=0.1)
    assert mixed[0]['metrics']['psnr'] != trained[0]['metrics']['psnr']


@pytest.mark.parametrize('val', [{'shuffle_experts': True}, {'budget': 0.5}, {'cost_weight': 1.0}])
def test_a_network_without_experts_has_no_routing_to_control(val):
    evaluate = ImageEvaluator({'is_train': False, 'path': {}, 'val': val})
    with pytest.raises(UserError, match='Conv2d has no experts: val: budget, cost_weight and shuffle_experts'):
        evaluate.upscale(torch.nn.Conv2d(3, 3, 1), torch.rand(1, 3, 4, 4), None, None)


@pytest.mark.parametrize(
    ('scale', 'lq_size', 'size', 'border'),
    [
        # floor(HR / s), HR cropped to round(LR * s) half up, shave ceil(s) + 6
        (2.5, (10, 13), (25, 33), (9, 9)),
        (3.3, (7, 10), (23, 33), (10, 10)),
        ([2, 3.5], (13, 9), (26, 32), (8, 10)),
    ],
)
def test_sizes_and_shave_of_odd_factors(root, scale, lq_size, size, border):
    opt = options(
        root,
        **{'datasets:val:scale': scale, 'val:metrics': {'rgb': {'type': 'calculate_psnr_sr', 'protocol': 'div2k'}}},
    )
    model = build_model(opt)
    loader = evaluation_loaders(opt, ('val',))[0]
    item = loader.dataset[0]
    assert tuple(item['lq'].shape[-2:]) == lq_size and tuple(item['gt'].shape[-2:]) == size
    values = [
        psnr(upscale(model.net_g_ema, item['lq'][None], size=size).image[0], item['gt'], border, luma=False)
        for item in (loader.dataset[index] for index in range(3))
    ]
    assert model.validate([loader], 1, None)[0].metrics['rgb'] == pytest.approx(sum(values) / 3, abs=1e-3)


@pytest.mark.parametrize('workers', [0, 1])
def test_a_broken_validation_image_costs_its_own_row(root, workers, caplog):
    """The means are those of the others, nothing becomes the best, and the log names the file."""
    write_images(root / 'bad', 3, (40, 40))
    opt = options(root, **{'datasets:val:dataroot_gt': str(root / 'bad'), 'datasets:val:num_worker_per_gpu': workers})
    model, loaders = build_model(opt), evaluation_loaders(opt, ('val',))
    whole = model.validate(loaders, 1, None)
    model.best_metric_results = {}
    logging.getLogger('basicsr').addHandler(caplog.handler)
    (root / 'bad' / '1.png').write_bytes((root / 'bad' / '0.png').read_bytes()[:60])
    first, second = model.validate(loaders, 2, None)
    psnrs = [row['metrics']['psnr'] for row in whole[0].rows]
    assert first.count == 2 and first.metrics['psnr'] == pytest.approx((psnrs[0] + psnrs[2]) / 2)
    assert [row['image'] for row in first.rows] == ['0', '2'] and list(first.failed) == ['1']
    assert second.metrics == whole[1].metrics and second.failed == {}
    assert list(model.best_metric_results) == ['tiny_x3.3']
    message = next(record.message for record in caplog.records if record.levelname == 'ERROR')
    assert '1 of 3 images could not be used' in message and str(root / 'bad' / '1.png') in message
    for path in (root / 'bad').iterdir():
        path.write_bytes(b'')
    assert model.validate(loaders, 3, None)[0].count == 0  # none is left, and the other dataset goes on


def test_images_that_do_not_fit_a_metric_or_memory(root, monkeypatch):
    write_images(root / 'mixed', 2, (40, 40))
    cv2.imwrite(str(root / 'mixed' / '1.png'), np.zeros((8, 8, 3), np.uint8))
    metrics = {'psnr': {'type': 'calculate_psnr_sr', 'protocol': 'benchmark', 'crop_border': 4}}
    opt = options(root, **{'datasets:val:dataroot_gt': str(root / 'mixed'), 'val:metrics': metrics})
    model, loaders = build_model(opt), evaluation_loaders(opt, ('val',))[:1]
    assert 'mixed/1.png: An image of 8 x 8 pixels has none left' in model.validate(loaders, 1, None)[0].failed['1']
    opt['val']['metrics'] = {'psnr': {'type': 'calculate_psnr', 'crop_border': 4}}  # BasicSR's: the mean of nothing
    result = build_model(opt).validate(loaders, 1, None)[0]
    assert 'mixed/1.png: calculate_psnr is not a number for an image of 8 x 8' in result.failed['1']
    assert result.count == 1 and result.metrics['psnr'] > 0

    def full(self, net, lq, *arguments):
        if lq.shape[-1] == 20:
            raise MemoryError
        return whole(self, net, lq, *arguments)

    whole = ImageEvaluator.timed
    monkeypatch.setattr(ImageEvaluator, 'timed', full)
    failed = model.validate(loaders, 1, None)[0].failed
    assert failed['0'] == '0: not enough memory.' and list(failed) == ['0', '1']


def test_no_two_images_have_one_name(root):
    """Those of one name keep their ending or their folder; rows and pictures are called alike."""
    write_images(root / 'set', 2, (26, 33))
    (root / 'set' / '0.jpg').write_bytes((root / 'set' / '0.png').read_bytes())
    base = run_yaml(root)
    sections = {
        **{key: base[key] for key in ('name', 'model_type', 'num_gpu', 'network_g', 'path')},
        'datasets': {'test': {**base['datasets']['val'], 'dataroot_gt': str(root / 'set')}},
        'val': {'save_img': True, 'needs_weights': False},
    }
    assert run_test(parse(root, sections, is_train=False)) == ExitCode.OK
    rows = schema.load(root / 'results/run/results.json')['rows']
    assert [row.get('image') for row in rows] == ['0.jpg', '0.png', '1', None]
    pictures = [row['pictures']['result'] for row in rows[:3]]
    assert pictures == [f'visualization/tiny_x2/{name}_x2.png' for name in ('0.jpg', '0.png', '1')]
    assert all((root / 'results/run' / picture).is_file() for picture in pictures)


class Listed(SimpleNamespace):
    def __len__(self):
        return len(self.paths)


def test_names_of_images():
    dataset = Listed(opt={'dataroot_gt': '/hr', 'dataroot_lq': ['/x/a/lq', '/x/b/lq']}, paths=[])
    dataset.paths = [
        {'lq_path': path, 'gt_path': '/hr/1.png'} for path in ('/x/a/lq/1.png', '/x/b/lq/1.png', '/x/b/lq/c/1.jpg')
    ]
    dataset.paths += [{'lq_path': path} for path in ('/x/b/lq/c/1.png', '/x/b/lq/2.png', '/x/b/lq/2.png', '/y/7.png')]
    names = ['a__lq__1', 'b__lq__1', 'b__lq__c__1.jpg', 'b__lq__c__1.png', 'b__lq__2.png', 'b__lq__2.png__2', '7']
    assert image_names(dataset) == names
    dataset.paths, dataset.opt = ['/hr/a/1.png', '/hr/2.png'], {'dataroot_gt': '/hr'}
    assert image_names(dataset) == ['a__1', '2']


def test_readers_are_told_what_was_compared():
    sr = {'type': 'calculate_psnr_sr', 'better': 'higher'}
    assert describe_metric(sr) == 'benchmark: luma, shave ceil(s)'
    assert describe_metric({**sr, 'protocol': 'div2k', 'rounded': True}, [2, 4]) == (
        'div2k: RGB, shave 2 x 4, rounded to 8 bits'
    )
    other = {'type': 'calculate_psnr', 'test_y_channel': True, 'crop_border': 2}
    assert describe_metric(other, 5) == 'calculate_psnr on 8 bits, crop_border 5, test_y_channel True'
    image = {'type': 'ArbitraryScaleImageDataset'}
    assert [describe_input(opt) for opt in (image, {**image, 'downsample': 'pil'}, {'type': 'PairedImageDataset'})] == [
        "LR by MATLAB's bicubic",
        "LR by Pillow's bicubic",
        'LR images of the dataset',
    ]
