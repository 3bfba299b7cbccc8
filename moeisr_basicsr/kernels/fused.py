"""The fused CPU kernels as a backend of `core.render`.

Shapes: as in `core.render`; D first hidden width, K frequencies of LTE.
"""

import torch
from torch import Tensor

from moeisr_basicsr.core.coords import GridAxis, Near
from moeisr_basicsr.core.decoder import MoEDecoder
from moeisr_basicsr.core.liif import LIIFExperts
from moeisr_basicsr.core.lte import LTEExperts
from moeisr_basicsr.core.mapper import Mapper
from moeisr_basicsr.core.render import Tile

from . import cpu


class FusedCPUBackend:
    """Decodes tiles of one decoder in C++; weights are packed once, at construction.

    Args:
        decoder: Its weights must not change afterwards; build a new backend then.
        precision: 'fp32' or 'bf16' for the experts. The mapper is fp32 always.
    """

    tile = 64  # measured: larger windows overlap less, and their tables still suit the caches

    def __init__(self, decoder: MoEDecoder, precision: str = 'fp32'):
        pool = decoder.pool
        experts = []
        for j in range(decoder.num_experts):
            linears = pool.linears(j)[1:] if isinstance(pool, LIIFExperts) else pool.linears(j)
            layers = [(layer.weight, layer.bias) for layer in linears]
            w_rel = pool.split_first(j)[1][:, :2].t() if isinstance(pool, LIIFExperts) else None
            experts.append({'w_rel': w_rel, 'hidden': layers[:-1], 'last': layers[-1]})
        self.packed = cpu.PackedExperts(experts, precision, decoder.family)
        if isinstance(pool, LIIFExperts):
            kernels, self.w_local = zip(*(pool.split_first(j) for j in range(pool.num_tables)))
            self.convs = [cpu.PackedConv([kernel], self.packed.isa) for kernel in kernels]

    @staticmethod
    def supports(decoder: MoEDecoder) -> bool:
        """Whether the kernels can decode these experts: a LIIF expert needs a hidden layer, weights are fp32."""
        return (
            (decoder.family == 'lte' or min(decoder.depths) > 0)
            and decoder.num_experts <= 256
            and all(parameter.dtype == torch.float32 for parameter in decoder.pool.parameters())
        )

    def decode(self, decoder: MoEDecoder, tile: Tile) -> Tensor:
        """(C_out, R, S) fp32."""
        size = tile.rows.rel.shape[1], tile.cols.rel.shape[1]
        expert_map = tile.expert_map
        if expert_map is None:
            expert_map = torch.zeros(size, dtype=torch.uint8)
        out = torch.empty(decoder.out_channels, *size)
        with torch.autocast('cpu', enabled=False):
            tables = self._liif_tables(decoder, tile) if decoder.family == 'liif' else self._lte_tables(decoder, tile)
        cpu.decode(self.packed, tables, tile.rows, tile.cols, expert_map, out)
        return out

    def _liif_tables(self, decoder: MoEDecoder, tile: Tile) -> list[Tensor | None]:
        """First-layer pre-activations (h, w, D) of the experts that the tile uses; bias and cell term included."""
        pool = decoder.pool
        assert isinstance(pool, LIIFExperts)
        window = tile.window.contiguous(memory_format=torch.channels_last)[0]

        def table(j: int, needed: Tensor | None) -> Tensor:
            bias = pool.linears(j)[0].bias + self.w_local[j][:, 2:] @ tile.cell_lr
            return self.convs[j](window, [bias], needed)

        if pool.num_tables == 1:
            return [table(0, None)] * decoder.num_experts
        assert tile.expert_map is not None  # several experts are routed
        size = tile.window.shape[-2] - 2, tile.window.shape[-1] - 2
        cells = cpu.needed_cells(tile.rows, tile.cols, tile.expert_map, size, decoder.num_experts)
        return [table(j, needed) if needed.numel() else None for j, needed in enumerate(cells)]

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
