"""Weights in the kernels' layout: padded to whole vectors, in panels of output channels (csrc/gemm_*.h)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moeisr_basicsr.kernels.native import Expert, Layer, TableJob, call, choose_isa

PAD = 32  # csrc/decode.h, kPad


def round_up(n: int, multiple: int = PAD) -> int:
    return -(-n // multiple) * multiple


def pad_to(x: Tensor, *sizes: int) -> Tensor:
    """Pads the last dimensions with zeros up to `sizes`; fp32, contiguous, on the CPU."""
    x = x.detach().to('cpu', torch.float32)
    pads = [n for size, have in zip(reversed(sizes), reversed(x.shape)) for n in (0, size - have)]
    return F.pad(x, pads).contiguous()


def pad_halves(x: Tensor) -> Tensor:
    """Pads each half of the last dimension to the kernel's width: (..., 2K) -> (..., 2 * padded K)."""
    half = x.shape[-1] // 2
    return F.pad(x.unflatten(-1, (2, half)), (0, round_up(half) - half)).flatten(-2)


def pack_weight(weight: Tensor, isa: str) -> Tensor:
    """A linear layer's weight (out, in) in the kernel's panels of output channels, padded."""
    out, inp = (round_up(n) for n in weight.shape)
    weight = pad_to(weight, out, inp)
    if isa in ('avx2', 'avx512'):
        panel = 16 if isa == 'avx2' else 32  # output channels: two vectors
        return weight.view(out // panel, panel, inp).transpose(1, 2).contiguous()  # (panels, in, panel)
    if isa == 'avx512_bf16':  # two rows interleaved per 128 bits give channels in order: (half, quarter, 4) swapped
        panels = weight.bfloat16().view(out // PAD, 2, 4, 4, inp).permute(0, 4, 2, 1, 3)
        return panels.contiguous()  # (panels, in, 32)
    split = 3 if isa == 'amx_fp32' else 1
    parts = _split_bf16(weight, split).view(split, out // PAD, PAD, inp // PAD, PAD // 2, 2)
    return parts.permute(1, 3, 0, 4, 2, 5).contiguous()  # (panels, in / 32, split, 16, 32, 2)


def _split_bf16(x: Tensor, parts: int) -> Tensor:
    """bf16 numbers that add up to `x`, largest first: (parts, *x.shape)."""
    out = []
    for _ in range(parts):
        out.append(x.bfloat16())
        x = x - out[-1].float()
    return torch.stack(out)


class PackedExperts:
    """Expert weights in the kernel's layout: prepared once per model and precision.

    Args:
        experts: For each expert a dict with
            `w_rel` (2, D): coefficients of the relative row and column in hidden layer 1 (LIIF); None for LTE;
            `hidden`: list of (weight (out, in), bias (out)): LIIF's hidden layers from the second on; all of LTE's;
            `last`: (weight (C, in), bias (C)).
        precision: 'fp32' or 'bf16' (bf16 activations and weights, fp32 sums; coordinates, blend and output layer in
            fp32). Falls back to fp32 arithmetic where the processor has no bf16 instructions.
        isa: One of `supported_isas()` instead of the fastest one.

    Raises:
        ValueError: Widths that do not fit each other, or an unknown precision or instruction set.
    """

    def __init__(self, experts: Sequence[dict], precision: str = 'fp32', isa: str | None = None) -> None:
        self.isa = choose_isa(precision, isa)
        if not 1 <= len(experts) <= 256:
            raise ValueError(f'the kernels take 1 to 256 experts; got {len(experts)}.')
        self.num_experts = len(experts)
        self.out_channels = experts[0]['last'][0].shape[0]
        self.family = 'lte' if experts[0].get('w_rel') is None else 'liif'
        self.widths = [self._check(j, expert) for j, expert in enumerate(experts)]  # D of each; LTE: 2K
        if self.family == 'lte' and len(set(self.widths)) > 1:
            raise ValueError(f'LTE experts share one basis; got input widths {self.widths}.')
        self._keep: list[object] = []  # the tensors and arrays that the structures below point into
        self.array = (Expert * len(experts))(*(self._pack(expert) for expert in experts))

    def _check(self, j: int, expert: dict) -> int:
        if (expert.get('w_rel') is None) != (self.family == 'lte'):
            raise ValueError(f'expert {j}: either all experts have w_rel (LIIF) or none (LTE).')
        chain = [*expert['hidden'], expert['last']]
        width = chain[0][0].shape[1] if self.family == 'lte' else expert['w_rel'].shape[1]
        have = width
        for n, (weight, bias) in enumerate(chain):
            if weight.shape[1] != have or bias.shape != weight.shape[:1]:
                raise ValueError(
                    f'expert {j}, layer {n}: weight {tuple(weight.shape)} and bias {tuple(bias.shape)} '
                    f'do not fit an input of width {have}.'
                )
            have = weight.shape[0]
        if have != self.out_channels:
            raise ValueError(f'expert {j}: {have} output channels; expert 0 has {self.out_channels}.')
        return width

    def _hold(self, x: Tensor) -> int:
        self._keep.append(x)
        return x.data_ptr()

    def _pack(self, expert: dict) -> Expert:
        last_weight, last_bias = expert['last']
        hidden = expert['hidden']
        if self.family == 'lte':  # cosine and sine half are padded each, as in the padded tables
            first = hidden[0] if hidden else expert['last']
            split = pad_halves(first[0])
            width = split.shape[1]
            if hidden:
                hidden = [(split, first[1]), *hidden[1:]]
            else:
                last_weight = split
            w_rel = None
        else:
            width = round_up(expert['w_rel'].shape[1])
            w_rel = self._hold(pad_to(expert['w_rel'], 2, width))
        layers = (Layer * len(hidden))(*(self._pack_layer(*layer) for layer in hidden))
        self._keep.append(layers)
        last_width = round_up(last_weight.shape[1])
        return Expert(
            width,
            len(hidden),
            last_width,
            w_rel,
            layers,
            self._hold(pad_to(last_weight, self.out_channels, last_width)),
            self._hold(pad_to(last_bias, self.out_channels)),
        )

    def _pack_layer(self, weight: Tensor, bias: Tensor) -> Layer:
        out, inp = (round_up(n) for n in weight.shape)
        return Layer(inp, out, self._hold(pack_weight(weight, self.isa)), self._hold(pad_to(bias, out)))


class PackedConv:
    """The 3x3 convolution that makes an expert's LR table.

    Faster than torch's: AMX serves fp32 too, and elsewhere only the cells that the expert's pixels read are computed,
    about half of them where texture comes in patches.

    Args:
        weight: (D, C, 3, 3).
        isa: As for `PackedExperts`; operands as there, sums and result in fp32.

    Raises:
        ValueError: This processor has no such instructions.
    """

    def __init__(self, weight: Tensor, isa: str) -> None:
        self.isa = choose_isa('fp32', isa)
        self.takes_cells = not isa.startswith('amx')
        self.out_channels, self.in_channels = weight.shape[:2]
        self.padded = round_up(self.in_channels)
        # Row, column, channel: in a channels-last window three neighbours of a row are contiguous.
        flat = F.pad(weight.detach().permute(0, 2, 3, 1), (0, self.padded - self.in_channels)).flatten(1)
        self.weight = pack_weight(flat, isa)

    def __call__(self, window: Tensor, bias: Tensor, cells: Tensor | None = None) -> Tensor:
        """The table of a window.

        Args:
            window: (C, Ht + 2, Wt + 2), with a halo of one code per side; quickest where it is channels-last.
            bias: (D) fp32.
            cells: (N,) int64 cells to compute, in row-major numbers; the others hold nothing. AMX computes all.

        Returns:
            (Ht, Wt, D) fp32, a view if D was padded.
        """
        if window.shape[0] != self.in_channels or bias.shape != (self.out_channels,):
            raise ValueError(
                f'the window must have {self.in_channels} channels and the bias {self.out_channels}; got '
                f'{tuple(window.shape)} and {tuple(bias.shape)}.'
            )
        height, width = (n - 2 for n in window.shape[1:])
        window = window.detach().float().permute(1, 2, 0)  # (Ht + 2, Wt + 2, C)
        window = F.pad(window, (0, self.padded - self.in_channels)).contiguous()
        out = torch.empty(height, width, round_up(self.out_channels))
        bias = pad_to(bias, out.shape[2])
        layer = Layer(9 * self.padded, out.shape[2], self.weight.data_ptr(), bias.data_ptr())
        job = TableJob(
            layer, window.data_ptr(), self.padded, height, width, out.data_ptr(), num_threads=torch.get_num_threads()
        )
        if cells is not None and self.takes_cells:
            job.cells, job.num_cells = cells.data_ptr(), cells.shape[0]
        if call('moeisr_table', job, self.isa):
            raise MemoryError('no memory for the activation blocks of the LR tables.')
        return out[..., : self.out_channels]
