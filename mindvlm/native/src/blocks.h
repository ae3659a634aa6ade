// Norms and feed-forward blocks of rows, on all threads.
#pragma once
#include "matrix.h"

// An RMSNorm, or a LayerNorm if `bias` is not null.
struct Norm {
  const float *weight, *bias;
  int64_t width;
  float eps;
};

// x W^T + b; `bias` may be null.
struct Linear {
  const Matrix* w;
  const float* bias;
};

// last(activation(first(x))), or last(activation(gate(x)) * first(x)) if the gate has a matrix.
struct Mlp {
  Linear gate, first, last;
  Activation activation;
};

// x (num_rows, width) -> to, the same shape.
void normalize(const Norm& norm, const float* x, int64_t num_rows, float* to);

// x (num_rows, columns of the first matrix) -> to (num_rows, rows of the last one).
void feed_forward(const Mlp& mlp, const float* x, int64_t num_rows, float* to);
