// The register tile of a segmented outer-product sum, one shape per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "machine.h"

namespace fastreg {

// Rows of a row-major matrix, from a given column on, as rows of WIDTH: columns past the matrix are
// zero. The width is a constant so that copying a row is a few moves, not a call; a partial row is read
// in full (the rest belongs to the next row) unless that would pass the end of the matrix.
template <int WIDTH, class T>
void pack(const T* __restrict__ from, std::int64_t stride, std::int64_t rows, std::int64_t columns,
          const T* end, T* __restrict__ to) {
  const int valid = static_cast<int>(std::min<std::int64_t>(columns, WIDTH));
  for (std::int64_t s = 0; s < rows; ++s, from += stride, to += WIDTH) {
    if (valid == WIDTH) {
      std::memcpy(to, from, WIDTH * sizeof(T));
    } else if (end - from >= WIDTH) {
      for (int i = 0; i < WIDTH; ++i) {
        const T value = from[i];
        to[i] = i < valid ? value : T(0);
      }
    } else {
      for (int i = 0; i < WIDTH; ++i) to[i] = i < valid ? from[i] : T(0);
    }
  }
}

template <class T>
using Pack = void (*)(const T*, std::int64_t, std::int64_t, std::int64_t, const T*, T*);

// What one tile reads and writes; a panel is packed, so its rows follow one another.
template <class T>
struct TileTask {
  const T* flat;                // [rows of the block, tile width]
  const T* tall;                // [rows of the block, tile height]
  const std::int64_t* offsets;  // of the block's segments
  std::int64_t segments;
  std::int64_t rows;
  T* carry;    // [height, width] of the segment that reaches into other blocks
  T* tile;     // [height, width], += the segments' tiles
  double* sq;  // [segments of the block], += the tiles' squares
  bool continued;
  bool continues;
};

template <class T, int BYTES, int HEIGHT>
struct Tile {
  typedef T V __attribute__((vector_size(BYTES), may_alias));
  static constexpr int LANES = BYTES / sizeof(T);
  static constexpr int WIDTH = 2 * LANES;

  __attribute__((always_inline)) static inline double squares(const V (&sum)[HEIGHT][2]) {
    V square = {};
#pragma GCC unroll 16
    for (int j = 0; j < HEIGHT; ++j) square += sum[j][0] * sum[j][0] + sum[j][1] * sum[j][1];
    double result = 0;
    for (int lane = 0; lane < LANES; ++lane) result += square[lane];
    return result;
  }

  // The function's locals `sum` are the registers: HEIGHT x 2 vectors, never stored inside the loop.
  __attribute__((always_inline)) static inline void run(const TileTask<T>& task) {
    const T* flat = task.flat;
    const T* tall = task.tall;
    for (std::int64_t k = 0; k < task.segments; ++k) {
      V sum[HEIGHT][2] = {};
      V* carry = reinterpret_cast<V*>(task.carry);
      if (task.continued) {
#pragma GCC unroll 16
        for (int j = 0; j < HEIGHT; ++j) sum[j][0] = carry[2 * j], sum[j][1] = carry[2 * j + 1];
      }
      const bool whole = !task.continued && !task.continues;
      const std::int64_t rows = whole ? task.offsets[k + 1] - task.offsets[k] : task.rows;
      for (std::int64_t s = 0; s < rows; ++s, flat += WIDTH, tall += HEIGHT) {
        const V left = *reinterpret_cast<const V*>(flat);
        const V right = *reinterpret_cast<const V*>(flat + LANES);
#pragma GCC unroll 16
        for (int j = 0; j < HEIGHT; ++j) {
          sum[j][0] += left * tall[j];
          sum[j][1] += right * tall[j];
        }
      }
      if (task.continues) {
#pragma GCC unroll 16
        for (int j = 0; j < HEIGHT; ++j) carry[2 * j] = sum[j][0], carry[2 * j + 1] = sum[j][1];
        return;
      }
      task.sq[k] += squares(sum);
      V* tile = reinterpret_cast<V*>(task.tile);
#pragma GCC unroll 16
      for (int j = 0; j < HEIGHT; ++j) tile[2 * j] += sum[j][0], tile[2 * j + 1] += sum[j][1];
    }
  }
};

// One tile shape per instruction set: as many accumulators as its registers hold beside the operands.
template <class T>
struct Shape {
  int height;
  int width;
  Pack<T> pack_flat;
  Pack<T> pack_tall;
  void (*run)(const TileTask<T>&);
};

template <class T, int BYTES, int HEIGHT>
Shape<T> shape_of(void (*run)(const TileTask<T>&)) {
  constexpr int width = Tile<T, BYTES, HEIGHT>::WIDTH;
  return {HEIGHT, width, pack<width, T>, pack<HEIGHT, T>, run};
}

template <class T>
FASTREG_V4 void tile_v4(const TileTask<T>& task) {
  Tile<T, 64, 12>::run(task);
}
template <class T>
FASTREG_V3 void tile_v3(const TileTask<T>& task) {
  Tile<T, 32, 6>::run(task);
}
template <class T>
void tile_base(const TileTask<T>& task) {
  Tile<T, 16, 6>::run(task);
}

template <class T>
Shape<T> shape_for_this_machine() {
  return for_this_machine(shape_of<T, 64, 12>(tile_v4<T>), shape_of<T, 32, 6>(tile_v3<T>),
                          shape_of<T, 16, 6>(tile_base<T>));
}

}  // namespace fastreg
