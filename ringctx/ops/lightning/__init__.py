"""Linear attention with decay, on one device: `lightning_attention` and `lightning_step`."""

from ringctx.ops.lightning.attention import lightning_attention, lightning_step

__all__ = ["lightning_attention", "lightning_step"]
