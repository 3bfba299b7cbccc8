"""Another implicit task with the same core: fit a depth map, one channel, without any image network.

A small learnable feature grid takes the place of the encoder; the decoder with its experts and mapper is the one that
super-resolution uses. It sees depth at random pixels of a coarse rendering and is asked for a rendering at twice the
resolution, where the analytic truth is known.

    python examples/fit_depth.py --png depth.png      (with moeisr_basicsr installed; about ten seconds on one core)
"""

import argparse
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moeisr_basicsr.core import MoEDecoder, make_cell, make_coord, render_image

SIZE = (96, 128)  # rows, columns of the depth map that is fitted
GRID = (24, 32)  # rows, columns of latent codes
BALANCE_WEIGHT = 0.05  # beside an absolute error of about 0.01; without it one expert soon predicts everything


class Fit(NamedTuple):
    """The result of `fit`."""

    start_rmse: float  # before training, in units of depth
    rmse: float  # at twice the fitted resolution
    shares: list[float]  # part of the pixels that each expert predicts
    mean_cost: float  # mean multiply-adds per pixel over the most expensive expert's
    depth: Tensor  # (R, S) fitted depth
    truth: Tensor  # (R, S)
    expert_map: Tensor  # (R, S) uint8


def analytic_depth(coord: Tensor) -> Tensor:
    """Depth of a made-up scene at positions (..., 2) in [-1, 1]: a tilted floor, a step, a ball, ripples; in [0, 1]."""
    row, col = coord.unbind(-1)
    depth = 0.75 - 0.2 * row
    depth = torch.where(col + 0.2 * row > 0.45, depth - 0.2, depth)  # an edge that no smooth function follows
    ball = 0.36 - (row + 0.1).square() - (col + 0.45).square()
    depth = torch.where(ball > 0, 0.6 - ball.clamp_min(0).sqrt() * 0.6, depth)
    ripples = 0.04 * torch.sin(18 * col) * torch.sin(14 * row)
    return depth + torch.where((row > 0.3) & (ball <= 0), ripples, torch.zeros_like(ripples))


class DepthField(nn.Module):
    """Latent codes on a grid and the decoder that reads them."""

    def __init__(self, num_feat: int = 16):
        super().__init__()
        self.feat = nn.Parameter(torch.randn(1, num_feat, *GRID) * 0.1)
        self.decoder = MoEDecoder(
            num_feat,
            out_channels=1,
            family='liif',
            experts=[[8], [24], [48, 48]],
            mapper={'num_layers': 1, 'num_feat': 16},
        )


def evaluate(field: DepthField, size: tuple[int, int]) -> tuple[float, Tensor, Tensor, Tensor]:
    """RMSE against the analytic truth at `size`, then depth, truth and expert map, each (R, S)."""
    rendered = render_image(field.decoder, field.feat.detach(), size, make_cell(SIZE))
    depth, truth = rendered.output[0, 0], analytic_depth(make_coord(size)).view(size)
    return (depth - truth).square().mean().sqrt().item(), depth, truth, rendered.expert_map[0]


def fit(iterations: int = 400, queries: int = 1024, seed: int = 0, verbose: bool = False) -> Fit:
    """Fit the made-up scene.

    Args:
        iterations: Training steps.
        queries: Pixels per step.
        seed: Of everything random.
        verbose: Print the error now and then.
    """
    torch.manual_seed(seed)
    field = DepthField()
    coords = make_coord(SIZE)  # (R * S, 2)
    values = analytic_depth(coords)
    cell = make_cell(SIZE).expand(1, queries, 2)
    optimizer = torch.optim.Adam(field.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=1e-4)
    finer = 2 * SIZE[0], 2 * SIZE[1]
    start_rmse = evaluate(field, finer)[0]
    for iteration in range(1, iterations + 1):
        which = torch.randint(len(coords), (queries,))
        decoded = field.decoder(field.feat, coords[which][None], cell)
        error = (decoded.prediction[0, :, 0] - values[which]).abs().mean()
        # Gates are one-hot forward and soft backward, so the shares are real and the mapper learns from them.
        shares = decoded.routing.gate.mean(dim=(0, 1))  # (J,)
        balance = (shares - 1 / len(shares)).square().sum() * len(shares)
        optimizer.zero_grad()
        (error + BALANCE_WEIGHT * balance).backward()
        optimizer.step()
        schedule.step()
        if verbose and iteration % 100 == 0:
            of_experts = ', '.join(f'{share:.0%}' for share in shares.tolist())
            print(
                f'iteration {iteration:4d}: mean absolute error {error.item():.4f}, shares of the experts {of_experts}'
            )
    rmse, depth, truth, expert_map = evaluate(field, finer)
    shares = expert_map.flatten().bincount(minlength=field.decoder.num_experts) / expert_map.numel()
    mean_cost = (shares * field.decoder.expert_costs).sum().item()
    return Fit(start_rmse, rmse, shares.tolist(), mean_cost, depth, truth, expert_map)


def save_png(path: str, result: Fit) -> None:
    """Truth, fit and expert map side by side, as an 8-bit grey image."""
    import cv2

    experts = result.expert_map.float() / max(len(result.shares) - 1, 1)
    panels = torch.cat([result.truth, result.depth, experts], dim=1).clamp(0, 1)
    if not cv2.imwrite(path, (panels * 255).round().byte().numpy()):
        raise SystemExit(f'{path} could not be written.')


def main() -> None:
    """Fit, print, and write the picture if asked."""
    parser = argparse.ArgumentParser(description='Fit a depth map with the decoder of MoEISR.')
    parser.add_argument('--iterations', type=int, default=400, help='training steps (default: 400)')
    parser.add_argument('--png', help='write truth, fit and expert map side by side to this file')
    args = parser.parse_args()
    if args.iterations < 1:
        parser.error(f'--iterations must be at least 1; got {args.iterations}')
    result = fit(args.iterations, verbose=True)
    print(
        f'at twice the fitted resolution: RMSE {result.start_rmse:.4f} -> {result.rmse:.4f}, '
        f'PSNR {-20 * math.log10(result.rmse):.1f} dB (depth spans 0 to 1)'
    )
    print(
        'pixels per expert, cheapest to most expensive: '
        + ', '.join(f'{share:.0%}' for share in result.shares)
        + f'; mean cost {result.mean_cost:.2f} of the most expensive expert alone'
    )
    if args.png:
        save_png(args.png, result)
        print(f'picture (truth, fit, experts): {args.png}')


if __name__ == '__main__':
    main()
