#include "bitmap.h"

#include <stddef.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "words.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "the bytes of a bitmap are in little-endian bit order");

/* The two loops over whole words that count bits, compiled for each instruction set with a faster
 * way: portable C, POPCNT, AVX2, AVX-512 VPOPCNTDQ. */
#define COUNTING_LOOPS(suffix, target)                                                             \
    target static uint64_t count_##suffix(const uint64_t *words, size_t n) {                       \
        uint64_t count = 0;                                                                        \
        for (size_t i = 0; i < n; i++)                                                             \
            count += (uint64_t)__builtin_popcountll(words[i]);                                     \
        return count;                                                                              \
    }                                                                                              \
    target static uint64_t fill_##suffix(uint64_t *words, size_t n, uint64_t value) {              \
        uint64_t count = 0;                                                                        \
        for (size_t i = 0; i < n; i++) {                                                           \
            count += (uint64_t)__builtin_popcountll(words[i]);                                     \
            words[i] = value;                                                                      \
        }                                                                                          \
        return count;                                                                              \
    }

COUNTING_LOOPS(portable, )
#ifdef __x86_64__
COUNTING_LOOPS(popcnt, __attribute__((target("popcnt"))))
COUNTING_LOOPS(vpopcnt, __attribute__((target("avx512f,avx512vpopcntdq,prefer-vector-width=512"))))

#define AVX2 __attribute__((target("avx2,popcnt")))

/* The number of ones in each byte, by a table of sixteen entries for both halves of the byte
 * (Mula, Kurz, Lemire: Faster Population Counts Using AVX2 Instructions, 2016). */
AVX2 static inline __m256i ones_in_bytes(__m256i v) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i low = _mm256_set1_epi8(15);
    __m256i a = _mm256_shuffle_epi8(table, _mm256_and_si256(v, low));
    __m256i b = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low));
    return _mm256_add_epi8(a, b);
}

/* Counts the ones of `n` vectors and, if `value` is not NULL, fills them with `*value`. */
AVX2 static inline uint64_t count_vectors(__m256i *vectors, size_t n, const uint64_t *value) {
    __m256i sum = _mm256_setzero_si256();
    for (size_t i = 0; i < n;) {
        /* A byte holds the counts of 31 vectors without overflow. */
        size_t stop = n - i > 31 ? i + 31 : n;
        __m256i bytes = _mm256_setzero_si256();
        for (; i < stop; i++) {
            bytes = _mm256_add_epi8(bytes, ones_in_bytes(_mm256_loadu_si256(vectors + i)));
            if (value != NULL)
                _mm256_storeu_si256(vectors + i, _mm256_set1_epi64x((long long)*value));
        }
        sum = _mm256_add_epi64(sum, _mm256_sad_epu8(bytes, _mm256_setzero_si256()));
    }
    uint64_t parts[4];
    _mm256_storeu_si256((__m256i *)(void *)parts, sum);
    return parts[0] + parts[1] + parts[2] + parts[3];
}

AVX2 static uint64_t count_avx2(const uint64_t *words, size_t n) {
    size_t rest = n % 4;
    return count_vectors((__m256i *)(uintptr_t)words, n / 4, NULL) +
           count_popcnt(words + n - rest, rest);
}

AVX2 static uint64_t fill_avx2(uint64_t *words, size_t n, uint64_t value) {
    size_t rest = n % 4;
    return count_vectors((__m256i *)(void *)words, n / 4, &value) +
           fill_popcnt(words + n - rest, rest, value);
}

#define PICK(loop, ...)                                                                            \
    (__builtin_cpu_supports("avx512vpopcntdq") ? loop##_vpopcnt(__VA_ARGS__)                       \
     : __builtin_cpu_supports("avx2")          ? loop##_avx2(__VA_ARGS__)                          \
     : __builtin_cpu_supports("popcnt")        ? loop##_popcnt(__VA_ARGS__)                        \
                                               : loop##_portable(__VA_ARGS__))
#else
#define PICK(loop, ...) loop##_portable(__VA_ARGS__)
#endif

/* Masks: the bits of a word from `low` on; below `high`, 0 < high <= 64. */
static uint64_t from(uint64_t low) {
    return ~UINT64_C(0) << low;
}

static uint64_t below(uint64_t high) {
    return ~UINT64_C(0) >> (64 - high);
}

static uint64_t ones(uint64_t word) {
    return (uint64_t)__builtin_popcountll(word);
}

/* A range as words: a partial first word, `n` whole ones, a partial last word. A mask of zero means
 * that there is no such word. */
struct span {
    size_t head, body, n, tail;
    uint64_t head_mask, tail_mask;
};

static struct span span_of(uint64_t start, uint64_t stop) {
    struct span s = {0};
    if (start >= stop)
        return s;
    s.head = (size_t)(start / 64);
    s.tail = (size_t)(stop / 64);
    if (s.head == s.tail) {
        s.head_mask = from(start % 64) & below(stop % 64);
        return s;
    }
    s.body = s.head;
    if (start % 64 != 0) {
        s.head_mask = from(start % 64);
        s.body++;
    }
    s.n = s.tail - s.body;
    if (stop % 64 != 0)
        s.tail_mask = below(stop % 64);
    return s;
}

bool bitmap_test(const uint64_t *words, uint64_t index) {
    return words[index / 64] >> (index % 64) & 1;
}

/* Writes `value` (all zeros or all ones) over the range and returns how many bits were set. */
static uint64_t fill(uint64_t *words, uint64_t start, uint64_t stop, uint64_t value) {
    struct span s = span_of(start, stop);
    uint64_t were_set = 0;
    if (s.head_mask != 0) {
        were_set += ones(words[s.head] & s.head_mask);
        words[s.head] = (words[s.head] & ~s.head_mask) | (value & s.head_mask);
    }
    if (s.n > 0)
        were_set += PICK(fill, words + s.body, s.n, value);
    if (s.tail_mask != 0) {
        were_set += ones(words[s.tail] & s.tail_mask);
        words[s.tail] = (words[s.tail] & ~s.tail_mask) | (value & s.tail_mask);
    }
    return were_set;
}

uint64_t bitmap_set(uint64_t *words, uint64_t start, uint64_t stop) {
    return stop - start - fill(words, start, stop, ~UINT64_C(0));
}

uint64_t bitmap_clear(uint64_t *words, uint64_t start, uint64_t stop) {
    return fill(words, start, stop, 0);
}

uint64_t bitmap_count(const uint64_t *words, uint64_t start, uint64_t stop) {
    struct span s = span_of(start, stop);
    uint64_t count = s.n > 0 ? PICK(count, words + s.body, s.n) : 0;
    if (s.head_mask != 0)
        count += ones(words[s.head] & s.head_mask);
    if (s.tail_mask != 0)
        count += ones(words[s.tail] & s.tail_mask);
    return count;
}

/* The number of leading words of [i, n) that equal `same`, in steps of eight so that the compiler
 * can compare 64 bytes at a time. */
static size_t skip_equal(const uint64_t *words, size_t i, size_t n, uint64_t same) {
    size_t begin = i;
    for (; i + 8 <= n; i += 8) {
        uint64_t other = 0;
        for (size_t k = 0; k < 8; k++)
            other |= words[i + k] ^ same;
        if (other != 0)
            break;
    }
    while (i < n && words[i] == same)
        i++;
    return i - begin;
}

/* The start of the lowest run of `length` ones in `word`; 64 if there is none. */
static unsigned run_in_word(uint64_t word, uint64_t length) {
    if (length > 64)
        return 64;
    for (uint64_t have = 1; have < length && word != 0;) {
        uint64_t more = smaller(have, length - have);
        word &= word >> more;
        have += more;
    }
    return word == 0 ? 64 : (unsigned)__builtin_ctzll(word);
}

/* One step of bitmap_seek: the lowest `n` bits of `word` are the bits from `index` on, 1 =
 * equal. */
static bool seek_in_word(uint64_t word, uint64_t index, unsigned n, uint64_t wanted,
                         uint64_t *first) {
    uint64_t full = below(n);
    if (word == full)
        return index + n - *first >= wanted;
    if (index + (unsigned)__builtin_ctzll(~word) - *first >= wanted)
        return true;
    unsigned inside = run_in_word(word, wanted);
    if (inside < 64) {
        *first = index + inside;
        return true;
    }
    uint64_t top = word << (64 - n);
    *first = index + n - (unsigned)__builtin_clzll(~top);
    return false;
}

bool bitmap_seek(const uint64_t *words, uint64_t start, uint64_t stop, bool value, uint64_t wanted,
                 uint64_t *first) {
    uint64_t flip = value ? 0 : ~UINT64_C(0);
    uint64_t at = start;
    while (at < stop) {
        unsigned skip = (unsigned)(at % 64);
        if (skip == 0 && stop - at >= 64) {
            size_t i = (size_t)(at / 64);
            size_t none = skip_equal(words, i, (size_t)(stop / 64), flip);
            if (none > 0) {
                at += (uint64_t)none * 64;
                *first = at;
                continue;
            }
        }
        unsigned n = (unsigned)smaller(64 - skip, stop - at);
        uint64_t word = ((words[at / 64] ^ flip) >> skip) & below(n);
        if (seek_in_word(word, at, n, wanted, first))
            return true;
        at += n;
    }
    return false;
}

uint64_t bitmap_find(const uint64_t *words, uint64_t start, uint64_t stop, bool value) {
    uint64_t first = start;
    return bitmap_seek(words, start, stop, value, 1, &first) ? first : stop;
}

uint64_t bitmap_extract(const uint64_t *words, uint64_t index, unsigned n) {
    size_t i = (size_t)(index / 64);
    unsigned shift = (unsigned)(index % 64);
    uint64_t bits = words[i] >> shift;
    if (shift + n > 64)
        bits |= words[i + 1] << (64 - shift);
    return bits & below(n);
}

void bitmap_deposit(uint64_t *words, uint64_t index, unsigned n, uint64_t bits) {
    size_t i = (size_t)(index / 64);
    unsigned shift = (unsigned)(index % 64);
    uint64_t mask = below(n);
    words[i] = (words[i] & ~(mask << shift)) | ((bits & mask) << shift);
    if (shift + n > 64) {
        unsigned done = 64 - shift;
        words[i + 1] = (words[i + 1] & ~(mask >> done)) | ((bits & mask) >> done);
    }
}

static uint64_t combine(uint64_t a, uint64_t b, enum bitmap_operation operation) {
    switch (operation) {
    case BITMAP_AND:
        return a & b;
    case BITMAP_OR:
        return a | b;
    case BITMAP_XOR:
        return a ^ b;
    case BITMAP_ANDNOT:
        return a & ~b;
    }
    return a;
}

void bitmap_combine(uint64_t *words, const uint64_t *other, uint64_t start, uint64_t stop,
                    enum bitmap_operation operation) {
    struct span s = span_of(start, stop);
    if (s.head_mask != 0)
        words[s.head] = (words[s.head] & ~s.head_mask) |
                        (combine(words[s.head], other[s.head], operation) & s.head_mask);
    for (size_t i = s.body; i < s.body + s.n; i++)
        words[i] = combine(words[i], other[i], operation);
    if (s.tail_mask != 0)
        words[s.tail] = (words[s.tail] & ~s.tail_mask) |
                        (combine(words[s.tail], other[s.tail], operation) & s.tail_mask);
}
