"""Upscaling with a network in hand: any size, large images in tiles, cost under the caller's control.

The encoder runs on tiles of the input with the halo that its receptive field needs, so the features of a large image
are never held whole; the decoder renders each tile's part of the output. Tiled equals whole to rounding.

Shapes: B images, C channels, (H, W) LR size, (R, S) output size.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moeisr_basicsr.archs.moeisr_arch import MoEISR
from moeisr_basicsr.core import output_size
from moeisr_basicsr.core.control import Budget, CostWeight, Shuffle
from moeisr_basicsr.core.render import TORCH, Clock, FeatureWindow, Renderer, spans
from moeisr_basicsr.core.skip import ImageWindow
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.kernels import fused_backend

# Input pixels that the encoder sees at once by default: 64-channel fp32 features of 640 x 640 take 100 MiB, and an
# encoder holds several of them. The halo of EDSR-baseline then costs a quarter more.
TILE_PIXELS = 640 * 640
STRIP_ROWS = 128  # of a band of tiles that are handed out at once: the caller's temporaries stay small
PRECISIONS = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


class Upscaled(NamedTuple):
    """The result of `upscale`."""

    image: Tensor  # (B, C, R, S) fp32, not clamped
    expert_map: Tensor | None  # (B, R, S) uint8, the expert of each output pixel; None for a dense decoder


class Window(NamedTuple):
    """What the output of one encoder tile is made of."""

    features: FeatureWindow
    base: ImageWindow | None  # None without a skip


class Strip(NamedTuple):
    """Consecutive rows of an output image."""

    top: int
    bottom: int  # one past the last row
    image: Tensor  # (C, r, S) fp32, not clamped
    expert_map: Tensor | None  # (r, S) uint8


def target_size(
    lq_size: tuple[int, int], scale: float | tuple[float, float] | None, size: tuple[int, int] | None
) -> tuple[int, int]:
    """Output (rows, columns) from exactly one of `scale` and `size`.

    Raises:
        UserError: Both or none are given, a factor is below 1, or the size is smaller than the input.
    """
    if scale is not None and size is None:
        try:
            return output_size(lq_size, scale)
        except ValueError as error:
            raise UserError(str(error)) from None
    if scale is not None or size is None:
        raise UserError(f'give either a scale or a size; got scale {scale} and size {size}.')
    if size[0] < lq_size[0] or size[1] < lq_size[1]:
        raise UserError(
            f'the output size must be at least the input size of {lq_size[0]} x {lq_size[1]} '
            f'(rows x columns); got {size[0]} x {size[1]}.'
        )
    return int(size[0]), int(size[1])


def make_control(net: MoEISR, cost_weight: float, budget: float | None) -> CostWeight | Budget:
    """The routing rule for one image.

    Raises:
        UserError: Both are given, the budget cannot be met, or the network has one expert and nothing to choose.
    """
    if budget is None and cost_weight == 0:
        return CostWeight()
    if net.num_experts == 1:
        raise UserError('a dense decoder has one expert: there is no cost weight or budget to set.')
    if budget is not None and cost_weight != 0:
        raise UserError(f'give either a cost weight or a budget; got {cost_weight} and {budget}.')
    try:
        return CostWeight(cost_weight) if budget is None else Budget(budget, net.expert_costs)
    except ValueError as error:
        raise UserError(str(error)) from None


def make_shuffle(net: MoEISR, size: tuple[int, int], seed: int | None, device: torch.device) -> Shuffle | None:
    """The shuffling of one image's experts; None without a seed.

    Raises:
        UserError: The network has one expert and nothing to shuffle.
    """
    if seed is None:
        return None
    if net.num_experts == 1:
        raise UserError('a dense decoder has one expert: there is nothing to shuffle.')
    return Shuffle(size, net.num_experts, seed, device)


def encoder_tiles(
    net: MoEISR, lq_size: tuple[int, int], size: tuple[int, int], tile: int | None
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Output row spans and column spans, one pair of them per encoder tile.

    Args:
        tile: LR pixels per side; None chooses, 0 takes the image whole.
    """
    if tile is not None and (tile < 0 or 0 < tile < 16):
        raise UserError(f'tile must be 0 (the whole image) or at least 16 pixels; got {tile}.')
    whole = lq_size[0] * lq_size[1] <= TILE_PIXELS if tile is None else tile == 0
    if whole or getattr(net.encoder, 'halo', None) is None:  # without a known receptive radius tiles would show
        return [(0, size[0])], [(0, size[1])]
    side = tile or math.isqrt(TILE_PIXELS)
    rows, cols = (spans(0, n_out, math.ceil(n_lr / side)) for n_out, n_lr in zip(size, lq_size))
    return rows, cols


def encode_window(net: MoEISR, lq: Tensor, bounds: tuple[int, int, int, int]) -> Window:
    """An image's LR codes (top, bottom, left, right; ends excluded), exact up to the edges.

    Args:
        lq: (1, C, H, W), the whole image.
    """
    height, width = lq.shape[-2:]
    top, bottom, left, right = bounds
    if net.skip != 'none':  # its kernel reaches 2 LR pixels, since no factor is below 1; the renderer's margin is 1
        top, bottom, left, right = max(top - 1, 0), min(bottom + 1, height), max(left - 1, 0), min(right + 1, width)
    if lq.device.type == 'cpu' or torch.is_autocast_enabled():
        lq = lq.contiguous(memory_format=torch.channels_last)  # convolutions 1.3x faster in fp32, 2x in bf16
    halo = getattr(net.encoder, 'halo', None) or 0  # None: `encoder_tiles` cuts nothing
    multiple = getattr(net.encoder, 'tile_multiple', 1)
    row0, row1 = aligned(top - halo, bottom + halo, height, multiple)
    col0, col1 = aligned(left - halo, right + halo, width, multiple)
    feat, image = net.encode(lq[..., row0:row1, col0:col1])
    features = FeatureWindow(
        feat[..., top - row0 : bottom - row0, left - col0 : right - col0], top, left, (height, width)
    )
    if image is None:
        return Window(features, None)
    s = image.shape[-2] // feat.shape[-2]  # the base image's own factor
    image = image[..., s * (top - row0) : s * (bottom - row0), s * (left - col0) : s * (right - col0)]
    return Window(features, ImageWindow(image, s * top, s * left, (s * height, s * width)))


def encode_whole(net: MoEISR, lq: Tensor, precision: str = 'fp32') -> Window:
    """A whole image's codes, for `upscale_strips(encoded=...)`: encode once, render many sizes and cost weights.

    Args:
        lq: (1, C, H, W) RGB in [0, 1] on the network's device.
    """
    with evaluation(net, lq.device.type, precision):
        return encode_window(in_single(net), lq.float(), (0, lq.shape[-2], 0, lq.shape[-1]))


def aligned(start: int, stop: int, size: int, multiple: int) -> tuple[int, int]:
    """The span widened to multiples of `multiple` (attention windows) and clipped to the image."""
    return max(start // multiple * multiple, 0), min(-(-stop // multiple) * multiple, size)


@contextmanager
def evaluation(net: nn.Module, device_type: str, precision: str) -> Iterator[None]:
    """Eval mode, no gradients, and `precision` whatever the caller's autocast and default type; all comes back."""
    if precision not in PRECISIONS:
        raise UserError(f'precision must be one of {", ".join(PRECISIONS)}; got {precision!r}.')
    dtype = PRECISIONS[precision]
    modes = [(module, module.training) for module in net.modules()]  # a frozen part may stay in eval mode for good
    default = torch.get_default_dtype()
    net.eval()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.no_grad(), torch.autocast(device_type, dtype, enabled=dtype is not None):
            yield
    finally:
        torch.set_default_dtype(default)
        for module, mode in modes:
            module.training = mode


def in_single(net: MoEISR) -> MoEISR:
    """`net`, or a copy of one in another precision: positions, tables and kernels are fp32."""
    values = (*net.parameters(), *net.buffers())
    is_single = all(value.dtype == torch.float32 for value in values if value.is_floating_point())
    return net if is_single else copy.deepcopy(net).float()


def upscale_strips(
    net: MoEISR,
    lq: Tensor,
    size: tuple[int, int],
    cost_weight: float = 0.0,
    budget: float | None = None,
    tile: int | None = None,
    precision: str = 'fp32',
    shuffle_seed: int | None = None,
    clock: Clock = nullcontext,
    encoded: Window | None = None,
) -> Iterator[Strip]:
    """Upscale one image, strip by strip from top to bottom, in memory that does not grow with the output.

    Args:
        net: `MoEISR`, `LIIF` or `LTE`; of any precision, but it computes in `precision`.
        lq: (1, C, H, W) RGB in [0, 1] on the network's device.
        size: (R, S) from `target_size`.
        cost_weight: kappa; above 0 cheaper, below 0 more expensive than the trained routing.
        budget: Fraction of the all-most-expensive decoder cost, in place of `cost_weight`. Encodes a tiled image twice.
        tile: Input pixels per side that the encoder sees at once, without halo; None chooses, 0 is the whole image.
        precision: 'fp32', 'bf16' or 'fp16' for encoder and experts; the mapper is always fp32.
        shuffle_seed: Permutes the chosen experts over the pixels of the image, a control experiment (see `Shuffle`).
        clock: Told of the stages 'encode', 'map' and 'decode'.
        encoded: What `encode_whole` made of `lq`, in place of encoding it.

    Raises:
        UserError: See `make_control`, `make_shuffle` and `encoder_tiles`; an unknown MOEISR_KERNELS.
    """
    net, lq = in_single(net), lq.float()
    lq_size = lq.shape[-2], lq.shape[-1]
    control = make_control(net, cost_weight, budget)
    shuffle = make_shuffle(net, size, shuffle_seed, lq.device)
    row_spans, col_spans = encoder_tiles(net, lq_size, size, tile if encoded is None else 0)
    with evaluation(net, lq.device.type, precision):
        try:
            backend = fused_backend(net.decoder, lq.device, precision) or TORCH
        except ValueError as error:  # an unknown MOEISR_KERNELS
            raise UserError(str(error)) from None
        renderer = Renderer(
            net.decoder,
            size,
            lq_size,
            net.test_cell(lq_size, size),
            control,
            backend,
            device=lq.device,
            shuffle=shuffle,
            clock=clock,
        )
    strips = render_tiles(net, lq, renderer, row_spans, col_spans, encoded)
    while True:
        # Entered anew for each strip: between strips the caller runs, and keeps its own modes.
        with evaluation(net, lq.device.type, precision):
            strip = next(strips, None)
        if strip is None:
            return
        yield strip


def render_tiles(
    net: MoEISR,
    lq: Tensor,
    renderer: Renderer,
    row_spans: list[tuple[int, int]],
    col_spans: list[tuple[int, int]],
    encoded: Window | None = None,
) -> Iterator[Strip]:
    """The strips of `upscale_strips`; each step must run under `evaluation`."""
    size = renderer.size
    windows: dict[tuple, Window] = {}

    def window(rows: tuple[int, int], cols: tuple[int, int]) -> Window:
        if encoded is not None:
            return encoded
        if (rows, cols) not in windows:
            windows.clear()  # one tile's features at a time
            with renderer.clock('encode'):
                windows[rows, cols] = encode_window(net, lq, renderer.window_of(rows, cols))
        return windows[rows, cols]

    def strips(rows: tuple[int, int], cols: tuple[int, int]) -> Iterator[Strip]:
        features, base = window(rows, cols)
        for top, bottom, strip in renderer.render_region(features, rows, cols):
            image = net.add_skip(strip.output, base, size, (top, bottom), cols)[0]
            yield Strip(top, bottom, image, None if strip.expert_map is None else strip.expert_map[0])

    for show in renderer.previews():
        for rows, cols in product(row_spans, col_spans):
            show(window(rows, cols).features, rows, cols)
    for rows in row_spans:
        if len(col_spans) == 1:
            yield from strips(rows, col_spans[0])
            continue
        band = torch.empty(net.decoder.out_channels, rows[1] - rows[0], size[1], device=lq.device)
        experts = None if net.num_experts == 1 else torch.empty(band.shape[1:], dtype=torch.uint8, device=lq.device)
        for cols in col_spans:
            for top, bottom, image, expert_map in strips(rows, cols):
                band[:, top - rows[0] : bottom - rows[0], cols[0] : cols[1]] = image
                if experts is not None and expert_map is not None:
                    experts[top - rows[0] : bottom - rows[0], cols[0] : cols[1]] = expert_map
        for top, bottom in spans(*rows, math.ceil((rows[1] - rows[0]) / STRIP_ROWS)):
            part = slice(top - rows[0], bottom - rows[0])
            yield Strip(top, bottom, band[:, part], None if experts is None else experts[part])


def upscale(
    net: MoEISR,
    lq: Tensor,
    scale: float | tuple[float, float] | None = None,
    size: tuple[int, int] | None = None,
    cost_weight: float = 0.0,
    budget: float | None = None,
    tile: int | None = None,
    precision: str = 'fp32',
    shuffle_seed: int | None = None,
    clock: Clock = nullcontext,
) -> Upscaled:
    """Upscale a batch by any factor; each image by itself, so that a budget holds for each.

    Args:
        net: `MoEISR`, `LIIF` or `LTE`; its training mode is restored afterwards.
        lq: (B, C, H, W) RGB in [0, 1] on the network's device.
        scale: One factor of at least 1, or (rows, columns).
        size: Output (rows, columns), in place of `scale`.
        cost_weight, budget, tile, precision, shuffle_seed, clock: As in `upscale_strips`.

    Raises:
        UserError: See `target_size` and `upscale_strips`.
    """
    size = target_size((lq.shape[-2], lq.shape[-1]), scale, size)
    images, maps = [], []
    for image in lq.split(1):
        strips = list(upscale_strips(net, image, size, cost_weight, budget, tile, precision, shuffle_seed, clock))
        images.append(torch.cat([strip.image for strip in strips], dim=1))
        if experts := [strip.expert_map for strip in strips if strip.expert_map is not None]:
            maps.append(torch.cat(experts))
    return Upscaled(torch.stack(images), torch.stack(maps) if maps else None)
