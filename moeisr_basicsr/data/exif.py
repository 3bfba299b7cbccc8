"""EXIF data of photographs: which way is up, and what an enlarged copy keeps.

A copy goes without what no longer holds for it: orientation (its pixels are upright), size and thumbnail, and the
camera's own notes, whose inner offsets point elsewhere after every rewriting.
"""

import numpy as np
from PIL import Image

EXIF_IFD, GPS_IFD = 0x8769, 0x8825
# Description, camera, resolution in print, software, time, artist, copyright, Windows' title to subject, rating.
MAIN_TAGS = (270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 33432, 18246, *range(40091, 40096))
LEFT_OUT = (37500, 40962, 40963, 40965)  # of EXIF_IFD: camera's notes, width, height, interoperability
LONGEST = 65000  # bytes; what one segment of a JPEG file holds, with room for its head
PREFIX = b'Exif\0\0'  # of the block in JPEG and WebP files; PNG has it without
ORIENTATION = 274


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C) as stored -> upright, by EXIF's orientation 1 to 8: 5 to 8 are transposed, then axes are flipped."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]


def kept_exif(image: Image.Image) -> bytes | None:
    """The block to write, with `PREFIX`; None where there is nothing to keep, or it is damaged."""
    try:
        read, kept = image.getexif(), Image.Exif()
        for tag in MAIN_TAGS:
            if tag in read:
                kept[tag] = read[tag]
        for ifd, left_out in ((EXIF_IFD, LEFT_OUT), (GPS_IFD, ())):
            values = {tag: value for tag, value in read.get_ifd(ifd).items() if tag not in left_out}
            if values:
                kept[ifd] = values
        data = kept.tobytes() if len(kept) else None
    except Exception:  # damaged values can end in almost any exception, and the picture is whole without them
        return None
    return data if data is not None and len(data) <= LONGEST else None
