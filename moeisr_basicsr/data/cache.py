"""Decoded images in memory that all workers of a process share."""

import os
import shutil

import numpy as np
import torch

from moeisr_basicsr.errors import ImageError, UserError

from .image_source import ImageSource


class SharedImages:
    """Decodes each image of a source once, into memory shared by the processes that have this object.

    Two workers that ask for the same image at the same time both write it: the same bytes, so nobody needs to wait.

    Args:
        source: The images.
        names: Those to keep room for.
        keeps_damaged: An image whose header is damaged fails when it is asked for, not here.

    Raises:
        ImageError: An image's header is damaged.
        UserError: There is not enough shared memory.
    """

    def __init__(self, source: ImageSource, names: list[str], keeps_damaged: bool = False):
        self.source = source
        self.places: dict[str, tuple[int, int, int, type]] = {}  # name -> number, first byte, last byte + 1, type
        total = 0
        for number, name in enumerate(names):
            try:
                height, width, bit_depth = source.header(name)
            except ImageError:
                if not keeps_damaged:
                    raise
                continue
            size = height * width * 3 * bit_depth // 8
            self.places[name] = number, total, total + size, np.uint16 if bit_depth == 16 else np.uint8
            total += size + size % 2  # even: uint16 needs it
        _check_room(total, source)
        self.pixels = torch.zeros(total, dtype=torch.uint8).share_memory_()
        self.rows = torch.zeros(len(names), dtype=torch.int64).share_memory_()  # of each image; 0: not decoded yet

    def rgb(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8 or uint16 RGB, read-only; errors as `ImageSource.rgb`."""
        if name not in self.places:
            return self.source.rgb(name)
        number, start, stop, dtype = self.places[name]
        pixels = self.pixels[start:stop].numpy().view(dtype)
        if self.rows[number] == 0:
            rgb = self.source.rgb(name)
            pixels[:] = rgb.ravel()
            self.rows[number] = rgb.shape[0]
        pixels.flags.writeable = False
        return pixels.reshape(int(self.rows[number]), -1, 3)


def _check_room(total: int, source: ImageSource) -> None:
    """Writing past the end of /dev/shm kills the process without a word; containers often have 64 MB of it."""
    ranks = int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # each has the images for itself, and takes pages as it writes
    try:
        free = shutil.disk_usage('/dev/shm').free
    except OSError:  # not Linux: shared memory has no such limit
        return
    if total * ranks > free:
        raise UserError(
            f'cache: memory needs {total / 2**30:.1f} GiB of shared memory on each of {ranks} ranks for the images of '
            f'{source.roots[0]}, /dev/shm has {free / 2**30:.1f} GiB free. Enlarge it (docker: --shm-size), or '
            'use cache: none with sub-images in an LMDB.'
        )
