// Operators that gather the inputs of a convolution as rows, in the order of its weight: a product with the weight as a
// matrix follows.
//
// N images, I input channels.
#include <algorithm>
#include <cstring>

#include "operators.h"

extern "C" {

// Operator: pixels (N, I, height, width) float32, patch size P (1,) int32 -> (N * rows * columns, I * P * P), without the
// pixels beyond the last whole patch.
int MindvlmPatches(int num_params, void** params, int*, int64_t** shapes, const char**, void*, void*) {
  const float* pixels = static_cast<const float*>(params[0]);
  float* out = static_cast<float*>(params[num_params - 1]);
  const int64_t channels = shapes[0][1], height = shapes[0][2], width = shapes[0][3];
  const int64_t size = *static_cast<const int32_t*>(params[1]), rows = height / size, columns = width / size;
  run_parallel(shapes[0][0] * rows, [&](int64_t task) {
    const float* image = pixels + task / rows * channels * height * width + task % rows * size * width;
    float* to = out + task * columns * channels * size * size;
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t channel = 0; channel < channels; ++channel)
        for (int64_t r = 0; r < size; ++r, to += size)
          std::memcpy(to, image + (channel * height + r) * width + column * size, size * sizeof(float));
  });
  return 0;
}

// Operator: x (N, rows, columns, I) float32, stride (1,) int32 -> the 3 x 3 neighbourhoods with zeros around the image,
// (N * ceil(rows / stride) * ceil(columns / stride), I * 9).
int MindvlmNeighbourhoods(int num_params, void** params, int*, int64_t** shapes, const char**, void*, void*) {
  const float* x = static_cast<const float*>(params[0]);
  float* out = static_cast<float*>(params[num_params - 1]);
  const int64_t rows = shapes[0][1], columns = shapes[0][2], channels = shapes[0][3];
  const int64_t stride = *static_cast<const int32_t*>(params[1]);
  const int64_t out_rows = (rows + stride - 1) / stride, out_columns = (columns + stride - 1) / stride;
  run_parallel(shapes[0][0] * out_rows, [&](int64_t task) {
    const float* image = x + task / out_rows * rows * columns * channels;
    float* to = out + task * out_columns * channels * 9;
    for (int64_t column = 0; column < out_columns; ++column, to += channels * 9) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t r = task % out_rows * stride + tap / 3 - 1, c = column * stride + tap % 3 - 1;
        const bool exists = r >= 0 && r < rows && c >= 0 && c < columns;
        const float* from = exists ? image + (r * columns + c) * channels : nullptr;
        for (int64_t i = 0; i < channels; ++i) to[i * 9 + tap] = from ? from[i] : 0.0f;
      }
    }
  });
  return 0;
}
}
