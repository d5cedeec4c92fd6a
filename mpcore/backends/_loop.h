/* The update: one loop that reads every number once and keeps it in registers until it is written.
 *
 * `_steps.h` says what a rule does to one element, and names a loop for each rule and format of
 * gradients and weights: `update_lanes`, with everything known that does not change from one element
 * to the next. A new way to keep masters or moments would be a format more.
 */

/* What a loop takes: `n` elements, a multiple of LANES; moments that the rule has none of are NULL. */
#define ELEMENTS                                                                                       \
    const void *restrict grad, float *restrict master, float *restrict moment0, float *restrict moment1, \
        float *restrict moment2, uint16_t *restrict weight, int64_t n, const float *restrict scalars,   \
        float coefficient, int streaming
#define PASSED_ON grad, master, moment0, moment1, moment2, weight, n, scalars, coefficient, streaming
#define MOST_MOMENTS 3
#define MOST_COLUMNS 16

/* Updates one element: returns the parameter, replaces moments. */
typedef float rule_t(float unscaled, float p, float *m, const float *s);
/* Updates elements; returns the bits of the largest magnitude that was rounded to a weight. If it is
 * CLAMPED or above, weights have to be written again. */
typedef uint32_t loop_t(ELEMENTS);

/* Gradients and weights that a loop is for. All others are widened to float32 gradients before. */
enum { NO_WEIGHTS, BOTH_FLOAT16 = FLOAT16, BOTH_BFLOAT16 = BFLOAT16, TO_FLOAT16, TO_BFLOAT16, FORMATS };

INLINE uint32_t update_lanes(rule_t *rule, int moments, int columns, int grad_dtype, int weight_dtype,
                             ELEMENTS) {
    const int grad_size = grad_dtype == FLOAT32 ? 4 : 2;
    float s[MOST_COLUMNS];
    for (int c = 0; c < columns; c++) s[c] = scalars[c];
    uint32_t largest[LANES] = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        float wide[LANES], updated[LANES];
        uint16_t rounded[LANES];
        ask_ahead((const char *)grad + grad_size * i);
        ask_ahead(master + i);
        if (moments > 0) ask_ahead(moment0 + i);
        if (moments > 1) ask_ahead(moment1 + i);
        if (moments > 2) ask_ahead(moment2 + i);
        if (CONVERTS(grad_dtype)) widen_lanes((const uint16_t *)grad + i, wide);
        /* The loop that becomes vectors; all else is in registers too. Because it makes a number of 16
         * bits, compilers take all LANES at once and load before they store: a third of the time, if
         * memory is waited for. Taken apart before, it would become no vectors at all. */
#pragma GCC unroll 1
        for (int j = 0; j < LANES; j++) {
            const int64_t k = i + j;
            const float x = CONVERTS(grad_dtype) ? wide[j] : load(grad_dtype, grad, k);
            float m[MOST_MOMENTS] = {0};
            if (moments > 0) m[0] = moment0[k];
            if (moments > 1) m[1] = moment1[k];
            if (moments > 2) m[2] = moment2[k];
            const float p = rule(x * coefficient, master[k], m, s);
            updated[j] = master[k] = p;
            if (moments > 0) moment0[k] = m[0];
            if (moments > 1) moment1[k] = m[1];
            if (moments > 2) moment2[k] = m[2];
            if (weight_dtype == FLOAT32) continue; /* the master is the weight */
            const uint32_t bits = bits_of(p), magnitude = bits & 0x7fffffffu;
            largest[j] = magnitude > largest[j] ? magnitude : largest[j];
            rounded[j] = CONVERTS(weight_dtype) ? (uint16_t)bits : nearest(weight_dtype, bits);
        }
        if (weight_dtype == FLOAT32) continue;
        if (CONVERTS(weight_dtype)) narrow_lanes(updated, rounded); /* over what is in there */
        if (streaming)
            stream_lanes(rounded, weight + i);
        else
            memcpy(weight + i, rounded, sizeof rounded);
    }
    uint32_t all = 0;
    for (int j = 0; j < LANES; j++) all = largest[j] > all ? largest[j] : all;
    return all;
}

/* LOOPS and SCALARS, and the MOMENTS, COLUMNS and NUMBERS of each: every rule of `mpcore.updates`. */
#include "_steps.h"

/* Elements and what they are updated with: the arguments of a loop. */
typedef struct {
    const void *grad;
    float *master, *moments[MOST_MOMENTS];
    uint16_t *weight;
    const float *scalars;
    float coefficient;
    int streaming;
} span_t;

static uint32_t call(loop_t *loop, const span_t *at, int64_t n) {
    return loop(at->grad, at->master, at->moments[0], at->moments[1], at->moments[2], at->weight, n,
                at->scalars, at->coefficient, at->streaming);
}

/* Updates fewer than LANES elements: copies of them, with zeros behind. */
static uint32_t update_rest(loop_t *loop, int moments, int grad_size, const span_t *at, int64_t n) {
    float grad[LANES] = {0}, master[LANES] = {0}, copies[MOST_MOMENTS][LANES] = {{0}};
    uint16_t weight[LANES];
    const size_t bytes = (size_t)n * sizeof(float);
    span_t here = {grad, master, {copies[0], copies[1], copies[2]}, weight, at->scalars, at->coefficient, 0};
    memcpy(grad, at->grad, (size_t)n * grad_size);
    memcpy(master, at->master, bytes);
    for (int i = 0; i < moments; i++) memcpy(copies[i], at->moments[i], bytes);
    const uint32_t largest = call(loop, &here, LANES);
    memcpy(at->master, master, bytes);
    for (int i = 0; i < moments; i++) memcpy(at->moments[i], copies[i], bytes);
    if (at->weight) memcpy(at->weight, weight, (size_t)n * sizeof *weight);
    return largest;
}

/* Updates `n` elements; returns what a loop does. */
static uint32_t update_elements(loop_t *loop, int moments, int grad_size, span_t at, int64_t n) {
    const int64_t rest = n % LANES, whole = n - rest;
    const uint32_t largest = call(loop, &at, whole);
    if (rest == 0) return largest;
    at.grad = (const char *)at.grad + grad_size * whole;
    at.master += whole;
    for (int i = 0; i < moments; i++) at.moments[i] += whole;
    if (at.weight) at.weight += whole;
    const uint32_t last = update_rest(loop, moments, grad_size, &at, rest);
    return last > largest ? last : largest;
}
