// Rows over threads, as many as torch.set_num_threads says.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace jam {

// Calls work(row) for each row in [0, num_rows). Not at::parallel_for, which an extension that
// links another OpenMP than torch's would run with a number of threads of its own.
template <typename Work>
void for_each_row(int64_t num_rows, const Work& work) {
  const int threads = num_rows == 1 || at::in_parallel_region()
                          ? 1
                          : static_cast<int>(std::min<int64_t>(num_rows, at::get_num_threads()));
  if (threads <= 1) {  // asking OpenMP costs as much as a short row
    for (int64_t row = 0; row < num_rows; ++row) work(row);
    return;
  }
  // A thread that wakes late, or whose core others use too, takes fewer rows.
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t row = 0; row < num_rows; ++row) work(row);
}

}  // namespace jam
