"""The section `model`: sizes of the network."""

from dataclasses import dataclass

from ringctx.config.checks import require
from ringctx.errors import ConfigError

__all__ = ["MIXERS", "ModelConfig"]

MIXERS = {
    "S": "softmax attention over all earlier tokens",
    "W": "softmax attention over the last model.window of them",
}


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
        require(
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
