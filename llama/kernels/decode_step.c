/* One decode step of a Llama on a CPU with AMX: bfloat16 weights and cache, sums in fp32. See decode_step.py; parts of
   it serve prefill.py.

   A step reads every weight once and does next to nothing with it, so all that counts is to keep memory busy. A core
   that walks along one row of a matrix waits for one cache line after the other (two cores: 15 GB/s); here a tile
   instruction takes 16 rows at a time while the lines that come next are called for (25 GB/s). Weights stay as they lie
   in the checkpoint: 16 rows of w are one operand, and x, which is small, is the one that is packed. Everything between
   the products is here as well: between two calls from Python the caches hold weights, not the interpreter, and 700
   calls cost a tenth of the step.

   Roundings to bfloat16 are where eager PyTorch has them, but for the softmax weights, which stay fp32.

   B sequences, T tokens of each, H query heads, K key/value heads, D head size, S cache slots; M rows of x, at most 16
   at once. A row's sums are formed in the same order whatever M is, so T tokens at once give the bits of T steps. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;

typedef struct {
    const bf16 *wq, *wk, *wv, *wo, *w1, *w2, *w3, *attention_norm, *ffn_norm;
} Layer;

typedef struct {
    int64_t dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, vocab_size;
    float norm_eps;
    const bf16 *tok_embeddings, *norm, *output;
    const Layer *layers;
} Model;

/* Linux lends the tile registers only to processes that ask. 0 means yes. */
int decode_init(void) {
    const long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return (int)syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
}

/* Sixteen values at a time. */

static inline __m512 load(const bf16 *x) {
    const __m256i halves = _mm256_loadu_si256((const __m256i *)x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

static inline void store(bf16 *y, __m512 x) {
    _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(x)); /* to nearest, ties to even, NaN stays NaN */
}

static inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1); }

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

/* Matrix products: y[M, N] = x[M, K] w[N, K]^T. Tile registers: 0 sums, 1 w, 2 x. */

enum { ROWS = 16, DEPTH = 32, AHEAD = 512 };

typedef struct {
    const bf16 *w;
    bf16 *y;
    int64_t N; /* a multiple of 16; K is one of 32 */
} Product;

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* The M 32-bit words that lie `stride` words apart, from `base` on. */
static inline __m512i column(const void *base, int64_t stride, int64_t M) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i offsets = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)stride));
    return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), first(M), offsets, base, 4);
}

/* 16 rows of w. AHEAD columns before they are needed, cache lines are called for: of the same rows or, near their end,
   of the next 16, where there are `more`. */
static void product_block(const bf16 *packed, const bf16 *w, bf16 *y, int64_t M, int64_t N, int64_t K, int more) {
    float sums[ROWS * 16];
    _tile_zero(0);
    for (int64_t k = 0; k < K; k += DEPTH) {
        const int64_t ahead = k + AHEAD < K ? k + AHEAD : more ? ROWS * K + k + AHEAD - K : k;
        for (int64_t row = 0; row < ROWS; row++) _mm_prefetch((const char *)(w + row * K + ahead), _MM_HINT_T1);
        _tile_loadd(1, w + k, 2 * K);
        _tile_loadd(2, packed + k * M, 4 * M);
        _tile_dpbf16ps(0, 1, 2);
    }
    _tile_stored(0, sums, 4 * M);
    for (int64_t m = 0; m < M; m++) store(y + m * N, _mm512_castsi512_ps(column(sums + m, M, ROWS)));
}

static void configure(const TileConfig *config) {
    __asm__ volatile("" : : "r"(config) : "memory"); /* GCC 12 believes that the next line reads 8 bytes of these 64 */
    _tile_loadconfig(config);
}

/* Several products of the same M <= 16 rows, which are packed once into [K / 2, M] pairs; one row lies so already. */
static void products_of_16(const bf16 *x, bf16 *packed, const Product *list, int count, int64_t M, int64_t K) {
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 3; tile++) {
        config.rows[tile] = 16;
        config.row_bytes[tile] = tile == 1 ? 64 : (uint16_t)(4 * M);
    }
#pragma omp parallel
    {
        TileConfig before = {0}; /* PyTorch's own kernels leave their configuration and expect to find it again */
        _tile_storeconfig(&before);
        configure(&config);
        if (M > 1) {
#pragma omp for schedule(static)
            for (int64_t pair = 0; pair < K / 2; pair++)
                _mm512_mask_storeu_epi32(packed + pair * M * 2, first(M), column(x + pair * 2, K / 2, M));
        }
        for (int i = 0; i < count; i++) {
            const int64_t N = list[i].N, blocks = N / ROWS;
#pragma omp for schedule(static) nowait
            for (int64_t j = 0; j < blocks; j++)
                product_block(M > 1 ? packed : x, list[i].w + j * ROWS * K, list[i].y + j * ROWS, M, N, K,
                              j + 1 < blocks);
        }
        if (before.palette) configure(&before);
        else _tile_release();
    }
}

static void products(const bf16 *x, bf16 *packed, const Product *list, int count, int64_t M, int64_t K) {
    for (int64_t m = 0; m < M; m += 16) {
        Product part[3];
        for (int i = 0; i < count; i++) part[i] = (Product){list[i].w, list[i].y + m * list[i].N, list[i].N};
        products_of_16(x + m * K, packed, part, count, M - m < 16 ? M - m : 16, K);
    }
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

/* q and out [B, T, H, D], k and v [B, T, K, D], cos_sin [B, T, D], keys and values [B, K, S, D], scores [B, T, H, S].
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
            rotate(k + from, cos_sin + row * D, k_all + pos[row] * D, D);
            memcpy(v_all + pos[row] * D, v + from, (size_t)D * sizeof *v);
        }
        for (int64_t row = first_row; row < first_row + T; row++) {
            const int64_t n = pos[row] + 1, group = (row * K + unit % K) * G; /* heads of one group are neighbours */
            for (int64_t head = group; head < group + G; head++) {
                rotate(q + head * D, cos_sin + row * D, turned, D);
                if (D == 64) attend_head(turned, k_all, v_all, scores + head * S, out + head * D, n, 64); /* unrolls */
                else attend_head(turned, k_all, v_all, scores + head * S, out + head * D, n, D);
            }
        }
    }
}

/* The step. */

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Values of bfloat16 that a step of M rows, which are B * T, needs to work in. */
int64_t decode_workspace(const Model *model, int64_t M, int64_t S) {
    const int64_t dim = model->dim, ffn = model->ffn_dim, kv = model->n_kv_heads * model->head_dim;
    return M * (4 * dim + 2 * kv + 2 * ffn + 2 * model->n_heads * S) + 16 * larger(dim, ffn);
}

/* Logits [B, T, V] after `tokens` [B, T] at `pos` [B, T], whose rotations are `cos_sin` [B, T, D]; keys and values are
   written to the cache, [n_layers, B, K, S, D] each. Returns -1, and has written nothing, where a token or position is
   out of range. */
int decode_step(const Model *model, const int64_t *tokens, const int64_t *pos, const float *cos_sin, bf16 *keys,
                bf16 *values, bf16 *workspace, bf16 *logits, int64_t B, int64_t T, int64_t S) {
    const int64_t M = B * T, dim = model->dim, ffn = model->ffn_dim, kv = model->n_kv_heads * model->head_dim;
    for (int64_t m = 0; m < M; m++)
        if (pos[m] < 0 || pos[m] >= S || tokens[m] < 0 || tokens[m] >= model->vocab_size) return -1;
    float *scores = (float *)workspace;
    bf16 *x = workspace + 2 * M * model->n_heads * S, *h = x + M * dim, *q = h + M * dim, *out = q + M * dim;
    bf16 *k = out + M * dim, *v = k + M * kv, *gate = v + M * kv, *up = gate + M * ffn, *packed = up + M * ffn;
    for (int64_t m = 0; m < M; m++)
        memcpy(x + m * dim, model->tok_embeddings + tokens[m] * dim, (size_t)dim * sizeof *x);
    for (int64_t i = 0; i < model->n_layers; i++) {
        const Layer *layer = &model->layers[i];
        const int64_t offset = i * B * kv * S;
        rms_norm(x, layer->attention_norm, h, model->norm_eps, M, dim);
        products(h, packed, (Product[]){{layer->wq, q, dim}, {layer->wk, k, kv}, {layer->wv, v, kv}}, 3, M, dim);
        attend(model, q, k, v, cos_sin, pos, keys + offset, values + offset, scores, out, B, T, S);
        products(out, packed, (Product[]){{layer->wo, h, dim}}, 1, M, dim);
        add(x, h, M * dim);
        rms_norm(x, layer->ffn_norm, h, model->norm_eps, M, dim);
        products(h, packed, (Product[]){{layer->w1, gate, ffn}, {layer->w3, up, ffn}}, 2, M, dim);
        silu_mul(gate, up, M * ffn);
        products(gate, packed, (Product[]){{layer->w2, h, dim}}, 1, M, ffn);
        add(x, h, M * dim);
    }
    rms_norm(x, model->norm, h, model->norm_eps, M, dim);
    products(h, packed, (Product[]){{model->output, logits, model->vocab_size}}, 1, M, dim);
    return 0;
}

/* Reads `n` bytes, but for a rest below 64 KiB, and does nothing else: 16 streams a core, as above, an addition a line.
   The measure of what the machine's memory delivers. */
int64_t read_all(const char *data, int64_t n) {
    const int64_t page = 4096;
    int64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (int64_t block = 0; block < n / (ROWS * page); block++) {
        const char *rows = data + block * ROWS * page;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < page; i += 64)
            for (int64_t row = 0; row < ROWS; row++) {
                const int64_t ahead = i + 2 * AHEAD < page ? i + 2 * AHEAD : ROWS * page + i + 2 * AHEAD - page;
                _mm_prefetch(rows + row * page + ahead, _MM_HINT_T1);
                sum = _mm512_add_epi64(sum, _mm512_loadu_si512(rows + row * page + i));
            }
        total += _mm512_reduce_add_epi64(sum);
    }
    return total;
}
