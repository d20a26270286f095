/* The parts of a forward pass that torch would run as dozens of small operators, one call each.
 *
 * Compiled and loaded by kernels.py. Every row is computed in an order of its own that depends on nothing but itself,
 * so that its bits are the same whatever company it has, and whether it was read as a prompt or decoded.
 */
#include "kernels.h"

/* ------------------------------------------------------------------------------------------------- normalisation */

INLINE float inverse_rms(const void *x, long width, float eps, int bf16) {
    vf acc = {0};
    long i = 0;
    for (; i + LANES <= width; i += LANES) {
        vf v = load(x, i, bf16);
        acc += v * v;
    }
    if (i < width) {
        vf v = load_tail(x, i, width - i, bf16);
        acc += v * v;
    }
    return 1.0f / sqrtf(sum(acc) / (float)width + eps);
}

INLINE void norm_row(const void *x, const void *weight, void *out, long width, float eps, int bf16) {
    float scale = inverse_rms(x, width, eps, bf16);
    long i = 0;
    for (; i + LANES <= width; i += LANES) store(out, i, load(x, i, bf16) * scale * load(weight, i, bf16), bf16);
    for (; i < width; i++) store1(out, i, load1(x, i, bf16) * scale * load1(weight, i, bf16), bf16);
}

INLINE void add_row(void *x, const void *add, long width, int bf16) {
    long i = 0;
    for (; i + LANES <= width; i += LANES) store(x, i, load(x, i, bf16) + load(add, i, bf16), bf16);
    for (; i < width; i++) store1(x, i, load1(x, i, bf16) + load1(add, i, bf16), bf16);
}

/* The rows of one array, shared out among the threads of the region this is called in. */
INLINE void add_norm_rows(long rows, long width, float eps, void *x, const void *add, const void *weight, void *out,
                          int bf16) {
#pragma omp for
    for (long row = 0; row < rows; row++) {
        char *at = row_of(x, row, width, bf16);
        if (add) add_row(at, row_of(add, row, width, bf16), width, bf16);
        norm_row(at, weight, row_of(out, row, width, bf16), width, eps, bf16);
    }
}

INLINE void add_norm_(int threads, long rows, long width, float eps, void *x, const void *add, const void *weight,
                      void *out, int bf16) {
#pragma omp parallel num_threads(threads) if (threads > 1 && rows * width >= PARALLEL_NUMBERS)
    add_norm_rows(rows, width, eps, x, add, weight, out, bf16);
}

/* x [rows, width] += add (unless NULL); out = x / rms(x) * weight [width]. */
void tally_add_norm(int bf16, int threads, long rows, long width, float eps, void *x, const void *add,
                    const void *weight, void *out) {
    if (bf16) add_norm_(threads, rows, width, eps, x, add, weight, out, 1);
    else add_norm_(threads, rows, width, eps, x, add, weight, out, 0);
}

/* ------------------------------------------------------------------------------------------------------ gated MLP */

INLINE void silu_row(const void *gate, const void *up, void *out, long inner, int bf16) {
    long i = 0;
    for (; i + LANES <= inner; i += LANES) {
        vf g = load(gate, i, bf16);
        store(out, i, g / (1.0f + exp_(-g)) * load(up, i, bf16), bf16);
    }
    if (i < inner) {
        vf g = load_tail(gate, i, inner - i, bf16);
        vf y = g / (1.0f + exp_(-g)) * load_tail(up, i, inner - i, bf16);
        for (long j = 0; i + j < inner; j++) store1(out, i + j, y[j], bf16);
    }
}

INLINE void silu_rows(long rows, long inner, const void *gate_up, void *out, int bf16) {
#pragma omp for
    for (long row = 0; row < rows; row++) {
        const char *gate = row_of(gate_up, row, 2 * inner, bf16);
        silu_row(gate, row_of(gate, 1, inner, bf16), row_of(out, row, inner, bf16), inner, bf16);
    }
}

INLINE void silu_(int threads, long rows, long inner, const void *gate_up, void *out, int bf16) {
#pragma omp parallel num_threads(threads) if (threads > 1 && rows * inner >= PARALLEL_NUMBERS)
    silu_rows(rows, inner, gate_up, out, bf16);
}

/* out [rows, inner] = silu(gate) * up, where gate_up is [rows, gate then up]. */
void tally_silu(int bf16, int threads, long rows, long inner, const void *gate_up, void *out) {
    if (bf16) silu_(threads, rows, inner, gate_up, out, 1);
    else silu_(threads, rows, inner, gate_up, out, 0);
}

/* ------------------------------------------------------------------------------------------------------ attention */

/* What all calls of one model have in common. Mirrored by kernels.Shape. */
typedef struct {
    int bf16, threads;
    long heads, kv_heads, head_dim, window, max_context;
    float eps;
    const void *cos, *sin; /* [max_context, head_dim]; the sine carries the sign of rotate_half */
} Shape;

INLINE void rotate(void *x, const void *cos, const void *sin, long dim, int bf16) {
    long half = dim / 2, i = 0;
    for (; i + LANES <= half; i += LANES) {
        vf a = load(x, i, bf16), b = load(x, i + half, bf16);
        store(x, i, a * load(cos, i, bf16) + b * load(sin, i, bf16), bf16);
        store(x, i + half, b * load(cos, i + half, bf16) + a * load(sin, i + half, bf16), bf16);
    }
    for (; i < half; i++) {
        float a = load1(x, i, bf16), b = load1(x, i + half, bf16);
        store1(x, i, a * load1(cos, i, bf16) + b * load1(sin, i, bf16), bf16);
        store1(x, i + half, b * load1(cos, i + half, bf16) + a * load1(sin, i + half, bf16), bf16);
    }
}

/* Normalise and rotate queries and keys in place, and write keys and values into the slot. */
INLINE void enter_row(const Shape *s, char *qkv, const void *q_norm, const void *k_norm, char *kv, long slot,
                      long position, int bf16) {
    long dim = s->head_dim, size = bf16 ? 2 : 4, rotated = s->heads + s->kv_heads;
    const char *cos = row_of(s->cos, position, dim, bf16), *sin = row_of(s->sin, position, dim, bf16);
    for (long head = 0; head < rotated; head++) {
        char *x = row_of(qkv, head, dim, bf16);
        const void *weight = head < s->heads ? q_norm : k_norm;
        if (weight) norm_row(x, weight, x, dim, s->eps, bf16);
        rotate(x, cos, sin, dim, bf16);
    }
    for (long head = 0; head < 2 * s->kv_heads; head++) {
        char *target = kv + ((slot * 2 * s->kv_heads + head) * s->max_context + position) * dim * size;
        memcpy(target, row_of(qkv, s->heads + head, dim, bf16), (size_t)(dim * size));
    }
}

/* Four sums at each of four levels: sixteen vectors to the vector of their sums. */
INLINE vf fold(vf a, vf b, vi low, vi high) { return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high); }

INLINE vf sums(const vf x[LANES]) {
    const vi low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const vi low4 = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    const vi low2 = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29};
    const vi low1 = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    vf a[8], b[4], c[2];
    for (int i = 0; i < 8; i++) a[i] = fold(x[2 * i], x[2 * i + 1], low8, low8 + 8);
    for (int i = 0; i < 4; i++) b[i] = fold(a[2 * i], a[2 * i + 1], low4, low4 + 4);
    for (int i = 0; i < 2; i++) c[i] = fold(b[2 * i], b[2 * i + 1], low2, low2 + 2);
    return fold(c[0], c[1], low1, low1 + 1);
}

INLINE float dot(const float *q, const void *key, long dim, int bf16) {
    vf acc = {0};
    long i = 0;
    for (; i + LANES <= dim; i += LANES) acc += load(q, i, 0) * load(key, i, bf16);
    if (i < dim) acc += load_tail(q, i, dim - i, 0) * load_tail(key, i, dim - i, bf16);
    return sum(acc);
}

/* scores[t] = q . keys[t], and their largest. */
INLINE float score(const float *q, const char *keys, long count, long dim, float *scores, int bf16) {
    vf top = splat(-INFINITY);
    long t = 0, size = bf16 ? 2 : 4;
    if (dim % LANES == 0)
        for (; t + LANES <= count; t += LANES) {
            vf acc[LANES];
            for (int k = 0; k < LANES; k++) acc[k] = (vf){0};
            for (long i = 0; i < dim; i += LANES) {
                vf part = load(q, i, 0);
                for (int k = 0; k < LANES; k++) acc[k] += part * load(keys + (t + k) * dim * size, i, bf16);
            }
            vf got = sums(acc);
            store(scores, t, got, 0);
            top = maximum(top, got);
        }
    float best = largest(top);
    for (; t < count; t++) {
        scores[t] = dot(q, keys + t * dim * size, dim, bf16);
        best = scores[t] > best ? scores[t] : best;
    }
    return best;
}

/* scores to weights, in place, not yet divided by their sum, which is returned. */
INLINE float weigh(float *scores, long count, float best) {
    vf acc = {0};
    long t = 0;
    for (; t + LANES <= count; t += LANES) {
        vf w = exp_(load(scores, t, 0) - best);
        store(scores, t, w, 0);
        acc += w;
    }
    float total = sum(acc);
    if (t < count) {
        vf w = exp_(load_tail(scores, t, count - t, 0) - best);
        for (long i = 0; t + i < count; i++) {
            scores[t + i] = w[i];
            total += w[i];
        }
    }
    return total;
}

/* out[i..i + 16 * parts) = sum of weights[t] * values[t][i..], times scale. */
INLINE void gather(const float *weights, const char *values, long count, long dim, long i, int parts, float scale,
                   void *out, int bf16) {
    long size = bf16 ? 2 : 4, t = 0;
    vf even[4], odd[4];
    for (int k = 0; k < parts; k++) even[k] = odd[k] = (vf){0};
    for (; t + 2 <= count; t += 2)
        for (int k = 0; k < parts; k++) {
            even[k] += weights[t] * load(values + t * dim * size, i + LANES * k, bf16);
            odd[k] += weights[t + 1] * load(values + (t + 1) * dim * size, i + LANES * k, bf16);
        }
    for (int k = 0; k < parts; k++) {
        if (t < count) even[k] += weights[t] * load(values + t * dim * size, i + LANES * k, bf16);
        store(out, i + LANES * k, (even[k] + odd[k]) * scale, bf16);
    }
}

/* One query head over `count` keys and values. */
INLINE void attend_head(const void *q, const char *keys, const char *values, long count, long dim, float *scores,
                        void *out, int bf16) {
    float query[1024], scale = 1.0f / sqrtf((float)dim);
    for (long i = 0; i < dim; i++) query[i] = load1(q, i, bf16) * scale;
    float best = score(query, keys, count, dim, scores, bf16);
    float inverse = 1.0f / weigh(scores, count, best);
    long i = 0;
    for (; i + 4 * LANES <= dim; i += 4 * LANES) gather(scores, values, count, dim, i, 4, inverse, out, bf16);
    for (; i + LANES <= dim; i += LANES) gather(scores, values, count, dim, i, 1, inverse, out, bf16);
    for (; i < dim; i++) {
        float total = 0;
        for (long t = 0; t < count; t++) total += scores[t] * load1(values, t * dim + i, bf16);
        store1(out, i, total * inverse, bf16);
    }
}

extern int omp_get_thread_num(void);

INLINE void attend_rows(const Shape *s, long rows, char *qkv, const void *q_norm, const void *k_norm,
                        const int64_t *slots, const int64_t *positions, char *kv, float *scratch, void *out,
                        int bf16) {
    long dim = s->head_dim, size = bf16 ? 2 : 4, group = s->heads / s->kv_heads;
    long width = (s->heads + 2 * s->kv_heads) * dim;
    float *scores = scratch + omp_get_thread_num() * s->max_context;
#pragma omp for
    for (long row = 0; row < rows; row++)
        enter_row(s, row_of(qkv, row, width, bf16), q_norm, k_norm, kv, slots[row], positions[row], bf16);
#pragma omp for schedule(dynamic, 1)
    for (long item = 0; item < rows * s->kv_heads; item++) {
        long row = item / s->kv_heads, head = item % s->kv_heads, position = positions[row];
        long first = s->window && position >= s->window ? position - s->window + 1 : 0;
        char *keys = kv + ((slots[row] * 2 * s->kv_heads + head) * s->max_context + first) * dim * size;
        char *values = keys + s->kv_heads * s->max_context * dim * size;
        for (long k = 0; k < group; k++) {
            long query = head * group + k;
            attend_head(row_of(qkv, row, width, bf16) + query * dim * size, keys, values, position + 1 - first, dim,
                        scores, row_of(out, row, s->heads * dim, bf16) + query * dim * size, bf16);
        }
    }
}

INLINE void attend_(const Shape *s, long rows, char *qkv, const void *q_norm, const void *k_norm,
                    const int64_t *slots, const int64_t *positions, char *kv, float *scratch, void *out, int bf16) {
#pragma omp parallel num_threads(s->threads) if (s->threads > 1)
    attend_rows(s, rows, qkv, q_norm, k_norm, slots, positions, kv, scratch, out, bf16);
}

/* Attention of one layer. qkv [rows, query, key and value heads, head_dim] is overwritten; kv is the layer's
 * [slots, key then value heads, max_context, head_dim]; scratch [threads, max_context]; out [rows, heads * head_dim].
 * Row r is the token at positions[r] of slots[r]; keys of earlier rows of a slot are in it when a later row looks. */
void tally_attend(const Shape *s, long rows, void *qkv, const void *q_norm, const void *k_norm, const int64_t *slots,
                  const int64_t *positions, void *kv, float *scratch, void *out) {
    if (s->bf16) attend_(s, rows, qkv, q_norm, k_norm, slots, positions, kv, scratch, out, 1);
    else attend_(s, rows, qkv, q_norm, k_norm, slots, positions, kv, scratch, out, 0);
}

/* ------------------------------------------------------------------------------------------------------- products */

/* A matrix of bf16 numbers, [out, in], packed: panels of 32 outputs, each [in / 2, 32, 2], so that one instruction
 * multiplies two inputs into sixteen outputs. Mirrored by kernels.Product. `bias` [out] or NULL. */
typedef struct {
    const uint16_t *packed;
    const uint16_t *bias;
    long in, out;
} Product;

enum { PANEL = 2 * LANES, TILE = 12 }; /* 12 rows by 32 outputs fill 24 of 32 registers with sums */

/* Whether there are products here at all: without the instruction torch's are faster. */
int tally_has_products(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

void tally_pack(long in, long out, const uint16_t *weight, uint16_t *packed) {
    for (long o = 0; o < (out + PANEL - 1) / PANEL * PANEL; o++)
        for (long i = 0; i < in; i++)
            packed[(o / PANEL * in / 2 + i / 2) * 2 * PANEL + o % PANEL * 2 + i % 2] = o < out ? weight[o * in + i] : 0;
}

#ifdef __AVX512BF16__
/* `rows` rows of x times one panel. Sums run over the inputs in order, whatever `rows` is. `wide`: the result, rounded
 * to bf16 all the same, is stored as fp32. */
INLINE void tile(const int rows, const uint16_t *x, long in, const uint16_t *panel, const uint16_t *bias, void *out,
                 long stride, long count, int wide) {
    __m512 acc[TILE][2];
    for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
    for (long i = 0; i < in; i += 2) {
        __m512bh low = (__m512bh)_mm512_loadu_si512(panel + i * PANEL);
        __m512bh high = (__m512bh)_mm512_loadu_si512(panel + i * PANEL + PANEL);
        for (int r = 0; r < rows; r++) {
            int pair;
            memcpy(&pair, x + r * in + i, 4);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            acc[r][0] = _mm512_dpbf16_ps(acc[r][0], low, both);
            acc[r][1] = _mm512_dpbf16_ps(acc[r][1], high, both);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) {
            uint16_t rounded[LANES];
            long left = count - half * LANES;
            if (left <= 0) continue;
            vf y = (vf)acc[r][half];
            if (bias) y += left >= LANES ? load(bias, half * LANES, 1) : load_tail(bias, half * LANES, left, 1);
            store(rounded, 0, y, 1);
            long n = left < LANES ? left : LANES, at = r * stride + half * LANES;
            if (!wide) memcpy((uint16_t *)out + at, rounded, (size_t)n * 2);
            else
                for (long i = 0; i < n; i++) ((float *)out)[at + i] = load1(rounded, i, 1);
        }
}

INLINE void product_rows(const Product *w, long rows, const uint16_t *x, void *out, int wide) {
    long blocks = (rows + TILE - 1) / TILE, size = blocks ? (rows + blocks - 1) / blocks : 0;
#pragma omp for
    for (long panel = 0; panel < (w->out + PANEL - 1) / PANEL; panel++) {
        const uint16_t *weights = w->packed + panel * w->in * PANEL, *bias = w->bias ? w->bias + panel * PANEL : NULL;
        long count = w->out - panel * PANEL < PANEL ? w->out - panel * PANEL : PANEL;
        for (long row = 0; row < rows; row += size) {
            const uint16_t *from = x + row * w->in;
            char *to = (char *)out + (row * w->out + panel * PANEL) * (wide ? 4 : 2);
            switch (rows - row < size ? rows - row : size) {
#define CASE(n) case n: tile(n, from, w->in, weights, bias, to, w->out, count, wide); break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
            }
        }
    }
}

/* out [rows, out] = x [rows, in] * w' + bias, in bf16, or `wide` as fp32. */
void tally_product(int threads, const Product *w, long rows, const uint16_t *x, void *out, int wide) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    product_rows(w, rows, x, out, wide);
}

/* One dense layer. Mirrored by kernels.LayerPointers. */
typedef struct {
    const void *input_norm, *q_norm, *k_norm, *mlp_norm;
    Product qkv, out, gate_up, down;
    void *kv;
} Layer;

/* Room for one batch. `x` and `y` [rows, hidden], `wide` [rows, most of qkv and gate_up], `narrow` [rows, most of
 * attended and gated], `scratch` [threads, max_context] fp32. Mirrored by kernels.Room. */
typedef struct {
    void *x, *y, *wide, *narrow;
    float *scratch;
} Room;

/* A whole forward of a dense model in bf16: rows of embed [vocab, hidden] in, final-normed hidden states in room.y. */
void tally_forward(const Shape *s, const Layer *layers, long count, long hidden, const void *embed, const void *norm,
                   long rows, const int64_t *ids, const int64_t *slots, const int64_t *positions, const Room *room) {
#pragma omp parallel num_threads(s->threads) if (s->threads > 1)
    {
        void *x = room->x, *y = room->y, *wide = room->wide, *narrow = room->narrow, *add = NULL;
#pragma omp for
        for (long row = 0; row < rows; row++)
            memcpy(row_of(x, row, hidden, 1), row_of(embed, ids[row], hidden, 1), (size_t)hidden * 2);
        for (const Layer *l = layers; l < layers + count; l++) {
            add_norm_rows(rows, hidden, s->eps, x, add, l->input_norm, y, 1);
            product_rows(&l->qkv, rows, y, wide, 0);
            attend_rows(s, rows, wide, l->q_norm, l->k_norm, slots, positions, l->kv, room->scratch, narrow, 1);
            product_rows(&l->out, rows, narrow, y, 0);
            add_norm_rows(rows, hidden, s->eps, x, y, l->mlp_norm, y, 1);
            product_rows(&l->gate_up, rows, y, wide, 0);
            silu_rows(rows, l->down.in, wide, narrow, 1);
            product_rows(&l->down, rows, narrow, y, 0);
            add = y;
        }
        add_norm_rows(rows, hidden, s->eps, x, add, norm, y, 1);
    }
}
#endif
