// Random numbers on the CPU.
#include "jam/draw.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/parallel.h"
#include "launchers.h"

namespace jam {
namespace {

namespace py = pybind11;

constexpr int64_t kPiece = int64_t{1} << 16;  // numbers that a thread draws at once

JAM_FOR_EACH_CPU void draw_uniform(float* out, int64_t start, int64_t count, uint64_t key,
                                   float scale) {
  draw<Draw::kUniform>(out, start, count, key, scale);
}

JAM_FOR_EACH_CPU void draw_cut_normal(float* out, int64_t start, int64_t count, uint64_t key,
                                      float scale) {
  draw<Draw::kCutNormal>(out, start, count, key, scale);
}

JAM_FOR_EACH_CPU void draw_normal(float* out, int64_t start, int64_t count, uint64_t key,
                                  float scale) {
  draw<Draw::kNormal>(out, start, count, key, scale);
}

// Fills `out`, float32 [count], with numbers from `start` on.
void fill(py::array_t<float, py::array::c_style> out, const std::string& kind, uint64_t key,
          int64_t start, float scale) {
  if (out.ndim() != 1 || start < 0) throw std::invalid_argument("draw: out is no vector");
  const auto work = kind == "uniform"      ? draw_uniform
                    : kind == "cut_normal" ? draw_cut_normal
                    : kind == "normal"     ? draw_normal
                                           : nullptr;
  if (!work) throw std::invalid_argument("draw: unknown kind " + kind);
  const int64_t count = out.size();
  float* numbers = out.mutable_data();
  py::gil_scoped_release unlocked;
  for_each_row((count + kPiece - 1) / kPiece, [&](int64_t piece) {
    const int64_t at = piece * kPiece;
    work(numbers + at, start + at, std::min(kPiece, count - at), key, scale);
  });
}

}  // namespace

void bind_draw(py::module_& module) {
  module.def("draw", &fill, py::arg("out").noconvert(), py::arg("kind"), py::arg("key"),
             py::arg("start"), py::arg("scale"));
}

}  // namespace jam
