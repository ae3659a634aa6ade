// Kernels for aarch64 with the dot product instructions of ARMv8.2.
#define MINDVLM_DOTPROD
#include "kernels_neon.cpp"
