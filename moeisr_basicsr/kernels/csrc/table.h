// LR tables: a 3x3 convolution over a window of features as matrix products. Included inside the namespace of one
// instruction set, after Vec, before the Gemm.

// Where the sums of one block of LR cells go; fp32 or bf16.
struct TableOut {
    float *wide;       // one of both is null
    uint16_t *narrow;
    int64_t stride;
    int cells;         // rows beyond are padding

    inline void put(int row, int64_t channel, Vec v) const {
        if (row >= cells) return;
        if (wide) store(wide + row * stride + channel, v);
        else store_rounded(narrow + row * stride + channel, v);
    }
};

struct TableRows {
    // `cells` LR cells from number `first` on, in row-major order.
    template <class Gemm>
    static void run(const TableJob &t, int64_t first, int64_t cells, const Scratch &scratch) {
        using Act = typename Gemm::Act;
        Act *rows = static_cast<Act *>(scratch.block[0]);
        for (int64_t i = 0; i < cells; ++i) {
            const int64_t row = (first + i) / t.width, col = (first + i) % t.width;
            Act *out = rows + i * scratch.stride;
            for (int64_t k_row = 0; k_row < 3; ++k_row) {  // three neighbours in a row are contiguous: channels last
                const float *window = t.window + ((row + k_row) * (t.width + 2) + col) * t.channels;
                for (int64_t k = 0; k < 3 * t.channels; k += kPad, out += kPad * Gemm::kSplit) {
                    Vec v[kVecs];
                    for (int n = 0; n < kVecs; ++n) v[n] = load(window + k + n * Vec::kLanes);
                    Gemm::write(out, v);
                }
            }
        }
        TableOut out = {nullptr, nullptr, t.out_stride, static_cast<int>(cells)};
        if (t.out_is_bf16) out.narrow = static_cast<uint16_t *>(t.out) + first * t.out_stride;
        else out.wide = static_cast<float *>(t.out) + first * t.out_stride;
        const int micro_rows = (static_cast<int>(cells) + Gemm::kRows - 1) / Gemm::kRows * Gemm::kRows;
        Gemm::begin();
        Gemm::linear(t.layer, rows, micro_rows, scratch, out);
        Gemm::end();
    }
};
