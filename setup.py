"""Builds libtorch_ext.so and the module torch_ext._C with torch's BuildExtension.

    pip install --no-build-isolation .      # or make wheel, and pip install dist/*.whl

CUDA kernels are compiled where there is a GPU; TORCH_EXT_CUDA=0/1 decides otherwise, and
TORCH_CUDA_ARCH_LIST for which GPUs. MAX_JOBS is the number of parallel compilers.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# As in pyproject.toml, which nobody reads in a build without isolation: an older one stops at a
# license that it cannot read. New environments of Python 3.10 and 3.11 come with 65.
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"torch_ext: building it takes setuptools 77.0.3 or newer, got {setuptools.__version__}:\n"
        "    pip install --upgrade setuptools ninja"
    )

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit(
        "torch_ext: no torch in the environment that builds. It is compiled for the torch that is "
        "installed, so install that first, then let pip build in the same environment:\n"
        "    pip install torch setuptools ninja\n"
        "    pip install --no-build-isolation ."
    )


def _load_cpp_build():
    spec = importlib.util.spec_from_file_location("cpp_build", ROOT / "torch_ext" / "cpp_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cpp_build"] = module
    spec.loader.exec_module(module)
    return module


cpp_build = _load_cpp_build()
try:
    PLAN = cpp_build.plan_build(ROOT / "csrc")
except cpp_build.BuildError as error:
    sys.exit(str(error))

LIBRARY = "torch_ext.lib.libtorch_ext"
CXX_FLAGS = [*PLAN.standard, *PLAN.cxx_flags]


def _relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def _library_folders() -> list[str]:
    """Where a C++ program finds torch, and CUDA's libraries as torch brings them: side by side in
    one site-packages."""
    folders = ["$ORIGIN/../../torch/lib"]
    if PLAN.cuda.on:
        packages = Path(torch.__file__).parent.parent
        libraries = [
            *packages.glob("nvidia/*/lib/libcudart.so.*"),
            *packages.glob("nvidia/*/lib/libcublasLt.so.*"),
        ]
        found = sorted({str(file.parent.relative_to(packages)) for file in libraries})
        folders += [f"$ORIGIN/../../{folder}" for folder in found]
    return folders


def _extensions() -> list[Extension]:
    library = CUDAExtension if PLAN.cuda.on else CppExtension
    operators = library(
        LIBRARY,
        _relative(PLAN.sources),
        include_dirs=[str(folder) for folder in PLAN.include_dirs],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": PLAN.nvcc_flags},
        extra_link_args=[
            "-fopenmp",
            "-Wl,--no-undefined",
            "-Wl,-soname,libtorch_ext.so",
            *(f"-Wl,-rpath,{folder}" for folder in _library_folders()),
        ],
    )
    operators.libraries += PLAN.libraries
    # Plain C++ that a LibTorch application links, so nothing of Python in it.
    operators.libraries = [name for name in operators.libraries if name != "torch_python"]
    module = CppExtension(
        "torch_ext._C",
        _relative([PLAN.module_source]),
        include_dirs=[str(folder) for folder in PLAN.include_dirs],
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=["-Wl,-rpath,$ORIGIN/lib"],
        libraries=["torch_ext"],
    )
    for extension in (operators, module):
        # torch's headers as system headers, as in the other builds: no warnings from them.
        ours = {str(folder) for folder in PLAN.include_dirs}
        system = [folder for folder in extension.include_dirs if folder not in ours]
        extension.include_dirs = [folder for folder in extension.include_dirs if folder in ours]
        extension.extra_compile_args["cxx"] = [
            *(word for folder in system for word in ("-isystem", folder)),
            *extension.extra_compile_args["cxx"],
        ]
    return [operators, module]


class BuildTorchExt(BuildExtension):
    """Two libraries, and beside them what C++ applications need: headers and the CMake package."""

    def get_ext_filename(self, ext_name: str) -> str:
        # Not libtorch_ext.cpython-311-x86_64-linux-gnu.so. In an editable install the name comes
        # without its package.
        if ext_name in (LIBRARY, LIBRARY.rpartition(".")[2]):
            return ext_name.replace(".", "/") + ".so"
        return super().get_ext_filename(ext_name)

    def build_extensions(self) -> None:
        # Without Python's own flags for C extensions (-g, -fwrapv ...): not what the kernels were
        # tuned and tested with, and different in every Python.
        self.compiler.set_executable("compiler_so", [self.compiler.compiler_so[0], "-fPIC"])
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(LIBRARY)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        if ext.name != LIBRARY:
            ext.library_dirs.insert(0, str(library.parent))
        super().build_extension(ext)

    def run(self) -> None:
        print(cpp_build_message(), flush=True)
        cpp_build.limit_jobs()
        package = Path(self.get_ext_fullpath(LIBRARY)).resolve().parent.parent
        (package / "lib" / cpp_build.BUILD_INFO).unlink(missing_ok=True)
        super().run()
        self._add_files(package)

    def _add_files(self, package: Path) -> None:
        shutil.copytree(
            ROOT / "csrc" / "include" / "torch_ext",
            package / "include" / "torch_ext",
            dirs_exist_ok=True,
        )
        folder = package / "share" / "cmake" / "torch_ext"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "cmake" / "torch_ext-libtorch.cmake", folder)
        values = {
            "@TORCH_EXT_VERSION@": PLAN.version,
            "@TORCH_EXT_TORCH_VERSION@": cpp_build.release(torch.__version__),
            "@TORCH_EXT_TORCH_ROOT@": str(Path(torch.__file__).resolve().parent),
        }
        for name in ("torch_ext-config.cmake", "torch_ext-config-version.cmake"):
            text = (ROOT / "cmake" / f"{name}.in").read_text()
            for variable, value in values.items():
                text = text.replace(variable, value)
            (folder / name).write_text(text)
        # Last: without it, the library counts as not built.
        cpp_build.write_record(package / "lib" / cpp_build.BUILD_INFO, PLAN.info())


class BuildPython(build_py):
    """From an empty folder: setuptools would install what an older build left in build/lib."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "torch_ext", ignore_errors=True)
        super().run()


def cpp_build_message() -> str:
    return f"torch_ext: building {PLAN.describe()}"


def _local_version() -> str:
    """The public version, and the torch, with its CUDA where that matters, that it is built for:
    a wheel of 0.1.0 is one of many, and runs with this one."""
    cuda = f".cu{torch.version.cuda.replace('.', '')}" if PLAN.cuda.on else ""
    return f"{PLAN.version}+torch{cpp_build.release(torch.__version__)}{cuda}"


setup(
    version=_local_version(),
    ext_modules=_extensions(),
    cmdclass={"build_ext": BuildTorchExt, "build_py": BuildPython},
)
