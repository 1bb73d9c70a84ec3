// Random bits that depend on a counter and a key alone: Philox-4x32-10 (Salmon et al. 2011). Branchless: a loop over
// counters becomes vector code.
#pragma once

#include <cstdint>

#include "simd.h"

namespace fastreg {

using Word = std::uint32_t;

FASTREG_INLINE Word low_word(std::uint64_t number) { return static_cast<Word>(number); }
FASTREG_INLINE Word high_word(std::uint64_t number) { return static_cast<Word>(number >> 32); }

struct Counter {
  Word c0, c1, c2, c3;
};

// The first of the four words.
FASTREG_INLINE Word philox(Counter c, std::uint64_t key) {
  Word k0 = low_word(key), k1 = high_word(key);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t first = std::uint64_t{0xD2511F53} * c.c0, second = std::uint64_t{0xCD9E8D57} * c.c2;
    c = {high_word(second) ^ c.c1 ^ k0, low_word(second), high_word(first) ^ c.c3 ^ k1, low_word(first)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c.c0;
}

}  // namespace fastreg
