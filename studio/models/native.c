/* One decoding step of a Llama-style network over a few rows, on a CPU.

   A step reads every weight once and does little with it, so its time is the time to stream the weights. Here that
   stream is all there is: one parallel region for the whole network, each thread with its share of every matrix's
   outputs, and a barrier where the next matrix needs them all. Weights are float32, or bfloat16 where that loses nothing;
   arithmetic is float32. Compiled on first use by native.py, which documents the layout of the arguments. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(16), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define LANES 8

typedef struct {
    int32_t dim, heads, kv_heads, head_dim, hidden, layers, vocab, max_length, bf16, threads;
    float eps;
    const void **wqkv, **wo, **w1, **w3, **w2, *output;
    const float **attention_norm, **ffn_norm, *norm;
} Network;

INLINE float total(vec v) {
    return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
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

INLINE vec weights_at(const void *matrix, int64_t index, const int bf16) {
    if (!bf16) return *(const vec *)((const float *)matrix + index);
    halves h = *(const halves *)((const uint16_t *)matrix + index);
    return (vec)(__builtin_convertvector(h, words) << 16);
}

/* `outputs` consecutive outputs of a matrix (out, in) for `rows` inputs (rows, in): products[output][row]. */
INLINE void products(const void *matrix, int64_t first, int in, const float *x, const int rows, const int outputs,
                     const int bf16, float *result) {
    vec sums[8] = {0};
    for (int i = 0; i < in; i += LANES)
        for (int o = 0; o < outputs; o++) {
            vec w = weights_at(matrix, (first + o) * in + i, bf16);
            for (int r = 0; r < rows; r++) sums[o * rows + r] += w * *(const vec *)(x + (int64_t)r * in + i);
        }
    for (int i = 0; i < outputs * rows; i++) result[i] = total(sums[i]);
}

/* Eight outputs from `first` on for some rows: y[row * stride + output], added to what is there where `add`. */
INLINE void tile(const void *matrix, int64_t first, int in, const float *x, const int rows, const int bf16, float *y,
                 int64_t stride, int add) {
    const int outputs = rows == 8 ? 1 : rows == 4 ? 2 : 4;
    float result[8];
    for (int64_t o = first; o < first + 8; o += outputs) {
        products(matrix, o, in, x, rows, outputs, bf16, result);
        for (int i = 0; i < outputs; i++)
            for (int r = 0; r < rows; r++) {
                float *to = y + r * stride + o + i;
                *to = (add ? *to : 0) + result[i * rows + r];
            }
    }
}

INLINE void tiles(const void *matrix, int begin, int end, int in, const float *x, int rows, const int bf16, float *y,
                  int64_t stride, int add) {
    for (int o = begin; o < end; o += 8)
        for (int done = 0, n; done < rows; done += n) {
            const float *from = x + (int64_t)done * in;
            float *to = y + done * stride;
            n = rows - done;
            if (n >= 8) n = 8, tile(matrix, o, in, from, 8, bf16, to, stride, add);
            else if (n >= 4) n = 4, tile(matrix, o, in, from, 4, bf16, to, stride, add);
            else if (n >= 2) n = 2, tile(matrix, o, in, from, 2, bf16, to, stride, add);
            else tile(matrix, o, in, from, 1, bf16, to, stride, add);
        }
}

typedef struct {
    int begin, end;
} Share;

/* A thread's part of `count` things, in blocks of eight. */
INLINE Share share_of(int count, int thread, int threads) {
    int blocks = count / 8, begin = 8 * (int)((int64_t)blocks * thread / threads);
    return (Share){begin, 8 * (int)((int64_t)blocks * (thread + 1) / threads)};
}

/* This thread's outputs of y = x W^T. */
INLINE void multiply(const void *matrix, Share share, int in, const float *x, int rows, int bf16, float *y,
                     int64_t stride, int add) {
    if (bf16) tiles(matrix, share.begin, share.end, in, x, rows, 1, y, stride, add);
    else tiles(matrix, share.begin, share.end, in, x, rows, 0, y, stride, add);
}

INLINE void normalise(const float *x, const float *weight, int rows, int dim, float eps, float *y) {
    for (int r = 0; r < rows; r++) {
        const float *from = x + (int64_t)r * dim;
        float *to = y + (int64_t)r * dim;
        vec squares = {0};
        for (int i = 0; i < dim; i += LANES) {
            vec v = *(const vec *)(from + i);
            squares += v * v;
        }
        float scale = 1.0f / sqrtf(total(squares) / dim + eps);
        for (int i = 0; i < dim; i += LANES)
            *(vec *)(to + i) = *(const vec *)(from + i) * scale * *(const vec *)(weight + i);
    }
}

INLINE void turn(float *x, const float *cos_sin, int head_dim) {
    for (int i = 0; i < head_dim; i += 2) {
        float even = x[i], odd = x[i + 1], c = cos_sin[i], s = cos_sin[i + 1];
        x[i] = even * c - odd * s;
        x[i + 1] = odd * c + even * s;
    }
}

/* One head of one row over `length` stored positions. */
INLINE void attend(const float *query, const float *keys, const float *values, const float *bias, int length,
                   int head_dim, float *scores, float *out) {
    const float scale = 1.0f / sqrtf((float)head_dim);
    float largest = -INFINITY;
    for (int t = 0; t < length; t++) {
        vec sum = {0};
        for (int i = 0; i < head_dim; i += LANES)
            sum += *(const vec *)(query + i) * *(const vec *)(keys + (int64_t)t * head_dim + i);
        scores[t] = total(sum) * scale + (bias ? bias[t] : 0);
        if (scores[t] > largest) largest = scores[t];
    }
    for (int t = length; t % LANES; t++) scores[t] = -INFINITY;
    vec sums = {0};
    for (int t = 0; t < length; t += LANES) {
        vec e = exponential(*(vec *)(scores + t) - largest);
        e = (vec)((ints)e & (*(vec *)(scores + t) > -INFINITY));
        *(vec *)(scores + t) = e;
        sums += e;
    }
    float inverse = 1.0f / total(sums);
    memset(out, 0, sizeof(float) * head_dim);
    for (int t = 0; t < length; t++) {
        float p = scores[t] * inverse;
        if (p == 0) continue;
        for (int i = 0; i < head_dim; i += LANES)
            *(vec *)(out + i) += p * *(const vec *)(values + (int64_t)t * head_dim + i);
    }
}

void studio_step(const Network *net, int32_t rows, int32_t position, float **caches, int64_t cache_row,
                 const float *bias, int64_t bias_row, const float *cos_sin, float *x, float *scratch, float *logits) {
    const int dim = net->dim, head_dim = net->head_dim, heads = net->heads, kv = net->kv_heads, hidden = net->hidden;
    const int width = (heads + 2 * kv) * head_dim, length = position + 1;
    const int64_t head_size = (int64_t)net->max_length * head_dim;
    float *qkv = scratch, *mixed = qkv + (int64_t)rows * width, *gates = mixed + (int64_t)rows * heads * head_dim;
    float *ups = gates + (int64_t)rows * hidden, *own = ups + (int64_t)rows * hidden;
    const int64_t own_size = (int64_t)rows * dim + net->max_length + LANES;

#pragma omp parallel num_threads(net->threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        float *unit = own + thread * own_size, *scores = unit + (int64_t)rows * dim;
        const Share of_qkv = share_of(width, thread, threads), of_dim = share_of(dim, thread, threads);
        const Share of_hidden = share_of(hidden, thread, threads), of_vocab = share_of(net->vocab, thread, threads);
        for (int layer = 0; layer < net->layers; layer++) {
            normalise(x, net->attention_norm[layer], rows, dim, net->eps, unit);
            multiply(net->wqkv[layer], of_qkv, dim, unit, rows, net->bf16, qkv, width, 0);
#pragma omp barrier
            for (int item = thread; item < rows * kv; item += threads) {
                const int row = item / kv, group = item % kv, queries = heads / kv;
                float *from = qkv + (int64_t)row * width, *key = from + (heads + group) * head_dim;
                float *keys = caches[layer] + row * cache_row + group * head_size, *values = keys + kv * head_size;
                turn(key, cos_sin, head_dim);
                memcpy(keys + (int64_t)position * head_dim, key, sizeof(float) * head_dim);
                memcpy(values + (int64_t)position * head_dim, key + kv * head_dim, sizeof(float) * head_dim);
                for (int head = group * queries; head < (group + 1) * queries; head++) {
                    turn(from + head * head_dim, cos_sin, head_dim);
                    attend(from + head * head_dim, keys, values, bias ? bias + row * bias_row : 0, length, head_dim,
                           scores, mixed + ((int64_t)row * heads + head) * head_dim);
                }
            }
#pragma omp barrier
            multiply(net->wo[layer], of_dim, heads * head_dim, mixed, rows, net->bf16, x, dim, 1);
#pragma omp barrier
            normalise(x, net->ffn_norm[layer], rows, dim, net->eps, unit);
            multiply(net->w1[layer], of_hidden, dim, unit, rows, net->bf16, gates, hidden, 0);
            multiply(net->w3[layer], of_hidden, dim, unit, rows, net->bf16, ups, hidden, 0);
            for (int row = 0; row < rows; row++)
                for (int i = of_hidden.begin; i < of_hidden.end; i += LANES) {
                    vec *gate = (vec *)(gates + (int64_t)row * hidden + i);
                    *gate = silu(*gate) * *(vec *)(ups + (int64_t)row * hidden + i);
                }
#pragma omp barrier
            multiply(net->w2[layer], of_dim, hidden, gates, rows, net->bf16, x, dim, 1);
#pragma omp barrier
        }
        normalise(x, net->norm, rows, dim, net->eps, unit);
        multiply(net->output, of_vocab, dim, unit, rows, net->bf16, logits, net->vocab, 0);
    }
}
