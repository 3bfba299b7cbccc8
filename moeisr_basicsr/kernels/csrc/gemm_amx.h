// Matrix products on AMX tiles: bf16 operands, fp32 sums. Included inside the namespace of its instruction set.
//
// 32 rows x 32 output channels at a time: four sum tiles, two tiles of activations (16 rows x 32 input channels) and
// two of weights.
//
// Split = 1 is plain bf16. Split = 3 has the accuracy of fp32: each number is the sum of three bf16 numbers (24 bits of
// mantissa), and the six products that matter are added up; the other three are below the rounding of fp32. That is six
// times the work, on a unit with 16 times the rate of fp32 multiply-adds. (An infinity becomes NaN: both are broken.)
//
// Layouts, for every 32 input channels: activations (Split, 32) per row; weights (Split, 16, kPad, 2), two neighbouring
// input channels together.

template <int Split>
struct Products;  // which parts are multiplied, 0 the largest, in an order that keeps tiles loaded
template <>
struct Products<1> {
    static constexpr int kCount = 1, kLeft[] = {0}, kRight[] = {0};
};
template <>
struct Products<3> {
    static constexpr int kCount = 6, kLeft[] = {0, 0, 0, 1, 1, 2}, kRight[] = {2, 1, 0, 0, 1, 0};
};

template <int Split>
struct GemmAmx {
    using Act = uint16_t;
    static constexpr int kRows = 16, kPixels = 16, kSplit = Split;
    static constexpr bool kCellOrder = false;
    static_assert(kPad == 32 && 4 * kPixels % kRows == 0, "padding must hold whole tiles");

    // The tile intrinsics do not tell the compiler which memory they read.
    static inline void fence() { asm volatile("" ::: "memory"); }

    struct Config {  // operand of ldtilecfg
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes_per_row[16];
        uint8_t rows[16];
    };
    static void begin() {
        Config config = {};
        config.palette = 1;
        for (int i = 0; i < 8; ++i) {
            config.bytes_per_row[i] = 64;
            config.rows[i] = 16;
        }
        fence();
        _tile_loadconfig(&config);
    }
    static void end() { _tile_release(); }

    static inline int row(int at) { return at; }
    static inline void write(uint16_t *out, const Vec *v) { write(out, v[0], v[1]); }
    static inline void write(uint16_t *out, Vec first, Vec second) {
        for (int part = 0; part < Split; ++part, out += kPad) {
            store_bf16(out, first, second);
            if (part + 1 < Split) {  // what rounding left over
                first = sub(first, load(out));
                second = sub(second, load(out + 16));
            }
        }
    }

    // Sums of `Tiles` x 16 rows by 32 channels over all input channels, without bias. Tile registers hold 32 rows of
    // sums at most, and storing them waits for the last product; so `meanwhile()` lets the caller finish the
    // previous piece between the products.
    template <int Tiles, class Meanwhile>
    static inline __attribute__((always_inline)) void sum_piece(const uint16_t *a, int64_t stride, const uint16_t *w,
                                                                int64_t k_end, float *sums,
                                                                const Meanwhile &meanwhile) {
        _tile_zero(0);
        _tile_zero(1);
        if (Tiles == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
        using P = Products<Split>;
        for (int64_t k = 0; k < k_end; k += kPad, a += kPad * Split) {
#pragma GCC unroll 6
            for (int i = 0; i < P::kCount; ++i) {
                const uint16_t *left = a + P::kLeft[i] * kPad;
                const bool new_left = i == 0 || P::kLeft[i] != P::kLeft[i - 1];
                if (new_left) _tile_loadd(4, left, 2 * stride);
                if (i == 0 || P::kRight[i] != P::kRight[i - 1]) {
                    const uint16_t *right = w + P::kRight[i] * kPad * kPad;
                    _tile_loadd(6, right, 4 * kPad);
                    _tile_loadd(7, right + kPad, 4 * kPad);
                }
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                if (Tiles == 2) {
                    if (new_left) _tile_loadd(5, left + 16 * stride, 2 * stride);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
            w += kPad * kPad * Split;
            meanwhile();
        }
        _tile_stored(0, sums, 4 * kPad);
        _tile_stored(1, sums + 16, 4 * kPad);
        if (Tiles == 2) {
            _tile_stored(2, sums + 16 * kPad, 4 * kPad);
            _tile_stored(3, sums + 16 * kPad + 16, 4 * kPad);
        }
    }

    // Calls finish(sums, row, channel) once for every four rows (one pixel) and 32 channels of the product.
    template <class Finish>
    static inline __attribute__((always_inline)) void multiply(const Layer &layer, const uint16_t *in, int rows,
                                                               const Scratch &scratch, const Finish &finish) {
        const uint16_t *weight = static_cast<const uint16_t *>(layer.weight);
        const int64_t steps = layer.in / kPad, pixels_per_step = (8 + steps - 1) / steps;
        const float *done = nullptr;  // piece whose sums are stored but not finished
        int done_row = 0, done_end = 0;
        int64_t done_channel = 0;
        float *sums = scratch.sums;
        const auto finish_pixels = [&](int64_t count) {
            for (; count > 0 && done_row < done_end; --count, done_row += 4, done += 4 * kPad)
                finish(done, done_row, done_channel);
        };
        const auto meanwhile = [&] { finish_pixels(pixels_per_step); };
        fence();
        // 32 rows stay in L1 while all weights pass; but weights beyond half of L2 pass once, and all rows each time.
        const bool weights_once = layer.in * layer.out * Split * sizeof(uint16_t) > (1u << 20);
        const int64_t panels = layer.out / kPad, row_blocks = (rows + 31) / 32;
        for (int64_t piece = 0; piece < panels * row_blocks; ++piece) {
            const int64_t n = kPad * (weights_once ? piece / row_blocks : piece % panels);
            const int m = 32 * static_cast<int>(weights_once ? piece % row_blocks : piece / panels);
            const int count = rows - m > 16 ? 32 : 16;
            const uint16_t *a = in + m * scratch.stride, *w = weight + n * layer.in * Split;
            if (count == 32) sum_piece<2>(a, scratch.stride, w, layer.in, sums, meanwhile);
            else sum_piece<1>(a, scratch.stride, w, layer.in, sums, meanwhile);
            done = sums;
            done_row = m;
            done_end = m + count;
            done_channel = n;
            sums = scratch.sums + (sums == scratch.sums ? 32 * kPad : 0);
        }
        finish_pixels(8);
    }

    static inline Vec activate(const float *sums, const float *bias) { return relu(add(load(sums), load(bias))); }

    static void hidden(const Layer &layer, const uint16_t *in, uint16_t *out, int rows, const Scratch &scratch) {
        const float *biases = layer.bias;
        const int64_t stride = scratch.stride;
        multiply(layer, in, rows, scratch, [=](const float *sums, int row, int64_t n) {
            const Vec bias[2] = {load(biases + n), load(biases + n + 16)};
            uint16_t *p = out + row * stride + n * Split;
            for (int i = 0; i < 4; ++i, p += stride)
                write(p, relu(add(load(sums + i * kPad), bias[0])), relu(add(load(sums + i * kPad + 16), bias[1])));
        });
    }

    // The last hidden layer never reaches memory: each piece is blended over the corners and multiplied by the output
    // layer at once. `total` collects one vector per pixel and output channel, summed over lanes at the end.
    template <int C>
    static void last_channels(const Decode &d, const Expert &e, const Layer &layer, const uint16_t *in,
                              const Block &block, const Scratch &scratch, int64_t first) {
        float *total = scratch.total;
        const float *w_last = e.w_last + first * e.last_width;
        std::memset(total, 0, sizeof(float) * C * 16 * static_cast<size_t>(block.rows / 4));
        multiply(layer, in, block.rows, scratch, [&](const float *sums, int row, int64_t n) {
            const float *bias = layer.bias + n, *weight = block.weight + row;
            Vec mean[2];
            for (int v = 0; v < 2; ++v) {
                mean[v] = mul(set1(weight[0]), activate(sums + 16 * v, bias + 16 * v));
                for (int j = 1; j < 4; ++j)
                    mean[v] = fma(set1(weight[j]), activate(sums + j * kPad + 16 * v, bias + 16 * v), mean[v]);
            }
            float *t = total + row / 4 * C * 16;
            for (int c = 0; c < C; ++c) {
                const float *w = w_last + c * e.last_width + n;
                store(t + 16 * c, fma(mean[1], load(w + 16), fma(mean[0], load(w), load(t + 16 * c))));
            }
        });
        for (int i = 0; i < block.pixels; ++i)
            for (int c = 0; c < C; ++c)
                block.target[i][(first + c) * d.out_plane_stride] =
                    sum(load(total + (i * C + c) * 16)) + e.b_last[first + c];
    }

    static void last(const Decode &d, const Expert &e, const Layer &layer, const uint16_t *in, const Block &block,
                     const Scratch &scratch) {
        for (int64_t first = 0; first < d.channels; first += 4) {
            switch (d.channels - first) {
                case 1: last_channels<1>(d, e, layer, in, block, scratch, first); break;
                case 2: last_channels<2>(d, e, layer, in, block, scratch, first); break;
                case 3: last_channels<3>(d, e, layer, in, block, scratch, first); break;
                default: last_channels<4>(d, e, layer, in, block, scratch, first); break;
            }
        }
    }

    // Without activation, fp32 out; only the first `cells` rows are written.
    static void linear(const TableJob &t, int64_t first, int cells, const uint16_t *in, const Scratch &scratch) {
        const Layer &layer = t.layers[t.num_layers - 1];
        float *out = t.out + first * layer.out;
        const int64_t out_stride = layer.out;
        const float *biases = layer.bias;
        const int rows = (cells + kRows - 1) / kRows * kRows;
        multiply(layer, in, rows, scratch, [=](const float *sums, int row, int64_t n) {
            const Vec bias[2] = {load(biases + n), load(biases + n + 16)};
            float *p = out + row * out_stride + n;
            for (int i = 0; i < 4 && row + i < cells; ++i, p += out_stride) {
                store(p, add(load(sums + i * kPad), bias[0]));
                store(p + 16, add(load(sums + i * kPad + 16), bias[1]));
            }
        });
    }
};
