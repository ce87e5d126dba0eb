"""Context parallelism for a module of your own: say what the ranks share, and attend over it.

One idea: only attention and the loss look beyond one token, so a model becomes parallel over tokens
when each rank gets its shard of the batch and those two are told about the rest. Everything else
that goes wrong silently in such runs has one place here:

    padding       a length that does not divide grows at the end; no real token sees what is added
    documents     their borders count in the whole sequence, whatever a shard holds of them
    positions     of a token in its row, not in its shard
    targets       shifted in the whole sequence, before it is cut
    loss          sum over ranks / targets of all ranks; a rank without targets adds 0, not NaN
    gradients     summed over the ranks that share a sequence, in fp32

`ringctx.parallel.transformers` does the same for models of Hugging Face Transformers.
Shapes: B batch, S tokens of the whole sequence, T local tokens, H heads, Hkv key/value heads, D
head dim.
"""

import zlib
from collections.abc import Iterable
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringctx.config import TopologyConfig
from ringctx.errors import LayoutError
from ringctx.ops.losses import IGNORE_INDEX
from ringctx.parallel import comm
from ringctx.parallel.gradients import sum_gradients
from ringctx.parallel.layout import check_layout, positions, shard, unshard
from ringctx.parallel.mask import Mask
from ringctx.parallel.padding import pad_cu_seqlens, pad_to_layout, padded_len, unpad
from ringctx.parallel.ring_attention import ring_attention, wiring_of
from ringctx.parallel.ways import check_schedule

__all__ = ["ContextParallel", "SharedSequence", "next_tokens", "scale_loss"]


class Spread(TypedDict):
    """Over how many ranks, and which tokens go where."""

    world_size: int
    layout: str


class ContextParallel:
    """The ranks that share sequences, and how: one object for the whole run.

    Args:
        group: the ranks, in layout order; `comm.SoloGroup()` for one rank.
        layout: which tokens a rank holds: "contiguous", "zigzag" or "striped".
        schedule: what travels in attention; see `ring_attention`.
        topology: how the ranks are wired; None is one switch.

    Raises:
        LayoutError: if there is no such layout or schedule, the topology does not fit the group, or
            this rank is not in it.
    """

    # Not a dataclass: some wrappers of modules rebuild every dataclass among the arguments.
    def __init__(
        self,
        *,
        group: comm.Group,
        layout: str = "zigzag",
        schedule: str = "auto",
        topology: TopologyConfig | None = None,
    ) -> None:
        check_layout(layout)
        self.group = group
        self.rank, self.world_size = comm.group_rank(group), comm.group_size(group)
        check_schedule(schedule)
        wiring_of(group, topology)
        self.layout, self.schedule, self.topology = layout, schedule, topology

    @property
    def spread(self) -> Spread:
        """How a sequence is cut, as `shard` and its kin want it."""
        return {"world_size": self.world_size, "layout": self.layout}

    def sequence(self, seq_len: int, *, cu_seqlens: Tensor | None = None) -> "SharedSequence":
        """What the ranks share in one forward and backward.

        Args:
            seq_len: tokens of a whole row; any length, padded where the layout needs it.
            cu_seqlens: `[num_docs + 1]`, integers of any width from 0 to seq_len: where documents
                begin and end, in every row of the batch; None: a row is one document.

        Raises:
            LayoutError: if `cu_seqlens` is no integer tensor that rises from 0 to seq_len.
        """
        return SharedSequence(self, seq_len=seq_len, cu_seqlens=cu_seqlens)

    def check_same(self, **whole: Tensor | None) -> None:
        """Raise on all ranks unless all pass the same whole tensors, as by a seed of their own.

        Args:
            whole: tensors by name, compared bit by bit; what is None counts as not given. One small
                collective a call, which every rank enters whatever it was given.

        Raises:
            LayoutError: if names, dtypes, shapes or contents differ.
        """
        given = {name: x for name, x in sorted(whole.items()) if x is not None}
        if self.world_size == 1:
            return
        kinds = str([(name, x.dtype, tuple(x.shape)) for name, x in given.items()])
        sums = [torch.tensor(zlib.crc32(kinds.encode()))]
        sums += [_checksum(x).cpu() for x in given.values()]
        # Ranks may disagree on how many tensors there are, and where, so what travels has one
        # length and goes one way.
        own, group = _checksum(torch.stack(sums)), self._process_group()
        bounds = torch.stack((own, -own)).to(comm.message_device(group))
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
        highest, lowest = bounds.tolist()
        if highest != -lowest:
            raise LayoutError(
                "the ranks of a group share sequences, but this batch "
                f"({', '.join(given) or 'nothing'}) differs between them; "
                "seed and order the data alike on all ranks of the group"
            )

    def sum(self, x: Tensor) -> Tensor:
        """The sum of a small tensor over the ranks, without gradient: a loss to print."""
        total = x.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(total, group=self._process_group())
        return total

    def reduce_gradients(self, parameters: nn.Module | Iterable[nn.Parameter]) -> None:
        """Sum `.grad` over the ranks in place, after backward; every rank must call it.

        A parameter that got no gradient on any rank keeps none. Not for models under FSDP, nor
        under DDP over these ranks: those average gradients; pass `averaged_over` to `scale_loss`.

        Args:
            parameters: a module or its parameters, the same on every rank.

        Raises:
            LayoutError: if an engine has sharded or averaged the gradients over these ranks.
        """
        if self.world_size > 1:
            sum_gradients(parameters, group=self._process_group())

    def _process_group(self) -> dist.ProcessGroup:
        if not isinstance(self.group, dist.ProcessGroup):
            raise LayoutError(f"group={self.group!r} has no collectives; pass a process group")
        return self.group


class SharedSequence:
    """One sequence (and the other rows of its batch) cut over the ranks; made by `sequence`.

    Attributes:
        seq_len: tokens of a whole row, as given.
        padded_len: the same with padding at the end, divisible as the layout needs.
        local_len: tokens that this rank holds of it.
        positions: int64 `[T]` on the CPU: index in its row of each local token.
        cu_seqlens: int32 `[num_docs + 1]` on the CPU up to `padded_len`, padding a document of its
            own; None without documents.
    """

    def __init__(
        self, context: ContextParallel, *, seq_len: int, cu_seqlens: Tensor | None
    ) -> None:
        self.context = context
        self.seq_len = seq_len
        self.padded_len = padded_len(seq_len, **context.spread)
        self.local_len = self.padded_len // context.world_size
        self.positions = positions(self.padded_len, rank=context.rank, **context.spread)
        if cu_seqlens is not None:
            cu_seqlens = _as_borders(cu_seqlens)
            Mask.checked(causal=True, window=None, sinks=0, cu_seqlens=cu_seqlens, seq_len=seq_len)
            cu_seqlens = pad_cu_seqlens(cu_seqlens, seq_len=seq_len, **context.spread)
        self.cu_seqlens = cu_seqlens

    def shard(self, x: Tensor, *, dim: int = 1, pad: float = 0) -> Tensor:
        """This rank's tokens of a whole tensor. Differentiable.

        Args:
            x: `seq_len` long in `dim`; the same on every rank.
            dim: the token dimension.
            pad: what the tokens that are added at the end are.

        Raises:
            LayoutError: if `x` has another length.
        """
        if x.shape[dim] != self.seq_len:
            raise LayoutError(
                f"dim {dim} of a tensor of shape {tuple(x.shape)} has {x.shape[dim]:,} tokens; "
                f"this sequence has {self.seq_len:,}"
            )
        spread = self.context.spread
        padded, _ = pad_to_layout(x, **spread, dim=dim, value=pad)
        return shard(padded, rank=self.context.rank, **spread, dim=dim)

    def unshard(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """The whole tensor from every rank's shard, without padding and without gradient."""
        whole = unshard(x, group=self.context.group, layout=self.context.layout, dim=dim)
        return unpad(whole, seq_len=self.seq_len, dim=dim)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        window: int | None = None,
        sinks: int = 0,
        scale: float | None = None,
    ) -> Tensor:
        """Exact attention of the local queries over the whole sequence.

        Under autocast the inputs are cast as for `F.scaled_dot_product_attention`.

        Args:
            q: local queries, `[B, T, H, D]`.
            k: local keys, `[B, T, Hkv, D]`; Hkv divides H.
            v: local values, as k.
            causal: whether a token sees only itself and earlier tokens.
            window: a token sees itself and the `window - 1` before it; None: all.
            sinks: with a window, this many first tokens of a document stay visible.
            scale: factor on the scores; None is 1 / sqrt(D).

        Returns:
            `[B, T, H, D]`.

        Raises:
            LayoutError: if the tensors are not shards of this sequence.
        """
        if q.ndim == 4 and q.shape[1] != self.local_len:
            raise LayoutError(
                f"q has shape {tuple(q.shape)}, [B, T, H, D], and this rank holds "
                f"{self.local_len:,} of the sequence's {self.padded_len:,} tokens"
            )
        context, cu_seqlens = self.context, self.cu_seqlens
        if cu_seqlens is None and not causal:
            # Where later tokens are seen, the padding has to be a document of its own.
            cu_seqlens = pad_cu_seqlens(None, seq_len=self.seq_len, **context.spread)
        q, k, v = _as_autocast(q, k, v)
        return ring_attention(
            q,
            k,
            v,
            group=context.group,
            layout=context.layout,
            causal=causal,
            window=window,
            sinks=sinks,
            cu_seqlens=cu_seqlens,
            schedule=context.schedule,
            topology=context.topology,
            scale=scale,
        )

    def scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`attend` with the signature and the `[B, H, T, D]` layout of torch's function.

        Raises:
            LayoutError: for what would not be exact: a mask, dropout, or fewer key/value heads
                without `enable_gqa`.
        """
        if attn_mask is not None:
            raise LayoutError(
                "attn_mask describes a whole sequence and this rank holds a part of it; "
                "use is_causal, cu_seqlens of the sequence, or window and sinks of attend()"
            )
        if dropout_p:
            raise LayoutError(
                f"dropout_p={dropout_p} in attention is not supported: ranks would drop "
                "different scores; pass 0.0"
            )
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise LayoutError(
                f"query has {query.shape[1]} heads and key {key.shape[1]}; pass enable_gqa=True"
            )
        # [B, H, T, D] -> [B, T, H, D]
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return self.attend(q, k, v, causal=is_causal, scale=scale).transpose(1, 2)


def next_tokens(tokens: Tensor, *, cu_seqlens: Tensor | None = None) -> Tensor:
    """What each token should predict; to be sharded with `pad=IGNORE_INDEX`, like the tokens.

    Args:
        tokens: `[B, S]`, whole rows.
        cu_seqlens: where documents begin and end; the last token of each predicts nothing.

    Returns:
        `[B, S]`: the next token, or IGNORE_INDEX (-100).
    """
    targets = torch.full_like(tokens, IGNORE_INDEX)
    targets[:, :-1] = tokens[:, 1:]
    if cu_seqlens is not None:
        targets[:, (cu_seqlens[1:] - 1).long().to(tokens.device)] = IGNORE_INDEX
    return targets


def scale_loss(loss_sum: Tensor, *, num_targets: int | Tensor, averaged_over: int = 1) -> Tensor:
    """A rank's part of the mean loss: the sum over ranks is the mean of all targets.

    Args:
        loss_sum: sum of the losses of this rank's tokens; 0 where it has no target.
        num_targets: of the whole step: all ranks, all rows, all accumulated microbatches.
        averaged_over: ranks over which an engine averages gradients: 1 with `reduce_gradients`,
            the data-parallel world size (context-parallel ranks included) under DDP or FSDP.

    Raises:
        LayoutError: if there is no target at all.
    """
    if not num_targets:
        raise LayoutError("the step has no targets: every one is masked; leave the step out")
    return loss_sum * averaged_over / num_targets


def _as_borders(cu_seqlens: Tensor) -> Tensor:
    """Where documents begin and end, as attention wants it; no value changes on the way."""
    if not isinstance(cu_seqlens, Tensor):
        raise LayoutError(
            f"cu_seqlens is a {type(cu_seqlens).__name__}; pass an integer tensor: "
            "torch.tensor([0, ..., seq_len])"
        )
    kind = cu_seqlens.dtype
    if kind == torch.bool or kind.is_floating_point or kind.is_complex:
        raise LayoutError(f"cu_seqlens is {kind}; it must hold integers")
    borders = cu_seqlens.to("cpu", torch.int32)
    if not torch.equal(borders.long(), cu_seqlens.to("cpu", torch.int64)):
        most = torch.iinfo(torch.int32).max
        raise LayoutError(f"cu_seqlens holds values beyond int32, which ends at {most:,}")
    return borders


def _checksum(x: Tensor) -> Tensor:
    """An int64 that depends on every bit and its place; arithmetic wraps around."""
    x = x.detach().flatten()
    if x.is_floating_point():
        same_size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        x = x.contiguous().view(same_size[x.element_size()])
    place = torch.arange(1, x.numel() + 1, device=x.device)
    mixed = (x.long() + place) * (2 * place + 1) * 0x9E3779B97F4A7C1
    # Halved, so that it can be negated.
    return mixed.bitwise_xor(mixed >> 29).sum() >> 1


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
