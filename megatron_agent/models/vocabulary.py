"""Whether two models speak of the same tokens: a teacher scores the very ids that the policy wrote."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_agent.errors import ConfigError


def token_ids(folder: Path) -> dict[str, int]:
    """Token -> id of a folder's tokenizer.json, added tokens too. Raises ConfigError for a folder without one."""
    file = Path(folder) / "tokenizer.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        return {**content["model"]["vocab"], **added}
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no tokenizer.json; the policy's tokens cannot be compared with the teacher's") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not a tokenizer of the tokenizers library: {error!r}") from error


def check_same_tokens(policy: Path, teacher: Path) -> None:
    """Raises ConfigError, naming both folders and what differs, for a teacher that reads the policy's ids as other tokens.

    Sizes padded beyond the tokenizer may differ (Qwen2.5's do between 3B and 72B).
    """
    own, its = token_ids(policy), token_ids(teacher)
    if own != its:
        differ = sorted(name for name in own.keys() | its.keys() if own.get(name) != its.get(name))
        shown = ", ".join(f"{name!r}: {own.get(name)} and {its.get(name)}" for name in differ[:3])
        raise ConfigError(
            f"algorithm.teacher_path={teacher}: its tokenizer is not that of model.path={policy}: {len(differ)} tokens differ "
            f"({shown}); a teacher scores the policy's token ids, so take one with the same tokenizer"
        )
    config = json.loads((Path(teacher) / "config.json").read_text())
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 0)
    if size <= max(own.values()):
        raise ConfigError(
            f"algorithm.teacher_path={teacher}: its config.json has vocab_size={size}, the tokens of model.path={policy} go to "
            f"{max(own.values())}; take a teacher with a row for each of them"
        )
