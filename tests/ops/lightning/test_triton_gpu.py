"""The Triton kernels against float64 on a GPU, where there is one."""

import pytest
import torch

from ringctx.ops.lightning.triton_stages import TritonStages
from tests.ops.lightning.stage_errors import joined_errors, make_case, stage_errors

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.gpu
@pytest.mark.proves("lightning attention: Triton kernels, forward and backward", on="GPU")
@pytest.mark.parametrize("fixed", [True, False], ids=["per head", "per token"])
@pytest.mark.parametrize("chunk_len", [16, 32, 64, 128])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (48, 40), (192, 256)])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_stages_match_their_definition_on_a_gpu(
    dtype: torch.dtype, dims: tuple[int, int], chunk_len: int, fixed: bool
) -> None:
    case = make_case(
        lengths=[131, 7, 1, 300], chunk_len=chunk_len, dims=dims, dtype=dtype, batch=2, fixed=fixed
    )
    for compute in (stage_errors, joined_errors):
        errors = compute(TritonStages(), case, dtype=dtype, fixed=fixed, device="cuda")
        for what, error in errors.items():
            assert error <= TOLERANCES[dtype], (what, error)
