// The kernels for AVX-512. The target pragma, not a compiler flag, selects the instructions: one build serves
// every x86-64 machine. Standard headers come first, so that no shared inline function is compiled for this target.
#include <cmath>
#include <cstring>
#include <utility>

#include "decode.h"

#if defined(__x86_64__)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl")
#endif

namespace moeisr {
namespace avx512 {
#include "vec_avx512.h"
#include "tile.h"
#include "render.h"
#include "gemm_sparse.h"
#include "gemm_fp32.h"
#include "table.h"
#include "route.h"
}  // namespace avx512
}  // namespace moeisr

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

// 32 registers: 4 rows x 4 vectors of sums, 4 of weights, broadcasts in flight.
moeisr::Kernel moeisr::avx512_kernel() {
    using Gemm = avx512::GemmSparse<avx512::ProductFp32<2>>;
    return {avx512::decode_tile<Gemm>, avx512::build_table<Gemm>, avx512::route_row, 4, 1, 48};
}

#else
moeisr::Kernel moeisr::avx512_kernel() { return {}; }
#endif
