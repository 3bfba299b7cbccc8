"""Which pixels and which colours an evaluation protocol compares.

'benchmark' (Set5, Set14, B100, Urban100): luma, borders of ceil(s) pixels left out on each axis.
'div2k': RGB, borders of ceil(s) + 6.

Shapes: (H, W, C) or (H, W) images.
"""

import math

from moeisr_basicsr.errors import UserError, did_you_mean

PROTOCOLS = {'benchmark': 0, 'div2k': 6}  # pixels to leave out beyond the factor; LIIF, utils.calc_psnr
LUMA = (65.738, 129.057, 25.064)  # MATLAB's rgb2ycbcr for R, G, B in [0, 1], times 256 / 255; LIIF, utils.calc_psnr
EPS_CEIL = 1e-6  # a factor that was computed from sizes may exceed a whole number by rounding


def factor_pair(scale: float | tuple[float, float]) -> tuple[float, float]:
    """(row factor, column factor).

    Raises:
        UserError: Neither one nor two factors of at least 1.
    """
    pair = tuple(scale) if isinstance(scale, (tuple, list)) else (scale, scale)
    if len(pair) != 2 or not all(math.isfinite(s) and s >= 1 for s in pair):
        raise UserError(f'A metric needs a scale of at least 1, or two of them (rows, columns); got {scale}.')
    return float(pair[0]), float(pair[1])


def shave(protocol: str, scale: float | tuple[float, float]) -> tuple[int, int]:
    """(rows, columns) to leave out at each border.

    Args:
        protocol: 'benchmark' or 'div2k'.
        scale: Factor, or (row factor, column factor).

    Raises:
        UserError: An unknown protocol or a factor below 1.
    """
    if protocol not in PROTOCOLS:
        raise UserError(
            f"'{protocol}' is not a protocol of evaluation; there are {', '.join(PROTOCOLS)}."
            f'{did_you_mean(protocol, PROTOCOLS)}'
        )
    rows, cols = factor_pair(scale)
    return math.ceil(rows - EPS_CEIL) + PROTOCOLS[protocol], math.ceil(cols - EPS_CEIL) + PROTOCOLS[protocol]
