// Products of many rows of x with a matrix of float32 or 16-bit values: sums of outer products.
//
// A block of W is transposed to panels of float32, [column][output of the panel], and every tile of x is copied beside it.
// A step of a tile then needs two vectors of the panel and one value of every row, and its sums stay in registers.

constexpr int64_t kPanel = 2 * kLanes;       // outputs of a panel
constexpr int64_t kDepth = 256;              // columns of a panel
constexpr int64_t kBlockOutputs = 256;       // outputs of the panels that stay in the second cache
constexpr int64_t kStride = kDepth + kLanes; // between copied rows of x: a power of two would crowd the first cache

struct alignas(64) Line {
  float values[16];
};

// Memory of a thread for `count` floats, aligned to lines of the cache.
inline float* scratch(std::vector<Line>& lines, int64_t count) {
  lines.resize((count + 15) / 16);
  return lines[0].values;
}

inline void transpose(Vec* rows) {
  for (int step = 1; step < kLanes; step *= 2) {
    Vec next[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = rows[i];
      next[2 * i + 1] = rows[i + kLanes / 2];
      interleave(next[2 * i], next[2 * i + 1]);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// Transposes `num_outputs` rows of W to a panel; missing outputs are 0.
template <Format format>
void fill_panel(const Matrix& w, int64_t first, int64_t num_outputs, int64_t begin, int64_t depth, float* panel) {
  for (int64_t part = 0; part < kPanel; part += kLanes) {
    const int64_t count = std::clamp<int64_t>(num_outputs - part, 0, kLanes);
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = i < count ? Row<format>(w, first + part + i).vec(begin + k) : Vec{};
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) store(panel + (k + i) * kPanel + part, rows[i]);
    }
    for (; k < depth; ++k)
      for (int i = 0; i < kLanes; ++i)
        panel[k * kPanel + part + i] = i < count ? Row<format>(w, first + part + i).value(begin + k) : 0.0f;
  }
}

// y[r] (+)= x[r] times a panel; copied rows of x are kStride apart, rows of y `outputs`.
template <int kRows>
inline void multiply_panel(const float* x, const float* panel, int64_t depth, float* y, int64_t outputs, bool adds) {
  // from 0 in every panel: short sums lose fewer bits than a long one
  Vec sums[kRows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec low = load(panel + k * kPanel), high = load(panel + k * kPanel + kLanes);
    for (int r = 0; r < kRows; ++r) {
      sums[r][0] += x[r * kStride + k] * low;
      sums[r][1] += x[r * kStride + k] * high;
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < 2; ++i) {
      float* to = y + r * outputs + i * kLanes;
      store(to, adds ? load(to) + sums[r][i] : sums[r][i]);
    }
}

// The same for fewer rows or outputs than a tile has: the sums pass through a buffer.
template <int kRows>
inline void multiply_edge(const float* x, const float* panel, int64_t depth, float* y, int64_t outputs, bool adds,
                          int64_t num_rows, int64_t num_outputs) {
  alignas(64) float sums[kRows * kPanel] = {};
  if (adds)
    for (int64_t r = 0; r < num_rows; ++r) std::memcpy(sums + r * kPanel, y + r * outputs, num_outputs * sizeof(float));
  multiply_panel<kRows>(x, panel, depth, sums, kPanel, adds);
  for (int64_t r = 0; r < num_rows; ++r) std::memcpy(y + r * outputs, sums + r * kPanel, num_outputs * sizeof(float));
}

// A tile of x times the panels of a block.
template <int kRows>
inline void multiply_panels(const float* x, int64_t cols, int64_t num_rows, const float* panels, int64_t depth, float* y,
                            int64_t outputs, int64_t num_outputs, bool adds) {
  alignas(64) float copied[kRows * kStride];
  for (int64_t r = 0; r < kRows; ++r)
    std::memcpy(copied + r * kStride, x + std::min(r, num_rows - 1) * cols, depth * sizeof(float));
  for (int64_t c = 0; c < num_outputs; c += kPanel, panels += kPanel * kDepth) {
    if (num_rows == kRows && c + kPanel <= num_outputs) {
      multiply_panel<kRows>(copied, panels, depth, y + c, outputs, adds);
    } else {
      multiply_edge<kRows>(copied, panels, depth, y + c, outputs, adds, num_rows, std::min(kPanel, num_outputs - c));
    }
  }
}

template <Format format>
void multiply_many(const Matrix& w, const float* x, int64_t num_rows, float* y, int64_t first, int64_t last) {
  thread_local std::vector<Line> lines;
  float* panels = scratch(lines, kBlockOutputs * kDepth);
  for (int64_t out = first; out < last; out += kBlockOutputs) {
    const int64_t num_outputs = std::min(kBlockOutputs, last - out);
    for (int64_t begin = 0; begin < w.cols; begin += kDepth) {
      const int64_t depth = std::min(kDepth, w.cols - begin);
      for (int64_t c = 0; c < num_outputs; c += kPanel)
        fill_panel<format>(w, out + c, std::min(kPanel, num_outputs - c), begin, depth, panels + c * kDepth);
      for (int64_t row = 0; row < num_rows;) {
        const int64_t rest = num_rows - row;
        const float* from = x + row * w.cols + begin;
        float* to = y + row * w.rows + out;
        if (rest > kPanelRows / 2) {
          const int64_t count = std::min<int64_t>(kPanelRows, rest);
          multiply_panels<kPanelRows>(from, w.cols, count, panels, depth, to, w.rows, num_outputs, begin > 0);
          row += count;
        } else {
          multiply_panels<kPanelRows / 2>(from, w.cols, rest, panels, depth, to, w.rows, num_outputs, begin > 0);
          row += rest;
        }
      }
    }
  }
}

template <Format format>
void multiply_format(const Matrix& w, const float* x, int64_t num_rows, float* y, int64_t first, int64_t last) {
  if (num_rows <= kFewRows) {
    multiply_few<format>(w, x, num_rows, y, first, last);
  } else {
    multiply_many<format>(w, x, num_rows, y, first, last);
  }
}

void multiply_float(const Matrix& w, const float* x, int64_t num_rows, float* y, int64_t first, int64_t last) {
  if (w.format == Format::float32) multiply_format<Format::float32>(w, x, num_rows, y, first, last);
  if (w.format == Format::bfloat16) multiply_format<Format::bfloat16>(w, x, num_rows, y, first, last);
  if (w.format == Format::float16) multiply_format<Format::float16>(w, x, num_rows, y, first, last);
}
