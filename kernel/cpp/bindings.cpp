// The Python side of the kernel: checks every array before memory is touched, copies none, releases the interpreter.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bind_json.h"
#include "bind_training.h"
#include "index.h"
#include "level.h"
#include "pack.h"
#include "rank.h"
#include "record.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace ranktower {
namespace {

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Words = Matrix<uint32_t>;  // (buckets, 16)
template <class T>
using Made = nb::ndarray<nb::numpy, T, nb::ndim<1>, nb::c_contig>;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

void expect(const char* name, size_t found, size_t wanted) {
    if (found != wanted)
        refuse(std::string(name) + " has " + std::to_string(found) + " entries, not " + std::to_string(wanted));
}

template <class T>
Made<T> give(std::vector<T>&& values) {
    auto* kept = new std::vector<T>(std::move(values));
    nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
    return Made<T>(kept->data(), {kept->size()}, owner);
}

Dtype dtype_of(const std::string& name) {
    if (name == "f32") return Dtype::f32;
    if (name == "f16") return Dtype::f16;
    if (name == "int8") return Dtype::int8;
    refuse("dtype is '" + name + "': use f32, f16 or int8");
}

std::vector<std::pair<std::string, bool>> known_levels() {
    const Level* const* all;
    const size_t count = levels(&all);
    std::vector<std::pair<std::string, bool>> known;
    for (size_t i = 0; i < count; ++i) known.emplace_back(all[i]->name, all[i]->supported());
    return known;
}

// --- records and ids

size_t pack_rows(const Shape& shape, const Matrix<float>& records, const Rows& rows) {
    expect("a record", records.shape(1), size_t(shape.item_size));
    expect("a row", rows.shape(1), shape.stride);
    expect("rows", rows.shape(0), records.shape(0));
    nb::gil_scoped_release release;
    return pack(shape, records.data(), records.shape(0), rows.data());
}

void check_buckets(size_t buckets, size_t words, size_t keys) {
    expect("a bucket", words, sizeof(Bucket) / 4);
    if (!buckets || buckets > 0xffffffff || buckets * Bucket::entries <= keys)
        refuse(std::to_string(buckets) + " buckets for " + std::to_string(keys) +
               " keys: more than a fifth as many are needed");
}

size_t fill_buckets(const Vector<uint64_t>& keys,
                    const nb::ndarray<uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>& buckets) {
    check_buckets(buckets.shape(0), buckets.shape(1), keys.shape(0));
    if (keys.shape(0) >= 0x7fffffff) refuse(std::to_string(keys.shape(0)) + " keys are more than rows can number");
    nb::gil_scoped_release release;
    return build_index(keys.data(), keys.shape(0), reinterpret_cast<Bucket*>(buckets.data()), buckets.shape(0));
}

struct TextArrays {
    Vector<uint8_t> data;
    Vector<int64_t> starts, sizes;

    Texts texts() const {
        expect("sizes", sizes.shape(0), starts.shape(0));
        for (size_t i = 0; i < starts.shape(0); ++i) {
            const int64_t start = starts.data()[i], size = sizes.data()[i];
            if (start < 0 || size < 0 || start > int64_t(data.shape(0)) || size > int64_t(data.shape(0)) - start)
                refuse("text " + std::to_string(i) + " lies outside of its buffer");
        }
        return {data.data(), starts.data(), sizes.data()};
    }
};

Made<uint64_t> hashes(Vector<uint8_t> data, Vector<int64_t> starts, Vector<int64_t> sizes, uint64_t salt) {
    const Texts texts = TextArrays{data, starts, sizes}.texts();
    std::vector<uint64_t> keys(starts.shape(0));
    {
        nb::gil_scoped_release release;
        hash_texts(texts, keys.size(), salt, keys.data());
    }
    return give(std::move(keys));
}

Made<int32_t> best_of(const Vector<float>& scores, size_t k) {
    std::vector<int32_t> best(std::min<size_t>(k, scores.shape(0)));
    {
        nb::gil_scoped_release release;
        TopK keep(best.size());
        keep.add(scores.data(), [](size_t i) { return int32_t(i); }, scores.shape(0));
        std::vector<float> kept(best.size());
        keep.finish(best.data(), kept.data());
    }
    return give(std::move(best));
}

// --- the table

using RankedArrays = std::tuple<Made<int32_t>, Made<float>, Made<int32_t>, size_t>;

RankedArrays arrays_of(Ranked&& ranked) {
    return {give(std::move(ranked.positions)), give(std::move(ranked.scores)), give(std::move(ranked.missing)),
            ranked.seen};
}

template <class Find>
Made<int32_t> found(size_t count, Find find) {
    std::vector<int32_t> rows(count);
    {
        nb::gil_scoped_release release;
        find(count, rows.data());
    }
    return give(std::move(rows));
}

// Where ids are found. Owns nothing: it keeps the arrays alive and reads them where they lie.
class Ids {
  public:
    Ids(Words buckets, size_t count, std::optional<Vector<uint64_t>> offsets, std::optional<Vector<uint8_t>> text,
        uint64_t salt)
        : buckets_(buckets) {
        check_buckets(buckets.shape(0), buckets.shape(1), count);
        if (offsets.has_value() != text.has_value()) refuse("text ids need both offsets and text");
        const auto* first = reinterpret_cast<const Bucket*>(buckets.data());
        index_ = {first, buckets.shape(0), count, nullptr, nullptr, salt};
        if (offsets) {
            expect("offsets", offsets->shape(0), count + 1);
            offsets_ = *offsets, text_ = *text;
            index_.offsets = offsets_.data(), index_.text = text_.data();
        }
        check_content();
    }

    const Index& index() const { return index_; }
    size_t size() const { return index_.count; }

    Made<int32_t> find_ids(const Vector<int64_t>& ids) const {
        need_integers(true);
        return found(ids.shape(0), [&](size_t n, int32_t* rows) { lookup(index_, ids.data(), n, rows); });
    }

    Made<int32_t> find_texts(Vector<uint8_t> data, Vector<int64_t> starts, Vector<int64_t> sizes) const {
        need_integers(false);
        const Texts texts = TextArrays{data, starts, sizes}.texts();
        return found(starts.shape(0), [&](size_t n, int32_t* rows) { lookup(index_, texts, n, rows); });
    }

    void need_integers(bool integers) const {
        if (integers == (index_.offsets != nullptr))
            refuse(integers ? "this table has text ids, got integers" : "this table has integer ids, got texts");
    }

  private:
    // The file may be anybody's: a row or an offset that leads out of it must be found before a request follows it.
    void check_content() const {
        nb::gil_scoped_release release;
        bool ends = false;
        for (size_t i = 0; i < index_.size; ++i) {
            ends |= !index_.buckets[i].spilled;
            const Bucket& bucket = index_.buckets[i];
            for (size_t entry = 0; entry < Bucket::entries; ++entry) {
                const uint32_t row = bucket.rows[entry];
                if (row > index_.count)
                    refuse("bucket " + std::to_string(i) + " names row " + std::to_string(row) + " of " +
                           std::to_string(index_.count));
                for (size_t other = 0; row && other < entry; ++other)  // a search would make a third row of the two
                    if (bucket.rows[other] && bucket.keys[other] == bucket.keys[entry])
                        refuse("bucket " + std::to_string(i) + " holds a key twice");
            }
        }
        if (!ends) refuse("every bucket has spilled: a search for an unknown id would not end");
        for (size_t i = 0; index_.offsets && i < index_.count; ++i)
            if (index_.offsets[i] > index_.offsets[i + 1])
                refuse("text " + std::to_string(i) + " ends before it begins");
        if (index_.offsets && index_.offsets[index_.count] > text_.shape(0))
            refuse("the last text ends outside of its buffer");
    }

    Words buckets_;
    Vector<uint64_t> offsets_;
    Vector<uint8_t> text_;
    Index index_{};
};

// Packed records and where their ids are found. Owns neither.
class Table {
  public:
    Table(const Shape& shape, Matrix<uint8_t> rows, const Ids& ids, const std::string& level)
        : shape_(shape), level_(level_of(level.c_str())), rows_(rows), ids_(ids), index_(ids.index()) {
        expect("a row", rows.shape(1), shape.stride);
        expect("rows", rows.shape(0), ids.size());
        records_ = {rows_.data(), shape_.stride};
    }

    // The same table under an overlay: records of the first `over.size()` ids, of which those beyond `rows` are deleted.
    Table(const Table& under, Matrix<uint8_t> rows, const Ids& over)
        : shape_(under.shape_),
          level_(under.level_),
          rows_(under.rows_),
          ids_(under.ids_),
          index_(under.index_),
          over_(&over),
          over_rows_(rows) {
        if (under.over_) refuse("the table has an overlay: lay the new one over the table itself");
        over.need_integers(!index_.offsets);
        expect("a row", rows.shape(1), shape_.stride);
        if (rows.shape(0) > over.size())
            refuse(std::to_string(rows.shape(0)) + " rows for " + std::to_string(over.size()) + " ids");
        if (index_.count + over.size() >= 0x7fffffff) refuse("table and overlay have more rows than can be numbered");
        records_ = {rows_.data(), shape_.stride, int32_t(index_.count), over_rows_.data()};
    }

    Made<int32_t> find_ids(const Vector<int64_t>& ids) const {
        ids_.need_integers(true);
        return found(ids.shape(0), [&](size_t n, int32_t* rows) { find(ids.data(), n, rows); });
    }

    Made<int32_t> find_texts(Vector<uint8_t> data, Vector<int64_t> starts, Vector<int64_t> sizes) const {
        ids_.need_integers(false);
        const Texts texts = TextArrays{data, starts, sizes}.texts();
        return found(starts.shape(0), [&](size_t n, int32_t* rows) { find(texts, n, rows); });
    }

    Made<float> score(const Vector<float>& user, const Vector<int32_t>& rows) const {
        check_rows(rows);
        std::vector<float> scores(rows.shape(0));
        const auto prepared = prepare(user);
        {
            nb::gil_scoped_release release;
            level_.score(shape_, prepared.get(), records_, rows.data(), scores.size(), scores.size(), scores.data());
        }
        return give(std::move(scores));
    }

    uint64_t touch(const Vector<int32_t>& rows) const {
        check_rows(rows);
        nb::gil_scoped_release release;
        return level_.touch(shape_, records_, rows.data(), rows.shape(0));
    }

    nb::ndarray<nb::numpy, float, nb::ndim<2>, nb::c_contig> records(const Vector<int32_t>& rows) const {
        check_rows(rows);
        auto* kept = new std::vector<float>(rows.shape(0) * size_t(shape_.item_size));
        nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<float>*>(p); });
        {
            nb::gil_scoped_release release;
            unpack(shape_, records_, rows.data(), rows.shape(0), kept->data());
        }
        return {kept->data(), {rows.shape(0), size_t(shape_.item_size)}, owner};
    }

    RankedArrays rank_ids(const Vector<float>& user, const Vector<int64_t>& ids, size_t k, int64_t deadline_ns) const {
        ids_.need_integers(true);
        return ranked(user, ids.shape(0), k, deadline_ns, [&](size_t n, int32_t* rows) { find(ids.data(), n, rows); });
    }

    RankedArrays rank_texts(const Vector<float>& user, Vector<uint8_t> data, Vector<int64_t> starts,
                            Vector<int64_t> sizes, size_t k, int64_t deadline_ns) const {
        ids_.need_integers(false);
        const Texts texts = TextArrays{data, starts, sizes}.texts();
        return ranked(user, starts.shape(0), k, deadline_ns, [&](size_t n, int32_t* rows) { find(texts, n, rows); });
    }

    // Lists of integer ids end to end, one for each row of users; equal to one by one.
    std::vector<RankedArrays> rank_batch(const Matrix<float>& users, const Vector<int64_t>& ids,
                                         const Vector<int64_t>& ends, const std::vector<size_t>& ks,
                                         int64_t deadline_ns) const {
        ids_.need_integers(true);
        expect("ends", ends.shape(0), users.shape(0));
        expect("ks", ks.size(), users.shape(0));
        expect("a user record", users.shape(1), size_t(shape_.user_size));
        int64_t start = 0;
        for (size_t i = 0; i < ends.shape(0); start = ends.data()[i++])
            if (ends.data()[i] < start) refuse("list " + std::to_string(i) + " ends before it begins");
        expect("ids", ids.shape(0), size_t(start));
        std::vector<Ranked> results(users.shape(0));
        {
            nb::gil_scoped_release release;
            for (size_t i = 0; i < results.size(); ++i) {
                const int64_t* from = ids.data() + (i ? ends.data()[i - 1] : 0);
                const auto look = [&](size_t n, int32_t* rows) { find(from, n, rows); };
                const auto prepared = prepare(users.data() + i * shape_.user_size);
                results[i] = ranktower::rank(level_, shape_, prepared.get(), records_, look,
                                             size_t(ids.data() + ends.data()[i] - from), ks[i], deadline_ns);
            }
        }
        std::vector<RankedArrays> arrays;
        for (Ranked& result : results) arrays.push_back(arrays_of(std::move(result)));
        return arrays;
    }

    const char* level() const { return level_.name; }
    size_t size() const { return index_.count + (over_ ? over_rows_.shape(0) : 0); }

  private:
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };

    void check_rows(const Vector<int32_t>& rows) const {
        for (size_t i = 0; i < rows.shape(0); ++i)
            if (rows.data()[i] < 0 || size_t(rows.data()[i]) >= size())
                refuse("row " + std::to_string(rows.data()[i]) + " is not among " + std::to_string(size()));
    }

    template <class Wanted>
    void find(const Wanted& ids, size_t count, int32_t* rows) const {
        lookup(index_, ids, count, rows);
        if (!over_) return;
        std::vector<int32_t> over(count);
        lookup(over_->index(), ids, count, over.data());
        lay_over(over.data(), count, index_.count, over_rows_.shape(0), rows);
    }

    std::unique_ptr<void, Free> prepare(const Vector<float>& user) const {
        expect("the user record", user.shape(0), size_t(shape_.user_size));
        return prepare(user.data());
    }

    std::unique_ptr<void, Free> prepare(const float* user) const {
        const size_t bytes = (level_.prepared_bytes(shape_) + 63) / 64 * 64;
        std::unique_ptr<void, Free> prepared(std::aligned_alloc(64, bytes));
        if (!prepared) throw std::bad_alloc();
        level_.prepare(shape_, user, prepared.get());
        return prepared;
    }

    template <class Find>
    RankedArrays ranked(const Vector<float>& user, size_t count, size_t k, int64_t deadline_ns, Find find) const {
        Ranked result;
        const auto prepared = prepare(user);
        {
            nb::gil_scoped_release release;
            result = ranktower::rank(level_, shape_, prepared.get(), records_, find, count, k, deadline_ns);
        }
        return arrays_of(std::move(result));
    }

    Shape shape_;
    const Level& level_;
    Matrix<uint8_t> rows_;
    const Ids& ids_;  // kept alive by the binding
    const Index& index_;
    const Ids* over_ = nullptr;  // of an overlay, kept alive, too
    Matrix<uint8_t> over_rows_;
    Records records_{};
};

void bind_records(nb::module_& m) {
    nb::class_<Shape>(m, "Shape")
        .def_ro("stride", &Shape::stride)
        .def_ro("bytes", &Shape::bytes)
        .def_ro("heads", &Shape::heads)
        .def_ro("dims", &Shape::dims)
        .def_ro("plain", &Shape::plain)
        .def_ro("v_at", &Shape::v_at)
        .def_ro("g_at", &Shape::g_at)
        .def_ro("scales_at", &Shape::scales_at)
        .def_ro("bias_at", &Shape::bias_at);
    m.def(
        "make_shape",
        [](const std::string& kind, const std::string& dtype, int user_heads, int item_heads, int dim, bool bias,
           float scale) {
            return make_shape(kind_of(kind.c_str()), dtype_of(dtype), user_heads, item_heads, dim, bias, scale);
        },
        "kind"_a, "dtype"_a, "user_heads"_a, "item_heads"_a, "dim"_a, "bias"_a, "scale"_a);
    m.def("pack", &pack_rows, "shape"_a, "records"_a.noconvert(), "rows"_a.noconvert());
    m.def("build_index", &fill_buckets, "keys"_a.noconvert(), "buckets"_a.noconvert());
    m.def("hash_texts", &hashes, "data"_a.noconvert(), "starts"_a.noconvert(), "sizes"_a.noconvert(), "salt"_a);
    m.def("top_k", &best_of, "scores"_a.noconvert(), "k"_a);
}

void bind_table(nb::module_& m) {
    nb::class_<Ids>(m, "Ids")
        .def(nb::init<Words, size_t, std::optional<Vector<uint64_t>>, std::optional<Vector<uint8_t>>, uint64_t>(),
             "buckets"_a.noconvert(), "count"_a, "offsets"_a.noconvert().none(), "text"_a.noconvert().none(), "salt"_a)
        .def("lookup", &Ids::find_ids, "ids"_a.noconvert())
        .def("lookup_texts", &Ids::find_texts, "data"_a.noconvert(), "starts"_a.noconvert(), "sizes"_a.noconvert())
        .def("__len__", &Ids::size);
    nb::class_<Table>(m, "Table")
        .def(nb::init<const Shape&, Matrix<uint8_t>, const Ids&, const std::string&>(), nb::keep_alive<1, 4>(),
             "shape"_a, "rows"_a.noconvert(), "ids"_a, "level"_a)
        .def(nb::init<const Table&, Matrix<uint8_t>, const Ids&>(), nb::keep_alive<1, 2>(), nb::keep_alive<1, 4>(),
             "under"_a, "rows"_a.noconvert(), "ids"_a)
        .def("lookup", &Table::find_ids, "ids"_a.noconvert())
        .def("lookup_texts", &Table::find_texts, "data"_a.noconvert(), "starts"_a.noconvert(), "sizes"_a.noconvert())
        .def("__len__", &Table::size)
        .def("score", &Table::score, "user"_a.noconvert(), "rows"_a.noconvert())
        .def("touch", &Table::touch, "rows"_a.noconvert())
        .def("records", &Table::records, "rows"_a.noconvert())
        .def("rank", &Table::rank_ids, "user"_a.noconvert(), "ids"_a.noconvert(), "k"_a, "deadline_ns"_a)
        .def("rank_texts", &Table::rank_texts, "user"_a.noconvert(), "data"_a.noconvert(), "starts"_a.noconvert(),
             "sizes"_a.noconvert(), "k"_a, "deadline_ns"_a)
        .def("rank_batch", &Table::rank_batch, "users"_a.noconvert(), "ids"_a.noconvert(), "ends"_a.noconvert(), "ks"_a,
             "deadline_ns"_a)
        .def_prop_ro("level", &Table::level);
}

}  // namespace
}  // namespace ranktower

NB_MODULE(_native, m) {
    m.doc() = "The native kernel. kernel/engine.py is its door.";
    nanobind::set_leak_warnings(false);  // tables that live until the process ends are no leak
    m.def("levels", &ranktower::known_levels);
    ranktower::bind_records(m);
    ranktower::bind_table(m);
    ranktower::bind_json(m);
    ranktower::bind_training(m);
}
