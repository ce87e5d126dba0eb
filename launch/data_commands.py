"""`ringctx data build | import | stats | plan | check`: make a dataset, look at it, verify it."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from ringctx.config_file import parse_size
from ringctx.data import open_dataset
from ringctx.data.check import check_dataset
from ringctx.data.ingest import BuildReport, build_dataset
from ringctx.data.records import CHATML
from ringctx.data.stats import DatasetStats, dataset_stats
from ringctx.launch.data_pictures import draw_stats
from ringctx.launch.data_plan import add_plan_command
from ringctx.launch.import_commands import add_import_command

__all__ = ["add_data_commands"]

_BAR_WIDTH = 30


def add_data_commands(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Register the commands; each sets `run`, a function of the arguments to an exit status."""
    data = subparsers.add_parser("data", help="build, inspect and verify datasets")
    commands = data.add_subparsers(metavar="COMMAND", required=True)
    _add_build(commands)
    add_import_command(commands)
    _add_stats(commands)
    add_plan_command(commands)
    _add_check(commands)


def _add_build(commands: "argparse._SubParsersAction[Any]") -> None:
    build = commands.add_parser("build", help="encode text and JSONL files into a dataset")
    build.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="files and folders (.gz too); NAME=INPUT, for all or none, names sources to be mixed",
    )
    build.add_argument("--out", required=True, metavar="DIR", help="dataset folder to make")
    build.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="NAME",
        help="'bytes', a tiktoken-style rank file, FILE:N for its first N ranks, or a Hugging Face "
        "tokenizer.json or the folder that holds it (%(default)s)",
    )
    build.add_argument(
        "--end-token",
        metavar="TEXT",
        help="token of a tokenizer.json that ends documents (the eos_token of its "
        "tokenizer_config.json)",
    )
    build.add_argument(
        "--glob", default="**/*", metavar="PATTERN", help="files of a folder to take (%(default)s)"
    )
    build.add_argument(
        "--group-by",
        default="file",
        metavar="file|dir[:DEPTH]",
        help="what forms a document: a file, all files of a folder, or all files below each "
        "folder at DEPTH; a JSONL file always has one document a line (%(default)s)",
    )
    build.add_argument(
        "--message-template",
        default=CHATML,
        metavar="TEXT",
        help="how a message of a JSONL record becomes text, with {role} and {content}; \\n is a "
        "new line (ChatML)",
    )
    build.add_argument(
        "--target-roles",
        default="assistant",
        metavar="ROLE[,ROLE...]",
        help="whose messages are targets (%(default)s)",
    )
    build.add_argument("--workers", type=int, metavar="N", help="processes (all cores)")
    build.set_defaults(run=_build)


def _add_stats(commands: "argparse._SubParsersAction[Any]") -> None:
    stats = commands.add_parser("stats", help="lengths of documents and sequences")
    stats.add_argument("dataset", metavar="DIR")
    stats.add_argument("--min-len", default="256", metavar="LEN", help="shortest sequence (256)")
    stats.add_argument(
        "--max-len", metavar="LEN", help="longest sequence (the longest that a document reaches)"
    )
    stats.add_argument("--json", action="store_true", help="print one JSON object")
    stats.add_argument("--plot", type=Path, metavar="PNG", help="draw lengths and sequences")
    stats.set_defaults(run=_stats)


def _add_check(commands: "argparse._SubParsersAction[Any]") -> None:
    check = commands.add_parser("check", help="verify every byte of a dataset")
    check.add_argument("dataset", metavar="DIR")
    check.set_defaults(run=_check)


def _build(args: argparse.Namespace) -> int:
    report = build_dataset(
        args.inputs,
        args.out,
        tokenizer=args.tokenizer,
        end_token=args.end_token,
        glob=args.glob,
        group_by=args.group_by,
        message_template=args.message_template.replace("\\n", "\n"),
        target_roles=args.target_roles.split(","),
        workers=args.workers,
        progress=True,
    )
    print("\n".join(_build_lines(report, args.out)))
    return 0


def _stats(args: argparse.Namespace) -> int:
    dataset = open_dataset(args.dataset)
    stats = dataset_stats(
        dataset,
        min_len=parse_size(args.min_len),
        max_len=parse_size(args.max_len) if args.max_len else None,
    )
    if args.plot is not None:
        draw_stats(stats, dataset.lengths, args.plot)
    print(json.dumps(dataclasses.asdict(stats)) if args.json else "\n".join(_stats_lines(stats)))
    return 0


def _check(args: argparse.Namespace) -> int:
    problems = check_dataset(args.dataset)
    print("\n".join(problems) if problems else f"{args.dataset} is sound")
    return 1 if problems else 0


def _build_lines(report: BuildReport, out: str) -> list[str]:
    skipped = ", ".join(f"{n:,} {reason}" for reason, n in sorted(report.skipped.items()))
    lines = [
        f"wrote {out}",
        f"  documents  {report.documents:,} (the longest has {report.longest:,} tokens)",
        f"  tokens     {report.tokens:,}",
        f"  skipped    {skipped or 'nothing'}",
    ]
    if report.targets < report.tokens - report.documents:
        lines.insert(3, f"  targets    {report.targets:,} ({report.targets / report.tokens:.1%})")
    for name, count in report.sources.items():
        lines.append(f"  source {name}: {count.documents:,} documents, {count.tokens:,} tokens")
    lines += [f"    not UTF-8 text: {name}" for name in report.undecodable]
    return [*lines, f"next: ringctx data stats {out}"]


def _stats_lines(stats: DatasetStats) -> list[str]:
    share = stats.dropped_tokens / max(stats.tokens, 1)
    lines = [
        f"documents            {stats.documents:,} (the longest has {stats.longest:,} tokens)",
        f"tokens               {stats.tokens:,}",
        f"  in sequences       {stats.kept_tokens:,}",
        f"  dropped            {stats.dropped_tokens:,} ({share:.1%}; remainders too short)",
        f"mean sequence        {stats.mean_sequence_len:,.1f} tokens",
        f"mean context         {stats.mean_context_len:,.1f} tokens",
    ]
    if stats.buckets:
        lines += ["", f"{'length':>10} {'sequences':>12} {'tokens':>16}  share of tokens"]
    for length, pieces in stats.buckets.items():
        part = pieces * length / stats.kept_tokens
        bar = "#" * round(part * _BAR_WIDTH)
        lines.append(f"{length:>10,} {pieces:>12,} {pieces * length:>16,}  {part:6.1%} {bar}")
    return lines
