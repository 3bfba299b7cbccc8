"""The fused CPU kernels against plain loops over the four corners, in double precision and without folding tricks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeisr_basicsr.core.coords import GridAxis, grid_axis, make_coord
from moeisr_basicsr.kernels import cpu

needs_kernels = pytest.mark.skipif(not cpu.available(), reason=f'the fused kernels cannot run here: {cpu.reason()}')
ISAS = cpu.supported_isas()
TOLERANCE = {isa: 4e-3 if isa in cpu.ISAS['bf16'] else 1e-5 for isa in cpu.ALL_ISAS}  # on the [0, 1] scale


def linear(inp, out, generator):
    """Weight and bias as `nn.Linear` starts them."""
    bound = inp**-0.5
    return tuple((torch.rand(shape, generator=generator) * 2 - 1) * bound for shape in ((out, inp), (out,)))


def make_experts(widths, out_channels, seed=0, basis=None):
    """Experts with the given hidden widths; LIIF's, or LTE's on `basis` inputs."""
    generator = torch.Generator().manual_seed(seed)
    experts = []
    for hidden in widths:
        chain = [*hidden, out_channels] if basis is None else [basis, *hidden, out_channels]
        layers = [linear(inp, out, generator) for inp, out in zip(chain[:-1], chain[1:])]
        w_rel = None if basis is not None else torch.randn(2, hidden[0], generator=generator) * 0.3
        experts.append({'w_rel': w_rel, 'hidden': layers[:-1], 'last': layers[-1]})
    return experts


def make_map(size, num_experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_experts, size, generator=generator, dtype=torch.uint8)


def corner_weights(rows, cols):
    """Ensemble weights (2, 2, h, w): each corner by the area of the one diagonally opposite."""
    area = (rows.rel[:, None, :, None] * cols.rel[None, :, None, :]).abs() + 1e-9
    return area.flip(0, 1) / (area[0, 0] + area[0, 1] + area[1, 0] + area[1, 1])


def perceptron(x, layers, rounded=False):
    for n, (weight, bias) in enumerate(layers):
        if rounded and n + 1 < len(layers):  # the output layer is fp32 always
            x, weight = x.bfloat16(), weight.bfloat16()
        x = F.linear(x.double(), weight.double(), bias.double())
        if n + 1 < len(layers):
            x = F.relu(x)
    return x


def reference(experts, first, rows, cols, expert_map, rounded=False):
    """Every expert on every pixel and corner, blended after the last layer, then chosen. (C, h, w) double.

    `first(j, index, rel)` gives what expert j's MLP reads at cells (row, column) and relative coordinates; `rounded`
    takes the operands of hidden layers to bf16.
    """
    weight = corner_weights(rows, cols).double()
    out = []
    for j, expert in enumerate(experts):
        total = 0
        for a in range(2):
            for b in range(2):
                index = (rows.index[a][:, None], cols.index[b][None, :])
                rel = torch.stack(torch.broadcast_tensors(rows.rel[a][:, None], cols.rel[b][None, :]), dim=-1)
                x = first(j, index, rel.double())
                total = total + weight[a, b, ..., None] * perceptron(x, [*expert['hidden'], expert['last']], rounded)
        out.append(total)
    chosen = torch.stack(out).gather(0, expert_map.long()[None, ..., None].expand(1, -1, -1, total.shape[-1]))
    return chosen[0].permute(2, 0, 1)  # (C, h, w)


def liif_first(experts, tables):
    return lambda j, index, rel: F.relu(tables[j][index].double() + rel @ experts[j]['w_rel'].double())


def lte_first(tables):
    coef, freq, phase = (x.double() for x in tables)
    basis = phase.shape[0]

    def first(j, index, rel):
        angle = freq[index][..., :basis] * rel[..., :1] + freq[index][..., basis:] * rel[..., 1:] + phase
        return coef[index] * torch.cat([(torch.pi * angle).cos(), (torch.pi * angle).sin()], dim=-1)

    return first


def liif_tables(experts, size, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, expert['w_rel'].shape[1], generator=generator) * 0.5 for expert in experts]


def lte_tables(size, basis, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return cpu.LteTables(
        torch.randn(*size, 2 * basis, generator=generator),
        torch.randn(*size, 2 * basis, generator=generator) * 3,
        torch.rand(basis, generator=generator),
    )


def lm_experts(widths, seed=0):
    """Render MLPs of (width, hidden layers) for three channels; None without layers."""
    return [
        make_experts([[width] * depth], 3, seed + j)[0] if depth else None for j, (width, depth) in enumerate(widths)
    ]


def lm_tables(experts, size, seed=1):
    """Scales (their 1 included), shifts and first pre-activations, (h, w, parts, padded width) flattened."""
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for expert in experts:
        if expert is not None:
            width, layers = expert['w_rel'].shape[1], len(expert['hidden']) + 1
            rows = torch.randn(*size, 2 * layers + 1, width, generator=generator) * 0.5
            rows[..., :layers, :] += 1
            rows = F.pad(rows, (0, -width % 16)).flatten(2)
        tables.append(None if expert is None else rows)
    return tables


def lm_pixel(expert, table, corners):
    """One pixel in double: `corners` gives row, column, relative coordinate and weight of each."""
    answer = torch.zeros(3, dtype=torch.double)
    for row, col, rel, weight in corners:
        layers = len(expert['hidden']) + 1
        parts = table[row, col].double().unflatten(0, (2 * layers + 1, -1))[:, : expert['w_rel'].shape[1]]
        x = parts[-1] + rel.double() @ expert['w_rel'].double()
        for layer in range(layers):
            if layer:
                x = F.linear(x, *(part.double() for part in expert['hidden'][layer - 1]))
            x = F.relu(x * parts[layer] + parts[layers + layer])
        answer += weight.double() * F.linear(x, *(part.double() for part in expert['last']))
    return answer


def run(experts, tables, rows, cols, expert_map, isa=None, precision='fp32', tile=None, family='liif'):
    family = 'lte' if isinstance(tables, cpu.LteTables) else family
    packed = cpu.PackedExperts(experts, precision, family, isa)
    out = torch.full((packed.out_channels, *expert_map.shape), float('nan'))
    cpu.decode(packed, tables, rows, cols, expert_map, out, tile=tile)
    return out


@needs_kernels
@pytest.mark.parametrize('isa', ISAS)
@pytest.mark.parametrize(
    'lr_size, out_size, channels',
    [((5, 7), (20, 28), 3), ((4, 6), (12, 18), 1), ((6, 5), (17, 33), 3), ((1, 1), (4, 3), 5), ((3, 9), (3, 40), 8)],
)
def test_liif_matches_plain_loops(isa, lr_size, out_size, channels):
    """Integer, odd and unequal factors, borders, one LR pixel, any number of channels, widths that need padding."""
    experts = make_experts([[256], [20, 100], [3, 64, 256], [100, 33, 65, 32]], channels)
    tables = liif_tables(experts, lr_size)
    rows, cols = grid_axis(out_size[0], lr_size[0]), grid_axis(out_size[1], lr_size[1])
    expert_map = make_map(out_size, 4)
    expected = reference(experts, liif_first(experts, tables), rows, cols, expert_map)
    got = run(experts, tables, rows, cols, expert_map, isa)
    assert (got - expected).abs().max() <= TOLERANCE[isa]


@needs_kernels
@pytest.mark.parametrize('isa', ISAS)
@pytest.mark.parametrize('basis', [128, 10])
def test_lte_matches_plain_loops(isa, basis):
    """Frequencies of several turns per LR pixel."""
    experts = make_experts([[7], [256], [20, 100], [64, 64, 64]], 3, basis=2 * basis)
    tables = lte_tables((5, 6), basis)
    rows, cols = grid_axis(17, 5), grid_axis(30, 6)
    expert_map = make_map((17, 30), 4)
    expected = reference(experts, lte_first(tables), rows, cols, expert_map)
    got = run(experts, tables, rows, cols, expert_map, isa)
    assert (got - expected).abs().max() <= TOLERANCE[isa]


@needs_kernels
@pytest.mark.parametrize('isa', ISAS)
@pytest.mark.parametrize('lr_size, out_size', [((3, 5), (13, 11)), ((1, 1), (1, 1)), ((2, 7), (4, 15))])
def test_lm_matches_plain_loops(isa, lr_size, out_size):
    """Odd pixels per block, widths of one vector, less and more, one layer or many, none, one query."""
    experts = lm_experts([(16, 6), (5, 2), (0, 0), (40, 1), (33, 3)])
    tables = lm_tables(experts, lr_size)
    rows, cols = grid_axis(out_size[0], lr_size[0]), grid_axis(out_size[1], lr_size[1])
    expert_map = make_map(out_size, 5)
    got = run(experts, tables, rows, cols, expert_map, isa, family='lm')
    weights = corner_weights(rows, cols)
    for row in range(out_size[0]):
        for col in range(out_size[1]):
            corners = [
                (rows.index[a, row], cols.index[b, col], torch.stack([rows.rel[a, row], cols.rel[b, col]]), weight)
                for (a, b), weight in zip(((0, 0), (0, 1), (1, 0), (1, 1)), weights[..., row, col].flatten())
            ]
            j = int(expert_map[row, col])
            expected = torch.zeros(3) if experts[j] is None else lm_pixel(experts[j], tables[j], corners)
            assert (got[:, row, col] - expected).abs().max() <= 1e-5  # fp32 in any precision


@needs_kernels
@pytest.mark.parametrize('isa', [isa for isa in ISAS if isa in cpu.ISAS['fp32']])
def test_default_widths_stay_close_to_double(isa):
    """The error grows with depth: four layers of 256 with outputs of order one, still below 1e-5."""
    experts = make_experts([[256] * 4], 3)
    experts[0]['last'] = (experts[0]['last'][0] * 20, experts[0]['last'][1] + 0.5)
    tables = [table * 4 for table in liif_tables(experts, (6, 6))]
    axis = grid_axis(24, 6)
    expert_map = torch.zeros(24, 24, dtype=torch.uint8)
    expected = reference(experts, liif_first(experts, tables), axis, axis, expert_map)
    assert 0.5 < expected.abs().max() < 5
    assert (run(experts, tables, axis, axis, expert_map, isa) - expected).abs().max() <= 1e-5


@needs_kernels
def test_against_the_unfolded_algorithm():
    """LIIF as published, from the features on: unfold, nearest `grid_sample`, cell input, four whole MLP passes."""
    height, width, out_size, channels = 5, 6, (15, 22), 8
    feat = torch.randn(1, channels, height, width)
    mlp = [nn.Linear(channels * 9 + 4, 64), nn.Linear(64, 48), nn.Linear(48, 3)]
    coord = make_coord(out_size)[None]
    rel_cell = torch.tensor([2 / out_size[0] * height, 2 / out_size[1] * width])
    unfolded = F.unfold(feat, 3, padding=1).view(1, -1, height, width)
    centres = make_coord((height, width)).view(1, height, width, 2).permute(0, 3, 1, 2)
    answers, areas = [], []
    with torch.no_grad():
        for row_shift in (-1, 1):
            for col_shift in (-1, 1):
                at = coord + torch.tensor([row_shift / height, col_shift / width]) + 1e-6
                at = at.clamp(-1 + 1e-6, 1 - 1e-6).flip(-1)[:, None]
                code, centre = (
                    F.grid_sample(x, at, mode='nearest', align_corners=False)[0, :, 0].t() for x in (unfolded, centres)
                )
                rel = (coord[0] - centre) * torch.tensor([height, width])
                x = torch.cat([code, rel, rel_cell.expand_as(rel)], dim=-1)
                answers.append(mlp[2](F.relu(mlp[1](F.relu(mlp[0](x))))))
                areas.append((rel[:, 0] * rel[:, 1]).abs() + 1e-9)
        total = areas[0] + areas[1] + areas[2] + areas[3]
        expected = sum(answer * (area / total)[:, None] for answer, area in zip(answers, areas[::-1]))
        weight = mlp[0].weight
        bias = mlp[0].bias + weight[:, -2:] @ rel_cell
        table = F.conv2d(feat, weight[:, :-4].view(64, channels, 3, 3), bias, padding=1)[0].permute(1, 2, 0)
    experts = [
        {'w_rel': weight[:, -4:-2].t(), 'hidden': [(mlp[1].weight, mlp[1].bias)], 'last': (mlp[2].weight, mlp[2].bias)}
    ]
    got = run(
        experts,
        [table.contiguous()],
        grid_axis(out_size[0], height),
        grid_axis(out_size[1], width),
        torch.zeros(out_size, dtype=torch.uint8),
    )
    assert (got - expected.t().view(3, *out_size)).abs().max() <= 1e-5


@needs_kernels
@pytest.mark.parametrize('isa', ISAS)
@pytest.mark.parametrize('family', ['liif', 'lm'])
def test_result_depends_on_nothing_but_the_pixel(isa, family):
    """Bit for bit: any tile size, any number of threads, any neighbours, a part of the image or all of it."""
    experts = make_experts([[64], [64, 64], [32, 64, 96]], 3)
    tables = liif_tables(experts, (12, 11))
    if family == 'lm':
        experts = lm_experts([(16, 2), (16, 5), (0, 0)])
        tables = lm_tables(experts, (12, 11))
    rows, cols = grid_axis(50, 12), grid_axis(70, 11)
    expert_map = make_map((50, 70), 3)
    whole = run(experts, tables, rows, cols, expert_map, isa, family=family)
    for tile in ((1, 1), (3, 5), (64, 64)):
        assert torch.equal(run(experts, tables, rows, cols, expert_map, isa, tile=tile, family=family), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert torch.equal(run(experts, tables, rows, cols, expert_map, isa, family=family), whole)
    finally:
        torch.set_num_threads(threads)
    part = run(
        experts,
        tables,
        GridAxis(rows.index[:, 9:31], rows.rel[:, 9:31]),
        GridAxis(cols.index[:, 20:], cols.rel[:, 20:]),
        expert_map[9:31, 20:].contiguous(),
        isa,
        family=family,
    )
    assert torch.equal(part, whole[:, 9:31, 20:])
    first = run(experts, tables, rows, cols, torch.zeros_like(expert_map), isa, family=family)
    assert torch.equal(first[:, expert_map == 0], whole[:, expert_map == 0])


@needs_kernels
def test_tables_may_start_at_the_tile_and_views_are_read_and_written_in_place():
    """LR tables with their own origin, cut out of one wide channels-last tensor; `out` inside an image."""
    experts = make_experts([[32], [64, 32]], 3)
    wide = torch.randn(10, 9, 96)
    tables = [wide[..., :32], wide[..., 32:]]
    rows, cols = grid_axis(40, 10), grid_axis(36, 9)
    expert_map = make_map((40, 36), 2)
    whole = run(experts, [table.contiguous() for table in tables], rows, cols, expert_map)
    rows_part, cols_part = slice(13, 29), slice(5, 36)
    first_row = int(rows.index[:, rows_part].min())
    window = [table[first_row:] for table in tables]
    image = torch.full((3, 40, 36), -1.0)
    cpu.decode(
        cpu.PackedExperts(experts),
        window,
        GridAxis(rows.index[:, rows_part] - first_row, rows.rel[:, rows_part]),
        GridAxis(cols.index[:, cols_part], cols.rel[:, cols_part]),
        expert_map[rows_part, cols_part],
        image[:, rows_part, cols_part],
    )
    assert torch.equal(image[:, rows_part, cols_part], whole[:, rows_part, cols_part])
    image[:, rows_part, cols_part] = -1
    assert (image == -1).all()


@needs_kernels
def test_idle_expert_needs_no_table_and_a_chosen_one_does():
    experts = make_experts([[32], [32, 32], [64]], 3)
    tables = liif_tables(experts, (4, 4))
    axis = grid_axis(9, 4)
    expert_map = make_map((9, 9), 2) * 2  # experts 0 and 2
    full = run(experts, tables, axis, axis, expert_map)
    assert torch.equal(run(experts, [tables[0], None, tables[2]], axis, axis, expert_map), full)
    with pytest.raises(ValueError, match='needs its table'):
        run(experts, [tables[0], tables[1], None], axis, axis, expert_map)
    with pytest.raises(ValueError, match='0 to 2'):
        run(experts, tables, axis, axis, torch.full((9, 9), 3, dtype=torch.uint8))


@needs_kernels
@pytest.mark.parametrize('isa', ISAS)
def test_nan_is_not_swallowed(isa):
    """A broken network shows: ReLU keeps NaN, as torch's does."""
    experts = make_experts([[32], [32, 32, 32]], 1)
    tables = liif_tables(experts, (3, 3))
    for table in tables:
        table[1, 1, 5] = float('nan')
    axis = grid_axis(6, 3)
    for j in (0, 1):
        got = run(experts, tables, axis, axis, torch.full((6, 6), j, dtype=torch.uint8), isa)
        assert got[0, 2:4, 2:4].isnan().all() and not got[0, 0, 0].isnan()


@needs_kernels
def test_bad_input_is_named():
    experts = make_experts([[32]], 3)
    axis = grid_axis(8, 4)
    expert_map = torch.zeros(8, 8, dtype=torch.uint8)
    good = liif_tables(experts, (4, 4))
    with pytest.raises(ValueError, match='table 0 must be'):
        run(experts, [torch.zeros(4, 4, 31)], axis, axis, expert_map)
    with pytest.raises(ValueError, match='outside a table of 3 cells'):
        run(experts, [good[0][:3]], axis, axis, expert_map)
    with pytest.raises(ValueError, match='table 0 must be fp32'):
        run(experts, [good[0].half()], axis, axis, expert_map)
    with pytest.raises(ValueError, match='channels-last'):
        run(experts, [good[0].permute(2, 0, 1).contiguous().permute(1, 2, 0)], axis, axis, expert_map)
    with pytest.raises(ValueError, match='expert_map must be uint8'):
        run(experts, good, axis, axis, expert_map.long())
    with pytest.raises(ValueError, match='precision must be'):
        cpu.PackedExperts(experts, 'fp64')
    experts[0]['last'] = (torch.zeros(3, 40), torch.zeros(3))
    with pytest.raises(ValueError, match='expert 0, layer 0'):
        cpu.PackedExperts(experts)
    with pytest.raises(ValueError, match='share one basis'):
        cpu.PackedExperts(make_experts([[32]], 3, basis=64) + make_experts([[32]], 3, basis=32), family='lte')


@needs_kernels
@pytest.mark.parametrize('isa', ISAS)
@pytest.mark.parametrize('channels, out_channels, size', [(64, 256, (9, 14)), (5, 20, (1, 1)), (180, 100, (3, 70))])
def test_conv_matches_torch(isa, channels, out_channels, size):
    """The LR tables: a 3x3 convolution over a window with its halo; more cells than one block holds, odd widths."""
    bound = (9 * channels) ** -0.5
    weight, bias = (torch.rand(out_channels, channels, 3, 3) * 2 - 1) * bound, torch.randn(out_channels)
    window = torch.randn(channels, size[0] + 2, size[1] + 2)
    expected = F.conv2d(window[None].double(), weight.double(), bias.double())[0].permute(1, 2, 0)
    got = cpu.PackedConv([weight], isa)(window, [bias])
    assert got.shape == expected.shape
    tolerance = 2e-5 if isa in cpu.ISAS['fp32'] else 2e-2  # up to 1620 products one after the other, sums up to 5
    assert (got - expected).abs().max() <= tolerance
    cells = torch.arange(0, size[0] * size[1], 3)  # the others may hold anything
    some = cpu.PackedConv([weight], isa)(window, [bias], cells)
    assert (some - expected).flatten(0, 1)[cells].abs().max() <= tolerance
    second, shift = torch.randn(41, out_channels) * out_channels**-0.5, torch.randn(41)
    expected = F.linear(F.relu(expected), second.double(), shift.double())
    got = cpu.PackedConv([weight, second], isa)(window, [bias, shift], cells).flatten(0, 1)
    assert got.shape[1] == 41 and (got[cells] - expected.flatten(0, 1)[cells]).abs().max() <= tolerance
    with pytest.raises(ValueError, match=f'must have {channels} channels'):
        cpu.PackedConv([weight], isa)(window[1:], [bias])


@needs_kernels
def test_needed_cells_are_those_that_the_pixels_read():
    """At the border, at factors that are not whole, of a part of a map; an idle expert needs none."""
    rows, cols = grid_axis(17, 6), grid_axis(33, 9)
    whole = make_map((17, 33), 3) * (torch.arange(33) < 20)  # experts 1 and 2 on the left only; no expert 3
    rows, expert_map = GridAxis(rows.index[:, 4:], rows.rel[:, 4:]), whole[4:]
    needed = cpu.needed_cells(rows, cols, expert_map, (6, 9), 4)
    for j, cells in enumerate(needed):
        expected = sorted(
            {
                int(rows.index[a, r]) * 9 + int(cols.index[b, c])
                for r, c in (expert_map == j).nonzero().tolist()
                for a in (0, 1)
                for b in (0, 1)
            }
        )
        assert cells.tolist() == expected
    assert 0 < len(needed[1]) < 54 and len(needed[3]) == 0
    with pytest.raises(ValueError, match='0 to 1'):
        cpu.needed_cells(rows, cols, expert_map, (6, 9), 2)
    with pytest.raises(ValueError, match='outside a table of 5 cells'):
        cpu.needed_cells(rows, cols, expert_map, (5, 9), 4)


@needs_kernels
@pytest.mark.parametrize('isa', ISAS)
def test_zeros_left_out_change_nothing(isa):
    """Hidden vectors of which none, some or all channels are zero, other ones in each LR pixel."""
    experts = make_experts([[64, 64, 96]], 3)
    generator = torch.Generator().manual_seed(3)
    shift = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])[torch.randint(5, (5, 6, 1), generator=generator)]
    tables = [table + shift for table in liif_tables(experts, (5, 6))]
    rows, cols = grid_axis(21, 5), grid_axis(24, 6)
    expert_map = torch.zeros(21, 24, dtype=torch.uint8)
    bf16 = isa in cpu.ISAS['bf16']  # against large activations its own rounding would hide a missing channel
    expected = reference(experts, liif_first(experts, tables), rows, cols, expert_map, rounded=bf16)
    got = run(experts, tables, rows, cols, expert_map, isa)
    assert (got - expected).abs().max() <= (5e-4 if bf16 else 1e-5)


@needs_kernels
@pytest.mark.parametrize('hidden, num_experts', [(32, 4), (20, 2), (64, 9)])
def test_route_matches_torch(hidden, num_experts):
    table = torch.randn(6, 7, hidden)
    w_rel, w_out, b_out = torch.randn(2, hidden), torch.randn(num_experts, hidden), torch.randn(num_experts)
    rows = GridAxis(torch.arange(6).repeat_interleave(4), torch.rand(24) - 0.5)
    cols = GridAxis(torch.arange(7).repeat_interleave(3), torch.rand(21) - 0.5)
    rel = torch.stack(torch.broadcast_tensors(rows.rel[:, None], cols.rel[None]), dim=-1)
    x = F.relu(table[rows.index[:, None], cols.index[None]] + rel @ w_rel)
    expected = x @ w_out.t() + b_out
    expert_map, logits = torch.empty(24, 21, dtype=torch.uint8), torch.empty(24, 21, num_experts)
    cpu.route(table, rows, cols, w_rel, w_out, b_out, expert_map, logits=logits)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(expert_map.long(), logits.argmax(dim=-1))
    alone = torch.empty_like(expert_map)
    cpu.route(table, rows, cols, w_rel, w_out, b_out, alone)
    assert torch.equal(alone, expert_map)


@needs_kernels
def test_route_takes_the_first_of_equal_experts():
    expert_map = torch.empty(5, 5, dtype=torch.uint8)
    axis = GridAxis(torch.arange(5), torch.zeros(5))
    w_out = torch.ones(4, 32)
    w_out[0] = 0
    cpu.route(torch.ones(5, 5, 32), axis, axis, torch.zeros(2, 32), w_out, torch.zeros(4), expert_map)
    assert (expert_map == 1).all()
