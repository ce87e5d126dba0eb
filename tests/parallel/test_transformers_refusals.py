"""What Hugging Face models ask of ranks and cannot be exact: refused, before anything moves."""

import sys
from typing import Any

import pytest
import torch
from torch import nn

from ringctx.errors import ConfigError, LayoutError
from ringctx.parallel import transformers as ring
from ringctx.parallel.comm import SoloGroup
from ringctx.parallel.context import ContextParallel
from tests.parallel.test_transformers import BY_NAME, ROUNDINGS, Case
from tests.tolerances import assert_close


def _sharded(
    case: Case | None = None, batch: dict[str, Any] | None = None, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    ring.register()
    case = case or BY_NAME["llama-gqa"]
    model = case.model(attention=ring.ATTENTION)
    context = ContextParallel(group=SoloGroup())
    shards = ring.shard_batch(batch or case.batch(), model=model, context=context, **settings)
    return model, shards


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.tensor([[0] + [1] * 21] * 2)}, "padding at the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1] + [1] * 19] * 2)}, "in the middle"),
        ({"attention_mask": torch.tensor([[1] * 21 + [0]] * 2)}, "labels where attention_mask"),
        (
            {"attention_mask": torch.ones(2, 1, 22, 22)},
            r"attention_mask has shape \[2, 1, 22, 22\]",
        ),
        (
            {
                "attention_mask": torch.ones(2, 22, dtype=torch.int64),
                "position_ids": torch.arange(22)[None] % 11,
            },
            "documents together with attention_mask",
        ),
        (
            {"position_ids": torch.stack((torch.arange(22) % 11, torch.arange(22) % 7))},
            "rows that pack different documents",
        ),
        (
            {"position_ids": torch.zeros(3, 2, 22, dtype=torch.int64)},
            r"position_ids has shape \[3, 2, 22\]; it must be \[B, S\], here \[2, 22\]",
        ),
        ({"position_ids": torch.zeros(3, 22, dtype=torch.int64)}, r"position_ids has shape \[3"),
        ({"input_ids": torch.zeros(22, dtype=torch.int64)}, r"input_ids has shape \[22\]"),
        (
            {"input_ids": None, "inputs_embeds": torch.zeros(2, 22)},
            r"inputs_embeds has shape \[2, 22\]; it must be \[B, S, E\]",
        ),
        ({"labels": torch.zeros(1, 22, dtype=torch.int64)}, r"labels has shape \[1, 22\]"),
        ({"labels": torch.zeros(2, 21, dtype=torch.int64)}, r"labels has shape \[2, 21\]"),
        ({"shift_labels": torch.zeros(2, 21)}, r"shift_labels has shape \[2, 21\]"),
        ({"labels": [[1] * 22] * 2}, "labels is a list"),
        ({"cu_seq_lens_q": torch.tensor([[0, 22]])}, r"cu_seq_lens_q has shape \[1, 2\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 22])}, "differs from cu_seq_lens_k"),
        (
            {
                "position_ids": torch.arange(22)[None] % 11,
                "cu_seq_lens_q": torch.tensor([0, 5, 22]),
                "cu_seq_lens_k": torch.tensor([0, 5, 22]),
            },
            "leave out one of the two",
        ),
        ({"labels": torch.full((2, 22), -100)}, "no targets"),
        (
            {"pixel_values": torch.zeros(1)},
            "pixel_values in the batch; shard_batch knows attention_mask, cu_seq_lens_k",
        ),
        ({"inputs_embeds": torch.zeros(2, 22, 24)}, "either input_ids or inputs_embeds"),
    ],
)
def test_refuses_a_batch(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _sharded(batch=BY_NAME["llama-gqa"].batch() | change)


def test_refuses_cu_seq_lens_that_end_elsewhere() -> None:
    borders = torch.tensor([0, 5, 21])
    batch = BY_NAME["llama-gqa"].batch() | {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
    with pytest.raises(LayoutError, match="22"):
        _sharded(batch=batch)
    borders = torch.tensor([0, 5.5, 22])
    batch = batch | {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
    with pytest.raises(LayoutError, match="must hold integers"):
        _sharded(batch=batch)


LLAMA4 = {"attention_chunk_size": 4, "head_dim": 8, "num_local_experts": 2}
LLAMA4_TEMPERATURE = LLAMA4 | {"attention_chunk_size": None, "layer_types": ["full_attention"] * 2}
GEMMA2 = {"attn_logit_softcapping": 30.0, "head_dim": 8}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("Llama4Text", LLAMA4, "chunked"),
        ("Llama4Text", LLAMA4_TEMPERATURE, "attn_temperature_tuning"),
        ("Roberta", {"is_decoder": True}, "RobertaEmbeddings without position_ids"),
        ("XLMRoberta", {"is_decoder": True}, "without position_ids"),
        ("Camembert", {"is_decoder": True}, "without position_ids"),
        ("Qwen3Next", {"head_dim": 8}, "layers of type linear_attention"),
        ("Mamba", {}, "layers of type linear_attention"),
        ("Mixtral", {"output_router_logits": True}, "router"),
        ("Llama", {"is_causal": False}, "not causal"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type='dynamic'",
        ),
    ],
)
def test_refuses_a_model(family: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _sharded(Case("refused", family, settings))


def test_refuses_a_model_that_attends_by_itself() -> None:
    model, batch = BY_NAME["llama-gqa"].model(), BY_NAME["llama-gqa"].batch()
    context = ContextParallel(group=SoloGroup())
    with pytest.raises(ConfigError, match="'sdpa': each rank would attend only within its shard"):
        ring.shard_batch(batch, model=model, context=context)
    with pytest.raises(ConfigError, match="no model of Transformers"):
        ring.shard_batch(batch, model=nn.Linear(1, 1), context=context)


def test_refuses_labels_for_another_loss() -> None:
    ring.register()
    model: Any = BY_NAME["llama-gqa"].model(attention=ring.ATTENTION)
    model.loss_function = torch.nn.functional.cross_entropy
    context = ContextParallel(group=SoloGroup())
    with pytest.raises(ConfigError, match="labels for a model without"):
        ring.shard_batch(BY_NAME["llama-gqa"].batch(), model=model, context=context)


def _learned_sinks() -> tuple[str, dict[str, Any]]:
    return "GptOss", {"head_dim": 8, "num_local_experts": 2, "sliding_window": 8}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("Gemma2", GEMMA2, "soft cap"),
        (*_learned_sinks(), "learned attention sinks"),
        ("Llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        (
            "DeepseekV3",
            {
                "kv_lora_rank": 8,
                "q_lora_rank": 8,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
                "first_k_dense_replace": 2,
                "num_key_value_heads": 6,
            },
            "values of head dim 8 beside queries of head dim 16",
        ),
    ],
)
def test_refuses_what_a_layer_asks_for(family: str, settings: dict[str, Any], message: str) -> None:
    model, shards = _sharded(Case("refused", family, settings))
    with pytest.raises(ConfigError, match=message):
        model.train()(**shards)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.ones(2, 22)}, "leave it to shard_batch"),
        ({"attention_mask": torch.ones(2, 1, 22, 22)}, "its caller made"),
        ({"use_cache": True}, "key/value cache"),
        ({"output_attentions": True}, "output_attentions"),
        ({"is_causal": False}, "causal|bidirectional"),
        ({"head_mask": torch.ones(2, 6)}, "head_mask"),
        ({"position_bias": torch.ones(1)}, "position_bias"),
        ({"temperature": 2.0}, "the argument 'temperature' to attention"),
        ({ring.ATTENTION: None}, "without a sequence"),
    ],
)
def test_refuses_an_argument_of_the_model(change: dict[str, Any], message: str) -> None:
    model, shards = _sharded()
    with pytest.raises(ConfigError, match=message):
        model(**shards | change)


# The older name is deprecated from 5.24 on; either must be refused, whichever release is installed.
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_refuses_to_go_on_from_a_cache(name: str) -> None:
    model, shards = _sharded()
    # A model of its own fills the cache.
    cache = BY_NAME["llama-gqa"].model()(shards["input_ids"], use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="key/value cache"):
        model(**shards | {name: cache})


def test_refuses_a_window_that_mask_and_layer_disagree_on() -> None:
    model, shards = _sharded(BY_NAME["qwen2-full-and-window"])
    model.model.layers[0].self_attn.sliding_window = 3
    with pytest.raises(ConfigError, match=r"mask has a window of None and which asks .* for 3"):
        model(**shards)


def test_a_model_that_does_not_know_shift_labels_shows_it() -> None:
    model, shards = _sharded()
    del shards["shift_labels"]
    assert model(**shards).loss.item() == 0


def test_accepts_embeddings_in_place_of_ids() -> None:
    case = BY_NAME["llama-gqa"]
    batch = case.batch()
    embed = case.model().get_input_embeddings()  # type: ignore[operator]
    model, shards = _sharded(batch={"inputs_embeds": embed(batch["input_ids"])})
    assert "labels" not in shards
    assert_close(model(**shards).logits, case.model()(**batch).logits, scale=ROUNDINGS)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(ConfigError, match=r"transformers 4\.57\.1 is too old; install 5"):
        ring.register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'ringctx\[hf\]'"):
        ring.register()
