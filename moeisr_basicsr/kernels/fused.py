"""The fused CPU kernels as a backend of `core.render`.

Shapes: as in `core.render`; D first hidden width, K frequencies of LTE.
"""

import torch
from torch import Tensor

from moeisr_basicsr.core.coords import GridAxis, Near
from moeisr_basicsr.core.decoder import MoEDecoder
from moeisr_basicsr.core.liif import ExpertPool, LIIFExperts
from moeisr_basicsr.core.lm import LMExperts
from moeisr_basicsr.core.lte import LTEExperts
from moeisr_basicsr.core.mapper import Mapper
from moeisr_basicsr.core.render import Tile

from . import cpu
from .latent import first_of, latent_of
from .packed import RENDER_PAD, round_up


class FusedCPUBackend:
    """Decodes tiles of one decoder in C++; weights are packed once, at construction.

    Args:
        decoder: Its weights must not change afterwards; build a new backend then.
        precision: 'fp32' or 'bf16' for the experts. The mapper is fp32 always.
    """

    tile = 64  # measured: larger windows overlap less, and their tables still suit the caches

    def __init__(self, decoder: MoEDecoder, precision: str = 'fp32'):
        pool = decoder.pool
        layered = [j for j in range(decoder.num_experts) if pool.linears(j)]
        experts = [_pack_expert(pool, j) if j in layered else None for j in range(decoder.num_experts)]
        self.packed = cpu.PackedExperts(experts, precision, decoder.family)
        if isinstance(pool, LMExperts):
            self.latents = {j: latent_of(pool, j, round_up(pool.render_width, RENDER_PAD)) for j in layered}
        elif isinstance(pool, LIIFExperts):
            self.latents = {j: first_of(pool, j) for j in pool.owners}
        else:
            return  # LTE's convolutions run in torch
        self.convs = {j: cpu.PackedConv(latent.weights, self.packed.isa) for j, latent in self.latents.items()}

    @staticmethod
    def supports(decoder: MoEDecoder) -> bool:
        """Whether the kernels can decode these experts: their weights must be fp32."""
        return all(parameter.dtype == torch.float32 for parameter in decoder.pool.parameters())

    def decode(self, decoder: MoEDecoder, tile: Tile) -> Tensor:
        """(C_out, R, S) fp32."""
        size = tile.rows.rel.shape[1], tile.cols.rel.shape[1]
        expert_map = tile.expert_map
        if expert_map is None:
            expert_map = torch.zeros(size, dtype=torch.uint8)
        out = torch.empty(decoder.out_channels, *size)
        with torch.autocast('cpu', enabled=False):
            tables = self._lte_tables(decoder, tile) if decoder.family == 'lte' else self._tables(decoder, tile)
        if all(table is None for table in tables):  # every pixel takes an expert without layers
            return out.zero_()
        cpu.decode(self.packed, tables, tile.rows, tile.cols, expert_map, out)
        return out

    def _tables(self, decoder: MoEDecoder, tile: Tile) -> list[Tensor | None]:
        """LIIF's and lm's tables (h, w, D) of the experts that the tile uses; bias and cell term included."""
        window = tile.window.contiguous(memory_format=torch.channels_last)[0]

        def table(j: int, needed: Tensor | None) -> Tensor:
            return self.convs[j](window, self.latents[j].biases_at(tile.cell_lr), needed)

        if tile.expert_map is None:
            return [table(0, None)]
        if len(decoder.pool.shared):  # one table for all with layers
            shared = table(next(iter(self.convs)), None)
            return [shared if width else None for width in self.packed.widths]
        size = tile.window.shape[-2] - 2, tile.window.shape[-1] - 2
        cells = cpu.needed_cells(tile.rows, tile.cols, tile.expert_map, size, decoder.num_experts)
        return [table(j, needed) if j in self.convs and needed.numel() else None for j, needed in enumerate(cells)]

    def _lte_tables(self, decoder: MoEDecoder, tile: Tile) -> cpu.LteTables:
        """Coefficient and frequency (h, w, 2 K), the latter with its row parts first, and the phase."""
        pool = decoder.pool
        assert isinstance(pool, LTEExperts)
        height, width = (n - 2 for n in tile.window.shape[-2:])
        coef, freq = (table[0].unflatten(0, (height, width)) for table in pool.tables(tile.window.float(), padding=0))
        freq = freq.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2).contiguous()
        return cpu.LteTables(coef.contiguous(), freq, pool.phase(tile.cell_lr))

    def logits(self, mapper: Mapper, table: Tensor, rows: Near, cols: Near, cell_lr: Tensor) -> Tensor:
        """(R, S, J) fp32."""
        logits = torch.empty(rows.rel.shape[0], cols.rel.shape[0], mapper.query_out.out_features)
        self._map(mapper, table, rows, cols, cell_lr, logits)
        return logits

    def route(self, mapper: Mapper, table: Tensor, rows: Near, cols: Near, cell_lr: Tensor) -> Tensor:
        """(R, S) uint8."""
        return self._map(mapper, table, rows, cols, cell_lr, None)

    def _map(
        self, mapper: Mapper, table: Tensor, rows: Near, cols: Near, cell_lr: Tensor, logits: Tensor | None
    ) -> Tensor:
        w_rel, w_cell = mapper.split_query_in()
        w_rel = w_rel.t() if mapper.granularity == 'output_pixel' else torch.zeros_like(w_rel).t()
        experts = torch.empty(rows.rel.shape[0], cols.rel.shape[0], dtype=torch.uint8)
        first, last = int(rows.index[0]), int(rows.index[-1])
        with torch.autocast('cpu', enabled=False):
            table = (table[first : last + 1] + w_cell @ cell_lr).contiguous()
        cpu.route(
            table,
            GridAxis(rows.index - first, rows.rel),
            GridAxis(*cols),
            w_rel,
            mapper.query_out.weight,
            mapper.query_out.bias,
            experts,
            logits=logits,
        )
        return experts


def _pack_expert(pool: ExpertPool, j: int) -> dict:
    """Expert j as `PackedExperts` takes it."""
    first, *rest = pool.linears(j)
    if isinstance(pool, LTEExperts):
        w_rel, rest = None, [first, *rest]
    else:  # relative coordinate and cell are the last inputs
        w_rel = first.weight[:, -4:-2].t()
    layers = [(layer.weight, layer.bias) for layer in rest]
    return {'w_rel': w_rel, 'hidden': layers[:-1], 'last': layers[-1]}
