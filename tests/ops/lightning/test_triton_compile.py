"""The Triton kernels compiled ahead of time, for GPUs that are not here."""

from pathlib import Path

import pytest
import torch
from lightning_kernels import compile_launch, record_launches

# What a program may have: 99 KiB on the smallest GPUs since Ampere (sm_86, sm_89).
SHARED_BYTES = 99 << 10
WITHOUT_PRODUCTS = {"scan", "scan_back"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.proves(
    "lightning attention: Triton kernels, forward and backward", on="ahead-of-time compilation"
)
@pytest.mark.parametrize(
    ("whole", "fixed"),
    [(True, True), (True, False), (False, False)],
    ids=["one rank, decay per head", "one rank", "with an exchange"],
)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", [80, 90])
def test_no_kernel_spills_and_all_fit_shared_memory_and_use_tensor_cores(
    arch: int, head_dim: int, whole: bool, fixed: bool
) -> None:
    launches = record_launches(
        k_dim=head_dim,
        v_dim=head_dim,
        chunk_len=64,
        dtype=torch.bfloat16,
        fixed=fixed,
        whole=whole,
    )
    assert len(launches) == (8 if whole else 12)
    for name, launch in launches.items():
        kernel = compile_launch(name, launch, arch=arch)
        assert kernel.stack_bytes == 0, kernel
        assert kernel.shared_bytes <= SHARED_BYTES, kernel
        products = kernel.wgmma if arch == 90 else kernel.mma_sync
        assert (products > 0) != (name in WITHOUT_PRODUCTS), kernel


@pytest.mark.slow
@pytest.mark.proves(
    "lightning attention: Triton kernels, forward and backward", on="ahead-of-time compilation"
)
def test_fp32_kernels_stay_off_tf32_and_do_not_spill() -> None:
    launches = record_launches(
        k_dim=64, v_dim=64, chunk_len=64, dtype=torch.float32, fixed=True, whole=True
    )
    for name, launch in launches.items():
        kernel = compile_launch(name, launch, arch=80)
        assert kernel.stack_bytes == 0, kernel
        assert kernel.wgmma == kernel.mma_sync == 0, kernel


@pytest.mark.slow
@pytest.mark.proves(
    "lightning attention: Triton kernels, forward and backward", on="ahead-of-time compilation"
)
@pytest.mark.parametrize(
    ("arch", "chunk_len", "dims"),
    [(80, 16, (40, 192)), (90, 128, (40, 192)), (80, 128, (256, 256))],
)
def test_any_head_dim_and_chunk_len_fits_shared_memory(
    arch: int, chunk_len: int, dims: tuple[int, int]
) -> None:
    launches = record_launches(
        k_dim=dims[0],
        v_dim=dims[1],
        chunk_len=chunk_len,
        dtype=torch.bfloat16,
        fixed=False,
        whole=True,
    )
    for name, launch in launches.items():
        kernel = compile_launch(name, launch, arch=arch)
        assert kernel.shared_bytes <= SHARED_BYTES, kernel
