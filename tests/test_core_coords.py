"""Coordinates, nearest cells, corners and weights against exact rational arithmetic and PyTorch's own sampler."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from moeisr_basicsr.core import make_cell, make_coord, output_size
from moeisr_basicsr.core.coords import (
    corner_axis,
    ensemble_weight,
    grid_axis,
    grid_corners,
    make_corners,
    nearest_index,
    pixel_centres,
)

# (LR size, output size) of one axis: odd and even factors, halves, non-integer ones, one pixel, no enlargement.
AXES = [
    (n, output_size((n, n), factor)[0])
    for n in (1, 2, 3, 7, 48, 113, 256, 513)
    for factor in (1, 1.5, 2, 2.7, 3, 3.3, 4, 5, 7, 8)
]


def published_coord(size):
    """The published formula, operation by operation: first centre, then steps of two radii, in fp32."""
    axes = []
    for n in size:
        radius = (1 - -1) / (2 * n)
        axes.append(-1 + radius + (2 * radius) * torch.arange(n).float())
    rows, cols = axes
    return torch.stack([rows.repeat_interleave(len(cols)), cols.repeat(len(rows))], dim=-1)


@pytest.mark.parametrize('size', [(1, 1), (2, 3), (7, 5), (48, 48), (111, 513)])
def test_make_coord_is_the_published_formula(size):
    coord = make_coord(size)
    assert coord.dtype == torch.float32
    assert torch.equal(coord, published_coord(size))
    exact = torch.tensor(
        [
            [(2 * row + 1) / size[0] - 1, (2 * col + 1) / size[1] - 1]
            for row in range(size[0])
            for col in range(size[1])
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(coord.double(), exact, rtol=0, atol=2e-7)


def test_make_cell_is_rows_first():
    assert make_cell((4, 10)).tolist() == pytest.approx([0.5, 0.2])


def grid_sample_index(coord, n):
    image = torch.arange(n, dtype=torch.float32).view(1, 1, 1, n)
    at = torch.stack([coord, torch.zeros_like(coord)], dim=-1).view(1, 1, -1, 2)
    return F.grid_sample(image, at, mode='nearest', align_corners=False).flatten().long()


def test_nearest_index_is_that_of_grid_sample():
    for n, n_out in AXES:
        coord = pixel_centres(n_out)
        for shift in (-1 / n + 1e-6, 0.0, 1 / n + 1e-6):
            at = (coord + shift).clamp(-1 + 1e-6, 1 - 1e-6)
            assert torch.equal(nearest_index(at, n), grid_sample_index(at, n)), (n, n_out, shift)


@pytest.mark.parametrize('n', [2, 5, 64, 513])
def test_nearest_index_of_any_coordinate(n):
    generator = torch.Generator().manual_seed(n)
    borders = (2 * torch.arange(n + 1) / n - 1).float()  # exactly between two cells: the same rounding is needed
    coord = torch.cat([torch.rand(4096, generator=generator) * 2 - 1, borders]).clamp(-1 + 1e-6, 1 - 1e-6)
    index = nearest_index(coord, n)
    assert index.dtype == torch.int64
    assert torch.equal(index, grid_sample_index(coord, n))
    inside = ((coord.double() + 1) / 2 * n).floor().long()
    position = (coord.double() + 1) / 2 * n
    clear = (position - position.round()).abs() > 1e-6 * n
    assert clear.sum() > 3000
    assert torch.equal(index[clear], inside[clear])


@pytest.mark.parametrize(('n', 'n_out'), AXES[::3] + [(5, 15), (9, 45), (113, 791)])
def test_corner_axis_in_rational_arithmetic(n, n_out):
    """Index and relative coordinate from exact fractions; the shift by 1e-6 decides the ties of odd factors."""
    axis = grid_axis(n_out, n)
    checked = 0
    for i in range(n_out):
        centre = Fraction(2 * i + 1, n_out) - 1
        for corner, sign in enumerate((-1, 1)):
            limit = 1 - Fraction(1, 10**6)
            shifted = max(-limit, min(limit, centre + Fraction(sign, n) + Fraction(1, 10**6)))
            position = (shifted + 1) / 2 * n
            if abs(position - round(position)) < Fraction(3, 10**7) * n:
                continue  # fp32 rounding decides; the comparison with grid_sample covers it
            code = min(math.floor(position), n - 1)
            assert int(axis.index[corner, i]) == code, (i, sign)
            rel = (centre - (Fraction(2 * code + 1, n) - 1)) * n
            assert float(axis.rel[corner, i]) == pytest.approx(float(rel), abs=4e-7 * n)
            checked += 1
    assert checked > n_out


def test_weights_add_up_to_one():
    for n, n_out in AXES:
        if n_out > 800:
            continue
        axis = grid_axis(n_out, n)
        weight = ensemble_weight(axis.rel[:, :, None], axis.rel[:, None, :])
        assert (weight >= 0).all()
        torch.testing.assert_close(weight.sum(dim=0), torch.ones(n_out, n_out), rtol=0, atol=1e-6)


@pytest.mark.parametrize('factor', [(2, 2), (3, 3), (2.6, 5), (4, 1.7)])
def test_inner_weights_are_bilinear(factor):
    """Inside the image the diagonally opposite areas are the bilinear interpolation weights."""
    lr_size = 9, 6
    size = output_size(lr_size, factor)
    corners = grid_corners(grid_axis(size[0], lr_size[0]), grid_axis(size[1], lr_size[1]), lr_size[1])
    blended = torch.zeros(size[0] * size[1], lr_size[0] * lr_size[1], dtype=torch.float64)
    for c in range(4):
        blended.scatter_add_(1, corners.index[c, 0, :, None], corners.weight[c, 0, :, None].double())
    codes = torch.eye(lr_size[0] * lr_size[1], dtype=torch.float64).view(1, -1, *lr_size)
    bilinear = F.interpolate(codes, size=size, mode='bilinear', align_corners=False)[0].flatten(1).t()
    centre = make_coord(size)
    # On the outermost latent codes all four areas are rounding noise, and the published blend rests on it.
    inner = (centre.abs() < 1 - 1.001 / torch.tensor(lr_size)).all(dim=-1)
    assert inner.sum() > 20
    torch.testing.assert_close(blended[inner], bilinear[inner], rtol=0, atol=5e-5)


@pytest.mark.parametrize(('n_out', 'n'), [(97, 31), (40, 40), (513, 73), (21, 7), (8, 1)])
def test_strip_equals_whole_bitwise(n_out, n):
    whole = grid_axis(n_out, n)
    for start, stop in ((0, n_out), (0, 1), (n_out - 1, None), (3, min(n_out, 20))):
        strip = grid_axis(n_out, n, start, stop)
        assert torch.equal(strip.index, whole.index[:, start:stop])
        assert torch.equal(strip.rel, whole.rel[:, start:stop])


@pytest.mark.parametrize(
    ('lr_size', 'size'), [((5, 7), (15, 21)), ((1, 1), (4, 3)), ((6, 1), (7, 5)), ((11, 4), (29, 28))]
)
def test_scattered_corners_equal_the_grid_bitwise(lr_size, size):
    grid = grid_corners(grid_axis(size[0], lr_size[0]), grid_axis(size[1], lr_size[1]), lr_size[1])
    scattered = make_corners(make_coord(size).expand(2, -1, -1), lr_size)
    for name in ('index', 'rel', 'weight'):
        for image in range(2):
            assert torch.equal(getattr(scattered, name)[:, image], getattr(grid, name)[:, 0]), name
    order = torch.randperm(size[0] * size[1], generator=torch.Generator().manual_seed(0))
    shuffled = make_corners(make_coord(size)[None, order], lr_size)
    assert torch.equal(shuffled.weight[:, 0], grid.weight[:, 0, order])


def test_corner_order_and_opposite_weights():
    """One query a quarter of a cell above and left of the centre of cell (1, 2) of a 4 x 5 map, by hand."""
    coord = torch.tensor([[[(1 + 0.25) / 4 * 2 - 1, (2 + 0.25) / 5 * 2 - 1]]])
    corners = make_corners(coord, (4, 5))
    assert corners.index[:, 0, 0].tolist() == [0 * 5 + 1, 0 * 5 + 2, 1 * 5 + 1, 1 * 5 + 2]
    rel = torch.tensor([[1.5, 1.5], [1.5, -0.5], [-0.5, 1.5], [-0.5, -0.5]])
    torch.testing.assert_close(corners.rel[:, 0, 0], rel, rtol=0, atol=1e-5)
    weight = torch.tensor([0.0625, 0.1875, 0.1875, 0.5625])
    torch.testing.assert_close(corners.weight[:, 0, 0], weight, rtol=0, atol=1e-5)


def test_corner_axis_keeps_the_shape_of_its_input():
    axis = corner_axis(torch.zeros(2, 3, 4), 8)
    assert axis.index.shape == axis.rel.shape == (2, 2, 3, 4)
    assert axis.rel.dtype == torch.float32


@pytest.mark.parametrize(
    ('size', 'scale', 'expected'),
    [
        ((10, 20), 2, (20, 40)),
        ((5, 7), 1.5, (8, 11)),
        ((5, 3), 2.5, (13, 8)),
        ((48, 48), 3.3, (158, 158)),
        ((10, 20), (2, 3.5), (20, 70)),
        ((10, 20), [1, 4], (10, 80)),
        ((1, 1), 1.0, (1, 1)),
        ((3, 4), 1.49, (4, 6)),
    ],
)
def test_output_size_rounds_halves_up(size, scale, expected):
    """Python's own round() would give 12 for 12.5 and 8 for 7.5: halves go up here."""
    assert output_size(size, scale) == expected


@pytest.mark.parametrize('scale', [0.5, 0, -2, (2, 0.9), (1, 2, 3), float('nan'), float('inf'), (2, float('nan')), ()])
def test_output_size_rejects_bad_factors(scale):
    with pytest.raises(ValueError, match='scale must be a finite factor of at least 1'):
        output_size((10, 10), scale)
