// The Python side of training.h: checks every array and every index before memory is touched.

#include "bind_training.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <string>

#include "level.h"
#include "training.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace ranktower {
namespace {

template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void expect(const char* name, size_t found, size_t wanted) {
    if (found != wanted)
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(found) + " entries, not " +
                                    std::to_string(wanted));
}

template <class T, class Like>
void expect_like(const char* name, const Matrix<T>& found, const Matrix<Like>& wanted) {
    expect(name, found.shape(0), wanted.shape(0));
    expect((std::string("a row of ") + name).c_str(), found.shape(1), wanted.shape(1));
}

class ListsHead {
  public:
    ListsHead(const std::string& kind, int user_heads, int item_heads, int dim, bool bias, const std::string& level)
        : level_(level_of(level.c_str())) {
        if (user_heads < 1 || item_heads < 1 || dim < 1)
            throw std::invalid_argument("user_heads, item_heads and dim must be at least 1");
        head_.kind = kind_of(kind.c_str()), head_.bias = bias;
        head_.user_heads = size_t(user_heads), head_.item_heads = size_t(item_heads), head_.dim = size_t(dim);
    }

    void score(const Matrix<const float>& users, const Matrix<const float>& items, const Matrix<const int64_t>& chosen,
               int threads, const Matrix<float>& scores, const Matrix<float>& biases) const {
        const Lists lists = checked(users, items, chosen);
        expect_like("scores", scores, chosen);
        if (lists.bias) expect_like("biases", biases, chosen);
        nb::gil_scoped_release release;
        score_lists(level_, lists, threads, scores.data(), biases.data());
    }

    void differentiate(const Matrix<const float>& users, const Matrix<const float>& items,
                       const Matrix<const int64_t>& chosen, int threads, const Matrix<const float>& of_scores,
                       const Matrix<const float>& of_biases, const Matrix<float>& of_users,
                       const Matrix<float>& of_items) const {
        const Lists lists = checked(users, items, chosen);
        expect_like("of_scores", of_scores, chosen);
        if (lists.bias) expect_like("of_biases", of_biases, chosen);
        expect_like("of_users", of_users, users);
        expect_like("of_items", of_items, items);
        nb::gil_scoped_release release;
        differentiate_lists(level_, lists, threads, of_scores.data(), of_biases.data(), items.shape(0), of_users.data(),
                            of_items.data());
    }

  private:
    Lists checked(const Matrix<const float>& users, const Matrix<const float>& items,
                  const Matrix<const int64_t>& chosen) const {
        Lists lists = head_;
        expect("a user record", users.shape(1), lists.user_size());
        expect("an item record", items.shape(1), lists.item_size());
        expect("chosen", chosen.shape(0), users.shape(0));
        for (size_t i = 0; i < chosen.size(); ++i)
            if (chosen.data()[i] < 0 || size_t(chosen.data()[i]) >= items.shape(0))
                throw std::invalid_argument("chosen holds " + std::to_string(chosen.data()[i]) +
                                            ", which is no row of " + std::to_string(items.shape(0)) + " items");
        lists.count = chosen.shape(0), lists.entries = chosen.shape(1);
        lists.users = users.data(), lists.items = items.data(), lists.chosen = chosen.data();
        return lists;
    }

    Lists head_{};
    const Level& level_;
};

}  // namespace

void bind_training(nb::module_& m) {
    nb::class_<ListsHead>(m, "ListsHead")
        .def(nb::init<const std::string&, int, int, int, bool, const std::string&>(), "kind"_a, "user_heads"_a,
             "item_heads"_a, "dim"_a, "bias"_a, "level"_a)
        .def("score", &ListsHead::score, "users"_a.noconvert(), "items"_a.noconvert(), "chosen"_a.noconvert(),
             "threads"_a, "scores"_a.noconvert(), "biases"_a.noconvert())
        .def("differentiate", &ListsHead::differentiate, "users"_a.noconvert(), "items"_a.noconvert(),
             "chosen"_a.noconvert(), "threads"_a, "of_scores"_a.noconvert(), "of_biases"_a.noconvert(),
             "of_users"_a.noconvert(), "of_items"_a.noconvert());
}

}  // namespace ranktower
