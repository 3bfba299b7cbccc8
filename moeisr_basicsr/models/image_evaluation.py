"""One validation image: upscale, measure, pictures, and its row in the results document.

Shapes: (1, C, h, w) LR image, (C, R, S) output image, RGB in [0, 1]; J experts.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from basicsr.utils import imwrite, tensor2img
from torch import Tensor, nn

from moeisr_basicsr.analysis.complexity import macs_per_pixel
from moeisr_basicsr.analysis.measure import PeakMeter, StageClock, time_ms
from moeisr_basicsr.analysis.pictures import bicubic
from moeisr_basicsr.analysis.routing_stats import depth_correlation, expert_shares, mean_cost
from moeisr_basicsr.core.render import Clock
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.inference import Upscaled, evaluation, upscale

from .evaluation import factor_pair, image_name, scale_label
from .measures import describe_input, describe_metric, measure
from .pictures import expert_map_picture

# name suffix of a saved picture -> its name in a results document
KINDS = {'': 'result', '_experts': 'expert_map', '_truth': 'truth', '_bicubic': 'bicubic'}


class Measured(NamedTuple):
    """A result and what it took."""

    result: Upscaled
    time_ms: dict[str, float]  # 'encode', 'map', 'decode' where the network has these stages, and 'total'
    peak_mib: float | None  # None where it was not asked for or cannot be measured


class ImageEvaluator:
    """Evaluates single images as the YAML's `val` section says.

    Args:
        opt: The whole options; reads `val` (metrics, suffix, bicubic_baseline, budget, cost_weight, precision,
            shuffle_experts, save_expert_map, save_references, tb_images, measure), `logger: use_tb_logger`,
            `path: visualization`, `manual_seed` and `is_train`.
    """

    def __init__(self, opt: dict):
        self.is_train = opt['is_train']
        self.folder = Path(opt['path'].get('visualization') or '.')
        self.val_opt = opt.get('val') or {}
        self.metrics = self.val_opt.get('metrics') or {}
        self.shows_pictures = self.is_train and (opt.get('logger') or {}).get('use_tb_logger', False)
        self.precision = self.val_opt.get('precision', 'fp32')
        self.shuffles = self.val_opt.get('shuffle_experts', False)
        self.seed = opt.get('manual_seed') or 0
        self.routing = {
            key: self.val_opt[key] for key in ('budget', 'cost_weight') if self.val_opt.get(key) is not None
        }

    def upscale(
        self,
        net: nn.Module,
        lq: Tensor,
        size: tuple[int, int] | None,
        scale: float | list[float] | None,
        index: int = 0,
        clock: Clock = nullcontext,
    ) -> Upscaled:
        """One image to `size`, or by `scale`, or by the network's own factor; `index` is its place in the dataset."""
        if not hasattr(net, 'encode'):  # of BasicSR or of somebody else: fixed factor
            if self.routing or self.shuffles:
                raise UserError(
                    f'{type(net).__name__} has no experts: val: budget, cost_weight and shuffle_experts do not fit it.'
                )
            return upscale_fixed(net, lq, self.precision)
        options = {
            **self.routing,
            'precision': self.precision,
            'clock': clock,
            'shuffle_seed': self.seed + index if self.shuffles else None,
        }  # the same on every rank
        if size is not None:
            return upscale(net, lq, size=size, **options)
        scale = net.scale if scale is None else scale
        if scale is None:
            raise UserError('An image without ground truth needs a factor: give the dataset or network_g a scale.')
        return upscale(net, lq, scale=tuple(scale) if isinstance(scale, (list, tuple)) else scale, **options)

    def timed(
        self, net: nn.Module, lq: Tensor, size: tuple[int, int] | None, scale: float | list[float] | None, index: int
    ) -> Measured:
        """`upscale` under the clock; with `measure` also its memory."""
        results = []
        meter = PeakMeter(lq.device) if self.val_opt.get('measure', False) else None
        clock = StageClock(lq.device)
        total = time_ms(lambda: results.append(self.upscale(net, lq, size, scale, index, clock)), lq.device)
        return Measured(
            results[0], {**clock.times, 'total': total}, meter.read() if meter is not None and meter.works else None
        )

    def __call__(
        self, net: nn.Module, item: dict, dataset_opt: dict, current_iter: int | str, save_img: bool, index: int
    ) -> dict:
        """The record of one image: what `evaluation.summarize` takes; its pictures are saved where asked for."""
        lq = item['lq'].to(next(net.parameters()).device)
        gt = item['gt'][0] if 'gt' in item else None
        measured = self.timed(net, lq, None if gt is None else tuple(gt.shape[-2:]), dataset_opt.get('scale'), index)
        sr, expert_map = measured.result.image[0].float().cpu(), measured.result.expert_map
        if gt is not None and sr.shape != gt.shape:
            raise UserError(
                f'{item["lq_path"][0]}: the output is {tuple(sr.shape)}, the ground truth '
                f'{tuple(gt.shape)} (channels, rows, columns). Check the scale of {dataset_opt["name"]}.'
            )
        nominal = dataset_opt.get('scale') or (None if gt is not None else getattr(net, 'scale', None))
        scale = factor_pair(nominal, tuple(lq.shape[-2:]), tuple(sr.shape[-2:]))
        loads = [] if expert_map is None else expert_shares(expert_map, net.num_experts)
        name = image_name(item['lq_path'][0], dataset_opt.get('dataroot_lq') or dataset_opt.get('dataroot_gt'))
        record = {
            'dataset': dataset_opt['name'],
            'name': name,
            'scale': scale_label(scale),
            'metrics': {},
            'loads': loads,
            'mean_cost': mean_cost(loads, net.expert_costs) if loads else None,
        }
        if gt is not None:
            record['metrics'] = self.measure_all(sr, gt, item['lq'][0], scale, dataset_opt.get('crop_border'))
        if not self.is_train:
            record['row'] = {
                **self.row(net, lq, gt, measured, scale, record),
                **self.setting(dataset_opt, gt is not None),
                'image': record['name'],
                'metrics': record['metrics'],
            }
        shown = self.shows_pictures and index < self.val_opt.get('tb_images', 1)
        if save_img or shown:
            pictures = {'': tensor2img([sr])}  # name suffix -> (R, S, 3) uint8 BGR
            if loads:
                pictures['_experts'] = expert_map_picture(expert_map[0], net.num_experts, net.expert_costs.tolist())
            if save_img:
                pictures.update(self.references(item['lq'][0], gt))
                self.save_pictures(pictures, record, current_iter)
            if shown:
                record['pictures'] = pictures
        return record

    def measure_all(
        self, sr: Tensor, gt: Tensor, lq: Tensor, scale: tuple[float, float], crop_border: int | list[int] | None
    ) -> dict[str, float]:
        """Every metric of the model's image and, with `bicubic_baseline`, of the bicubic one."""
        images = {'': sr}
        if self.val_opt.get('bicubic_baseline', False) and self.metrics:
            images['bicubic_'] = bicubic(lq, tuple(gt.shape[-2:]))
        return {
            prefix + name: measure(metric_opt, image, gt, scale, crop_border)
            for prefix, image in images.items()
            for name, metric_opt in self.metrics.items()
        }

    def save_pictures(self, pictures: dict, record: dict, current_iter: int | str) -> None:
        """`<visualization>/<dataset>/<image>_x2.png`; in training the iteration is part of the name."""
        stem = f'{record["name"]}_{record["scale"]}'
        if self.is_train:
            stem += f'_{current_iter}'
        elif self.val_opt.get('suffix'):
            stem += f'_{self.val_opt["suffix"]}'
        for suffix, picture in pictures.items():
            if suffix == '_experts' and not self.val_opt.get('save_expert_map', False):
                continue
            path = Path(record['dataset']) / f'{stem}{suffix}.png'
            imwrite(picture, str(self.folder / path))
            if 'row' in record:  # results.json lies beside the folder of pictures
                record['row'].setdefault('pictures', {})[KINDS[suffix]] = (Path(self.folder.name) / path).as_posix()

    def references(self, lq: Tensor, gt: Tensor | None) -> dict:
        """With `save_references` in testing, the pictures that a report puts beside the model's."""
        if self.is_train or gt is None or not self.val_opt.get('save_references', False):
            return {}
        return {'_truth': tensor2img([gt]), '_bicubic': tensor2img([bicubic(lq, tuple(gt.shape[-2:]))])}

    def setting(self, dataset_opt: dict, has_truth: bool) -> dict:
        """What was measured on and how, of a row of a results document."""
        setting = {'dataset': dataset_opt['name'], 'protocol': describe_input(dataset_opt)}
        if has_truth:
            setting['metric_protocols'] = {
                name: describe_metric(metric_opt, dataset_opt.get('crop_border'))
                for name, metric_opt in self.metrics.items()
            }
        return setting

    def row(
        self,
        net: nn.Module,
        lq: Tensor,
        gt: Tensor | None,
        measured: Measured,
        scale: tuple[float, float],
        record: dict,
    ) -> dict:
        """The image's row of a results document, see `analysis.schema`; `record` has its loads and mean cost."""
        result = measured.result
        lq_size, size = tuple(lq.shape[-2:]), tuple(result.image.shape[-2:])
        row = {
            'case': 'test',
            'lq_size': list(lq_size),
            'size': list(size),
            'scale': list(scale),
            'precision': self.precision,
            'budget': self.routing.get('budget'),
            'cost_weight': self.routing.get('cost_weight'),
            'shuffle_experts': self.shuffles,
            'time_ms': measured.time_ms,
            'repeats': 1,
        }
        if measured.peak_mib is not None:
            row['peak_mib'] = {'total': measured.peak_mib}
        if not hasattr(net, 'decoder'):
            return row
        if result.expert_map is not None:
            # The truth where there is one: where neighbours' experts differ, the output has edges that they made.
            texture = result.image[0] if gt is None else gt
            correlation = depth_correlation(result.expert_map[0], texture, net.decoder.depths)
            row['routing'] = {
                'loads': record['loads'],
                'mean_cost': record['mean_cost'],
                'texture_correlation': correlation,
            }
        return {**row, 'macs': macs_per_pixel(net, lq_size, size, record['loads'] or [1.0])}


def upscale_fixed(net: nn.Module, lq: Tensor, precision: str) -> Upscaled:
    """By a network that knows one factor only; its training mode is restored."""
    with evaluation(net, lq.device.type, precision):
        return Upscaled(net(lq), None)
