"""scripts/check_cuda_binary.py on what the tools print, with and without something wrong."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from checkout_copy import ROOT

_NAME = (
    "_ZN9torch_ext4cuda14program_kernelINS0_17AccumulateProgramILi3840EEENS0_9ListBlock"
    "EEEvNT_4ArgsE"
)
_DEMANGLED = (
    "void torch_ext::cuda::program_kernel<torch_ext::cuda::AccumulateProgram<3840>, "
    "torch_ext::cuda::ListBlock>(torch_ext::cuda::AccumulateProgram<3840>::Args)"
)
_RESOURCES = f"""
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {_NAME}:
  REG:64 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:4416 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Function {_NAME}:
  REG:60 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:4416 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
_SASS = f"""
Fatbin elf code:
================
arch = sm_80
	code for sm_80
		Function : {_NAME}
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;          /* 0x00000a0000017a02 */
                                                                   /* 0x000fc40000000f00 */
        /*0010*/              @!P0 LDG.E.EF.128 R4, [R2.64] ;      /* 0x0000000402047981 */
        /*0020*/                   STG.E.128 [R2.64], R4 ;         /* 0x0000000402007986 */
        /*0030*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;     /* 0x0000000104047890 */
	code for sm_90a
		Function : {_NAME}
        /*0000*/                   LDG.E.64 R4, desc[UR4][R2.64] ; /* 0x0000000402047981 */
        /*0010*/               @P3 STL [R1], R4 ;                  /* 0x0000000401007387 */
"""
_PTXAS = f"""
ptxas info    : Compiling entry function '{_NAME}' for 'sm_90a'
ptxas info    : Function properties for {_NAME}
    24 bytes stack frame, 40 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 60 registers, used 0 barriers
"""


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "check_cuda_binary", ROOT / "scripts" / "check_cuda_binary.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_cuda_binary"] = module
    spec.loader.exec_module(module)
    del sys.modules["check_cuda_binary"]
    return module


@pytest.fixture
def run(
    check: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """Runs the script on canned output: (exit status, what it printed)."""
    printed = {"--dump-resource-usage": _RESOURCES, "--dump-sass": _SASS}
    monkeypatch.setattr(check, "_dump", lambda option, binary: printed[option].splitlines())

    def run_script(declaration: str) -> tuple[int, str]:
        (tmp_path / "accumulate.cu").write_text(f"{declaration}\nint x;\n")
        (tmp_path / "object.o").touch()
        (tmp_path / "build.log").write_text(_PTXAS)
        status = check.main(
            [
                str(tmp_path / "object.o"),
                "--sources",
                str(tmp_path),
                "--ptxas-report",
                str(tmp_path / "build.log"),
            ]
        )
        output = capsys.readouterr()
        return status, output.out + output.err

    return run_script


def test_reads_what_the_tools_print(check: ModuleType) -> None:
    assert list(check.parse_resources(_RESOURCES.splitlines())) == [
        ("80", _NAME, 64, 0),
        ("90a", _NAME, 60, 24),
    ]
    assert [(a, o) for a, _, o in check.parse_sass(_SASS.splitlines())] == [
        ("80", "MOV"),
        ("80", "LDG.E.EF.128"),
        ("80", "STG.E.128"),
        ("80", "UIADD3"),
        ("90a", "LDG.E.64"),
        ("90a", "STL"),
    ]
    assert check.parse_ptxas(_PTXAS.splitlines()) == {("90a", _NAME): 104}
    assert check.demangled([_NAME]) == {_NAME: _DEMANGLED}
    assert check.short_name(_DEMANGLED) == "AccumulateProgram<3840>"


def test_declarations(check: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "x.cu"
    source.write_text(
        "// A comment.\n"
        "// SASS EmbeddingSumProgram<float>: LDG.E.128|LDG.E.EF.128\n"
        "// SASS HopperProgram [90a 100]: HGMMA stack-allowed (printf) UTMALDG\n"
        "// SASS ForwardProgram<torch_ext::cuda::Bf16, 64, false>: LDGSTS.*128\n"
    )
    first, second, third = check.parse_declarations([source])
    assert first.program == "EmbeddingSumProgram<float>"
    assert first.instructions == ("LDG.E.128|LDG.E.EF.128",)
    assert not first.architectures
    assert not first.stack_allowed
    assert second.architectures == {"90a", "100"}
    assert second.instructions == ("HGMMA", "UTMALDG")
    assert second.stack_allowed
    assert second.place == "x.cu:3"
    assert third.program == "ForwardProgram<torch_ext::cuda::Bf16, 64, false>"
    assert third.instructions == ("LDGSTS.*128",)
    source.write_text("// SASS ForwardProgram LDG\n")
    with pytest.raises(
        check.CheckError, match=r"x\.cu:1 is no declaration: // SASS ForwardProgram LDG"
    ):
        check.parse_declarations([source])


def test_good_code_passes(run) -> None:
    status, output = run(
        "// SASS AccumulateProgram [80]: LDG.E.128|LDG.E.EF.128 STG.E.128 MOV\n"
        "// SASS AccumulateProgram [90a]: stack-allowed (a test) LDG.E.64"
    )
    assert status == 0
    assert "hot AccumulateProgram<3840>" in output
    assert "2 kernels, 2 declarations, 0 complaints" in output


def test_spills_are_refused(run) -> None:
    status, output = run("// SASS AccumulateProgram<3840> [90a]: LDG")
    assert status == 1
    assert (
        "accumulate.cu:1: AccumulateProgram<3840> for sm_90a: 104 bytes spilled, 24 bytes of "
        "stack, 1 accesses to local memory with 60 registers"
    ) in output


def test_undeclared_kernels_must_not_spill_either(run) -> None:
    status, output = run("// SASS AccumulateProgram [80]: LDG")
    assert status == 1
    assert "AccumulateProgram<3840> for sm_90a, undeclared: 104 bytes spilled" in output
    assert "sm_80, undeclared" not in output


def test_a_stack_may_be_allowed_with_a_reason(run) -> None:
    status, _ = run("// SASS AccumulateProgram [90a]: stack-allowed (printf's arguments) LDG.E.64")
    assert status == 0
    status, output = run("// SASS AccumulateProgram [90a]: stack-allowed LDG.E.64")
    assert status == 1
    assert "accumulate.cu:1 allows a stack without saying (why)" in output


def test_missing_instructions_are_named(run) -> None:
    status, output = run("// SASS AccumulateProgram: stack-allowed (a test) LDG.E.64 HMMA")
    assert status == 1
    assert "AccumulateProgram for sm_80: no instruction begins with LDG.E.64" in output
    assert "AccumulateProgram for sm_80: no instruction begins with HMMA" in output
    assert "AccumulateProgram for sm_90a: no instruction begins with HMMA" in output
    assert "sm_90a: no instruction begins with LDG.E.64" not in output


def test_a_word_is_a_whole_opcode(run) -> None:
    status, output = run("// SASS AccumulateProgram [80]: LDG.E.EF.1 UIADD")
    assert status == 1
    assert "begins with LDG.E.EF.1:" in output
    assert "begins with UIADD:" in output


def test_a_declared_kernel_must_be_there(run) -> None:
    status, output = run("// SASS OtherProgram: LDG")
    assert status == 1
    assert "OtherProgram for sm_80: no such kernel in the binaries" in output


def test_no_declarations_are_an_error(run) -> None:
    status, output = run("// nothing")
    assert status == 1
    assert "no .cu file has a // SASS line" in output


def test_hot_kernels_are_declared(check: ModuleType) -> None:
    declarations = check.parse_declarations(check.listed_sources())
    programs = {declaration.program for declaration in declarations}
    assert {
        "AccumulateProgram",
        "ChunkNormProgram",
        "AdamStepProgram",
        "SgdStepProgram",
        "AttentionDecodeProgram",
        "AttentionForwardProgram<torch_ext::cuda::Bf16, 128, true>",
        "AttentionBackwardKeysProgram<torch_ext::cuda::Fp16, 256, true>",
    } <= programs
    allowed = {found.program for found in declarations if found.stack_allowed}
    assert allowed == {"EmbeddingCheckProgram"}
