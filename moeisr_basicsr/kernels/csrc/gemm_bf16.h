// The products of gemm_sparse.h with bf16 operands and fp32 sums (AVX512_BF16).
//
// One instruction adds two products: first that of the odd (upper) bf16 of each 32 bits, then that of the even one. Two
// active channels that follow each other, wherever they are, share one: the first in the odd place, so that sums are
// taken in ascending order, alike for all neighbours. A panel of weights is (in, kPanel), its channels in the order
// in which two interleaved rows give them.
//
// Activations are kept as fp32 numbers that are already rounded: the lower half is zero. Read two bytes further on, the
// same number stands in the even place and the odd place is zero.

struct ProductBf16 {
    using Weight = uint16_t;
    static constexpr int kPanels = 2, kPanel = 2 * Vec::kLanes;

    static inline Vec round(Vec v) {
        const __m256bh half = _mm512_cvtneps_pbh(v.v);
        __m256i bits;
        std::memcpy(&bits, &half, sizeof(bits));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
    }

    static inline __m512i broadcast(const float *number, int bytes) {
        int32_t bits;
        std::memcpy(&bits, reinterpret_cast<const char *>(number) + bytes, sizeof(bits));
        return _mm512_set1_epi32(bits);
    }

    // Adds up channel `odd`, and channel `even` if `both`.
    template <int P>
    static inline __attribute__((always_inline)) void step(const float *rows, int64_t stride, const uint16_t *weight,
                                                           int64_t panel, int64_t odd, int64_t even, bool both,
                                                           Vec sums[kMicroRows][2 * P]) {
        __m512bh column[2 * P];
        for (int p = 0; p < P; ++p) {
            const __m512i upper = _mm512_loadu_si512(weight + p * panel + odd * kPanel);
            const __m512i lower = _mm512_loadu_si512(weight + p * panel + even * kPanel);
            column[2 * p] = (__m512bh)_mm512_unpacklo_epi16(lower, upper);
            column[2 * p + 1] = (__m512bh)_mm512_unpackhi_epi16(lower, upper);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kMicroRows; ++i) {
            __m512i x = broadcast(rows + i * stride + odd, 0);
            if (both) x = _mm512_or_si512(x, broadcast(rows + i * stride + even, 2));
#pragma GCC unroll 4
            for (int v = 0; v < 2 * P; ++v) sums[i][v].v = _mm512_dpbf16_ps(sums[i][v].v, (__m512bh)x, column[v]);
        }
    }

    template <int P>
    static inline __attribute__((always_inline)) void micro(const float *rows, int64_t stride, const uint16_t *weight,
                                                            int64_t panel, const int32_t *active, int count,
                                                            Vec sums[kMicroRows][2 * P]) {
        int t = 0;
        for (; t + 2 <= count; t += 2) step<P>(rows, stride, weight, panel, active[t], active[t + 1], true, sums);
        if (t < count) step<P>(rows, stride, weight, panel, active[t], active[t], false, sums);
    }
};
