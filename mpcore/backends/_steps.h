/* Generated from mpcore/updates by `make c-steps`. */

LOOP void adam_2_loop(const float *restrict grad, float *restrict master, float *restrict moment0, float *restrict moment1, int64_t n,
                      const float *s, float coefficient) {
    const float s0 = s[0], s1 = s[1], s2 = s[2], s3 = s[3], s4 = s[4], s5 = s[5], s6 = s[6], s7 = s[7], s8 = s[8], s9 = s[9];
    for (int64_t i = 0; i < n; i++) {
        const float p = master[i], m0 = moment0[i], m1 = moment1[i];
        const float g = (grad[i] * coefficient) * s0;
        const float t0 = p * s2;
        const float t1 = g + t0;
        const float t2 = p * s1;
        const float t3 = m0 * s3;
        const float t4 = t1 * s4;
        const float t5 = t3 + t4;
        const float t6 = m1 * s5;
        const float t7 = t1 * t1;
        const float t8 = t7 * s6;
        const float t9 = t6 + t8;
        const float t10 = t5 * s7;
        const float t11 = sqrtf(t9);
        const float t12 = t11 / s8;
        const float t13 = t12 + s9;
        const float t14 = t10 / t13;
        const float t15 = t2 - t14;
        master[i] = t15;
        moment0[i] = t5;
        moment1[i] = t9;
    }
}

static void adam_2(const float *grad, float *master, float *const *moments, int64_t n,
                   const float *s, float coefficient) {
    adam_2_loop(grad, master, moments[0], moments[1], n, s, coefficient);
}

LOOP void adam_3_loop(const float *restrict grad, float *restrict master, float *restrict moment0, float *restrict moment1, float *restrict moment2, int64_t n,
                      const float *s, float coefficient) {
    const float s0 = s[0], s1 = s[1], s2 = s[2], s3 = s[3], s4 = s[4], s5 = s[5], s6 = s[6], s7 = s[7], s8 = s[8], s9 = s[9];
    for (int64_t i = 0; i < n; i++) {
        const float p = master[i], m0 = moment0[i], m1 = moment1[i], m2 = moment2[i];
        const float g = (grad[i] * coefficient) * s0;
        const float t0 = p * s2;
        const float t1 = g + t0;
        const float t2 = p * s1;
        const float t3 = m0 * s3;
        const float t4 = t1 * s4;
        const float t5 = t3 + t4;
        const float t6 = m1 * s5;
        const float t7 = t1 * t1;
        const float t8 = t7 * s6;
        const float t9 = t6 + t8;
        const float t10 = (m2 > t9 || m2 != m2) ? m2 : t9;
        const float t11 = t5 * s7;
        const float t12 = sqrtf(t10);
        const float t13 = t12 / s8;
        const float t14 = t13 + s9;
        const float t15 = t11 / t14;
        const float t16 = t2 - t15;
        master[i] = t16;
        moment0[i] = t5;
        moment1[i] = t9;
        moment2[i] = t10;
    }
}

static void adam_3(const float *grad, float *master, float *const *moments, int64_t n,
                   const float *s, float coefficient) {
    adam_3_loop(grad, master, moments[0], moments[1], moments[2], n, s, coefficient);
}

LOOP void sgd_0_loop(const float *restrict grad, float *restrict master, int64_t n,
                      const float *s, float coefficient) {
    const float s0 = s[0], s1 = s[1], s2 = s[2], s3 = s[3], s4 = s[4], s5 = s[5], s6 = s[6];
    for (int64_t i = 0; i < n; i++) {
        const float p = master[i];
        const float g = (grad[i] * coefficient) * s0;
        const float t0 = p * s1;
        const float t1 = g + t0;
        const float t2 = t1 * s6;
        const float t3 = p - t2;
        master[i] = t3;
    }
}

static void sgd_0(const float *grad, float *master, float *const *moments, int64_t n,
                   const float *s, float coefficient) {
    sgd_0_loop(grad, master, n, s, coefficient);
}

LOOP void sgd_1_loop(const float *restrict grad, float *restrict master, float *restrict moment0, int64_t n,
                      const float *s, float coefficient) {
    const float s0 = s[0], s1 = s[1], s2 = s[2], s3 = s[3], s4 = s[4], s5 = s[5], s6 = s[6];
    for (int64_t i = 0; i < n; i++) {
        const float p = master[i], m0 = moment0[i];
        const float g = (grad[i] * coefficient) * s0;
        const float t0 = p * s1;
        const float t1 = g + t0;
        const float t2 = m0 * s2;
        const float t3 = t1 * s3;
        const float t4 = t2 + t3;
        const float t5 = (s4 != (float)0x0.0p+0) ? t1 : t4;
        const float t6 = t5 * s2;
        const float t7 = t1 + t6;
        const float t8 = (s5 != (float)0x0.0p+0) ? t7 : t5;
        const float t9 = t8 * s6;
        const float t10 = p - t9;
        master[i] = t10;
        moment0[i] = t5;
    }
}

static void sgd_1(const float *grad, float *master, float *const *moments, int64_t n,
                   const float *s, float coefficient) {
    sgd_1_loop(grad, master, moments[0], n, s, coefficient);
}

LOOP void adagrad_1_loop(const float *restrict grad, float *restrict master, float *restrict moment0, int64_t n,
                      const float *s, float coefficient) {
    const float s0 = s[0], s1 = s[1], s2 = s[2], s3 = s[3];
    for (int64_t i = 0; i < n; i++) {
        const float p = master[i], m0 = moment0[i];
        const float g = (grad[i] * coefficient) * s0;
        const float t0 = p * s1;
        const float t1 = g + t0;
        const float t2 = t1 * t1;
        const float t3 = m0 + t2;
        const float t4 = t1 * s2;
        const float t5 = sqrtf(t3);
        const float t6 = t5 + s3;
        const float t7 = t4 / t6;
        const float t8 = p - t7;
        master[i] = t8;
        moment0[i] = t3;
    }
}

static void adagrad_1(const float *grad, float *master, float *const *moments, int64_t n,
                   const float *s, float coefficient) {
    adagrad_1_loop(grad, master, moments[0], n, s, coefficient);
}

LOOP void lion_1_loop(const float *restrict grad, float *restrict master, float *restrict moment0, int64_t n,
                      const float *s, float coefficient) {
    const float s0 = s[0], s1 = s[1], s2 = s[2], s3 = s[3], s4 = s[4], s5 = s[5], s6 = s[6];
    for (int64_t i = 0; i < n; i++) {
        const float p = master[i], m0 = moment0[i];
        const float g = (grad[i] * coefficient) * s0;
        const float t0 = p * s1;
        const float t1 = m0 * s2;
        const float t2 = g * s3;
        const float t3 = t1 + t2;
        const float t4 = (float)((t3 > 0) - (t3 < 0));
        const float t5 = t4 * s6;
        const float t6 = t0 - t5;
        const float t7 = m0 * s4;
        const float t8 = g * s5;
        const float t9 = t7 + t8;
        master[i] = t6;
        moment0[i] = t9;
    }
}

static void lion_1(const float *grad, float *master, float *const *moments, int64_t n,
                   const float *s, float coefficient) {
    lion_1_loop(grad, master, moments[0], n, s, coefficient);
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

#define MOST_MOMENTS 3
static step_t *const STEPS[] = {adam_2, adam_3, sgd_0, sgd_1, adagrad_1, lion_1};
static const int MOMENTS[] = {2, 3, 0, 1, 1, 1};
static const int COLUMNS[] = {10, 10, 7, 7, 4, 7};
static scalars_t *const SCALARS[] = {adam_scalars, adam_scalars, sgd_scalars, sgd_scalars, adagrad_scalars, lion_scalars};
static const int NUMBERS[] = {7, 7, 6, 6, 5, 5};
