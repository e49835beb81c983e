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

enum { MAX_D = 256 };

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

/* softmax(q k^T / sqrt(D)) v for one head; D is even. Each 32 bits of v hold two neighbours, which are summed apart and
   put together again at the end. */
static inline void attend_head(const bf16 *q, const bf16 *k, const bf16 *v, float *scores, bf16 *out, int64_t n,
                               int64_t D) {
    const float scale = 1.0f / sqrtf((float)D);
    for (int64_t s = 0; s < n; s++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < D; d += 32) {
            _mm_prefetch((const char *)(v + s * D + d), _MM_HINT_T1);
            const __m512i q_d = load_pairs(q + d, D - d), k_d = load_pairs(k + s * D + d, D - d);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)q_d, (__m512bh)k_d);
        }
        scores[s] = _mm512_reduce_add_ps(sum) * scale;
    }
    const __m512 factor = _mm512_set1_ps(1.0f / softmax_weights(scores, n));
    __m512 even[MAX_D / 32], odd[MAX_D / 32];
    for (int64_t i = 0; i < ceil_div(D, 32); i++) even[i] = odd[i] = _mm512_setzero_ps();
    for (int64_t s = 0; s < n; s++) {
        const __m512 weight = _mm512_set1_ps(scores[s]);
        for (int64_t i = 0; i < ceil_div(D, 32); i++) {
            const __m512i pairs = load_pairs(v + s * D + i * 32, D - i * 32);
            even[i] = _mm512_fmadd_ps(weight, even_of(pairs), even[i]);
            odd[i] = _mm512_fmadd_ps(weight, odd_of(pairs), odd[i]);
        }
    }
    for (int64_t i = 0; i < ceil_div(D, 32); i++) {
        const __m256i low = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(even[i], factor));
        const __m256i high = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(odd[i], factor));
        const __m512i shifted = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
        const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(low), shifted);
        _mm512_mask_storeu_epi32(out + i * 32, first(D / 2 - i * 16), pairs);
    }
}

/* q and out [B, T, H, D], k and v [B, T, K, D], cos_sin [S, D], keys and values [B, K, S, D], scores [B, T, H, S].
   Writes k and v into the cache, all T before the first is read. A key/value head passes through a core once, for all
   the tokens and query heads that share it. */
static void attend(const Model *model, const bf16 *q, const bf16 *k, const bf16 *v, const float *cos_sin,
                   const int64_t *pos, bf16 *keys, bf16 *values, float *scores, bf16 *out, int64_t B, int64_t T,
                   int64_t S) {
    const int64_t K = model->n_kv_heads, D = model->head_dim, G = model->n_heads / K;
#pragma omp for schedule(static) nowait
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
   values are written to the cache, [n_layers, B, K, S, D] each. Returns -1, and has written nothing, where a token or
   position is out of range. */
int decode_step(const Model *model, const int64_t *tokens, const int64_t *pos, const float *cos_sin, bf16 *keys,
                bf16 *values, char *workspace, bf16 *logits, int64_t B, int64_t T, int64_t S) {
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
            const int64_t offset = i * B * kv * S;
            const Product qkv[] = {{&layer->wq, q, false}, {&layer->wk, k, false}, {&layer->wv, v, false}};
            products(&self, x, layer->attention_norm, eps, qkv, 3, M);
#pragma omp barrier
            attend(model, q, k, v, cos_sin, pos, keys + offset, values + offset, scores, out, B, T, S);
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
