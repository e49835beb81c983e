/* Gradients of causal attention on a CPU with AMX, bfloat16 with sums in fp32. See attention.py.

   With S = scale Q K^T, P = e^(S - lse) where key <= query, dP = dO V^T and delta = sum of O dO over a row:
   dS = scale P (dP - delta), dQ = dS K, dK = dS^T Q, dV = P^T dO (Dao et al. 2022, algorithm 4).

   Scores are made for 32 keys and 32 queries at a time, transposed: a row is a key, the lanes of a vector are queries, so
   that lse and delta are vectors, and P^T and dS^T are operands as they lie. What lies above the diagonal is left out.

   The first operand of a tile product is rows of 32 values. The second is 16 rows of pairs of neighbours in depth: where
   the depth is the head size D, a transpose of 32-bit words; where it is tokens, two rows interleaved.

   B sequences, T tokens, H query heads, K key/value heads, D head size, a multiple of 32. N is T rounded up to whole
   blocks; what is added holds zeros. Tensors are [B, T, heads, D]. */

#include <stdlib.h>
#include <string.h>

#include "simd.h"

enum { BLOCK = 32, TILE = 16 };

int attention_init(void) { return request_tiles(); }

/* What one core works in, for one key/value head and one of the query heads that share it. */
typedef struct {
    bf16 *k, *v;           /* [N, D] */
    bf16 *k_turned;        /* [D, N] */
    bf16 *q_words, *d_words; /* Q and dO, [D / 2, N] pairs: transposed 32-bit words */
    bf16 *q_rows, *d_rows; /* [N / 2, D] pairs: two rows interleaved */
    float *dq, *dk, *dv;   /* dq turned, [D, N]; [N, D] */
    float *lse, *delta;    /* [N] */
} Work;

static int64_t padded(int64_t T) { return (T + BLOCK - 1) / BLOCK * BLOCK; }

/* The arrays of a Work lie one after the other. */
static int64_t work_bytes(int64_t N, int64_t D) { return 7 * N * D * 2 + (3 * N * D + 2 * N) * 4; }

static Work lay_out(char *memory, int64_t N, int64_t D) {
    const int64_t size = N * D;
    bf16 *halves = (bf16 *)memory;
    float *wide = (float *)(halves + 7 * size);
    return (Work){halves, halves + size, halves + 2 * size, halves + 3 * size, halves + 4 * size, halves + 5 * size,
                  halves + 6 * size, wide, wide + size, wide + 2 * size, wide + 3 * size, wide + 3 * size + N};
}

/* [T, D] whose rows are `stride` apart, as [N, D] with zeros below. */
static void copy_rows(const bf16 *x, int64_t stride, bf16 *y, int64_t T, int64_t N, int64_t D) {
    for (int64_t t = 0; t < T; t++) memcpy(y + t * D, x + t * stride, (size_t)D * sizeof *y);
    memset(y + T * D, 0, (size_t)((N - T) * D) * sizeof *y);
}

static void turn(const bf16 *x, bf16 *y, int64_t N, int64_t D) {
    for (int64_t t = 0; t < N; t++)
        for (int64_t d = 0; d < D; d++) y[d * N + t] = x[t * D + d];
}

/* y[D / 2, N] of 32-bit words from the words of x [T, D]. */
static void turn_words(const bf16 *x, int64_t stride, bf16 *y, int64_t T, int64_t N, int64_t D) {
    for (int64_t t = 0; t < N; t += TILE)
        for (int64_t d = 0; d < D / 2; d++)
            _mm512_storeu_si512(y + (d * N + t) * 2, t < T ? column(x + t * stride + d * 2, stride / 2, T - t)
                                                           : _mm512_setzero_si512());
}

/* y[N / 2, D] of pairs from the rows 2 n and 2 n + 1 of x [T, D]. */
static void interleave(const bf16 *x, int64_t stride, bf16 *y, int64_t T, int64_t N, int64_t D) {
    for (int64_t t = 0; t < N; t += 2)
        for (int64_t d = 0; d < D; d += TILE) {
            const __m256i zero = _mm256_setzero_si256();
            const __m256i even = t < T ? _mm256_loadu_si256((const __m256i *)(x + t * stride + d)) : zero;
            const __m256i odd = t + 1 < T ? _mm256_loadu_si256((const __m256i *)(x + (t + 1) * stride + d)) : zero;
            const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
            _mm512_storeu_si512(y + t * D + d * 2, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
        }
}

/* sums[16, 16] = a[16 rows of keys, D] b[D / 2 pairs, 16 queries]. */
static inline void scores(const bf16 *a, const bf16 *b, float *sums, int64_t N, int64_t D) {
    _tile_zero(0);
    for (int64_t d = 0; d < D; d += 32) {
        _tile_loadd(1, a + d, 2 * D);
        _tile_loadd(2, b + d * N, 4 * N);
        _tile_dpbf16ps(0, 1, 2);
    }
    _tile_stored(0, sums, 64);
}

/* c[16, columns] += a[16, 32] b[16 pairs, columns]; rows `a_bytes`, `b_bytes` and `c_bytes` apart. */
static inline void accumulate(const bf16 *a, int64_t a_bytes, const bf16 *b, int64_t b_bytes, float *c, int64_t c_bytes,
                              int64_t columns) {
    _tile_loadd(1, a, a_bytes);
    for (int64_t n = 0; n < columns; n += TILE) {
        _tile_loadd(0, c + n, c_bytes);
        _tile_loadd(2, b + 2 * n, b_bytes);
        _tile_dpbf16ps(0, 1, 2);
        _tile_stored(0, c + n, c_bytes);
    }
}

/* Keys j..j+31 and queries i..i+31. */
static void block(const Work *w, int64_t i, int64_t j, int64_t N, int64_t D, float scale) {
    bf16 p[BLOCK][BLOCK], ds[BLOCK][BLOCK]; /* transposed: [keys, queries] */
    uint32_t ds_pairs[BLOCK / 2][BLOCK];    /* two rows of ds interleaved */
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t key = 0; key < BLOCK; key += TILE)
        for (int64_t query = 0; query < BLOCK; query += TILE) {
            float s[TILE][TILE], dp[TILE][TILE];
            scores(w->k + (j + key) * D, w->q_words + (i + query) * 2, s[0], N, D);
            scores(w->v + (j + key) * D, w->d_words + (i + query) * 2, dp[0], N, D);
            const __m512 lse = _mm512_loadu_ps(w->lse + i + query), delta = _mm512_loadu_ps(w->delta + i + query);
            const __m512i queries = _mm512_add_epi32(multiples(1), _mm512_set1_epi32((int)(i + query)));
            __m512i even = _mm512_setzero_si512();
            for (int64_t r = 0; r < TILE; r++) {
                const __mmask16 seen = _mm512_cmpge_epi32_mask(queries, _mm512_set1_epi32((int)(j + key + r)));
                const __m512 shifted = _mm512_fmsub_ps(_mm512_loadu_ps(s[r]), factor, lse);
                const __m512 weight = _mm512_maskz_mov_ps(seen, exponential(shifted));
                const __m512 change = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(dp[r]), delta), factor);
                const __m256i gradient = narrow(_mm512_mul_ps(weight, change));
                _mm256_storeu_si256((__m256i *)&p[key + r][query], narrow(weight));
                _mm256_storeu_si256((__m256i *)&ds[key + r][query], gradient);
                const __m512i words = _mm512_cvtepu16_epi32(gradient);
                if (r % 2 == 0) even = words;
                else _mm512_storeu_si512(&ds_pairs[(key + r) / 2][query],
                                         _mm512_or_si512(even, _mm512_slli_epi32(words, 16)));
            }
        }
    for (int64_t key = 0; key < BLOCK; key += TILE) {
        const int64_t to = (j + key) * D, from = i * D;
        accumulate(p[key], 2 * BLOCK, w->d_rows + from, 4 * D, w->dv + to, 4 * D, D);
        accumulate(ds[key], 2 * BLOCK, w->q_rows + from, 4 * D, w->dk + to, 4 * D, D);
    }
    for (int64_t d = 0; d < D; d += TILE)
        accumulate(w->k_turned + d * N + j, 2 * N, (const bf16 *)ds_pairs, 4 * BLOCK, w->dq + d * N + i, 4 * N, BLOCK);
}

/* One query head: packs what belongs to it, adds to dk and dv, writes dq. */
static void query_head(const Work *w, const bf16 *q, const bf16 *out, const bf16 *d_out, const float *lse, bf16 *dq,
                       int64_t T, int64_t N, int64_t D, int64_t stride, float scale) {
    turn_words(q, stride, w->q_words, T, N, D);
    turn_words(d_out, stride, w->d_words, T, N, D);
    interleave(q, stride, w->q_rows, T, N, D);
    interleave(d_out, stride, w->d_rows, T, N, D);
    for (int64_t t = 0; t < N; t++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < D && t < T; d += TILE)
            sum = _mm512_fmadd_ps(load(out + t * stride + d), load(d_out + t * stride + d), sum);
        w->delta[t] = _mm512_reduce_add_ps(sum);
        w->lse[t] = t < T ? lse[t] : 0;
    }
    memset(w->dq, 0, (size_t)(N * D) * sizeof *w->dq);
    for (int64_t i = 0; i < N; i += BLOCK)
        for (int64_t j = 0; j <= i; j += BLOCK) block(w, i, j, N, D, scale);
    for (int64_t t = 0; t < T; t++)
        for (int64_t d = 0; d < D; d += TILE)
            store(dq + t * stride + d, _mm512_castsi512_ps(column(w->dq + d * N + t, N, TILE)));
}

static void narrow_rows(const float *x, bf16 *y, int64_t stride, int64_t T, int64_t D) {
    for (int64_t t = 0; t < T; t++)
        for (int64_t d = 0; d < D; d += TILE) store(y + t * stride + d, _mm512_loadu_ps(x + t * D + d));
}

/* q, out, d_out and dq [B, T, H, D]; k, v, dk and dv [B, T, K, D]; lse [B, H, T]. Returns -1 where memory is short. */
int attention_backward(const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const bf16 *d_out, const float *lse,
                       bf16 *dq, bf16 *dk, bf16 *dv, int64_t B, int64_t T, int64_t H, int64_t K, int64_t D) {
    const int64_t N = padded(T), G = H / K;
    const float scale = 1.0f / sqrtf((float)D);
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 3; tile++) config.rows[tile] = 16, config.row_bytes[tile] = 64;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        char *memory = malloc((size_t)work_bytes(N, D));
        failed = memory == NULL;
        const Work w = lay_out(memory, N, D);
        TileConfig before = {0};
        _tile_storeconfig(&before);
        configure(&config);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < B * K; unit++) {
            if (failed) continue;
            const int64_t b = unit / K, group = unit % K, place = (b * T * K + group) * D;
            copy_rows(k + place, K * D, w.k, T, N, D);
            copy_rows(v + place, K * D, w.v, T, N, D);
            turn(w.k, w.k_turned, N, D);
            memset(w.dk, 0, (size_t)(N * D) * sizeof *w.dk);
            memset(w.dv, 0, (size_t)(N * D) * sizeof *w.dv);
            for (int64_t head = group * G; head < (group + 1) * G; head++) {
                const int64_t from = (b * T * H + head) * D;
                query_head(&w, q + from, out + from, d_out + from, lse + (b * H + head) * T, dq + from, T, N, D, H * D,
                           scale);
            }
            narrow_rows(w.dk, dk + place, K * D, T, D);
            narrow_rows(w.dv, dv + place, K * D, T, D);
        }
        restore(&before);
        free(memory);
    }
    return failed ? -1 : 0;
}
