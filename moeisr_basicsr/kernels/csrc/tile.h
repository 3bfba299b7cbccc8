// One tile of output pixels: group by expert, gather, run the expert, blend, write. Included inside the namespace of
// one instruction set, after Vec. The matrix products come from the template argument `Gemm`:
//   Gemm::Act                   element of an activation block, float or uint16_t (bf16)
//   Gemm::kSplit                elements per channel
//   Gemm::kRows, kPixels        rows that stand together, pixels per block
//   Gemm::kCellOrder            whether pixels that read the same LR pixels should follow each other
//   Gemm::row(4 * pixel + corner)   where that row stands in an activation block
//   Gemm::write(Act *, Vec *)   kPad channels at once (kPad / lanes vectors)
//   Gemm::hidden(layer, in, out, rows, scratch)
//   Gemm::last(decode, expert, layer, in, block, scratch)   last hidden layer, blend, output layer
// A pixel's result depends on nothing but its own inputs: sums run over channels in a fixed order, whatever the tile,
// the block, the neighbours or the thread.

constexpr int kVecs = kPad / Vec::kLanes;  // vectors per step of kPad channels

// The pixels of one block, in the order in which their rows stand.
struct Block {
    int pixels, rows;             // rows: 4 * pixels, rounded up to whole micro-tiles by the Gemm
    int64_t cell[kBlockRows];     // LR pixel of each row
    float rel_row[kBlockRows], rel_col[kBlockRows];
    float weight[kBlockRows];     // of the local ensemble
    float *target[kBlockPixels];  // first output channel
};

static inline void prepare(const Decode &d, const Tile &tile, const uint16_t *order, int pixels, Block *block) {
    block->pixels = pixels;
    for (int i = 0; i < pixels; ++i) {
        const int64_t row = tile.row + (order[i] >> kColBits), col = tile.col + (order[i] & (kMaxTileCols - 1));
        const int64_t cell[2] = {d.row_index[row] * d.table_width, d.row_index[d.height + row] * d.table_width};
        const int64_t cell_col[2] = {d.col_index[col], d.col_index[d.width + col]};
        const __m128 rel_row = _mm_setr_ps(d.row_rel[row], d.row_rel[row], d.row_rel[d.height + row],
                                           d.row_rel[d.height + row]);
        const __m128 rel_col = _mm_setr_ps(d.col_rel[col], d.col_rel[d.width + col], d.col_rel[col],
                                           d.col_rel[d.width + col]);
        // LIIF's operations in LIIF's order: at the last row and column all four areas are near 0.
        const __m128 area = _mm_add_ps(_mm_andnot_ps(_mm_set1_ps(-0.0f), _mm_mul_ps(rel_row, rel_col)),
                                       _mm_set1_ps(1e-9f));
        float a[4];
        _mm_storeu_ps(a, area);
        const __m128 total = _mm_set1_ps(a[0] + a[1] + a[2] + a[3]);
        const __m128 opposite = _mm_shuffle_ps(area, area, _MM_SHUFFLE(0, 1, 2, 3));
        _mm_storeu_ps(block->weight + 4 * i, _mm_div_ps(opposite, total));
        _mm_storeu_ps(block->rel_row + 4 * i, rel_row);
        _mm_storeu_ps(block->rel_col + 4 * i, rel_col);
        for (int corner = 0; corner < 4; ++corner)
            block->cell[4 * i + corner] = cell[corner >> 1] + cell_col[corner & 1];
        block->target[i] = d.out + row * d.out_row_stride + col;
    }
}

// LIIF: first hidden layer = relu(table + relative coordinate).
template <class Gemm>
static inline void gather_rows(const Table &table, const Expert &e, const Block &block, typename Gemm::Act *out,
                               int64_t stride) {
    const float *w_row = e.w_rel, *w_col = e.w_rel + e.width;
    for (int row = 0; row < 4 * block.pixels; ++row) {
        const float *cell = table.data + block.cell[row] * table.stride;
        const Vec rel_row = set1(block.rel_row[row]), rel_col = set1(block.rel_col[row]);
        for (int64_t k = 0; k < e.width; k += kPad) {
            Vec hidden[kVecs];
            for (int v = 0; v < kVecs; ++v) {
                const int64_t at = k + v * Vec::kLanes;
                hidden[v] = relu(fma(rel_col, load(w_col + at), fma(rel_row, load(w_row + at), load(cell + at))));
            }
            Gemm::write(out + Gemm::row(row) * stride + k * Gemm::kSplit, hidden);
        }
    }
}

// sin(pi x) and cos(pi x), error about 1e-7. Reduction to a quarter turn is exact; the polynomials are minimax fits of
// sin(pi/2 r) / r and cos(pi/2 r) in r^2 on [0, 1/4].
static inline void sincospi(Vec x, Vec *sin_out, Vec *cos_out) {
    const Vec twice = add(x, x);
    const Vec quarter = round_nearest(twice);
    const Vec r = sub(twice, quarter);
    const Vec r2 = mul(r, r);
    Vec s = set1(-0.004602149213f);
    s = fma(s, r2, set1(0.07968021765f));
    s = fma(s, r2, set1(-0.6459634777f));
    s = fma(s, r2, set1(1.570796322f));
    Vec c = set1(0.0009067398984f);
    c = fma(c, r2, set1(-0.02086152834f));
    c = fma(c, r2, set1(0.2536694104f));
    c = fma(c, r2, set1(-1.233700549f));
    c = fma(c, r2, set1(1.0f));
    rotate(quarter, mul(s, r), c, sin_out, cos_out);
}

// LTE: coefficients times the cosine (first half) and sine (second half) of the local frequencies.
template <class Gemm>
static inline void basis_rows(const Decode &d, const Block &block, typename Gemm::Act *out, int64_t stride) {
    const int64_t basis = d.basis;
    for (int row = 0; row < 4 * block.pixels; ++row) {
        const float *coef = d.coef + block.cell[row] * d.coef_stride;
        const float *freq = d.freq + block.cell[row] * d.freq_stride;
        const Vec rel_row = set1(block.rel_row[row]), rel_col = set1(block.rel_col[row]);
        for (int64_t k = 0; k < basis; k += kPad) {
            Vec even[kVecs], odd[kVecs];
            for (int v = 0; v < kVecs; ++v) {
                const int64_t at = k + v * Vec::kLanes;
                // Two products, their sum, then the phase: the official order, so that large arguments agree.
                const Vec angle = add(mul(load(freq + at), rel_row), mul(load(freq + basis + at), rel_col));
                Vec sine, cosine;
                sincospi(add(angle, load(d.phase + at)), &sine, &cosine);
                even[v] = mul(load(coef + at), cosine);
                odd[v] = mul(load(coef + basis + at), sine);
            }
            Gemm::write(out + Gemm::row(row) * stride + k * Gemm::kSplit, even);
            Gemm::write(out + Gemm::row(row) * stride + (basis + k) * Gemm::kSplit, odd);
        }
    }
}

// Blend of the four corners and output layer for up to four channels. `corner(row, k)` gives one vector of a row.
template <int C, class Corner>
static inline void blend_channels(const Block &block, const Expert &e, int64_t first, int64_t plane_stride,
                                  const Corner &corner) {
    const float *w_last = e.w_last + first * e.last_width;
    for (int i = 0; i < block.pixels; ++i) {
        const Vec weight[4] = {set1(block.weight[4 * i]), set1(block.weight[4 * i + 1]),
                               set1(block.weight[4 * i + 2]), set1(block.weight[4 * i + 3])};
        Vec total[C];
        for (int c = 0; c < C; ++c) total[c] = zero();
        for (int64_t k = 0; k < e.last_width; k += Vec::kLanes) {
            Vec mean = mul(weight[0], corner(4 * i, k));
            for (int j = 1; j < 4; ++j) mean = fma(weight[j], corner(4 * i + j, k), mean);
            for (int c = 0; c < C; ++c) total[c] = fma(mean, load(w_last + c * e.last_width + k), total[c]);
        }
        for (int c = 0; c < C; ++c)
            block.target[i][(first + c) * plane_stride] = sum(total[c]) + e.b_last[first + c];
    }
}

template <class Corner>
static inline void blend(const Block &block, const Expert &e, int64_t channels, int64_t plane_stride,
                         const Corner &corner) {
    int64_t first = 0;
    for (; first + 4 <= channels; first += 4) blend_channels<4>(block, e, first, plane_stride, corner);
    switch (channels - first) {
        case 3: blend_channels<3>(block, e, first, plane_stride, corner); break;
        case 2: blend_channels<2>(block, e, first, plane_stride, corner); break;
        case 1: blend_channels<1>(block, e, first, plane_stride, corner); break;
        default: break;
    }
}

// An expert whose only hidden layer is the folded one: nothing to multiply, so the gather feeds the blend directly.
static inline void blend_gathered(const Decode &d, const Table &table, const Expert &e, const Block &block) {
    const float *w_row = e.w_rel, *w_col = e.w_rel + e.width;
    blend(block, e, d.channels, d.out_plane_stride, [&](int row, int64_t k) {
        const float *cell = table.data + block.cell[row] * table.stride;
        return relu(fma(set1(block.rel_col[row]), load(w_col + k),
                        fma(set1(block.rel_row[row]), load(w_row + k), load(cell + k))));
    });
}

template <class Gemm>
static inline void blend_rows(const Decode &d, const Expert &e, const Block &block, const float *in, int64_t stride) {
    blend(block, e, d.channels, d.out_plane_stride,
          [&](int row, int64_t k) { return load(in + Gemm::row(row) * stride + k); });
}

static void predict_zero(const Decode &d, const Block &block) {
    for (int64_t c = 0; c < d.channels; ++c)
        for (int i = 0; i < block.pixels; ++i) block.target[i][c * d.out_plane_stride] = 0;
}

static void render(const Decode &, const Table &, const Expert &, const Block &, const Scratch &);  // render.h

template <class Gemm>
static inline void run_block(const Decode &d, int64_t j, const Block &block, const Scratch &scratch) {
    using Act = typename Gemm::Act;
    const Expert &e = d.experts[j];
    if (!e.w_last) return predict_zero(d, block);
    if (d.modulated) return render(d, d.tables[j], e, block, scratch);
    Act *in = static_cast<Act *>(scratch.block[0]), *out = static_cast<Act *>(scratch.block[1]);
    if (d.tables) {
        const Table &table = d.tables[j];
        if (e.num_layers == 0) return blend_gathered(d, table, e, block);
        gather_rows<Gemm>(table, e, block, in, scratch.stride);
    } else {
        basis_rows<Gemm>(d, block, in, scratch.stride);
    }
    for (int64_t n = 0; n + 1 < e.num_layers; ++n) {
        Gemm::hidden(e.layers[n], in, out, block.rows, scratch);
        Act *swap = in;
        in = out;
        out = swap;
    }
    Gemm::last(d, e, e.layers[e.num_layers - 1], in, block, scratch);
}

// End of the run of output positions on one axis that read the same two LR pixels as position `at`.
static inline int64_t run_end(const int64_t *index, int64_t positions, int64_t at, int64_t stop) {
    int64_t end = at + 1;
    while (end < stop && index[end] == index[at] && index[positions + end] == index[positions + at]) ++end;
    return end;
}

// Calls visit(row, column) for each pixel of the tile, counted from its first; with `by_cell` those that read the same
// four LR pixels follow each other.
template <class Visit>
static inline void each_pixel(const Decode &d, const Tile &tile, bool by_cell, const Visit &visit) {
    const int64_t rows = tile.row + tile.rows, cols = tile.col + tile.cols;
    for (int64_t top = tile.row, bottom; top < rows; top = bottom) {
        bottom = by_cell ? run_end(d.row_index, d.height, top, rows) : rows;
        for (int64_t left = tile.col, right; left < cols; left = right) {
            right = by_cell ? run_end(d.col_index, d.width, left, cols) : cols;
            for (int64_t r = top; r < bottom; ++r)
                for (int64_t c = left; c < right; ++c) visit(r - tile.row, c - tile.col);
        }
    }
}

template <class Gemm>
static void decode_tile(const Decode &d, const Tile &tile, const Scratch &scratch, int *error) {
    // Counting sort of the tile's pixels by expert.
    int start[257] = {0};
    uint16_t order[kMaxTilePixels];
    const uint8_t *map = d.expert_map + tile.row * d.map_stride + tile.col;
    for (int64_t r = 0; r < tile.rows; ++r)
        for (int64_t c = 0; c < tile.cols; ++c) ++start[map[r * d.map_stride + c] + 1];
    for (int64_t j = 0; j < 256; ++j) {
        if (start[j + 1] && j >= d.num_experts) { *error = kBadExpert; return; }
        if (start[j + 1] && d.tables && d.experts[j].w_last && !d.tables[j].data) { *error = kMissingTable; return; }
        start[j + 1] += start[j];
    }
    int next[256];
    std::memcpy(next, start, sizeof(next));
    each_pixel(d, tile, Gemm::kCellOrder || d.modulated, [&](int64_t r, int64_t c) {
        order[next[map[r * d.map_stride + c]]++] = static_cast<uint16_t>(r << kColBits | c);
    });

    Gemm::begin();
    Block block;
    for (int64_t j = 0; j < d.num_experts; ++j) {
        for (int at = start[j]; at < start[j + 1]; at += Gemm::kPixels) {
            const int left = start[j + 1] - at;
            prepare(d, tile, order + at, left < Gemm::kPixels ? left : Gemm::kPixels, &block);
            block.rows = (4 * block.pixels + Gemm::kRows - 1) / Gemm::kRows * Gemm::kRows;
            run_block<Gemm>(d, j, block, scratch);
        }
    }
    Gemm::end();
}
