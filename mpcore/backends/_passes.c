/* Passes of the compiled backend. `_c_command.py` compiles this file; `_steps.h` is generated.
 *
 * Tensors come as arrays of addresses, work as a table of chunks that threads take from a shared
 * counter: which thread gets which chunk shows in no bit.
 *
 * Memory is read once and written once. Built without contraction and without -ffast-math: the bits
 * are those of IEEE arithmetic, whatever processor it was built for.
 */
#include "_numbers.h"
#include "_stores.h"

#define BLOCK 512 /* elements that stay in the first-level cache */

typedef struct {
    int64_t tensor, start, stop; /* elements */
} chunk_t;

/* What the threads of a pass share; `_c_work.py` has the same fields. */
typedef struct {
    int64_t next, count; /* chunks */
    const chunk_t *chunks;
    const void *const *grads; /* of `grad_dtype` */
    double *sums;             /* of `square_sums`: [count] */
    int64_t *counts;          /* of `count_values`: [count][COUNTS] */
    void *const *masters;     /* from here on of `update`; as `store` keeps them */
    void *const *moments;     /* [moments][tensors], as `moment_stores` keep them */
    float *const *scales;     /* [moments][tensors], of moments in 8 bits */
    uint16_t *const *weights; /* of `weight_dtype`; NULL: the masters are the weights */
    const float *scalars;     /* [tensors][columns] */
    int64_t *saturated;
    int64_t *edits; /* [tensors][2], of `adopt`, and of `update` unless it is NULL */
    const draws_t *draws;            /* [tensors] */
    const int64_t *offsets, *rows;   /* [tensors]: place in the full tensor; elements of a row, or 0 */
    int64_t tensors;
    int32_t step; /* its place in STEPS */
    int32_t grad_dtype, weight_dtype, store, moment_stores[3];
    int32_t words; /* bit i: word i of random bits is needed */
    float coefficient;
    int32_t streaming; /* whether weights go around the caches */
} work_t;

/* Returns the number of a chunk that nobody has taken, or at least `count`. */
static inline int64_t take(work_t *work) {
    return __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
}

/* Returns elements `at` to `at + n` of a gradient in float32: where they are, or in `room`. */
static const float *widened(const work_t *work, int64_t tensor, int64_t at, int64_t n, float *room) {
    if (work->grad_dtype == FLOAT32) return (const float *)work->grads[tensor] + at;
    const uint16_t *from = (const uint16_t *)work->grads[tensor] + at;
    if (work->grad_dtype == FLOAT16)
        widen_float16(from, room, n);
    else
        widen_bfloat16(from, room, n);
    return room;
}

/* Returns the sum of squares of BLOCK elements. Squares are float32, exact of 16-bit numbers, and added
 * in float64: however gradients are cut into shards and chunks, norms round to the same float32. */
INLINE double squares_of(int dtype, const void *from) {
    enum { STRIDE = 64, SUMS = 16 };
    const int size = dtype == FLOAT32 ? 4 : 2;
    double sums[SUMS] = {0}, sum = 0;
    for (int i = 0; i < BLOCK; i += STRIDE) {
        float wide[STRIDE];
        for (int b = 0; b < size * STRIDE; b += 64) ask_ahead((const char *)from + size * i + b);
        if (CONVERTS(dtype))
            for (int j = 0; j < STRIDE; j += LANES) widen_lanes((const uint16_t *)from + i + j, wide + j);
        for (int k = 0; k < STRIDE; k += SUMS)
            for (int j = 0; j < SUMS; j++) {
                const float x = CONVERTS(dtype) ? wide[k + j] : load(dtype, from, i + k + j);
                const float square = x * x;
                sums[j] += (double)square;
            }
    }
    for (int j = 0; j < SUMS; j++) sum += sums[j];
    return sum;
}

LOOP double squares_of_float32(const void *from) { return squares_of(FLOAT32, from); }
LOOP double squares_of_float16(const void *from) { return squares_of(FLOAT16, from); }
LOOP double squares_of_bfloat16(const void *from) { return squares_of(BFLOAT16, from); }

/* Returns the sum of squares of at most BLOCK elements. */
static double block_squares(const work_t *work, int64_t tensor, int64_t at, int64_t n) {
    const uint16_t *halves = (const uint16_t *)work->grads[tensor] + at;
    if (n == BLOCK && work->grad_dtype == FLOAT16) return squares_of_float16(halves);
    if (n == BLOCK && work->grad_dtype == BFLOAT16) return squares_of_bfloat16(halves);
    float room[BLOCK];
    const float *grad = widened(work, tensor, at, n, room);
    if (n == BLOCK) return squares_of_float32(grad);
    if (grad != room) memcpy(room, grad, (size_t)n * sizeof *grad);
    memset(room + n, 0, (size_t)(BLOCK - n) * sizeof *room);
    return squares_of_float32(room);
}

/* Writes the sum of squares of each chunk. */
void square_sums(work_t *work) {
    for (int64_t k; (k = take(work)) < work->count;) {
        const chunk_t chunk = work->chunks[k];
        double sum = 0;
        for (int64_t at = chunk.start; at < chunk.stop; at += BLOCK) {
            const int64_t n = chunk.stop - at < BLOCK ? chunk.stop - at : BLOCK;
            sum += block_squares(work, chunk.tensor, at, n);
        }
        work->sums[k] = sum;
    }
}

/* What `sum_up` reads and writes; `_c_inspection.py` has the same fields. */
typedef struct {
    const chunk_t *chunks;
    const double *sums; /* [count], of the chunks */
    int64_t count, tensors;
    double coefficient, bounds[4];
    double *squares;    /* from here on [tensors] */
    int64_t *first_bad;
    int32_t *kinds;
} totals_t;

/* Sums the unscaled squares of each tensor from those of its chunks, and says that none of its values is
 * bad. Returns how many chunks have to be looked at again: `conclude` in `_cpu_inspection.py` says why. */
int64_t sum_up(const totals_t *of) {
    const double coefficient = of->coefficient, *bounds = of->bounds;
    int64_t unknown = 0;
    for (int64_t i = 0; i < of->tensors; i++) of->squares[i] = 0, of->first_bad[i] = -1, of->kinds[i] = 0;
    for (int64_t k = 0; k < of->count; k++) {
        const double sum = of->sums[k], length = sqrt(sum) * fabs(coefficient);
        unknown += !(sum > bounds[0] && sum < bounds[1] && length > bounds[2] && length < bounds[3]);
        of->squares[of->chunks[k].tensor] += sum * coefficient * coefficient;
    }
    return unknown;
}

/* What `count_values` writes for a chunk: values by the exponent of float32, zeros, and the bits of
 * the largest finite magnitude. */
enum { ZEROS = 256, LARGEST, COUNTS };

/* Counts the values of each chunk. */
void count_values(work_t *work) {
    for (int64_t k; (k = take(work)) < work->count;) {
        const chunk_t chunk = work->chunks[k];
        int64_t *counts = work->counts + COUNTS * k;
        uint32_t tables[4][256] = {{0}}; /* in turn: a counter is not read just after it was written */
        uint32_t zeros = 0, largest = 0;
        for (int64_t at = chunk.start; at < chunk.stop; at += BLOCK) {
            int64_t n = chunk.stop - at < BLOCK ? chunk.stop - at : BLOCK;
            float room[BLOCK];
            const float *grad = widened(work, chunk.tensor, at, n, room);
            for (int64_t i = 0; i < n; i++) {
                uint32_t magnitude = bits_of(grad[i]) & 0x7fffffffu;
                uint32_t finite = magnitude & mask_of(magnitude < 0x7f800000u);
                zeros += magnitude == 0;
                largest = finite > largest ? finite : largest;
            }
            for (int64_t i = 0; i < n; i++) tables[i & 3][bits_of(grad[i]) >> 23 & 0xff]++;
        }
        for (int i = 0; i < 256; i++)
            counts[i] = (int64_t)tables[0][i] + tables[1][i] + tables[2][i] + tables[3][i];
        counts[ZEROS] = zeros;
        counts[LARGEST] = largest;
    }
}

/* Computes the scalars of one tensor: see `fill_scalars`. */
typedef void scalars_t(const double *numbers, double t, float *scalars);

/* `mpcore.updates.rule.power`: multiplications in its order. */
static double power(double base, double exponent) {
    double result = 1;
    for (int64_t bits = (int64_t)exponent; bits > 0; bits >>= 1) {
        if (bits & 1) result *= base;
        base *= base;
    }
    return result;
}

#include "_adopt.h"
#include "_sample.h"
#include "_loop.h"
#include "_tiles.h"

/* Fills the scalars of tensors, [tensors][columns], for their next update.
 *
 * `numbers` holds the hyper-parameters of each param group, `counts` the updates that each tensor has
 * had; NULL: nobody counts. Neighbours that share both share what is computed. */
void fill_scalars(int32_t step, int64_t tensors, const int64_t *groups, const double *numbers,
                  const float *counts, float *scalars) {
    const int columns = COLUMNS[step];
    for (int64_t i = 0; i < tensors; i++, scalars += columns) {
        const int same = i > 0 && groups[i] == groups[i - 1] && (!counts || counts[i] == counts[i - 1]);
        if (same)
            memcpy(scalars, scalars - columns, columns * sizeof *scalars);
        else
            SCALARS[step](numbers + NUMBERS[step] * groups[i], counts ? (double)counts[i] + 1 : 1, scalars);
    }
}

/* Counts an update of each tensor. */
void count_steps(float *counts, int64_t tensors) {
    for (int64_t i = 0; i < tensors; i++) counts[i] += 1;
}

/* What moves a loss scale; `_c_scale.py` has the same fields. */
typedef struct {
    float *scale;
    int32_t *growth_tracker, *overflows_left;
    int64_t *counters;
    double growth_factor, backoff_factor;
    float min_scale, max_scale;
    int64_t growth_interval, few, of_steps;
    int32_t hysteresis, refill;
} move_t;

/* `update_scale_` of the reference backend. */
void move_scale(const move_t *move, int32_t bad) {
    int64_t *counters = move->counters; /* steps, skipped, in a row, at the minimum, since, overflows */
    counters[0] += 1;
    counters[1] += bad;
    counters[2] = (counters[2] + 1) * bad;
    const int64_t since = counters[4] + 1, overflows = counters[5] + bad;
    int32_t left = *move->overflows_left - bad;
    if (left < 0) left = 0;
    const int32_t tracker = bad ? 0 : *move->growth_tracker + 1;
    const int grow = tracker >= move->growth_interval;
    const float scale = *move->scale;
    float lower = (float)(scale * move->backoff_factor), higher = (float)(scale * move->growth_factor);
    if (lower < move->min_scale) lower = move->min_scale;
    if (higher > move->max_scale) higher = move->max_scale;
    const int backs_off = bad && left == 0 && overflows * move->of_steps >= since * move->few;
    counters[3] += backs_off && scale <= move->min_scale;
    const int moves = grow || backs_off;
    counters[4] = moves ? 0 : since;
    counters[5] = moves ? 0 : overflows;
    *move->scale = grow ? higher : backs_off ? lower : scale;
    *move->growth_tracker = grow ? 0 : tracker;
    const int full = grow || ((move->refill & 1) && !bad) || ((move->refill & 2) && backs_off);
    *move->overflows_left = full ? move->hysteresis : left;
}

/* Elements after which the largest weight is looked at. */
#define SPAN 4096

/* Makes weights that others wrote to masters. */
static void adopt_tile(const work_t *work, tile_t tile) {
    float *master = (float *)work->masters[tile.tensor] + tile.at;
    const uint16_t *weight = work->weights[tile.tensor] + tile.at;
    const int narrow = work->weight_dtype == FLOAT16;
    const int64_t whole = tile.n - tile.n % LANES;
    const int fits = (narrow ? all_fit_float16 : all_fit_bfloat16)(master, weight, whole);
    const int64_t first = fits ? whole : 0;
    uint32_t counts[2] = {0};
    (narrow ? adopt_float16 : adopt_bfloat16)(weight + first, master + first, tile.n - first, counts);
    for (int i = 0; i < 2; i++)
        if (counts[i]) __atomic_fetch_add(work->edits + 2 * tile.tensor + i, counts[i], __ATOMIC_RELAXED);
}

/* Returns the tile that begins at an element of a chunk: no block of moments in 8 bits reaches into two. */
static tile_t tile_at(const work_t *work, chunk_t chunk, int64_t at) {
    const int64_t row = work->rows ? work->rows[chunk.tensor] : 0;
    int64_t n = chunk.stop - at < TILE ? chunk.stop - at : TILE;
    if (row && row - at % row < n) n = row - at % row;
    return (tile_t){chunk.tensor, at, n};
}

/* Returns the elements of a chunk that begin at one of them, at most SPAN. */
static tile_t span_at(chunk_t chunk, int64_t at) {
    return (tile_t){chunk.tensor, at, chunk.stop - at < SPAN ? chunk.stop - at : SPAN};
}

/* Makes weights that others wrote to masters, chunk by chunk. */
void adopt(work_t *work) {
    for (int64_t k; (k = take(work)) < work->count;) {
        const chunk_t chunk = work->chunks[k];
        for (int64_t at = chunk.start; at < chunk.stop; at += SPAN) adopt_tile(work, span_at(chunk, at));
    }
}

/* Updates elements that are kept in float32 alone; returns how many weights were clamped. */
static int64_t update_span(const work_t *work, tile_t span_of) {
    const int64_t tensor = span_of.tensor, at = span_of.at, n = span_of.n;
    const int step = work->step, moments = MOMENTS[step], dtype = work->weight_dtype;
    const int alike = work->weights && work->grad_dtype == dtype;
    const int format = !work->weights ? NO_WEIGHTS : alike ? dtype : dtype + TO_FLOAT16 - FLOAT16;
    float room[SPAN];
    span_t span = {.master = (float *)work->masters[tensor] + at};
    span.grad = alike ? (const uint16_t *)work->grads[tensor] + at
                      : (const void *)widened(work, tensor, at, n, room);
    for (int i = 0; i < moments; i++) span.moments[i] = (float *)work->moments[i * work->tensors + tensor] + at;
    if (work->weights) span.weight = work->weights[tensor] + at;
    span.scalars = work->scalars + COLUMNS[step] * tensor;
    span.coefficient = work->coefficient;
    span.streaming = work->streaming && ((uintptr_t)span.weight & 31) == 0;

    const uint32_t largest = update_elements(LOOPS[step][format], moments, alike ? 2 : 4, span, n);
    if (!work->weights || largest < CLAMPED(dtype)) return 0;
    fence(); /* after what went around the caches */
    return (dtype == FLOAT16 ? narrow_float16 : narrow_bfloat16)(span.master, span.weight, n);
}

/* Whether masters and moments lie in memory as float32 numbers. */
static int all_float32(const work_t *work) {
    int all = work->store == FLOAT32_MASTERS;
    for (int i = 0; i < MOMENTS[work->step]; i++) all = all && work->moment_stores[i] == FLOAT32_MOMENTS;
    return all;
}

/* Updates chunks of masters, moments and weights; counts the weights that were clamped. Before, weights
 * that others wrote to become masters if `edits` asks for it: the update finds both in the cache. */
void update(work_t *work) {
    const int wide = all_float32(work);
    int64_t clamped = 0;
    room_t room;
    for (int64_t k; (k = take(work)) < work->count;) {
        const chunk_t chunk = work->chunks[k];
        tile_t tile;
        for (int64_t at = chunk.start; at < chunk.stop; at += tile.n) {
            tile = wide ? span_at(chunk, at) : tile_at(work, chunk, at);
            if (work->edits) adopt_tile(work, tile);
            clamped += wide ? update_span(work, tile) : update_tile(work, tile, &room);
        }
    }
    fence(); /* what went around the caches is seen by whoever waits for this thread */
    __atomic_fetch_add(work->saturated, clamped, __ATOMIC_RELAXED);
}
