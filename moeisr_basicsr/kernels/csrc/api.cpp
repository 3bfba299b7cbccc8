// Entry points for ctypes: what the processor can do, and the loop over tiles.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "decode.h"

#define MOEISR_API extern "C" __attribute__((visibility("default")))

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moeisr {
namespace {

// Ways to compute, in the order of ISAS in kernels/native.py.
enum Isa { kAvx2 = 1, kAvx512 = 2, kAmxFp32 = 3, kAvx512Bf16 = 4, kAmxBf16 = 5, kLastIsa = 5 };

#if defined(__x86_64__)
uint64_t enabled_state() {  // which registers the operating system saves: XCR0
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

bool request_amx() {  // Linux hands out tile registers on request, for the whole process
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

bool cpu_has(Isa isa) {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
    const bool fma = c & (1u << 12), f16c = c & (1u << 29), osxsave = c & (1u << 27);
    if (!osxsave || !fma || !f16c) return false;
    const uint64_t state = enabled_state();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool avx2 = (b & (1u << 5)) && (state & 0x6) == 0x6;
    const bool avx512 = (b & (1u << 16)) && (b & (1u << 17)) && (b & (1u << 30)) && (b & (1u << 31)) &&
                        (state & 0xe6) == 0xe6;  // F, DQ, BW, VL; opmask and upper registers saved
    const bool amx = (d & (1u << 22)) && (d & (1u << 24)) && (state & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) a = 0;
    const bool bf16 = avx512 && (a & (1u << 5));
    switch (isa) {
        case kAvx2: return avx2;
        case kAvx512: return avx2 && avx512;
        case kAvx512Bf16: return avx2 && bf16;
        case kAmxFp32:
        case kAmxBf16: return avx2 && bf16 && amx && request_amx();
        default: return false;
    }
}
#else
bool cpu_has(Isa) { return false; }
#endif

Kernel kernel_of(int64_t isa) {
    switch (isa) {
        case kAvx2: return avx2_kernel();
        case kAvx512: return avx512_kernel();
        case kAmxFp32: return amx_fp32_kernel();
        case kAvx512Bf16: return avx512_bf16_kernel();
        case kAmxBf16: return amx_bf16_kernel();
        default: return {};
    }
}

constexpr int64_t kCacheLine = 64;  // bytes

// One allocation per thread, kept between calls: a fresh one would be mapped and zeroed by the system every time.
class ThreadMemory {
  public:
    ~ThreadMemory() { std::free(data_); }
    char *reserve(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            data_ = static_cast<char *>(std::aligned_alloc(64, bytes));
            size_ = data_ ? bytes : 0;
        }
        return data_;
    }

  private:
    char *data_ = nullptr;
    size_t size_ = 0;
};

int64_t widest(const Decode &d) {
    int64_t width = kPad;
    for (int64_t j = 0; j < d.num_experts; ++j) {
        const Expert &e = d.experts[j];
        width = std::max(width, e.width);
        for (int64_t n = 0; n < e.num_layers; ++n) width = std::max(width, e.layers[n].out);
    }
    return width;
}

bool make_scratch(int64_t width, int64_t rows, const Kernel &kernel, Scratch *scratch) {
    thread_local ThreadMemory memory;
    // One cache line more than the width: at a power of two all rows would share a few cache sets.
    scratch->stride = width * kernel.split + kCacheLine / kernel.element;
    scratch->last_stride = width + kCacheLine / 4;
    const size_t block = rows * scratch->stride * kernel.element;  // whole cache lines, as each one below
    const size_t last = rows * scratch->last_stride * 4;
    const size_t sums = 2 * 32 * kPad * 4;
    const size_t total = kBlockPixels * 4 * kCacheLine;
    const size_t active = width * 4 + kCacheLine;
    char *p = memory.reserve(2 * block + last + sums + total + active);
    if (!p) return false;
    scratch->block[0] = p;
    scratch->block[1] = p + block;
    scratch->last = reinterpret_cast<float *>(p + 2 * block);
    scratch->sums = reinterpret_cast<float *>(p + 2 * block + last);
    scratch->total = reinterpret_cast<float *>(p + 2 * block + last + sums);
    scratch->active = reinterpret_cast<int32_t *>(p + 2 * block + last + sums + total);
    return true;
}

}  // namespace
}  // namespace moeisr

using namespace moeisr;

// Bit i: way to compute i (enum Isa) can run here.
MOEISR_API int64_t moeisr_supported() {
    int64_t bits = 0;
    for (int64_t isa = kAvx2; isa <= kLastIsa; ++isa)
        if (kernel_of(isa).decode && cpu_has(static_cast<Isa>(isa))) bits |= int64_t{1} << isa;
    return bits;
}

// Returns one of Error.
MOEISR_API int64_t moeisr_decode(const Decode *decode, int64_t isa) {
    const Decode &d = *decode;
    const Kernel kernel = kernel_of(isa);
    const int64_t across = (d.width + d.tile_cols - 1) / d.tile_cols;
    const int64_t tiles = across * ((d.height + d.tile_rows - 1) / d.tile_rows);
    std::atomic<int> failed{kOk};
#pragma omp parallel num_threads(d.num_threads)
    {
        Scratch scratch;
        if (!make_scratch(widest(d), kBlockRows, kernel, &scratch)) failed = kNoMemory;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < tiles; ++i) {
            if (failed) continue;
            Tile tile = {i / across * d.tile_rows, i % across * d.tile_cols, d.tile_rows, d.tile_cols};
            tile.rows = std::min(tile.rows, d.height - tile.row);
            tile.cols = std::min(tile.cols, d.width - tile.col);
            int error = kOk;
            kernel.decode(d, tile, scratch, &error);
            if (error) failed = error;
        }
    }
    return failed;
}

// Returns one of Error.
MOEISR_API int64_t moeisr_table(const TableJob *job, int64_t isa) {
    const TableJob &t = *job;
    const Kernel kernel = kernel_of(isa);
    const int64_t cells = t.cells ? t.num_cells : t.height * t.width;
    int64_t width = 0;
    for (int64_t n = 0; n < t.num_layers; ++n) width = std::max(width, t.layers[n].in);
    int64_t step = kernel.table_cells;
    while (step > 48 && cells < step * t.num_threads) step /= 2;
    std::atomic<int> failed{kOk};
#pragma omp parallel num_threads(t.num_threads)
    {
        Scratch scratch;
        if (!make_scratch(width, step, kernel, &scratch)) failed = kNoMemory;
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < cells; first += step)
            if (!failed) kernel.table(t, first, std::min(step, cells - first), scratch);
    }
    return failed;
}

// Returns one of Error. No vectors: the instruction set does not matter.
MOEISR_API int64_t moeisr_needed(const Needed *needed, int64_t) {
    const Needed &n = *needed;
    for (int64_t row = 0; row < n.height; ++row) {
        const uint8_t *experts = n.expert_map + row * n.map_stride;
        const int64_t tops[2] = {n.row_index[row], n.row_index[n.height + row]};
        for (int64_t col = 0; col < n.width; ++col) {
            if (experts[col] >= n.num_experts) return kBadExpert;
            uint8_t *of_expert = n.needed + experts[col] * n.table_height * n.table_width;
            for (int64_t top : tops) {
                of_expert[top * n.table_width + n.col_index[col]] = 1;
                of_expert[top * n.table_width + n.col_index[n.width + col]] = 1;
            }
        }
    }
    return kOk;
}

MOEISR_API int64_t moeisr_route(const Route *route, int64_t isa) {
    const RouteRow run = kernel_of(isa).route;
#pragma omp parallel for num_threads(route->num_threads) schedule(static)
    for (int64_t row = 0; row < route->height; ++row) run(*route, row);
    return 0;
}
