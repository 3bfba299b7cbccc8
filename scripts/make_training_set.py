"""The training set of the shipped weights: BSDS500's training and test images and high-resolution photographs.

    python scripts/make_training_set.py ../shared/data -o datasets/moeisr_train.lmdb

The folder holds `BSDS500_train`, `BSDS500_test` and `HiRes`, and the test sets in folders of their own. Photographs are
shrunk at least twice (their JPEG artefacts disappear) until they are at most 1920 pixels long, cut into sub-images, and
flat ones are left out; BSDS500's small images stay whole. No test image enters: every test image is compared with every
source, by its pixels and by a perceptual hash that survives re-encoding and resizing, and sources that show the same
picture are left out (Set5's `woman` is one of BSDS500's training images). Beside the LMDB, NAME.json keeps the SHA-256
of every source file and of the result.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import create_lmdb  # beside this file; makes the package importable too
import cv2
import lmdb
import numpy as np

from moeisr_basicsr.data.image_reader import is_image_name, read_header, read_image
from moeisr_basicsr.errors import UserError

WHOLE = ('BSDS500_train', 'BSDS500_test')
PHOTOGRAPHS = ('HiRes',)
TEST_SETS = ('Set5', 'Set14', 'B100_jpg', 'DIV2K_valid_crop256')  # B100 is BSDS500's validation split
LONGEST, LEAST_SHRINK = 1920, 2.0
CUT = {'crop': 320, 'step': 320, 'thresh': 160, 'min_detail': 3.0}
HASH_SIDE = 16
# Of 256 bits. Among these folders unrelated pictures differ in 67 and more; the one that is twice there, cropped at one
# side, in 18.
SAME_PICTURE = 40


class Fingerprint(NamedTuple):
    path: str
    pixels: str  # SHA-256 of size and RGB values
    bits: np.ndarray  # (256,) bool, difference hash of the luma


def fingerprint(path: Path) -> Fingerprint:
    """What tells whether two files hold the same picture."""
    rgb = read_image(path).rgb
    pixels = hashlib.sha256(repr(rgb.shape).encode() + rgb.tobytes()).hexdigest()
    luma = rgb.mean(axis=2).astype(np.float32)
    small = cv2.resize(luma, (HASH_SIDE + 1, HASH_SIDE), interpolation=cv2.INTER_AREA)
    return Fingerprint(str(path), pixels, (small[:, 1:] > small[:, :-1]).ravel())


def images_in(folders: Iterable[Path]) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.rglob('*')) if is_image_name(path)]


def same_pictures(sources: list[Path], tests: list[Path]) -> tuple[dict[Path, str], int]:
    """Source -> the test image that it shows, and the bits between the nearest other source and a test image."""
    prints = [fingerprint(path) for path in tests]
    test_pixels = {each.pixels for each in prints}
    test_bits = np.stack([each.bits for each in prints])  # (tests, 256)
    found, least = {}, HASH_SIDE**2
    for source in sources:
        print_ = fingerprint(source)
        distance = (test_bits != print_.bits).sum(axis=1)
        if distance.min() < SAME_PICTURE or print_.pixels in test_pixels:
            found[source] = prints[int(distance.argmin())].path
        else:
            least = min(least, int(distance.min()))
    return found, least


def find_jobs(root: Path) -> list[create_lmdb.Job]:
    def jobs_of(names: Iterable[str], **options: float) -> list[create_lmdb.Job]:
        folders = [str(root / name) for name in names]
        whole = {'crop': None, 'step': None, 'thresh': 0, 'min_detail': 0, 'jpeg_shrink': 1, 'skip_damaged': False}
        return create_lmdb.find_jobs(argparse.Namespace(folders=folders, **whole | options))

    def shrunk(job: create_lmdb.Job) -> create_lmdb.Job:
        height, width, _ = read_header(job.path)
        return job._replace(jpeg_shrink=max(LEAST_SHRINK, max(height, width) / LONGEST))

    return jobs_of(WHOLE) + [shrunk(job) for job in jobs_of(PHOTOGRAPHS, **CUT)]


def content_sha256(path: str) -> str:
    """SHA-256 of all records in the order of their keys; the LMDB file itself depends on the order of writing."""
    digest = hashlib.sha256()
    with lmdb.open(path, readonly=True, lock=False) as environment, environment.begin() as transaction:
        for key, value in transaction.cursor():
            digest.update(key + b'\0' + len(value).to_bytes(8, 'little') + value)
    return digest.hexdigest()


def run(args: argparse.Namespace) -> None:
    root = Path(args.root)
    jobs = find_jobs(root)
    tests = images_in(root / name for name in TEST_SETS)
    if not tests:
        raise UserError(
            f'{root} holds none of the test sets {", ".join(TEST_SETS)}; without them nothing shows that '
            'no test image is among the training images.'
        )
    same, least = same_pictures([Path(job.path) for job in jobs], tests)
    for source, test in same.items():
        print(f'{source} is left out: it shows the test image {test}.')
    jobs = [job for job in jobs if Path(job.path) not in same]
    settings = {'script': Path(__file__).name, 'longest': LONGEST, 'least_shrink': LEAST_SHRINK, **CUT}
    create_lmdb.build(jobs, settings, args.output, args.resume, args.workers)

    def below(path: str | Path) -> str:
        return Path(path).relative_to(root).as_posix()

    record = {
        **settings,
        'content_sha256': content_sha256(args.output),
        'compared_with_test_images': len(tests),
        'left_out': {below(source): below(test) for source, test in same.items()},
        'sources': {below(job.path): hashlib.sha256(Path(job.path).read_bytes()).hexdigest() for job in jobs},
    }
    log = Path(args.output).with_suffix('.json')
    log.write_text(json.dumps(record, indent=1, sort_keys=True) + '\n')
    print(f'{len(tests)} test images compared; the nearest pair left differs in {least} of {HASH_SIDE**2} bits.')
    print(f'Checksums: {log}; of the content: {record["content_sha256"]}')


def main(argv: list[str] | None = None) -> int:
    """The exit code, as create_lmdb's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', help='the folder of the image folders')
    parser.add_argument('-o', '--output', required=True, help='the LMDB to make; its name ends in .lmdb')
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='processes (default: all cores)')
    parser.add_argument('--resume', action='store_true', help='go on with an interrupted run')
    return create_lmdb.exit_code('make_training_set', lambda: run(parser.parse_args(argv)))


if __name__ == '__main__':
    sys.exit(main())
