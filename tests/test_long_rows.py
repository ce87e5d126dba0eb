"""Rows of 65,536 and 131,072 tokens go all the way from the dataset to an update."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ringctx.data.tokenizers import ByteTokenizer
from ringctx.data.writer import DatasetWriter
from ringctx.run_plan import make_run_plan
from ringctx.tracking import read_metrics
from ringctx.trainer import Trainer
from tests.ranks import run_ranks
from tests.tiny import read_config, world, write_config

CONFIG = """
model: {{dim: 8, num_layers: 1, num_heads: 1, mlp_dim: 8}}
data: {{path: {folder}/dataset}}
curriculum: {{min_len: 256, max_len: {length}, tokens_per_step: {length}, first_step: longest}}
parallel: {{tokens_per_rank: {per_rank}}}
train: {{run_dir: {folder}/run, steps: 1, device: cpu}}
"""


def _train(folder: Path) -> None:
    run = make_run_plan(read_config(folder), world_size=dist.get_world_size())
    trainer = Trainer(run, world=world())
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.fit()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("length", [65_536, 131_072])
def test_a_one_head_model_trains_a_step_on_one_row(length: int, tmp_path: Path) -> None:
    rng, tokenizer = np.random.default_rng(0), ByteTokenizer()
    with DatasetWriter(tmp_path / "dataset", tokenizer=tokenizer) as writer:
        ids = np.append(rng.integers(97, 123, size=length + 700), tokenizer.end_id)
        writer.add(ids, np.array([len(ids)]))
        writer.finish(built_from={})
    text = CONFIG.replace("{length}", str(length)).replace("{per_rank}", str(length // 2))
    write_config(tmp_path, text)
    run_ranks(2, _train, tmp_path, timeout_s=500)
    (record,) = read_metrics(tmp_path / "run")
    assert (record["bucket_len"], record["num_sequences"], record["cp_degree"]) == (length, 1, 2)
    assert np.isfinite(record["loss"])
