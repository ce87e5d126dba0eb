"""The transformer by itself: counts, positions, recompute, initial values."""

import math

import pytest
import torch
from torch import Tensor, nn

from ringctx.config import ModelConfig
from ringctx.model import (
    RMSNorm,
    RotaryTable,
    Transformer,
    flops_per_token,
    initialise,
    parameter_count,
    rotary_table,
    rotate,
)
from ringctx.ops.losses import IGNORE_INDEX
from ringctx.parallel.comm import SoloGroup
from ringctx.parallel.mesh import ContextMesh, StepLayout
from tests.tolerances import assert_close

CONFIG = ModelConfig(vocab_size=61, dim=24, num_layers=2, num_heads=3, num_kv_heads=1, mlp_dim=40)


def solo_mesh() -> ContextMesh:
    return ContextMesh(
        group=SoloGroup(),
        cp_rank=0,
        dp_rank=0,
        sizes=StepLayout(cp_degree=1, dp_degree=1, rows=1),
        layout="contiguous",
        schedule="auto",
    )


def build(config: ModelConfig, **options: object) -> Transformer:
    model = Transformer(config, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initialise(name, parameter.shape, config=config, seed=3))
    return model


def loss_of(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1])
    loss: Tensor = model(tokens, targets=targets, positions=positions, mesh=solo_mesh())
    return loss


def rows(batch: int, length: int) -> tuple[Tensor, Tensor]:
    whole = torch.randint(0, 61, (batch, length + 1))
    return whole[:, :-1].clone(), whole[:, 1:].clone()


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
def test_parameter_count_is_that_of_the_model(tie: bool, qk_norm: bool) -> None:
    config = ModelConfig(
        vocab_size=61, dim=24, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8,
        tie_embeddings=tie, qk_norm=qk_norm,
    )  # fmt: skip
    model = Transformer(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


def test_flops_are_six_for_each_weight_and_half_the_square_for_attention() -> None:
    embedding = 61 * 24
    norms = CONFIG.num_layers * 2 * 24 + 24
    weights = parameter_count(CONFIG) - embedding - norms
    assert flops_per_token(CONFIG, seq_len=0) == 6 * weights
    # Forward: two products over half of seq_len keys, 2 FLOPs each; backward twice that.
    attention = 3 * 2 * 2 * CONFIG.num_layers * 24 * 512 / 2
    assert flops_per_token(CONFIG, seq_len=512) - 6 * weights == attention


def test_an_untrained_model_is_little_worse_than_an_even_guess() -> None:
    tokens, targets = rows(8, 60)
    loss = loss_of(build(CONFIG), tokens, targets) / targets.numel()
    # Logits of variance 1 cost half a nat.
    assert abs(loss.item() - math.log(61) - 0.5) < 0.2


def test_a_later_token_changes_no_earlier_output() -> None:
    model, (tokens, _) = build(CONFIG), rows(1, 20)
    changed = tokens.clone()
    changed[0, 11] = (changed[0, 11] + 1) % 61
    positions = torch.arange(20)
    before = model.hidden(tokens, positions=positions, mesh=solo_mesh())
    after = model.hidden(changed, positions=positions, mesh=solo_mesh())
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])


def test_recompute_changes_no_gradient() -> None:
    tokens, targets = rows(2, 17)
    grads = []
    for recompute in (False, True):
        model = build(CONFIG, recompute=recompute)
        loss_of(model, tokens, targets).backward()
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
        def forward(self, x: Tensor, rotary: RotaryTable, mesh: ContextMesh) -> Tensor:
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
