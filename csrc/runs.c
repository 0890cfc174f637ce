#include "runs.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* runs_empty keeps the storage of up to this many runs. */
enum { SMALL = 64 };

size_t runs_search(const struct runs *set, size_t offset) {
    size_t low = 0, high = set->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (set->items[middle].hi < offset)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

void runs_splice(struct runs *set, size_t from, size_t to, const struct run *fresh, size_t n) {
    for (size_t i = from; i < to; i++)
        set->total -= set->items[i].hi - set->items[i].lo;
    memmove(set->items + from + n, set->items + to, (set->count - to) * sizeof *set->items);
    for (size_t i = 0; i < n; i++) {
        set->items[from + i] = fresh[i];
        set->total += fresh[i].hi - fresh[i].lo;
    }
    set->count = set->count - (to - from) + n;
}

int runs_grow(struct runs *set) {
    if (set->count < set->capacity)
        return 0;
    size_t capacity = set->capacity == 0 ? 4 : set->capacity * 2;
    struct run *items = realloc(set->items, capacity * sizeof *items);
    if (items == NULL)
        return ENOMEM;
    set->items = items;
    set->capacity = capacity;
    return 0;
}

void runs_add(struct runs *set, size_t lo, size_t hi) {
    /* The runs [from, to) touch or overlap [lo, hi). */
    size_t from = runs_search(set, lo), to = runs_search(set, hi);
    if (to < set->count && set->items[to].lo <= hi)
        to++;
    struct run joined = {lo, hi};
    if (from < to) {
        if (set->items[from].lo < lo)
            joined.lo = set->items[from].lo;
        if (set->items[to - 1].hi > hi)
            joined.hi = set->items[to - 1].hi;
    }
    runs_splice(set, from, to, &joined, 1);
}

void runs_remove(struct runs *set, size_t lo, size_t hi) {
    /* The runs [from, to) overlap [lo, hi); what the first and the last have outside is left. */
    size_t from = runs_search(set, lo + 1), to = runs_search(set, hi);
    if (to < set->count && set->items[to].lo < hi)
        to++;
    if (from == to)
        return;
    struct run left[2];
    size_t n = 0;
    if (set->items[from].lo < lo)
        left[n++] = (struct run){set->items[from].lo, lo};
    if (set->items[to - 1].hi > hi)
        left[n++] = (struct run){hi, set->items[to - 1].hi};
    runs_splice(set, from, to, left, n);
}

bool runs_contain(const struct runs *set, size_t lo, size_t hi) {
    size_t i = runs_search(set, lo + 1);
    return i < set->count && set->items[i].lo <= lo && hi <= set->items[i].hi;
}

bool runs_next(const struct runs *set, size_t lo, size_t hi, struct run *piece) {
    if (lo >= hi)
        return false;
    size_t i = runs_search(set, lo + 1);
    if (i == set->count || set->items[i].lo >= hi)
        return false;
    piece->lo = set->items[i].lo > lo ? set->items[i].lo : lo;
    piece->hi = set->items[i].hi < hi ? set->items[i].hi : hi;
    return true;
}

bool runs_next_gap(const struct runs *set, size_t lo, size_t hi, struct run *gap) {
    if (lo >= hi)
        return false;
    size_t i = runs_search(set, lo + 1);
    if (i < set->count && set->items[i].lo <= lo)
        lo = set->items[i++].hi;
    if (lo >= hi)
        return false;
    gap->lo = lo;
    gap->hi = i < set->count && set->items[i].lo < hi ? set->items[i].lo : hi;
    return true;
}

int runs_copy(struct runs *copy, const struct runs *set) {
    *copy = *set;
    copy->capacity = set->count + 1;
    copy->items = malloc(copy->capacity * sizeof *copy->items);
    if (copy->items == NULL)
        return ENOMEM;
    if (set->count > 0)
        memcpy(copy->items, set->items, set->count * sizeof *copy->items);
    return 0;
}

void runs_empty(struct runs *set) {
    if (set->capacity > SMALL)
        runs_clear(set);
    set->count = set->total = 0;
}

void runs_clear(struct runs *set) {
    free(set->items);
    *set = (struct runs){0};
}
