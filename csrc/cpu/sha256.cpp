// SHA-256 of several messages on the CPU.
#include "jam/sha256.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
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

// `states` is uint32 [8, 16], changed in place; of the at most 16 pieces, each is None or a buffer
// for that column, of any multiple of 64 bytes. Pieces of one size are the fastest.
void sha256_update(py::array_t<uint32_t, py::array::c_style> states,
                   const std::vector<std::optional<py::buffer>>& pieces) {
  if (states.ndim() != 2 || states.shape(0) != kShaWords || states.shape(1) != kShaLanes)
    throw std::invalid_argument("sha256_update: states are not [8, 16]");
  if (pieces.size() > kShaLanes) throw std::invalid_argument("sha256_update: over 16 pieces");
  std::vector<py::buffer_info> infos;  // each holds its buffer
  std::array<const uint8_t*, kShaLanes> messages{};
  std::array<size_t, kShaLanes> left{};  // blocks of each
  for (size_t lane = 0; lane < pieces.size(); ++lane) {
    if (!pieces[lane]) continue;
    const py::buffer_info& info = infos.emplace_back(pieces[lane]->request());
    if (info.ndim != 1 || info.strides[0] != info.itemsize)
      throw std::invalid_argument("sha256_update: a piece is not plain bytes");
    const size_t size = static_cast<size_t>(info.size * info.itemsize);
    if (size % kShaBlock) throw std::invalid_argument("sha256_update: size is no multiple of 64");
    messages[lane] = static_cast<const uint8_t*>(info.ptr);
    left[lane] = size / kShaBlock;
  }
  auto& words = *reinterpret_cast<ShaStates*>(states.mutable_data());
  py::gil_scoped_release unlocked;
  for (;;) {
    size_t blocks = 0;
    const uint8_t* any = nullptr;  // read in lanes that have nothing
    for (size_t lane = 0; lane < kShaLanes; ++lane) {
      if (!left[lane] || (blocks && left[lane] >= blocks)) continue;
      blocks = left[lane];
      any = messages[lane];
    }
    if (!blocks) return;
    ShaStates found;
    std::array<const uint8_t*, kShaLanes> read;
    memcpy(found, words, sizeof(found));
    for (size_t lane = 0; lane < kShaLanes; ++lane) read[lane] = left[lane] ? messages[lane] : any;
    update(found, read.data(), blocks);
    for (size_t lane = 0; lane < kShaLanes; ++lane) {
      if (!left[lane]) continue;
      for (int word = 0; word < kShaWords; ++word) words[word][lane] = found[word][lane];
      messages[lane] += blocks * kShaBlock;
      left[lane] -= blocks;
    }
  }
}

}  // namespace

void bind_sha256(py::module_& module) {
  module.def("has_sha_lanes", &has_sha_lanes);
  module.def("sha256_update", &sha256_update, py::arg("states").noconvert(), py::arg("pieces"));
}

}  // namespace jam
