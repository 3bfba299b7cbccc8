"""`train(opt)`: the training loop. It finds its place, steps, validates, saves, and ends in order."""

import secrets
import time
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import torch
from basicsr.models import build_model
from basicsr.utils import set_random_seed
from torch.optim import Optimizer

from moeisr_basicsr.atomic_file import SaveError
from moeisr_basicsr.errors import ExitCode, UserError
from moeisr_basicsr.models.non_finite import NonFiniteLossError

from .changed_options import SCHEDULE, changes_of, describe, is_of, options_to_save, refuse_fixed
from .checkpoint_store import Checkpoint, CheckpointStore
from .data_loading import Place, TrainData, evaluation_loaders
from .distributed import Ranks, launched
from .experiment import Start, find_start, root_of, run_folders
from .logs import MetricsFile, TrainLog, start_charts, start_logger
from .resume import (
    model_state,
    model_weights,
    networks,
    plain,
    rng_state,
    set_model_state,
    set_model_weights,
    set_rng_state,
    without_pretrained,
)
from .run_lock import held
from .signals import StopRequest
from .test_loop import evaluate

DEFAULT_KEEP = 5  # checkpoints
FAILED = 1000  # above every signal


def train(opt: dict) -> int:
    """Train as BasicSR's options dict says, safe to kill at any moment; the `ExitCode`.

    Raises:
        UserError: Options, data or the checkpoint to resume from do not fit.
    """
    with launched(opt) as ranks, held(root_of(opt), ranks), StopRequest() as stop:
        opt, path = ranks.options(opt), opt['path']
        keep = opt['logger'].get('keep_checkpoints', DEFAULT_KEEP)
        store = CheckpointStore(path['models'], path['training_states'], keep)
        start = find_start(opt, ranks, store)
        with run_folders(opt, ranks, start.fresh) as notes:
            trainer = Trainer(opt, ranks, stop, store, start._replace(notes=start.notes + notes))
            try:
                return trainer.run()
            except NonFiniteLossError as error:
                # Not saved: the last step may be what has spoilt the weights, and a new state pushes out an older one.
                trainer.logger.error(f'Training stopped. {error}. {trainer.newest_state()}')
                return ExitCode.NON_FINITE
            except SaveError as error:
                trainer.logger.error(f'Training stopped: {error.strerror}. {trainer.newest_state()}')
                return ExitCode.SAVE_FAILED
            except Exception:
                trainer.rescue()
                raise
            finally:
                if trainer.charts:
                    trainer.charts.close()


def rates(optimizer: Optimizer) -> list[dict]:
    """The numbers of each group of parameters."""
    return [{key: value for key, value in group.items() if key != 'params'} for group in optimizer.param_groups]


class Settled(NamedTuple):
    """What a step changes before its optimizer does, as it was after the last whole step."""

    rng: dict
    groups: list[list[dict]]  # of each optimizer, without parameters
    schedules: list[dict]


class Trainer:
    """One run in one process; `opt` as in `train`."""

    def __init__(self, opt: dict, ranks: Ranks, stop: StopRequest, store: CheckpointStore, start: Start):
        self.ranks, self.stop, self.store = ranks, stop, store
        checkpoint, root, path = start.checkpoint, opt['path']['experiments_root'], opt['path']
        self.opt = opt = {**opt, 'manual_seed': self._seed(opt, checkpoint)}
        if checkpoint is not None:
            opt['path'] = without_pretrained(path, checkpoint.weights)
        self.logger = start_logger(opt, ranks, start.notes)
        if ranks.is_main:
            store.clean()
        torch.backends.cudnn.benchmark = bool(opt.get('cudnn_benchmark', True))
        set_random_seed((opt['manual_seed'] + ranks.rank) % 2**32)
        self.model = build_model(opt)
        self.train_data = TrainData(opt, ranks, self.model.device)
        self.val_loaders = evaluation_loaders(opt, ('val',)) if opt.get('val') else []
        self.iteration, self.place, self.validation_due = 0, Place(), False
        self.saved = 0  # iteration of the newest checkpoint
        self.options = options_to_save({**opt, 'path': path}, self.model)
        if checkpoint is not None:
            self._restore(checkpoint)
        self.begun, self.rescued = self.iteration, False
        self._settle()
        for optimizer in self.model.optimizers:
            optimizer.register_step_pre_hook(self._unsettle)
        self.charts = start_charts(opt, ranks, self.iteration)
        self.metrics = MetricsFile(root, ranks.is_main, self.iteration, self.validation_due)
        self.log = TrainLog(opt, ranks, self.iteration, self.charts, self.metrics, self.model.device)

    def _seed(self, opt: dict, checkpoint: Checkpoint | None) -> int:
        """The run's seed: the YAML's, the checkpoint's, or one drawn by rank 0."""
        seed = opt.get('manual_seed')
        if seed is None and checkpoint is not None:
            seed = checkpoint.state.get('manual_seed')
        return self.ranks.from_main(secrets.randbelow(10000) if seed is None else int(seed))

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Everything as it was when the checkpoint was saved; the log hears of what is not."""
        state, notes = checkpoint.state, []
        if 'options' not in state:  # BasicSR's own
            changes = None
            notes.append('the checkpoint does not hold its options; those given now count')
        else:
            changes = changes_of(state['options'], self.options)
            refuse_fixed(changes)
            notes += [f'changed option, {describe(change)}' for change in changes]
        notes += self.ranks.together(lambda: self.store.set_aside(checkpoint.iteration))
        notes += set_model_weights(self.model, checkpoint.weights)
        notes += set_model_state(self.model, state, changes is None or any(is_of(one, SCHEDULE) for one in changes))
        for metric in {keys[2] for keys, *_ in changes or () if keys[:2] == ('val', 'metrics') and len(keys) > 2}:
            for best in getattr(self.model, 'best_metric_results', {}).values():
                best.pop(metric, None)  # of another definition
        self.iteration = checkpoint.iteration
        self.place, place_notes = self.train_data.place_from(state)
        self.validation_due, rngs = bool(state.get('validation_due', False)), state.get('rng')
        if rngs is None:
            notes.append('the checkpoint has no states of the random generators')
        elif len(rngs) == self.ranks.world_size:
            set_rng_state(rngs[self.ranks.rank], self.model.device)
        self.logger.info(
            f'Resuming from iteration {checkpoint.iteration}, epoch {self.place.epoch}, '
            f'{self.place.samples} samples into it.'
        )
        for note in notes + place_notes:
            self.logger.warning(f'Resume: {note}.')
        # not so for a state of another experiment
        if self.ranks.together(lambda: self.store.state_path(checkpoint.iteration).is_file()):
            self.saved = checkpoint.iteration

    def run(self) -> int:
        """Train to the last iteration, or until asked to stop."""
        total = int(self.opt['train']['total_iter'])
        data = self.train_data
        self.logger.info(
            f'{len(data.dataset)} training images, batch {data.batch} x {self.ranks.world_size}, '
            f'{data.batches_per_epoch} iterations per epoch, {total} in all.'
        )
        if self.validation_due:
            self.validate()
        batches = data.batches(self.place)
        while self.iteration < total:
            waited = time.perf_counter()
            found, failure = self._next(batches)
            stopped = self._asked_to_stop(failure)
            if stopped == FAILED:
                self._end_together(failure)
            if stopped or found is None:
                break
            self._step(*found, time.perf_counter() - waited)
            self._after_step(total)
        stopped = self._asked_to_stop()
        if self.saved != self.iteration:
            self.save()
        if stopped:
            self.logger.warning(
                f'Stopped by signal {stopped} after iteration {self.iteration}; continue with --auto_resume.'
            )
            return 128 + stopped
        self._name_weights(['latest'])
        latest = self.store.weights_path('net_g', 'latest')
        self.logger.info(f'Training ended at iteration {self.iteration}; weights: {latest}')
        return ExitCode.OK

    def _next(self, batches: Iterator[tuple[Place, dict]]) -> tuple[tuple[Place, dict] | None, Exception | None]:
        """The next batch and the place after it, or why it cannot be read."""
        try:
            return next(batches), None
        except Exception as error:
            return None, error

    def _end_together(self, failure: Exception | None) -> NoReturn:
        """Save, and end the run on every rank, because of this rank's `failure` or that of another one."""
        told = None
        if failure is not None:
            told = str(failure) if isinstance(failure, UserError) else f'{type(failure).__name__}: {failure}'
        words = [f'rank {rank}: {text}' for rank, text in enumerate(self.ranks.gather(told)) if text]
        rngs = self._rngs()
        self.ranks.together(lambda: self.rescue(rngs))
        raise failure or UserError('; '.join(words))

    def _step(self, place: Place, data: dict, data_time: float) -> None:
        iteration, model = self.iteration + 1, self.model
        model.update_learning_rate(iteration, warmup_iter=self.opt['train'].get('warmup_iter', -1))
        model.feed_data(data)
        model.optimize_parameters(iteration)
        self.iteration, self.place = iteration, place
        self._settle()
        queries = model.batch.queries if hasattr(model, 'batch') else model.gt.numel() // model.gt.shape[1]
        self.log.step(iteration, place.epoch, model, queries, data_time)

    def _settle(self) -> None:
        """Note what a step changes before its optimizer does, so that `rescue` can take it back."""
        groups = [rates(optimizer) for optimizer in self.model.optimizers]
        schedules = [scheduler.state_dict() for scheduler in self.model.schedulers]
        self.settled, self.updating = Settled(rng_state(self.model.device), groups, schedules), False

    def _unsettle(self, *_: object) -> None:
        self.updating = True

    def _after_step(self, total: int) -> None:
        """Save, then validate: what a signal cuts off is due when the run continues."""
        last = self.iteration == total
        if self.val_loaders and (last or self.iteration % self.opt['val'].get('val_freq', total) == 0):
            self.validation_due = True
        if last or self.iteration % self.opt['logger'].get('save_checkpoint_freq', total) == 0:
            self.save()
        if self.validation_due:
            self.validate()

    def _asked_to_stop(self, failure: Exception | None = None) -> int:
        """The signal that any rank has received, or FAILED; 0 for neither. All ranks stop together."""
        return self.ranks.largest(self.stop.signal if failure is None else FAILED)

    def save(self) -> None:
        """Write a checkpoint of this iteration.

        Raises:
            SaveError: On every rank, if rank 0 could not write.
        """
        rngs = self._rngs()
        self.ranks.together(lambda: self._write(rngs))
        self.saved = self.iteration
        self.log.restart()
        self.logger.info(f'Saved models and training state of iteration {self.iteration}.')

    def _rngs(self) -> list:
        """The generators of every rank after the last whole step."""
        return self.ranks.gather(plain(self.settled.rng))

    def _write(self, rngs: list | None) -> None:
        state = {
            'epoch': self.place.epoch,
            'place': {**self.place._asdict(), 'world_size': self.ranks.world_size},
            'manual_seed': self.opt['manual_seed'],
            'validation_due': self.validation_due,
            'rng': rngs,
            'options': self.options,
        }
        self.store.save(self.iteration, model_weights(self.model), {**state, **model_state(self.model)})

    def rescue(self, rngs: list | None = None) -> None:
        """Save the state after the last whole step, where it is not on disk, because an error ends the run.

        Called on rank 0 alone, for the others may be anywhere: without their generators, but for `rngs`. A failure in
        here is logged: the error that ends the run is the one to see.
        """
        if not self.ranks.is_main or self.rescued:
            return
        self.rescued = True
        try:
            if self.updating:
                self.logger.error(f'The step of iteration {self.iteration + 1} was cut off halfway: it is not saved.')
            elif self.iteration not in (self.saved, self.begun):
                self._take_back()
                self._write(self._rngs() if self.ranks.world_size == 1 else rngs)
                self.saved = self.iteration
        except Exception as error:
            self.logger.error(f'The state could not be saved: {error}')
        self.logger.error(f'An error ends the run. {self.newest_state()}')

    def _take_back(self) -> None:
        """Rates and schedules as they were after the last whole step.

        Raises:
            ValueError: The weights are not finite.
        """
        for optimizer, groups in zip(self.model.optimizers, self.settled.groups):
            for group, before in zip(optimizer.param_groups, groups):
                group.update(before)
        for scheduler, before in zip(self.model.schedulers, self.settled.schedules):
            scheduler.load_state_dict(before)
        for net in networks(self.model).values():
            if not all(bool(torch.isfinite(parameter).all()) for parameter in net.parameters()):
                raise ValueError('the weights are not finite')

    def newest_state(self) -> str:
        """Where to go on from, for the log."""
        if not self.saved:
            return 'No state has been saved.'
        path = self.store.state_path(self.saved)
        return f'The newest state is of iteration {self.saved}, {path}; --auto_resume goes on from it.'

    def validate(self) -> None:
        """Evaluate on every validation set; keep the weights that are the best of a metric."""
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # sizes come once each
        results = evaluate(self.model, self.val_loaders, self.iteration, self.charts, self.opt, self.stop)
        torch.backends.cudnn.benchmark = benchmark
        self.log.restart()
        if results is None:
            return  # asked to stop; still due when the run continues
        self.validation_due = False
        self._settle()
        best = getattr(self.model, 'best_metric_results', {})
        for result in results:
            values = {key: value for key, value in vars(result).items() if key != 'rows'}
            self.metrics.write('validation', self.iteration, {**values, 'best': best.get(result.dataset, {})})
        records = [(f'best_{data}_{metric}', one) for data, of in best.items() for metric, one in of.items()]
        self._name_weights([name for name, record in records if record['iter'] == self.iteration])
        if self.saved == self.iteration:  # otherwise a resumed run would do it all again
            changes = plain({'validation_due': False, 'best_metric_results': best, 'rng': self._rngs()})
            self.ranks.together(lambda: self.store.amend(self.iteration, changes))

    def _name_weights(self, names: list[str]) -> None:
        if names:
            self.ranks.together(lambda: self.store.name_weights(model_weights(self.model), names))
