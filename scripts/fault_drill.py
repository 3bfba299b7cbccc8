"""Break training on purpose, and print what survives: the long form of the fault tests.

    python scripts/fault_drill.py
    python scripts/fault_drill.py --kills 20 --only kill ranks

Trains a tiny network in processes of its own and kills them, cuts off checkpoints, fills the disk, damages images.
Every row says what came of it; the exit code is 1 if one of them failed. About 10 minutes on 2 cores.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 300  # no single attempt may take longer
NETWORK = """
name: NAME
model_type: MoEISRModel
num_gpu: 0
manual_seed: 1
network_g:
  type: MoEISR
  encoder: {type: EDSREncoder, num_feat: 8, num_block: 1}
  experts: [[8], [8, 8]]
  mapper: {num_layers: 1, num_feat: 8}
"""
# Two loader workers, EMA, checkpoints off the epoch's end
OPTIONS = (
    NETWORK
    + """datasets:
  train: {type: ArbitraryScaleImageDataset, name: train, dataroot_gt: WORK/train, lq_size: 16, sample_q: 256,
          batch_size_per_gpu: BATCH, num_worker_per_gpu: 2, dataset_enlarge_ratio: 9}
  val: {type: ArbitraryScaleImageDataset, name: val, dataroot_gt: WORK/val, scale: 3.3}
path: {}
train:
  total_iter: ITERATIONS
  tau: [5.0, 1.0]
  ema_decay: 0.99
  warmup_iter: 20
  optim_g: {type: AdamW, lr: !!float 1e-3}
  scheduler: {type: CosineAnnealingLR, T_max: ITERATIONS}
  pixel_opt: {type: L1Loss, loss_weight: 1.0, reduction: mean}
  balance_opt: {type: MoEBalanceLoss, loss_weight: 0.1}
val: {val_freq: 60, metrics: {psnr: {type: calculate_psnr_sr}}}
logger: {print_freq: 1, save_checkpoint_freq: 7}
"""
)
TEST_OPTIONS = (
    NETWORK
    + """datasets:
  test: {type: ArbitraryScaleImageDataset, name: x2, dataroot_gt: WORK/train, scale: 2}
  test_2: {type: ArbitraryScaleImageDataset, name: x3.3, dataroot_gt: WORK/train, scale: 3.3}
  test_3: {type: ArbitraryScaleImageDataset, name: x4, dataroot_gt: WORK/train, scale: 4}
path: {pretrain_network_g: WORK/experiments/reference/models/net_g_latest.pth}
val: {metrics: {psnr: {type: calculate_psnr_sr}}}
"""
)
# Stands in for a full disk: after some checkpoints, those that follow fail.
FULL_DISK = """
import errno, os, sys
from moeisr_basicsr import atomic_file
room, whole_open = [4], open
def small_open(path, mode):
    room[0] -= 1
    if room[0] < 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return whole_open(path, mode)
atomic_file.open = small_open
from moeisr_basicsr.cli import main
sys.exit(main(sys.argv[1:]))
"""


class Failed(Exception):
    """A fault was not survived."""


class Drill:
    """The faults.

    Args:
        work: Folder for the runs and their images.
        iterations: Length of a run.
        kills: Number of random SIGKILLs.
        seed: Of the random moments and lengths.
    """

    def __init__(self, work: Path, iterations: int, kills: int, seed: int):
        self.work, self.iterations, self.kills, self.random = work, iterations, kills, random.Random(seed)
        for folder, count in (('train', 8), ('val', 2)):
            smooth_images(work / folder, count)

    def options(self, name: str, batch: int = 4, text: str = OPTIONS) -> Path:
        """The options file of a run."""
        path = self.work / f'{name}.yml'
        values = {'NAME': name, 'WORK': self.work, 'BATCH': batch, 'ITERATIONS': self.iterations}
        for key, value in values.items():
            text = text.replace(key, str(value))
        path.write_text(text)
        return path

    @contextmanager
    def started(
        self, name: str, *arguments: str, ranks: int = 1, code: str = '', verb: str = 'train'
    ) -> Iterator[subprocess.Popen]:
        """`basicsr train` in a process group of its own, or `code` that does so; nothing of it is left afterwards."""
        program = ['-m', 'moeisr_basicsr'] if not code else ['-c', code]
        if ranks > 1:
            rendezvous = ['--rdzv-backend=c10d', '--rdzv-endpoint=localhost:0', '--max-restarts=3']
            program = ['-m', 'torch.distributed.run', f'--nproc_per_node={ranks}', *rendezvous, *program]
        command = [sys.executable, *program, verb, '-opt', str(self.work / f'{name}.yml'), *arguments]
        with open(self.work / f'{name}.out', 'a') as out:
            where = {'cwd': self.work, 'env': environment(), 'start_new_session': True}
            process = subprocess.Popen(command, stdout=out, stderr=out, **where)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def run(self, name: str, *arguments: str, **more) -> int:
        """The same, to its end: the exit code."""
        with self.started(name, *arguments, **more) as process:
            return process.wait(LIMIT_S)

    def output(self, name: str) -> str:
        """What a run has printed."""
        return (self.work / f'{name}.out').read_text()

    def lines(self, name: str) -> list[dict]:
        """The metrics that a run has told of."""
        path = self.work / 'experiments' / name / 'metrics.jsonl'
        whole = path.read_text().rpartition('\n')[0] if path.is_file() else ''  # the last line may be half written
        return [json.loads(line) for line in whole.splitlines()]

    def progress(self, name: str) -> int:
        """The last iteration that a run has told of."""
        return max((line['iter'] for line in self.lines(name)), default=0)

    def wait_for(self, process: subprocess.Popen, name: str, iteration: int) -> None:
        """Until the run has reached an iteration."""
        limit = time.monotonic() + LIMIT_S
        while self.progress(name) < iteration:
            check(process.poll() is None and time.monotonic() < limit, f'{name} does not reach iteration {iteration}')
            time.sleep(0.01)

    def check_same(self, name: str, other: str) -> None:
        """The final weights and their averages are bit-identical."""
        file = Path('models') / f'net_g_{self.iterations}.pth'
        one, two = (torch.load(self.work / 'experiments' / run / file, weights_only=True) for run in (name, other))
        parts = [(one[part][key], two[part][key]) for part in ('params', 'params_ema') for key in one[part]]
        check(all(torch.equal(*pair) for pair in parts), f'the final weights of {name} differ')

    def reference(self) -> str:
        """A run that nothing disturbs; trained once."""
        if not (self.work / 'experiments' / 'reference').is_dir():
            self.options('reference')
            check(self.run('reference') == 0, 'the undisturbed run failed')
        return 'reference'

    def kill(self) -> str:
        """SIGKILL at random moments of start-up, step, save, validation; --auto_resume each time"""
        reference, moments = self.reference(), []
        self.options('killed')
        span = max(1, 6 * self.iterations // (5 * self.kills))
        while len(moments) < self.kills:
            with self.started('killed', '--auto_resume') as process:
                target = self.progress('killed') + self.random.randint(0, span)
                if self.random.random() < 0.2:
                    time.sleep(self.random.uniform(0.5, 4))
                else:
                    self.wait_for(process, 'killed', min(target, self.iterations - 1))
                    time.sleep(self.random.uniform(0, 0.2))
                check(process.poll() is None, f'the run ended after {len(moments)} kills; give more --iterations')
            moments.append(self.progress('killed'))
        check(self.run('killed', '--auto_resume') == 0, 'the last restart failed')
        self.check_same('killed', reference)
        return f'{len(moments)} kills, at iterations {moments}: final weights and EMA bit-identical'

    def ranks(self) -> str:
        """one of two ranks SIGKILLed under torchrun --max-restarts"""
        for name in ('ranks_reference', 'ranks_killed'):
            self.options(name, batch=2)
        check(self.run('ranks_reference', ranks=2) == 0, 'the undisturbed run failed')
        with self.started('ranks_killed', ranks=2) as process:
            self.wait_for(process, 'ranks_killed', self.iterations // 3)
            listed = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(process.pid)], capture_output=True, text=True)
            os.kill(int(self.random.choice(listed.stdout.split())), signal.SIGKILL)
            check(process.wait(LIMIT_S) == 0, f'torchrun ended with code {process.returncode}')
        self.check_same('ranks_killed', 'ranks_reference')
        return 'torchrun restarted both ranks, the run finished, final weights and EMA bit-identical'

    def truncated(self) -> str:
        """newest checkpoint, its state or its weights, empty or cut off at ten lengths"""
        reference, lengths = self.work / 'experiments' / self.reference(), []
        for place in range(11):
            name = f'truncated_{place}'
            self.options(name)
            folder = Path(shutil.copytree(reference, reference.with_name(name)))
            states, models = f'training_states/{self.iterations}.state', f'models/net_g_{self.iterations}.pth'
            victim = folder / (models if place % 2 else states)
            whole = victim.read_bytes()
            lengths.append(self.random.randrange(1, len(whole)) if place else 0)
            victim.write_bytes(whole[: lengths[-1]])
            check(self.run(name, '--auto_resume') == 0, f'cut at {lengths[-1]}: the run failed')
            check('is not usable, going back' in self.output(name), f'cut at {lengths[-1]}: nothing was reported')
            self.check_same(name, 'reference')
        return f'state or weights cut at {lengths} bytes: reported, the one before used, same final weights'

    def full_disk(self) -> str:
        """disk full while saving (injected ENOSPC)"""
        self.options('full_disk')
        check(self.run('full_disk', code=FULL_DISK) == 1, 'the run did not end with code 1')
        output = self.output('full_disk')
        check('No space left on device' in output and 'Traceback' not in output, 'the error is not clear')
        folder = self.work / 'experiments' / 'full_disk'
        kept = list(folder.glob('training_states/*.state'))
        for path in kept:
            torch.load(path, weights_only=True)
            torch.load(folder / 'models' / f'net_g_{path.stem}.pth', weights_only=True)
        check(bool(kept), 'no checkpoint was written before the disk was full')
        return f'exit code 1, one clear line, {len(kept)} older checkpoints intact'

    def signals(self) -> str:
        """SIGTERM and SIGINT, then --auto_resume"""
        reference, found = self.reference(), []
        for number in (signal.SIGTERM, signal.SIGINT):
            name = f'signal_{number.name}'
            self.options(name)
            with self.started(name) as process:
                self.wait_for(process, name, self.random.randint(5, self.iterations - 5))
                os.killpg(process.pid, number)  # loader workers get it too, as from a terminal
                code = process.wait(LIMIT_S)
            check(code == 128 + number, f'{number.name}: exit code {code}')
            check(self.run(name, '--auto_resume') == 0, f'{number.name}: the restart failed')
            self.check_same(name, reference)
            found.append(f'{number.name} {code}')
        return f'saved after the step, exit codes {", ".join(found)}, resumed to the same bits'

    def image(self) -> str:
        """a training image cut off in mid-run"""
        reference, victim = self.reference(), self.work / 'train' / '3.png'
        whole = victim.read_bytes()
        try:
            self.options('image')
            with self.started('image') as process:
                self.wait_for(process, 'image', 10)
                victim.write_bytes(whole[: len(whole) // 2])
                code = process.wait(LIMIT_S)
            output, at = self.output('image'), self.progress('image')
            check(code == 2, f'exit code {code}')
            check('train/3.png: the image is damaged' in output and 'Traceback' not in output, 'the error is not clear')
            states = self.work / 'experiments/image/training_states'
            check((states / f'{at}.state').is_file(), f'the state of iteration {at} was not saved')
            self.options('skip', text=OPTIONS.replace('dataset_enlarge', 'on_damaged: skip, dataset_enlarge'))
            check(self.run('skip') == 0, 'the run with on_damaged: skip failed')
            named = self.output('skip').count('Another sample takes its place')
            check(named == 1, f'with on_damaged: skip the image was named {named} times')
        finally:
            victim.write_bytes(whole)
        check(self.run('image', '--auto_resume') == 0, 'the restart failed')
        self.check_same('image', reference)
        return f'state of iteration {at} saved, resumed to the same bits; on_damaged: skip goes on and names it'

    def share(self) -> str:
        """the folder of training images gone for 3 seconds"""
        reference, folder = self.reference(), self.work / 'train'
        self.options('share')
        with self.started('share') as process:
            self.wait_for(process, 'share', 10)
            away = folder.rename(self.work / 'away')
            time.sleep(3)
            away.rename(folder)
            check(process.wait(LIMIT_S) == 0, f'the run ended with code {process.returncode}')
        self.check_same('share', reference)
        return 'reads were tried again, final weights and EMA bit-identical'

    def test(self) -> str:
        """`basicsr test` SIGKILLed, then the same command"""
        self.reference()
        names = ('test_whole', 'test_killed')
        for name in names:
            self.options(name, text=TEST_OPTIONS)
        check(self.run('test_whole', verb='test') == 0, 'the undisturbed test failed')
        folder, images = self.work / 'results', 24
        progress, limit = folder / 'test_killed' / 'progress_0.jsonl', time.monotonic() + LIMIT_S
        with self.started('test_killed', verb='test') as process:
            while not progress.is_file() or progress.read_text().count('\n') < images // 2:
                check(process.poll() is None and time.monotonic() < limit, 'the test ended before it was killed')
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        known = progress.read_text().count('\n') - 1
        check(self.run('test_killed', verb='test') == 0, 'the second start failed')
        check(f'{known} images are measured already' in self.output('test_killed'), 'it did not go on where it was')
        whole, killed = (json.loads((folder / name / 'results.json').read_text())['rows'] for name in names)
        for row in (*whole, *killed):
            row.pop('time_ms')
        check(whole == killed, 'the results differ')
        return f'went on after {known} of {images} images, same results'

    def twice(self) -> str:
        """a second start of a living run, then a start after its SIGKILL"""
        reference, folder = self.reference(), self.work / 'experiments'
        self.options('twice')
        with self.started('twice') as process:
            self.wait_for(process, 'twice', 10)
            process.send_signal(signal.SIGSTOP)  # it would be at its end before the second start has come this far
            for arguments in ((), ('--auto_resume',)):
                check(self.run('twice', *arguments) == 2, 'the second start was not refused')
            check(f'is in use by process {process.pid} on ' in self.output('twice'), 'the holder is not named')
            check(len(list(folder.glob('twice*'))) == 1, 'the folder of the living run was moved')
            process.send_signal(signal.SIGCONT)
            self.wait_for(process, 'twice', self.progress('twice') + 5)
            process.kill()
            process.wait()
        check(self.run('twice', '--auto_resume') == 0, 'the folder of the dead run is still held')
        self.check_same('twice', reference)
        return 'refused in one line that names the process, which went on; a dead one is no obstacle, same weights'

    def launcher(self) -> str:
        """torchrun with two processes and without --launcher"""
        self.options('launcher', batch=2)
        check(self.run('launcher', ranks=2) == 0, 'the run failed')
        folder = self.work / 'experiments' / 'launcher'
        check(len(list(folder.parent.glob('launcher*'))) == 1 and len(list(folder.glob('*.log'))) == 1, 'two runs')
        state = torch.load(folder / 'training_states' / f'{self.iterations}.state', weights_only=True)
        check(state['place']['world_size'] == 2, 'the processes did not train together')
        return 'recognised: one run of two processes'


FAULTS = ('kill', 'ranks', 'truncated', 'full_disk', 'signals', 'image', 'share', 'test', 'twice', 'launcher')


def check(passed: bool, message: str) -> None:
    """Fail the fault in progress unless `passed`."""
    if not passed:
        raise Failed(message)


def environment() -> dict[str, str]:
    """One thread per process: more than two processes share the cores, and sums depend on the number of threads."""
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}


def smooth_images(folder: Path, count: int) -> None:
    """Random images in a new folder."""
    folder.mkdir()
    rng = np.random.default_rng(count)
    for number in range(count):
        coarse = rng.integers(0, 256, (15, 20, 3)).astype(np.float32)
        image = cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f'{number}.png'), image.clip(0, 255).round().astype(np.uint8))


def main() -> int:
    """Run the drill and print its table."""
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--work', type=Path, help='where the runs go; without it a temporary folder')
    parser.add_argument('--kills', type=int, default=20, help='number of random SIGKILLs')
    parser.add_argument('--iterations', type=int, default=150, help='length of a run')
    parser.add_argument('--seed', type=int, default=0, help='of the random moments and lengths')
    parser.add_argument('--only', nargs='+', choices=FAULTS, default=FAULTS, help='faults to try')
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        drill = Drill(work, args.iterations, args.kills, args.seed)
        for name in args.only:
            fault, began = getattr(drill, name), time.monotonic()
            print(f'{fault.__doc__} ...', file=sys.stderr, flush=True)
            try:
                verdict, figure = 'passed', fault()
            except (Failed, subprocess.TimeoutExpired) as error:
                verdict, figure = 'FAILED', str(error)
            rows.append(f'| {fault.__doc__} | {verdict} | {figure} | {time.monotonic() - began:.0f} |')
    print('| fault | | figure | s |\n|---|---|---|---|', *rows, sep='\n')
    return int(any('| FAILED |' in row for row in rows))


if __name__ == '__main__':
    sys.exit(main())
