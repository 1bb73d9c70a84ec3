// Elementary functions that a compiler turns into vector code: branchless, polynomial, single precision; the double
// forms are the library's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace fastreg {

FASTREG_INLINE float float_of_bits(std::int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FASTREG_INLINE std::int32_t bits_of_float(float value) {
  std::int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// exp(y) for y <= 0 (rounding above it is harmless), relative error below 2 ulp; below -87, where floats become
// subnormal, exp(-87).
FASTREG_INLINE float exp_nonpositive(float y) {
  y = y > -87.0f ? y : -87.0f;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const float shifted = y * 1.44269504f + 12582912.0f;
  const float count = shifted - 12582912.0f;
  // ln 2 in two parts, so that count * ln 2 loses nothing.
  const float r = (y - count * 0.693359375f) + count * 2.12194440e-4f;
  float p = 0.00138144662f;
  p = p * r + 0.00836878049f;
  p = p * r + 0.0416683942f;
  p = p * r + 0.166665201f;
  p = p * r + 0.499999934f;
  p = p * r * r + r + 1.0f;
  return p * float_of_bits((bits_of_float(shifted) - 0x4B400000 + 127) << 23);
}

FASTREG_INLINE double exp_nonpositive(double y) { return std::exp(y); }

// exp(y) for y <= 0, with 0 for -inf and NaN for NaN.
FASTREG_INLINE float exp_of(float y) {
  const float e = exp_nonpositive(y);
  return y >= -87.0f ? e : (y < -87.0f ? 0.0f : y);
}

FASTREG_INLINE double exp_of(double y) { return std::exp(y); }

}  // namespace fastreg
