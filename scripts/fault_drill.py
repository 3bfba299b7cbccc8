"""Break training on purpose, and print what survives: the long form of the fault tests.

    python scripts/fault_drill.py
    python scripts/fault_drill.py --images datasets/DIV2K/valid_HR --kills 20 --only kill ranks

Trains a tiny network in processes of its own and kills them, cuts off checkpoints, fills the disk, and hands in hostile
files. Every row says what came of it; the exit code is 1 if one of them failed. About 10 minutes on 2 cores.
"""

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a checkout that is not installed

import torch  # noqa: E402
import yaml  # noqa: E402

TRAIN_IMAGES, VAL_IMAGES = 8, 2
LIMIT_S = 300  # no single attempt may take longer
# Stands in for a full disk where no small file system can be mounted: after so many bytes, checkpoints fail.
FULL_DISK = """
import errno, os, sys
from moeisr_basicsr import atomic_file
room, whole_open = [int(sys.argv[1])], open
def small_open(path, mode):
    room[0] -= 100_000
    if room[0] < 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return whole_open(path, mode)
atomic_file.open = small_open
from moeisr_basicsr.cli import main
sys.exit(main(sys.argv[2:]))
"""


class Drill:
    """The faults, on one set of images.

    Args:
        work: Folder for the runs.
        images: HR images.
        iterations: Length of a run.
        kills: Number of random SIGKILLs.
        seed: Of the random moments and lengths.
    """

    def __init__(self, work: Path, images: list[Path], iterations: int, kills: int, seed: int):
        self.work = work
        self.iterations = iterations
        self.kills = kills
        self.random = random.Random(seed)
        self.folder = images[0].parent
        for name, part in (('train', images[:TRAIN_IMAGES]), ('val', images[-VAL_IMAGES:])):
            (work / f'{name}.txt').write_text(''.join(f'{path.name} (0,0,3)\n' for path in part))

    def options(self, name: str, batch: int = 4, **train: object) -> Path:
        """The options file of a run: two loader workers, EMA, checkpoints off the epoch's end."""
        dataset = {'type': 'ArbitraryScaleImageDataset', 'dataroot_gt': str(self.folder)}
        encoder = {'type': 'EDSREncoder', 'num_feat': 8, 'num_block': 1}
        options = {
            'name': name,
            'model_type': 'MoEISRModel',
            'num_gpu': 0,
            'manual_seed': 1,
            'network_g': {
                'type': 'MoEISR',
                'encoder': encoder,
                'experts': [[8], [8, 8]],
                'mapper': {'num_layers': 1, 'num_feat': 8, 'hidden': 8},
            },
            'datasets': {
                'train': {
                    **dataset,
                    'name': 'train',
                    'meta_info_file': str(self.work / 'train.txt'),
                    'lq_size': 16,
                    'sample_q': 256,
                    'batch_size_per_gpu': batch,
                    'num_worker_per_gpu': 2,
                    'dataset_enlarge_ratio': 9,
                },
                'val': {**dataset, 'name': 'val', 'meta_info_file': str(self.work / 'val.txt'), 'scale': 3.3},
            },
            'path': {},
            'train': {
                'total_iter': self.iterations,
                'ema_decay': 0.99,
                'warmup_iter': 20,
                'optim_g': {'type': 'AdamW', 'lr': 1e-3},
                'scheduler': {'type': 'CosineAnnealingLR', 'T_max': self.iterations},
                'pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': 'mean'},
                'balance_opt': {'type': 'MoEBalanceLoss', 'loss_weight': 0.1},
                'temperature': {'type': 'cosine', 'start': 5.0, 'end': 1.0, 'total_iter': self.iterations},
                **train,
            },
            'val': {'val_freq': 60, 'metrics': {'psnr': {'type': 'calculate_psnr_sr'}}},
            'logger': {'print_freq': 1, 'save_checkpoint_freq': 7},
        }
        path = self.work / f'{name}.yml'
        path.write_text(yaml.safe_dump(options, sort_keys=False))
        return path

    def start(
        self, name: str, *arguments: str, ranks: int = 1, restarts: int = 0, folder: Path | None = None
    ) -> subprocess.Popen:
        """`basicsr train` in a process group of its own, with its experiments below `folder`."""
        torchrun = [
            '-m',
            'torch.distributed.run',
            f'--nproc_per_node={ranks}',
            f'--max-restarts={restarts}',
            '--rdzv-backend=c10d',
            '--rdzv-endpoint=localhost:0',
        ]
        command = [
            sys.executable,
            *(torchrun if ranks > 1 else []),
            '-m',
            'moeisr_basicsr',
            'train',
            '-opt',
            str(self.work / f'{name}.yml'),
            *(['--launcher', 'pytorch'] if ranks > 1 else []),
            *arguments,
        ]
        with open(self.work / f'{name}.out', 'a') as output:
            return subprocess.Popen(
                command,
                cwd=folder or self.work,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=environment(),
            )

    def run(self, name: str, *arguments: str, ranks: int = 1, folder: Path | None = None) -> int:
        """The same, to its end: the exit code."""
        process = self.start(name, *arguments, ranks=ranks, folder=folder)
        try:
            return process.wait(LIMIT_S)
        finally:
            end(process)

    def experiment(self, name: str) -> Path:
        """Its folder."""
        return self.work / 'experiments' / name

    def progress(self, name: str) -> int:
        """The last iteration that the run has told of."""
        path = self.experiment(name) / 'metrics.jsonl'
        whole = path.read_text().rpartition('\n')[0] if path.is_file() else ''  # the last line may be half written
        return json.loads(whole.rpartition('\n')[2])['iter'] if whole else 0

    def same_weights(self, name: str, other: str) -> bool:
        """Whether two runs ended with the same bits, in the weights and in their average."""
        one, two = (
            torch.load(self.experiment(run) / 'models' / f'net_g_{self.iterations}.pth', weights_only=True)
            for run in (name, other)
        )
        return all(
            torch.equal(one[part][key], two[part][key]) for part in ('params', 'params_ema') for key in one[part]
        )

    def reference(self) -> str:
        """A run that nothing disturbs; trained once."""
        if not self.experiment('reference').is_dir():
            self.options('reference')
            check(self.run('reference') == 0, 'the undisturbed run failed')
        return 'reference'

    def kill(self) -> str:
        """SIGKILL at random moments: of start-up, of a step, of a save, of validation."""
        reference = self.reference()
        self.options('killed')
        moments = []
        span = max(1, 6 * self.iterations // (5 * self.kills))
        while len(moments) < self.kills:
            process = self.start('killed', '--auto_resume')
            target = self.progress('killed') + self.random.randint(0, span)
            began = time.monotonic()
            if self.random.random() < 0.2:
                time.sleep(self.random.uniform(0.5, 4))
            else:
                while process.poll() is None and self.progress('killed') < min(target, self.iterations - 1):
                    time.sleep(0.005)
                time.sleep(self.random.uniform(0, 0.2))
            check(time.monotonic() - began < LIMIT_S, 'a restarted run does not get ahead')
            if process.poll() is not None:
                check(process.returncode == 0, f'a restarted run ended with code {process.returncode}')
                break
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            moments.append(self.progress('killed'))
        check(len(moments) == self.kills, f'the run ended after {len(moments)} kills; give more --iterations')
        check(self.run('killed', '--auto_resume') == 0, 'the last restart failed')
        check(self.same_weights('killed', reference), 'the final weights differ')
        return f'{len(moments)} kills, at iterations {moments}: final weights and EMA bit-identical'

    def ranks(self) -> str:
        """One of two ranks killed, under torchrun --max-restarts."""
        for name in ('ranks_reference', 'ranks_killed'):
            self.options(name, batch=2)
        check(self.run('ranks_reference', ranks=2) == 0, 'the undisturbed run failed')
        process = self.start('ranks_killed', ranks=2, restarts=3)
        try:
            self.wait_for(process, 'ranks_killed', self.iterations // 3)
            victim = self.random.choice(children(process.pid))
            os.kill(victim, signal.SIGKILL)
            check(process.wait(LIMIT_S) == 0, f'torchrun ended with code {process.returncode}')
        finally:
            end(process)
        check(self.same_weights('ranks_killed', 'ranks_reference'), 'the final weights differ')
        return 'torchrun restarted both ranks, the run finished, final weights and EMA bit-identical'

    def wait_for(self, process: subprocess.Popen, name: str, iteration: int) -> None:
        """Until the run has reached an iteration."""
        limit = time.monotonic() + LIMIT_S
        while self.progress(name) < iteration:
            check(process.poll() is None and time.monotonic() < limit, f'{name} does not reach iteration {iteration}')
            time.sleep(0.01)

    def truncated(self) -> str:
        """The newest checkpoint, its state or its weights, cut off at ten lengths, and empty."""
        reference = self.experiment(self.reference())
        lengths = []
        for place in range(11):
            name = f'truncated_{place}'
            self.options(name)
            shutil.copytree(reference, self.experiment(name))
            victim = self.experiment(name) / ('training_states' if place % 2 == 0 else 'models')
            victim /= f'{self.iterations}.state' if place % 2 == 0 else f'net_g_{self.iterations}.pth'
            whole = victim.read_bytes()
            lengths.append(self.random.randrange(1, len(whole)) if place else 0)
            victim.write_bytes(whole[: lengths[-1]])
            check(self.run(name, '--auto_resume') == 0, f'cut at {lengths[-1]}: the run failed')
            output = (self.work / f'{name}.out').read_text()
            check('is not usable, going back' in output, f'cut at {lengths[-1]}: nothing was reported')
            check(self.same_weights(name, 'reference'), f'cut at {lengths[-1]}: the final weights differ')
        return f'state or weights cut at {lengths} bytes: reported, the one before used, same final weights'

    def full_disk(self) -> str:
        """No room for a checkpoint: a tmpfs of 1 MiB where one can be mounted, else an injected ENOSPC."""
        name, small = 'full_disk', self.work / 'small'
        self.options(name)
        small.mkdir()
        mounted = (
            subprocess.run(
                ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(small)], capture_output=True
            ).returncode
            == 0
        )
        try:
            if mounted:
                (small / 'ballast').write_bytes(bytes(500_000))
                code = self.run(name, '--force_yml', 'logger:keep_checkpoints=0', folder=small)
            else:
                command = [sys.executable, '-c', FULL_DISK, '1000000', 'train', '-opt', str(self.work / f'{name}.yml')]
                done = subprocess.run(command, cwd=small, env=environment(), capture_output=True, text=True)
                (self.work / f'{name}.out').write_text(done.stdout + done.stderr)
                code = done.returncode
            output = (self.work / f'{name}.out').read_text()
            check(code == 1, f'the run ended with code {code}')
            check('No space left on device' in output and 'Traceback' not in output, 'the error is not clear')
            kept = list((small / 'experiments' / name / 'training_states').glob('*.state'))
            for path in kept:
                torch.load(path, weights_only=True)
                torch.load(path.parent.parent / 'models' / f'net_g_{path.stem}.pth', weights_only=True)
            check(bool(kept), 'no checkpoint was written before the disk was full')
        finally:
            if mounted:
                subprocess.run(['umount', str(small)], check=False)
        return (
            f'{"tmpfs of 1 MiB" if mounted else "injected ENOSPC"}: exit code 1, one clear line, '
            f'{len(kept)} older checkpoints intact'
        )

    def processes(self) -> str:
        """One process with a batch of 4 against two with a batch of 2."""
        largest = 0.0
        for accumulate in (1, 2):
            lines = []
            for ranks in (1, 2):
                name = f'processes_{ranks}_{accumulate}'
                self.options(name, batch=4 // ranks, total_iter=20, accumulate=accumulate)
                check(self.run(name, ranks=ranks) == 0, f'{name} failed')
                text = (self.experiment(name) / 'metrics.jsonl').read_text()
                lines.append([json.loads(line) for line in text.splitlines()])
            for one, two in zip(*lines):
                values = one['metrics'] if one['kind'] == 'validation' else one
                others = two['metrics'] if one['kind'] == 'validation' else two
                largest = max(
                    [largest]
                    + [abs(values[key] - others[key]) for key in values if key in ('psnr', 'l_pix', 'l_balance')]
                )
        check(largest < 1e-5, f'losses differ by {largest:.1e}')
        return f'20 losses and the validation after them differ by at most {largest:.1e}, also in two parts per batch'

    def signals(self) -> str:
        """SIGTERM and SIGINT, to one process and to torchrun; then the run goes on to its end."""
        reference, found = self.reference(), []
        for number in (signal.SIGTERM, signal.SIGINT):
            name = f'signal_{number.name}'
            self.options(name)
            process = self.start(name)
            self.wait_for(process, name, self.random.randint(5, self.iterations - 5))
            os.killpg(process.pid, number)  # loader workers get it too, as from a terminal
            code = process.wait(LIMIT_S)
            end(process)
            check(code == 128 + number, f'{number.name}: exit code {code}')
            check(self.run(name, '--auto_resume') == 0, f'{number.name}: the restart failed')
            check(self.same_weights(name, reference), f'{number.name}: the final weights differ')
            found.append(f'{number.name} {code}')
        return f'saved after the step, exit codes {", ".join(found)}, resumed to the same bits'

    def hostile(self) -> str:
        """YAML tags, --force_yml and pickles that would run code."""
        marker = self.work / 'executed'
        plain, tagged = self.options('hostile'), self.work / 'tagged.yml'
        tagged.write_text(f'name: !!python/object/apply:os.mkdir ["{marker}"]\n' + plain.read_text())
        torch.save({'params': Bomb(marker), 'iter': 1}, self.work / 'bomb.pth')
        (self.work / 'bomb.state').write_bytes(pickle.dumps({'iter': 1, 'optimizers': Bomb(marker)}))
        force = ['-opt', str(plain), '--force_yml']
        code = f'__import__("os").mkdir("{marker}")'
        cases = {
            'YAML tag': ['-opt', str(tagged)],
            '--force_yml': [*force, f'name"]={code}#=1'],
            '--force_yml value': [*force, f'datasets:train:scale_range=[{code}]'],
            'weights': [*force, f'path:pretrain_network_g={self.work}/bomb.pth'],
            'resume state': [*force, f'path:resume_state={self.work}/bomb.state'],
        }
        for what, arguments in cases.items():
            done = subprocess.run(
                [sys.executable, '-m', 'moeisr_basicsr', 'train', *arguments],
                cwd=self.work,
                env=environment(),
                capture_output=True,
                text=True,
            )
            check(not marker.exists(), f'{what}: code was run')
            check(done.returncode == 2 and 'Traceback' not in done.stderr, f'{what}: exit code {done.returncode}')
            errors = [line for line in done.stderr.splitlines() if line.startswith('basicsr: error')]
            check(len(errors) == 1, f'{what}: no single clear line')
        return f'{", ".join(cases)}: nothing ran, one clear line, exit code 2'


FAULTS: dict[str, tuple[str, Callable[[Drill], str]]] = {
    'kill': ('SIGKILL at random moments, --auto_resume each time', Drill.kill),
    'ranks': ('one of two ranks SIGKILLed under torchrun --max-restarts', Drill.ranks),
    'truncated': ('newest checkpoint truncated or empty', Drill.truncated),
    'full_disk': ('disk full while saving', Drill.full_disk),
    'processes': ('1 against 2 processes', Drill.processes),
    'signals': ('SIGTERM, SIGINT', Drill.signals),
    'hostile': ('hostile YAML, --force_yml, weights, resume state', Drill.hostile),
}


class Failed(Exception):
    """A fault was not survived."""


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def check(passed: bool, message: str) -> None:
    if not passed:
        raise Failed(message)


def environment() -> dict[str, str]:
    """One thread per process: more than two processes share the cores, and sums depend on the number of threads."""
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}


def children(pid: int) -> list[int]:
    """The training processes that torchrun, process `pid`, has started."""
    listed = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]


def end(process: subprocess.Popen) -> None:
    """Leave nothing of a process group that this script started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def synthetic_images(folder: Path) -> list[Path]:
    """Smooth random images, for a drill without photographs."""
    import cv2
    import numpy as np

    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = [folder / f'{number:02}.png' for number in range(TRAIN_IMAGES + VAL_IMAGES)]
    for path in paths:
        coarse = rng.integers(0, 256, (15, 20, 3)).astype(np.float32)
        image = cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(path), image.clip(0, 255).round().astype(np.uint8))
    return paths


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--images', type=Path, help='folder of PNG or JPEG photographs; made-up images without it')
    parser.add_argument('--work', type=Path, help='where the runs go; without it a temporary folder')
    parser.add_argument('--kills', type=int, default=20, help='number of random SIGKILLs')
    parser.add_argument('--iterations', type=int, default=150, help='length of a run')
    parser.add_argument('--seed', type=int, default=0, help='of the random moments and lengths')
    parser.add_argument('--only', nargs='+', choices=sorted(FAULTS), default=list(FAULTS), help='faults to try')
    return parser.parse_args()


def main() -> int:
    """Run the drill and print its table."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if args.images is None:
            images = synthetic_images(work / 'images')
        else:
            images = sorted(
                path.resolve() for path in args.images.iterdir() if path.suffix.lower() in ('.png', '.jpg', '.jpeg')
            )
        if len(images) < TRAIN_IMAGES + VAL_IMAGES:
            print(f'{args.images}: at least {TRAIN_IMAGES + VAL_IMAGES} images are needed.', file=sys.stderr)
            return 2
        drill = Drill(work, images, args.iterations, args.kills, args.seed)
        rows = []
        for name in args.only:
            title, fault = FAULTS[name]
            began = time.monotonic()
            print(f'{title} ...', file=sys.stderr, flush=True)
            try:
                rows.append((title, 'passed', fault(drill), time.monotonic() - began))
            except (Failed, subprocess.TimeoutExpired) as error:
                rows.append((title, 'FAILED', str(error), time.monotonic() - began))
    print('| fault | | figure | s |\n|---|---|---|---|')
    for title, verdict, figure, seconds in rows:
        print(f'| {title} | {verdict} | {figure} | {seconds:.0f} |')
    return int(any(verdict == 'FAILED' for _, verdict, _, _ in rows))


if __name__ == '__main__':
    sys.exit(main())
