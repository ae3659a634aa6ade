// Attention of vision towers.
//
// N images, T tokens, H heads, D head dimension, R rows and C columns of a grid of tokens.
#include "towers.h"

#include <cmath>
#include <numeric>
#include <vector>

#include "matrix.h"
#include "operators.h"

namespace {

// Least queries of a task: a task packs all keys.
constexpr int64_t kLeastQueries = 192;

// The cells of a window, and the tokens of all cells.
struct Window {
  std::vector<int32_t> cells, tokens;
};

// Runs the attention of every image, window and head; `head_of` returns it without its cells and tokens.
template <class HeadOf>
void attend_windows(int64_t num_images, const std::vector<Window>& queries, const std::vector<Window>& keys,
                    int64_t num_heads, const HeadOf& head_of) {
  const int64_t num_windows = queries.size(), num_units = num_images * num_windows * num_heads;
  if (num_units == 0) return;
  const int64_t most = std::max<int64_t>(1, queries[0].cells.size() / kLeastQueries);
  const int64_t num_parts = std::clamp<int64_t>((4 * num_threads() + num_units - 1) / num_units, 1, most);
  run_parallel(num_units * num_parts, [&](int64_t task) {
    const int64_t part = task % num_parts, unit = task / num_parts;
    const Window& window = queries[unit / num_heads % num_windows];
    const int64_t count = window.cells.size(), size = (count + num_parts - 1) / num_parts;
    const int64_t first = std::min(count, part * size);
    HeadAttention head = head_of(unit / num_heads / num_windows, unit % num_heads);
    head.cells = window.cells.data() + first;
    head.num_queries = std::min(size, count - first);
    head.query_tokens = window.tokens.data();
    head.key_tokens = keys[unit / num_heads % num_windows].tokens.data();
    kernels->attend_head(head);
  });
}

std::vector<Window> one_window(int64_t num_tokens) {
  Window window;
  window.cells.resize(num_tokens);
  std::iota(window.cells.begin(), window.cells.end(), 0);
  window.tokens = window.cells;
  return {window};
}

// Windows of a grid; cells beyond its right and lower edge have no token.
std::vector<Window> windows_of(int64_t rows, int64_t columns, int64_t window_rows, int64_t window_columns) {
  std::vector<Window> windows;
  for (int64_t top = 0; top < rows; top += window_rows) {
    for (int64_t left = 0; left < columns; left += window_columns) {
      Window window;
      for (int64_t r = top; r < top + window_rows; ++r) {
        for (int64_t c = left; c < left + window_columns; ++c) {
          const bool exists = r < rows && c < columns;
          if (exists) window.cells.push_back(static_cast<int32_t>(window.tokens.size()));
          window.tokens.push_back(exists ? static_cast<int32_t>(r * columns + c) : -1);
        }
      }
      windows.push_back(std::move(window));
    }
  }
  return windows;
}

}  // namespace

extern "C" {

// Operator: query (N, T, H D), key and value (N, T', H D) float32, H (1,) int32 -> (N, T, H D).
int MindvlmAttendAll(int num_params, void** params, int*, int64_t** shapes, const char**, void*, void*) {
  const auto input = [&](int i) { return static_cast<const float*>(params[i]); };
  const float *query = input(0), *key = input(1), *value = input(2);
  float* out = static_cast<float*>(params[num_params - 1]);
  const int64_t num_heads = *static_cast<const int32_t*>(params[3]);
  const int64_t num_queries = shapes[0][1], num_keys = shapes[1][1], width = shapes[0][2], head_dim = width / num_heads;
  attend_windows(shapes[0][0], one_window(num_queries), one_window(num_keys), num_heads, [&](int64_t image, int64_t index) {
    const int64_t from = image * num_queries * width + index * head_dim, to = image * num_keys * width + index * head_dim;
    HeadAttention head = {};
    head.query = query + from;
    head.key = key + to;
    head.value = value + to;
    head.query_stride = head.key_stride = head.out_stride = width;
    head.grid_rows = num_keys;
    head.grid_columns = 1;
    head.head_dim = head_dim;
    head.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
    head.out = out + from;
    return head;
  });
  return 0;
}

// Operator: queries, keys and values (N, R, C, 3 H D) float32, those of padding (3 H D,), SAM's tables of relative positions
// (2 r - 1, D) and (2 c - 1, D) -> (N, R, C, H D). Attention within windows of r x c tokens.
int MindvlmAttendGrid(int num_params, void** params, int*, int64_t** shapes, const char**, void*, void*) {
  const auto input = [&](int i) { return static_cast<const float*>(params[i]); };
  const float *qkv = input(0), *padding = input(1), *row_table = input(2), *column_table = input(3);
  float* out = static_cast<float*>(params[num_params - 1]);
  const int64_t rows = shapes[0][1], columns = shapes[0][2], width = shapes[0][3] / 3, head_dim = shapes[2][1];
  const int64_t window_rows = (shapes[2][0] + 1) / 2, window_columns = (shapes[3][0] + 1) / 2;
  const std::vector<Window> windows = windows_of(rows, columns, window_rows, window_columns);
  attend_windows(shapes[0][0], windows, windows, width / head_dim, [&](int64_t image, int64_t index) {
    const int64_t first = image * rows * columns, at = index * head_dim;
    HeadAttention head = {};
    head.query = qkv + first * 3 * width + at;
    head.key = head.query + width;
    head.value = head.key + width;
    head.query_stride = head.key_stride = 3 * width;
    head.padding_key = padding + width + at;
    head.padding_value = padding + 2 * width + at;
    head.grid_rows = window_rows;
    head.grid_columns = window_columns;
    head.row_table = row_table;
    head.column_table = column_table;
    head.head_dim = head_dim;
    head.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
    head.out = out + first * width + at;
    head.out_stride = width;
    return head;
  });
  return 0;
}
}
