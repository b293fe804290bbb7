// torch_ext._C: what is no operator. The instruction set in use, the drop-in switch, which path the
// newest attention call took, and Python on the threads of torch's parallel regions.
#include <pybind11/pybind11.h>
#include <torch_ext/attention.h>
#include <torch_ext/sdpa_override.h>

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "../kernels/cpu/cpu_isa.h"
#include "attention/attention_path.h"
#include "gradient_accumulation/worker_team.h"
#include "sdpa_override/torch_backend_choice.h"

namespace py = pybind11;

namespace {

/// A torch_ext::EnabledScope that Python closes itself: garbage collection comes too late, or
/// early.
class ScopeHandle {
 public:
  ScopeHandle(bool on, bool cuda) : scope_(std::in_place, on, cuda) {}
  void close() { scope_.reset(); }

 private:
  std::optional<torch_ext::EnabledScope> scope_;
};

// Never destroyed: a C++ thread may flip the switch while the interpreter goes away.
py::object& override_listener() {
  static auto* const listener = new py::object(py::none());
  return *listener;
}

void notify_python(bool enabled, bool cuda) {
  const py::gil_scoped_acquire gil;
  const py::object listener = override_listener();
  try {
    listener(enabled, cuda);
  } catch (py::error_already_set& error) {
    // The switch has been flipped, whatever the listener makes of it.
    error.discard_as_unraisable("torch_ext's override listener");
  }
}

void set_override_listener(py::object listener) {
  torch_ext::OverrideListener const notify = listener.is_none() ? nullptr : &notify_python;
  std::swap(override_listener(), listener);
  const py::gil_scoped_release released;
  torch_ext::set_override_listener(notify);
}

/// Calls `clean_up` until it returns. Ctrl-C comes between any two steps of a Python function, its
/// first included: one that may begin anew is the only one that is sure to end.
void run_to_its_end(const py::object& clean_up, std::optional<py::error_already_set>& raised) {
  // Not for ever: a clean_up that always raises is a fault of its own.
  for (int attempt = 0; attempt < 1000; ++attempt) {
    try {
      clean_up();
      return;
    } catch (const py::error_already_set& error) {
      if (!raised.has_value()) raised.emplace(error);
    }
  }
}

/// body(), then clean_up() to its end, whatever was raised; then raises it, the first if there are
/// several.
py::object run_then_clean_up(const py::object& body, const py::object& clean_up) {
  std::optional<py::error_already_set> raised;
  py::object result;
  try {
    result = body();
  } catch (const py::error_already_set& error) {
    raised.emplace(error);
  }
  run_to_its_end(clean_up, raised);
  if (raised.has_value()) throw py::error_already_set(*raised);
  return result;
}

/// A base class of contexts that Ctrl-C leaves whole. A subclass has _enter(), _exit(failed), and
/// _restore(), which ends what _enter() has begun, or does nothing, as often as it is called.
/// Python calls a context's methods where no signal is looked for if they are no Python functions.
struct InterruptibleScope {};

py::object enter_scope(const py::object& self) {
  try {
    self.attr("_enter")();
  } catch (const py::error_already_set& error) {
    std::optional<py::error_already_set> raised(error);
    run_to_its_end(self.attr("_restore"), raised);
    throw py::error_already_set(*raised);
  }
  return self;
}

void exit_scope(const py::object& self, const py::object& kind, const py::object& /*error*/,
                const py::object& /*traceback*/) {
  try {
    self.attr("_exit")(!kind.is_none());
  } catch (const py::error_already_set& error) {
    std::optional<py::error_already_set> raised(error);
    run_to_its_end(self.attr("_restore"), raised);
    throw py::error_already_set(*raised);
  }
}

// Never destroyed: as the listener.
py::object& onnx_check() {
  static auto* const check = new py::object(py::none());
  return *check;
}

bool ask_python() {
  const py::gil_scoped_acquire gil;
  return onnx_check()().cast<bool>();
}

void set_onnx_check(py::object check) {
  torch_ext::set_onnx_check(check.is_none() ? nullptr : &ask_python);
  std::swap(onnx_check(), check);
}

/// Strings from Python, kept for as long as last_attention_path() may name them.
void record_attention_path(const std::string& path) {
  static auto* const kept = new std::set<std::string>();  // guarded by the GIL
  torch_ext::record_attention_path(kept->insert(path).first->c_str());
}

/// torch_ext::run_on_team of a Python function. When one raises (Ctrl-C, anywhere in the caller's
/// thread) `stop` makes the others return; then it is raised here, the first if there are several.
bool run_on_team(std::int64_t workers, const py::object& task, const py::object& stop) {
  bool has_run = false;
  std::optional<py::error_already_set> raised;  // guarded by the GIL
  {
    const py::gil_scoped_release released;
    has_run = torch_ext::run_on_team(workers, [&] {
      const py::gil_scoped_acquire gil;
      bool returned = false;
      for (const py::object* call = &task; !returned; call = &stop) {
        try {
          (*call)();
          returned = true;
        } catch (const py::error_already_set& error) {
          // Once more for those who press it once more: else the others would go on for ever.
          returned = call == &stop && !error.matches(PyExc_KeyboardInterrupt);
          if (!raised.has_value()) raised.emplace(error);
        }
      }
    });
  }
  if (raised.has_value()) throw py::error_already_set(*raised);
  return has_run;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("cpu_capability",
        [] { return std::string(torch_ext::capability_name(torch_ext::current_capability())); });
  m.def("supported_cpu_capability",
        [] { return std::string(torch_ext::capability_name(torch_ext::supported_capability())); });
  m.def(
      "set_cpu_capability",
      [](const std::string& name) { torch_ext::set_capability(torch_ext::parse_capability(name)); },
      py::arg("name"));
  m.def("last_attention_path", [] { return std::string(torch_ext::last_attention_path()); });
  m.def("record_attention_path", &record_attention_path, py::arg("path"));

  // The switch is locked while its listener runs, and the listener takes the GIL: whoever waits for
  // the switch must not hold it.
  using Released = py::call_guard<py::gil_scoped_release>;
  m.def("enable", &torch_ext::enable, py::arg("cuda") = false, Released());
  m.def("disable", &torch_ext::disable, Released());
  m.def("is_enabled", &torch_ext::is_enabled);
  m.def("is_cuda_enabled", &torch_ext::is_cuda_enabled);
  m.def("set_onnx_check", &set_onnx_check, py::arg("check").none(true));
  m.def("set_override_listener", &set_override_listener, py::arg("listener").none(true));
  py::class_<ScopeHandle>(m, "EnabledScope")
      .def(py::init<bool, bool>(), py::arg("on") = true, py::arg("cuda") = false, Released())
      .def("close", &ScopeHandle::close, Released());

  m.def("compute_alone", &torch_ext::compute_alone);
  m.def("run_then_clean_up", &run_then_clean_up, py::arg("body"), py::arg("clean_up"));
  py::class_<InterruptibleScope>(m, "InterruptibleScope")
      .def(py::init<>())
      .def("__enter__", &enter_scope)
      .def("__exit__", &exit_scope);
  m.def("run_on_team", &run_on_team, py::arg("workers"), py::arg("task"), py::arg("stop"));
}
