// The render MLP of the lm family, layer by layer for a few rows at a time. Included inside the namespace of one
// instruction set, after Vec and tile.h. In fp32 for every instruction set: what it costs is small beside the tables.
//
// A table's row of one LR pixel, L hidden layers of padded width W: L scales of W (the 1 of 1 + scale is in them), L
// shifts of W, and W pre-activations of layer 1 without their coordinate part. Weights are panels (in, kRenderPad).

constexpr int kRenderVecs = kRenderPad / Vec::kLanes;
constexpr int kRenderRows = Vec::kLanes / 2;  // 8 sums in flight hide the latency of a multiply-add

// relu(scale * x + shift) for one vector of channels; `cell` points to the layer's scales.
static inline Vec modulate(const float *cell, int64_t to_shift, Vec x) {
    return relu(fma(load(cell), x, load(cell + to_shift)));
}

template <int Rows>
static inline __attribute__((always_inline)) void render_layer(const Layer &layer, const float *const *cells,
                                                               int64_t to_shift, const float *in, int64_t in_stride,
                                                               float *out, int64_t out_stride) {
    const float *weight = static_cast<const float *>(layer.weight);
    for (int64_t n = 0; n < layer.out; n += kRenderPad, weight += layer.in * kRenderPad) {
        Vec sums[Rows][kRenderVecs];
        for (int i = 0; i < Rows; ++i)
            for (int v = 0; v < kRenderVecs; ++v) sums[i][v] = load(layer.bias + n + v * Vec::kLanes);
        for (int64_t k = 0; k < layer.in; ++k) {
            Vec column[kRenderVecs];
            for (int v = 0; v < kRenderVecs; ++v) column[v] = load(weight + k * kRenderPad + v * Vec::kLanes);
#pragma GCC unroll 8
            for (int i = 0; i < Rows; ++i) {
                const Vec x = set1(in[i * in_stride + k]);
                for (int v = 0; v < kRenderVecs; ++v) sums[i][v] = fma(x, column[v], sums[i][v]);
            }
        }
        for (int i = 0; i < Rows; ++i)
            for (int v = 0; v < kRenderVecs; ++v) {
                const int64_t at = n + v * Vec::kLanes;
                store(out + i * out_stride + at, modulate(cells[i] + at, to_shift, sums[i][v]));
            }
    }
}

// The last hidden vectors of `Rows` rows from `first` on, into `scratch.last`.
template <int Rows>
static inline void render_rows(const Table &table, const Expert &e, const Block &block, int first,
                               const Scratch &scratch) {
    const int64_t width = e.width, to_shift = (e.num_layers + 1) * width;
    const float *cells[Rows];
    float *last = scratch.last + first * scratch.last_stride;
    float *in = e.num_layers ? static_cast<float *>(scratch.block[0]) : last;
    int64_t in_stride = e.num_layers ? width : scratch.last_stride;
    for (int i = 0; i < Rows; ++i) {
        const float *cell = cells[i] = table.data + block.cell[first + i] * table.stride;
        const Vec rel_row = set1(block.rel_row[first + i]), rel_col = set1(block.rel_col[first + i]);
        for (int64_t k = 0; k < width; k += Vec::kLanes) {
            const Vec x = fma(rel_col, load(e.w_rel + width + k),
                              fma(rel_row, load(e.w_rel + k), load(cell + 2 * to_shift + k)));
            store(in + i * in_stride + k, modulate(cell + k, to_shift, x));
        }
    }
    for (int64_t n = 0; n < e.num_layers; ++n) {
        const bool is_last = n + 1 == e.num_layers;
        float *out = is_last ? last : static_cast<float *>(scratch.block[(n + 1) % 2]);
        const int64_t out_stride = is_last ? scratch.last_stride : width;
        for (int i = 0; i < Rows; ++i) cells[i] += width;
        render_layer<Rows>(e.layers[n], cells, to_shift, in, in_stride, out, out_stride);
        in = out;
        in_stride = out_stride;
    }
}

static void render(const Decode &d, const Table &table, const Expert &e, const Block &block, const Scratch &scratch) {
    static_assert(kRenderRows % 4 == 0, "whole pixels");
    int row = 0;
    for (; row + kRenderRows <= 4 * block.pixels; row += kRenderRows)
        render_rows<kRenderRows>(table, e, block, row, scratch);
    for (; row < 4 * block.pixels; row += 4) render_rows<4>(table, e, block, row, scratch);
    blend(block, e, d.channels, d.out_plane_stride,
          [&](int row, int64_t k) { return load(scratch.last + row * scratch.last_stride + k); });
}
