/* The blocks of a Llama-style network over a few positions of a few rows, and a denoising network, on a CPU.

   One call for the whole network, whose threads share every matrix's outputs (native_threads.h). Matrices are packed: for
   each block of two widest vectors of outputs (the last one filled up with zeros) and each input, the block's weights
   side by side, so that inputs are multiplied by whole vectors and nothing is left to sum up. Weights are float32, or
   bfloat16 where that loses nothing; arithmetic is float32.

   Every sum is taken in an order of its own that depends neither on the number of rows or positions nor on what else is
   pending: a tree of tokens gets, bit by bit, the numbers of its paths taken one token at a time.

   Compiled on first use by native_library.py; native_blocks.py and native_head.py make the arguments. */

#define _GNU_SOURCE
#if defined(__FMA__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "native_threads.h"

#if defined(__AVX512F__)
#define WIDE 16 /* numbers of the widest vector */
#define MOST_TOGETHER 12 /* rows whose sums fit the registers, beside a block of weights */
#else
#define WIDE 8
#define MOST_TOGETHER 6
#endif

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef float wide __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define LANES 8
#define BLOCK (2 * WIDE)
#define QUERIES 4
#define AHEAD 48 /* inputs whose weights are asked for early: a matrix is read once, from the slow end of the caches */

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

typedef struct {
    int32_t dim, heads, kv_heads, head_dim, hidden, layers, bf16, positions;
    float eps;
    const void **wqkv, **wo, **w1, **w3, **w2;
    const float **attention_norm, **ffn_norm, *norm, *turns; /* a norm may be missing; turns: (positions, head_dim) */
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

/* a * b + c, rounded once where the processor can: said outright, as compilers fuse some of such sums and not others. */
INLINE vec fused(vec a, vec b, vec c) {
#if defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    vec sum;
    for (int i = 0; i < LANES; i++) sum[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return sum;
#else
    return a * b + c;
#endif
}

INLINE wide fused_wide(wide a, wide b, wide c) {
#if defined(__AVX512F__)
    return (wide)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return fused(a, b, c);
#endif
}

INLINE wide all_wide(float number) {
#if defined(__AVX512F__)
    return (wide)_mm512_set1_ps(number);
#else
    return (wide){number, number, number, number, number, number, number, number};
#endif
}

INLINE vec all(float number) {
    return (vec){number, number, number, number, number, number, number, number};
}

INLINE float total(vec v) {
    return ((v[0] + v[2]) + (v[1] + v[3])) + ((v[4] + v[6]) + (v[5] + v[7]));
}

/* The totals of eight vectors, each summed in the order of `total`. */
INLINE vec totals(const vec *v) {
    vec pairs[4], fours[2];
    UNROLL for (int i = 0; i < 4; i++)
        pairs[i] = SHUFFLE(v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
                   SHUFFLE(v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    UNROLL for (int i = 0; i < 2; i++)
        fours[i] = SHUFFLE(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                   SHUFFLE(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           SHUFFLE(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

/* e**x within 2 units in the last place for x <= 0, and 0 below -87. */
INLINE vec exponential(vec x) {
    const vec lowest = x * 0 - 87.0f;
    x = (vec)(((ints)x & (x > lowest)) | ((ints)lowest & ~(x > lowest)));
    vec whole = x * 1.44269504f - 0.5f;
    ints n = __builtin_convertvector(whole, ints);
    vec k = __builtin_convertvector(n, vec);
    vec r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((n + 127) << 23);
}

/* x / (1 + e**-x) */
INLINE vec silu(vec x) {
    ints positive = x > 0.0f;
    vec e = exponential((vec)((ints)x | INT32_MIN));
    vec top = (vec)((positive & (ints)x) | (~positive & (ints)(x * e)));
    return top / (1.0f + e);
}

/* `blocks` blocks of outputs for `rows` inputs (rows, in): y (rows, out), added to what is there where `add`. */
INLINE void products(const void *matrix, int64_t first, int in, int out, const float *x, const int rows,
                     const int blocks, const int bf16, float *y, int add) {
    wide sums[2 * MOST_TOGETHER] = {0};
    for (int i = 0; i < in; i++)
        UNROLL for (int b = 0; b < blocks; b++) {
            const int64_t place = ((first + b) * in + i) * BLOCK;
            wide low, high;
            __builtin_prefetch((const char *)matrix + (place + AHEAD * BLOCK) * (bf16 ? 2 : 4));
            if (bf16) {
                words pairs = *(const words *)((const uint16_t *)matrix + place);
                low = (wide)(pairs << 16);
                high = (wide)(pairs & 0xffff0000u);
            } else {
                low = *(const wide *)((const float *)matrix + place);
                high = *(const wide *)((const float *)matrix + place + WIDE);
            }
            UNROLL for (int r = 0; r < rows; r++) {
                wide number = all_wide(x[(int64_t)r * in + i]), *sum = sums + 2 * (b * rows + r);
                sum[0] = fused_wide(number, low, sum[0]);
                sum[1] = fused_wide(number, high, sum[1]);
            }
        }
    UNROLL for (int b = 0; b < blocks; b++)
        UNROLL for (int r = 0; r < rows; r++) {
            const float *sum = (const float *)(sums + 2 * (b * rows + r));
            const int64_t output = (first + b) * BLOCK;
            float *to = y + (int64_t)r * out + output;
            for (int i = 0; i < BLOCK && output + i < out; i += LANES) {
                vec eight = *(const vec *)(sum + i);
                *(vec *)(to + i) = add ? (vec)(*(vec *)(to + i) + eight) : eight;
            }
        }
}

/* How many blocks keep a core busy: more for fewer rows. */
INLINE int blocks_at_once(int rows) {
    return rows == 1 ? 4 : rows == 2 ? 2 : 1;
}

/* Block by block, each read once for up to MOST_TOGETHER rows. */
INLINE void all_products(const void *matrix, Share share, int in, int out, const float *x, int rows, const int bf16,
                         float *y, int add) {
    const int together = blocks_at_once(rows);
    for (int b = share.begin, blocks; b < share.end; b += blocks) {
        blocks = share.end - b < together ? 1 : together;
        for (int done = 0, groups = (rows + MOST_TOGETHER - 1) / MOST_TOGETHER, n; done < rows; done += n, groups--) {
            const float *from = x + (int64_t)done * in;
            float *to = y + (int64_t)done * out;
            n = (rows - done + groups - 1) / groups;
#define ROWS(number, blocks)                                                  \
    case number:                                                              \
        products(matrix, b, in, out, from, number, blocks, bf16, to, add);    \
        break;
            if (blocks == 4) products(matrix, b, in, out, from, 1, 4, bf16, to, add);
            else if (blocks == 2) products(matrix, b, in, out, from, 2, 2, bf16, to, add);
            else
                switch (n) {
                    ROWS(1, 1) ROWS(2, 1) ROWS(3, 1) ROWS(4, 1) ROWS(5, 1) ROWS(6, 1)
#if MOST_TOGETHER > 6
                    ROWS(7, 1) ROWS(8, 1) ROWS(9, 1) ROWS(10, 1) ROWS(11, 1) ROWS(12, 1)
#endif
                }
#undef ROWS
        }
    }
}

/* The next blocks of a matrix with so many outputs, for this thread, as of `take`. */
static int take_blocks(Worker *me, int out, int rows, Share *blocks) {
    const int all = (out + BLOCK - 1) / BLOCK, unit = blocks_at_once(rows);
    if (!take(me, (all + unit - 1) / unit, blocks)) return 0;
    *blocks = (Share){blocks->begin * unit, blocks->end * unit < all ? blocks->end * unit : all};
    return 1;
}

/* Some blocks of y = x W^T, or of y += x W^T where `add`; their outputs. */
static Share multiply(const void *matrix, Share blocks, int in, int out, int bf16, const float *x, int rows, float *y,
                      int add) {
    if (bf16) all_products(matrix, blocks, in, out, x, rows, 1, y, add);
    else all_products(matrix, blocks, in, out, x, rows, 0, y, add);
    return (Share){blocks.begin * BLOCK, blocks.end * BLOCK < out ? blocks.end * BLOCK : out};
}

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

INLINE void turn(float *x, const float *cos_sin, int head_dim) {
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

/* Scores of up to QUERIES queries against `kept` stored keys; room for 7 more is needed. */
INLINE void score_kept(const float *queries, int64_t stride, int n, const float *keys, int kept, const float *bias,
                       int head_dim, float *scores, int64_t width) {
    for (int t = 0; t < kept; t += LANES) {
        const float *key[LANES];
        for (int j = 0; j < LANES; j++) key[j] = keys + (int64_t)(t + j < kept ? t + j : kept - 1) * head_dim;
        score_eight(queries, stride, n, key, head_dim, scores + t, width);
        if (bias)
            for (int q = 0; q < n; q++)
                for (int j = 0; j < LANES && t + j < kept; j++) scores[q * width + t + j] += bias[t + j];
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
    float largest = -INFINITY;
    for (int t = 0; t < length; t++)
        if (scores[t] > largest) largest = scores[t];
    for (int t = length; t % LANES; t++) scores[t] = -INFINITY;
    vec sums = {0};
    for (int t = 0; t < length; t += LANES) {
        vec score = *(vec *)(scores + t), e = exponential(score - largest);
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
    score_kept(queries, stride, n, keys, kept, bias, head_dim, scores, width);
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
        const float *cos_sin = net->turns + (asked < last ? asked : last) * head_dim;
        const int64_t place = (int64_t)(call->base + call->pending + node) * head_dim;
        float *head = from + (int64_t)node * stride, *key = head + (heads + group) * head_dim;
        turn(key, cos_sin, head_dim);
        memcpy(keys + place, key, sizeof(float) * head_dim);
        memcpy(values + place, key + kv * head_dim, sizeof(float) * head_dim);
        for (int h = group * queries; h < (group + 1) * queries; h++) turn(head + h * head_dim, cos_sin, head_dim);
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
    Share part;

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
            const Share made = multiply(net->w3[layer], part, dim, hidden, bf16, unit, rows, ups, 0);
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
    if (rows) together(run_blocks, &blocks, sizeof blocks, call->threads, rows * net->layers * weights);
}

typedef struct {
    const void *matrix;
    int in, out, bf16, rows;
    const float *x;
    float *y;
} Product;

static void run_product(Worker *me, const void *arguments) {
    const Product *p = arguments;
    for (Share part; take_blocks(me, p->out, p->rows, &part);)
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
    Share part;
    while (take(me, rows, &part))
        for (int r = part.begin; r < part.end; r++) {
            const int row = begin + r;
            memcpy(inner + (int64_t)r * token,
                   call->x + ((int64_t)(row / per_step) * call->tokens + row % call->tokens) * token,
                   sizeof(float) * token);
        }
    while (take_blocks(me, width, rows, &part)) {
        const Share made = multiply(head->input, part, token, width, bf16, inner, rows, hidden, 0);
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
            const Share made = multiply(head->first[layer], part, width, width, bf16, unit, rows, inner, 0);
            for (int r = 0; r < rows; r++)
                for (int i = made.begin; i < made.end; i += LANES) {
                    vec *to = (vec *)(inner + (int64_t)r * width + i);
                    *to = silu(*to + *(const vec *)(head->first_bias[layer] + i));
                }
        }
        while (take_blocks(me, width, rows, &part)) {
            const Share made = multiply(head->second[layer], part, width, width, bf16, inner, rows, unit, 0);
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
        const Share made = multiply(head->output, part, width, 2 * token, bf16, unit, rows, out, 0);
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
    const float *told = out + ((int64_t)step * call->copies * call->tokens + token) * 2 * numbers;
    const float *null = call->copies > 1 ? told + (int64_t)call->tokens * 2 * numbers : told;
    for (int i = 0; i < numbers; i++) {
        const float x = call->x[place + i], noise = null[i] + scale * (told[i] - null[i]);
        float aim = t[0] * x - t[1] * noise;
        if (limit > 0) aim = t[2] * (aim > limit ? limit : aim < -limit ? -limit : aim) + t[3] * x;
        call->mean[place + i] = aim;
        call->log_std[place + i] = t[4] + t[5] * told[numbers + i];
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
    for (Share part; take(me, call->steps * call->tokens, &part);)
        for (int state = part.begin; state < part.end; state++)
            reverse(head, call, state / call->tokens, state % call->tokens, out);
}

/* A reverse step of every state. `scratch` holds 3 * ROWS_AT_ONCE * max(width, token) numbers, then twice `token` for
   each state and copy. */
void studio_denoise(const Head *head, const Denoising *call, float *scratch) {
    const Step step = {*head, *call, scratch};
    const int64_t rows = (int64_t)call->steps * call->copies * call->tokens;
    const int64_t weights = head->width * (3 * (int64_t)head->token + 2 * (int64_t)head->depth * head->width);
    if (rows) together(run_denoise, &step, sizeof step, call->threads, rows * weights);
}
