// What csrc compiles once for each set of instructions, in whichever this file is compiled for.
#include "jam/average.h"
#include "jam/draw.h"
#include "jam/sha256.h"

extern "C" {

void draw_normal(float* out, int64_t start, int64_t count, uint64_t key, float scale) {
  jam::draw<jam::Draw::kNormal>(out, start, count, key, scale);
}

void draw_cut_normal(float* out, int64_t start, int64_t count, uint64_t key, float scale) {
  jam::draw<jam::Draw::kCutNormal>(out, start, count, key, scale);
}

void average_bfloat16(const jam::BFloat16* a, const jam::BFloat16* b, jam::BFloat16* out,
                      int64_t size, float share) {
  jam::average_halves(a, b, out, size, share, 1 - share);
}

void average_float16(const jam::Float16* a, const jam::Float16* b, jam::Float16* out, int64_t size,
                     float share) {
  jam::average_halves(a, b, out, size, share, 1 - share);
}

void sha256_update(jam::ShaStates* states, const uint8_t* const* messages, int64_t blocks) {
  jam::sha_update(*states, messages, static_cast<size_t>(blocks));
}
}
