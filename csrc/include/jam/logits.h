// The number formats of logits, read as float exactly, without the headers of torch or CUDA.
#pragma once

#include <cstdint>

#include "jam/host_device.h"
#include "jam/weights.h"

namespace jam {

enum class LogitType { kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

JAM_HOST_DEVICE float to_float(float value) { return value; }

JAM_HOST_DEVICE float to_float(BFloat16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

JAM_HOST_DEVICE float to_float(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) {  // inf and NaN keep their mantissa
    return float_from_bits(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  }
  // Shifted into place the exponent is 112 too small; a product by 2^112 also mends subnormals.
  return float_from_bits(sign | magnitude << 13) * 0x1p112f;
}

}  // namespace jam
