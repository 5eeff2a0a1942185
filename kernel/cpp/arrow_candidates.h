// The candidates of an Arrow IPC stream where they lie in it, if the stream is as plain as nearly all are.
//
// A stream is messages, each four octets of ones, the size of its header, the header (a flatbuffers table, Message of
// the Arrow columnar format), and a body that the header says the size of. Plain is: a schema of one column `candidates`
// of int64, a record batch without nulls and compression, and the end. Whatever is unusual is refused, and a library
// reads the stream and says what is wrong with it. Nothing that the stream says is followed outside of it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ranktower::arrow {

struct Span {
    const uint8_t* first = nullptr;
    size_t size = 0;
};

struct Candidates {
    Span request;  // the value of the schema's metadata under `request`, empty where there is none
    Span values;   // of int64
};

// A flatbuffers buffer: offsets are relative, tables name their fields by a table of offsets, all little-endian.
class Flat {
  public:
    explicit Flat(Span span) : at_(span.first), size_(span.size) {}

    template <class T>
    bool read(size_t place, T& value) const {
        if (place > size_ || size_ - place < sizeof(T)) return false;
        std::memcpy(&value, at_ + place, sizeof(T));
        return true;
    }

    // Where the offset at `place` leads; 0, where no table can lie, if it leads out.
    size_t target(size_t place) const {
        uint32_t distance;
        return read(place, distance) && distance && distance < size_ - place ? place + distance : 0;
    }

    // Where a field of a table lies, 0 where it is absent.
    size_t field(size_t table, int number) const {
        int32_t back;
        if (!table || !read(table, back)) return 0;
        const int64_t fields = int64_t(table) - back;
        uint16_t length, offset;
        const size_t entry = 4 + 2 * size_t(number);
        if (fields < 0 || !read(size_t(fields), length) || entry + 2 > length) return 0;
        if (!read(size_t(fields) + entry, offset) || !offset) return 0;
        return table + offset;
    }

    size_t child(size_t table, int number) const {
        const size_t place = field(table, number);
        return place ? target(place) : 0;
    }

    // The value of a field, `otherwise` where it is absent or leads out.
    template <class T>
    T value(size_t table, int number, T otherwise) const {
        const size_t place = field(table, number);
        T found;
        return place && read(place, found) ? found : otherwise;
    }

    // Entries of a vector or text, -1 unless all of it lies within.
    int64_t length(size_t vector, size_t entry) const {
        uint32_t count;
        if (!vector || !read(vector, count) || count > (size_ - vector - 4) / entry) return -1;
        return count;
    }

    Span text(size_t vector) const {
        const int64_t count = length(vector, 1);
        return count < 0 ? Span{} : Span{at_ + vector + 4, size_t(count)};
    }

  private:
    const uint8_t* at_;
    size_t size_;
};

inline bool is(Span text, const char* wanted) {
    return text.first && text.size == std::strlen(wanted) && std::memcmp(text.first, wanted, text.size) == 0;
}

// Takes the next message of `rest`: its header and body. False at the end, or where there is none.
inline bool next(Span& rest, Span& header, Span& body, bool& at_end) {
    uint32_t mark, size;
    if (rest.size < 8) return false;
    std::memcpy(&mark, rest.first, 4);
    std::memcpy(&size, rest.first + 4, 4);
    if (mark != 0xffffffff) return false;
    at_end = size == 0;
    if (at_end || size % 8 || size > rest.size - 8) return false;
    header = {rest.first + 8, size};
    const Flat flat(header);
    const int64_t octets = flat.value<int64_t>(flat.target(0), 3, 0);
    const size_t left = rest.size - 8 - size;
    if (octets < 0 || octets % 8 || uint64_t(octets) > left) return false;  // all that follows stays aligned
    body = {header.first + size, size_t(octets)};
    rest = {body.first + body.size, left - body.size};
    return true;
}

// One column `candidates` of int64, as it is in memory.
inline bool read_schema(Span header, Span& request) {
    const Flat flat(header);
    const size_t message = flat.target(0), schema = flat.child(message, 2);
    if (flat.value<uint8_t>(message, 1, 0) != 1 || !schema || flat.value<int16_t>(schema, 0, 0) != 0) return false;
    const size_t fields = flat.child(schema, 1);
    if (flat.length(fields, 4) != 1 || flat.field(schema, 3)) return false;
    const size_t column = flat.target(fields + 4), type = flat.child(column, 3);
    if (!is(flat.text(flat.child(column, 0)), "candidates") || flat.field(column, 4)) return false;
    if (flat.value<uint8_t>(column, 2, 0) != 2 || !type) return false;  // Int
    if (flat.value<int32_t>(type, 0, 0) != 64 || flat.value<uint8_t>(type, 1, 0) != 1) return false;
    const size_t metadata = flat.child(schema, 2);
    const int64_t pairs = metadata ? flat.length(metadata, 4) : 0;
    if (pairs < 0) return false;
    for (int64_t i = 0; i < pairs; ++i) {
        const size_t pair = flat.target(metadata + 4 + 4 * size_t(i));
        if (!is(flat.text(flat.child(pair, 0)), "request")) continue;
        if (request.first) return false;  // twice
        request = flat.text(flat.child(pair, 1));
        if (!request.first) return false;
    }
    return true;
}

// One column without nulls, its values in octets of `body`.
inline bool read_batch(Span header, Span body, Span& values) {
    const Flat flat(header);
    const size_t message = flat.target(0), batch = flat.child(message, 2);
    if (flat.value<uint8_t>(message, 1, 0) != 3 || !batch || flat.field(batch, 3)) return false;  // compressed
    if (flat.field(message, 4)) return false;  // compressed as before Arrow 1.0, or whatever else metadata may say
    const int64_t rows = flat.value<int64_t>(batch, 0, 0);
    const size_t nodes = flat.child(batch, 1), buffers = flat.child(batch, 2);
    if (flat.length(nodes, 16) != 1 || flat.length(buffers, 16) != 2) return false;
    int64_t node[2], buffer[4];  // length, nulls; validity's offset and length, the values'
    if (!flat.read(nodes + 4, node) || !flat.read(buffers + 4, buffer)) return false;
    if (node[0] != rows || node[1] != 0 || rows < 0 || rows > INT64_MAX / 8) return false;
    if (buffer[2] < 0 || buffer[3] < 8 * rows || buffer[2] % 8) return false;
    if (uint64_t(buffer[2]) > body.size || uint64_t(buffer[3]) > body.size - uint64_t(buffer[2])) return false;
    values = {body.first + buffer[2], size_t(rows)};
    return true;
}

// False for whatever is not plain.
inline bool find_candidates(const uint8_t* stream, size_t size, Candidates& found) {
    Span rest{stream, size}, header, body;
    bool at_end = false;
    if (!next(rest, header, body, at_end) || body.size || !read_schema(header, found.request)) return false;
    if (!next(rest, header, body, at_end) || !read_batch(header, body, found.values)) return false;
    return rest.size == 0 || (!next(rest, header, body, at_end) && at_end && rest.size == 8);
}

}  // namespace ranktower::arrow
