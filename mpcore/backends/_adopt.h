/* Weights that somebody else wrote to become masters, element by element: `adopt_` of the reference
 * backend. Nearly always none was, so that masters are read and not written.
 */

/* Whether elements, a multiple of LANES, surely are their rounded masters, none of them clamped. */
INLINE int all_fit(int dtype, const float *restrict master, const uint16_t *restrict weight, int64_t n) {
    uint32_t largest[LANES] = {0};
    uint16_t others[LANES] = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        uint16_t rounded[LANES];
        ask_ahead(master + i);
        ask_ahead(weight + i);
        if (CONVERTS(dtype)) narrow_lanes(master + i, rounded);
#pragma GCC unroll 1
        for (int j = 0; j < LANES; j++) {
            const uint32_t bits = bits_of(master[i + j]), magnitude = bits & 0x7fffffffu;
            largest[j] = magnitude > largest[j] ? magnitude : largest[j];
            others[j] |= (CONVERTS(dtype) ? rounded[j] : nearest(dtype, bits)) ^ weight[i + j];
        }
    }
    uint32_t all = 0, other = 0;
    for (int j = 0; j < LANES; j++) all = largest[j] > all ? largest[j] : all;
    for (int j = 0; j < LANES; j++) other |= others[j];
    return all < CLAMPED(dtype) && other == 0;
}

LOOP int all_fit_float16(const float *restrict master, const uint16_t *restrict weight, int64_t n) {
    return all_fit(FLOAT16, master, weight, n);
}
LOOP int all_fit_bfloat16(const float *restrict master, const uint16_t *restrict weight, int64_t n) {
    return all_fit(BFLOAT16, master, weight, n);
}

/* Makes weights masters where they are not these, rounded. Adds to `counts` how many elements were made
 * masters, and how many were not because they are not finite. */
INLINE void adopt_elements(int dtype, const uint16_t *restrict weight, float *restrict master, int64_t n,
                           uint32_t *counts) {
    const uint32_t infinity = dtype == FLOAT16 ? 0x7c00u : 0x7f80u;
    uint32_t adopted = 0, refused = 0, clamped = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(master[i]), half = weight[i], magnitude = half & 0x7fffu;
        const uint32_t rounded =
            dtype == FLOAT16 ? clamped_float16(bits, &clamped) : clamped_bfloat16(bits, &clamped);
        const uint32_t both_nan = mask_of(magnitude > infinity) & mask_of((bits & 0x7fffffffu) > 0x7f800000u);
        const uint32_t differs = mask_of(half != rounded) & ~both_nan, finite = mask_of(magnitude < infinity);
        master[i] = float_of(choose(differs & finite, bits_of(load(dtype, weight, i)), bits));
        adopted += differs & finite & 1;
        refused += differs & ~finite & 1;
    }
    counts[0] += adopted;
    counts[1] += refused;
}

LOOP void adopt_float16(const uint16_t *restrict weight, float *restrict master, int64_t n,
                        uint32_t *restrict counts) {
    adopt_elements(FLOAT16, weight, master, n, counts);
}
LOOP void adopt_bfloat16(const uint16_t *restrict weight, float *restrict master, int64_t n,
                         uint32_t *restrict counts) {
    adopt_elements(BFLOAT16, weight, master, n, counts);
}
