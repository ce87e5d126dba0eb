"""Models of Hugging Face Transformers over ranks: loss and gradients of one process."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ringctx.errors import LayoutError
from ringctx.parallel import transformers as ring
from ringctx.parallel.comm import Group, record_traffic
from ringctx.parallel.context import ContextParallel
from ringctx.parallel.model_states import whole
from tests.ranks import run_ranks
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
    setting, batch = BY_NAME["mistral-window"], BY_NAME["mistral-window"].batch()
    context = ContextParallel(group=_world())
    inner: Any = setting.model(attention=ring.ATTENTION)
    model: Any = inner
    match engine:
        case "ddp":
            model = DistributedDataParallel(inner)
        case "fsdp2":
            for layer in inner.model.layers:
                fully_shard(layer)
            fully_shard(inner)
        case "fsdp1":
            model = FullyShardedDataParallel(
                inner, device_id=torch.device("cpu"), use_orig_params=True
            )
    shards = ring.shard_batch(
        batch, model=model, context=context, averaged_over=dist.get_world_size()
    )
    out = model(**shards)
    out.loss.backward()
    with pytest.raises(LayoutError, match="leave out reduce_gradients"):
        context.reduce_gradients(model)
    alone = _alone(setting, batch)
    assert_close(context.sum(out.loss) / dist.get_world_size(), alone.loss)
    full = (
        FullyShardedDataParallel.summon_full_params(model, with_grads=True)
        if engine == "fsdp1"
        else nullcontext()
    )
    with full:
        for name, parameter in inner.named_parameters():
            assert_close(whole(parameter.grad), alone.grads[name], scale=ROUNDINGS)


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2"])
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


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _number_by_hand(family: str) -> None:
    case = Case("positions", family, {"is_decoder": True} | NO_DROPOUT)
    # As the model itself would number them.
    places = torch.arange(1, 1 + case.seq_len)[None]
    batch = case.batch()
    results = _shared(case, batch | {"position_ids": places}), _alone(case, batch)
    for result in results:
        for name in [name for name in result.grads if name.endswith("key.bias")]:
            # Softmax takes no notice of what all scores of a query share: 0, but for roundings.
            assert result.grads.pop(name).abs().max() < 1e-8
    _assert_equal(*results)


@pytest.mark.parametrize("family", ["Roberta", "Camembert", "XLMRoberta"])
def test_positions_that_begin_after_the_padding_index_may_be_given(family: str) -> None:
    run_ranks(2, _number_by_hand, family)


OTHERS: dict[str, Any] = {
    "input_ids": torch.arange(22)[None],
    "labels": torch.arange(22)[None],
    "shift_labels": torch.arange(22)[None],
    "attention_mask": torch.ones(1, 22, dtype=torch.int64),
    "position_ids": torch.arange(22)[None],
    "inputs_embeds": torch.linspace(0, 1, 22 * 24).view(1, 22, 24),
    "cu_seq_lens_q": torch.tensor([0, 8, 22], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 8, 22], dtype=torch.int32),
}


def _differ(how: str) -> None:
    ring.register()
    embeds = "input_ids" if how == "inputs_embeds" else "inputs_embeds"
    batch = {name: x.clone() for name, x in OTHERS.items() if name != embeds}
    settings: dict[str, Any] = {"num_targets": 21, "averaged_over": 2}
    if dist.get_rank() == 1:
        match how:
            case "num_targets" | "averaged_over":
                settings[how] += 1
            case "inputs_embeds":
                # One rounding of one number.
                x = batch[how]
                x[0, 7, 3] = x[0, 7, 3].nextafter(torch.tensor(2.0))
            case "a list":
                batch["labels"] = batch["labels"].tolist()
            case _:
                batch[how].view(-1)[1] += 1
    model = BY_NAME["llama-gqa"].model(attention=ring.ATTENTION)
    context = ContextParallel(group=_world())
    with pytest.raises(LayoutError, match=r"this batch .* differs between them"):
        ring.shard_batch(batch, model=model, context=context, **settings)


def _differ_each() -> None:
    for how in (*OTHERS, "num_targets", "averaged_over", "a list"):
        _differ(how)


def test_ranks_with_batches_of_their_own_are_told_so() -> None:
    run_ranks(2, _differ_each)


def _embeddings_alone() -> None:
    ring.register()
    model, embeds = BY_NAME["llama-gqa"].model(attention=ring.ATTENTION), OTHERS["inputs_embeds"]
    context = ContextParallel(group=_world())
    shards = ring.shard_batch({"inputs_embeds": embeds}, model=model, context=context)
    logits = shards[ring.ATTENTION].unshard(model(**shards).logits)
    expected = BY_NAME["llama-gqa"].model()(inputs_embeds=embeds).logits
    assert_close(logits, expected.detach(), scale=ROUNDINGS)


def test_embeddings_need_no_labels() -> None:
    run_ranks(2, _embeddings_alone)
