/* One decode step of a Llama on a CPU with AVX-512: weights of bfloat16, int8 or int4, a cache of bfloat16, sums in fp32.
   See decode_step.py; parts of it serve prefill.py. products.h has the matrix products, where the time goes.

   Everything between the products is here as well: between two calls from Python the caches hold weights, not the
   interpreter, and 700 calls cost a tenth of the step. All threads go through the step together and meet where one needs
   what another has computed, five times a layer; what takes less than such a meeting, each computes for itself.

   Roundings to bfloat16 are where eager PyTorch has them, but for the softmax weights, which stay fp32.

   B sequences, T tokens of each, H query heads, K key/value heads, D head size, S cache slots; M rows of x, B * T. */

#include <omp.h>

#include "products.h"

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

/* `count` rows of w, from `row` on, as bfloat16 [count, K]. */
void widen_rows(const Matrix *w, int64_t row, int64_t count, bf16 *y) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) widen_row(w, row + i, y + i * w->K);
}

/* y = bf16(x / sqrt(mean(x^2) + eps)) * weight over N values. */
static void norm_row(const bf16 *x, const bf16 *weight, bf16 *y, float eps, int64_t N) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t n = 0; n < N; n += 16) {
        const __m512 part = load_part(x + n, first(N - n));
        squares = _mm512_fmadd_ps(part, part, squares);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)N + eps));
    for (int64_t n = 0; n < N; n += 16) {
        const __m512 normed = widen(narrow(_mm512_mul_ps(load_part(x + n, first(N - n)), scale)));
        store_part(y + n, _mm512_mul_ps(normed, load_part(weight + n, first(N - n))), first(N - n));
    }
}

void rms_norm(const bf16 *x, const bf16 *weight, bf16 *y, float eps, int64_t M, int64_t N) {
#pragma omp parallel for schedule(static) if (M > 1)
    for (int64_t m = 0; m < M; m++) norm_row(x + m * N, weight, y + m * N, eps, N);
}

/* gate = bf16(silu(gate)) * up over n values; silu(x) = x / (1 + e^-x). */
static void silu_mul_part(bf16 *gate, const bf16 *up, int64_t n) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 x = load_part(gate + i, first(n - i));
        const __m512 decay = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x))); /* cannot overflow */
        const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
        const __m512 top = _mm512_mask_mov_ps(one, negative, decay); /* sigmoid: 1 or e^x, over 1 + e^-|x| */
        const __m512 silu = widen(narrow(_mm512_mul_ps(x, _mm512_div_ps(top, _mm512_add_ps(one, decay)))));
        store_part(gate + i, _mm512_mul_ps(silu, load_part(up + i, first(n - i))), first(n - i));
    }
}

void silu_mul(bf16 *gate, const bf16 *up, int64_t n) {
    enum { PART = 4096 };
#pragma omp parallel for schedule(static) if (n > 4 * PART)
    for (int64_t i = 0; i < n; i += PART) silu_mul_part(gate + i, up + i, at_most(PART, n - i));
}

/* Attention over the cache. */

enum { MAX_D = STEP };

/* Rotate the pairs of a head by angles given as (cosine, sine). */
static void rotate(const bf16 *x, const float *cos_sin, bf16 *y, int64_t D) {
    for (int64_t i = 0; i < D; i += 16) {
        const __mmask16 there = first(D - i);
        const __m512 v = load_part(x + i, there), cs = _mm512_maskz_loadu_ps(there, cos_sin + i);
        const __m512 c = _mm512_moveldup_ps(cs), s = _mm512_movehdup_ps(cs), other = _mm512_permute_ps(v, 0xb1);
        store_part(y + i, _mm512_fmaddsub_ps(v, c, _mm512_mul_ps(other, s)), there); /* x0 c - x1 s, x1 c + x0 s */
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

/* Keys and values of a layer, [B, K, S, D]: bfloat16, or int8 with a scale fp32 [B, K, S] for each position of a head. */
typedef struct {
    void *keys, *values;
    float *key_scales, *value_scales; /* NULL for bfloat16 */
} Cache;

enum { TOGETHER = 4 }; /* query heads at most for which a position is read once */

/* A query, ready for the keys: as it is, or int16 in units. */
typedef struct {
    bf16 turned[MAX_D];
    __m512i whole[MAX_D / 32];
    float unit;
} Query;

/* Codes of a row of D values; returns the scale. */
static float encode_row(const bf16 *x, int8_t *codes, int64_t D) {
    __m512 top = _mm512_setzero_ps();
    for (int64_t d = 0; d < D; d += 16) {
        const __m512 size = _mm512_abs_ps(load_part(x + d, first(D - d)));
        top = _mm512_max_ps(top, size); /* NaN in the second operand stays */
    }
    const float largest = _mm512_reduce_max_ps(top), scale = largest == 0 ? 1.0f : largest / 127;
    for (int64_t d = 0; d < D; d += 16) {
        const __m512 code = _mm512_div_ps(load_part(x + d, first(D - d)), _mm512_set1_ps(scale));
        _mm_mask_storeu_epi8(codes + d, first(D - d), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(code)));
    }
    return scale;
}

/* scores[g S + s] = q[g] k[s]^T times `scale` for `heads` queries and s from `from` to `to`, four positions at a time. */
INLINE void scores_of(const Cache *cache, int64_t unit, int64_t S, const Query *q, int heads, int64_t D, float scale,
                      int64_t from, int64_t to, float *scores) {
    for (int64_t s = from; s < to; s += 4) {
        __m512 sums[TOGETHER][4];
        const __mmask8 there = (__mmask8)first(at_most(4, to - s));
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const int64_t at = (unit * S + at_most(s + i, to - 1)) * D;
            __m512i whole[TOGETHER];
            for (int g = 0; g < heads; g++) {
                sums[g][i] = _mm512_setzero_ps();
                whole[g] = _mm512_setzero_si512();
            }
            for (int64_t d = 0; d < D; d += 32) {
                if (!cache->key_scales) {
                    const __m512bh k = (__m512bh)load_pairs((const bf16 *)cache->keys + at + d, D - d);
                    for (int g = 0; g < heads; g++)
                        sums[g][i] = _mm512_dpbf16_ps(sums[g][i], (__m512bh)load_pairs(q[g].turned + d, D - d), k);
                    continue;
                }
                const __m512i k = _mm512_cvtepi8_epi16(load_bytes_32((const char *)cache->keys + at + d, D - d));
                for (int g = 0; g < heads; g++) whole[g] = _mm512_dpwssd_epi32(whole[g], k, q[g].whole[d / 32]);
            }
            if (cache->key_scales)
                for (int g = 0; g < heads; g++) sums[g][i] = _mm512_cvtepi32_ps(whole[g]);
        }
#pragma GCC unroll 4
        for (int g = 0; g < heads; g++) {
            __m128 four = lane_sums(sums[g][0], sums[g][1], sums[g][2], sums[g][3]);
            four = _mm_mul_ps(four, _mm_set1_ps(scale * q[g].unit));
            if (cache->key_scales)
                four = _mm_mul_ps(four, _mm_maskz_loadu_ps(there, cache->key_scales + unit * S + s));
            _mm_mask_storeu_ps(scores + g * S + s, there, four);
        }
    }
}

/* y[g, D] += weights[g S + s] v[s] for `heads` of them and s from `from` to `to`. */
INLINE void add_values(const Cache *cache, int64_t unit, int64_t S, int heads, int64_t D, int64_t from, int64_t to,
                       const float *weights, float (*y)[MAX_D]) {
    __m512 sums[TOGETHER][MAX_D / 16];
    for (int g = 0; g < heads; g++)
        for (int64_t d = 0; d < D; d += 16) sums[g][d / 16] = _mm512_loadu_ps(y[g] + d);
    for (int64_t s = from; s < to; s++) {
        const int64_t at = (unit * S + s) * D;
        const float scale = cache->value_scales ? cache->value_scales[unit * S + s] : 1.0f;
        __m512 weight[TOGETHER];
        for (int g = 0; g < heads; g++) weight[g] = _mm512_set1_ps(weights[g * S + s] * scale);
        for (int64_t d = 0; d < D; d += 16) {
            __m512 v;
            if (cache->value_scales) {
                const __m128i codes = load_bytes_16((const char *)cache->values + at + d, D - d);
                v = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
            } else v = load_part((const bf16 *)cache->values + at + d, first(D - d));
            for (int g = 0; g < heads; g++) sums[g][d / 16] = _mm512_fmadd_ps(weight[g], v, sums[g][d / 16]);
        }
    }
    for (int g = 0; g < heads; g++)
        for (int64_t d = 0; d < D; d += 16) _mm512_storeu_ps(y[g] + d, sums[g][d / 16]);
}

/* softmax(q k^T / sqrt(D)) v over n positions, for `heads` query heads q[heads, D] of key/value head `unit`. */
INLINE void attend_heads(const Cache *cache, int64_t unit, int64_t S, const bf16 *q, const float *cos_sin, int heads,
                         int64_t D, int64_t n, float *scores, bf16 *out) {
    Query queries[TOGETHER] = {0};
    float sums[TOGETHER][MAX_D] = {0};
    for (int g = 0; g < heads; g++) {
        rotate(q + g * D, cos_sin, queries[g].turned, D);
        queries[g].unit = cache->key_scales ? whole_units(queries[g].turned, D, queries[g].whole) : 1.0f;
    }
    scores_of(cache, unit, S, queries, heads, D, 1.0f / sqrtf((float)D), 0, n, scores);
    float factors[TOGETHER];
    for (int g = 0; g < heads; g++) factors[g] = 1.0f / softmax_weights(scores + g * S, n);
    add_values(cache, unit, S, heads, D, 0, n, scores, sums);
    for (int g = 0; g < heads; g++)
        for (int64_t d = 0; d < D; d += 16) {
            const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(sums[g] + d), _mm512_set1_ps(factors[g]));
            store_part(out + g * D + d, y, first(D - d));
        }
}

/* The same with constants, for which loops unroll and sums stay in registers. */
#define ATTEND(name, heads_, D_)                                                                                      \
    static void name(const Cache *cache, int64_t unit, int64_t S, const bf16 *q, const float *cos_sin, int heads,      \
                     int64_t D, int64_t n, float *scores, bf16 *out) {                                                \
        (void)heads, (void)D;                                                                                         \
        attend_heads(cache, unit, S, q, cos_sin, heads_, D_, n, scores, out);                                         \
    }
ATTEND(attend_1, 1, 64)
ATTEND(attend_2, 2, 64)
ATTEND(attend_4, 4, 64)
ATTEND(attend_any, heads, D)

/* A row of k and v at its place in the cache. */
static void keep(const Cache *cache, int64_t at, const bf16 *k, const bf16 *v, const float *cos_sin, int64_t D) {
    bf16 turned[MAX_D];
    rotate(k, cos_sin, turned, D);
    if (cache->key_scales) {
        cache->key_scales[at] = encode_row(turned, (int8_t *)cache->keys + at * D, D);
        cache->value_scales[at] = encode_row(v, (int8_t *)cache->values + at * D, D);
        return;
    }
    memcpy((bf16 *)cache->keys + at * D, turned, (size_t)D * sizeof *k);
    memcpy((bf16 *)cache->values + at * D, v, (size_t)D * sizeof *v);
}

/* q and out [B, T, H, D], k and v [B, T, K, D], cos_sin [S, D], scores [B, T, H, S]. Writes k and v into the cache, all T
   before the first is read. Each position passes through a core once for the query heads that share it. */
static void attend(const Model *model, const bf16 *q, const bf16 *k, const bf16 *v, const float *cos_sin,
                   const int64_t *pos, const Cache *cache, float *scores, bf16 *out, int64_t B, int64_t T, int64_t S) {
    const int64_t K = model->n_kv_heads, D = model->head_dim, G = model->n_heads / K;
#pragma omp for schedule(static) nowait
    for (int64_t unit = 0; unit < B * K; unit++) {
        const int64_t first_row = unit / K * T;
        for (int64_t row = first_row; row < first_row + T; row++) {
            const int64_t from = (row * K + unit % K) * D;
            keep(cache, unit * S + pos[row], k + from, v + from, cos_sin + pos[row] * D, D);
        }
        for (int64_t row = first_row; row < first_row + T; row++) {
            const int64_t head = (row * K + unit % K) * G, n = pos[row] + 1; /* heads of one group are neighbours */
            const float *angles = cos_sin + pos[row] * D;
            for (int64_t h = head; h < head + G;) {
                const int64_t left = head + G - h, heads = left >= 4 ? 4 : left >= 2 ? 2 : 1;
                (D != 64 ? attend_any : heads == 4 ? attend_4 : heads == 2 ? attend_2 : attend_1)(
                    cache, unit, S, q + h * D, angles, (int)heads, D, n, scores + h * S, out + h * D);
                h += heads;
            }
        }
    }
}

/* What begins `rows` rows of D values further on. */
static Cache layer_of(const Cache *cache, int64_t rows, int64_t D) {
    if (!cache->key_scales) return (Cache){(bf16 *)cache->keys + rows * D, (bf16 *)cache->values + rows * D, NULL, NULL};
    return (Cache){(int8_t *)cache->keys + rows * D, (int8_t *)cache->values + rows * D, cache->key_scales + rows,
                   cache->value_scales + rows};
}

/* The step. */

/* One of the threads that go through a step together. */
typedef struct {
    int64_t thread, threads;
    Room room;
} Member;

/* Products of x[M, K], or with a norm of x normed, MOST rows at a time. */
static void products(Member *self, const bf16 *x, const bf16 *norm, float eps, const Product *list, int count, int64_t M) {
    const int64_t K = list[0].w->K;
    for (int64_t m = 0; m < M; m += MOST) {
        const int64_t rows = at_most(MOST, M - m);
        const bf16 *part = x + m * K;
        Product parts[3];
        for (int i = 0; i < count; i++) {
            parts[i] = list[i];
            parts[i].y += m * list[i].w->N;
        }
        if (norm) {
            for (int64_t row = 0; row < rows; row++) norm_row(part + row * K, norm, self->room.normed + row * K, eps, K);
            part = self->room.normed;
        }
        products_of(part, parts, count, rows, &self->room, self->thread, self->threads);
    }
}

static int64_t widest(const Model *model) {
    return larger(larger(model->dim, model->ffn_dim), model->n_heads * model->head_dim);
}

/* Bytes that a step of M rows, which are B * T, needs to work in. */
int64_t decode_workspace(const Model *model, int64_t M, int64_t S) {
    const int64_t q = model->n_heads * model->head_dim, kv = model->n_kv_heads * model->head_dim;
    const int64_t of_row = 2 * (model->dim + 2 * q + 2 * kv + 2 * model->ffn_dim) + 4 * model->n_heads * S;
    return M * of_row + omp_get_max_threads() * room_bytes(widest(model));
}

/* Logits [B, T, V] after `tokens` [B, T] at `pos` [B, T]; `cos_sin` [S, D] has the rotations of every slot. Keys and
   values are written to the cache, that of all layers, one after another. Returns -1, and has written nothing, where a
   token or position is out of range. */
int decode_step(const Model *model, const int64_t *tokens, const int64_t *pos, const float *cos_sin, const Cache *cache,
                char *workspace, bf16 *logits, int64_t B, int64_t T, int64_t S) {
    const int64_t M = B * T, dim = model->dim, ffn = model->ffn_dim, heads = model->n_heads * model->head_dim;
    const int64_t kv = model->n_kv_heads * model->head_dim;
    const float eps = model->norm_eps;
    for (int64_t m = 0; m < M; m++)
        if (pos[m] < 0 || pos[m] >= S || tokens[m] < 0 || tokens[m] >= model->vocab_size) return -1;
    float *scores = (float *)workspace;
    bf16 *x = (bf16 *)(scores + M * model->n_heads * S), *q = x + M * dim, *out = q + M * heads, *k = out + M * heads;
    bf16 *v = k + M * kv, *gate = v + M * kv, *up = gate + M * ffn;
    char *rooms = (char *)(up + M * ffn);
#pragma omp parallel
    {
        Member self = {.thread = omp_get_thread_num(), .threads = omp_get_num_threads()};
        self.room = room_of(rooms + self.thread * room_bytes(widest(model)), widest(model));
        for (int64_t m = self.thread; m < M; m += self.threads)
            widen_row(&model->tok_embeddings, tokens[m], x + m * dim);
#pragma omp barrier
        for (int64_t i = 0; i < model->n_layers; i++) {
            const Layer *layer = &model->layers[i];
            const Cache own = layer_of(cache, i * B * model->n_kv_heads * S, model->head_dim);
            const Product qkv[] = {{&layer->wq, q, false}, {&layer->wk, k, false}, {&layer->wv, v, false}};
            products(&self, x, layer->attention_norm, eps, qkv, 3, M);
#pragma omp barrier
            attend(model, q, k, v, cos_sin, pos, &own, scores, out, B, T, S);
#pragma omp barrier
            products(&self, out, NULL, eps, (Product[]){{&layer->wo, x, true}}, 1, M);
#pragma omp barrier
            const Product gates[] = {{&layer->w1, gate, false}, {&layer->w3, up, false}};
            products(&self, x, layer->ffn_norm, eps, gates, 2, M);
            const int64_t from = share_of(ffn, self.thread, self.threads);
            const int64_t n = share_of(ffn, self.thread + 1, self.threads) - from;
            for (int64_t m = 0; m < M; m++) silu_mul_part(gate + m * ffn + from, up + m * ffn + from, n);
#pragma omp barrier
            products(&self, gate, NULL, eps, (Product[]){{&layer->w2, x, true}}, 1, M);
#pragma omp barrier
        }
        products(&self, x, model->norm, eps, (Product[]){{&model->output, logits, false}}, 1, M);
    }
    return 0;
}

/* Reads `n` bytes, but for a rest below 64 KiB, and does nothing else: 16 streams a core, a page each, an addition a line.
   The measure of what the machine's memory delivers. */
int64_t read_all(const char *data, int64_t n) {
    enum { STREAMS = 16, PAGE = 4096, AHEAD = 1024 };
    int64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (int64_t block = 0; block < n / (STREAMS * PAGE); block++) {
        const char *pages = data + block * STREAMS * PAGE;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < PAGE; i += 64)
            for (int64_t stream = 0; stream < STREAMS; stream++) {
                const int64_t ahead = i + AHEAD < PAGE ? i + AHEAD : STREAMS * PAGE + i + AHEAD - PAGE;
                _mm_prefetch(pages + stream * PAGE + ahead, _MM_HINT_T1);
                sum = _mm512_add_epi64(sum, _mm512_loadu_si512(pages + stream * PAGE + i));
            }
        total += _mm512_reduce_add_epi64(sum);
    }
    return total;
}
