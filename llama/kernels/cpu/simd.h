/* Vectors of sixteen values, kept as bfloat16 or fp32 and computed in fp32; and the tile registers of AMX. */

#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>

typedef uint16_t bf16;

static inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }

static inline __m512 widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

static inline __m256i narrow(__m512 x) { /* to nearest, ties to even, NaN stays NaN */
    return (__m256i)_mm512_cvtneps_pbh(x);
}

static inline __m512 load(const bf16 *x) { return widen(_mm256_loadu_si256((const __m256i *)x)); }

static inline void store(bf16 *y, __m512 x) { _mm256_storeu_si256((__m256i *)y, narrow(x)); }

/* Those that there are of 16 values, zeros for the rest. */
static inline __m512 load_part(const bf16 *x, __mmask16 there) { return widen(_mm256_maskz_loadu_epi16(there, x)); }

static inline void store_part(bf16 *y, __m512 x, __mmask16 there) { _mm256_mask_storeu_epi16(y, there, narrow(x)); }

static inline __m512 load_fp16(const uint16_t *x, __mmask16 there) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, x));
}

/* 32 values of bfloat16, `n` of which there are, as 16 pairs; and the first and the second of each pair. */
static inline __m512i load_pairs(const bf16 *x, int64_t n) {
    return n >= 32 ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi16(n > 0 ? (1u << n) - 1 : 0, x);
}

static inline __m512 even_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }

static inline __m512 odd_of(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}

/* 16, 32 or 64 bytes, `n` of which there are. */
static inline __m128i load_bytes_16(const char *x, int64_t n) {
    return n >= 16 ? _mm_loadu_si128((const __m128i *)x) : _mm_maskz_loadu_epi8(n > 0 ? (1u << n) - 1 : 0, x);
}

static inline __m256i load_bytes_32(const char *x, int64_t n) {
    return n >= 32 ? _mm256_loadu_si256((const __m256i *)x) : _mm256_maskz_loadu_epi8(n > 0 ? (1u << n) - 1 : 0, x);
}

static inline __m512i load_bytes_64(const char *x, int64_t n) {
    return n >= 64 ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi8(n > 0 ? (1ull << n) - 1 : 0, x);
}

static inline __m128 widen_4(__m128i x) { return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(x), 16)); }

static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* 0, n, 2 n, ... 15 n. */
static inline __m512i multiples(int n) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_mullo_epi32(lanes, _mm512_set1_epi32(n));
}

/* n 32-bit words that lie `stride` words apart, from `base` on. */
static inline __m512i column(const void *base, int64_t stride, int64_t n) {
    return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), first(n), multiples((int)stride), base, 4);
}

/* e^x for x <= 0: 2^n times a polynomial for 2^f, |f| <= 1/2; relative error below 3e-7. NaN stays NaN. */
static inline __m512 exponential(__m512 x) {
    const float taylor[] = {1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f,
                            2.4022651e-1f, 6.9314718e-1f, 1.0f};
    const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 t = _mm512_max_ps(_mm512_set1_ps(-150.0f), scaled); /* max returns the second operand if one is NaN */
    const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT), f = _mm512_sub_ps(t, n);
    __m512 p = _mm512_set1_ps(taylor[0]);
    for (int i = 1; i < 7; i++) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(taylor[i]));
    return _mm512_scalef_ps(p, n);
}

#ifdef __AMX_TILE__

#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* Linux lends the tile registers only to processes that ask. 0 means yes. */
static inline int request_tiles(void) {
    const long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return (int)syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
}

static inline void configure(const TileConfig *config) {
    __asm__ volatile("" : : "r"(config) : "memory"); /* GCC 12 believes that the next line reads 8 bytes of these 64 */
    _tile_loadconfig(config);
}

/* Back to what PyTorch's own kernels left, who expect to find it again. */
static inline void restore(const TileConfig *before) {
    if (before->palette) configure(before);
    else _tile_release();
}

#endif
