// Philox4x32-10, a counter-based random generator (Salmon et al. 2011, "Parallel random numbers: as
// easy as 1, 2, 3"): a draw is a pure function of (seed, offset, round), on every backend.
#pragma once

#include <cstdint>

#include "jam/host_device.h"

namespace jam {

struct Philox4x32 {
  uint32_t x[4];
};

// One block of 128 random bits: ten rounds of multiplication and exclusive or.
JAM_HOST_DEVICE Philox4x32 philox4x32_10(Philox4x32 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.x[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.x[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.x[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.x[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// A multiple of 2^-53 in [0, 1). Counter: offset (two words), round, 0; key: seed.
JAM_HOST_DEVICE double philox_uniform(int64_t seed, int64_t offset, uint32_t round) {
  const uint64_t key = static_cast<uint64_t>(seed), count = static_cast<uint64_t>(offset);
  const Philox4x32 bits =
      philox4x32_10({{static_cast<uint32_t>(count), static_cast<uint32_t>(count >> 32), round, 0u}},
                    static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  const uint64_t word = (uint64_t{bits.x[1]} << 32) | bits.x[0];
  return static_cast<double>(word >> 11) * 0x1p-53;
}

}  // namespace jam
