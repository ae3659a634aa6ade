// The C interface: matrices by handle, products of them, and the operators of a MindSpore graph.
#include <sys/mman.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "matrix.h"
#include "operators.h"
#include "products.h"
#include "quantize.h"
#include "threads.h"

const Kernels* kernels = nullptr;

namespace {

// The kernels of AVX-512 with the products of AMX. They are put together here, because no code in a file with options of its
// own may run before the processor is known.
const Kernels* add_tiles() {
  if (!kAvx512 || !kMultiplyTiles) return nullptr;
  static Kernels set = *kAvx512;
  set.name = "amx";
  set.multiply_blocks = kMultiplyTiles;
  return &set;
}

const Kernels* const kAmx = add_tiles();

#if defined(__x86_64__)
// Whether the processor has what all files for x86 with vectors are compiled for.
bool has_avx2() {
  unsigned eax, ebx, ecx, edx;
  // the builtin of GCC 10 does not know F16C
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) &&
         ecx & bit_F16C;
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

// Whether the processor has tiles of int8, and Linux lets this process use their registers. It must be asked, and says no if
// it does not save them.
bool may_use_tiles() {
  constexpr unsigned kHasTiles = 1u << 24, kHasInt8 = 1u << 25;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // in <asm/prctl.h> since Linux 5.16
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && edx & kHasTiles && edx & kHasInt8 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool runs_here(const Kernels* set) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (set == kAmx) return has_avx512() && may_use_tiles();
  if (set == kAvx512) return has_avx512();
  if (set == kAvx2) return has_avx2();
#elif defined(__aarch64__)
  if (set == kDotprod) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#endif
  return true;
}

// Runs a computation for a caller that no exception may reach. Returns 0, or 1 if it had too little memory.
template <class Computation>
int within_memory(const Computation& compute) {
  try {
    compute();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace

void Unmap::operator()(uint8_t* pages) const { munmap(pages, size); }

extern "C" {

// Identifies the sources that the library was compiled from.
const char* mindvlm_digest() { return MINDVLM_DIGEST; }

// Chooses the kernels by name; null chooses the best ones of this processor. Returns the name, or null if there are none.
const char* mindvlm_choose_kernels(const char* name) {
  for (const Kernels* set : {kAmx, kAvx512, kAvx2, kDotprod, kNeon, kPortable}) {
    // the name first: AMX asks Linux for registers, which cannot be given back
    if (set && (!name || std::string(name) == set->name) && runs_here(set)) {
      kernels = set;
      return set->name;
    }
  }
  return nullptr;
}

void mindvlm_set_num_threads(int count) { set_num_threads(count); }

// Returns a matrix over row-major values that the caller keeps alive; null for a format that does not exist, or without memory.
Matrix* mindvlm_new_float_matrix(int format, int64_t rows, int64_t cols, const void* values) {
  if (format < 0 || format > static_cast<int>(Format::float16)) return nullptr;
  return new (std::nothrow) Matrix{static_cast<Format>(format), rows, cols, values};
}

// Returns an empty matrix of blocks, which `mindvlm_pack_rows` fills; null without memory.
Matrix* mindvlm_new_block_matrix(int format, int64_t rows, int64_t cols) {
  const Format kind = static_cast<Format>(format);
  if (!is_blocked(kind) || cols % block_size(kind)) return nullptr;
  const int64_t size = std::max<int64_t>(1, round_up(rows, kernels->group) * interleaved_row_bytes(kind, cols));
  // pages of its own: the heap would keep them when the matrix is freed
  void* pages = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
  // a product reads up to a quarter faster from huge pages; without them it works as well
  madvise(pages, size, MADV_HUGEPAGE);
  std::unique_ptr<uint8_t, Unmap> owned(static_cast<uint8_t*>(pages), Unmap{size});
  return new (std::nothrow) Matrix{kind, rows, cols, nullptr, std::move(owned)};
}

void mindvlm_free_matrix(Matrix* matrix) { delete matrix; }

// Rows that the layout of blocks interleaves: parts of a matrix begin at a multiple of it.
int64_t mindvlm_rows_of_group() { return kernels->group; }

// Fills rows of a matrix of blocks from those that are stored; `first` is a multiple of `mindvlm_rows_of_group`.
int mindvlm_pack_rows(Matrix* w, int64_t first, int64_t count, const uint8_t* blocks) {
  const int64_t group = kernels->group;
  const auto pack = [&](int64_t i) {
    kernels->pack(w->format, blocks + i * group * row_bytes(w->format, w->cols), std::min(group, count - i * group), w->cols,
                  w->packed.get() + (first + i * group) * interleaved_row_bytes(w->format, w->cols));
  };
  return within_memory([&] { run_parallel((count + group - 1) / group, pack); });
}

// Rounds rows of weights to blocks as they are stored; see `quantize_weights`.
int mindvlm_quantize(int format, const float* weights, int64_t rows, int64_t cols, const float* importance,
                     uint8_t* blocks) {
  const Format kind = static_cast<Format>(format);
  const auto quantize = [&](int64_t row) {
    quantize_weights(kind, weights + row * cols, cols, importance, blocks + row * row_bytes(kind, cols));
  };
  return within_memory([&] { run_parallel(rows, quantize); });
}

int mindvlm_multiply(const Matrix* w, const float* x, int64_t num_rows, float* y) {
  return within_memory([&] { multiply({{w, nullptr, y}}, x, num_rows); });
}

void mindvlm_read_row(const Matrix* w, int64_t index, float* to) { kernels->read_row(*w, index, to); }

// Operator: x (..., I) float32, handles (1,) int64 of matrices, their biases (O,) float32 or none -> x W^T + bias (..., O) of
// each.
int MindvlmProducts(int num_params, void** params, int* num_dims, int64_t** shapes, const char** dtypes, void*, void*) {
  int count = 0;
  while (std::strcmp(dtypes[1 + count], "int64") == 0) ++count;
  const bool has_bias = num_params > 1 + 2 * count;
  std::vector<Product> products;
  for (int i = 0; i < count; ++i) {
    const float* bias = has_bias ? static_cast<const float*>(params[1 + count + i]) : nullptr;
    products.push_back({&matrix_of(params[1 + i]), bias, static_cast<float*>(params[num_params - count + i])});
  }
  multiply(products, static_cast<const float*>(params[0]), size_before_last(shapes[0], num_dims[0]));
  return 0;
}

// Operator: x (..., I) float32, W (O, I) float32 of any shape, its bias (O,) float32 or none -> x W^T + bias (..., O).
int MindvlmDense(int num_params, void** params, int* num_dims, int64_t** shapes, const char**, void*, void*) {
  const int64_t outputs = shapes[1][0];
  const Matrix w{Format::float32, outputs, num_elements(shapes[1], num_dims[1]) / outputs, params[1]};
  const float* bias = num_params > 3 ? static_cast<const float*>(params[2]) : nullptr;
  multiply({{&w, bias, static_cast<float*>(params[num_params - 1])}}, static_cast<const float*>(params[0]),
           size_before_last(shapes[0], num_dims[0]));
  return 0;
}

// Operator: ids (...) int32, handle (1,) int64 -> W[ids] (..., I) float32.
int MindvlmRows(int num_params, void** params, int* num_dims, int64_t** shapes, const char**, void*, void*) {
  const Matrix& w = matrix_of(params[1]);
  const int32_t* ids = static_cast<const int32_t*>(params[0]);
  float* to = static_cast<float*>(params[num_params - 1]);
  share_rows(num_elements(shapes[0], num_dims[0]), w.cols, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      kernels->read_row(w, std::clamp<int64_t>(ids[i], 0, w.rows - 1), to + i * w.cols);
  });
  return 0;
}
}
