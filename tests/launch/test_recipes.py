"""Every ready-made curriculum trains: its config, with all sizes scaled down to a tiny dataset."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from omegaconf import OmegaConf

from ringctx.config_file import load_config, parse_size
from ringctx.data.tokenizers import ByteTokenizer
from ringctx.data.writer import DatasetWriter
from ringctx.run_plan import make_run_plan
from ringctx.tracking import read_metrics
from ringctx.trainer import Trainer
from tests.ranks import run_ranks
from tests.tiny import world

RECIPES = sorted((Path(__file__).parents[2] / "launch/configs/curricula").glob("*.yaml"))
SIZES = {"len", "min_len", "max_len", "tokens_per_step", "tokens", "window_start"}
STEPS = 12


def scaled(recipe: Path, folder: Path) -> Path:
    """The recipe with its longest row at 128 tokens, over a dataset with the sources it names."""
    raw: Any = OmegaConf.to_container(OmegaConf.load(recipe))
    rule = raw["curriculum"]
    longest = max(size for name, size in sizes(rule) if name in ("len", "max_len"))
    factor = longest // 128
    scale(rule, factor)
    rule["tokens_per_step"] = 512
    for stage in rule.get("stages", ()):
        stage.pop("tokens_per_step", None)
        if "tokens" in stage:
            stage["tokens"] = STEPS // 2 * 512
        if "mix" in stage:
            stage["mix"] = {scaled_key(key, factor): n for key, n in stage["mix"].items()}
    raw["data"] = {"path": str(write_sources(folder, rule))}
    raw["model"] = {**raw.get("model", {}), "dim": 16, "num_layers": 1, "num_heads": 2}
    raw["parallel"] = {"tokens_per_rank": 64}
    raw["train"] = {"run_dir": str(folder / "run"), "device": "cpu", "steps": STEPS}
    raw["optim"] = {**raw.get("optim", {}), "warmup_steps": 2}
    path = folder / "config.yaml"
    OmegaConf.save(OmegaConf.create(raw), path)
    return path


def sizes(section: Any) -> list[tuple[str, int]]:
    found = []
    for name, value in section.items():
        if isinstance(value, list):
            found += [size for entry in value for size in sizes(entry)]
        elif name in SIZES:
            found.append((name, parse_size(str(value))))
    return found


def scale(section: Any, factor: int) -> None:
    for name, value in section.items():
        if isinstance(value, list):
            for entry in value:
                scale(entry, factor)
        elif name in SIZES:
            section[name] = max(2, parse_size(str(value)) // factor)


def scaled_key(key: str, factor: int) -> str:
    name, _, length = key.partition("@")
    return f"{name}@{parse_size(length) // factor}" if length else key


def write_sources(folder: Path, rule: Any) -> Path:
    """Documents of 20 to 700 bytes, in every source that a mix names."""
    mixes = [stage.get("mix", {}) for stage in rule.get("stages", ())]
    names = {key.partition("@")[0] for mix in mixes for key in mix}
    tokenizer, rng = ByteTokenizer(), np.random.default_rng(0)
    with DatasetWriter(folder / "dataset", tokenizer=tokenizer, sources=sorted(names)) as writer:
        for source in range(max(1, len(names))):
            for length in rng.integers(20, 700, size=60 if names else 120):
                ids = np.append(rng.integers(97, 123, size=length), tokenizer.end_id)
                of = np.array([source], dtype=np.uint16) if names else None
                writer.add(ids, np.array([len(ids)]), sources=of)
        writer.finish(built_from={})
    return folder / "dataset"


def train_recipe(path: Path) -> None:
    run = make_run_plan(load_config(path), world_size=dist.get_world_size())
    Trainer(run, world=world()).fit()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_on_two_ranks(recipe: Path, tmp_path: Path) -> None:
    path = scaled(recipe, tmp_path)
    run_ranks(2, train_recipe, path)
    records = read_metrics(tmp_path / "run")
    assert len(records) == STEPS
    assert all(np.isfinite(record["loss"]) for record in records)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_at_its_real_sizes_and_has_a_run_folder_of_its_own(recipe: Path) -> None:
    assert Path(load_config(recipe).train.run_dir).name == recipe.stem
