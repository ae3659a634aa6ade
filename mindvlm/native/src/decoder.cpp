// Attention with a cache, and the layers of a decoder around it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "blocks.h"
#include "operators.h"
#include "products.h"

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

// Tokens [first, first + count) that follow each other in a row of the cache.
struct Sequence {
  int64_t first, count, row;
};

// N new tokens with their angles (N, R), positions, scales of the queries and rows of the cache (N,).
struct Tokens {
  const float *cos, *sin;
  const int32_t* positions;
  const float* scales;
  int64_t count, rotary_dim;
  std::vector<Sequence> sequences;
  std::vector<int32_t> rows;

  // The inputs cos and sin (B, L, R), positions (B, L), rows (B,), scales (B, L) of an operator.
  Tokens(void* const* inputs, int64_t* const* shapes)
      : cos(static_cast<const float*>(inputs[0])),
        sin(static_cast<const float*>(inputs[1])),
        positions(static_cast<const int32_t*>(inputs[2])),
        scales(static_cast<const float*>(inputs[4])),
        count(shapes[0][0] * shapes[0][1]),
        rotary_dim(shapes[0][2]) {
    const int64_t length = shapes[0][1];
    for (int64_t i = 0; i < shapes[0][0]; ++i) {
      const int32_t row = static_cast<const int32_t*>(inputs[3])[i];
      sequences.push_back({i * length, length, row});
      rows.insert(rows.end(), length, row);
    }
  }
};

// Chosen rows of values (rows, width), one after the other.
template <class Value>
std::vector<Value> gather(const Value* values, int64_t width, const std::vector<int64_t>& places) {
  std::vector<Value> gathered(places.size() * width);
  for (size_t i = 0; i < places.size(); ++i)
    std::memcpy(gathered.data() + i * width, values + places[i] * width, width * sizeof(Value));
  return gathered;
}

// The tokens that are no padding, and some of it if they are so few that their products would be rounded like those of few rows.
class WithoutPadding {
 public:
  explicit WithoutPadding(const Tokens& all) : tokens_(all) {
    int64_t num_missing = std::min(all.count, kMostFewRows + 1);
    for (int64_t i = 0; i < all.count; ++i) num_missing -= all.positions[i] >= 0;
    tokens_.sequences.clear();
    for (const Sequence& sequence : all.sequences) {
      const int64_t first = places_.size();
      for (int64_t i = sequence.first; i < sequence.first + sequence.count; ++i)
        if (all.positions[i] >= 0 || num_missing-- > 0) places_.push_back(i);
      const int64_t count = places_.size() - first;
      if (count > 0) tokens_.sequences.push_back({first, count, sequence.row});
    }
    tokens_.count = places_.size();
    if (tokens_.count == all.count) return;
    cos_ = gather(all.cos, all.rotary_dim, places_);
    sin_ = gather(all.sin, all.rotary_dim, places_);
    positions_ = gather(all.positions, 1, places_);
    scales_ = gather(all.scales, 1, places_);
    tokens_.rows = gather(all.rows.data(), 1, places_);
    tokens_.cos = cos_.data();
    tokens_.sin = sin_.data();
    tokens_.positions = positions_.data();
    tokens_.scales = scales_.data();
  }
  WithoutPadding(const WithoutPadding&) = delete;

  const Tokens& tokens() const { return tokens_; }
  // Their indices among all tokens.
  const std::vector<int64_t>& places() const { return places_; }

 private:
  Tokens tokens_;
  std::vector<int64_t> places_;
  std::vector<float> cos_, sin_, scales_;
  std::vector<int32_t> positions_;
};

// Keys and values (rows, K, S, D) of a layer.
struct Cache {
  float *keys, *values;
  int64_t num_groups, capacity, head_dim;

  Cache(void* const* inputs, int64_t* const* shapes)
      : keys(static_cast<float*>(inputs[0])),
        values(static_cast<float*>(inputs[1])),
        num_groups(shapes[0][1]),
        capacity(shapes[0][2]),
        head_dim(shapes[0][3]) {}
};

// Attention of new tokens with their cache, which it updates: query (N, H D), key and value (N, K D) before rotation
// -> out (N, H D). A token sees the positions of its row up to its own. Positions beyond the cache are not stored.
void attend(const Tokens& tokens, const Cache& cache, const float* query, const float* key, const float* value,
            int64_t num_heads, float* out) {
  const int64_t rotary_dim = tokens.rotary_dim;
  const int64_t num_groups = cache.num_groups, capacity = cache.capacity, head_dim = cache.head_dim;
  const int64_t group = num_heads / num_groups;
  share_rows(tokens.count, num_groups * head_dim, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const int64_t position = tokens.positions[token];
      if (position < 0 || position >= capacity) continue;
      const float *cos = tokens.cos + token * rotary_dim, *sin = tokens.sin + token * rotary_dim;
      for (int64_t head = 0; head < num_groups; ++head) {
        const int64_t from = (token * num_groups + head) * head_dim;
        const int64_t to = ((tokens.rows[token] * num_groups + head) * capacity + position) * head_dim;
        rotate(key + from, cos, sin, rotary_dim, head_dim, 1.0f, cache.keys + to);
        std::memcpy(cache.values + to, value + from, head_dim * sizeof(float));
      }
    }
  });

  const int64_t step = std::max<int64_t>(1, kTaskQueries / group);
  std::vector<Sequence> parts;
  for (const Sequence& sequence : tokens.sequences)
    for (int64_t at = 0; at < sequence.count; at += step)
      parts.push_back({sequence.first + at, std::min(step, sequence.count - at), sequence.row});
  run_parallel(parts.size() * num_groups, [&](int64_t task) {
    thread_local std::vector<float> queries, attended;
    thread_local std::vector<int64_t> num_keys;
    const Sequence& part = parts[task / num_groups];
    const int64_t head = task % num_groups, count = part.count * group;
    queries.resize(count * head_dim);
    attended.resize(count * head_dim);
    num_keys.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = part.first + i / group;
      num_keys[i] = std::clamp<int64_t>(tokens.positions[token] + 1, 1, capacity);
      rotate(query + (token * num_heads + head * group + i % group) * head_dim, tokens.cos + token * rotary_dim,
             tokens.sin + token * rotary_dim, rotary_dim, head_dim, tokens.scales[token], queries.data() + i * head_dim);
    }
    const int64_t cached = (part.row * num_groups + head) * capacity * head_dim;
    kernels->attend(queries.data(), count, num_keys.data(), cache.keys + cached, cache.values + cached, head_dim,
                    attended.data(), head_dim);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = part.first + i / group;
      std::memcpy(out + (token * num_heads + head * group + i % group) * head_dim, attended.data() + i * head_dim,
                  head_dim * sizeof(float));
    }
  });
}

void add(const float* x, int64_t num_rows, int64_t width, float* to) {
  share_rows(num_rows, width, [&](int64_t first, int64_t last) {
    for (int64_t i = first * width; i < last * width; ++i) to[i] += x[i];
  });
}

// What the layers are made of; the order is that of `dialect_of` in mindvlm/nn/native_decoder.py.
struct Dialect {
  int32_t num_layers, is_parallel, has_norm_bias, has_qkv_bias, has_output_bias, is_gated, has_mlp_bias;
  Activation activation;
};

// The parameters of a layer: x += attention(norm(x)); x += mlp(norm(x)). A parallel one has no second norm:
// x += attention(norm(x)) + mlp(norm(x)).
struct Layer {
  Norm first_norm, second_norm;
  Linear query, key, value, output;
  Mlp mlp;
};

// Reads the parameters of a layer from the inputs of an operator: norms and matrices in the order of computation, each
// followed by its bias. Moves `input` past them.
Layer read_layer(const Dialect& dialect, void**& input, int64_t width, float eps) {
  const auto floats = [&](bool exists) { return exists ? static_cast<const float*>(*input++) : nullptr; };
  const auto norm = [&] { return Norm{floats(true), floats(dialect.has_norm_bias), width, eps}; };
  const auto linear = [&](bool has_bias) { return Linear{&matrix_of(*input++), floats(has_bias)}; };
  Layer layer = {};
  layer.first_norm = norm();
  layer.query = linear(dialect.has_qkv_bias);
  layer.key = linear(dialect.has_qkv_bias);
  layer.value = linear(dialect.has_qkv_bias);
  layer.output = linear(dialect.has_output_bias);
  if (!dialect.is_parallel) layer.second_norm = norm();
  if (dialect.is_gated) layer.mlp.gate = linear(dialect.has_mlp_bias);
  layer.mlp.first = linear(dialect.has_mlp_bias);
  layer.mlp.last = linear(dialect.has_mlp_bias);
  layer.mlp.activation = dialect.activation;
  return layer;
}

}  // namespace

extern "C" {

// Operator: positions (B, L) int32 and frequencies (R / 2,) or (B, 1, R / 2) float32 -> cos and sin of their products,
// (B, L, R) each, both halves of R alike.
//
// MindSpore's functions round an element by its place in a tensor; these do not.
int MindvlmAngles(int, void** params, int* num_dims, int64_t** shapes, const char**, void*, void*) {
  const int32_t* positions = static_cast<const int32_t*>(params[0]);
  const float* frequencies = static_cast<const float*>(params[1]);
  float *cos = static_cast<float*>(params[2]), *sin = static_cast<float*>(params[3]);
  const int64_t length = shapes[0][1], half = shapes[1][num_dims[1] - 1];
  const int64_t step = num_dims[1] > 1 && shapes[1][0] > 1 ? half : 0;
  // a value takes as long as the products with some weights
  share_rows(shapes[0][0] * length, 32 * half, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token)
      for (int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(positions[token]) * frequencies[token / length * step + i];
        const int64_t at = token * 2 * half + i;
        cos[at] = cos[at + half] = std::cos(angle);
        sin[at] = sin[at + half] = std::sin(angle);
      }
  });
  return 0;
}

// Operator: attention of new tokens with their cache, which it updates in place; see `attend`.
//
// Inputs: query, key, value, cos and sin (B, L, R), positions (B, L) int32, rows of the cache (B,) int32, scales of the
// queries (B, L), keys and values of the cache (rows, K, S, D). Output: (B, L, H D).
int MindvlmAttention(int num_params, void** params, int*, int64_t** shapes, const char**, void*, void*) {
  const auto input = [&](int i) { return static_cast<const float*>(params[i]); };
  const Cache cache(params + 8, shapes + 8);
  attend(Tokens(params + 3, shapes + 3), cache, input(0), input(1), input(2), shapes[0][2] / cache.head_dim,
         static_cast<float*>(params[num_params - 1]));
  return 0;
}

// Operator: the layers of a decoder for new tokens with their caches, which it updates in place.
//
// Inputs: x (B, L, hidden), cos and sin (B, L, R), positions (B, L) int32, rows of the caches (B,) int32, scales of the
// queries (B, L), a `Dialect` int32, epsilon of the norms (1,), keys and values of every layer (rows, K, S, D), and the
// parameters of every layer, see `read_layer`. Output: (B, L, hidden). A token with a negative position is padding; its
// output is 0, or undefined for the padding that is computed, see `WithoutPadding`.
int MindvlmDecoder(int num_params, void** params, int*, int64_t** shapes, const char**, void*, void*) {
  const WithoutPadding computed(Tokens(params + 1, shapes + 1));
  const Tokens& tokens = computed.tokens();
  const Dialect& dialect = *static_cast<const Dialect*>(params[6]);
  const float eps = *static_cast<const float*>(params[7]);
  const int64_t num_rows = tokens.count, width = shapes[0][2];
  std::vector<float> x = gather(static_cast<const float*>(params[0]), width, computed.places());

  void** input = params + 8 + 2 * dialect.num_layers;
  std::vector<float> normed(x.size()), added(x.size()), fed(x.size()), query, key, value, attended;
  for (int64_t i = 0; i < dialect.num_layers; ++i) {
    const Layer layer = read_layer(dialect, input, width, eps);
    const Cache cache(params + 8 + 2 * i, shapes + 8 + 2 * i);
    query.resize(num_rows * layer.query.w->rows);
    key.resize(num_rows * layer.key.w->rows);
    value.resize(key.size());
    attended.resize(query.size());

    normalize(layer.first_norm, x.data(), num_rows, normed.data());
    multiply({{layer.query.w, layer.query.bias, query.data()},
              {layer.key.w, layer.key.bias, key.data()},
              {layer.value.w, layer.value.bias, value.data()}},
             normed.data(), num_rows);
    attend(tokens, cache, query.data(), key.data(), value.data(), layer.query.w->rows / cache.head_dim, attended.data());
    multiply({{layer.output.w, layer.output.bias, added.data()}}, attended.data(), num_rows);
    if (!dialect.is_parallel) {
      add(added.data(), num_rows, width, x.data());
      normalize(layer.second_norm, x.data(), num_rows, normed.data());
    }
    feed_forward(layer.mlp, normed.data(), num_rows, fed.data());
    if (dialect.is_parallel) add(added.data(), num_rows, width, fed.data());
    add(fed.data(), num_rows, width, x.data());
  }
  float* out = static_cast<float*>(params[num_params - 1]);
  std::memset(out, 0, shapes[0][0] * shapes[0][1] * width * sizeof(float));
  for (int64_t i = 0; i < num_rows; ++i)
    std::memcpy(out + computed.places()[i] * width, x.data() + i * width, width * sizeof(float));
  return 0;
}
}
