"""What is on disk is what is shipped."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_on_disk_is_listed_for_the_wheel() -> None:
    found = set()
    for name, folder in SETUPTOOLS["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            if not any(
                (ROOT / folder).joinpath(*parts[: i + 1]).is_symlink() for i in range(len(parts))
            ):
                found.add(".".join((name, *parts)))
    assert found == set(SETUPTOOLS["packages"])


def test_links_inside_ringctx_point_at_the_top_level_folders() -> None:
    for name, folder in SETUPTOOLS["package-dir"].items():
        assert (ROOT / name.replace(".", "/")).resolve() == ROOT / folder


@pytest.mark.parametrize("folder", ["parallel", "data", "launch"])
def test_a_bare_import_is_refused_with_the_right_name(folder: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert f"import ringctx.{folder}" in result.stderr
