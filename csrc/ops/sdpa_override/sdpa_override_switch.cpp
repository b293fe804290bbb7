// The state behind enable(), disable() and EnabledScope.
#include <torch/library.h>
#include <torch_ext/sdpa_override.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>
#include <vector>

#include "sdpa_override_kernels.h"

namespace torch_ext {
namespace {

struct Setting {
  std::uint64_t scope;
  bool on;
  bool cuda;
};

class OverrideSwitch {
 public:
  bool is_on() const noexcept { return on_.load(std::memory_order_acquire); }
  bool is_cuda_on() const noexcept { return cuda_on_.load(std::memory_order_acquire); }

  void set(bool on, bool cuda) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Setting before = settings_.back();
    settings_.back().on = on;
    settings_.back().cuda = cuda;
    try {
      apply();
    } catch (...) {
      settings_.back() = before;
      throw;
    }
  }

  std::uint64_t open_scope(bool on, bool cuda) {
    const std::lock_guard<std::mutex> lock(mutex_);
    settings_.push_back({++last_scope_, on, cuda});
    try {
      apply();
    } catch (...) {
      settings_.pop_back();
      throw;
    }
    return last_scope_;
  }

  void close_scope(std::uint64_t scope) {
    const std::lock_guard<std::mutex> lock(mutex_);
    settings_.erase(std::remove_if(settings_.begin(), settings_.end(),
                                   [scope](const Setting& s) { return s.scope == scope; }),
                    settings_.end());
    apply();
  }

  void set_listener(OverrideListener listener) {
    const std::lock_guard<std::mutex> lock(mutex_);
    listener_ = listener;
  }

 private:
  void apply() {
    const bool on = settings_.back().on;
    const bool cuda = on && settings_.back().cuda;
    if (on == is_on() && cuda == is_cuda_on()) return;
    if (on && !is_on()) {
      std::vector<torch::Library> libraries;
      override_attention(libraries);
      override_multi_head_attention(libraries);
      override_varlen_attention(libraries);
      libraries_ = std::move(libraries);
    } else if (!on) {
      // Calls already past the dispatcher finish: the kernels are plain functions, so a library
      // that goes away frees nothing that they use.
      libraries_.clear();
    }
    on_.store(on, std::memory_order_release);
    cuda_on_.store(cuda, std::memory_order_release);
    if (listener_ != nullptr) listener_(on, cuda);
  }

  std::mutex mutex_;
  // The setting outside every scope, then those of the open scopes, oldest first.
  std::vector<Setting> settings_{{0, false, false}};
  std::uint64_t last_scope_ = 0;
  std::atomic<bool> on_{false};
  std::atomic<bool> cuda_on_{false};
  std::vector<torch::Library> libraries_;
  OverrideListener listener_ = nullptr;
};

OverrideSwitch& override_switch() {
  // Never destroyed: threads may still be computing attention while the process exits.
  static OverrideSwitch* const instance = new OverrideSwitch();
  return *instance;
}

}  // namespace

void enable(bool cuda) { override_switch().set(true, cuda); }

void disable() { override_switch().set(false, false); }

bool is_enabled() noexcept { return override_switch().is_on(); }

bool is_cuda_enabled() noexcept { return override_switch().is_cuda_on(); }

EnabledScope::EnabledScope(bool on, bool cuda) : id_(override_switch().open_scope(on, cuda)) {}

EnabledScope::~EnabledScope() { override_switch().close_scope(id_); }

void set_override_listener(OverrideListener listener) { override_switch().set_listener(listener); }

}  // namespace torch_ext
