// The work of vision towers.
#pragma once
#include <cstdint>

// The order is that of `ACTIVATION_KERNELS` in mindvlm/nn/native_layers.py.
enum class Activation : int32_t { none, gelu, tanh_gelu, quick_gelu, silu, relu };

// Attention of queries of one head to all keys, which form a grid of cells. Pointers are those of token 0; tokens are
// `..._stride` floats apart.
struct HeadAttention {
  const float *query, *key, *value;
  int64_t query_stride, key_stride;
  // Key and value of a cell without a token.
  const float *padding_key, *padding_value;
  // The cells of the queries, and the tokens of all cells: -1 for none.
  const int32_t* cells;
  int64_t num_queries;
  const int32_t *query_tokens, *key_tokens;
  int64_t grid_rows, grid_columns;
  // SAM's tables of relative positions, (2 rows - 1, head_dim) and (2 columns - 1, head_dim), for the unscaled query; null
  // for attention without positions, whose grid has one column.
  const float *row_table, *column_table;
  int64_t head_dim;
  float scale;
  float* out;
  int64_t out_stride;
};
