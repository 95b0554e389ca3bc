"""Packaging: the kernels need torch and triton alone; the trainer is the `train` extra."""

import ast
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    ast.literal_eval(node.value)
    for node in ast.parse((HERE / "kernels" / "rto_kernels" / "__init__.py").read_text()).body
    if isinstance(node, ast.Assign) and node.targets[0].id == "__version__"
)

TRAIN = [
    "accelerate>=1.1",  # transformers reads weights straight to a GPU with it
    "datasets>=3",
    "deepspeed>=0.19.8,<0.20",
    "filelock>=3.16",
    "httpx>=0.27",
    "matplotlib>=3.9",
    "ninja",
    "packaging",
    "peft>=0.21,<0.22",  # adapters; its layers are read and merged here
    "psutil",
    "rich>=13",
    "safetensors>=0.5",
    "tenacity>=9",
    "tensorboard>=2.18",
    "transformers>=5.16,<5.20",  # what vLLM 0.32 asks for; 5.24 renames the argument past_key_values
    "tyro>=0.9",
]

setup(
    name="rto-fast",
    version=VERSION,
    description="Reinforced Token Optimization: exact, fast, packed RLHF with fused Triton kernels",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The rto_fast authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # The folder `kernels/` is deliberately no package: Hugging Face owns that name.
    package_dir={
        "rto_kernels": "kernels/rto_kernels",
        "rto_kernels.integrations": "kernels/rto_kernels/integrations",
        "rto_fast": "rto_fast",
    },
    packages=["rto_kernels", "rto_kernels.integrations", *find_packages(include=["rto_fast", "rto_fast.*"])],
    package_data={"rto_kernels": ["py.typed"], "rto_fast": ["py.typed"]},
    entry_points={"console_scripts": ["rto-fast = rto_fast.__main__:main"]},
    install_requires=["torch>=2.11", "triton>=3.6"],
    extras_require={
        "train": TRAIN,
        "vllm": ["vllm>=0.26,<0.34"],  # rto_fast/rollout/vllm_engines/support.py says what was tried
        "flash": ["flash-attn>=2.8"],  # needs pip's --no-build-isolation: its build looks at the torch that is there
        "wandb": ["wandb>=0.18"],
        "quant": ["bitsandbytes>=0.50"],  # --frozen-dtype, --lora-base-dtype
        "math": ["math-verify>=0.9"],  # the reward of `rto-fast rlvr`
        "dev": [
            "bitsandbytes>=0.50",  # a wheel of 43 MB for CPUs and GPUs alike
            "codespell>=2.4",
            "hypothesis>=6.100",
            "math-verify>=0.9",
            "mkdocs>=1.6,<2",
            "mypy>=2.4,<2.5",  # another version counts other errors
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "selenium>=4.30",  # opens the report in Chromium
            "trl>=1.16,<1.17",  # the objectives and integrations are tested against it
        ],
    },
)
