/* softmax(q k^T) v and its gradient in float32 on a CPU, for heads of few features.

A head's scores are computed, used and forgotten a few queries at a time, so that neither pass keeps a matrix
of queries x keys. General matrix products lose most of a processor's peak where they add up only HEAD terms;
here a register holds one feature of WIDTH keys, and HEAD is known when this is compiled.

Keys and values are first laid out in panels of WIDTH keys, feature after feature: all that is needed of a few
keys lies side by side. Rows of 1,024 keys would be a power of two apart and drive each other out of the cache.

All arrays are [batch, tokens, heads, HEAD] and dense, `normalizer` is [batch, heads, queries] and holds
log(sum(exp(scores))). A call computes the heads from `first` to `last` of all batch x heads; calls for other
heads may run beside it. Each returns 0, or 1 where memory was short. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(WIDTH)
/* As the command says: a test asks for every width. */
#elif defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define QUERIES 6
#define PANELS 2
/* As many sums as leave registers for what is added. */
#define SUMS 12
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)

typedef float vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t whole __attribute__((vector_size(4 * WIDTH)));

static inline float total(vector x) {
    float sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += x[i];
    return sum;
}

/* The larger one, by element; x where x is NaN. */
static inline vector larger(vector x, vector y) {
    const whole below = x < y;
    return (vector)((below & (whole)y) | (~below & (whole)x));
}

/* e^x, relative error some 1e-7, for x <= 88; NaN stays NaN. 2^n times a polynomial (Cephes' expf). */
static inline vector exponential(vector x) {
    x = larger(x, (vector){} - 87.0f);
    /* Adding 1.5 * 2^23 leaves the nearest integer in the last bits. */
    vector n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vector y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    return y * (vector)((__builtin_convertvector(n, whole) + 127) << 23);
}

static inline long in_panel(long key, int feature) {
    return (key / WIDTH * HEAD + feature) * WIDTH + key % WIDTH;
}

static void to_panels(const float *rows, long stride, long keys, float *panels) {
    for (long key = 0; key < keys; key++)
        for (int d = 0; d < HEAD; d++) panels[in_panel(key, d)] = rows[key * stride + d];
}

static void from_panels(const float *panels, long stride, long keys, float *rows) {
    for (long key = 0; key < keys; key++)
        for (int d = 0; d < HEAD; d++) rows[key * stride + d] = panels[in_panel(key, d)];
}

/* products[b][u] = rows[b] . the keys of panel u */
static inline void products(float rows[QUERIES][HEAD], const vector *panel, vector tile[QUERIES][PANELS]) {
    vector sum[QUERIES][PANELS] = {};
    EACH(d, HEAD) {
        EACH(u, PANELS) {
            vector x = panel[u * HEAD + d];
            EACH(b, QUERIES) sum[b][u] += x * rows[b][d];
        }
    }
    EACH(b, QUERIES) EACH(u, PANELS) tile[b][u] = sum[b][u];
}

/* panel u += sum over b of weights[b][u] rows[b] */
static inline void add_outer(vector weights[QUERIES][PANELS], float rows[QUERIES][HEAD], vector *panel) {
    EACH(d, HEAD) {
        EACH(u, PANELS) {
            vector x = panel[u * HEAD + d];
            EACH(b, QUERIES) x += weights[b][u] * rows[b][d];
            panel[u * HEAD + d] = x;
        }
    }
}

/* row = factor * sum over keys of weights[key] panels[key] */
static inline void weighted_sum(const vector *weights, const vector *panels, long count, float factor, float *row) {
    for (int from = 0; from < HEAD; from += SUMS) {
        vector sum[SUMS] = {};
        const int features = HEAD - from < SUMS ? HEAD - from : SUMS;
        if (features == SUMS)
            for (long p = 0; p < count; p++) {
                EACH(d, SUMS) sum[d] += weights[p] * panels[p * HEAD + from + d];
            }
        else
            for (long p = 0; p < count; p++) {
                EACH(d, HEAD % SUMS) sum[d] += weights[p] * panels[p * HEAD + from + d];
            }
        for (int d = 0; d < features; d++) row[from + d] = factor * total(sum[d]);
    }
}

/* Keys that are there only to fill the last panels are no keys. Hidden at -inf they weigh e^-87 of the highest,
which no sum here can tell from nothing. */
static void hide_padding(vector tile[QUERIES][PANELS], long panel, long keys, float value) {
    for (int u = 0; u < PANELS; u++)
        for (int w = 0; w < WIDTH; w++)
            if ((panel + u) * WIDTH + w >= keys)
                for (int b = 0; b < QUERIES; b++) tile[b][u][w] = value;
}

static long padded_keys(long keys) {
    const long step = WIDTH * PANELS;
    return (keys + step - 1) / step * step;
}

static void forward_head(const float *q, const float *k, const float *v, float *o, float *normalizer, long stride,
                         long queries, long keys, float scale, float *memory) {
    const long padded = padded_keys(keys), count = padded / WIDTH;
    float *kp = memory, *vp = kp + padded * HEAD, *scores = vp + padded * HEAD;
    to_panels(k, stride, keys, kp);
    to_panels(v, stride, keys, vp);
    for (long i = 0; i < queries; i += QUERIES) {
        const int rows_left = queries - i < QUERIES ? (int)(queries - i) : QUERIES;
        float rows[QUERIES][HEAD];
        for (int b = 0; b < QUERIES; b++)
            for (int d = 0; d < HEAD; d++) rows[b][d] = scale * q[(i + (b < rows_left ? b : 0)) * stride + d];
        vector tops[QUERIES];
        for (int b = 0; b < QUERIES; b++) tops[b] = (vector){} - INFINITY;
        for (long p = 0; p < count; p += PANELS) {
            vector tile[QUERIES][PANELS];
            products(rows, (const vector *)kp + p * HEAD, tile);
            if ((p + PANELS) * WIDTH > keys) hide_padding(tile, p, keys, -INFINITY);
            EACH(b, QUERIES) EACH(u, PANELS) {
                tops[b] = larger(tile[b][u], tops[b]);
                ((vector *)(scores + b * padded))[p + u] = tile[b][u];
            }
        }
        for (int b = 0; b < rows_left; b++) {
            float *row = scores + b * padded;
            vector *row_vectors = (vector *)row;
            float top = tops[b][0];
            for (int w = 1; w < WIDTH; w++) top = tops[b][w] > top ? tops[b][w] : top;
            vector sums = {};
            for (long p = 0; p < count; p++) {
                row_vectors[p] = exponential(row_vectors[p] - top);
                sums += row_vectors[p];
            }
            const float sum = total(sums);
            normalizer[i + b] = top + logf(sum);
            weighted_sum(row_vectors, (const vector *)vp, count, 1 / sum, o + (i + b) * stride);
        }
    }
}

static void backward_head(const float *q, const float *k, const float *v, const float *o, const float *normalizer,
                          const float *go, float *gq, float *gk, float *gv, long stride, long queries, long keys,
                          float scale, float *memory) {
    const long padded = padded_keys(keys), count = padded / WIDTH;
    float *kp = memory, *vp = kp + padded * HEAD, *gkp = vp + padded * HEAD, *gvp = gkp + padded * HEAD;
    float *slopes = gvp + padded * HEAD;
    to_panels(k, stride, keys, kp);
    to_panels(v, stride, keys, vp);
    memset(gkp, 0, sizeof(float) * 2 * padded * HEAD);
    for (long i = 0; i < queries; i += QUERIES) {
        const int rows_left = queries - i < QUERIES ? (int)(queries - i) : QUERIES;
        float rows[QUERIES][HEAD], gradients[QUERIES][HEAD], mean[QUERIES] = {}, norm[QUERIES];
        for (int b = 0; b < QUERIES; b++) {
            const long from = (i + (b < rows_left ? b : 0)) * stride;
            norm[b] = normalizer[i + (b < rows_left ? b : 0)];
            for (int d = 0; d < HEAD; d++) {
                rows[b][d] = scale * q[from + d];
                gradients[b][d] = b < rows_left ? go[from + d] : 0;
                mean[b] += gradients[b][d] * o[from + d];
            }
        }
        for (long p = 0; p < count; p += PANELS) {
            vector weights[QUERIES][PANELS], slope[QUERIES][PANELS];
            products(rows, (const vector *)kp + p * HEAD, weights);
            EACH(b, QUERIES) EACH(u, PANELS) weights[b][u] = exponential(weights[b][u] - norm[b]);
            if ((p + PANELS) * WIDTH > keys) hide_padding(weights, p, keys, 0);
            add_outer(weights, gradients, (vector *)gvp + p * HEAD);
            products(gradients, (const vector *)vp + p * HEAD, slope);
            EACH(b, QUERIES) EACH(u, PANELS) {
                slope[b][u] = weights[b][u] * (slope[b][u] - mean[b]);
                ((vector *)(slopes + b * padded))[p + u] = slope[b][u];
            }
            add_outer(slope, rows, (vector *)gkp + p * HEAD);
        }
        for (int b = 0; b < rows_left; b++)
            weighted_sum((vector *)(slopes + b * padded), (const vector *)kp, count, scale, gq + (i + b) * stride);
    }
    from_panels(gkp, stride, keys, gk);
    from_panels(gvp, stride, keys, gv);
}

static float *memory_for(long keys, int panels) {
    /* Zeros, since the padding of the panels counts for nothing only if it is finite. */
    const size_t bytes = sizeof(float) * padded_keys(keys) * (panels * HEAD + QUERIES);
    float *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory) memset(memory, 0, bytes);
    return memory;
}

int forward(const float *q, const float *k, const float *v, float *o, float *normalizer, long first, long last,
            long heads, long queries, long keys, float scale) {
    float *memory = memory_for(keys, 2);
    if (!memory) return 1;
    const long stride = heads * HEAD;
    for (long x = first; x < last; x++) {
        const long at_q = x / heads * queries * stride + x % heads * HEAD;
        const long at_k = x / heads * keys * stride + x % heads * HEAD;
        forward_head(q + at_q, k + at_k, v + at_k, o + at_q, normalizer + x * queries, stride, queries, keys, scale,
                     memory);
    }
    free(memory);
    return 0;
}

int backward(const float *q, const float *k, const float *v, const float *o, const float *normalizer,
             const float *go, float *gq, float *gk, float *gv, long first, long last, long heads, long queries,
             long keys, float scale) {
    float *memory = memory_for(keys, 4);
    if (!memory) return 1;
    const long stride = heads * HEAD;
    for (long x = first; x < last; x++) {
        const long at_q = x / heads * queries * stride + x % heads * HEAD;
        const long at_k = x / heads * keys * stride + x % heads * HEAD;
        backward_head(q + at_q, k + at_k, v + at_k, o + at_q, normalizer + x * queries, go + at_q, gq + at_q,
                      gk + at_k, gv + at_k, stride, queries, keys, scale, memory);
    }
    free(memory);
    return 0;
}
