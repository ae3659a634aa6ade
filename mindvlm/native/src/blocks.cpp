#include "blocks.h"

#include <memory>

#include "operators.h"
#include "products.h"

namespace {

// Rows whose intermediate values of one matrix are in memory at a time.
constexpr int64_t kMlpRows = 1024;

const float* floats(const void* input) { return static_cast<const float*>(input); }

}  // namespace

void normalize(const Norm& norm, const float* x, int64_t num_rows, float* to) {
  const int64_t width = norm.width;
  share_rows(num_rows, width, [&](int64_t first, int64_t last) {
    for (int64_t from = first * width; from < last * width; from += width) {
      if (norm.bias) {
        kernels->layer_norm(x + from, norm.weight, norm.bias, width, norm.eps, to + from);
      } else {
        kernels->rms_norm(x + from, norm.weight, width, norm.eps, to + from);
      }
    }
  });
}

void feed_forward(const Mlp& mlp, const float* x, int64_t num_rows, float* to) {
  const auto& [gate, first, last, activation] = mlp;
  const int64_t width = first.w->rows, cols = first.w->cols;
  const int64_t limit = gate.w ? kMlpRows / 2 : kMlpRows, num_parts = std::max<int64_t>(1, (num_rows + limit - 1) / limit);
  // parts of equal sizes, because a rest of few rows would be rounded in another way
  const int64_t most = (num_rows + num_parts - 1) / num_parts;
  const std::unique_ptr<float[]> hidden(new float[most * width]), gates(new float[gate.w ? most * width : 0]);
  for (int64_t row = 0; row < num_rows; row += most) {
    const int64_t count = std::min(most, num_rows - row);
    if (gate.w) {
      multiply({{gate.w, gate.bias, gates.get(), activation}, {first.w, first.bias, hidden.get()}}, x + row * cols, count);
      share_rows(count, width, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * width; i < end * width; ++i) hidden[i] *= gates[i];
      });
    } else {
      multiply({{first.w, first.bias, hidden.get(), activation}}, x + row * cols, count);
    }
    multiply({{last.w, last.bias, to + row * last.w->rows}}, hidden.get(), count);
  }
}

extern "C" {

// Operator: x (..., I), weight (I,), epsilon (1,) float32 -> x / rms(x) * weight.
int MindvlmRmsNorm(int num_params, void** params, int* num_dims, int64_t** shapes, const char**, void*, void*) {
  const Norm norm = {floats(params[1]), nullptr, shapes[1][0], *floats(params[2])};
  normalize(norm, floats(params[0]), size_before_last(shapes[0], num_dims[0]), static_cast<float*>(params[num_params - 1]));
  return 0;
}

// Operator: x (..., I), weight (I,), bias (I,), epsilon (1,) float32 -> (x - mean) / deviation * weight + bias.
int MindvlmLayerNorm(int num_params, void** params, int* num_dims, int64_t** shapes, const char**, void*, void*) {
  const Norm norm = {floats(params[1]), floats(params[2]), shapes[1][0], *floats(params[3])};
  normalize(norm, floats(params[0]), size_before_last(shapes[0], num_dims[0]), static_cast<float*>(params[num_params - 1]));
  return 0;
}

// Operator: x float32, kind (1,) int32 -> activation(x), the shape of x.
int MindvlmActivation(int num_params, void** params, int* num_dims, int64_t** shapes, const char**, void*, void*) {
  const float* x = floats(params[0]);
  const Activation kind = *static_cast<const Activation*>(params[1]);
  float* to = static_cast<float*>(params[num_params - 1]);
  const int64_t width = shapes[0][num_dims[0] - 1];
  share_rows(size_before_last(shapes[0], num_dims[0]), width, [&](int64_t first, int64_t last) {
    kernels->activate(kind, x + first * width, (last - first) * width, to + first * width);
  });
  return 0;
}

// Operator: gate and up, float32 of one shape -> silu(gate) * up.
int MindvlmGatedSilu(int num_params, void** params, int* num_dims, int64_t** shapes, const char**, void*, void*) {
  const float *gate = floats(params[0]), *up = floats(params[1]);
  float* to = static_cast<float*>(params[num_params - 1]);
  const int64_t width = shapes[0][num_dims[0] - 1];
  share_rows(size_before_last(shapes[0], num_dims[0]), width, [&](int64_t first, int64_t last) {
    kernels->gated_silu(gate + first * width, up + first * width, (last - first) * width, to + first * width);
  });
  return 0;
}

// Operator: x (..., I) float32, the handles of two matrices, kind of activation (1,) int32, the biases of both or nothing
// -> W2 activation(W1 x + b1) + b2.
int MindvlmMlp(int num_params, void** params, int* num_dims, int64_t** shapes, const char**, void*, void*) {
  const bool has_bias = num_params > 5;
  const Linear first = {&matrix_of(params[1]), has_bias ? floats(params[4]) : nullptr};
  const Linear last = {&matrix_of(params[2]), has_bias ? floats(params[5]) : nullptr};
  feed_forward({{}, first, last, *static_cast<const Activation*>(params[3])}, floats(params[0]),
               size_before_last(shapes[0], num_dims[0]), static_cast<float*>(params[num_params - 1]));
  return 0;
}
}
