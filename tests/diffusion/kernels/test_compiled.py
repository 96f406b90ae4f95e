"""Compilation of the kernels to machine code for GPUs that may be absent."""

from pathlib import Path

import pytest

triton = pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("logits", "sums", "capability"), [("fp32", "fp32", 80), ("bf16", "fp32", 90), ("fp64", "fp64", 90)]
)
def test_kernels_compile_for_each_generation(
    logits: str, sums: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vqd_scale.diffusion.kernels import logit_statistics as rows
    from vqd_scale.diffusion.kernels import philox, top_p

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = {"true": "*i64", "observed": "*i64", "slots": "*i64", "correct": "*i1", "logits": f"*{logits}"}
    kinds |= {"key": "i64", "draw": "i64"}
    sizes = {"row_stride", "code_stride", "codes", "count"}
    constants = {"width": 4096, "words_per_number": 2 if sums == "fp64" else 1, "blocks": 128, "rate": 0.86}
    kinds |= {"log_p": "*fp32", "result": "*fp32"}
    for kernel in (rows._statistics_kernel, rows._gradient_kernel, philox._uniforms, top_p._top_p):  # pyright: ignore[reportPrivateUsage]
        signature = {
            name: "constexpr"
            if name in constants
            else kinds.get(name, "i32" if name in sizes else f"*{sums}")
            for name in kernel.arg_names
        }
        source = ASTSource(
            kernel, signature, {name: constants[name] for name in signature if name in constants}
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        assert len(compiled.asm["cubin"]) > 1000
