"""The command line: `ringctx data | train | verify | plan | plot | config`.

Settings live in the YAML and in `key=value`; the few flags say where things are, not what to do.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ringctx.config_file import config_to_yaml, load_config
from ringctx.launch.data_commands import add_data_commands
from ringctx.launch.entry import exit_code
from ringctx.launch.plan_commands import add_plan_commands
from ringctx.launch.plot import plot_run
from ringctx.launch.torchrun import local_ranks, torchrun
from ringctx.resume import checkpoint_folder
from ringctx.run_plan import make_run_plan

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `ringctx`; returns the exit code: 0, 1 (a check failed) or 2 (a mistake)."""
    return exit_code(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    # argparse takes no overrides behind an option by itself.
    given, more = parser.parse_known_args(arguments)
    strange = [item for item in more if "=" not in item or item.startswith("-")]
    if strange or (more and "overrides" not in given):
        parser.error(f"unrecognized arguments: {' '.join(strange or more)}")
    if more:
        given.overrides = [*given.overrides, *more]
    return int(given.run(given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ringctx", description="Train language models on very long documents."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_data_commands(commands)
    _add_ranked(commands, "train", _train, "train a model; starts the ranks of this node")
    _add_ranked(
        commands, "verify", _verify, "compare this layout with one process; exit 1 if they differ"
    )
    add_plan_commands(commands)
    plot = commands.add_parser("plot", help="draw loss, throughput and lengths of a run")
    plot.add_argument("run_dir", type=Path)
    plot.set_defaults(run=_plot)
    config = commands.add_parser("config", help="look at a config")
    show = config.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "show", help="print the complete config"
    )
    _add_config(show)
    show.set_defaults(run=_show)
    return parser


def _add_ranked(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: object,
    text: str,
) -> None:
    command = commands.add_parser(name, help=text)
    command.add_argument(
        "--nproc", default="auto", help="ranks on this node; auto: one a GPU, else one a core"
    )
    _add_config(command)
    command.set_defaults(run=run)


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", help="YAML file")
    command.add_argument("overrides", nargs="*", metavar="section.key=value")


def _train(given: argparse.Namespace) -> int:
    return _on_ranks("ringctx.launch.train", given)


def _verify(given: argparse.Namespace) -> int:
    return _on_ranks("ringctx.launch.verify", given)


def _on_ranks(module: str, given: argparse.Namespace) -> int:
    nproc = local_ranks(given.nproc)
    # Mistakes are found here, once, before any rank is started. What a checkpoint says as well is
    # looked at by the ranks.
    config = load_config(given.config, given.overrides)
    if not checkpoint_folder(config).exists():
        make_run_plan(config, world_size=nproc)
    return torchrun(module, [given.config, *given.overrides], nproc=nproc)


def _plot(given: argparse.Namespace) -> int:
    for path in plot_run(given.run_dir):
        sys.stdout.write(f"{path}\n")
    return 0


def _show(given: argparse.Namespace) -> int:
    sys.stdout.write(config_to_yaml(load_config(given.config, given.overrides)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
