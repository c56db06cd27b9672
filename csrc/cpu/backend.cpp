// Which instructions serve: decided at run time, so that one build runs on every CPU.
#include "jam/backend.h"

#include <atomic>
#include <cstring>

#include "cpu/workspace.h"

namespace jam {
namespace {

const Backend* fastest() {
  if (const Backend* found = avx512_backend()) return found;
  if (const Backend* found = avx2_backend()) return found;
  return portable_backend();
}

std::atomic<const Backend*> chosen{nullptr};

}  // namespace

const Backend& backend() {
  static const Backend* const best = fastest();
  const Backend* const set = chosen.load(std::memory_order_relaxed);
  return set ? *set : *best;
}

Workspace& workspace() {
  thread_local Workspace own;
  return own;
}

}  // namespace jam

void jam_set_backend(const jam::Backend* backend) { jam::chosen.store(backend); }

const jam::Backend* jam_backend(const char* name) {
  for (const jam::Backend* known :
       {jam::portable_backend(), jam::avx2_backend(), jam::avx512_backend()}) {
    if (known && std::strcmp(known->name, name) == 0) return known;
  }
  return nullptr;
}
