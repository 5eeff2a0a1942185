// The candidates of a request's JSON body, and the body without them, in one pass.
//
// find_candidates() walks over the body and knows no more of JSON than strings, brackets and keys. At every key
// `candidates` of an object at the wanted depth it hands the array to `read`, read_integers() or read_texts(), which
// takes the whole array or refuses it. What is left, each array replaced by `[]`, goes to the ordinary decoder. That
// is enough to be right: if the rest is JSON then the strings and brackets in it are where this pass saw them, so each
// `[]` is the value of such a key, and in its place stood an array of plain values. Whatever is unusual is refused,
// and the ordinary decoder reads the whole body:
//
//   a key with an escape, or twice in an object      nesting of more than 64      brackets that do not match
//   integers out of int64, -0, 01, 1.0, 1e3          texts with an escape, of more than 1024 octets, not UTF-8
//
// Short integers are read 16 digits at a time where there is SSE2, else digits and texts eight octets at a time in one
// 64-bit word: 65 kB of 5,000 integers take 27 us.
// A big-endian machine goes octet by octet. No octet at or after `end` is read.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace ranktower {
namespace json {

constexpr size_t longest_text = 1024;
constexpr int deepest = 64;
constexpr char key_text[] = "candidates";
constexpr size_t key_size = sizeof key_text - 1;

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
constexpr bool by_words = true;
#else
constexpr bool by_words = false;
#endif

constexpr uint64_t each(uint8_t octet) { return 0x0101010101010101u * octet; }

inline uint64_t word_at(const char* p) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    return word;
}

inline const char* skip_space(const char* p, const char* end) {
    if (p < end && uint8_t(*p) > ' ') return p;
    while (p < end && (*p == ' ' || *p == '\n' || *p == '\r' || *p == '\t')) ++p;
    return p;
}

inline bool is_digit(char c) { return uint8_t(c - '0') <= 9; }

// --- integers

// The value of eight digits, each in its octet, the first one lowest.
inline uint64_t eight_digits(uint64_t word) {
    word = (word * 10 + (word >> 8)) & 0x00ff00ff00ff00ffu;  // pairs, then fours, then eight
    word = (word * 100 + (word >> 16)) & 0x0000ffff0000ffffu;
    return (word * 10000 + (word >> 32)) & 0xffffffffu;
}

// Reads the digits from p on into `number`, 20 at most; returns where they end.
inline const char* read_digits(const char* p, const char* end, uint64_t& number) {
    static constexpr uint64_t tens[] = {1, 10, 100, 1000, 10000, 100000, 1000000, 10000000};
    number = 0;
    const char* last = end - p > 20 ? p + 20 : end;
    while (by_words && last - p >= 8) {
        const uint64_t word = word_at(p) ^ each('0');
        const uint64_t others =
            ((word + each(0x76)) | word) & each(0x80);  // exact up to the first octet that is no digit
        if (!others) {  // a branch, not a count of eight: what comes next need not wait for it
            number = number * 100000000 + eight_digits(word);
            p += 8;
            continue;
        }
        const int count = __builtin_ctzll(others) >> 3;
        if (!count) return p;
        number = number * tens[count] + eight_digits(word << (64 - 8 * count));  // zeros lead in place of what follows
        return p + count;
    }
    while (p < last && is_digit(*p)) number = number * 10 + uint64_t(*p++ - '0');
    return p;
}

#if defined(__SSE2__)

// The octets of the 64 at p that are no digits, the first one lowest.
inline uint64_t no_digits(const char* p) {
    uint64_t found = 0;
    for (int part = 0; part < 4; ++part) {
        const __m128i octets = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + part);
        const __m128i value = _mm_sub_epi8(octets, _mm_set1_epi8('0'));
        const __m128i digits = _mm_cmpeq_epi8(_mm_min_epu8(value, _mm_set1_epi8(9)), value);
        found |= uint64_t(uint16_t(~_mm_movemask_epi8(digits))) << (16 * part);
    }
    return found;
}

// The value of the 1 to 16 digits before `stop`. Reads 16 octets whatever their number.
inline uint64_t digits_before(const char* stop, size_t count) {
    alignas(16) static constexpr uint8_t kept[32] = {0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,
                                                     0,   0,   0,   0,   0,   255, 255, 255, 255, 255, 255,
                                                     255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
    const auto load = [](const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
    const __m128i digits = _mm_and_si128(_mm_sub_epi8(load(stop - 16), _mm_set1_epi8('0')), load(kept + count));
    const __m128i tens = _mm_mullo_epi16(_mm_and_si128(digits, _mm_set1_epi16(255)), _mm_set1_epi16(10));
    const __m128i pairs = _mm_add_epi16(tens, _mm_srli_epi16(digits, 8));
    const __m128i fours = _mm_madd_epi16(pairs, _mm_set1_epi32(100 | 1 << 16));
    const __m128i eights = _mm_madd_epi16(_mm_packs_epi32(fours, fours), _mm_set1_epi32(10000 | 1 << 16));
    const uint64_t both = uint64_t(_mm_cvtsi128_si64(eights));
    return (both & 0xffffffff) * 100000000 + (both >> 32);
}

static_assert(key_size + 5 >= 15, "digits_before() reads 16 octets that end in a list which `{\"key\":[` precedes");

// Reads integers of 1 to 16 digits, the comma behind each and a blank behind that, as far as there is nothing else;
// returns where that ends. At least 15 octets are before p. Commas are found in blocks, ahead of the values, so that no
// integer waits for the end of the one before it.
template <class Put>
const char* read_short_integers(const char* p, const char* end, Put put) {
    while (end - p > 64) {
        const char* block = p;
        uint64_t found = no_digits(block);
        if (!found) return p;
        int left = 4;  // as many as nearly every block holds: where the last one ends cannot be foreseen
        do {
            const char* stop = block + __builtin_ctzll(found);
            const size_t count = size_t(stop - p);
            if (count - 1 > 15 || *stop != ',' || (*p == '0' && count > 1)) return p;
            put(int64_t(digits_before(stop, count)));
            p = stop + 1;
            found &= found - 1;
            if (*p == ' ') {
                ++p;
                found &= found - 1;
            }
        } while (--left && found);
    }
    return p;
}

#endif

// The end of the integer at p, null unless it is plain and within int64.
inline const char* read_integer(const char* p, const char* end, int64_t& value) {
    const bool negative = p < end && *p == '-';
    p += negative;
    const char* first = p;
    uint64_t number;
    p = read_digits(p, end, number);
    const size_t size = size_t(p - first);
    if (!size || size > 19 || (*first == '0' && (size > 1 || negative))) return nullptr;  // 19 digits fit in 64 bits
    if (number > uint64_t(INT64_MAX) + negative) return nullptr;
    value = int64_t(negative ? 0 - number : number);
    return p;
}

// `p` is at the bracket that opens, behind a key and so behind 14 octets at least. put(int64) for each; returns the end of the array, null to refuse it.
template <class Put>
const char* read_integers(const char* p, const char* end, Put put) {
    p = skip_space(p + 1, end);
    if (p < end && *p == ']') return p + 1;
    while (p < end) {
#if defined(__SSE2__)
        p = skip_space(read_short_integers(p, end, put), end);
#endif
        int64_t value;
        p = read_integer(p, end, value);
        if (!p) return nullptr;
        put(value);
        p = skip_space(p, end);
        if (p == end) return nullptr;
        if (*p == ']') return p + 1;
        if (*p != ',') return nullptr;  // of 1.5 and 1e3 too
        p = skip_space(p + 1, end);
    }
    return nullptr;
}

// --- texts

// Octets of the well-formed UTF-8 character at p that is not ASCII, 0 if it is none (Unicode, table 3-7).
inline size_t character_size(const char* p, const char* end) {
    const auto at = [&](size_t i) { return uint8_t(p[i]); };
    const uint8_t lead = at(0);
    const size_t size = lead >= 0xc2 && lead < 0xe0   ? 2
                        : lead >= 0xe0 && lead < 0xf0 ? 3
                        : lead >= 0xf0 && lead < 0xf5 ? 4
                                                      : 0;
    if (!size || size_t(end - p) < size) return 0;
    const uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;   // no long forms,
    const uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;  // no halves of pairs, none over 10ffff
    if (at(1) < low || at(1) > high) return 0;
    for (size_t i = 2; i < size; ++i)
        if (at(i) < 0x80 || at(i) > 0xbf) return 0;
    return size;
}

// The first octet from p on that is not plain text: a quote, an escape, a control character, or not ASCII.
inline const char* skip_plain(const char* p, const char* end) {
    while (by_words && end - p >= 8) {
        const uint64_t word = word_at(p), quote = word ^ each('"'), escape = word ^ each('\\');
        const uint64_t found =
            (((quote - each(1)) & ~quote) | ((escape - each(1)) & ~escape) |  // exact up to the first
             ((word - each(0x20)) & ~word) | word) &
            each(0x80);
        if (found) return p + (__builtin_ctzll(found) >> 3);
        p += 8;
    }
    while (p < end && uint8_t(*p) >= 0x20 && uint8_t(*p) < 0x80 && *p != '"' && *p != '\\') ++p;
    return p;
}

// The quote that closes the text whose first octet is p, null unless all of it is plain UTF-8.
inline const char* read_text(const char* p, const char* end) {
    for (;;) {
        p = skip_plain(p, end);
        if (p == end) return nullptr;
        if (*p == '"') return p;
        if (uint8_t(*p) < 0x80) return nullptr;
        const size_t size = character_size(p, end);
        if (!size) return nullptr;
        p += size;
    }
}

// As read_integers; put(first octet, octets) for each.
template <class Put>
const char* read_texts(const char* p, const char* end, Put put) {
    p = skip_space(p + 1, end);
    if (p < end && *p == ']') return p + 1;
    while (p < end && *p == '"') {
        const char* first = p + 1;
        p = read_text(first, end);
        if (!p || size_t(p - first) > longest_text) return nullptr;
        put(first, size_t(p - first));
        p = skip_space(p + 1, end);
        if (p == end) return nullptr;
        if (*p == ']') return p + 1;
        if (*p != ',') return nullptr;
        p = skip_space(p + 1, end);
    }
    return nullptr;
}

// --- the body

// The quote that closes any string, null where it is not closed. `escaped` tells whether it holds an escape.
inline const char* skip_string(const char* p, const char* end, bool& escaped) {
    for (escaped = false; p < end; ++p) {
        if (*p == '"') return p;
        if (*p != '\\') continue;
        escaped = true;
        if (++p == end) return nullptr;
    }
    return nullptr;
}

// Open brackets from outside in: whether each opened an object.
struct Nesting {
    uint64_t objects = 0;
    int level = 0;

    bool open(bool object) {
        if (level == deepest) return false;
        objects = objects << 1 | object;
        ++level;
        return true;
    }

    bool close(bool object) {
        if (!level || (objects & 1) != object) return false;
        objects >>= 1;
        --level;
        return true;
    }

    // Within an object that is a value of the root (1), or of an array in it (3): objects at odd levels alone.
    bool at(int depth) const {
        return level == depth && objects == (0x5555555555555555u & ((uint64_t(2) << (depth - 1)) - 1));
    }
};

// read(p, end) takes the array at p and returns its end, or null to refuse. False where anything is unusual.
template <class Read>
bool find_candidates(const char* body, size_t size, int depth, Read read) {
    const char *p = body, *end = body + size;
    Nesting nesting;
    bool seen = false, escaped;
    while (p < end) {
        const char c = *p;
        if (c == '{' || c == '[') {
            if (!nesting.open(c == '{')) return false;
            if (nesting.at(depth)) seen = false;
            ++p;
        } else if (c == '}' || c == ']') {
            if (!nesting.close(c == '}')) return false;
            ++p;
        } else if (c != '"') {
            ++p;
        } else {
            const char* first = p + 1;
            p = skip_string(first, end, escaped);
            if (!p) return false;
            const size_t length = size_t(p++ - first);
            if (!nesting.at(depth)) continue;
            const char* colon = skip_space(p, end);
            if (colon == end || *colon != ':') continue;  // a value, no key
            if (escaped) return false;
            if (length != key_size || std::memcmp(first, key_text, key_size) != 0) continue;
            p = skip_space(colon + 1, end);
            if (seen || p == end || *p != '[') return false;
            seen = true;
            p = read(p, end);
            if (!p) return false;
        }
    }
    return nesting.level == 0;
}

}  // namespace json
}  // namespace ranktower
