// Matrix products that leave out what ReLU has set to zero. Included inside the namespace of one instruction set, after
// Vec and tile.h.
//
// Four rows at a time: the same corner of four neighbouring pixels, which mostly read the same LR pixel. Their hidden
// vectors are then zero in nearly the same channels, about half of all; `active_channels` lists the others, and only
// their weights are read. Leaving out products with zero changes no bit of a sum.
//
// What the number format decides comes from the template argument `Product`:
//   Product::Weight                   element of the packed weights
//   Product::kPanels                  panels of weights (see kernels/packed.py) that one micro-tile multiplies by
//   Product::kPanel                   output channels per panel
//   Product::round(Vec)               a number as the product reads it
//   Product::micro<Panels>(...)       adds up one micro-tile

constexpr int kMicroRows = 4;

// Channels in which any of the micro-tile's rows is not zero, in ascending order; returns their number. A zero is put
// behind each row: what was there before may be anything, and a product may read across its last channel.
static inline int active_channels(float *rows, int64_t stride, int64_t width, int32_t *active) {
    static_assert(kMicroRows == 4, "four rows are joined below");
    int32_t *end = active;
    for (int64_t k = 0; k < width; k += Vec::kLanes) {
        const Vec first = either(load(rows + k), load(rows + stride + k));
        const Vec second = either(load(rows + 2 * stride + k), load(rows + 3 * stride + k));
        end = append_nonzero(either(first, second), static_cast<int32_t>(k), end);
    }
    for (int i = 0; i < kMicroRows; ++i) rows[i * stride + width] = 0;
    return static_cast<int>(end - active);
}

template <class Product>
struct GemmSparse {
    using Act = float;
    static constexpr int kRows = 4 * kMicroRows, kPixels = 32, kSplit = 1;
    static constexpr int kPanel = Product::kPanel;
    static constexpr bool kCellOrder = true;
    static_assert(kPad % kPanel == 0, "padding must hold whole panels");

    static void begin() {}
    static void end() {}

    // 4 * pixel + corner -> row: one corner of four pixels side by side.
    static inline int row(int at) { return (at & ~15) | (at & 3) << 2 | (at >> 2 & 3); }

    static inline void write(float *out, const Vec *v) {
        for (int i = 0; i < kVecs; ++i) store(out + i * Vec::kLanes, Product::round(v[i]));
    }

    // One micro-tile by `Panels` panels of weights; `sink(row, channel, sums)` for each vector of sums, bias included.
    template <int Panels, class Sink>
    static inline __attribute__((always_inline)) void panels(const Layer &layer, int64_t n, const float *rows,
                                                             int64_t stride, const int32_t *active, int count,
                                                             const Sink &sink) {
        constexpr int kVectors = Panels * kPanel / Vec::kLanes;
        Vec sums[kMicroRows][kVectors];
        for (int i = 0; i < kMicroRows; ++i)
            for (int v = 0; v < kVectors; ++v) sums[i][v] = load(layer.bias + n + v * Vec::kLanes);
        const auto *weight = static_cast<const typename Product::Weight *>(layer.weight) + n * layer.in;
        Product::template micro<Panels>(rows, stride, weight, kPanel * layer.in, active, count, sums);
        for (int i = 0; i < kMicroRows; ++i)
            for (int v = 0; v < kVectors; ++v) sink(i, n + v * Vec::kLanes, sums[i][v]);
    }

    // `sink(row, channel, sums)` for every row and vector of output channels.
    template <class Sink>
    static void multiply(const Layer &layer, float *in, int rows, const Scratch &scratch, const Sink &sink) {
        const int64_t stride = scratch.stride, step = Product::kPanels * kPanel;
        for (int m = 0; m < rows; m += kMicroRows) {
            float *first = in + m * stride;
            const int count = active_channels(first, stride, layer.in, scratch.active);
            const auto finish = [&](int i, int64_t n, Vec sums) { sink(m + i, n, sums); };
            int64_t n = 0;
            for (; n + step <= layer.out; n += step)
                panels<Product::kPanels>(layer, n, first, stride, scratch.active, count, finish);
            for (; n < layer.out; n += kPanel) panels<1>(layer, n, first, stride, scratch.active, count, finish);
        }
    }

    static void hidden(const Layer &layer, float *in, float *out, int rows, const Scratch &scratch) {
        const int64_t stride = scratch.stride;
        multiply(layer, in, rows, scratch, [=](int row, int64_t n, Vec sums) {
            store(out + row * stride + n, Product::round(relu(sums)));
        });
    }

    // The last hidden vectors are not rounded: they are only blended and summed.
    static void last(const Decode &d, const Expert &e, const Layer &layer, float *in, const Block &block,
                     const Scratch &scratch) {
        float *out = static_cast<float *>(in == scratch.block[0] ? scratch.block[1] : scratch.block[0]);
        const int64_t stride = scratch.stride;
        multiply(layer, in, block.rows, scratch, [=](int row, int64_t n, Vec sums) {
            store(out + row * stride + n, relu(sums));
        });
        blend_rows<GemmSparse>(d, e, block, out, stride);
    }

    // LR tables: without activation, each row to its cell.
    static void linear(const TableJob &t, int64_t first, int cells, float *in, const Scratch &scratch) {
        const int rows = (cells + kMicroRows - 1) / kMicroRows * kMicroRows;
        const Layer &layer = t.layers[t.num_layers - 1];
        multiply(layer, in, rows, scratch, [&](int row, int64_t n, Vec sums) {
            if (row >= cells) return;
            const int64_t cell = t.cells ? t.cells[first + row] : first + row;
            store(t.out + cell * layer.out + n, sums);
        });
    }
};
