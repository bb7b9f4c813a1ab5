/* Tests of the guesses of Jacobi decoding, for native.c: what `decide` of studio.decoding.couplings computes. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "native_threads.h"
#include "native_vectors.h"

#define SUMMED 64          /* weights of a block whose sum is kept */
#define MOST_TOKENS 65536

/* The k-th largest of n numbers, 1 <= k <= n: of all that have at least k of the numbers at or above them, the largest. */
static float kth_largest(const float *x, int n, int k) {
    uint32_t found = 0; /* floats by rising value, as whole numbers from 0 on */
    for (uint32_t bit = UINT32_C(1) << 31; bit; bit >>= 1) {
        const int32_t least = (int32_t)((found | bit) ^ UINT32_C(0x80000000));
        ints counts = {0};
        for (int i = 0; i < n; i += LANES) {
            const ints bits = *(const ints *)(x + i);
            counts -= (bits ^ ((bits >> 31) & INT32_MAX)) >= least;
        }
        int count = 0;
        for (int i = 0; i < LANES; i++) count += counts[i];
        if (count >= k) found |= bit;
    }
    int32_t bits = (int32_t)(found ^ UINT32_C(0x80000000));
    bits ^= (bits >> 31) & INT32_MAX;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* Guided logits: u + scale * (c - u). */
static void guide(const float *c, const float *u, float scale, int vocab, float *out) {
    for (int i = 0; i < vocab; i += LANES) {
        const vec without = *(const vec *)(u + i);
        *(vec *)(out + i) = (*(const vec *)(c + i) - without) * scale + without;
    }
}

/* The probabilities of logits over a divisor, of the `top_k` likeliest (0: all) and of those that are as likely as the last;
   they may take the logits' place. */
static void softmax(const float *logits, int vocab, int top_k, float divisor, float *p) {
    const float most = largest(logits, vocab) / divisor;
    for (int i = 0; i < vocab; i += LANES) *(vec *)(p + i) = *(const vec *)(logits + i) / divisor;
    const float least = top_k && top_k < vocab ? kth_largest(p, vocab, top_k) : -INFINITY;
    vec sums = {0};
    for (int i = 0; i < vocab; i += LANES) {
        const vec x = *(const vec *)(p + i);
        const vec e = (vec)((ints)exponential(x - most) & (x >= least) & (x - most > -87.0f));
        *(vec *)(p + i) = e;
        sums += e;
    }
    const float sum = total(sums);
    for (int i = 0; i < vocab; i += LANES) *(vec *)(p + i) = *(const vec *)(p + i) / sum;
}

/* The inverse of the distribution function of p, or of max(p - q, 0) where there is a q and anything is left, at a share
   of the whole in (0, 1]. */
static int64_t sample(const float *p, const float *q, int vocab, double share) {
    double sums[MOST_TOKENS / SUMMED], whole = 0;
    for (int first = 0; first < vocab; first += SUMMED) {
        double lanes[LANES] = {0}, sum = 0;
        for (int i = first; i < vocab && i < first + SUMMED; i += LANES)
            for (int lane = 0; lane < LANES; lane++) {
                const float left = q ? p[i + lane] - q[i + lane] : p[i + lane];
                lanes[lane] += left > 0 ? left : 0;
            }
        for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
        sums[first / SUMMED] = sum;
        whole += sum;
    }
    if (!(whole > 0)) return q ? sample(p, 0, vocab, share) : 0;
    const double wanted = share * whole;
    double reached = 0;
    int block = 0;
    while (reached + sums[block] < wanted) reached += sums[block++]; /* in the order of `whole`: ends within it */
    int64_t token = 0;
    for (int i = block * SUMMED; i < vocab && i < (block + 1) * SUMMED && reached < wanted; i++) {
        const float left = q ? p[i] - q[i] : p[i];
        if (!(left > 0)) continue;
        reached += left;
        token = i;
    }
    return token;
}

/* Of `images` windows of `places` tokens: logits (images, places, vocab), guesses for each place but the last, and the
   distributions that they were sampled from, which become those of the next guesses. With scales (images, places) there
   are as many unconditional logits behind the others. Numbers (images, 2 places) from [0, 1): an unused one and one for
   each guess to test, then one for each place to sample. `near` (vocab, width) are each token's nearest ones, of which
   `borrowed` count; with 0 of them nothing is relaxed. A budget below 0 is none. */
typedef struct {
    int32_t images, places, vocab, top_k, width, borrowed, keeps, threads;
    float divisor, tv_budget, ratio_budget;
    const float *logits, *scales;
    float *distributions, *proposals;
    const int64_t *guesses;
    const int32_t *near;
    const double *numbers;
    int64_t *found;
} Guesses;

/* The mass that a guess holds in a test: its own, and what the budgets let it borrow of the nearest tokens. */
static float held_mass(const Guesses *all, const float *p, int64_t guess, float share) {
    const float own = p[guess];
    if (!all->borrowed) return own;
    float bound = INFINITY, sum = 0;
    if (all->tv_budget >= 0) bound = all->tv_budget * share;
    if (all->ratio_budget >= 0 && (all->ratio_budget - 1) * own < bound) bound = (all->ratio_budget - 1) * own;
    const int32_t *near = all->near + guess * all->width;
    for (int i = 0; i < all->borrowed; i++) {
        if (!(sum + p[near[i]] <= bound)) break;
        sum += p[near[i]];
    }
    return own + sum;
}

static void test_window(const Guesses *all, int image) {
    const int places = all->places, vocab = all->vocab;
    const int64_t size = vocab, tested = (int64_t)image * (places - 1), first = (int64_t)image * places;
    const double *tests = all->numbers + 2 * first + 1, *samples = all->numbers + 2 * first + places;
    const float *p = all->distributions + first * size;
    float *q = all->proposals + tested * size;
    int64_t *outcomes = all->found + first + image;
    int right = places - 1;
    for (int place = 0; place < places; place++) {
        const float *here = p + place * size, *proposal = 0;
        const double share = 1 - samples[place];
        if (place < places - 1) {
            const int64_t guess = all->guesses[tested + place];
            const float chance = q[place * size + guess];
            const double number = tests[place] * chance;
            if (place < right && !(number < held_mass(all, here, guess, chance))) right = place;
            outcomes[place] = guess;
            if (place < right || (place > right && all->keeps && number < here[guess])) continue;
            if (place == right || all->keeps) proposal = q + place * size;
        }
        outcomes[place] = sample(here, proposal, vocab, share);
    }
    outcomes[places] = right;
    for (int next = 0; next < places - 1; next++, q += size)
        if (right + 1 + next < places) {
            memcpy(q, p + (right + 1 + next) * size, size * sizeof *q);
        } else {
            memset(q, 0, size * sizeof *q);
            q[outcomes[places - 1]] = 1;
        }
}

static void run_tests(Worker *me, const void *arguments) {
    const Guesses *all = arguments;
    const int64_t size = all->vocab, rows = all->images * all->places;
    for (Range part; take(me, rows, &part);)
        for (int r = part.begin; r < part.end; r++) {
            const float *logits = all->logits + r * size;
            float *p = all->distributions + r * size;
            if (all->scales) guide(logits, logits + rows * size, all->scales[r], all->vocab, p);
            softmax(all->scales ? p : logits, all->vocab, all->top_k, all->divisor, p);
        }
    for (Range part; take(me, all->images, &part);)
        for (int image = part.begin; image < part.end; image++) test_window(all, image);
}

/* Into `found` (images, places + 1): outcomes, and how many guesses pass before the first that fails; vocab is a multiple
   of 8. */
void studio_guesses(const Guesses *all) {
    together(run_tests, all, sizeof *all, all->threads, (int64_t)all->images * all->places * all->vocab * 32);
}
