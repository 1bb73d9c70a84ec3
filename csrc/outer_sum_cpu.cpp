// A matrix product with two accumulators. Registers hold one tile of one segment's gradient; at the
// segment's end its squares go to the norm and the tile to the total, so no gradient of a segment is
// ever in memory. Rows are the reduction dimension of the product, hence both operands are read along
// their rows and need no transpose: chunks of them are packed into panels as wide as a tile.
#include "outer_sum.h"

#include <algorithm>
#include <vector>

#include "buffer.h"
#include "outer_tile.h"
#include "parallel.h"

namespace fastreg {
namespace {

// Rows of a block: the panel of the flat operand that every panel of the tall one meets, 32 KB.
constexpr std::int64_t kBlockRows = 256;
// Numbers packed at once: 1 MB of floats, so that panels are in cache when read.
constexpr std::int64_t kChunkNumbers = 1 << 18;
// Several threads take larger chunks, because they meet twice per chunk and wait for the slowest.
constexpr std::int64_t kSharedChunkNumbers = 1 << 20;
// Columns of a chunk at most: whole rows, which memory delivers faster than pieces of them.
constexpr std::int64_t kChunkColumns = 1024;
// Rows packed together: their lines of one panel fit in the eight ways of a cache set, where a
// power-of-two row length puts them all.
constexpr std::int64_t kPackRows = 8;
// Rows packed by one task.
constexpr std::int64_t kPackGrain = 64;
// Work items per chunk at least, so that a narrow matrix still occupies the threads.
constexpr std::int64_t kItems = 8;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Row-major [rows, columns].
template <class T>
struct Matrix {
  const T* data;
  std::int64_t rows;
  std::int64_t columns;

  const T* at(std::int64_t row, std::int64_t column) const { return data + row * columns + column; }
  const T* end() const { return data + rows * columns; }
};

// The product tall^T flat and where its element (i, j) goes: total[i * tall_stride + j * flat_stride].
template <class T>
struct Product {
  Matrix<T> tall;
  Matrix<T> flat;
  T* total;
  std::int64_t tall_stride;
  std::int64_t flat_stride;
  const std::int64_t* offsets;
  std::int64_t segments;
  Shape<T> shape;
};

// Share of a tiling that is not padding.
double filled(std::int64_t size, std::int64_t tile) {
  const std::int64_t padded = std::max<std::int64_t>(1, ceil_div(size, tile)) * tile;
  return static_cast<double>(size) / static_cast<double>(padded);
}

// Either operand may be the tall one: take the arrangement with less padding, and between equals the
// larger matrix as the tall one, which is packed once.
template <class T>
Product<T> arrange(const OuterSum<T>& p, const Shape<T>& shape) {
  const std::int64_t rows = p.offsets[p.segments];
  const Matrix<T> a{p.a, rows, p.inputs}, d{p.d, rows, p.outputs};
  const double d_tall = filled(p.outputs, shape.height) * filled(p.inputs, shape.width);
  const double a_tall = filled(p.inputs, shape.height) * filled(p.outputs, shape.width);
  if (a_tall > 1.1 * d_tall || (a_tall > 0.9 * d_tall && p.inputs > p.outputs)) {
    return {a, d, p.total, 1, p.inputs, p.offsets, p.segments, shape};
  }
  return {d, a, p.total, p.inputs, 1, p.offsets, p.segments, shape};
}

// Consecutive whole segments, or one piece of a segment longer than a block.
struct Block {
  std::int64_t row;
  std::int64_t rows;
  std::int64_t segment;
  std::int64_t segments;
  bool continued;  // begins inside its segment
  bool continues;  // ends inside its segment
};

std::vector<Block> blocks_of(const std::int64_t* offsets, std::int64_t segments) {
  std::vector<Block> blocks;
  for (std::int64_t k = 0; k < segments; ++k) {
    const std::int64_t begin = offsets[k], end = offsets[k + 1];
    const bool joins = !blocks.empty() && !blocks.back().continued;
    if (joins && blocks.back().rows + end - begin <= kBlockRows) {
      blocks.back().rows += end - begin;
      blocks.back().segments += 1;
      continue;
    }
    std::int64_t row = begin;
    do {
      const std::int64_t rows = std::min(kBlockRows, end - row);
      blocks.push_back({row, rows, k, 1, row > begin, row + rows < end});
      row += rows;
    } while (row < end);
  }
  return blocks;
}

// Packed rectangles of both operands: the blocks [first, last), some columns of the tall one, all of
// the flat one.
template <class T>
struct Chunk {
  const Block* first;
  const Block* last;
  bool opens;   // the first chunk of its columns
  bool closes;  // the last one
  std::int64_t row;
  std::int64_t rows;
  std::int64_t column;
  std::int64_t columns;
  T* tall;  // [panels, rows, height]
  T* flat;  // [panels, rows, width]
};

// Columns [column, column + columns) of rows [begin, end) of the chunk into panels of `width`.
template <class T>
void pack_rows(const Matrix<T>& from, std::int64_t column, std::int64_t columns, Pack<T> pack, int width,
               const Chunk<T>& chunk, std::int64_t begin, std::int64_t end, T* to) {
  for (std::int64_t row = begin; row < end; row += kPackRows) {
    const std::int64_t rows = std::min(kPackRows, end - row);
    for (std::int64_t c = 0; c < columns; c += width) {
      pack(from.at(chunk.row + row, column + c), from.columns, rows, columns - c, from.end(),
           to + c * chunk.rows + row * width);
    }
  }
}

template <class T>
void pack_chunk(const Product<T>& p, const Chunk<T>& chunk, int threads) {
  parallel_chunks(chunk.rows, kPackGrain, threads, [&](std::int64_t begin, std::int64_t end) {
    pack_rows(p.tall, chunk.column, chunk.columns, p.shape.pack_tall, p.shape.height, chunk, begin, end,
              chunk.tall);
    pack_rows(p.flat, 0, p.flat.columns, p.shape.pack_flat, p.shape.width, chunk, begin, end, chunk.flat);
  });
}

// How the work is cut. Panels and items depend on the shapes alone, and the rows of a chunk change no
// sum's order, so the number of threads changes no bit.
struct Cut {
  std::int64_t chunk_panels;  // of the tall operand
  std::int64_t flat_panels;
  std::int64_t item_panels;  // of the tall operand, per item
  std::int64_t ranges;       // items per panel of the flat operand
  std::int64_t chunk_rows;

  template <class T>
  Cut(const Product<T>& p, int threads)
      : chunk_panels(std::min(kChunkColumns / p.shape.height, ceil_div(p.tall.columns, p.shape.height))),
        flat_panels(std::max<std::int64_t>(1, ceil_div(p.flat.columns, p.shape.width))),
        item_panels(std::max<std::int64_t>(1, ceil_div(chunk_panels, ceil_div(kItems, flat_panels)))),
        ranges(ceil_div(chunk_panels, item_panels)) {
    const std::int64_t row_numbers = chunk_panels * p.shape.height + flat_panels * p.shape.width;
    const std::int64_t numbers = threads > 1 ? kSharedChunkNumbers : kChunkNumbers;
    chunk_rows = std::max(kBlockRows, numbers / row_numbers);
  }

  std::int64_t items() const { return flat_panels * ranges; }
};

// One work item: a panel of the flat operand times some panels of a chunk.
template <class T>
struct Item {
  const Product<T>& p;
  const Chunk<T>& chunk;
  std::int64_t column;  // of the flat operand
  std::int64_t first_panel;
  std::int64_t last_panel;
  // Both [panels of the item, height, width], kept from chunk to chunk: the segment that reaches into
  // the next block, and the sum of the segments, which is stored once.
  T* carry;
  T* tiles;
  double* sq;  // [segments], this item's share

  void run() const {
    const std::int64_t tile_size = p.shape.height * p.shape.width;
    if (chunk.opens) std::fill(tiles, tiles + (last_panel - first_panel) * tile_size, T(0));
    for (const Block* block = chunk.first; block != chunk.last; ++block) {
      const std::int64_t row = block->row - chunk.row;
      const T* flat = chunk.flat + column * chunk.rows + row * p.shape.width;
      for (std::int64_t panel = first_panel; panel < last_panel; ++panel) {
        const std::int64_t at = (panel - first_panel) * tile_size;
        const T* tall = chunk.tall + (panel * chunk.rows + row) * p.shape.height;
        p.shape.run({flat, tall, p.offsets + block->segment, block->segments, block->rows,
                     carry + at, tiles + at, sq + block->segment, block->continued, block->continues});
      }
    }
    if (!chunk.closes || p.total == nullptr) return;
    for (std::int64_t panel = first_panel; panel < last_panel; ++panel) {
      store(tiles + (panel - first_panel) * tile_size, panel * p.shape.height);
    }
  }

  void store(const T* tile, std::int64_t row) const {
    const std::int64_t height = std::min<std::int64_t>(p.shape.height, chunk.columns - row);
    const std::int64_t width = std::min<std::int64_t>(p.shape.width, p.flat.columns - column);
    T* total = p.total + (chunk.column + row) * p.tall_stride + column * p.flat_stride;
    for (std::int64_t i = 0; i < height; ++i) {
      for (std::int64_t j = 0; j < width; ++j) {
        total[i * p.tall_stride + j * p.flat_stride] = tile[i * p.shape.width + j];
      }
    }
  }
};

// What the items of one call share out among themselves.
template <class T>
struct Workspace {
  Buffer<T> tall;              // one chunk of each operand, packed
  Buffer<T> flat;
  Buffer<T> carries;           // [items, item panels, height, width]
  Buffer<T> tiles;             // likewise
  std::vector<double> shares;  // [items, segments]; summed over items in order at the end
};

template <class T>
void run_chunk(const Product<T>& p, const Cut& cut, const Chunk<T>& chunk, Workspace<T>& space, int threads) {
  pack_chunk(p, chunk, threads);
  const std::int64_t panels = ceil_div(chunk.columns, p.shape.height);
  const std::int64_t item_size = cut.item_panels * p.shape.height * p.shape.width;
  parallel_for(cut.items(), threads, [&](std::int64_t item) {
    const std::int64_t first = item % cut.ranges * cut.item_panels;
    if (first >= panels) return;
    Item<T>{p, chunk, item / cut.ranges * p.shape.width, first, std::min(panels, first + cut.item_panels),
            space.carries.get() + item * item_size, space.tiles.get() + item * item_size,
            space.shares.data() + item * p.segments}
        .run();
  });
}

// Blocks from `first` whose rows fit in one chunk; at least one.
const Block* chunk_end(const Block* first, const Block* end, std::int64_t rows) {
  const Block* last = first + 1;
  while (last != end && last->row + last->rows - first->row <= rows) ++last;
  return last;
}

}  // namespace

template <class T>
void outer_sum(const OuterSum<T>& operands) {
  const Product<T> p = arrange(operands, shape_for_this_machine<T>());
  const int threads = threads_for(p.tall.rows * p.tall.columns * p.flat.columns / 8, operands.threads);
  const Cut cut(p, threads);
  const std::int64_t chunk_columns = cut.chunk_panels * p.shape.height;
  const std::int64_t tiles_size = cut.items() * cut.item_panels * p.shape.height * p.shape.width;
  const std::int64_t chunk_rows = std::min(p.tall.rows, cut.chunk_rows);
  Workspace<T> space{make_buffer<T>(chunk_rows * chunk_columns),
                     make_buffer<T>(chunk_rows * cut.flat_panels * p.shape.width),
                     make_buffer<T>(tiles_size), make_buffer<T>(tiles_size),
                     std::vector<double>(cut.items() * p.segments, 0.0)};

  const std::vector<Block> blocks = blocks_of(p.offsets, p.segments);
  const Block* begin = blocks.data();
  const Block* end = begin + blocks.size();
  for (std::int64_t column = 0; column < p.tall.columns; column += chunk_columns) {
    const std::int64_t columns = std::min(chunk_columns, p.tall.columns - column);
    for (const Block *first = begin, *last; first != end; first = last) {
      last = chunk_end(first, end, cut.chunk_rows);
      const std::int64_t rows = last[-1].row + last[-1].rows - first->row;
      const Chunk<T> chunk{first, last, first == begin, last == end, first->row, rows, column, columns,
                           space.tall.get(), space.flat.get()};
      run_chunk(p, cut, chunk, space, threads);
    }
  }
  for (std::int64_t k = 0; k < p.segments; ++k) {
    double sum = 0;
    for (std::int64_t item = 0; item < cut.items(); ++item) sum += space.shares[item * p.segments + k];
    operands.sq[k] = static_cast<T>(sum);
  }
}

template void outer_sum(const OuterSum<float>&);
template void outer_sum(const OuterSum<double>&);

}  // namespace fastreg
