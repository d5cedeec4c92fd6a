/* How masters and moments are kept: `mpcore.stores` over a tile of elements, which stay in the
 * first-level cache while they are decoded, updated and encoded. Loops take any number of them. */

/* `_c_update.py` has the same numbers. */
enum { FLOAT32_MASTERS, SPLIT, NO_MASTERS };
enum { FLOAT32_MOMENTS, BFLOAT16_MOMENTS, INT8_MOMENTS, UINT8_MOMENTS };

/* Elements of a tile; also of a block of moments in 8 bits. A tile of any more would leave the cache; any
 * fewer, and calls would cost more. Stages of one tile keep the chains of operations of one element short:
 * a processor looks at 200 to 500 operations ahead, and finds more of them that wait for nothing. */
#define TILE 256

/* 1.5 * 2^23: adding it rounds to an integer, ties to even, whose lower 16 bits are the last ones then. */
#define TO_INTEGER 12582912.0f

/* Bits of the largest finite weight, in float32. */
#define LARGEST(dtype) ((dtype) == FLOAT16 ? 0x477fe000u : 0x7f7f0000u)
#define INFINITE 0x7f800000u

/* Returns the bits of the largest magnitude. Only if it is beyond what is finite, or fits into a weight,
 * do numbers have to be looked at one by one. */
LOOP uint32_t largest_of(const float *restrict from, int64_t n) {
    int32_t largest = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t magnitude = (int32_t)(bits_of(from[i]) & 0x7fffffffu);
        largest = magnitude > largest ? magnitude : largest;
    }
    return (uint32_t)largest;
}

/* Rounds finite numbers that fit to nearest, ties to even; `streaming` is for whole LANES. */
INLINE void round_finite(int dtype, const float *restrict from, uint16_t *restrict to, int64_t n, int streaming) {
    const int64_t whole = n - n % LANES;
    for (int64_t i = 0; i < whole; i += LANES) {
        uint16_t rounded[LANES];
        if (CONVERTS(dtype)) {
            narrow_lanes(from + i, rounded);
        } else {
#pragma GCC unroll 1
            for (int j = 0; j < LANES; j++) rounded[j] = nearest(dtype, bits_of(from[i + j]));
        }
        if (streaming)
            stream_lanes(rounded, to + i);
        else
            memcpy(to + i, rounded, sizeof rounded);
    }
    for (int64_t i = whole; i < n; i++) to[i] = nearest(dtype, bits_of(from[i]));
}

LOOP void round_float16(const float *restrict from, uint16_t *restrict to, int64_t n, int streaming) {
    round_finite(FLOAT16, from, to, n, streaming);
}
LOOP void round_bfloat16(const float *restrict from, uint16_t *restrict to, int64_t n, int streaming) {
    round_finite(BFLOAT16, from, to, n, streaming);
}

/* A split of bfloat16 is the bits of the number: the upper half, rounded, and the lower one. */
LOOP void join_bfloat16(const uint16_t *restrict weight, const int16_t *restrict rest, float *restrict to,
                        int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint16_t magnitude = weight[i] & 0x7fffu, below = (uint16_t)(rest[i] >> 15);
        /* behind an infinity or a NaN there is nothing, and nothing is below 0; all in 16 bits, of which
         * twice as many fit into a vector */
        const uint16_t beyond = (uint16_t)-(uint16_t)((int16_t)magnitude > 0x7f7f);
        const uint16_t nothing = beyond | ((uint16_t)-(uint16_t)(magnitude == 0) & below);
        const uint16_t upper = (uint16_t)(weight[i] + (below & ~nothing));
        const uint16_t lower = (uint16_t)rest[i] & ~nothing;
        to[i] = float_of((uint32_t)upper << 16 | lower);
    }
}

LOOP void split_bfloat16(const float *restrict from, uint16_t *restrict weight, int16_t *restrict rest,
                         int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(from[i]);
        const uint16_t upper = (uint16_t)(bits >> 16), lower = (uint16_t)bits;
        rest[i] = (int16_t)lower;
        weight[i] = (uint16_t)(upper + (lower >> 15));
    }
}

/* Returns a power of two: the size of the leading bit of a float16 number, at least that of a normal one. */
INLINE uint32_t leading_bit(float wide) {
    const uint32_t exponent = bits_of(wide) & 0x7f800000u;
    return exponent > 0x38800000u ? exponent : 0x38800000u;
}

/* `to` holds the weights in float32. What is subtracted is +0 where there is no remainder: -0 stays -0. */
LOOP void join_float16(const int16_t *restrict rest, float *restrict to, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        to[i] -= (float)-(int32_t)rest[i] * float_of(leading_bit(to[i]) - (26u << 23));
}

/* Writes what float16 weights, `wide` in float32, leave of finite numbers in their range. */
LOOP void rests_of_float16(const float *restrict from, const float *restrict wide, int16_t *restrict rest,
                           int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const float part = (from[i] - wide[i]) * float_of(((2u * 127 + 26) << 23) - leading_bit(wide[i]));
        rest[i] = (int16_t)bits_of((part < 32767.0f ? part : 32767.0f) + TO_INTEGER);
    }
}

/* Makes finite numbers beyond the largest weight that; returns how many there were. */
LOOP int64_t clamp(int dtype, float *restrict values, int64_t n) {
    uint32_t count = 0;
    const uint32_t largest = LARGEST(dtype);
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(values[i]), magnitude = bits & 0x7fffffffu;
        const uint32_t over = mask_of(magnitude > largest) & mask_of(magnitude < 0x7f800000u);
        values[i] = float_of(choose(over, (bits & 0x80000000u) | largest, bits));
        count += over & 1;
    }
    return count;
}

/* Mends the split of numbers that are not finite: no carry makes a NaN another number, no remainder is left. */
static void mend_split(int dtype, const float *from, uint16_t *weight, int16_t *rest, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(from[i]), magnitude = bits & 0x7fffffffu;
        uint32_t ignored;
        if (magnitude < INFINITE) continue;
        rest[i] = 0;
        weight[i] = dtype == FLOAT16 ? clamped_float16(bits, &ignored) : clamped_bfloat16(bits, &ignored);
    }
}

/* Splits numbers and clamps those that are too large; returns how many those were. */
static int64_t split(int dtype, float *values, uint16_t *weight, int16_t *rest, int64_t n) {
    const uint32_t largest = largest_of(values, n);
    const int64_t clamped = largest > LARGEST(dtype) ? clamp(dtype, values, n) : 0;
    if (dtype == BFLOAT16) {
        split_bfloat16(values, weight, rest, n);
    } else {
        float wide[TILE];
        round_float16(values, weight, n, 0);
        widen_float16(weight, wide, n);
        rests_of_float16(values, wide, rest, n);
    }
    if (largest >= INFINITE) mend_split(dtype, values, weight, rest, n);
    return clamped;
}

/* Rounds numbers to weights beside which they stay; returns how many were clamped. */
static int64_t round_all(int dtype, const float *values, uint16_t *weight, int64_t n, int streaming) {
    if (largest_of(values, n) >= CLAMPED(dtype))
        return (dtype == FLOAT16 ? narrow_float16 : narrow_bfloat16)(values, weight, n);
    (dtype == FLOAT16 ? round_float16 : round_bfloat16)(values, weight, n, streaming);
    return 0;
}

/* What random bits are made of: `mpcore.stores.random_bits`. Words of one tensor and step. */
typedef struct {
    uint32_t first[2], between[2];
} draws_t;

INLINE uint32_t mix(uint32_t x, uint32_t between) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = ((x ^ (x >> 15)) + between) * 0x846ca68bu;
    return x ^ (x >> 16);
}

/* Fills the draws of tensors that have had `counts` updates, this one included. */
void fill_draws(int64_t tensors, const uint64_t *keys, const double *counts, draws_t *draws) {
    for (int64_t i = 0; i < tensors; i++)
        for (uint32_t word = 0; word < 2; word++) {
            const uint32_t low = (uint32_t)keys[i], high = (uint32_t)(keys[i] >> 32);
            const uint32_t first = mix((uint32_t)(int64_t)counts[i] ^ low, 0);
            draws[i].first[word] = mix(first + high + word * 0x9e3779b9u, 0);
            draws[i].between[word] = mix(draws[i].first[word] ^ high, 0);
        }
}

/* Draws 32 bits for each element from `offset` on: two roundings have 16 each. */
LOOP void draw(uint32_t first, uint32_t between, uint32_t offset, uint32_t *restrict to, int64_t n) {
    const uint32_t start = offset + first;
    for (uint32_t i = 0; i < (uint32_t)n; i++) to[i] = mix(start + i, between);
}

/* Rounds to bfloat16 at random, by the 16 bits of `words` above `shift`. From the largest number on nothing
 * is added: it would become an infinity, and a NaN, which has its upper bits set here, another number. */
LOOP void round_randomly(const float *restrict from, uint16_t *restrict to, int64_t n,
                         const uint32_t *restrict words, int shift) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = bits_of(from[i]);
        const uint32_t below = mask_of((int32_t)(bits & 0x7fffffffu) < 0x7f7f0000);
        to[i] = (uint16_t)((bits + ((words[i] >> shift) & 0xffffu & below)) >> 16);
    }
}

/* Returns how many numbers are finite and beyond the largest weight. */
LOOP int64_t count_beyond(int dtype, const float *restrict from, int64_t n) {
    uint32_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t magnitude = bits_of(from[i]) & 0x7fffffffu;
        count += magnitude > LARGEST(dtype) && magnitude < INFINITE;
    }
    return count;
}

/* Codes of a block: `mpcore.stores.blocks`. */
INLINE void decode_codes(const uint8_t *restrict from, float *restrict to, int64_t n, float scale, int is_signed) {
    const float step = is_signed ? (float)(1.0 / 127) : (float)(1.0 / 255);
    for (int64_t i = 0; i < n; i++) {
        const int code = is_signed ? (int8_t)from[i] : from[i];
        const float root = scale * ((float)(code < 0 ? -code : code) * step), square = root * root;
        to[i] = code < 0 ? -square : square;
    }
}

LOOP void decode_int8(const uint8_t *restrict from, float *restrict to, int64_t n, float scale) {
    decode_codes(from, to, n, scale, 1);
}
LOOP void decode_uint8(const uint8_t *restrict from, float *restrict to, int64_t n, float scale) {
    decode_codes(from, to, n, scale, 0);
}

INLINE void encode_codes(const float *restrict from, uint8_t *restrict to, int64_t n, float inverse,
                         const uint32_t *restrict words, int shift, int is_signed) {
    const int32_t most = is_signed ? 127 : 255;
    int32_t wide[TILE]; /* to be narrowed in a loop of its own: this one has vectors of 32 bits alone */
    for (int64_t i = 0; i < n; i++) {
        const float t = sqrtf(fabsf(from[i])) * inverse;
        const int32_t whole = (int32_t)t;
        const float lower = (float)whole;
        const float drawn = ((float)(int32_t)((words[i] >> shift) & 0xffffu) + 0.5f) * 0x1p-16f;
        const int32_t up = drawn * (lower + lower + 1) < (t - lower) * (t + lower);
        int32_t code = whole + up < most ? whole + up : most;
        if (is_signed) {
            const int32_t sign = (int32_t)bits_of(from[i]) >> 31;
            code = (code ^ sign) - sign;
        } else {
            const int32_t least = t > 0;
            code = code > least ? code : least;
        }
        wide[i] = code;
    }
    for (int64_t i = 0; i < n; i++) to[i] = (uint8_t)wide[i];
}

LOOP void encode_int8(const float *restrict from, uint8_t *restrict to, int64_t n, float inverse,
                      const uint32_t *restrict words, int shift) {
    encode_codes(from, to, n, inverse, words, shift, 1);
}
LOOP void encode_uint8(const float *restrict from, uint8_t *restrict to, int64_t n, float inverse,
                       const uint32_t *restrict words, int shift) {
    encode_codes(from, to, n, inverse, words, shift, 0);
}

/* Encodes a block; returns its scale, NaN if a number is not finite. */
static float encode_block(const float *from, uint8_t *to, int64_t n, const uint32_t *words, int shift,
                          int is_signed) {
    const uint32_t largest = largest_of(from, n);
    if (largest >= INFINITE) {
        memset(to, 0, (size_t)n);
        return NAN;
    }
    const float scale = sqrtf(float_of(largest));
    const float inverse = scale > 0 ? (is_signed ? 127.0f : 255.0f) / scale : 0;
    (is_signed ? encode_int8 : encode_uint8)(from, to, n, inverse, words, shift);
    return scale;
}
