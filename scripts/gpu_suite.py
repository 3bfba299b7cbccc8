"""Every question that needs a GPU, in one call of a quarter of an hour: `python scripts/gpu_suite.py -o OUT`.

The parts, each in a process of its own with its own time limit, so that a failure costs only itself:

    kernels    the Triton kernels against the torch code, every decoder family
    decode     decode and whole upscale at x2, x4, x8 against LIIF's plain algorithm; the card's limits
    steps      seconds per training step: fp32, TF32, bf16, fp16 with its scaler, compiled, one process of nccl
    training   the paper's recipe and dense LIIF alternately, from the states in PACK, for the time that is left

OUT/gpu_suite.json has the results of all parts, rewritten after each. `--pack` makes the folder PACK on a machine with
network and images: training images as WebP, the packages that a bare machine with PyTorch lacks, and the states that an
earlier OUT brought back. `--device cpu --quick` runs everything in two minutes, so that nothing is tried for the first
time on the day a GPU is at hand.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / 'gpu_pack'  # git ignores it
# On the machines that we know these are missing; pip takes what else they need from there.
PACKAGES = ('basicsr', 'addict', 'future', 'lmdb', 'yapf', 'platformdirs', 'mmengine-lite', 'termcolor', 'spandrel')
PACKAGES += ('pydantic', 'pydantic-core', 'annotated-types', 'typing-inspection', 'typing-extensions')
PACKAGES += ('jsonschema', 'jsonschema-specifications', 'referencing', 'rpds-py', 'attrs')
IMAGES_MIB, STATE_MIB = 38, 15  # of PACK's images; of one file of a state in OUT
STEPS = {  # --force_yml of each way to train
    'fp32': ('train:tf32=false',),
    'tf32': ('train:tf32=true',),
    'bf16': ('train:tf32=true', 'train:amp=bf16'),
    'fp16': ('train:tf32=true', 'train:amp=fp16'),
    'bf16 channels_last': ('train:tf32=true', 'train:amp=bf16', 'train:channels_last=true'),
    'bf16 compiled': ('train:tf32=true', 'train:amp=bf16', 'train:compile=true'),
}
ROWS = ('moeisr_edsr', 'liif_edsr')  # trained with the time that is left
QUICK = ('network_g:encoder:num_feat=8', 'network_g:encoder:num_block=1', 'datasets:train:lq_size=16')
QUICK += ('datasets:train:sample_q=64', 'datasets:train:batch_size_per_gpu=2')


def main(argv: list[str] | None = None) -> int:
    """0 where every part ended well, else 1."""
    args = parse_arguments(argv)
    if args.pack is not None:
        pack(Path(args.pack), args.resume)
        return 0
    out = Path(args.output).resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), str(PACK / 'site'), os.environ.get('PYTHONPATH', '')])
    results: dict[str, dict] = {'environment': environment()}
    print(json.dumps(results['environment']), flush=True)
    ends = time.monotonic() + (100 if args.quick else args.seconds)
    for name, part, share in PARTS:
        if name not in args.parts:
            continue
        began, left = time.monotonic(), ends - time.monotonic()
        try:
            result = part(args, out, max(left if share is None else min(share * args.seconds, left), 1))
        except Exception as error:  # whatever a part does, the others go on
            result = {'failed': f'{type(error).__name__}: {error}'}
        results[name] = {**result, 'seconds': round(time.monotonic() - began, 1)}
        (out / 'gpu_suite.json').write_text(json.dumps(results, indent=1) + '\n')
        print(f'{name}: {json.dumps(results[name])}', flush=True)
    return int(any('failed' in result for result in results.values()))


def environment() -> dict:
    """What this machine has, the missing packages put in place from PACK first."""
    wheels = sorted(map(str, (PACK / 'wheels').glob('*.whl')))
    missing = [name for name in ('basicsr', 'mmengine', 'pydantic', 'jsonschema', 'lmdb', 'spandrel') if not has(name)]
    found = {'python': sys.version.split()[0], 'missing': missing, 'installed': False}
    if missing and wheels:
        target = ['--target', str(PACK / 'site'), '--no-index', '--no-deps', '--upgrade']
        found['installed'] = (
            subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', *target, *wheels]).returncode == 0
        )
    code = 'import json, moeisr_basicsr, torch; from moeisr_basicsr.analysis.environment import environment as e; '
    code += "d = 'cuda' if torch.cuda.is_available() else 'cpu'; print(json.dumps(e('', torch.device(d))))"
    return {**found, **json.loads(run([sys.executable, '-c', code], 120).splitlines()[-1])}


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def run(command: list[str], seconds: float, good: tuple[int, ...] = (0,), cwd: Path | None = None, **env: str) -> str:
    """The output of a command, which gets SIGTERM when its time is over and then half a minute to save.

    Raises:
        RuntimeError: Another exit code; with the end of the output.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env={**os.environ, **env}
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    if process.returncode not in good:
        raise RuntimeError(f'exit code {process.returncode} of {" ".join(command)}: {output[-1500:]}')
    return output


def kernels(args: argparse.Namespace, out: Path, seconds: float) -> dict:
    """tests/triton_cases.py on the GPU; without one in Triton's interpreter."""
    on_gpu = args.device == 'cuda'
    only = ['-k', 'route'] if args.quick else []
    command = [
        sys.executable,
        '-m',
        'pytest',
        '-q',
        '-p',
        'no:cacheprovider',
        '-p',
        'no:xdist',
        'triton_cases.py',
        *only,
    ]
    text = run(command, seconds, cwd=ROOT / 'tests', TRITON_INTERPRET=str(int(not on_gpu)), MOEISR_KERNELS='auto')
    return {'tests': text.strip().splitlines()[-1]}


def decode(args: argparse.Namespace, out: Path, seconds: float) -> dict:
    """scripts/benchmark_decode.py, and what its times mean on this card."""
    file = out / 'benchmark.json'
    size = (
        ['--lq-size', '24', '--scales', '2', '--repeats', '1']
        if args.quick
        else ['--lq-size', '512', '--scales', '2', '4', '8']
    )
    precisions = ['--precisions', 'fp32'] if args.device == 'cpu' else ['--precisions', 'fp32', 'bf16']
    command = [sys.executable, str(ROOT / 'scripts' / 'benchmark_decode.py'), '--device', args.device]
    run([*command, *size, *precisions, '--json', str(file)], seconds)
    rows = [row for row in json.loads(file.read_text())['rows'] if row.get('time_ms')]
    limits = card_limits(args.device)
    return {'limits': limits, 'rows': [roofline(row, limits) for row in rows]}


def card_limits(device: str) -> dict[str, float]:
    """What the card does at best: TFLOP/s of a bf16 (CPU: fp32) matrix product, GB/s of a copy."""
    import torch

    side, dtype = (8192, torch.bfloat16) if device == 'cuda' else (512, torch.float32)
    one, many = torch.rand(side, side, device=device).to(dtype), torch.empty(side * side * 8, device=device)
    seconds = {'product': timed(lambda: one @ one, device), 'copy': timed(lambda: many.clone(), device)}
    return {'tflops': 2e-12 * side**3 / seconds['product'], 'gb_per_s': 2e-9 * many.nbytes / seconds['copy']}


def timed(work: Callable[[], object], device: str) -> float:
    """Median seconds of ten runs."""
    import torch

    times = []
    for _ in range(12):
        began = time.perf_counter()
        work()
        if device == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[2:])[5]


def roofline(row: dict, limits: dict[str, float]) -> dict:
    """A benchmark's row with the arithmetic it did, and the share of the card's best that this is."""
    pixels, macs = row['size'][0] * row['size'][1], (row.get('macs') or {}).get('total')
    kept = {key: row[key] for key in ('case', 'scale', 'size', 'ratio', 'difference', 'time_ms') if key in row}
    if macs is None:
        return kept
    tflops = 2e-12 * macs * pixels / (row['time_ms']['total'] / 1e3)
    return {**kept, 'tflops': tflops, 'of_the_card': tflops / limits['tflops']}


def steps(args: argparse.Namespace, out: Path, seconds: float) -> dict:
    """Seconds per iteration of short real trainings."""
    ends, found = time.monotonic() + seconds, {}
    ways = {**STEPS, 'bf16 nccl': ('train:tf32=true', 'train:amp=bf16')} if args.device == 'cuda' else {'fp32': ()}
    for name, changes in ways.items():
        launcher = 'nccl' in name
        python = ['-m', 'torch.distributed.run', '--nproc_per_node=1'] if launcher else []
        extra = ['--launcher', 'pytorch'] if launcher else []
        total = 4 if args.quick else 120
        try:
            train(
                args,
                out,
                f'steps_{name.replace(" ", "_")}',
                'moeisr_edsr',
                ends - time.monotonic(),
                total,
                changes,
                python,
                extra,
            )
            lines = (out / 'experiments' / f'steps_{name.replace(" ", "_")}' / 'metrics.jsonl').read_text().splitlines()
            found[name] = json.loads(lines[-1])['time_s']  # of the last interval: compiling and warming up are over
        except (RuntimeError, OSError) as error:
            found[name] = str(error)[-400:]
    return {
        'seconds_per_iteration': found,
        **({} if any(isinstance(v, float) for v in found.values()) else {'failed': 'all'}),
    }


def train(
    args: argparse.Namespace,
    out: Path,
    name: str,
    options: str,
    seconds: float,
    total: int,
    changes: tuple[str, ...] = (),
    python: list[str] | tuple = (),
    extra: list[str] | tuple = (),
    resume: bool = False,
) -> None:
    """A training of options/`options`.yml on PACK's images, below OUT/experiments; SIGTERM saves it."""
    forced = [f'name={name}', f'train:total_iter={total}', 'val=none', f'datasets:train:dataroot_gt={images(args)}']
    forced += ['datasets:train:io_backend={type: disk}', 'datasets:train:cache=memory', 'logger:use_tb_logger=false']
    forced += ['datasets:train:num_worker_per_gpu=0' if args.quick else 'datasets:train:num_worker_per_gpu=12']
    forced += [
        f'logger:print_freq={max(total // 4, 1) if total < 1000 else 100}',
        *changes,
        *(QUICK if args.quick else ()),
    ]
    command = [
        sys.executable,
        *python,
        '-m',
        'moeisr_basicsr',
        'train',
        '-opt',
        str(ROOT / 'options' / f'{options}.yml'),
    ]
    command += [*extra, *(['--auto_resume'] if resume else []), '--force_yml', *forced]
    run(command, max(seconds, 1), (0, 143), out)


def images(args: argparse.Namespace) -> Path:
    """PACK's training images; on a trial those that come with the repository."""
    packed = PACK / 'images'
    return packed if packed.is_dir() else ROOT / 'assets' / 'quickstart' / 'train'


def training(args: argparse.Namespace, out: Path, seconds: float) -> dict:
    """Train `ROWS` alternately, each from its state in PACK; the newest states in files that can be carried."""
    found: dict = {}
    for row in ROWS:
        models = out / 'experiments' / row
        if (PACK / 'states' / row).is_dir() and not models.exists():
            join_parts(PACK / 'states' / row, models)
        began = time.monotonic()
        total = 4 if args.quick else 1_000_000
        train(args, out, row, row, seconds / len(ROWS) - 20, total, resume=models.exists())
        states = sorted((models / 'training_states').glob('*.state'), key=lambda path: int(path.stem))
        if not states:
            raise RuntimeError(f'{row}: nothing was saved')
        iteration = states[-1].stem
        found[row] = {'iteration': int(iteration), 'seconds': round(time.monotonic() - began, 1)}
        split_parts([states[-1], models / 'models' / f'net_g_{iteration}.pth'], out / f'state_{row}')
    return found


def split_parts(files: list[Path], folder: Path) -> None:
    """Cut files into pieces that a lent machine gives back."""
    folder.mkdir(exist_ok=True)
    for file in files:
        content, size = file.read_bytes(), STATE_MIB << 20
        for part, start in enumerate(range(0, len(content), size)):
            (folder / f'{file.name}.{part}').write_bytes(content[start : start + size])


def join_parts(folder: Path, experiment: Path) -> None:
    """Put pieces together again, in the folders of an experiment."""
    for first in sorted(folder.glob('*.0')):
        place = experiment / ('training_states' if first.stem.endswith('.state') else 'models')
        place.mkdir(parents=True, exist_ok=True)
        parts = sorted(folder.glob(f'{first.stem}.*'), key=lambda path: int(path.suffix[1:]))
        (place / first.stem).write_bytes(b''.join(part.read_bytes() for part in parts))


def pack(data: Path, resume: Path | None) -> None:
    """Make PACK: images below `data` as WebP, wheels, and the states of an earlier OUT."""
    sys.path[:0] = [str(ROOT), str(ROOT / 'scripts')]
    from make_training_set import find_jobs
    from PIL import Image

    shutil.rmtree(PACK, ignore_errors=True)
    (PACK / 'images').mkdir(parents=True)
    limit, used = IMAGES_MIB << 20, 0
    for number, job in enumerate(find_jobs(data)):
        with Image.open(job.path) as image:
            image = image.convert('RGB')
            shrink = getattr(job, 'jpeg_shrink', 1) or 1
            image = image.resize([max(round(side / shrink), 1) for side in image.size], Image.Resampling.LANCZOS)
            file = PACK / 'images' / f'{number:04}.webp'
            image.save(file, quality=90)
        used += file.stat().st_size
        if used > limit:
            file.unlink()
            break
    versions = dict(
        line.split(';')[0].strip().split('==')
        for line in (ROOT / 'requirements.txt').read_text().splitlines()
        if '==' in line
    )
    wanted = [f'{name}=={versions[name]}' if name in versions else name for name in PACKAGES]
    wheels = [
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '-q',
        '--no-deps',
        '--no-build-isolation',
        '-w',
        str(PACK / 'wheels'),
    ]
    subprocess.run([*wheels, *wanted], check=True)
    for row in ROWS if resume else ():
        if (folder := resume / f'state_{row}').is_dir():
            shutil.copytree(folder, PACK / 'states' / row)
    size = sum(path.stat().st_size for path in PACK.rglob('*') if path.is_file())
    print(f'{PACK}: {size / 2**20:.1f} MiB')


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-o', '--output', help='folder for results, states and logs')
    parser.add_argument('--seconds', type=float, default=560, help='for everything (default 560)')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--quick', action='store_true', help='a trial of every part, two minutes')
    parser.add_argument(
        '--parts', nargs='+', choices=[name for name, *_ in PARTS], default=[name for name, *_ in PARTS]
    )
    parser.add_argument('--pack', metavar='DATA', help='make PACK from the images below DATA, and stop')
    parser.add_argument(
        '--resume', type=Path, metavar='OUT', help='with --pack: take the states of this earlier OUT along'
    )
    args = parser.parse_args(argv)
    if args.pack is None and args.output is None:
        parser.error('give -o OUT, or --pack DATA')
    return args


# name, function, most of --seconds that it may take; None: what is left
PARTS = (('kernels', kernels, 0.2), ('decode', decode, 0.25), ('steps', steps, 0.25), ('training', training, None))

if __name__ == '__main__':
    sys.exit(main())
