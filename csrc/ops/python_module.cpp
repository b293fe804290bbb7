// torch_ext._C: what is no operator: build info, and the instruction set in use.
#include <pybind11/pybind11.h>
#include <torch_ext/version.h>

#include <string>

#include "kernels/cpu/cpu_isa.h"

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("cpu_capability",
        [] { return std::string(torch_ext::capability_name(torch_ext::current_capability())); });
  m.def("supported_cpu_capability",
        [] { return std::string(torch_ext::capability_name(torch_ext::supported_capability())); });
  m.def(
      "set_cpu_capability",
      [](const std::string& name) {
        torch_ext::set_capability(torch_ext::parse_capability(name));
      },
      py::arg("name"));
}
