"""The section `model`: sizes of the network."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from ringctx.config.checks import require
from ringctx.errors import ConfigError

__all__ = ["MIXERS", "DecayStyle", "LightningBackend", "ModelConfig"]

DecayStyle = Literal["alibi", "retnet", "tnl", "none", "data"]
LightningBackend = Literal["torch", "triton", "fla"]

MIXERS = {
    "S": "softmax attention over all earlier tokens",
    "W": "softmax attention over the last model.window of them",
    "L": "lightning attention, linear in length",
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
    """A letter a layer, repeated over the layers (LLLS: every fourth is softmax). S: softmax over
    all earlier tokens; W: softmax over a sliding window; L: lightning attention, linear in length:
    what came before is one matrix a head."""
    window: int | None = None
    """W layers: tokens that a token sees, itself included."""
    sinks: int = 0
    """W layers: first tokens of the document that stay visible behind the window."""
    decay_style: DecayStyle = "alibi"
    """L layers: how a head forgets. By a fixed factor a token, alibi: e to the -2^(-8h/H) for head
    h = 1 to H; retnet: 1 - 2^(-4-h); tnl: alibi, slower in later layers; none: not at all. By a
    factor that each token sets, data: alibi to the power of softplus(w x) / ln 2 with learned w."""
    lightning_backend: LightningBackend = "torch"
    """L layers: what computes them. torch: on any device; triton: kernels for CUDA; fla: those of
    flash-linear-attention, if installed."""
    num_heads: int = 8
    """Query heads; in L layers of keys and values too."""
    num_kv_heads: int | None = None
    """S and W layers: key/value heads (grouped-query attention); null: as many as query heads."""
    head_dim: int | None = None
    """Width of a head; null: dim / num_heads."""
    mlp_dim: int | None = None
    """Inner width of the SwiGLU; null: 8/3 dim, rounded up to a multiple of 64."""
    rope_theta: float = 500_000.0
    """Base of the rotary frequencies; larger for longer contexts."""
    rope_mixers: str = "SW"
    """Letters whose layers rotate queries and keys by their position; SWL: all. The others know
    order by what they may see, and L layers by their decay."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    qk_norm: bool = False
    """S and W layers: RMSNorm on each query and key head before the rotation."""
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
                *self._use_rules(),
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

    def _use_rules(self) -> list[tuple[bool, str]]:
        """Every setting that is not at its default concerns some layer."""
        unknown = sorted(set(self.rope_mixers) - MIXERS.keys())
        written = f"model.mixers={self.mixers!r}"
        return [
            *(
                (
                    self.has(letters) or self._is_default(name),
                    f"model.{name}={getattr(self, name)} has no use: {written} has no "
                    f"{' or '.join(letters)}; leave it out, or add such a layer",
                )
                for name, letters in (
                    ("decay_style", "L"),
                    ("lightning_backend", "L"),
                    ("num_kv_heads", "SW"),
                    ("qk_norm", "SW"),
                )
            ),
            (
                not unknown,
                f"model.rope_mixers={self.rope_mixers!r}: no layer is called "
                f"{', '.join(unknown)}; name those of S, W and L whose layers rotate, SWL for all",
            ),
            # S and W are in the default, whatever the pattern.
            (
                "L" not in self.rope_mixers or self.has("L"),
                f"model.rope_mixers={self.rope_mixers!r} names L, but {written} has no L; leave it "
                "out, or add such a layer",
            ),
            (
                self.any_rotates or self._is_default("rope_theta"),
                f"model.rope_theta={self.rope_theta:g} has no use: model.rope_mixers="
                f"{self.rope_mixers!r} names no layer of {written}; leave it out, or name one",
            ),
        ]

    def _is_default(self, name: str) -> bool:
        """Whether a field says what it would if it were left out."""
        if name == "num_kv_heads":
            return self.num_kv_heads == self.num_heads
        default: Any = next(field.default for field in fields(self) if field.name == name)
        return bool(getattr(self, name) == default)

    def mixer(self, layer: int) -> str:
        """The letter of a layer, counted from 0."""
        return self.mixers[layer % len(self.mixers)]

    def has(self, letters: str) -> bool:
        """Whether any layer is of one of these kinds."""
        return bool(set(letters) & set(self.mixers))

    def rotates(self, layer: int) -> bool:
        """Whether a layer, counted from 0, rotates queries and keys by their position."""
        return self.mixer(layer) in self.rope_mixers

    @property
    def any_rotates(self) -> bool:
        """Whether some layer does."""
        return self.has(self.rope_mixers)

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
