"""Lightning attention in your own model: `torchrun --nproc-per-node 2 examples/own_lightning.py`.

A small hybrid in plain torch, one layer linear in length and one with softmax, trained on packed
documents whose length does not divide. Both layers take the same shards, so nothing is moved
between them. The script trains it over the ranks and on one process and compares losses and, at the
first step, every gradient; then it prints what each layer sends as the sequence grows.
"""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ringctx.layers import rotary_table, rotate
from ringctx.lightning_layer import LightningAttention
from ringctx.parallel.comm import Group, SoloGroup, record_traffic
from ringctx.parallel.context import ContextParallel, SharedSequence, next_tokens, scale_loss

VOCAB, DIM, HEADS, HEAD_DIM = 64, 64, 4, 16
DOCS = (70, 3, 101, 33)
STEPS = 8
LENGTHS = (256, 1024, 4096)


class Softmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * HEADS * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, DIM)

    def forward(self, x: Tensor, sequence: SharedSequence) -> Tensor:
        # [B, T, 3 * H * D] -> 3 of [B, T, H, D]
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        rotary = rotary_table(sequence.positions, head_dim=HEAD_DIM, theta=1e4)
        mixed: Tensor = self.out(
            sequence.attend(rotate(q, rotary), rotate(k, rotary), v).flatten(2)
        )
        return mixed


class Lightning(nn.Module):
    def __init__(self, *, layer: int, num_layers: int) -> None:
        super().__init__()
        self.attention = LightningAttention(
            DIM, num_heads=HEADS, layer=layer, num_layers=num_layers, decay_style="data"
        )

    def forward(self, x: Tensor, sequence: SharedSequence) -> Tensor:
        # No positions: the decay tells near from far.
        context = sequence.context
        mixed: Tensor = self.attention(
            x, group=context.group, layout=context.layout, cu_seqlens=sequence.cu_seqlens
        )
        return mixed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.mixers = nn.ModuleList([Lightning(layer=0, num_layers=2), Softmax()])
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
            for _ in self.mixers
        )
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2 * len(self.mixers)))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor, sequence: SharedSequence) -> Tensor:
        x = self.embed(tokens)
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer(self.norms[2 * i](x), sequence)
            x = x + mlp(self.norms[2 * i + 1](x))
        logits: Tensor = self.head(x)
        return logits


def documents(step: int) -> tuple[Tensor, Tensor]:
    """Rows that can be learned (each token is the last plus 1, 2 or 3), and their borders."""
    generator = torch.Generator().manual_seed(step)
    steps = torch.randint(1, 4, (1, sum(DOCS)), generator=generator)
    return steps.cumsum(1) % VOCAB, torch.tensor([0, *DOCS]).cumsum(0).int()


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


def sent_bytes(mixer: nn.Module, context: ContextParallel, length: int) -> int:
    """What all ranks send in one layer, forward and backward, for a sequence of one document."""
    sequence = context.sequence(length)
    x = torch.randn(1, sequence.local_len, DIM, requires_grad=True)
    with record_traffic() as traffic:
        mixer(x, sequence).sum().backward()
    return int(context.sum(torch.tensor(float(traffic.moved_bytes))))


def main() -> int:
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None, "start with torchrun"
    shared, alone = Run(dist.group.WORLD), Run(SoloGroup())
    speak = dist.get_rank() == 0
    if speak:
        print(
            f"{sum(DOCS)} tokens in {len(DOCS)} documents over {dist.get_world_size()} ranks, a "
            "lightning and a softmax layer\n\n  step   loss over ranks   loss of one process"
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
        print("\nbytes between the ranks, forward and backward:")
        print("    tokens   lightning layer   softmax layer")
    for length in LENGTHS:
        linear, softmax = (
            sent_bytes(mixer, shared.context, length) for mixer in shared.model.mixers
        )
        if speak:
            print(f"  {length:8,}   {linear:15,}   {softmax:13,}")
    dist.barrier()
    dist.destroy_process_group()
    return 0 if worst < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
