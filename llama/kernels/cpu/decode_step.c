/* One decode step of a Llama on a CPU with AVX-512: weights of bfloat16, int8 or int4, a cache of bfloat16, sums in fp32.
   See decode_step.py; parts of it serve prefill.py. products.h has the matrix products, where the time goes.

   Everything between the products is here as well: between two calls from Python the caches hold weights, not the
   interpreter, and 700 calls cost a tenth of the step. All threads go through the step together and meet where one needs
   what another has computed, six times a layer; what takes less than such a meeting, each computes for itself.

   Attention over the cache goes a part of the positions of a key/value head at a time, and the parts are put together
   afterwards. So any number of threads share the longest text evenly, and give the same bits.

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

/* Keys and values of a layer, [B, K, S, D]: bfloat16, or int8 with a scale fp32 [B, K, S] for each position of a head. */
typedef struct {
    void *keys, *values;
    float *key_scales, *value_scales; /* NULL for bfloat16 */
} Cache;

/* Query heads that share a key/value head go through its positions together, TOGETHER of them: a vector has four lanes for
   each. PART positions of keys, 64 KiB for a head of 64 in bfloat16, stay in a core's cache, and so do those of values. */
enum { PART = 512, TOGETHER = 4, EIGHTHS = MAX_D / 8 };

/* Queries of up to four heads, zeros for the rest, ready for the keys: 8 values of each head a vector, as they are, or in
   units as int16. `factors` has for each lane what its sum is to be multiplied by. */
typedef struct {
    __m512i values[EIGHTHS];
    __m512 factors;
} Queries;

/* Positions `start` on, `n` of them, of a key/value head. They are read as four streams that lie next to each other, of
   `quarter` positions each: a core waits for memory less than with one. `ahead` is where the thread's next part begins,
   whose lines are called for meanwhile. */
typedef struct {
    const Cache *cache;
    int64_t start, n, quarter, ahead, D;
} Part;

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

static void prepare_queries(const bf16 *q, const float *cos_sin, int heads, int64_t D, bool is_int8, Queries *out) {
    bf16 turned[MAX_D] = {0};
    __m512i whole[MAX_D / 32];
    uint16_t values[EIGHTHS][TOGETHER][8] = {0};
    const uint16_t *from = is_int8 ? (const uint16_t *)whole : turned;
    float factors[16] = {0};
    for (int g = 0; g < heads; g++) {
        rotate(q + g * D, cos_sin, turned, D);
        const float unit = is_int8 ? whole_units(turned, D, whole) : 1.0f;
        for (int i = 0; i < EIGHTHS; i++) memcpy(values[i][g], from + 8 * i, sizeof values[i][g]);
        for (int lane = 4 * g; lane < 4 * g + 4; lane++) factors[lane] = unit / sqrtf((float)D);
    }
    for (int i = 0; i < EIGHTHS; i++) out->values[i] = _mm512_loadu_si512(values[i]);
    out->factors = _mm512_loadu_ps(factors);
}

INLINE void call_for_row(const void *rows, int64_t row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char *)rows + row * bytes + i, _MM_HINT_T1);
}

/* Values d to d + 7 of the key at a position, for each of four heads: bfloat16, or codes as int16. */
INLINE __m512i key_of(const Part *part, int64_t position, int64_t d) {
    const int64_t at = position * part->D + d, left = part->D - d;
    if (!part->cache->key_scales) {
        const bf16 *key = (const bf16 *)part->cache->keys + at;
        const __m128i eight =
            left >= 8 ? _mm_loadu_si128((const __m128i *)key) : _mm_maskz_loadu_epi16((__mmask8)first(left), key);
        return _mm512_broadcast_i32x4(eight);
    }
    const int8_t *codes = (const int8_t *)part->cache->keys + at;
    const __m128i eight = left >= 8 ? _mm_loadu_si64(codes) : _mm_maskz_loadu_epi8(first(left), codes);
    return _mm512_cvtepi8_epi16(_mm256_broadcastq_epi64(eight));
}

/* Which lanes stand for a position, where lane 4 g + j stands for head g and position i of stream j. */
INLINE __mmask16 lanes_of(const Part *part, int64_t i) {
    const int64_t step = part->quarter, n = part->n - i;
    return (__mmask16)(0x1111 * (1 + 2 * (step < n) + 4 * (2 * step < n) + 8 * (3 * step < n)));
}

/* The scales of those positions in their lanes. */
INLINE __m512 scales_of(const Part *part, const float *scales, int64_t i) {
    float four[4];
    for (int j = 0; j < 4; j++) four[j] = scales[part->start + at_most(j * part->quarter + i, part->n - 1)];
    return _mm512_broadcast_f32x4(_mm_loadu_ps(four));
}

/* The largest of each four neighbouring lanes, and the sum, in all four. */
INLINE __m512 largest_of_four(__m512 x) {
    x = _mm512_max_ps(x, _mm512_permute_ps(x, 0x4e));
    return _mm512_max_ps(x, _mm512_permute_ps(x, 0xb1));
}

INLINE __m512 sum_of_four(__m512 x) {
    x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));
    return _mm512_add_ps(x, _mm512_permute_ps(x, 0xb1));
}

/* What attention of a query over a part comes to: the largest score, the sum of e^(score - largest), and that of
   e^(score - largest) v [D]. Parts of a query are neighbours, `all` floats from one query to the next. */
INLINE int64_t partial_size(int64_t D) { return 2 + D; }

/* weights[i] = e^(score - largest) in lanes_of(i), times the scales of the values where they have some. */
INLINE void weights_of(const Part *part, const Queries *q, int heads, __m512 *weights, float *partial, int64_t all) {
    const Cache *cache = part->cache;
    const bool is_int8 = cache->key_scales;
    __m512 largest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t i = 0; i < part->quarter; i++) {
        __m512 sums[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const int64_t s = at_most(j * part->quarter + i, part->n - 1);
            __m512 sum = _mm512_setzero_ps();
            __m512i whole = _mm512_setzero_si512();
            call_for_row(cache->keys, part->ahead + s, is_int8 ? part->D : 2 * part->D);
#pragma GCC unroll 8
            for (int64_t d = 0; d < part->D; d += 8) {
                const __m512i k = key_of(part, part->start + s, d);
                if (is_int8) whole = _mm512_dpwssd_epi32(whole, k, q->values[d / 8]);
                else sum = _mm512_dpbf16_ps(sum, (__m512bh)k, (__m512bh)q->values[d / 8]);
            }
            sums[j] = is_int8 ? _mm512_cvtepi32_ps(whole) : sum;
        }
        weights[i] = _mm512_mul_ps(quarter_sums(sums[0], sums[1], sums[2], sums[3]), q->factors);
        if (is_int8) weights[i] = _mm512_mul_ps(weights[i], scales_of(part, cache->key_scales, i));
        largest = _mm512_mask_max_ps(largest, lanes_of(part, i), largest, weights[i]);
    }
    largest = largest_of_four(largest);
    for (int64_t i = 0; i < part->quarter; i++) {
        const __m512 shifted = _mm512_sub_ps(weights[i], largest);
        weights[i] = _mm512_maskz_mov_ps(lanes_of(part, i), exponential(shifted));
        total = _mm512_add_ps(total, weights[i]);
        if (is_int8) weights[i] = _mm512_mul_ps(weights[i], scales_of(part, cache->value_scales, i));
    }
    float of_lanes[2][16];
    _mm512_storeu_ps(of_lanes[0], largest);
    _mm512_storeu_ps(of_lanes[1], sum_of_four(total));
    for (int g = 0; g < heads; g++)
        for (int i = 0; i < 2; i++) partial[g * all + i] = of_lanes[i][4 * g];
}

/* 16 values from column d on of the value at a position. */
INLINE __m512 value_of(const Part *part, int64_t position, int64_t d) {
    const int64_t at = position * part->D + d, left = part->D - d;
    if (!part->cache->value_scales)
        return load_part((const bf16 *)part->cache->values + at, left > 0 ? first(left) : 0);
    const __m128i codes = load_bytes_16((const char *)part->cache->values + at, left);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
}

/* partial[2 + d] = sum of weights * v, 64 columns at a time. */
INLINE void sum_values(const Part *part, int heads, const __m512 *weights, float *partial, int64_t all) {
    for (int64_t d = 0; d < part->D; d += 64) {
        __m512 sums[TOGETHER][4];
        for (int g = 0; g < TOGETHER; g++)
            for (int c = 0; c < 4; c++) sums[g][c] = _mm512_setzero_ps();
        for (int64_t i = 0; i < part->quarter; i++)
            for (int j = 0; j < 4; j++) {
                const int64_t s = j * part->quarter + i;
                if (s >= part->n) break;
                const float *of_position = (const float *)(weights + i) + j;
                call_for_row(part->cache->values, part->ahead + s, part->cache->value_scales ? part->D : 2 * part->D);
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) {
                    const __m512 v = value_of(part, part->start + s, d + 16 * c);
#pragma GCC unroll 4
                    for (int g = 0; g < TOGETHER; g++)
                        sums[g][c] = _mm512_fmadd_ps(_mm512_set1_ps(of_position[4 * g]), v, sums[g][c]);
                }
            }
        for (int g = 0; g < heads; g++)
            for (int64_t c = 0; c < 4 && d + 16 * c < part->D; c++)
                _mm512_mask_storeu_ps(partial + g * all + 2 + d + 16 * c, first(part->D - d - 16 * c), sums[g][c]);
    }
}

/* The partials of `heads` query heads. */
INLINE void attend_part(const Part *part, const Queries *q, int heads, float *partial, int64_t all) {
    __m512 weights[PART / 4];
    weights_of(part, q, heads, weights, partial, all);
    sum_values(part, heads, weights, partial, all);
}

/* The same with constants, for which loops unroll. */
static void attend_64(Part part, const Queries *q, int heads, float *partial, int64_t all) {
    part.D = 64;
    if (part.cache->key_scales) attend_part(&part, q, heads, partial, all);
    else {
        const Cache plain = {part.cache->keys, part.cache->values, NULL, NULL};
        part.cache = &plain;
        attend_part(&part, q, heads, partial, all);
    }
}

static void attend_any(Part part, const Queries *q, int heads, float *partial, int64_t all) {
    attend_part(&part, q, heads, partial, all);
}

/* softmax(q k^T / sqrt(D)) v [D] of the `parts` of a query, scaled to the largest score of all (online softmax, Milakov
   and Gimelshein 2018). */
static void join(const float *partials, int64_t parts, bf16 *out, int64_t D) {
    const int64_t size = partial_size(D);
    float top = partials[0];
    for (int64_t i = 1; i < parts; i++) top = fmaxf(top, partials[i * size]);
    __m512 total = _mm512_setzero_ps(), sums[MAX_D / 16];
    for (int64_t d = 0; d < D; d += 16) sums[d / 16] = _mm512_setzero_ps();
    for (int64_t i = 0; i < parts; i++, partials += size) {
        const __m512 share = exponential(_mm512_set1_ps(partials[0] - top));
        total = _mm512_fmadd_ps(share, _mm512_set1_ps(partials[1]), total);
        for (int64_t d = 0; d < D; d += 16)
            sums[d / 16] = _mm512_fmadd_ps(share, _mm512_maskz_loadu_ps(first(D - d), partials + 2 + d), sums[d / 16]);
    }
    for (int64_t d = 0; d < D; d += 16) store_part(out + d, _mm512_div_ps(sums[d / 16], total), first(D - d));
}

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

/* q and out [B, T, H, D], k and v [B, T, K, D], cos_sin [B, T, D]; parts: that the largest of `pos` needs; partials
   [B, T, H, parts]. Writes k and v into the cache: whichever part has a position does, before it reads it. */
static void attend(const Model *model, const bf16 *q, const bf16 *k, const bf16 *v, const float *cos_sin,
                   const int64_t *pos, const Cache *cache, float *partials, int64_t parts, bf16 *out, int64_t B, int64_t T,
                   int64_t S) {
    const int64_t K = model->n_kv_heads, D = model->head_dim, H = model->n_heads, G = H / K, units = B * K;
    const int64_t size = partial_size(D), all = parts * size;
#pragma omp for schedule(static, 1)
    for (int64_t i = 0; i < units * parts; i++) {
        const int64_t unit = i % units, number = i / units, from = number * PART, first_row = unit / K * T;
        const int64_t next = at_most(i + omp_get_num_threads(), units * parts - 1);
        for (int64_t row = first_row; row < first_row + T; row++) {
            const int64_t at = (row * K + unit % K) * D;
            if (pos[row] / PART == number) keep(cache, unit * S + pos[row], k + at, v + at, cos_sin + row * D, D);
        }
        for (int64_t row = first_row; row < first_row + T; row++) {
            const int64_t n = at_most(PART, pos[row] + 1 - from), query = row * H + unit % K * G;
            const Part part = {.cache = cache, .start = unit * S + from, .n = n, .quarter = ceil_div(n, 4),
                               .ahead = next % units * S + next / units * PART, .D = D};
            for (int64_t g = 0; n > 0 && g < G; g += TOGETHER) { /* the heads of a group are neighbours */
                Queries queries;
                const int heads = (int)at_most(TOGETHER, G - g);
                float *partial = partials + (query + g) * all + number * size;
                prepare_queries(q + (query + g) * D, cos_sin + row * D, heads, D, cache->key_scales, &queries);
                (D == 64 ? attend_64 : attend_any)(part, &queries, heads, partial, all);
            }
        }
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < B * T * H; i++) join(partials + i * all, pos[i / H] / PART + 1, out + i * D, D);
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

/* Bytes that a step of M rows, which are B * T, needs to work in, up to position `n` of the cache. */
int64_t decode_workspace(const Model *model, int64_t M, int64_t n) {
    const int64_t q = model->n_heads * model->head_dim, kv = model->n_kv_heads * model->head_dim;
    const int64_t partials = model->n_heads * (n / PART + 1) * partial_size(model->head_dim);
    const int64_t of_row = 2 * (model->dim + 2 * q + 2 * kv + 2 * model->ffn_dim) + 4 * partials;
    return M * of_row + omp_get_max_threads() * room_bytes(widest(model));
}

/* A softmax weight of a score 88 below the largest is subnormal, and a product with it takes a hundred cycles. */
enum { SUBNORMALS_ARE_ZERO = 0x8040 };

/* Logits [B, T, V] after `tokens` [B, T] at `pos` [B, T]; `cos_sin` [B, T, D] has their rotations. Keys and values are
   written to the cache, that of all layers, one after another. Returns -1, and has written nothing, where a token or
   position is out of range. */
int decode_step(const Model *model, const int64_t *tokens, const int64_t *pos, const float *cos_sin, const Cache *cache,
                char *workspace, bf16 *logits, int64_t B, int64_t T, int64_t S) {
    const int64_t M = B * T, dim = model->dim, ffn = model->ffn_dim, heads = model->n_heads * model->head_dim;
    const int64_t kv = model->n_kv_heads * model->head_dim;
    const float eps = model->norm_eps;
    int64_t parts = 1;
    for (int64_t m = 0; m < M; m++) {
        if (pos[m] < 0 || pos[m] >= S || tokens[m] < 0 || tokens[m] >= model->vocab_size) return -1;
        parts = larger(parts, pos[m] / PART + 1);
    }
    float *partials = (float *)workspace;
    bf16 *x = (bf16 *)(partials + M * model->n_heads * parts * partial_size(model->head_dim)), *q = x + M * dim, *out = q + M * heads, *k = out + M * heads;
    bf16 *v = k + M * kv, *gate = v + M * kv, *up = gate + M * ffn;
    char *rooms = (char *)(up + M * ffn);
#pragma omp parallel
    {
        Member self = {.thread = omp_get_thread_num(), .threads = omp_get_num_threads()};
        self.room = room_of(rooms + self.thread * room_bytes(widest(model)), widest(model));
        const unsigned before = _mm_getcsr();
        _mm_setcsr(before | SUBNORMALS_ARE_ZERO);
        for (int64_t m = self.thread; m < M; m += self.threads)
            widen_row(&model->tok_embeddings, tokens[m], x + m * dim);
#pragma omp barrier
        for (int64_t i = 0; i < model->n_layers; i++) {
            const Layer *layer = &model->layers[i];
            const Cache own = layer_of(cache, i * B * model->n_kv_heads * S, model->head_dim);
            const Product qkv[] = {{&layer->wq, q, false}, {&layer->wk, k, false}, {&layer->wv, v, false}};
            products(&self, x, layer->attention_norm, eps, qkv, 3, M);
#pragma omp barrier
            attend(model, q, k, v, cos_sin, pos, &own, partials, parts, out, B, T, S);
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
        _mm_setcsr(before);
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
