"""`ringctx data import`: a dataset of token files that are there already, without copying."""

import argparse
from typing import Any, get_args

from ringctx.data.import_sources import Format
from ringctx.data.importers import ImportReport, import_dataset
from ringctx.data.token_files import TokenDtype

__all__ = ["add_import_command"]


def add_import_command(commands: "argparse._SubParsersAction[Any]") -> None:
    """Register the command; it sets `run`, a function of the arguments to an exit status."""
    command = commands.add_parser(
        "import", help="make a dataset of OLMo or Megatron token files, without copying tokens"
    )
    command.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="OLMo .npy, Megatron .bin or the name before .bin, and folders of them",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="dataset folder to make")
    command.add_argument("--format", choices=get_args(Format), help="(as the names say)")
    command.add_argument(
        "--dtype",
        choices=get_args(TokenDtype),
        help="how OLMo files store ids (the smallest type that holds the vocabulary)",
    )
    command.add_argument(
        "--end-id",
        type=int,
        metavar="N",
        help="end-of-document id; OLMo files without a .csv.gz are cut there (the tokenizer's)",
    )
    vocabulary = command.add_mutually_exclusive_group(required=True)
    vocabulary.add_argument(
        "--tokenizer", metavar="NAME", help="the tokenizer the files were made with"
    )
    vocabulary.add_argument(
        "--vocab-size", type=int, metavar="N", help="its number of ids, where it cannot be loaded"
    )
    command.set_defaults(run=_import)


def _import(args: argparse.Namespace) -> int:
    report = import_dataset(
        args.sources,
        args.out,
        format=args.format,
        dtype=args.dtype,
        end_id=args.end_id,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        progress=True,
    )
    print("\n".join(_lines(report, args.out)))
    return 0


def _lines(report: ImportReport, out: str) -> list[str]:
    lines = [
        f"wrote {out}",
        f"  files      {report.files:,} of {report.format}, linked, not copied: leave them there",
        f"  documents  {report.documents:,} (the longest has {report.longest:,} tokens)",
        f"  tokens     {report.tokens:,}",
        f"  skipped    {f'{report.empty:,} empty' if report.empty else 'nothing'}",
    ]
    if report.one_token:
        lines.append(f"  no target  {report.one_token:,} documents of one token, kept in place")
    if report.unended:
        lines.append(
            f"  open end   {report.unended:,} documents do not end with id {report.end_id}"
        )
    return [*lines, f"next: ringctx data stats {out}"]
