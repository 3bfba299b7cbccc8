"""What a run tells: console and log file, TensorBoard, Weights & Biases, and one JSON-lines file of every metric."""

import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from basicsr.models.base_model import BaseModel
from basicsr.utils import MessageLogger, get_env_info, get_root_logger, get_time_str
from basicsr.utils.logger import initialized_logger
from basicsr.utils.options import dict2str

from moeisr_basicsr import __version__
from moeisr_basicsr.analysis.schema import finite
from moeisr_basicsr.atomic_file import write_atomic
from moeisr_basicsr.errors import UserError

from .distributed import Ranks
from .experiment import root_of, tensorboard_folder

METRICS_FILE = 'metrics.jsonl'
WANDB_FILE = '.wandb_run'  # its identity there; wandb itself would take a folder called .wandb


def start_logger(opt: dict, ranks: Ranks, notes: list[str]) -> logging.Logger:
    """BasicSR's root logger with a log file of this run; other ranks say errors only. It begins with `notes`."""
    logger = logging.getLogger('basicsr')
    for handler in list(logger.handlers):  # of an earlier run in this process, or of an import that logged
        logger.removeHandler(handler)
        handler.close()
    initialized_logger.pop('basicsr', None)
    logger.setLevel(logging.INFO)
    kind = 'train' if opt['is_train'] else 'test'
    file = Path(opt['path']['log']) / f'{kind}_{opt["name"]}_{get_time_str()}.log'
    while file.exists():
        file = file.with_stem(file.stem + '_')
    get_root_logger(log_level=logging.INFO, log_file=str(file) if ranks.is_main else None)
    for handler in logger.handlers:
        handler.handleError = report_log_error  # type: ignore[method-assign]
        stream: Any = getattr(handler, 'stream', None)
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')  # of file names that are no UTF-8
    if ranks.is_main:
        logger.info(f'{get_env_info()}\n\tmoeisr_basicsr: {__version__}')
        logger.info(dict2str(opt))
    for note in notes:
        logger.warning(note)
    return logger


def report_log_error(record: logging.LogRecord) -> None:
    """One line where the log cannot be written; logging's own way is a traceback for every line of a full disk."""
    print(f'The log cannot be written: {sys.exc_info()[1]}', file=sys.stderr)


class Charts:
    """TensorBoard and Weights & Biases, by the calls that BasicSR makes of the former.

    Args:
        opt: Reads `logger: use_tb_logger` and `logger: wandb`.
        after: Iteration that the run continues from. TensorBoard hides what an interrupted run wrote beyond it; Weights
            & Biases goes on with the same run, and drops what it already has.

    Raises:
        UserError: Weights & Biases is not installed, or does not start.
    """

    def __init__(self, opt: dict, after: int = 0):
        self.tensorboard, self.wandb = None, None
        if opt['logger'].get('use_tb_logger'):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(tensorboard_folder(opt)), purge_step=after + 1 if after else None)
        if (opt['logger'].get('wandb') or {}).get('project'):
            self.wandb = start_wandb(opt)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if self.tensorboard:
            self.tensorboard.add_scalar(tag, value, step)
        if self.wandb:
            self.wandb.log({tag: value}, step=step)

    def add_image(self, tag: str, image: np.ndarray, step: int, dataformats: str = 'HWC') -> None:
        if self.tensorboard:
            self.tensorboard.add_image(tag, image, step, dataformats=dataformats)
        if self.wandb:
            import wandb

            self.wandb.log({tag: wandb.Image(image)}, step=step)

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def start_charts(opt: dict, ranks: Ranks, after: int = 0) -> Charts | None:
    """The charts of rank 0; None elsewhere, with --debug, and where the options ask for none."""
    chosen = opt['logger'].get('use_tb_logger') or (opt['logger'].get('wandb') or {}).get('project')
    return Charts(opt, after) if chosen and ranks.is_main and not opt.get('debug') else None


def start_wandb(opt: dict) -> Any:
    """The Weights & Biases run that `logger: wandb` names, or that this folder's run had before, or a new one.

    Raises:
        UserError: See `Charts`.
    """
    chosen, root = opt['logger']['wandb'], root_of(opt)
    file = root / WANDB_FILE
    known = file.read_text() if file.is_file() else secrets.token_hex(8)
    try:
        import wandb

        run = wandb.init(
            project=chosen['project'],
            id=chosen.get('resume_id') or known,
            resume='allow',
            name=opt['name'],
            config=opt,
            dir=str(root),
        )
    except ImportError:
        raise UserError('logger: wandb: the package is not installed: pip install wandb.') from None
    except wandb.Error as error:
        raise UserError(f'logger: wandb: {error}') from error
    write_atomic(file, lambda target: target.write(run.id.encode()))
    return run


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, with `kind` 'train' or 'validation' and `iter`.

    Args:
        folder: Of the experiment.
        is_main: Whether this is rank 0; the others write nothing.
        after: Iteration that the run continues from: lines of an interrupted run beyond it come again and are dropped.
        validate_again: Whether the validation of that iteration comes again too.
    """

    def __init__(self, folder: str | Path, is_main: bool, after: int = 0, validate_again: bool = False):
        self.path = Path(folder) / METRICS_FILE
        self.is_main = is_main
        if is_main and self.path.is_file():
            limits = {'train': after, 'validation': after - validate_again}
            lines = self.path.read_text(encoding='utf-8').splitlines(keepends=True)
            kept = ''.join(line for line in lines if _is_kept(line, limits))
            write_atomic(self.path, lambda file: file.write(kept.encode()))

    def write(self, kind: str, iteration: int, values: Mapping) -> None:
        """Append one line. Where the disk is full or failing the run goes on without: its checkpoints matter more."""
        if not self.is_main:
            return
        line = json.dumps(finite({'kind': kind, 'iter': iteration, 'time': round(time.time(), 3), **values}))
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, 'a', encoding='utf-8') as file:
                file.write(line + '\n')
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, size)  # no half line before the next one
            get_root_logger().warning(
                f'{error.strerror}: cannot write {self.path}; iteration {iteration} is missing in it.'
            )


def _is_kept(line: str, limits: dict[str, int]) -> bool:
    try:
        entry = json.loads(line)
        return entry['iter'] <= limits.get(entry['kind'], -1)
    except (ValueError, KeyError, TypeError):
        return False  # the half-written last line of a killed run


class TrainLog:
    """Console, TensorBoard and JSON lines of the training steps of a run that starts from iteration `start`."""

    def __init__(
        self, opt: dict, ranks: Ranks, start: int, charts: Charts | None, metrics: MetricsFile, device: torch.device
    ):
        self.interval = opt['logger'].get('print_freq', 100)
        self.total = int(opt['train']['total_iter'])
        logger_opt = {'print_freq': self.interval, 'use_tb_logger': charts is not None}
        # It counts one iteration less to go than there are.
        train_opt = {'total_iter': self.total + 1}
        self.console = MessageLogger({**opt, 'logger': logger_opt, 'train': train_opt}, start + 1, charts)
        self.world_size, self.metrics, self.device = ranks.world_size, metrics, device
        self.restart()

    def restart(self) -> None:
        """Start the clock of an interval, also after what is no training: validation, saving."""
        self.steps, self.queries, self.data_time, self.began = 0, 0, 0.0, time.perf_counter()

    def step(self, iteration: int, epoch: int, model: BaseModel, queries: int, data_time: float) -> None:
        """Count one step; at the end of an interval and of the run, tell.

        Args:
            iteration: Of the run.
            epoch: Of the data.
            model: BasicSR's; gives learning rates, losses and statistics, which are means over all ranks.
            queries: Output positions of the step on this rank.
            data_time: Seconds that the step waited for its batch.
        """
        self.steps += 1
        self.queries += queries * self.world_size
        self.data_time += data_time
        if iteration % self.interval != 0 and iteration != self.total:
            return
        elapsed = time.perf_counter() - self.began
        rates, values = model.get_current_learning_rate(), dict(model.get_current_log())
        values |= {'lr': rates[0], 'queries_per_s': self.queries / elapsed}
        if self.device.type == 'cuda':
            values['gpu_peak_mib'] = torch.cuda.max_memory_allocated(self.device) / 2**20
        times = {'time': elapsed / self.steps, 'data_time': self.data_time / self.steps}
        self.console({'epoch': epoch, 'iter': iteration, 'lrs': rates, **times, **values})
        self.metrics.write('train', iteration, {'epoch': epoch, **values, **{f'{k}_s': v for k, v in times.items()}})
        self.restart()
