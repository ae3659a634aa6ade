// Operators of a decoder.
#include <algorithm>
#include <cstring>
#include <vector>

#include "matrix.h"
#include "operators.h"
#include "products.h"
#include "threads.h"

namespace {

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

// Rows of an MLP whose intermediate values are in memory at a time.
constexpr int64_t kMlpRows = 512;

}  // namespace

extern "C" {

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

// Operator: x (..., I), handles (1,) int64 of gate, up (O, I) and down (I, O) -> (silu(x gate^T) * x up^T) down^T (..., I).
int MindvlmGatedMlp(int num_params, void** params, int* num_dims, int64_t** shapes, const char**, void*, void*) {
  const float* x = static_cast<const float*>(params[0]);
  const Matrix &gate = matrix_of(params[1]), &up = matrix_of(params[2]), &down = matrix_of(params[3]);
  float* to = static_cast<float*>(params[num_params - 1]);
  const int64_t num_rows = size_before_last(shapes[0], num_dims[0]), width = gate.rows;
  std::vector<float> gates(std::min(num_rows, kMlpRows) * width), ups(gates.size());
  for (int64_t row = 0; row < num_rows; row += kMlpRows) {
    const int64_t count = std::min(kMlpRows, num_rows - row);
    multiply({{&gate, nullptr, gates.data()}, {&up, nullptr, ups.data()}}, x + row * gate.cols, count);
    share_rows(count, width, [&](int64_t first, int64_t last) {
      const int64_t from = first * width;
      kernels->gated_silu(gates.data() + from, ups.data() + from, (last - first) * width, gates.data() + from);
    });
    multiply({{&down, nullptr, to + row * down.rows}}, gates.data(), count);
  }
  return 0;
}
}
