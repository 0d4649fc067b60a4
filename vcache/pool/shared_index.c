/* The server's index in shared memory: an open-addressing table of chunk keys and where their payloads lie, with one writer and any
 * number of readers that take no lock. The layout is in docs/index-format.md; called through ctypes by shared_index.py. Plain C: no Python header is
 * needed to build it.
 *
 * A slot is a mark, the two halves of a key, and a placement. The mark's two low bits say what the slot is, the others count its
 * changes, so a mark that is the same before and after the rest was read says that it was whole. Readers compare nothing else. */
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/file.h>

enum { HEADER_BYTES = 64, STATE_AT = 4, AHEAD = 8, LOOKS = 8 };
enum { EMPTY = 0, CHANGING = 1, PRESENT = 2, REMOVED = 3, KIND = 3, CHANGE = 4 };
enum { STATE_LIVE = 1, OWNER_GONE = -16, NOT_PLACED = -17 };
enum { PLACEMENT_WORDS = 4, PLACEMENT_BYTES = 8 * PLACEMENT_WORDS, GENERATION = 1 };

/* A cache line. A placement without a generation says that the chunk is there, and nothing about where. */
struct slot {
    uint64_t mark, low, high, placement[PLACEMENT_WORDS], unused;
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

static void put(struct slot *slot, uint64_t low, uint64_t high, const uint64_t *placement)
{
    uint64_t changes = slot->mark & ~(uint64_t)KIND;
    __atomic_store_n(&slot->mark, (changes + CHANGE) | CHANGING, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE); /* nobody sees a part of what is new under the old mark */
    __atomic_store_n(&slot->low, low, __ATOMIC_RELAXED);
    __atomic_store_n(&slot->high, high, __ATOMIC_RELAXED);
    for (int word = 0; word < PLACEMENT_WORDS; word++)
        __atomic_store_n(&slot->placement[word], placement[word], __ATOMIC_RELAXED);
    __atomic_store_n(&slot->mark, (changes + 2 * CHANGE) | PRESENT, __ATOMIC_RELEASE);
}

static void mark(struct slot *slot, int kind)
{
    __atomic_store_n(&slot->mark, ((slot->mark & ~(uint64_t)KIND) + CHANGE) | (uint64_t)kind, __ATOMIC_RELEASE);
}

/* False: the table has no room for one more. */
static int insert(struct slot *slots, uint64_t last, int64_t limit, struct counts *counts, uint64_t low, uint64_t high,
                  const uint64_t *placement)
{
    struct slot *free = 0;
    for (uint64_t at = home_of(low, high) & last;; at = (at + 1) & last) {
        struct slot *slot = slots + at;
        int kind = (int)(slot->mark & KIND);
        if (kind == PRESENT && slot->low == low && slot->high == high) {
            put(slot, low, high, placement);
            return 1;
        }
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
        put(free, low, high, placement);
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

/* Makes keys present, with their placements, or absent, in order; how many were done before the table was full (``limit`` slots
 * in use). */
int64_t vcache_index_apply(uint8_t *table, int64_t slot_count, int64_t limit, struct counts *counts, const uint8_t *keys,
                           const uint8_t *placements, const uint8_t *is_present, int64_t count)
{
    struct slot *slots = slots_of(table);
    uint64_t last = (uint64_t)slot_count - 1, low, high, placement[PLACEMENT_WORDS];
    for (int64_t at = 0; at < count; at++) {
        halves(keys + 16 * at, &low, &high);
        memcpy(placement, placements + PLACEMENT_BYTES * at, PLACEMENT_BYTES);
        if (!is_present[at])
            remove_key(slots, last, counts, low, high);
        else if (!insert(slots, last, limit, counts, low, high, placement))
            return at;
    }
    return count;
}

/* Copies the keys in the slots from ``first`` to before ``end`` of one table into another; before which slot that was full. */
int64_t vcache_index_copy(const uint8_t *from, int64_t first, int64_t end, uint8_t *to, int64_t to_count, int64_t limit,
                          struct counts *counts)
{
    const struct slot *slots = slots_of(from);
    uint64_t last = (uint64_t)to_count - 1;
    for (int64_t at = first; at < end; at++)
        if ((slots[at].mark & KIND) == PRESENT &&
            !insert(slots_of(to), last, limit, counts, slots[at].low, slots[at].high, slots[at].placement))
            return at;
    return end;
}

void vcache_index_set_state(uint8_t *table, uint64_t state)
{
    __atomic_store_n((uint64_t *)(uintptr_t)table + STATE_AT, state, __ATOMIC_SEQ_CST);
}

/* --- readers ---------------------------------------------------------------------------------------------------------- */

/* Whether the slot has the key now; then also its placement. EMPTY: no slot beyond has it. */
static int look(const struct slot *slot, uint64_t low, uint64_t high, uint64_t *placement)
{
    for (int tries = 0; tries < LOOKS; tries++) {
        uint64_t before = __atomic_load_n(&slot->mark, __ATOMIC_ACQUIRE);
        if ((before & KIND) == EMPTY)
            return EMPTY;
        if ((before & KIND) == CHANGING)
            continue;
        if ((before & KIND) != PRESENT || __atomic_load_n(&slot->low, __ATOMIC_RELAXED) != low ||
            __atomic_load_n(&slot->high, __ATOMIC_RELAXED) != high)
            return REMOVED;
        for (int word = 0; word < PLACEMENT_WORDS; word++)
            placement[word] = __atomic_load_n(&slot->placement[word], __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(&slot->mark, __ATOMIC_RELAXED) == before)
            return PRESENT;
        /* It changed under our eyes: these may be parts of two. */
    }
    return REMOVED; /* its writer was stopped in the middle of a change, perhaps: the key has just come or just gone */
}

static int has(const struct slot *slots, uint64_t last, uint64_t low, uint64_t high, uint64_t *placement)
{
    uint64_t at = home_of(low, high) & last;
    for (uint64_t seen = 0; seen <= last; seen++, at = (at + 1) & last) {
        int kind = look(slots + at, low, high, placement);
        if (kind != REMOVED)
            return kind == PRESENT;
    }
    return 0;
}

static uint64_t state_of(const uint8_t *table)
{
    return __atomic_load_n((const uint64_t *)(uintptr_t)table + STATE_AT, __ATOMIC_ACQUIRE) & KIND;
}

/* The length of the leading run of keys that are present; negative when the table cannot say: OWNER_GONE, or -1 - state for a
 * state that is not live. The server holds the file's flock for as long as it lives and the table is the present one.
 * ``placements``, unless null, takes those of the run; NOT_PLACED when that of one is not said. */
int64_t vcache_index_run(const uint8_t *table, int64_t slot_count, int fd, const uint8_t *keys, int64_t count,
                         uint8_t *placements)
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
    uint64_t last = (uint64_t)slot_count - 1, low, high, placement[PLACEMENT_WORDS];
    for (int64_t at = 0; at < count; at++) {
        if (at + AHEAD < count) {
            halves(keys + 16 * (at + AHEAD), &low, &high);
            __builtin_prefetch(slots + (home_of(low, high) & last));
        }
        halves(keys + 16 * at, &low, &high);
        if (!has(slots, last, low, high, placement))
            return at;
        if (!placements)
            continue;
        if (!placement[GENERATION])
            return NOT_PLACED;
        memcpy(placements + PLACEMENT_BYTES * at, placement, PLACEMENT_BYTES);
    }
    return count;
}
