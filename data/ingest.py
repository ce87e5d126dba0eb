"""Build a dataset: find documents, encode them in parallel, write them in order.

Tasks of a few megabytes go to worker processes; results are taken back in the order of the tasks,
so the dataset is the same, byte for byte, whatever the number of processes.
Price: bounded by the tokenizer, about 5 M tokens a second and core; memory holds a few tasks a
process and the largest document.
"""

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ringctx.data.encode import (
    Encoded,
    encode_in_worker,
    encode_task,
    start_worker,
)
from ringctx.data.records import CHATML, MessageFormat
from ringctx.data.sources import (
    LineSource,
    TextSource,
    find_sources,
    parse_group_by,
    parse_inputs,
)
from ringctx.data.tasks import LineTask, TextTask, split_tasks
from ringctx.data.tokenizers import Tokenizer, load_tokenizer, name_end_token
from ringctx.data.writer import DatasetWriter
from ringctx.errors import ConfigError, DatasetError

__all__ = ["BuildReport", "SourceCount", "build_dataset"]

# Below this starting processes takes longer than encoding.
INLINE_BYTES = 16 * 2**20
MAX_UNDECODABLE_SHARE = 0.01

_TASKS_AHEAD = 2


@dataclass(frozen=True)
class SourceCount:
    """What came from a source."""

    documents: int = 0
    tokens: int = 0


@dataclass
class BuildReport:
    """What went into a dataset."""

    documents: int = 0
    tokens: int = 0
    longest: int = 0
    """Tokens of the longest document."""
    texts: int = 0
    """Files and JSONL lines that were read."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Documents left out, by reason."""
    undecodable: list[str] = field(default_factory=list)
    """Files and `file:line` that are not UTF-8 text."""
    targets: int = 0
    """Tokens that are a target: not a document's first, and not marked otherwise."""
    sources: dict[str, SourceCount] = field(default_factory=dict)
    """What came from each source, where they are named."""

    def count(self, done: Encoded, names: Sequence[str] = ()) -> None:
        """Add the result of a task."""
        for i, name in enumerate(names):
            lengths = done.lengths[done.sources == i]
            before = self.sources.get(name, SourceCount())
            self.sources[name] = SourceCount(
                before.documents + len(lengths), before.tokens + int(lengths.sum())
            )
        self.targets += _count_targets(done)
        self.documents += len(done.lengths)
        self.tokens += len(done.tokens)
        self.longest = max(self.longest, int(done.lengths.max(initial=0)))
        self.texts += done.texts
        self.undecodable += done.undecodable
        reasons = {"empty": done.empty, "one token": done.one_token}
        reasons["undecodable"] = len(done.undecodable)
        self.skipped.update({reason: n for reason, n in reasons.items() if n})


def build_dataset(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str = "bytes",
    end_token: str | None = None,
    glob: str = "**/*",
    group_by: str = "file",
    message_template: str = CHATML,
    target_roles: Sequence[str] = ("assistant",),
    workers: int | None = None,
    progress: bool = False,
) -> BuildReport:
    """Encode files and folders into the dataset `out`.

    Args:
        inputs: text and JSONL files, gzipped or not, and folders of them; or `NAME=PATH` for each,
            to name the sources of a mix.
        out: folder to make; it must not exist.
        tokenizer: `bytes`, a rank file, `path:n` for its first n ranks, or a `tokenizer.json`.
        end_token: the token of a `tokenizer.json` that ends documents; None: as its
            `tokenizer_config.json` says.
        glob: which files of a folder to take.
        group_by: `file`, `dir` or `dir:DEPTH`: which files of a folder form one document.
        message_template: how a message of a JSONL record becomes text, with `{role}` and
            `{content}`.
        target_roles: whose messages are targets.
        workers: processes; None takes all cores, and none at all for small inputs.
        progress: show a bar on standard error, if that is a terminal.

    Raises:
        ConfigError: if an option is wrong or `out` exists.
        DatasetError: if an input is broken, or more than 1 % of the texts are not UTF-8.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers} must be at least 1")
    encoder = load_tokenizer(name_end_token(tokenizer, end_token))
    messages = MessageFormat(template=message_template, target_roles=tuple(target_roles))
    given = parse_inputs(inputs)
    sources = find_sources(given, glob=glob, group_by=parse_group_by(group_by))
    size = sum(file.stat().st_size for source in sources for file in _files(source))
    if workers is None:
        workers = 1 if size < INLINE_BYTES else os.cpu_count() or 1
    options = {
        "inputs": [str(item) for item in inputs],
        "glob": glob,
        "group_by": group_by,
        "message_template": message_template,
        "target_roles": list(target_roles),
    }
    report = BuildReport()
    try:
        with (
            DatasetWriter(out, tokenizer=encoder, sources=given.names) as writer,
            closing(_encode(split_tasks(sources), encoder, messages, workers)) as results,
            _progress_bar(size, show=progress) as bar,
        ):
            for done in results:
                report.count(done, given.names)
                _advance(bar, done, report)
                named = done.sources if given.names else None
                writer.add(done.tokens, done.lengths, sources=named, loss=done.loss)
            _check_report(report, target_roles)
            skipped = dict(sorted(report.skipped.items()))
            writer.finish(
                built_from=options | {"skipped": skipped, "undecodable": report.undecodable}
            )
    except OSError as error:
        raise DatasetError(f"building {out} failed: {error}") from error
    return report


def _files(source: TextSource | LineSource) -> tuple[Path, ...]:
    return source.files if isinstance(source, TextSource) else (source.file,)


def _encode(
    tasks: Iterable[TextTask | LineTask],
    tokenizer: Tokenizer,
    messages: MessageFormat,
    workers: int,
) -> Generator[Encoded]:
    """Results of all tasks, in their order."""
    if workers == 1:
        for task in tasks:
            yield encode_task(task, tokenizer, messages)
        return
    # forkserver: this process may hold threads, which a plain fork does not survive.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([encode_in_worker.__module__])
    waiting: deque[Future[Encoded]] = deque()
    here = (os.getcwd(),)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=start_worker, initargs=here
    ) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(encode_in_worker, task, tokenizer.name, messages))
                if len(waiting) > workers * _TASKS_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DatasetError(
                "a worker process died, perhaps for lack of memory; try fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _progress_bar(total_bytes: int, *, show: bool) -> "tqdm[Any]":
    """A bar of bytes with MB/s; none where standard error is not a terminal."""
    # disable=None: tqdm asks the terminal.
    return tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None if show else True)


def _advance(bar: "tqdm[Any]", done: Encoded, report: BuildReport) -> None:
    """Move the bar, and put documents and tokens/s beside it."""
    bar.update(done.input_bytes)
    if not bar.disable:
        speed = report.tokens / max(bar.format_dict["elapsed"], 1e-9)
        bar.set_postfix_str(f"{report.documents:,} documents, {speed / 1e6:.1f} Mtok/s")


def _count_targets(done: Encoded) -> int:
    if done.loss is None:
        return len(done.tokens) - len(done.lengths)
    first = np.cumsum(done.lengths) - done.lengths
    return int(done.loss.sum()) - int(done.loss[first].sum())


def _check_report(report: BuildReport, target_roles: Sequence[str]) -> None:
    bad = report.undecodable
    if len(bad) > MAX_UNDECODABLE_SHARE * report.texts:
        some = "\n  ".join(bad[:10]) + ("\n  ..." if len(bad) > 10 else "")
        raise DatasetError(
            f"{len(bad):,} of {report.texts:,} texts are not UTF-8 text, more than 1 %:\n  {some}\n"
            "leave them out with --glob (as in --glob '**/*.py'), or convert them"
        )
    if not report.documents:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(report.skipped.items()))
        raise DatasetError(f"no document is left of {report.texts:,} texts ({reasons})")
    if not report.targets:
        raise DatasetError(
            f"none of {report.tokens:,} tokens is a target: there is nothing to learn; "
            'mark some span with "target": true, or see whether the messages have a role of '
            f"--target-roles {','.join(target_roles)}"
        )
