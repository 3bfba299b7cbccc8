"""Put folders of images into an LMDB that BasicSR's FileClient and this plugin's datasets read.

    python scripts/create_lmdb.py datasets/DIV2K/HR -o datasets/DIV2K_train.lmdb --crop 480 --step 240
    python scripts/create_lmdb.py photos more_photos -o datasets/photos.lmdb --jpeg-shrink 2 --crop 480 --min-detail 3

Sub-images make training fast: an item then decodes a quarter of a megapixel instead of a whole photograph. An
interrupted run goes on with --resume, which BasicSR's own LmdbMaker cannot.
"""

import argparse
import contextlib
import itertools
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

COMPRESS_LEVEL = 1  # of PNG, BasicSR's
FIRST_MAP_SIZE = 1 << 28  # grows by doubling: on Windows the file is as large as the map
SETTINGS = ('folders', 'crop', 'step', 'thresh', 'jpeg_shrink', 'min_detail', 'skip_damaged')  # the result depends on

NUMBERS = (  # option, type, default, least, meaning
    ('--crop', int, None, 1, 'cut images into squares of this size; smaller images stay whole'),
    ('--step', int, None, 1, 'distance between squares (default: half of --crop)'),
    ('--thresh', int, 0, 0, 'a larger rest at the border gets a square of its own (default: 0)'),
    ('--jpeg-shrink', float, 1.0, 1, 'shrink JPEG files by this factor, which hides artefacts; try 2 (default: 1)'),
    ('--min-detail', float, 0.0, 0, 'leave out what is flatter; 2 to 4 drops sky and blur (default: 0, keep all)'),
    ('--workers', int, os.cpu_count() or 1, 1, 'processes (default: all cores)'),
)


class Job(NamedTuple):
    """One source file and what to do with it."""

    path: str
    key: str
    jpeg_shrink: float
    options: argparse.Namespace  # crop, step, thresh, min_detail, skip_damaged


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', help='folders of images; sub-folders are searched too')
    parser.add_argument('-o', '--output', required=True, help='the LMDB to make; its name ends in .lmdb')
    for option, kind, default, _, meaning in NUMBERS:
        parser.add_argument(option, type=kind, default=default, help=meaning)
    parser.add_argument('--resume', action='store_true', help='go on with an interrupted run of the same settings')
    parser.add_argument(
        '--skip-damaged', action='store_true', help='leave out files that cannot be read, and list them'
    )
    args = parser.parse_args(argv)
    for option, _, _, least, _ in NUMBERS:
        value = getattr(args, option[2:].replace('-', '_'))
        if value is not None and not value >= least:
            raise UserError(f'{option}: {value} must be at least {least}.')
    if args.step is not None and args.crop is None:
        raise UserError('--step: give --crop, the size of the squares, too.')
    return args


def find_jobs(args: argparse.Namespace) -> list[Job]:
    """One job per image file. Keys hold no dot, space or slash: BasicSR cuts names at the first dot."""
    jobs: dict[str, Job] = {}
    for folder in map(Path, args.folders):
        if not folder.is_dir():
            raise UserError(f'{folder} is not a folder.')
        paths = sorted(path for path in folder.rglob('*') if is_image_name(path) and path.is_file())
        if not paths:
            raise UserError(f'{folder} holds no image.')
        for path in paths:
            key = '_'.join(path.relative_to(folder).with_suffix('').parts).replace('.', '_').replace(' ', '_')
            if not key.isascii() or not key.isprintable():
                raise UserError(f'{path}: BasicSR reads plain ASCII names only; rename the file.')
            if key in jobs:
                raise UserError(f'{path} and {jobs[key].path} would have the same name in the LMDB; rename one.')
            jobs[key] = Job(str(path), key, args.jpeg_shrink, args)
    return list(jobs.values())


def pieces(image: np.ndarray, job: Job) -> Iterator[tuple[str, np.ndarray]]:
    """(key, part of the image): squares named _s001, _s002, ... row by row, as BasicSR's extract_subimages cuts them;
    the whole without --crop, or where the image is not larger."""
    crop, thresh = job.options.crop, job.options.thresh
    if crop is None:
        yield job.key, image
        return

    def starts(length: int) -> list[int]:
        found = list(range(0, max(length - crop, 0) + 1, job.options.step or max(crop // 2, 1)))
        return found + [length - crop] * (length - (found[-1] + crop) > thresh)

    corners = itertools.product(starts(image.shape[0]), starts(image.shape[1]))
    for number, (top, left) in enumerate(corners, 1):
        yield f'{job.key}_s{number:03d}', image[top : top + crop, left : left + crop]


def detail(image: np.ndarray) -> float:
    """Mean difference between neighbouring pixels of (H, W, 3), of 255."""
    grey = image.mean(axis=2) * (255 / np.iinfo(image.dtype).max)
    differences = np.concatenate([np.abs(np.diff(grey, axis=axis)).ravel() for axis in (0, 1)])
    return float(differences.mean()) if differences.size else 0.0


def make(job: Job) -> tuple[dict, dict[str, bytes]]:
    """Read one source file and encode what it gives; runs in a worker process.

    Returns:
        An entry of the log: `key`, `lines` of meta_info.txt, `notes` of what was left out. And key -> PNG file.
    """
    lines: list[str] = []
    notes: list[str] = []
    images: dict[str, bytes] = {}
    entry = {'key': job.key, 'lines': lines, 'notes': notes}
    try:
        source = read_image(job.path)
    except UserError as error:
        if not job.options.skip_damaged:
            raise
        notes.append(f'file left out, {error}')
        return entry, images
    image = source.rgb
    if source.alpha is not None:
        notes.append('files have transparency; their colours alone were kept')
    if job.jpeg_shrink > 1 and Path(job.path).suffix.lower() in ('.jpg', '.jpeg'):
        rows, cols = (max(int(n / job.jpeg_shrink), 1) for n in image.shape[:2])
        image = imresize(image, (rows, cols))
    for key, part in pieces(image, job):
        if detail(part) < job.options.min_detail:
            notes.append('flat images or squares left out')
            continue
        stored = np.ascontiguousarray(part[..., :1] if source.was_grey else part[..., ::-1])  # OpenCV's order
        images[key] = cv2.imencode('.png', stored, [cv2.IMWRITE_PNG_COMPRESSION, COMPRESS_LEVEL])[1].tobytes()
        lines.append('{}.png ({},{},{}) {}'.format(key, *stored.shape, COMPRESS_LEVEL))
    return entry, images


def build(jobs: list[Job], settings: dict, output: str, resume: bool, workers: int) -> None:
    """Make the LMDB of these jobs, in a folder `<output>.partial` that is renamed at the end, and say what is in it.

    The result depends on `settings`; a resumed run must have the same.
    """
    folder = Path(f'{output}.partial')
    if not output.endswith('.lmdb'):
        raise UserError(f'--output: {output} must end in .lmdb, which BasicSR asks for.')
    if Path(output).exists():
        raise UserError(f'{output} exists already; it is never overwritten. Remove it, or choose another name.')
    if folder.exists() and not resume:
        raise UserError(f'{folder} is left from an interrupted run: --resume goes on with it; or remove it.')
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / 'progress.jsonl'  # the settings, then what each source file gave that is in the database
    entries = []
    for line in log.read_text().splitlines() if log.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # cut off: its images are made, and stored, again
            entries.append(json.loads(line))
    mode, entries = ('a', entries) if entries else ('w', [settings])
    if entries[0] != settings:
        raise UserError(f'{folder} was begun with other settings ({entries[0]}); use those, or remove it.')
    done = {entry['key'] for entry in entries[1:]}
    waiting = [job for job in jobs if job.key not in done]
    bar = tqdm(total=len(jobs), initial=len(done), unit='file', desc=Path(output).name)
    with bar, lmdb.open(str(folder), map_size=FIRST_MAP_SIZE) as environment, open(log, mode) as file:
        if mode == 'w':
            file.write(json.dumps(settings))
        for entry, images in results(waiting, workers):
            put(environment, images)
            entries.append(entry)
            file.write('\n' + json.dumps(entry))  # a line break first: the line before may be cut off
            file.flush()
            bar.update()
    lines = sorted(line for entry in entries[1:] for line in entry['lines'])
    if not lines:
        raise UserError('No image is left: all were damaged or below --min-detail.')
    (folder / 'meta_info.txt').write_text('\n'.join(lines) + '\n', encoding='ascii')
    log.unlink()
    folder.rename(output)
    print(f'{output}: {len(lines)} images from {len(jobs)} files.')
    for note, count in Counter(note for entry in entries[1:] for note in entry['notes']).items():
        print(f'{count} {note}.')


def put(environment: lmdb.Environment, images: dict[str, bytes]) -> None:
    """Store images, in one transaction."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, png in images.items():
                    transaction.put(key.encode('ascii'), png)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()['map_size'])


def results(jobs: list[Job], workers: int) -> Iterator[tuple[dict, dict[str, bytes]]]:
    """What the jobs give, in any order, from `workers` processes."""
    if workers == 1 or len(jobs) < 2:
        yield from map(make, jobs)
        return
    # Ctrl-C is the parent's business: it stops the workers.
    initial = (signal.signal, (signal.SIGINT, signal.SIG_IGN))
    with multiprocessing.get_context('spawn').Pool(min(workers, len(jobs)), *initial) as pool:
        yield from pool.imap_unordered(make, jobs)


def exit_code(name: str, work: Callable[[], None]) -> int:
    """Of a script that builds an LMDB. 0: done; 2: something that the user can fix, in one line; 130: interrupted."""
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

    def run() -> None:
        args = parse_arguments(argv)
        settings = {name: getattr(args, name) for name in SETTINGS}
        build(find_jobs(args), settings, args.output, args.resume, args.workers)

    return exit_code('create_lmdb', run)


if __name__ == '__main__':
    sys.exit(main())
