"""The table of a run says how rows are spread, what auto takes, and where tokens go."""

import re
from pathlib import Path

import pytest
import torch

from ringctx.config import TopologyConfig
from ringctx.layout_table import layout_table
from ringctx.parallel.cost import choose
from ringctx.parallel.layout import Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.parts import chain_of
from ringctx.parallel.state_cost import StateShape, choose_exchange
from ringctx.parallel.topology import wire_up
from ringctx.parallel.traffic import Shape
from tests.tiny import run_plan, write_config, write_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path)
    write_config(tmp_path)
    return tmp_path


def test_the_table_names_rows_that_fill_up_a_world_that_does_not_divide(folder: Path) -> None:
    lines = layout_table(run_plan(folder, world_size=3))
    assert lines[3] == (
        "len       128: sequences a step      2, cp 1 x dp 3, forwards 1 x rows 1, "
        "rows without targets 1"
    )


def test_the_table_says_how_heads_and_tokens_share_a_ring(folder: Path) -> None:
    overrides = ("parallel.tokens_per_rank=16", "parallel.ulysses_degree=2")
    lines = layout_table(run_plan(folder, *overrides, world_size=8))
    assert [line.split("cp ")[1].split(", forwards")[0] for line in lines[:4]] == [
        "1 x dp 8",
        "2 (ulysses 2 x ring 1) x dp 4",
        "4 (ulysses 2 x ring 2) x dp 2",
        "8 (ulysses 2 x ring 4) x dp 1",
    ]


def test_the_table_accounts_for_every_token(folder: Path) -> None:
    run = run_plan(folder, "train.steps=null")
    (line,) = [line for line in layout_table(run) if "tokens: in steps" in line]
    whole, *parts = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:tokens|\()", line)]
    assert parts[0] == len(run.plan) * 256
    assert whole == sum(parts) == run.dataset.num_tokens
    assert sum(float(share) for share in re.findall(r"([\d.]+)%", line)) == pytest.approx(
        100, abs=0.1
    )


def auto_lines(folder: Path, *overrides: str, world_size: int = 8) -> list[str]:
    overrides = ("parallel.tokens_per_rank=16", *overrides)
    lines = layout_table(run_plan(folder, *overrides, world_size=world_size))
    return [line for line in lines if " auto: " in line]


def test_the_table_says_what_auto_takes_for_every_length_with_a_ring(folder: Path) -> None:
    lines = auto_lines(folder, "parallel.topology=cables")
    assert [line.split(": auto: ")[0] for line in lines] == [
        "len        32",
        "len        64",
        "len       128",
    ]
    passes = r"forward (\w+), backward (\w+)"
    assert re.fullmatch(f"{passes}|S {passes}; W {passes}", lines[-1].split("auto: ")[1])
    assert not auto_lines(folder, "parallel.schedule=two_way")
    assert not auto_lines(folder, "parallel.tokens_per_rank=128")


def test_what_auto_takes_is_what_attention_is_told(folder: Path) -> None:
    changes = ("parallel.ulysses_degree=2", "model.mixers=S", "model.window=null", "model.sinks=0")
    wiring = "parallel.topology={kind: cables, link_gbit: 1, latency_us: 0}"
    (line,) = [
        line for line in auto_lines(folder, *changes, wiring) if line.startswith("len       128")
    ]
    choice = choose(
        shape=Shape(batch=1, heads=2, kv_heads=1, head_dim=8, dtype=torch.float32),
        sharding=Sharding(128, 4, "zigzag"),
        mask=Mask(),
        wiring=wire_up(
            TopologyConfig(kind="cables", link_gbit=1, latency_us=0),
            ranks=(0, 2, 4, 6),
            world_size=8,
        ),
    )
    assert line == f"len       128: auto: forward {choice.forward}, backward {choice.backward}"
    # Otherwise a fixed text would do.
    assert (choice.forward, choice.backward) != ("one_way", "one_way")


HYBRID = ("model.mixers=LS", "model.window=null", "model.sinks=0")


def test_the_table_says_how_states_travel_beside_what_softmax_layers_take(folder: Path) -> None:
    lines = auto_lines(folder, *HYBRID, "parallel.ulysses_degree=2")
    # Of a group that shares the heads there is no ring, but states travel all the same.
    assert re.fullmatch(r"len        32: auto: L states (all_gather|ring)", lines[0])
    choice = r"S forward \w+, backward \w+; L states (all_gather|ring)"
    assert re.fullmatch(choice, lines[-1].split("auto: ")[1])
    lines = auto_lines(folder, *HYBRID, "parallel.state_exchange=ring")
    assert lines and not any("states" in line for line in lines)


@pytest.mark.parametrize(("decay", "cables"), [("data", True), ("alibi", False)])
def test_how_states_travel_is_what_the_cost_function_says(
    folder: Path, decay: str, cables: bool
) -> None:
    wiring = "{kind: cables, link_gbit: 0.001, latency_us: 0}" if cables else "switch"
    pure = ("model={mixers: L, num_kv_heads: null, qk_norm: false, window: null, sinks: 0}",)
    settings = (f"model.decay_style={decay}", f"parallel.topology={wiring}")
    line = auto_lines(folder, *pure, *settings)[-1]
    told = choose_exchange(
        shape=StateShape(heads=4, key_dim=8, value_dim=8, data_decay=decay == "data"),
        chain=chain_of(Sharding(128, 8, "zigzag"), None),
        wiring=wire_up(
            TopologyConfig(kind="cables", link_gbit=0.001, latency_us=0)
            if cables
            else TopologyConfig(),
            ranks=tuple(range(8)),
            world_size=8,
        ),
    )
    assert line == f"len       128: auto: L states {told}"
    assert told == ("ring" if cables else "all_gather")
