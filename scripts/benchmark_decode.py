"""How much faster the decoder is than plain LIIF, in one process: `python scripts/benchmark_decode.py --quick`.

Every line is `case scale ratio`; the ratio is the time of the plain LIIF algorithm (unfold, grid_sample, four full MLP
passes, chunks of 30000 queries, fp32) over that of the case, medians of runs that take turns. Lines that begin with #
are notes. Weights and features are random, expert maps are made up in patches.

cases: <code>-<what>-<precision>, code `plain` (`plain-10000`: in smaller chunks), `torch` or `fused`; what `dense`,
`lm-dense` (LMLIIF as published), or `moe-<shares of the four experts>`, LR tables included. `whole-...` are encoder
(EDSR-baseline), mapper and decoder against the plain algorithm with its encoder. `mac-efficiency-...` is (dense time
/ MoE time) over (dense MACs / MoE MACs); `lm-gain-...` is dense time / lm-dense time. `route-agreement` is the share
of pixels that both codes send to the same expert. `train-exact` is a training step of the decoder (`train-whole-exact`:
with the encoder) against the plain sum of all experts. For memory see `basicsr profile`. A large
MALLOC_MMAP_THRESHOLD_ in the environment speeds up the plain algorithm's temporaries: run it with and without; --json
keeps which.
"""

import time

START = time.perf_counter()  # --quick counts the imports too

import argparse  # noqa: E402
import math  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout that is not installed

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from benchmark_case import Case, Turns, note  # noqa: E402
from benchmark_train import PATCH, QUERIES, SCALE, TrainSteps  # noqa: E402
from liif_peer import load_peer  # noqa: E402
from torch import Tensor  # noqa: E402

from moeisr_basicsr.analysis import schema  # noqa: E402
from moeisr_basicsr.analysis.complexity import decoder_macs, dense_folded_macs  # noqa: E402
from moeisr_basicsr.analysis.environment import environment, kernel_name  # noqa: E402
from moeisr_basicsr.archs.moeisr_arch import MoEISR  # noqa: E402
from moeisr_basicsr.cli.outputs import add_overwrite, check_output  # noqa: E402
from moeisr_basicsr.core import MoEDecoder, make_cell, make_coord, output_size, reference  # noqa: E402
from moeisr_basicsr.core.render import TORCH, Backend  # noqa: E402
from moeisr_basicsr.errors import UserError  # noqa: E402
from moeisr_basicsr.inference import evaluation  # noqa: E402
from moeisr_basicsr.kernels import fused_backend  # noqa: E402
from moeisr_basicsr.tools.profile.rendering import CHUNK, clustered_map, plain_image, render_fixed, route  # noqa: E402

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
        self.args, self.device = args, torch.device(args.device)
        self.turns = Turns(START, QUICK_SECONDS if args.quick else math.inf, args.repeats, self.device)
        torch.manual_seed(0)
        self.net = MoEISR({'type': 'EDSREncoder'}, shared_layers=args.shared_layers).to(self.device).eval()
        self.moe = self.net.decoder
        self.dense = MoEDecoder(64, 3, 'liif', [[256] * 4]).to(self.device).eval()
        for own, theirs in zip(self.dense.pool.linears(0), self.moe.pool.linears(3)):
            own.load_state_dict(theirs.state_dict())
        self.lm = MoEDecoder(64, 3, 'lm', [{'latent': [208], 'depth': 6}]).to(self.device).eval()
        self.lq_size = (args.lq_size, args.lq_size)
        self.lq = torch.rand(1, 3, *self.lq_size, device=self.device)
        with torch.no_grad():
            self.feat = self.net.encode(self.lq).feat
            self.feat = self.feat / self.feat.std()  # a trained encoder's features are of this order
        self.plain: dict[str, Callable[..., Tensor]] = {'plain': self.plain_image}  # the first one is the baseline
        if args.peer is not None:
            self.plain = {'peer': load_peer(args.peer, self.dense, self.device), **self.plain}
            self.check_peer()
        start = time.perf_counter()
        self.fused = {
            (what, precision): fused_backend(decoder, self.device, precision)
            for what, decoder in (('moe', self.moe), ('dense', self.dense), ('lm-dense', self.lm))
            for precision in args.precisions
        }
        for (what, precision), backend in self.fused.items():
            if backend is None:
                note(f'skipped fused {what} {precision}: the fused kernels do not run here')
        if time.perf_counter() - start > 5:
            note('the kernels were compiled just now; run again for more rounds')
        self.rows: list[dict] = []

    def plain_image(self, feat: Tensor, size: tuple[int, int], chunk: int, count: int) -> Tensor:
        """`count` chunks of the plain algorithm: (1, Q, 3)."""
        return plain_image(self.dense, 0, feat, size, make_cell(size), chunk, count)

    def check_peer(self) -> None:
        """The peer's code with our weights gives what the built-in plain algorithm gives; AssertionError otherwise."""
        one, other = (decode(self.feat[..., :16, :16], (40, 52), CHUNK, 1) for decode in self.plain.values())
        difference = float((one - other).abs().max()) / 2
        note(f'equal peer: largest difference {difference:.2e} of at most {LIMITS["fp32"]:g}')
        assert difference <= LIMITS['fp32'], f'the peer differs by {difference} from the built-in algorithm'

    def report(self, name: str, scale: float, ratio: float, **row) -> None:
        """Print a case and keep its row of a results document."""
        print(f'{name} x{scale:g} {ratio:.4g}', flush=True)
        self.rows.append({'case': name, 'scale': [float(scale)] * 2, 'ratio': float(ratio), **row})

    def render(
        self,
        decoder: MoEDecoder,
        feat: Tensor,
        size: tuple[int, int],
        backend: Backend,
        precision: str,
        expert_map: Tensor | None,
    ) -> Tensor:
        """One decode with a given map, or of a dense decoder: (3, R, S)."""
        with evaluation(self.net, self.device.type, precision):
            return render_fixed(decoder, feat, size, expert_map, make_cell(size), backend)

    def whole(self, size: tuple[int, int], backend: Backend, precision: str, expert_map: Tensor) -> Tensor:
        """Encoder, mapper (its routing is thrown away) and decoder."""
        with evaluation(self.net, self.device.type, precision):
            lq = self.lq.contiguous(memory_format=torch.channels_last) if self.device.type == 'cpu' else self.lq
            feat = self.net.encode(lq).feat  # as `upscale` does
            route(self.moe, feat, size, backend)
        return self.render(self.moe, feat, size, backend, precision, expert_map)

    def plain_cases(self, size: tuple[int, int]) -> list[Case]:
        """The plain algorithm in both chunk sizes, the baseline first; a part of the chunks with --quick."""
        cases, pixels = [], size[0] * size[1]
        for chunk in (CHUNK, SMALL_CHUNK):
            count = QUICK_PIXELS // chunk if self.args.quick else math.ceil(pixels / chunk)
            for name, decode in self.plain.items():
                work = partial(decode, self.feat, size, chunk, count)
                part = min(count * chunk / pixels, 1.0)
                cases.append(Case(f'{name}-{chunk}', work, part, guess=part))
        return cases

    def decode_cases(self, size: tuple[int, int], maps: dict[str, Tensor], few: bool) -> list[Case]:
        """Our decoders and whole upscales, what matters most first; `few` keeps the fused dense and skewed ones."""
        cases = []
        decoders = {SKEWED: self.moe, 'whole': self.moe, 'dense': self.dense, 'lm-dense': self.lm, 'uniform': self.moe}
        for name, decoder in decoders.items():
            if few and name not in (SKEWED, 'dense', 'lm-dense'):
                continue
            for code in ('fused',) if few else ('fused', 'torch'):
                for precision in self.args.precisions:
                    what = 'moe' if decoder is self.moe else name
                    backend = TORCH if code == 'torch' else self.fused[what, precision]
                    if backend is None:
                        continue
                    guess = 1.0 if code == 'torch' else 0.3  # the kernels need less than a third per multiply-add
                    if name == 'whole':
                        work = partial(self.whole, size, backend, precision, maps[SKEWED])
                        case = Case(f'whole-{code}-moe-{SKEWED}-{precision}', work, guess=2 * guess)
                    else:
                        label = f'moe-{name}' if what == 'moe' else name
                        work = partial(self.render, decoder, self.feat, size, backend, precision, maps.get(name))
                        case = Case(f'{code}-{label}-{precision}', work, guess=guess, backend=backend)
                        case.expert_map = name if what == 'moe' else None
                    case.decoder = decoder
                    case.precision = precision
                    cases.append(case)
        return cases

    def warm_up(self, scale: float, case: Case) -> None:
        """Run a case once; compare ours with the plain algorithm, with the same map, on border pixels and others.

        Raises:
            AssertionError: They differ.
        """
        if case.backend is None:
            return None if self.args.quick else case.work()
        feat = self.feat[..., :QUICK_CHECK_SIZE, :QUICK_CHECK_SIZE] if self.args.quick else self.feat
        size = output_size(feat.shape[-2:], scale)
        pixels, decoder, expert_map = checked_pixels(size), case.decoder, None
        gate = torch.ones(1, len(pixels), 1, device=self.device)
        if case.expert_map is not None:
            expert_map = clustered_map(size, feat.shape[-2:], MAPS[case.expert_map]).to(self.device)
            gate = F.one_hot(expert_map.flatten()[pixels].long(), 4)[None]
        output = self.render(decoder, feat, size, case.backend, case.precision, expert_map).flatten(1)[:, pixels].t()
        coord = make_coord(size, self.device)[pixels][None]
        with torch.no_grad():
            expected = reference.mixture(decoder, feat, coord, make_cell(size, self.device).expand_as(coord), gate)[0]
        case.difference, limit = float((output - expected).abs().max()) / 2, LIMITS[case.precision]
        words = f'largest difference {case.difference:.2e} of at most {limit:g}'
        note(f'equal {case.name} x{scale:g}: {words}, outputs spread {float(expected.std()) / 2:.2g}')
        assert case.difference <= limit, f'{case.name} x{scale:g} differs by {case.difference} from the plain algorithm'

    def run_scale(self, scale: float, few: bool) -> None:
        """All cases of one scale: check, time in turns, report."""
        if not self.turns.fits():
            return note(f'skipped x{scale:g}: no time left')
        size = output_size(self.lq_size, scale)
        maps = {name: clustered_map(size, self.lq_size, shares).to(self.device) for name, shares in MAPS.items()}
        ours = self.decode_cases(size, maps, few)
        plain, *others = self.plain_cases(size)
        encode = Case('encode', lambda: self.net.encode(self.lq))
        with torch.no_grad():
            first = len(self.plain) - 1  # beside the peer stands the built-in algorithm: the two should agree
            cases = [plain, encode, *others[:first], *ours, *others[first:]]
            rounds = self.turns.take(cases, partial(self.warm_up, scale))
        done = {case.name: case for case in (plain, *others, *ours) if case.times}
        for case in done.values():
            is_whole = case.name.startswith('whole')
            row = {'lq_size': list(self.lq_size), 'size': list(size), 'precision': case.precision, 'repeats': rounds}
            row |= {'time_ms': {'total': case.ms}, 'difference': case.difference}
            if case.backend is not None:
                row['macs'] = {'total': self.macs(case.decoder, size, case.expert_map)}
            if case.expert_map is not None:
                row['routing'] = {'shares': list(MAPS[case.expert_map])}
            ratio, baseline = (plain.ms + (encode.ms if is_whole else 0)) / case.ms, 'whole-' * is_whole + plain.name
            self.report(case.name, scale, ratio, baseline=baseline, **row)
        saved = self.macs(self.dense, size, None) / self.macs(self.moe, size, SKEWED)
        for code in ('torch', 'fused'):
            for precision in self.args.precisions:
                dense, moe, lm = (
                    done.get(f'{code}-{what}-{precision}') for what in ('dense', f'moe-{SKEWED}', 'lm-dense')
                )
                if dense is not None and lm is not None:
                    self.report(f'lm-gain-{code}-{precision}', scale, dense.ms / lm.ms, baseline=dense.name)
                if dense is not None and moe is not None:
                    # How much of the saving on paper arrives as time.
                    row = {'baseline': dense.name, 'notes': f'on paper {saved:.3f}'}
                    self.report(f'mac-efficiency-{code}-{precision}', scale, dense.ms / moe.ms / saved, **row)
        backend = self.fused['moe', self.args.precisions[0]]
        if backend is not None and not few and self.turns.fits():
            with evaluation(self.net, self.device.type, 'fp32'):
                one, other = (route(self.moe, self.feat, size, code) for code in (TORCH, backend))
            self.report('route-agreement', scale, float((one == other).double().mean()), baseline='torch')

    def macs(self, decoder: MoEDecoder, size: tuple[int, int], expert_map: str | None) -> float:
        """Multiply-adds per output pixel, LR tables and experts."""
        if expert_map is None:
            return dense_folded_macs(decoder, self.lq_size, size)
        counts = decoder_macs(decoder, self.lq_size, size)
        return counts.tables + counts.experts_at(MAPS[expert_map])

    def run_train(self) -> None:
        """Training steps of the decoder: output and gradients are compared first."""
        if not self.turns.fits():
            return note('skipped train: no time left')
        batch = 4 if self.args.quick else 16
        steps = TrainSteps(self.moe, batch)
        output, gradient = steps.compare()
        note(f'equal train-exact: largest difference {output:.2e}, gradients differ by {gradient:.2e} of their norm')
        assert output <= LIMITS['fp32'] and gradient <= GRADIENT_LIMIT, 'training differs from the plain sum'
        lq = torch.rand(batch, 3, PATCH, PATCH, device=self.device)
        plain, exact = (Case(f'train-{form}', partial(steps.run, form), guess=1.0) for form in ('plain', 'exact'))
        encode = Case('encoder', lambda: self.net.encode(lq).feat.sum().backward(), guess=1.0)
        row = {'repeats': self.turns.take([plain, exact, encode], lambda case: None), 'count': batch}
        row |= {'lq_size': [PATCH, PATCH], 'notes': f'{QUERIES} queries per image'}
        if encode.times:
            for name, more in (('', 0.0), ('whole-', encode.ms)):
                row |= {'time_ms': {'total': exact.ms + more}, 'baseline': f'train-{name}plain'}
                self.report(f'train-{name}exact', SCALE, (plain.ms + more) / (exact.ms + more), **row)


def checked_pixels(size: tuple[int, int]) -> Tensor:
    """Pixels on which outputs are compared, row-major: of the outermost three rows and columns, and of all."""
    inside = torch.zeros(size, dtype=torch.bool)
    inside[3:-3, 3:-3] = True
    border = (~inside).flatten().nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(0)
    border = border[torch.randperm(len(border), generator=generator)[: CHECKED_PIXELS // 2]]
    return torch.cat([border, torch.randint(inside.numel(), (CHECKED_PIXELS // 2,), generator=generator)]).unique()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--quick', action='store_true', help='end within 50 seconds: x4, and x8 in part')
    add('--scales', type=float, nargs='+', metavar='S', help='default 2 3 4 6 8 12; 4 8 with --quick')
    add('--lq-size', type=int, default=128, metavar='N', help='input pixels per side (default 128)')
    add('--precisions', nargs='+', choices=tuple(LIMITS), default=list(LIMITS))
    add('--repeats', type=int, default=3, metavar='N', help='rounds (default 3)')
    layers = 'leading hidden layers that the experts have in common (default 0, as in the paper)'
    add('--shared-layers', type=int, choices=range(5), default=0, help=layers)
    add('--peer', metavar='DIR', help='a checkout of yinboc/liif: the ratios are against its own code')
    add('--train', action='store_true', help='training steps too')
    add('--device', default='cpu', help='default cpu')
    add('--threads', type=int, metavar='N', help='default: as many as PyTorch takes')
    add('--json', metavar='FILE', help='keep all results')
    add_overwrite(parser)
    args = parser.parse_args(argv)
    if args.json:
        try:
            check_output('--json', args.json, '.json', args.overwrite)
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
    if args.json:
        kernel = ', '.join(sorted({kernel_name(backend) for backend in benchmark.fused.values()}))
        schema.save(args.json, schema.document('benchmark', environment(kernel, benchmark.device), benchmark.rows))


if __name__ == '__main__':
    main()
