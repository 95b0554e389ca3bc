"""Load models from folders and Hub ids; check what can be checked before."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from rto_fast import distributed
from rto_fast.config import Lora, RunConfig
from rto_fast.data.adapter_folder import AdapterFolder, base_of, read_adapter
from rto_fast.errors import ConfigError
from rto_fast.models.adapters import PREFIX, check_adapter, check_base, merge, put_back, put_on
from rto_fast.models.attention import ALONE, PACKED, resolve_attention
from rto_fast.models.family import check_family, own_outputs
from rto_fast.models.heads import PolicyModel, ScalarModel
from rto_fast.models.packing import Placement
from rto_fast.models.quantised import quantise
from rto_fast.models.skeleton import from_rank_zero

M = TypeVar("M", PolicyModel, ScalarModel)
SCORE_HEADS = ("score", "value_head")  # transformers' name, OpenRLHF's name
Home = Literal["host", "device", "rank 0"]
"""Where a model's weights are read to: host memory; the device of its placement, past the host unless they are to be in
codes; the host of rank 0 alone, for ZeRO-3 to take apart (backend/spread.py), while the other ranks get a model without
storage."""


def load_config(path: str, argument: str) -> PretrainedConfig:
    """The config of a model, of an adapter's base for an adapter; or a ConfigError that names the argument."""
    source = base_of(path, argument)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if source != path:
            raise ConfigError(
                f"{argument}: no base of the adapter {path!r} at {source!r} ({reason}); set base_model_name_or_path in "
                "its adapter_config.json"
            ) from error
        raise ConfigError(f"{argument}: no model at {path!r} ({reason})") from error


def _load(
    auto: type, path: str, argument: str, placement: Placement | None, home: Home, **settings: object
) -> tuple[nn.Module, dict[str, Any]]:
    """(model that draws nothing at random, loading info) of a folder or Hub id; ConfigError where it does not load.

    With dropout PPO's first ratio would not be 1, and packed attention has none.
    """
    load_config(path, argument)
    if placement and placement.device.type != "cpu" and not _on_host(home):
        settings["device_map"] = {"": placement.device}
    try:
        model, info = auto.from_pretrained(path, output_loading_info=True, trust_remote_code=False, **settings)
    except torch.OutOfMemoryError:
        raise
    except KeyError as error:
        if error.args == (PACKED,):  # an old family chooses its attention from a table of its own
            raise ConfigError(f"{argument}: {path!r} has no attention for packed rows. Use --packing off") from error
        raise ConfigError(f"{argument}: {path!r} does not load: KeyError {error}") from error
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError, AttributeError,
            TypeError) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:300].strip()
        raise ConfigError(f"{argument}: {path!r} does not load: {reason}") from error
    _make_repeatable(model)
    return model, info


ROUTER_NOISE = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps")
"""Names by which mixtures' modules know the noise that their routers read in training."""
DRAWING_ROUTERS = ("PhimoeTopKRouter",)
"""Routers that draw their experts at random in training."""


def _make_repeatable(model: nn.Module) -> None:
    """Takes out what a forward draws at random in training: dropout, skipped layers, noise and draws of routers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # rates of what a function drops, not a module
            if isinstance(value, float) and ("drop" in name or name in ROUTER_NOISE):
                setattr(module, name, 0.0)
        if type(module).__name__ in DRAWING_ROUTERS:
            module.eval()
            module.train = partial(_as_it_is, module)  # type: ignore[method-assign]


def _as_it_is(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def load_policy(
    path: str, *, dtype: torch.dtype, attention: str | None, argument: str, placement: Placement | None = None,
    home: Home = "host", lora: Lora | None = None,
) -> PolicyModel:  # fmt: skip
    """A causal LM folder or Hub id as a PolicyModel; ConfigError where weights are missing.

    placement: where it will run; the model is checked there (collective), see family.py. home: see Home.
    lora: an adapter to train on it, new, or that of an adapter's folder; None = whole weights, an adapter merged.
    """
    adapter = _adapter_at(path, argument, lora)
    path = adapter.base if adapter else path
    home, device = _for_codes(home, lora, placement)

    def load() -> PolicyModel:
        settings = {"dtype": dtype, "attn_implementation": attention}
        lm, info = _load(AutoModelForCausalLM, path, argument, placement, home, **settings)
        if info["missing_keys"]:
            raise ConfigError(
                f"{argument}: {path!r} lacks weights of a {type(lm).__name__}: {_some(info['missing_keys'])}"
            )
        _drop_unused_sampling(lm)
        made = _checked(PolicyModel, lm, path, argument, placement, home)
        return _adapted(made, adapter, lora, path, argument, device)

    return _at_home(load, home)


def _adapter_at(path: str, argument: str, lora: Lora | None) -> AdapterFolder | None:
    """The adapter in a folder, fit to go on with as `lora`; None where it holds none."""
    check_adapter(path, lora, argument)
    return read_adapter(path, argument)


def _for_codes(home: Home, lora: Lora | None, placement: Placement | None) -> tuple[Home, torch.device | None]:
    """(where weights are read to, the device that the base goes to in codes; None where it stays)."""
    coded = lora is not None and lora.base_dtype != "off"
    return ("host", placement.device) if coded and placement and home == "device" else (home, None)


def _adapted(
    model: M, adapter: AdapterFolder | None, lora: Lora | None, base: str, argument: str, device: torch.device | None
) -> M:
    """The base with the adapter of a folder, merged where none is trained, or with a new one; in codes on `device` if
    `lora` says so."""
    if lora and lora.base_dtype != "off":
        quantise(model, lora.base_dtype, argument, "lora_base_dtype", device)
    if adapter:
        put_back(model, adapter, argument)
        if not lora:
            merge(model)
    elif lora:
        put_on(model, lora, base, argument)
    return model


def _at_home(load: Callable[[], M], home: Home) -> M:
    """`load()`, by rank 0 for all where the weights are to lie there alone."""
    return from_rank_zero(load) if _on_one(home) else load()


def _on_one(home: Home) -> bool:
    """Whether rank 0 alone reads the weights."""
    return home == "rank 0" and distributed.world_size() > 1


def _on_host(home: Home) -> bool:
    """Whether weights are read to host memory, whatever the device."""
    return home == "host" or _on_one(home)


def _checked(
    make: Callable[[Any], M], model: Any, path: str, argument: str, placement: Placement | None, home: Home
) -> M:
    """`make(model)`, and with a placement the proof that it computes what the model alone does."""
    if placement is None:
        return make(model)
    name = f"{argument}: {path!r} ({type(model).__name__})"
    alone = own_outputs(model, placement, name)
    made = make(model)
    check_family(made, alone, placement, name, together=not _on_one(home))
    return made


SAMPLING_ONLY = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def _drop_unused_sampling(lm: torch.nn.Module) -> None:
    """Takes the sampling settings out of a generation_config that samples nothing (`do_sample: false`).

    It means the same without them. With them, as common on the Hub, transformers refuses to save the model.
    """
    settings = getattr(lm, "generation_config", None)
    if settings is not None and settings.do_sample is False:
        for name in SAMPLING_ONLY:
            if getattr(settings, name, None) is not None:
                setattr(settings, name, None)


def load_scalar(
    path: str, *, dtype: torch.dtype, attention: str | None, argument: str, placement: Placement | None = None,
    home: Home = "host", lora: Lora | None = None,
) -> ScalarModel:  # fmt: skip
    """A reward model with its stored head; a missing head is an error, never random weights. Rest: load_policy.

    Its class is sequence classification, or token classification, whose head has a bias.
    """
    loading: dict[str, Any] = {
        "dtype": dtype, "attention": attention, "argument": argument, "placement": placement, "home": home,
    }  # fmt: skip
    return _at_home(_scalar(path, lora=lora, **loading), home)


def _scalar(
    path: str, *, dtype: torch.dtype, attention: str | None, argument: str, placement: Placement | None, home: Home,
    lora: Lora | None = None,
) -> Callable[[], ScalarModel]:  # fmt: skip
    """What loads it where it is called."""
    adapter = _adapter_at(path, argument, lora)
    home, device = _for_codes(home, lora, placement)
    if adapter:
        return _adapted_scalar(
            adapter, lora, device, dtype=dtype, attention=attention, argument=argument, placement=placement, home=home
        )
    config = load_config(path, argument)
    _check_statistics(config, path, argument)
    of_tokens = any("TokenClassification" in name for name in config.architectures or ())
    kind = AutoModelForTokenClassification if of_tokens else AutoModelForSequenceClassification

    def load() -> ScalarModel:
        classifier, info = _load(
            kind, path, argument, placement, home, num_labels=1, dtype=dtype,
            attn_implementation=attention, key_mapping={rf"^{SCORE_HEADS[1]}\.": f"{SCORE_HEADS[0]}."},
            ignore_mismatched_sizes=True,
        )  # fmt: skip
        _require_score(classifier, path, argument)
        if any(k.startswith("score.") for k in info["missing_keys"]):
            raise _no_head(path, argument)
        mismatched = [str(key) for key in info.get("mismatched_keys", ())]
        if info["missing_keys"] or mismatched:
            raise ConfigError(f"{argument}: {path!r} does not fit a one-output {type(classifier).__name__}: "
                              f"{_some([*info['missing_keys'], *mismatched])}")  # fmt: skip
        made = _checked(ScalarModel, classifier, path, argument, placement, home)
        return _adapted(made, None, lora, path, argument, device)

    return load


def _adapted_scalar(
    adapter: AdapterFolder, lora: Lora | None, device: torch.device | None, **loading: Any
) -> Callable[[], ScalarModel]:
    """What loads a reward model: an adapter, the head beside it, and the model under it, which may be either kind."""
    argument = loading["argument"]
    check_reward_head(adapter.path, argument)
    load_base = (_scalar if is_reward_model(adapter.base, argument) else _new_scalar)(adapter.base, **loading)

    def load() -> ScalarModel:
        model = load_base()
        model.mean, model.std = (float(adapter.record.get(k, v)) for k, v in (("mean", 0.0), ("std", 1.0)))
        return _adapted(model, adapter, lora, adapter.base, argument, device)

    return load


def check_weights(path: str, argument: str) -> set[str]:
    """Names of the tensors in a folder's safetensors, read from their headers, before any model is loaded.

    Raises ConfigError where the folder has no weights, or a file of them is missing or torn. A Hub id, or weights in
    another format, give no names; loading judges them. Those of an adapter come with those of its base, which must be
    the one that it was trained on.
    """
    if adapter := read_adapter(path, argument):
        below = check_weights(adapter.base, argument)
        check_base(adapter, argument)
        return below | {name.removeprefix(PREFIX) for name in _names_in(adapter.weights, argument)}
    folder = Path(path)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = set(folder.glob("*.safetensors"))
    if folder.is_dir() and not files and not index.exists() and not any(folder.glob("*.bin")):
        raise ConfigError(f"{argument}: {path!r} holds no weights (*.safetensors or *.bin)")
    if index.exists():
        try:
            shards = {folder / str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{argument}: {str(index)!r} is no readable index of safetensors files ({type(error).__name__}); write "
                "the model anew, or fetch the file again"
            ) from error
        if lost := sorted(shards - files):
            raise ConfigError(f"{argument}: {path!r} lacks {_some(p.name for p in lost)}, which its index names")
    names: set[str] = set()
    for file in sorted(files):
        names |= _names_in(file, argument)
    return names


def _names_in(file: Path, argument: str) -> set[str]:
    try:
        with safe_open(file, "pt") as tensors:
            return set(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{argument}: {str(file)!r} is no readable safetensors file ({error})") from error


def check_reward_head(path: str, argument: str) -> None:
    """ConfigError when the folder's safetensors name no reward head; see `check_weights`."""
    names = check_weights(path, argument)
    _check_statistics(load_config(path, argument), path, argument)
    if names and not any(f"{head}.weight" in names for head in SCORE_HEADS):
        raise _no_head(path, argument)


def reward_outputs(path: str) -> int:
    """Numbers that the reward head in a folder's safetensors gives at a position; 0 where none is found there."""
    adapter = read_adapter(path, "reward_model")
    folders = (adapter.path, adapter.base) if adapter else (path,)
    for file in [p for folder in folders for p in Path(folder).glob("*.safetensors")]:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                if name.removeprefix(PREFIX) in [f"{head}.weight" for head in SCORE_HEADS]:
                    return int(tensors.get_slice(name).get_shape()[0])
    return 0


def _check_statistics(config: PretrainedConfig, path: str, argument: str) -> None:
    """ConfigError where the mean and std that scores are normalised by are no numbers to do it with."""
    for name in ("mean", "std"):
        value = getattr(config, name, 1.0)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or (name == "std" and value <= 0):
            wanted = "a number above 0" if name == "std" else "a number"
            raise ConfigError(f"{argument}: {path!r} has {name} {value!r} in its config.json, which must be {wanted}; "
                              "correct it, or delete mean and std: scores are not normalised then")  # fmt: skip


def is_reward_model(path: str, argument: str) -> bool:
    """Whether a folder or Hub id has a reward head already."""
    names = check_weights(path, argument)
    if names:
        return any(f"{head}.weight" in names for head in SCORE_HEADS)
    kinds = load_config(path, argument).architectures or ()
    return any("SequenceClassification" in kind for kind in kinds)


def _require_score(classifier: nn.Module, path: str, argument: str) -> None:
    if not isinstance(getattr(classifier, "score", None), nn.Linear):
        raise ConfigError(
            f"{argument}: {path!r} ({type(classifier).__name__}) has no linear head named score; reward models and "
            "critics of this family are not supported"
        )


def _no_head(path: str, argument: str) -> ConfigError:
    return ConfigError(
        f"{argument}: {path!r} has no reward head (looked for {' and '.join(SCORE_HEADS)}); "
        "train one with recipes/rm_llama3.py"
    )


def new_scalar(
    path: str, *, dtype: torch.dtype, attention: str | None, argument: str, placement: Placement | None = None,
    home: Home = "host", head_std: float = 0.0, lora: Lora | None = None,
) -> ScalarModel:  # fmt: skip
    """A backbone from a causal LM with a new head: zeros, or normal with `head_std` (torch's current seed).

    placement, home, lora: see load_policy.
    """
    loading: dict[str, Any] = {
        "dtype": dtype, "attention": attention, "argument": argument, "placement": placement, "home": home,
    }  # fmt: skip
    return _at_home(_new_scalar(path, head_std=head_std, lora=lora, **loading), home)


def _new_scalar(
    path: str, *, dtype: torch.dtype, attention: str | None, argument: str, placement: Placement | None, home: Home,
    head_std: float = 0.0, lora: Lora | None = None,
) -> Callable[[], ScalarModel]:  # fmt: skip
    """What loads it where it is called."""
    adapter = _adapter_at(path, argument, lora)
    path = adapter.base if adapter else path
    home, device = _for_codes(home, lora, placement)

    def load() -> ScalarModel:
        settings = {"dtype": dtype, "attn_implementation": attention, "num_labels": 1}
        classifier, info = _load(AutoModelForSequenceClassification, path, argument, placement, home, **settings)
        _require_score(classifier, path, argument)
        missing = [k for k in info["missing_keys"] if not k.startswith("score.")]
        if missing:
            raise ConfigError(f"{argument}: {path!r} lacks weights of a {type(classifier).__name__}: {_some(missing)}")
        with torch.no_grad():
            weight = classifier.score.weight
            weight.copy_(torch.randn(weight.shape) * head_std if head_std else torch.zeros(weight.shape))
        classifier.config.mean, classifier.config.std = 0.0, 1.0
        made = _checked(ScalarModel, classifier, path, argument, placement, home)
        return _adapted(made, adapter, lora, path, argument, device)

    return load


def _some(names: object, limit: int = 4) -> str:
    names = sorted(str(n) for n in names)  # type: ignore[attr-defined]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def choose_attention(config: RunConfig, device: torch.device) -> tuple[str | None, str]:
    """(transformers attention, packed kernel) for the run; None: what transformers chooses for the family."""
    if config.packing == "off" and config.attention == "auto":
        return None, ALONE
    try:
        name, kernel = resolve_attention(config.attention, device, DTYPES[config.dtype])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.packing == "off":
        return ("sdpa" if name == PACKED else name), ALONE
    return name, kernel


def place(
    config: RunConfig, device: torch.device, tokens: int, longest: int, *, lockstep: bool = False
) -> tuple[Placement, dict[str, Any]]:
    """Where forwards run, and the settings that every trained model of the run is loaded with.

    tokens: of a micro-batch; longest: of a sequence; lockstep: under any ZeRO stage (see Placement).
    """
    attention, kernel = choose_attention(config, device)
    if kernel == ALONE and distributed.rank() == 0:
        print("packing: off, one sequence a row", flush=True)
    placement = Placement(device, kernel, lockstep or config.zero_stage == 3, config.micro_budget(tokens), longest)
    home: Home = "rank 0" if config.zero_stage == 3 else "device"
    return placement, {"dtype": DTYPES[config.dtype], "attention": attention, "placement": placement, "home": home}
