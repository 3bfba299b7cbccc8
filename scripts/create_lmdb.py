"""Put folders of images into an LMDB that BasicSR's FileClient and this plugin's datasets read.

    python scripts/create_lmdb.py datasets/DIV2K/HR -o datasets/DIV2K_train.lmdb --crop 480 --step 240
    python scripts/create_lmdb.py photos more_photos -o datasets/photos.lmdb --jpeg-shrink 2 --crop 480 --min-detail 3

Sub-images make training fast: an item then decodes a quarter of a megapixel instead of a whole photograph. An
interrupted run goes on with --resume.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import cv2
import lmdb
import numpy as np
from tqdm import tqdm

from moeisr_basicsr.data.image_reader import is_image_name, read_image
from moeisr_basicsr.data.resize import imresize
from moeisr_basicsr.errors import UserError

NOTE = b'\0'  # first byte of bookkeeping records; image keys are printable
SETTINGS = NOTE + b'settings'
FIRST_MAP_SIZE = 1 << 28  # grows by doubling: on Windows the file is as large as the map
JPEG_SUFFIXES = ('.jpg', '.jpeg')


class Job(NamedTuple):
    """One source file and what to do with it."""

    path: str
    key: str
    crop: int | None
    step: int
    thresh: int
    jpeg_shrink: float
    min_detail: float
    compress_level: int
    skip_damaged: bool


class Record(NamedTuple):
    """One image of the LMDB."""

    key: str
    png: bytes
    shape: tuple[int, int, int]


class Made(NamedTuple):
    """What a source file gave."""

    key: str
    records: list[Record]
    notes: list[str]  # what was left out: 'flat', 'alpha', 'damaged'


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', help='folders of images; sub-folders are searched too')
    parser.add_argument('-o', '--output', required=True, help='the LMDB to make; its name ends in .lmdb')
    parser.add_argument('--crop', type=int, help='cut images into squares of this size; smaller images stay whole')
    parser.add_argument('--step', type=int, help='distance between squares (default: half of --crop)')
    parser.add_argument(
        '--thresh',
        type=int,
        default=0,
        help='a rest of more than this at the border gets a square of its own (default: 0)',
    )
    parser.add_argument(
        '--jpeg-shrink',
        type=float,
        default=1.0,
        help='shrink JPEG files by this factor, which hides their artefacts; try 2 (default: 1)',
    )
    parser.add_argument(
        '--min-detail',
        type=float,
        default=0.0,
        help='leave out images or squares whose mean difference between neighbouring pixels, of 255, '
        'is below this; 2 to 4 drops sky and blur (default: 0, keep all)',
    )
    parser.add_argument(
        '--compress-level',
        type=int,
        default=1,
        choices=range(10),
        metavar='0..9',
        help='of PNG; 0 reads fastest and takes about twice the room (default: 1)',
    )
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='processes (default: all cores)')
    parser.add_argument('--resume', action='store_true', help='go on with an interrupted run of the same settings')
    parser.add_argument(
        '--skip-damaged', action='store_true', help='leave out files that cannot be read, and list them'
    )
    args = parser.parse_args(argv)
    if not args.output.endswith('.lmdb'):
        raise UserError(f'--output: {args.output} must end in .lmdb, which BasicSR asks for.')
    for name, least in (('crop', 1), ('step', 1), ('thresh', 0), ('jpeg_shrink', 1), ('min_detail', 0), ('workers', 1)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise UserError(f'--{name.replace("_", "-")}: {value} must be at least {least}.')
    if args.step is not None and args.crop is None:
        raise UserError('--step: give --crop, the size of the squares, too.')
    return args


def find_jobs(args: argparse.Namespace) -> list[Job]:
    """One job per image file. Keys hold no dot, space or slash: BasicSR cuts names at the first dot."""
    jobs = {}
    for folder in map(Path, args.folders):
        if not folder.is_dir():
            raise UserError(f'{folder} is not a folder.')
        paths = sorted(path for path in folder.rglob('*') if is_image_name(path) and path.is_file())
        if not paths:
            raise UserError(f'{folder} holds no image.')
        for path in paths:
            key = '_'.join(path.relative_to(folder).with_suffix('').parts)
            key = ''.join('_' if letter in '. ' else letter for letter in key)
            if not key.isascii() or not key.isprintable():
                raise UserError(f'{path}: BasicSR reads plain ASCII names only; rename the file.')
            if key in jobs:
                raise UserError(f'{path} and {jobs[key].path} would have the same name in the LMDB; rename one.')
            step = args.step or max((args.crop or 2) // 2, 1)
            jobs[key] = Job(
                str(path),
                key,
                args.crop,
                step,
                args.thresh,
                args.jpeg_shrink,
                args.min_detail,
                args.compress_level,
                args.skip_damaged,
            )
    return list(jobs.values())


def positions(length: int, crop: int, step: int, thresh: int) -> list[int]:
    """Where squares begin on one axis, as BasicSR's extract_subimages; [0] for an image that is not larger."""
    starts = list(range(0, max(length - crop, 0) + 1, step))
    if length - (starts[-1] + crop) > thresh:
        starts.append(length - crop)
    return starts


def pieces(image: np.ndarray, job: Job) -> Iterator[tuple[str, np.ndarray]]:
    """(key, part of the image): squares named _s001, _s002, ... row by row, or the whole."""
    if job.crop is None:
        yield job.key, image
        return
    number = 0
    for top in positions(image.shape[0], job.crop, job.step, job.thresh):
        for left in positions(image.shape[1], job.crop, job.step, job.thresh):
            number += 1
            yield f'{job.key}_s{number:03d}', image[top : top + job.crop, left : left + job.crop]


def detail(image: np.ndarray) -> float:
    """Mean absolute difference between neighbouring pixels of (H, W, 3), of 255."""
    grey = image.mean(axis=2) * (255 / np.iinfo(image.dtype).max)
    differences = [np.abs(np.diff(grey, axis=axis)) for axis in (0, 1)]
    count = sum(difference.size for difference in differences)
    return sum(float(difference.sum()) for difference in differences) / max(count, 1)


def make(job: Job) -> Made:
    """Read one source file and encode what it gives; runs in a worker process."""
    try:
        source = read_image(job.path)
    except UserError:
        if not job.skip_damaged:
            raise
        return Made(job.key, [], ['damaged'])
    image = source.rgb
    notes = ['alpha'] if source.alpha is not None else []
    if job.jpeg_shrink > 1 and Path(job.path).suffix.lower() in JPEG_SUFFIXES:
        size = tuple(max(int(n / job.jpeg_shrink), 1) for n in image.shape[:2])
        image = imresize(image, size=size)
    records = []
    for key, part in pieces(image, job):
        if detail(part) < job.min_detail:
            notes.append('flat')
            continue
        stored = part[..., :1] if source.was_grey else part[..., ::-1]  # OpenCV's order
        done, png = cv2.imencode(
            '.png', np.ascontiguousarray(stored), [cv2.IMWRITE_PNG_COMPRESSION, job.compress_level]
        )
        assert done, key
        records.append(Record(key, png.tobytes(), stored.shape))
    return Made(job.key, records, notes)


class Database:
    """The LMDB while it is made, in a folder `<output>.partial` that is renamed at the end.

    A source file's images and the note that it is done are one transaction: an interrupted run leaves whole files.
    """

    def __init__(self, output: str, settings: dict, resume: bool):
        self.output, self.folder = Path(output), Path(f'{output}.partial')
        if self.output.exists():
            raise UserError(f'{output} exists already; it is never overwritten. Remove it, or choose another name.')
        if self.folder.exists() and not resume:
            raise UserError(f'{self.folder} is left from an interrupted run: --resume goes on with it; or remove it.')
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environment = lmdb.open(str(self.folder), map_size=FIRST_MAP_SIZE)
        text = json.dumps(settings, sort_keys=True)
        with self.environment.begin(write=True) as transaction:
            before = transaction.get(SETTINGS)
            if before is None:
                transaction.put(SETTINGS, text.encode())
        if before is not None and before.decode() != text:
            self.environment.close()
            raise UserError(
                f'{self.folder} was begun with other settings ({before.decode()}); use those, or remove it.'
            )

    def notes(self) -> dict[str, dict]:
        """Finished source files: key -> {'lines': lines of meta_info.txt, 'notes': what was left out}."""
        found = {}
        with self.environment.begin() as transaction, transaction.cursor() as cursor:
            if cursor.set_range(NOTE):
                for key, value in cursor:
                    if not key.startswith(NOTE):
                        break
                    if key != SETTINGS:
                        found[key[1:].decode()] = json.loads(value)
        return found

    def add(self, made: Made, compress_level: int) -> None:
        lines = ['{}.png ({},{},{}) {}'.format(record.key, *record.shape, compress_level) for record in made.records]
        entries = [(record.key.encode('ascii'), record.png) for record in made.records]
        entries.append((NOTE + made.key.encode('ascii'), json.dumps({'lines': lines, 'notes': made.notes}).encode()))
        while True:
            try:
                with self.environment.begin(write=True) as transaction:
                    for key, value in entries:
                        transaction.put(key, value)
                return
            except lmdb.MapFullError:
                self.environment.set_mapsize(2 * self.environment.info()['map_size'])

    def finish(self, notes: dict[str, dict]) -> int:
        """Write meta_info.txt, remove the bookkeeping, give the folder its name. Returns the number of images."""
        lines = sorted(line for note in notes.values() for line in note['lines'])
        if not lines:
            raise UserError('No image is left: all were damaged or below --min-detail.')
        with self.environment.begin(write=True) as transaction:
            for key in (SETTINGS, *(NOTE + key.encode('ascii') for key in notes)):
                transaction.delete(key)
            # Inside the transaction: if this fails, the notes stay and --resume can try again.
            (self.folder / 'meta_info.txt').write_text('\n'.join(lines) + '\n', encoding='ascii')
        self.environment.sync(True)
        self.environment.close()
        self.folder.rename(self.output)
        return len(lines)


def run(args: argparse.Namespace) -> None:
    settings = {
        name: getattr(args, name)
        for name in ('folders', 'crop', 'step', 'thresh', 'jpeg_shrink', 'min_detail', 'compress_level', 'skip_damaged')
    }
    build(find_jobs(args), settings, args.output, args.resume, args.workers)


def build(jobs: list[Job], settings: dict, output: str, resume: bool, workers: int) -> None:
    """Make the LMDB of these jobs and say what is in it.

    Args:
        settings: What the result depends on; a resumed run must have the same.
    """
    database = Database(output, settings, resume)
    try:
        done = database.notes()
        waiting = [job for job in jobs if job.key not in done]
        with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), unit='file', desc=Path(output).name) as bar:
            for made in results(waiting, workers):
                database.add(made, jobs[0].compress_level)
                bar.update()
        notes = database.notes()
        images = database.finish(notes)
    finally:
        database.environment.close()
    report(output, images, jobs, notes)


def results(jobs: list[Job], workers: int) -> Iterator[Made]:
    """What the jobs give, in any order, from `workers` processes."""
    if workers == 1 or len(jobs) < 2:
        yield from map(make, jobs)
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context('forkserver' if 'forkserver' in methods else 'spawn')
    if context.get_start_method() == 'forkserver':
        context.set_forkserver_preload([make.__module__, 'moeisr_basicsr.data.image_reader'])  # torch is imported once
    # Ctrl-C is the parent's business: it stops the workers.
    with context.Pool(min(workers, len(jobs)), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap_unordered(make, jobs)


def report(output: str, images: int, jobs: list[Job], notes: dict[str, dict]) -> None:
    left_out = Counter(word for note in notes.values() for word in note['notes'])
    print(f'{output}: {images} images from {len(jobs)} files.')
    if left_out['flat']:
        print(f'{left_out["flat"]} flat images or squares were left out.')
    if left_out['alpha']:
        print(f'{left_out["alpha"]} files have transparency; their colours alone were kept.')
    damaged = [job.path for job in jobs if 'damaged' in notes[job.key]['notes']]
    if damaged:
        print(f'{len(damaged)} files cannot be read and were left out:', *damaged, sep='\n  ')


def exit_code(name: str, work: Callable[[], None]) -> int:
    """Of a script that builds an LMDB. 0: done; 2: something that the user can mend, in one line; 130: interrupted."""
    try:
        work()
    except (UserError, OSError, lmdb.Error) as error:
        print(f'{name}: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'{name}: interrupted; the same command with --resume goes on.', file=sys.stderr)
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    """The exit code."""
    return exit_code('create_lmdb', lambda: run(parse_arguments(argv)))


if __name__ == '__main__':
    sys.exit(main())
