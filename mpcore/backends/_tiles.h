/* The update of what is kept in other stores than float32: tile by tile, in the first-level cache.
 *
 * Gradients, masters and moments are decoded into float32, updated by the loop of a rule over float32
 * numbers (`_loop.h`), and encoded: rules know nothing of stores, and stores nothing of rules. Every number
 * is read from memory once and written once.
 */

/* A tile in float32: where it lies in memory, or copies of it. */
typedef struct {
    float grad[TILE], param[TILE], moments[MOST_MOMENTS][TILE];
    uint32_t words[2][TILE]; /* random bits */
} room_t;

/* Elements `at` to `at + n` of a tensor, at most TILE. */
typedef struct {
    int64_t tensor, at, n;
} tile_t;

/* Returns elements in float32 and in a number that loops take: where they are, or in `room`. */
static float *padded(const float *from, int64_t n, float *room) {
    if (n % LANES == 0) return (float *)from;
    memset(room + n - n % LANES, 0, LANES * sizeof *room);
    memcpy(room, from, (size_t)n * sizeof *room);
    return room;
}

/* Puts 0 behind the end of what is decoded. */
static float *cleared(float *room, int64_t n) {
    if (n % LANES) memset(room + n - n % LANES, 0, LANES * sizeof *room);
    return room;
}

static float *decode_grad(const work_t *work, tile_t tile, float *room) {
    const void *grad = work->grads[tile.tensor];
    if (work->grad_dtype == FLOAT32) return padded((const float *)grad + tile.at, tile.n, room);
    const uint16_t *from = (const uint16_t *)grad + tile.at;
    (work->grad_dtype == FLOAT16 ? widen_float16 : widen_bfloat16)(from, cleared(room, tile.n), tile.n);
    return room;
}

static float *decode_master(const work_t *work, tile_t tile, float *room) {
    void *master = work->masters[tile.tensor];
    if (work->store == FLOAT32_MASTERS) return padded((const float *)master + tile.at, tile.n, room);
    const uint16_t *weight = work->weights[tile.tensor] + tile.at;
    const int16_t *rest = (const int16_t *)master + tile.at;
    cleared(room, tile.n);
    if (work->store == NO_MASTERS) {
        widen_bfloat16(weight, room, tile.n);
    } else if (work->weight_dtype == BFLOAT16) {
        join_bfloat16(weight, rest, room, tile.n);
    } else {
        widen_float16(weight, room, tile.n);
        join_float16(rest, room, tile.n);
    }
    return room;
}

/* Writes a master and its weight; returns how many weights were clamped. */
static int64_t encode_master(const work_t *work, tile_t tile, float *param, const uint32_t *words) {
    void *master = work->masters[tile.tensor];
    if (work->store == FLOAT32_MASTERS && param != (float *)master + tile.at)
        memcpy((float *)master + tile.at, param, (size_t)tile.n * sizeof *param);
    if (!work->weights) return 0;
    uint16_t *weight = work->weights[tile.tensor] + tile.at;
    if (work->store == SPLIT) return split(work->weight_dtype, param, weight, (int16_t *)master + tile.at, tile.n);
    if (work->store == NO_MASTERS) {
        round_randomly(param, weight, tile.n, words, 16);
        return largest_of(param, tile.n) > LARGEST(BFLOAT16) ? count_beyond(BFLOAT16, param, tile.n) : 0;
    }
    const int streaming = work->streaming && ((uintptr_t)weight & 31) == 0;
    return round_all(work->weight_dtype, param, weight, tile.n, streaming);
}

/* Returns the scale of the block that a tile is. */
static float *scale_of(const work_t *work, tile_t tile, int moment) {
    const int64_t row = work->rows[tile.tensor], blocks = (row + TILE - 1) / TILE;
    float *scales = work->scales[moment * work->tensors + tile.tensor];
    return scales + tile.at / row * blocks + tile.at % row / TILE;
}

static float *decode_moment(const work_t *work, tile_t tile, int moment, float *room) {
    const int store = work->moment_stores[moment];
    const void *held = work->moments[moment * work->tensors + tile.tensor];
    if (store == FLOAT32_MOMENTS) return padded((const float *)held + tile.at, tile.n, room);
    cleared(room, tile.n);
    if (store == BFLOAT16_MOMENTS) {
        widen_bfloat16((const uint16_t *)held + tile.at, room, tile.n);
    } else {
        const float scale = *scale_of(work, tile, moment);
        (store == INT8_MOMENTS ? decode_int8 : decode_uint8)((const uint8_t *)held + tile.at, room, tile.n, scale);
    }
    return room;
}

static void encode_moment(const work_t *work, tile_t tile, int moment, const float *value,
                          uint32_t words[2][TILE]) {
    const int store = work->moment_stores[moment], shift = 16 * (moment % 2);
    void *held = work->moments[moment * work->tensors + tile.tensor];
    if (store == FLOAT32_MOMENTS) {
        if (value != (float *)held + tile.at)
            memcpy((float *)held + tile.at, value, (size_t)tile.n * sizeof *value);
    } else if (store == BFLOAT16_MOMENTS) {
        round_randomly(value, (uint16_t *)held + tile.at, tile.n, words[moment / 2], shift);
    } else {
        *scale_of(work, tile, moment) = encode_block(value, (uint8_t *)held + tile.at, tile.n,
                                                     words[moment / 2], shift, store == INT8_MOMENTS);
    }
}

/* Updates a tile; returns how many weights were clamped. */
static int64_t update_tile(const work_t *work, tile_t tile, room_t *room) {
    const int step = work->step, moments = MOMENTS[step];
    float *m[MOST_MOMENTS] = {0};
    float *grad = decode_grad(work, tile, room->grad), *param = decode_master(work, tile, room->param);
    for (int i = 0; i < moments; i++) m[i] = decode_moment(work, tile, i, room->moments[i]);
    const float *scalars = work->scalars + COLUMNS[step] * tile.tensor;
    const int64_t n = (tile.n + LANES - 1) / LANES * LANES;
    LOOPS[step][NO_WEIGHTS](grad, param, m[0], m[1], m[2], NULL, n, scalars, work->coefficient, 0);
    for (int word = 0; word < 2; word++)
        if (work->draws && (work->words >> word & 1)) {
            const draws_t *draws = work->draws + tile.tensor;
            const uint32_t offset = (uint32_t)(work->offsets[tile.tensor] + tile.at);
            draw(draws->first[word], draws->between[word], offset, room->words[word], tile.n);
        }
    for (int i = 0; i < moments; i++) encode_moment(work, tile, i, m[i], room->words);
    return encode_master(work, tile, param, room->words[1]);
}
