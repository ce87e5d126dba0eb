"""Hugging Face models over two processes: `torchrun --nproc-per-node 2 examples/hugging_face.py`.

A small Llama on packed documents and a small Mistral with a sliding window, both from their config
classes with random weights. Each is trained over the ranks and, beside it, on one process with
Transformers' own attention; losses and, at the first step, every gradient are compared.
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ringctx.parallel import transformers as ring
from ringctx.parallel.comm import record_traffic
from ringctx.parallel.context import ContextParallel

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
DOCS = (150, 7, 300, 44)
STEPS = 6


def llama() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**SIZES))
    return model


def mistral() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=64))
    return model


def packed(step: int) -> dict[str, Tensor]:
    """One row of documents: positions begin again with each, as Transformers has it."""
    batch = rows(step, num_rows=1, seq_len=sum(DOCS))
    batch["position_ids"] = torch.cat([torch.arange(length) for length in DOCS])[None]
    # The first token of a document is no target of the document before it.
    batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, -100)
    return batch


def rows(step: int, *, num_rows: int = 2, seq_len: int = 401) -> dict[str, Tensor]:
    """Rows that can be learned: each token is the last plus 1, 2 or 3."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, 4, (num_rows, seq_len), generator=generator).cumsum(1) % 128
    return {"input_ids": tokens, "labels": tokens}


def train(name: str, make_model: Any, make_batch: Any) -> float:
    """Train both ways; returns the largest relative difference."""
    context = ContextParallel(group=dist.group.WORLD)  # type: ignore[arg-type]
    alone, shared = make_model(), make_model()
    shared.set_attn_implementation("ringctx")
    optimizers = [torch.optim.AdamW(model.parameters(), lr=5e-3) for model in (alone, shared)]
    say(f"{name}\n  step   loss over ranks   loss of one process   sent by rank 0")
    worst = 0.0
    for step in range(STEPS):
        batch = make_batch(step)
        # Without use_cache=False, Transformers would not look for documents.
        expected = alone(**batch, use_cache=False).loss
        expected.backward()

        with record_traffic() as traffic:
            loss = shared(**ring.shard_batch(batch, model=shared, context=context)).loss
            loss.backward()
        context.reduce_gradients(shared)
        loss = context.sum(loss)

        if step == 0:
            worst = largest_difference(shared, alone)
        worst = max(worst, ((loss - expected.detach()).abs() / expected.detach()).item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        moved = f"{traffic.moved_bytes / 1024:,.0f} KiB"
        say(f"  {step:4}   {loss.item():15.6f}   {expected.item():19.6f}   {moved:>14}")
    say(f"  largest difference of a loss or of a first gradient: {worst:.1e} of its size\n")
    return worst


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Of any gradient, relative to its largest entry."""
    largest = 0.0
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        error = (mine.grad - theirs.grad).abs().max() / theirs.grad.abs().max()
        largest = max(largest, error.item())
    return largest


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def main() -> int:
    dist.init_process_group("gloo")
    ring.register()
    worst = max(
        train("Llama, four documents of 501 tokens in one row", llama, packed),
        train("Mistral, window of 64, two rows of 401 tokens", mistral, rows),
    )
    dist.barrier()
    dist.destroy_process_group()
    return 0 if worst < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
