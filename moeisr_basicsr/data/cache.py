"""Decoded images in memory that all workers of a process share."""

import os
import shutil

import numpy as np
import torch

from moeisr_basicsr.errors import UserError

from .image_source import ImageSource

MODES = ('none', 'memory')


class SharedImages:
    """Decodes each image of a source once, into memory shared by the processes that have this object.

    It fills up as images are asked for. Two workers that ask for the same image at the same time both write it: the
    same bytes, so nobody needs to wait.

    Args:
        source: The images.
        names: Those to keep room for.

    Raises:
        UserError: An image's header is damaged, or the images need more shared memory than there is for the ranks of
            this machine, each of which has them for itself.
    """

    def __init__(self, source: ImageSource, names: list[str]):
        self.source = source
        headers = [source.header(name) for name in names]
        sizes = [header.height * header.width * 3 * header.bit_depth // 8 for header in headers]
        starts = np.concatenate([[0], np.cumsum([size + size % 2 for size in sizes])])  # even: uint16 needs it
        total = int(starts[-1])
        _check_room(total, source)
        self.places = {
            name: (int(start), size, header) for name, start, size, header in zip(names, starts, sizes, headers)
        }
        self.order = {name: position for position, name in enumerate(self.places)}
        self.pixels = torch.zeros(total, dtype=torch.uint8).share_memory_()
        self.filled = torch.zeros(len(names), dtype=torch.bool).share_memory_()

    def rgb(self, name: str) -> np.ndarray:
        """(H, W, 3) uint8 or uint16 RGB, read-only; errors as `ImageSource.rgb`."""
        start, size, header = self.places[name]
        position = self.order[name]
        dtype = np.uint16 if header.bit_depth == 16 else np.uint8
        view = self.pixels[start : start + size].numpy().view(dtype).reshape(header.height, header.width, 3)
        if not self.filled[position]:
            rgb = self.source.rgb(name)
            if rgb.shape != view.shape or rgb.dtype != view.dtype:  # rotated by what the header did not show
                return rgb
            view[...] = rgb
            self.filled[position] = True
        view.flags.writeable = False
        return view


def _check_room(total: int, source: ImageSource) -> None:
    """Writing past the end of /dev/shm kills the process without a word; containers often have 64 MB of it.

    The pages are taken as they are written: a rank that looks first sees the room that the others will want.
    """
    ranks = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    try:
        free = shutil.disk_usage('/dev/shm').free
    except OSError:  # not Linux: shared memory has no such limit
        return
    if total * ranks > free:
        each = f' on each of {ranks} ranks' if ranks > 1 else ''
        raise UserError(
            f'cache: memory needs {total / 2**30:.1f} GiB of shared memory{each} for the images of '
            f'{source.root}, /dev/shm has {free / 2**30:.1f} GiB free. Enlarge it (docker: --shm-size), or '
            'use cache: none with sub-images in an LMDB.'
        )
