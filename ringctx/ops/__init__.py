"""The maths of one device: no ranks, no process groups, no files."""

from ringctx.ops.lightning import lightning_attention, lightning_step

__all__ = ["lightning_attention", "lightning_step"]
