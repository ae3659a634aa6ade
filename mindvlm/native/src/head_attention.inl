// Softmax attention of many queries of one head to all keys, block by block of keys: the scores of one block of queries
// and keys are in memory at a time (FlashAttention, arXiv 2205.14135).
//
// A score begins as the bias of SAM's relative positions, and the product of query and key is added to it.

constexpr int64_t kQueryBlock = round_up(48, kPanelRows);
constexpr int64_t kKeyBlock = 256;
constexpr float kHidden = -1e30f;  // the score of a key that does not exist

// y[r] += x[r] times a panel of `kVecs` vectors; rows of x and of y are `x_stride` and `y_stride` apart.
template <int kVecs>
__attribute__((noinline)) void add_panel(const float* x, int64_t x_stride, const float* panel, int64_t depth, float* y,
                                         int64_t y_stride) {
  Vec sums[kPanelRows][kVecs] = {};
  for (int64_t k = 0; k < depth; ++k, panel += kVecs * kLanes) {
    Vec values[kVecs];
    for (int i = 0; i < kVecs; ++i) values[i] = load(panel + i * kLanes);
    for (int r = 0; r < kPanelRows; ++r)
      for (int i = 0; i < kVecs; ++i) sums[r][i] += x[r * x_stride + k] * values[i];
  }
  for (int r = 0; r < kPanelRows; ++r)
    for (int i = 0; i < kVecs; ++i) {
      float* to = y + r * y_stride + i * kLanes;
      store(to, load(to) + sums[r][i]);
    }
}

// y += x times panels of `width` columns in all, a multiple of kLanes; the last panel has one vector if need be.
inline void add_panels(const float* x, int64_t x_stride, int64_t num_rows, const float* panels, int64_t depth,
                       int64_t width, float* y, int64_t y_stride) {
  for (int64_t c = 0; c < width; c += kPanel)
    for (int64_t r = 0; r < num_rows; r += kPanelRows) {
      if (c + kPanel <= width) {
        add_panel<2>(x + r * x_stride, x_stride, panels + c * depth, depth, y + r * y_stride + c, y_stride);
      } else {
        add_panel<1>(x + r * x_stride, x_stride, panels + c * depth, depth, y + r * y_stride + c, y_stride);
      }
    }
}

// Writes `count` rows of `depth` values as panels [column][row], see `add_panels`. row(i) is their address; missing rows
// up to a multiple of kLanes are 0.
template <class Row>
void transpose_rows(const Row& row, int64_t count, int64_t depth, float* panels) {
  const int64_t width = round_up(count, kLanes);
  for (int64_t first = 0; first < width; first += kLanes) {
    const int64_t panel = first / kPanel * kPanel, lanes = std::min(kPanel, width - panel);
    float* to = panels + panel * depth + first % kPanel;
    const float* from[kLanes];
    for (int i = 0; i < kLanes; ++i) from[i] = first + i < count ? row(first + i) : nullptr;
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
      Vec rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = from[i] ? load(from[i] + k) : Vec{};
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) store(to + (k + i) * lanes, rows[i]);
    }
    for (; k < depth; ++k)
      for (int i = 0; i < kLanes; ++i) to[k * lanes + i] = from[i] ? from[i][k] : 0.0f;
  }
}

// The keys, values and position tables of a head as panels, and the buffers of a block of queries.
class HeadAttender {
 public:
  explicit HeadAttender(const HeadAttention& head)
      : head_(head),
        depth_(head.head_dim),
        width_(round_up(head.head_dim, kLanes)),
        num_tables_(head.row_table ? 2 * (head.grid_rows + head.grid_columns) - 2 : 0),
        table_stride_(round_up(num_tables_, kLanes) + kLanes) {
    const int64_t num_blocks = (head.grid_rows * head.grid_columns + kKeyBlock - 1) / kKeyBlock;
    block_rows_ = (head.grid_rows + num_blocks - 1) / num_blocks;
    stride_ = round_up(block_rows_ * head.grid_columns, kLanes) + kLanes;
    num_blocks_ = (head.grid_rows + block_rows_ - 1) / block_rows_;
    thread_local std::vector<Line> lines;
    const int64_t key_size = num_blocks_ * stride_ * depth_, value_size = num_blocks_ * stride_ * width_;
    const int64_t table_size = round_up(num_tables_, kLanes) * depth_;
    const int64_t sizes[] = {key_size,  value_size, table_size, kQueryBlock * depth_, kQueryBlock * width_,
                             kQueryBlock * stride_ + kLanes, kQueryBlock * table_stride_};
    float** const parts[] = {&keys_, &values_, &tables_, &queries_, &sums_, &scores_, &biases_};
    int64_t total = 0;
    for (int64_t size : sizes) total += round_up(size, 16);
    float* memory = scratch(lines, total);
    for (int i = 0; i < 7; ++i) {
      *parts[i] = memory;
      memory += round_up(sizes[i], 16);
    }
    pack();
  }

  void attend(int64_t first, int64_t count) {
    std::fill(queries_ + count * depth_, queries_ + kQueryBlock * depth_, 0.0f);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(queries_ + i * depth_, head_.query + token_of(first + i) * head_.query_stride, depth_ * sizeof(float));
    const int64_t num_rows = round_up(count, kPanelRows);
    if (num_tables_) {
      std::fill(biases_, biases_ + num_rows * table_stride_, 0.0f);
      add_panels(queries_, depth_, num_rows, tables_, depth_, round_up(num_tables_, kLanes), biases_, table_stride_);
    }
    for (int64_t i = 0; i < count * depth_; ++i) queries_[i] *= head_.scale;

    float tops[kQueryBlock], totals[kQueryBlock] = {};
    std::fill(tops, tops + kQueryBlock, kHidden);
    std::fill(sums_, sums_ + num_rows * width_, 0.0f);
    for (int64_t block = 0; block < num_blocks_; ++block) {
      const int64_t row = block * block_rows_, num_grid_rows = std::min(block_rows_, head_.grid_rows - row);
      const int64_t num_keys = num_grid_rows * head_.grid_columns, num_scores = round_up(num_keys, kLanes);
      for (int64_t i = 0; i < num_rows; ++i) begin_scores(first + std::min(i, count - 1), i, row, num_grid_rows);
      add_panels(queries_, depth_, num_rows, keys_ + block * stride_ * depth_, depth_, num_scores, scores_, stride_);
      for (int64_t i = 0; i < num_rows; ++i) weigh(scores_ + i * stride_, num_scores, sums_ + i * width_, tops[i], totals[i]);
      add_panels(scores_, stride_, num_rows, values_ + block * stride_ * width_, num_keys, width_, sums_, width_);
    }
    for (int64_t i = 0; i < count; ++i) {
      float* to = head_.out + token_of(first + i) * head_.out_stride;
      const float inverse = 1.0f / totals[i];
      for (int64_t d = 0; d < depth_; ++d) to[d] = sums_[i * width_ + d] * inverse;
    }
  }

 private:
  int64_t token_of(int64_t query) const { return head_.query_tokens[head_.cells[query]]; }

  void pack() {
    for (int64_t block = 0; block < num_blocks_; ++block) {
      const int64_t first = block * block_rows_ * head_.grid_columns;
      const int64_t count = std::min(block_rows_ * head_.grid_columns, head_.grid_rows * head_.grid_columns - first);
      const auto key = [&](int64_t i) {
        const int64_t token = head_.key_tokens[first + i];
        return token < 0 ? head_.padding_key : head_.key + token * head_.key_stride;
      };
      transpose_rows(key, count, depth_, keys_ + block * stride_ * depth_);
      float* panels = values_ + block * stride_ * width_;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t token = head_.key_tokens[first + i];
        const float* from = token < 0 ? head_.padding_value : head_.value + token * head_.key_stride;
        for (int64_t d = 0; d < width_; d += kPanel) {
          const int64_t lanes = std::min(kPanel, width_ - d), given = std::min(lanes, depth_ - d);
          float* to = panels + d * count + i * lanes;
          std::memcpy(to, from + d, given * sizeof(float));
          std::fill(to + given, to + lanes, 0.0f);
        }
      }
    }
    if (!num_tables_) return;
    // the columns in reverse: those of consecutive keys are then consecutive
    const int64_t num_rows = 2 * head_.grid_rows - 1;
    const auto table = [&](int64_t i) {
      return i < num_rows ? head_.row_table + i * depth_ : head_.column_table + (num_tables_ - 1 - i) * depth_;
    };
    transpose_rows(table, num_tables_, depth_, tables_);
  }

  // Sets the scores of a query to the biases of the keys of some rows of the grid.
  void begin_scores(int64_t query, int64_t i, int64_t row, int64_t num_grid_rows) {
    float* to = scores_ + i * stride_;
    const int64_t columns = head_.grid_columns, num_keys = num_grid_rows * columns;
    if (num_tables_) {
      const int64_t cell = head_.cells[query];
      const float* by_row = biases_ + i * table_stride_ + cell / columns + head_.grid_rows - 1;
      const float* by_column = biases_ + i * table_stride_ + 2 * head_.grid_rows - 1 + columns - 1 - cell % columns;
      // a vector may exceed a row of the grid: the next one overwrites it
      for (int64_t r = 0; r < num_grid_rows; ++r)
        for (int64_t c = 0; c < columns; c += kLanes) store(to + r * columns + c, load(by_column + c) + by_row[-(row + r)]);
    } else {
      std::fill(to, to + num_keys, 0.0f);
    }
    std::fill(to + num_keys, to + round_up(num_keys, kLanes), kHidden);
  }

  // Replaces scores by their exponentials below the largest score so far, and rescales what was summed with a smaller one.
  void weigh(float* scores, int64_t count, float* sums, float& top, float& total) {
    Vec tops = Vec{} + top;
    for (int64_t k = 0; k < count; k += kLanes) {
      const Vec value = load(scores + k);
      tops = value > tops ? value : tops;
    }
    float found = tops[0];
    for (int i = 1; i < kLanes; ++i) found = std::max(found, tops[i]);
    if (found > top) {
      const float factor = std::exp(top - found);
      for (int64_t d = 0; d < width_; d += kLanes) store(sums + d, load(sums + d) * factor);
      total *= factor;
      top = found;
    }
    Vec part = {};
    for (int64_t k = 0; k < count; k += kLanes) {
      const Vec value = exponential(load(scores + k) - top);
      store(scores + k, value);
      part += value;
    }
    total += sum(part);
  }

  const HeadAttention& head_;
  const int64_t depth_, width_, num_tables_, table_stride_;
  int64_t block_rows_, stride_, num_blocks_;
  float *keys_, *values_, *tables_, *queries_, *sums_, *scores_, *biases_;
};

void attend_head(const HeadAttention& head) {
  HeadAttender attender(head);
  for (int64_t first = 0; first < head.num_queries; first += kQueryBlock)
    attender.attend(first, std::min(kQueryBlock, head.num_queries - first));
}
