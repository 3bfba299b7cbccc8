// Sixteen fp32 lanes. Included inside the namespace of one instruction set, after its target pragma.

struct Vec {
    __m512 v;
    static constexpr int kLanes = 16;
};
static inline Vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float *p, Vec a) { _mm512_storeu_ps(p, a.v); }
static inline Vec set1(float a) { return {_mm512_set1_ps(a)}; }
static inline Vec zero() { return {_mm512_setzero_ps()}; }
static inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec relu(Vec a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }  // this order keeps NaN

static inline Vec either(Vec a, Vec b) { return {_mm512_or_ps(a.v, b.v)}; }  // all bits of both

// Writes `first` + lane for every lane of `v` that is not zero, and up to 16 entries more; returns the new end.
static inline int32_t *append_nonzero(Vec v, int32_t first, int32_t *end) {
    const __m512i bits = _mm512_castps_si512(v.v);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 some = _mm512_test_epi32_mask(bits, bits);
    // Compressed in a register: straight to memory it takes a hundred cycles on Zen 4.
    _mm512_storeu_si512(end, _mm512_maskz_compress_epi32(some, _mm512_add_epi32(lanes, _mm512_set1_epi32(first))));
    return end + __builtin_popcount(some);
}

static inline Vec load(const uint16_t *p) {  // bf16 is the upper half of fp32
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

static inline float sum(Vec a) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 eighth = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(eighth, _mm_movehdup_ps(eighth)));
}

static inline Vec round_nearest(Vec a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

// Quarter turns: given s = sin(r), c = cos(r) and the integer-valued q, returns sin and cos of r + q * pi / 2.
static inline void rotate(Vec q, Vec s, Vec c, Vec *sin_out, Vec *cos_out) {
    const __m512i n = _mm512_cvtps_epi32(q.v);
    const __mmask16 odd = _mm512_test_epi32_mask(n, _mm512_set1_epi32(1));
    const __m512i flip_sin = _mm512_slli_epi32(_mm512_srli_epi32(n, 1), 31);
    const __m512i flip_cos = _mm512_slli_epi32(_mm512_srli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(1)), 1), 31);
    *sin_out = {_mm512_xor_ps(_mm512_mask_blend_ps(odd, s.v, c.v), _mm512_castsi512_ps(flip_sin))};
    *cos_out = {_mm512_xor_ps(_mm512_mask_blend_ps(odd, c.v, s.v), _mm512_castsi512_ps(flip_cos))};
}
