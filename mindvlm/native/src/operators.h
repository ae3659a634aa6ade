// What the operators of a MindSpore graph share: sizes from shapes, and ranges of rows for the threads.
#pragma once
#include <algorithm>
#include <cstdint>

#include "threads.h"

// Work per task, in weights: below it, waking another thread costs more than it saves.
constexpr int64_t kTaskWeights = 1 << 16;

inline int64_t num_elements(const int64_t* shape, int num_dims) {
  int64_t size = 1;
  for (int i = 0; i < num_dims; ++i) size *= shape[i];
  return size;
}

inline int64_t size_before_last(const int64_t* shape, int num_dims) { return num_elements(shape, num_dims - 1); }

// Calls run(first, last) for ranges of rows of about kTaskWeights values.
template <class Run>
void share_rows(int64_t num_rows, int64_t width, const Run& run) {
  const int64_t size = std::max<int64_t>(1, kTaskWeights / 4 / std::max<int64_t>(1, width));
  run_parallel((num_rows + size - 1) / size, [&](int64_t task) { run(task * size, std::min(num_rows, (task + 1) * size)); });
}
