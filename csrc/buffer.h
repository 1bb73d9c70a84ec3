// Uninitialised workspace aligned to cache lines: a vector that straddles two lines costs two loads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace fastreg {

constexpr std::size_t kCacheLine = 64;

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(kCacheLine)); }
};

template <class T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;

// Room for n numbers; T needs no construction.
template <class T>
Buffer<T> make_buffer(std::int64_t n) {
  const std::size_t bytes = static_cast<std::size_t>(n) * sizeof(T);
  return Buffer<T>(static_cast<T*>(::operator new(bytes, std::align_val_t(kCacheLine))));
}

}  // namespace fastreg
