"""Checkpoints that are whole or not there: written aside, hashed, renamed, checked before use.

torch's distributed checkpoint (DCP) writes and reads the tensors, so another world size or engine
can load them; DCP alone reads a flipped bit without a word, so a manifest holds the size and
sha256 of every file. A folder counts only with a manifest that checks.
Layout: `step-00000100/{MANIFEST.json, trainer.json, .metadata, __<rank>_<n>.distcp}`; `latest`
names the newest.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from ringctx.errors import CheckpointError
from ringctx.parallel.agreement import together

__all__ = ["find_checkpoint", "load_checkpoint", "read_trainer_state", "save_checkpoint"]

_LOG = logging.getLogger(__name__)
_DISK = (OSError,)
_MANIFEST = "MANIFEST.json"
_TRAINER = "trainer.json"
_NAME = re.compile(r"step-(\d{8})")


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    trainer_state: dict[str, Any],
    keep: int | None,
) -> Path:
    """Write everything that a resume needs; every rank must call it.

    Args:
        folder: holds all checkpoints of a run; on several nodes, a shared file system.
        step: steps done.
        model: as made by the engine.
        optimizer: over the model's parameters.
        trainer_state: JSON-able, equal on all ranks.
        keep: newest checkpoints to keep; None: all.

    Returns:
        The finished checkpoint.

    Raises:
        OSError: on every rank, if any rank could not write its part.
    """
    final = folder / f"step-{step:08d}"
    aside = folder / f"step-{step:08d}.tmp"
    together(lambda: _start(aside), failures=_DISK, only_first=True)
    weights, states = get_state_dict(model, optimizer)
    state_dict_saver.save({"model": weights, "optimizer": states}, checkpoint_id=aside)
    hashes = together(lambda: _hash_files(aside, pattern=f"__{dist.get_rank()}_*"), failures=_DISK)
    files = {name: entry for part in hashes for name, entry in part.items()}
    together(
        lambda: _finish(aside, final, step, files, trainer_state), failures=_DISK, only_first=True
    )
    together(lambda: _prune(folder, keep), failures=_DISK, only_first=True)
    return final


def find_checkpoint(folder: Path, *, resume: int | str) -> Path | None:
    """The checkpoint to start from; every rank must call it and gets the same answer.

    Args:
        folder: holds all checkpoints of a run.
        resume: `auto`: the newest good one, or None if there is none at all; `never`: None, and
            an error if there is one; a number: that step and no other.

    Raises:
        CheckpointError: if the step asked for is missing or damaged, or none of several is good.
    """
    found = sorted(p for p in folder.glob("step-*") if _NAME.fullmatch(p.name))
    if resume == "never":
        if found:
            raise CheckpointError(
                f"{folder} holds checkpoints and checkpoint.resume=never; choose another "
                "train.run_dir, or checkpoint.resume=auto to go on from the newest"
            )
        return None
    if resume != "auto":
        found = _only_step(found, folder, int(resume))
    damage: list[str] = []
    for path in reversed(found):
        shares = together(partial(_check_share, path), failures=_DISK)
        problems = [problem for share in shares for problem in share]
        if not problems:
            for line in damage:
                _LOG.warning("skipped a damaged checkpoint: %s", line)
            return path
        damage.append("; ".join(problems))
    if damage:
        raise CheckpointError("no checkpoint can be used:\n" + "\n".join(damage))
    return None


def read_trainer_state(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `trainer_state`."""
    state: dict[str, Any] = json.loads((path / _TRAINER).read_text())
    return state


def load_checkpoint(path: Path, *, model: nn.Module, optimizer: Optimizer) -> None:
    """Fill model and optimizer in place, whatever world size or engine wrote them.

    Args:
        path: as found by `find_checkpoint`.
        model: as made by the engine, with the same sizes.
        optimizer: over the model's parameters.
    """
    weights, states = get_state_dict(model, optimizer)
    state_dict_loader.load({"model": weights, "optimizer": states}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)


def _start(aside: Path) -> None:
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)


def _finish(
    aside: Path, final: Path, step: int, files: dict[str, Any], trainer_state: dict[str, Any]
) -> None:
    _write_json(aside / _TRAINER, trainer_state)
    files |= _hash_files(aside, pattern=_TRAINER) | _hash_files(aside, pattern=".metadata")
    _write_json(aside / _MANIFEST, {"version": 1, "step": step, "files": files})
    _sync_folder(aside)
    replaced = final.with_suffix(".old")
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    pointer = final.parent / "latest.tmp"
    pointer.write_text(final.name + "\n")
    pointer.replace(final.parent / "latest")
    _sync_folder(final.parent)


def _prune(folder: Path, keep: int | None) -> None:
    whole = sorted(p for p in folder.glob("step-*") if _NAME.fullmatch(p.name))
    for path in whole[: -keep if keep else 0]:
        # Without its manifest the folder no longer counts, so a kill half-way does no harm.
        (path / _MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def _only_step(found: list[Path], folder: Path, step: int) -> list[Path]:
    chosen = [path for path in found if path.name == f"step-{step:08d}"]
    if not chosen:
        steps = ", ".join(str(int(path.name[5:])) for path in found) or "none"
        raise CheckpointError(
            f"checkpoint.resume={step}: {folder} has no such step; there are: {steps}"
        )
    return chosen


def _check_share(path: Path) -> list[str]:
    """What is wrong with the files of a checkpoint that this rank is to look at."""
    manifest = path / _MANIFEST
    if not manifest.exists():
        return [f"{manifest} is missing: the save did not finish"]
    try:
        files = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError) as error:
        return [f"{manifest} is not readable: {error}"]
    problems = []
    for name in sorted(files)[dist.get_rank() :: dist.get_world_size()]:
        expected, file = files[name], path / name
        if not file.exists():
            problems.append(f"{file} is missing")
        elif file.stat().st_size != expected["bytes"]:
            problems.append(f"{file} has {file.stat().st_size:,} of {expected['bytes']:,} bytes")
        elif _sha256(file) != expected["sha256"]:
            problems.append(f"{file} does not have the content that was saved (sha256 differs)")
    return problems


def _hash_files(folder: Path, *, pattern: str) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.glob(pattern))
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: Any) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
