#pragma once
#include "matrix.h"

// Rounds a row of weights to blocks. `importance` (cols) weighs the error of each column; null weighs all alike. q8_0
// and q8_c ignore it.
void quantize_weights(Format format, const float* row, int64_t cols, const float* importance, uint8_t* blocks);

// A block of q4_K.
void quantize_q4_k(const float* x, const float* importance, uint8_t* block);
