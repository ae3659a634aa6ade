// The tiles of AMX in plain C++, of a processor and a system that have them, for a processor without. The compiler includes this
// file before a source (`-include`). The process ends where the processor would raise an exception.
#pragma once
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
  int rows, row_bytes;
  uint8_t values[16][64];
};

// Of a thread, as the registers of a processor are.
inline thread_local Tile tiles[8];
inline thread_local bool are_configured = false;
inline thread_local int64_t num_products = 0;

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

inline bool is_zero(const uint8_t* bytes, int first, int last) {
  for (; first < last; ++first)
    if (bytes[first]) return false;
  return true;
}

inline void load_config(const void* from) {
  uint8_t bytes[64];
  std::memcpy(bytes, from, sizeof bytes);
  require(bytes[0] == 1, "the palette is not 1");
  require(bytes[1] == 0, "the first row is not 0");
  require(is_zero(bytes, 2, 16) && is_zero(bytes, 32, 48) && is_zero(bytes, 56, 64), "reserved bytes are not 0");
  for (int i = 0; i < 8; ++i) {
    const int row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
    require(row_bytes <= 64 && rows <= 16 && !row_bytes == !rows, "a tile has a wrong shape");
    tiles[i] = {rows, row_bytes, {}};
  }
  are_configured = true;
}

inline void release() { are_configured = false; }

inline Tile& tile(int i) {
  require(are_configured && tiles[i].rows > 0, "a tile is not configured");
  return tiles[i];
}

inline void zero(int i) { std::memset(tile(i).values, 0, sizeof tile(i).values); }

inline void load(int i, const void* from, int64_t stride) {
  zero(i);
  for (int row = 0; row < tile(i).rows; ++row)
    std::memcpy(tile(i).values[row], static_cast<const uint8_t*>(from) + row * stride, tile(i).row_bytes);
}

inline void store(int i, void* to, int64_t stride) {
  for (int row = 0; row < tile(i).rows; ++row)
    std::memcpy(static_cast<uint8_t*>(to) + row * stride, tile(i).values[row], tile(i).row_bytes);
}

// sums += a b, signed bytes: four values of a row of a by those of a column of b.
inline void multiply(int to, int first, int second) {
  Tile &sums = tile(to), &a = tile(first), &b = tile(second);
  require(to != first && to != second && first != second, "two tiles are the same");
  require(sums.row_bytes % 4 == 0 && a.row_bytes % 4 == 0 && b.row_bytes % 4 == 0, "a row has parts of 32 bits");
  require(sums.rows == a.rows && a.row_bytes / 4 == b.rows && sums.row_bytes == b.row_bytes, "shapes do not fit");
  for (int m = 0; m < sums.rows; ++m) {
    int32_t totals[16];
    std::memcpy(totals, sums.values[m], sizeof totals);
    for (int k = 0; k < b.rows; ++k)
      for (int n = 0; n < sums.row_bytes / 4; ++n)
        for (int i = 0; i < 4; ++i)
          totals[n] += static_cast<int8_t>(a.values[m][4 * k + i]) * static_cast<int8_t>(b.values[k][4 * n + i]);
    std::memcpy(sums.values[m], totals, sizeof totals);
  }
  ++num_products;
}

inline int cpuid(unsigned leaf, unsigned subleaf, unsigned* eax, unsigned* ebx, unsigned* ecx, unsigned* edx) {
  require(leaf == 7 && subleaf == 0, "not the leaf of AMX");
  *eax = *ebx = *ecx = 0;
  *edx = std::getenv("EMULATED_WITHOUT_INT8") ? 1u << 24 : 1u << 24 | 1u << 25;
  return 1;
}

inline long system_call(long number, int request, int feature) {
  require(number == SYS_arch_prctl && request == 0x1023 && feature == 18, "not the request for the registers of tiles");
  return std::getenv("EMULATED_REFUSAL") ? -1 : 0;
}

}  // namespace emulated

// Products since the last call in this thread; -1 if it has not released the tiles.
extern "C" __attribute__((used)) inline int64_t take_num_products() {
  const int64_t count = emulated::are_configured ? -1 : emulated::num_products;
  emulated::num_products = 0;
  return count;
}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbssd emulated::multiply
#define __get_cpuid_count emulated::cpuid
#define syscall emulated::system_call
