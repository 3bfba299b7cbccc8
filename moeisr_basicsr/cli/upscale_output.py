"""Writing what `basicsr upscale` computes, in a thread of its own and strip by strip.

Shapes: (R, S) rows and columns of the output image; strips have r rows; C is 1 to 4 channels as stored.
"""

import queue
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from moeisr_basicsr.data.image_reader import ImageData
from moeisr_basicsr.data.image_writer import join_channels, strip_writer
from moeisr_basicsr.inference import Strip

from .expert_map import ExpertMapPicture
from .upscale_jobs import Job

BLOCK_VALUES = 1 << 22  # of a block of rows: its temporaries stay far below the memory that a network needs
BLOCKS_WAITING = 8  # between the network and the disk
POLL_SECONDS = 0.2
END = object()


class Part(NamedTuple):
    """A block of rows, as they are stored."""

    pixels: np.ndarray  # (r, S, C) uint8 or uint16
    expert_map: np.ndarray | None  # (r, S) uint8


class Target(NamedTuple):
    """What is written, and where."""

    job: Job
    source: ImageData  # without its pixels: depth, grey, profile, and whether there is alpha
    size: tuple[int, int]  # (R, S)
    costs: list[float]  # of the experts, for the map's legend


def blocks(strip: Strip, alpha: np.ndarray | None, source: ImageData, with_map: bool) -> Iterator[Part]:
    """A strip as blocks of rows: a strip of a large image is large itself, and its copies would add up.

    Args:
        strip: From the network.
        alpha: (R, S) of the whole image, or None.
        source: Says the depth and whether to write grey.
        with_map: Whether the expert map is wanted.
    """
    rows, cols = strip.image.shape[1:]
    step = max(BLOCK_VALUES // (3 * cols), 1)
    for top in range(0, rows, step):
        bottom = min(top + step, rows)
        rgb = strip.image[:, top:bottom].permute(1, 2, 0).float().cpu().numpy()  # (r, S, 3)
        part = None if alpha is None else alpha[strip.top + top : strip.top + bottom]
        expert_map = strip.expert_map[top:bottom].cpu().numpy() if with_map else None
        yield Part(join_channels(rgb, part, source.bit_depth, source.was_grey), expert_map)


class Aborted(Exception):
    """The image could not be computed; its files must not appear."""


class Pipe:
    """Blocks of rows on their way to a file.

    Args:
        pool: Runs the writing; one worker, so that files are written one after the other.
        target: What is written.
    """

    def __init__(self, pool: Executor, target: Target):
        self.parts: queue.Queue = queue.Queue(BLOCKS_WAITING)
        self.future: Future = pool.submit(write_files, target, self.parts)

    def send(self, part: object) -> None:
        """Hand on a block; waits while the disk is slower than the network.

        Raises:
            UserError: Writing has failed.
        """
        while True:
            try:
                return self.parts.put(part, timeout=POLL_SECONDS)
            except queue.Full:
                if self.future.done():
                    self.future.result()  # raises what stopped it

    def close(self) -> Future:
        """All blocks are sent; the result is the experts' shares, once the files are there."""
        self.send(END)
        return self.future

    def abort(self) -> None:
        """Give up; neither file appears."""
        while not self.future.done():
            try:
                return self.parts.put(Aborted(), timeout=POLL_SECONDS)
            except queue.Full:
                continue


def write_files(target: Target, parts: queue.Queue) -> list[float]:
    """Write the blocks of `parts` until its end: the image, and the expert map before it.

    Raises:
        Aborted: As the queue says; no file appears.
        UserError: The disk is full or fails.
    """
    job, source, picture = target.job, target.source, None
    channels = (1 if source.was_grey else 3) + (source.alpha is not None)
    with ExitStack() as stack:
        if job.expert_map is not None:
            picture = ExpertMapPicture(target.size[1], target.costs)
        image = stack.enter_context(  # left last, so that it appears last: then everything is there
            strip_writer(job.target, *target.size, channels, source.bit_depth, source.icc_profile, source.exif)
        )
        drawing = (
            None
            if picture is None
            else stack.enter_context(strip_writer(job.expert_map, target.size[0] + picture.legend_rows, picture.width))
        )
        while (part := parts.get()) is not END:
            if isinstance(part, Aborted):
                raise part
            image(part.pixels)
            if drawing is not None:
                drawing(picture.rows(part.expert_map))
        if drawing is not None:
            drawing(picture.legend())
    return [] if picture is None else picture.shares()
