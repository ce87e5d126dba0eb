"""One variant of the curriculum experiment: train, and measure held-out loss on the way.

Started by `curricula.py`, one process and one thread each. Training is the project's own trainer;
evaluation runs documents alone, without packing, through the model's forward, so all variants are
asked the same. Lines of JSON are appended as they come: a kill loses nothing.
"""

import json
import math
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ringctx.config_file import load_config
from ringctx.data import Dataset, open_dataset
from ringctx.launch.distributed import world_group
from ringctx.model import Transformer
from ringctx.parallel.comm import SoloGroup
from ringctx.parallel.mesh import context_mesh
from ringctx.run_plan import make_run_plan
from ringctx.trainer import Trainer

__all__ = ["HeldOut", "run_variant"]

_LOGITS_AT_ONCE = 2048
# Every other document of the evaluation is one of the longest, so that late positions are seen.
_NUM_DOCUMENTS = 48


class HeldOut:
    """Documents that no variant trains on, and the loss of a model on them."""

    def __init__(self, dataset: Dataset, *, longest: int) -> None:
        """Choose the documents: half of them the longest, half spread over all others.

        Args:
            dataset: held-out documents.
            longest: tokens of each that are looked at.
        """
        order = np.argsort(-dataset.lengths, kind="stable")
        half = _NUM_DOCUMENTS // 2
        spread = np.linspace(half, len(order) - 1, half).astype(int)
        chosen = [*order[:half].tolist(), *order[spread].tolist()]
        self._documents = [
            torch.from_numpy(dataset.document(i)[: longest + 1].astype(np.int64)) for i in chosen
        ]
        edges = [0, *(2**k for k in range(6, longest.bit_length()))]
        self.edges = [edge for edge in edges if edge <= longest]

    @property
    def num_tokens(self) -> int:
        """Tokens that are predicted."""
        return sum(len(document) - 1 for document in self._documents)

    @torch.no_grad()
    def losses(self, model: Transformer, *, limit: int) -> dict[str, Any]:
        """Mean loss, and by position in the document.

        Args:
            model: to ask.
            limit: positions beyond this are left out.
        """
        sums, counts = torch.zeros(len(self.edges) - 1), torch.zeros(len(self.edges) - 1)
        edges = torch.tensor(self.edges)
        for document in self._documents:
            tokens = document[: limit + 1]
            losses = _token_losses(model, tokens)
            bins = torch.bucketize(torch.arange(len(losses)), edges, right=True) - 1
            sums.index_add_(0, bins, losses)
            counts.index_add_(0, bins, torch.ones_like(losses))
        by_position = [
            float(total / count) if count else None
            for total, count in zip(sums, counts, strict=True)
        ]
        loss = float(sums.sum() / counts.sum())
        return {"limit": limit, "loss": loss, "by_position": by_position}


def run_variant(
    name: str, config_path: Path, *, heldout: Path, out: Path, num_evals: int, train_len: int
) -> None:
    """Train one variant and append its measurements to OUT/NAME.jsonl.

    Args:
        name: of the variant.
        config_path: its YAML.
        heldout: dataset folder for evaluation.
        out: folder of the experiment.
        num_evals: evaluations on the way, the first before training.
        train_len: longest context of training; the last evaluation also looks at twice that.
    """
    torch.set_num_threads(1)
    config = load_config(config_path)
    with (
        world_group("cpu", timeout=timedelta(hours=1)) as world,
        (out / f"{name}.jsonl").open("w") as file,
    ):
        write = partial(_write, file, name)
        trainer = Trainer(make_run_plan(config, world_size=1), world=world)
        model = _whole_model(trainer)
        seen = HeldOut(open_dataset(heldout), longest=2 * train_len)
        due = _evaluation_steps(trainer.run.num_steps, num_evals)
        tokens, seconds, began = 0, 0.0, time.process_time()
        for planned, batches in trainer.loader.steps(0, trainer.run.num_steps):
            if planned.step in due:
                write(planned.step, tokens, seconds, seen.losses(model, limit=train_len))
                began = time.process_time()
            record = trainer.train_step(planned, batches)
            trainer.step, trainer.tokens = planned.step + 1, record.tokens
            tokens, now = record.tokens, time.process_time()
            seconds, began = seconds + now - began, now
            trained = {"train_loss": record.loss, "bucket_len": record.bucket_len}
            write(trainer.step, tokens, seconds, trained)
        final = {
            "final": True,
            "heldout_tokens": seen.num_tokens,
            "edges": seen.edges,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        last = seen.losses(model, limit=train_len)
        write(trainer.step, tokens, seconds, last)
        twice = seen.losses(model, limit=2 * train_len)
        write(trainer.step, tokens, seconds, twice | final)


def _evaluation_steps(num_steps: int, num_evals: int) -> set[int]:
    """Steps before which to evaluate: dense at first, where the loss falls fast."""
    shares = np.linspace(0, 1, num_evals, endpoint=False) ** 1.5
    return {math.floor(share * num_steps) for share in shares}


def _whole_model(trainer: Trainer) -> Transformer:
    """The model of a world of one rank; with DDP it is one level down."""
    model: Any = trainer.engine.model
    found: Transformer = getattr(model, "module", model)
    return found


def _token_losses(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """The loss of each next token of one document, in nats, `[tokens - 1]`."""
    inputs, targets = tokens[:-1], tokens[1:]
    hidden = model.hidden(
        inputs[None],
        positions=torch.arange(len(inputs)),
        mesh=context_mesh(SoloGroup(), layout="contiguous"),
    )[0].float()
    weight = model.embed.weight if model.head is None else model.head.weight
    parts = [
        F.cross_entropy(part @ weight.T, target, reduction="none")
        for part, target in zip(
            hidden.split(_LOGITS_AT_ONCE), targets.split(_LOGITS_AT_ONCE), strict=True
        )
    ]
    return torch.cat(parts)


def _write(
    file: Any, name: str, step: int, tokens: int, seconds: float, measured: dict[str, Any]
) -> None:
    line = {"variant": name, "step": step, "tokens": tokens, "cpu_seconds": seconds, **measured}
    file.write(json.dumps(line) + "\n")
    file.flush()
