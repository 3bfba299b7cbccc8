"""`train(opt)`: the training loop. It finds its place, steps, validates, saves, and ends in order."""

import os
import time

import torch
from basicsr.models import build_model

from moeisr_basicsr.atomic_file import SaveError
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.models.non_finite import NonFiniteLossError

from . import exit_codes
from .checkpoint_store import Checkpoint, CheckpointStore, DamagedCheckpoint, Weights
from .data_loading import Place, TrainData, evaluation_loaders
from .distributed import Ranks, launched, seed_everything
from .experiment import belongs_to, copy_options, earlier_runs, make_folders, undo
from .logs import MetricsFile, TrainLog, start_logger, start_tensorboard
from .resume import model_state, model_weights, plain, rng_state, set_model_state, set_model_weights, set_rng_state
from .signals import StopRequest

DEFAULT_KEEP = 5


def train(opt: dict) -> int:
    """Train as the options say; safe to kill at any moment.

    Args:
        opt: BasicSR's options dict; it is not changed. Beside BasicSR's keys it reads `launcher`, `dist_params`,
            `opt_file`, `logger: keep_checkpoints` and `logger: save_best`.

    Returns:
        One of `exit_codes`.

    Raises:
        UserError: Options, data or the checkpoint to resume from do not fit.
    """
    with launched(opt.get('launcher', 'none'), opt.get('dist_params')) as ranks, StopRequest() as stop:
        trainer = Trainer(opt, ranks, stop)
        try:
            return trainer.run()
        except UserError:
            trainer.undo_folders()  # of data, noticed by the first batch
            raise
        except NonFiniteLossError as error:
            trainer.logger.error(f'Training stopped. {error}')
            return exit_codes.NON_FINITE
        except SaveError as error:
            trainer.logger.error(f'Training stopped: {error.strerror}.')
            return exit_codes.SAVE_FAILED
        finally:
            trainer.close()


class Trainer:
    """One run in one process.

    Args:
        opt: See `train`.
        ranks: This process among all.
        stop: Whether a signal asks for the end.
    """

    def __init__(self, opt: dict, ranks: Ranks, stop: StopRequest):
        self.ranks, self.stop = ranks, stop
        opt = {**opt, 'rank': ranks.rank, 'world_size': ranks.world_size, 'dist': ranks.world_size > 1}
        path = opt['path']
        self.store = CheckpointStore(
            path['models'], path['training_states'], opt['logger'].get('keep_checkpoints', DEFAULT_KEEP)
        )
        reports = []
        restarted = is_restart(opt, ranks)
        checkpoint = ranks.together(lambda: find_checkpoint(opt, self.store, reports.append, restarted))
        fresh = checkpoint is None and not restarted and not path.get('resume_state')
        self.fresh = ranks.together(lambda: make_folders(opt, fresh, ranks.launch))
        try:
            self._set_up(opt, checkpoint, reports + [report for folder in self.fresh for report in folder.reports()])
        except Exception:
            self.undo_folders()
            raise

    def undo_folders(self) -> None:
        """A start that fails leaves the earlier run of the same name where it was."""
        if self.ranks.is_main:
            undo(self.fresh)

    def _set_up(self, opt: dict, checkpoint: Checkpoint | None, reports: list[str]) -> None:
        """Logs, model, data and the place in them. `reports` go to the log."""
        ranks, path = self.ranks, opt['path']
        opt['manual_seed'] = self._seed(opt, checkpoint)
        opt['path'] = {**path, **({} if checkpoint is None else without_pretrained(checkpoint.weights))}
        self.opt = opt
        self.iteration = 0 if checkpoint is None else checkpoint.iteration
        self.logger = start_logger(opt, ranks, 'train')
        for report in reports:
            self.logger.warning(report)
        if opt.get('auto_resume') and checkpoint is None:
            root = path['experiments_root']
            self.logger.warning(
                f'--auto_resume: {root} has no checkpoint; starting from iteration 0.{earlier_runs(root)}'
            )
        if ranks.is_main:
            self.store.clean()
            copy_options(opt, path['experiments_root'])
        torch.backends.cudnn.benchmark = bool(opt.get('cudnn_benchmark', True))
        seed_everything(opt['manual_seed'] + ranks.rank)
        self.model = build_model(opt)
        self.train_data = TrainData(opt, ranks, self.model.device)
        self.val_loaders = evaluation_loaders(opt, ('val',)) if opt.get('val') else []
        self.place, self.validation_due, self.saved = Place(), False, None
        if checkpoint is not None:
            self._restore(checkpoint)
        self.tensorboard = start_tensorboard(opt, ranks, self.iteration)
        self.metrics = MetricsFile(path['experiments_root'], ranks.is_main, self.iteration, self.validation_due)
        self.log = TrainLog(opt, ranks, self.logger, self.tensorboard, self.metrics, self.model.device)

    def _seed(self, opt: dict, checkpoint: Checkpoint | None) -> int:
        """The run's seed: the YAML's, the checkpoint's, or one drawn by rank 0."""
        seed = opt.get('manual_seed')
        if seed is None and checkpoint is not None:
            seed = checkpoint.state.get('manual_seed')
        drawn = int.from_bytes(os.urandom(4), 'little') % 10000
        return self.ranks.from_main(drawn if seed is None else int(seed))

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        notes = self.ranks.together(lambda: self.store.set_aside(checkpoint.iteration))
        notes += set_model_weights(self.model, checkpoint.weights) + set_model_state(self.model, state)
        self.place, place_notes = self.train_data.place_from(state)
        self.validation_due = bool(state.get('validation_due', False))
        notes += place_notes
        rngs = state.get('rng')
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
        for note in notes:
            self.logger.warning(f'Resume: {note}.')
        if self.store.state_path(checkpoint.iteration).is_file():  # not so for a state of another experiment
            self.saved = checkpoint.iteration

    def run(self) -> int:
        """Train to the last iteration, or until asked to stop."""
        total = int(self.opt['train']['total_iter'])
        self.logger.info(
            f'{len(self.train_data.dataset)} training images, batch {self.train_data.batch} x '
            f'{self.ranks.world_size}, {self.train_data.batches_per_epoch} iterations per epoch, '
            f'{total} in all.'
        )
        if self.validation_due:
            self.validate()
        batches = self.train_data.batches(self.place)
        self.log.restart()
        while self.iteration < total and not self._asked_to_stop():
            waited = time.perf_counter()
            self.place, data = next(batches)
            self._step(data, time.perf_counter() - waited)
            self._after_step(total)
        stopped = self._asked_to_stop()
        if stopped and self.iteration == 0:  # its state could not say what the first iteration does once only
            self.logger.warning(f'Stopped by signal {stopped} before the first iteration: there is nothing to save.')
            return exit_codes.of_signal(stopped)
        if self.saved != self.iteration:
            self.save()
        if stopped:
            self.logger.warning(
                f'Stopped by signal {stopped} after iteration {self.iteration}; its state is saved. '
                'Continue with --auto_resume.'
            )
            return exit_codes.of_signal(stopped)
        self._name_weights(['latest'])
        self.logger.info(
            f'Training ended at iteration {self.iteration}; weights: {self.store.weights_path("net_g", "latest")}'
        )
        return exit_codes.OK

    def _step(self, data: dict, data_time: float) -> None:
        self.iteration += 1
        model = self.model
        model.update_learning_rate(self.iteration, warmup_iter=self.opt['train'].get('warmup_iter', -1))
        model.feed_data(data)
        model.optimize_parameters(self.iteration)
        queries = model.batch.queries if hasattr(model, 'batch') else model.gt.numel() // model.gt.shape[1]
        self.log.step(
            self.iteration,
            self.place.epoch,
            model.get_current_learning_rate(),
            model.get_current_log(),
            queries,
            data_time,
        )

    def _after_step(self, total: int) -> None:
        last = self.iteration == total
        paused = self.log.pause()
        if self.val_loaders and (last or self.iteration % self.opt['val'].get('val_freq', total) == 0):
            self.validation_due = True
        if self.iteration % self.opt['logger'].get('save_checkpoint_freq', total) == 0 or last:
            self.save()
        if self.validation_due:
            self.validate()
        self.log.resume_after(paused)

    def _asked_to_stop(self) -> int:
        """The signal that any rank has received; 0 for none. All ranks stop after the same step."""
        return self.ranks.largest(self.stop.signal)

    def save(self) -> None:
        """Write a checkpoint of this iteration.

        Raises:
            SaveError: On every rank, if rank 0 could not write.
        """
        rngs = self.ranks.gather(rng_state(self.model.device))

        def write() -> None:
            state = {
                'format': 1,
                'epoch': self.place.epoch,
                'place': self.place.state(self.ranks),
                'manual_seed': self.opt['manual_seed'],
                'validation_due': self.validation_due,
                'rng': plain(rngs),
                **model_state(self.model),
            }
            self.store.save(self.iteration, model_weights(self.model), state)

        self.ranks.together(write)
        self.saved = self.iteration
        self.logger.info(f'Saved models and training state of iteration {self.iteration}.')

    def validate(self) -> None:
        """Evaluate on every validation set; keep the weights that are the best of a metric."""
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # sizes come once each
        try:
            self._validate()
        finally:
            torch.backends.cudnn.benchmark = benchmark

    def _validate(self) -> None:
        save_img = self.opt['val'].get('save_img', False)
        if hasattr(self.model, 'validate'):
            results = self.model.validate(
                self.val_loaders, self.iteration, self.tensorboard, save_img, should_stop=lambda: bool(self.stop)
            )
            if results is None:
                return  # asked to stop; still due when the run continues
            self.metrics.write_results(self.iteration, results, getattr(self.model, 'best_metric_results', {}))
        else:
            for loader in self.val_loaders:
                self.model.validation(loader, self.iteration, self.tensorboard, save_img)
        self.validation_due = False
        if self.opt['logger'].get('save_best', True):
            best = getattr(self.model, 'best_metric_results', {})
            self._name_weights(
                [
                    f'best_{dataset}_{metric}'
                    for dataset, records in best.items()
                    for metric, record in records.items()
                    if record['iter'] == self.iteration
                ]
            )

    def _name_weights(self, names: list[str]) -> None:
        def write() -> None:
            saved = self.iteration if self.saved == self.iteration else None
            self.store.name_weights(model_weights(self.model), names, saved)

        self.ranks.together(write if names else lambda: None)

    def close(self) -> None:
        """Flush what is open."""
        if self.tensorboard:
            self.tensorboard.close()


def is_restart(opt: dict, ranks: Ranks) -> bool:
    """Whether torchrun's --max-restarts began this attempt, and the run of an earlier one is there to go on with."""
    if ranks.launch is None:  # an older torch, of which every attempt has another store
        return ranks.largest(int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))) > 0
    return ranks.together(lambda: belongs_to(opt, ranks.launch))


def find_checkpoint(opt: dict, store: CheckpointStore, report, restarted: bool) -> Checkpoint | None:
    """What to continue from: `path: resume_state`, or with --auto_resume and after torchrun's restarts the newest.

    Raises:
        UserError: The given state cannot be used.
    """
    given = opt['path'].get('resume_state')
    if opt.get('auto_resume') or restarted:
        newest = store.newest(report)
        if newest is not None or not given:
            return newest
    if not given:
        return None
    try:
        return store.load(given)
    except DamagedCheckpoint as damage:
        raise UserError(f'path: resume_state: {damage}.') from damage


def without_pretrained(weights: Weights) -> dict:
    """The `pretrain_network_*` entries of the networks in a checkpoint as None: a resumed run has their weights there.

    A model may have others that never train, such as the identity network of a face loss: these come from their files.
    """
    return {f'pretrain_network_{name.removeprefix("net_")}': None for name in weights}
