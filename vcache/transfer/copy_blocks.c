/* Copies blocks between planes and a payload in host memory, past the caches. Called through ctypes by cpu.py, which has
 * checked every argument; the GIL is not held. Plain C: no Python header is needed to build it.
 *
 * A copied block is not read again before the caches have long been used for something else, so it is written with
 * non-temporal stores: the processor then need not read what it is about to overwrite (a third of a plain copy's traffic). */
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

/* One chunk's blocks of one field. Plane p's block i is at planes + p * plane_stride + ids[i] * block_stride, in the payload
 * at payload + p * payload_stride + i * block_bytes. Neighbouring blocks without a gap are one run. */
void vcache_copy_blocks(uint8_t *planes, int64_t plane_stride, int64_t plane_count, int64_t block_stride,
                        int64_t block_bytes, const int64_t *ids, int64_t count, uint8_t *payload,
                        int64_t payload_stride, int to_payload)
{
    for (int64_t plane = 0; plane < plane_count; plane++) {
        for (int64_t first = 0, next; first < count; first = next) {
            next = first + 1;
            while (block_stride == block_bytes && next < count && ids[next] == ids[next - 1] + 1)
                next++;
            uint8_t *blocks = planes + plane * plane_stride + ids[first] * block_stride;
            uint8_t *packed = payload + plane * payload_stride + first * block_bytes;
            size_t nbytes = (size_t)((next - first) * block_bytes);
            if (to_payload)
                copy(packed, blocks, nbytes);
            else
                copy(blocks, packed, nbytes);
        }
    }
    finish();
}
