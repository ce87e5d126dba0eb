"""A checkpoint is whole or it does not count; what does not belong together is refused."""

import io
import logging
import resource
import shutil
import signal
from pathlib import Path

import pytest

from ringctx.errors import CheckpointError, ConfigError, RingctxError
from ringctx.tracking import read_metrics
from tests.ranks import RankError, run_ranks
from tests.tiny import begin, train_here, write_config, write_dataset


def _train(folder: Path, overrides: tuple[str, ...]) -> None:
    train_here(folder, *overrides)


def train(folder: Path, *overrides: str, world_size: int = 2) -> list[int]:
    """The steps that stand in the metrics afterwards."""
    run_ranks(world_size, _train, folder, overrides)
    return [record["step"] for record in read_metrics(folder / "run")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, with checkpoints after 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    write_dataset(folder)
    write_config(folder)
    train(folder, "train.stop_after=6", "checkpoint.every=2")
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    write_config(tmp_path)
    return tmp_path


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def test_only_the_newest_are_kept_and_latest_names_the_last(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    write_config(tmp_path)
    train(tmp_path, "train.stop_after=10", "checkpoint.every=2", "checkpoint.keep=2")
    assert checkpoints(tmp_path) == ["latest", "step-00000008", "step-00000010"]
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000010\n"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.proves("checkpoint: damage is found, the newest good one is used", on="CPU/gloo")
@pytest.mark.parametrize("file", ["__0_0.distcp", "__1_0.distcp", ".metadata", "trainer.json"])
@pytest.mark.parametrize(
    "damage", [flip, truncate, Path.unlink], ids=["flip", "truncate", "unlink"]
)
def test_auto_resume_passes_over_a_damaged_checkpoint(
    folder: Path, file: str, damage: object
) -> None:
    assert callable(damage)
    damage(folder / "run/checkpoints/step-00000006" / file)
    (folder / "run/metrics.jsonl").unlink()
    assert train(folder, "train.stop_after=7")[0] == 4


def test_a_folder_without_a_manifest_does_not_count(folder: Path) -> None:
    (folder / "run/checkpoints/step-00000006/MANIFEST.json").unlink()
    (folder / "run/metrics.jsonl").unlink()
    assert train(folder, "train.stop_after=7")[0] == 4


def test_a_save_that_was_cut_off_is_replaced(folder: Path) -> None:
    leftover = folder / "run/checkpoints/step-00000008.tmp"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"half")
    train(folder, "train.stop_after=8")
    assert "step-00000008" in checkpoints(folder)
    assert "step-00000008.tmp" not in checkpoints(folder)


def test_an_explicit_step_is_used_and_never_replaced_by_another(folder: Path) -> None:
    (folder / "run/metrics.jsonl").unlink()
    assert train(folder, "checkpoint.resume=2", "train.stop_after=4") == [2, 3]
    flip(folder / "run/checkpoints/step-00000002/__0_0.distcp")
    with pytest.raises(RankError, match=r"sha256 differs"):
        train(folder, "checkpoint.resume=2")
    with pytest.raises(RankError, match=r"has no such step; there are: 2, 4$"):
        train(folder, "checkpoint.resume=3")


def test_never_refuses_a_folder_that_holds_a_run(folder: Path) -> None:
    with pytest.raises(RankError, match=r"checkpoint\.resume=never"):
        train(folder, "checkpoint.resume=never")
    shutil.rmtree(folder / "run/checkpoints")
    with pytest.raises(RankError, match=r"checkpoint\.resume=never"):
        train(folder, "checkpoint.resume=never")


def test_a_damaged_newest_does_not_push_out_a_good_one(folder: Path) -> None:
    truncate(folder / "run/checkpoints/step-00000006/__0_0.distcp")
    train(folder, "train.stop_after=5", "checkpoint.keep=1")
    assert checkpoints(folder) == ["abandoned-step-00000006", "latest", "step-00000005"]
    (folder / "run/metrics.jsonl").unlink()
    assert train(folder, "train.stop_after=6", "checkpoint.keep=1") == [5]


def test_going_back_gives_up_the_later_steps_and_goes_on_from_there(folder: Path) -> None:
    back = ("checkpoint.keep=1", "optim.lr=0.1")
    train(folder, "checkpoint.resume=2", "train.stop_after=4", *back)
    assert "step-00000006" not in checkpoints(folder)
    train(folder, "train.stop_after=6", *back)
    rates = [record["lr"] for record in read_metrics(folder / "run")]
    assert rates[:2] == [0.0025, 0.005]
    assert len(rates) == 6
    assert all(rate > 0.05 for rate in rates[2:])


def test_an_abandoned_checkpoint_is_never_overwritten_by_the_next(folder: Path) -> None:
    for _ in range(2):
        train(folder, "checkpoint.resume=2", "train.stop_after=4")
    assert checkpoints(folder) == [
        "abandoned-step-00000004",
        "abandoned-step-00000004-2",
        "abandoned-step-00000006",
        "latest",
        "step-00000002",
        "step-00000004",
    ]


def test_a_save_killed_between_its_renames_is_found_again(folder: Path) -> None:
    saves = folder / "run/checkpoints"
    (saves / "step-00000006").rename(saves / "step-00000006.old")
    (folder / "run/metrics.jsonl").unlink()
    assert train(folder, "train.stop_after=7") == [6]
    (saves / "step-00000007.old").mkdir()
    train(folder, "checkpoint.resume=6", "train.stop_after=7")
    assert "step-00000007" in checkpoints(folder)


@pytest.mark.parametrize(
    "manifest",
    ["null", "{}", '{"files": null}', '{"version": 1, "files": {}}', '{"files": {"a": {}}}', "{"],
)
def test_an_odd_manifest_is_damage_and_no_crash(folder: Path, manifest: str) -> None:
    (folder / "run/checkpoints/step-00000006/MANIFEST.json").write_text(manifest)
    (folder / "run/metrics.jsonl").unlink()
    assert train(folder, "train.stop_after=5") == [4]


def _train_with_a_small_disk(folder: Path) -> str:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        train_here(folder, "train.stop_after=8")
    except CheckpointError as error:
        assert error.on_all_ranks
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    return ""


def test_a_save_that_does_not_fit_fails_on_all_ranks_and_leaves_nothing(folder: Path) -> None:
    before = checkpoints(folder)
    messages = run_ranks(2, _train_with_a_small_disk, folder)
    assert messages[0] == messages[1]
    assert "step-00000008.tmp cannot be written" in messages[0]
    assert checkpoints(folder) == before


def _warnings(folder: Path, override: str) -> list[str]:
    told = io.StringIO()
    handler, logger = logging.StreamHandler(told), logging.getLogger("ringctx")
    logger.addHandler(handler)
    try:
        begin(folder, override)
    finally:
        logger.removeHandler(handler)
    return told.getvalue().splitlines()


def test_settings_that_change_the_trajectory_are_warned_about(folder: Path) -> None:
    warned = run_ranks(1, _warnings, folder, "optim.lr=0.5")[0]
    assert warned == ["changed since the checkpoint: optim.lr: 0.01 -> 0.5"]
    assert run_ranks(1, _warnings, folder, "checkpoint.every=3")[0] == []


def test_nothing_good_is_an_error_and_not_a_fresh_start(folder: Path) -> None:
    for name in ("step-00000002", "step-00000004", "step-00000006"):
        flip(folder / "run/checkpoints" / name / "trainer.json")
    with pytest.raises(RankError, match="no checkpoint can be used"):
        train(folder)


def _start_expecting(folder: Path, override: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        begin(folder, override)
    assert isinstance(caught.value, RingctxError) and caught.value.on_all_ranks


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        ("model.num_layers=3", CheckpointError, r"model\.num_layers: 2 -> 3"),
        ("model.rope_theta=1e4", CheckpointError, r"model\.rope_theta: 500000\.0 -> 10000\.0"),
        ("train.seed=1", CheckpointError, r"train\.seed: 0 -> 1"),
        ("curriculum.odds=uniform", ConfigError, r"curriculum\.odds"),
        ("curriculum.max_len=64", ConfigError, r"curriculum\.max_len"),
    ],
)
def test_a_checkpoint_of_another_model_or_curriculum_is_refused_on_every_rank(
    folder: Path, override: str, kind: type[Exception], message: str
) -> None:
    run_ranks(2, _start_expecting, folder, override, kind, message)


def test_a_checkpoint_of_another_dataset_is_refused_on_every_rank(folder: Path) -> None:
    shutil.rmtree(folder / "dataset")
    write_dataset(folder, seed=1)
    run_ranks(2, _start_expecting, folder, "train.steps=20", ConfigError, "dataset")


def test_a_dataset_that_moved_is_not_another_one(folder: Path) -> None:
    (folder / "dataset").rename(folder / "moved")
    assert train(folder, f"data.path={folder}/moved", "train.stop_after=7")[-1] == 6


def test_a_finished_run_does_nothing_more(folder: Path) -> None:
    before = checkpoints(folder)
    assert train(folder, "train.stop_after=6") == list(range(6))
    assert checkpoints(folder) == before
