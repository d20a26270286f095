/* Seeded sampling by the rule of protocol/sampling.py, and the fingerprints of protocol/transcript.py. */
#include "kernels.h"

INLINE vu mix(vu x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ (x >> 16);
}

/* The words of ids first..first + 15 and their Gumbel values; see protocol/sampling.py. */
INLINE vu words(long first, uint32_t k0, uint32_t k1) {
    const vu lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return mix(mix((lanes + (uint32_t)first) ^ k0) + k1);
}

/* At least the Gumbel value of each word, for a tenth of the work: -log(-log(1 - v)) <= -log(v), and v is at least
 * the power of two below the word. The last term covers rounding. */
INLINE vf gumbel_at_most(vu word) {
    vi exponent = ((vi)__builtin_convertvector(word, vf) >> 23) - 127;
    return (32.0f - __builtin_convertvector(exponent, vf)) * 0.69314718f + 1e-3f;
}

INLINE vf gumbel(vu word) {
    vf v = __builtin_convertvector(word, vf) * 0x1p-32f + 0x1p-33f;
    v = pick(v > 0x1.fffffep-1f, splat(0x1.fffffep-1f), v);
    vf u = 1.0f - v; /* -log(1 - v) by Kahan's correction, which keeps the digits of a small v */
    vi same = u == 1.0f;
    vf e = pick(same, v, log_(u) * v / (u - pick(same, splat(2.0f), splat(1.0f))));
    return -log_(e);
}

/* The best of each lane so far, with its id. */
typedef struct {
    vf value;
    vi id;
} Best;

INLINE void offer(Best *best, vf value, vi id) {
    vi more = value > best->value;
    best->value = pick(more, value, best->value);
    best->id = (more & id) | (~more & best->id);
}

/* The id of the best, the lowest on ties. -1 when nothing beats -inf. */
INLINE long winner(const Best *best) {
    long id = -1;
    float value = -INFINITY;
    for (int i = 0; i < LANES; i++)
        if (best->value[i] > value || (best->value[i] == value && id >= 0 && best->id[i] < id)) {
            value = best->value[i];
            id = best->id[i];
        }
    return id;
}

INLINE vf tail(const float *x, long at, long count) {
    vf v = splat(-INFINITY);
    for (long i = 0; at + i < count && i < LANES; i++) v[i] = x[at + i];
    return v;
}

INLINE vf some(const float *x, long at, long count) {
    return at + LANES <= count ? load(x, at, 0) : tail(x, at, count);
}

INLINE int any(vi mask) {
    int32_t m[LANES];
    memcpy(m, &mask, sizeof m);
    int found = 0;
    for (int i = 0; i < LANES; i++) found |= m[i];
    return found;
}

/* Argmax of logit + temperature * noise over tokens with a logit above `edge`. Noise is computed only where it could
 * beat the best score so far, which is for one block in dozens. */
static long best_score(const float *logits, long vocab, float temperature, const uint32_t *keys, float edge) {
    const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Best best = {splat(-INFINITY), {0}};
    float bar = -INFINITY;
    for (long i = 0; i < vocab; i += LANES) {
        vf x = some(logits, i, vocab), y = x;
        if (temperature > 0) {
            vu word = words(i, keys[0], keys[1]);
            if (!any((x + temperature * gumbel_at_most(word) >= bar) & (x > edge))) continue;
            y = x + temperature * gumbel(word);
        }
        offer(&best, pick(x > edge, y, splat(-INFINITY)), lanes + (int32_t)i);
        if (temperature > 0) bar = largest(best.value);
    }
    return winner(&best);
}

/* log of the sum of exp(x * scale), with the largest x in `top`. */
static double log_sum(const float *x, long count, float scale, float *top) {
    vf high = splat(-INFINITY), acc = {0};
    for (long i = 0; i < count; i += LANES) high = maximum(high, some(x, i, count));
    *top = largest(high);
    for (long i = 0; i < count; i += LANES) acc += exp_((some(x, i, count) - *top) * scale);
    return log((double)sum(acc)) + (double)*top * scale;
}

/* Whether the tokens above `edge` shut a token at it out of the nucleus. `self`: one that does not count, or -1. */
static int outside(const float *logits, long vocab, float edge, long self, float scale, double total, long top_k,
                   double top_p) {
    vi count = {0};
    vf acc = {0};
    for (long i = 0; i < vocab; i += LANES) {
        vf x = some(logits, i, vocab);
        vi above = x > edge;
        count -= above;
        acc += pick(above, exp_(x * scale - (float)total), splat(0.0f));
    }
    long larger = 0;
    double mass = (double)sum(acc);
    for (int i = 0; i < LANES; i++) larger += count[i];
    if (self >= 0 && logits[self] > edge) {
        larger--;
        mass -= (double)exp_(splat(logits[self] * scale - (float)total))[0];
    }
    return larger && (larger >= top_k || mass >= top_p);
}

/* out[r] = the token of row r by the rule of protocol/sampling.py, 0 where every logit is -inf or NaN. logits [rows,
 * vocab] fp32; keys [rows, 2]; top_k vocab or more and top_p 2 are no cut. */
void tally_choose(int threads, long rows, long vocab, const float *logits, const uint32_t *keys,
                  const float *temperature, const int64_t *top_k, const double *top_p, int64_t *out) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 1)
    for (long row = 0; row < rows; row++) {
        const float *x = logits + row * vocab;
        long chosen = best_score(x, vocab, temperature[row], keys + 2 * row, -INFINITY);
        if (temperature[row] > 0 && (top_k[row] < vocab || top_p[row] < 2)) {
            float top, scale = 1.0f / temperature[row];
            double total = log_sum(x, vocab, scale, &top);
            while (chosen >= 0 && outside(x, vocab, x[chosen], -1, scale, total, top_k[row], top_p[row]))
                chosen = best_score(x, vocab, temperature[row], keys + 2 * row, x[chosen]);
        }
        out[row] = chosen < 0 ? 0 : chosen;
    }
}

/* The best two scores of a row and the id of the first, -1 when nothing beats -inf. */
typedef struct {
    float first, second;
    long id;
} Two;

/* The second largest of the lanes' best scores and of those that came second in a lane. */
INLINE float runner_up(vf best, vf second) {
    float high = -INFINITY, next = largest(second);
    for (int i = 0; i < LANES; i++) {
        if (best[i] > high) {
            next = high > next ? high : next;
            high = best[i];
        } else if (best[i] > next) next = best[i];
    }
    return next;
}

static Two best_two(const float *logits, long vocab, float temperature, const uint32_t *keys) {
    const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Best best = {splat(-INFINITY), {0}};
    vf second = splat(-INFINITY);
    float bar = -INFINITY;
    for (long i = 0; i < vocab; i += LANES) {
        vf y = some(logits, i, vocab);
        if (temperature > 0) {
            vu word = words(i, keys[0], keys[1]);
            if (!any(y + temperature * gumbel_at_most(word) >= bar)) continue;
            y += temperature * gumbel(word);
        }
        second = maximum(second, pick(y > best.value, best.value, y));
        offer(&best, y, lanes + (int32_t)i);
        if (temperature > 0) bar = runner_up(best.value, second);
    }
    return (Two){largest(best.value), runner_up(best.value, second), winner(&best)};
}

static float score_of(const float *logits, long vocab, long id, float temperature, const uint32_t *keys) {
    long first = id - id % LANES;
    vf y = some(logits, first, vocab);
    if (temperature > 0) y += temperature * gumbel(words(first, keys[0], keys[1]));
    return y[id - first];
}

/* The margin of `chosen` where a cut may apply: rivals that are outside even of a narrower nucleus do not count. */
static float margin_inside(const float *x, long vocab, const uint32_t *keys, float temperature, long top_k,
                           double top_p, long chosen, long rival, float edge_logit, double edge_mass) {
    float top, scale = 1.0f / temperature, score = score_of(x, vocab, chosen, temperature, keys);
    double total = log_sum(x, vocab, scale, &top);
    if (outside(x, vocab, x[chosen] + edge_logit, -1, scale, total, top_k, top_p + edge_mass)) return INFINITY;
    while (rival >= 0 && rival != chosen) {
        float lead = score_of(x, vocab, rival, temperature, keys) - score;
        if (!(lead > 0)) return 0;
        if (!outside(x, vocab, x[rival] - edge_logit, rival, scale, total, top_k, top_p - edge_mass)) return lead;
        rival = best_score(x, vocab, temperature, keys, x[rival]);
    }
    return 0;
}

/* out [rows, 2] = margin of chosen[r] by the rule of protocol/sampling.py, and best score minus second best. Arguments
 * as of tally_choose; edge_* are the tolerances of the rule. */
void tally_look_back(int threads, long rows, long vocab, const float *logits, const uint32_t *keys,
                     const float *temperature, const int64_t *top_k, const double *top_p, const int64_t *chosen,
                     float edge_logit, double edge_mass, float *out) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows > 1)
    for (long row = 0; row < rows; row++) {
        const float *x = logits + row * vocab;
        const uint32_t *words = keys + 2 * row;
        float warm = temperature[row];
        Two two = best_two(x, vocab, warm, words);
        float margin = two.id == chosen[row] ? 0 : two.first - score_of(x, vocab, chosen[row], warm, words);
        if (warm > 0 && (top_k[row] < vocab || top_p[row] < 2))
            margin = margin_inside(x, vocab, words, warm, top_k[row], top_p[row], chosen[row], two.id, edge_logit,
                                   edge_mass);
        out[2 * row] = margin;
        out[2 * row + 1] = two.first - two.second;
    }
}

/* out[r] = log-probability of chosen[r] under the plain softmax of row r. logits [rows, vocab] fp32. */
void tally_logprob(int threads, long rows, long vocab, const float *logits, const int64_t *chosen, float *out) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * vocab >= PARALLEL_NUMBERS)
    for (long row = 0; row < rows; row++) {
        const float *x = logits + row * vocab;
        float top;
        double total = log_sum(x, vocab, 1.0f, &top);
        out[row] = (float)((double)x[chosen[row]] - total);
    }
}

INLINE void project(const void *hidden, const uint8_t *signs, long width, float *out, int bf16) {
    vf acc[8];
    for (int k = 0; k < 8; k++) acc[k] = (vf){0};
    for (long i = 0; i < width; i += LANES) {
        vf h = i + LANES <= width ? load(hidden, i, bf16) : load_tail(hidden, i, width - i, bf16);
        vu bits = {0};
        if (i + LANES <= width) bits = __builtin_convertvector(*(const vb *)(signs + i), vu);
        else
            for (long j = 0; i + j < width; j++) bits[j] = signs[i + j];
        for (int k = 0; k < 8; k++) acc[k] += (vf)((vu)h ^ (~(bits >> k) << 31));
    }
    for (int k = 0; k < 8; k++) out[k] = sum(acc[k]) / sqrtf((float)width);
}

/* To fp16, nearest, ties to even, held within its range, big-endian. */
static void put_half(float x, uint8_t *out) {
    uint32_t bits;
    x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
    memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu, half;
    if (size > 0x7F800000u) half = 0x7E00u; /* NaN */
    else if (size < 0x38800000u) {          /* subnormal: let the sum round */
        float small, magic = 0.5f;
        memcpy(&small, &size, 4);
        small += magic;
        memcpy(&half, &small, 4);
        half -= 0x3F000000u;
    } else half = (size - 0x38000000u + 0xFFFu + (size >> 13 & 1u)) >> 13;
    half |= sign;
    out[0] = (uint8_t)(half >> 8);
    out[1] = (uint8_t)half;
}

/* out [rows, 18] bytes, 9 fp16: log-probability of chosen[r] under the plain softmax, then hidden [rows, width]
 * projected by signs [rows, width], whose bit k says that row k of the matrix is +1 there. */
void tally_fingerprint(int bf16, int threads, long rows, long vocab, long width, const float *logits,
                       const void *hidden, const int64_t *chosen, const uint8_t *signs, uint8_t *out) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * vocab >= PARALLEL_NUMBERS)
    for (long row = 0; row < rows; row++) {
        const float *x = logits + row * vocab;
        float top;
        double total = log_sum(x, vocab, 1.0f, &top);
        float values[9] = {(float)((double)x[chosen[row]] - total)};
        if (bf16) project(row_of(hidden, row, width, 1), signs + row * width, width, values + 1, 1);
        else project(row_of(hidden, row, width, 0), signs + row * width, width, values + 1, 0);
        for (int k = 0; k < 9; k++) put_half(values[k], out + 18 * row + 2 * k);
    }
}
