"""Strict configuration: YAML + `a.b=c` overrides into one tree of dataclasses. Unknown keys name their nearest kin.

Each dataclass sits beside what it configures; this file only composes them and checks what spans sections.
Parsing imports none of ray, vllm, megatron (tests/test_configs.py).
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_agent import registry
from megatron_agent.data.dataset import DataConfig
from megatron_agent.errors import ConfigError
from megatron_agent.observe.boards import ObserveConfig
from megatron_agent.options import coerce, component_config, reject_unknown, require
from megatron_agent.rollout.agent_loop import AgentConfig
from megatron_agent.rollout.engine import RolloutConfig
from megatron_agent.rollout.rollouts import of_env
from megatron_agent.training.actor import TrainingConfig, VisionSection

COMPONENTS = {"reward": ("rewards", "vl_agent"), "algorithm": ("algorithms", "grpo")}  # section -> folder, default name


@dataclass
class CheckpointSection:
    """Every `every_steps` updates (0: at the end only) a resumable checkpoint; the newest `keep` stay (0: all)."""

    every_steps: int = 10
    keep: int = 2
    asynchronous: bool = True  # training goes on while the files are written; it waits for a copy in host memory only
    keep_best: str = ""  # a metric of the held-out evaluation, "heldout/accuracy": its best checkpoint stays too
    export_hf: bool = False  # a Hugging Face folder beside the weights, step_.../hf_model

    def __post_init__(self) -> None:
        require(self.every_steps >= 0 and self.keep >= 0, "checkpoint.every_steps and checkpoint.keep must be 0 or more")
        require(
            not self.keep_best or self.keep_best.startswith("heldout/"),
            f"checkpoint.keep_best={self.keep_best!r}: give a metric of the held-out rows, such as heldout/accuracy, or ''",
        )


@dataclass
class ModelSection:
    """The Hugging Face checkpoint to start from and the model family (a folder or file of models/) that reads it."""

    path: str = ""
    family: str = "qwen2_5_vl"


@dataclass
class SftSection:
    """Supervised warm start on the `script` column; 0 steps: none."""

    files: list[str] = field(default_factory=list)
    num_steps: int = 0
    rows_per_step: int = 32
    lr: float = 1e-3
    warmup_steps: int = 20
    decay_fraction: float = 0.3  # the last part of the steps over which the rate falls
    min_lr_fraction: float = 0.1
    clip_grad: float = 1.0

    def __post_init__(self) -> None:
        require(self.num_steps >= 0, f"sft.num_steps={self.num_steps} must be 0 (no warm start) or more")
        require(self.rows_per_step >= 1, f"sft.rows_per_step={self.rows_per_step} must be 1 or more")
        require(0 < self.lr < math.inf, f"sft.lr={self.lr} must be above 0 and finite")
        require(self.warmup_steps >= 0, f"sft.warmup_steps={self.warmup_steps} must be 0 or more")
        require(self.clip_grad >= 0, f"sft.clip_grad={self.clip_grad} must be 0 (off) or more")
        for name in ("decay_fraction", "min_lr_fraction"):
            require(0 <= getattr(self, name) <= 1, f"sft.{name}={getattr(self, name)} must lie between 0 and 1")


@dataclass
class EvaluationSection:
    """Greedy episodes over held-out files, before, after and every `every_steps` (0: never between)."""

    files: list[str] = field(default_factory=list)
    without_tool_files: list[str] = field(default_factory=list)
    every_steps: int = 0
    max_rows: int = 0  # 0: all
    chance: float = 0.0  # accuracy of guessing, for the summary

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, f"evaluation.every_steps={self.every_steps} must be 0 (never between) or more")
        require(self.max_rows >= 0, f"evaluation.max_rows={self.max_rows} must be 0 (all) or more")
        require(0 <= self.chance <= 1, f"evaluation.chance={self.chance} must lie between 0 and 1")


@dataclass
class RunConfig:
    """The whole tree. A run lives in `output_dir`/`name`; `resume`: "never", or "auto" to go on from its last complete
    checkpoint. `env`, `reward`, `algorithm` hold the Config of the component that is named."""

    name: str = "run"
    output_dir: str = "runs"
    seed: int = 0
    resume: str = "never"
    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    vision: VisionSection = field(default_factory=VisionSection)
    sft: SftSection = field(default_factory=SftSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    env: dict[str, Any] = field(default_factory=dict)  # env name -> its Config
    reward_name: str = "vl_agent"
    reward: Any = None
    algorithm_name: str = "grpo"
    algorithm: Any = None

    def __post_init__(self) -> None:
        require(self.resume in ("auto", "never"), f"resume is {self.resume!r}; allowed: auto, never")
        check_across_sections(self)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def num_models(self) -> int:
        """Of how many models a trainer's GPU holds a shard: policy, critic, teacher."""
        algorithm = registry.resolve("algorithms", self.algorithm_name)(self.algorithm)
        return 1 + algorithm.needs_critic + bool(algorithm.teacher_path)


def check_across_sections(config: RunConfig) -> None:
    training, rollout = config.training, config.rollout
    require(
        training.prompts_per_step % training.minibatches_per_step == 0,
        f"training.minibatches_per_step={training.minibatches_per_step} does not divide training.prompts_per_step="
        f"{training.prompts_per_step}: mini-batches are made of whole groups",
    )
    multiple = training.layout.segment_multiple
    longest = -(-rollout.max_model_len // multiple) * multiple
    padded = f" (padded to {longest} for training.context_parallel)" if longest > rollout.max_model_len else ""
    require(
        longest <= training.max_tokens_per_microbatch,
        f"rollout.max_model_len={rollout.max_model_len}{padded} exceeds training.max_tokens_per_microbatch="
        f"{training.max_tokens_per_microbatch}: a full row would fit no micro-batch; raise the second or lower the first",
    )
    require(
        rollout.dtype in ("auto", training.dtype),
        f"rollout.dtype={rollout.dtype!r} differs from training.dtype={training.dtype!r}, in which weights are sent; "
        f"give the same to both",
    )
    for name, env in rollout.per_env.items():
        registry.resolve("envs", name)
        of_env(config.agent, env)
    if training.num_steps:
        check_sampling(rollout)
    require(
        not config.checkpoint.keep_best or bool(config.evaluation.files),
        f"checkpoint.keep_best={config.checkpoint.keep_best!r} needs held-out rows; give evaluation.files, or '' for off",
    )
    require(
        config.agent.single_response_max_tokens < rollout.max_model_len,
        f"agent.single_response_max_tokens={config.agent.single_response_max_tokens} must be below "
        f"rollout.max_model_len={rollout.max_model_len}",
    )


def check_sampling(rollout: RolloutConfig) -> None:
    """What is sampled must be what the trainer computes log-probs of."""
    require(
        rollout.temperature > 0,
        "rollout.temperature=0 makes all rollouts of a task alike: nothing can be learned; give a value above 0",
    )
    common = {name: getattr(rollout, name) for name in ("temperature", "top_p", "top_k")}
    for name, env in rollout.per_env.items():
        require(
            all(getattr(env, option) in (None, value) for option, value in common.items()),
            f"rollout.per_env.{name}: the trainer takes the log-probs of all rows under rollout's {common}; training needs the "
            f"same here",
        )


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML file and apply `section.key=value` overrides (values are YAML). Raises ConfigError."""
    path = Path(path)
    require(path.is_file(), f"{path}: no such config file")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    tree = {} if tree is None else tree
    require(isinstance(tree, dict), f"{path}: the top level must be a mapping of sections, not {type(tree).__name__}")
    for item in overrides or []:
        apply_override(tree, item)
    return parse(tree)


def apply_override(tree: dict, item: str) -> None:
    """Set `section.key` in place; a section that is null or not there is made."""
    key, equals, text = item.partition("=")
    require(bool(equals) and bool(key), f"override {item!r}: write it as section.key=value")
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        below = node.get(name)
        if below is None:
            below = {}
        elif isinstance(below, str) and node is tree and name in COMPONENTS:
            below = {"name": below}
        require(isinstance(below, dict), f"override {item!r}: {name!r} is a value, not a section")
        node[name] = below
        node = below
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {item!r}: not valid YAML: {error}") from error


def parse(tree: dict) -> RunConfig:
    """A mapping as YAML gives it -> RunConfig; every key and type is checked."""
    tree = dict(tree)
    env = tree.pop("env", None)
    env = {} if env is None else env
    require(isinstance(env, dict), "env: a mapping of env names to their options")
    env_configs = {name: component_config("envs", name, options, f"env.{name}") for name, options in env.items()}
    components: dict[str, Any] = {"env": env_configs}
    for section, (kind, default) in COMPONENTS.items():
        options = tree.pop(section, None)
        if options is None or isinstance(options, str):
            options = {"name": options or default}
        require(isinstance(options, dict), f"{section}: expected a name or a mapping of options, got {options!r}")
        options = dict(options)
        name = options.pop("name", default)
        components[section] = component_config(kind, name, options, section)
        components[f"{section}_name"] = name
    sections = {f.name: f for f in dataclasses.fields(RunConfig) if f.name not in components}
    reject_unknown(tree, [*sections, "env", "reward", "algorithm"], "")
    hints = typing.get_type_hints(RunConfig)
    values = {}
    for name, value in tree.items():
        is_empty = value is None and dataclasses.is_dataclass(hints[name])  # a section written without options
        values[name] = coerce(hints[name], {} if is_empty else value, name)
    return RunConfig(**values, **components)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved tree, as `parse` reads it back."""
    tree = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    tree = {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in tree.items()}  # type: ignore[arg-type]
    tree["env"] = {k: dataclasses.asdict(v) for k, v in config.env.items()}
    for section in ("reward", "algorithm"):
        tree[section] = {"name": tree.pop(f"{section}_name"), **tree[section]}
    return tree
