"""Writes the pages that follow from the code: `python docs/generate.py` (`--check`: only compare).

configuration.md and run_folder.md come from dataclasses and the texts under their fields,
verified.md from the `proves` marks of the tests, so none can claim what is not there.
"""

import ast
import dataclasses
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

from ringctx import config as config_module
from ringctx import tracking as tracking_module
from ringctx.config_file import section_lists, sections, subsections

ROOT = Path(__file__).resolve().parent.parent
PLACES = (
    "CPU",
    "CPU/gloo",
    "shaped links",
    "Triton interpreter",
    "ahead-of-time compilation",
    "FakeTensor (CUDA shapes)",
    "GPU",
)


def main(arguments: list[str]) -> int:
    """Write or compare the pages; 1 if a page is out of date."""
    pages = {
        ROOT / "docs" / "configuration.md": configuration_page(),
        ROOT / "docs" / "run_folder.md": run_folder_page(),
        ROOT / "docs" / "verified.md": verified_page(),
    }
    stale = [path for path, text in pages.items() if not _is_current(path, text)]
    if "--check" not in arguments:
        for path in stale:
            path.write_text(pages[path])
        return 0
    for path in stale:
        sys.stderr.write(f"{path.relative_to(ROOT)} is out of date: python docs/generate.py\n")
    return 1 if stale else 0


def configuration_page() -> str:
    """Every section and field, with default and meaning."""
    classes = _field_texts(config_module)
    lines = [
        "# Configuration",
        "",
        "<!-- Written by docs/generate.py from ringctx/config/. -->",
        "",
        "One YAML file holds these sections; `section.key=value` on the command line overrides it.",
        "Sizes are tokens and may be written `128k` or `0.5M` (powers of 1024). Off is `null`.",
        "An item of a list is named by its place, from 0: `curriculum.stages.0.len=1k`.",
        "A list given there replaces that of the file; a section only what it names.",
        "`ringctx config show CONFIG` prints a config with everything filled in.",
    ]
    for name, section in sections().items():
        lines += ["", f"## {name}", "", str(section.__doc__), ""]
        lines += ["| key | default | meaning |", "|---|---|---|"]
        lines += _field_rows(section, classes)
    return "\n".join(lines) + "\n"


def _field_rows(
    section: type[Any], texts: dict[str, dict[str, str]], prefix: str = ""
) -> list[str]:
    """A row of the table for each field, those of a section within it right below."""
    inner, lists, rows = subsections(section), section_lists(section), []
    for field in dataclasses.fields(section):
        # A section within may be given by its first field alone.
        first = dataclasses.fields(inner[field.name])[0] if field.name in inner else field
        text = texts[section.__name__][field.name]
        rows.append(f"| `{prefix}{field.name}` | `{_default(first)}` | {text} |")
        if field.name in inner:
            rows += _field_rows(inner[field.name], texts, f"{prefix}{field.name}.")
        if field.name in lists:
            rows += _field_rows(lists[field.name], texts, f"{prefix}{field.name}[].")
    return rows


def run_folder_page() -> str:
    """What a run leaves behind, with every field of a metrics line."""
    texts = _field_texts(tracking_module)["StepRecord"]
    lines = [
        "# The run folder",
        "",
        "<!-- Written by docs/generate.py from ringctx/tracking.py. -->",
        "",
        "```",
        "RUN_DIR/config.yaml        the complete config of the newest start",
        "RUN_DIR/metrics.jsonl      one JSON object a step, only ever appended to",
        "RUN_DIR/checkpoints/       see checkpoints.md",
        "RUN_DIR/logs/rank-<n>.log  what each rank logged",
        "RUN_DIR/report/            pictures and by_length.json, by `ringctx plot RUN_DIR`",
        "RUN_DIR/wandb/, wandb-id   only with tracking.wandb",
        "```",
        "",
        "A line of metrics.jsonl:",
        "",
        "| field | meaning |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {text} |" for name, text in texts.items()]
    return "\n".join(lines) + "\n"


def verified_page() -> str:
    """What has been run where: a row a feature, a column a place, by the tests that prove it."""
    proofs = _proofs()
    lines = [
        "# What has been run where",
        "",
        "<!-- Written by docs/generate.py from the `proves` marks of the tests. -->",
        "",
        "A number counts the test functions that prove a feature there; the list below names them.",
        "A dash: not yet run there. Tests in the column GPU are written and skip without one:",
        "**no CUDA code of this project has been run on hardware yet.**",
        "",
        "| feature | " + " | ".join(PLACES) + " |",
        "|---|" + "---|" * len(PLACES),
    ]
    for feature in sorted(proofs):
        cells = [_cell(proofs[feature].get(place, []), place) for place in PLACES]
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    for feature in sorted(proofs):
        lines += ["", f"**{feature}**"]
        for place in PLACES:
            lines += [f"- {place}: {test}" for test in sorted(proofs[feature].get(place, []))]
    return "\n".join(lines) + "\n"


def _is_current(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


def _cell(tests: list[str], place: str) -> str:
    if not tests:
        return "-"
    return f"not yet ({len(tests)} written)" if place == "GPU" else str(len(tests))


def _default(field: "dataclasses.Field[Any]") -> str:
    value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return str(list(value)) if isinstance(value, tuple) else str(value) or "''"


def _field_texts(module: ModuleType) -> dict[str, dict[str, str]]:
    """The string under each field of each dataclass of a module, or of a package's modules."""
    assert module.__file__ is not None
    path = Path(module.__file__)
    paths = sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for node in (node for path in paths for node in ast.parse(path.read_text()).body):
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                # A cell of a table is one line.
                texts[node.name][field.target.id] = " ".join(str(below.value.value).split())
    return texts


def _proofs() -> dict[str, dict[str, list[str]]]:
    """Feature to place to tests, as marked."""
    proofs: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.proves":
                    feature = ast.literal_eval(mark.args[0])
                    place = ast.literal_eval(mark.keywords[0].value)
                    assert place in PLACES, f"{path}: {node.name}: unknown place {place!r}"
                    test = f"`{path.relative_to(ROOT)}::{node.name}`"
                    proofs[feature][place].append(test)
    return proofs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
