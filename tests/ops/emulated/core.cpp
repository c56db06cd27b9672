// Runs guided sampling without torch, for sanitizers and valgrind: every backend over rows whose
// memory ends where they end, with ordinary and odd values. Exits with 1 where backends differ.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "jam/backend.h"

#ifdef WITH_EMULATION
extern "C" const jam::Backend* jam_emulated_backend();
#endif

namespace {

using namespace jam;

struct Result {
  int64_t token, id, yielded[2];
  float logs[2], largest;
  std::vector<float> probabilities, weights;

  bool operator==(const Result& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0;
    };
    return token == other.token && id == other.id && yielded[0] == other.yielded[0] &&
           yielded[1] == other.yielded[1] && std::memcmp(logs, other.logs, sizeof(logs)) == 0 &&
           (token < 0 ||
            (same(probabilities, other.probabilities) && same(weights, other.weights)));
  }
};

Result run(const Backend& backend, const GuidedRows& rows, uint64_t seed) {
  Result result{};
  GuidedDraws draws{};
  draws.seed = static_cast<int64_t>(seed);
  draws.tokens = &result.token;
  draws.log_probability = &result.logs[0];
  draws.truncated_log_probability = &result.logs[1];
  backend.sample(rows, draws, 0);
  result.probabilities.resize(rows.vocabulary);
  result.yielded[0] = backend.probabilities(rows, result.probabilities.data(), 0);
  result.id = backend.largest(rows, &result.largest, 0);
  const float max = result.id < 0 ? 0.0f : result.largest;
  result.weights.resize(rows.vocabulary);
  result.yielded[1] = backend.weights(rows, max, result.weights.data(), 0);
  return result;
}

template <typename T>
T pick(std::mt19937& random, std::initializer_list<T> values) {
  return values.begin()[random() % values.size()];
}

// A row's bits: normal numbers, some of them replaced by odd ones.
std::vector<char> row_of(std::mt19937& random, LogitType type, int64_t vocabulary) {
  std::normal_distribution<float> normal(0, pick(random, {0.0f, 1.0f, 5.0f, 1e4f}));
  const float infinity = std::numeric_limits<float>::infinity();
  const int64_t size = type == LogitType::kFloat32 ? 4 : 2;
  std::vector<char> row(vocabulary * size);
  for (int64_t id = 0; id < vocabulary; ++id) {
    float value = normal(random);
    if (random() % 40 == 0) value = pick(random, {-infinity, 0.0f, -0.0f, 1e-40f, -3e38f});
    if (random() % 20000 == 0) value = pick(random, {infinity, std::nanf("")});
    uint32_t bits = bits_of(value);
    if (type == LogitType::kBFloat16) bits >>= 16;
    if (type == LogitType::kFloat16) bits = random() % 60 ? random() % 0x5000u : random() & 0xFFFFu;
    std::memcpy(row.data() + id * size, &bits, size);
  }
  return row;
}

bool agree(std::mt19937& random) {
  const int64_t vocabulary = pick(random, {1, 7, 31, 64, 127, 128, 129, 300, 1024, 3000});
  GuidedRows rows{};
  rows.type = pick(random, {LogitType::kFloat32, LogitType::kBFloat16, LogitType::kFloat16});
  const std::vector<char> cond = row_of(random, rows.type, vocabulary);
  const std::vector<char> uncond = row_of(random, rows.type, vocabulary);
  std::vector<char> legal(vocabulary);
  for (char& each : legal) each = random() % 3 != 0;
  rows.num_rows = 1;
  rows.vocabulary = vocabulary;
  rows.cond = cond.data();
  rows.uncond = random() % 3 ? uncond.data() : nullptr;
  rows.legal = random() % 3 ? nullptr : reinterpret_cast<const bool*>(legal.data());
  rows.legal_begin = random() % 2 ? 0 : random() % vocabulary;
  rows.legal_end = random() % 2 ? vocabulary : rows.legal_begin + 1;
  rows.settings = {pick(random, {0.0, 1.0, 3.5, -2.0}), pick(random, {0.0, 1e-9, 0.8, 1.0, 20.0}),
                   pick(random, {1e-9, 0.3, 0.9, 1.0}), pick(random, {0.0, 1.0, 5.0, 9e9}),
                   pick(random, {0.0, 0.01, 1.0})};
  const uint64_t seed = random();
  std::vector<const Backend*> backends = {portable_backend(), avx2_backend(), avx512_backend()};
#ifdef WITH_EMULATION
  backends.push_back(jam_emulated_backend());
#endif
  const Result expected = run(*backends[0], rows, seed);
  for (const Backend* backend : backends) {
    if (backend == nullptr || run(*backend, rows, seed) == expected) continue;
    std::printf("%s differs from %s at %ld ids\n", backend->name, backends[0]->name, vocabulary);
    return false;
  }
  return true;
}

}  // namespace

int main(int, char** arguments) {
  std::mt19937 random(1);
  const int num = std::atoi(arguments[1]);
  for (int call = 0; call < num; ++call) {
    if (!agree(random)) return 1;
  }
  std::printf("%d calls agree\n", num);
  return 0;
}
