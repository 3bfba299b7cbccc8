"""What `basicsr upscale` has to do: which image goes to which file. Nothing is written here."""

import argparse
import os
import sys
from collections import Counter
from os.path import realpath  # unlike `Path.resolve`, not lost in a loop of links
from pathlib import Path
from typing import NamedTuple

from moeisr_basicsr.data.image_reader import SUFFIXES, is_image_name
from moeisr_basicsr.data.image_writer import FORMATS
from moeisr_basicsr.engine.distributed import process_number
from moeisr_basicsr.errors import UserError, did_you_mean, did_you_mean_file, printable


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
    output = Path(args.output)
    sources, left_out = find_sources(args.inputs, args.recursive, realpath(output))
    suffix = output.suffix.lower()
    is_file = suffix in FORMATS and not os.path.isdir(output)
    if is_file and (len(sources) > 1 or any(os.path.isdir(name) for name in args.inputs)):
        raise UserError(f'{output} is one file, but there are {len(sources)} images; name a folder after -o.')
    if is_file and args.ext not in (None, suffix[1:]):
        raise UserError(f'{output} and --ext {args.ext} contradict each other.')
    if not is_file and not os.path.exists(output) and 1 < len(suffix) <= 5:
        hint = did_you_mean(suffix, FORMATS)
        raise UserError(f"{output}: images are written as {', '.join(FORMATS)}; got '{suffix}'.{hint}")
    folder = output.parent if is_file else output
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not os.path.isdir(existing):
        raise UserError(f'{existing} is a file or a broken link, not a folder.')
    jobs = []
    for source, below in sources.items():
        target = output if is_file else output / below / f'{source.stem}_{factor_label(args)}.{args.ext or "png"}'
        jobs.append(Job(source, target, target.with_name(f'{target.stem}_experts.png') if args.expert_map else None))
    if args.resume:  # a folder may hold its own results by now
        results = {realpath(path) for job in jobs for path in job.outputs}
        jobs = [job for job in jobs if realpath(job.source) not in results]
    check_collisions(jobs)
    # Shared before a look at what exists: by then another process may have written its first files.
    rank, world_size = process_number()
    jobs = jobs[rank::world_size]
    if args.resume:
        jobs = [job for job in jobs if not all(map(os.path.exists, job.outputs))]
    present = [path for job in jobs for path in job.outputs if os.path.lexists(path)]
    if present and not args.overwrite and not args.resume:
        more = f' (and {len(present) - 1} more)' if len(present) > 1 else ''
        raise UserError(f'{present[0]}{more} already exists: give --overwrite to replace it, or --resume to leave it.')
    if left_out and os.environ.get('RANK', '0') == '0':
        told = ', '.join(f'{kind} {count}' for kind, count in left_out.most_common())
        print(printable(f'basicsr: note: left out: {told}.'), file=sys.stderr)
    return jobs


def find_sources(names: list[str], recursive: bool, output: str) -> tuple[dict[Path, Path], Counter[str]]:
    """The images that files and folders name, each once, and where each lies below the folder that was named.

    What a folder holds beside them is counted by its kind. The output folder is not searched.
    """
    sources: dict[str, tuple[Path, Path]] = {}
    left_out: Counter[str] = Counter()
    for path in map(Path, names):
        if os.path.isdir(path):
            found = images_below(path, recursive, output, left_out)
            if not found:
                where = 'in it or below it' if recursive else 'directly in it'
                raise UserError(f'{path} has no image {where} ({", ".join(SUFFIXES)}).')
        elif os.path.isfile(path):
            found = [path]
        else:
            hint = did_you_mean_file(path, lambda entry: entry.is_dir() or is_image_name(entry))
            raise UserError(f'there is no image or folder {path}.{hint}')
        folder = path if os.path.isdir(path) else path.parent
        for entry in found:  # a link of another name has its own output
            sources.setdefault(os.path.abspath(entry), (entry, entry.parent.relative_to(folder)))
    return dict(sources.values()), left_out


def images_below(folder: Path, recursive: bool, output: str, left_out: Counter[str]) -> list[Path]:
    """The images of a folder in order; what is none is counted in `left_out` by its kind. Hidden files are ignored."""

    def fail(error: OSError) -> None:
        raise error

    images = []
    for place, folders, files in os.walk(folder, onerror=fail):
        inner = [Path(place, name) for name in sorted(folders) if not name.startswith('.')]
        inner = [path for path in inner if realpath(path) != output]
        kind = 'linked folders' if recursive else 'subfolders (taken with --recursive)'
        left_out.update(kind for path in inner if path.is_symlink() or not recursive)
        folders[:] = [path.name for path in inner] if recursive else []  # `walk` goes into these, but for links
        entries = [Path(place, name) for name in sorted(files) if not name.startswith('.')]
        found = {path: is_image_name(path) and path.is_file() for path in entries}
        images += [path for path in entries if found[path]]
        left_out.update(path.suffix.lower() or 'without a suffix' for path in entries if not found[path])
    return images


def factor_label(args: argparse.Namespace) -> str:
    """How file names say the factor: 'x3.3', 'x2.5x4' (rows x columns), or '3840x2160' (width first)."""
    if args.scale is None:
        return f'{args.size[1]}x{args.size[0]}'
    rows, cols = (f'{factor:.6g}' for factor in args.scale)
    return f'x{rows}' if rows == cols else f'x{rows}x{cols}'


def check_collisions(jobs: list[Job]) -> None:
    """Whether every file that is written is a file of its own, and none of the inputs."""
    inputs = {realpath(job.source) for job in jobs}
    owners: dict[str, Path] = {}
    for job in jobs:
        for path in job.outputs:
            if realpath(path) in inputs:
                raise UserError(f'{path} is an input: it would be overwritten. Choose another name after -o.')
            other = owners.setdefault(realpath(path), job.source)
            if other != job.source:
                both = f'{other} and {job.source} would both become {path}'
                raise UserError(f'{both}; upscale them into different folders.')
