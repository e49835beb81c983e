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
