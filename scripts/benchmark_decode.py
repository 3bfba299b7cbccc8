"""How much faster the decoder is than plain LIIF, in one process: `python scripts/benchmark_decode.py --quick`.

Every line is `case scale ratio`; the ratio is the time of the plain LIIF algorithm (unfold, grid_sample, four full MLP
passes, chunks of 30000 queries, fp32) over that of the case, medians of runs that take turns. Lines that begin with #
are notes. Weights and features are random, expert maps are made up in patches.

cases: <code>-<what>-<precision>, code `plain` (`plain-10000`: in smaller chunks), `torch` or `fused`; what `dense`, or
`moe-<shares of the four experts>`, LR tables included. `whole-...` are encoder (EDSR-baseline), mapper and decoder
against the plain algorithm with its encoder. `mac-efficiency-...` is (dense time / MoE time) over (dense MACs / MoE
MACs). `route-agreement` is the share of pixels that both codes send to the same expert. `train-...` are training steps
of the decoder (`train-whole-...`: with the encoder) against the naive sum of four experts. `memory-mib-...` is no ratio
but the peak in MiB beyond input, features and output. A large MALLOC_MMAP_THRESHOLD_ in the environment speeds up the
plain algorithm's temporaries: run it with and without; --json keeps which.
"""

import time

START = time.perf_counter()  # --quick counts the imports too

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import torch  # noqa: E402
from benchmark_case import Case, Clock, note  # noqa: E402
from liif_peer import load_peer  # noqa: E402
from moeisr_basicsr.analysis.rendering import clustered_map, render_fixed  # noqa: E402
from moeisr_basicsr.analysis.train_steps import PATCH, QUERIES, SCALE, TrainSteps  # noqa: E402
from torch import Tensor  # noqa: E402

from moeisr_basicsr.analysis import schema  # noqa: E402
from moeisr_basicsr.analysis.complexity import decoder_macs, dense_folded_macs, plain_query_macs  # noqa: E402
from moeisr_basicsr.analysis.environment import environment  # noqa: E402
from moeisr_basicsr.analysis.measure import time_ms  # noqa: E402
from moeisr_basicsr.analysis.plain import CHUNK, plain_image, plain_pixels  # noqa: E402
from moeisr_basicsr.archs.moeisr_arch import MoEISR  # noqa: E402
from moeisr_basicsr.cli.outputs import check_output, is_results_of  # noqa: E402
from moeisr_basicsr.core import MoEDecoder, make_cell, output_size  # noqa: E402
from moeisr_basicsr.core.render import TORCH, Backend, FeatureWindow, Renderer  # noqa: E402
from moeisr_basicsr.errors import UserError  # noqa: E402
from moeisr_basicsr.inference import evaluation  # noqa: E402
from moeisr_basicsr.kernels import fused_backend  # noqa: E402

QUICK_SECONDS = 44  # of 50, so that a case in progress can end
SMALL_CHUNK = 10000  # the plain algorithm is faster with it, but 30000 is its authors' default
MAPS = {'uniform': (0.25,) * 4, '50/25/15/10': (0.5, 0.25, 0.15, 0.1)}
SKEWED = '50/25/15/10'
LIMITS = {'fp32': 1e-5, 'bf16': 4e-3}  # largest difference to the plain algorithm on the [0, 1] scale
CHECKED_PIXELS = 4000
QUICK_PIXELS = 60000  # of the plain algorithm with --quick; its chunks cost the same, so a part gives the time of all
QUICK_CHECK_SIZE = 48  # LR pixels per side of the image on which outputs are compared with --quick
GRADIENT_LIMIT = 5e-3  # of its norm: a ReLU whose input is rounding noise may flip, and one alone makes 1e-3


class Benchmark:
    """The networks, the options and the rows so far."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.clock = Clock(START, QUICK_SECONDS if args.quick else math.inf)
        torch.manual_seed(0)
        self.net = MoEISR({'type': 'EDSREncoder'}, shared_layers=args.shared_layers).to(self.device).eval()
        self.moe = self.net.decoder
        self.dense = MoEDecoder(64, 3, 'liif', [[256] * 4]).to(self.device).eval()
        for own, theirs in zip(self.dense.pool.linears(0), self.moe.pool.linears(3)):
            own.load_state_dict(theirs.state_dict())
        self.lq_size = (args.lq_size, args.lq_size)
        self.lq = torch.rand(1, 3, *self.lq_size, device=self.device)
        with torch.no_grad():
            self.feat = self.net.encode(self.lq)
            self.feat = self.feat / self.feat.std()  # a trained encoder's features are of this order
        self.peer = None if args.peer is None else load_peer(args.peer, self.dense, self.device)
        self.peer is None or self.check_peer()
        self.fused: dict[tuple[str, str], Backend] = {}
        start = time.perf_counter()
        for precision in args.precisions:
            for name, decoder in (('moe', self.moe), ('dense', self.dense)):
                backend = fused_backend(decoder, self.device, precision)
                if backend is None:
                    note(f'skipped fused {name} {precision}: the fused kernels do not run here')
                else:
                    self.fused[name, precision] = backend
        if time.perf_counter() - start > 5:
            note('the kernels were compiled just now; run again for more rounds')
        self.rows: list[dict] = []

    def check_peer(self) -> None:
        """The peer's code with our weights gives what the built-in plain algorithm gives.

        Raises:
            AssertionError: It does not.
        """
        feat, size = self.feat[..., :16, :16], (40, 52)
        expected = plain_image(self.dense, 0, feat, size, make_cell(size))
        difference = float((self.peer(feat, size, CHUNK, 1) - expected).abs().max()) / 2
        note(f'equal peer: largest difference {difference:.2e} of at most {LIMITS["fp32"]:g}')
        assert difference <= LIMITS['fp32'], f'the peer differs by {difference} from the built-in algorithm'

    def backend(self, code: str, what: str, precision: str) -> Backend | None:
        """The backend of a case; None where there is none."""
        return TORCH if code == 'torch' else self.fused.get((what, precision))

    def report(self, name: str, scale: float, ratio: float, **row) -> None:
        """Print a case and keep its row."""
        print(f'{name} x{scale:g} {ratio:.4g}', flush=True)
        self.rows.append({'case': name, 'scale': [float(scale)] * 2, 'ratio': float(ratio), **row})

    def render(
        self,
        feat: Tensor,
        size: tuple[int, int],
        backend: Backend,
        precision: str,
        expert_map: Tensor | None,
        with_mapper: bool = False,
    ) -> Tensor:
        """One decode with a given map, or of the dense decoder: (3, R, S)."""
        decoder = self.dense if expert_map is None else self.moe
        with evaluation(self.net, self.device.type, precision):
            return render_fixed(decoder, feat, size, expert_map, make_cell(size), backend, with_mapper)

    def whole(self, size: tuple[int, int], backend: Backend, precision: str, expert_map: Tensor) -> Tensor:
        """Encoder, mapper (its routing is thrown away) and decoder."""
        with evaluation(self.net, self.device.type, precision):
            lq = self.lq.contiguous(memory_format=torch.channels_last) if self.device.type == 'cpu' else self.lq
            feat = self.net.encode(lq)  # as `upscale` does
        return self.render(feat, size, backend, precision, expert_map, with_mapper=True)

    def plain_cases(self, size: tuple[int, int]) -> list[Case]:
        """The plain algorithm in both chunk sizes, the baseline first; a part of the chunks with --quick."""
        cases = []
        pixels = size[0] * size[1]
        for chunk in (CHUNK, SMALL_CHUNK):
            count = QUICK_PIXELS // chunk if self.args.quick else math.ceil(pixels / chunk)
            part = min(count * chunk / pixels, 1.0)
            if self.peer is not None:
                cases.append(
                    Case(f'peer-{chunk}', lambda c=chunk, n=count: self.peer(self.feat, size, c, n), part, guess=part)
                )
            cases.append(
                Case(
                    f'plain-{chunk}',
                    lambda c=chunk, n=count: plain_image(self.dense, 0, self.feat, size, make_cell(size), c, n),
                    part,
                    guess=part,
                )
            )
        return cases

    def decode_cases(self, size: tuple[int, int], maps: dict[str, Tensor], few: bool) -> list[Case]:
        """Our decoders and whole upscales, what matters most first; `few` keeps the fused dense and skewed ones."""
        cases = []
        for name in (SKEWED, None) if few else (SKEWED, None, 'whole', 'uniform'):
            for code in ('fused',) if few else ('fused', 'torch'):
                for precision in self.args.precisions:
                    what = 'dense' if name is None else 'moe'
                    backend = self.backend(code, what, precision)
                    if backend is None:
                        continue
                    # torch needs no more time per multiply-add than the plain algorithm, the kernels less than a third
                    guess = self.macs(size, SKEWED if name == 'whole' else name) / plain_query_macs(self.dense, 0)
                    guess = guess if code == 'torch' else guess / 3
                    if name == 'whole':
                        cases.append(
                            Case(
                                f'whole-{code}-moe-{SKEWED}-{precision}',
                                lambda b=backend, p=precision: self.whole(size, b, p, maps[SKEWED]),
                                precision=precision,
                                guess=2 * guess,
                            )
                        )
                        continue
                    label = 'dense' if name is None else f'moe-{name}'
                    cases.append(
                        Case(
                            f'{code}-{label}-{precision}',
                            lambda b=backend, p=precision, n=name: self.render(self.feat, size, b, p, maps.get(n)),
                            loads=name,
                            backend=backend,
                            precision=precision,
                            guess=guess,
                        )
                    )
        return cases

    def check_equal(self, case: Case, scale: float) -> None:
        """Compare with the plain algorithm, with the same map, on border pixels and others; this also warms up.

        Raises:
            AssertionError: They differ.
        """
        feat = self.feat[..., :QUICK_CHECK_SIZE, :QUICK_CHECK_SIZE] if self.args.quick else self.feat
        lq_size = tuple(feat.shape[-2:])
        size = output_size(lq_size, scale)
        pixels = checked_pixels(size)
        decoder, experts, expert_map = self.dense, torch.zeros(len(pixels), dtype=torch.long), None
        if case.loads is not None:
            expert_map = clustered_map(size, lq_size, MAPS[case.loads])
            decoder, experts = self.moe, expert_map.flatten()[pixels].long()
            expert_map = expert_map.to(self.device)
        output = self.render(feat, size, case.backend, case.precision, expert_map).flatten(1)  # (3, R * S)
        pixels = pixels.to(self.device)
        expected = plain_pixels(decoder, feat, size, make_cell(size), pixels, experts.to(self.device))
        case.difference = float((output[:, pixels].t() - expected).abs().max()) / 2  # [-1, 1] to [0, 1]
        limit = LIMITS[case.precision]
        note(
            f'equal {case.name} x{scale:g}: largest difference {case.difference:.2e} of at most {limit:g}, '
            f'outputs spread {float(expected.std()) / 2:.2g}'
        )
        assert case.difference <= limit, f'{case.name} x{scale:g} differs by {case.difference} from the plain algorithm'

    def run_scale(self, scale: float, few: bool) -> None:
        """All cases of one scale: check, time in turns, report."""
        size = output_size(self.lq_size, scale)
        maps = {name: clustered_map(size, self.lq_size, loads).to(self.device) for name, loads in MAPS.items()}
        ours = self.decode_cases(size, maps, few)
        plain, *others = self.plain_cases(size)
        encode = Case('encode', lambda: self.net.encode(self.lq))
        with torch.no_grad():
            first = self.peer is not None  # beside the peer stands the built-in algorithm: the two should agree
            rounds = self.take_turns([plain, encode, *others[:first], *ours, *others[first:]], scale)
        done = {case.name: case for case in (plain, *others, *ours) if case.times}
        for case in done.values():
            is_whole = case.name.startswith('whole')
            before = plain.ms + encode.ms if is_whole else plain.ms
            row = {} if case.backend is None else {'macs': {'total': self.macs(size, case.loads)}}
            if case.loads is not None:
                row['routing'] = {'loads': list(MAPS[case.loads])}
            self.report(
                case.name,
                scale,
                before / case.ms,
                time_ms={'total': case.ms},
                repeats=rounds,
                baseline=('whole-' if is_whole else '') + plain.name,
                lq_size=list(self.lq_size),
                size=list(size),
                difference=case.difference,
                precision=case.precision,
                **row,
            )
        self.report_efficiency(scale, size, done)
        if not few and self.clock.fits():
            self.report_agreement(scale, size)

    def take_turns(self, cases: list[Case], scale: float) -> int:
        """Check each case, then time all in turns while there is time; returns the number of rounds."""
        if not self.clock.fits():
            note(f'skipped x{scale:g}: no time left')
            return 0
        for done in range(self.args.repeats):
            start = time.perf_counter()
            for place, case in enumerate(cases):
                if done == 0 and place > 0 and not self.clock.fits(case.guess * cases[0].ms / 1e3):
                    note(f'skipped {case.name} x{scale:g}: no time left')
                    continue
                if done == 0 and case.backend is not None:
                    self.check_equal(case, scale)
                elif done == 0 and not self.args.quick:
                    case.work()  # warm up
                case.times.append(time_ms(case.work, self.device) / case.fraction)
            cases = [case for case in cases if case.times]
            if not self.clock.fits((time.perf_counter() - start) * 0.9):  # a later round has nothing to check
                return done + 1
        return self.args.repeats

    def macs(self, size: tuple[int, int], loads: str | None) -> float:
        """Multiply-adds per output pixel, LR tables and experts."""
        if loads is None:
            return dense_folded_macs(self.dense, self.lq_size, size)
        counts = decoder_macs(self.moe, self.lq_size, size)
        return counts.tables + counts.experts_at(MAPS[loads])

    def report_efficiency(self, scale: float, size: tuple[int, int], done: dict[str, Case]) -> None:
        """How much of the saving on paper arrives as time."""
        for code in ('torch', 'fused'):
            for precision in self.args.precisions:
                dense, moe = (done.get(f'{code}-{what}-{precision}') for what in ('dense', f'moe-{SKEWED}'))
                if dense is not None and moe is not None:
                    saved = self.macs(size, None) / self.macs(size, SKEWED)
                    self.report(
                        f'mac-efficiency-{code}-{precision}',
                        scale,
                        dense.ms / moe.ms / saved,
                        baseline=dense.name,
                        notes=f'on paper {saved:.3f}',
                    )

    def report_agreement(self, scale: float, size: tuple[int, int]) -> None:
        """Whether the fused mapper sends pixels where the torch one does; both are fp32."""
        backend = self.fused.get(('moe', self.args.precisions[0]))
        if backend is None:
            return
        maps = []
        with evaluation(self.net, self.device.type, 'fp32'):
            for code in (TORCH, backend):
                renderer = Renderer(self.moe, size, self.lq_size, backend=code, device=self.device)
                strips = renderer.strips(FeatureWindow(self.feat, 0, 0, self.lq_size), (0, size[0]), (0, size[1]))
                maps.append(torch.cat([strip for _, _, strip in strips]))
        self.report('route-agreement', scale, float((maps[0] == maps[1]).double().mean()), baseline='torch')

    def run_train(self) -> None:
        """Training steps of the decoder: output and gradients are compared first."""
        if not self.clock.fits():
            return note('skipped train: no time left')
        batch = 4 if self.args.quick else 16
        steps = TrainSteps(self.moe, batch)
        start = time.perf_counter()
        output, gradient = steps.compare('exact')
        note(f'equal train-exact: largest difference {output:.2e}, gradients differ by {gradient:.2e} of their norm')
        assert output <= LIMITS['fp32'] and gradient <= GRADIENT_LIMIT, 'exact training differs from the naive sum'
        if not self.clock.fits(time.perf_counter() - start):
            return note('skipped train: no time left')
        lq = torch.rand(batch, 3, PATCH, PATCH, device=self.device)
        cases = [
            Case(name, lambda form=name: steps.run(form), guess=1.0)
            for name in ('plain-naive', 'exact', 'sampled', 'naive')
        ]
        cases.append(Case('encoder', lambda: self.net.encode(lq).sum().backward(), guess=1.0))
        rounds = self.take_turns(cases, SCALE)
        plain, *forms, encoder = cases
        details = {
            'repeats': rounds,
            'count': batch,
            'lq_size': [PATCH, PATCH],
            'notes': f'{QUERIES} queries per image',
        }
        for case in forms:
            if case.times:
                self.report(
                    f'train-{case.name}',
                    SCALE,
                    plain.ms / case.ms,
                    time_ms={'total': case.ms},
                    baseline='train-plain-naive',
                    **details,
                )
            if case.times and encoder.times:
                self.report(
                    f'train-whole-{case.name}',
                    SCALE,
                    (plain.ms + encoder.ms) / (case.ms + encoder.ms),
                    time_ms={'total': case.ms + encoder.ms},
                    baseline='train-whole-plain-naive',
                    **details,
                )

    def run_memory(self) -> None:
        """512x512 at x8, in a process of its own: nothing else is in its memory."""
        side = self.args.memory_lq_size
        command = [
            sys.executable,
            str(Path(__file__).with_name('decode_memory.py')),
            '--lq-size',
            str(side),
            '--threads',
            str(torch.get_num_threads()),
        ]
        for precision, budget in [*((entry, []) for entry in self.args.precisions), ('fp32', ['--budget', '0.3'])]:
            child = subprocess.run([*command, '--precision', precision, *budget], capture_output=True, text=True)
            if child.returncode:
                raise RuntimeError(f'the memory case failed: {child.stderr.strip().splitlines()[-1]}')
            result = json.loads(child.stdout.splitlines()[-1])
            if result['mib'] is None:
                return note('skipped memory: this system does not say how much a process used')
            name = f'memory-mib-{result["code"]}-{"budget-" if budget else ""}{precision}'
            self.report(
                name,
                8,
                result['mib'],
                precision=precision,
                peak_mib={'decode': result['mib']},
                lq_size=[side, side],
                routing={'loads': result['loads']},
            )


def checked_pixels(size: tuple[int, int]) -> Tensor:
    """Pixels on which outputs are compared, row-major: of the outermost three rows and columns, and of all."""
    rows, cols = size
    row = torch.arange(rows)[:, None].expand(size)
    col = torch.arange(cols)[None].expand(size)
    distance = torch.stack([row, rows - 1 - row, col, cols - 1 - col]).amin(0).flatten()
    border = (distance < 3).nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(0)
    border = border[torch.randperm(len(border), generator=generator)[: CHECKED_PIXELS // 2]]
    inside = torch.randint(rows * cols, (CHECKED_PIXELS // 2,), generator=generator)
    return torch.cat([border, inside]).unique()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='end within 50 seconds: x4, and x8 in part')
    parser.add_argument('--scales', type=float, nargs='+', metavar='S', help='default 2 3 4 6 8 12; 4 8 with --quick')
    parser.add_argument('--lq-size', type=int, default=128, metavar='N', help='input pixels per side (default 128)')
    parser.add_argument('--precisions', nargs='+', choices=tuple(LIMITS), default=list(LIMITS))
    parser.add_argument('--repeats', type=int, default=3, metavar='N', help='rounds (default 3)')
    parser.add_argument(
        '--shared-layers',
        type=int,
        choices=range(5),
        default=0,
        help='leading hidden layers that the experts have in common: 0 as in the paper (default), 4 as '
        "in this package's recipes",
    )
    parser.add_argument('--peer', metavar='DIR', help='a checkout of yinboc/liif: the ratios are against its own code')
    parser.add_argument('--train', action='store_true', help='training steps too')
    parser.add_argument('--memory', action='store_true', help='peak memory too (always without --quick)')
    parser.add_argument('--memory-lq-size', type=int, default=512, metavar='N', help=argparse.SUPPRESS)
    parser.add_argument('--device', default='cpu', help='default cpu')
    parser.add_argument('--threads', type=int, metavar='N', help='default: as many as PyTorch takes')
    parser.add_argument('--json', metavar='FILE', help='keep all results; replaces an earlier benchmark only')
    args = parser.parse_args(argv)
    if args.json:
        try:
            check_output('--json', args.json, '.json', partial(is_results_of, 'benchmark'))
        except (UserError, OSError) as error:
            parser.error(str(error))
    args.scales = args.scales or ([4.0, 8.0] if args.quick else [2.0, 3.0, 4.0, 6.0, 8.0, 12.0])
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    benchmark = Benchmark(args)
    for place, scale in enumerate(args.scales):
        benchmark.run_scale(scale, few=args.quick and place > 0)
    if args.train:
        benchmark.run_train()
    if args.memory or not args.quick:
        benchmark.run_memory()
    if args.json:
        kernel = ', '.join(sorted({type(backend).__name__ for backend in benchmark.fused.values()})) or 'torch'
        schema.save(args.json, schema.document('benchmark', environment(kernel, benchmark.device), benchmark.rows))


if __name__ == '__main__':
    main()
