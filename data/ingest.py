"""Build a dataset: find documents, encode them in parallel, write them in order.

Tasks of a few megabytes go to worker processes; results are taken back in the order of the tasks,
so the dataset is the same, byte for byte, whatever the number of processes.
Price: bounded by the tokenizer, about 5 M tokens a second and core; memory holds a few tasks a
process and the largest document.
"""

import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from ringctx.data.encode import (
    Encoded,
    LineTask,
    TextTask,
    encode_in_worker,
    encode_task,
    split_tasks,
)
from ringctx.data.sources import LineSource, TextSource, find_sources, parse_group_by
from ringctx.data.tokenizers import Tokenizer, load_tokenizer, name_end_token
from ringctx.data.writer import DatasetWriter
from ringctx.errors import ConfigError, DatasetError

__all__ = ["BuildReport", "build_dataset"]

# Below this starting processes takes longer than encoding.
INLINE_BYTES = 16 * 2**20
MAX_UNDECODABLE_SHARE = 0.01

_TASKS_AHEAD = 2


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

    def count(self, done: Encoded) -> None:
        """Add the result of a task."""
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
    workers: int | None = None,
    progress: bool = False,
) -> BuildReport:
    """Encode files and folders into the dataset `out`.

    Args:
        inputs: text and JSONL files, gzipped or not, and folders of them.
        out: folder to make; it must not exist.
        tokenizer: `bytes`, a rank file, `path:n` for its first n ranks, or a `tokenizer.json`.
        end_token: the token of a `tokenizer.json` that ends documents; None: as its
            `tokenizer_config.json` says.
        glob: which files of a folder to take.
        group_by: `file`, `dir` or `dir:DEPTH`: which files of a folder form one document.
        workers: processes; None takes all cores, and none at all for small inputs.
        progress: show a bar on standard error, if that is a terminal.

    Raises:
        ConfigError: if an option is wrong or `out` exists.
        DatasetError: if an input is broken, or more than 1 % of the texts are not UTF-8.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers} must be at least 1")
    encoder = load_tokenizer(name_end_token(tokenizer, end_token))
    sources = find_sources(inputs, glob=glob, group_by=parse_group_by(group_by))
    size = sum(file.stat().st_size for source in sources for file in _files(source))
    if workers is None:
        workers = 1 if size < INLINE_BYTES else os.cpu_count() or 1
    report = BuildReport()
    tasks = split_tasks(sources)
    try:
        with (
            DatasetWriter(out, tokenizer=encoder) as writer,
            closing(_encode(tasks, encoder, workers)) as results,
        ):
            for done in _with_progress(results, report, total_bytes=size, show=progress):
                writer.add(done.tokens, done.lengths)
            _check_report(report)
            options = {"inputs": [str(item) for item in inputs], "glob": glob, "group_by": group_by}
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
    tasks: Iterable[TextTask | LineTask], tokenizer: Tokenizer, workers: int
) -> Generator[Encoded]:
    """Results of all tasks, in their order."""
    if workers == 1:
        for task in tasks:
            yield encode_task(task, tokenizer)
        return
    # forkserver: this process may hold threads, which a plain fork does not survive.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([encode_in_worker.__module__])
    waiting: deque[Future[Encoded]] = deque()
    here = (os.getcwd(),)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=os.chdir, initargs=here
    ) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(encode_in_worker, task, tokenizer.name))
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


def _with_progress(
    results: Iterable[Encoded], report: BuildReport, *, total_bytes: int, show: bool
) -> Iterator[Encoded]:
    """Count results in the report, and show a bar with MB/s, documents and tokens/s."""
    # disable=None: no bar where standard error is not a terminal.
    with tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None if show else True) as bar:
        for done in results:
            report.count(done)
            bar.update(done.input_bytes)
            if not bar.disable:
                speed = report.tokens / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{report.documents:,} documents, {speed / 1e6:.1f} Mtok/s")
            yield done


def _check_report(report: BuildReport) -> None:
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
