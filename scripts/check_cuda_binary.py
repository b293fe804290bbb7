#!/usr/bin/env python3
"""What the compiler made of the hot CUDA kernels, read from their machine code.

    scripts/check_cuda_binary.py build/.../accumulate.cu.o ... [--ptxas-report build.log]

A kernel is hot where its source says so, in a line like

    // SASS AttentionForwardProgram: HMMA LDGSTS.E.BYPASS.128|UTMALDG LDSM
    // SASS HopperForwardProgram [90a]: HGMMA UTMALDG

The name is the program's (csrc/kernels/cuda/kernel_launch.h); a number in brackets limits the line
to those architectures. Each word is a regular expression that some instruction must begin with. No
kernel, hot or not, may spill registers or have a stack: both go through memory. A declaration lifts
that with ``stack-allowed (why)``. Exits with 1, naming what is wrong, where any of it is not so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCAL_MEMORY = re.compile(r"(LDL|STL)\b")
STACK_ALLOWED = re.compile(r"\bstack-allowed\b(?: \(.+?\))?")


class CheckError(Exception):
    """A tool or a file is missing; the message says which."""


@dataclass(frozen=True)
class Declaration:
    """One ``// SASS`` line."""

    program: str
    architectures: frozenset[str]  # empty: all
    instructions: tuple[str, ...]
    stack_allowed: bool
    place: str


@dataclass
class Kernel:
    """One kernel for one architecture."""

    architecture: str
    name: str  # demangled
    registers: int = 0
    stack: int = 0
    spills: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)


def listed_sources() -> list[Path]:
    """The .cu files that a build compiles."""
    lines = (ROOT / "csrc" / "sources_cuda.txt").read_text().splitlines()
    return [ROOT / "csrc" / line for line in lines if line.endswith(".cu")]


def parse_declarations(sources: Iterable[Path]) -> list[Declaration]:
    """All ``// SASS`` lines of some files."""
    found = []
    for source in sources:
        for number, line in enumerate(source.read_text().splitlines(), 1):
            if not re.match(r"\s*// SASS\b", line):
                continue
            match = re.match(r"\s*// SASS (.+?)\s*(?:\[([\w ]+)\])?: (.+)$", line)
            if match is None:
                raise CheckError(f"{source.name}:{number} is no declaration: {line.strip()}")
            allowed = STACK_ALLOWED.search(match.group(3))
            if allowed is not None and not allowed.group().endswith(")"):
                raise CheckError(f"{source.name}:{number} allows a stack without saying (why)")
            found.append(
                Declaration(
                    program=match.group(1).strip(),
                    architectures=frozenset((match.group(2) or "").split()),
                    instructions=tuple(STACK_ALLOWED.sub("", match.group(3)).split()),
                    stack_allowed=allowed is not None,
                    place=f"{source.name}:{number}",
                )
            )
    return found


def parse_resources(lines: Iterable[str]) -> Iterator[tuple[str, str, int, int]]:
    """(architecture, mangled name, registers, stack) from ``cuobjdump --dump-resource-usage``."""
    architecture = name = ""
    for line in lines:
        if match := re.search(r"arch = sm_(\w+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match.group(1)
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            yield architecture, name, int(match.group(1)), int(match.group(2))


def parse_sass(lines: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(architecture, mangled name, opcode with its modifiers) from ``cuobjdump --dump-sass``."""
    architecture = name = ""
    instruction = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
    for line in lines:
        if match := instruction.match(line):
            yield architecture, name, match.group(1)
        elif match := re.search(r"arch = sm_(\w+)|code for sm_(\w+)", line):
            architecture = match.group(1) or match.group(2)
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = match.group(1)


def parse_ptxas(lines: Iterable[str]) -> dict[tuple[str, str], int]:
    """Bytes spilled, stores and loads, by (architecture, name as printed) from ``ptxas -v``."""
    spills = {}
    key = None
    for line in lines:
        if match := re.search(r"Compiling entry function '([^']+)' for 'sm_(\w+)'", line):
            key = (match.group(2), match.group(1))
        elif key and (match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill", line)):
            spills[key] = int(match.group(1)) + int(match.group(2))
            key = None
    return spills


def demangled(names: Iterable[str]) -> dict[str, str]:
    """C++ names of mangled ones, through binutils' c++filt."""
    wanted = sorted(set(names))
    if not wanted:
        return {}
    output = subprocess.run(
        ["c++filt"], input="\n".join(wanted), capture_output=True, text=True, check=True
    ).stdout
    return dict(zip(wanted, output.splitlines(), strict=True))


def _tool_folder() -> str:
    """The folder of cuobjdump and nvdisasm: CUDA's, or those that triton brings along."""
    for tool in (shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"):
        if tool and Path(tool).with_name("nvdisasm").is_file():
            return str(Path(tool).parent)
    triton = importlib.util.find_spec("triton")
    for location in (triton.submodule_search_locations or []) if triton else []:
        folder = Path(location) / "backends" / "nvidia" / "bin"
        if (folder / "cuobjdump").is_file():
            return str(folder)
    raise CheckError("cuobjdump and nvdisasm were not found: neither CUDA's nor triton's")


def _dump(option: str, binary: Path) -> Iterator[str]:
    folder = _tool_folder()
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [str(Path(folder) / "cuobjdump"), option, str(binary)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode != 0:
        raise CheckError(f"{' '.join(command)} failed with {process.returncode}")


def read_kernels(binaries: Iterable[Path], ptxas_report: Path | None) -> list[Kernel]:
    """Every kernel of every architecture in the binaries."""
    kernels: dict[tuple[str, str], Kernel] = {}
    for binary in binaries:
        if not binary.is_file():
            raise CheckError(f"there is no {binary}")
        for architecture, name, registers, stack in parse_resources(
            _dump("--dump-resource-usage", binary)
        ):
            kernels[architecture, name] = Kernel(architecture, name, registers, stack)
        for architecture, name, opcode in parse_sass(_dump("--dump-sass", binary)):
            opcodes = kernels[architecture, name].opcodes
            opcodes[opcode] = opcodes.get(opcode, 0) + 1
    names = demangled(name for _, name in kernels)
    if ptxas_report is not None:
        for key, spills in parse_ptxas(ptxas_report.read_text().splitlines()).items():
            if key in kernels:
                kernels[key].spills = spills
    for kernel in kernels.values():
        kernel.name = names[kernel.name]
    return list(kernels.values())


def names_program(kernel: Kernel, program: str) -> bool:
    """Whether a kernel runs a program: its name with, or without, template arguments."""
    return re.search(rf"(?<!\w){re.escape(program)}(?!\w)", kernel.name) is not None


def complaints(kernels: list[Kernel], declarations: list[Declaration]) -> list[str]:
    """What is wrong, a line each."""
    wrong = []
    present = sorted({kernel.architecture for kernel in kernels})
    for declaration in declarations:
        for architecture in present:
            if declaration.architectures and architecture not in declaration.architectures:
                continue
            found = [
                kernel
                for kernel in kernels
                if kernel.architecture == architecture and covers(declaration, kernel)
            ]
            where = f"{declaration.place}: {declaration.program} for sm_{architecture}"
            if not found:
                wrong.append(f"{where}: no such kernel in the binaries")
            for kernel in found:
                wrong += [f"{where}: {what}" for what in _complaints_of(kernel, declaration)]
    for kernel in kernels:
        if not any(covers(declaration, kernel) for declaration in declarations):
            wrong += [
                f"{short_name(kernel.name)} for sm_{kernel.architecture}, undeclared: {what}"
                for what in _memory_of(kernel)
            ]
    return wrong


def covers(declaration: Declaration, kernel: Kernel) -> bool:
    """Whether a declaration speaks of a kernel."""
    architectures = declaration.architectures
    return names_program(kernel, declaration.program) and (
        not architectures or kernel.architecture in architectures
    )


def _memory_of(kernel: Kernel) -> Iterator[str]:
    local = sum(n for opcode, n in kernel.opcodes.items() if LOCAL_MEMORY.match(opcode))
    if kernel.spills or kernel.stack or local:
        yield (
            f"{kernel.spills} bytes spilled, {kernel.stack} bytes of stack, {local} accesses "
            f"to local memory with {kernel.registers} registers: {kernel.name}"
        )


def _complaints_of(kernel: Kernel, declaration: Declaration) -> Iterator[str]:
    if not declaration.stack_allowed:
        yield from _memory_of(kernel)
    for pattern in declaration.instructions:
        if not any(re.match(f"(?:{pattern})(?![A-Z0-9])", opcode) for opcode in kernel.opcodes):
            yield f"no instruction begins with {pattern}: {kernel.name}"


def short_name(name: str) -> str:
    """``AccumulateProgram<3840>`` of a kernel's whole name."""
    found = re.search(r"program_kernel<(?:\w+::)*(\w+(?:<[^<>]*>)?)", name)
    return found.group(1) if found else name.split("(")[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("binaries", nargs="+", type=Path, help="objects, libraries or cubins")
    parser.add_argument("--sources", type=Path, help="a folder; else those of sources_cuda.txt")
    parser.add_argument("--ptxas-report", type=Path, help="output of a build with -Xptxas -v")
    parser.add_argument("--all", action="store_true", help="list the other kernels too")
    options = parser.parse_args(arguments)
    try:
        sources = listed_sources()
        if options.sources is not None:
            sources = sorted(options.sources.glob("*.cu"))
        declarations = parse_declarations(sources)
        if not declarations:
            raise CheckError("no .cu file has a // SASS line")
        kernels = read_kernels(options.binaries, options.ptxas_report)
    except CheckError as error:
        print(f"check_cuda_binary: {error}", file=sys.stderr)
        return 1
    for kernel in sorted(kernels, key=lambda k: (short_name(k.name), k.name, k.architecture)):
        hot = any(covers(found, kernel) and not found.stack_allowed for found in declarations)
        if not hot and not options.all:
            continue
        print(
            f"{'hot ' if hot else '    '}{short_name(kernel.name):45} sm_{kernel.architecture:5}"
            f"{kernel.registers:4} registers {kernel.stack:4} B stack {kernel.spills:4} B spilled"
            f"{sum(kernel.opcodes.values()):7} instructions"
        )
    wrong = complaints(kernels, declarations)
    for line in wrong:
        print(f"check_cuda_binary: {line}", file=sys.stderr)
    print(
        f"check_cuda_binary: {len(kernels)} kernels, {len(declarations)} declarations, "
        f"{len(wrong)} complaints"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
