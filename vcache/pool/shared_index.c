/* The server's index in shared memory: an open-addressing table of chunk keys with one writer and any number of readers that
 * take no lock. The layout is in docs/index-format.md; called through ctypes by shared_index.py. Plain C: no Python header is
 * needed to build it.
 *
 * A slot is a mark and the two halves of a key. The mark's two low bits say what the slot is, the others count its changes, so
 * a mark that is the same before and after the key was read says that the key was whole. Readers compare nothing else. */
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/file.h>

enum { HEADER_BYTES = 64, STATE_AT = 4, AHEAD = 8 };
enum { EMPTY = 0, CHANGING = 1, PRESENT = 2, REMOVED = 3, KIND = 3, CHANGE = 4 };
enum { STATE_LIVE = 1, OWNER_GONE = -16 };

struct slot {
    uint64_t mark, low, high;
};

/* What the writer alone keeps. */
struct counts {
    int64_t present, used; /* used: also slots of removed keys, which lengthen the way to others */
};

static struct slot *slots_of(const uint8_t *table) { return (struct slot *)(uintptr_t)(table + HEADER_BYTES); }

static uint64_t home_of(uint64_t low, uint64_t high)
{
    uint64_t mixed = low ^ (high * UINT64_C(0x9E3779B97F4A7C15));
    mixed ^= mixed >> 32;
    mixed *= UINT64_C(0xD6E8FEB86659FD93);
    return mixed ^ (mixed >> 32);
}

static void halves(const uint8_t *key, uint64_t *low, uint64_t *high)
{
    memcpy(low, key, 8);
    memcpy(high, key + 8, 8);
}

/* --- the writer ------------------------------------------------------------------------------------------------------- */

static void put(struct slot *slot, uint64_t low, uint64_t high)
{
    uint64_t changes = slot->mark & ~(uint64_t)KIND;
    __atomic_store_n(&slot->mark, (changes + CHANGE) | CHANGING, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE); /* nobody sees a half of the new key under the old mark */
    __atomic_store_n(&slot->low, low, __ATOMIC_RELAXED);
    __atomic_store_n(&slot->high, high, __ATOMIC_RELAXED);
    __atomic_store_n(&slot->mark, (changes + 2 * CHANGE) | PRESENT, __ATOMIC_RELEASE);
}

static void mark(struct slot *slot, int kind)
{
    __atomic_store_n(&slot->mark, ((slot->mark & ~(uint64_t)KIND) + CHANGE) | (uint64_t)kind, __ATOMIC_RELEASE);
}

/* False: the table has no room for one more. */
static int insert(struct slot *slots, uint64_t last, int64_t limit, struct counts *counts, uint64_t low, uint64_t high)
{
    struct slot *free = 0;
    for (uint64_t at = home_of(low, high) & last;; at = (at + 1) & last) {
        struct slot *slot = slots + at;
        int kind = (int)(slot->mark & KIND);
        if (kind == PRESENT && slot->low == low && slot->high == high)
            return 1;
        if (kind == REMOVED && !free)
            free = slot;
        if (kind != EMPTY)
            continue;
        if (!free) {
            if (counts->used >= limit)
                return 0;
            counts->used++;
            free = slot;
        }
        put(free, low, high);
        counts->present++;
        return 1;
    }
}

static void remove_key(struct slot *slots, uint64_t last, struct counts *counts, uint64_t low, uint64_t high)
{
    uint64_t at = home_of(low, high) & last;
    for (;; at = (at + 1) & last) {
        int kind = (int)(slots[at].mark & KIND);
        if (kind == EMPTY)
            return;
        if (kind == PRESENT && slots[at].low == low && slots[at].high == high)
            break;
    }
    mark(slots + at, REMOVED);
    counts->present--;
    if ((slots[(at + 1) & last].mark & KIND) != EMPTY)
        return;
    /* No key lies beyond on a way that leads through here, so the way may end here. */
    for (; (slots[at].mark & KIND) == REMOVED; at = (at - 1) & last) {
        mark(slots + at, EMPTY);
        counts->used--;
    }
}

/* Makes keys present or absent, in order; how many were done before the table was full (``limit`` slots in use). */
int64_t vcache_index_apply(uint8_t *table, int64_t slot_count, int64_t limit, struct counts *counts, const uint8_t *keys,
                           const uint8_t *is_present, int64_t count)
{
    struct slot *slots = slots_of(table);
    uint64_t last = (uint64_t)slot_count - 1, low, high;
    for (int64_t at = 0; at < count; at++) {
        halves(keys + 16 * at, &low, &high);
        if (!is_present[at])
            remove_key(slots, last, counts, low, high);
        else if (!insert(slots, last, limit, counts, low, high))
            return at;
    }
    return count;
}

/* Copies every key of one table into another, which has room for them. */
void vcache_index_copy(const uint8_t *from, int64_t from_count, uint8_t *to, int64_t to_count, struct counts *counts)
{
    const struct slot *slots = slots_of(from);
    for (int64_t at = 0; at < from_count; at++)
        if ((slots[at].mark & KIND) == PRESENT)
            insert(slots_of(to), (uint64_t)to_count - 1, to_count, counts, slots[at].low, slots[at].high);
}

void vcache_index_set_state(uint8_t *table, uint64_t state)
{
    __atomic_store_n((uint64_t *)(uintptr_t)table + STATE_AT, state, __ATOMIC_SEQ_CST);
}

/* --- readers ---------------------------------------------------------------------------------------------------------- */

static int has(const struct slot *slots, uint64_t last, uint64_t low, uint64_t high)
{
    uint64_t at = home_of(low, high) & last;
    for (uint64_t seen = 0; seen <= last; seen++, at = (at + 1) & last) {
        const struct slot *slot = slots + at;
        uint64_t before = __atomic_load_n(&slot->mark, __ATOMIC_ACQUIRE);
        if ((before & KIND) == EMPTY)
            return 0;
        if ((before & KIND) != PRESENT || __atomic_load_n(&slot->low, __ATOMIC_RELAXED) != low ||
            __atomic_load_n(&slot->high, __ATOMIC_RELAXED) != high)
            continue;
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&slot->mark, __ATOMIC_RELAXED) == before)
            return 1;
        /* It changed under our eyes: these may be halves of two keys. The key, if it is there, has just come or just gone. */
    }
    return 0;
}

static uint64_t state_of(const uint8_t *table)
{
    return __atomic_load_n((const uint64_t *)(uintptr_t)table + STATE_AT, __ATOMIC_ACQUIRE) & KIND;
}

/* The length of the leading run of keys that are present; negative when the table cannot say: OWNER_GONE, or -1 - state for a
 * state that is not live. The server holds the file's flock for as long as it lives and the table is the present one. */
int64_t vcache_index_run(const uint8_t *table, int64_t slot_count, int fd, const uint8_t *keys, int64_t count)
{
    uint64_t state = state_of(table);
    if (state == STATE_LIVE && (flock(fd, LOCK_SH | LOCK_NB) == 0 || errno != EWOULDBLOCK)) {
        flock(fd, LOCK_UN);
        state = state_of(table); /* a table that is superseded says so before its lock goes */
        if (state == STATE_LIVE)
            return OWNER_GONE;
    }
    if (state != STATE_LIVE)
        return -1 - (int64_t)state;
    const struct slot *slots = slots_of(table);
    uint64_t last = (uint64_t)slot_count - 1, low, high;
    for (int64_t at = 0; at < count; at++) {
        if (at + AHEAD < count) {
            halves(keys + 16 * (at + AHEAD), &low, &high);
            __builtin_prefetch(slots + (home_of(low, high) & last));
        }
        halves(keys + 16 * at, &low, &high);
        if (!has(slots, last, low, high))
            return at;
    }
    return count;
}
