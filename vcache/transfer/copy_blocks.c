/* Copies blocks between planes and payloads in host memory, past the caches, by several threads. Called through ctypes by
 * cpu.py, which has checked every argument, and by threads.py; the GIL is not held. Plain C: no Python header is needed to
 * build it.
 *
 * A copied block is not read again before the caches have long been used for something else, so it is written with
 * non-temporal stores: the processor then need not read what it is about to overwrite (a third of a plain copy's traffic). */
#define _GNU_SOURCE /* threads' CPUs */
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>

#ifdef __SSE2__ /* every x86-64 has it */
#include <emmintrin.h>

enum { VECTOR = 16, LINE = 64, AHEAD = 512 };

static void copy(uint8_t *to, const uint8_t *from, size_t nbytes)
{
    size_t head = -(uintptr_t)to & (VECTOR - 1);
    if (head > nbytes)
        head = nbytes;
    memcpy(to, from, head);
    to += head, from += head, nbytes -= head;
    for (; nbytes >= LINE; to += LINE, from += LINE, nbytes -= LINE) {
        _mm_prefetch((const char *)from + AHEAD, _MM_HINT_NTA); /* may lie beyond the end: a prefetch never faults */
        const __m128i *source = (const __m128i *)from;
        __m128i first = _mm_loadu_si128(source), second = _mm_loadu_si128(source + 1);
        __m128i third = _mm_loadu_si128(source + 2), fourth = _mm_loadu_si128(source + 3);
        __m128i *target = (__m128i *)to;
        _mm_stream_si128(target, first);
        _mm_stream_si128(target + 1, second);
        _mm_stream_si128(target + 2, third);
        _mm_stream_si128(target + 3, fourth);
    }
    memcpy(to, from, nbytes);
}

/* Non-temporal stores are not ordered among themselves, nor before later ones: a record must not be seen before its payload. */
static void finish(void) { _mm_sfence(); }

#else

static void copy(uint8_t *to, const uint8_t *from, size_t nbytes) { memcpy(to, from, nbytes); }
static void finish(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

#endif

/* Block b is at ``address + b * stride``. In a payload of n blocks the plane begins at ``n * before``. */
struct plane {
    int64_t address, stride, block_bytes, before;
};

/* One call. Its blocks are numbered as they lie in the payloads: by chunk, by plane, by block. */
struct job {
    const struct plane *planes;
    int64_t plane_count;
    const int64_t *ids; /* [chunks, per_chunk] */
    int64_t per_chunk;
    uint8_t *segment;
    const int64_t *offsets; /* [chunks] */
    int to_payload;
    int64_t count, step, next;
    int wanted, helping; /* helpers that may still come, and those that are at it */
    struct job *following;
};

/* Neighbours without a gap are one run. */
static void copy_blocks(const struct job *job, int64_t first, int64_t last)
{
    for (int64_t at = first, next; at < last; at = next) {
        int64_t row = at / job->per_chunk, block = at % job->per_chunk, chunk = row / job->plane_count;
        const struct plane *plane = job->planes + row % job->plane_count;
        const int64_t *ids = job->ids + chunk * job->per_chunk;
        int64_t end = block + (last - at) < job->per_chunk ? block + (last - at) : job->per_chunk, after = block + 1;
        while (plane->stride == plane->block_bytes && after < end && ids[after] == ids[after - 1] + 1)
            after++;
        next = at + (after - block);
        uint8_t *blocks = (uint8_t *)(uintptr_t)(plane->address + ids[block] * plane->stride);
        uint8_t *packed =
            job->segment + job->offsets[chunk] + job->per_chunk * plane->before + block * plane->block_bytes;
        size_t nbytes = (size_t)((after - block) * plane->block_bytes);
        if (job->to_payload)
            copy(packed, blocks, nbytes);
        else
            copy(blocks, packed, nbytes);
    }
}

/* Each thread takes the next few blocks when it is done with its last, so one that gets no CPU delays nobody for long. */
static void work_off(struct job *job)
{
    int64_t first;
    while ((first = __atomic_fetch_add(&job->next, job->step, __ATOMIC_RELAXED)) < job->count)
        copy_blocks(job, first, first + job->step < job->count ? first + job->step : job->count);
    finish();
}

/* --- helpers ---------------------------------------------------------------------------------------------------------- */

enum { MAX_HELPERS = 64 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t called = PTHREAD_COND_INITIALIZER, done = PTHREAD_COND_INITIALIZER;
static struct job *jobs; /* those that may have more helpers, the oldest first */
static int helper_count;
static struct helper {
    pthread_t thread;
    cpu_set_t allowed;
    int elsewhere_than; /* the CPU it keeps away from */
} helpers[MAX_HELPERS];

/* A helper that is woken on its caller's CPU shares it for as long as the copy lasts: the scheduler does not look for another
 * one within the few milliseconds. */
static void send_elsewhere(int cpu)
{
    for (struct helper *helper = helpers; helper < helpers + helper_count; helper++) {
        cpu_set_t others = helper->allowed;
        if (helper->elsewhere_than == cpu)
            continue;
        CPU_CLR(cpu, &others);
        if (CPU_COUNT(&others) && !pthread_setaffinity_np(helper->thread, sizeof others, &others))
            helper->elsewhere_than = cpu;
    }
}

/* Makes the calling thread a helper for as long as the process lives. */
void vcache_copy_help(void)
{
    pthread_mutex_lock(&lock);
    if (helper_count < MAX_HELPERS) {
        struct helper *me = helpers + helper_count++;
        me->thread = pthread_self();
        me->elsewhere_than = -1;
        CPU_ZERO(&me->allowed);
        pthread_getaffinity_np(me->thread, sizeof me->allowed, &me->allowed);
    }
    for (;;) {
        while (!jobs)
            pthread_cond_wait(&called, &lock);
        struct job *job = jobs;
        job->helping++;
        if (!--job->wanted)
            jobs = job->following;
        pthread_mutex_unlock(&lock);
        work_off(job);
        pthread_mutex_lock(&lock);
        if (!--job->helping)
            pthread_cond_broadcast(&done);
    }
}

/* In a forked child: the helpers were its parent's, and one may have held the lock. */
void vcache_copy_forget_helpers(void)
{
    static const pthread_mutex_t open = PTHREAD_MUTEX_INITIALIZER;
    static const pthread_cond_t nobody = PTHREAD_COND_INITIALIZER;
    lock = open, called = done = nobody;
    jobs = 0, helper_count = 0;
}

/* Between the blocks ``ids`` of each chunk and the payload at its offset. ``step``: blocks that a thread takes at a time. At most
 * ``helpers_wanted`` helpers take part. Nobody is copying any more when it returns. */
void vcache_copy(const struct plane *planes, int64_t plane_count, const int64_t *ids, int64_t per_chunk, uint8_t *segment,
                 const int64_t *offsets, int64_t chunks, int64_t step, int helpers_wanted, int to_payload)
{
    struct job job = {planes,     plane_count, ids, per_chunk, segment, offsets,
                      to_payload, chunks * plane_count * per_chunk, step, 0, helpers_wanted, 0, 0};
    if (helpers_wanted) {
        pthread_mutex_lock(&lock);
        send_elsewhere(sched_getcpu());
        struct job **end = &jobs;
        while (*end)
            end = &(*end)->following;
        *end = &job;
        pthread_mutex_unlock(&lock);
        for (int helper = 0; helper < helpers_wanted; helper++)
            pthread_cond_signal(&called);
    }
    work_off(&job);
    if (helpers_wanted) {
        pthread_mutex_lock(&lock);
        struct job **at = &jobs;
        while (*at && *at != &job)
            at = &(*at)->following;
        if (*at) /* not all helpers came; from here on none will */
            *at = job.following;
        while (job.helping)
            pthread_cond_wait(&done, &lock);
        pthread_mutex_unlock(&lock);
    }
}
