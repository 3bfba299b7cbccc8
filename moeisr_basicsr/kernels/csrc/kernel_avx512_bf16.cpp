// The kernels for AVX512_BF16. The target pragma, not a compiler flag, selects the instructions: one build serves
// every x86-64 machine. Standard headers come first, so that no shared inline function is compiled for this target.
#include <cmath>
#include <cstring>
#include <utility>

#include "decode.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16")
#endif

namespace moeisr {
namespace avx512_bf16 {
#include "vec_avx512.h"
#include "tile.h"
#include "render.h"
#include "gemm_sparse.h"
#include "gemm_bf16.h"
#include "table.h"
}  // namespace avx512_bf16
}  // namespace moeisr

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

moeisr::Kernel moeisr::avx512_bf16_kernel() {
    using Gemm = avx512_bf16::GemmSparse<avx512_bf16::ProductBf16>;
    return {avx512_bf16::decode_tile<Gemm>, avx512_bf16::build_table<Gemm>, nullptr, 4, 1, 48};
}

#else
moeisr::Kernel moeisr::avx512_bf16_kernel() { return {}; }
#endif
