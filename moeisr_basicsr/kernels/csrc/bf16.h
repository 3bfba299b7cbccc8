// bf16 helpers for AVX-512 machines with AVX512_BF16. Included inside the namespace of one instruction set.

// Two vectors of fp32 to 32 bf16, nearest even.
static inline void store_bf16(uint16_t *out, Vec first, Vec second) {
    const __m512bh both = _mm512_cvtne2ps_pbh(second.v, first.v);
    __m512i bits;
    std::memcpy(&bits, &both, sizeof(bits));
    _mm512_storeu_si512(out, bits);
}
