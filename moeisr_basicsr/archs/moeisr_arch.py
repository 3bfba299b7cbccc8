"""MoEISR (Oh et al., arXiv 2311.12077), and its cases of one expert: dense LIIF, LTE and LMLIIF, and no decoder at all.

Shapes: B images, C_in and C_out channels, (H, W) LR size, (R, S) output rows and columns, Q queries, J experts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from basicsr.utils.registry import ARCH_REGISTRY
from pydantic import ConfigDict, Field, with_config
from torch import Tensor, nn
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on only

from moeisr_basicsr.core import (
    Draw,
    MoEDecoder,
    Predictions,
    Rendered,
    make_cell,
    make_coord,
    output_size,
    render_image,
)
from moeisr_basicsr.core.decoder import FAMILIES
from moeisr_basicsr.core.skip import SKIPS, ImageWindow, skip_at, skip_grid
from moeisr_basicsr.errors import UserError
from moeisr_basicsr.options.values import Count, Factors, Key, OneOf, Positive, Section, Weight, described

from .encoders import build_encoder

Skip = Literal['none', 'bilinear', 'bicubic', 'network']
Widths = Sequence[Positive]
Pair = tuple[int, int]
Family = Annotated[str, OneOf(FAMILIES)]
CELL_SCALE_MAX = {'lte': 4, 'lm': 4}  # trained up to x4, their test codes show them no smaller cell than x4's


@with_config(ConfigDict(extra='forbid'))
class LMLayers(TypedDict):
    """Of an expert of `core.lm`: hidden widths of its latent MLP, hidden layers of its render MLP."""

    latent: Widths
    depth: Positive


Experts = Sequence[
    Annotated[
        Widths | LMLayers,
        described(
            "a list of widths, or with 'lm' a section of a list of widths, `latent`, and a whole number, `depth`"
        ),
    ]
]


class MapperOptions(Section):
    """Of `core.mapper.Mapper`; the paper gives the number of convolutions only."""

    fills_defaults: ClassVar[bool] = False
    num_layers: Annotated[int, Field(ge=1, le=5)] = Key('convolutions on the features', 5)
    num_feat: Positive = Key('their width, and that of the layer per query', 32)
    granularity: Literal['output_pixel', 'lr_pixel'] = Key(
        'one decision per output pixel (the paper), or per LR pixel (MoEISR-J)', 'output_pixel'
    )


class Encoded(NamedTuple):
    """What an encoder makes of an image, or of a part of one."""

    feat: Tensor  # (B, C, H, W), the implicit representation
    image: Tensor | None  # (B, C_out, s H, s W), the base image; None without a skip


@ARCH_REGISTRY.register()
class MoEISR(nn.Module):
    """Any encoder x decoder family x experts x mapper. Images go in and out as RGB in [0, 1].

    Args:
        encoder: Options of a registered encoder, for example {'type': 'EDSREncoder', 'num_feat': 64}.
        decoder: Decoder family; `core.decoder.register_family` adds one.
        experts: Hidden widths of each expert, for example [[256], [256, 256]]; with 'lm' `latent`, the hidden widths of
            its latent MLP, and `depth`, the hidden layers of its render MLP, for example [{latent: [208], depth: 6}].
            [] is an expert without layers, which predicts 0. One expert is the dense decoder.
        mapper: num_layers (1 to 5), num_feat, granularity ('output_pixel' or 'lr_pixel').
        skip: Image that the decoder's output is added to: 'none', 'bilinear', 'bicubic', or 'network', the encoder's
            own fixed-scale output, resampled. With the last two the decoder's output starts at zero, so that training
            starts at that image's quality.
        in_channels: C_in.
        out_channels: C_out; a skip needs C_in = C_out.
        scale: Factor of `net(lq)`, one or [rows, columns]; at least 1.
        hidden_dim: Width of LTE's Fourier basis; None for its default of 256.
        render_width: Width of the render MLPs of 'lm'; None for its default of 16.
        cell_scale_max: Largest factor whose cell the decoder is shown, best the largest that it is trained on: cells
            that it never saw cost up to 0.04 dB at x6 and x8. None for 4 with LTE and LM (their official test codes)
            and no limit with LIIF; 0 for no limit.
        shared_layers: How many leading hidden layers the experts have in common, whose widths must agree; 0 for none.
            With 'liif' one LR table then serves all. As many as the deepest expert has make the experts exits of one
            network at different depths.
        **family_options: Further arguments of a decoder family of one's own.
    """

    encoder: Any  # any network with `num_feat`; with `skip: network` it has `with_image` and `scale`

    def __init__(
        self,
        encoder: dict,
        decoder: Family = 'liif',
        experts: Experts = ((256,), (256,) * 2, (256,) * 3, (256,) * 4),
        mapper: Annotated[dict | None, MapperOptions] = None,
        skip: Skip = 'none',
        in_channels: Positive = 3,
        out_channels: Positive = 3,
        scale: Factors | None = None,
        hidden_dim: Positive | None = None,
        cell_scale_max: Weight | None = None,
        shared_layers: Count = 0,
        render_width: Positive | None = None,
        **family_options: Any,
    ):
        super().__init__()
        if skip not in SKIPS:
            raise UserError(f'skip must be one of {SKIPS}; got {skip!r}.')
        if skip != 'none' and in_channels != out_channels:
            raise UserError(f"skip '{skip}' needs in_channels = out_channels; got {in_channels} and {out_channels}.")
        family = dict(family_options)
        for name, value, owner in (('hidden_dim', hidden_dim, 'lte'), ('render_width', render_width, 'lm')):
            if value is not None:
                family[name] = value
                if decoder != owner:
                    raise UserError(f'{name} belongs to the decoder {owner!r}; the decoder is {decoder!r}.')
        self.skip = skip
        self.in_channels, self.scale = in_channels, scale
        self.cell_scale_max = CELL_SCALE_MAX.get(decoder, 0) if cell_scale_max is None else cell_scale_max
        self.encoder, num_feat = build_encoder(encoder, in_channels, tail=skip == 'network')
        try:
            self.decoder = MoEDecoder(
                num_feat, out_channels, decoder, experts, mapper, shared_layers=shared_layers, **family
            )
        except ValueError as error:  # the method knows nothing of users
            raise UserError(str(error)) from error
        if skip in ('bicubic', 'network'):
            self.decoder.pool.scale_output(0)

    @staticmethod
    def passes_on(network_opt: Mapping[str, Any]) -> Callable | None:
        """What takes `**family_options`, for the check of options."""
        return FAMILIES.get(network_opt.get('decoder', 'liif'))

    @property
    def num_experts(self) -> int:
        """J."""
        return self.decoder.num_experts

    @property
    def expert_macs(self) -> list[int]:
        """Multiply-adds of each expert per output pixel, LR tables and mapper not counted."""
        return self.decoder.expert_macs

    @property
    def expert_costs(self) -> Tensor:
        """(J,) each expert's multiply-adds over those of the most expensive one."""
        return self.decoder.expert_costs

    def encode(self, lq: Tensor) -> Encoded:
        """The implicit representation z = E(lq) and the base image of the skip: (B, C_in, H, W) in [0, 1]."""
        scaled = lq * 2 - 1  # LIIF feeds its encoder [-1, 1]
        if self.skip == 'network':
            feat, image = self.encoder.with_image(scaled)
            return Encoded(feat, image.to(lq.dtype))  # 16 bit under autocast
        return Encoded(self.encoder(scaled), None if self.skip == 'none' else lq)

    def forward(
        self, lq: Tensor, coord: Tensor | None = None, cell: Tensor | None = None, draw: Draw | None = None
    ) -> Tensor | Predictions:
        """Upscale by the network's own `scale`, or answer queries.

        Args:
            lq: (B, C_in, H, W) in [0, 1].
            coord: (B, Q, 2) in [-1, 1], rows first; None for a whole image at `scale`.
            cell: (B, Q, 2), 2 / output size; shown to the decoder as `cell_scale_max` allows.
            draw: A training step's noise and temperature, for an objective that needs more than the mixture.

        Returns:
            (B, C_out, R, S) without coordinates; (B, Q, C_out) with them; every expert's predictions with a draw.
        """
        if coord is None:
            return self.upscale(lq)
        assert cell is not None, 'coord and cell come together'
        (feat, image), shown = self.encode(lq), self.shown_cell(cell, (lq.shape[-2], lq.shape[-1]))
        base = lq.new_tensor(0.5) if image is None else skip_at(image, coord, cell, self.skip)
        # The decoder works in [-1, 1], the image lies in [0, 1]; under autocast the image keeps the input's precision.
        if draw is None:
            return self.decoder(feat, coord, shown).prediction.to(lq.dtype) * 0.5 + base
        experts, routing = self.decoder.predict(feat, coord, shown, draw)
        return Predictions(experts.to(lq.dtype) * 0.5 + (base.unsqueeze(2) if base.dim() else base), routing)

    def logits(self, lq: Tensor, coord: Tensor, cell: Tensor) -> Tensor:
        """The mapper's logits, (B, Q, J); arguments as for `forward`."""
        return self.decoder.logits(self.encode(lq).feat, coord, self.shown_cell(cell, (lq.shape[-2], lq.shape[-1])))

    def upscale(self, lq: Tensor) -> Tensor:
        """The whole image at the network's `scale`, with gradients in training: (B, C_out, R, S)."""
        if self.scale is None:
            raise UserError('net(lq) without coordinates needs `scale` in network_g.')
        size = output_size((lq.shape[-2], lq.shape[-1]), self.scale)
        if not self.training:
            return self.decode_image(self.encode(lq), size).output
        batch = lq.shape[0]
        coord = make_coord(size, lq.device).expand(batch, -1, -1)  # (B, R * S, 2)
        cell = make_cell(size, lq.device).expand(batch, coord.shape[1], -1)
        output = self.forward(lq, coord, cell)
        assert isinstance(output, Tensor)  # without a draw
        return output.transpose(1, 2).unflatten(-1, size)

    def decode_image(self, encoded: Encoded, size: tuple[int, int]) -> Rendered:
        """The whole image at any size (R, S), without gradients."""
        feat, image = encoded
        rendered = render_image(self.decoder, feat, size, self.test_cell((feat.shape[-2], feat.shape[-1]), size))
        base = None if image is None else ImageWindow.whole(image)
        return rendered._replace(output=self.add_skip(rendered.output, base, size, (0, size[0]), (0, size[1])))

    def add_skip(self, output: Tensor, base: ImageWindow | None, size: Pair, rows: Pair, cols: Pair) -> Tensor:
        """Decoder output to image: `output` (B, C_out, r, s) holds the region `rows`, `cols` of a whole of `size`."""
        return output * 0.5 + (0.5 if base is None else skip_grid(base, size, rows, cols, self.skip))

    def test_cell(self, lr_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """The cell that the decoder is shown for a whole image: (2,)."""
        return self.shown_cell(make_cell(size), lr_size)

    def shown_cell(self, cell: Tensor, lr_size: tuple[int, int]) -> Tensor:
        """What the decoder is shown for `cell` (..., 2), 2 / output size: at least the cell of `cell_scale_max`."""
        if not self.cell_scale_max:
            return cell
        return cell.maximum(2 / (self.cell_scale_max * cell.new_tensor(lr_size)))


@ARCH_REGISTRY.register()
class LIIF(MoEISR):
    """Dense LIIF (Chen et al., CVPR 2021, arXiv 2012.09161): one expert of four hidden layers."""

    def __init__(
        self,
        encoder: dict,
        hidden_list: Widths = (256,) * 4,
        skip: Skip = 'none',
        in_channels: Positive = 3,
        out_channels: Positive = 3,
        scale: Factors | None = None,
        cell_scale_max: Weight | None = None,
    ):
        super().__init__(
            encoder,
            'liif',
            [hidden_list],
            skip=skip,
            in_channels=in_channels,
            out_channels=out_channels,
            scale=scale,
            cell_scale_max=cell_scale_max,
        )


@ARCH_REGISTRY.register()
class LTE(MoEISR):
    """Dense LTE (Lee and Jin, CVPR 2022, arXiv 2111.08918): one expert of three hidden layers, bilinear skip."""

    def __init__(
        self,
        encoder: dict,
        hidden_list: Widths = (256,) * 3,
        hidden_dim: Positive = 256,
        skip: Skip = 'bilinear',
        in_channels: Positive = 3,
        out_channels: Positive = 3,
        scale: Factors | None = None,
        cell_scale_max: Weight | None = None,
    ):
        super().__init__(
            encoder,
            'lte',
            [hidden_list],
            skip=skip,
            in_channels=in_channels,
            out_channels=out_channels,
            scale=scale,
            hidden_dim=hidden_dim,
            cell_scale_max=cell_scale_max,
        )


@ARCH_REGISTRY.register()
class LMLIIF(MoEISR):
    """Dense LM-LIIF (He and Jin, CVPR 2024, arXiv 2404.16451): one pair of latent and render MLP."""

    def __init__(
        self,
        encoder: dict,
        latent: Widths = (208,),
        depth: Positive = 6,
        render_width: Positive = 16,
        skip: Skip = 'none',
        in_channels: Positive = 3,
        out_channels: Positive = 3,
        scale: Factors | None = None,
        cell_scale_max: Weight | None = None,
    ):
        super().__init__(
            encoder,
            'lm',
            [LMLayers(latent=latent, depth=depth)],
            skip=skip,
            in_channels=in_channels,
            out_channels=out_channels,
            scale=scale,
            render_width=render_width,
            cell_scale_max=cell_scale_max,
        )


@ARCH_REGISTRY.register()
class FixedScale(MoEISR):
    """The encoder's own fixed-scale output, resampled to any size: no decoder, the baseline of every table."""

    def __init__(
        self, encoder: dict, in_channels: Positive = 3, out_channels: Positive = 3, scale: Factors | None = None
    ):
        super().__init__(
            encoder, experts=[[]], skip='network', in_channels=in_channels, out_channels=out_channels, scale=scale
        )
