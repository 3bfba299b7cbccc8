// Matrix products with bf16 operands and fp32 sums (AVX512_BF16). Two neighbouring input channels are one 32-bit
// element: a panel of weights is (in / 2, kPad, 2).

struct GemmBf16 {
    using Act = uint16_t;
    static constexpr int kRows = 12, kNumVecs = 2, kPixels = 24, kSplit = 1;
    static_assert(kNumVecs * Vec::kLanes == kPad && 4 * kPixels % kRows == 0, "padding must hold whole micro-tiles");

    static void begin() {}
    static void end() {}

    static inline void write(uint16_t *out, const Vec *v) { store_bf16(out, v[0], v[1]); }

    static inline __m512bh broadcast_pair(const uint16_t *p) {
        int32_t pair;
        std::memcpy(&pair, p, sizeof(pair));
        return (__m512bh)_mm512_set1_epi32(pair);
    }

    template <class Sink>
    static inline __attribute__((always_inline)) void micro(const uint16_t *a, int64_t stride, const uint16_t *w,
                                                            int64_t k_end, const float *bias, const Sink &sink) {
        __m512 acc[kRows][kNumVecs];
        for (int i = 0; i < kRows; ++i)
            for (int v = 0; v < kNumVecs; ++v) acc[i][v] = _mm512_loadu_ps(bias + v * Vec::kLanes);
        for (int64_t k = 0; k < k_end; k += 2, w += 2 * kPad) {
            const __m512bh weight[kNumVecs] = {(__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_loadu_si512(w + kPad)};
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i) {
                const __m512bh x = broadcast_pair(a + i * stride + k);
#pragma GCC unroll 4
                for (int v = 0; v < kNumVecs; ++v) acc[i][v] = _mm512_dpbf16_ps(acc[i][v], x, weight[v]);
            }
        }
        for (int i = 0; i < kRows; ++i) sink(i, Vec{acc[i][0]}, Vec{acc[i][1]});
    }

    // `sink(row, channel, sums, sums of the next 16 channels)` for every row and panel, bias included.
    template <class Sink>
    static void multiply(const Layer &layer, const uint16_t *in, int rows, const Scratch &scratch, const Sink &sink) {
        const uint16_t *weight = static_cast<const uint16_t *>(layer.weight);
        for (int64_t n = 0; n < layer.out; n += kPad)
            for (int m = 0; m < rows; m += kRows)
                micro(in + m * scratch.stride, scratch.stride, weight + n * layer.in, layer.in, layer.bias + n,
                      [&](int i, Vec first, Vec second) { sink(m + i, n, first, second); });
    }

    static void hidden(const Layer &layer, const uint16_t *in, uint16_t *out, int rows, const Scratch &scratch) {
        const int64_t stride = scratch.stride;
        multiply(layer, in, rows, scratch, [=](int row, int64_t n, Vec first, Vec second) {
            store_bf16(out + row * stride + n, relu(first), relu(second));
        });
    }

    // The last hidden vectors stay in fp32: they are only blended and summed.
    static void last(const Decode &d, const Expert &e, const Layer &layer, const uint16_t *in, const Block &block,
                     const Scratch &scratch) {
        float *out = scratch.last;
        const int64_t stride = scratch.last_stride;
        multiply(layer, in, block.rows, scratch, [=](int row, int64_t n, Vec first, Vec second) {
            store(out + row * stride + n, relu(first));
            store(out + row * stride + n + Vec::kLanes, relu(second));
        });
        blend_rows(d, e, block, out, stride);
    }
};
