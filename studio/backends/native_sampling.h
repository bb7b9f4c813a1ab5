/* Which tokens win an exponential race, for native.c: what `sample_rows` of studio.decoding.sampling computes. */

#pragma once

#include <math.h>
#include <stdint.h>

#include "native_threads.h"
#include "native_vectors.h"

#define SURE 1.00001f /* how far a winner is ahead, at least: 20 times what rounding may move */

/* The winner among `vocab` tokens, each with exp((logit - largest) / divisor) over its noise, of the `top_k` likeliest
   (0: all); -1 where two are too close to be sure that other roundings have the same one. */
static int64_t winner(const float *logits, const float *noise, int vocab, int top_k, float divisor) {
    const float most = largest(logits, vocab) / divisor;
    for (float floor = -INFINITY;;) { /* of logits that may win */
        vec best = {0}, next = {0};
        ints where = {0};
        const ints lane = {0, 1, 2, 3, 4, 5, 6, 7};
        for (int i = 0; i < vocab; i += LANES) {
            const vec x = *(const vec *)(logits + i);
            vec score = exponential(x / divisor - most) / *(const vec *)(noise + i);
            score = (vec)((ints)score & (x > floor));
            const ints ahead = score > best, between = score > next;
            const ints second = ahead & (ints)best;
            next = (vec)(second | (~ahead & ((between & (ints)score) | (~between & (ints)next))));
            best = (vec)((ahead & (ints)score) | (~ahead & (ints)best));
            where = (ahead & (lane + i)) | (~ahead & where);
        }
        int first = 0;
        for (int i = 1; i < LANES; i++)
            if (best[i] > best[first]) first = i;
        float second = next[first];
        for (int i = 0; i < LANES; i++)
            if (i != first && best[i] > second) second = best[i];
        if (!(best[first] > second * SURE)) return -1;
        const int64_t token = where[first];
        if (!top_k || top_k >= vocab) return token;
        ints count = {0};
        for (int i = 0; i < vocab; i += LANES) count -= *(const vec *)(logits + i) / divisor > logits[token] / divisor;
        int likelier = 0;
        for (int i = 0; i < LANES; i++) likelier += count[i];
        if (likelier < top_k) return token;
        floor = logits[token];
    }
}

typedef struct {
    int32_t rows, vocab, top_k, threads;
    float divisor;
    const float *logits, *noise;
    const int64_t *places;
    int64_t *winners;
} Race;

static void run_races(Worker *me, const void *arguments) {
    const Race *race = arguments;
    for (Range part; take(me, race->rows, &part);)
        for (int r = part.begin; r < part.end; r++)
            race->winners[r] = winner(race->logits + (int64_t)r * race->vocab,
                                      race->noise + race->places[r] * race->vocab, race->vocab, race->top_k, race->divisor);
}

/* `winners` (rows) of logits (rows, vocab) with the rows `places` (rows) of the noise; vocab is a multiple of 8. */
void studio_winners(const Race *race) {
    together(run_races, race, sizeof *race, race->threads, (int64_t)race->rows * race->vocab * 8);
}
