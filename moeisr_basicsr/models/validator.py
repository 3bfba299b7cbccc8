"""From validation datasets to results: the work of all ranks, collected and reported."""

import sys
from collections.abc import Callable
from typing import Any

from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import get_dist_info
from mmengine.dist import all_gather_object
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from moeisr_basicsr.analysis.schema import scale_label

from .evaluation import Evaluated, Record, iterate_jobs, my_jobs, summarize
from .image_evaluation import ImageEvaluator


def run_validation(
    opt: dict,
    net: nn.Module,
    dataloaders: list[DataLoader],
    current_iter: int | str,
    tb_logger: Any,
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
    datasets: list[Any] = [loader.dataset for loader in dataloaders]
    jobs = my_jobs([len(dataset) for dataset in datasets], rank, world_size)
    shown = (opt.get('val') or {}).get('pbar', sys.stderr.isatty())
    records, stopped = [], False
    with tqdm(total=sum(map(len, jobs)), unit='image', disable=not shown or rank != 0) as bar:
        for position, (loader, indices) in enumerate(zip(dataloaders, jobs)):
            for index, item in iterate_jobs(loader, indices):
                stopped = stopped or (should_stop is not None and should_stop())
                if stopped:
                    break
                row, pictures = evaluate(net, item, datasets[position].opt, current_iter, save_img, index)
                records.append(Record(position, index, row, pictures))
                bar.set_description(f'{row["dataset"]} {row["image"]}')
                bar.update()
    of_ranks = all_gather_object(None if stopped else records)
    if None in of_ranks:  # a rank was asked to stop: all give up
        return None
    everything = [record for records in of_ranks for record in records]
    everything.sort(key=lambda record: (record.dataset, record.place))
    for _, _, row, pictures in everything if tb_logger else []:
        for suffix, picture in pictures.items():
            name = f'{row["dataset"]}_{scale_label(row["scale"])}/{row["image"]}{suffix}'
            tb_logger.add_image(name, picture[..., ::-1].copy(), current_iter, dataformats='HWC')
    of_datasets = [[record.row for record in everything if record.dataset == at] for at in range(len(datasets))]
    return [summarize(rows) for rows in of_datasets if rows]


def report(result: Evaluated, best: dict, current_iter: int | str, tb_logger: Any) -> None:
    """One dataset's results in the log and in TensorBoard; `best` is BasicSR's `best_metric_results`."""
    lines = [f'Validation {result.dataset} {result.scale}, {result.count} images']
    scalars: dict[str, float | None] = {}
    for name, value in result.metrics.items():
        record = best.get(result.dataset, {}).get(name)
        known = '' if record is None else f'\tBest: {record["val"]:.4f} @ {record["iter"]} iter'
        lines.append(f'\t # {name}: {value:.4f}{known}')
        scalars[f'metrics/{result.dataset}/{name}'] = value
    if result.shares:
        shares = ' '.join(f'{share:.1%}' for share in result.shares)
        lines.append(f'\t # experts: {shares}\tmean cost: {result.mean_cost:.4f}')
        scalars[f'val_cost/{result.dataset}'] = result.mean_cost
        scalars |= {f'val_share/{result.dataset}/expert_{j}': share for j, share in enumerate(result.shares, 1)}
    get_root_logger().info('\n'.join(lines))
    for tag, scalar in scalars.items() if tb_logger else ():
        tb_logger.add_scalar(tag, scalar, current_iter)
