"""What `basicsr upscale` has to do: which image goes to which file. Nothing is written here."""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

from moeisr_basicsr.data.image_reader import SUFFIXES, is_image_name
from moeisr_basicsr.errors import UserError, did_you_mean, did_you_mean_file

from .outputs import check_folder

OUTPUT_SUFFIXES = {'.png': 'png', '.jpg': 'jpg', '.jpeg': 'jpg', '.tif': 'tif', '.tiff': 'tif', '.webp': 'webp'}


class Job(NamedTuple):
    """One image."""

    source: Path
    target: Path
    expert_map: Path | None  # None where no map is wanted


def plan(args: argparse.Namespace) -> list[Job]:
    """The jobs of this process, those already done left out under --resume.

    Args:
        args: Reads `inputs`, `output`, `scale`, `size`, `ext`, `expert_map`, `overwrite`, `resume`.

    Raises:
        UserError: An input is missing or no image; two images have the same output file; an output file exists, or a
            file where a folder is needed.
    """
    sources = find_sources(args.inputs)
    output = Path(args.output)
    given = output.suffix.lower()
    is_file = not output.is_dir() and given in OUTPUT_SUFFIXES
    known = ', '.join(sorted(OUTPUT_SUFFIXES))
    if is_file and (len(sources) > 1 or any(Path(name).is_dir() for name in args.inputs)):
        raise UserError(f'{output} is one file, but there are {len(sources)} images; name a folder after -o.')
    if is_file and args.ext not in (None, OUTPUT_SUFFIXES[given]):
        raise UserError(f'{output} and --ext {args.ext} contradict each other.')
    if not output.is_dir() and given and not is_file and len(given) <= 5:
        raise UserError(
            f"{output}: images are written as {known}; got '{given}'.{did_you_mean(given, OUTPUT_SUFFIXES)}"
        )
    if not is_file and output.exists() and not output.is_dir():
        raise UserError(f'{output} is a file; name a folder, or a file that ends in {known}.')
    check_folder(output.parent if is_file else output)
    label = factor_label(args)
    jobs = []
    for source in sources:
        target = output if is_file else output / f'{source.stem}_{label}.{args.ext or "png"}'
        expert_map = target.with_name(f'{target.stem}_experts.png') if args.expert_map else None
        jobs.append(Job(source, target, expert_map))
    if args.resume:
        jobs = without_results(jobs, args.inputs)
    check_collisions(jobs)
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    # Shared before a look at what exists: by then another rank may have written its first files.
    return check_existing(jobs[rank::world_size], args.overwrite, args.resume)


def find_sources(names: list[str]) -> list[Path]:
    """The images that files and folders name, each once, also where its folder is named too.

    Raises:
        UserError: See `find_images`.
    """
    sources: dict[Path, Path] = {}
    for path in (path for name in names for path in find_images(Path(name))):
        sources.setdefault(path.parent.resolve() / path.name, path)  # a link of another name has its own output
    return list(sources.values())


def find_images(path: Path) -> list[Path]:
    """The image itself, or the images directly in a folder, sorted.

    Raises:
        UserError: There is no such file or folder, or no image in it.
    """
    if path.is_dir():
        found = sorted(
            entry
            for entry in path.iterdir()
            if entry.is_file() and is_image_name(entry.name) and not entry.name.startswith('.')
        )
        if not found:
            kinds = ', '.join(suffix[1:] for suffix in SUFFIXES)
            raise UserError(f'{path} has no image directly in it ({kinds}).')
        return found
    if not path.is_file():
        hint = did_you_mean_file(path, lambda entry: entry.is_dir() or is_image_name(entry.name))
        raise UserError(f'there is no image or folder {path}.{hint}')
    return [path]


def factor_label(args: argparse.Namespace) -> str:
    """How file names say the factor: 'x3.3', 'x2.5x4' (rows x columns), or '3840x2160' (width first)."""
    if args.scale is None:
        return f'{args.size[1]}x{args.size[0]}'
    rows, cols = (f'{factor:.6g}' for factor in args.scale)
    return f'x{rows}' if rows == cols else f'x{rows}x{cols}'


def without_results(jobs: list[Job], names: list[str]) -> list[Job]:
    """Without the images that lie in a given folder because an earlier run of these jobs put them there."""
    named = {Path(name).resolve() for name in names}
    results = {path.resolve() for job in jobs for path in (job.target, job.expert_map) if path is not None}
    return [job for job in jobs if job.source.resolve() in named or job.source.resolve() not in results]


def check_collisions(jobs: list[Job]) -> None:
    """Every file that is written must be a file of its own.

    Raises:
        UserError: Two images have the same output file, or an output file is an input.
    """
    owners: dict[Path, Path] = {}
    inputs = {job.source.resolve() for job in jobs}
    for job in jobs:
        for path in filter(None, (job.target, job.expert_map)):
            place = path.resolve()
            if place in inputs:
                raise UserError(f'{path} is an input: it would be overwritten. Choose another name after -o.')
            if place in owners:
                raise UserError(
                    f'{owners[place]} and {job.source} would both become {path}; upscale them into different folders.'
                )
            owners[place] = job.source


def check_existing(jobs: list[Job], overwrite: bool, resume: bool) -> list[Job]:
    """The jobs that are left to do.

    Raises:
        UserError: An output file exists, and neither --overwrite nor --resume is given.
    """

    def outputs(job: Job) -> list[Path]:
        return [path for path in (job.target, job.expert_map) if path is not None]

    if overwrite:
        return jobs
    if resume:
        return [job for job in jobs if not all(path.exists() for path in outputs(job))]
    existing = [path for job in jobs for path in outputs(job) if path.exists()]
    if existing:
        more = f' (and {len(existing) - 1} more)' if len(existing) > 1 else ''
        raise UserError(f'{existing[0]}{more} already exists: give --overwrite to replace it, or --resume to leave it.')
    return jobs
