/* Updates that a 16-bit weight without a master would lose, on a sample: `_sample.py` in plain PyTorch.
 * Rounding is torch's: what is too large becomes infinite, and is not clamped as weights are. */

typedef struct {
    int64_t tensor, stride, count; /* every how-many-th element is taken, and how many are */
    int64_t place;                 /* of the first of them among all that are taken */
} taken_t;

/* What the threads of a pass share; `_c_sample.py` has the same fields. */
typedef struct {
    int64_t next, count; /* of `taken` */
    const taken_t *taken;
    const float *const *masters;
    float *before;  /* the sample, one tensor after the other */
    int64_t *found; /* of `count_lost`: updates lost, and masters changed */
    int32_t dtype;  /* of the weights */
} sample_t;

INLINE uint16_t rounded(int dtype, float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
    const uint32_t infinity = dtype == FLOAT16 ? 0x7c00u : 0x7f80u;
    uint32_t near = nearest(dtype, magnitude) & 0x7fffu;
    near = choose(mask_of(magnitude >= CLAMPED(dtype)), infinity, near);
    near = choose(mask_of(magnitude > 0x7f800000u), 0x7fffu, near);
    return (uint16_t)(near | ((bits >> 16) & 0x8000u));
}

/* Whether two of them are the same number; NaN is none. */
INLINE uint32_t are_equal(int dtype, uint32_t one, uint32_t other) {
    const uint32_t infinity = dtype == FLOAT16 ? 0x7c00u : 0x7f80u;
    const uint32_t same = (one == other) & ((one & 0x7fffu) <= infinity);
    return same | (((one | other) & 0x7fffu) == 0);
}

/* Adds up how many of `n` updates would be lost, and how many masters changed. */
INLINE void lost_of(int dtype, const float *before, const float *after, int64_t n, uint32_t *counts) {
    uint32_t lost = 0, moved = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint16_t weight = rounded(dtype, before[i]);
        const float wide = dtype == FLOAT16 ? from_float16(weight) : from_bfloat16(weight);
        const float update = after[i] - before[i];
        const uint16_t alone = rounded(dtype, wide + update);
        const uint32_t changed = after[i] != before[i];
        moved += changed;
        lost += changed & are_equal(dtype, alone, weight);
    }
    counts[0] += lost;
    counts[1] += moved;
}

#ifdef FAST_FLOAT16
/* `lost_of` eight by eight, for float16. */
LOOP int64_t lost_of_lanes(const float *before, const float *after, int64_t n, uint32_t *counts) {
    int64_t i = 0;
    uint32_t lost = 0, moved = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 old = _mm256_loadu_ps(before + i), new = _mm256_loadu_ps(after + i);
        const __m256 weight = _mm256_cvtph_ps(_mm256_cvtps_ph(old, _MM_FROUND_TO_NEAREST_INT));
        const __m256 sum = _mm256_add_ps(weight, _mm256_sub_ps(new, old));
        const __m256 alone = _mm256_cvtph_ps(_mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
        const int changed = _mm256_movemask_ps(_mm256_cmp_ps(new, old, _CMP_NEQ_UQ));
        const int same = _mm256_movemask_ps(_mm256_cmp_ps(alone, weight, _CMP_EQ_OQ));
        moved += (uint32_t)__builtin_popcount((unsigned)changed);
        lost += (uint32_t)__builtin_popcount((unsigned)(changed & same));
    }
    counts[0] += lost;
    counts[1] += moved;
    return i;
}
#endif

LOOP void lost_of_float16(const float *before, const float *after, int64_t n, uint32_t *counts) {
    int64_t done = 0;
#ifdef FAST_FLOAT16
    done = lost_of_lanes(before, after, n, counts);
#endif
    lost_of(FLOAT16, before + done, after + done, n - done, counts);
}

LOOP void lost_of_bfloat16(const float *before, const float *after, int64_t n, uint32_t *counts) {
    lost_of(BFLOAT16, before, after, n, counts);
}

static int64_t next_taken(sample_t *sample) { return __atomic_fetch_add(&sample->next, 1, __ATOMIC_RELAXED); }

/* Copies elements `at` to `at + n` of what is taken of a tensor. */
INLINE void copy_taken(const sample_t *sample, const taken_t *taken, int64_t at, int64_t n, float *to) {
    const float *from = sample->masters[taken->tensor] + at * taken->stride;
    for (int64_t i = 0; i < n; i++) to[i] = from[i * taken->stride];
}

/* Copies some masters of each tensor. */
void take_sample(sample_t *sample) {
    for (int64_t k; (k = next_taken(sample)) < sample->count;) {
        const taken_t *taken = sample->taken + k;
        float *to = sample->before + taken->place;
        if (taken->stride == 1)
            memcpy(to, sample->masters[taken->tensor], (size_t)taken->count * sizeof *to);
        else
            copy_taken(sample, taken, 0, taken->count, to);
    }
}

/* Compares masters with what they were. */
void count_lost(sample_t *sample) {
    for (int64_t k; (k = next_taken(sample)) < sample->count;) {
        const taken_t *taken = sample->taken + k;
        uint32_t counts[2] = {0};
        for (int64_t at = 0; at < taken->count; at += BLOCK) {
            const int64_t n = taken->count - at < BLOCK ? taken->count - at : BLOCK;
            const float *before = sample->before + taken->place + at;
            const float *after = sample->masters[taken->tensor] + at;
            float room[BLOCK];
            if (taken->stride != 1) {
                copy_taken(sample, taken, at, n, room);
                after = room;
            }
            (sample->dtype == FLOAT16 ? lost_of_float16 : lost_of_bfloat16)(before, after, n, counts);
        }
        for (int i = 0; i < 2; i++) __atomic_fetch_add(sample->found + i, counts[i], __ATOMIC_RELAXED);
    }
}
