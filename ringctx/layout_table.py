"""What a run will do, as lines of text: layouts, what `auto` takes, where the tokens go."""

import torch

from ringctx.data import PlanSummary
from ringctx.parallel.cost import choose
from ringctx.parallel.head_exchange import key_heads
from ringctx.parallel.layout import Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.mesh import StepLayout, split_ranks
from ringctx.parallel.parts import chain_of
from ringctx.parallel.state_cost import StateShape, choose_exchange
from ringctx.parallel.topology import Wiring, wire_up
from ringctx.parallel.traffic import Shape
from ringctx.run_plan import RunPlan

__all__ = ["layout_table"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def layout_table(run: RunPlan) -> list[str]:
    """How the rows of each length are spread, what of the data is in no step, what was cut."""
    summary = run.plan.describe()
    lines = [
        _layout_line(
            length,
            run.layouts[length],
            num_rows=bucket.rows_per_step,
            ulysses_degree=run.config.parallel.ulysses_degree,
        )
        for length, bucket in summary.buckets.items()
    ]
    lines += [line for length in sorted(run.layouts) for line in _auto_line(run, length)]
    lines.append(
        f"plan: steps {run.plan.first_step:,} to {len(run.plan):,}; the run ends after step "
        f"{run.num_steps:,}"
    )
    lines.append(_coverage(summary))
    lines += [
        f"plan: cut from {fold.bucket:,} to {fold.into:,} tokens: {fold.pieces:,} ({fold.reason})"
        for fold in summary.folds
    ]
    return [*lines, *(f"plan: {note}" for note in summary.notes)]


def _coverage(summary: PlanSummary) -> str:
    """Where the tokens of the dataset go, with the share of each."""
    parts = [
        f"{name} {tokens:,} ({tokens / summary.dataset_tokens:.2%})"
        for name, tokens in (
            ("in steps", summary.tokens),
            ("trained before", summary.trained_tokens),
            ("dropped as too short", summary.dropped_tokens),
            ("passed over", summary.passed_over_tokens),
            ("left over at the end", summary.left_over_tokens),
            ("of these padding", -summary.padding_tokens),
            ("of these repeated", -summary.repeated_tokens),
        )
        if tokens or name in ("in steps", "dropped as too short")
    ]
    return f"plan: of {summary.dataset_tokens:,} tokens: {', '.join(parts)}"


def _layout_line(length: int, layout: StepLayout, *, num_rows: int, ulysses_degree: int) -> str:
    empty = layout.rows_without_targets(num_rows)
    shared = min(ulysses_degree, layout.cp_degree)
    split = f" (ulysses {shared} x ring {layout.cp_degree // shared})" if shared > 1 else ""
    return (
        f"len {length:>9,}: sequences a step {num_rows:>6,}, cp {layout.cp_degree}{split} x dp "
        f"{layout.dp_degree}, forwards {layout.num_rounds(num_rows)} x rows {layout.rows}"
        + (f", rows without targets {empty}" if empty else "")
    )


def _auto_line(run: RunPlan, length: int) -> list[str]:
    """What `auto` takes on rank 0; nothing where nothing is shared, or nothing left to it."""
    taken = _auto_passes(run, length)
    told = [f"{letter} {passes}" for letter, passes in taken.items()]
    if len(set(taken.values())) == 1 and not run.config.model.has("L"):
        told = list(taken.values())[:1]
    told += _auto_exchange(run, length)
    return [f"len {length:>9,}: auto: {'; '.join(told)}"] if told else []


def _auto_passes(run: RunPlan, length: int) -> dict[str, str]:
    """The schedules of the softmax layers, by letter."""
    model, parallel, layout = run.config.model, run.config.parallel, run.layouts[length]
    split = split_ranks(
        0,
        cp_degree=layout.cp_degree,
        ulysses_degree=min(parallel.ulysses_degree, layout.cp_degree),
        layout=parallel.layout,
    )
    if parallel.schedule != "auto" or len(split.ring) == 1:
        return {}
    shared = len(split.ulysses)
    shape = Shape(
        batch=layout.rows,
        heads=model.num_heads // shared,
        kv_heads=sum(key_heads(model.num_heads, model.kv_heads, world_size=shared)[0].repeats),
        head_dim=model.head_width,
        dtype=_DTYPES[run.config.train.dtype],
    )
    taken = {}
    for letter in dict.fromkeys(model.mixer(layer) for layer in range(model.num_layers)):
        if letter == "L":
            continue
        windowed = letter == "W"
        choice = choose(
            shape=shape,
            sharding=Sharding(length, len(split.ring), parallel.layout),
            mask=Mask.checked(
                causal=True,
                window=model.window if windowed else None,
                sinks=model.sinks if windowed else 0,
                cu_seqlens=None,
                seq_len=length,
            ),
            wiring=_wiring(run, split.ring, layout),
        )
        taken[letter] = f"forward {choice.forward}, backward {choice.backward}"
    return taken


def _auto_exchange(run: RunPlan, length: int) -> list[str]:
    """How the states of lightning layers travel."""
    model, parallel, layout = run.config.model, run.config.parallel, run.layouts[length]
    if not model.has("L") or parallel.state_exchange != "auto" or layout.cp_degree == 1:
        return []
    exchange = choose_exchange(
        shape=StateShape(
            batch=layout.rows,
            heads=model.num_heads,
            key_dim=model.head_width,
            value_dim=model.head_width,
            data_decay=model.decay_style == "data",
        ),
        chain=chain_of(Sharding(length, layout.cp_degree, parallel.layout), None),
        wiring=_wiring(run, tuple(range(layout.cp_degree)), layout),
    )
    return [f"L states {exchange}"]


def _wiring(run: RunPlan, ranks: tuple[int, ...], layout: StepLayout) -> Wiring:
    world_size = layout.cp_degree * layout.dp_degree
    return wire_up(run.config.parallel.topology, ranks=ranks, world_size=world_size)
