"""The curriculum experiment measures what it says, in small."""

import json
from pathlib import Path

import pytest
import torch
from curricula_report import draw, summarise, table
from curricula_run import HeldOut, run_variant

from ringctx.data import open_dataset
from ringctx.parallel.comm import SoloGroup
from ringctx.parallel.mesh import context_mesh
from ringctx.train_step import build_model, starting_value
from tests.ranks import run_ranks
from tests.tiny import read_config, run_plan, write_config, write_dataset

CONFIG = """
model: {{dim: 16, num_layers: 1, num_heads: 2, mlp_dim: 16}}
data: {{path: {folder}/dataset}}
curriculum: {{kind: packed, len: 128, doc_mask: false, tokens_per_step: 256, total_tokens: 2048}}
parallel: {{tokens_per_rank: 256, engine: ddp}}
train: {{run_dir: {folder}/run, device: cpu}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path)
    write_config(tmp_path, CONFIG)
    return tmp_path


def _run(folder: Path) -> None:
    # The variant starts a world of its own.
    torch.distributed.destroy_process_group()
    run_variant(
        "concat",
        folder / "config.yaml",
        heldout=folder / "dataset",
        out=folder,
        num_evals=2,
        train_len=128,
    )


def test_held_out_loss_is_that_of_documents_alone_and_the_mean_over_positions(folder: Path) -> None:
    run = run_plan(folder)
    model = build_model(run.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(starting_value(name, parameter.shape, config=run.config))
    seen = HeldOut(open_dataset(folder / "dataset"), longest=256)
    found = seen.losses(model, limit=256)
    total, count = 0.0, 0
    for document in seen._documents:
        inputs, targets = document[None, :-1], document[None, 1:]
        at = torch.arange(inputs.shape[1])
        loss = model(inputs, targets=targets, positions=at, mesh=context_mesh(SoloGroup()))
        total, count = total + float(loss.detach()), count + inputs.shape[1]
    assert count == seen.num_tokens
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert len(found["by_position"]) == len(seen.edges) - 1
    assert seen.losses(model, limit=64)["by_position"][1:] == [None, None]


def test_a_variant_leaves_its_measurements_and_the_report_reads_them(folder: Path) -> None:
    run_ranks(1, _run, folder)
    lines = [json.loads(line) for line in (folder / "concat.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, 9))
    measured = summarise(folder, ["concat", "absent"])
    row = measured["concat"]
    assert list(measured) == ["concat"] and row["finished"] and row["tokens"] == 2048
    assert [tokens for tokens, _, _ in row["evaluations"]] == [0, 512, 2048]
    assert row["heldout_loss"] == row["evaluations"][-1][2] < row["evaluations"][0][2]
    assert len(table(measured)) == 3
    draw(folder, measured, folder / "picture.png")
    assert (folder / "picture.png").stat().st_size > 0


def test_every_variant_of_the_experiment_is_a_valid_config(folder: Path) -> None:
    from curricula import VARIANTS

    from ringctx.config import CurriculumConfig
    from ringctx.config_file import build_section

    assert read_config(folder).curriculum.kind == "packed"
    for name, rule in VARIANTS.items():
        made = build_section(CurriculumConfig, rule, name=name)
        assert made.kind in ("packed", "decomposed")
