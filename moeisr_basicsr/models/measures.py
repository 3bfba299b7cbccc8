"""One metric of the YAML's `val: metrics` on one pair of images.

Metrics of this package take the float images and know the protocols' shaves; BasicSR's take 8-bit images and a fixed
`crop_border`, which a dataset with its own scale can override.

Shapes: (C, H, W) images, RGB in [0, 1].
"""
import inspect

from basicsr.metrics import calculate_metric
from basicsr.utils import tensor2img
from basicsr.utils.registry import METRIC_REGISTRY
from torch import Tensor


def measure(metric_opt: dict, sr: Tensor, gt: Tensor, scale: tuple[float, float],
            crop_border: int | list[int] | None = None) -> float:
    """The value of one metric.

    Args:
        metric_opt: `type` and the metric's own options; `better` is not the metric's.
        sr: The result, not clipped.
        gt: The truth.
        scale: Nominal (row factor, column factor), for metrics that have a protocol.
        crop_border: The dataset's own shave, one or (rows, columns), in place of the metric's.
    """
    options = {key: value for key, value in metric_opt.items() if key != 'better'}
    takes = inspect.signature(METRIC_REGISTRY.get(options['type'])).parameters
    if crop_border is not None:
        options['crop_border'] = crop_border
    if 'scale' in takes:
        options.setdefault('scale', scale)
        return float(calculate_metric({'img': sr, 'img2': gt}, options))
    images = {'img': tensor2img([sr]), 'img2': tensor2img([gt])}  # (H, W, 3) BGR, uint8
    if isinstance(options.get('crop_border'), (list, tuple)):
        rows, cols = options['crop_border']
        images = {name: image[rows:image.shape[0] - rows, cols:image.shape[1] - cols]
                  for name, image in images.items()}
        options['crop_border'] = 0
    return float(calculate_metric({name: images[name] for name in images if name in takes or name == 'img'}, options))
