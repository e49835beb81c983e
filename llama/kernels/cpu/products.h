/* Matrix products of a few rows: y[M, N] = x[M, K] w[N, K]^T, with w of bfloat16, int8 or int4, sums in fp32.

   A step reads every weight once and does next to nothing with it, so all that counts is to keep memory busy: four rows
   of w are multiplied while the four after them are called for, line by line. Weights stay as they lie in the
   checkpoint, and are made into numbers in registers; it is x, which is small, that is prepared.

   bfloat16 is widened to fp32 and multiplied in it. Codes are multiplied as integers and scaled after, so x is made
   integers as well: of 16 bits, with a power of two, its unit, for each STEP columns of each row. Of a bfloat16 that
   keeps all that is above 2^-16 of the largest among those columns. Sums of products within a step are exact.

   A row of y is formed by the same operations in the same order whatever M is, so several tokens at once have the bits of
   one after the other.

   Any K and N: the last step of a row reads what there is and multiplies zeros for the rest; in the place of rows that are
   not there the last one is read again. */

#pragma once

#include <stdbool.h>
#include <string.h>

#include "simd.h"

/* A matrix [N, K] as llama/codes.py lays it out.
   INT8: codes; scales fp32 [N], or with a group_size fp16 [N, groups].
   INT4: blocks of 32 columns in 16 bytes, column j of a block in the low nibble of byte j, j + 16 in the high one; scales
   bfloat16 [N, groups], and a nibble stands for it less 8 times its scale; or scales and offsets fp16, and it stands for
   it times its scale, and the offset. */
enum { BF16, INT8, INT4 };

typedef struct {
    const void *data, *scales, *offsets;
    int64_t format, group_size, N, K;
} Matrix;

/* y[M, N], or where it is added to y what y was. */
typedef struct {
    const Matrix *w;
    bf16 *y;
    bool is_added;
} Product;

enum { ROWS = 4, STEP = 128, MOST = 16, AT_ONCE = 4 }; /* rows of w; columns; rows of x that are prepared, multiplied */
enum { BLOCK = 32 };                                   /* columns of int4 that are packed together */

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t row_bytes(const Matrix *w) {
    return w->format == BF16 ? 2 * w->K : w->format == INT8 ? w->K : BLOCK / 2 * ceil_div(w->K, BLOCK);
}

static inline int64_t groups_of(const Matrix *w) { return w->group_size ? ceil_div(w->K, w->group_size) : 0; }

/* x, prepared for one format: each row in steps of STEP columns, zeros after the last column.
   BF16: fp32, of each 32 columns the even ones and then the odd ones. Else int16, `order` says which column is where;
   units[m, step], and for INT4 totals[m, step, 16], in fp32 the sums of x that belong to a lane of sums of products. */
typedef struct {
    void *x;
    float *units, *totals;
    int64_t steps;
} Prepared;

/* What one thread needs: x in each of the formats, and scales of ROWS rows of w. */
typedef struct {
    Prepared of[3];
    bool is_ready[3];
    float *scales, *offsets;
    int64_t groups; /* that a row of scales has room for */
    bf16 *normed;   /* MOST rows of x */
} Room;

/* Bytes of the room for rows of at most K columns. */
static int64_t room_bytes(int64_t K) {
    const int64_t steps = ceil_div(K, STEP), columns = MOST * steps * STEP, of_steps = MOST * steps;
    const int64_t scales = 2 * ROWS * (ceil_div(K, BLOCK) + 32);
    return columns * (4 + 2 + 2 + 2) + 4 * (2 * of_steps + 16 * of_steps + scales) + 4096;
}

static inline void *take(char **room, int64_t bytes) {
    char *taken = *room;
    *room += ceil_div(bytes, 64) * 64;
    return taken;
}

static Room room_of(char *bytes, int64_t K) {
    const int64_t steps = ceil_div(K, STEP), columns = MOST * steps * STEP, of_steps = MOST * steps;
    Room room = {.groups = ceil_div(K, BLOCK) + 32};
    bytes += -(uintptr_t)bytes % 64;
    room.of[BF16] = (Prepared){.x = take(&bytes, 4 * columns)};
    for (int format = INT8; format <= INT4; format++)
        room.of[format] = (Prepared){.x = take(&bytes, 2 * columns), .units = take(&bytes, 4 * of_steps)};
    room.of[INT4].totals = take(&bytes, 64 * of_steps);
    room.scales = take(&bytes, 4 * ROWS * room.groups);
    room.offsets = take(&bytes, 4 * ROWS * room.groups);
    room.normed = take(&bytes, 2 * columns);
    return room;
}

/* Preparing x. */

static void prepare_bf16(const bf16 *x, int64_t M, int64_t K, Prepared *out) {
    float *to = out->x;
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < out->steps * STEP; k += 32, to += 32) {
            const __m512i pairs = load_pairs(x + m * K + k, K - k);
            _mm512_storeu_ps(to, even_of(pairs));
            _mm512_storeu_ps(to + 16, odd_of(pairs));
        }
}

/* STEP columns of x in whole units; returns the unit, NaN where what is not finite is among them. */
static inline float whole_units(const bf16 *x, int64_t n, __m512i *whole) {
    __m512i pairs[STEP / 32], top = _mm512_setzero_si512();
    for (int i = 0; i < STEP / 32; i++) {
        pairs[i] = load_pairs(x + 32 * i, n - 32 * i);
        top = _mm512_max_epu16(top, _mm512_and_si512(pairs[i], _mm512_set1_epi16(0x7fff)));
    }
    const __m512i even = _mm512_and_si512(top, _mm512_set1_epi32(0xffff)), odd = _mm512_srli_epi32(top, 16);
    const int largest = (int)_mm512_reduce_max_epu32(_mm512_max_epu32(even, odd)) >> 7; /* 2^(largest - 127) <= |x| */
    const int unit = larger(largest, 30) - 126 - 15; /* |x| < 2^15 units, less 2^7 since x has 8 bits */
    const __m512 scale = _mm512_set1_ps((float)-unit);
    for (int i = 0; i < STEP / 32; i++) {
        if (largest == 255) {
            whole[i] = _mm512_setzero_si512();
            continue;
        }
        const __m512i low = _mm512_cvtps_epi32(_mm512_scalef_ps(even_of(pairs[i]), scale));
        const __m512i high = _mm512_cvtps_epi32(_mm512_scalef_ps(odd_of(pairs[i]), scale));
        whole[i] = _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(high, 16));
    }
    return largest == 255 ? NAN : ldexpf(1.0f, unit);
}

static void prepare_int8(const bf16 *x, int64_t M, int64_t K, Prepared *out) {
    int16_t *to = out->x;
    for (int64_t m = 0; m < M; m++)
        for (int64_t step = 0; step < out->steps; step++, to += STEP) {
            __m512i whole[STEP / 32];
            out->units[m * out->steps + step] = whole_units(x + m * K + step * STEP, K - step * STEP, whole);
            for (int i = 0; i < STEP / 32; i++) _mm512_storeu_si512(to + 32 * i, whole[i]);
        }
}

/* A step of int4 is a line of four blocks. In its 32 words of two bytes lie, from the lowest nibble to the highest, columns
   2 j, 2 j + 16, 2 j + 1 and 2 j + 17 of block i, for word 8 i + j. x goes into four vectors in that order. */
static void prepare_int4(const bf16 *x, int64_t M, int64_t K, Prepared *out) {
    const __m512i one = _mm512_set1_epi16(1);
    int16_t order[4][32], *to = out->x;
    for (int word = 0; word < 32; word++)
        for (int nibble = 0; nibble < 4; nibble++)
            order[nibble][word] = (int16_t)(word / 8 * 32 + word % 8 * 2 + nibble % 2 * 16 + nibble / 2);
    for (int64_t m = 0; m < M; m++)
        for (int64_t step = 0; step < out->steps; step++, to += STEP) {
            __m512i whole[4], total = _mm512_setzero_si512();
            const int64_t at = m * out->steps + step;
            out->units[at] = whole_units(x + m * K + step * STEP, K - step * STEP, whole);
            for (int i = 0; i < 4; i++) {
                const __m512i from = _mm512_loadu_si512(order[i]);
                const __m512i low = _mm512_permutex2var_epi16(whole[0], from, whole[1]);
                const __m512i high = _mm512_permutex2var_epi16(whole[2], from, whole[3]);
                const __m512i part = _mm512_mask_blend_epi16(0xffff0000, low, high); /* words 16 on: blocks 2 and 3 */
                total = _mm512_dpwssd_epi32(total, part, one);
                _mm512_storeu_si512(to + 32 * i, part);
            }
            const __m512 unit = _mm512_set1_ps(out->units[at]);
            _mm512_storeu_ps(out->totals + 16 * at, _mm512_mul_ps(_mm512_cvtepi32_ps(total), unit));
        }
}

static const Prepared *prepared(Room *room, const bf16 *x, int64_t M, const Matrix *w) {
    Prepared *out = &room->of[w->format];
    if (!room->is_ready[w->format]) {
        out->steps = ceil_div(w->K, STEP);
        (w->format == BF16 ? prepare_bf16 : w->format == INT8 ? prepare_int8 : prepare_int4)(x, M, w->K, out);
        room->is_ready[w->format] = true;
    }
    return out;
}

/* Scales and offsets of a row as fp32, and zeros for another 16 groups. */
static void widen_scales(const Matrix *w, int64_t row, float *scales, float *offsets) {
    const int64_t n = groups_of(w), at = row * n;
    const __m512 eight = _mm512_set1_ps(-8.0f);
    for (int64_t g = 0; g < n + 16; g += 16) {
        const __mmask16 there = g < n ? first(n - g) : 0;
        if (w->format == INT8 || w->offsets) {
            _mm512_storeu_ps(scales + g, load_fp16((const uint16_t *)w->scales + at + g, there));
            if (w->offsets) _mm512_storeu_ps(offsets + g, load_fp16((const uint16_t *)w->offsets + at + g, there));
        } else {
            const __m512 scale = load_part((const bf16 *)w->scales + at + g, there);
            _mm512_storeu_ps(scales + g, scale);
            _mm512_storeu_ps(offsets + g, _mm512_mul_ps(scale, eight));
        }
    }
}

/* Multiplying: ROWS rows of w, at w[0..3], with `n` of the prepared rows of x, from row m on. `n` is a constant where these
   are called, so that the sums stay in registers. */

#define INLINE static inline __attribute__((always_inline))

/* Calls for the lines of the rows that come next, in the order in which they lie. */
typedef struct {
    const char *at, *end;
} Ahead;

INLINE void call_for(Ahead *ahead, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(ahead->at + i, _MM_HINT_T1);
    if (ahead->at < ahead->end) ahead->at += bytes;
}

INLINE void step_bf16(const char *const *w, int64_t k, int64_t left, const float *x, int64_t to_next, int n,
                      __m512 (*sums)[AT_ONCE]) {
    __m512 low[ROWS], high[ROWS];
    for (int r = 0; r < ROWS; r++) {
        const __m512i pairs = load_pairs((const bf16 *)w[r] + k, left);
        low[r] = even_of(pairs);
        high[r] = odd_of(pairs);
    }
#pragma GCC unroll 4
    for (int m = 0; m < n; m++) {
        const __m512 even = _mm512_loadu_ps(x + m * to_next + k), odd = _mm512_loadu_ps(x + m * to_next + k + 16);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            sums[r][m] = _mm512_fmadd_ps(low[r], even, sums[r][m]);
            sums[r][m] = _mm512_fmadd_ps(high[r], odd, sums[r][m]);
        }
    }
}

INLINE void multiply_bf16(const char *const *w, const Matrix *matrix, const Prepared *x, int64_t m, int n, Ahead *ahead,
                          __m512 (*sums)[AT_ONCE]) {
    const int64_t K = matrix->K, to_next = x->steps * STEP;
    const float *rows = (const float *)x->x + m * to_next;
    int64_t k = 0;
    for (; k + 32 <= K; k += 32) {
        call_for(ahead, ROWS * 64);
        step_bf16(w, k, 32, rows, to_next, n, sums);
    }
    if (k < K) step_bf16(w, k, K - k, rows, to_next, n, sums);
}

/* 128 codes of a row, `left` of which there are, as words in the order of x. */
INLINE void words_int8(const char *w, int64_t left, __m512i *words) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) words[i] = _mm512_cvtepi8_epi16(load_bytes_32(w + 32 * i, left - 32 * i));
}

INLINE void words_int4(const char *w, int64_t bytes, __m512i *words) {
    const __m512i line = load_bytes_64(w, bytes), nibble = _mm512_set1_epi16(15);
    words[0] = _mm512_and_si512(line, nibble);
    words[1] = _mm512_and_si512(_mm512_srli_epi16(line, 4), nibble);
    words[2] = _mm512_and_si512(_mm512_srli_epi16(line, 8), nibble);
    words[3] = _mm512_srli_epi16(line, 12);
}

INLINE __m512i load_x(const int16_t *x, int i) { return _mm512_loadu_si512(x + 32 * i); }

INLINE __m512 dot(const __m512i *words, const int16_t *x) {
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sum = _mm512_dpwssd_epi32(sum, words[i], load_x(x, i));
    return _mm512_cvtepi32_ps(sum);
}

/* One scale for a row: applied to the whole sum, by whoever stores it. */
INLINE void step_int8(const char *const *w, int64_t step, int64_t left, const Prepared *x, int64_t m, int n,
                      __m512 (*sums)[AT_ONCE]) {
    for (int r = 0; r < ROWS; r++) {
        __m512i words[4];
        words_int8(w[r] + step * STEP, left, words);
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            const int64_t at = (m + i) * x->steps + step;
            const __m512 sum = dot(words, (const int16_t *)x->x + at * STEP);
            sums[r][i] = _mm512_fmadd_ps(sum, _mm512_set1_ps(x->units[at]), sums[r][i]);
        }
    }
}

/* A scale for each group: each 32 columns are summed apart. */
INLINE void step_int8_groups(const char *const *w, int64_t step, int64_t left, const Prepared *x, int64_t m, int n,
                             const float *scales, int64_t groups, int64_t group_size, __m512 (*sums)[AT_ONCE]) {
    for (int r = 0; r < ROWS; r++) {
        __m512i words[4];
        words_int8(w[r] + step * STEP, left, words);
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            const int64_t at = (m + i) * x->steps + step;
            const __m512 unit = _mm512_set1_ps(x->units[at]);
#pragma GCC unroll 4
            for (int b = 0; b < 4; b++) {
                const __m512i part = load_x((const int16_t *)x->x + at * STEP, b);
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_dpwssd_epi32(_mm512_setzero_si512(), words[b], part));
                const float scale = scales[r * groups + (step * STEP + 32 * b) / group_size];
                sums[r][i] = _mm512_fmadd_ps(_mm512_mul_ps(sum, unit), _mm512_set1_ps(scale), sums[r][i]);
            }
        }
    }
}

/* Four lanes of a sum belong to a block, which has a scale and an offset: times the sum of x in those lanes. */
INLINE void step_int4(const char *const *w, int64_t step, int64_t bytes, const Prepared *x, int64_t m, int n,
                      const float *scales, const float *offsets, int64_t groups, __m512i lane, __m512 (*sums)[AT_ONCE]) {
    for (int r = 0; r < ROWS; r++) {
        __m512i words[4];
        words_int4(w[r] + step * 64, bytes, words);
        const __m512 scale = _mm512_permutexvar_ps(lane, _mm512_loadu_ps(scales + r * groups));
        const __m512 offset = _mm512_permutexvar_ps(lane, _mm512_loadu_ps(offsets + r * groups));
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            const int64_t at = (m + i) * x->steps + step;
            const __m512 sum = _mm512_mul_ps(dot(words, (const int16_t *)x->x + at * STEP), _mm512_set1_ps(x->units[at]));
            sums[r][i] = _mm512_fmadd_ps(offset, _mm512_loadu_ps(x->totals + 16 * at), sums[r][i]);
            sums[r][i] = _mm512_fmadd_ps(scale, sum, sums[r][i]);
        }
    }
}

INLINE void multiply_codes(const char *const *w, const Matrix *matrix, const Prepared *x, int64_t m, int n, Room *room,
                           Ahead *ahead, __m512 (*sums)[AT_ONCE]) {
    const int64_t K = matrix->K, group_size = matrix->group_size, whole = K / STEP, groups = room->groups;
    if (matrix->format == INT4) {
        const int64_t to_next = STEP / group_size;
        const __m512i lane = _mm512_srli_epi32(multiples(1), group_size == 32 ? 2 : group_size == 64 ? 3 : 4);
        for (int64_t step = 0; step < whole; step++) {
            call_for(ahead, ROWS * 64);
            step_int4(w, step, 64, x, m, n, room->scales + step * to_next, room->offsets + step * to_next, groups, lane,
                      sums);
        }
        if (K % STEP)
            step_int4(w, whole, row_bytes(matrix) - whole * 64, x, m, n, room->scales + whole * to_next,
                      room->offsets + whole * to_next, groups, lane, sums);
    } else if (group_size) {
        for (int64_t step = 0; step < whole; step++) {
            call_for(ahead, ROWS * 128);
            step_int8_groups(w, step, STEP, x, m, n, room->scales, groups, group_size, sums);
        }
        if (K % STEP)
            step_int8_groups(w, whole, K % STEP, x, m, n, room->scales, groups, group_size, sums);
    } else {
        for (int64_t step = 0; step < whole; step++) {
            call_for(ahead, ROWS * 128);
            step_int8(w, step, STEP, x, m, n, sums);
        }
        if (K % STEP) step_int8(w, whole, K % STEP, x, m, n, sums);
    }
}

/* The sums of four neighbouring lanes each: lane 4 i + j has that of lanes 4 i to 4 i + 3 of vector j. */
INLINE __m512 quarter_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    return _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
}

/* The sums of the lanes of four vectors. */
INLINE __m128 lane_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 quarters = quarter_sums(a, b, c, d);
    const __m256 upper = _mm512_extractf32x8_ps(quarters, 1);
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), upper);
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

/* Rows row..row+3 of w, `count` of which there are, with rows m..m+n-1 of x. */
INLINE void block(const Product *product, int64_t row, int64_t count, const Prepared *x, int64_t m, int n, Room *room,
                  Ahead *ahead) {
    const Matrix *matrix = product->w;
    const char *w[ROWS];
    __m512 sums[ROWS][AT_ONCE];
    for (int r = 0; r < ROWS; r++) {
        w[r] = (const char *)matrix->data + (row + at_most(r, count - 1)) * row_bytes(matrix);
        for (int i = 0; i < n; i++) sums[r][i] = _mm512_setzero_ps();
    }
    if (matrix->format == BF16) multiply_bf16(w, matrix, x, m, n, ahead, sums);
    else multiply_codes(w, matrix, x, m, n, room, ahead, sums);
    const __mmask8 there = (__mmask8)((1 << count) - 1);
    __m128 scale = _mm_set1_ps(1.0f);
    if (matrix->format == INT8 && !matrix->group_size)
        scale = _mm_maskz_loadu_ps(there, (const float *)matrix->scales + row);
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
        bf16 *y = product->y + (m + i) * matrix->N + row;
        const __m128 sum = _mm_mul_ps(lane_sums(sums[0][i], sums[1][i], sums[2][i], sums[3][i]), scale);
        __m128i values = (__m128i)_mm_cvtneps_pbh(sum);
        if (product->is_added) {
            const __m128 before = widen_4(_mm_maskz_loadu_epi16(there, y));
            values = (__m128i)_mm_cvtneps_pbh(_mm_add_ps(before, widen_4(values)));
        }
        _mm_mask_storeu_epi16(y, there, values);
    }
}

static void rows_of_block(const Product *product, int64_t row, int64_t count, const Prepared *x, int64_t M, Room *room,
                          Ahead *ahead) {
    const Matrix *w = product->w;
    if (w->group_size)
        for (int r = 0; r < ROWS; r++)
            widen_scales(w, row + at_most(r, count - 1), room->scales + r * room->groups,
                         room->offsets + r * room->groups);
    int64_t m = 0;
    for (; m + 4 <= M; m += 4) block(product, row, count, x, m, 4, room, ahead);
    if (m + 2 <= M) {
        block(product, row, count, x, m, 2, room, ahead);
        m += 2;
    }
    if (m < M) block(product, row, count, x, m, 1, room, ahead);
}

/* The part of a matrix's rows that is this thread's. */
static inline int64_t share_of(int64_t n, int64_t thread, int64_t threads) {
    const int64_t blocks = ceil_div(n, 32); /* a line of y each, so that no two threads write to the same one */
    return at_most(n, blocks * thread / threads * 32);
}

/* This thread's part of several products of the same M <= MOST rows x[M, K]. */
static void products_of(const bf16 *x, const Product *list, int count, int64_t M, Room *room, int64_t thread,
                        int64_t threads) {
    memset(room->is_ready, 0, sizeof room->is_ready);
    for (int i = 0; i < count; i++) {
        const Matrix *w = list[i].w;
        const Prepared *ready = prepared(room, x, M, w);
        const int64_t bytes = row_bytes(w), end = share_of(w->N, thread + 1, threads);
        for (int64_t row = share_of(w->N, thread, threads); row < end; row += ROWS) {
            const int64_t next = at_most(row + 2 * ROWS, end);
            const char *data = w->data;
            Ahead ahead = {data + at_most(row + ROWS, end) * bytes, data + next * bytes};
            rows_of_block(&list[i], row, at_most(ROWS, end - row), ready, M, room, &ahead);
        }
    }
}

/* Row `row` as bfloat16: codes times scales, and offsets, rounded once. */
static void widen_row(const Matrix *w, int64_t row, bf16 *y) {
    float scales[groups_of(w) + 32], offsets[groups_of(w) + 32];
    const char *data = (const char *)w->data + row * row_bytes(w);
    if (w->format == BF16) {
        memcpy(y, data, (size_t)w->K * sizeof *y);
        return;
    }
    if (w->group_size) widen_scales(w, row, scales, offsets);
    for (int64_t k = 0; k < w->K; k += 16) {
        const int64_t left = w->K - k;
        __m512i codes;
        float scale = 0, offset = 0;
        if (w->format == INT8) codes = _mm512_cvtepi8_epi32(load_bytes_16(data + k, left));
        else { /* columns 0 to 15 of a block are the low nibbles of its bytes, 16 to 31 the high ones */
            codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(data + k / BLOCK * (BLOCK / 2))));
            codes = k % BLOCK ? _mm512_srli_epi32(codes, 4) : _mm512_and_si512(codes, _mm512_set1_epi32(15));
        }
        if (w->group_size) {
            scale = scales[k / w->group_size];
            if (w->format == INT4) offset = offsets[k / w->group_size];
        } else scale = ((const float *)w->scales)[row];
        const __m512 value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(scale), _mm512_set1_ps(offset));
        store_part(y + k, value, first(left));
    }
}
