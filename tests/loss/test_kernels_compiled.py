"""The kernels compiled for sm_80 and sm_90 with no GPU: what the interpreter cannot show.

No spills, 16-byte loads, and few enough instructions per element that an H200 would wait for its memory rather than
for them: at 4.3 TB/s and 1.7 GHz its 132 multiprocessors can issue about 13 per bf16 element.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eaft_megatron.testing import run_distributed
from tests.worlds import once

pytest.importorskip("triton", "3.4", reason="the kernels are tested with Triton 3.4 and later (pip install triton)")

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
CAPABILITIES = [80, 90]
EXTENT = pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
BUDGET = {torch.bfloat16: 13.0, torch.float16: 13.0, torch.float32: 26.0}  # lane-instructions per element


def _compile(fn, types: dict, constants: dict, aligned: set[str], capability: int, warps: int) -> dict:
    """PTX, SASS and ptxas' account of a kernel; ``types`` of the arguments that are not compile-time constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = fn.arg_names
    source = ASTSource(
        fn=fn,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cubin = Path("kernel.cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], check=True, capture_output=True, text=True)
    sass = subprocess.run([tools / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True)
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout).groups()
    return {
        "ptx": compiled.asm["ptx"],
        "sass": sass.stdout,
        **dict(zip(("registers", "stack", "shared", "local"), map(int, numbers), strict=True)),
    }


def _statistics(dtype, capability: int, k: int, squares: bool) -> dict:
    from eaft_megatron.loss.kernels.statistics import token_statistics_kernel
    from eaft_megatron.loss.kernels.tuning import stream_shape

    shape, pad = stream_shape(k, dtype), max(1 << (k - 1).bit_length(), 2)
    types = {"rows": POINTERS[dtype], "values": POINTERS[dtype], "target": "*i64", "sums": "*fp32"}
    types |= dict.fromkeys(("row_stride", "tokens", "width", "start", "ignore_index"), "i32")
    sizes = {"BUCKETS": shape.buckets, "GROUP": shape.group, "CHUNK": shape.chunk}
    constants = {"K": k, "KPAD": pad, "TARGET": True, "SQUARES": squares, **sizes}
    aligned = {"values", "target", "sums"}
    found = _compile(token_statistics_kernel, types, constants, aligned, capability, 1)
    return found | {"tile": shape.buckets * shape.group}


def _gradient(dtype, capability: int, rows_aligned: bool) -> dict:
    from eaft_megatron.loss.kernels.gradient import gradient_kernel
    from eaft_megatron.loss.kernels.tuning import gradient_block

    block, warps = gradient_block(dtype)
    types = {"rows": POINTERS[dtype], "out": POINTERS[dtype], "target": "*i64"}
    types |= dict.fromkeys(("maximum", "sum_exp", "slope", "upstream"), "*fp32")
    types |= dict.fromkeys(("row_stride", "out_stride", "columns", "width", "blocks", "start", "ignore_index"), "i32")
    constants = {"BLOCK": block, "GROUP": 16 // dtype.itemsize, "ALIGNED": rows_aligned}
    aligned = {"rows", "out", "row_stride", "out_stride", "columns"} if rows_aligned else set()
    found = _compile(gradient_kernel, types, constants, aligned, capability, warps)
    return found | {"tile": block, "threads": 32 * warps}


def _merge(dtype, capability: int) -> dict:
    from eaft_megatron.loss.kernels.merging import merge_kernel

    types = {"values": POINTERS[dtype], "target": "*i64", "sums": "*fp32"}
    types |= {name: "*fp32" for name in merge_kernel.arg_names if name.endswith("_out")}
    types |= dict.fromkeys(("values_stride", "sums_stride", "tokens", "vocab_size", "ignore_index"), "i32")
    constants = {"RANKS": 8, "RPAD": 8, "KL": 20, "KPAD": 32, "K": 20, "TARGET": True, "ENTROPY": True, "SQUARES": True}
    return _compile(merge_kernel, types, constants, {"values", "sums"}, capability, 1)


def _compile_all(everything: bool) -> dict:
    """Some of the kernels: those of a run with EAFT in bf16 and fp32; or all that the launchers can ask for."""
    out = {}
    bf16, fp32 = torch.bfloat16, torch.float32
    chosen = [(bf16, 90, 20, False), (bf16, 80, 20, False), (fp32, 90, 20, False)]
    if everything:
        options = ((20, False), (20, True), (1, False), (128, False))
        chosen = [(dtype, cap, k, sq) for dtype in POINTERS for cap in CAPABILITIES for k, sq in options]
    for variant in chosen:
        out[("statistics", *variant)] = _statistics(*variant)
    for dtype, capability in dict.fromkeys(variant[:2] for variant in chosen):
        for rows_aligned in (True, False):
            out["gradient", dtype, capability, rows_aligned] = _gradient(dtype, capability, rows_aligned)
        if everything or (dtype, capability) == (bf16, 90):
            out["merge", dtype, capability] = _merge(dtype, capability)
    return out


def _compiled(everything: bool) -> dict:
    """In a process that has neither the interpreter nor an old cache."""
    (result,) = run_distributed(_in_a_folder_of_its_own, 1, everything, env={"TRITON_INTERPRET": None}, timeout=500)
    return result


@pytest.fixture(scope="module")
def compiled() -> Callable:
    """What `_compiled` returns, computed once for each argument."""
    return once(_compiled)


def _in_a_folder_of_its_own(everything: bool) -> dict:
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        os.chdir(folder)
        return _compile_all(everything)


def _loops(sass: str) -> list[list[str]]:
    """Bodies of the loops: what lies between a label and a later jump back to it."""
    instructions, labels, bodies = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(found[1])
            jump = re.search(r"BRA.*?(\.L_x_\d+)", found[1])
            if jump and labels.get(jump[1], len(instructions)) < len(instructions) - 1:  # not the trap at the end
                bodies.append(instructions[labels[jump[1]] :])
    return bodies


def _hot_loop(sass: str) -> list[str]:
    """The loop that loads most: the one over the tiles."""
    return max(_loops(sass), key=lambda body: sum("LDG" in line for line in body))


def _hot_loop_instructions(found: dict) -> float:
    """Of a lane per element, in the loop over the tiles."""
    return len(_hot_loop(found["sass"])) / (found["tile"] / 32)


def _gradient_instructions(found: dict) -> float:
    """Of a lane per element, in the whole program, though no block takes all of its branches."""
    total = len(re.findall(r"^\s+/\*[0-9a-f]+\*/\s", found["sass"], re.MULTILINE))
    return total / (found["tile"] / found["threads"])


def resource_table(compiled: dict) -> str:
    """A line a kernel, as benchmarks/results/kernels_compiled.md holds them."""
    lines = ["| kernel | dtype | sm | K | rows | registers | stack | instructions per element |", "|" + "---|" * 8]
    for name, found in compiled.items():
        kernel, dtype, capability, *rest = name
        if kernel == "merge" or (kernel == "statistics" and (rest[0] == 1 or rest[1])):
            continue
        k, rows = ("", "aligned" if rest[0] else "unaligned") if kernel == "gradient" else (rest[0], "any")
        count = _hot_loop_instructions(found) if kernel == "statistics" else _gradient_instructions(found)
        cells = [kernel, str(dtype)[6:], capability, k, rows, found["registers"], found["stack"], f"{count:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


@EXTENT
def test_nothing_spills(compiled, everything):
    """No local memory, no stack, no shared memory in any kernel; registers for at least 9 warps, at K <= 32 for 16."""
    for name, found in compiled(everything).items():
        assert (found["local"], found["stack"], found["shared"]) == (0, 0, 0), name
        limit = 216 if name[0] == "statistics" and name[3] > 32 else 128
        assert found["registers"] <= limit, f"{name}: {found['registers']} registers"


@EXTENT
def test_the_hot_loop_loads_16_bytes_at_a_time(compiled, everything):
    """Every load of the statistics' loop over the tiles takes 16 bytes, as many loads as the tile needs."""
    for name, found in compiled(everything).items():
        if name[0] == "statistics":
            loads = [line for line in _hot_loop(found["sass"]) if "LDG" in line]
            assert all("LDG.E.128" in line for line in loads), name
            assert len(loads) == found["tile"] * name[1].itemsize // 16 // 32, name


@EXTENT
def test_the_hot_loop_fits_the_budget(compiled, everything):
    """Instructions per element in the loop over the tiles, counted in the machine code."""
    for name, found in compiled(everything).items():
        if name[0] == "statistics":
            assert _hot_loop_instructions(found) <= BUDGET[name[1]], name


@EXTENT
def test_the_gradient_reads_and_writes_16_bytes_at_a_time(compiled, everything):
    """As many 16-byte loads as stores beside the zeros of dead rows; rounding to nearest; budget as above, twice."""
    for name, found in compiled(everything).items():
        if name[0] == "gradient" and name[3]:
            needed = found["tile"] * name[1].itemsize // 16 // found["threads"]
            assert found["sass"].count("LDG.E.128") == needed, name
            assert found["sass"].count("STG.E.128") == 2 * needed, name
            assert _gradient_instructions(found) <= 2 * BUDGET[name[1]], name
            if name[1] != torch.float32:
                assert "cvt.rn." in found["ptx"] and "cvt.rz." not in found["ptx"], name


@EXTENT
def test_unaligned_rows_are_read_and_written_16_bytes_at_a_time(compiled, everything):
    """The statistics know no other rows. In the gradient all blocks but a row's first and last take 16-byte steps."""
    for name, found in compiled(everything).items():
        if name[0] == "statistics":
            assert _hot_loop_instructions(found) <= 16, name
        if name[0] == "gradient" and not name[3]:
            needed = found["tile"] * name[1].itemsize // 16 // found["threads"]
            assert found["sass"].count("LDG.E.128") == needed, name
            assert found["sass"].count("STG.E.128") >= needed, name


def test_the_counting_itself_can_fail():
    """A loop is found between its label and the jump back, and not elsewhere."""
    sass = "\n".join(
        [
            ".L_x_0:",
            "        /*0010*/                   LDG.E.128 R4, [R2] ;",
            "        /*0020*/                   FADD R0, R0, R4 ;",
            "        /*0030*/              @P0  BRA `(.L_x_0) ;",
            "        /*0040*/                   EXIT ;",
            ".L_x_1:",
            "        /*0050*/                   BRA `(.L_x_1);",
        ]
    )
    assert [len(body) for body in _loops(sass)] == [3]


if __name__ == "__main__":
    print(resource_table(_compiled(everything=True)), end="")
