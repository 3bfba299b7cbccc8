"""From validation datasets to results: the work of all ranks, collected and reported."""

import sys
from collections.abc import Callable

from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import get_dist_info
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .evaluation import Evaluated, gather_records, iterate_jobs, my_jobs, summarize
from .image_evaluation import ImageEvaluator

GIVEN_UP = {'loader': -1, 'index': 0}  # the record of a rank that was asked to stop


def run_validation(
    opt: dict,
    net: nn.Module,
    dataloaders: list[DataLoader],
    current_iter: int | str,
    tb_logger: object,
    save_img: bool,
    should_stop: Callable[[], bool] | None = None,
) -> list[Evaluated] | None:
    """Evaluate every dataset, images x scales shared among the ranks.

    Args:
        opt: The whole options; see `ImageEvaluator`; also reads `val: pbar` (shown on a terminal by default).
        net: The bare network.
        dataloaders: One per dataset; each dataset has one scale.
        current_iter: Iteration, or the run's name in testing.
        tb_logger: TensorBoard writer of rank 0, or None.
        save_img: Whether to write result images.
        should_stop: Asked before every image.

    Returns:
        The results of every dataset, on every rank; None where validation was given up.
    """
    evaluate = ImageEvaluator(opt)
    rank, world_size = get_dist_info()
    jobs = my_jobs([len(loader.dataset) for loader in dataloaders], rank, world_size)
    shown = (opt.get('val') or {}).get('pbar', sys.stderr.isatty())
    records, stopped = [], False
    with tqdm(total=sum(map(len, jobs)), unit='image', disable=not shown or rank != 0) as bar:
        for position, (loader, indices) in enumerate(zip(dataloaders, jobs)):
            for index, item in iterate_jobs(loader, indices):
                stopped = stopped or (should_stop is not None and should_stop())
                if stopped:
                    break
                record = evaluate(net, item, loader.dataset.opt, current_iter, save_img, index)
                records.append({'loader': position, 'index': index, **record})
                bar.set_description(f'{record["dataset"]} {record["name"]}')
                bar.update()
    records = gather_records(records + [GIVEN_UP] * stopped)
    if GIVEN_UP in records:
        return None
    show_pictures(records, current_iter, tb_logger)
    groups = [[record for record in records if record['loader'] == position] for position in range(len(dataloaders))]
    return [summarize(group) for group in groups if group]


def show_pictures(records: list[dict], current_iter: int | str, tb_logger: object) -> None:
    """The gathered pictures in TensorBoard, then out of the records."""
    for record in records:
        for suffix, picture in record.pop('pictures', {}).items():
            if tb_logger:
                name = f'{record["dataset"]}_{record["scale"]}/{record["name"]}{suffix}'
                tb_logger.add_image(name, picture[..., ::-1].copy(), current_iter, dataformats='HWC')


def report(result: Evaluated, best: dict, current_iter: int | str, tb_logger: object) -> None:
    """One dataset's results in the log and in TensorBoard.

    Args:
        best: BasicSR's `best_metric_results`.
    """
    lines = [f'Validation {result.dataset} {result.scale}, {result.count} images']
    for name, value in result.metrics.items():
        line = f'\t # {name}: {value:.4f}'
        record = best.get(result.dataset, {}).get(name)
        lines.append(line if record is None else f'{line}\tBest: {record["val"]:.4f} @ {record["iter"]} iter')
    if result.loads:
        loads = ' '.join(f'{load:.1%}' for load in result.loads)
        lines.append(f'\t # experts: {loads}\tmean cost: {result.mean_cost:.4f}')
    get_root_logger().info('\n'.join(lines))
    if tb_logger:
        for name, value in result.metrics.items():
            tb_logger.add_scalar(f'metrics/{result.dataset}/{name}', value, current_iter)
        for j, load in enumerate(result.loads, 1):
            tb_logger.add_scalar(f'val_load/{result.dataset}/expert_{j}', load, current_iter)
        if result.mean_cost is not None:
            tb_logger.add_scalar(f'val_cost/{result.dataset}', result.mean_cost, current_iter)
