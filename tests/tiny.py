"""A run small enough for tests: documents of many lengths, a model of a few thousand weights."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ringctx.config import Config
from ringctx.config_file import load_config
from ringctx.data.tokenizers import ByteTokenizer
from ringctx.data.writer import DatasetWriter
from ringctx.parallel.mesh import World
from ringctx.resume import Beginning, plan_or_resume
from ringctx.run_plan import RunPlan, make_run_plan
from ringctx.trainer import start

CONFIG = """
model:
  {{dim: 32, num_layers: 2, num_heads: 4, num_kv_heads: 2, mlp_dim: 48, qk_norm: true,
    mixers: SW, window: 24, sinks: 2}}
data: {{path: {folder}/dataset}}
curriculum: {{odds: grow_p2, cycles: 2, min_len: 16, max_len: 128, tokens_per_step: 256}}
parallel: {{tokens_per_rank: 128}}
optim: {{lr: 1e-2, warmup_steps: 4}}
train: {{run_dir: {folder}/run, steps: 20, loss_chunk: 50, device: cpu}}
checkpoint: {{every: null}}
"""


def write_dataset(folder: Path, *, documents: int = 60, seed: int = 0) -> Path:
    """Documents of 20 to 600 bytes with words in them, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    words = [bytes(rng.integers(97, 123, size=n).astype(np.uint8)) for n in rng.integers(2, 8, 40)]
    tokenizer = ByteTokenizer()
    with DatasetWriter(folder / "dataset", tokenizer=tokenizer) as writer:
        for length in rng.integers(20, 600, size=documents):
            text = b" ".join(words[i] for i in rng.integers(0, 40, size=300))[:length]
            tokens = np.append(tokenizer.encode(text.decode()), tokenizer.end_id)
            writer.add(tokens, np.array([len(tokens)]))
        writer.finish(built_from={"seed": seed})
    return folder / "dataset"


def write_config(folder: Path, text: str = CONFIG) -> Path:
    """The config above, for a dataset in the same folder."""
    path = folder / "config.yaml"
    path.write_text(text.format(folder=folder))
    return path


def read_config(folder: Path, *overrides: str) -> Config:
    """The config of a folder."""
    return load_config(folder / "config.yaml", overrides)


def run_plan(folder: Path, *overrides: str, world_size: int = 1) -> RunPlan:
    """Config and dataset of a folder, ready for a trainer."""
    return make_run_plan(read_config(folder, *overrides), world_size=world_size)


def world() -> World:
    """The ranks of the present process group, on the CPU."""
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=torch.device("cpu"))


def begin(folder: Path, *overrides: str) -> Beginning:
    """On a rank: what a run of this folder would do."""
    return plan_or_resume(read_config(folder, *overrides), world=world())


def train_here(folder: Path, *overrides: str) -> None:
    """On a rank: train as the entry point does."""
    start(begin(folder, *overrides), world=world()).fit()
