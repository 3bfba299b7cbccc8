"""`train(opt)`: the training loop. It finds its place, steps, validates, saves, and ends in order."""

import secrets
import time

import torch
from basicsr.models import build_model
from basicsr.utils import set_random_seed

from moeisr_basicsr.atomic_file import SaveError
from moeisr_basicsr.errors import ExitCode
from moeisr_basicsr.models.non_finite import NonFiniteLossError

from .checkpoint_store import Checkpoint, CheckpointStore
from .data_loading import Place, TrainData, evaluation_loaders
from .distributed import Ranks, launched
from .experiment import Start, find_start, root_of, run_folders
from .logs import MetricsFile, TrainLog, start_logger, start_tensorboard
from .resume import (
    model_state,
    model_weights,
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
                trainer.logger.error(f'Training stopped. {error}')
                return ExitCode.NON_FINITE
            except SaveError as error:
                trainer.logger.error(f'Training stopped: {error.strerror}.')
                return ExitCode.SAVE_FAILED
            finally:
                if trainer.tensorboard:
                    trainer.tensorboard.close()


class Trainer:
    """One run in one process; `opt` as in `train`."""

    def __init__(self, opt: dict, ranks: Ranks, stop: StopRequest, store: CheckpointStore, start: Start):
        self.ranks, self.stop, self.store = ranks, stop, store
        checkpoint, root = start.checkpoint, opt['path']['experiments_root']
        self.opt = opt = {**opt, 'manual_seed': self._seed(opt, checkpoint)}
        if checkpoint is not None:
            opt['path'] = without_pretrained(opt['path'], checkpoint.weights)
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
        if checkpoint is not None:
            self._restore(checkpoint)
        self.tensorboard = start_tensorboard(opt, ranks, self.iteration)
        self.metrics = MetricsFile(root, ranks.is_main, self.iteration, self.validation_due)
        self.log = TrainLog(opt, ranks, self.iteration, self.tensorboard, self.metrics, self.model.device)

    def _seed(self, opt: dict, checkpoint: Checkpoint | None) -> int:
        """The run's seed: the YAML's, the checkpoint's, or one drawn by rank 0."""
        seed = opt.get('manual_seed')
        if seed is None and checkpoint is not None:
            seed = checkpoint.state.get('manual_seed')
        return self.ranks.from_main(secrets.randbelow(10000) if seed is None else int(seed))

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Everything as it was when the checkpoint was saved; the log hears of what is not."""
        state = checkpoint.state
        notes = self.ranks.together(lambda: self.store.set_aside(checkpoint.iteration))
        notes += set_model_weights(self.model, checkpoint.weights) + set_model_state(self.model, state)
        self.iteration = checkpoint.iteration
        self.place, place_notes = self.train_data.place_from(state)
        self.validation_due, rngs = bool(state.get('validation_due', False)), state.get('rng')
        if rngs is None:
            notes.append('the checkpoint has no states of the random generators')
        elif len(rngs) == self.ranks.world_size:
            set_rng_state(rngs[self.ranks.rank], self.model.device)
        if state.get('manual_seed', self.opt['manual_seed']) != self.opt['manual_seed']:
            notes.append(f'manual_seed was {state["manual_seed"]}, is now {self.opt["manual_seed"]}: draws differ')
        self.logger.info(
            f'Resuming from iteration {checkpoint.iteration}, epoch {self.place.epoch}, '
            f'{self.place.samples} samples into it.'
        )
        for note in notes + place_notes:
            self.logger.warning(f'Resume: {note}.')
        if self.store.state_path(checkpoint.iteration).is_file():  # not so for a state of another experiment
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
        while self.iteration < total and not self._asked_to_stop():
            waited = time.perf_counter()
            self.place, batch = next(batches)
            self._step(batch, time.perf_counter() - waited)
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

    def _step(self, data: dict, data_time: float) -> None:
        self.iteration += 1
        model = self.model
        model.update_learning_rate(self.iteration, warmup_iter=self.opt['train'].get('warmup_iter', -1))
        model.feed_data(data)
        model.optimize_parameters(self.iteration)
        queries = model.batch.queries if hasattr(model, 'batch') else model.gt.numel() // model.gt.shape[1]
        self.log.step(self.iteration, self.place.epoch, model, queries, data_time)

    def _after_step(self, total: int) -> None:
        """Save, then validate: what a signal cuts off is due when the run continues."""
        last = self.iteration == total
        if self.val_loaders and (last or self.iteration % self.opt['val'].get('val_freq', total) == 0):
            self.validation_due = True
        if last or self.iteration % self.opt['logger'].get('save_checkpoint_freq', total) == 0:
            self.save()
        if self.validation_due:
            self.validate()

    def _asked_to_stop(self) -> int:
        """The signal that any rank has received; 0 for none. All ranks stop after the same step."""
        return self.ranks.largest(self.stop.signal)

    def save(self) -> None:
        """Write a checkpoint of this iteration.

        Raises:
            SaveError: On every rank, if rank 0 could not write.
        """
        state = {
            'epoch': self.place.epoch,
            'place': {**self.place._asdict(), 'world_size': self.ranks.world_size},
            'manual_seed': self.opt['manual_seed'],
            'validation_due': self.validation_due,
            'rng': self.ranks.gather(rng_state(self.model.device)),
        }
        self.ranks.together(
            lambda: self.store.save(self.iteration, model_weights(self.model), {**state, **model_state(self.model)})
        )
        self.saved = self.iteration
        self.log.restart()
        self.logger.info(f'Saved models and training state of iteration {self.iteration}.')

    def validate(self) -> None:
        """Evaluate on every validation set; keep the weights that are the best of a metric."""
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # sizes come once each
        results = evaluate(self.model, self.val_loaders, self.iteration, self.tensorboard, self.opt, self.stop)
        torch.backends.cudnn.benchmark = benchmark
        self.log.restart()
        if results is None:
            return  # asked to stop; still due when the run continues
        self.validation_due = False
        best = getattr(self.model, 'best_metric_results', {})
        for result in results:
            values = {key: value for key, value in vars(result).items() if key != 'rows'}
            self.metrics.write('validation', self.iteration, {**values, 'best': best.get(result.dataset, {})})
        if self.opt['logger'].get('save_best', True):
            records = [(f'best_{data}_{metric}', one) for data, of in best.items() for metric, one in of.items()]
            self._name_weights([name for name, record in records if record['iter'] == self.iteration])

    def _name_weights(self, names: list[str]) -> None:
        if names:
            self.ranks.together(lambda: self.store.name_weights(model_weights(self.model), names))
