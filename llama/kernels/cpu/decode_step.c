/* One decode step of a Llama on a CPU with AMX: weights of bfloat16, int8 or int4, a cache of bfloat16, sums in fp32.
   See decode_step.py; parts of it serve prefill.py.

   A step reads every weight once and does next to nothing with it, so all that counts is to keep memory busy. A core
   that walks along one row of a matrix waits for one cache line after the other (two cores: 15 GB/s); here a tile
   instruction takes 16 rows at a time while the lines that come next are called for (25 GB/s). Weights stay as they lie
   in the checkpoint: 16 rows of w are one operand, and x, which is small, is the one that is packed. Everything between
   the products is here as well: between two calls from Python the caches hold weights, not the interpreter, and 700
   calls cost a tenth of the step.

   Roundings to bfloat16 are where eager PyTorch has them, but for the softmax weights, which stay fp32.

   B sequences, T tokens of each, H query heads, K key/value heads, D head size, S cache slots; M rows of x, at most 16
   at once. A row's sums are formed in the same order whatever M is, so T tokens at once give the bits of T steps. */

#include <omp.h>
#include <string.h>

#include "simd.h"

/* A matrix [N, K] as llama/quantization.py lays it out. INT8: codes times scales, fp32 [N]. INT4: blocks of 32 columns in
   16 bytes, column j of a block in the low nibble of byte j, j + 16 in the high one, each less 8 and times a scale of its
   group, bfloat16 [N, K / group_size]. */
enum { BF16, INT8, INT4 };

typedef struct {
    const void *data, *scales;
    int64_t format, group_size;
} Matrix;

typedef struct {
    Matrix wq, wk, wv, wo, w1, w2, w3;
    const bf16 *attention_norm, *ffn_norm;
} Layer;

typedef struct {
    int64_t dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, vocab_size;
    float norm_eps;
    Matrix tok_embeddings, output;
    const bf16 *norm;
    const Layer *layers;
} Model;

int decode_init(void) { return request_tiles(); }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Matrix products: y[M, N] = x[M, K] w[N, K]^T for M <= 16. A core walks along 16 rows of w at once, a cache line of
   each at a time; those 16 lines are one tile of bfloat16 or int8, and four groups of columns of int4.

   Codes are multiplied as they are and scaled after, for 512 of them are read in 20 ns, in which the two threads of a
   core cannot make a bfloat16 of each that holds its scale. So it is x that is prepared, as integers with one power of
   two per row of x (int8: 24 bits) or per 32 columns of it (int4: 16 bits). Of a bfloat16 that keeps all that is above
   2^-22 of the largest value of its row, or 2^-14 of the largest in its 32 columns; products and their sums are exact,
   in any order.

   Tile registers: 0 to 2 sums, 3 to 5 x, 6 and 7 w. */

enum { ROWS = 16, LINE = 64, PAGE = 4096 };
enum { AHEAD = 1024 }; /* bytes of a row that are called for before they are needed */
enum { PACKED = 25 };  /* values of bfloat16 that 16 rows of x take at most, packed, per column: those of int8 */

typedef struct {
    const Matrix *w;
    bf16 *y;
    int64_t N; /* a multiple of 16; K is one of 32, with int8 of 64, with int4 of 128 */
} Product;

/* 16 rows of w that are multiplied at once, and where their results go. Memory delivers most where 16 pages are read side
   by side, so rows shorter than a page form a stream with those after them, and a block is one row of each of 16 streams.
   A matrix as it lies in memory, from left to right and then down, with three rows to a page (spread = 3):

                     block 0    block 1    block 2
       stream  0     row  0     row  1     row  2       one page
       stream  1     row  3     row  4     row  5       the next page
          ...
       stream 15     row 45     row 46     row 47       16 streams: a set
                     block 3    block 4    block 5
       stream  0     row 48     row 49     row 50       the next set
          ...

   A core goes through the blocks of a set in order, so that 16 readers move to the right, each through its own page.
   From a block's row on, a stream has `left` bytes; its rows are `stride` bytes below each other, `spread` rows in the
   matrix. `next` is where the 16 readers go from the end of the set, or NULL where this core is done then. */
typedef struct {
    const char *w, *next, *scales, *next_scales;
    bf16 *y;
    int64_t M, N, K, group_size, spread, stride, left;
    int64_t scale_bytes, scale_stride; /* of the scales that belong to a line of codes; from one row to the next */
} Block;

static int64_t row_bytes_of(const Matrix *w, int64_t K) {
    return w->format == BF16 ? 2 * K : w->format == INT8 ? K : K / 2;
}

/* Cache lines are called for AHEAD bytes before they are needed: of the same streams or, near their end, of the next. */
static inline void call_for(const Block *block, int64_t at) {
    const char *w = block->w;
    int64_t ahead = at + AHEAD;
    if (ahead >= block->left) {
        if (!block->next) return;
        w = block->next;
        ahead -= block->left;
    }
    for (int64_t i = 0; i < ROWS; i++) _mm_prefetch(w + i * block->stride + ahead, _MM_HINT_T1);
}

static inline void store_rows(const Block *block, int64_t m, __m512 y) {
    bf16 *out = block->y + m * block->N, values[ROWS];
    if (block->spread == 1) {
        store(out, y);
        return;
    }
    store(values, y);
    for (int64_t i = 0; i < ROWS; i++) out[i * block->spread] = values[i];
}

/* bfloat16: x is packed as pairs, [K / 2, M]; one row lies so already. */

static void pack_bf16(const bf16 *x, bf16 *packed, int64_t M, int64_t K) {
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < K / 2; pair++)
        _mm512_mask_storeu_epi32(packed + pair * M * 2, first(M), column(x + pair * 2, K / 2, M));
}

static void block_bf16(const Block *block, const bf16 *packed) {
    const int64_t M = block->M, depth = LINE / 2;
    float sums[ROWS * 16];
    _tile_zero(0);
    for (int64_t k = 0; k < block->K; k += depth) {
        call_for(block, 2 * k);
        _tile_loadd(6, block->w + 2 * k, block->stride);
        _tile_loadd(3, packed + k * M, 4 * M);
        _tile_dpbf16ps(0, 6, 3);
    }
    _tile_stored(0, sums, 4 * M);
    for (int64_t m = 0; m < M; m++) store_rows(block, m, _mm512_castsi512_ps(column(sums + m, M, ROWS)));
}

/* Digits, of int8: |x| < 2^e for all x of a row; x 2^-e = d0 2^-7 + d1 2^-15 + d2 2^-23, each d in -128..127, and what
   is left below half a unit of the last digit, or a whole one where it is 127. */

enum { DIGITS8 = 3 };

/* The bits of the largest of |x|, `n` values, a multiple of 32, NaN and infinity being larger than any number. */
static inline int largest(const bf16 *x, int64_t n) {
    __m512i top = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 32)
        top = _mm512_max_epu16(top, _mm512_and_si512(_mm512_loadu_si512(x + i), _mm512_set1_epi16(0x7fff)));
    const __m512i even = _mm512_and_si512(top, _mm512_set1_epi32(0xffff)), odd = _mm512_srli_epi32(top, 16);
    return (int)_mm512_reduce_max_epu32(_mm512_max_epu32(even, odd));
}

/* 2^(e - 7), the unit of the first digit; NaN where a value is infinite or NaN, and with it all that it multiplies. */
static inline float unit_of(int e) { return e < 129 ? ldexpf(1.0f, e - 7) : NAN; }

/* The digits of 16 values, 16 bytes each. */
static inline void digits_of(const bf16 *x, int e, __m128i *digits) {
    __m512 rest = _mm512_scalef_ps(load(x), _mm512_set1_ps((float)(7 - e)));
    for (int i = 0; i < DIGITS8; i++) {
        const __m512 up = _mm512_floor_ps(_mm512_add_ps(rest, _mm512_set1_ps(0.5f)));
        const __m512 digit = _mm512_min_ps(up, _mm512_set1_ps(127.0f));
        digits[i] = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(digit));
        rest = _mm512_mul_ps(_mm512_sub_ps(rest, digit), _mm512_set1_ps(256.0f));
    }
}

/* int8: digit j of row m is column j M + m of a tile, or column m of the j-th of three tiles where one is too narrow.
   The units of the rows of x come first. */

static inline int64_t tiles_int8(int64_t M) { return DIGITS8 * M > 16 ? DIGITS8 : 1; }

static void pack_int8(const bf16 *x, float *packed, int64_t M, int64_t K) {
    const int64_t tiles = tiles_int8(M), width = DIGITS8 * M / tiles, to_next = tiles > 1 ? 16 * M : M;
    int32_t *exponents = (int32_t *)packed + 16, *out = exponents + 16;
#pragma omp for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        exponents[m] = (largest(x + m * K, K) >> 7) - 126;
        packed[m] = unit_of(exponents[m]);
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < K; k += 16) {
        for (int64_t m = 0; m < M; m++) {
            int32_t words[DIGITS8][4];
            __m128i digits[DIGITS8];
            digits_of(x + m * K + k, exponents[m], digits);
            memcpy(words, digits, sizeof words);
            int32_t *at = out + k / LINE * 16 * DIGITS8 * M + k % LINE / 4 * width + m;
            for (int64_t j = 0; j < DIGITS8; j++)
                for (int64_t i = 0; i < 4; i++) at[j * to_next + i * width] = words[j][i];
        }
    }
}

static void block_int8(const Block *block, const float *packed) {
    const int64_t M = block->M, tiles = tiles_int8(M), width = DIGITS8 * M / tiles;
    const int64_t to_next = tiles > 1 ? 16 * M : M;
    const int32_t *x = (const int32_t *)packed + 32;
    int32_t sums[DIGITS8 * ROWS * 16];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (int64_t k = 0; k < block->K; k += LINE, x += 16 * DIGITS8 * M) {
        call_for(block, k);
        _tile_loadd(6, block->w + k, block->stride);
        _tile_loadd(3, x, 4 * width);
        _tile_dpbssd(0, 6, 3);
        if (tiles == 1) continue;
        _tile_loadd(4, x + to_next, 4 * width);
        _tile_dpbssd(1, 6, 4);
        _tile_loadd(5, x + 2 * to_next, 4 * width);
        _tile_dpbssd(2, 6, 5);
    }
    _tile_stored(0, sums, 4 * width);
    if (tiles > 1) {
        _tile_stored(1, sums + to_next, 4 * width);
        _tile_stored(2, sums + 2 * to_next, 4 * width);
    }
    const __m512 scales = _mm512_castsi512_ps(column(block->scales, block->spread, ROWS));
    const __m512 next_digit = _mm512_set1_ps(0x1p-8f);
    for (int64_t m = 0; m < M; m++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t j = DIGITS8 - 1; j >= 0; j--)
            sum = _mm512_fmadd_ps(sum, next_digit, _mm512_cvtepi32_ps(column(sums + m + j * to_next, width, ROWS)));
        store_rows(block, m, _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(packed[m])), scales));
    }
}

/* int4: groups of 32 columns are summed apart, for they have scales of their own; y is the sum of group sums times
   scales, in the order of the columns. Of x counts what is a multiple of 2^(e - 15), |x| < 2^e in the group: 16 bits,
   and a code has 4. A group sum then fits fp32 and is exact, whichever unit forms it, so two ways give the same bits.

   One row of x, or two, is multiplied by vectors: two digits of 8 bits with codes as they lie, 0 to 15; 8 times the sum of x,
   which each group has too much, goes off. Of more rows, each multiple is a bfloat16, since x is one, and so is each
   code: a group is the depth of one tile, whose time hardly depends on how many rows of x it holds. Four layers of
   Llama 3.2 1B take 7.6 ms by vectors, and by tiles 17 with 2 rows and 24 with 16. */

enum { DEPTH4 = 128, GROUP = 32, GROUPS = DEPTH4 / GROUP, DIGITS4 = 2 };
enum { VECTOR_ROWS = 2 }; /* of x, up to which vectors are faster */

/* 128 columns of a row of x: each quarter of a line is a group. */
typedef struct {
    int8_t digits[DIGITS4][2][LINE]; /* x = (256 first + second) unit; of the low columns and of the high ones */
    int32_t offsets[GROUPS];         /* 8 times the sum of x, in units */
    float units[GROUPS];
} Step4;

/* 32 columns of x in whole units, below 2^15 - 2^7 so that both digits fit; returns the unit, NaN for a group that
   holds what is not finite. No unit is below 2^-115, for tiles take subnormal numbers for 0. */
static inline float whole_units(const bf16 *x, __m512i *whole) {
    const int top = largest(x, GROUP), up = (top + 1) >> 7; /* 255/256 of a power of two counts as that */
    const int e = up - 126 > -100 ? up - 126 : -100;
    const __m512 shift = _mm512_set1_ps((float)(15 - e));
    if (top >= 0x7f80) {
        whole[0] = whole[1] = _mm512_setzero_si512();
        return NAN;
    }
    for (int half = 0; half < 2; half++) whole[half] = _mm512_cvtps_epi32(_mm512_scalef_ps(load(x + 16 * half), shift));
    return ldexpf(1.0f, e - 15);
}

/* [M, K] as [M, K / 128] steps. */
static void pack_int4_rows(const bf16 *x, Step4 *packed, int64_t M, int64_t K) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < M * K / GROUP; i++) {
        Step4 *step = packed + i / GROUPS;
        const int64_t g = i % GROUPS;
        __m512i whole[2];
        step->units[g] = whole_units(x + i * GROUP, whole);
        step->offsets[g] = 8 * _mm512_reduce_add_epi32(_mm512_add_epi32(whole[0], whole[1]));
        for (int half = 0; half < 2; half++) {
            const __m512i up = _mm512_srai_epi32(_mm512_add_epi32(whole[half], _mm512_set1_epi32(128)), 8);
            _mm_storeu_si128((__m128i *)(step->digits[0][half] + g * 16), _mm512_cvtepi32_epi8(up));
            _mm_storeu_si128((__m128i *)(step->digits[1][half] + g * 16), _mm512_cvtepi32_epi8(whole[half]));
        }
    }
}

/* Which column stands where after widen_int4: for i from 0 to 7 column 2 i, then 2 i + 16, 2 i + 1 and 2 i + 17. */
static inline __m512i order_int4(void) {
    short order[GROUP];
    for (int i = 0; i < GROUP; i++) order[i] = (short)(i % 8 * 2 + i / 8 % 2 * 16 + i / 16);
    return _mm512_loadu_si512(order);
}

static void pack_int4_tiles(const bf16 *x, bf16 *packed, int64_t M, int64_t K) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < K / GROUP; i++) {
        for (int64_t m = 0; m < M; m++) {
            __m512i whole[2];
            bf16 values[GROUP];
            const __m512 unit = _mm512_set1_ps(whole_units(x + m * K + i * GROUP, whole));
            for (int half = 0; half < 2; half++)
                store(values + 16 * half, _mm512_mul_ps(_mm512_cvtepi32_ps(whole[half]), unit));
            const __m512i pairs = _mm512_permutexvar_epi16(order_int4(), _mm512_loadu_si512(values));
            _mm512_i32scatter_epi32(packed + (i * 16 * M + m) * 2, multiples((int)M), pairs, 4);
        }
    }
}

/* The scales of the four groups of 128 columns of a row. */
static inline uint64_t scales_of(const char *scales, int64_t group_size) {
    uint64_t four;
    uint32_t two;
    uint16_t one;
    if (group_size == 32) {
        memcpy(&four, scales, sizeof four);
        return four;
    }
    if (group_size == 64) {
        memcpy(&two, scales, sizeof two);
        return ((uint64_t)(two >> 16) << 32 | (two & 0xffff)) * 0x10001;
    }
    memcpy(&one, scales, sizeof one);
    return one * 0x0001000100010001u;
}

/* Those of 16 rows; and as many of the next block are called for. */
static inline void load_scales(const Block *block, int64_t step, uint64_t *out) {
    const int64_t group_size = block->group_size, bytes = block->scale_bytes;
    const char *at = block->scales + step * bytes, *next = block->next_scales + step * ROWS * bytes;
    for (int64_t i = 0; i < ROWS * bytes; i += LINE) _mm_prefetch(next + i, _MM_HINT_T1);
#pragma GCC unroll 1
    for (int64_t row = 0; row < ROWS; row++, at += block->scale_stride) out[row] = scales_of(at, group_size);
}

/* Group sums of four rows of codes, a line of each: in a quarter those of a group, row after row. */
static inline __m512i dot_4(const char *w, int64_t row_bytes, const Step4 *x) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i sums[4];
#pragma GCC unroll 4
    for (int64_t row = 0; row < 4; row++) {
        const __m512i codes = _mm512_loadu_si512(w + row * row_bytes);
        const __m512i low = _mm512_and_si512(codes, nibble);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble);
        __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, _mm512_loadu_si512(x->digits[0][0]));
        sum = _mm512_dpbusd_epi32(sum, high, _mm512_loadu_si512(x->digits[0][1]));
        sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), low, _mm512_loadu_si512(x->digits[1][0]));
        sums[row] = _mm512_dpbusd_epi32(sum, high, _mm512_loadu_si512(x->digits[1][1]));
    }
    for (int i = 0; i < 4; i += 2) { /* of words 0 and 2, 1 and 3 of rows i and i + 1 */
        const __m512i a = _mm512_unpacklo_epi32(sums[i], sums[i + 1]), b = _mm512_unpackhi_epi32(sums[i], sums[i + 1]);
        sums[i] = _mm512_add_epi32(a, b);
    }
    return _mm512_add_epi32(_mm512_unpacklo_epi64(sums[0], sums[2]), _mm512_unpackhi_epi64(sums[0], sums[2]));
}

/* Four vectors of four quarters, transposed. */
static inline void transpose_quarters(__m512i *x) {
    const __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(x[0], x[1], 0xee), d = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
    x[0] = _mm512_shuffle_i32x4(a, b, 0x88);
    x[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
    x[2] = _mm512_shuffle_i32x4(c, d, 0x88);
    x[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

/* Row m of x, with the steps from `x` on. The codes of a block are in the cache for the second row. */
static void block_int4_row(const Block *block, const Step4 *x, int64_t m) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000), even = multiples(2);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    __m512 y = _mm512_setzero_ps();
    for (int64_t step = 0; step < block->K / DEPTH4; step++, x++) {
        const char *w = block->w + step * LINE;
        uint64_t words[ROWS];
        __m512i sums[GROUPS], scales[GROUPS];
        call_for(block, step * LINE);
        load_scales(block, step, words);
        for (int64_t i = 0; i < 4; i++) sums[i] = dot_4(w + 4 * i * block->stride, block->stride, x);
        transpose_quarters(sums); /* a vector holds one group of 16 rows */
        const __m512i first_8 = _mm512_loadu_si512(words), last_8 = _mm512_loadu_si512(words + 8);
        const __m512i pair = _mm512_permutex2var_epi32(first_8, even, last_8);
        const __m512i next_pair = _mm512_permutex2var_epi32(first_8, odd, last_8);
        scales[0] = _mm512_slli_epi32(pair, 16);
        scales[1] = _mm512_and_si512(pair, upper);
        scales[2] = _mm512_slli_epi32(next_pair, 16);
        scales[3] = _mm512_and_si512(next_pair, upper);
        for (int64_t g = 0; g < GROUPS; g++) {
            const __m512i sum = _mm512_sub_epi32(sums[g], _mm512_set1_epi32(x->offsets[g]));
            const __m512 exact = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(x->units[g]));
            y = _mm512_fmadd_ps(exact, _mm512_castsi512_ps(scales[g]), y);
        }
    }
    store_rows(block, m, y);
}

/* What nibbles stand for, in bfloat16: -8 to 7, twice, since an index has 5 bits. */
static inline __m512i values_of_nibbles(void) {
    const __m512 values = _mm512_cvtepi32_ps(_mm512_sub_epi32(multiples(1), _mm512_set1_epi32(8)));
    return (__m512i)_mm512_cvtne2ps_pbh(values, values);
}

/* A line of each of 16 rows as bfloat16: a tile for each group. */
static inline void widen_int4(const char *w, int64_t row_bytes, __m512i values, bf16 (*tiles)[ROWS][GROUP]) {
    const long long one = 0x0001000100010001;
    const __m512i shift = _mm512_set_epi64(12 * one, 12 * one, 8 * one, 8 * one, 4 * one, 4 * one, 0, 0);
    for (int64_t row = 0; row < ROWS; row++)
        for (int64_t g = 0; g < GROUPS; g++) {
            const __m128i bytes = _mm_loadu_si128((const __m128i *)(w + row * row_bytes + g * 16));
            const __m512i index = _mm512_srlv_epi16(_mm512_broadcast_i32x4(bytes), shift);
            _mm512_store_si512(tiles[g][row], _mm512_permutexvar_epi16(index, values));
        }
}

/* Group sums of 16 rows of w with the M of x: x is [4, 16, M] pairs. */
static inline void multiply_int4(bf16 (*w)[ROWS][GROUP], const bf16 *x, int64_t M, float (*sums)[ROWS][16]) {
    __asm__ volatile("" : : : "memory"); /* GCC 12 does not know that tiles are loaded from memory */
    _tile_zero(0);
    _tile_loadd(6, w[0], LINE);
    _tile_loadd(3, x, 4 * M);
    _tile_dpbf16ps(0, 6, 3);
    _tile_zero(1);
    _tile_loadd(7, w[1], LINE);
    _tile_loadd(4, x + GROUP * M, 4 * M);
    _tile_dpbf16ps(1, 7, 4);
    _tile_stored(0, sums[0], LINE);
    _tile_zero(2);
    _tile_loadd(6, w[2], LINE);
    _tile_loadd(5, x + 2 * GROUP * M, 4 * M);
    _tile_dpbf16ps(2, 6, 5);
    _tile_stored(1, sums[1], LINE);
    _tile_zero(0);
    _tile_loadd(7, w[3], LINE);
    _tile_loadd(3, x + 3 * GROUP * M, 4 * M);
    _tile_dpbf16ps(0, 7, 3);
    _tile_stored(2, sums[2], LINE);
    _tile_stored(0, sums[3], LINE);
}

static inline void accumulate(__m512 *y, float (*sums)[ROWS][16], const uint64_t *words) {
    float scales[ROWS][GROUPS];
    for (int64_t row = 0; row < ROWS; row += 4) {
        const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(words + row)));
        _mm512_storeu_si512(scales[row], _mm512_slli_epi32(bits, 16));
    }
#pragma GCC unroll 1
    for (int64_t row = 0; row < ROWS; row++)
        for (int64_t g = 0; g < GROUPS; g++)
            y[row] = _mm512_fmadd_ps(_mm512_load_ps(sums[g][row]), _mm512_set1_ps(scales[row][g]), y[row]);
}

/* While tiles are multiplied, the next line is widened and the sums before are scaled. */
static void block_int4_tiles(const Block *block, const bf16 *packed) {
    _Alignas(64) bf16 wide[2][GROUPS][ROWS][GROUP];
    _Alignas(64) float sums[GROUPS][ROWS][16] = {0};
    uint64_t words[2][ROWS];
    __m512 y[ROWS];
    const __m512i values = values_of_nibbles();
    const int64_t M = block->M, steps = block->K / DEPTH4;
    for (int64_t row = 0; row < ROWS; row++) y[row] = _mm512_setzero_ps();
    widen_int4(block->w, block->stride, values, wide[0]);
    for (int64_t step = 0; step < steps; step++) {
        call_for(block, step * LINE);
        if (step + 1 < steps) widen_int4(block->w + (step + 1) * LINE, block->stride, values, wide[~step & 1]);
        if (step) accumulate(y, sums, words[~step & 1]);
        load_scales(block, step, words[step & 1]);
        multiply_int4(wide[step & 1], packed + step * DEPTH4 * M, M, sums);
    }
    accumulate(y, sums, words[~steps & 1]);
    for (int64_t m = 0; m < M; m++)
        store_rows(block, m, _mm512_castsi512_ps(column((const float *)y + m, 16, ROWS)));
}

static void block_int4(const Block *block, const void *packed) {
    const int64_t M = block->M;
    if (M > VECTOR_ROWS) block_int4_tiles(block, packed);
    else
        for (int64_t m = 0; m < M; m++) block_int4_row(block, (const Step4 *)packed + m * (block->K / DEPTH4), m);
}

static TileConfig config_of(int64_t format, int64_t M) {
    const int64_t width = format == INT8 ? DIGITS8 * M / tiles_int8(M) : M;
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.rows[tile] = 16;
        config.row_bytes[tile] = tile < 6 ? (uint16_t)(4 * width) : LINE;
    }
    return config;
}

/* Rows of a matrix that form one stream: as many as a page holds, if whole sets of 16 streams make up the matrix, else
   fewer; 1 for rows of a page and more. */
static int64_t spread_of(const Product *product, int64_t K) {
    int64_t spread = larger(1, PAGE / row_bytes_of(product->w, K));
    while (product->N % (ROWS * spread)) spread--;
    return spread;
}

/* Block j of a matrix in the order in which they are read: block `nth` of a set, whose rows begin with row `nth` of that
   set. While it is read, scales are called for as well, the `nth` 16 rows of those of the next set, so that all of them
   are there when that begins. */
static Block block_of(const Product *product, int64_t j, int64_t M, int64_t K) {
    const Matrix *w = product->w;
    const int64_t row_bytes = row_bytes_of(w, K), spread = spread_of(product, K);
    const int64_t scale_bytes = w->format == INT4 ? 2 * K / w->group_size : w->format == INT8 ? 4 : 0;
    const int64_t set = j / spread, nth = j % spread, row = set * ROWS * spread + nth;
    const char *scales = w->format == BF16 ? NULL : (const char *)w->scales + row * scale_bytes;
    return (Block){
        .w = (const char *)w->data + row * row_bytes,
        .scales = scales,
        .next_scales = scales + (ROWS * spread + (ROWS - 1) * nth) * scale_bytes,
        .y = product->y + row,
        .M = M,
        .N = product->N,
        .K = K,
        .group_size = w->group_size,
        .spread = spread,
        .stride = spread * row_bytes,
        .left = (spread - nth) * row_bytes,
        .scale_bytes = scale_bytes * LINE / row_bytes,
        .scale_stride = spread * scale_bytes,
    };
}

/* Several products of the same M <= 16 rows with weights of one format; x is packed once. Each core takes a run of whole
   sets of each matrix; after the last block of a set it goes on with the first of the one after. */
static void products_of_16(const bf16 *x, void *packed, const Product *list, int count, int64_t M, int64_t K) {
    const int64_t format = list[0].w->format;
    const TileConfig config = config_of(format, M);
#pragma omp parallel
    {
        TileConfig before = {0}; /* PyTorch's own kernels leave their configuration and expect to find it again */
        _tile_storeconfig(&before);
        configure(&config);
        const int64_t threads = omp_get_num_threads(), mine = omp_get_thread_num();
        if (format == INT8) pack_int8(x, packed, M, K);
        else if (format == INT4 && M <= VECTOR_ROWS) pack_int4_rows(x, packed, M, K);
        else if (format == INT4) pack_int4_tiles(x, packed, M, K);
        else if (M > 1) pack_bf16(x, packed, M, K);
        for (int i = 0; i < count; i++) {
            const int64_t spread = spread_of(&list[i], K), sets = list[i].N / ROWS / spread;
            const int64_t end = sets * (mine + 1) / threads * spread;
            for (int64_t j = sets * mine / threads * spread; j < end; j++) {
                Block block = block_of(&list[i], j, M, K);
                const int64_t next_set = (j / spread + 1) * spread;
                if (next_set < end) block.next = block_of(&list[i], next_set, M, K).w;
                if (format == INT8) block_int8(&block, packed);
                else if (format == INT4) block_int4(&block, packed);
                else block_bf16(&block, M > 1 ? packed : x);
            }
        }
        restore(&before);
    }
}

static void products(const bf16 *x, void *packed, const Product *list, int count, int64_t M, int64_t K) {
    for (int64_t m = 0; m < M; m += 16) {
        Product part[3];
        for (int i = 0; i < count; i++) part[i] = (Product){list[i].w, list[i].y + m * list[i].N, list[i].N};
        products_of_16(x + m * K, packed, part, count, M - m < 16 ? M - m : 16, K);
    }
}

/* 32 codes of a row times their scale, which is one for all of them. */
static inline void widen_32(const Matrix *w, const char *row, int64_t k, float scale, bf16 *y) {
    __m512i low, high;
    if (w->format == INT8) {
        low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(row + k)));
        high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(row + k + 16)));
    } else {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(row + k / 2)));
        low = _mm512_sub_epi32(_mm512_and_si512(bytes, _mm512_set1_epi32(15)), _mm512_set1_epi32(8));
        high = _mm512_sub_epi32(_mm512_srli_epi32(bytes, 4), _mm512_set1_epi32(8));
    }
    store(y, _mm512_mul_ps(_mm512_cvtepi32_ps(low), _mm512_set1_ps(scale)));
    store(y + 16, _mm512_mul_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(scale)));
}

/* Row `row` of K columns, a multiple of 32, as bfloat16. */
static void widen_row(const Matrix *w, int64_t row, bf16 *y, int64_t K) {
    const char *data = (const char *)w->data + row * row_bytes_of(w, K);
    if (w->format == BF16) {
        memcpy(y, data, (size_t)K * sizeof *y);
        return;
    }
    for (int64_t k = 0; k < K; k += 32) {
        float scale;
        if (w->format == INT8) {
            scale = ((const float *)w->scales)[row];
        } else {
            const uint32_t bits = (uint32_t)((const bf16 *)w->scales)[(row * K + k) / w->group_size] << 16;
            memcpy(&scale, &bits, sizeof scale);
        }
        widen_32(w, data, k, scale, y + k);
    }
}

/* `count` rows, from `row` on, as bfloat16 [count, K]: codes times scales, rounded once. */
void widen_rows(const Matrix *w, int64_t row, int64_t count, int64_t K, bf16 *y) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) widen_row(w, row + i, y + i * K, K);
}

/* y = bf16(x / sqrt(mean(x^2) + eps)) * weight over rows of N, a multiple of 16. */
void rms_norm(const bf16 *x, const bf16 *weight, bf16 *y, float eps, int64_t M, int64_t N) {
#pragma omp parallel for schedule(static) if (M > 1)
    for (int64_t m = 0; m < M; m++) {
        const bf16 *in = x + m * N;
        bf16 *out = y + m * N;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t n = 0; n < N; n += 16) squares = _mm512_fmadd_ps(load(in + n), load(in + n), squares);
        const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)N + eps));
        for (int64_t n = 0; n < N; n += 16) {
            store(out + n, _mm512_mul_ps(load(in + n), scale));
            store(out + n, _mm512_mul_ps(load(out + n), load(weight + n)));
        }
    }
}

/* x += y over n values, a multiple of 16. */
static void add(bf16 *x, const bf16 *y, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) store(x + i, _mm512_add_ps(load(x + i), load(y + i)));
}

/* gate = bf16(silu(gate)) * up over n values, a multiple of 16; silu(x) = x / (1 + e^-x). */
void silu_mul(bf16 *gate, const bf16 *up, int64_t n) {
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for schedule(static) if (n > 16384)
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 x = load(gate + i);
        const __m512 decay = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x))); /* cannot overflow */
        const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
        const __m512 top = _mm512_mask_mov_ps(one, negative, decay); /* sigmoid: 1 or e^x, over 1 + e^-|x| */
        store(gate + i, _mm512_mul_ps(x, _mm512_div_ps(top, _mm512_add_ps(one, decay))));
        store(gate + i, _mm512_mul_ps(load(gate + i), load(up + i)));
    }
}

/* Attention over the cache. */

enum { MAX_D = 256 };

/* Rotate the pairs of a head by angles given as (cosine, sine). */
static void rotate(const bf16 *x, const float *cos_sin, bf16 *y, int64_t D) {
    for (int64_t i = 0; i < D; i += 16) {
        const __m512 v = load(x + i), cs = _mm512_loadu_ps(cos_sin + i);
        const __m512 c = _mm512_moveldup_ps(cs), s = _mm512_movehdup_ps(cs), other = _mm512_permute_ps(v, 0xb1);
        store(y + i, _mm512_fmaddsub_ps(v, c, _mm512_mul_ps(other, s))); /* x0 c - x1 s, x1 c + x0 s */
    }
}

/* y[b, head, t] = x[b, t, head] over T positions of B sequences, rotated by cos_sin [T, D], or as it is where that is
   NULL. A head of y takes `slots` positions, T of which are written: a cache, or T itself. */
void rotate_heads(const bf16 *x, const float *cos_sin, bf16 *y, int64_t B, int64_t T, int64_t heads, int64_t D,
                  int64_t slots) {
#pragma omp parallel for schedule(static)
    for (int64_t unit = 0; unit < B * heads; unit++) {
        const int64_t b = unit / heads, head = unit % heads;
        for (int64_t t = 0; t < T; t++) {
            const bf16 *in = x + ((b * T + t) * heads + head) * D;
            bf16 *out = y + (unit * slots + t) * D;
            if (cos_sin) rotate(in, cos_sin + t * D, out, D);
            else memcpy(out, in, (size_t)D * sizeof *in);
        }
    }
}

/* scores[0..n) become exp(score - largest); returns their sum. */
static inline float softmax_weights(float *scores, int64_t n) {
    __m512 top = _mm512_set1_ps(scores[0]), sum = _mm512_setzero_ps();
    for (int64_t s = 0; s < n; s += 16)
        top = _mm512_mask_max_ps(top, first(n - s), top, _mm512_maskz_loadu_ps(first(n - s), scores + s));
    top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int64_t s = 0; s < n; s += 16) {
        const __m512 shifted = _mm512_sub_ps(_mm512_maskz_loadu_ps(first(n - s), scores + s), top);
        const __m512 weight = _mm512_maskz_mov_ps(first(n - s), exponential(shifted));
        _mm512_mask_storeu_ps(scores + s, first(n - s), weight);
        sum = _mm512_add_ps(sum, weight);
    }
    return _mm512_reduce_add_ps(sum);
}

/* softmax(q k^T / sqrt(D)) v for one head; D is a multiple of 32. Each 32 bits of v hold two neighbours, which are
   summed apart and put together again at the end. */
static inline void attend_head(const bf16 *q, const bf16 *k, const bf16 *v, float *scores, bf16 *out, int64_t n,
                               int64_t D) {
    const float scale = 1.0f / sqrtf((float)D);
    for (int64_t s = 0; s < n; s++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < D; d += 32) {
            _mm_prefetch((const char *)(v + s * D + d), _MM_HINT_T1);
            const __m512i q_d = _mm512_loadu_si512(q + d), k_d = _mm512_loadu_si512(k + s * D + d);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)q_d, (__m512bh)k_d);
        }
        scores[s] = _mm512_reduce_add_ps(sum) * scale;
    }
    const __m512 factor = _mm512_set1_ps(1.0f / softmax_weights(scores, n));
    __m512 even[MAX_D / 32], odd[MAX_D / 32];
    for (int64_t i = 0; i < D / 32; i++) even[i] = odd[i] = _mm512_setzero_ps();
    for (int64_t s = 0; s < n; s++) {
        const __m512 weight = _mm512_set1_ps(scores[s]);
        for (int64_t i = 0; i < D / 32; i++) {
            const __m512i pairs = _mm512_loadu_si512(v + s * D + i * 32);
            const __m512i high = _mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000));
            even[i] = _mm512_fmadd_ps(weight, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), even[i]);
            odd[i] = _mm512_fmadd_ps(weight, _mm512_castsi512_ps(high), odd[i]);
        }
    }
    for (int64_t i = 0; i < D / 32; i++) {
        const __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(even[i], factor));
        const __m256i high = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(odd[i], factor));
        const __m512i shifted = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
        _mm512_storeu_si512(out + i * 32, _mm512_or_si512(_mm512_cvtepu16_epi32(low), shifted));
    }
}

/* q and out [B, T, H, D], k and v [B, T, K, D], cos_sin [S, D], keys and values [B, K, S, D], scores [B, T, H, S].
   Writes k and v into the cache, all T before the first is read. A key/value head passes through a core once, for all
   the tokens and query heads that share it. */
static void attend(const Model *model, const bf16 *q, const bf16 *k, const bf16 *v, const float *cos_sin,
                   const int64_t *pos, bf16 *keys, bf16 *values, float *scores, bf16 *out, int64_t B, int64_t T,
                   int64_t S) {
    const int64_t K = model->n_kv_heads, D = model->head_dim, G = model->n_heads / K;
#pragma omp parallel for schedule(static)
    for (int64_t unit = 0; unit < B * K; unit++) {
        const int64_t first_row = unit / K * T;
        bf16 *k_all = keys + unit * S * D, *v_all = values + unit * S * D, turned[MAX_D];
        for (int64_t row = first_row; row < first_row + T; row++) {
            const int64_t from = (row * K + unit % K) * D;
            rotate(k + from, cos_sin + pos[row] * D, k_all + pos[row] * D, D);
            memcpy(v_all + pos[row] * D, v + from, (size_t)D * sizeof *v);
        }
        for (int64_t row = first_row; row < first_row + T; row++) {
            const int64_t n = pos[row] + 1, group = (row * K + unit % K) * G; /* heads of one group are neighbours */
            for (int64_t head = group; head < group + G; head++) {
                rotate(q + head * D, cos_sin + pos[row] * D, turned, D);
                if (D == 64) attend_head(turned, k_all, v_all, scores + head * S, out + head * D, n, 64); /* unrolls */
                else attend_head(turned, k_all, v_all, scores + head * S, out + head * D, n, D);
            }
        }
    }
}

/* The step. */

/* Values of bfloat16 that a step of M rows, which are B * T, needs to work in. */
int64_t decode_workspace(const Model *model, int64_t M, int64_t S) {
    const int64_t dim = model->dim, ffn = model->ffn_dim, kv = model->n_kv_heads * model->head_dim;
    return M * (4 * dim + 2 * kv + 2 * ffn + 2 * model->n_heads * S) + PACKED * larger(dim, ffn);
}

/* Logits [B, T, V] after `tokens` [B, T] at `pos` [B, T]; `cos_sin` [S, D] has the rotations of every slot. Keys and
   values are written to the cache, [n_layers, B, K, S, D] each. Returns -1, and has written nothing, where a token or
   position is out of range. */
int decode_step(const Model *model, const int64_t *tokens, const int64_t *pos, const float *cos_sin, bf16 *keys,
                bf16 *values, bf16 *workspace, bf16 *logits, int64_t B, int64_t T, int64_t S) {
    const int64_t M = B * T, dim = model->dim, ffn = model->ffn_dim, kv = model->n_kv_heads * model->head_dim;
    for (int64_t m = 0; m < M; m++)
        if (pos[m] < 0 || pos[m] >= S || tokens[m] < 0 || tokens[m] >= model->vocab_size) return -1;
    float *scores = (float *)workspace;
    bf16 *x = workspace + 2 * M * model->n_heads * S, *h = x + M * dim, *q = h + M * dim, *out = q + M * dim;
    bf16 *k = out + M * dim, *v = k + M * kv, *gate = v + M * kv, *up = gate + M * ffn, *packed = up + M * ffn;
    for (int64_t m = 0; m < M; m++) widen_row(&model->tok_embeddings, tokens[m], x + m * dim, dim);
    for (int64_t i = 0; i < model->n_layers; i++) {
        const Layer *layer = &model->layers[i];
        const int64_t offset = i * B * kv * S;
        rms_norm(x, layer->attention_norm, h, model->norm_eps, M, dim);
        products(h, packed, (Product[]){{&layer->wq, q, dim}, {&layer->wk, k, kv}, {&layer->wv, v, kv}}, 3, M, dim);
        attend(model, q, k, v, cos_sin, pos, keys + offset, values + offset, scores, out, B, T, S);
        products(out, packed, (Product[]){{&layer->wo, h, dim}}, 1, M, dim);
        add(x, h, M * dim);
        rms_norm(x, layer->ffn_norm, h, model->norm_eps, M, dim);
        products(h, packed, (Product[]){{&layer->w1, gate, ffn}, {&layer->w3, up, ffn}}, 2, M, dim);
        silu_mul(gate, up, M * ffn);
        products(gate, packed, (Product[]){{&layer->w2, h, dim}}, 1, M, ffn);
        add(x, h, M * dim);
    }
    rms_norm(x, model->norm, h, model->norm_eps, M, dim);
    products(h, packed, (Product[]){{&model->output, logits, model->vocab_size}}, 1, M, dim);
    return 0;
}

/* Reads `n` bytes, but for a rest below 64 KiB, and does nothing else: 16 streams a core, as above, an addition a line.
   The measure of what the machine's memory delivers. */
int64_t read_all(const char *data, int64_t n) {
    const int64_t page = PAGE;
    int64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (int64_t block = 0; block < n / (ROWS * page); block++) {
        const char *rows = data + block * ROWS * page;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < page; i += 64)
            for (int64_t row = 0; row < ROWS; row++) {
                const int64_t ahead = i + AHEAD < page ? i + AHEAD : ROWS * page + i + AHEAD - page;
                _mm_prefetch(rows + row * page + ahead, _MM_HINT_T1);
                sum = _mm512_add_epi64(sum, _mm512_loadu_si512(rows + row * page + i));
            }
        total += _mm512_reduce_add_epi64(sum);
    }
    return total;
}
