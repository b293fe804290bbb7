// The switch as torch_ext._C sees it. Included by csrc/ops/python_module.cpp alone: libtorch_ext
// itself knows no Python.
#pragma once

#include <pybind11/pybind11.h>
#include <torch_ext/sdpa_override.h>

#include <optional>
#include <utility>

namespace torch_ext {

namespace detail {

// An EnabledScope whose end Python decides.
class ScopeHandle {
 public:
  explicit ScopeHandle(bool on) : scope_(std::in_place, on) {}
  void close() { scope_.reset(); }

 private:
  std::optional<EnabledScope> scope_;
};

// Guarded by the GIL. Leaked: a C++ thread may flip the switch while the interpreter goes away.
inline pybind11::object& python_listener() {
  static auto* const listener = new pybind11::object();
  return *listener;
}

inline void call_python_listener(bool enabled) {
  if (!Py_IsInitialized()) return;
  const pybind11::gil_scoped_acquire gil;
  const pybind11::object listener = python_listener();
  if (!listener || listener.is_none()) return;
  try {
    listener(enabled);
  } catch (pybind11::error_already_set& error) {
    // The dispatcher has changed by now, and a C++ caller may know no Python exceptions.
    error.discard_as_unraisable("torch_ext: the listener of enable() and disable()");
  }
}

}  // namespace detail

inline void bind_sdpa_override(pybind11::module_& m) {
  namespace py = pybind11;
  // The switch is locked while its listener runs, and the listener takes the GIL: whoever waits for
  // the lock must not hold it.
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;
  m.def("enable", &enable, ReleaseGil());
  m.def("disable", &disable, ReleaseGil());
  m.def("is_enabled", &is_enabled);
  py::class_<detail::ScopeHandle>(m, "EnabledScope")
      .def(py::init<bool>(), py::arg("on") = true, ReleaseGil())
      .def("close", &detail::ScopeHandle::close, ReleaseGil());
  m.def(
      "set_override_listener",
      [](py::object listener) {
        const bool wanted = !listener.is_none();
        detail::python_listener() = std::move(listener);
        const py::gil_scoped_release release;
        set_override_listener(wanted ? &detail::call_python_listener : nullptr);
      },
      py::arg("listener"));
}

}  // namespace torch_ext
