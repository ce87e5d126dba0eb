"""`ringctx data plan`: what a config will train on, before any device is touched.

Buckets, steps, layout and predicted share of the time for each row length, and where every token of
the dataset went. Time is predicted by the model's FLOPs, which a few steps of each length are asked
for; nothing is read but offsets, and loss bits where there are some.
"""

import argparse
import json
from typing import Any

import numpy as np

from ringctx.config_file import load_config
from ringctx.launch.torchrun import local_ranks
from ringctx.model_cost import step_flops
from ringctx.run_plan import RunPlan, make_run_plan

__all__ = ["add_plan_command"]

# Steps of each length whose FLOPs stand for all; packed rows differ from step to step.
_SAMPLES = 16
_BAR_WIDTH = 20


def add_plan_command(commands: "argparse._SubParsersAction[Any]") -> None:
    """Register the command; it sets `run`, a function of the arguments to an exit status."""
    plan = commands.add_parser("plan", help="buckets, steps and layout of a config, by length")
    plan.add_argument("config", help="YAML file")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value")
    plan.add_argument(
        "--ranks", default="auto", help="ranks of the whole run; auto: those of this machine"
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    run = make_run_plan(config, world_size=local_ranks(args.ranks, option="--ranks"))
    table = plan_table(run)
    print(json.dumps(table) if args.json else "\n".join(_lines(table)))
    return 0


def plan_table(run: RunPlan) -> dict[str, Any]:
    """A plan as plain values: totals, and one entry a row length."""
    summary = run.plan.describe()
    costs = {length: _flops(run, length) * b.steps for length, b in summary.buckets.items()}
    whole = sum(costs.values())
    buckets = {}
    for length, bucket in summary.buckets.items():
        layout = run.layouts[length]
        rows = bucket.rows_per_step
        buckets[length] = {
            "steps": bucket.steps,
            "pieces": bucket.pieces,
            "tokens": bucket.tokens,
            "cp_degree": layout.cp_degree,
            "dp_degree": layout.dp_degree,
            "forwards": layout.num_rounds(rows),
            "rows_without_targets": layout.rows_without_targets(rows),
            "predicted_time_share": costs[length] / whole,
        }
    return {
        "steps": summary.steps,
        "run_steps": run.num_steps,
        "tokens": summary.tokens,
        "buckets": buckets,
        "dataset_tokens": summary.dataset_tokens,
        "kept_tokens": summary.kept_tokens,
        "dropped_tokens": summary.dropped_tokens,
        "passed_over_tokens": summary.passed_over_tokens,
        "repeated_tokens": summary.repeated_tokens,
        "left_over_tokens": summary.left_over_tokens,
        "padding_tokens": summary.padding_tokens,
        "folds": [vars(fold) for fold in summary.folds],
        "notes": list(summary.notes),
    }


def _flops(run: RunPlan, length: int) -> float:
    """Model FLOPs of an average step of one length."""
    plan, model = run.plan, run.config.model
    own = plan.steps_of(length)
    picked = own[np.unique(np.linspace(0, len(own) - 1, _SAMPLES).round().astype(int))]
    return sum(step_flops(model, plan.step(t)) for t in picked.tolist()) / len(picked)


def _lines(table: dict[str, Any]) -> list[str]:
    lines = [
        f"{'length':>10}{'steps':>9}{'rows':>12}{'tokens':>16}{'cp x dp':>10}{'forwards':>10}"
        f"{'empty':>7}  share of time"
    ]
    for length, row in table["buckets"].items():
        share = row["predicted_time_share"]
        degrees = f"{row['cp_degree']} x {row['dp_degree']}"
        lines.append(
            f"{length:>10,}{row['steps']:>9,}{row['pieces']:>12,}{row['tokens']:>16,}"
            f"{degrees:>10}{row['forwards']:>10,}{row['rows_without_targets']:>7,}"
            f"  {share:6.1%} {'#' * round(share * _BAR_WIDTH)}"
        )
    lines += ["", f"{table['steps']:,} steps, {table['tokens']:,} tokens"]
    if table["run_steps"] < table["steps"]:
        lines.append(f"train.steps ends the run after {table['run_steps']:,} of them")
    whole = table["dataset_tokens"]
    lines += [
        f"  {name:12} {table[key]:>16,}  {table[key] / whole:6.1%} of the dataset{meaning}"
        for name, key, meaning in (
            ("dataset", "dataset_tokens", ""),
            ("in steps", "tokens", ""),
            ("dropped", "dropped_tokens", ": remainders below min_len"),
            ("passed over", "passed_over_tokens", ": in no row of this curriculum"),
            ("left over", "left_over_tokens", ": less than a step at the end"),
            ("repeated", "repeated_tokens", ": in steps or left over, and not for the first time"),
            ("padding", "padding_tokens", ": places without a token in packed rows"),
        )
        if table[key] or key in ("dataset_tokens", "dropped_tokens")
    ]
    lines += [
        f"cut from {fold['bucket']:,} to {fold['into']:,} tokens: {fold['pieces']:,} "
        f"({fold['reason']})"
        for fold in table["folds"]
    ]
    return [*lines, *table["notes"]]
