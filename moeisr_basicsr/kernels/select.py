"""Which backend renders on this machine."""

import logging
import textwrap
from functools import cache

import torch

from moeisr_basicsr.core.decoder import MoEDecoder
from moeisr_basicsr.core.render import Backend, FeatureWindow, Renderer, Tile, crop_window

from .native import switched_off

FAMILIES = ('liif', 'lte', 'lm')  # that the kernels are written for
_RUNS: dict[tuple, bool] = {}  # what determines the compiled code -> whether its trial succeeded in this process


def fused_backend(decoder: MoEDecoder, device: torch.device | str, precision: str = 'fp32') -> Backend | None:
    """The fused kernels for this decoder as it is now; None where the torch code has to do it.

    Packing the weights takes milliseconds: ask anew for each image rather than after each change of the weights. The
    Triton kernels are compiled at the first call for a decoder's sizes, which takes seconds.

    Args:
        decoder: On `device`.
        device: 'cpu' or a CUDA device.
        precision: 'fp32', 'bf16' or 'fp16'.

    Raises:
        ValueError: An unknown value of the environment variable MOEISR_KERNELS.
    """
    if switched_off():
        _say(logging.INFO, 'Decode runs on torch code: MOEISR_KERNELS=off.')
        return None
    if decoder.family not in FAMILIES or not any(decoder.depths):  # nothing to compute
        return None
    device = torch.device(device)
    if device.type == 'cpu' and precision != 'fp16':  # no processor's kernel is written for fp16
        from . import cpu
        from .fused import FusedCPUBackend

        return FusedCPUBackend(decoder, precision) if cpu.available() and FusedCPUBackend.supports(decoder) else None
    if device.type == 'cuda':
        try:
            from . import triton_decode

            if not triton_decode.available(device):
                return None
            backend = triton_decode.TritonBackend(decoder, precision)
        except (ImportError, ValueError):  # no Triton or an older one; a layer too wide for its registers
            return None
        return backend if _runs(backend, decoder, device, precision) else None
    return None


def _runs(backend: Backend, decoder: MoEDecoder, device: torch.device, precision: str) -> bool:
    """Whether the kernels compile and run, found out once for each decoder's sizes; says so where they do not."""
    sizes = tuple((name, parameter.shape, parameter.dtype) for name, parameter in decoder.named_parameters())
    key = device, precision, decoder.family, sizes
    if key not in _RUNS:
        try:
            _try_out(backend, decoder)
            _RUNS[key] = True
        except torch.cuda.OutOfMemoryError:  # which says nothing about the kernels
            raise
        except Exception as error:  # no C compiler, no Python.h, no place to write, a driver that is too old, ...
            why = textwrap.shorten(f'{type(error).__name__}: {error}', 240)
            _say(logging.WARNING, f'CUDA decode runs on torch code, slower: the Triton kernels failed with {why}')
            _RUNS[key] = False
    return _RUNS[key]


@torch.no_grad()
def _try_out(backend: Backend, decoder: MoEDecoder) -> None:
    """Runs all kernels on one pixel per expert. Triton compiles at the first launch, with the machine's C compiler."""
    device, size = next(decoder.parameters()).device, (1, decoder.num_experts)
    feat = torch.zeros(1, decoder.pool.in_channels, 1, 1, device=device)
    renderer = Renderer(decoder, size, (1, 1), device=device)
    expert_map = None
    if decoder.mapper is not None:
        window = FeatureWindow(feat, 0, 0, (1, 1))
        near = renderer.near(window, (0, size[0]), (0, size[1]))
        for kernel in (backend.route, backend.logits):
            kernel(decoder.mapper, renderer.mapper_table(window), *near, renderer.cell_lr)
        expert_map = torch.arange(size[1], dtype=torch.uint8, device=device)[None]
    crop, rows, cols = crop_window(feat, renderer.rows, renderer.cols)
    backend.decode(decoder, Tile(crop, rows, cols, renderer.cell_lr, expert_map)).cpu()  # waits for all of them


@cache
def _say(level: int, text: str) -> None:
    """Logs a line, once per process."""
    logging.getLogger('basicsr.kernels').log(level, text)
