/* Threads that do a call together, on a machine that they may have to share with others.

   A call is a row of phases, each of so many pieces of work. Whichever thread is there takes the next piece of the phase,
   and the phase is over when all pieces are done: a thread that the system does not run holds up nobody, but for the
   piece in its hands. Waiting is spinning for some microseconds, then sleeping: a thread that spins on takes the processor
   from the one that it waits for. Who does a piece changes none of its numbers. */

#pragma once

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define MOST_THREADS 64
#define PIECES 3                  /* of a phase, for each thread */
#define LEAST_WORK 100000         /* multiplications of a phase that are worth a further thread: some 3 microseconds */
#define PHASE_SPIN 50000          /* nanoseconds */
#define CALL_SPIN 100000          /* nanoseconds, between two calls */
#define ARGUMENTS 320             /* bytes, at most */

/* What a thread knows of the call that it is in. */
typedef struct {
    int threads, thread, next, holds;
    uint32_t phase;
} Worker;

/* A part of some things. */
typedef struct {
    int begin, end;
} Range;

typedef void Run(Worker *, const void *arguments);

/* `place`: the phase in the upper half, the next piece in the lower; phases are counted on from call to call. */
static struct {
    pthread_mutex_t in_use, lock;
    pthread_cond_t phase_over, called;
    _Atomic uint64_t place;
    atomic_int done, waiting, idle;
    atomic_uint calls;
    int helpers;
    Run *run;
    Worker start;
    _Alignas(16) char arguments[ARGUMENTS];
} team = {.in_use = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER,
          .phase_over = PTHREAD_COND_INITIALIZER, .called = PTHREAD_COND_INITIALIZER};

static inline uint32_t phase_of(uint64_t place) {
    return (uint32_t)(place >> 32);
}

static inline int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static inline void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

/* Waits for `condition`: spins, then sleeps on `signal`, counted in `sleepers`. */
#define AWAIT(condition, spin, signal, sleepers)                                 \
    do {                                                                         \
        for (int64_t end = nanoseconds() + (spin); !(condition);) {              \
            pause_briefly();                                                     \
            if (nanoseconds() < end) continue;                                   \
            pthread_mutex_lock(&team.lock);                                      \
            atomic_fetch_add(&(sleepers), 1);                                    \
            while (!(condition)) pthread_cond_wait(&(signal), &team.lock);       \
            atomic_fetch_sub(&(sleepers), 1);                                    \
            pthread_mutex_unlock(&team.lock);                                    \
        }                                                                        \
    } while (0)

/* The next piece of a phase of `count` things, all of the last piece being done; 0 when the phase is over. */
static int take(Worker *me, int count, Range *share) {
    int pieces = me->threads == 1 ? 1 : PIECES * me->threads, piece;
    if (pieces > count) pieces = count;
    if (me->threads == 1) {
        piece = me->next++;
        if (piece == pieces) return me->next = 0;
    } else {
        if (me->holds && atomic_fetch_add(&team.done, 1) + 1 == pieces) {
            atomic_store(&team.done, 0);
            atomic_store(&team.place, (uint64_t)(me->phase + 1) << 32);
            if (atomic_load(&team.waiting)) {
                pthread_mutex_lock(&team.lock);
                pthread_cond_broadcast(&team.phase_over);
                pthread_mutex_unlock(&team.lock);
            }
        }
        uint64_t place = atomic_load(&team.place);
        do {
            piece = (int)(uint32_t)place;
            me->holds = phase_of(place) == me->phase && piece < pieces;
        } while (me->holds && !atomic_compare_exchange_weak(&team.place, &place, place + 1));
        if (!me->holds) {
            AWAIT(phase_of(atomic_load(&team.place)) != me->phase, PHASE_SPIN, team.phase_over, team.waiting);
            me->phase++;
            return 0;
        }
    }
    *share = (Range){(int)((int64_t)count * piece / pieces), (int)((int64_t)count * (piece + 1) / pieces)};
    return 1;
}

/* A helper comes to a call late, or not at all; it then finds phases over and pieces taken, and touches nothing. */
static void *help(void *number) {
    unsigned seen = 0;
    for (;;) {
        AWAIT(atomic_load(&team.calls) != seen, CALL_SPIN, team.called, team.idle);
        _Alignas(16) char arguments[ARGUMENTS];
        pthread_mutex_lock(&team.lock);
        seen = atomic_load(&team.calls);
        Worker me = team.start;
        Run *run = team.run;
        memcpy(arguments, team.arguments, ARGUMENTS);
        pthread_mutex_unlock(&team.lock);
        me.thread = (int)(intptr_t)number;
        if (me.thread < me.threads) run(&me, arguments);
    }
    return 0;
}

/* A process that was forked has none of the threads. */
static void forked(void) {
    pthread_mutex_init(&team.in_use, 0);
    pthread_mutex_init(&team.lock, 0);
    pthread_cond_init(&team.phase_over, 0);
    pthread_cond_init(&team.called, 0);
    team.helpers = 0;
    atomic_store(&team.waiting, 0);
    atomic_store(&team.idle, 0);
    atomic_store(&team.done, 0);
    atomic_store(&team.place, (uint64_t)(phase_of(atomic_load(&team.place)) + 1) << 32);
}

static void prepare(void) {
    pthread_atfork(0, 0, forked);
}

/* Has helpers for so many threads in all, or as many as the system gives; signals are left to the program's own. */
static int hire(int threads) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, prepare);
    if (team.helpers + 1 >= threads) return threads;
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);
    for (pthread_t helper; team.helpers + 1 < threads; team.helpers++) {
        if (pthread_create(&helper, 0, help, (void *)(intptr_t)(team.helpers + 1))) break;
        pthread_detach(helper);
    }
    pthread_sigmask(SIG_SETMASK, &before, 0);
    return team.helpers + 1;
}

/* Runs a call with at most so many threads: with this one alone where a phase has little `work` (multiplications), or
   where another call has the helpers. */
static void together(Run *run, const void *arguments, size_t size, int threads, int64_t work) {
    Worker me = {.threads = 1};
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads > work / LEAST_WORK) threads = (int)(work / LEAST_WORK);
    if (threads < 2 || pthread_mutex_trylock(&team.in_use)) {
        run(&me, arguments);
        return;
    }
    me.threads = hire(threads);
    if (me.threads > 1) {
        pthread_mutex_lock(&team.lock);
        me.phase = phase_of(atomic_load(&team.place));
        team.start = me;
        team.run = run;
        memcpy(team.arguments, arguments, size);
        atomic_fetch_add(&team.calls, 1);
        if (atomic_load(&team.idle)) pthread_cond_broadcast(&team.called);
        pthread_mutex_unlock(&team.lock);
    }
    run(&me, arguments);
    pthread_mutex_unlock(&team.in_use);
}
