"""One validation image: upscale, measure, pictures, and its row in the results document.

Shapes: (1, C, h, w) LR image, (C, R, S) output image, RGB in [0, 1]; J experts.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from basicsr.utils import imwrite, tensor2img
from torch import Tensor

from moeisr_basicsr.analysis.complexity import macs_per_pixel
from moeisr_basicsr.analysis.measure import PeakMeter, StageClock, time_ms
from moeisr_basicsr.analysis.pictures import bicubic, expert_colours
from moeisr_basicsr.analysis.routing_stats import depth_correlation, expert_shares, lr_reads, mean_cost
from moeisr_basicsr.analysis.schema import scale_label
from moeisr_basicsr.core.render import Clock
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.inference import Upscaled, evaluation, upscale

from .evaluation import image_name
from .measures import describe_input, describe_metric, measure

# name suffix of a saved picture -> its name in a results document
KINDS = {'': 'result', '_experts': 'expert_map', '_truth': 'truth', '_bicubic': 'bicubic'}


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
        self.seed = opt.get('manual_seed') or 0
        self.setting = {  # as it stands in a results row
            'precision': self.val_opt.get('precision', 'fp32'),
            'budget': self.val_opt.get('budget'),
            'cost_weight': self.val_opt.get('cost_weight'),
            'shuffle_experts': self.val_opt.get('shuffle_experts', False),
        }

    def upscale(
        self,
        net: Any,
        lq: Tensor,
        size: tuple[int, int] | None,
        scale: float | tuple[float, float] | list[float] | None,
        index: int = 0,
        clock: Clock = nullcontext,
    ) -> Upscaled:
        """One image to `size`, or by `scale`, or by the network's own factor; `index` is its place in the dataset."""
        precision, shuffles = self.setting['precision'], self.setting['shuffle_experts']
        routing = {key: self.setting[key] for key in ('budget', 'cost_weight') if self.setting[key] is not None}
        if not hasattr(net, 'encode'):  # of BasicSR or of somebody else: fixed factor
            if routing or shuffles:
                raise UserError(
                    f'{type(net).__name__} has no experts: val: budget, cost_weight and shuffle_experts do not fit it.'
                )
            with evaluation(net, lq.device.type, precision):
                return Upscaled(net(lq), None)
        if size is not None:
            scale = None
        elif scale is None:
            scale = net.scale
            if scale is None:
                raise UserError('An image without ground truth needs a factor: give the dataset or network_g a scale.')
        return upscale(
            net,
            lq,
            size=size,
            scale=(scale[0], scale[1]) if isinstance(scale, list) else scale,
            precision=precision,
            clock=clock,
            shuffle_seed=self.seed + index if shuffles else None,  # the same on every rank
            **routing,
        )

    def __call__(
        self, net: Any, item: dict, dataset_opt: dict, current_iter: int | str, save_img: bool, index: int
    ) -> tuple[dict, dict[str, np.ndarray]]:
        """Its row of a results document (see `analysis.schema`), and the pictures that TensorBoard shows.

        Args:
            net: The bare network, of this package or another one.
            item: A batch of one image.
            dataset_opt: Reads `name`, `scale`, `crop_border` and the dataset's roots.
            current_iter: Iteration, or the run's name in testing.
            save_img: Whether to write pictures.
            index: Place of the image in the dataset.
        """
        lq = item['lq'].to(next(net.parameters()).device)
        gt = item['gt'][0] if 'gt' in item else None
        nominal = dataset_opt.get('scale') or (None if gt is not None else getattr(net, 'scale', None))
        result, took = self.timed(net, lq, None if gt is None else size_of(gt), nominal, index)
        sr = result.image[0].float().cpu()
        if gt is not None and sr.shape != gt.shape:
            raise UserError(
                f'{item["lq_path"][0]}: the output is {tuple(sr.shape)}, the ground truth '
                f'{tuple(gt.shape)} (channels, rows, columns). Check the scale of {dataset_opt["name"]}.'
            )
        lq_size, size = size_of(lq), size_of(sr)
        scale = np.divide(size, lq_size) if nominal is None else np.broadcast_to(nominal, 2)
        row = {
            'case': 'test',
            'dataset': dataset_opt['name'],
            'image': image_name(item['lq_path'][0], dataset_opt.get('dataroot_lq') or dataset_opt.get('dataroot_gt')),
            'protocol': describe_input(dataset_opt),
            'lq_size': list(lq_size),
            'size': list(size),
            'scale': scale.astype(float).tolist(),  # (rows, columns)
            **self.setting,
            **took,
            'metrics': {},
        }
        if gt is not None:
            border = dataset_opt.get('crop_border')
            row['metrics'] = self.measure_all(sr, gt, item['lq'][0], tuple(row['scale']), border)
            row['metric_protocols'] = {name: describe_metric(opt, border) for name, opt in self.metrics.items()}
        row |= self.routing(net, lq, result, gt)
        shown = self.shows_pictures and index < self.val_opt.get('tb_images', 1)
        pictures = {}  # name suffix -> (R, S, 3) uint8 BGR
        if save_img or shown:
            pictures[''] = tensor2img([sr])
            if result.expert_map is not None:
                colours = expert_colours(net.num_experts, net.expert_costs.tolist())
                pictures['_experts'] = colours[result.expert_map[0].cpu().numpy()]
        if save_img:
            self.save_pictures({**pictures, **self.references(item['lq'][0], gt)}, row, current_iter)
        return row, pictures if shown else {}

    def timed(
        self, net: Any, lq: Tensor, size: tuple[int, int] | None, scale: float | list[float] | None, index: int
    ) -> tuple[Upscaled, dict]:
        """`upscale`, and what it took: milliseconds by stage and, with `measure`, memory."""
        results = []
        meter = PeakMeter(lq.device) if self.val_opt.get('measure', False) else None
        clock = StageClock(lq.device)
        total = time_ms(lambda: results.append(self.upscale(net, lq, size, scale, index, clock)), lq.device)
        took = {'time_ms': {**clock.times, 'total': total}, 'repeats': 1}
        if meter is not None and meter.works:
            took['peak_mib'] = {'total': meter.read()}
        return results[0], took

    def routing(self, net: Any, lq: Tensor, result: Upscaled, gt: Tensor | None) -> dict:
        """What the routing did to one image and, in testing, the multiply-adds; nothing of other networks."""
        found, loads, reads = {}, [1.0], None
        if result.expert_map is not None:
            loads = expert_shares(result.expert_map, net.num_experts)
            found['routing'] = {'loads': loads, 'mean_cost': mean_cost(loads, net.expert_costs)}
            if reads := lr_reads(net.decoder, result.expert_map[0], size_of(lq)):
                found['routing']['lr_reads'] = reads
            if not self.is_train:
                # The truth where there is one: where neighbours' experts differ, the output has edges that they made.
                texture = result.image[0] if gt is None else gt
                correlation = depth_correlation(result.expert_map[0], texture, net.decoder.depths)
                found['routing']['texture_correlation'] = correlation
        if not self.is_train and hasattr(net, 'decoder'):
            found['macs'] = macs_per_pixel(net, size_of(lq), size_of(result.image), loads, reads=reads)
        return found

    def measure_all(
        self, sr: Tensor, gt: Tensor, lq: Tensor, scale: tuple[float, float], crop_border: int | list[int] | None
    ) -> dict[str, float]:
        """Every metric of the model's image and, with `bicubic_baseline`, of the bicubic one."""
        images = {'': sr}
        if self.val_opt.get('bicubic_baseline', False) and self.metrics:
            images['bicubic_'] = bicubic(lq, size_of(gt))
        return {
            prefix + name: measure(metric_opt, image, gt, scale, crop_border)
            for prefix, image in images.items()
            for name, metric_opt in self.metrics.items()
        }

    def references(self, lq: Tensor, gt: Tensor | None) -> dict[str, np.ndarray]:
        """With `save_references` in testing, the pictures that a report puts beside the model's."""
        if self.is_train or gt is None or not self.val_opt.get('save_references', False):
            return {}
        return {'_truth': tensor2img([gt]), '_bicubic': tensor2img([bicubic(lq, size_of(gt))])}

    def save_pictures(self, pictures: dict[str, np.ndarray], row: dict, current_iter: int | str) -> None:
        """`<visualization>/<dataset>/<image>_x2.png`; in training the iteration is part of the name."""
        end = current_iter if self.is_train else self.val_opt.get('suffix')
        stem = f'{row["image"]}_{scale_label(row["scale"])}' + (f'_{end}' if end else '')
        if not self.val_opt.get('save_expert_map', False):
            pictures.pop('_experts', None)
        for suffix, picture in pictures.items():
            path = Path(row['dataset']) / f'{stem}{suffix}.png'
            imwrite(picture, str(self.folder / path))
            # results.json lies beside the folder of pictures
            row.setdefault('pictures', {})[KINDS[suffix]] = (Path(self.folder.name) / path).as_posix()


def size_of(image: Tensor) -> tuple[int, int]:
    """(rows, columns)."""
    return image.shape[-2], image.shape[-1]
