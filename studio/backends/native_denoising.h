/* Reverse steps of a diffusion-loss head, for native.c. */

#pragma once

#include "native_vectors.h"

#define ROWS_AT_ONCE 48

/* The network of a diffusion-loss head: `token` numbers in, twice as many out, `depth` residual blocks `width` wide. */
typedef struct {
    int32_t token, width, depth, bf16;
    float eps;
    const void *input, *output, **first, **second;
    const float *input_bias, *output_bias, **first_bias, **second_bias, **norm_weight, **norm_bias;
} Head;

/* States x (steps, tokens, token), each under `copies` conditions. `modulated` has an entry per block (shift, scale,
   gate) and the last layer's (shift, scale); what a state reads is in row `step` * step_rows + `copy` * copy_rows + token
   of each. A row of `table` (steps, 6) has the numbers of `reverse`. */
typedef struct {
    int32_t steps, copies, tokens, threads;
    int64_t step_rows, copy_rows;
    const float *x, **modulated, *scales, *table;
    float limit, *mean, *log_std;
} Denoising;

/* The norm of one row, without weight and bias where those are missing, then its modulation. */
INLINE void modulate(const float *x, const float *weight, const float *bias, const float *shift, const float *scale,
                     int dim, float eps, float *y) {
    vec sums = {0}, squares = {0};
    for (int i = 0; i < dim; i += LANES) sums += *(const vec *)(x + i);
    const float mean = total(sums) / dim;
    for (int i = 0; i < dim; i += LANES) {
        vec apart = *(const vec *)(x + i) - mean;
        squares = fused(apart, apart, squares);
    }
    const float factor = 1.0f / sqrtf(total(squares) / dim + eps);
    for (int i = 0; i < dim; i += LANES) {
        vec unit = (*(const vec *)(x + i) - mean) * factor;
        if (weight) unit = fused(unit, *(const vec *)(weight + i), *(const vec *)(bias + i));
        *(vec *)(y + i) = fused(unit, *(const vec *)(scale + i), *(const vec *)(shift + i));
    }
}

/* What a layer's modulation has for a row, counted over steps, copies and tokens. */
INLINE const float *modulation_of(const Denoising *call, int layer, int row, int numbers) {
    const int token = row % call->tokens, copy = row / call->tokens % call->copies;
    const int64_t step = row / call->tokens / call->copies;
    return call->modulated[layer] + (step * call->step_rows + copy * call->copy_rows + token) * numbers;
}

/* The network over rows `begin` to `begin + rows`; `hidden`, `unit` and `inner` have room for them. */
static void denoise_rows(Worker *me, const Head *head, const Denoising *call, int begin, int rows, float *hidden,
                         float *unit, float *inner, float *out) {
    const int width = head->width, token = head->token, bf16 = head->bf16, per_step = call->copies * call->tokens;
    Range part;
    while (take(me, rows, &part))
        for (int r = part.begin; r < part.end; r++) {
            const int row = begin + r;
            memcpy(inner + (int64_t)r * token,
                   call->x + ((int64_t)(row / per_step) * call->tokens + row % call->tokens) * token,
                   sizeof(float) * token);
        }
    while (take_blocks(me, width, rows, &part)) {
        const Range made = multiply(head->input, part, token, width, bf16, inner, rows, hidden, 0);
        for (int r = 0; r < rows; r++)
            for (int i = made.begin; i < made.end; i += LANES)
                *(vec *)(hidden + (int64_t)r * width + i) += *(const vec *)(head->input_bias + i);
    }
    for (int layer = 0; layer < head->depth; layer++) {
        while (take(me, rows, &part))
            for (int r = part.begin; r < part.end; r++) {
                const float *shift = modulation_of(call, layer, begin + r, 3 * width);
                modulate(hidden + (int64_t)r * width, head->norm_weight[layer], head->norm_bias[layer], shift,
                         shift + width, width, head->eps, unit + (int64_t)r * width);
            }
        while (take_blocks(me, width, rows, &part)) {
            const Range made = multiply(head->first[layer], part, width, width, bf16, unit, rows, inner, 0);
            for (int r = 0; r < rows; r++)
                for (int i = made.begin; i < made.end; i += LANES) {
                    vec *to = (vec *)(inner + (int64_t)r * width + i);
                    *to = silu(*to + *(const vec *)(head->first_bias[layer] + i));
                }
        }
        while (take_blocks(me, width, rows, &part)) {
            const Range made = multiply(head->second[layer], part, width, width, bf16, inner, rows, unit, 0);
            for (int r = 0; r < rows; r++) {
                const float *gate = modulation_of(call, layer, begin + r, 3 * width) + 2 * width;
                for (int i = made.begin; i < made.end; i += LANES) {
                    vec *to = (vec *)(hidden + (int64_t)r * width + i);
                    vec change = *(const vec *)(unit + (int64_t)r * width + i);
                    change += *(const vec *)(head->second_bias[layer] + i);
                    *to = fused(*(const vec *)(gate + i), change, *to);
                }
            }
        }
    }
    while (take(me, rows, &part))
        for (int r = part.begin; r < part.end; r++) {
            const float *shift = modulation_of(call, head->depth, begin + r, 2 * width);
            modulate(hidden + (int64_t)r * width, 0, 0, shift, shift + width, width, head->eps,
                     unit + (int64_t)r * width);
        }
    while (take_blocks(me, 2 * token, rows, &part)) {
        const Range made = multiply(head->output, part, width, 2 * token, bf16, unit, rows, out, 0);
        for (int r = 0; r < rows; r++)
            for (int i = made.begin; i < made.end; i += LANES)
                *(vec *)(out + (int64_t)r * 2 * token + i) += *(const vec *)(head->output_bias + i);
    }
}

/* Mean and log of the standard deviation of the state before x, from the guided noise and the conditional logit: with a
   limit, t2 * clamp(t0 * x - t1 * noise) + t3 * x, else t0 * x - t1 * noise; and t4 + t5 * logit. */
static void reverse(const Head *head, const Denoising *call, int step, int token, const float *out) {
    const int numbers = head->token;
    const float *t = call->table + 6 * step, scale = call->scales[token], limit = call->limit;
    const int64_t place = ((int64_t)step * call->tokens + token) * numbers;
    const float *cond = out + ((int64_t)step * call->copies * call->tokens + token) * 2 * numbers;
    const float *null = call->copies > 1 ? cond + (int64_t)call->tokens * 2 * numbers : cond;
    for (int i = 0; i < numbers; i++) {
        const float x = call->x[place + i], noise = null[i] + scale * (cond[i] - null[i]);
        float aim = t[0] * x - t[1] * noise;
        if (limit > 0) aim = t[2] * (aim > limit ? limit : aim < -limit ? -limit : aim) + t[3] * x;
        call->mean[place + i] = aim;
        call->log_std[place + i] = t[4] + t[5] * cond[numbers + i];
    }
}

typedef struct {
    Head head;
    Denoising call;
    float *scratch;
} Step;

static void run_denoise(Worker *me, const void *arguments) {
    const Step *step = arguments;
    const Head *head = &step->head;
    const Denoising *call = &step->call;
    const int rows = call->steps * call->copies * call->tokens;
    const int64_t room = (int64_t)ROWS_AT_ONCE * (head->width > head->token ? head->width : head->token);
    float *scratch = step->scratch, *out = scratch + 3 * room;
    for (int begin = 0; begin < rows; begin += ROWS_AT_ONCE)
        denoise_rows(me, head, call, begin, rows - begin < ROWS_AT_ONCE ? rows - begin : ROWS_AT_ONCE, scratch,
                     scratch + room, scratch + 2 * room, out + (int64_t)begin * 2 * head->token);
    for (Range part; take(me, call->steps * call->tokens, &part);)
        for (int state = part.begin; state < part.end; state++)
            reverse(head, call, state / call->tokens, state % call->tokens, out);
}

/* A reverse step of every state. `scratch` holds 3 * ROWS_AT_ONCE * max(width, token) numbers, then twice `token` for
   each state and copy. */
void studio_denoise(const Head *head, const Denoising *call, float *scratch) {
    const Step step = {*head, *call, scratch};
    const int64_t rows = (int64_t)call->steps * call->copies * call->tokens;
    const int64_t at_once = rows < ROWS_AT_ONCE ? rows : ROWS_AT_ONCE, weights = (int64_t)head->width * head->width;
    if (rows) together(run_denoise, &step, sizeof step, call->threads, at_once * weights * 2 / 3);
}
