"""The YAML of a run: what is accepted, and what every mistake is told."""

from pathlib import Path

import pytest

from ringctx.config import Config, CurriculumConfig, ModelConfig, TopologyConfig
from ringctx.config_file import config_to_yaml, load_config, parse_size
from ringctx.errors import ConfigError

LAUNCH_CONFIGS = sorted((Path(__file__).parent.parent / "launch" / "configs").glob("*.yaml"))


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text("data: {path: somewhere}\n" + text)
    return load_config(path, overrides)


def test_sizes_are_tokens_in_powers_of_1024() -> None:
    assert [parse_size(text) for text in ("4096", "128k", "0.5M", "2G", "1_000")] == [
        4096,
        131_072,
        524_288,
        2**31,
        1000,
    ]


@pytest.mark.parametrize("text", ["", "k", "12q", "-4k", "0.3", "1.2.3k"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


def test_overrides_win_over_the_file_and_take_units(tmp_path: Path) -> None:
    config = load(tmp_path, "curriculum: {max_len: 8k}", "curriculum.max_len=64k", "optim.lr=1e-3")
    assert config.curriculum.max_len == 65_536
    assert config.optim.lr == 1e-3


def test_whole_floats_are_accepted_where_tokens_are_counted(tmp_path: Path) -> None:
    assert load(tmp_path, "curriculum: {total_tokens: 20e9}").curriculum.total_tokens == 20 * 10**9


def test_the_written_config_reads_back_equal(tmp_path: Path) -> None:
    config = load(tmp_path, "parallel: {cp_degree: 2}\nmodel: {num_kv_heads: 2}")
    path = tmp_path / "written.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("topology: {kind: cables, link_gbit: 50}", ()),
        ("topology: cables", ("parallel.topology.link_gbit=50",)),
        ("topology: {kind: switch, link_gbit: 50}", ("parallel.topology=cables",)),
        ("layout: zigzag", ("parallel.topology=cables", "parallel.topology.link_gbit=50")),
        ("layout: zigzag", ("parallel.topology.link_gbit=50", "parallel.topology=cables")),
    ],
    ids=str,
)
def test_a_topology_is_a_section_or_just_its_kind_and_neither_loses_the_other(
    tmp_path: Path, text: str, overrides: tuple[str, ...]
) -> None:
    config = load(tmp_path, f"parallel: {{{text}}}", *overrides)
    assert config.parallel.topology == TopologyConfig(kind="cables", link_gbit=50)
    (tmp_path / "written.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "written.yaml") == config


def test_the_pattern_of_mixers_repeats_over_the_layers_and_may_be_cut() -> None:
    model = ModelConfig(mixers="SSW", num_layers=8, window=64)
    assert "".join(model.mixer(layer) for layer in range(8)) == "SSWSSWSS"


@pytest.mark.parametrize("path", LAUNCH_CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    load_config(path)


def test_sizes_that_follow_from_others_are_filled_in() -> None:
    model = ModelConfig(dim=96, num_heads=3)
    assert (model.num_kv_heads, model.head_dim, model.mlp_dim) == (3, 32, 256)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = "optim: {lr: -1}\nparallel: {layout: zigzg}\nmodle: {dim: 3}\ncurriculum: {cycle: 2}"
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert "optim.lr=-1.0 must be above 0" in message
    assert "parallel.layout='zigzg'" in message
    assert "unknown key 'modle': did you mean 'model'?" in message
    assert "unknown key 'curriculum.cycle': did you mean 'cycles'?" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dim=many", r"model\.dim='many': must be a whole number; write .* 128k"),
        ("model.num_heads=3", r"model\.dim=512 is not divisible by model\.num_heads=3"),
        ("model.num_kv_heads=3", r"num_kv_heads=3 does not divide model\.num_heads=8"),
        ("model.head_dim=7", r"head_dim=7 must be even"),
        ("model.mixers=SSSL", r"mixers='SSSL': no layer is called L; write .* S: softmax .*; W: "),
        ("model.mixers=''", r"model\.mixers is empty; write a letter a layer, S: softmax"),
        ("model.mixers=SSSSSSSSS", r"mixers='SSSSSSSSS' is longer than model\.num_layers=8"),
        ("model.mixers=SSSW", r"mixers='SSSW' has W layers, which need .* model\.window=1024"),
        ("model.window=1k", r"window=1024 has no use: model\.mixers='S' has no W"),
        ("model.window=0", r"model\.window=0 must be at least 1: a token sees itself"),
        ("model.sinks=4", r"model\.sinks=4 must be 0, or positive with a model\.window"),
        ("curriculum.max_len=1000", r"must be powers of two"),
        ("curriculum.min_len=16k", r"must be powers of two with 2 <= min_len <= max_len"),
        ("curriculum.tokens_per_step=12000", r"nearest valid values are 8,192 or 16,384"),
        ("optim.lr=inf", r"optim\.lr=inf must be a finite number"),
        ("curriculum.max_len=.inf", r"curriculum\.max_len"),
        ("model=0", r"model=0 must be a section"),
        ("curriculum.cycles=0", r"cycles=0 must lie in 1 to 10,000"),
        ("curriculum.odds=grow_p3", r"did you mean 'grow_p2'\? expected one of \['uniform', "),
        ("parallel.tokens_per_rank=1000", r"tokens_per_rank=1,000 must be a power of two"),
        ("parallel.cp_degree=3", r"cp_degree=3 must be 'auto' or a power of two"),
        ("parallel.cp_degree=most", r"parallel\.cp_degree='most'"),
        ("parallel.ulysses_degree=3", r"ulysses_degree=3 must be a power of two"),
        ("parallel.ulysses_degree=16", r"degree=16 does not divide .*=8: .* one of 1, 2, 4, 8"),
        ("parallel={cp_degree: 2, ulysses_degree: 4}", r"degree=4 is above the 2 ranks that may"),
        ("parallel.schedule=two_ways", r"parallel\.schedule='two_ways'"),
        ("parallel.topology=ring", r"topology\.kind='ring'.*expected one of \['switch', 'cables'"),
        ("parallel.topology=7", r"parallel\.topology=7 must be a section"),
        ("parallel.topology.knd=cables", r"'parallel\.topology\.knd': did you mean 'kind'\?"),
        ("parallel.topology.link_gbit=0", r"topology\.link_gbit=0\.0 must be above 0"),
        ("parallel.topology.flops=inf", r"topology\.flops=inf must be a finite number"),
        ("parallel.topology.flops=300T", r"flops='300T': must be a plain number.*3e14"),
        ("parallel.topology.link_gbit=200G", r"topology\.link_gbit='200G': must be a plain number"),
        ("parallel.topology.node_gbit=1T", r"topology\.node_gbit='1T': must be a plain number"),
        ("parallel.topology.latency_us=-1", r"latency_us=-1\.0 must be at least 0"),
        (
            "parallel.topology.ranks_per_node=4",
            r"=4 has no use with parallel\.topology\.kind=switch",
        ),
        (
            "parallel.topology.node_gbit=9",
            r"node_gbit=9\.0 has no use with .*kind=switch, .* no nodes",
        ),
        ("parallel.topology=two_level", r"kind=two_level needs parallel\.topology\.ranks_per_node"),
        (
            "parallel.topology={kind: two_level, ranks_per_node: 0}",
            r"ranks_per_node=0 must be at least 1",
        ),
        ("train.steps=0", r"train\.steps=0 must be positive"),
        ("checkpoint.resume=last", r"checkpoint\.resume='last'"),
        ("train.steps", r"'train\.steps' is not an override"),
        ("--steps=3", r"'--steps=3' is not an override"),
        ("data.path=", r"data\.path=None: must not be null"),
        ("data.path=''", r"data\.path is not set"),
    ],
)
def test_a_wrong_value_is_told_with_its_name_and_rule(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, "", override)


def test_a_missing_file_and_broken_yaml_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load(tmp_path, "model: {dim: 3")
    with pytest.raises(ConfigError, match="must be a section"):
        load(tmp_path, "model: 3")


def test_sections_check_themselves_without_a_file() -> None:
    with pytest.raises(ConfigError, match="less than one step"):
        CurriculumConfig(total_tokens=10)


@pytest.mark.parametrize("name", ["link_gbit", "latency_us", "node_gbit", "flops"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_a_wiring_without_end_is_refused_without_a_file_too(name: str, value: float) -> None:
    node = {"kind": "two_level", "ranks_per_node": 2} if name == "node_gbit" else {}
    with pytest.raises(ConfigError, match=rf"topology\.{name}={value} must be .*finite number"):
        TopologyConfig(**{**node, name: value})  # type: ignore[arg-type]
