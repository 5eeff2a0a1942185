#include "record.h"

#include <stdexcept>
#include <string>

namespace ranktower {

static void check_range(const char* name, int value, int least, int most) {
    if (value < least || value > most)
        throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ": the kernel takes " +
                                    std::to_string(least) + " to " + std::to_string(most));
}

Kind kind_of(const char* name) {
    const std::string kind = name;
    if (kind == "maxsim") return Kind::maxsim;
    if (kind == "cross_attention") return Kind::cross_attention;
    throw std::invalid_argument("head kind is '" + kind + "': the kernel scores maxsim and cross_attention");
}

Shape make_shape(Kind kind, Dtype dtype, int user_heads, int item_heads, int dim, bool bias, float scale) {
    check_range("user_heads", user_heads, 1, max_user_heads);
    check_range("item_heads", item_heads, 1, max_item_heads);
    check_range("dim", dim, min_dim, dtype == Dtype::int8 ? max_int8_dim : max_dim);
    Shape s{};
    s.kind = kind, s.dtype = dtype, s.bias = bias, s.scale = scale;
    s.user_heads = user_heads, s.item_heads = item_heads, s.dim = dim;
    s.heads = 1;
    while (s.heads < item_heads) s.heads *= 2;
    const int unit = s.heads < 4 ? 16 / s.heads : 4;
    s.dims = (dim + unit - 1) / unit * unit;
    s.plain = (dim + 15) / 16 * 16;
    const bool cross = kind == Kind::cross_attention;
    s.parts = cross ? 3 : 1;
    s.user_size = (cross ? 5 : 1) * user_heads * dim;
    s.item_size = s.parts * item_heads * dim + bias;
    const size_t width = dtype == Dtype::f32 ? 4 : dtype == Dtype::f16 ? 2 : 1;
    const size_t quads = width * s.heads * s.dims;
    s.v_at = quads;
    s.g_at = s.v_at + (cross ? width * s.heads * s.plain : 0);
    s.scales_at = s.g_at + (cross ? quads : 0);
    s.bias_at = s.scales_at + (dtype == Dtype::int8 ? 2 * s.parts * s.heads : 0);
    s.bias_at = (s.bias_at + 3) / 4 * 4;
    s.bytes = bias ? s.bias_at + 4 : s.bias_at;
    s.stride = (s.bytes + 15) / 16 * 16;
    return s;
}

}  // namespace ranktower
