/* Causal attention of a prompt on a CPU that multiplies pairs of bfloat16 (AVX512_BF16), with sums in fp32.

   softmax(scale Q K^T) V by blocks of KEYS keys with online softmax (Dao et al. 2022): the scores of a block are made,
   used and forgotten. A unit of work is QUERIES queries of all heads that share a key/value head; keys and values are
   read once for it.

   Everything is transposed: the lanes of a vector are queries. So the running maximum and the sum of a query are lanes,
   and nothing is ever summed across a vector. The first operand of a product is words of two neighbours in depth, of 16
   queries; the second a word of two neighbours that all lanes share, as it lies in memory. For scores the depth is the
   head size D, and K is read as it lies; for V it is the keys, and two rows of V are interleaved before.

   D is a multiple of 16. Query t has position start + t and sees the keys up to it, of S = start + T. */

#include <stdlib.h>
#include <string.h>

#include "simd.h"

enum { QUERIES = 64, KEYS = 64, LANES = 16, VECTORS = QUERIES / LANES, AT_ONCE = 4 };

/* Of one query head: words of Q [D / 2, QUERIES], the sum so far [D, QUERIES], maximum and sum of each query. */
typedef struct {
    uint32_t *q;
    float *o, *top, *sum;
} Head;

static float scale_of(int64_t D) { return 1.0f / sqrtf((float)D); }

static int64_t head_bytes(int64_t D) { return QUERIES * (2 * D + 4 * D + 8); }

static Head head_of(char *memory, int64_t i, int64_t D) {
    float *o = (float *)(memory + i * head_bytes(D));
    return (Head){(uint32_t *)(o + QUERIES * (D + 2)), o, o + QUERIES * D, o + QUERIES * (D + 1)};
}

/* The sums of AT_ONCE rows of shared words with all queries: sums[row][query] += a[depth, query] b[row][depth]. Words of b
   lie `to_row` and `to_depth` words apart. */
static inline __attribute__((always_inline)) void multiply(const uint32_t *a, const uint32_t *const *b, int64_t to_depth,
                                                           int64_t depth, __m512 (*sums)[VECTORS]) {
    for (int64_t k = 0; k < depth; k++) {
        __m512bh words[VECTORS];
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++)
            words[i] = (__m512bh)_mm512_loadu_si512(a + k * QUERIES + i * LANES);
#pragma GCC unroll 4
        for (int row = 0; row < AT_ONCE; row++) {
            const __m512bh shared = (__m512bh)_mm512_set1_epi32((int)b[row][k * to_depth]);
#pragma GCC unroll 4
            for (int i = 0; i < VECTORS; i++) sums[row][i] = _mm512_dpbf16_ps(sums[row][i], words[i], shared);
        }
    }
}

static void scores(const Head *head, const bf16 *k, int64_t n, int64_t D, float (*s)[QUERIES]) {
    for (int64_t key = 0; key < KEYS && key < n; key += AT_ONCE) {
        const uint32_t *rows[AT_ONCE];
        for (int i = 0; i < AT_ONCE; i++) /* what stands for keys that are not there is hidden like those to come */
            rows[i] = (const uint32_t *)(k + (key + i < n ? key + i : n - 1) * D);
        __m512 sums[AT_ONCE][VECTORS] = {0};
        multiply(head->q, rows, 1, D / 2, sums);
        for (int i = 0; i < AT_ONCE; i++)
            for (int j = 0; j < VECTORS; j++) _mm512_storeu_ps(s[key + i] + j * LANES, sums[i][j]);
    }
}

/* Scores become weights, words of two neighbouring keys; returns in `decay` what the sum so far is multiplied by. Queries
   first_query + lane see the keys from first_key on up to their own position. */
static void weigh(Head *head, float (*s)[QUERIES], int64_t first_key, int64_t n_keys, int64_t first_query, float scale,
                  uint32_t (*p)[QUERIES], float *decay) {
    const __m512 factor = _mm512_set1_ps(scale), hidden = _mm512_set1_ps(-INFINITY);
    for (int j = 0; j < QUERIES; j += LANES) {
        const __m512i query = _mm512_add_epi32(multiples(1), _mm512_set1_epi32((int)(first_query + j)));
        const __m512 before = _mm512_loadu_ps(head->top + j);
        __m512 top = before, sum = _mm512_setzero_ps();
        for (int64_t key = 0; key < n_keys; key++) {
            const __mmask16 seen = _mm512_cmpge_epi32_mask(query, _mm512_set1_epi32((int)(first_key + key)));
            const __m512 score = _mm512_mask_mul_ps(hidden, seen, _mm512_loadu_ps(s[key] + j), factor);
            _mm512_storeu_ps(s[key] + j, score);
            top = _mm512_max_ps(score, top);
        }
        for (int64_t key = 0; key < n_keys; key += 2) {
            const __m512 even = exponential(_mm512_sub_ps(_mm512_loadu_ps(s[key] + j), top));
            const __m512 odd = exponential(_mm512_sub_ps(_mm512_loadu_ps(s[key + 1] + j), top));
            sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
            const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(odd)), 16);
            _mm512_storeu_si512(p[key / 2] + j, _mm512_or_si512(_mm512_cvtepu16_epi32(narrow(even)), high));
        }
        const __m512 share = exponential(_mm512_sub_ps(before, top));
        _mm512_storeu_ps(decay + j, share);
        _mm512_storeu_ps(head->top + j, top);
        _mm512_storeu_ps(head->sum + j, _mm512_fmadd_ps(_mm512_loadu_ps(head->sum + j), share, sum));
    }
}

static void add_values(Head *head, uint32_t (*p)[QUERIES], const uint32_t *v, int64_t n_pairs, int64_t D,
                       const float *decay) {
    for (int64_t d = 0; d < D; d += AT_ONCE) {
        __m512 sums[AT_ONCE][VECTORS];
        const uint32_t *columns[AT_ONCE];
        for (int i = 0; i < AT_ONCE; i++) {
            columns[i] = v + d + i;
            for (int j = 0; j < VECTORS; j++)
                sums[i][j] = _mm512_mul_ps(_mm512_loadu_ps(head->o + (d + i) * QUERIES + j * LANES),
                                           _mm512_loadu_ps(decay + j * LANES));
        }
        multiply(p[0], columns, D, n_pairs, sums);
        for (int i = 0; i < AT_ONCE; i++)
            for (int j = 0; j < VECTORS; j++)
                _mm512_storeu_ps(head->o + (d + i) * QUERIES + j * LANES, sums[i][j]);
    }
}

/* Words [KEYS / 2, D] of rows 2 n and 2 n + 1 of v; zeros where there is none: a weight of 0 times NaN would be NaN. */
static void interleave(const bf16 *v, int64_t n, int64_t D, uint32_t *words) {
    for (int64_t key = 0; key < KEYS; key += 2)
        for (int64_t d = 0; d < D; d += LANES) {
            const __m256i zero = _mm256_setzero_si256();
            const __m256i even = key < n ? _mm256_loadu_si256((const __m256i *)(v + key * D + d)) : zero;
            const __m256i odd = key + 1 < n ? _mm256_loadu_si256((const __m256i *)(v + (key + 1) * D + d)) : zero;
            const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
            _mm512_storeu_si512(words + key / 2 * D + d, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
        }
}

/* Queries [n, D] of a head, zeros after them. */
static void begin(Head *head, const bf16 *q, int64_t n, int64_t D) {
    for (int64_t t = 0; t < QUERIES; t += LANES)
        for (int64_t d = 0; d < D / 2; d++)
            _mm512_storeu_si512(head->q + d * QUERIES + t,
                                t < n ? column(q + t * D + 2 * d, D / 2, n - t) : _mm512_setzero_si512());
    memset(head->o, 0, (size_t)(4 * QUERIES * D));
    for (int t = 0; t < QUERIES; t++) head->top[t] = -INFINITY, head->sum[t] = 0;
}

static void end(const Head *head, bf16 *out, int64_t to_next, int64_t n, int64_t D) {
    for (int64_t t = 0; t < n; t++)
        for (int64_t d = 0; d < D; d += LANES) {
            const __m512 sum = _mm512_castsi512_ps(column(head->o + d * QUERIES + t, QUERIES, LANES));
            store(out + t * to_next + d, _mm512_div_ps(sum, _mm512_set1_ps(head->sum[t])));
        }
}

/* QUERIES queries from t on of the G heads that share a key/value head; q and out at the first of these heads. */
static void unit(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, int64_t t, int64_t T, int64_t G, int64_t H,
                 int64_t D, int64_t start, char *memory) {
    float s[KEYS][QUERIES], decay[QUERIES];
    uint32_t p[KEYS / 2][QUERIES], *words = (uint32_t *)(memory + G * head_bytes(D));
    const int64_t n = T - t < QUERIES ? T - t : QUERIES, last = start + t + n; /* keys that any of them sees */
    for (int64_t g = 0; g < G; g++) {
        Head head = head_of(memory, g, D);
        begin(&head, q + (g * T + t) * D, n, D);
    }
    for (int64_t key = 0; key < last; key += KEYS) {
        const int64_t n_keys = last - key < KEYS ? last - key : KEYS;
        const int64_t rounded = (n_keys + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
        interleave(v + key * D, n_keys, D, words);
        for (int64_t g = 0; g < G; g++) {
            Head head = head_of(memory, g, D);
            scores(&head, k + key * D, n_keys, D, s);
            weigh(&head, s, key, rounded, start + t, scale_of(D), p, decay);
            add_values(&head, p, words, rounded / 2, D, decay);
        }
    }
    for (int64_t g = 0; g < G; g++) {
        Head head = head_of(memory, g, D);
        end(&head, out + t * H * D + g * D, H * D, n, D);
    }
}

/* q [B, H, T, D]; k and v [B, K, S, D], S = start + T, the heads and sequences of both `to_head` and `to_sequence` values
   apart; out [B, T, H, D]. Returns -1 where memory is short. */
int prefill_attention(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, int64_t B, int64_t T, int64_t H, int64_t K,
                      int64_t D, int64_t start, int64_t to_head, int64_t to_sequence) {
    const int64_t G = H / K, blocks = (T + QUERIES - 1) / QUERIES;
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        char *memory = aligned_alloc(64, (size_t)((G * head_bytes(D) + 2 * KEYS * D + 63) / 64 * 64));
        failed = memory == NULL;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < blocks * B * K; i++) { /* the last queries first: they see most */
            if (failed) continue;
            const int64_t t = (blocks - 1 - i / (B * K)) * QUERIES, b = i % (B * K) / K, head = i % K;
            const int64_t at = b * to_sequence + head * to_head;
            unit(q + (b * H + head * G) * T * D, k + at, v + at, out + (b * T * H + head * G) * D, t, T, G, H, D, start,
                 memory);
        }
        free(memory);
    }
    return failed ? -1 : 0;
}
