"""Make the real-text corpus of the benchmarks in a folder of your own, and say what it holds.

    apt-get update
    python benchmarks/corpora.py CORPUS [--sources stdlib torch kjv ...] [--group-by file]

Debian packages are downloaded and unpacked below the folder, never installed; the standard library
and torch are read where they are. Documents are split by the hash of their path, 2 % held out, and
each part becomes a dataset, `CORPUS/train` and `CORPUS/heldout`. The tokenizer is the first ranks
of Tekken, from the data file in mistral-common. Nothing of it belongs into a repository: the same
package versions give the same `sha256`, which is printed with the counts and kept in `corpus.json`.
Price: 185 MB of downloads, 1.5 GB of disk, a minute or two.
"""

import argparse
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ringctx.config_file import parse_size
from ringctx.data import Dataset, open_dataset
from ringctx.data.ingest import build_dataset
from ringctx.errors import ConfigError, RingctxError

__all__ = ["RECIPES", "Recipe", "is_held_out", "main", "make_corpus"]

LONG_TOKENS = 16_384
_HELD_OUT_PER_MILLE = 20
_TOKENIZER_PACKAGE, _TOKENIZER_FILE = "mistral-common", "mistral_common/data/tekken_240911.json"
_KJV = "kjv.txt"


@dataclass(frozen=True)
class Recipe:
    """Where a source's texts come from."""

    licence: str
    patterns: tuple[str, ...]
    """Files, relative to `root`."""
    root: str = ""
    """Folder of the texts, below the unpacked packages."""
    packages: tuple[str, ...] = ()
    """Debian packages; none: the texts are part of this Python."""
    group_depth: int | None = None
    """Files that agree in this many folders are one document; None: every file is one."""
    tarball: tuple[str, ...] = ()
    """An archive inside the package, and what to take out of it."""


_LINUX = "linux-source-6.1"
_LINUX_TAR = (
    f"usr/src/{_LINUX}.tar.xz",
    *(f"{_LINUX}/{part}" for part in ("Documentation", "fs", "kernel", "mm", "net")),
)
RECIPES = {
    "stdlib": Recipe("PSF", ("**/*.py",)),
    "torch": Recipe("BSD-3", ("**/*.py",), group_depth=2),
    "linux-docs": Recipe(
        "GPL-2",
        ("Documentation/**/*.rst", "Documentation/**/*.txt"),
        root=_LINUX,
        packages=(_LINUX,),
        tarball=_LINUX_TAR,
    ),
    "linux-code": Recipe(
        "GPL-2",
        tuple(f"{part}/**/*.[ch]" for part in ("fs", "kernel", "mm", "net")),
        root=_LINUX,
        packages=(_LINUX,),
        tarball=_LINUX_TAR,
        group_depth=2,
    ),
    "rust": Recipe("MIT/Apache-2.0", ("**/*.rs", "**/*.md"), "usr/src", ("rust-src",)),
    "perl-doc": Recipe("Artistic/GPL", ("**/*.pod",), "usr/share/perl", ("perl-doc",)),
    "python-doc": Recipe("PSF", ("**/*.rst.txt",), "usr/share/doc", ("python3.11-doc",)),
    "kjv": Recipe("public domain", (_KJV,), "usr/lib", ("bible-kjv", "bible-kjv-text")),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the corpus and print what it holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="CORPUS", help="folder to fill")
    here = [name for name, recipe in RECIPES.items() if not recipe.packages or _has_apt()]
    parser.add_argument("--sources", nargs="+", choices=RECIPES, default=here, metavar="NAME")
    parser.add_argument(
        "--group-by",
        choices=["dir", "file"],
        default="dir",
        help="dir: the code of a folder is one document (linux-code, torch); file: a file is",
    )
    parser.add_argument("--ranks", default="7936", help="of the tokenizer (%(default)s)")
    parser.add_argument("--tokenizer", metavar="NAME", help="instead of Tekken's first ranks")
    args = parser.parse_args(arguments)
    try:
        report = make_corpus(
            args.out,
            sources=args.sources,
            by_folder=args.group_by == "dir",
            tokenizer=args.tokenizer or f"{_tekken(args.out)}:{parse_size(args.ranks)}",
        )
    except (RingctxError, OSError, subprocess.CalledProcessError) as error:
        print(f"corpora: {error}", file=sys.stderr)
        return 1
    for left_out in RECIPES.keys() - set(args.sources):
        report["left_out"].append(left_out)
    (args.out / "corpus.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    return 0


def make_corpus(
    out: Path, *, sources: Sequence[str], by_folder: bool, tokenizer: str
) -> dict[str, Any]:
    """Write `out/texts`, and the datasets `out/train` and `out/heldout`.

    Args:
        out: folder, made if it is not there; packages that are there already are not fetched again.
        sources: names of recipes.
        by_folder: join files as the recipes say; False: a file is a document.
        tokenizer: as `build_dataset` takes it.

    Returns:
        Counts by source and by part.

    Raises:
        ConfigError: if a dataset is there already, or a package cannot be had.
    """
    texts = out / "texts"
    texts.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"sources": {}, "left_out": [], "tokenizer": tokenizer}
    for name in sources:
        report["sources"][name] = _write_source(name, out, by_folder=by_folder)
    for part in ("train", "heldout"):
        files = [texts / f"{name}.{part}.jsonl" for name in sources]
        build_dataset([f for f in files if f.stat().st_size], out / part, tokenizer=tokenizer)
        report[part] = _sizes(open_dataset(out / part))
    return report


def is_held_out(key: str) -> bool:
    """Whether a document is for evaluation: about one in fifty, by the hash of its path."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < _HELD_OUT_PER_MILLE


def _write_source(name: str, out: Path, *, by_folder: bool) -> dict[str, Any]:
    """Two JSONL files, and what is in them."""
    recipe, written = RECIPES[name], {"train": 0, "heldout": 0}
    everything, size, skipped = hashlib.sha256(), 0, 0
    root = _root(name, out)
    with (
        (out / "texts" / f"{name}.train.jsonl").open("w") as train,
        (out / "texts" / f"{name}.heldout.jsonl").open("w") as heldout,
    ):
        for key, files in _documents(root, recipe, by_folder=by_folder):
            parts = [text for text in map(_read_text, files) if text is not None]
            skipped += len(files) - len(parts)
            text = "\n".join(parts)
            if not text.strip():
                continue
            held = is_held_out(f"{name}/{key}")
            (heldout if held else train).write(json.dumps({"id": key, "text": text}) + "\n")
            written["heldout" if held else "train"] += 1
            everything.update(f"{key}\0{hashlib.sha256(text.encode()).hexdigest()}\n".encode())
            size += len(text.encode())
    return {
        "documents": written,
        "bytes": size,
        "files_not_text": skipped,
        "licence": recipe.licence,
        "packages": [path.stem for path in _debs(recipe, out)],
        "sha256": everything.hexdigest(),
    }


def _documents(root: Path, recipe: Recipe, *, by_folder: bool) -> Iterator[tuple[str, list[Path]]]:
    """Name and files of every document, sorted."""
    found = {file for pattern in recipe.patterns for file in root.glob(pattern)}
    groups: dict[str, list[Path]] = {}
    for file in sorted(found):
        inside = file.relative_to(root)
        if not file.is_file() or inside.parts[0] in ("site-packages", "dist-packages", "test"):
            continue
        key = inside
        if by_folder and recipe.group_depth is not None:
            key = Path(*inside.parent.parts[: recipe.group_depth])
        groups.setdefault(str(key), []).append(file)
    yield from sorted(groups.items())


def _read_text(file: Path) -> str | None:
    """The text of a file; None where it is not UTF-8."""
    raw = file.read_bytes()
    try:
        return None if b"\0" in raw else raw.decode()
    except UnicodeDecodeError:
        return None


def _root(name: str, out: Path) -> Path:
    """The folder of a source's texts, unpacked if need be."""
    recipe = RECIPES[name]
    if not recipe.packages:
        return Path(sysconfig.get_paths()["stdlib"] if name == "stdlib" else torch.__path__[0])
    unpacked = out / "unpacked" / recipe.packages[0]
    if not unpacked.exists():
        aside = unpacked.with_name(f"{unpacked.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for deb in _debs(recipe, out):
            subprocess.run(["dpkg-deb", "-x", str(deb), str(aside)], check=True)
        if recipe.tarball:
            archive, *members = recipe.tarball
            command = ["tar", "-xJf", str(aside / archive), "-C", str(aside), *members]
            subprocess.run(command, check=True)
        if name == "kjv":
            _print_bible(aside)
        aside.rename(unpacked)
    return unpacked / recipe.root


def _print_bible(folder: Path) -> None:
    """The packages hold a program and its compressed text."""
    program = (folder / "usr/bin/bible").resolve()
    lines = subprocess.run(
        # It looks for its data in the current folder first.
        [program, "-f", "gen1:1-rev22:21"],
        cwd=folder / "usr/lib",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (folder / "usr/lib" / _KJV).write_text(lines)


def _debs(recipe: Recipe, out: Path) -> list[Path]:
    """The package files of a recipe, downloaded if need be."""
    folder = out / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for package in recipe.packages:
        if not any(folder.glob(f"{package}_*.deb")):
            if not _has_apt():
                raise ConfigError(
                    f"{package} comes as a Debian package, and there is no apt-get here; leave "
                    "its source out of --sources"
                )
            command = ["apt-get", "-qq", "download", package]
            if subprocess.run(command, cwd=folder, stderr=subprocess.DEVNULL).returncode:
                raise ConfigError(f"'apt-get download {package}' failed; try 'apt-get update'")
        found += sorted(folder.glob(f"{package}_*.deb"))[:1]
    return found


def _has_apt() -> bool:
    return shutil.which("apt-get") is not None and shutil.which("dpkg-deb") is not None


def _tekken(out: Path) -> Path:
    """Tekken as a rank file; the wheel is fetched for its data and not installed."""
    ranks, folder = out / "tekken.tiktoken", out / "packages"
    if ranks.exists():
        return ranks
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, _TOKENIZER_PACKAGE], check=True)
    wheel = sorted(folder.glob("mistral_common-*.whl"))[-1]
    with zipfile.ZipFile(wheel) as archive:
        content = json.loads(archive.read(_TOKENIZER_FILE))
    tokens = sorted(content["vocab"], key=lambda entry: entry["rank"])
    lines = [f"{entry['token_bytes']} {entry['rank']}\n" for entry in tokens]
    assert base64.b64decode(tokens[0]["token_bytes"]) == b"\0", tokens[0]
    ranks.write_text("".join(lines))
    return ranks


def _sizes(dataset: Dataset) -> dict[str, int]:
    lengths = dataset.lengths
    long = lengths >= LONG_TOKENS
    return {
        "documents": dataset.num_documents,
        "tokens": dataset.num_tokens,
        "longest": int(lengths.max()),
        "median": int(sorted(lengths)[len(lengths) // 2]),
        "long_documents": int(long.sum()),
        "tokens_in_long_documents": int(lengths[long].sum()),
    }


if __name__ == "__main__":
    sys.exit(main())
