/* Vectors, and products of packed matrices with a few rows, for native.c; its head comment describes the layout of matrices. */

#pragma once

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
#define AHEAD 48 /* inputs whose weights are asked for early: a matrix is read once, from the slow end of the caches */

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

/* a * b + c, rounded once where the processor can: explicitly, because compilers fuse only some of these sums. */
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

/* The largest of n numbers, a multiple of 8. */
INLINE float largest(const float *x, int n) {
    vec each = all(-INFINITY);
    for (int i = 0; i < n; i += LANES) {
        const vec eight = *(const vec *)(x + i);
        each = (vec)(((ints)eight & (eight > each)) | ((ints)each & ~(eight > each)));
    }
    float most = each[0];
    for (int i = 1; i < LANES; i++)
        if (each[i] > most) most = each[i];
    return most;
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
INLINE void all_products(const void *matrix, Range share, int in, int out, const float *x, int rows, const int bf16,
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
static int take_blocks(Worker *me, int out, int rows, Range *blocks) {
    const int all = (out + BLOCK - 1) / BLOCK, unit = blocks_at_once(rows);
    if (!take(me, (all + unit - 1) / unit, blocks)) return 0;
    *blocks = (Range){blocks->begin * unit, blocks->end * unit < all ? blocks->end * unit : all};
    return 1;
}

/* Some blocks of y = x W^T, or of y += x W^T where `add`; their outputs. */
static Range multiply(const void *matrix, Range blocks, int in, int out, int bf16, const float *x, int rows, float *y,
                      int add) {
    if (bf16) all_products(matrix, blocks, in, out, x, rows, 1, y, add);
    else all_products(matrix, blocks, in, out, x, rows, 0, y, add);
    return (Range){blocks.begin * BLOCK, blocks.end * BLOCK < out ? blocks.end * BLOCK : out};
}
