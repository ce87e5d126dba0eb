"""What a run will do is known, and told, before anything is made."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from ringctx.config import TopologyConfig
from ringctx.config_file import config_to_dict
from ringctx.errors import CheckpointError, ConfigError, DatasetError
from ringctx.parallel.cost import choose
from ringctx.parallel.layout import Sharding
from ringctx.parallel.mask import Mask
from ringctx.parallel.topology import wire_up
from ringctx.parallel.traffic import Shape
from ringctx.run_plan import changed_fields, fields_to_agree_on, layout_table, make_run_plan
from tests.tiny import read_config, run_plan, write_config, write_dataset


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


def test_null_steps_are_the_whole_plan_and_stay_null_in_the_config(folder: Path) -> None:
    run = run_plan(folder, "train.steps=null")
    assert run.num_steps == len(run.plan)
    assert run.config.train.steps is None


def test_a_larger_vocabulary_than_the_datasets_is_kept(folder: Path) -> None:
    assert run_plan(folder, "model.vocab_size=300").config.model.vocab_size == 300
    assert run_plan(folder).config.model.vocab_size == 257


def test_places_may_differ_between_ranks_and_nothing_else(folder: Path) -> None:
    here = fields_to_agree_on(run_plan(folder))
    (folder / "dataset").rename(folder / "elsewhere")
    there = fields_to_agree_on(run_plan(folder, f"data.path={folder}/elsewhere"))
    assert here == there
    assert here != fields_to_agree_on(
        run_plan(folder, f"data.path={folder}/elsewhere", "optim.eps=1e-9")
    )


def test_what_changed_since_a_checkpoint_is_warned_about_or_refused(folder: Path) -> None:
    before = config_to_dict(read_config(folder))
    assert changed_fields(before, read_config(folder)) == []
    changed = read_config(folder, "optim.lr=1", "tracking.log_every=3")
    assert changed_fields(before, changed) == ["optim.lr: 0.01 -> 1.0"]
    with pytest.raises(CheckpointError, match=r"model\.qk_norm: True -> False"):
        changed_fields(before, read_config(folder, "model.qk_norm=false"))
    with pytest.raises(CheckpointError, match=r"model\.window: 24 -> 25"):
        changed_fields(before, read_config(folder, "model.window=25"))


def test_layout_schedule_and_wiring_may_change_on_resume(folder: Path) -> None:
    before = config_to_dict(read_config(folder))
    other = ("layout=striped", "schedule=two_way", "topology=cables", "topology.link_gbit=1")
    overrides = [f"parallel.{item}" for item in other]
    assert changed_fields(before, read_config(folder, *overrides)) == []


def test_a_checkpoint_older_than_a_setting_had_its_default(folder: Path) -> None:
    plain = ("model.mixers=S", "model.window=null", "model.sinks=0")
    before = config_to_dict(read_config(folder, *plain))
    for name in ("mixers", "window", "sinks"):
        del before["model"][name]
    del before["parallel"]["topology"]
    assert changed_fields(before, read_config(folder, *plain)) == []
    with pytest.raises(CheckpointError, match=r"model\.mixers: S -> SW"):
        changed_fields(before, read_config(folder))


def test_settings_that_are_a_mapping_may_be_newer_than_a_checkpoint(folder: Path) -> None:
    before = config_to_dict(read_config(folder))
    sources = ("data.path=''", f"data.sources={{a: {folder}/dataset}}", "curriculum.mix={a: 1}")
    assert changed_fields(before, read_config(folder, *sources)) == []


def test_ranks_agree_on_every_part_of_the_wiring(folder: Path) -> None:
    fields = fields_to_agree_on(run_plan(folder, "parallel.topology.link_gbit=25"))
    assert fields["parallel.topology.link_gbit"] == 25
    assert fields["parallel.topology.kind"] == "switch"


def test_wandb_that_is_not_installed_is_told_before_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tracking\.wandb=project needs wandb: pip install"):
        run_plan(folder, "tracking.wandb=project")


NODES = ("parallel.topology={kind: two_level, ranks_per_node: 3}", "parallel.tokens_per_rank=32")


def test_nodes_that_do_not_fit_are_told_before_the_run_with_those_that_do(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_plan(folder, *NODES, world_size=8)
    message = str(caught.value)
    # cp 2: ranks 2 and 3 lie on two nodes, one each; cp 4: 0, 1, 2 and 3 do not spread evenly.
    assert "parallel.topology.ranks_per_node=3 does not spread the 4 ranks of a ring" in message
    assert "(0, 1, 2, 3)" in message
    assert "of the numbers that divide the world of 8 ranks, 1, 2, 4, 8 fit" in message
    for fitting in (1, 2, 4, 8):
        run_plan(folder, *NODES, f"parallel.topology.ranks_per_node={fitting}", world_size=8)


def test_nodes_that_fit_the_first_ring_must_fit_the_others(folder: Path) -> None:
    # Ranks 0 to 3 share a node of 6; of 4 to 7, two lie on each; of 8 to 11, all on the second.
    fits = [*NODES, "parallel.topology.ranks_per_node=6", "parallel.cp_degree=4"]
    run_plan(folder, *fits, world_size=12)
    with pytest.raises(ConfigError, match=r"the 4 ranks of a ring \(4, 5, 6, 7\).*, 12 fit"):
        run_plan(folder, *fits, "parallel.topology.ranks_per_node=5", world_size=12)


def test_nodes_need_only_fit_the_rings_that_the_heads_leave(folder: Path) -> None:
    # All of a group share the heads: no ring. Striped, the ranks of a ring are neighbours.
    run_plan(folder, *NODES, "parallel.ulysses_degree=4", world_size=8)
    run_plan(folder, *NODES, "parallel.ulysses_degree=2", "parallel.layout=striped", world_size=8)


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


def _flip_a_byte(folder: Path) -> None:
    path = folder / "dataset" / "shard-00000.bin"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def test_changed_data_are_used_when_allowed_but_never_by_a_resume(folder: Path) -> None:
    state = run_plan(folder).plan.state(3)
    _flip_a_byte(folder)
    with pytest.raises(DatasetError, match="was changed after the build"):
        run_plan(folder)
    run = run_plan(folder, "data.allow_changed=true")
    assert run.dataset.changed
    with pytest.raises(ConfigError, match=r"data\.allow_changed=true does not go with a resume"):
        make_run_plan(run.config, world_size=1, state=state)


def test_rejects_an_end_before_what_is_done(folder: Path) -> None:
    state = run_plan(folder).plan.state(8)
    config = run_plan(folder, "train.steps=7").config
    with pytest.raises(ConfigError, match=r"train\.steps=7, but the checkpoint has 8 steps done"):
        make_run_plan(config, world_size=1, state=state)


def test_datasets_joined_by_name_are_sources_of_a_mix(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    write_dataset(tmp_path / "more", seed=1)
    sources = f"data.sources={{a: {folder}/dataset, b: {tmp_path}/more/dataset}}"
    run = run_plan(folder, "data.path=''", sources, "curriculum.mix={a: 1, b: 3}")
    assert run.dataset.source_names == ("a", "b")
    alone = run_plan(folder).dataset.num_documents
    for t in range(0, len(run.plan), 5):
        step = run.plan.step(t)
        from_a = int((step.pieces[:, 0] < alone).sum())
        assert abs(from_a - step.num_rows / 4) <= 1
