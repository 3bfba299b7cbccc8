// The kernels for AVX2 and FMA. The target pragma, not a compiler flag, selects the instructions: one build serves
// every x86-64 machine. Standard headers come first, so that no shared inline function is compiled for this target.
#include <cmath>
#include <cstring>
#include <utility>

#include "decode.h"

#if defined(__x86_64__)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace moeisr {
namespace avx2 {
#include "vec_avx2.h"
#include "tile.h"
#include "render.h"
#include "gemm_sparse.h"
#include "gemm_fp32.h"
#include "table.h"
#include "route.h"
}  // namespace avx2
}  // namespace moeisr

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// 16 registers: 4 rows x 2 vectors of sums, 2 of weights, broadcasts in flight.
moeisr::Kernel moeisr::avx2_kernel() {
    using Gemm = avx2::GemmSparse<avx2::ProductFp32<1>>;
    return {avx2::decode_tile<Gemm>, avx2::build_table<Gemm>, avx2::route_row, 4, 1, 48};
}

#else
moeisr::Kernel moeisr::avx2_kernel() { return {}; }
#endif
