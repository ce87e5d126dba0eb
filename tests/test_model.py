"""The transformer by itself: counts, positions, recompute, initial values."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from ringctx.config import ModelConfig
from ringctx.layers import RMSNorm, rotary_table, rotate
from ringctx.mixers import Rows, SoftmaxMixer
from ringctx.model import Transformer, initialise
from ringctx.ops.losses import IGNORE_INDEX
from ringctx.ops.naive import naive_attention
from ringctx.parallel.comm import SoloGroup
from ringctx.parallel.mesh import ContextMesh, context_mesh
from tests.tolerances import assert_close

CONFIG = ModelConfig(vocab_size=61, dim=24, num_layers=2, num_heads=3, num_kv_heads=1, mlp_dim=40)


def solo_mesh() -> ContextMesh:
    return context_mesh(SoloGroup(), layout="contiguous")


def build(config: ModelConfig, **options: object) -> Transformer:
    model = Transformer(config, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initialise(name, parameter.shape, config=config, seed=3))
    return model


def loss_of(
    model: Transformer,
    tokens: Tensor,
    targets: Tensor,
    *,
    cu_seqlens: Sequence[int] | None = None,
    window: int | None = None,
    rope_theta: float | None = None,
) -> Tensor:
    loss: Tensor = model(
        tokens,
        targets=targets,
        positions=torch.arange(tokens.shape[1]),
        mesh=solo_mesh(),
        cu_seqlens=cu_seqlens,
        window=window,
        rope_theta=rope_theta,
    )
    return loss


def rows(batch: int, length: int) -> tuple[Tensor, Tensor]:
    whole = torch.randint(0, 61, (batch, length + 1))
    return whole[:, :-1].clone(), whole[:, 1:].clone()


def test_an_untrained_model_is_little_worse_than_an_even_guess() -> None:
    tokens, targets = rows(8, 60)
    loss = loss_of(build(CONFIG), tokens, targets) / targets.numel()
    # Logits of variance 1 cost half a nat.
    assert abs(loss.item() - math.log(61) - 0.5) < 0.2


@pytest.mark.parametrize("pattern", ["S", "L", "LS"])
def test_a_later_token_changes_no_earlier_output(pattern: str) -> None:
    config = replace(CONFIG, mixers=pattern, num_kv_heads=3 if pattern == "L" else 1)
    model, (tokens, _) = build(config), rows(1, 20)
    changed = tokens.clone()
    changed[0, 11] = (changed[0, 11] + 1) % 61
    positions = torch.arange(20)
    before = model.hidden(tokens, positions=positions, mesh=solo_mesh())
    after = model.hidden(changed, positions=positions, mesh=solo_mesh())
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_token_reaches_the_window_behind_it_and_a_sink_everything(sinks: int) -> None:
    config = replace(CONFIG, num_layers=1, mixers="W", window=5, sinks=sinks)
    model, (tokens, _) = build(config), rows(1, 20)

    def changed_by(at: int) -> list[int]:
        other = tokens.clone()
        other[0, at] = (other[0, at] + 1) % 61
        before, after = (
            model.hidden(x, positions=torch.arange(20), mesh=solo_mesh()) for x in (tokens, other)
        )
        return (before != after).any(-1)[0].nonzero().flatten().tolist()

    assert changed_by(11) == [11, 12, 13, 14, 15]
    assert changed_by(1) == list(range(1, 20 if sinks else 6))


@pytest.mark.parametrize(
    ("pattern", "own", "largest", "same"),
    [
        ("S", None, 5, ("W", 5)),
        ("W", 5, 9, ("W", 5)),
        ("W", 9, 5, ("W", 5)),
        ("SW", 9, 5, ("W", 5)),
        ("S", None, 30, ("S", None)),
    ],
)
def test_the_window_of_a_forward_caps_that_of_every_layer(
    pattern: str, own: int | None, largest: int, same: tuple[str, int | None]
) -> None:
    tokens, targets = rows(2, 30)
    capped = build(replace(CONFIG, mixers=pattern, window=own))
    other = build(replace(CONFIG, mixers=same[0], window=same[1]))
    loss = loss_of(capped, tokens, targets, window=largest)
    assert torch.equal(loss, loss_of(other, tokens, targets))


def test_a_window_of_a_forward_does_not_concern_lightning_layers() -> None:
    tokens, targets = rows(2, 30)
    model = build(replace(CONFIG, mixers="L", num_kv_heads=3))
    assert torch.equal(loss_of(model, tokens, targets, window=3), loss_of(model, tokens, targets))


def test_a_window_of_a_forward_leaves_a_layer_its_sinks() -> None:
    tokens, targets = rows(2, 30)
    wide, near = (build(replace(CONFIG, mixers="W", window=window, sinks=2)) for window in (12, 5))
    loss = loss_of(wide, tokens, targets, window=5)
    assert torch.equal(loss, loss_of(near, tokens, targets))
    assert not torch.equal(loss, loss_of(wide, tokens, targets))


def test_the_theta_of_a_forward_takes_the_place_of_the_configs() -> None:
    tokens, targets = rows(2, 30)
    one, other = (build(replace(CONFIG, rope_theta=theta)) for theta in (1e4, 30.0))
    loss = loss_of(one, tokens, targets, rope_theta=30.0)
    assert torch.equal(loss, loss_of(other, tokens, targets))
    assert not torch.equal(loss, loss_of(one, tokens, targets))


@pytest.mark.parametrize("letter", ["S", "W"])
def test_a_softmax_mixer_is_the_naive_attention_of_its_layer(letter: str) -> None:
    window, sinks = (6, 1) if letter == "W" else (None, 0)
    config = replace(CONFIG, mixers=letter, window=window, sinks=sinks)
    mixer = SoftmaxMixer(config, 1).double()
    x = torch.randn(2, 19, 24, dtype=torch.float64)
    rotary = rotary_table(torch.arange(19), head_dim=8, theta=config.rope_theta)
    q, k, v = (
        layer(x).unflatten(-1, (heads, 8))
        for layer, heads in ((mixer.q, 3), (mixer.k, 1), (mixer.v, 1))
    )
    expected, _ = naive_attention(
        rotate(q, rotary),
        rotate(k, rotary),
        v,
        causal=True,
        window=window,
        sinks=sinks,
    )
    out = mixer(x, Rows(rotary=rotary, mesh=solo_mesh(), cu_seqlens=None, window=None))
    assert_close(out, mixer.out(expected.flatten(-2)))


@pytest.mark.parametrize("pattern", ["S", "SW", "SSSW", "LLLS", "LSW"])
def test_a_packed_row_gives_the_loss_and_gradients_of_its_documents(pattern: str) -> None:
    window, sinks = (6, 2) if "W" in pattern else (None, 0)
    config = replace(CONFIG, num_layers=4, mixers=pattern, window=window, sinks=sinks)
    borders = (0, 13, 14, 40, 47)
    tokens, targets = rows(1, 47)
    targets[0, [border - 1 for border in borders[1:]]] = IGNORE_INDEX
    packed, apart = build(config).double(), build(config).double()
    packed.dtype = apart.dtype = torch.float64
    loss = loss_of(packed, tokens, targets, cu_seqlens=borders)
    loss.backward()
    total = torch.zeros((), dtype=torch.float64)
    for begin, end in pairwise(borders):
        part = loss_of(apart, tokens[:, begin:end], targets[:, begin:end])
        part.backward()
        total += part.detach()
    assert_close(loss, total)
    for mine, theirs in zip(packed.parameters(), apart.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("pattern", ["SW", "LW"])
def test_recompute_changes_no_gradient(pattern: str) -> None:
    tokens, targets = rows(2, 17)
    config = replace(CONFIG, mixers=pattern, window=4, sinks=1)
    grads = []
    for recompute in (False, True):
        model = build(config, recompute=recompute)
        loss_of(model, tokens, targets, cu_seqlens=(0, 6, 17)).backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, again in zip(*grads, strict=True):
        assert plain is not None and again is not None
        assert torch.equal(plain, again)


def test_recompute_keeps_less_for_backward() -> None:
    tokens, targets = rows(1, 64)

    def saved_bytes(recompute: bool) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        model = build(CONFIG, recompute=recompute)
        weights = {p.data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(model, tokens, targets)
        total = sum(size for pointer, size in kept.items() if pointer not in weights)
        del loss
        return total

    assert saved_bytes(True) < 0.5 * saved_bytes(False)


def test_ignored_targets_give_no_loss() -> None:
    model, (tokens, targets) = build(CONFIG), rows(1, 12)
    first = loss_of(model, tokens[:, :7], targets[:, :7])
    targets[0, 7:] = IGNORE_INDEX
    assert_close(loss_of(model, tokens, targets), first)


def test_the_mixer_is_an_argument() -> None:
    class Doubling(nn.Module):
        def forward(self, x: Tensor, rows: Rows) -> Tensor:
            return 2 * x

    made: list[int] = []

    def make(config: ModelConfig, layer: int) -> nn.Module:
        made.append(layer)
        return Doubling()

    model = Transformer(CONFIG, make_mixer=make)
    tokens, targets = rows(1, 5)
    assert made == [0, 1]
    assert loss_of(model, tokens, targets).isfinite()
    assert not any("mixer.q" in name for name, _ in model.named_parameters())


def test_rotation_depends_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(at_q: int, at_k: int) -> Tensor:
        tables = [rotary_table(torch.tensor([p]), head_dim=16, theta=1e4) for p in (at_q, at_k)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum()

    assert_close(score(5, 2), score(4_000_005, 4_000_002), scale=100)


def test_rotation_is_exact_far_into_a_document() -> None:
    position = 4_194_303
    cos, _ = rotary_table(torch.tensor([position]), head_dim=2, theta=1e4)
    assert abs(cos.item() - math.cos(position)) < 1e-9


def test_norm_is_done_in_fp32_for_bf16_inputs() -> None:
    norm = RMSNorm(64, eps=1e-5)
    x = torch.randn(3, 64).bfloat16()
    expected = x.float() / (x.float().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(norm(x), expected.bfloat16())


def test_initial_values_depend_on_seed_and_name_only() -> None:
    shape = torch.Size((64, 64))
    draw = [
        initialise(name, shape, config=CONFIG, seed=seed)
        for name, seed in (("a", 0), ("a", 0), ("a", 1), ("b", 0))
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert not torch.equal(draw[0], draw[3])


def test_matrices_that_write_into_the_residual_stream_start_smaller() -> None:
    shape = torch.Size((256, 256))
    plain = initialise("layers.0.mlp.up.weight", shape, config=CONFIG, seed=0).std()
    writing = initialise("layers.0.mlp.down.weight", shape, config=CONFIG, seed=0).std()
    assert abs(plain / writing - 2.0) < 0.05
    assert initialise("norm.weight", torch.Size((8,)), config=CONFIG, seed=0).eq(1).all()
