#include "attention_path.h"

#include <torch_ext/attention.h>

#include <atomic>

namespace torch_ext {
namespace {

std::atomic<const char*> newest_path{"none"};

}  // namespace

void record_attention_path(const char* path) noexcept {
  newest_path.store(path, std::memory_order_relaxed);
}

const char* last_attention_path() noexcept { return newest_path.load(std::memory_order_relaxed); }

}  // namespace torch_ext
