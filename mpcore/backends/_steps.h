/* Generated from mpcore/updates by `make c-steps`. */

INLINE float adam_2(float unscaled, float p, float *m, const float *s) {
    const float m0 = m[0];
    const float m1 = m[1];
    const float g = unscaled * s[0];
    const float t0 = p * s[2];
    const float t1 = g + t0;
    const float t2 = p * s[1];
    const float t3 = m0 * s[3];
    const float t4 = t1 * s[4];
    const float t5 = t3 + t4;
    const float t6 = m1 * s[5];
    const float t7 = t1 * t1;
    const float t8 = t7 * s[6];
    const float t9 = t6 + t8;
    const float t10 = t5 * s[7];
    const float t11 = sqrtf(t9);
    const float t12 = t11 / s[8];
    const float t13 = t12 + s[9];
    const float t14 = t10 / t13;
    const float t15 = t2 - t14;
    m[0] = t5;
    m[1] = t9;
    return t15;
}

LOOP uint32_t adam_2_float32(ELEMENTS) {
    return update_lanes(adam_2, 2, 10, FLOAT32, FLOAT32, PASSED_ON);
}
LOOP uint32_t adam_2_float16(ELEMENTS) {
    return update_lanes(adam_2, 2, 10, FLOAT16, FLOAT16, PASSED_ON);
}
LOOP uint32_t adam_2_bfloat16(ELEMENTS) {
    return update_lanes(adam_2, 2, 10, BFLOAT16, BFLOAT16, PASSED_ON);
}
LOOP uint32_t adam_2_to_float16(ELEMENTS) {
    return update_lanes(adam_2, 2, 10, FLOAT32, FLOAT16, PASSED_ON);
}
LOOP uint32_t adam_2_to_bfloat16(ELEMENTS) {
    return update_lanes(adam_2, 2, 10, FLOAT32, BFLOAT16, PASSED_ON);
}

INLINE float adam_3(float unscaled, float p, float *m, const float *s) {
    const float m0 = m[0];
    const float m1 = m[1];
    const float m2 = m[2];
    const float g = unscaled * s[0];
    const float t0 = p * s[2];
    const float t1 = g + t0;
    const float t2 = p * s[1];
    const float t3 = m0 * s[3];
    const float t4 = t1 * s[4];
    const float t5 = t3 + t4;
    const float t6 = m1 * s[5];
    const float t7 = t1 * t1;
    const float t8 = t7 * s[6];
    const float t9 = t6 + t8;
    const float t10 = (m2 > t9 || m2 != m2) ? m2 : t9;
    const float t11 = t5 * s[7];
    const float t12 = sqrtf(t10);
    const float t13 = t12 / s[8];
    const float t14 = t13 + s[9];
    const float t15 = t11 / t14;
    const float t16 = t2 - t15;
    m[0] = t5;
    m[1] = t9;
    m[2] = t10;
    return t16;
}

LOOP uint32_t adam_3_float32(ELEMENTS) {
    return update_lanes(adam_3, 3, 10, FLOAT32, FLOAT32, PASSED_ON);
}
LOOP uint32_t adam_3_float16(ELEMENTS) {
    return update_lanes(adam_3, 3, 10, FLOAT16, FLOAT16, PASSED_ON);
}
LOOP uint32_t adam_3_bfloat16(ELEMENTS) {
    return update_lanes(adam_3, 3, 10, BFLOAT16, BFLOAT16, PASSED_ON);
}
LOOP uint32_t adam_3_to_float16(ELEMENTS) {
    return update_lanes(adam_3, 3, 10, FLOAT32, FLOAT16, PASSED_ON);
}
LOOP uint32_t adam_3_to_bfloat16(ELEMENTS) {
    return update_lanes(adam_3, 3, 10, FLOAT32, BFLOAT16, PASSED_ON);
}

INLINE float sgd_0(float unscaled, float p, float *m, const float *s) {
    const float g = unscaled * s[0];
    const float t0 = p * s[1];
    const float t1 = g + t0;
    const float t2 = t1 * s[6];
    const float t3 = p - t2;
    return t3;
}

LOOP uint32_t sgd_0_float32(ELEMENTS) {
    return update_lanes(sgd_0, 0, 7, FLOAT32, FLOAT32, PASSED_ON);
}
LOOP uint32_t sgd_0_float16(ELEMENTS) {
    return update_lanes(sgd_0, 0, 7, FLOAT16, FLOAT16, PASSED_ON);
}
LOOP uint32_t sgd_0_bfloat16(ELEMENTS) {
    return update_lanes(sgd_0, 0, 7, BFLOAT16, BFLOAT16, PASSED_ON);
}
LOOP uint32_t sgd_0_to_float16(ELEMENTS) {
    return update_lanes(sgd_0, 0, 7, FLOAT32, FLOAT16, PASSED_ON);
}
LOOP uint32_t sgd_0_to_bfloat16(ELEMENTS) {
    return update_lanes(sgd_0, 0, 7, FLOAT32, BFLOAT16, PASSED_ON);
}

INLINE float sgd_1(float unscaled, float p, float *m, const float *s) {
    const float m0 = m[0];
    const float g = unscaled * s[0];
    const float t0 = p * s[1];
    const float t1 = g + t0;
    const float t2 = m0 * s[2];
    const float t3 = t1 * s[3];
    const float t4 = t2 + t3;
    const float t5 = (s[4] != (float)0x0.0p+0) ? t1 : t4;
    const float t6 = t5 * s[2];
    const float t7 = t1 + t6;
    const float t8 = (s[5] != (float)0x0.0p+0) ? t7 : t5;
    const float t9 = t8 * s[6];
    const float t10 = p - t9;
    m[0] = t5;
    return t10;
}

LOOP uint32_t sgd_1_float32(ELEMENTS) {
    return update_lanes(sgd_1, 1, 7, FLOAT32, FLOAT32, PASSED_ON);
}
LOOP uint32_t sgd_1_float16(ELEMENTS) {
    return update_lanes(sgd_1, 1, 7, FLOAT16, FLOAT16, PASSED_ON);
}
LOOP uint32_t sgd_1_bfloat16(ELEMENTS) {
    return update_lanes(sgd_1, 1, 7, BFLOAT16, BFLOAT16, PASSED_ON);
}
LOOP uint32_t sgd_1_to_float16(ELEMENTS) {
    return update_lanes(sgd_1, 1, 7, FLOAT32, FLOAT16, PASSED_ON);
}
LOOP uint32_t sgd_1_to_bfloat16(ELEMENTS) {
    return update_lanes(sgd_1, 1, 7, FLOAT32, BFLOAT16, PASSED_ON);
}

INLINE float adagrad_1(float unscaled, float p, float *m, const float *s) {
    const float m0 = m[0];
    const float g = unscaled * s[0];
    const float t0 = p * s[1];
    const float t1 = g + t0;
    const float t2 = t1 * t1;
    const float t3 = m0 + t2;
    const float t4 = t1 * s[2];
    const float t5 = sqrtf(t3);
    const float t6 = t5 + s[3];
    const float t7 = t4 / t6;
    const float t8 = p - t7;
    m[0] = t3;
    return t8;
}

LOOP uint32_t adagrad_1_float32(ELEMENTS) {
    return update_lanes(adagrad_1, 1, 4, FLOAT32, FLOAT32, PASSED_ON);
}
LOOP uint32_t adagrad_1_float16(ELEMENTS) {
    return update_lanes(adagrad_1, 1, 4, FLOAT16, FLOAT16, PASSED_ON);
}
LOOP uint32_t adagrad_1_bfloat16(ELEMENTS) {
    return update_lanes(adagrad_1, 1, 4, BFLOAT16, BFLOAT16, PASSED_ON);
}
LOOP uint32_t adagrad_1_to_float16(ELEMENTS) {
    return update_lanes(adagrad_1, 1, 4, FLOAT32, FLOAT16, PASSED_ON);
}
LOOP uint32_t adagrad_1_to_bfloat16(ELEMENTS) {
    return update_lanes(adagrad_1, 1, 4, FLOAT32, BFLOAT16, PASSED_ON);
}

INLINE float lion_1(float unscaled, float p, float *m, const float *s) {
    const float m0 = m[0];
    const float g = unscaled * s[0];
    const float t0 = p * s[1];
    const float t1 = m0 * s[2];
    const float t2 = g * s[3];
    const float t3 = t1 + t2;
    const float t4 = (float)((t3 > 0) - (t3 < 0));
    const float t5 = t4 * s[6];
    const float t6 = t0 - t5;
    const float t7 = m0 * s[4];
    const float t8 = g * s[5];
    const float t9 = t7 + t8;
    m[0] = t9;
    return t6;
}

LOOP uint32_t lion_1_float32(ELEMENTS) {
    return update_lanes(lion_1, 1, 7, FLOAT32, FLOAT32, PASSED_ON);
}
LOOP uint32_t lion_1_float16(ELEMENTS) {
    return update_lanes(lion_1, 1, 7, FLOAT16, FLOAT16, PASSED_ON);
}
LOOP uint32_t lion_1_bfloat16(ELEMENTS) {
    return update_lanes(lion_1, 1, 7, BFLOAT16, BFLOAT16, PASSED_ON);
}
LOOP uint32_t lion_1_to_float16(ELEMENTS) {
    return update_lanes(lion_1, 1, 7, FLOAT32, FLOAT16, PASSED_ON);
}
LOOP uint32_t lion_1_to_bfloat16(ELEMENTS) {
    return update_lanes(lion_1, 1, 7, FLOAT32, BFLOAT16, PASSED_ON);
}

static void adam_scalars(const double *n, double t, float *s) {
    const double n0 = n[0], n1 = n[1], n2 = n[2], n3 = n[3], n4 = n[4], n5 = n[5], n6 = n[6];
    const double t0 = (double)0x1.0000000000000p+1 * n6;
    const double t1 = (double)0x1.0000000000000p+0 - t0;
    const double t2 = n0 * n4;
    const double t3 = (double)0x1.0000000000000p+0 - t2;
    const double t4 = (n5 != (double)0x0.0p+0) ? t3 : (double)0x1.0000000000000p+0;
    const double t5 = (n5 != (double)0x0.0p+0) ? (double)0x0.0p+0 : n4;
    const double t6 = (double)0x1.0000000000000p+0 - n1;
    const double t7 = (double)0x1.0000000000000p+0 - n2;
    const double t8 = power(n1, t);
    const double t9 = (double)0x1.0000000000000p+0 - t8;
    const double t10 = n0 / t9;
    const double t11 = power(n2, t);
    const double t12 = (double)0x1.0000000000000p+0 - t11;
    const double t13 = sqrt(t12);
    s[0] = (float)t1;
    s[1] = (float)t4;
    s[2] = (float)t5;
    s[3] = (float)n1;
    s[4] = (float)t6;
    s[5] = (float)n2;
    s[6] = (float)t7;
    s[7] = (float)t10;
    s[8] = (float)t13;
    s[9] = (float)n3;
}

static void sgd_scalars(const double *n, double t, float *s) {
    const double n0 = n[0], n1 = n[1], n2 = n[2], n3 = n[3], n4 = n[4], n5 = n[5];
    const double t0 = (t == (double)0x1.0000000000000p+0) ? (double)0x1.0000000000000p+0 : (double)0x0.0p+0;
    const double t1 = (double)0x1.0000000000000p+1 * n5;
    const double t2 = (double)0x1.0000000000000p+0 - t1;
    const double t3 = (double)0x1.0000000000000p+0 - n2;
    s[0] = (float)t2;
    s[1] = (float)n3;
    s[2] = (float)n1;
    s[3] = (float)t3;
    s[4] = (float)t0;
    s[5] = (float)n4;
    s[6] = (float)n0;
}

static void adagrad_scalars(const double *n, double t, float *s) {
    const double n0 = n[0], n1 = n[1], n2 = n[2], n3 = n[3], n4 = n[4];
    const double t0 = (double)0x1.0000000000000p+1 * n4;
    const double t1 = (double)0x1.0000000000000p+0 - t0;
    const double t2 = t - (double)0x1.0000000000000p+0;
    const double t3 = t2 * n1;
    const double t4 = (double)0x1.0000000000000p+0 + t3;
    const double t5 = n0 / t4;
    s[0] = (float)t1;
    s[1] = (float)n3;
    s[2] = (float)t5;
    s[3] = (float)n2;
}

static void lion_scalars(const double *n, double t, float *s) {
    const double n0 = n[0], n1 = n[1], n2 = n[2], n3 = n[3], n4 = n[4];
    const double t0 = n0 * n3;
    const double t1 = (double)0x1.0000000000000p+0 - t0;
    const double t2 = (double)0x1.0000000000000p+1 * n4;
    const double t3 = (double)0x1.0000000000000p+0 - t2;
    const double t4 = (double)0x1.0000000000000p+0 - n1;
    const double t5 = (double)0x1.0000000000000p+0 - n2;
    s[0] = (float)t3;
    s[1] = (float)t1;
    s[2] = (float)n1;
    s[3] = (float)t4;
    s[4] = (float)n2;
    s[5] = (float)t5;
    s[6] = (float)n0;
}

_Static_assert(3 <= MOST_MOMENTS && 10 <= MOST_COLUMNS, "`_loop.h` has too few");
static loop_t *const LOOPS[][FORMATS] = {{adam_2_float32, adam_2_float16, adam_2_bfloat16, adam_2_to_float16, adam_2_to_bfloat16}, {adam_3_float32, adam_3_float16, adam_3_bfloat16, adam_3_to_float16, adam_3_to_bfloat16}, {sgd_0_float32, sgd_0_float16, sgd_0_bfloat16, sgd_0_to_float16, sgd_0_to_bfloat16}, {sgd_1_float32, sgd_1_float16, sgd_1_bfloat16, sgd_1_to_float16, sgd_1_to_bfloat16}, {adagrad_1_float32, adagrad_1_float16, adagrad_1_bfloat16, adagrad_1_to_float16, adagrad_1_to_bfloat16}, {lion_1_float32, lion_1_float16, lion_1_bfloat16, lion_1_to_float16, lion_1_to_bfloat16}};
static const int MOMENTS[] = {2, 3, 0, 1, 1, 1};
static const int COLUMNS[] = {10, 10, 7, 7, 4, 7};
static scalars_t *const SCALARS[] = {adam_scalars, adam_scalars, sgd_scalars, sgd_scalars, adagrad_scalars, lion_scalars};
static const int NUMBERS[] = {7, 7, 6, 6, 5, 5};
