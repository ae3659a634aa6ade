#include "products.h"

#include <algorithm>
#include <cstring>

#include "operators.h"
#include "threads.h"

namespace {

// Rows and outputs per task of a product with many rows.
constexpr int64_t kTaskRows = 128, kTaskOutputs = 256;

// The outputs [first, last) of some rows.
struct Task {
  const Product* product;
  int64_t first, last, row, num_rows;
};

// Ranges of outputs that are multiples of `unit`, with all rows.
void split_outputs(const Product& product, int64_t num_rows, int64_t unit, std::vector<Task>& tasks) {
  const Matrix& w = *product.w;
  const int64_t least = std::max<int64_t>(1, kTaskWeights / std::max<int64_t>(1, w.cols * num_rows));
  // four tasks per thread, so that a thread that is held up does not hold up the product
  const int64_t wanted = (w.rows + 4 * num_threads() - 1) / (4 * num_threads());
  const int64_t size = round_up(std::max(least, wanted), unit);
  for (int64_t first = 0; first < w.rows; first += size)
    tasks.push_back({&product, first, std::min(w.rows, first + size), 0, num_rows});
}

// Blocks of outputs, each with all rows if there are enough of them, because a task transposes its block. Parts of the rows have
// equal sizes: a rest of few rows would be rounded in another way.
void split_blocks(const Product& product, int64_t num_rows, std::vector<Task>& tasks) {
  const int64_t outputs = product.w->rows, num_blocks = (outputs + kTaskOutputs - 1) / kTaskOutputs;
  const int64_t num_parts = std::clamp<int64_t>((4 * num_threads() + num_blocks - 1) / num_blocks, 1, num_rows / kTaskRows);
  for (int64_t first = 0; first < outputs; first += kTaskOutputs)
    for (int64_t part = 0; part < num_parts; ++part) {
      const int64_t row = num_rows * part / num_parts, end = num_rows * (part + 1) / num_parts;
      tasks.push_back({&product, first, std::min(outputs, first + kTaskOutputs), row, end - row});
    }
}

// Rows of x rounded to blocks.
struct Rounded {
  std::vector<int8_t> values;
  std::vector<float> scales;
  std::vector<int32_t> sums;

  Rounded(const float* x, int64_t num_rows, int64_t cols)
      : values(num_rows * cols), scales(num_rows * (cols / kBlock)), sums(num_rows * (cols / kBlock)) {
    share_rows(num_rows, cols, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row)
        kernels->quantize_row(x + row * cols, cols, values.data() + row * cols, scales.data() + row * (cols / kBlock),
                              sums.data() + row * (cols / kBlock));
    });
  }

  QuantizedRows view() const { return {values.data(), scales.data(), sums.data()}; }
};

}  // namespace

void multiply(const std::vector<Product>& products, const float* x, int64_t num_rows) {
  const int64_t cols = products[0].w->cols;
  bool needs_blocks = false;
  std::vector<Task> tasks;
  for (const Product& product : products) {
    const bool is_block_product = is_blocked(product.w->format);
    needs_blocks |= is_block_product;
    if (is_block_product || num_rows < 2 * kTaskRows) {
      split_outputs(product, num_rows, is_block_product ? kernels->group : kernels->tile, tasks);
    } else {
      split_blocks(product, num_rows, tasks);
    }
  }
  const Rounded rounded(x, needs_blocks ? num_rows : 0, cols);
  run_parallel(tasks.size(), [&](int64_t index) {
    const auto [product, first, last, row, count] = tasks[index];
    const Matrix& w = *product->w;
    float* y = product->y + row * w.rows;
    if (is_blocked(w.format)) {
      kernels->multiply_blocks(w, rounded.view(), count, y, first, last);
    } else {
      kernels->multiply_float(w, x + row * cols, count, y, first, last);
    }
    for (int64_t r = 0; r < count; ++r) {
      float* outputs = y + r * w.rows;
      if (product->bias)
        for (int64_t i = first; i < last; ++i) outputs[i] += product->bias[i];
      if (product->activation != Activation::none)
        kernels->activate(product->activation, outputs + first, last - first, outputs + first);
    }
  });
}

const Matrix& matrix_of(const void* handle) {
  int64_t address;
  std::memcpy(&address, handle, sizeof address);
  return *reinterpret_cast<const Matrix*>(address);
}
