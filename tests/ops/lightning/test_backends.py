"""The choice of a backend: before anything is launched; another than asked for is said once."""

import logging

import pytest
import torch

from ringctx.errors import LayoutError
from ringctx.ops.lightning import backends
from ringctx.ops.lightning.backends import passes_for
from ringctx.ops.lightning.staged import StagedPasses
from ringctx.ops.lightning.streamed import StreamedPasses


def _inputs(
    k_dim: int = 64, v_dim: int = 64, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    q = torch.empty(1, 4, 2, k_dim, dtype=dtype, device=device)
    return {"q": q, "v": torch.empty(1, 4, 2, v_dim, dtype=dtype, device=device)}


@pytest.fixture
def in_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ringctx.ops.lightning.triton_kernels.INTERPRETED", True)
    backends._say_once.cache_clear()


def test_torch_computes_anything() -> None:
    assert isinstance(passes_for("torch", **_inputs(300, dtype=torch.float64)), StreamedPasses)


def test_rejects_an_unknown_backend_and_names_the_known() -> None:
    with pytest.raises(LayoutError, match=r"backend='cuda' is not known; .*torch.*triton.*fla"):
        passes_for("cuda", **_inputs())


def test_rejects_states_of_other_ranks_for_a_backend_that_takes_none() -> None:
    with pytest.raises(LayoutError, match="whole sequences on one device"):
        passes_for("fla", **_inputs())


def test_rejects_triton_on_the_cpu_and_says_what_works() -> None:
    with pytest.raises(LayoutError, match=r"on cpu; choose backend='torch' .*TRITON_INTERPRET=1"):
        passes_for("triton", **_inputs())


def test_rejects_triton_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(LayoutError, match="not installed"):
        passes_for("triton", **_inputs())


@pytest.mark.usefixtures("in_interpreter")
def test_triton_computes_head_dims_up_to_its_limit() -> None:
    for dims in ((1, 256), (256, 40)):
        assert isinstance(passes_for("triton", **_inputs(*dims)), StagedPasses)


@pytest.mark.usefixtures("in_interpreter")
@pytest.mark.parametrize(
    ("dims", "dtype", "said"),
    [
        ((257, 64), torch.float32, "head dim 257, which is over 256"),
        ((64, 512), torch.float16, "head dim 512, which is over 256"),
        ((64, 64), torch.float64, "torch.float64"),
        ((64, 64), torch.bfloat16, "torch.bfloat16"),
    ],
)
def test_falls_back_to_torch_and_says_why_once(
    dims: tuple[int, int], dtype: torch.dtype, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert isinstance(passes_for("triton", **_inputs(*dims, dtype=dtype)), StreamedPasses)
    (record,) = caplog.records
    assert said in record.getMessage()


def test_bf16_is_computed_on_a_gpu_of_ampere_or_later(monkeypatch: pytest.MonkeyPatch) -> None:
    backends._say_once.cache_clear()
    capability = backends._ON_CUDA
    inputs = _inputs(dtype=torch.bfloat16)
    for compute, lack in (((8, 0), None), ((9, 0), None), ((7, 5), "compute capability 7.5")):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device, found=compute: found
        )
        found = capability.lacks(inputs["q"], inputs["v"])
        assert found is None if lack is None else found is not None and lack in found
