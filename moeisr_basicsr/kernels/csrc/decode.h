// Plain-C interface of the fused decode, shared by every instruction set and mirrored by ctypes in kernels/native.py:
// every field is 8 bytes wide, so that both sides agree without padding rules.
//
// Legend: h x w output pixels of one strip, Ht x Wt cells of the LR tables, J experts, C output channels.
// A "row" of an activation block is one corner of one pixel: row = 4 * pixel + corner, corners in the order
// (-1,-1), (-1,+1), (+1,-1), (+1,+1).
#pragma once

#include <cstdint>

namespace moeisr {

constexpr int kPad = 32;         // every width is padded to this: one AMX k-step, two AVX-512 vectors
constexpr int kRenderPad = 16;   // widths of lm's render MLP are padded to this
constexpr int kBlockPixels = 32;  // most pixels per activation block; each kernel picks its own number
constexpr int kBlockRows = 4 * kBlockPixels;
constexpr int kColBits = 6, kMaxTileCols = 1 << kColBits, kMaxTileRows = 64;
constexpr int kMaxTilePixels = kMaxTileRows * kMaxTileCols;

struct Layer {
    int64_t in, out;     // padded widths
    const void *weight;  // panels of output channels, see kernels/packed.py
    const float *bias;   // (out), zero in the padding
};

struct Expert {
    int64_t width;        // padded width of hidden layer 1 (LIIF, lm) or of the basis product (LTE)
    int64_t num_layers;   // hidden layers still to do
    int64_t last_width;   // padded input width of the last layer
    const float *w_rel;   // (2, width), LIIF and lm
    const Layer *layers;
    const float *w_last;  // (C, last_width); null: the expert without layers, which predicts 0
    const float *b_last;  // (C)
};

struct Table {
    const float *data;  // (Ht * Wt, width), lm: see render.h; null where no pixel of this strip takes the expert
    int64_t stride;     // elements from one LR pixel to the next
};

struct Decode {
    int64_t num_experts, channels;
    const Expert *experts;
    int64_t modulated;        // lm
    const Table *tables;      // (J), LIIF and lm; null for LTE
    const float *coef;        // (Ht * Wt, 2 * basis): cosine part, then sine part; LTE
    const float *freq;        // (Ht * Wt, 2 * basis): row part, then column part; LTE
    const float *phase;       // (basis); LTE
    int64_t coef_stride, freq_stride, basis;
    int64_t table_width;      // Wt
    int64_t height, width;    // h, w
    const int64_t *row_index, *col_index;  // (2, h), (2, w)
    const float *row_rel, *col_rel;        // (2, h), (2, w), in LR pixels
    const uint8_t *expert_map;  // (h, w)
    int64_t map_stride;
    float *out;                 // (C, h, w)
    int64_t out_plane_stride, out_row_stride;
    int64_t tile_rows, tile_cols;
    int64_t num_threads;
};

struct Route {
    int64_t num_experts, hidden;  // hidden: padded width
    const float *table;           // (Ht * Wt, hidden): mapper features with bias and cell term
    int64_t table_stride, table_width;
    const float *w_rel;           // (2, hidden)
    const float *w_out;           // (J, hidden)
    const float *b_out;           // (J)
    int64_t height, width;
    const int64_t *row_index, *col_index;  // (h), (w)
    const float *row_rel, *col_rel;        // (h), (w)
    uint8_t *expert_map;  // (h, w)
    int64_t map_stride;
    float *logits;        // (h, w, J), or null
    int64_t num_threads;
};

// LR tables: (Ht * Wt, out) of the last layer. The first is a 3x3 convolution of a window of features, ReLU between.
struct TableJob {
    const Layer *layers;  // the first has in = 9 * channels: row, column, channel of the window
    int64_t num_layers;
    const float *window;  // (Ht + 2, Wt + 2, channels), channels a multiple of kPad
    int64_t channels, height, width;  // Ht, Wt
    float *out;           // (Ht * Wt, out)
    const int64_t *cells;  // LR pixels to compute; null for all of them. Not on AMX
    int64_t num_cells;
    int64_t num_threads;
};

// Which LR pixels the pixels of each expert read.
struct Needed {
    int64_t num_experts, height, width;    // J, h, w
    const int64_t *row_index, *col_index;  // (2, h), (2, w)
    const uint8_t *expert_map;             // (h, w)
    int64_t map_stride;
    int64_t table_height, table_width;  // Ht, Wt
    uint8_t *needed;                    // (J, Ht, Wt), zero at first
};

struct Tile {
    int64_t row, col, rows, cols;
};

// Working memory of one thread.
struct Scratch {
    void *block[2];       // activation blocks, kBlockRows x stride elements
    int64_t stride;       // elements from one row of a block to the next
    float *last;          // lm: last hidden vectors, kBlockRows x last_stride
    int64_t last_stride;
    int32_t *active;      // channels that a micro-tile multiplies, up to the width and 16 more
    float *sums;          // AMX: two pieces of 32 rows x kPad channels
    float *total;         // AMX: output channels of each pixel, not yet added over lanes
};

using DecodeTile = void (*)(const Decode &, const Tile &, const Scratch &, int *error);
using BuildTable = void (*)(const TableJob &, int64_t first, int64_t cells, const Scratch &);
using RouteRow = void (*)(const Route &, int64_t row);

enum Error { kOk = 0, kBadExpert = 1, kMissingTable = 2, kNoMemory = 3 };

// One way to compute; null functions where the compiler could not build it.
struct Kernel {
    DecodeTile decode;
    BuildTable table;  // as many cells as the scratch has rows
    RouteRow route;    // fp32 only
    int64_t element, split;  // of an activation block: bytes per element, elements per channel
    // LR pixels per block of `table`, a multiple of every micro-tile's rows. AMX reads all weights once per block, and
    // those of several experts exceed L2: its blocks are large.
    int64_t table_cells;
};
Kernel avx2_kernel();
Kernel avx512_kernel();
Kernel avx512_bf16_kernel();
Kernel amx_bf16_kernel();
Kernel amx_fp32_kernel();  // each number as three bf16 parts, see gemm_amx.h

}  // namespace moeisr
