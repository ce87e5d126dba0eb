"""What a model costs: parameters, and the FLOPs of a token and of a step.

Model FLOPs, not hardware FLOPs: forward and backward, nothing recomputed, padding not counted, and
of attention only the pairs that a mask leaves: 6 for each weight of a matrix product (the embedding
look-up is none), and 12 * H * D for each pair of a token and one that it sees, in every softmax
layer. A lightning layer writes each token into a state and reads it: 12 * H * D^2 a token, as much
as D pairs; that a chunk of tokens is computed pair by pair is a matter of the implementation.
Source: PaLM (arXiv 2204.02311), appendix B, but only visible keys count.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ringctx.config import ModelConfig
from ringctx.data import Step
from ringctx.data.balance import visible_pairs
from ringctx.mixers import sight

__all__ = ["flops_per_token", "parameter_count", "step_flops", "step_tokens"]


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model, embeddings included, with the mixers that the config names."""
    assert config.vocab_size is not None
    heads = 1 if config.tie_embeddings else 2
    embeddings = heads * config.vocab_size * config.dim
    blocks = sum(_block_parameters(config, layer) for layer in range(config.num_layers))
    return embeddings + config.dim + blocks


def flops_per_token(
    config: ModelConfig, *, seq_len: int, cu_seqlens: Sequence[int] | None = None
) -> float:
    """Model FLOPs of one token of a row, on average.

    Args:
        config: sizes, and the window of each layer.
        seq_len: tokens of a row.
        cu_seqlens: where the documents of a packed row begin, and its end; None: one document.
    """
    lengths = np.diff((0, seq_len) if cu_seqlens is None else cu_seqlens)
    pairs = _pairs(config, lengths, window=None)
    return _flops(config, tokens=1, pairs=pairs / max(1, int(lengths.sum())))


def step_flops(config: ModelConfig, step: Step) -> float:
    """Model FLOPs of a whole step, over all ranks: its documents and windows as they are."""
    pairs = _pairs(config, _document_lens(step), window=step.window)
    return _flops(config, tokens=step_tokens(step), pairs=pairs)


def step_tokens(step: Step) -> int:
    """Tokens of a step over all ranks, padding left out."""
    return int(_row_lens(step).sum())


def _row_lens(step: Step) -> NDArray[np.int64]:
    """Tokens of each row, padding left out."""
    if step.row_offsets is None:
        return np.full(step.num_rows, step.bucket_len)
    return np.diff(np.append(0, np.cumsum(step.pieces[:, 2]))[step.row_offsets])


def _document_lens(step: Step) -> NDArray[np.int64]:
    """Tokens of each stretch of a step whose tokens see one another."""
    return step.pieces[:, 2] if step.doc_mask else _row_lens(step)


def _flops(config: ModelConfig, *, tokens: int, pairs: float) -> float:
    """Of softmax pairs, over all layers, and of everything else that tokens cost."""
    assert config.vocab_size is not None
    blocks = sum(_block_matrices(config, layer) for layer in range(config.num_layers))
    matrices = blocks + config.vocab_size * config.dim
    lightning = sum(config.mixer(layer) == "L" for layer in range(config.num_layers))
    pairs += lightning * config.head_width * tokens
    return 6.0 * matrices * tokens + 12.0 * config.num_heads * config.head_width * pairs


def _pairs(config: ModelConfig, lengths: NDArray[np.int64], *, window: int | None) -> int:
    """Pairs of a token and one that it sees, over all documents and softmax layers."""
    sights = Counter(
        sight(config, layer, window)
        for layer in range(config.num_layers)
        if config.mixer(layer) != "L"
    )
    return sum(
        count * int(visible_pairs(lengths, window=near, sinks=sinks).sum())
        for (near, sinks), count in sights.items()
    )


def _block_matrices(config: ModelConfig, layer: int) -> int:
    return _mixer_matrices(config, layer) + 3 * config.dim * config.mlp_width


def _mixer_matrices(config: ModelConfig, layer: int) -> int:
    inner = config.num_heads * config.head_width
    if config.mixer(layer) == "L":
        decay = config.num_heads if config.decay_style == "data" else 0
        # q, k, v, gate, out.
        return (5 * inner + decay) * config.dim
    return 2 * (inner + config.kv_heads * config.head_width) * config.dim


def _block_parameters(config: ModelConfig, layer: int) -> int:
    heads = 1 if config.mixer(layer) == "L" else 2 * config.qk_norm
    norms = 2 * config.dim + heads * config.head_width
    return _block_matrices(config, layer) + norms
