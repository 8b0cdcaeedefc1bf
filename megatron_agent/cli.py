"""`megatron-agent train|train-async|evaluate|check run.yaml section.key=value ...`: an error of ours is one line."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable

from megatron_agent.config import RunConfig, load, to_dict
from megatron_agent.errors import ConfigError, MegatronAgentError, StopRequested

USAGE = "usage: megatron-agent train|train-async|evaluate|check run.yaml [section.key=value ...]"


def load_config(arguments: list[str]) -> RunConfig:
    if not arguments or "=" in arguments[0]:
        raise ConfigError(f"no config file given; {USAGE}")
    return load(arguments[0], arguments[1:])


def check(arguments: list[str]) -> int:
    """Parse a config and print it with all defaults."""
    sys.stdout.write(json.dumps(to_dict(load_config(arguments)), indent=1) + "\n")
    return 0


def guarded(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command; exit status 2 for the user's mistakes, 1 for failures, 130 when a signal ended it."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("megatron_agent").setLevel(logging.INFO)
    try:
        return command(arguments)
    except StopRequested as error:
        sys.stderr.write(f"{error}; go on with resume=auto\n")
        return 130
    except MegatronAgentError as error:
        if os.environ.get("MEGATRON_AGENT_TRACEBACK"):
            raise
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 2 if isinstance(error, ValueError) else 1


def main() -> int:
    arguments = sys.argv[1:]
    name = arguments[0] if arguments else ""
    if name == "train":
        from megatron_agent.train import main as command
    elif name == "train-async":
        from megatron_agent.train_async import main as command
    elif name == "evaluate":
        from megatron_agent.evaluate import main as command
    elif name == "check":
        command = check
    else:
        sys.stderr.write(USAGE + "\n")
        return 2
    return guarded(command, arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
