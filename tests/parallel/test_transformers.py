"""Models of Hugging Face Transformers over ranks: equal to one process, or refused."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ringctx.errors import ConfigError, LayoutError
from ringctx.parallel import transformers as ring
from ringctx.parallel.comm import Group, SoloGroup, record_traffic
from ringctx.parallel.context import ContextParallel
from ringctx.parallel.model_states import whole
from tests.ranks import RankError, run_ranks
from tests.tolerances import assert_close

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Many operations in a row, in an order of their own on each side.
ROUNDINGS = 4


@dataclass(frozen=True)
class Case:
    """A model and a batch; `family` names a config class and a model class."""

    name: str
    family: str = "Llama"
    settings: dict[str, Any] = field(default_factory=dict)
    docs: tuple[int, ...] = ()
    rows: int = 2
    seq_len: int = 22
    layout: str = "zigzag"
    padded: bool = False

    def __str__(self) -> str:
        return self.name

    def model(self, *, attention: str = "sdpa") -> nn.Module:
        torch.manual_seed(1)
        config = getattr(transformers, f"{self.family}Config")(**SIZES | self.settings)
        config._attn_implementation = attention
        family = self.family.removesuffix("Text")
        model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
        return model

    def batch(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(2)
        shape = (1, sum(self.docs)) if self.docs else (self.rows, self.seq_len)
        tokens = torch.randint(1, 61, shape, generator=generator)
        batch = {"input_ids": tokens, "labels": tokens.clone()}
        if self.docs:
            batch["position_ids"] = torch.cat([torch.arange(n) for n in self.docs])[None]
        if self.padded:
            batch["attention_mask"] = torch.ones_like(tokens)
            batch["attention_mask"][0, -5:] = 0
            batch["labels"][0, -5:] = -100
        return batch


DOCS = (5, 1, 11, 6)
QWEN = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
CASES = [
    Case("llama-gqa"),
    Case("llama-mqa-contiguous", settings={"num_key_value_heads": 1}, layout="contiguous"),
    Case("llama-striped-odd", layout="striped", seq_len=19, rows=1),
    Case("llama-padded-right", padded=True),
    Case("llama-packed", docs=DOCS),
    Case("mistral-window", "Mistral", {"sliding_window": 7}),
    Case("mistral-window-packed", "Mistral", {"sliding_window": 4}, docs=DOCS),
    Case("qwen2-full-and-window", "Qwen2", QWEN),
    Case("qwen3-norms-and-head-dim", "Qwen3", {"head_dim": 8, "attention_bias": True}),
    Case("gemma3-pattern", "Gemma3Text", {"sliding_window": 6, "head_dim": 8}),
    Case("mixtral-experts", "Mixtral", {"num_local_experts": 3, "sliding_window": None}),
]
BY_NAME = {case.name: case for case in CASES}


@dataclass(frozen=True)
class Result:
    """Loss, logits and the gradient of each parameter, by name."""

    loss: Tensor
    logits: Tensor
    grads: dict[str, Tensor]


def _world() -> Group:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _result(model: nn.Module, loss: Tensor, logits: Tensor) -> Result:
    grads = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
    return Result(loss.detach(), logits.detach(), grads)


def _alone(case: Case, batch: dict[str, Tensor]) -> Result:
    model = case.model()
    # With a cache, Transformers does not look for documents.
    out = model(**batch, use_cache=False)
    out.loss.backward()
    return _result(model, out.loss, out.logits)


def _shared(
    case: Case, batch: dict[str, Tensor], prepare: Callable[[Any], None] | None = None
) -> Result:
    ring.register()
    context = ContextParallel(group=_world(), layout=case.layout)
    model: Any = case.model(attention=ring.ATTENTION)
    if prepare is not None:
        prepare(model)
    shards = ring.shard_batch(batch, model=model, context=context)
    out = model(**shards)
    out.loss.backward()
    context.reduce_gradients(model)
    logits = shards[ring.ATTENTION].unshard(out.logits)
    return _result(model, context.sum(out.loss), logits)


def _assert_equal(actual: Result, expected: Result, *, real: Tensor | None = None) -> None:
    assert_close(actual.loss, expected.loss)
    kept = slice(None) if real is None else real.bool()
    assert_close(actual.logits[kept], expected.logits[kept], scale=ROUNDINGS)
    assert actual.grads.keys() == expected.grads.keys()
    for name, grad in actual.grads.items():
        assert grad.shape == expected.grads[name].shape, name
        assert_close(grad, expected.grads[name], scale=ROUNDINGS)


def _compare(case: Case) -> None:
    batch = case.batch()
    _assert_equal(_shared(case, batch), _alone(case, batch), real=batch.get("attention_mask"))


@pytest.mark.proves("Hugging Face models, windows and packed batches", on="CPU/gloo")
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_logits_and_every_gradient_equal_one_process(case: Case, world_size: int) -> None:
    run_ranks(world_size, _compare, case)


def _pack() -> None:
    case = BY_NAME["mistral-window-packed"]
    documents = torch.randint(1, 61, (sum(DOCS),)).split(DOCS)
    collator: Any = transformers.DataCollatorWithFlattening
    batch = collator(return_flash_attn_kwargs=True)(
        [{"input_ids": document.tolist()} for document in documents]
    )
    shared = _shared(case, batch)

    model = case.model()
    num_targets = sum(len(document) - 1 for document in documents)
    losses, logits = [], []
    for document in documents:
        row = document[None]
        out = model(input_ids=row, labels=row, num_items_in_batch=num_targets)
        out.loss.backward()
        losses.append(out.loss)
        logits.append(out.logits)
    _assert_equal(shared, _result(model, torch.stack(losses).sum(), torch.cat(logits, dim=1)))


def test_packed_documents_equal_separate_ones() -> None:
    run_ranks(2, _pack)


def _mask_labels() -> None:
    case = BY_NAME["llama-mqa-contiguous"]
    batch = case.batch()
    # All that is left belongs to rank 0.
    batch["labels"][:, 4:] = -100
    _assert_equal(_shared(case, batch), _alone(case, batch))


def test_a_rank_without_labels_adds_nothing_and_is_not_nan() -> None:
    run_ranks(2, _mask_labels)


def _recompute() -> None:
    case = BY_NAME["qwen2-full-and-window"]
    batch = case.batch()

    def prepare(model: Any) -> None:
        model.train()
        model.activation_checkpointing_enable()

    _assert_equal(_shared(case, batch, prepare), _alone(case, batch))


def test_gradient_checkpointing_finds_the_sequence_again() -> None:
    run_ranks(2, _recompute)


def _train(case: Case) -> None:
    ring.register()
    context = ContextParallel(group=_world())
    losses: list[list[float]] = []
    for attention in ("sdpa", ring.ATTENTION):
        model = case.model(attention=attention)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses.append([])
        for step in range(4):
            torch.manual_seed(step)
            tokens = torch.randint(1, 61, (1, 30))
            batch: dict[str, Any] = {"input_ids": tokens, "labels": tokens}
            if attention == ring.ATTENTION:
                batch = ring.shard_batch(batch, model=model, context=context)
            loss = model(**batch).loss
            loss.backward()
            if attention == ring.ATTENTION:
                context.reduce_gradients(model)
                loss = context.sum(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)


def test_training_goes_the_way_of_one_process() -> None:
    run_ranks(2, _train, BY_NAME["mistral-window"])


def _train_in_engine(engine: str) -> None:
    ring.register()
    case, batch = BY_NAME["mistral-window"], BY_NAME["mistral-window"].batch()
    context = ContextParallel(group=_world())
    model: Any = case.model(attention=ring.ATTENTION)
    if engine == "fsdp":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    inner, model = model, DistributedDataParallel(model) if engine == "ddp" else model
    shards = ring.shard_batch(
        batch, model=model, context=context, averaged_over=dist.get_world_size()
    )
    out = model(**shards)
    out.loss.backward()
    if engine == "fsdp":
        with pytest.raises(LayoutError, match="leave out reduce_gradients"):
            context.reduce_gradients(model)
    alone = _alone(case, batch)
    assert_close(context.sum(out.loss) / dist.get_world_size(), alone.loss)
    for name, parameter in inner.named_parameters():
        assert_close(whole(parameter.grad), alone.grads[name], scale=ROUNDINGS)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_engines_that_average_give_the_same_gradients(engine: str) -> None:
    run_ranks(2, _train_in_engine, engine)


def _count_bytes() -> int:
    ring.register()
    case, context = (
        Case("llama-gqa", rows=1, seq_len=24),
        ContextParallel(group=_world(), schedule="one_way"),
    )
    model = case.model(attention=ring.ATTENTION)
    shards = ring.shard_batch(case.batch(), model=model, context=context)
    with record_traffic() as ledger, torch.no_grad():
        model(**shards)
    return ledger.moved_bytes


def test_keys_and_values_travel_unexpanded() -> None:
    num_layers, local_tokens, kv_heads, head_dim, fp32_bytes = 2, 12, 2, 4, 4
    one_way = num_layers * 2 * local_tokens * kv_heads * head_dim * fp32_bytes
    assert all(moved <= one_way for moved in run_ranks(2, _count_bytes))


def _differ() -> None:
    ring.register()
    case = BY_NAME["llama-gqa"]
    batch = case.batch()
    batch["input_ids"][1, 3] += dist.get_rank()
    model = case.model(attention=ring.ATTENTION)
    ring.shard_batch(batch, model=model, context=ContextParallel(group=_world()))


def test_ranks_with_batches_of_their_own_are_told_so() -> None:
    with pytest.raises(RankError, match=r"this batch .* differs between them"):
        run_ranks(2, _differ)


# From here on, one rank in this process: refusals come before anything moves.


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
        ({"attention_mask": torch.ones(2, 1, 22, 22)}, "attention_mask of shape"),
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
        ({"position_ids": torch.zeros(3, 2, 22, dtype=torch.int64)}, "position_ids of shape"),
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
        ({"pixel_values": torch.zeros(1)}, "pixel_values in the batch"),
        ({"inputs_embeds": torch.zeros(2, 22, 24)}, "either input_ids or inputs_embeds"),
    ],
)
def test_refuses_a_batch(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _sharded(batch=BY_NAME["llama-gqa"].batch() | change)


def test_refuses_cu_seq_lens_that_end_elsewhere() -> None:
    borders = torch.tensor([0, 5, 21])
    batch = BY_NAME["llama-gqa"].batch() | {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
    with pytest.raises(LayoutError, match="22"):
        _sharded(batch=batch)


LLAMA4 = {"attention_chunk_size": 4, "head_dim": 8, "num_local_experts": 2}
GEMMA2 = {"attn_logit_softcapping": 30.0, "head_dim": 8}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("Llama4Text", LLAMA4, "chunked"),
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


def test_refuses_to_go_on_from_a_cache() -> None:
    model, shards = _sharded()
    # A model of its own fills the cache.
    cache = BY_NAME["llama-gqa"].model()(shards["input_ids"], use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="key/value cache"):
        model(**shards | {"past_key_values": cache})


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
