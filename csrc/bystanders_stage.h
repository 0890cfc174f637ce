/* bystanders_stage: the memory that a caller and its bystanders work on. Of bystanders.c alone. */
#ifndef PYRESERVE_BYSTANDERS_STAGE_H
#define PYRESERVE_BYSTANDERS_STAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "bystanders.h"
#include "vm.h"
#include "words.h"

/* The mappings of one process: a reservation whose pieces are committed. */
struct stage {
    uintptr_t base, piece, others; /* others: the first bystander's memory */
    size_t length, total, stride;  /* of the piece, of all, from one bystander's memory to the next */
    bool has_hole;                 /* the piece is unmapped */
};

static inline bool has_memory(int work) {
    return work != BYSTANDERS_SPIN;
}

/* Maps the caller's piece and, for faults in its mapping, the memory of `n` bystanders right behind
 * it; for other work each bystander's memory behind a page without access, so that mappings stay
 * apart. After a refusal close_stage is due too. */
static inline int open_stage(struct stage *stage, const struct bystanders_setup *setup, size_t n,
                             size_t page) {
    size_t align = setup->huge != 0 ? setup->huge : page, length = setup->length;
    bool shares = setup->work == BYSTANDERS_FAULT_SHARED, has = has_memory(setup->work);
    stage->length = length;
    stage->stride = has ? setup->bytes + (shares ? 0 : page) : 0;
    stage->total = align + page + length + n * stage->stride + page;
    int err = vm_map(0, stage->total, VM_RESERVED, &stage->base);
    if (err != 0)
        return err;
    stage->piece = (uintptr_t)round_up(stage->base + page, align);
    stage->others = stage->piece + length + (shares ? 0 : page);
    err = vm_protect(stage->piece, length + (shares ? n * setup->bytes : 0), VM_COMMITTED);
    for (size_t i = 0; i < n && has && !shares && err == 0; i++)
        err = vm_protect(stage->others + i * stage->stride, setup->bytes, VM_COMMITTED);
    if (err == 0 && setup->huge != 0)
        err = vm_advise(stage->piece, length, VM_HUGE_PREFER);
    return err;
}

/* Another thread of the process may have mapped memory in a hole: leave that alone. */
static inline void close_stage(struct stage *stage) {
    uintptr_t end = stage->piece + stage->length;
    if (stage->base == 0)
        return;
    if (stage->has_hole) {
        (void)vm_release(stage->base, stage->piece - stage->base);
        (void)vm_release(end, stage->base + stage->total - end);
    } else {
        (void)vm_release(stage->base, stage->total);
    }
    stage->base = 0;
}

/* Stores a byte every `step` bytes, which divides the length. */
static inline void store(uintptr_t at, size_t length, size_t step) {
    for (uintptr_t end = at + length; at != end; at += step)
        *(volatile unsigned char *)at = 1;
}

#endif
