"""The work of `basicsr upscale`: read an image, upscale it strip by strip, write the strips as they come.

Shapes: (H, W) input, (R, S) output, strips of r output rows, C channels as stored (1 to 4).
"""

import argparse
import logging
import math
import os
import re
import shutil
import sys
import time
from contextlib import ExitStack

import torch
from basicsr.utils import get_root_logger
from tqdm import tqdm

from moeisr_basicsr.archs.moeisr_arch import FixedScale, MoEISR
from moeisr_basicsr.checkpoint import load_any
from moeisr_basicsr.data.image_reader import read_image, to_float
from moeisr_basicsr.data.image_writer import FORMATS, join_channels, strip_writer
from moeisr_basicsr.data.resize import resize
from moeisr_basicsr.data.strip_encoders import ENCODERS
from moeisr_basicsr.errors import ExitCode, UserError, printable
from moeisr_basicsr.inference import make_control, target_size, upscale_strips

from . import mistakes
from .expert_map import ExpertMapPicture
from .upscale_jobs import Job

OUT_OF_MEMORY = "out of memory|not enough memory|can't allocate memory"  # and not CUDA's 'illegal memory access'
UNLIKE = 1.02  # factors of rows and columns that differ by more change what a picture looks like
LARGE = 2**30  # bytes of pixels, which a line announces
# What writing takes on the disk, for each byte of pixels: the least that photographs of Set5 took, upscaled twelvefold.
# TIFF keeps the pixels there as well, until it is done.
ON_DISK = {'PNG': 0.17, 'TIFF': 1.17, 'JPEG': 0.03, 'WEBP': 0.01, 'BMP': 1.0}


def run_jobs(jobs: list[Job], args: argparse.Namespace) -> int:
    """Do all jobs. An image that cannot be done costs itself only, and the exit code says so."""
    get_root_logger(log_level=logging.WARNING)  # not one line for each network that is built
    net = load_network(args)
    if not jobs:
        print('Nothing to do: every output file exists.')
    code = ExitCode.OK
    for number, job in enumerate(jobs, 1):
        start = time.perf_counter()
        try:
            job.target.parent.mkdir(parents=True, exist_ok=True)
            shares = upscale_file(net, job, args, f'{number}/{len(jobs)}')
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            print(f'basicsr: error: {reason(error, job)}', file=sys.stderr)
            code = ExitCode.USER_ERROR
        else:
            experts = f', experts {" ".join(f"{share:.1%}" for share in shares)}' if shares else ''
            print(printable(f'{job.source} -> {job.target}, {time.perf_counter() - start:.2f} s{experts}'))
    return code


def reason(error: Exception, job: Job) -> str:
    """Why an image could not be done; a bug is raised again."""
    if lines := mistakes(error):
        return lines[0]
    if isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error)):
        return f'{job.source}: there is not enough memory; try --tile, or a smaller output.'
    raise error


def upscale_file(net: MoEISR, job: Job, args: argparse.Namespace, label: str) -> list[float]:
    """Upscale one image; its files appear complete or not at all. Returns the experts' shares if there is a map."""
    image = read_image(job.source)
    try:
        size = target_size(image.rgb.shape[:2], args.scale, args.size)
    except UserError as error:
        raise UserError(f'{job.source}: {error}') from None
    rows, cols = (out / own for out, own in zip(size, image.rgb.shape))
    if image.num_frames > 1:
        tell(f'{job.source}: only the first of {image.num_frames} frames is upscaled')
    if args.size is not None and max(rows, cols) > UNLIKE * min(rows, cols):
        tell(f'{job.source}: its proportions change: {rows:.3g} times the rows, {cols:.3g} times the columns')
    lq = torch.from_numpy(to_float(image.rgb)).permute(2, 0, 1)[None]  # (1, 3, H, W)
    lq = lq.to(next(net.parameters()).device)
    with ExitStack() as stack:
        channels = (1 if image.was_grey else 3) + (image.alpha is not None)
        image_file = strip_writer(job.target, *size, channels, image.bit_depth, image.icc_profile, image.exif)
        write = stack.enter_context(image_file)  # left last: then everything is there
        announce(job, size, channels * image.bit_depth // 8)
        alpha = None if image.alpha is None else resize(image.alpha, size)  # (R, S)
        if job.expert_map is not None:
            picture = ExpertMapPicture(size[1], net.expert_costs.tolist())
            map_file = strip_writer(job.expert_map, size[0] + picture.legend_rows, picture.width)
            write_map = stack.enter_context(map_file)
        bar = stack.enter_context(tqdm(total=size[0], unit='row', desc=label, leave=False, disable=None))
        for strip in upscale_strips(net, lq, size, args.cost_weight, args.budget, args.tile, args.precision):
            rgb = strip.image.permute(1, 2, 0).cpu().numpy()  # (r, S, 3)
            opacity = None if alpha is None else alpha[strip.top : strip.bottom]
            write(join_channels(rgb, opacity, image.bit_depth, image.was_grey))  # (r, S, C)
            if job.expert_map is not None and strip.expert_map is not None:
                write_map(picture.rows(strip.expert_map.cpu().numpy()))
            bar.update(strip.bottom - strip.top)
        if job.expert_map is not None:
            write_map(picture.legend())
    return picture.shares() if job.expert_map is not None else []


def announce(job: Job, size: tuple[int, int], pixel_bytes: int) -> None:
    """A line about a very large output.

    Raises:
        UserError: The disk has no room for it.
    """
    total, kind = math.prod(size) * pixel_bytes, FORMATS[job.target.suffix.lower()][0]
    if total < LARGE:
        return
    megapixels = f'{size[1]} x {size[0]} pixels, {math.prod(size) / 1e6:,.0f} megapixels'
    what = f'{job.target}: {megapixels}, {total / 2**30:,.1f} GiB uncompressed'
    needed, free = ON_DISK[kind] * total, shutil.disk_usage(job.target.parent).free
    if needed > free:
        room = f'about {needed / 2**30:,.1f} GiB on the disk, which has {free / 2**30:,.1f} GiB left'
        raise UserError(f'{what}: this needs {room}.')
    where = '' if kind in ENCODERS else ', all in memory until it is written; .png and .tif are not'
    tell(f'{what}{where}')


def tell(note: str) -> None:
    """A line beside the results."""
    print(printable(f'basicsr: note: {note}.'), file=sys.stderr)


def choose_device(name: str | None) -> torch.device:
    """The named device; without a name a GPU if there is one, under torchrun the process's own."""
    if name is None:
        count = torch.cuda.device_count()
        name = f'cuda:{int(os.environ.get("LOCAL_RANK", 0)) % count}' if count else 'cpu'
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cause = str(error).strip().splitlines()[0]
        raise UserError(f"--device '{name}' cannot be used here: {cause}") from error
    return device


def load_network(args: argparse.Namespace) -> MoEISR:
    """The network, once it is clear that it can do what is asked."""
    net = load_any(args.model, choose_device(args.device))
    if isinstance(net, FixedScale) and os.environ.get('RANK', '0') == '0':
        print(f'Model: {args.model}, made for x{net.encoder.scale}: its image is resampled to other factors.')
    if (net.in_channels, net.decoder.out_channels) != (3, 3):
        raise UserError(f'{args.model}: this network does not work on RGB images.')
    if args.expert_map and net.num_experts == 1:
        raise UserError(f'{args.model} has one expert: there is no map to draw. Leave out --expert-map.')
    if args.tile is not None and args.tile != 0 and args.tile < 16:
        raise UserError(f'--tile must be 0 (the whole image) or at least 16 pixels; got {args.tile}.')
    make_control(net, args.cost_weight, args.budget)
    return net
