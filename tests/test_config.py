"""The YAML of a run: what is accepted, and what every mistake is told."""

import json
from pathlib import Path

import pytest

from ringctx.config import (
    Config,
    CurriculumConfig,
    DataConfig,
    ModelConfig,
    StageConfig,
    TopologyConfig,
    split_mix_key,
)
from ringctx.config_file import config_to_dict, config_to_yaml, load_config, parse_size
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


PROLONG = """
curriculum:
  kind: stages
  max_epochs: {books: 4}
  stages:
    - {len: 64k, tokens: 20e9, tokens_per_step: 4M, rope_theta: 8.0e6, lr: 1e-5,
       mix: {repos: .3, books: .3, short: .4}}
    - {len: 512k, tokens: 20e9, tokens_per_step: 8M, rope_theta: 1.28e8, lr: 5e-6,
       mix: {repos@512k: .15, repos@64k: .15, books@512k: .05, books@64k: .25, short: .4}}
"""


def test_stages_are_read_with_units_and_mixes(tmp_path: Path) -> None:
    first, second = load(tmp_path, PROLONG).curriculum.stages
    assert first == StageConfig(
        len=65_536,
        tokens=20 * 10**9,
        tokens_per_step=2**22,
        mix={"repos": 0.3, "books": 0.3, "short": 0.4},
        rope_theta=8e6,
        lr=1e-5,
    )
    assert second.mix is not None
    assert [split_mix_key(key) for key in second.mix] == [
        ("repos", 524_288),
        ("repos", 65_536),
        ("books", 524_288),
        ("books", 65_536),
        ("short", None),
    ]


@pytest.mark.parametrize("key", ["stages.1.len", "stages[1].len"])
def test_an_override_reaches_into_a_list(tmp_path: Path, key: str) -> None:
    lens = [
        stage.len for stage in load(tmp_path, PROLONG, f"curriculum.{key}=1M").curriculum.stages
    ]
    assert lens == [65_536, 2**20]


def test_an_override_replaces_a_list_and_extends_a_mapping(tmp_path: Path) -> None:
    stages = "curriculum.stages=[{len: 1k, share: 1, mix: {books: 1}}]"
    curriculum = load(tmp_path, PROLONG, stages, "curriculum.max_epochs.books=2").curriculum
    assert curriculum.stages == (StageConfig(len=1024, share=1, mix={"books": 1.0}),)
    assert curriculum.max_epochs == {"books": 2.0}
    more = load(tmp_path, PROLONG, "curriculum.stages.0.mix.wiki=.1").curriculum.stages[0]
    assert more.mix == {"repos": 0.3, "books": 0.3, "short": 0.4, "wiki": 0.1}


@pytest.mark.parametrize("key", ["stages.2.len", "stages.one.len"])
def test_an_override_of_an_item_that_is_not_there_is_told(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=r"curriculum\.stages.*"):
        load(tmp_path, PROLONG, f"curriculum.{key}=1k")


ROUND_TRIPS = {
    "stages": (PROLONG, ()),
    "numbers": ("", ("curriculum.odds=[1,2,3]", "curriculum.min_len=2k")),
    "packed": ("curriculum: {kind: packed, len: 1k, packing: best_fit}", ()),
    "sources": ("curriculum: {mix: {a: 1}}", ("data.path=''", "data.sources={a: x, b: y}")),
}


@pytest.mark.parametrize(("text", "overrides"), ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_any_kind_reads_back_equal_from_yaml_and_json(
    tmp_path: Path, text: str, overrides: tuple[str, ...]
) -> None:
    config = load(tmp_path, text, *overrides)
    (tmp_path / "written.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "written.yaml") == config
    plain = json.loads(json.dumps(config_to_dict(config)))
    assert plain == config_to_dict(config)
    assert CurriculumConfig(**plain["curriculum"]) == config.curriculum
    assert DataConfig(**plain["data"]) == config.data


def test_lengths_in_a_mix_are_equal_however_they_are_written() -> None:
    def stages(key: str) -> CurriculumConfig:
        return CurriculumConfig(
            kind="stages", stages=(StageConfig(len=2**17, share=1, mix={key: 1}),)
        )

    assert stages("a@64k") == stages("a@65536") == stages("a@65_536")


def test_a_number_with_a_unit_that_gives_no_whole_tokens_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"curriculum\.max_len='0\.3k': must be a whole number"):
        load(tmp_path, "", "curriculum.max_len=0.3k")


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


STAGE = "curriculum={kind: stages, tokens_per_step: 64k, stages: [{len: 1k, share: 1}, {%s}]}"
"""A curriculum whose second stage is to be filled in."""

CURRICULUM_MISTAKES = [
    ("curriculum.kind=stage", r"expected one of \['decomposed', 'stages', 'window', 'packed'\]"),
    # Fields of another kind.
    (
        "curriculum.packing=best_fit",
        r"packing=best_fit has no use .*=decomposed: .*packed or window",
    ),
    ("curriculum.doc_mask=false", r"doc_mask=False has no use .* kind=packed or window or stages"),
    ("curriculum.window_start=3", r"window_start=3 has no use .* choose kind=window"),
    ("curriculum.stages=[{len: 1k}]", r"curriculum\.stages has no use .* choose kind=stages"),
    ("curriculum={kind: packed, len: 1k, cycles: 3}", r"cycles=3 has no use .* kind=decomposed"),
    ("curriculum={kind: stages, len: 1k}", r"len=1024 has no use .* kind=packed or window"),
    # Odds.
    ("curriculum.odds=3", r"curriculum\.odds=3 must be a name or a list of numbers"),
    ("curriculum.odds=[a]", r"curriculum\.odds\[0\]='a': must be a plain number"),
    ("curriculum.odds=[1, 2]", r"odds has 2 numbers, but there are 6 .*=256 to max_len=8,192"),
    (
        "curriculum.odds=[1, 2, 0, 1, 1, 1]",
        r"odds\[2\]=0 must be .* leave lengths out, raise min_len",
    ),
    ("curriculum.odds=[1, -2, 1, 1, 1, 1]", r"odds\[1\]=-2 must be a number above 0"),
    ("curriculum.odds=[1, .inf, 1, 1, 1, 1]", r"odds\[1\]=inf must be a finite number"),
    ("curriculum.odds=[1e101, 1, 1, 1, 1, 1]", r"odds=.* span more than 1e\+100"),
    ("curriculum.max_dropped=1.5", r"max_dropped=1\.5 must lie in 0 to 1"),
    # Rows of one length.
    ("curriculum={kind: packed}", r"curriculum\.len is not set: all rows of kind=packed"),
    ("curriculum={kind: window, len: 3k}", r"len=3,072 must be a power of two"),
    ("curriculum.tokens_per_step=-4", r"=-4 is not a multiple .* nearest valid values are 8,192$"),
    ("curriculum={kind: packed, len: 1M}", r"not a multiple of curriculum\.len=.* are 1,048,576$"),
    ("curriculum={kind: window, len: 1k, window_start: 2k}", r"window_start=2,048 must lie in 1"),
    ("curriculum={kind: window, len: 1k, window_start: 0}", r"window_start=0 must lie in 1"),
    ("curriculum={kind: window, len: 1k, window_growth: 0}", r"growth=0 must be a number above 0"),
    # Stages.
    ("curriculum.kind=stages", r"curriculum\.stages is empty: .* at least one"),
    ("curriculum.stages=3", r"curriculum\.stages=3 must be a list of sections"),
    ("curriculum.stages=[3]", r"curriculum\.stages\[0\]=3 must be a section"),
    (STAGE % "lne: 1k", r"unknown key 'curriculum\.stages\[1\]\.lne': did you mean 'len'\?"),
    (STAGE % "share: 1", r"curriculum\.stages\[1\]\.len is not set"),
    (STAGE % "len: many", r"stages\[1\]\.len='many': must be a whole number"),
    (STAGE % "len: 3k, share: 1", r"curriculum\.stages\[1\]\.len=3,072 must be a power of two"),
    (STAGE % "len: 128k, share: 1", r"=65,536 is not a multiple of curriculum\.stages\[1\]\.len"),
    (
        STAGE % "len: 4k, share: 1, tokens_per_step: 6k",
        r"stages\[1\]\.tokens_per_step=6,144 .*stages\[1\]\.len=4,096; .* are 4,096 or 8,192",
    ),
    (STAGE % "len: 1k", r"of the 2 curriculum\.stages, 1 have share and 0 have tokens"),
    (STAGE % "len: 1k, tokens: 1M", r"1 have share and 1 have tokens; give all of them share, or"),
    (STAGE % "len: 1k, share: 0", r"stages\[1\]\.share=0\.0 must be a number above 0"),
    (STAGE % "len: 1k, share: 1, lr: 0", r"stages\[1\]\.lr=0\.0 must be a number above 0"),
    (STAGE % "len: 1k, share: 1, rope_theta: 1", r"rope_theta=1\.0 must be a number above 1"),
    (
        "curriculum={kind: stages, total_tokens: 1G, stages: [{len: 1k, tokens: 1G}]}",
        r"total_tokens=1073741824 and the tokens of curriculum\.stages are both set",
    ),
    (
        "curriculum={kind: stages, stages: [{len: 1k, tokens: 0}]}",
        r"stages\[0\]\.tokens=0 must be positive",
    ),
    (
        f"curriculum={{kind: stages, stages: [{', '.join(['{len: 2, share: 1}'] * 256)}]}}",
        r"curriculum\.stages has 256 entries; 255 is the most",
    ),
    # Sources.
    ("curriculum.mix=3", r"curriculum\.mix=3 must be a section of names"),
    ("curriculum.mix={}", r"curriculum\.mix=\{\} is empty"),
    ("curriculum.mix={a: x}", r"curriculum\.mix\.a='x': must be a plain number"),
    ("curriculum.mix={a: 1, b: 0}", r"curriculum\.mix\.b=0 must be .* leave the source out"),
    ("curriculum.mix={a@1k: 1}", r"mix\.a@1024 takes pieces of one length, which only .*=stages"),
    (STAGE % "len: 1k, share: 1, mix: {a@2k: 1}", r"mix\.a@2048: .*stages\[1\]\.len=1,024"),
    (STAGE % "len: 1k, share: 1, mix: {a@3: 1}", r"mix\.a@3: the length 3 must be a power of two"),
    (
        STAGE % "len: 1k, share: 1, mix: {a@x: 1}",
        r"stages\[1\]\.mix: .* '@' of 'a@x': 'x' is not a",
    ),
    (STAGE % "len: 1k, share: 1, mix: {a@1k: 1, a@1024: 2}", r"mix has 'a@1024' twice"),
    (
        "curriculum={kind: stages, mix: {a: 1}, stages: [{len: 1k, share: 1, mix: {b: 1}}]}",
        r"curriculum\.mix has no use: every one of curriculum\.stages has a mix of its own",
    ),
    (
        "curriculum={mix: {books: 1}, max_epochs: {boks: 2}}",
        r"epochs\.boks is in no mix; did .* 'books'",
    ),
    ("curriculum={mix: {a: 1}, max_epochs: {a: 0}}", r"max_epochs\.a=0 must be a number above 0"),
]


LAYERS = """
model: {mixers: %s, num_layers: 4}
"""


@pytest.mark.parametrize("mixers", ["L", "LLLS", "SL"])
def test_striped_is_refused_with_any_l_layer_in_one_error_that_names_both(
    tmp_path: Path, mixers: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, LAYERS % mixers, "parallel.layout=striped")
    message = str(caught.value)
    assert f"parallel.layout=striped does not go with model.mixers='{mixers}'" in message
    assert "choose parallel.layout=zigzag" in message and "\n" not in message
    for layout in ("zigzag", "contiguous"):
        load(tmp_path, LAYERS % mixers, f"parallel.layout={layout}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.schedule=two_way", r"schedule=two_way has no use: .*='L' has no S or W; for L"),
        ("parallel.ulysses_degree=2", r"ulysses_degree=2 has no use: .* exchange states, not"),
        ("curriculum={kind: window, len: 1k}", r"kind=window has no use: .* choose .*kind=packed"),
        (
            "curriculum={kind: stages, stages: [{len: 1k, share: 1, rope_theta: 1e4}]}",
            r"stages with a rope_theta have no use for it: model\.rope_mixers='SW' names no layer",
        ),
    ],
    ids=str,
)
def test_what_only_softmax_layers_use_is_refused_where_there_are_none(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, LAYERS % "L", override)
    load(tmp_path, LAYERS % "LS", override)


def test_letters_that_rotate_are_those_named(tmp_path: Path) -> None:
    for letters, rotated in (("SW", "---S-W"), ("SWL", "LLLSLW"), ("", "------"), ("L", "LLL-L-")):
        model = ModelConfig(mixers="LLLSLW", num_layers=6, window=9, rope_mixers=letters)
        told = "".join(model.mixer(i) if model.rotates(i) else "-" for i in range(6))
        assert told == rotated


def test_a_hybrid_reads_back_equal(tmp_path: Path) -> None:
    for text in (LAYERS % "LLLS", LAYERS % "L"):
        settings = ("model.decay_style=data", "model.rope_mixers=SWL", "model.rope_theta=1e4")
        config = load(tmp_path, text, *settings, "parallel.state_exchange=ring")
        (tmp_path / "written.yaml").write_text(config_to_yaml(config))
        assert load_config(tmp_path / "written.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.dim=many", r"model\.dim='many': must be a whole number; write .* 128k"),
        ("model.num_heads=3", r"model\.dim=512 is not divisible by model\.num_heads=3"),
        ("model.num_kv_heads=3", r"num_kv_heads=3 does not divide model\.num_heads=8"),
        ("model.head_dim=7", r"head_dim=7 must be even"),
        ("model.mixers=SSSX", r"mixers='SSSX': no layer is called X; write .* S: softmax .*; W: "),
        ("model.mixers=''", r"model\.mixers is empty; write a letter a layer, S: softmax"),
        ("model.mixers=SSSSSSSSS", r"mixers='SSSSSSSSS' is longer than model\.num_layers=8"),
        ("model.mixers=SSSW", r"mixers='SSSW' has W layers, which need .* model\.window=1024"),
        ("model.window=1k", r"window=1024 has no use: model\.mixers='S' has no W"),
        ("model.window=0", r"model\.window=0 must be at least 1: a token sees itself"),
        ("model.decay_style=tnl", r"decay_style=tnl has no use: model\.mixers='S' has no L; leave"),
        ("model.decay_style=fast", r"model\.decay_style='fast'.*'alibi', 'retnet', 'tnl', 'none'"),
        ("model.lightning_backend=fla", r"lightning_backend=fla has no use: .*='S' has no L"),
        ("model.rope_mixers=SX", r"rope_mixers='SX': no layer is called X; name those of S, W"),
        ("model.rope_mixers=SL", r"rope_mixers='SL' names L, but model\.mixers='S' has no L"),
        ("model={mixers: L, num_kv_heads: 2}", r"num_kv_heads=2 has no use: .*='L' has no S or W"),
        ("model={mixers: L, qk_norm: true}", r"model\.qk_norm=True has no use: .* no S or W"),
        ("model={mixers: L, rope_theta: 1e4}", r"rope_theta=10000 has no use: .*='SW' names no"),
        ("model={rope_mixers: '', rope_theta: 1e4}", r"rope_theta=10000 has no use: .*'' names no"),
        ("parallel.state_exchange=ring", r"state_exchange=ring has no use: .*='S' has no L"),
        ("parallel.state_exchange=rnig", r"exchange='rnig'.* expected one of \['auto', 'all_"),
        ("model.sinks=4", r"model\.sinks=4 must be 0, or positive with a model\.window"),
        ("curriculum.max_len=1000", r"must be powers of two"),
        ("curriculum.min_len=16k", r"must be powers of two with 2 <= min_len <= max_len"),
        ("curriculum.tokens_per_step=12000", r"nearest valid values are 8,192 or 16,384"),
        ("optim.lr=inf", r"optim\.lr=inf must be a finite number"),
        ("curriculum.max_len=.inf", r"curriculum\.max_len"),
        ("model=0", r"model=0 must be a section"),
        ("curriculum.cycles=0", r"cycles=0 must lie in 1 to 10,000"),
        *CURRICULUM_MISTAKES,
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
        ("data.path=''", r"data\.path is not set: name a folder .*, or several in data\.sources"),
        ("data.sources={a: x}", r"data\.path=somewhere and data\.sources=\['a'\] are both set"),
        ("data={path: '', sources: {}}", r"data\.sources=\{\} is empty"),
        ("data={path: '', sources: {a: ''}}", r"data\.sources\.a is empty: name a folder"),
        ("data={path: '', sources: {a@1k: x}}", r"a source 'a@1k': a name .* has no '@'"),
        ("data.sources=[x]", r"data\.sources=\['x'\] must be a section of names"),
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
