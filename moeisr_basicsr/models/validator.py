"""From validation datasets to results: the work of all ranks, collected and reported."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import get_dist_info
from mmengine.dist import all_gather_object
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from moeisr_basicsr.analysis.schema import scale_label
from moeisr_basicsr.errors import ImageError

from .evaluation import Evaluated, Journal, Record, files_of, image_names, iterate_jobs, my_jobs, summarize
from .image_evaluation import ImageEvaluator


def run_validation(
    opt: dict,
    net: nn.Module,
    dataloaders: list[DataLoader],
    current_iter: int | str,
    tb_logger: Any,
    save_img: bool,
    should_stop: Callable[[], bool] | None = None,
    journal: Journal | None = None,
) -> Iterator[Evaluated | None]:
    """Evaluate dataset by dataset, images x scales shared among the ranks. An image that cannot be used costs its own
    row.

    Args:
        opt: The whole options; see `ImageEvaluator`; also reads `val: pbar` (shown on a terminal by default).
        net: The bare network.
        dataloaders: One per dataset; each dataset has one scale.
        current_iter: Iteration, or the run's name in testing.
        tb_logger: TensorBoard writer of rank 0, or None.
        save_img: Whether to write result images.
        should_stop: Asked before every image.
        journal: Knows and gets rows.

    Yields:
        The results of a dataset, on every rank; None, at last, where validation was given up.
    """
    evaluate = ImageEvaluator(opt)
    rank, world_size = get_dist_info()
    datasets: list[Any] = [loader.dataset for loader in dataloaders]
    jobs = my_jobs([len(dataset) for dataset in datasets], rank, world_size)
    shown = (opt.get('val') or {}).get('pbar', sys.stderr.isatty())
    with tqdm(total=sum(map(len, jobs)), unit='image', disable=not shown or rank != 0) as bar:
        for dataset, loader, indices in zip(datasets, dataloaders, jobs):
            name, names, stopped = dataset.opt['name'], image_names(dataset), False
            records = known_records(dataset, names, indices, journal)  # of this rank
            known = {record.place for record in records}
            bar.update(len(known))
            for index, item in iterate_jobs(loader, [index for index in indices if index not in known]):
                stopped = should_stop is not None and should_stop()
                if stopped:
                    break
                bar.set_description(f'{name} {names[index]}')
                row, pictures = measured(evaluate, net, item, dataset.opt, current_iter, save_img, index, names[index])
                if journal and row['case'] != 'failed':
                    journal.add(row, files_of(dataset, index))
                records.append(Record(index, row, pictures))
                bar.update()
            of_ranks = all_gather_object(None if stopped else records)
            if None in of_ranks:  # a rank was asked to stop: all give up
                yield None
                return
            everything = sorted((record for of_rank in of_ranks for record in of_rank), key=lambda record: record.place)
            for _, row, pictures in everything if tb_logger else []:
                for suffix, picture in pictures.items():
                    tag = f'{name}_{scale_label(row["scale"])}/{row["image"]}{suffix}'
                    tb_logger.add_image(tag, np.atleast_3d(picture)[..., ::-1].copy(), current_iter, dataformats='HWC')
            if everything:
                yield summarize([record.row for record in everything])


def known_records(dataset: Any, names: list[str], indices: list[int], journal: Journal | None) -> list[Record]:
    """What the journal knows of the images `indices`."""
    if journal is None:
        return []
    rows = ((index, journal.known(dataset.opt['name'], names[index], files_of(dataset, index))) for index in indices)
    return [Record(index, row, {}) for index, row in rows if row is not None]


def measured(
    evaluate: ImageEvaluator,
    net: nn.Module,
    item: dict,
    dataset_opt: dict,
    current_iter: int | str,
    save_img: bool,
    index: int,
    name: str,
) -> tuple[dict, dict]:
    """Row and pictures of one image, see `ImageEvaluator`; a row of the case 'failed' where it cannot be used."""
    try:
        if 'error' in item:
            raise ImageError(item['error'][0])
        return evaluate(net, item, dataset_opt, current_iter, save_img, index, name)
    except (ImageError, MemoryError, torch.OutOfMemoryError) as error:
        reason = str(error) if isinstance(error, ImageError) else f'{name}: not enough memory.'
    scale = np.broadcast_to(dataset_opt.get('scale') or 1, 2).astype(float).tolist()
    return {'case': 'failed', 'dataset': dataset_opt['name'], 'image': name, 'scale': scale, 'notes': reason}, {}


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
    if result.failed:
        every = result.count + len(result.failed)
        reasons = ''.join(f'\n\t # {image}: {reason}' for image, reason in result.failed.items())
        get_root_logger().error(
            f'{result.dataset}: {len(result.failed)} of {every} images could not be used. The means are over the '
            f'others; in training they do not count as the best.{reasons}'
        )
    for tag, scalar in scalars.items() if tb_logger else ():
        tb_logger.add_scalar(tag, scalar, current_iter)
