// The Python side of json_candidates.h, arrow_candidates.h and json_items.h. Ids leave as arrays, or as their place.

#include "bind_json.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arrow_candidates.h"
#include "json_candidates.h"
#include "json_items.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace ranktower {
namespace {

using Places = nb::ndarray<nb::numpy, int64_t, nb::ndim<1>, nb::c_contig>;
using Ends = std::vector<size_t>;

constexpr size_t long_body = 1 << 18;  // from here on others may run meanwhile: 100 us and more

Places give(std::vector<int64_t>&& values) {
    auto* kept = new std::vector<int64_t>(std::move(values));
    nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<int64_t>*>(p); });
    return Places(kept->data(), {kept->size()}, owner);
}

// Takes what is between the arrays, and calls `read` for each; nothing where anything is unusual.
template <class Read>
bool split(const nb::bytes& body, int depth, std::string& rest, Read read) {
    if (depth < 1 || depth > json::deepest) return false;
    const char *first = body.c_str(), *kept = first;
    std::optional<nb::gil_scoped_release> release;
    if (body.size() >= long_body) release.emplace();
    const bool plain = json::find_candidates(first, body.size(), depth, [&](const char* p, const char* end) {
        rest.append(kept, p).append("[]");
        return kept = read(p, end);
    });
    if (plain) rest.append(kept, first + body.size());
    return plain;
}

using Integers = std::tuple<nb::bytes, Ends, Places>;

std::optional<Integers> split_integers(const nb::bytes& body, int depth) {
    std::string rest;
    Ends ends;
    std::vector<int64_t> ids;
    ids.reserve(body.size() / 8);
    const bool plain = split(body, depth, rest, [&](const char* p, const char* end) {
        const char* after = json::read_integers(p, end, [&](int64_t id) { ids.push_back(id); });
        ends.push_back(ids.size());
        return after;
    });
    if (!plain) return std::nullopt;
    return Integers(nb::bytes(rest.data(), rest.size()), std::move(ends), give(std::move(ids)));
}

using Texts = std::tuple<nb::bytes, Ends, Places, Places>;

std::optional<Texts> split_texts(const nb::bytes& body, int depth) {
    std::string rest;
    Ends ends;
    std::vector<int64_t> starts, sizes;
    const char* origin = body.c_str();
    starts.reserve(body.size() / 16), sizes.reserve(body.size() / 16);
    const bool plain = split(body, depth, rest, [&](const char* p, const char* end) {
        const char* after = json::read_texts(p, end, [&](const char* text, size_t size) {
            starts.push_back(text - origin);
            sizes.push_back(int64_t(size));
        });
        ends.push_back(starts.size());
        return after;
    });
    if (!plain) return std::nullopt;
    return Texts(nb::bytes(rest.data(), rest.size()), std::move(ends), give(std::move(starts)), give(std::move(sizes)));
}

using Found = std::tuple<size_t, size_t, size_t, size_t>;

// Where the request lies in the stream and its octets, then the values and how many; nothing where it is not plain.
std::optional<Found> find_arrow(const nb::bytes& stream) {
    const auto* first = reinterpret_cast<const uint8_t*>(stream.c_str());
    arrow::Candidates found;
    if (!arrow::find_candidates(first, stream.size(), found)) return std::nullopt;
    const auto place = [&](const arrow::Span& span) { return span.first ? size_t(span.first - first) : 0; };
    return Found(place(found.request), found.request.size, place(found.values), found.values.size);
}

template <class T>
using Column = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::bytes items_json(const Column<int64_t>& ids, const Column<float>& scores,
                     const std::optional<Column<float>>& probabilities,
                     const std::optional<Column<int32_t>>& positions) {
    const size_t count = ids.shape(0);
    if (scores.shape(0) != count || (probabilities && probabilities->shape(0) != count) ||
        (positions && positions->shape(0) != count))
        throw std::invalid_argument("ids, scores, probabilities and positions differ in length");
    const std::string text = json::items(ids.data(), scores.data(), probabilities ? probabilities->data() : nullptr,
                                         positions ? positions->data() : nullptr, count);
    return nb::bytes(text.data(), text.size());
}

// sigmoid(a s + b) of each score s in double, NaN of NaN.
nb::ndarray<nb::numpy, float, nb::ndim<1>, nb::c_contig> probabilities(const Column<float>& scores, double a,
                                                                       double b) {
    auto* kept = new std::vector<float>(scores.shape(0));
    nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
    for (size_t i = 0; i < kept->size(); ++i)
        (*kept)[i] = float(0.5 * (1 + std::tanh(0.5 * (a * double(scores.data()[i]) + b))));
    return {kept->data(), {kept->size()}, owner};
}

}  // namespace

void bind_json(nb::module_& m) {
    m.def("split_integers", &split_integers, "body"_a, "depth"_a);
    m.def("split_texts", &split_texts, "body"_a, "depth"_a);
    m.def("probabilities", &probabilities, "scores"_a.noconvert(), "a"_a, "b"_a);
    m.def("find_arrow", &find_arrow, "stream"_a);
    m.def("items_json", &items_json, "ids"_a.noconvert(), "scores"_a.noconvert(), "probabilities"_a.noconvert().none(),
          "positions"_a.noconvert().none());
}

}  // namespace ranktower
