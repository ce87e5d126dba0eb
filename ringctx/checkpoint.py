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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from ringctx.errors import CheckpointError
from ringctx.parallel.agreement import agree, agree_on_first

__all__ = ["Found", "find_checkpoint", "load_checkpoint", "save_checkpoint", "set_aside_later"]

_LOG = logging.getLogger(__name__)
_VERSION = 1
_MANIFEST = "MANIFEST.json"
_TRAINER = "trainer.json"
_METADATA = ".metadata"
_NAME = re.compile(r"step-(\d{8})")

# Of one file: its size and sha256.
Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Found:
    """A checkpoint that checks, and what its trainer was told to remember."""

    path: Path
    trainer_state: dict[str, Any]


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
        CheckpointError: on every rank, if any rank could not write its part; nothing half-written
            is left.
    """
    final = folder / _name(step)
    aside = final.with_suffix(".tmp")
    agree_on_first(partial(_start, folder, aside), error=CheckpointError)
    try:
        agree(partial(_write_tensors, aside, model, optimizer), error=CheckpointError)
        own = agree(partial(_hash_own_files, aside), error=CheckpointError)
        files = _gather(own)
        agree_on_first(
            partial(_finish, aside, final, step, files, trainer_state), error=CheckpointError
        )
    except CheckpointError:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    agree_on_first(partial(_prune, folder, keep), error=CheckpointError)
    return final


def find_checkpoint(folder: Path, *, resume: int | str) -> Found | None:
    """The checkpoint to start from; every rank must call it and gets the same answer.

    Args:
        folder: holds all checkpoints of a run.
        resume: `auto`: the newest good one, or None if there is none at all; a number: that step
            and no other.

    Raises:
        CheckpointError: on every rank, if the step asked for is missing or damaged, or if there
            are checkpoints and none is good.
    """
    names = agree_on_first(partial(_candidates, folder, resume), error=CheckpointError)
    damage: list[str] = []
    for name in reversed(names):
        path = folder / name
        try:
            agree(partial(_check_share, path), error=CheckpointError)
        except CheckpointError as error:
            damage.append(f"{path}: {error}")
            continue
        for line in damage:
            _LOG.warning("passed over a damaged checkpoint: %s", line)
        return Found(path, agree_on_first(partial(_trainer_state, path), error=CheckpointError))
    if damage:
        raise _no_good(damage)
    return None


def load_checkpoint(path: Path, *, model: nn.Module, optimizer: Optimizer) -> None:
    """Fill model and optimizer in place, whatever world size or engine wrote them.

    Args:
        path: as found by `find_checkpoint`.
        model: as made by the engine, with the same sizes.
        optimizer: over the model's parameters.

    Raises:
        CheckpointError: on every rank, if a rank could not read its part.
    """
    agree(partial(_read_tensors, path, model, optimizer), error=CheckpointError)


def set_aside_later(folder: Path, *, step: int) -> None:
    """Rename the checkpoints of steps that the run will take anew, so that none is mistaken.

    They stay on disk as `abandoned-step-...`; every rank must call it.
    """
    agree_on_first(partial(_set_aside_later, folder, step), error=CheckpointError)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


def _start(folder: Path, aside: Path) -> None:
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover)
    aside.mkdir(parents=True)


def _write_tensors(aside: Path, model: nn.Module, optimizer: Optimizer) -> None:
    weights, states = get_state_dict(model, optimizer)
    try:
        state_dict_saver.save({"model": weights, "optimizer": states}, checkpoint_id=aside)
    except CheckpointException as error:
        raise CheckpointError(f"{aside} cannot be written: {_causes(error)}") from error


def _read_tensors(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    weights, states = get_state_dict(model, optimizer)
    try:
        state_dict_loader.load({"model": weights, "optimizer": states}, checkpoint_id=path)
    except CheckpointException as error:
        raise CheckpointError(f"{path} cannot be read: {_causes(error)}") from error
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)


def _causes(error: CheckpointException) -> str:
    return "; ".join(sorted({str(cause) for cause, _ in error.failures.values()}))


def _hash_own_files(aside: Path) -> Entries:
    return _hash_files(aside, pattern=f"__{dist.get_rank()}_*")


def _gather(own: Entries) -> Entries:
    """The entries of all ranks, on all ranks."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {name: entry for part in everyone for name, entry in part.items()}


def _finish(
    aside: Path, final: Path, step: int, files: Entries, trainer_state: dict[str, Any]
) -> None:
    _write_json(aside / _TRAINER, trainer_state)
    files |= _hash_files(aside, pattern=_TRAINER) | _hash_files(aside, pattern=_METADATA)
    _write_json(aside / _MANIFEST, {"version": _VERSION, "step": step, "files": files})
    _sync_folder(aside)
    replaced = final.with_suffix(".old")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    aside.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    pointer = final.parent / "latest.tmp"
    pointer.write_text(final.name + "\n")
    pointer.replace(final.parent / "latest")
    _sync_folder(final.parent)


def _prune(folder: Path, keep: int | None) -> None:
    whole = [path for path in _steps(folder) if (path / _MANIFEST).exists()]
    for path in whole[: -keep if keep else 0]:
        # Without its manifest the folder no longer counts, so a kill half-way does no harm.
        (path / _MANIFEST).unlink()
        shutil.rmtree(path)


def _candidates(folder: Path, resume: int | str) -> list[str]:
    """Names of the checkpoints that may be used, oldest first."""
    for replaced in folder.glob("step-*.old"):
        # A kill between two renames left the whole one under this name.
        if not replaced.with_suffix("").exists():
            replaced.rename(replaced.with_suffix(""))
    names = [path.name for path in _steps(folder)]
    if resume == "auto":
        return names
    if _name(int(resume)) not in names:
        steps = ", ".join(str(int(name[5:])) for name in names) or "none"
        raise CheckpointError(
            f"checkpoint.resume={resume}: {folder} has no such step; there are: {steps}"
        )
    return [_name(int(resume))]


def _no_good(damage: list[str]) -> CheckpointError:
    error = CheckpointError("no checkpoint can be used:\n" + "\n".join(damage))
    error.on_all_ranks = True
    return error


def _trainer_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / _TRAINER).read_text())
    return state


def _set_aside_later(folder: Path, step: int) -> None:
    for path in _steps(folder):
        if path.name > _name(step):
            aside, number = folder / f"abandoned-{path.name}", 1
            while aside.exists():
                number += 1
                aside = folder / f"abandoned-{path.name}-{number}"
            path.rename(aside)
            _LOG.warning("%s is of steps that are taken anew: renamed to %s", path, aside.name)


def _check_share(path: Path) -> None:
    """Raise CheckpointError unless the files that fall to this rank are as they were saved."""
    files = _read_manifest(path / _MANIFEST)
    problems = []
    for name in sorted(files)[dist.get_rank() :: dist.get_world_size()]:
        expected, file = files[name], path / name
        if not file.exists():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != expected["bytes"]:
            problems.append(f"{name} has {file.stat().st_size:,} of {expected['bytes']:,} bytes")
        elif _sha256(file) != expected["sha256"]:
            problems.append(f"{name} does not have the content that was saved (sha256 differs)")
    if problems:
        raise CheckpointError("; ".join(problems))


def _read_manifest(path: Path) -> Entries:
    if not path.exists():
        raise CheckpointError(f"{path.name} is missing: the save did not finish")
    try:
        manifest = json.loads(path.read_text())
        files: Entries = manifest["files"]
        complete = {_TRAINER, _METADATA} <= files.keys()
        complete &= all({"bytes", "sha256"} <= entry.keys() for entry in files.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name} is damaged: {error!r}") from error
    if manifest.get("version") != _VERSION or not complete:
        raise CheckpointError(f"{path.name} is damaged, or of another version than {_VERSION}")
    return files


def _hash_files(folder: Path, *, pattern: str) -> Entries:
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
