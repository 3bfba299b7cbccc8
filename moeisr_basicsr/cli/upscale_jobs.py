"""What `basicsr upscale` has to do: which image goes to which file. Nothing is written here."""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

from moeisr_basicsr.data.image_reader import SUFFIXES, is_image_name
from moeisr_basicsr.errors import UserError, did_you_mean, did_you_mean_file


class Job(NamedTuple):
    """One image."""

    source: Path
    target: Path
    expert_map: Path | None  # None where no map is wanted

    @property
    def outputs(self) -> list[Path]:
        return [path for path in (self.target, self.expert_map) if path is not None]


def plan(args: argparse.Namespace) -> list[Job]:
    """The jobs of this process, without those already done under --resume. Every mistake is a UserError."""
    sources = find_sources(args.inputs)
    output = Path(args.output)
    suffix = output.suffix.lower()
    is_file = suffix in SUFFIXES and not output.is_dir()
    if is_file and (len(sources) > 1 or any(Path(name).is_dir() for name in args.inputs)):
        raise UserError(f'{output} is one file, but there are {len(sources)} images; name a folder after -o.')
    if is_file and args.ext not in (None, suffix[1:]):
        raise UserError(f'{output} and --ext {args.ext} contradict each other.')
    if not is_file and not output.exists() and 1 < len(suffix) <= 5:
        hint = did_you_mean(suffix, SUFFIXES)
        raise UserError(f"{output}: images are written as {', '.join(SUFFIXES)}; got '{suffix}'.{hint}")
    folder = output.parent if is_file else output
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir():
        raise UserError(f'{existing} is a file, not a folder.')
    jobs = []
    for source in sources:
        target = output if is_file else output / f'{source.stem}_{factor_label(args)}.{args.ext or "png"}'
        jobs.append(Job(source, target, target.with_name(f'{target.stem}_experts.png') if args.expert_map else None))
    if args.resume:  # a folder may hold its own results by now
        results = {path.resolve() for job in jobs for path in job.outputs}
        jobs = [job for job in jobs if job.source.resolve() not in results]
    check_collisions(jobs)
    # Shared before a look at what exists: by then another process may have written its first files.
    jobs = jobs[int(os.environ.get('RANK', 0)) :: int(os.environ.get('WORLD_SIZE', 1))]
    if args.resume:
        return [job for job in jobs if not all(path.exists() for path in job.outputs)]
    present = [path for job in jobs for path in job.outputs if path.exists()]
    if present and not args.overwrite:
        more = f' (and {len(present) - 1} more)' if len(present) > 1 else ''
        raise UserError(f'{present[0]}{more} already exists: give --overwrite to replace it, or --resume to leave it.')
    return jobs


def find_sources(names: list[str]) -> list[Path]:
    """The images that files and folders name, each once."""
    sources: dict[str, Path] = {}
    for path in map(Path, names):
        if path.is_dir():
            entries = sorted(entry for entry in path.iterdir() if entry.is_file())
            found = [entry for entry in entries if is_image_name(entry) and not entry.name.startswith('.')]
            if not found:
                raise UserError(f'{path} has no image directly in it ({", ".join(SUFFIXES)}).')
        elif path.is_file():
            found = [path]
        else:
            hint = did_you_mean_file(path, lambda entry: entry.is_dir() or is_image_name(entry))
            raise UserError(f'there is no image or folder {path}.{hint}')
        for entry in found:
            sources.setdefault(os.path.abspath(entry), entry)  # a link of another name has its own output
    return list(sources.values())


def factor_label(args: argparse.Namespace) -> str:
    """How file names say the factor: 'x3.3', 'x2.5x4' (rows x columns), or '3840x2160' (width first)."""
    if args.scale is None:
        return f'{args.size[1]}x{args.size[0]}'
    rows, cols = (f'{factor:.6g}' for factor in args.scale)
    return f'x{rows}' if rows == cols else f'x{rows}x{cols}'


def check_collisions(jobs: list[Job]) -> None:
    """Whether every file that is written is a file of its own, and none of the inputs."""
    inputs = {job.source.resolve() for job in jobs}
    owners: dict[Path, Path] = {}
    for job in jobs:
        for path in job.outputs:
            if path.resolve() in inputs:
                raise UserError(f'{path} is an input: it would be overwritten. Choose another name after -o.')
            other = owners.setdefault(path.resolve(), job.source)
            if other != job.source:
                both = f'{other} and {job.source} would both become {path}'
                raise UserError(f'{both}; upscale them into different folders.')
