"""The import direction of the design: ops < parallel, data < model < trainer < launch."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A module may import from its own layer's package and from every layer with a lower number.
LAYERS = {
    "ringctx.errors": 0,
    "ringctx.config": 1,
    "ringctx.config_file": 2,
    "ringctx.ops": 3,
    "ringctx.parallel": 4,
    "ringctx.data": 4,
    "ringctx.layers": 5,
    "ringctx.kv_cache": 5,
    "ringctx.optim": 5,
    "ringctx.run_plan": 5,
    "ringctx.checkpoint": 5,
    "ringctx.tracking": 5,
    "ringctx.by_length": 5,
    "ringctx.lightning_layer": 6,
    "ringctx.layout_table": 6,
    "ringctx.resume": 6,
    "ringctx.mixers": 7,
    "ringctx.model": 8,
    "ringctx.model_cost": 8,
    "ringctx.generate": 9,
    "ringctx.train_step": 9,
    "ringctx.trainer": 10,
    "ringctx.launch": 11,
}
FOLDERS = {
    "ringctx": "ringctx",
    "parallel": "ringctx.parallel",
    "data": "ringctx.data",
    "launch": "ringctx.launch",
}


def _modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT / folder)
            if inside.parts[0] in ("parallel", "data", "launch") and folder == "ringctx":
                continue
            found[".".join((package, *inside.with_suffix("").parts))] = path
    return found


def _unit(module: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    return ".".join(module.split(".")[:2])


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= set(inside) if node.module == "ringctx" else {str(node.module)}
    return names


def test_every_module_has_a_layer() -> None:
    units = {_unit(name) for name in _modules() if name != "ringctx.__init__"}
    assert units == set(LAYERS)


def test_no_module_imports_from_a_higher_layer_or_a_sibling_package() -> None:
    wrong = []
    for module, path in _modules().items():
        for target in {name for name in _imports(path) if name.startswith("ringctx.")}:
            own, other = _unit(module), _unit(target)
            if own != other and LAYERS.get(own, 99) <= LAYERS[other]:
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_data_and_ops_know_no_process_group() -> None:
    for module, path in _modules().items():
        if _unit(module) in ("ringctx.data", "ringctx.ops"):
            assert not any(name.startswith("torch.distributed") for name in _imports(path)), module
