"""What a run reads, fingerprinted: a resumed run must read the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from rto_fast.config import RunConfig
from rto_fast.data.adapter_folder import read_adapter
from rto_fast.logs.files import fingerprint

MODELS = ("model", "policy", "reference", "dpo_model", "dpo_ref", "reward_model")
TOKEN_REWARD = ("dpo_model", "dpo_ref")
"""Not loaded where no token reward comes from them."""
DATA = ("data", "eval_data", "ptx_data")
READ = (".safetensors", ".bin", ".json", ".model", ".jinja", ".txt", ".arrow")
"""Files of a folder that loading reads."""
Contents = dict[str, dict[str, str]]
"""Argument and path -> file -> size and hash; a Hub id has its revision alone."""


def contents_of(config: RunConfig) -> Contents:
    """The fingerprints of every model, data set, reward function and template file that the run reads."""
    found: Contents = {}
    models = [name for name in MODELS if getattr(config, "dpo_scale", 1.0) or name not in TOKEN_REWARD]
    for spec, _ in getattr(config, "token_sources", ()):
        found |= {f"token_reward: {path!r}": _contents(path, "model") for path in spec.models}
        if spec.kind == "fn":
            found[f"token_reward: {spec.parts[0]!r}"] = _sources(spec.parts[0])
    for names, kind in ((models, "model"), (DATA, "dataset")):
        for name in names:
            value = getattr(config, name, ())
            for path in (value,) if isinstance(value, str) else value:
                if path:
                    found[f"{name}: {path!r}"] = _contents(path, kind)
                if path and kind == "model" and (adapter := read_adapter(path, name)):
                    found[f"{name}: {adapter.base!r}, the base of {path!r}"] = _contents(adapter.base, kind)
    for function in getattr(config, "reward_fn", ()):
        found[f"reward_fn: {function!r}"] = _sources(function)
    if (template := Path(config.chat_template).expanduser()).is_file():
        found[f"chat_template: {config.chat_template!r}"] = {template.name: fingerprint(template)}
    return found


def difference(then: Contents, now: Contents) -> str:
    """The first thing that was read otherwise, as argument, path and what has changed; "" where nothing was."""
    for what, files in now.items():
        before = then.get(what)
        if before is None or before == files:
            continue
        lost, new = sorted(before.keys() - files.keys()), sorted(files.keys() - before.keys())
        changed = sorted(name for name in before.keys() & files.keys() if before[name] != files[name])
        parts = [f"{', '.join(names[:3])} {how}" for names, how in (
            (changed, "has other contents"), (lost, "is gone"), (new, "is new")) if names]  # fmt: skip
        sizes = [
            f"{before[n].split()[0]} bytes then, {files[n].split()[0]} now" for n in changed[:1] if " " in files[n]
        ]
        return f"{what}: {'; '.join(parts)}" + (f" ({sizes[0]})" if sizes else "")
    return ""


def _contents(name: str, kind: str) -> dict[str, str]:
    path = Path(name).expanduser()
    if path.is_file():
        return {path.name: fingerprint(path)}
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in READ and p.is_file())
        return {str(p.relative_to(path)): fingerprint(p) for p in files}
    revision = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "refs" / "main"
    return {"revision": revision.read_text().strip()} if revision.is_file() else {}


def _sources(function: str) -> dict[str, str]:
    """Of a reward function: its file, its module's, or all of its package's; not what those import from elsewhere."""
    place = function.rpartition(":")[0]
    origin = Path(place)
    if not place.endswith(".py"):
        try:
            spec = importlib.util.find_spec(place)
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.has_location or spec.origin is None:
            return {}
        origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    return {str(p.relative_to(origin.parent)): fingerprint(p) for p in files if p.is_file()}
