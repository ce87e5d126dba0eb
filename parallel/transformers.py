"""Ring attention inside models of Hugging Face Transformers, exactly or not at all.

    transformers.register()
    model = LlamaForCausalLM(config)  # config: attn_implementation="ringctx"
    context = ContextParallel(group=group)
    loss = model(**transformers.shard_batch(batch, model=model, context=context)).loss
    loss.backward()
    context.reduce_gradients(model)

One idea: the batch brings its own context. `shard_batch` cuts input ids, positions and labels
(shifted first) down to this rank's tokens and adds the `SharedSequence` as a keyword argument,
which Transformers hands on from the model to every attention layer. So there is no global group,
recomputation in backward finds it in any thread, and two models in one process cannot mix. A layer
that does not get it raises; it never attends to its own shard alone.

What the ranks cannot do exactly is refused with a ConfigError before anything moves. The mask that
a model asks for is never built, but it is looked at: which parts it is made of, and whether its
window is the one that the layer names.
Source: the attention and mask interfaces of Transformers (`AttentionInterface`,
`AttentionMaskInterface`). Shapes: B batch, S tokens, T local tokens, H heads, D head dim.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ringctx.errors import ConfigError
from ringctx.ops.losses import IGNORE_INDEX
from ringctx.parallel.context import ContextParallel, SharedSequence, next_tokens
from ringctx.parallel.transformers_checks import (
    ATTENTION,
    check_batch,
    check_call,
    check_config,
    check_loss,
    check_model,
    check_positions,
    refusal,
)

__all__ = ["ATTENTION", "check_model", "register", "shard_batch"]

# Older ones hand other arguments to the mask interface.
_OLDEST = (5, 23)

# What causal, window and document masks are made of in transformers.masking_utils.
_MASK_PARTS = {
    "and_masks",
    "causal_mask_function",
    "sliding_window_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
}


class MaskNote:
    """Stands where a model expects its mask: what that mask would have been."""

    # Not a dataclass, for the same reason as ContextParallel.
    def __init__(self, *, window: int | None) -> None:
        self.window = window


def register() -> None:
    """Make `attn_implementation="ringctx"` known to Transformers; may be called again.

    Raises:
        ConfigError: if Transformers is missing or too old.
    """
    library = _library()
    library.AttentionInterface.register(ATTENTION, _attention)
    library.AttentionMaskInterface.register(ATTENTION, _note_mask)


def shard_batch(
    batch: Mapping[str, Any],
    *,
    model: nn.Module,
    context: ContextParallel,
    num_targets: int | Tensor | None = None,
    averaged_over: int = 1,
) -> dict[str, Any]:
    """This rank's part of a whole batch, as keyword arguments of `model`.

    Documents are packed as Transformers has it: where `position_ids` do not go up by one, or by
    `cu_seq_lens_q`. All rows must have the same ones. `attention_mask` may mark padding at the end.

    Args:
        batch: the whole batch, the same on every rank: `input_ids` `[B, S]` or `inputs_embeds`
            `[B, S, E]`; optional `labels` (not shifted, as always), `position_ids`,
            `attention_mask`, and what `DataCollatorWithFlattening` adds.
        model: will get the batch; may be wrapped.
        context: the ranks.
        num_targets: of the whole step, where it is more than this batch: accumulation, or data
            parallel groups with other batches.
        averaged_over: as in `scale_loss`.

    Returns:
        With labels, `model(**result).loss` is this rank's part: over all ranks they add up to the
        mean loss.
        The targets are in `shift_labels`; `labels` hold none, so that a model
        which does not know `shift_labels` returns 0 and not a wrong loss. `result["ringctx"]` is
        the SharedSequence, to put together what comes out.

    Raises:
        ConfigError: if model or batch need something that cannot be exact.
        LayoutError: if the documents do not fit the batch, or ranks do not pass the same.
    """
    check_model(model)
    # First of all that looks at the batch, so that no rank is left waiting in it.
    _check_same(batch, context, num_targets=num_targets, averaged_over=averaged_over)
    check_batch(batch)
    if batch.get("position_ids") is None:
        check_positions(model)
    inputs = "input_ids" if batch.get("input_ids") is not None else "inputs_embeds"
    whole = batch[inputs]
    num_rows, seq_len = whole.shape[:2]
    places = _position_ids(batch, num_rows=num_rows, seq_len=seq_len, device=whole.device)
    _check_padding(batch, places)
    sequence = context.sequence(seq_len, cu_seqlens=_documents(batch, places))
    result = {
        inputs: sequence.shard(whole),
        "position_ids": sequence.shard(places),
        "use_cache": False,
        ATTENTION: sequence,
    }
    targets = _targets(batch)
    if targets is not None:
        check_loss(model)
        if num_targets is None:
            num_targets = int((targets != IGNORE_INDEX).sum())
        if not num_targets:
            raise ConfigError("the batch has no targets: every label is -100; leave it out")
        local = sequence.shard(targets, pad=IGNORE_INDEX)
        result["labels"] = torch.full_like(local, IGNORE_INDEX)
        result["shift_labels"] = local
        result["num_items_in_batch"] = num_targets / averaged_over
    return result


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What Transformers calls in each layer: `[B, H, T, D]` in, `[B, T, H, D]` out."""
    sequence = kwargs.pop(ATTENTION, None)
    if not isinstance(sequence, SharedSequence):
        raise ConfigError(
            f"attention {ATTENTION!r} of {type(module).__name__} was called without a sequence: "
            "call the model with the result of shard_batch. If you did, this model does not hand "
            "keyword arguments on to its attention layers and is not supported"
        )
    check_config(getattr(module, "config", None))
    check_call(module, query, key, value, dropout=dropout, arguments=kwargs)
    _check_mask(attention_mask, window=sliding_window)
    # [B, H, T, D] -> [B, T, H, D]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return sequence.attend(q, k, v, window=sliding_window, scale=scaling), None


def _note_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **_: Any,
) -> MaskNote:
    """What Transformers calls, once a forward and kind of layer, to build a mask."""
    if attention_mask is not None:
        raise refusal("attention_mask next to sharded inputs; leave it to shard_batch")
    if kv_length != q_length:
        raise refusal("a key/value cache")
    for part in _parts(mask_function):
        if part not in _MASK_PARTS:
            raise refusal(f"a mask with {part}")
    return MaskNote(window=local_size)


def _parts(mask_function: Callable[..., Any]) -> Iterator[str]:
    """Names of the functions that a mask is made of; it is a tree of closures."""
    yield mask_function.__qualname__.partition(".")[0]
    for cell in getattr(mask_function, "__closure__", None) or ():
        held = cell.cell_contents
        for part in held if isinstance(held, tuple) else (held,):
            if callable(part):
                yield from _parts(part)


def _check_mask(attention_mask: object, *, window: int | None) -> None:
    if attention_mask is None:
        return
    if not isinstance(attention_mask, MaskNote):
        raise refusal("an attention_mask that the model or its caller made")
    if attention_mask.window != window:
        raise refusal(
            f"a layer whose mask has a window of {attention_mask.window} and which asks its "
            f"attention for {window}"
        )


def _check_same(
    batch: Mapping[str, Any],
    context: ContextParallel,
    *,
    num_targets: int | Tensor | None,
    averaged_over: int,
) -> None:
    """The likeliest mistake: a data loader that gives every rank rows of its own."""
    compared = {name: x for name, x in batch.items() if isinstance(x, Tensor)}
    compared["averaged_over"] = torch.as_tensor(averaged_over)
    if num_targets is not None:
        compared["num_targets"] = torch.as_tensor(num_targets)
    context.check_same(**compared)


def _position_ids(
    batch: Mapping[str, Any], *, num_rows: int, seq_len: int, device: torch.device
) -> Tensor:
    """Position ids of the whole batch, `[B, S]`."""
    given: Tensor | None = batch.get("position_ids")
    if given is None:
        given = torch.arange(seq_len, device=device)[None]
    return given.expand(num_rows, -1)


def _check_padding(batch: Mapping[str, Any], places: Tensor) -> None:
    """Padding at the end is seen by nobody; elsewhere it is."""
    mask: Tensor | None = batch.get("attention_mask")
    if mask is None:
        return
    kept = mask.bool()
    if (kept[:, 1:] & ~kept[:, :-1]).any():
        raise refusal(
            "padding at the left or in the middle (attention_mask); pad at the right, or pack "
            "documents with position_ids"
        )
    labels: Tensor | None = batch.get("labels")
    if labels is not None and (labels[~kept] != IGNORE_INDEX).any():
        raise refusal("labels where attention_mask is 0; set them to -100")
    if batch.get("cu_seq_lens_q") is not None or (places.diff() != 1).any():
        raise refusal(
            "documents together with attention_mask: Transformers itself ignores them then; leave "
            "out attention_mask"
        )


def _documents(batch: Mapping[str, Any], places: Tensor) -> Tensor | None:
    """Where documents begin and end in every row; None if a row is one document."""
    starts = places.diff() != 1
    if (starts != starts[:1]).any():
        raise refusal(
            "rows that pack different documents; put them into one row: "
            "input_ids.reshape(1, -1), and labels and position_ids likewise"
        )
    seq_len = places.shape[1]
    borders = [0, *(starts[0].nonzero()[:, 0] + 1).tolist(), seq_len]
    of_queries, of_keys = (
        None if batch.get(name) is None else batch[name].tolist()
        for name in ("cu_seq_lens_q", "cu_seq_lens_k")
    )
    if of_queries != of_keys:
        raise refusal("cu_seq_lens_q that differs from cu_seq_lens_k")
    if of_queries is None:
        return torch.tensor(borders, dtype=torch.int32) if len(borders) > 2 else None
    if not set(borders[1:-1]) <= set(of_queries):
        raise ConfigError(
            f"position_ids begin documents at {borders[:-1]} and cu_seq_lens_q at "
            f"{of_queries[:-1]}; leave out one of the two"
        )
    borders_given: Tensor = batch["cu_seq_lens_q"]
    return borders_given


def _targets(batch: Mapping[str, Any]) -> Tensor | None:
    """Whole rows of what each token predicts, `[B, S]`."""
    shifted: Tensor | None = batch.get("shift_labels")
    if shifted is not None:
        return shifted
    labels: Tensor | None = batch.get("labels")
    return None if labels is None else next_tokens(labels)


def _library() -> ModuleType:
    try:
        library = importlib.import_module("transformers")
    except ImportError as missing:
        raise ConfigError(
            "ringctx.parallel.transformers needs Hugging Face Transformers: "
            "pip install 'ringctx[hf]'"
        ) from missing
    version: str = library.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise ConfigError(f"transformers {version} is too old; install {oldest} or newer")
    return library
