"""Weights in the kernels' layout: padded to whole vectors, in panels of output channels (csrc/gemm_*.h)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moeisr_basicsr.kernels.native import Expert, Layer, TableJob, call, choose_isa

PAD = 32  # csrc/decode.h, kPad
RENDER_PAD = 16  # csrc/decode.h, kRenderPad


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


def panel_of(isa: str) -> int:
    """Output channels that the kernel takes at a time."""
    return 16 if isa == 'avx2' else PAD


def pack_weight(weight: Tensor, isa: str, pad: int = PAD) -> Tensor:
    """A linear layer's weight (out, in) in the kernel's panels of output channels, padded."""
    out, inp = (round_up(n, pad) for n in weight.shape)
    weight = pad_to(weight, out, inp)
    if isa in ('avx2', 'avx512'):
        return weight.view(-1, panel_of(isa), inp).transpose(1, 2).contiguous()  # (panels, in, panel)
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


def pack_render(weight: Tensor) -> Tensor:
    """A layer of lm's render MLP (out, in) in panels of output channels (csrc/render.h), padded."""
    out, inp = (round_up(n, RENDER_PAD) for n in weight.shape)
    return pad_to(weight, out, inp).view(-1, RENDER_PAD, inp).transpose(1, 2).contiguous()  # (panels, in, 16)


class PackedExperts:
    """Expert weights in the kernel's layout: prepared once per model and precision.

    Args:
        experts: For each expert None if it has no layers, which predicts 0, or a dict with
            `w_rel` (2, D): coefficients of the relative row and column in hidden layer 1; None for LTE;
            `hidden`: list of (weight (out, in), bias (out)): all of LTE's hidden layers; from the second on else;
            `last`: (weight (C, in), bias (C)).
        precision: 'fp32' or 'bf16' (bf16 activations and weights, fp32 sums; coordinates, blend, output layer and lm's
            render MLP in fp32). Falls back to fp32 arithmetic where the processor has no bf16 instructions.
        family: 'liif', 'lte' or 'lm'; lm's hidden layers of one expert have one width.
        isa: One of `supported_isas()` instead of the fastest one.

    Raises:
        ValueError: Widths that do not fit each other, or an unknown precision or instruction set.
    """

    def __init__(
        self, experts: Sequence[dict | None], precision: str = 'fp32', family: str = 'liif', isa: str | None = None
    ) -> None:
        self.isa = choose_isa(precision, isa)
        if not 1 <= len(experts) <= 256:
            raise ValueError(f'the kernels take 1 to 256 experts; got {len(experts)}.')
        self.num_experts, self.family = len(experts), family
        self.out_channels = next(expert['last'][0].shape[0] for expert in experts if expert is not None)
        # Channels of each expert's table, 0 without layers; LTE: 2K.
        self.widths = [0 if expert is None else self._check(j, expert) for j, expert in enumerate(experts)]
        if family == 'lte' and len(set(self.widths) - {0}) > 1:
            raise ValueError(f'LTE experts share one basis; got input widths {self.widths}.')
        self._keep: list[object] = []  # the tensors and arrays that the structures below point into
        self.array = (Expert * len(experts))(*(Expert() if e is None else self._pack(e) for e in experts))

    def _check(self, j: int, expert: dict) -> int:
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
            raise ValueError(f'expert {j}: {have} output channels; another has {self.out_channels}.')
        if self.family == 'lm':
            return (2 * len(chain) + 1) * round_up(width, RENDER_PAD)  # see csrc/render.h
        return width

    def _hold(self, x: Tensor) -> int:
        self._keep.append(x)
        return x.data_ptr()

    def _pack(self, expert: dict) -> Expert:
        last_weight, last_bias = expert['last']
        hidden, pad = expert['hidden'], RENDER_PAD if self.family == 'lm' else PAD
        if self.family == 'lte':  # cosine and sine half are padded each, as in the padded tables
            first = pad_halves(hidden[0][0])
            width, w_rel = first.shape[1], None
            hidden = [(first, hidden[0][1]), *hidden[1:]]
        else:
            width = round_up(expert['w_rel'].shape[1], pad)
            w_rel = self._hold(pad_to(expert['w_rel'], 2, width))
        layers = (Layer * len(hidden))(*(self._pack_layer(*layer) for layer in hidden))
        self._keep.append(layers)
        last_width = round_up(last_weight.shape[1], pad)
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
        pad, packed = PAD, pack_weight(weight, self.isa)
        if self.family == 'lm':
            pad, packed = RENDER_PAD, pack_render(weight)
        out, inp = (round_up(n, pad) for n in weight.shape)
        return Layer(inp, out, self._hold(packed), self._hold(pad_to(bias, out)))


class PackedConv:
    """The 3x3 convolution that makes an expert's LR table; lm's has further layers, with ReLU between them.

    Faster than torch's: AMX serves fp32 too, and elsewhere only the cells that the expert's pixels read are computed,
    about half of them where texture comes in patches.

    Args:
        weights: (D, C, 3, 3); of further layers (D_out, D_in).
        isa: As for `PackedExperts`; operands as there, sums and result in fp32.

    Raises:
        ValueError: This processor has no such instructions.
    """

    def __init__(self, weights: Sequence[Tensor], isa: str) -> None:
        self.isa = choose_isa('fp32', isa)
        self.takes_cells = not isa.startswith('amx')
        self.in_channels, self.out_channels = weights[0].shape[1], weights[-1].shape[0]
        self.padded = round_up(self.in_channels)
        # Row, column, channel: in a channels-last window three neighbours of a row are contiguous.
        flat = F.pad(weights[0].detach().permute(0, 2, 3, 1), (0, self.padded - self.in_channels)).flatten(1)
        pad, layers = panel_of(isa), (flat, *weights[1:])
        self.sizes = [(round_up(weight.shape[1], pad), round_up(weight.shape[0], pad)) for weight in layers]
        self.weights = [pack_weight(weight, isa, pad) for weight in layers]

    def __call__(self, window: Tensor, biases: Sequence[Tensor], cells: Tensor | None = None) -> Tensor:
        """The table of a window.

        Args:
            window: (C, Ht + 2, Wt + 2), with a halo of one code per side; quickest where it is channels-last.
            biases: (D) fp32 of each layer.
            cells: (N,) int64 cells to compute, in row-major numbers; the others hold nothing. AMX computes all.

        Returns:
            (Ht, Wt, D) fp32, a view if D was padded.
        """
        if window.shape[0] != self.in_channels:
            raise ValueError(f'the window must have {self.in_channels} channels; got {tuple(window.shape)}.')
        height, width = (n - 2 for n in window.shape[1:])
        window = window.detach().float().permute(1, 2, 0)  # (Ht + 2, Wt + 2, C)
        window = F.pad(window, (0, self.padded - self.in_channels)).contiguous()
        out = torch.empty(height, width, self.sizes[-1][1])
        padded = [pad_to(bias, size[1]) for bias, size in zip(biases, self.sizes, strict=True)]
        layers = (Layer * len(padded))(
            *(Layer(*size, w.data_ptr(), b.data_ptr()) for size, w, b in zip(self.sizes, self.weights, padded))
        )
        job = TableJob(layers, len(layers), window.data_ptr(), self.padded, height, width, out.data_ptr())
        job.num_threads = torch.get_num_threads()
        if cells is not None and self.takes_cells:
            job.cells, job.num_cells = cells.data_ptr(), cells.shape[0]
        if call('moeisr_table', job, self.isa):
            raise MemoryError('no memory for the activation blocks of the LR tables.')
        return out[..., : self.out_channels]
