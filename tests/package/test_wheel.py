"""The wheel in environments of its own: it trains, and without the trainer's packages its kernels run."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import rto_kernels
from loop_helpers import ROOT
from packaging.requirements import Requirement

import rto_fast

pytestmark = pytest.mark.slow

SITE = Path(sysconfig.get_path("purelib"))


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A command outside the repository, which finds nothing of it but what is installed."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE", "MASTER_PORT")}
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=clean | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"} | env,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the files that git knows, so that no left-over of a build gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\n")
    sources = [n for n in names if n.startswith(("rto_fast/", "kernels/")) or "/" not in n]
    for name in filter(None, sources):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    built = run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder,
        folder / "source", cwd=folder,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


def environment(folder: Path, wheel: Path) -> tuple[Path, Path]:
    """(bin, site-packages) of a new virtual environment that holds the wheel alone."""
    venv.create(folder, with_pip=False)
    site = Path(run(folder / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))",
                    cwd=folder).stdout.strip())  # fmt: skip
    installed = run(
        sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-deps", wheel,
        cwd=folder,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    return folder / "bin", site


def requirements(name: str) -> set[str]:
    """A distribution and all that it requires, where it is installed here."""
    found, todo = set(), [name]
    while todo:
        at = todo.pop()
        if at in found:
            continue
        try:
            lines = importlib.metadata.requires(at) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(at)
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


def test_the_wheel_trains(wheel, tmp_path):
    """With the trainer's packages: two iterations of each arm of the tiny recipe."""
    binaries, site = environment(tmp_path / "env", wheel)
    (site / "packages.pth").write_text(f"{SITE}\n")  # its own .pth files, the repository's among them, are not read
    where = run(binaries / "python", "-c", "import rto_fast; print(rto_fast.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(site), where.stdout + where.stderr
    flags = [
        "--output-dir", tmp_path / "demo", "--iterations", "2", "--rollout-batch", "8", "--train-batch", "8",
        "--corpus-rows", "64", "--pairs", "32", "--prompts", "32", "--eval-prompts", "8", "--stage-epochs", "1",
        "--rm-epochs", "1", "--max-response-length", "8",
    ]  # fmt: skip
    trained = run(binaries / "rto-fast", "demo", *flags, cwd=tmp_path)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    for arm in ("ppo", "rto"):
        assert len((tmp_path / "demo" / arm / "metrics.jsonl").read_text().splitlines()) == 2
        assert (tmp_path / "demo" / arm / "policy" / "model.safetensors").exists()
    again = run(binaries / "python", "-m", "rto_fast", "--local_rank=0", "demo", *flags, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr  # as deepspeed --module starts it; nothing is left to do


def test_the_kernels_need_torch_and_triton_alone(wheel, tmp_path):
    binaries, site = environment(tmp_path / "env", wheel)
    for name in requirements("torch") | requirements("triton"):
        for file in importlib.metadata.files(name) or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(SITE / top)
    code = (
        "import torch, rto_kernels; from rto_kernels import gae; print(rto_kernels.__file__, rto_kernels.__version__);"
        "print(gae(torch.tensor([0.0, 1.0]), torch.zeros(2), gamma=1.0, lam=1.0, cu_seqlens=torch.tensor([0, 2]))"
        ".advantages.tolist())"
    )
    out = run(binaries / "python", "-c", code, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    imported, advantages = out.stdout.splitlines()
    path, version = imported.split()
    assert Path(path).is_relative_to(site)
    assert version == rto_kernels.__version__
    assert advantages == "[1.0, 1.0]"
    refused = run(binaries / "rto-fast", "rto", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "transformers" in refused.stderr
    assert refused.stderr.endswith("pip install 'rto-fast[train]'\n")


def test_the_wheel_says_what_it_is(wheel):
    (metadata,) = importlib.metadata.distributions(path=[str(unpacked(wheel))])
    assert metadata.version == rto_fast.__version__ == rto_kernels.__version__
    assert metadata.metadata["License"] == "Apache-2.0" or metadata.metadata["License-Expression"] == "Apache-2.0"
    names = {str(f) for f in metadata.files or ()}
    assert {"rto_fast/py.typed", "rto_kernels/py.typed"} <= names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert not {n.split("/")[0] for n in names} & {"kernels", "tests", "bench", "recipes"}


def unpacked(wheel: Path) -> Path:
    import zipfile

    folder = wheel.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder
