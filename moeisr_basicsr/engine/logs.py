"""What a run tells: console and log file, TensorBoard, and one JSON-lines file of every metric."""

import datetime
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from basicsr.utils import get_env_info, get_root_logger, get_time_str, init_tb_logger, init_wandb_logger
from basicsr.utils.logger import initialized_logger
from basicsr.utils.options import dict2str

from moeisr_basicsr.atomic_file import write_atomic
from moeisr_basicsr.models.evaluation import Evaluated

from .distributed import Ranks
from .experiment import tensorboard_folder

METRICS_FILE = 'metrics.jsonl'


def start_logger(opt: dict, ranks: Ranks, kind: str) -> logging.Logger:
    """BasicSR's root logger with a log file of this run; other ranks say errors only.

    Args:
        opt: Reads `path: log` and `name`.
        ranks: This process among all.
        kind: 'train' or 'test', the beginning of the file's name.
    """
    logger = logging.getLogger('basicsr')
    for handler in list(logger.handlers):  # of an earlier run in this process, or of an import that logged
        logger.removeHandler(handler)
        handler.close()
    initialized_logger.pop('basicsr', None)
    logger.setLevel(logging.INFO)
    file = Path(opt['path']['log']) / f'{kind}_{opt["name"]}_{get_time_str()}.log'
    while file.exists():
        file = file.with_stem(file.stem + '_')
    logger = get_root_logger(log_level=logging.INFO, log_file=str(file) if ranks.is_main else None)
    for handler in logger.handlers:
        handler.handleError = report_log_error
    if ranks.is_main:
        logger.info(get_env_info())
        logger.info(dict2str(opt))
    return logger


def report_log_error(record: logging.LogRecord) -> None:
    """One line where the log cannot be written; logging's own way is a traceback for every line of a full disk."""
    print(f'The log cannot be written: {sys.exc_info()[1]}', file=sys.stderr)


def start_tensorboard(opt: dict, ranks: Ranks, after: int = 0) -> object | None:
    """TensorBoard's writer on rank 0, None elsewhere, with --debug, and without `logger: use_tb_logger`.

    Args:
        after: Iteration that the run continues from; what an interrupted run wrote beyond it is hidden.
    """
    logger_opt = opt['logger']
    if not ranks.is_main or opt.get('debug') or not logger_opt.get('use_tb_logger'):
        return None
    if (logger_opt.get('wandb') or {}).get('project'):
        init_wandb_logger(opt)  # before TensorBoard's, which it follows
    folder = str(tensorboard_folder(opt))
    if after == 0:
        return init_tb_logger(folder)
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=after + 1)


class MetricsFile:
    """`metrics.jsonl`: one JSON object per line, with `kind` 'train' or 'validation' and `iter`.

    Args:
        folder: Of the experiment.
        is_main: Other ranks write nothing.
        after: Iteration that the run continues from: lines of an interrupted run beyond it are dropped, for they
            come again. `validate_again` drops the validation of that iteration too.
    """

    def __init__(self, folder: str | Path, is_main: bool, after: int = 0, validate_again: bool = False):
        self.path = Path(folder) / METRICS_FILE
        self.is_main = is_main
        if is_main and self.path.is_file():
            limits = {'train': after, 'validation': after - 1 if validate_again else after}
            kept = [
                line
                for line in self.path.read_text(encoding='utf-8').splitlines(keepends=True)
                if _is_kept(line, limits)
            ]
            write_atomic(self.path, lambda file: file.write(''.join(kept).encode()))

    def write(self, kind: str, iteration: int | str, values: Mapping) -> None:
        """Append one line. Where the disk is full or failing the run goes on without: its checkpoints matter more."""
        if self.is_main:
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

    def write_results(self, iteration: int | str, results: list[Evaluated], best: Mapping) -> None:
        """One line per dataset."""
        for result in results:
            values = {key: value for key, value in result._asdict().items() if key != 'rows'}
            self.write('validation', iteration, {**values, 'best': best.get(result.dataset, {})})


def _is_kept(line: str, limits: dict[str, int]) -> bool:
    try:
        entry = json.loads(line)
        return entry['iter'] <= limits.get(entry['kind'], -1)
    except (ValueError, KeyError, TypeError):
        return False  # the half-written last line of a killed run


def finite(value: object) -> object:
    """`value` with what JSON cannot say (infinity, not a number) as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value


class TrainLog:
    """Console, TensorBoard and JSON lines of the training steps.

    Args:
        opt: Reads `logger: print_freq`, `train: total_iter`, `name`.
        ranks: This process among all.
        logger: The console and the log file.
        tensorboard: Writer or None.
        metrics: The JSON-lines file.
        device: Its memory is reported where it is a GPU.
    """

    def __init__(
        self,
        opt: dict,
        ranks: Ranks,
        logger: logging.Logger,
        tensorboard: object | None,
        metrics: MetricsFile,
        device: torch.device,
    ):
        self.name = opt['name']
        self.interval = opt['logger'].get('print_freq', 100)
        self.total = int(opt['train']['total_iter'])
        self.ranks = ranks
        self.logger = logger
        self.tensorboard = tensorboard
        self.metrics = metrics
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Start the clock of the next interval; time since then that is not training does not count."""
        self.steps, self.queries = 0, 0
        self.data_time, self.began = 0.0, time.perf_counter()

    def pause(self) -> float:
        """Now, for `resume_after`."""
        return time.perf_counter()

    def resume_after(self, paused: float) -> None:
        """Take the time since `paused` (validation, saving) out of the interval."""
        self.began += time.perf_counter() - paused

    def step(
        self,
        iteration: int,
        epoch: int,
        rates: list[float],
        values: Mapping[str, float],
        queries: int,
        data_time: float,
    ) -> None:
        """Count one step; at the end of an interval and of the run, tell.

        Args:
            iteration: Of the run.
            epoch: Of the data.
            rates: Learning rates.
            values: Losses and statistics, means over all ranks.
            queries: Output positions of the step on this rank.
            data_time: Seconds that the step waited for its batch.
        """
        self.steps += 1
        self.queries += queries * self.ranks.world_size
        self.data_time += data_time
        if iteration % self.interval == 0 or iteration == self.total:
            self._tell(iteration, epoch, rates, values)
            self.restart()

    def _tell(self, iteration: int, epoch: int, rates: list[float], values: Mapping[str, float]) -> None:
        elapsed = time.perf_counter() - self.began
        step_time = elapsed / self.steps
        extra = {
            'lr': rates[0],
            'time_s': step_time,
            'data_time_s': self.data_time / self.steps,
            'queries_per_s': self.queries / elapsed,
        }
        if self.device.type == 'cuda':
            extra['gpu_peak_mib'] = torch.cuda.max_memory_allocated(self.device) / 2**20
        if not self.ranks.is_main:
            return
        eta = datetime.timedelta(seconds=int(step_time * (self.total - iteration)))
        shown = ' '.join(f'{name}: {value:.4e}' for name, value in values.items())
        self.logger.info(
            f'[{self.name[:5]}..][epoch:{epoch:3d}, iter:{iteration:8,d}, lr:({rates[0]:.3e},)] '
            f'[eta: {eta}, time (data): {step_time:.3f} ({extra["data_time_s"]:.3f}), '
            f'{extra["queries_per_s"]:,.0f} queries/s] {shown}'
        )
        self.metrics.write('train', iteration, {'epoch': epoch, **values, **extra})
        if self.tensorboard:
            for name, value in {**values, **extra}.items():
                name = f'losses/{name}' if name.startswith('l_') else name
                self.tensorboard.add_scalar(name, value, iteration)
