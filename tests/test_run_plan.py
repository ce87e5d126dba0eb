"""What a run will do is known, and told, before anything is made."""

import importlib.util
from pathlib import Path

import pytest
import torch

from ringctx.config_file import config_to_dict
from ringctx.errors import CheckpointError, ConfigError, DatasetError
from ringctx.run_plan import changed_fields, fields_to_agree_on, make_run_plan
from tests.tiny import read_config, run_plan, write_config, write_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path)
    write_config(tmp_path)
    return tmp_path


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


HYBRID = ("model.mixers=LS", "model.window=null", "model.sinks=0")
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


def test_nodes_must_fit_the_whole_group_through_which_states_travel(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"the 4 ranks of a ring \(0, 1, 2, 3\)"):
        run_plan(folder, *NODES, *HYBRID, "parallel.ulysses_degree=4", world_size=8)


def test_the_backend_may_change_on_resume_and_the_decay_may_not(folder: Path) -> None:
    before = config_to_dict(read_config(folder, *HYBRID))
    changed = read_config(folder, *HYBRID, "model.lightning_backend=triton")
    assert changed_fields(before, changed) == ["model.lightning_backend: torch -> triton"]
    with pytest.raises(CheckpointError, match=r"model\.decay_style: alibi -> data"):
        changed_fields(before, read_config(folder, *HYBRID, "model.decay_style=data"))


def test_a_backend_that_is_not_installed_is_told_before_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"backend=fla needs flash-linear-attention: pip inst"):
        run_plan(folder, *HYBRID, "model.lightning_backend=fla")
    with pytest.raises(ConfigError, match=r"needs Triton: pip install 'ringctx\[gpu\]'"):
        run_plan(folder, *HYBRID, "model.lightning_backend=triton")


def test_kernels_of_lightning_layers_that_cannot_run_are_told_before_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = "model.lightning_backend=fla"
    with pytest.raises(ConfigError, match=r"backend=fla .* CUDA devices only, .* choose torch"):
        run_plan(folder, *HYBRID, backend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"train.dtype=fp32 does not go with it"):
        run_plan(folder, *HYBRID, backend, "train.device=auto")
    on_bf16 = (*HYBRID, backend, "train.device=auto", "train.dtype=bf16")
    with pytest.raises(
        ConfigError, match=r"are shared by \d ranks; choose torch or triton, or raise"
    ):
        run_plan(folder, *on_bf16, "parallel.tokens_per_rank=64", world_size=2)


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
