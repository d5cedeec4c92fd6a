/* float32, float16 and bfloat16 as bits: exact when widened, rounded to nearest, ties to even, when
 * narrowed. Loops over any bits, and lanes of a loop that has nothing to clamp. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <immintrin.h>
#endif
#if defined(__F16C__) && !defined(PORTABLE)
#define FAST_FLOAT16
#endif

#define LOOP static __attribute__((noinline)) /* keeps `restrict`, which inlining drops */
#define INLINE static inline __attribute__((always_inline))

/* `_c_work.py` has the same numbers. */
enum { FLOAT32, FLOAT16, BFLOAT16 };

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Returns `yes` where the mask is all ones and `no` where it is 0: branches keep loops scalar. */
INLINE uint32_t choose(uint32_t mask, uint32_t yes, uint32_t no) { return (yes & mask) | (no & ~mask); }

INLINE uint32_t mask_of(int condition) { return -(uint32_t)condition; }

INLINE float from_bfloat16(uint16_t half) { return float_of((uint32_t)half << 16); }

INLINE float from_float16(uint16_t half) {
    uint32_t sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
    uint32_t bits = magnitude + (112u << 23); /* the exponent with the bias of float32 */
    /* a subnormal number: its bits behind a leading one, that one subtracted again */
    uint32_t small = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
    bits = choose(mask_of(magnitude >= 0x0f800000u), bits + (112u << 23), bits);
    bits = choose(mask_of(magnitude < 0x00800000u), small, bits);
    return float_of(bits | sign);
}

/* Returns element `i` of a gradient. */
INLINE float load(int dtype, const void *from, int64_t i) {
    if (dtype == FLOAT32) return ((const float *)from)[i];
    const uint16_t half = ((const uint16_t *)from)[i];
    return dtype == FLOAT16 ? from_float16(half) : from_bfloat16(half);
}

LOOP void widen_bfloat16(const uint16_t *restrict from, float *restrict to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = from_bfloat16(from[i]);
}

LOOP void widen_float16(const uint16_t *restrict from, float *restrict to, int64_t n) {
    int64_t i = 0;
#ifdef FAST_FLOAT16
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#endif
    for (; i < n; i++) to[i] = from_float16(from[i]);
}

/* Bits of the smallest magnitudes that would round to infinity; infinities and NaNs are above. */
#define CLAMPED(dtype) ((dtype) == FLOAT16 ? 0x477ff000u : 0x7f7f8000u)

/* These round what is below CLAMPED. */

INLINE uint16_t nearest_bfloat16(uint32_t bits) {
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

INLINE uint16_t nearest_float16(uint32_t bits) {
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1)) >> 13;
    /* adding 0.5 leaves the multiples of 2^-24 in the last bits */
    uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t rounded = choose(mask_of(magnitude < 0x38800000u), small, normal);
    return (uint16_t)(rounded | ((bits >> 16) & 0x8000u));
}

INLINE uint16_t nearest(int dtype, uint32_t bits) {
    return dtype == FLOAT16 ? nearest_float16(bits) : nearest_bfloat16(bits);
}

/* These round anything. A finite value that would round to infinity becomes the largest finite one with
 * its sign, and is counted. */

INLINE uint16_t clamped_bfloat16(uint32_t bits, uint32_t *count) {
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t over = mask_of(magnitude >= CLAMPED(BFLOAT16)) & mask_of(magnitude < 0x7f800000u);
    uint32_t rounded = choose(over, 0x7f7fu, nearest_bfloat16(magnitude));
    rounded = choose(mask_of(magnitude > 0x7f800000u), 0x7fc0u, rounded);
    *count += over & 1;
    return (uint16_t)(rounded | ((bits >> 16) & 0x8000u));
}

INLINE uint16_t clamped_float16(uint32_t bits, uint32_t *count) {
    uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t over = mask_of(magnitude >= CLAMPED(FLOAT16)), bad = mask_of(magnitude >= 0x7f800000u);
    uint32_t rounded = choose(over, 0x7bffu, nearest_float16(magnitude));
    rounded = choose(bad, 0x7c00u, rounded) | (mask_of(magnitude > 0x7f800000u) & 0x0200u);
    *count += over & ~bad & 1;
    return (uint16_t)(rounded | ((bits >> 16) & 0x8000u));
}

LOOP int64_t narrow_bfloat16(const float *restrict from, uint16_t *restrict to, int64_t n) {
    uint32_t clamped = 0;
    for (int64_t i = 0; i < n; i++) to[i] = clamped_bfloat16(bits_of(from[i]), &clamped);
    return clamped;
}

LOOP int64_t narrow_float16(const float *restrict from, uint16_t *restrict to, int64_t n) {
    uint32_t clamped = 0;
    for (int64_t i = 0; i < n; i++) to[i] = clamped_float16(bits_of(from[i]), &clamped);
    return clamped;
}

/* Elements that a loop of `_loop.h` takes at a time. They are arrays in C and registers in what a
 * compiler makes of it, whatever the width of its vectors. */
#define LANES 16

/* Asks memory for what lies 2 KiB behind the address, a line of a cache or less: a processor follows
 * several arrays by itself, but not far enough ahead, and begins anew at each page. */
INLINE void ask_ahead(const void *address) {
    __builtin_prefetch((const void *)((uintptr_t)address + 2048));
}

/* Whether the processor converts a dtype, LANES at a time; a compiler does not see that by itself. */
#ifdef FAST_FLOAT16
#define CONVERTS(dtype) ((dtype) == FLOAT16)
#else
#define CONVERTS(dtype) 0
#endif

INLINE void widen_lanes(const uint16_t *from, float *to) {
#if defined(FAST_FLOAT16) && defined(__AVX512F__)
    _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)));
#elif defined(FAST_FLOAT16)
    for (int j = 0; j < LANES; j += 8)
        _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + j))));
#endif
}

/* Rounds what is below CLAMPED. */
INLINE void narrow_lanes(const float *from, uint16_t *to) {
#ifdef FAST_FLOAT16
    const int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#ifdef __AVX512F__
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph(_mm512_loadu_ps(from), how));
#else
    const __m128i low = _mm256_cvtps_ph(_mm256_loadu_ps(from), how);
    const __m128i high = _mm256_cvtps_ph(_mm256_loadu_ps(from + 8), how);
    _mm256_storeu_si256((__m256i *)to, _mm256_set_m128i(high, low));
#endif
#endif
}

/* Writes LANES weights around the caches: they are read again in the next forward pass, and a line
 * that is not read before it is written saves a seventh of what the update reads. */
INLINE void stream_lanes(const uint16_t *from, uint16_t *to) {
#if defined(__AVX__)
    _mm256_stream_si256((__m256i *)to, _mm256_loadu_si256((const __m256i *)from));
#elif defined(__SSE2__)
    for (int j = 0; j < LANES; j += 8)
        _mm_stream_si128((__m128i *)(to + j), _mm_loadu_si128((const __m128i *)(from + j)));
#else
    memcpy(to, from, LANES * sizeof *to);
#endif
}

/* Returns when all that was written around the caches can be seen. */
INLINE void fence(void) {
#ifdef __SSE2__
    _mm_sfence();
#endif
}
