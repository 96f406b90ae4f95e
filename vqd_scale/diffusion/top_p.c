/* Top-p truncation of rows of probabilities without sorting them.

A row keeps each code before which, in descending order with ties in the order of their numbers, the sum of the
probabilities is less than `rate`; and at least one code. The bits of a float >= 0 grow with its value. So a
histogram over the leading bits shows in which bucket the sum crosses `rate`, and a second one, over the next
bits of that bucket's codes, leaves a few codes to sort. Example with rate 0.8:

  p = .5 .2 .15 .1 .05   sums before each = 0 .5 .7 .85 .95   kept: .5 .2 .15

`log_p`, `p` and `kept` are [rows, codes], dense. Dropped codes become -inf in `kept`. A row with NaN is copied.
A call computes the rows from `first` to `last`. It returns 0, or 1 where memory was short. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define COARSE 20
#define FINE 10
/* Probabilities are at most 1, whose leading bits are 1016; rounding may exceed 1 by a little. */
#define BUCKETS 1024

typedef struct {
    float chance;
    int32_t code;
} candidate;

/* Descending; ties in the order of their codes. */
static int compare(const void *first, const void *second) {
    const candidate *one = first, *two = second;
    if (one->chance != two->chance) return one->chance < two->chance ? 1 : -1;
    return one->code < two->code ? -1 : 1;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* The bucket in which `sum` plus the buckets from the last one down reaches `rate`, or -1. `sum` becomes the sum
of the buckets above it. */
static long crossing(const double *buckets, double *sum, double rate) {
    for (long bucket = BUCKETS - 1; bucket >= 0; bucket--) {
        if (buckets[bucket] > 0 && *sum + buckets[bucket] >= rate) return bucket;
        *sum += buckets[bucket];
    }
    return -1;
}

int top_p(const float *log_p, const float *p, float *kept, long first, long last, long codes, double rate) {
    candidate *candidates = malloc(codes * sizeof *candidates);
    double *buckets = malloc(2 * BUCKETS * sizeof *buckets);
    if (!candidates || !buckets) {
        free(candidates);
        free(buckets);
        return 1;
    }
    for (long row = first; row < last; row++) {
        const float *in = log_p + row * codes, *chance = p + row * codes;
        float *out = kept + row * codes;
        /* Two histograms: a sum would wait for the one before it in the same bucket. */
        memset(buckets, 0, 2 * BUCKETS * sizeof *buckets);
        uint32_t largest = 0;
        for (long code = 0; code < codes; code++) {
            const uint32_t bits = bits_of(chance[code]);
            largest = bits > largest ? bits : largest;
            buckets[(code & 1) * BUCKETS + (bits >> COARSE) % BUCKETS] += chance[code];
        }
        for (long bucket = 0; bucket < BUCKETS; bucket++) buckets[bucket] += buckets[BUCKETS + bucket];
        double sum = 0;
        const long coarse = crossing(buckets, &sum, rate);
        if (coarse < 0 || largest >> COARSE >= BUCKETS) {
            memcpy(out, in, codes * sizeof *out);
            continue;
        }
        memset(buckets, 0, BUCKETS * sizeof *buckets);
        for (long code = 0; code < codes; code++) {
            const uint32_t bits = bits_of(chance[code]);
            out[code] = (long)(bits >> COARSE) > coarse ? in[code] : -INFINITY;
            if ((long)(bits >> COARSE) == coarse) buckets[(bits >> FINE) % BUCKETS] += chance[code];
        }
        const long fine = crossing(buckets, &sum, rate);
        long count = 0;
        for (long code = 0; code < codes; code++) {
            const uint32_t bits = bits_of(chance[code]);
            if ((long)(bits >> COARSE) != coarse) continue;
            const long bucket = (bits >> FINE) % BUCKETS;
            if (bucket > fine) out[code] = in[code];
            if (bucket == fine) candidates[count++] = (candidate){chance[code], code};
        }
        int are_equal = 1;
        for (long place = 1; place < count; place++) are_equal &= candidates[place].chance == candidates[0].chance;
        if (!are_equal) qsort(candidates, count, sizeof *candidates, compare);
        for (long place = 0; place < count && (sum < rate || (sum == 0 && place == 0)); place++) {
            out[candidates[place].code] = in[candidates[place].code];
            sum += candidates[place].chance;
        }
    }
    free(candidates);
    free(buckets);
    return 0;
}
