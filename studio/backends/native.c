/* The blocks of a Llama-style network over a few positions of a few rows, and a denoising network, on a CPU.

   One call for the whole network, whose threads share every matrix's outputs (native_threads.h). Matrices are packed: for
   each block of two widest vectors of outputs (the last one filled up with zeros) and each input, the block's weights
   side by side, so that inputs are multiplied by whole vectors and nothing is left to sum up. Weights are float32, or
   bfloat16 where that loses nothing; arithmetic is float32.

   Every sum is taken in an order of its own that depends neither on the number of rows or positions nor on what else is
   pending: a tree of tokens gets, bit by bit, the numbers of its paths taken one token at a time.

   Compiled on first use by native_library.py; cpu_c.py and cpu_c_head.py prepare the arguments. */

#define _GNU_SOURCE
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "native_denoising.h"
#include "native_threads.h"
#include "native_vectors.h"

#define QUERIES 4

typedef struct {
    int32_t dim, heads, kv_heads, head_dim, hidden, layers, bf16, positions;
    float eps;
    const void **wqkv, **wo, **w1, **w3, **w2;
    const float **attention_norm, **ffn_norm, *norm, *rope; /* a norm may be missing; rope: (positions, head_dim) */
} Network;

/* `nodes` new positions of each row, stored behind `base` + `pending`. Each sees its row's first `kept` positions, of the
   pending and new ones those that `visible` (rows, nodes, pending + nodes) says (missing: all before it), and itself; a
   `bias` below 0 hides a position from all others. `cache` holds keys and values (layers, rows, 2, kv_heads, max_length, head_dim). */
typedef struct {
    int32_t rows, nodes, base, pending, max_length, threads;
    int64_t cache_layer, cache_row, bias_row;
    float *cache;
    const int64_t *kept, *positions;
    const uint8_t *visible;
    const float *bias;
} Call;

/* The norm of one position; without a weight, a copy. */
INLINE void normalise(const float *x, const float *weight, int dim, float eps, float *y) {
    if (!weight) {
        memcpy(y, x, sizeof(float) * dim);
        return;
    }
    vec squares = {0};
    for (int i = 0; i < dim; i += LANES) {
        vec v = *(const vec *)(x + i);
        squares = fused(v, v, squares);
    }
    const float scale = 1.0f / sqrtf(total(squares) / dim + eps);
    for (int i = 0; i < dim; i += LANES) *(vec *)(y + i) = *(const vec *)(x + i) * scale * *(const vec *)(weight + i);
}

INLINE void rotate(float *x, const float *cos_sin, int head_dim) {
    for (int i = 0; i < head_dim; i += 2) {
        float even = x[i], odd = x[i + 1], c = cos_sin[i], s = cos_sin[i + 1];
        x[i] = even * c - odd * s;
        x[i + 1] = odd * c + even * s;
    }
}

/* Scores of n queries, `stride` numbers apart, against eight keys. */
INLINE void score_eight(const float *queries, int64_t stride, int n, const float *const *key, int head_dim,
                        float *scores, int64_t width) {
    const float scale = 1.0f / sqrtf((float)head_dim);
    for (int q = 0; q < n; q++) {
        vec sums[LANES] = {0};
        for (int i = 0; i < head_dim; i += LANES) {
            vec query = *(const vec *)(queries + q * stride + i);
            UNROLL for (int j = 0; j < LANES; j++) sums[j] = fused(query, *(const vec *)(key[j] + i), sums[j]);
        }
        *(vec *)(scores + q * width) = totals(sums) * scale;
    }
}

/* Scores of up to QUERIES queries against `kept` stored keys, of which there is room for `most`; room for 7 more scores
   is needed. */
INLINE void score_kept(const float *queries, int64_t stride, int n, const float *keys, int kept, int most,
                       const float *bias, int head_dim, float *scores, int64_t width) {
    for (int t = 0; t < kept; t += LANES) {
        const float *key[LANES];
        for (int j = 0; j < LANES; j++) key[j] = keys + (int64_t)(t + j < kept ? t + j : kept - 1) * head_dim;
        score_eight(queries, stride, n, key, head_dim, scores + t, width);
        if (!bias) continue;
        vec eight = {0};
        if (t + LANES <= most) eight = *(const vec *)(bias + t);
        else memcpy(&eight, bias + t, sizeof(float) * (most - t));
        for (int q = 0; q < n; q++) *(vec *)(scores + q * width + t) += eight;
    }
}

/* Scores of one query against the keys of a list; room for 7 more is needed. */
INLINE void score_listed(const float *query, const float *keys, const int *places, int count, int head_dim,
                         float *scores) {
    for (int k = 0; k < count; k += LANES) {
        const float *key[LANES];
        for (int j = 0; j < LANES; j++) key[j] = keys + (int64_t)places[k + j < count ? k + j : count - 1] * head_dim;
        score_eight(query, 0, 1, key, head_dim, scores + k, 0);
    }
}

/* Scores to weights, short of the factor that is returned. */
INLINE float soften(float *scores, int length) {
    for (; length % LANES; length++) scores[length] = -INFINITY;
    const float most = largest(scores, length);
    vec sums = {0};
    for (int t = 0; t < length; t += LANES) {
        vec score = *(vec *)(scores + t), e = exponential(score - most);
        e = (vec)((ints)e & (score > -INFINITY));
        *(vec *)(scores + t) = e;
        sums += e;
    }
    return 1.0f / total(sums);
}

/* `chunk` vectors of the weighed sums of values for n queries: kept positions first, then those in each one's list. */
INLINE void mix(const float *weights, int64_t width, const int n, const float *values, int kept, const int *seen,
                const int *counts, int head_dim, const int chunk, const float *factors, float *out, int64_t stride) {
    vec sums[3 * QUERIES] = {0};
    for (int t = 0; t < kept; t++) {
        const float *value = values + (int64_t)t * head_dim;
        UNROLL for (int c = 0; c < chunk; c++) {
            vec v = *(const vec *)(value + c * LANES);
            UNROLL for (int q = 0; q < n; q++)
                sums[q * chunk + c] = fused(all(weights[q * width + t]), v, sums[q * chunk + c]);
        }
    }
    UNROLL for (int q = 0; q < n; q++) {
        for (int k = 0; k < counts[q]; k++) {
            const float *value = values + (int64_t)seen[q * width + k] * head_dim;
            const vec weight = all(weights[q * width + kept + k]);
            UNROLL for (int c = 0; c < chunk; c++)
                sums[q * chunk + c] = fused(weight, *(const vec *)(value + c * LANES), sums[q * chunk + c]);
        }
        UNROLL for (int c = 0; c < chunk; c++)
            *(vec *)(out + q * stride + c * LANES) = sums[q * chunk + c] * factors[q];
    }
}

/* All of a head, as many vectors at once as fit the registers. */
INLINE void mix_all(const float *weights, int64_t width, const int n, const float *values, int kept, const int *seen,
                    const int *counts, int head_dim, const float *factors, float *out, int64_t stride) {
    for (int i = 0, left; (left = (head_dim - i) / LANES) > 0;) {
        if (left >= 6 && n <= 2) {
            mix(weights, width, n, values + i, kept, seen, counts, head_dim, 6, factors, out + i, stride);
            i += 6 * LANES;
        } else if (left >= 3) {
            mix(weights, width, n, values + i, kept, seen, counts, head_dim, 3, factors, out + i, stride);
            i += 3 * LANES;
        } else {
            mix(weights, width, n, values + i, kept, seen, counts, head_dim, 1, factors, out + i, stride);
            i += LANES;
        }
    }
}

/* One head of n of a row's new positions from `first` on. `scores` and `seen` have `width` numbers for each. */
static void attend(const Call *call, int row, int first, int n, const float *queries, int64_t stride,
                   const float *keys, const float *values, int head_dim, float *scores, int *seen, int64_t width,
                   float *out, int64_t out_stride) {
    const int kept = (int)call->kept[row], all = call->pending + call->nodes;
    const float *bias = call->bias ? call->bias + row * call->bias_row : 0;
    int counts[QUERIES];
    float factors[QUERIES];
    score_kept(queries, stride, n, keys, kept, call->max_length, bias, head_dim, scores, width);
    for (int q = 0; q < n; q++) {
        const uint8_t *visible = call->visible ? call->visible + ((int64_t)row * call->nodes + first + q) * all : 0;
        const int self = call->pending + first + q;
        counts[q] = 0;
        for (int j = 0; j < all; j++) {
            const int place = call->base + j;
            if (j != self && (!(visible ? visible[j] : j < self) || (bias && bias[place] < 0))) continue;
            seen[q * width + counts[q]++] = place;
        }
        score_listed(queries + q * stride, keys, seen + q * width, counts[q], head_dim, scores + q * width + kept);
        factors[q] = soften(scores + q * width, kept + counts[q]);
    }
    if (n == 4) mix_all(scores, width, 4, values, kept, seen, counts, head_dim, factors, out, out_stride);
    else if (n == 3) mix_all(scores, width, 3, values, kept, seen, counts, head_dim, factors, out, out_stride);
    else if (n == 2) mix_all(scores, width, 2, values, kept, seen, counts, head_dim, factors, out, out_stride);
    else mix_all(scores, width, 1, values, kept, seen, counts, head_dim, factors, out, out_stride);
}

/* Stores the keys and values of a row's new positions for one group of heads, and attends with all queries of it. */
static void attend_group(const Network *net, const Call *call, int layer, int row, int group, float *qkv, float *mixed,
                         float *scores, int *seen) {
    const int head_dim = net->head_dim, heads = net->heads, kv = net->kv_heads, queries = heads / kv;
    const int nodes = call->nodes, stride = (heads + 2 * kv) * head_dim, width = call->max_length + LANES;
    float *keys = call->cache + layer * call->cache_layer + row * call->cache_row;
    keys += (int64_t)group * call->max_length * head_dim;
    float *values = keys + (int64_t)kv * call->max_length * head_dim;
    float *from = qkv + (int64_t)row * nodes * stride, *to = mixed + (int64_t)row * nodes * heads * head_dim;
    for (int node = 0; node < nodes; node++) {
        const int64_t asked = call->positions[(int64_t)row * nodes + node], last = net->positions - 1;
        const float *cos_sin = net->rope + (asked < last ? asked : last) * head_dim;
        const int64_t place = (int64_t)(call->base + call->pending + node) * head_dim;
        float *head = from + (int64_t)node * stride, *key = head + (heads + group) * head_dim;
        rotate(key, cos_sin, head_dim);
        memcpy(keys + place, key, sizeof(float) * head_dim);
        memcpy(values + place, key + kv * head_dim, sizeof(float) * head_dim);
        for (int h = group * queries; h < (group + 1) * queries; h++) rotate(head + h * head_dim, cos_sin, head_dim);
    }
    for (int h = group * queries; h < (group + 1) * queries; h++)
        for (int first = 0; first < nodes; first += QUERIES)
            attend(call, row, first, nodes - first < QUERIES ? nodes - first : QUERIES,
                   from + (int64_t)first * stride + h * head_dim, stride, keys, values, head_dim, scores, seen, width,
                   to + ((int64_t)first * heads + h) * head_dim, heads * head_dim);
}

typedef struct {
    Network net;
    Call call;
    float *x, *scratch;
} Blocks;

static void normalise_all(const float *x, const float *weight, int rows, const Network *net, float *y) {
    for (int r = 0; r < rows; r++)
        normalise(x + (int64_t)r * net->dim, weight, net->dim, net->eps, y + (int64_t)r * net->dim);
}

static void run_blocks(Worker *me, const void *arguments) {
    const Blocks *blocks = arguments;
    const Network *net = &blocks->net;
    const Call *call = &blocks->call;
    const int dim = net->dim, inner = net->heads * net->head_dim, kv = net->kv_heads, hidden = net->hidden;
    const int width = inner + 2 * kv * net->head_dim, rows = call->rows * call->nodes, bf16 = net->bf16;
    const int64_t scores_size = (int64_t)QUERIES * (call->max_length + LANES);
    float *x = blocks->x, *qkv = blocks->scratch, *mixed = qkv + (int64_t)rows * width;
    float *gates = mixed + (int64_t)rows * inner, *ups = gates + (int64_t)rows * hidden;
    float *unit = ups + (int64_t)rows * hidden + me->thread * ((int64_t)rows * dim + 2 * scores_size);
    float *scores = unit + (int64_t)rows * dim;
    int *seen = (int *)(scores + scores_size);
    Range part;

    for (int layer = 0; layer < net->layers; layer++) {
        for (int first = 1; take_blocks(me, width, rows, &part); first = 0) {
            if (first) normalise_all(x, net->attention_norm[layer], rows, net, unit);
            multiply(net->wqkv[layer], part, dim, width, bf16, unit, rows, qkv, 0);
        }
        while (take(me, call->rows * kv, &part))
            for (int item = part.begin; item < part.end; item++)
                attend_group(net, call, layer, item / kv, item % kv, qkv, mixed, scores, seen);
        while (take_blocks(me, dim, rows, &part)) multiply(net->wo[layer], part, inner, dim, bf16, mixed, rows, x, 1);
        for (int first = 1; take_blocks(me, hidden, rows, &part); first = 0) {
            if (first) normalise_all(x, net->ffn_norm[layer], rows, net, unit);
            multiply(net->w1[layer], part, dim, hidden, bf16, unit, rows, gates, 0);
            const Range made = multiply(net->w3[layer], part, dim, hidden, bf16, unit, rows, ups, 0);
            for (int r = 0; r < rows; r++)
                for (int i = made.begin; i < made.end; i += LANES) {
                    vec *gate = (vec *)(gates + (int64_t)r * hidden + i);
                    *gate = silu(*gate) * *(vec *)(ups + (int64_t)r * hidden + i);
                }
        }
        while (take_blocks(me, dim, rows, &part)) multiply(net->w2[layer], part, hidden, dim, bf16, gates, rows, x, 1);
    }
    while (take(me, rows, &part))
        if (net->norm)
            normalise_all(x + (int64_t)part.begin * dim, net->norm, part.end - part.begin, net,
                          x + (int64_t)part.begin * dim);
}

/* All blocks and the last norm over x (rows * nodes, dim), in place. `scratch` holds rows * nodes times (the outputs of
   wqkv, heads * head_dim and twice hidden) numbers, then for each thread rows * nodes * dim and 2 * QUERIES *
   (max_length + LANES). */
void studio_blocks(const Network *net, const Call *call, float *x, float *scratch) {
    const Blocks blocks = {*net, *call, x, scratch};
    const int64_t inner = net->heads * net->head_dim, width = 2 * inner + 2 * net->kv_heads * net->head_dim;
    const int64_t rows = (int64_t)call->rows * call->nodes, weights = net->dim * (width + 3 * (int64_t)net->hidden);
    if (rows) together(run_blocks, &blocks, sizeof blocks, call->threads, rows * weights / 5);
}

typedef struct {
    const void *matrix;
    int in, out, bf16, rows;
    const float *x;
    float *y;
} Product;

static void run_product(Worker *me, const void *arguments) {
    const Product *p = arguments;
    for (Range part; take_blocks(me, p->out, p->rows, &part);)
        multiply(p->matrix, part, p->in, p->out, p->bf16, p->x, p->rows, p->y, 0);
}

/* y = x W^T for x (rows, in). */
void studio_product(const void *matrix, int32_t in, int32_t out, int32_t bf16, int32_t threads, int32_t rows,
                    const float *x, float *y) {
    const Product product = {matrix, in, out, bf16, rows, x, y};
    if (rows) together(run_product, &product, sizeof product, threads, (int64_t)rows * in * out);
}

/* Numbers of the vectors that matrices are packed for: the first half of a block's outputs, and the second. */
int32_t studio_lanes(void) {
    return WIDE;
}

#include "native_guesses.h"
#include "native_pixels.h" /* attends with the functions above */
#include "native_sampling.h"
#include "native_sums.h"
