// Matrix products in fp32. Included inside the namespace of one instruction set, after Vec and tile.h.
//
// A micro-tile keeps MicroRows x NumVecs vectors of sums in registers. Its weight panel (NumVecs vectors wide, all of
// the input width) is read from L1 by every micro-tile of the block before the next panel is touched.

template <int MicroRows, int NumVecs>
struct GemmFp32 {
    using Act = float;
    static constexpr int kRows = MicroRows, kPixels = 24, kSplit = 1;
    static constexpr int kPanel = NumVecs * Vec::kLanes;  // output channels per weight panel
    static_assert(kPad % kPanel == 0 && 4 * kPixels % MicroRows == 0, "padding must hold whole micro-tiles");

    static void begin() {}
    static void end() {}

    static inline void write(float *out, const Vec *v) { FloatRows::write(out, v); }

    // One micro-tile, bias included; `sink(row, sums)` takes the NumVecs vectors of each row.
    template <class Sink>
    static inline __attribute__((always_inline)) void micro(const float *a, int64_t stride, const float *w,
                                                            int64_t k_end, const float *bias, const Sink &sink) {
        Vec acc[MicroRows][NumVecs];
        for (int i = 0; i < MicroRows; ++i)
            for (int v = 0; v < NumVecs; ++v) acc[i][v] = load(bias + v * Vec::kLanes);
        for (int64_t k = 0; k < k_end; ++k, w += kPanel) {
            Vec weight[NumVecs];
            for (int v = 0; v < NumVecs; ++v) weight[v] = load(w + v * Vec::kLanes);
#pragma GCC unroll 16
            for (int i = 0; i < MicroRows; ++i) {
                const Vec x = set1(a[i * stride + k]);
#pragma GCC unroll 4
                for (int v = 0; v < NumVecs; ++v) acc[i][v] = fma(x, weight[v], acc[i][v]);
            }
        }
        for (int i = 0; i < MicroRows; ++i) sink(i, acc[i]);
    }

    // `sink(row, channel, sums)` for every row and panel.
    template <class Sink>
    static void multiply(const Layer &layer, const float *in, int rows, const Scratch &scratch, const Sink &sink) {
        const float *weight = static_cast<const float *>(layer.weight);
        for (int64_t n = 0; n < layer.out; n += kPanel)
            for (int m = 0; m < rows; m += MicroRows)
                micro(in + m * scratch.stride, scratch.stride, weight + n * layer.in, layer.in, layer.bias + n,
                      [&](int i, const Vec *sums) { sink(m + i, n, sums); });
    }

    static void hidden(const Layer &layer, const float *in, float *out, int rows, const Scratch &scratch) {
        const int64_t stride = scratch.stride;
        multiply(layer, in, rows, scratch, [=](int row, int64_t n, const Vec *sums) {
            for (int v = 0; v < NumVecs; ++v) store(out + row * stride + n + v * Vec::kLanes, relu(sums[v]));
        });
    }

    static void last(const Decode &d, const Expert &e, const Layer &layer, const float *in, const Block &block,
                     const Scratch &scratch) {
        float *out = static_cast<float *>(in == scratch.block[0] ? scratch.block[1] : scratch.block[0]);
        hidden(layer, in, out, block.rows, scratch);
        blend_rows(d, e, block, out, scratch.stride);
    }
};
