// Products of one x with some matrices, on all threads.
#pragma once
#include <vector>

#include "matrix.h"

// y (num_rows, rows of W) = activation(x W^T + bias); `bias` may be null.
struct Product {
  const Matrix* w;
  const float* bias;
  float* y;
  Activation activation = Activation::none;
};

// Computes products of x (num_rows, cols); the matrices have the same number of columns.
void multiply(const std::vector<Product>& products, const float* x, int64_t num_rows);

// The matrix of a handle, an int64 in memory.
const Matrix& matrix_of(const void* handle);
