"""Components by file name. What a component must be is checked in tests/contracts."""

import importlib
import sys

import pytest

from megatron_agent import registry
from megatron_agent.algorithms.grpo import GRPO
from megatron_agent.errors import ConfigError


def test_names_are_files():
    assert registry.names("algorithms") == tuple(sorted(registry.names("algorithms"))) and "grpo" in registry.names(
        "algorithms"
    )
    assert set(registry.names("rewards")) >= {"vl_agent", "exact_match"}
    assert "visual_toolbox_v2" in registry.names("envs") and "qwen2_5_vl" in registry.names("models")
    for kind in ("algorithms", "rewards", "envs", "models"):
        assert not {"base", "functional", "mapping", "renderer", "judge", "attention"} & set(registry.names(kind))


def test_sources_are_read_and_not_imported(tmp_path, monkeypatch):
    package = importlib.import_module("megatron_agent.rewards")
    (tmp_path / "mine.py").write_text("raise RuntimeError('imported')\nCOMPONENT: type = int\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__init__.py").write_text("class A: ...\nCOMPONENT = A\n")
    (tmp_path / "shared.py").write_text('"""Not a COMPONENT."""\nif True:\n    COMPONENT = 1\n')
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    found = registry.names.__wrapped__("rewards")
    assert {"mine", "folder", "vl_agent"} <= set(found) and "shared" not in found


@pytest.mark.parametrize("kind", ["algorithms", "rewards", "envs", "models"])
def test_every_name_resolves(kind):
    for name in registry.names(kind):
        registry.resolve(kind, name)


def test_a_name_is_its_class():
    assert registry.resolve("algorithms", "grpo") is GRPO


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"algorithms: unknown name 'grop'; did you mean 'grpo'\?.*Known: .*, grpo, "):
        registry.resolve("algorithms", "grop")
    with pytest.raises(ConfigError) as caught:
        registry.resolve("algorithms", "zzzzzz")
    known = ", ".join(registry.names("algorithms"))
    assert str(caught.value) == f"algorithms: unknown name 'zzzzzz'. Known: {known}, or 'package.module:Class'"


@pytest.mark.parametrize(("kind", "name"), [("algorithms", "base"), ("models", "attention"), ("rewards", "judge")])
def test_what_components_share_is_no_component(kind, name):
    with pytest.raises(ConfigError, match=f"unknown name '{name}'"):
        registry.resolve(kind, name)


def test_a_class_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "users_algorithms.py").write_text("class Mine:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = registry.resolve("algorithms", "users_algorithms:Mine")
    assert found is sys.modules["users_algorithms"].Mine


@pytest.mark.parametrize("name", ["no_such_module:Mine", "megatron_agent.types:NoSuchClass"])
def test_a_class_that_cannot_be_loaded(name):
    with pytest.raises(ConfigError, match=f"algorithms: cannot load '{name}'.*package.module:Class"):
        registry.resolve("algorithms", name)
