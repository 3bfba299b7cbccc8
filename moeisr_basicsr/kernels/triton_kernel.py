"""The device code of `triton_decode`: `decode_kernel` answers LIIF's and LTE's queries, `render_kernel` those of lm,
`route_kernel` chooses their experts.

A program of `decode_kernel` takes a block of queries of one expert, with all four corners of each. Its activations
are one matrix of 4 * BLOCK rows that never leaves the chip; weights are read from L2 in chunks. Triton cannot slice a
matrix held in registers, so layers alternate between two forms:

    layer 0      sum over chunks of its inputs, each chunk made from the LR table on the spot
    layers 1, 2  for a chunk of layer 1's outputs: compute it, apply ReLU, add its share of layer 2 (3 and 4 alike)
    last layer   in one go, where it is not the second of such a pair: it has a handful of outputs

The last layer runs before the blend of the corners here, after it elsewhere (it is linear, so both are the same):
on tensor cores it costs a 16th of a hidden layer, and 16 columns are blended across threads in place of 256.

Legend: (R, S) output rows and columns, N = R * S queries, M = 4 * BLOCK rows of a program (row 4 q + c is corner c
of query q), T latent codes, D_IN width of layer 0's input, D hidden width, D_OUT output channels; all widths are
padded to powers of two, at least 16.
"""

import triton
import triton.language as tl


@triton.jit
def _corners(
    order,
    count,
    row_index,
    row_rel,
    col_index,
    col_rel,
    n_rows,
    n_cols,
    table_width,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
):
    """Latent code, relative coordinate and ensemble weight of each corner of this program's queries, all (M,).

    The arithmetic of `core.coords.ensemble_weight`, in its order. Codes are int64, as `GridAxis` has them.
    """
    lane = tl.arange(0, 4 * BLOCK)
    corner = lane % 4
    number = tl.minimum(tl.program_id(0) * BLOCK + lane // 4, count - 1)  # tables have rows of this expert's codes only
    query = tl.load(order + number).to(tl.int32)  # (M,)
    row, col = query // n_cols, query % n_cols
    up, down = tl.load(row_rel + row), tl.load(row_rel + n_rows + row)
    left, right = tl.load(col_rel + col), tl.load(col_rel + n_cols + col)
    is_up, is_left = corner < 2, corner % 2 == 0
    opposite = tl.abs(tl.where(is_up, down, up) * tl.where(is_left, right, left)) + EPS
    total = (tl.abs(up * left) + EPS) + (tl.abs(up * right) + EPS)
    total = total + (tl.abs(down * left) + EPS) + (tl.abs(down * right) + EPS)
    code = tl.load(row_index + tl.where(is_up, 0, n_rows) + row) * table_width
    code += tl.load(col_index + tl.where(is_left, 0, n_cols) + col)
    return code, tl.where(is_up, up, down), tl.where(is_left, left, right), opposite / total


@triton.jit
def _dot(x, weight, total, DOT: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """total + x @ weight with x rounded to the weight's type and fp32 sums."""
    if EMULATE_BF16:  # the interpreter truncates to bf16, and multiplies its bits as integers; both mended here
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536  # to nearest, ties to even
        return tl.dot(bits.to(tl.float32, bitcast=True), weight.to(tl.float32), total, input_precision=DOT)
    return tl.dot(x.to(weight.dtype), weight, total, input_precision=DOT)


@triton.jit
def _liif_layer(
    table,
    w_coord,
    weights,
    rel_row,
    rel_col,
    D_IN: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """relu(table + rel . w_rel + bias) @ weights: (M, N); `table` points to each row's latent code, (M,)."""
    outer = tl.arange(0, N)
    x = tl.zeros((rel_row.shape[0], N), dtype=tl.float32)
    for start in range(0, D_IN, CHUNK):
        at = start + tl.arange(0, CHUNK)
        w_row, w_col = tl.load(w_coord + at), tl.load(w_coord + D_IN + at)
        part = tl.load(table[:, None] + at[None, :]).to(tl.float32) + tl.load(w_coord + 2 * D_IN + at)[None, :]
        part += rel_row[:, None] * w_row[None, :] + rel_col[:, None] * w_col[None, :]  # (M, CHUNK)
        part = tl.maximum(part, 0.0)
        weight = tl.load(weights + at[:, None] * N + outer[None, :])  # (CHUNK, N)
        x = _dot(part, weight, x, DOT, EMULATE_BF16)
    return x


@triton.jit
def _lte_layer(
    coef,
    freq,
    phase,
    weights,
    rel_row,
    rel_col,
    HALF: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """(coef * [cos, sin](pi (freq . rel + phase))) @ weights: (M, N); HALF is the number of frequencies."""
    outer = tl.arange(0, N)
    x = tl.zeros((rel_row.shape[0], N), dtype=tl.float32)
    for start in range(0, HALF, CHUNK):
        at = start + tl.arange(0, CHUNK)
        angle = tl.load(freq[:, None] + at[None, :]) * rel_row[:, None]
        angle += tl.load(freq[:, None] + HALF + at[None, :]) * rel_col[:, None]
        angle = 3.141592653589793 * (angle + tl.load(phase + at)[None, :])  # (M, CHUNK)
        part = tl.load(coef[:, None] + at[None, :]) * tl.cos(angle)
        weight = tl.load(weights + at[:, None] * N + outer[None, :])  # (CHUNK, N)
        x = _dot(part, weight, x, DOT, EMULATE_BF16)
        part = tl.load(coef[:, None] + HALF + at[None, :]) * tl.sin(angle)
        weight = tl.load(weights + (HALF + at)[:, None] * N + outer[None, :])
        x = _dot(part, weight, x, DOT, EMULATE_BF16)
    return x


@triton.jit
def _layer_pair(
    x,
    weight_in,
    weight_out,
    bias,
    D: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """relu(relu(x) @ weight_in + bias) @ weight_out: (M, D) -> (M, N)."""
    hidden = tl.arange(0, D)
    outer = tl.arange(0, N)
    x = tl.maximum(x, 0.0)
    y = tl.zeros((x.shape[0], N), dtype=tl.float32)
    for start in range(0, D, CHUNK):
        at = start + tl.arange(0, CHUNK)
        weight = tl.load(weight_in + hidden[:, None] * D + at[None, :])  # (D, CHUNK)
        part = tl.zeros((x.shape[0], CHUNK), dtype=tl.float32) + tl.load(bias + at)[None, :]
        part = _dot(x, weight, part, DOT, EMULATE_BF16)  # (M, CHUNK)
        weight = tl.load(weight_out + at[:, None] * N + outer[None, :])  # (CHUNK, N)
        y = _dot(tl.maximum(part, 0.0), weight, y, DOT, EMULATE_BF16)
    return y


@triton.jit
def _answer(
    out, order, count, x, blend, bias, n_queries, CHANNELS: tl.constexpr, D_OUT: tl.constexpr, BLOCK: tl.constexpr
):
    """Blends the corners' outputs (M, D_OUT) and writes them."""
    channel = tl.arange(0, D_OUT)
    answer = tl.sum(tl.reshape(x * blend[:, None], (BLOCK, 4, D_OUT)), axis=1)  # (BLOCK, D_OUT)
    answer += tl.load(bias + channel)[None, :]
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    query = tl.load(order + number, mask=number < count, other=0).to(tl.int64)
    place = channel[None, :].to(tl.int64) * n_queries + query[:, None]
    tl.store(out + place, answer, mask=(number < count)[:, None] & (channel < CHANNELS)[None, :])


# Unspecialised: these change from tile to tile, and each special case would be another compilation.
@triton.jit(do_not_specialize=['order', 'count', 'n_rows', 'n_cols', 'table_width'])
def decode_kernel(
    out,
    order,
    row_index,
    row_rel,
    col_index,
    col_rel,
    table,
    freq,
    w_coord,
    weights,
    biases,
    count,
    n_rows,
    n_cols,
    table_width,
    table_stride,
    LTE: tl.constexpr,
    LAYERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    D_IN: tl.constexpr,
    D: tl.constexpr,
    D_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    EPS: tl.constexpr,
):
    """One block of queries of one expert.

    Args:
        out: (CHANNELS, N) fp32.
        order: (count,) numbers of this expert's queries.
        row_index: (2, R) int64; row_rel (2, R) fp32; col_index and col_rel (2, S): `GridAxis`.
        table: LIIF: (T, D_IN). LTE: the coefficients (T, D_IN), cosine half before sine half.
        freq: LTE: (T, D_IN) fp32, row frequencies before column frequencies. LIIF: not read.
        w_coord: LIIF: (3, D_IN) fp32, row and column coefficients, bias. LTE: (D_IN / 2) phase.
        weights: All layers, each (inputs, outputs), one after the other.
        biases: (LAYERS - 1) * D values, then D_OUT.
    """
    code, rel_row, rel_col, blend = _corners(
        order, count, row_index, row_rel, col_index, col_rel, n_rows, n_cols, table_width, BLOCK, EPS
    )
    code = code * table_stride  # int64: tables may be large

    hidden = tl.arange(0, D)
    channel = tl.arange(0, D_OUT)
    N0: tl.constexpr = D if LAYERS > 1 else D_OUT
    if LTE:
        x = _lte_layer(
            table + code, freq + code, w_coord, weights, rel_row, rel_col, D_IN // 2, N0, CHUNK, DOT, EMULATE_BF16
        )
    else:
        x = _liif_layer(table + code, w_coord, weights, rel_row, rel_col, D_IN, N0, CHUNK, DOT, EMULATE_BF16)
    rest = weights + D_IN * N0  # of layer 1 and on
    for layer in tl.static_range(1, LAYERS - 1, 2):  # this layer and the next one
        x += tl.load(biases + (layer - 1) * D + hidden)[None, :]
        x = _layer_pair(
            x,
            rest + (layer - 1) * D * D,
            rest + layer * D * D,
            biases + layer * D,
            D,
            D_OUT if layer + 2 == LAYERS else D,
            CHUNK,
            DOT,
            EMULATE_BF16,
        )
    if LAYERS % 2 == 0:
        x = tl.maximum(x + tl.load(biases + (LAYERS - 2) * D + hidden)[None, :], 0.0)
        weight = tl.load(rest + (LAYERS - 2) * D * D + hidden[:, None] * D_OUT + channel[None, :])  # (D, D_OUT)
        x = _dot(x, weight, tl.zeros((4 * BLOCK, D_OUT), dtype=tl.float32), DOT, EMULATE_BF16)

    _answer(out, order, count, x, blend, biases + (LAYERS - 1) * D, n_rows * n_cols, CHANNELS, D_OUT, BLOCK)


@triton.jit
def _modulate(x, scale, to_shift):
    """relu(x * scale + shift), (M, D); `scale` points to the scales of each row's latent code."""
    return tl.maximum(x * tl.load(scale).to(tl.float32) + tl.load(scale + to_shift).to(tl.float32), 0.0)


@triton.jit(do_not_specialize=['order', 'count', 'n_rows', 'n_cols', 'table_width', 'table_stride'])
def render_kernel(
    out,
    order,
    row_index,
    row_rel,
    col_index,
    col_rel,
    table,
    w_rel,
    weights,
    biases,
    count,
    n_rows,
    n_cols,
    table_width,
    table_stride,
    LAYERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    D: tl.constexpr,
    D_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    EPS: tl.constexpr,
):
    """One block of queries of one expert of lm, LAYERS hidden layers; arguments as for `decode_kernel`, but:

    Args:
        table: (T, (2 * LAYERS + 1) * D), as `latent.latent_of` has it.
        w_rel: (2, D) fp32.
        weights: Of layers 2 to LAYERS and the last one.
    """
    code, rel_row, rel_col, blend = _corners(
        order, count, row_index, row_rel, col_index, col_rel, n_rows, n_cols, table_width, BLOCK, EPS
    )
    hidden = tl.arange(0, D)
    channel = tl.arange(0, D_OUT)
    scale = table + (code * table_stride)[:, None] + hidden[None, :]  # (M, D)
    x = tl.load(scale + 2 * LAYERS * D).to(tl.float32)
    x += rel_row[:, None] * tl.load(w_rel + hidden)[None, :] + rel_col[:, None] * tl.load(w_rel + D + hidden)[None, :]
    x = _modulate(x, scale, LAYERS * D)
    for layer in tl.static_range(1, LAYERS):
        weight = tl.load(weights + (layer - 1) * D * D + hidden[:, None] * D + hidden[None, :])
        bias = tl.zeros((4 * BLOCK, D), dtype=tl.float32) + tl.load(biases + (layer - 1) * D + hidden)[None, :]
        x = _modulate(_dot(x, weight, bias, DOT, EMULATE_BF16), scale + layer * D, LAYERS * D)
    weight = tl.load(weights + (LAYERS - 1) * D * D + hidden[:, None] * D_OUT + channel[None, :])  # (D, D_OUT)
    x = _dot(x, weight, tl.zeros((4 * BLOCK, D_OUT), dtype=tl.float32), DOT, EMULATE_BF16)
    _answer(out, order, count, x, blend, biases + (LAYERS - 1) * D, n_rows * n_cols, CHANNELS, D_OUT, BLOCK)


@triton.jit(do_not_specialize=['count', 'n_cols', 'table_width'])
def route_kernel(
    logits,
    expert_map,
    table,
    row_index,
    row_rel,
    col_index,
    col_rel,
    w_rel,
    w_out,
    b_out,
    count,
    n_cols,
    table_width,
    WANT_LOGITS: tl.constexpr,
    J: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The mapper's per-query layers on a grid: logits, or the expert with the largest, the first among equals.

    Args:
        logits: (count, J) fp32, written if WANT_LOGITS.
        expert_map: (count,) uint8, written else.
        table: (T, WIDTH) fp32, cell term included.
        row_index: (R,) int64; row_rel (R,) fp32; col_index and col_rel (S,): `Near`.
        w_rel: (2, WIDTH). w_out: (J, WIDTH). b_out: (J,).
    """
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = number < count
    row = tl.where(live, number // n_cols, 0)
    col = tl.where(live, number % n_cols, 0)
    code = tl.load(row_index + row) * table_width + tl.load(col_index + col)
    at = tl.arange(0, PADDED)
    real = at < WIDTH
    x = tl.load(table + code[:, None] * WIDTH + at[None, :], mask=real[None, :], other=0.0)  # (BLOCK, PADDED)
    x += tl.load(row_rel + row)[:, None] * tl.load(w_rel + at, mask=real, other=0.0)[None, :]
    x += tl.load(col_rel + col)[:, None] * tl.load(w_rel + WIDTH + at, mask=real, other=0.0)[None, :]
    x = tl.maximum(x, 0.0)
    best = tl.full((BLOCK,), float('-inf'), dtype=tl.float32)
    choice = tl.zeros((BLOCK,), dtype=tl.int32)
    for j in tl.static_range(J):
        weight = tl.load(w_out + j * WIDTH + at, mask=real, other=0.0)
        logit = tl.sum(x * weight[None, :], axis=1) + tl.load(b_out + j)  # (BLOCK,)
        if WANT_LOGITS:
            tl.store(logits + number.to(tl.int64) * J + j, logit, mask=live)
        choice = tl.where(logit > best, j, choice)
        best = tl.maximum(best, logit)
    if not WANT_LOGITS:
        tl.store(expert_map + number, choice.to(tl.uint8), mask=live)


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter on the CPU: TRITON_INTERPRET=1 before Triton's first import."""
    return not isinstance(decode_kernel, triton.JITFunction)
