// SHA-256 of several messages on the CPU.
#include "jam/sha256.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <vector>

#include "launchers.h"

namespace jam {
namespace {

namespace py = pybind11;

JAM_FOR_EACH_CPU void update(ShaStates& states, const uint8_t* const* messages, size_t blocks) {
  sha_update(states, messages, blocks);
}

// Vectors of sixteen words, in one register: only with these do lanes outrun one message at a time.
bool has_sha_lanes() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512cd");
#else
  return false;
#endif
}

// `states` is uint32 [8, 16], changed in place; `pieces` are 1 to 16 buffers of one size, a
// multiple of 64 bytes. Columns without a piece are spoilt.
void sha256_update(py::array_t<uint32_t, py::array::c_style> states,
                   const std::vector<py::buffer>& pieces) {
  if (states.ndim() != 2 || states.shape(0) != kShaWords || states.shape(1) != kShaLanes)
    throw std::invalid_argument("sha256_update: states are not [8, 16]");
  if (pieces.empty() || pieces.size() > kShaLanes)
    throw std::invalid_argument("sha256_update: not 1 to 16 pieces");
  std::vector<py::buffer_info> infos;
  std::array<const uint8_t*, kShaLanes> messages;
  for (const py::buffer& piece : pieces) infos.push_back(piece.request());
  const py::ssize_t size = infos[0].size * infos[0].itemsize;
  for (const py::buffer_info& info : infos)
    if (info.ndim != 1 || info.strides[0] != info.itemsize || info.size * info.itemsize != size)
      throw std::invalid_argument("sha256_update: pieces are not plain bytes of one size");
  if (size % kShaBlock) throw std::invalid_argument("sha256_update: size is no multiple of 64");
  for (size_t lane = 0; lane < kShaLanes; ++lane)
    messages[lane] = static_cast<const uint8_t*>(infos[lane < infos.size() ? lane : 0].ptr);
  auto& words = *reinterpret_cast<ShaStates*>(states.mutable_data());
  py::gil_scoped_release unlocked;
  update(words, messages.data(), size / kShaBlock);
}

}  // namespace

void bind_sha256(py::module_& module) {
  module.def("has_sha_lanes", &has_sha_lanes);
  module.def("sha256_update", &sha256_update, py::arg("states").noconvert(), py::arg("pieces"));
}

}  // namespace jam
