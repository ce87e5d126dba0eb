"""What a model of Transformers asks of its attention, held against what ranks can do exactly.

One idea: refuse what is not known to be harmless. Models differ by what they hand to their
attention, by a few settings, and by modules that mix tokens outside of it; each has its check, and
an argument or a kind of layer that nobody has thought of here is refused by name.
"""

import importlib
from typing import Any

from torch import Tensor, nn

from ringctx.errors import ConfigError

__all__ = ["ATTENTION", "check_call", "check_config", "check_loss", "check_model", "refusal"]

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


def check_loss(model: nn.Module) -> None:
    """Raise ConfigError unless the model's own loss is the one that knows `shift_labels`."""
    known = importlib.import_module("transformers.loss.loss_utils").ForCausalLMLoss
    outermost = next(module for module in model.modules() if hasattr(module, "config"))
    if getattr(outermost, "loss_function", None) is not known:
        raise refusal(
            "labels for a model without the causal language model loss of Transformers; leave out "
            "the labels and use ringctx.parallel.scale_loss on its logits"
        )


def refusal(what: str) -> ConfigError:
    """The error for what cannot be exact."""
    return ConfigError(f"not supported with context parallelism: {what}")
