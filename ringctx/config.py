"""The whole run as one tree of frozen dataclasses; the YAML file mirrors it.

Sizes are tokens. Off is null. Each section checks what it can know by itself when it is made;
what depends on the dataset or the number of ranks is checked where that is known.
`ringctx.config_file` reads and writes the YAML.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ringctx.errors import ConfigError

__all__ = [
    "MIXERS",
    "CheckpointConfig",
    "Config",
    "CurriculumConfig",
    "DataConfig",
    "Layout",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "Schedule",
    "TopologyConfig",
    "TopologyKind",
    "TrackingConfig",
    "TrainConfig",
]

MIXERS = {
    "S": "softmax attention over all earlier tokens",
    "W": "softmax attention over the last model.window of them",
}
Layout = Literal["contiguous", "zigzag", "striped"]
Schedule = Literal["auto", "one_way", "two_way", "token_ring", "all_gather"]
TopologyKind = Literal["switch", "cables", "fully_connected", "two_level"]


def _is_power_of_two(n: int) -> bool:
    """Whether n is 1, 2, 4, ..."""
    return n > 0 and n & (n - 1) == 0


def _require(rules: Sequence[tuple[bool, str]]) -> None:
    """Raise one ConfigError that lists the message of every rule that does not hold."""
    broken = [message for holds, message in rules if not holds]
    if broken:
        raise ConfigError("\n".join(broken))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer."""

    vocab_size: int | None = None
    """Rows of the embedding; null takes the dataset's vocabulary."""
    dim: int = 512
    """Width of the residual stream."""
    num_layers: int = 8
    """Transformer blocks."""
    mixers: str = "S"
    """A letter a layer, repeated over the layers (SSSW: every fourth has a window). S: softmax over
    all earlier tokens; W: softmax over a sliding window."""
    window: int | None = None
    """W layers: tokens that a token sees, itself included."""
    sinks: int = 0
    """W layers: first tokens of the document that stay visible behind the window."""
    num_heads: int = 8
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads (grouped-query attention); null: as many as query heads."""
    head_dim: int | None = None
    """Width of a head; null: dim / num_heads."""
    mlp_dim: int | None = None
    """Inner width of the SwiGLU; null: 8/3 dim, rounded up to a multiple of 64."""
    rope_theta: float = 500_000.0
    """Base of the rotary frequencies; larger for longer contexts."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotation."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head."""

    def __post_init__(self) -> None:
        """Fill the sizes that follow from others, and check them."""
        heads = max(self.num_heads, 1)
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            if self.dim % heads:
                raise ConfigError(
                    f"model.dim={self.dim} is not divisible by model.num_heads={self.num_heads}; "
                    "set model.head_dim, or change one of the two"
                )
            object.__setattr__(self, "head_dim", self.dim // heads)
        if self.mlp_dim is None:
            object.__setattr__(self, "mlp_dim", -(-8 * self.dim // 3 // 64) * 64)
        kv_heads, head_dim = self.kv_heads, self.head_width
        _require(
            [
                *self._mixer_rules(),
                (
                    min(self.dim, self.num_layers, self.num_heads, kv_heads, self.mlp_width) > 0,
                    "model.dim, num_layers, num_heads, num_kv_heads and mlp_dim must be positive",
                ),
                (
                    kv_heads > 0 and self.num_heads % max(kv_heads, 1) == 0,
                    f"model.num_kv_heads={kv_heads} does not divide model.num_heads="
                    f"{self.num_heads}; every key/value head serves the same number of query heads",
                ),
                (
                    head_dim > 0 and head_dim % 2 == 0,
                    f"model.head_dim={head_dim} must be even: RoPE rotates pairs of entries",
                ),
                (
                    self.rope_theta > 1,
                    f"model.rope_theta={self.rope_theta} must be above 1; 10000 is the usual "
                    "smallest value",
                ),
                (self.norm_eps > 0, f"model.norm_eps={self.norm_eps} must be above 0"),
                (
                    self.vocab_size is None or self.vocab_size > 0,
                    f"model.vocab_size={self.vocab_size} must be positive, or null to take the "
                    "dataset's",
                ),
            ]
        )

    def _mixer_rules(self) -> list[tuple[bool, str]]:
        """What pattern, window and sinks ask of one another."""
        unknown = sorted(set(self.mixers) - MIXERS.keys())
        known = "; ".join(f"{letter}: {meaning}" for letter, meaning in MIXERS.items())
        windowed = "W" in self.mixers
        return [
            (bool(self.mixers), f"model.mixers is empty; write a letter a layer, {known}"),
            (
                not unknown,
                f"model.mixers={self.mixers!r}: no layer is called {', '.join(unknown)}; write a "
                f"letter a layer, {known}",
            ),
            (
                len(self.mixers) <= max(self.num_layers, 1),
                f"model.mixers={self.mixers!r} is longer than model.num_layers={self.num_layers}, "
                "so the end of the pattern would never be used",
            ),
            (
                not windowed or self.window is not None,
                f"model.mixers={self.mixers!r} has W layers, which need model.window: how "
                "many tokens they see, for example model.window=1024",
            ),
            (
                windowed or self.window is None,
                f"model.window={self.window} has no use: model.mixers={self.mixers!r} has no W",
            ),
            (
                self.window is None or self.window > 0,
                f"model.window={self.window} must be at least 1: a token sees itself",
            ),
            (
                self.sinks == 0 or (self.sinks > 0 and self.window is not None),
                f"model.sinks={self.sinks} must be 0, or positive with a model.window to stand "
                "behind",
            ),
        ]

    def mixer(self, layer: int) -> str:
        """The letter of a layer, counted from 0."""
        return self.mixers[layer % len(self.mixers)]

    @property
    def kv_heads(self) -> int:
        """Key/value heads, always a number."""
        assert self.num_kv_heads is not None
        return self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Head dim, always a number."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def mlp_width(self) -> int:
        """Inner width of the SwiGLU, always a number."""
        assert self.mlp_dim is not None
        return self.mlp_dim


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens are."""

    path: str = ""
    """A dataset folder written by `ringctx data build`."""

    def __post_init__(self) -> None:
        """Check that a path was given."""
        _require(
            [(bool(self.path), "data.path is not set: name a folder made by 'ringctx data build'")]
        )


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Which sequence lengths are trained when (Dataset Decomposition, arXiv 2405.13226)."""

    kind: Literal["decomposed"] = "decomposed"
    """decomposed: sequences of one power-of-two length a step, each from one document."""
    odds: Literal["uniform", "grow_p2"] = "grow_p2"
    """How likely a bucket is drawn: uniform: equal; grow_p2: twice as likely as the next longer."""
    cycles: int = 8
    """Passes of the training, each over an equal part of every bucket; grow_p2 grows in each."""
    min_len: int = 256
    """Shortest sequence, a power of two; shorter remainders of documents are dropped."""
    max_len: int = 8192
    """Longest sequence, a power of two; longer documents give several of these."""
    tokens_per_step: int = 524_288
    """Tokens of one optimizer step, whatever the sequence length."""
    total_tokens: int | None = None
    """Tokens of the whole plan; null: every sequence once."""

    def __post_init__(self) -> None:
        """Check that lengths are powers of two that fit one another."""
        powers = _is_power_of_two(self.min_len) and _is_power_of_two(self.max_len)
        low = self.tokens_per_step // max(self.max_len, 1) * self.max_len
        near = " or ".join(f"{n:,}" for n in (low, low + self.max_len) if n > 0)
        _require(
            [
                (
                    powers and 2 <= self.min_len <= self.max_len,
                    f"curriculum.min_len={self.min_len:,} and curriculum.max_len="
                    f"{self.max_len:,} must be powers of two with 2 <= min_len <= max_len",
                ),
                (
                    1 <= self.cycles <= 10_000,
                    f"curriculum.cycles={self.cycles} must lie in 1 to 10,000; the paper uses 8",
                ),
                (
                    not powers or (self.tokens_per_step > 0 and low == self.tokens_per_step),
                    f"curriculum.tokens_per_step={self.tokens_per_step:,} is not a multiple of "
                    f"curriculum.max_len={self.max_len:,}; the nearest valid values are {near}",
                ),
                (
                    self.total_tokens is None or self.total_tokens >= self.tokens_per_step,
                    f"curriculum.total_tokens={self.total_tokens} is less than one step of "
                    f"curriculum.tokens_per_step={self.tokens_per_step:,}; null takes all tokens",
                ),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class TopologyConfig:
    """How the ranks are wired; the cheapest schedule follows from it."""

    kind: TopologyKind = "switch"
    """switch: one full-duplex port a rank; cables: rank i wired to i + 1, in a circle;
    fully_connected: a link for every pair; two_level: fast nodes on a slow switch."""
    link_gbit: float = 400.0
    """Gbit/s (1e9 bits) of one link in each direction; two_level: of each node's port."""
    latency_us: float = 10.0
    """Microseconds that every transfer takes besides its bytes."""
    ranks_per_node: int | None = None
    """two_level: consecutive ranks that share a node."""
    node_gbit: float | None = None
    """two_level: Gbit/s of one rank's port inside its node; null: 8 times link_gbit."""
    flops: float = 3e14
    """FLOP/s that one rank's attention kernels reach."""

    def __post_init__(self) -> None:
        """Check ranges."""
        node, two_level = self.ranks_per_node, self.kind == "two_level"
        above_zero = {"link_gbit": self.link_gbit, "flops": self.flops}
        if self.node_gbit is not None:
            above_zero["node_gbit"] = self.node_gbit
        _require(
            [
                *(
                    (
                        math.isfinite(value) and value > 0,
                        f"parallel.topology.{name}={value} must be above 0, and a finite number",
                    )
                    for name, value in above_zero.items()
                ),
                (
                    math.isfinite(self.latency_us) and self.latency_us >= 0,
                    f"parallel.topology.latency_us={self.latency_us} must be at least 0, and a "
                    "finite number",
                ),
                (
                    node is not None or not two_level,
                    "parallel.topology.kind=two_level needs parallel.topology.ranks_per_node: how "
                    "many consecutive ranks share a node, for example 8",
                ),
                (
                    node is None or two_level,
                    f"parallel.topology.ranks_per_node={node} has no use with parallel.topology."
                    f"kind={self.kind}: leave it out, or choose two_level",
                ),
                (
                    self.node_gbit is None or two_level,
                    f"parallel.topology.node_gbit={self.node_gbit} has no use with parallel."
                    f"topology.kind={self.kind}, which has no nodes: leave it out, or choose "
                    "two_level",
                ),
                (
                    node is None or node > 0,
                    f"parallel.topology.ranks_per_node={node} must be at least 1",
                ),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a step is spread over the ranks."""

    tokens_per_rank: int = 8192
    """Tokens that a rank holds in one forward, a power of two: sets the memory of activations."""
    cp_degree: int | Literal["auto"] = "auto"
    """Ranks that share a sequence: auto follows the length (max(1, len / tokens_per_rank))."""
    max_cp_degree: int | None = None
    """Longest ring; lengths that need more are refused. Null: as long as the world allows."""
    layout: Layout = "zigzag"
    """Which tokens of a sequence a rank holds; zigzag and striped balance causal work."""
    ulysses_degree: int = 1
    """Of a ring's ranks, how many split the heads between them instead of the tokens; 1: none."""
    schedule: Schedule = "auto"
    """What travels in the ring. one_way: K/V, always to the next rank; two_way: K/V, both ways,
    each piece only as far as the mask needs it; token_ring: queries, and partial results home;
    all_gather: K/V, straight to every rank that needs them; auto: the cheapest of these by the
    formulas for the shape, the mask and the topology, in each pass by itself."""
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    """How the ranks are wired, which only `auto` and the routes ask: just the kind, as in
    `topology: cables`, or a section, as in `topology: {kind: cables, link_gbit: 50}`."""
    engine: Literal["fsdp2", "ddp"] = "fsdp2"
    """fsdp2 shards weights, gradients and optimizer over all ranks; ddp keeps a copy on each."""

    def __post_init__(self) -> None:
        """Check degrees by themselves; the world size is checked when it is known."""
        cp = self.cp_degree
        _require(
            [
                (
                    _is_power_of_two(self.tokens_per_rank),
                    f"parallel.tokens_per_rank={self.tokens_per_rank:,} must be a power of two, "
                    "so that it divides or is divided by every sequence length",
                ),
                (
                    cp == "auto" or _is_power_of_two(int(cp)),
                    f"parallel.cp_degree={cp} must be 'auto' or a power of two",
                ),
                (
                    self.max_cp_degree is None or _is_power_of_two(self.max_cp_degree),
                    f"parallel.max_cp_degree={self.max_cp_degree} must be a power of two, or null",
                ),
                (
                    _is_power_of_two(self.ulysses_degree),
                    f"parallel.ulysses_degree={self.ulysses_degree} must be a power of two, as "
                    "every degree of context parallelism is; 1 is none",
                ),
                (
                    self.ulysses_degree <= min(self._cp_bounds(), default=self.ulysses_degree),
                    f"parallel.ulysses_degree={self.ulysses_degree} is above the "
                    f"{min(self._cp_bounds(), default=0)} ranks that may share a sequence; lower "
                    "it, or raise parallel.cp_degree or max_cp_degree",
                ),
                (
                    cp == "auto" or self.max_cp_degree is None or int(cp) <= self.max_cp_degree,
                    f"parallel.cp_degree={cp} is above parallel.max_cp_degree="
                    f"{self.max_cp_degree}; lower the one or raise the other",
                ),
            ]
        )

    def _cp_bounds(self) -> list[int]:
        """What the settings say of the largest ring."""
        degrees = (self.cp_degree, self.max_cp_degree)
        return [degree for degree in degrees if isinstance(degree, int)]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Learning rate at the last step, as a share of the peak."""
    warmup_steps: int = 100
    """Steps of linear rise from 0 to lr."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging factors of the gradient and its square."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; null: no clipping."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(
            [
                (self.lr > 0, f"optim.lr={self.lr} must be above 0"),
                (
                    0 <= self.min_lr_ratio <= 1,
                    f"optim.min_lr_ratio={self.min_lr_ratio} must lie between 0 and 1",
                ),
                (self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps} is negative"),
                (
                    all(0 <= beta < 1 for beta in self.betas),
                    f"optim.betas={list(self.betas)} must lie in [0, 1)",
                ),
                (self.eps > 0, f"optim.eps={self.eps} must be above 0"),
                (self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} is negative"),
                (
                    self.clip_norm is None or self.clip_norm > 0,
                    f"optim.clip_norm={self.clip_norm} must be above 0, or null for no clipping",
                ),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    run_dir: str = "runs/default"
    """Folder for config, metrics, checkpoints, logs and plots of this run."""
    steps: int | None = None
    """Optimizer steps; null: the whole plan."""
    stop_after: int | None = None
    """Save and stop after this many steps in all, as if interrupted; the schedule stays."""
    seed: int = 0
    """Seed of the weights and of the order of sequences."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: compute in bf16, keep weights, reductions and optimizer in fp32."""
    recompute: Literal["none", "layer"] = "none"
    """layer: keep only each layer's input and run the layer again in backward (ring included)."""
    loss_chunk: int | None = 1024
    """Tokens whose logits exist at once; null: all of them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(
            [
                (bool(self.run_dir), "train.run_dir is empty: name a folder for the run"),
                (
                    self.steps is None or self.steps > 0,
                    f"train.steps={self.steps} must be positive, or null for the whole plan",
                ),
                (
                    self.stop_after is None or self.stop_after > 0,
                    f"train.stop_after={self.stop_after} must be positive, or null",
                ),
                (self.seed >= 0, f"train.seed={self.seed} must not be negative"),
                (
                    self.loss_chunk is None or self.loss_chunk > 0,
                    f"train.loss_chunk={self.loss_chunk} must be positive, or null",
                ),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved, and from where it starts."""

    every: int | None = 1000
    """Steps between checkpoints; null: only at the end."""
    keep: int | None = 3
    """Newest checkpoints to keep; null: all."""
    resume: int | Literal["auto", "never"] = "auto"
    """auto: the newest good one in run_dir, if any; never: refuse a used folder; or a step."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(
            [
                (
                    self.every is None or self.every > 0,
                    f"checkpoint.every={self.every} must be positive, or null for the end only",
                ),
                (
                    self.keep is None or self.keep > 0,
                    f"checkpoint.keep={self.keep} must be positive, or null to keep all",
                ),
                (
                    isinstance(self.resume, str) or self.resume > 0,
                    f"checkpoint.resume={self.resume} must be 'auto', 'never' or a step",
                ),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is shown while the run goes on; metrics.jsonl is always written."""

    log_every: int = 10
    """Steps between log lines where standard error is not a terminal."""
    wandb: str | None = None
    """Weights & Biases project; null: off. Offline when there is no key."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require([(self.log_every > 0, f"tracking.log_every={self.log_every} must be positive")])


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Check what concerns two sections."""
        heads, degree = self.model.num_heads, self.parallel.ulysses_degree
        fits = [str(n) for n in range(1, heads + 1) if heads % n == 0 and _is_power_of_two(n)]
        _require(
            [
                (
                    heads % degree == 0,
                    f"parallel.ulysses_degree={degree} does not divide model.num_heads={heads}: "
                    f"its ranks take equal shares of the heads; choose one of {', '.join(fits)}",
                )
            ]
        )
