// The kernels for AMX_BF16. The target pragma, not a compiler flag, selects the instructions: one build serves
// every x86-64 machine. Standard headers come first, so that no shared inline function is compiled for this target.
#include <cmath>
#include <cstring>
#include <utility>

#include "decode.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(                                                                                  \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")
#endif

namespace moeisr {
namespace amx {
#include "vec_avx512.h"
#include "tile.h"
#include "render.h"
#include "bf16.h"
#include "gemm_amx.h"
#include "table.h"
}  // namespace amx
}  // namespace moeisr

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

moeisr::Kernel moeisr::amx_bf16_kernel() {
    using Gemm = amx::GemmAmx<1>;
    return {amx::decode_tile<Gemm>, amx::build_table<Gemm>, nullptr, 2, 1, 192};
}
moeisr::Kernel moeisr::amx_fp32_kernel() {
    using Gemm = amx::GemmAmx<3>;
    return {amx::decode_tile<Gemm>, amx::build_table<Gemm>, nullptr, 2, 3, 192};
}

#else
moeisr::Kernel moeisr::amx_bf16_kernel() { return {}; }
moeisr::Kernel moeisr::amx_fp32_kernel() { return {}; }
#endif
