/* What lies between the matrix products of a training step, one pass each: bfloat16 activations, sums in fp32. See
   train_ops.py, which holds the slow twin of each.

   Reading an activation of 512 tokens takes less time than the system needs to hand out the pages of a fresh one, so
   nothing here makes a temporary, and results may lie over arguments wherever the elements correspond.

   M rows of N values. A `wide` argument tells which operands are fp32 and not bfloat16. */

#include "simd.h"

static inline __m512 load_either(const void *x, int64_t i, int wide) {
    return wide ? _mm512_loadu_ps((const float *)x + i) : load((const bf16 *)x + i);
}

static inline __m512 rounded(__m512 x) { return widen(narrow(x)); }

static inline void store_either(void *y, int64_t i, __m512 x, int wide) {
    if (wide) _mm512_storeu_ps((float *)y + i, x);
    else store((bf16 *)y + i, x);
}

/* RMSNorm: n = x / sqrt(mean(x^2) + eps), y = n w. N is a multiple of 16. Writes 1 / rms(x) of each row as well. */

enum { X_WIDE = 1, W_WIDE = 2, DY_WIDE = 4 };

void rms_norm(const void *x, const void *w, bf16 *y, float *inverse, float eps, int64_t M, int64_t N, int wide) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t n = 0; n < N; n += 16) {
            const __m512 v = load_either(x, m * N + n, wide & X_WIDE);
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        inverse[m] = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)N + eps);
        for (int64_t n = 0; n < N; n += 16) {
            __m512 v = _mm512_mul_ps(load_either(x, m * N + n, wide & X_WIDE), _mm512_set1_ps(inverse[m]));
            if (!(wide & X_WIDE)) v = rounded(v); /* as RMSNorm does */
            store(y + m * N + n, _mm512_mul_ps(v, load_either(w, n, wide & W_WIDE)));
        }
    }
}

/* With g = w dy: dx = (g - n mean(g n)) / rms(x), in the dtype of x. */
void rms_norm_backward(const void *x, const void *w, const float *inverse, const void *dy, void *dx, int64_t M,
                       int64_t N, int wide) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        const int64_t row = m * N;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t n = 0; n < N; n += 16) {
            const __m512 g = _mm512_mul_ps(load_either(dy, row + n, wide & DY_WIDE), load_either(w, n, wide & W_WIDE));
            sum = _mm512_fmadd_ps(g, load_either(x, row + n, wide & X_WIDE), sum);
        }
        const __m512 scale = _mm512_set1_ps(inverse[m]);
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) * inverse[m] * inverse[m] / (float)N);
        for (int64_t n = 0; n < N; n += 16) {
            const __m512 g = _mm512_mul_ps(load_either(dy, row + n, wide & DY_WIDE), load_either(w, n, wide & W_WIDE));
            const __m512 v = load_either(x, row + n, wide & X_WIDE);
            store_either(dx, row + n, _mm512_mul_ps(_mm512_fnmadd_ps(v, mean, g), scale), wide & X_WIDE);
        }
    }
}

/* The gradient of w: dw[n] = sum over rows of dy n, in fp32. */
void rms_norm_weight(const void *x, const float *inverse, const void *dy, float *dw, int64_t M, int64_t N, int wide) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t m = 0; m < M; m++) {
            const __m512 v = _mm512_mul_ps(load_either(x, m * N + n, wide & X_WIDE), _mm512_set1_ps(inverse[m]));
            sum = _mm512_fmadd_ps(v, load_either(dy, m * N + n, wide & DY_WIDE), sum);
        }
        _mm512_storeu_ps(dw + n, sum);
    }
}

/* SwiGLU over n values, a multiple of 16: silu(gate) up, silu(x) = x s, s = 1 / (1 + e^-x). */

static inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 decay = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x))); /* cannot overflow */
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_div_ps(_mm512_mask_mov_ps(one, negative, decay), _mm512_add_ps(one, decay));
}

void swiglu(const bf16 *gate, const bf16 *up, bf16 *y, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 x = load(gate + i);
        store(y + i, _mm512_mul_ps(rounded(_mm512_mul_ps(x, sigmoid(x))), load(up + i)));
    }
}

/* d_gate = d up s (1 + gate (1 - s)), d_up = d gate s; they may lie over gate and up. */
void swiglu_backward(const bf16 *d, const bf16 *gate, const bf16 *up, bf16 *d_gate, bf16 *d_up, int64_t n) {
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += 16) {
        const __m512 x = load(gate + i), dy = load(d + i), s = sigmoid(x), product = _mm512_mul_ps(x, s);
        /* s (1 + x (1 - s)) = s + x s (1 - s) */
        const __m512 slope = _mm512_fmadd_ps(product, _mm512_sub_ps(one, s), s);
        const __m512 u = load(up + i);
        store(d_gate + i, _mm512_mul_ps(_mm512_mul_ps(dy, u), slope));
        store(d_up + i, _mm512_mul_ps(dy, product));
    }
}

/* RoPE: x and y [M, heads, D], cos_sin [M, D] of (cosine, sine) pairs; sign -1 turns back. D is a multiple of 16. */
void rotate(const bf16 *x, const float *cos_sin, bf16 *y, int64_t M, int64_t heads, int64_t D, float sign) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++)
        for (int64_t head = m * heads; head < (m + 1) * heads; head++)
            for (int64_t i = 0; i < D; i += 16) {
                const __m512 v = load(x + head * D + i), cs = _mm512_loadu_ps(cos_sin + m * D + i);
                const __m512 c = _mm512_moveldup_ps(cs), s = _mm512_movehdup_ps(cs);
                const __m512 other = _mm512_mul_ps(_mm512_permute_ps(v, 0xb1), _mm512_mul_ps(s, _mm512_set1_ps(sign)));
                store(y + head * D + i, _mm512_fmaddsub_ps(v, c, other)); /* x0 c - x1 s, x1 c + x0 s */
            }
}

/* LoRA: three products with a matrix of R rows; x [M, N] without the elements that `drop` (NULL: none) marks. N is a
   multiple of 16. */

static inline __m512 load_kept(const bf16 *x, const uint8_t *drop, int64_t i) {
    const __m512 v = load(x + i);
    if (!drop) return v;
    const __m128i marks = _mm_loadu_si128((const __m128i *)(drop + i));
    return _mm512_maskz_mov_ps(_mm_cmpeq_epi8_mask(marks, _mm_setzero_si128()), v);
}

enum { BLOCK = 8 }; /* ranks whose sums are in registers together */

static inline void down_block(const bf16 *x, const uint8_t *drop, const float *a, float *low, float factor, int64_t N,
                              int64_t count) {
    __m512 sums[BLOCK];
    for (int64_t r = 0; r < count; r++) sums[r] = _mm512_setzero_ps();
    for (int64_t n = 0; n < N; n += 16) {
        const __m512 v = load_kept(x, drop, n);
        for (int64_t r = 0; r < count; r++) sums[r] = _mm512_fmadd_ps(v, _mm512_loadu_ps(a + r * N + n), sums[r]);
    }
    for (int64_t r = 0; r < count; r++) low[r] = _mm512_reduce_add_ps(sums[r]) * factor;
}

/* low[M, R] = factor x a^T, a [R, N]. */
void lora_down(const bf16 *x, const uint8_t *drop, const float *a, float *low, float factor, int64_t M, int64_t N,
               int64_t R) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        const uint8_t *marks = drop ? drop + m * N : NULL;
        int64_t r = 0;
        for (; r + BLOCK <= R; r += BLOCK) down_block(x + m * N, marks, a + r * N, low + m * R + r, factor, N, BLOCK);
        for (; r < R; r++) down_block(x + m * N, marks, a + r * N, low + m * R + r, factor, N, 1);
    }
}

/* y[M, N] += factor low a, but for the dropped elements. */
void lora_up(const float *low, const float *a, const uint8_t *drop, bf16 *y, float factor, int64_t M, int64_t N,
             int64_t R) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t r = 0; r < R; r++)
                sum = _mm512_fmadd_ps(_mm512_set1_ps(low[m * R + r]), _mm512_loadu_ps(a + r * N + n), sum);
            const __m512 kept = load(y + m * N + n);
            const __m512 moved = _mm512_fmadd_ps(sum, _mm512_set1_ps(factor), kept);
            if (!drop) store(y + m * N + n, moved);
            else {
                const __m128i marks = _mm_loadu_si128((const __m128i *)(drop + m * N + n));
                store_part(y + m * N + n, moved, _mm_cmpeq_epi8_mask(marks, _mm_setzero_si128()));
            }
        }
}

static inline void outer_block(const float *low, const bf16 *x, const uint8_t *drop, float *g, float factor, int64_t M,
                               int64_t N, int64_t R, int64_t count) {
    __m512 sums[BLOCK];
    for (int64_t r = 0; r < count; r++) sums[r] = _mm512_setzero_ps();
    for (int64_t m = 0; m < M; m++) {
        const __m512 v = load_kept(x, drop, m * N);
        for (int64_t r = 0; r < count; r++) sums[r] = _mm512_fmadd_ps(v, _mm512_set1_ps(low[m * R + r]), sums[r]);
    }
    for (int64_t r = 0; r < count; r++) _mm512_storeu_ps(g + r * N, _mm512_mul_ps(sums[r], _mm512_set1_ps(factor)));
}

/* g[R, N] = factor low^T x. */
void lora_outer(const float *low, const bf16 *x, const uint8_t *drop, float *g, float factor, int64_t M, int64_t N,
                int64_t R) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n += 16) {
        const uint8_t *marks = drop ? drop + n : NULL;
        int64_t r = 0;
        for (; r + BLOCK <= R; r += BLOCK) outer_block(low + r, x + n, marks, g + r * N + n, factor, M, N, R, BLOCK);
        for (; r < R; r++) outer_block(low + r, x + n, marks, g + r * N + n, factor, M, N, R, 1);
    }
}

/* Cross entropy over rows of N logits. */

/* lse[m] = log sum exp z[m]. */
void logsumexp(const bf16 *z, float *lse, int64_t M, int64_t N) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        const bf16 *row = z + m * N;
        __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (int64_t n = 0; n < N; n += 16)
            top = _mm512_mask_max_ps(top, first(N - n), top, load_part(row + n, first(N - n)));
        const float largest = _mm512_reduce_max_ps(top);
        top = _mm512_set1_ps(largest);
        for (int64_t n = 0; n < N; n += 16) {
            const __m512 part = exponential(_mm512_sub_ps(load_part(row + n, first(N - n)), top));
            sum = _mm512_mask_add_ps(sum, first(N - n), sum, part);
        }
        lse[m] = largest + logf(_mm512_reduce_add_ps(sum));
    }
}

/* z = scale (e^(z - lse) - 1 at the label): labels [M] counts from z's first column, and may lie outside of it. */
void softmax_gradient(bf16 *z, const float *lse, const int64_t *labels, float scale, int64_t M, int64_t N) {
#pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < M; m++) {
        bf16 *row = z + m * N;
        const __m512 all = _mm512_set1_ps(lse[m]), factor = _mm512_set1_ps(scale);
        const int is_inside = labels[m] >= 0 && labels[m] < N;
        const int64_t block = is_inside ? labels[m] / 16 * 16 : 0;
        const __m512 at_label = load_part(row + block, first(N - block));
        for (int64_t n = 0; n < N; n += 16) {
            const __m512 p = exponential(_mm512_sub_ps(load_part(row + n, first(N - n)), all));
            store_part(row + n, _mm512_mul_ps(p, factor), first(N - n));
        }
        if (is_inside) { /* once more, before the rounding */
            const __m512 p = exponential(_mm512_sub_ps(at_label, all));
            const __m512 less = _mm512_mask_sub_ps(p, (__mmask16)(1u << (labels[m] - block)), p, _mm512_set1_ps(1.0f));
            store_part(row + block, _mm512_mul_ps(less, factor), first(N - block));
        }
    }
}

/* w -= lr g over n values. */
void sgd(float *w, const bf16 *g, float lr, int64_t n) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 part = first(n - i);
        const __m512 before = _mm512_maskz_loadu_ps(part, w + i);
        const __m512 after = _mm512_fnmadd_ps(load_part(g + i, part), _mm512_set1_ps(lr), before);
        _mm512_mask_storeu_ps(w + i, part, after);
    }
}
