// Python bindings of the CPU code: module fastreg._C.
// Tensors arrive as integers from Tensor.data_ptr(); shapes, dtypes and contiguity are checked in
// Python before the call, and nothing here allocates or frees what it is given. Every op releases the
// interpreter lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "affine_sqnorm.h"
#include "attention.h"
#include "cross_entropy.h"
#include "gelu_double_backward.h"
#include "index_sqnorm.h"
#include "machine.h"
#include "multi_tensor_cpu.h"
#include "norm_affine.h"
#include "normalize.h"
#include "outer_apply.h"
#include "outer_sqnorm.h"
#include "outer_sum.h"
#include "segment_dot.h"

namespace py = pybind11;
using namespace fastreg;

namespace {

using Address = std::uintptr_t;
using Size = std::int64_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

const std::int64_t* int64_at(Address address) { return at<const std::int64_t>(address); }

template <class T>
void bind_outer_products(py::module_& m, const std::string& suffix) {
  m.def(("outer_sum" + suffix).c_str(),
        [](Address a, Address d, Address offsets, Address total, Address sq, Size inputs, Size outputs,
           Size segments, int threads) {
          outer_sum<T>({at<T>(a), at<T>(d), int64_at(offsets), at<T>(total), at<T>(sq), inputs, outputs,
                        segments, threads});
        },
        Unlocked());
  m.def(("outer_sqnorm" + suffix).c_str(),
        [](Address a, Address d, Address offsets, Address sq, Size inputs, Size outputs, Size segments,
           bool bias, int threads) {
          outer_sqnorm<T>({at<T>(a), at<T>(d), int64_at(offsets), at<T>(sq), inputs, outputs, segments,
                           bias, threads});
        },
        Unlocked());
  m.def(("outer_apply" + suffix).c_str(),
        [](Address q, Address k, Address v, Address offsets, Address out, Size inputs, Size outputs,
           Size segments, bool bias, int threads) {
          outer_apply<T>({at<T>(q), at<T>(k), at<T>(v), int64_at(offsets), at<T>(out), inputs, outputs,
                          segments, bias, threads});
        },
        Unlocked());
}

template <class T>
void bind_segment_sums(py::module_& m, const std::string& suffix) {
  m.def(("affine_sqnorm" + suffix).c_str(),
        [](Address x, Address d, Address offsets, Address sq_scale, Address sq_bias, Address scale,
           Address bias, Size channels, Size places, Size segments, int threads) {
          affine_sqnorm<T>({at<T>(x), at<T>(d), int64_at(offsets), at<T>(sq_scale), at<T>(sq_bias),
                            at<T>(scale), at<T>(bias), channels, places, segments, threads});
        },
        Unlocked());
  m.def(("index_sqnorm" + suffix).c_str(),
        [](Address index, Address d, Address offsets, Address sq, Address shared, Size width,
           Size segments, int threads) {
          index_sqnorm<T>({int64_at(index), at<T>(d), int64_at(offsets), at<T>(sq), at<T>(shared), width,
                           segments, threads});
        },
        Unlocked());
  m.def(("segment_dot" + suffix).c_str(),
        [](Address x, Address y, Address offsets, Address out, Size width, Size segments, int threads) {
          segment_dot<T>({at<T>(x), at<T>(y), int64_at(offsets), at<T>(out), width, segments, threads});
        },
        Unlocked());
}

template <class T>
void bind_normalize(py::module_& m, const std::string& suffix) {
  m.def(("normalize" + suffix).c_str(),
        [](Address x, Address xhat, Address rstd, Size rows, Size width, double eps, bool center,
           int threads) {
          normalize<T>({at<T>(x), at<T>(xhat), at<T>(rstd), rows, width, eps, center, threads});
        },
        Unlocked());
  m.def(("normalize_backward" + suffix).c_str(),
        [](Address xhat, Address rstd, Address g, Address dx, Size rows, Size width, bool center,
           int threads) {
          normalize_backward<T>({at<T>(xhat), at<T>(rstd), at<T>(g), at<T>(dx), rows, width, center,
                                 threads});
        },
        Unlocked());
  m.def(("normalize_double_backward" + suffix).c_str(),
        [](Address xhat, Address rstd, Address g, Address v, Address grad_g, Address grad_x, Size rows,
           Size width, bool center, int threads) {
          normalize_double_backward<T>({at<T>(xhat), at<T>(rstd), at<T>(g), at<T>(v), at<T>(grad_g),
                                        at<T>(grad_x), rows, width, center, threads});
        },
        Unlocked());
}

template <class T>
void bind_norm_affine(py::module_& m, const std::string& suffix) {
  // (samples, groups, channels of a group, places)
  using Sizes = std::array<Size, 4>;
  const auto shape = [](const Sizes& s) { return NormShape{s[0], s[1], s[2], s[3]}; };
  m.def(("norm_affine" + suffix).c_str(),
        [shape](Address x, Address weight, Address bias, Address y, Address mean, Address rstd, const Sizes& sizes,
                double eps, bool center, int threads) {
          norm_affine<T>({at<T>(x), at<T>(weight), at<T>(bias), at<T>(y), at<T>(mean), at<T>(rstd), shape(sizes), eps,
                          center, threads});
        },
        Unlocked());
  m.def(("norm_affine_backward" + suffix).c_str(),
        [shape](const std::array<Address, 5>& in, Address offsets, const std::array<Address, 3>& out,
                const Sizes& sizes, Size segments, bool center, int threads) {
          norm_affine_backward<T>({at<T>(in[0]), at<T>(in[1]), at<T>(in[2]), at<T>(in[3]), at<T>(in[4]),
                                   int64_at(offsets), at<T>(out[0]), at<T>(out[1]), at<T>(out[2]), shape(sizes),
                                   segments, center, threads});
        },
        Unlocked());
  m.def(("norm_affine_double_backward" + suffix).c_str(),
        [shape](const std::array<Address, 8>& in, Address offsets, const std::array<Address, 3>& out,
                const Sizes& sizes, Size segments, bool center, int threads) {
          norm_affine_double_backward<T>({at<T>(in[0]), at<T>(in[1]), at<T>(in[2]), at<T>(in[3]), at<T>(in[4]),
                                          at<T>(in[5]), at<T>(in[6]), at<T>(in[7]), int64_at(offsets),
                                          at<T>(out[0]), at<T>(out[1]), at<T>(out[2]), shape(sizes), segments,
                                          center, threads});
        },
        Unlocked());
}

template <class T>
void bind_cross_entropy(py::module_& m, const std::string& suffix) {
  m.def(("cross_entropy" + suffix).c_str(),
        [](const std::array<Address, 3>& in, const std::array<Address, 4>& out, Size rows, Size classes,
           std::int64_t seed, std::int64_t draw, int threads) {
          cross_entropy<T>({at<T>(in[0]), int64_at(in[1]), at<T>(in[2]), at<T>(out[0]), at<T>(out[1]),
                            at<std::int64_t>(out[2]), at<T>(out[3]), rows, classes, static_cast<std::uint64_t>(seed),
                            static_cast<std::uint64_t>(draw), threads});
        },
        Unlocked());
  m.def(("cross_entropy_backward" + suffix).c_str(),
        [](const std::array<Address, 4>& in, Address dz, Size rows, Size classes, int threads) {
          cross_entropy_backward<T>({at<T>(in[0]), at<T>(in[1]), int64_at(in[2]), at<T>(in[3]), at<T>(dz), rows,
                                     classes, threads});
        },
        Unlocked());
  m.def(("cross_entropy_double_backward" + suffix).c_str(),
        [](const std::array<Address, 5>& in, const std::array<Address, 2>& out, Size rows, Size classes,
           int threads) {
          cross_entropy_double_backward<T>({at<T>(in[0]), at<T>(in[1]), int64_at(in[2]), at<T>(in[3]), at<T>(in[4]),
                                            at<T>(out[0]), at<T>(out[1]), rows, classes, threads});
        },
        Unlocked());
}

// (address, sample stride, head stride, row stride), strides in numbers.
using Strided = std::array<std::int64_t, 4>;

template <class T>
Operand<T> operand(const Strided& of) {
  return {at<T>(static_cast<Address>(of[0])), of[1], of[2], of[3]};
}

// samples, heads of queries, heads of keys, queries, keys, width
using AttentionSizes = std::array<Size, 6>;

AttentionShape attention_shape(const AttentionSizes& s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }

// mask, whether it is bool, its strides, spans, seed, threshold, factor, scale, left, right
using PatternFields =
    std::tuple<Address, bool, std::array<Size, 4>, Address, std::uint64_t, std::uint32_t, double, double, Size, Size>;

template <class T>
Pattern<T> pattern(const PatternFields& f) {
  return {at<const void>(std::get<0>(f)), std::get<1>(f), std::get<2>(f), at<const std::int32_t>(std::get<3>(f)),
          std::get<4>(f), std::get<5>(f), static_cast<T>(std::get<6>(f)), static_cast<T>(std::get<7>(f)),
          std::get<8>(f), std::get<9>(f)};
}

template <class T>
void bind_attention(py::module_& m, const std::string& suffix) {
  m.def(("attention_forward" + suffix).c_str(),
        [](const std::array<Strided, 3>& in, const std::array<Address, 2>& out, const AttentionSizes& sizes,
           const PatternFields& fields, int threads) {
          const auto x = [&](int i) { return operand<T>(in[i]); };
          attention_forward<T>({x(0), x(1), x(2), at<T>(out[0]), at<T>(out[1]), attention_shape(sizes),
                                pattern<T>(fields), threads});
        },
        Unlocked());
  m.def(("attention_backward" + suffix).c_str(),
        [](const std::array<Strided, 4>& in, Address lse, const std::array<Address, 3>& out,
           const AttentionSizes& sizes, const PatternFields& fields, int threads) {
          const auto x = [&](int i) { return operand<T>(in[i]); };
          attention_backward<T>({x(0), x(1), x(2), x(3), at<T>(lse), at<T>(out[0]), at<T>(out[1]), at<T>(out[2]),
                                 attention_shape(sizes), pattern<T>(fields), threads});
        },
        Unlocked());
  m.def(("attention_double_backward" + suffix).c_str(),
        [](const std::array<Strided, 7>& in, Address lse, const std::array<Address, 4>& out,
           const AttentionSizes& sizes, const PatternFields& fields, int threads) {
          const auto x = [&](int i) { return operand<T>(in[i]); };
          attention_double_backward<T>({x(0), x(1), x(2), x(3), x(4), x(5), x(6), at<T>(lse), at<T>(out[0]),
                                        at<T>(out[1]), at<T>(out[2]), at<T>(out[3]), attention_shape(sizes),
                                        pattern<T>(fields), threads});
        },
        Unlocked());
}

// addresses, chunks, bounds; then tensors and chunks.
TensorLists lists_of(const std::array<Address, 3>& tables, Size tensors, Size count) {
  return {int64_at(tables[0]), at<const Chunk>(tables[1]), int64_at(tables[2]), tensors, count};
}

// The constants of a rule are its fields, in order.
template <template <class> class Rule, class T, class... Constants>
void bind_rule(py::module_& m, const std::string& name) {
  m.def(name.c_str(),
        [](const std::array<Address, 3>& tables, Size tensors, Size count, Address coefficients, Address sums,
           int threads, Constants... constants) {
          multi_tensor(Rule<T>{static_cast<T>(constants)...}, lists_of(tables, tensors, count),
                       at<const T>(coefficients), at<T>(sums), threads);
        },
        Unlocked());
}

template <class T>
void bind_multi_tensor(py::module_& m, const std::string& suffix) {
  using D = double;
  bind_rule<SqNorm, T>(m, "multi_sqnorm" + suffix);
  bind_rule<Dot, T>(m, "multi_dot" + suffix);
  bind_rule<Axpy, T>(m, "multi_axpy" + suffix);
  bind_rule<Sgd, T, D, D, D>(m, "multi_sgd" + suffix);
  bind_rule<SgdMomentum, T, D, D, D, D, D, D, D>(m, "multi_sgd_momentum" + suffix);
  bind_rule<AdamW, T, D, D, D, D, D, D, D>(m, "multi_adamw" + suffix);
}

void bind_gelu(py::module_& m) {
  m.def("gelu_double_backward_f32",
        [](Address x, Address d, Address v, Address grad_d, Address grad_x, Size size, bool approximate,
           int threads) {
          gelu_double_backward({at<float>(x), at<float>(d), at<float>(v), at<float>(grad_d),
                                at<float>(grad_x), size, approximate, threads});
        },
        Unlocked());
}

template <class T>
void bind_ops(py::module_& m, const std::string& suffix) {
  bind_outer_products<T>(m, suffix);
  bind_segment_sums<T>(m, suffix);
  bind_normalize<T>(m, suffix);
  bind_norm_affine<T>(m, suffix);
  bind_attention<T>(m, suffix);
  bind_cross_entropy<T>(m, suffix);
  bind_multi_tensor<T>(m, suffix);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastreg CPU kernels";
  m.def("version", [] { return FASTREG_VERSION; }, "Version of fastreg this module was built from.");
  m.def("max_threads", &max_threads, "Threads an OpenMP region would use now.");
  m.def("isa", &isa, "Instruction set the loader picked for cloned functions.");
  bind_ops<float>(m, "_f32");
  bind_ops<double>(m, "_f64");
  bind_gelu(m);
}
