"""Strictness of the configuration: names, types, overrides, and checks that span sections.

Options of single sections are checked where they live; the examples' files in tests/test_configs.py.
"""

import pytest

from megatron_agent.config import RunConfig, apply_override, load, parse, to_dict
from megatron_agent.errors import ConfigError, MegatronAgentError
from megatron_agent.training.layout import Layout


def test_defaults_stand_alone():
    config = parse({})
    assert (config.name, config.resume, config.reward_name, config.algorithm_name) == ("run", "never", "vl_agent", "grpo")
    assert config.training.layout == Layout() and str(config.folder) == "runs/run" and config.env == {}


def test_sections_of_components():
    config = parse(
        {"algorithm": {"name": "grpo", "clip_high": 0.3}, "reward": {"name": "exact_match"}, "env": {"visual_toolbox_v2": {}}}
    )
    assert config.algorithm.clip_high == 0.3 and config.algorithm.clip_low == 0.2 and config.reward_name == "exact_match"
    assert set(config.env) == {"visual_toolbox_v2"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"trainning": {}}, "unknown key 'trainning'; did you mean 'training'"),
        ({"training": {"tensor_paralel": 2}}, r"unknown key 'training\.tensor_paralel'; did you mean 'tensor_parallel'"),
        ({"algorithm": {"clip_hi": 0.2}}, r"unknown key 'algorithm\.clip_hi'; did you mean 'clip_high'"),
        ({"env": {"visual_toolbox_v2": {"max_pixel": 1}}}, r"'env\.visual_toolbox_v2\.max_pixel'; did you mean 'max_pixels'"),
        ({"training": {"layout": 1}}, r"unknown key 'training\.layout'"),  # computed, not given
        ({"algorithm_name": "grpo"}, "unknown key 'algorithm_name'"),
        ({"training": {"qqqq": 1}}, r"unknown key 'training\.qqqq'\. Known: tensor_parallel"),
        ({"algorithm": {"name": "grpoo"}}, "algorithms: unknown name 'grpoo'; did you mean 'grpo'"),
        ({"env": {"visual_tolbox_v2": {}}}, "envs: unknown name 'visual_tolbox_v2'; did you mean 'visual_toolbox_v2'"),
    ],
)
def test_unknown_keys_name_the_nearest(tree, message):
    with pytest.raises(ConfigError, match=message):
        parse(tree)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"seed": "one"}, r"seed: expected int, got 'one' \(str\)"),
        ({"seed": True}, r"seed: expected int, got True \(bool\)"),
        ({"training": {"num_steps": 1.5}}, r"training\.num_steps: expected int, got 1.5 \(float\)"),
        ({"training": {"lr": "fast"}}, r"training\.lr: expected float, got 'fast'"),
        ({"training": {"lr": None}}, r"training\.lr: expected float, got None"),
        ({"training": {"lr": True}}, r"training\.lr: expected float, got True"),
        ({"training": {"betas": 0.9}}, r"training\.betas: expected a list"),
        ({"training": {"betas": [0.9, "x"]}}, r"training\.betas\[1\]: expected float, got 'x'"),
        ({"training": 3}, r"training: expected a mapping of options, got 3"),
        ({"name": 7}, r"name: expected str, got 7"),
        ({"data": {"train_files": "a.parquet"}}, r"data\.train_files: expected a list, got 'a.parquet'"),
        ({"env": ["visual_toolbox_v2"]}, "env: a mapping of env names"),
        ({"resume": "always"}, "resume is 'always'; allowed: auto, never"),
        ({"checkpoint": {"keep": -1}}, "checkpoint.keep must be 0 or more"),
    ],
)
def test_wrong_types_and_values(tree, message):
    with pytest.raises(ConfigError, match=message):
        parse(tree)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"algorithm": ["grpo"]}, r"algorithm: expected a name or a mapping of options, got \['grpo'\]"),
        ({"reward": 0}, "reward: expected a name or a mapping of options, got 0"),
        ({"reward": []}, "reward: expected a name or a mapping of options"),
        ({"algorithm": {"name": 3}}, "algorithm: a name is text, got 3"),
        ({"algorithm": {"name": None}}, "algorithm: a name is text, got None"),
        ({"algorithm": "grpoo"}, "algorithms: unknown name 'grpoo'; did you mean 'grpo'"),
        ({"algorithm": "megatron_agent.types:MicroBatch"}, "'megatron_agent.types:MicroBatch' has no Config class"),
        ({"env": {3: {}}}, "env.3: a name is text, got 3"),
        ({"env": {"visual_toolbox_v2": []}}, r"env\.visual_toolbox_v2: expected a mapping of options, got \[\]"),
        ({"env": 0}, "env: a mapping of env names"),
        ({"name": None}, "name: expected str, got None"),
    ],
)
def test_component_sections_of_the_wrong_type(tree, message):
    with pytest.raises(ConfigError, match=message):
        parse(tree)


def test_a_component_may_be_given_by_its_name_alone():
    config = parse({"reward": "exact_match", "algorithm": "grpo", "env": {"visual_toolbox_v2": None}})
    assert (config.reward_name, config.algorithm_name) == ("exact_match", "grpo")
    assert config == parse({"reward": {"name": "exact_match"}, "algorithm": None, "env": {"visual_toolbox_v2": {}}})


@pytest.mark.parametrize("value", ["nan", ".inf", "-inf", float("nan"), float("inf"), 10**400])
def test_a_rate_that_is_no_number(value):
    with pytest.raises(ConfigError, match=r"training\.lr: expected"):
        parse({"training": {"lr": value}})


def test_numbers_as_yaml_1_1_reads_them():
    config = parse({"training": {"lr": "1e-6", "clip_grad": 1}})
    assert config.training.lr == 1e-6 and config.training.clip_grad == 1.0 and isinstance(config.training.clip_grad, float)


BASE = {
    "rollout": {"group_size": 4, "max_model_len": 256},
    "training": {"prompts_per_step": 3, "max_tokens_per_microbatch": 256},
}


def changed(**sections):
    tree = {name: dict(options) for name, options in BASE.items()}
    for name, options in sections.items():
        tree.setdefault(name, {}).update(options)
    return {"agent": {"single_response_max_tokens": 64}, **tree}


def test_the_base_of_the_next_test_is_valid():
    assert parse(changed(training={"data_parallel": 5, "minibatches_per_step": 3})).training.layout.world_size == 5


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            changed(training={"minibatches_per_step": 2}),
            r"minibatches_per_step=2 does not divide .*prompts_per_step=3: .* whole",
        ),
        (changed(rollout={"max_model_len": 257}), r"max_model_len=257 exceeds training\.max_tokens_per_microbatch=256"),
        (
            changed(rollout={"max_model_len": 253}, training={"context_parallel": 2, "max_tokens_per_microbatch": 255}),
            r"max_model_len=253 \(padded to 256 for training\.context_parallel\) exceeds",
        ),
        ({**changed(), "agent": {"single_response_max_tokens": 256}}, r"single_response_max_tokens=256 must be below"),
        (changed(rollout={"temperature": 0}), r"rollout\.temperature=0 makes all rollouts of a task alike"),
        (changed(rollout={"per_env": {"visual_toolbox_v2": {"top_k": 5}}}), r"per_env\.visual_toolbox_v2: the trainer takes"),
        (changed(rollout={"per_env": {"visual_toolbax": {"stop": ["a"]}}}), r"'visual_toolbax'.*visual_toolbox_v2"),
        (changed(rollout={"per_env": {"visual_toolbox_v2": {"max_turns": 0}}}), r"max_turns=0 must be 1 or more"),
        (changed(rollout={"validation": {"temperature": -1}}), r"rollout\.validation\.temperature=-1\.0 must be 0"),
        (changed(rollout={"dtype": "bfloat16"}), r"rollout\.dtype='bfloat16' differs from training\.dtype='float32'"),
        (changed(training={"dtype": "bfloat16"}), r"rollout\.dtype='float32' differs from training\.dtype='bfloat16'"),
    ],
)
def test_sections_that_do_not_fit_together(tree, message):
    with pytest.raises(ConfigError, match=message):
        parse(tree)


def test_sampling_is_free_where_nothing_is_trained():
    rollout = {"temperature": 0, "top_p": 0.9, "top_k": 20, "ban_special_tokens": True}
    parse(changed(rollout=rollout, training={"num_steps": 0}))


@pytest.mark.parametrize("dtypes", [("auto", "bfloat16"), ("auto", "float32"), ("bfloat16", "bfloat16")])
def test_dtypes_that_fit(dtypes):
    parse(changed(rollout={"dtype": dtypes[0]}, training={"dtype": dtypes[1]}))


def test_rows_need_not_divide_over_the_ranks():
    parse(changed(sft={"num_steps": 1, "rows_per_step": 5}, training={"data_parallel": 2}))


@pytest.mark.parametrize(
    ("section", "options"),
    [
        *(("sft", {name: -1}) for name in ("num_steps", "warmup_steps", "clip_grad", "decay_fraction", "min_lr_fraction")),
        *(("sft", {name: 1.1}) for name in ("decay_fraction", "min_lr_fraction")),
        ("sft", {"rows_per_step": 0}),
        ("sft", {"lr": 0}),
        *(("evaluation", {name: -1}) for name in ("every_steps", "max_rows", "chance")),
        ("evaluation", {"chance": 1.1}),
        *(("checkpoint", {name: -1}) for name in ("every_steps", "keep")),
    ],
)
def test_values_outside_their_range(section, options):
    with pytest.raises(ConfigError, match=rf"{section}\.{next(iter(options))}"):
        parse({section: options})


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("resume=auto", {"resume": "auto"}),
        ("training.lr=3", {"training": {"lr": 3, "num_steps": 1}}),
        ("rollout.x.y=[1, a]", {"rollout": {"x": {"y": [1, "a"]}}}),
        ("model.path=a=b", {"model": {"path": "a=b"}}),
        ("model.path=", {"model": {"path": None}}),
        ("training=", {"training": None}),
        ("reward.name=b", {"reward": {"name": "b"}}),
    ],
)
def test_overrides(item, expected):
    tree = {"training": {"lr": 1.0, "num_steps": 1}}
    apply_override(tree, item)
    assert tree == {"training": {"lr": 1.0, "num_steps": 1}} | expected


@pytest.mark.parametrize("item", ["training.lr", "=3", "training.lr.deeper=3"])
def test_overrides_of_the_wrong_form(item):
    with pytest.raises(ConfigError, match=f"override '{item}'"):
        apply_override({"training": {"lr": 1.0}}, item)


@pytest.mark.parametrize("item", ["training.lr=[1", "training.lr=a: b: c"])
def test_overrides_whose_value_is_no_yaml(item):
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        apply_override({}, item)
    assert f"override '{item}'" in str(caught.value)


def test_an_override_of_an_empty_section():
    tree = {"training": None}
    apply_override(tree, "training.lr=1")
    assert tree == {"training": {"lr": 1}}


def test_an_override_of_a_component_given_by_its_name_alone():
    tree = {"algorithm": "grpo", "name": "run"}
    apply_override(tree, "algorithm.clip_low=0.1")
    assert tree == {"algorithm": {"name": "grpo", "clip_low": 0.1}, "name": "run"}
    for item in ("name.x=1", "list.x=1"):
        with pytest.raises(ConfigError, match="is a value, not a section"):
            apply_override(tree | {"list": [1]}, item)


def test_files(tmp_path):
    file = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match="no such config file"):
        load(file)
    file.write_text("training: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(file)
    file.write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(file)
    for text in ("- a", "[]"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="top level must be a mapping of sections, not list"):
            load(file)
    file.write_text("# nothing")
    assert load(file) == parse({})
    file.write_text("training: {lr: 1.0e-4}\nname: a")
    config = load(file, ["training.lr=2e-5", "resume=auto", "name=b"])
    assert (config.training.lr, config.resume, config.name) == (2e-5, "auto", "b")
    with pytest.raises(ConfigError, match="did you mean 'training'"):
        load(file, ["trainin.lr=1"])


def test_the_tree_comes_back():
    config = parse(changed(algorithm={"name": "grpo", "clip_low": 0.1}, env={"visual_toolbox_v2": {}}))
    tree = to_dict(config)
    assert parse(tree) == config and to_dict(parse(tree)) == tree
    assert isinstance(config, RunConfig) and tree["algorithm"]["name"] == "grpo" and "layout" not in tree["training"]


def test_errors_of_the_user_are_ours():
    assert issubclass(ConfigError, MegatronAgentError)
