// LR tables: a 3x3 convolution over a window of features, and what layers follow it, as matrix products. Included inside the namespace of one
// instruction set, after the Gemm.

// `cells` LR pixels from number `first` on, of those to compute.
template <class Gemm>
static void build_table(const TableJob &t, int64_t first, int64_t cells, const Scratch &scratch) {
    using Act = typename Gemm::Act;
    Act *in = static_cast<Act *>(scratch.block[0]), *next = static_cast<Act *>(scratch.block[1]);
    for (int64_t i = 0; i < cells; ++i) {
        const int64_t cell = t.cells ? t.cells[first + i] : first + i;
        const int64_t row = cell / t.width, col = cell % t.width;
        Act *out = in + i * scratch.stride;
        for (int64_t k_row = 0; k_row < 3; ++k_row) {  // three neighbours in a row are contiguous: channels last
            const float *window = t.window + ((row + k_row) * (t.width + 2) + col) * t.channels;
            for (int64_t k = 0; k < 3 * t.channels; k += kPad, out += kPad * Gemm::kSplit) {
                Vec v[kVecs];
                for (int n = 0; n < kVecs; ++n) v[n] = load(window + k + n * Vec::kLanes);
                Gemm::write(out, v);
            }
        }
    }
    Gemm::begin();
    const int rows = static_cast<int>((cells + Gemm::kRows - 1) / Gemm::kRows * Gemm::kRows);
    for (int64_t n = 0; n + 1 < t.num_layers; ++n, std::swap(in, next))
        Gemm::hidden(t.layers[n], in, next, rows, scratch);
    Gemm::linear(t, first, static_cast<int>(cells), in, scratch);
    Gemm::end();
}
