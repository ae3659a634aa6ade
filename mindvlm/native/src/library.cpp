// The C interface: matrices by handle, products of them, and the operators of a MindSpore graph.
#include <sys/mman.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "matrix.h"
#include "operators.h"
#include "quantize.h"
#include "threads.h"

const Kernels* kernels = nullptr;

namespace {

// Rows and outputs per task of a product with many rows.
constexpr int64_t kTaskRows = 128, kTaskOutputs = 256;

bool runs_here(const Kernels* set) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (set == kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni");
  if (set == kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__aarch64__)
  if (set == kDotprod) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#endif
  return true;
}

// Calls run(first, last) for ranges of outputs that are multiples of `unit`, on all threads.
template <class Run>
void share_outputs(const Matrix& w, int64_t unit, int64_t num_rows, const Run& run) {
  const int64_t least = std::max<int64_t>(1, kTaskWeights / std::max<int64_t>(1, w.cols * num_rows));
  // four tasks per thread, so that a thread that is held up does not hold up the product
  const int64_t wanted = (w.rows + 4 * num_threads() - 1) / (4 * num_threads());
  const int64_t size = round_up(std::max(least, wanted), unit);
  run_parallel((w.rows + size - 1) / size, [&](int64_t task) { run(task * size, std::min(w.rows, (task + 1) * size)); });
}

void multiply_float(const Matrix& w, const float* x, int64_t num_rows, float* y) {
  if (num_rows < 2 * kTaskRows) {
    share_outputs(w, kernels->tile, num_rows,
                  [&](int64_t first, int64_t last) { kernels->multiply_float(w, x, num_rows, y, first, last); });
    return;
  }
  // blocks of outputs, each with all rows if there are enough of them, because a task transposes its block
  const int64_t num_blocks = (w.rows + kTaskOutputs - 1) / kTaskOutputs;
  const int64_t num_parts = std::clamp<int64_t>((4 * num_threads() + num_blocks - 1) / num_blocks, 1, num_rows / kTaskRows);
  const int64_t size = (num_rows + num_parts - 1) / num_parts;
  run_parallel(num_blocks * num_parts, [&](int64_t task) {
    const int64_t first = task / num_parts * kTaskOutputs, row = task % num_parts * size;
    if (row >= num_rows) return;
    kernels->multiply_float(w, x + row * w.cols, std::min(size, num_rows - row), y + row * w.rows, first,
                            std::min(w.rows, first + kTaskOutputs));
  });
}

void multiply(const Matrix& w, const float* x, int64_t num_rows, float* y) {
  if (!is_blocked(w.format)) return multiply_float(w, x, num_rows, y);
  const int64_t num_blocks = w.cols / kBlock;
  thread_local std::vector<int8_t> values;
  thread_local std::vector<float> scales;
  thread_local std::vector<int32_t> sums;
  values.resize(num_rows * w.cols);
  scales.resize(num_rows * num_blocks);
  sums.resize(num_rows * num_blocks);
  int8_t* to_values = values.data();
  float* to_scales = scales.data();
  int32_t* to_sums = sums.data();
  const auto quantize = [&](int64_t row) {
    kernels->quantize_row(x + row * w.cols, w.cols, to_values + row * w.cols, to_scales + row * num_blocks,
                          to_sums + row * num_blocks);
  };
  if (num_rows < 8) {
    for (int64_t row = 0; row < num_rows; ++row) quantize(row);
  } else {
    run_parallel(num_rows, quantize);
  }
  const QuantizedRows quantized = {to_values, to_scales, to_sums};
  share_outputs(w, kernels->group, num_rows,
                [&](int64_t first, int64_t last) { kernels->multiply_blocks(w, quantized, num_rows, y, first, last); });
}

const Matrix& matrix_of(const void* handle) {
  int64_t address;
  std::memcpy(&address, handle, sizeof address);
  return *reinterpret_cast<const Matrix*>(address);
}

// Rotates the first `rotary_dim` values of a head by its angles, half by half, and scales all of them.
void rotate(const float* from, const float* cos, const float* sin, int64_t rotary_dim, int64_t head_dim, float scale,
            float* to) {
  const int64_t half = rotary_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    to[i] = (from[i] * cos[i] - from[i + half] * sin[i]) * scale;
    to[i + half] = (from[i + half] * cos[i + half] + from[i] * sin[i + half]) * scale;
  }
  for (int64_t i = rotary_dim; i < head_dim; ++i) to[i] = from[i] * scale;
}

// Queries of a head per task of an attention.
constexpr int64_t kTaskQueries = 32;

}  // namespace

void Unmap::operator()(uint8_t* pages) const { munmap(pages, size); }

extern "C" {

// Identifies the sources that the library was compiled from.
const char* mindvlm_digest() { return MINDVLM_DIGEST; }

// Chooses the kernels by name; null chooses the best ones of this processor. Returns the name, or null if there are none.
const char* mindvlm_choose_kernels(const char* name) {
  for (const Kernels* set : {kAvx512, kAvx2, kDotprod, kNeon, kPortable}) {
    if (set && runs_here(set) && (!name || std::string(name) == set->name)) {
      kernels = set;
      return set->name;
    }
  }
  return nullptr;
}

void mindvlm_set_num_threads(int count) { set_num_threads(count); }

// Returns a matrix over row-major values that the caller keeps alive; null for a format or size that does not exist.
Matrix* mindvlm_new_float_matrix(int format, int64_t rows, int64_t cols, const void* values) {
  if (format < 0 || format > static_cast<int>(Format::float16)) return nullptr;
  return new Matrix{static_cast<Format>(format), rows, cols, values};
}

// Returns an empty matrix of blocks, which `mindvlm_pack_rows` fills; null without memory.
Matrix* mindvlm_new_block_matrix(int format, int64_t rows, int64_t cols) {
  const Format kind = static_cast<Format>(format);
  if (!is_blocked(kind) || cols % kBlock) return nullptr;
  const int64_t size = std::max<int64_t>(1, round_up(rows, kernels->group) * cols / kBlock * block_bytes(kind));
  // pages of its own: the heap would keep them when the matrix is freed
  void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
  return new Matrix{kind, rows, cols, nullptr, {static_cast<uint8_t*>(pages), Unmap{size}}};
}

void mindvlm_free_matrix(Matrix* matrix) { delete matrix; }

// Rows that the layout of blocks interleaves: parts of a matrix begin at a multiple of it.
int64_t mindvlm_rows_of_group() { return kernels->group; }

// Fills rows of a matrix of blocks from ggml's layout; `first` is a multiple of `mindvlm_rows_of_group`.
void mindvlm_pack_rows(Matrix* w, int64_t first, int64_t count, const uint8_t* blocks) {
  const int64_t row_bytes = w->cols / kBlock * block_bytes(w->format), group = kernels->group;
  run_parallel((count + group - 1) / group, [&](int64_t i) {
    kernels->pack(w->format, blocks + i * group * row_bytes, std::min(group, count - i * group), w->cols,
                  w->packed.get() + (first + i * group) * row_bytes);
  });
}

// Rounds rows of weights to blocks in ggml's layout; see `quantize_weights`.
void mindvlm_quantize(int format, const float* weights, int64_t rows, int64_t cols, const float* importance,
                      uint8_t* blocks) {
  const Format kind = static_cast<Format>(format);
  run_parallel(rows, [&](int64_t row) {
    quantize_weights(kind, weights + row * cols, cols, importance, blocks + row * cols / kBlock * block_bytes(kind));
  });
}

void mindvlm_multiply(const Matrix* w, const float* x, int64_t num_rows, float* y) { multiply(*w, x, num_rows, y); }

void mindvlm_read_row(const Matrix* w, int64_t index, float* to) { kernels->read_row(*w, index, to); }

// Operator: x (..., I) float32, handle (1,) int64 -> x W^T (..., O) float32.
int MindvlmProduct(int num_params, void** params, int* num_dims, int64_t** shapes, const char**, void*, void*) {
  const float* x = static_cast<const float*>(params[0]);
  multiply(matrix_of(params[1]), x, size_before_last(shapes[0], num_dims[0]), static_cast<float*>(params[num_params - 1]));
  return 0;
}

// Operator: ids (...) int32, handle (1,) int64 -> W[ids] (..., I) float32.
int MindvlmRows(int num_params, void** params, int* num_dims, int64_t** shapes, const char**, void*, void*) {
  const Matrix& w = matrix_of(params[1]);
  const int32_t* ids = static_cast<const int32_t*>(params[0]);
  float* to = static_cast<float*>(params[num_params - 1]);
  const int64_t count = num_elements(shapes[0], num_dims[0]);
  for (int64_t i = 0; i < count; ++i)
    kernels->read_row(w, std::clamp<int64_t>(ids[i], 0, w.rows - 1), to + i * w.cols);
  return 0;
}

// Operator: attention of new tokens with their cache, which it updates in place.
//
// Inputs: query (B, L, H D), key and value (B, L, K D) before rotation, cos and sin (B, L, R), caches of keys and values
// (rows, K, S, D), positions (B, L) int32, rows of the caches (B,) int32, scale of the queries (B, L).
// Output: (B, L, H D). A token sees the positions of its row up to its own. Positions beyond the cache are not stored.
int MindvlmAttention(int num_params, void** params, int*, int64_t** shapes, const char**, void*, void*) {
  const auto input = [&](int i) { return static_cast<const float*>(params[i]); };
  const float *query = input(0), *key = input(1), *value = input(2), *cos = input(3), *sin = input(4), *scales = input(9);
  float *keys = static_cast<float*>(params[5]), *values = static_cast<float*>(params[6]);
  const int32_t *positions = static_cast<const int32_t*>(params[7]), *rows = static_cast<const int32_t*>(params[8]);
  float* out = static_cast<float*>(params[num_params - 1]);
  const int64_t batch = shapes[0][0], length = shapes[0][1], rotary_dim = shapes[3][2];
  const int64_t num_groups = shapes[5][1], capacity = shapes[5][2], head_dim = shapes[5][3];
  const int64_t num_heads = shapes[0][2] / head_dim, group = num_heads / num_groups;

  share_rows(batch * length, num_groups * head_dim, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const int64_t position = positions[token];
      if (position < 0 || position >= capacity) continue;
      for (int64_t head = 0; head < num_groups; ++head) {
        const int64_t from = (token * num_groups + head) * head_dim;
        const int64_t to = ((rows[token / length] * num_groups + head) * capacity + position) * head_dim;
        rotate(key + from, cos + token * rotary_dim, sin + token * rotary_dim, rotary_dim, head_dim, 1.0f, keys + to);
        std::memcpy(values + to, value + from, head_dim * sizeof(float));
      }
    }
  });

  const int64_t step = std::max<int64_t>(1, kTaskQueries / group), num_parts = (length + step - 1) / step;
  run_parallel(batch * num_groups * num_parts, [&](int64_t task) {
    thread_local std::vector<float> queries, attended;
    thread_local std::vector<int64_t> num_keys;
    const int64_t part = task % num_parts, head = task / num_parts % num_groups, row = task / num_parts / num_groups;
    const int64_t first = part * step, count = std::min(step, length - first);
    queries.resize(count * group * head_dim);
    attended.resize(count * group * head_dim);
    num_keys.resize(count * group);
    for (int64_t i = 0; i < count * group; ++i) {
      const int64_t token = row * length + first + i / group;
      num_keys[i] = std::clamp<int64_t>(positions[token] + 1, 1, capacity);
      rotate(query + (token * num_heads + head * group + i % group) * head_dim, cos + token * rotary_dim,
             sin + token * rotary_dim, rotary_dim, head_dim, scales[token], queries.data() + i * head_dim);
    }
    const int64_t cached = (rows[row] * num_groups + head) * capacity * head_dim;
    kernels->attend(queries.data(), count * group, num_keys.data(), keys + cached, values + cached, head_dim,
                    attended.data(), head_dim);
    for (int64_t i = 0; i < count * group; ++i) {
      const int64_t token = row * length + first + i / group;
      std::memcpy(out + (token * num_heads + head * group + i % group) * head_dim, attended.data() + i * head_dim,
                  head_dim * sizeof(float));
    }
  });
  return 0;
}

// Operator: x (..., I), weight (I,), epsilon (1,) float32 -> x / rms(x) * weight.
int MindvlmRmsNorm(int num_params, void** params, int* num_dims, int64_t** shapes, const char**, void*, void*) {
  const float *x = static_cast<const float*>(params[0]), *weight = static_cast<const float*>(params[1]);
  const float eps = *static_cast<const float*>(params[2]);
  float* to = static_cast<float*>(params[num_params - 1]);
  const int64_t width = shapes[1][0];
  share_rows(size_before_last(shapes[0], num_dims[0]), width, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) kernels->rms_norm(x + row * width, weight, width, eps, to + row * width);
  });
  return 0;
}

// Operator: gate and up, float32 of one shape -> silu(gate) * up.
int MindvlmGatedSilu(int num_params, void** params, int* num_dims, int64_t** shapes, const char**, void*, void*) {
  const float *gate = static_cast<const float*>(params[0]), *up = static_cast<const float*>(params[1]);
  float* to = static_cast<float*>(params[num_params - 1]);
  const int64_t width = shapes[0][num_dims[0] - 1];
  share_rows(size_before_last(shapes[0], num_dims[0]), width, [&](int64_t first, int64_t last) {
    kernels->gated_silu(gate + first * width, up + first * width, (last - first) * width, to + first * width);
  });
  return 0;
}
}
