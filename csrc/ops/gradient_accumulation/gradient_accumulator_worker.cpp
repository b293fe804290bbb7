// What a worker thread takes over from the thread that calls parallel_micro_batches: autocast, grad
// mode, hooks and modes; and a random generator of the micro-batch's own.
#include <ATen/ThreadLocalState.h>
#include <ATen/core/Generator.h>
#include <torch/custom_class.h>

#include <optional>

#include "gradient_accumulator_random.h"

namespace torch_ext {
namespace {

class CallerState final : public torch::CustomClassHolder {
 public:
  /// Puts this thread into the caller's state until leave().
  void enter(const at::Generator& generator) const {
    own_state().emplace();
    at::ThreadLocalState::setThreadLocalState(state_);
    set_thread_generator(generator);
  }

  void leave() const {
    set_thread_generator(std::nullopt);
    if (!own_state().has_value()) return;
    at::ThreadLocalState::setThreadLocalState(*own_state());
    own_state().reset();
  }

 private:
  static std::optional<at::ThreadLocalState>& own_state() {
    thread_local std::optional<at::ThreadLocalState> state;
    return state;
  }

  at::ThreadLocalState state_;  // the caller's: of the thread that made this object
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(torch_ext, m) {
  m.class_<CallerState>("CallerState")
      .def(torch::init<>())
      .def("enter", [](const c10::intrusive_ptr<CallerState>& state,
                       const at::Generator& generator) { state->enter(generator); })
      .def("leave", [](const c10::intrusive_ptr<CallerState>& state) { state->leave(); });
}

}  // namespace torch_ext
