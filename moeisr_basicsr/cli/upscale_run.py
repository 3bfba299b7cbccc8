"""The work of `basicsr upscale`: the next image is read and the last one written while the network computes.

Shapes: (H, W) input, (R, S) output, strips of r rows.
"""

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from basicsr.utils import get_root_logger
from torch import nn
from tqdm import tqdm

from moeisr_basicsr.checkpoint import load_model
from moeisr_basicsr.compat import default_device
from moeisr_basicsr.data.image_reader import ImageData, read_image, to_float
from moeisr_basicsr.data.image_writer import check_writable
from moeisr_basicsr.data.resize import resize
from moeisr_basicsr.errors import UserError, did_you_mean
from moeisr_basicsr.inference import make_control, target_size, upscale_strips

from .upscale_jobs import Job
from .upscale_output import Pipe, Target, blocks

FAILED = 2
DEVICES = ('cpu', 'cuda', 'mps', 'xpu')
OUT_OF_MEMORY = "out of memory|not enough memory|can't allocate memory"  # and not CUDA's 'illegal memory access'


class Upscaler:
    """A network and how to use it.

    Args:
        args: Reads `model`, `device`, `scale`, `size`, `cost_weight`, `budget`, `tile`, `precision`, `expert_map`.

    Raises:
        UserError: The model file, the device, the budget or the tile size is wrong.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        get_root_logger(log_level=logging.WARNING)  # not one line for each network that is built
        self.device = choose_device(args.device)
        self.net = load_model(args.model, self.device)
        check_network_fits(self.net, args)
        self.failed = 0

    def run(self, jobs: list[Job]) -> int:
        """Do all jobs; returns the exit code."""
        if not jobs:
            print('Nothing to do: every output file exists.')
        pending: list[tuple[Job, float, Future]] = []
        bar = tqdm(total=len(jobs), unit='image', disable=None if len(jobs) > 1 else True)
        with bar, ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            for job, image in read_ahead(reader, jobs):
                start = time.perf_counter()
                written = self.attempt(job, lambda: self.upscale(job, image.result(), writer, show=len(jobs) == 1))
                if written is not None:
                    pending.append((job, time.perf_counter() - start, written))
                while pending and (pending[0][2].done() or len(pending) > 1):
                    self.report(*pending.pop(0))
                bar.update()
            for entry in pending:
                self.report(*entry)
        return FAILED if self.failed else 0

    def attempt(self, job: Job, action: Callable) -> object:
        """`action`'s result; None, and one line, where the image cannot be done. Other images go on."""
        try:
            return action()
        except UserError as error:
            message = str(error)
        except MemoryError:
            message = f'{job.source}: there is not enough memory; try --tile, or a smaller output.'
        except OSError as error:
            message = f'{job.target}: cannot be written ({error.strerror or error}).'
        except RuntimeError as error:
            if not re.search(OUT_OF_MEMORY, str(error)):
                raise
            message = f'{job.source}: there is not enough memory on {self.device}; try --tile, or a smaller output.'
        self.failed += 1
        tqdm.write(f'basicsr: error: {message}', file=sys.stderr)
        return None

    def upscale(self, job: Job, image: ImageData, writer: ThreadPoolExecutor, show: bool) -> Future:
        """Compute one image and send it to the writer, whose result says when the files are there."""
        args = self.args
        try:
            size = target_size(image.rgb.shape[:2], args.scale, args.size)
        except UserError as error:
            raise UserError(f'{job.source}: {error}') from None
        job.target.parent.mkdir(parents=True, exist_ok=True)
        check_writable(job.target, size, image.bit_depth, image.alpha is not None)
        if image.num_frames > 1:
            tqdm.write(
                f'basicsr: note: {job.source}: only the first of {image.num_frames} frames is upscaled.',
                file=sys.stderr,
            )
        lq = torch.from_numpy(to_float(image.rgb)).permute(2, 0, 1)[None].to(self.device)  # (1, 3, H, W)
        alpha = None if image.alpha is None else resize(image.alpha, size)  # (R, S)
        strips = upscale_strips(self.net, lq, size, args.cost_weight, args.budget, args.tile, args.precision)
        pipe = Pipe(writer, Target(job, image._replace(rgb=np.empty(0)), size, self.net.expert_costs.tolist()))
        try:
            with tqdm(total=size[0], unit='row', disable=None if show else True, leave=False) as bar:
                for strip in strips:
                    for block in blocks(strip, alpha, image, args.expert_map):
                        pipe.send(block)
                    bar.update(strip.bottom - strip.top)
            return pipe.close()
        except BaseException:
            pipe.abort()
            raise

    def report(self, job: Job, seconds: float, written: Future) -> None:
        """One line about an image that is on the disk, or that could not be written."""
        shares = self.attempt(job, written.result)
        if shares is not None:
            experts = f', experts {" ".join(f"{share:.1%}" for share in shares)}' if shares else ''
            tqdm.write(f'{job.source} -> {job.target}, {seconds:.2f} s{experts}')


def read_ahead(pool: ThreadPoolExecutor, jobs: list[Job]) -> Iterator[tuple[Job, Future]]:
    """Each job with its image, which is read while the one before is computed."""
    following = pool.submit(read_image, jobs[0].source) if jobs else None
    for place, job in enumerate(jobs):
        current = following
        following = pool.submit(read_image, jobs[place + 1].source) if place + 1 < len(jobs) else None
        yield job, current


def choose_device(name: str | None) -> torch.device:
    """The named device; a GPU if there is one where none is named, under torchrun the process's own.

    Raises:
        UserError: There is no such device.
    """
    if name is None:
        device = default_device()
        local = int(os.environ.get('LOCAL_RANK', 0))
        return torch.device('cuda', local % torch.cuda.device_count()) if device.type == 'cuda' else device
    if not re.fullmatch(r'[a-z]+(:\d+)?', name) or name.partition(':')[0] not in DEVICES:
        raise UserError(
            f'--device must be one of {", ".join(DEVICES)}, or one with a number such as cuda:1; got '
            f"'{name}'.{did_you_mean(name.partition(':')[0], DEVICES)}"
        )
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'--device {name} cannot be used here: {reason}') from error
    return device


def check_network_fits(net: nn.Module, args: argparse.Namespace) -> None:
    """Whether the network can do what is asked, before the first image is read.

    Raises:
        UserError: It cannot.
    """
    if not hasattr(net, 'render'):
        raise UserError(
            f'{args.model}: {type(net).__name__} upscales by one fixed factor; `basicsr upscale` needs '
            'LIIF, LTE or MoEISR.'
        )
    if net.decoder.out_channels != 3 or next(net.encoder.parameters()).shape[1] != 3:
        raise UserError(f'{args.model}: this network does not work on RGB images.')
    if args.expert_map and net.num_experts == 1:
        raise UserError(f'{args.model} has one expert: there is no map to draw. Leave out --expert-map.')
    if args.tile is not None and (args.tile < 0 or 0 < args.tile < 16):
        raise UserError(f'--tile must be 0 (the whole image) or at least 16 pixels; got {args.tile}.')
    make_control(net, args.cost_weight, args.budget)
