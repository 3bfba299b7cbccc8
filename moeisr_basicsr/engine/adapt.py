"""From a trained fixed-scale network to one of any factor: the recipe filled in, its schedule, what came of it.

The run is that of an ordinary options file, `adapt.yml` beside this one with the user's files in it; `adapt` trains it,
and `adapt_result` compares what came of it with the network's own image, resampled, and writes the better one.
"""

import hashlib
import time
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from basicsr.models import build_model
from basicsr.utils import get_root_logger

from moeisr_basicsr.archs.encoders import build_encoder
from moeisr_basicsr.data.image_source import ImageSource
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options import read_yaml

from .adapt_result import Compared, options_of, write_better, write_text
from .data_loading import Place, TrainData
from .distributed import Ranks
from .run_lock import held
from .train_loop import train

RECIPE = Path(__file__).with_name('adapt.yml')
EXPERTS: dict[str, list[list[int]]] = {  # of the families beside the recipe's own, cheapest first
    'liif': [[], [64], [128, 128]],
    'lte': [[], [64], [128, 128]],
}
VALIDATION_IMAGES, VALIDATION_PIXELS = 8, 1 << 20
RESTING = 0.1  # part of the iterations in which the encoder rests
TIMED_STEPS, UNTIMED_STEPS = 5, 2
SPARE = 0.9  # of the time that is left: the rest is for what comes after training
Names = tuple[list[str], list[str]]  # of images to train on, and to validate on


class Job(NamedTuple):
    """What the user asks for."""

    encoder: dict  # options of the encoder: a checkpoint, or an architecture and its weights
    data: str  # folder or LMDB of HR images
    out: Path  # the model file
    decoder: str = 'lm'
    validation: str | None = None  # folder or LMDB of HR images; None holds some of `data` back
    minutes: float | None = None  # time for everything; None trains the recipe's iterations

    @property
    def name(self) -> str:
        """Of the run."""
        return f'adapt_{self.out.stem}'

    @property
    def weights(self) -> str:
        """The user's checkpoint."""
        return self.encoder['weights' if 'arch' in self.encoder else 'checkpoint']


def adapt(job: Job, started: float) -> tuple[int, list[Compared], float]:
    """Train, compare, write the model file.

    Args:
        job: What to do.
        started: `time.monotonic` when the user's minutes began.

    Returns:
        The `ExitCode` of the training (the rest is empty where it did not end), and what `write_better` returns.

    Raises:
        UserError: Files do not fit.
    """
    opt, names = plan(job)
    with held(Path('experiments', f'{job.name}.yml'), Ranks()):
        return train_and_compare(job, *write_options(job, opt, names, started))


def train_and_compare(job: Job, path: Path, resumes: bool) -> tuple[int, list[Compared], float]:
    """`adapt`, with the options file at `path`."""
    code = train(options_of(path, auto_resume=resumes))
    if code:
        return code, [], 0.0
    return code, *write_better(read_yaml(path).data, job.out)


def fill_recipe(job: Job, train_list: Path, val_list: Path) -> dict[str, Any]:
    """The recipe with the user's files; the lists name the images to train on and to validate on."""
    opt = read_yaml(str(RECIPE)).data
    opt['name'] = job.name
    opt['network_g']['encoder'] = job.encoder
    opt['network_g']['decoder'] = job.decoder
    if job.decoder in EXPERTS:
        opt['network_g']['experts'] = EXPERTS[job.decoder]
    opt['datasets']['train'] |= root_options(job.data) | {'meta_info_file': str(train_list)}
    held_back = {'meta_info_file': str(val_list)} if job.validation is None else {'recursive': True}
    opt['datasets']['val'] |= root_options(job.validation or job.data) | held_back
    return opt


def root_options(root: str) -> dict[str, Any]:
    """Keys of a dataset that name its images."""
    return {'dataroot_gt': root, 'io_backend': {'type': 'lmdb' if is_lmdb(root) else 'disk'}}


def is_lmdb(folder: str) -> bool:
    return Path(folder, 'data.mdb').is_file()


def plan(job: Job) -> tuple[dict[str, Any], Names]:
    """The options of the run and its images. Nothing is written.

    Raises:
        UserError: The job cannot be done.
    """
    opt = fill_recipe(job, *lists_of(job))
    names = split_images(job, opt['datasets']['train']['lq_size'])
    build_encoder(job.encoder, 3, tail=True)  # says what is wrong with it
    return opt, names


def lists_of(job: Job) -> list[Path]:
    """The files that name the images to train on and to validate on."""
    return [Path('experiments', f'{job.name}_{part}.txt') for part in ('train', 'val')]


def write_options(job: Job, opt: dict[str, Any], names: Names, started: float) -> tuple[Path, bool]:
    """The options file of the run, experiments/NAME.yml, and whether it goes on with a run of the same options.

    Raises:
        UserError: See `parse_options`.
    """
    path, lists = Path('experiments', f'{job.name}.yml'), lists_of(job)
    # Without a state nothing was trained: the run may have ended while its schedule was being fitted.
    earlier = read_yaml(str(path)).data if path.is_file() and has_state(job.name) else None
    digest = f'# SHA-256 of the checkpoint: {hashlib.sha256(Path(job.weights).read_bytes()).hexdigest()}\n'
    if earlier is not None and without_schedule(earlier) == without_schedule(opt):
        if path.read_text(encoding='utf-8').startswith(digest):
            tell_what_stays(earlier, job, lists, names)
            return path, True
        get_root_logger().warning(f'{job.weights} has changed since {job.name} began: a new run begins.')
    path.parent.mkdir(exist_ok=True)
    for file, part in zip(lists, names):
        write_text(file, '\n'.join(part))
    write_text(path, digest + yaml.safe_dump(opt, sort_keys=False))
    if job.minutes is not None:
        resting, training = seconds_per_step(options_of(path))
        left = 60 * job.minutes - (time.monotonic() - started)
        set_iterations(opt, max(int(SPARE * left / (RESTING * resting + (1 - RESTING) * training)), 20))
        write_text(path, digest + yaml.safe_dump(opt, sort_keys=False))
    return path, False


def has_state(run: str) -> bool:
    return any(Path('experiments', run, 'training_states').glob('*.state'))


def tell_what_stays(opt: dict[str, Any], job: Job, lists: list[Path], found: Names) -> None:
    """A run that goes on keeps its schedule, and its images: what was trained on must not be held back later."""
    stays = []
    if job.minutes is not None:
        stays.append(f'its {opt["train"]["total_iter"]} iterations, whatever --minutes is now')
    if any(file.read_text(encoding='utf-8').splitlines() != names for file, names in zip(lists, found)):
        stays.append(f'the images of {lists[0]} and {lists[1]}, although {job.data} has others now')
    if stays:
        get_root_logger().warning(
            f'{job.name} goes on with {" and ".join(stays)}. Another name of the output file begins a new run.'
        )


def without_schedule(opt: dict[str, Any]) -> dict[str, Any]:
    """The options that one run shares with another however long they are."""
    opt = deepcopy(opt)
    set_iterations(opt, 1)
    return opt


def set_iterations(opt: dict[str, Any], total: int) -> None:
    """Let a run of the recipe take `total` iterations."""
    opt['train'] |= {'total_iter': total, 'fix_encoder': round(RESTING * total)}
    opt['train']['scheduler']['periods'] = [total]
    opt['val']['val_freq'] = -(-total // 4)


def split_images(job: Job, least: int) -> Names:
    """The names of the images to train on, and of those that are held back for validation.

    Folders below are searched too; images with a side below `least` or in `job.validation` are left out. Those held
    back are spread over the folder, of a megapixel at most where there are such ones.

    Raises:
        UserError: There are too few.
    """
    source = ImageSource([job.data], '--data', is_lmdb(job.data), recursive=True)
    sizes = {Path(name).relative_to(job.data).as_posix(): source.header(name)[:2] for name in source.names}
    usable = [name for name, size in sizes.items() if min(size) >= least]
    which = f'of at least {least} x {least} pixels'
    if job.validation is not None:
        others = ImageSource([job.validation], '--val', is_lmdb(job.validation), recursive=True)
        compared = {Path(name).resolve() for name in others.names}
        usable = [name for name in usable if Path(job.data, name).resolve() not in compared]
        which += f' that are not in --val {job.validation}'
    if odd := [name for name in usable if not is_line(name)]:
        raise UserError(
            f'--data: {Path(job.data, odd[0])}: a name that is no line of text cannot be listed; rename it.'
        )
    if len(usable) < 2:
        raise UserError(f'--data {job.data}: {len(usable)} images {which}; 2 are needed.')
    if job.validation is not None:
        return usable, []
    small = [name for name in usable if sizes[name][0] * sizes[name][1] <= VALIDATION_PIXELS] or usable
    step = max(len(small) // VALIDATION_IMAGES, 2)
    held_back = small[step // 2 :: step][:VALIDATION_IMAGES]
    return [name for name in usable if name not in held_back], held_back


def is_line(name: str) -> bool:
    """Whether a list of files can hold a name."""
    return name.encode(errors='replace').decode() == name and name.splitlines() == [name.strip()]


def seconds_per_step(opt: dict[str, Any]) -> tuple[float, float]:
    """Median time of a training step while the encoder rests, and while it trains."""
    ranks = Ranks()
    opt = ranks.options({**opt, 'manual_seed': opt.get('manual_seed') or 0})
    model = build_model(opt)
    batches = TrainData(opt, ranks, model.device).batches(Place())
    medians = []
    for first in (1, opt['train']['fix_encoder'] + 1):
        times = []
        for iteration in range(first, first + UNTIMED_STEPS + TIMED_STEPS):
            began = time.perf_counter()
            model.feed_data(next(batches)[1])
            model.optimize_parameters(iteration)
            model.get_current_log()
            times.append(time.perf_counter() - began)
        medians.append(sorted(times[UNTIMED_STEPS:])[TIMED_STEPS // 2])
    return medians[0], medians[1]
