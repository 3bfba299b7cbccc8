"""One metric of the YAML's `val: metrics` on one pair of images.

Metrics of this package take the float images and know the protocols' shaves; BasicSR's take 8-bit images and a fixed
`crop_border`, which a dataset with its own scale can override.

Shapes: (C, H, W) images, RGB in [0, 1].
"""

import inspect
import math
import warnings

from basicsr.metrics import calculate_metric
from basicsr.utils import tensor2img
from basicsr.utils.registry import METRIC_REGISTRY
from torch import Tensor

from moeisr_basicsr.errors import UserError

DOWNSAMPLE = {'matlab': "MATLAB's bicubic", 'pil': "Pillow's bicubic"}
PROTOCOL = {'benchmark': ('luma', 'ceil(s)'), 'div2k': ('RGB', 'ceil(s) + 6')}  # colours, shave at a factor s


def describe_input(dataset_opt: dict) -> str:
    """Where the LR images of a dataset come from, for readers of its figures."""
    if dataset_opt.get('type') == 'ArbitraryScaleImageDataset':
        return f'LR by {DOWNSAMPLE[dataset_opt.get("downsample", "matlab")]}'
    return 'LR images of the dataset'


def metric_options(metric_opt: dict, crop_border: int | list[int] | None) -> dict:
    """`type` and the metric's own options; a dataset's `crop_border` wins over the metric's."""
    options = {key: value for key, value in metric_opt.items() if key != 'better'}
    return options if crop_border is None else {**options, 'crop_border': crop_border}


def describe_metric(metric_opt: dict, crop_border: int | list[int] | None = None) -> str:
    """What `measure` compares, for readers of its figures; the same for all scales of a protocol."""
    options = metric_options(metric_opt, crop_border)
    name = options.pop('type')
    if not name.endswith('_sr'):
        return ', '.join([f'{name} on 8 bits', *(f'{key} {options[key]}' for key in sorted(options))])
    protocol = options.get('protocol', 'benchmark')
    colours, border = PROTOCOL[protocol]
    border = options.get('crop_border', border)
    border = ' x '.join(map(str, border)) if isinstance(border, (list, tuple)) else border
    rounded = ', rounded to 8 bits' if options.get('rounded') else ''
    return f'{protocol}: {colours}, shave {border}{rounded}'


def measure(
    metric_opt: dict, sr: Tensor, gt: Tensor, scale: tuple[float, float], crop_border: int | list[int] | None = None
) -> float:
    """The value of one metric.

    Args:
        metric_opt: See `metric_options`.
        sr: The result, not clipped.
        gt: The truth.
        scale: Nominal (row factor, column factor), for metrics that have a protocol.
        crop_border: The dataset's own shave, one or (rows, columns).

    Raises:
        UserError: It is not a number.
    """
    options = metric_options(metric_opt, crop_border)
    takes = inspect.signature(METRIC_REGISTRY.get(options['type'])).parameters
    if 'scale' in takes:
        return float(calculate_metric({'img': sr, 'img2': gt}, {'scale': scale, **options}))
    images = {'img': tensor2img([sr]), 'img2': tensor2img([gt])}  # (H, W, 3) BGR, uint8
    if isinstance(options.get('crop_border'), (list, tuple)):  # BasicSR's metrics know one border only
        rows, cols = options['crop_border']
        images = {
            name: image[rows : image.shape[0] - rows, cols : image.shape[1] - cols] for name, image in images.items()
        }
        options['crop_border'] = 0
    if 'img2' not in takes:  # such as NIQE
        del images['img2']
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # NumPy's, of the mean of nothing
        value = float(calculate_metric(images, options))
    if math.isnan(value):
        size = ' x '.join(map(str, images['img'].shape[:2]))
        border = f' with a crop_border of {options["crop_border"]}' if options.get('crop_border') else ''
        raise UserError(f'{metric_opt["type"]} is not a number for an image of {size} pixels{border}.')
    return value
