// The products of gemm_sparse.h in fp32. A panel of weights is (in, kPanel).

template <int Panels>
struct ProductFp32 {
    using Weight = float;
    static constexpr int kPanels = Panels, kPanel = 2 * Vec::kLanes;

    static inline Vec round(Vec v) { return v; }

    template <int P>
    static inline __attribute__((always_inline)) void micro(const float *rows, int64_t stride, const float *weight,
                                                            int64_t panel, const int32_t *active, int count,
                                                            Vec sums[kMicroRows][2 * P]) {
        for (int t = 0; t < count; ++t) {
            const int64_t k = active[t];
            const float *w = weight + k * kPanel;
            Vec column[2 * P];
            for (int v = 0; v < 2 * P; ++v) column[v] = load(w + v / 2 * panel + v % 2 * Vec::kLanes);
#pragma GCC unroll 4
            for (int i = 0; i < kMicroRows; ++i) {
                const Vec x = set1(rows[i * stride + k]);
#pragma GCC unroll 4
                for (int v = 0; v < 2 * P; ++v) sums[i][v] = fma(x, column[v], sums[i][v]);
            }
        }
    }
};
