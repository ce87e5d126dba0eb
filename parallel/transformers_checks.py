"""What a model of Transformers asks of its attention, held against what ranks can do exactly.

One idea: refuse what is not known to be harmless. Models differ by what they hand to their
attention, by a few settings, and by modules that mix tokens outside of it; each has its check, and
an argument or a kind of layer that nobody has thought of here is refused by name.
"""

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ringctx.errors import ConfigError

__all__ = [
    "ATTENTION",
    "check_batch",
    "check_call",
    "check_config",
    "check_loss",
    "check_model",
    "check_positions",
    "refusal",
]

ATTENTION = "ringctx"
"""Name of the attention implementation, and of the argument that carries the sequence."""

# Entries of config.layer_types in which tokens meet in the registered attention, and only there.
_LAYER_TYPES = {"full_attention", "sliding_attention", "sparse", "dense", "moe"}

# Modules that carry a state along the tokens, by what their class names contain.
_MIXERS = ("Mamba", "Rwkv", "Recurrent", "Retention", "DeltaNet", "LinearAttention", "Lightning")

# Arguments of a layer's attention that do not change what it computes for a sharded batch.
_HARMLESS = {
    "cache_position",
    "is_causal",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "shift_labels",
}
_REFUSED = {
    "softcap": "a soft cap on the scores (attn_logit_softcapping)",
    "s_aux": "learned attention sinks (s_aux)",
    "sinks": "learned attention sinks",
    "position_bias": "a bias on the scores (position_bias)",
    "head_mask": "head_mask",
    "output_attentions": "output_attentions: the weights are never built",
    "output_router_logits": "output_router_logits: the router's loss would be a shard's",
    "use_cache": "a key/value cache (use_cache=True)",
    "cache": "a key/value cache",
    "past_key_value": "a key/value cache",
    "past_key_values": "a key/value cache",
    "indices": "sparse attention (indices)",
    "block_indices": "sparse attention (block_indices)",
}

# What shard_batch takes.
_BATCH = {
    "input_ids",
    "inputs_embeds",
    "position_ids",
    "attention_mask",
    "labels",
    "shift_labels",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}

# Each with [B, S], of which position_ids may leave out the rows.
_BY_TOKEN = ("input_ids", "position_ids", "attention_mask", "labels", "shift_labels")


def check_model(model: nn.Module) -> None:
    """Raise ConfigError unless every layer that mixes tokens does so in the registered attention.

    Args:
        model: a model of Transformers, perhaps inside wrappers (DDP, FSDP, a compiled module).
    """
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    if not configs:
        raise ConfigError(f"{type(model).__name__} holds no model of Transformers")
    for config in configs:
        check_config(config)
        chosen = getattr(config, "_attn_implementation", ATTENTION)
        if chosen != ATTENTION:
            raise ConfigError(
                f"attention of {type(config).__name__} is {chosen!r}: each rank would attend only "
                f"within its shard; call model.set_attn_implementation({ATTENTION!r})"
            )
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.Conv1d | nn.RNNBase) or any(x in kind for x in _MIXERS):
            raise refusal(f"{name} ({kind}), which mixes tokens outside of attention")
        # Without it, a model keeps attention code of its own whatever its config says.
        if not getattr(module, "_supports_attention_backend", True):
            raise refusal(f"{kind}, which does not use the attention interface of Transformers")


def check_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float,
    arguments: dict[str, Any],
) -> None:
    """Raise ConfigError unless a layer's call can be exact.

    Args:
        module: the layer's attention.
        query: `[B, H, T, D]`.
        key: `[B, Hkv, T, D]`.
        value: as key.
        dropout: on the weights; 0 outside of training.
        arguments: all others that the layer passes, by name.
    """
    is_causal = arguments.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise refusal("attention that is not causal, or across two sequences (is_causal=False)")
    if dropout:
        raise refusal(
            f"dropout in attention (attention_dropout={dropout}); set it to 0 in the config"
        )
    for name, setting in arguments.items():
        if setting is None or setting is False or name in _HARMLESS:
            continue
        raise refusal(_REFUSED.get(name, f"the argument {name!r} to attention"))
    if key.shape[2] != query.shape[2]:
        raise refusal("a key/value cache, or attention across two sequences")
    if value.shape[3] != query.shape[3]:
        raise refusal(
            f"values of head dim {value.shape[3]} beside queries of head dim {query.shape[3]}"
        )


def check_config(config: Any) -> None:
    """Raise ConfigError if a setting of the model's configuration cannot be exact on shards."""
    other = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if other:
        raise refusal(f"layers of type {', '.join(sorted(other))}")
    if getattr(config, "attention_chunk_size", None) is not None:
        raise refusal("chunked attention (attention_chunk_size)")
    if getattr(config, "attn_temperature_tuning", False):
        raise refusal(
            "queries scaled by their position, which this model counts within the shard "
            "(attn_temperature_tuning)"
        )
    if getattr(config, "output_router_logits", False):
        raise refusal(_REFUSED["output_router_logits"])
    if not getattr(config, "is_causal", True) or getattr(
        config, "use_bidirectional_attention", False
    ):
        raise refusal("attention that is not causal")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for kind in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if kind.get("rope_type") in ("dynamic", "longrope"):
            raise refusal(
                f"rope_type={kind['rope_type']!r}, whose angles follow the longest position at "
                "hand and so would differ between ranks"
            )


def check_positions(model: nn.Module) -> None:
    """Raise ConfigError if the model, left to itself, does not number its positions 0, 1, 2, ..."""
    for module in model.modules():
        # A method, or a function beside the class of the model or beside one that it derives from.
        places = [type(module), *(sys.modules.get(c.__module__) for c in type(module).__mro__)]
        if any(hasattr(place, "create_position_ids_from_input_ids") for place in places):
            raise refusal(
                f"{type(module).__name__} without position_ids in the batch: left to itself it "
                "counts from padding_idx + 1 and leaves out padding; give those of the whole batch"
            )


def check_loss(model: nn.Module) -> None:
    """Raise ConfigError unless the model's own loss is the one that knows `shift_labels`."""
    known = importlib.import_module("transformers.loss.loss_utils").ForCausalLMLoss
    outermost = next(module for module in model.modules() if hasattr(module, "config"))
    if getattr(outermost, "loss_function", None) is not known:
        raise refusal(
            "labels for a model without the causal language model loss of Transformers; leave out "
            "the labels and use ringctx.parallel.scale_loss on its logits"
        )


def check_batch(batch: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a whole batch holds what `shard_batch` knows, in fitting shapes."""
    given = {name for name, entry in batch.items() if entry is not None}
    if unknown := given - _BATCH:
        raise refusal(
            f"{', '.join(sorted(unknown))} in the batch; shard_batch knows "
            f"{', '.join(sorted(_BATCH))}"
        )
    if ("input_ids" in given) == ("inputs_embeds" in given):
        raise ConfigError("the batch must have either input_ids or inputs_embeds")
    _check_shapes(batch)


def refusal(what: str) -> ConfigError:
    """The error for what cannot be exact."""
    return ConfigError(f"not supported with context parallelism: {what}")


def _check_shapes(batch: Mapping[str, Any]) -> None:
    """Each of `_BY_TOKEN` says something about every token; embeddings have one dimension more."""
    given = {name: x for name, x in batch.items() if x is not None and not name.startswith("max_")}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ConfigError(f"{name} is a {type(x).__name__}; shard_batch takes tensors")
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if embeds is not None and embeds.ndim != 3:
        raise ConfigError(f"inputs_embeds has shape {list(embeds.shape)}; it must be [B, S, E]")
    if ids is not None and ids.ndim != 2:
        raise ConfigError(f"input_ids has shape {list(ids.shape)}; it must be [B, S]")
    rows, seq_len = given["inputs_embeds" if ids is None else "input_ids"].shape[:2]
    for name in _BY_TOKEN:
        shape = list(given[name].shape) if name in given else [rows, seq_len]
        one_row = name == "position_ids" and shape == [1, seq_len]
        if shape != [rows, seq_len] and not one_row:
            raise ConfigError(
                f"{name} has shape {shape}; it must be [B, S], here {[rows, seq_len]}"
            )
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in given and given[name].ndim != 1:
            raise ConfigError(f"{name} has shape {list(given[name].shape)}; it must be [docs + 1]")
