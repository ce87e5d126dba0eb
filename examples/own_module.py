"""A model of your own over two processes: `torchrun --nproc-per-node 2 examples/own_module.py`.

A small model in plain torch, with full and sliding-window layers, trained on packed documents whose
length does not divide. Attention calls `sequence.attend`, positions and loss are told about the
whole sequence; nothing else differs from the model on one process. The script trains both side by
side and compares losses and, at the first step, every gradient.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ringctx.parallel.comm import Group, SoloGroup
from ringctx.parallel.context import ContextParallel, SharedSequence, next_tokens, scale_loss

VOCAB, DIM, HEADS, KV_HEADS, HEAD_DIM = 64, 64, 4, 2, 16
WINDOWS = (None, 32)
DOCS = (70, 3, 101, 33)
STEPS = 8


class Attention(nn.Module):
    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.qkv = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, DIM)

    def forward(self, x: Tensor, sequence: SharedSequence) -> Tensor:
        # [B, T, (H + 2 Hkv) * D] -> [B, T, H or Hkv, D]
        heads = self.qkv(x).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        q, k = rotate(q, sequence.positions), rotate(k, sequence.positions)
        # The one line that changes: F.scaled_dot_product_attention stood here.
        out = sequence.attend(q, k, v, window=self.window)
        mixed: Tensor = self.out(out.flatten(-2))
        return mixed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.attention = nn.ModuleList(Attention(window) for window in WINDOWS)
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
            for _ in WINDOWS
        )
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2 * len(WINDOWS)))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor, sequence: SharedSequence) -> Tensor:
        x = self.embed(tokens)
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(self.norms[2 * i](x), sequence)
            x = x + mlp(self.norms[2 * i + 1](x))
        logits: Tensor = self.head(x)
        return logits


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE over `[B, T, H, D]`."""
    exponents = torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM
    angles = (positions[:, None] * 10_000.0**-exponents)[:, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def documents(step: int) -> tuple[Tensor, Tensor]:
    """Rows that can be learned (each token is the last plus 1, 2 or 3), and their borders."""
    generator = torch.Generator().manual_seed(step)
    steps = torch.randint(1, 4, (1, sum(DOCS)), generator=generator)
    borders = torch.tensor([0, *DOCS]).cumsum(0).int()
    return steps.cumsum(1) % VOCAB, borders


class Run:
    """A model and how its batches are shared: over a group, or alone."""

    def __init__(self, group: Group) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.context = ContextParallel(group=group)

    def backward(self, step: int) -> Tensor:
        """Gradients of one step; returns the mean loss over all ranks."""
        tokens, borders = documents(step)
        targets = next_tokens(tokens, cu_seqlens=borders)
        self.context.check_same(tokens=tokens)

        sequence = self.context.sequence(tokens.shape[1], cu_seqlens=borders)
        logits = self.model(sequence.shard(tokens), sequence)
        loss_sum = F.cross_entropy(
            logits.flatten(0, 1), sequence.shard(targets, pad=-100).flatten(), reduction="sum"
        )
        loss = scale_loss(loss_sum, num_targets=(targets != -100).sum())
        loss.backward()
        self.context.reduce_gradients(self.model)
        return self.context.sum(loss)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Of any gradient, relative to its largest entry."""
    largest = 0.0
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        error = (mine.grad - theirs.grad).abs().max() / theirs.grad.abs().max()
        largest = max(largest, error.item())
    return largest


def main() -> int:
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None, "start with torchrun"
    shared, alone = Run(dist.group.WORLD), Run(SoloGroup())
    speak = dist.get_rank() == 0
    if speak:
        sequence = shared.context.sequence(sum(DOCS))
        print(
            f"{sequence.seq_len} tokens in {len(DOCS)} documents over {dist.get_world_size()} "
            f"ranks: {sequence.local_len} tokens each, {sequence.padded_len - sequence.seq_len} of "
            f"padding\n\n  step   loss over ranks   loss of one process"
        )
    worst = 0.0
    for step in range(STEPS):
        losses = [run.backward(step).item() for run in (shared, alone)]
        if step == 0:
            worst = largest_difference(shared.model, alone.model)
        for run in (shared, alone):
            run.update()
        if speak:
            print(f"  {step:4}   {losses[0]:15.6f}   {losses[1]:19.6f}")
        worst = max(worst, abs(losses[0] - losses[1]) / losses[1])
    if speak:
        print(f"\nlargest difference of a loss or of a first gradient: {worst:.1e} of its size")
    dist.barrier()
    dist.destroy_process_group()
    return 0 if worst < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
