// Eight fp32 lanes. Included inside the namespace of one instruction set, after its target pragma.

struct Vec {
    __m256 v;
    static constexpr int kLanes = 8;
};
static inline Vec load(const float *p) { return {_mm256_loadu_ps(p)}; }
static inline void store(float *p, Vec a) { _mm256_storeu_ps(p, a.v); }
static inline Vec set1(float a) { return {_mm256_set1_ps(a)}; }
static inline Vec zero() { return {_mm256_setzero_ps()}; }
static inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec relu(Vec a) { return {_mm256_max_ps(_mm256_setzero_ps(), a.v)}; }  // this order keeps NaN

static inline Vec either(Vec a, Vec b) { return {_mm256_or_ps(a.v, b.v)}; }  // all bits of both

// Writes `first` + lane for every lane of `v` that is not zero; returns the new end.
static inline int32_t *append_nonzero(Vec v, int32_t first, int32_t *end) {
    const __m256i none = _mm256_cmpeq_epi32(_mm256_castps_si256(v.v), _mm256_setzero_si256());
    for (int some = ~_mm256_movemask_ps(_mm256_castsi256_ps(none)) & 0xff; some; some &= some - 1)
        *end++ = first + __builtin_ctz(some);
    return end;
}

static inline float sum(Vec a) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

static inline Vec round_nearest(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// Quarter turns: given s = sin(r), c = cos(r) and the integer-valued q, returns sin and cos of r + q * pi / 2.
static inline void rotate(Vec q, Vec s, Vec c, Vec *sin_out, Vec *cos_out) {
    const __m256i n = _mm256_cvtps_epi32(q.v);
    const __m256 odd = _mm256_castsi256_ps(_mm256_slli_epi32(n, 31));
    const __m256i flip_sin = _mm256_slli_epi32(_mm256_srli_epi32(n, 1), 31);
    const __m256i flip_cos = _mm256_slli_epi32(_mm256_srli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(1)), 1), 31);
    *sin_out = {_mm256_xor_ps(_mm256_blendv_ps(s.v, c.v, odd), _mm256_castsi256_ps(flip_sin))};
    *cos_out = {_mm256_xor_ps(_mm256_blendv_ps(c.v, s.v, odd), _mm256_castsi256_ps(flip_cos))};
}
