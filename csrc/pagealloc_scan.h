/* pagealloc_scan: the loops of pagealloc over one cache line. Pure: no memory of its own, no system
 * call. Included by pagealloc.c alone.
 *
 * A line is either a chunk, 512 bits in eight words, 1 = a free page, or 32 codes of a tree node.
 * Each function exists twice: portable C, and a "wide" form in 512-bit registers that holds a line
 * in one of them (AVX-512 F, BW, VL, DQ, VBMI2: Intel since Ice Lake, AMD since Zen 4). SCAN picks
 * one. A free with an allocation takes 60 to 130 ns with the wide forms and 200 to 570 ns without
 * (1 GiB of 4 KiB pages, runs of 1 to 128 pages).
 *
 * They are static inline in a header because pagealloc compiles its two hot paths once more as one
 * flat function for these instructions; as calls into another file they cost 3 to 10 % of a pair of
 * free and alloc.
 *
 * Holds for every function here: `words` is one chunk and `line` one node, both aligned to 64 bytes
 * except where a function says otherwise; a run is a row of ones inside the chunk; bit i of a chunk
 * is bit i % 64 of words[i / 64].
 */
#ifndef PYRESERVE_PAGEALLOC_SCAN_H
#define PYRESERVE_PAGEALLOC_SCAN_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "bitmap.h"

enum {
    SCAN_BITS = 512,             /* of a chunk: a cache line */
    SCAN_WORDS = SCAN_BITS / 64, /* of a chunk */
    SCAN_CODES = 32              /* of a node: a cache line of 16-bit codes */
};

/* `out` = `words` shifted down by `by` bits; bits of `fill` (all zeros or all ones) shift in. */
static void scan_shift_down(uint64_t *out, const uint64_t *words, unsigned by, uint64_t fill) {
    unsigned skip = by / 64, shift = by % 64;
    for (unsigned i = 0; i < SCAN_WORDS; i++) {
        uint64_t low = i + skip < SCAN_WORDS ? words[i + skip] : fill;
        uint64_t high = i + skip + 1 < SCAN_WORDS ? words[i + skip + 1] : fill;
        out[i] = low >> shift | high << 1 << (63 - shift);
    }
}

/* Clears each bit whose bit `by` further on is 0. If that would clear all, changes nothing and
 * returns false. */
static bool scan_shorten(uint64_t *words, unsigned by) {
    uint64_t shorter[SCAN_WORDS], any = 0;
    scan_shift_down(shorter, words, by, 0);
    for (unsigned i = 0; i < SCAN_WORDS; i++)
        any |= shorter[i] &= words[i];
    if (any != 0)
        memcpy(words, shorter, sizeof shorter);
    return any != 0;
}

/* The length of the longest run of ones. Doubling: after a shift by 1, 2, 4, ... a bit is left for
 * each start of 2, 4, 8, ... ones, until none is; then the steps shrink again. */
static unsigned scan_longest_portable(const uint64_t *words) {
    uint64_t ones[SCAN_WORDS], any = 0;
    for (unsigned i = 0; i < SCAN_WORDS; i++)
        any |= ones[i] = words[i];
    if (any == 0)
        return 0;
    unsigned length = 1, step = 1;
    for (; scan_shorten(ones, step); step *= 2)
        length += step;
    while ((step /= 2) > 0)
        length += scan_shorten(ones, step) ? step : 0;
    return length;
}

/* Clears the bits [start, stop) and returns the length of the longest run of ones that is left.
 * `rest` is the length of one of them, often the longest. */
static unsigned scan_longest_without_portable(uint64_t *words, unsigned start, unsigned stop,
                                         unsigned rest) {
    (void)rest;
    (void)bitmap_clear(words, start, stop);
    return scan_longest_portable(words);
}

/* The start of the lowest run of `n` ones, 0 < n <= SCAN_BITS, which must exist; bits behind the
 * chunk are those of `fill`. */
static unsigned scan_find_portable(const uint64_t *words, unsigned n, uint64_t fill) {
    uint64_t ones[SCAN_WORDS], moved[SCAN_WORDS];
    memcpy(ones, words, sizeof ones);
    for (unsigned have = 1; have < n;) {
        unsigned step = have < n - have ? have : n - have;
        scan_shift_down(moved, ones, step, fill);
        for (unsigned i = 0; i < SCAN_WORDS; i++)
            ones[i] &= moved[i];
        have += step;
    }
    unsigned i = 0;
    while (ones[i] == 0)
        i++;
    return i * 64 + (unsigned)__builtin_ctzll(ones[i]);
}

/* A bit for each code of a line that is at least `code`. */
static uint32_t scan_at_least_portable(const uint16_t *line, uint16_t code) {
    uint32_t mask = 0;
    for (unsigned i = 0; i < SCAN_CODES; i++)
        mask |= (uint32_t)(line[i] >= code) << i;
    return mask;
}

/* The largest code of a line, with `code` in the place of element `at`. */
static uint16_t scan_largest_portable(const uint16_t *line, unsigned at, uint16_t code) {
    uint16_t largest = code;
    for (unsigned i = 0; i < SCAN_CODES; i++)
        largest = i != at && line[i] > largest ? line[i] : largest;
    return largest;
}

/* The number of ones at the low end of a word, and at its high end. */
static inline unsigned scan_low_ones(uint64_t word) {
    return word == ~UINT64_C(0) ? 64 : (unsigned)__builtin_ctzll(~word);
}

static inline unsigned scan_high_ones(uint64_t word) {
    return word == ~UINT64_C(0) ? 64 : (unsigned)__builtin_clzll(~word);
}

/* A run of 64 or more reaches the end of a word, so a scan word by word is faster than the other
 * kernels. Returns the start of the lowest run of `n` >= 64 ones, else of the run that reaches the
 * end. */
static inline unsigned scan_find_long(const uint64_t *words, unsigned n) {
    unsigned open = 0, found = SCAN_BITS; /* `open`: ones at the end of the words seen so far */
    for (unsigned i = 0; i < SCAN_WORDS; i++) {
        unsigned low = scan_low_ones(words[i]);
        found = found == SCAN_BITS && open + low >= n ? i * 64 - open : found;
        open = low == 64 ? open + 64 : scan_high_ones(words[i]);
    }
    return found < SCAN_BITS ? found : SCAN_BITS - open;
}

/* The length of the longest run of ones if it is 64 or more; otherwise any number below 64, which
 * is 0 only if there are no ones. */
static inline unsigned scan_longest_long(const uint64_t *words) {
    unsigned open = 0, longest = 0;
    uint64_t any = 0;
    for (unsigned i = 0; i < SCAN_WORDS; i++) {
        unsigned low = scan_low_ones(words[i]);
        longest = open + low > longest ? open + low : longest;
        any |= words[i];
        open = low == 64 ? open + 64 : scan_high_ones(words[i]);
    }
    longest = open > longest ? open : longest;
    return longest == 0 && any != 0 ? 1 : longest;
}

#ifdef __x86_64__
#define SCAN_WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,bmi,bmi2,lzcnt")))

SCAN_WIDE static inline __m512i scan_shift_down_wide(__m512i words, unsigned by, __m512i fill) {
    const __m512i places = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    __m512i from = _mm512_add_epi64(places, _mm512_set1_epi64(by / 64));
    __m512i low = _mm512_permutex2var_epi64(words, from, fill);
    __m512i high = _mm512_permutex2var_epi64(
        words, _mm512_add_epi64(from, _mm512_set1_epi64(1)), fill);
    return _mm512_shrdv_epi64(low, high, _mm512_set1_epi64(by % 64));
}

/* The same for a constant power of two. */
#define SCAN_SHIFT_DOWN(words, by, fill)                                                           \
    ((by) < 64 ? _mm512_shrdi_epi64(words, _mm512_alignr_epi64(fill, words, 1), (by) % 64)         \
               : _mm512_alignr_epi64(fill, words, (by) / 64 % 8))

SCAN_WIDE static inline unsigned scan_longest_of(__m512i ones) {
    const __m512i zero = _mm512_setzero_si512();
    __m512i shorter;
    unsigned length = 1;
    if (_mm512_test_epi64_mask(ones, ones) == 0)
        return 0;
#define SCAN_DOUBLE(by, otherwise)                                                                 \
    shorter = _mm512_and_si512(ones, SCAN_SHIFT_DOWN(ones, by, zero));                             \
    if (_mm512_test_epi64_mask(shorter, shorter) == 0)                                             \
        goto otherwise;                                                                            \
    ones = shorter;                                                                                \
    length = 2 * (by)
#define SCAN_ADD(by)                                                                               \
    shorter = _mm512_and_si512(ones, SCAN_SHIFT_DOWN(ones, by, zero));                             \
    some = _mm512_test_epi64_mask(shorter, shorter) != 0 ? 0xff : 0;                               \
    ones = _mm512_mask_mov_epi64(ones, some, shorter);                                             \
    length += some ? (by) : 0
    __mmask8 some;
    SCAN_DOUBLE(1, below_2);
    SCAN_DOUBLE(2, below_4);
    SCAN_DOUBLE(4, below_8);
    SCAN_DOUBLE(8, below_16);
    SCAN_DOUBLE(16, below_32);
    SCAN_DOUBLE(32, below_64);
    SCAN_DOUBLE(64, below_128);
    SCAN_DOUBLE(128, below_256);
    SCAN_DOUBLE(256, below_512);
    return length;
below_512:
    SCAN_ADD(128);
below_256:
    SCAN_ADD(64);
below_128:
    SCAN_ADD(32);
below_64:
    SCAN_ADD(16);
below_32:
    SCAN_ADD(8);
below_16:
    SCAN_ADD(4);
below_8:
    SCAN_ADD(2);
below_4:
    SCAN_ADD(1);
below_2:
    return length;
#undef SCAN_DOUBLE
#undef SCAN_ADD
}

SCAN_WIDE static unsigned scan_longest_wide(const uint64_t *words) {
    return scan_longest_of(_mm512_loadu_si512(words));
}

/* A chunk with all bits from `at` on set, 0 <= at <= SCAN_BITS. */
SCAN_WIDE static inline __m512i scan_bits_from(unsigned at) {
    const __m512i begin = _mm512_set_epi64(448, 384, 320, 256, 192, 128, 64, 0);
    __m512i skip = _mm512_sub_epi64(_mm512_set1_epi64(at), begin);
    return _mm512_sllv_epi64(_mm512_set1_epi64(-1),
                             _mm512_max_epi64(skip, _mm512_setzero_si512()));
}

/* A bit for each start of at least `n` ones, 0 < n <= SCAN_BITS; bits behind the chunk are
 * `filling`. */
SCAN_WIDE static inline __m512i scan_starts_of(__m512i ones, unsigned n, __m512i filling) {
    unsigned have = 1;
#define SCAN_DOUBLE(by)                                                                            \
    if (n < 2 * (by))                                                                              \
        goto rest;                                                                                 \
    ones = _mm512_and_si512(ones, SCAN_SHIFT_DOWN(ones, by, filling));                             \
    have = 2 * (by)
    SCAN_DOUBLE(1);
    SCAN_DOUBLE(2);
    SCAN_DOUBLE(4);
    SCAN_DOUBLE(8);
    SCAN_DOUBLE(16);
    SCAN_DOUBLE(32);
    SCAN_DOUBLE(64);
    SCAN_DOUBLE(128);
    SCAN_DOUBLE(256);
#undef SCAN_DOUBLE
rest:
    if (have < n)
        ones = _mm512_and_si512(ones, scan_shift_down_wide(ones, n - have, filling));
    return ones;
}

SCAN_WIDE static unsigned scan_longest_without_wide(uint64_t *words, unsigned start, unsigned stop,
                                          unsigned rest) {
    __m512i out = _mm512_andnot_si512(scan_bits_from(stop), scan_bits_from(start));
    __m512i ones = _mm512_andnot_si512(out, _mm512_load_si512(words));
    _mm512_store_si512(words, ones);
    if (rest >= 64)
        return scan_longest_long(words);
    if (rest > 0) {
        __m512i longer = scan_starts_of(ones, rest + 1, _mm512_setzero_si512());
        if (_mm512_test_epi64_mask(longer, longer) == 0)
            return rest;
    }
    return scan_longest_of(ones);
}

SCAN_WIDE static unsigned scan_find_wide(const uint64_t *words, unsigned n, uint64_t fill) {
    __m512i filling = _mm512_set1_epi64((long long)fill);
    __m512i ones = scan_starts_of(_mm512_loadu_si512(words), n, filling);
    __mmask8 some = _mm512_test_epi64_mask(ones, ones);
    __m128i lowest = _mm512_castsi512_si128(_mm512_maskz_compress_epi64(some, ones));
    return (unsigned)__builtin_ctz(some) * 64 +
           (unsigned)__builtin_ctzll((unsigned long long)_mm_cvtsi128_si64(lowest));
}

SCAN_WIDE static uint32_t scan_at_least_wide(const uint16_t *line, uint16_t code) {
    return _mm512_cmpge_epu16_mask(_mm512_load_si512(line), _mm512_set1_epi16((short)code));
}

SCAN_WIDE static uint16_t scan_largest_wide(const uint16_t *line, unsigned at, uint16_t code) {
    __m512i all = _mm512_mask_set1_epi16(_mm512_load_si512(line), 1U << at, (short)code);
    __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    /* There is an instruction for the minimum of eight: use it on the complements. */
    __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
    return (uint16_t)~_mm_extract_epi16(least, 0);
}

static bool scan_machine_is_wide(void) {
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

#define SCAN(wide, name, ...)                                                                   \
    ((wide) ? scan_##name##_wide(__VA_ARGS__) : scan_##name##_portable(__VA_ARGS__))
#else
static bool scan_machine_is_wide(void) {
    return false;
}

#define SCAN(wide, name, ...) ((void)(wide), scan_##name##_portable(__VA_ARGS__))
#endif

#endif
