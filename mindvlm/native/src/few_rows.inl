// Products of few rows of x with a matrix of float32 or 16-bit values: dot products, every weight read once.

// Beyond them, transposing W pays: measured as 16 rows with AVX-512 and 6 with AVX2. With one less, 16 tokens of a picture are
// multiplied alike alone and with those of other pictures.
constexpr int64_t kFewRows = kTileRows * kLanes / 4 - 1;
static_assert(kFewRows <= kMostFewRows);

// y[r][c] = x[r] . w[c] over `cols` columns; rows of y are `outputs` apart.
template <int kRows, int kCols, Format format>
inline void multiply_tile(const float* x, int64_t cols, const Row<format>* w, float* y, int64_t outputs) {
  Vec sums[kRows][kCols] = {};
  int64_t k = 0;
  for (; k + kLanes <= cols; k += kLanes) {
    Vec weights[kCols];
    for (int c = 0; c < kCols; ++c) weights[c] = w[c].vec(k);
    if (kCols > 1) {
      // the rows after these: the processor's own prefetching ends at a page, which may be one row
      const auto* next = w[0].values + kCols * (cols + k);
      for (int line = 0; line * 64 < static_cast<int>(kCols * kLanes * sizeof *next); ++line)
        __builtin_prefetch(reinterpret_cast<const char*>(next) + 64 * line);
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec values = load(x + r * cols + k);
      for (int c = 0; c < kCols; ++c) sums[r][c] += values * weights[c];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kCols; ++c) {
      float total = sum(sums[r][c]);
      for (int64_t rest = k; rest < cols; ++rest) total += x[r * cols + rest] * w[c].value(rest);
      y[r * outputs + c] = total;
    }
  }
}

// The same for any number of rows of x.
template <int kCols, Format format>
inline void multiply_tiles(const float* x, int64_t num_rows, int64_t cols, const Row<format>* w, float* y,
                           int64_t outputs) {
  int64_t row = 0;
  for (; row + kTileRows <= num_rows; row += kTileRows)
    multiply_tile<kTileRows, kCols, format>(x + row * cols, cols, w, y + row * outputs, outputs);
  for (; row + 2 <= num_rows; row += 2)
    multiply_tile<2, kCols, format>(x + row * cols, cols, w, y + row * outputs, outputs);
  if (row < num_rows)
    multiply_tile<1, kCols, format>(x + row * cols, cols, w, y + row * outputs, outputs);
}

template <Format format, int... kIndex>
inline void multiply_full_tile(const Matrix& w, int64_t first, std::integer_sequence<int, kIndex...>, const float* x,
                               int64_t num_rows, float* y) {
  const Row<format> rows[] = {Row<format>(w, first + kIndex)...};
  multiply_tiles<kTileOutputs, format>(x, num_rows, w.cols, rows, y + first, w.rows);
}

// y = W x for the outputs [first, last). Memory bounds this product, so W is read in order.
template <Format format>
void multiply_one(const Matrix& w, const float* x, float* y, int64_t first, int64_t last) {
  // independent sums, because an addition takes several cycles
  constexpr int kSums = kLanes < 16 ? 8 : 4;
  for (; first < last; ++first) {
    const Row<format> row(w, first);
    Vec sums[kSums] = {};
    int64_t k = 0;
    for (; k + kSums * kLanes <= w.cols; k += kSums * kLanes) {
      prefetch_after<kSums * kLanes * sizeof *row.values>(row.values + k);
      for (int i = 0; i < kSums; ++i) sums[i] += load(x + k + i * kLanes) * row.vec(k + i * kLanes);
    }
    for (int i = 1; i < kSums; ++i) sums[0] += sums[i];
    float total = sum(sums[0]);
    for (; k < w.cols; ++k) total += x[k] * row.value(k);
    y[first] = total;
  }
}

template <Format format>
void multiply_few(const Matrix& w, const float* x, int64_t num_rows, float* y, int64_t first, int64_t last) {
  if (num_rows == 1) return multiply_one<format>(w, x, y, first, last);
  for (; first + kTileOutputs <= last; first += kTileOutputs)
    multiply_full_tile<format>(w, first, std::make_integer_sequence<int, kTileOutputs>(), x, num_rows, y);
  for (; first < last; ++first) {
    const Row<format> row(w, first);
    multiply_tiles<1, format>(x, num_rows, w.cols, &row, y + first, w.rows);
  }
}
