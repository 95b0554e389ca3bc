"""LoRA adapters: put on a model, read, merged, written, in PEFT's own format.

PEFT's layers stand in the place of a transformers model's linear maps; the model keeps its class. The base is frozen,
of a scalar model its head is trained with the adapter.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from rto_fast.config import ALL_LINEAR, Lora
from rto_fast.data.adapter_folder import ADAPTER_RECORD, ADAPTER_WEIGHTS, AdapterFolder, read_adapter
from rto_fast.errors import ConfigError, require
from rto_fast.logs.files import fingerprint
from rto_fast.models.quantised import QuantisedLinear, coded

Model = Any
"""A PolicyModel or a ScalarModel (models/heads.py)."""

NAME = "default"
"""PEFT's name of the one adapter of a model."""
PREFIX = "base_model.model."
"""What PEFT writes before every name."""
HEAD = "score"


@dataclass(frozen=True)
class Adapter:
    """The adapter that a model carries, which is all that training changes."""

    base: str
    """Folder or Hub id."""
    fresh: bool
    """It is new and changes nothing yet."""


@dataclass(frozen=True)
class AdapterForm:
    """What an adapter is beside its numbers: what another program needs to compute with them."""

    settings: dict[str, Any]
    """PEFT's, as adapter_config.json holds them: rank, alpha, rank-stabilised or not, and targets."""
    shapes: dict[str, torch.Size]
    """Of its tensors, by the names that PEFT's files have for them."""
    beyond: str
    """What of it is more than LoRA with one rank and scale; empty = nothing."""

    @property
    def rank(self) -> int:
        return self.settings["r"]

    @property
    def scale(self) -> float:
        """What the product of its two matrices is multiplied by."""
        return self.settings["lora_alpha"] / (self.rank**0.5 if self.settings["use_rslora"] else self.rank)


def check_adapter(path: str, lora: Lora | None, argument: str) -> None:
    """ConfigError where a model folder holds an adapter that the run cannot go on with: of another rank or kind."""
    adapter = read_adapter(path, argument)
    if adapter is None or lora is None:
        return
    for key, flag, asked in (
        ("r", "rank", lora.rank), ("lora_alpha", "alpha", lora.alpha),
        ("use_rslora", "rslora", lora.rslora), ("use_dora", "dora", lora.dora),
    ):  # fmt: skip
        found = adapter.settings.get(key, False)
        require(
            found == asked,
            f"{argument}: {path!r} is an adapter with {key} {found}, and --lora-{flag} {asked} is asked for; pass "
            f"--lora-{flag} {found}, or merge it (rto-fast export {path} --merge --to FOLDER) and start on the result",
        )


def check_base(adapter: AdapterFolder, argument: str) -> None:
    """ConfigError where the base's weights are not those that the adapter was trained on; unknown is let pass."""
    known = adapter.record.get("base")
    if isinstance(known, dict) and known and (now := contents_of_base(adapter.base)) != known:
        changed = sorted(f for f in known.keys() | now.keys() if known.get(f) != now.get(f))
        raise ConfigError(
            f"{argument}: {adapter.path!r} is an adapter of another base: {changed[0]} of {adapter.base!r} has other "
            "contents than in its training; put that base back, or name its folder as base_model_name_or_path"
        )


def contents_of_base(base: str) -> dict[str, str]:
    """The fingerprint of each file of weights in a model's folder or in the cache of a Hub id."""
    config = cached_file(base, "config.json", _raise_exceptions_for_missing_entries=False)
    folder = Path(config).parent if config else Path(base)
    files = [p for kind in ("*.safetensors", "*.bin") for p in folder.glob(kind)]
    return {p.name: fingerprint(p) for p in sorted(files)}


def put_on(model: Model, lora: Lora, base: str, argument: str) -> None:
    """Gives a whole model a new adapter, the same on every rank; the model is then what it was.

    Raises ConfigError where a module of `lora` is none of the model's, or PEFT cannot adapt it.
    """
    peft, inner = _peft(), model.inner
    names = target_modules(inner, lora.targets, argument)
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, use_rslora=lora.rslora,
        use_dora=lora.dora, base_model_name_or_path=base, task_type=_task(inner),
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in inner.modules()),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        _inject(model, settings, base, argument)
    model.adapter = Adapter(base, fresh=True)


def put_back(model: Model, adapter: AdapterFolder, argument: str) -> None:
    """Gives a model the adapter of a folder. Raises ConfigError where it does not fit the model."""
    settings, what = _peft().LoraConfig.from_pretrained(adapter.path), f"{argument}: {adapter.path!r}"
    kept = [name for name in settings.modules_to_save or () if name not in (HEAD, "classifier")]
    require(not kept, f"{what} is an adapter with whole modules ({', '.join(kept)}) beside it; merge it by PEFT first")
    settings.modules_to_save, settings.inference_mode, settings.base_model_name_or_path = None, False, adapter.base
    settings.task_type = _task(model.inner)
    target_modules(model.inner, settings.target_modules, argument)
    _inject(model, settings, adapter.base, argument)
    try:
        state = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(adapter.weights).items()}
        head = {name.removeprefix(f"{HEAD}."): state.pop(name) for name in list(state) if name.startswith(f"{HEAD}.")}
        if hasattr(model.inner, HEAD):
            model.inner.get_submodule(HEAD).load_state_dict(head, strict=bool(head))
        found = _peft().set_peft_model_state_dict(model.inner, state, adapter_name=NAME)
        lacking = [name for name in found.missing_keys if f".{NAME}." in name]
    except (RuntimeError, KeyError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200].strip()
        raise ConfigError(f"{what} is an adapter of another base than {adapter.base!r}: {reason}") from error
    wrong = [*lacking, *found.unexpected_keys]
    require(not wrong, f"{what} is an adapter of another base than {adapter.base!r}: {', '.join(wrong[:3])} does not "
            "fit")  # fmt: skip
    model.adapter = Adapter(adapter.base, fresh=False)


def merge(model: Model) -> None:
    """Adds the adapter to the weights and takes it off; all parameters are trained again."""
    for name, layer in list(_layers(model.inner).items()):
        layer.merge(safe_merge=True)
        parent, _, own = name.rpartition(".")
        setattr(model.inner.get_submodule(parent), own, layer.get_base_layer())
    del model.inner.peft_config
    model.inner.requires_grad_(True)
    model.adapter = None


def merged_parameters(inner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name without an adapter, full tensor with it merged) one at a time; collective under ZeRO-3.

    A tensor is valid until the next one is asked for; the model keeps its weights. Those in codes are decoded.
    """
    layers = _layers(inner)
    for name, parameter in inner.named_parameters():
        owner, _, own = name.rpartition(".base_layer.")
        layer = layers.get(owner)
        if layer is None:
            if not _of_adapter(name, layers):
                with gathered(parameter):
                    yield name, parameter.data
        else:
            with gathered(*layer.parameters()):
                before = parameter.data
                if own == "weight":
                    layer.merge(safe_merge=True)
                try:
                    yield f"{owner}.{own}", parameter.data
                finally:
                    parameter.data = before
                    layer.merged_adapters.clear()
    for name, module in coded(inner).items():
        weight = module.decoded(next(inner.parameters()).dtype)
        yield f"{name}.weight", weight + layers[name].get_delta_weight(NAME) if name in layers else weight


def twin(model: Any) -> Any:
    """The model as it is now, on the same frozen weights: training the one leaves the other as it was.

    An adapter that changes nothing yet is left out. For a model that DeepSpeed has not seen.
    """
    return bare(model) if model.adapter and model.adapter.fresh else _beside(model)


def bare(model: Any) -> Any:
    """The model without its adapter, in modules of its own on the same weights. For one that DeepSpeed has not seen."""
    found = _beside(model)
    if found.adapter:
        for name, layer in _layers(found.inner).items():
            parent, _, own = name.rpartition(".")
            setattr(found.inner.get_submodule(parent), own, layer.get_base_layer())
        del found.inner.peft_config
        found.adapter = None
    return found


def _beside(model: Any) -> Any:
    """A copy that shares what is not trained: the base's tensors, not its modules."""
    shared = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def form_of(model: Any) -> AdapterForm:
    """The form of the adapter that a model carries."""
    asked = model.inner.peft_config[NAME]
    targets = asked.target_modules
    settings = {
        "peft_type": "LORA", "r": asked.r, "lora_alpha": asked.lora_alpha, "use_rslora": asked.use_rslora,
        "target_modules": targets if isinstance(targets, str) else sorted(targets), "bias": "none",
    }  # fmt: skip
    shapes = {
        file_name(name): torch.Size(getattr(p, "ds_shape", p.shape))
        for name, p in model.inner.named_parameters()
        if p.requires_grad
    }
    more = {
        "DoRA": asked.use_dora, "ranks of modules": asked.rank_pattern, "alphas of modules": asked.alpha_pattern,
        "biases": asked.lora_bias or asked.bias != "none", "repeated layers": asked.layer_replication,
        "adapted parameters": asked.target_parameters,
        f"{asked.init_lora_weights} start, which changes the base": isinstance(asked.init_lora_weights, str),
        f"base in {base_dtype(model)} as the policy's is": base_dtype(model) != "off",
    }  # fmt: skip
    return AdapterForm(settings, shapes, next((what for what, there in more.items() if there), ""))


def file_name(name: str) -> str:
    """The name that PEFT's files have for a parameter of an adapter."""
    return PREFIX + name.replace(f".{NAME}.", ".")


def base_dtype(model: Any) -> str:
    """The code of a model's base, as the setting `lora_base_dtype` has it."""
    return next((module.kind for module in coded(model.inner).values()), "off")


def adapter_settings(model: Any) -> str:
    """What an adapter does with its weights, as text."""
    settings = model.inner.peft_config[NAME]
    return repr((settings.r, settings.lora_alpha, settings.use_rslora, settings.use_dora, settings.rank_pattern,
                 settings.alpha_pattern))  # fmt: skip


def save_adapter(model: Model, state: dict[str, Tensor], folder: Path, record: dict) -> None:
    """Writes PEFT's two files and ours; state: the trained parameters by their names in transformers' model."""
    inner, adapter = model.inner, model.adapter
    assert adapter is not None
    head = {name: tensor for name, tensor in state.items() if name.startswith(f"{HEAD}.")}
    found = _peft().get_peft_model_state_dict(
        inner, {k: v for k, v in state.items() if k not in head}, adapter_name=NAME, save_embedding_layers=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in (found | head).items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    settings = copy.copy(inner.peft_config[NAME])
    local = Path(adapter.base).exists()
    settings.base_model_name_or_path = str(Path(adapter.base).resolve()) if local else adapter.base
    settings.inference_mode, settings.modules_to_save = True, [HEAD] if head else None
    settings.save_pretrained(folder)
    kind = base_dtype(model)
    record = {"base": contents_of_base(adapter.base)} | ({"base_dtype": kind} if kind != "off" else {}) | record
    (folder / ADAPTER_RECORD).write_text(json.dumps(record, indent=2) + "\n")


def gathered(*parameters: nn.Parameter) -> ExitStack:
    """A context in which parameters are whole, wherever ZeRO-3 keeps their parts; collective there."""
    stack, apart = ExitStack(), [p for p in parameters if hasattr(p, "ds_id")]
    if apart:
        import deepspeed

        stack.enter_context(deepspeed.zero.GatheredParameters(apart))
    return stack


def target_modules(inner: nn.Module, asked: Any, argument: str) -> list[str]:
    """The last names of the modules to adapt: all linear maps but the head, or those that are asked for.

    Raises ConfigError, with the nearest name, where one is no module of the model, or no linear map.
    """
    head = {id(m) for m in (inner.get_output_embeddings(), getattr(inner, HEAD, None)) if m is not None}  # type: ignore[operator]
    modules = {name: m for name, m in inner.named_modules() if name}
    maps = nn.Linear | Conv1D | QuantisedLinear
    linear = {name for name, m in modules.items() if isinstance(m, maps) and id(m) not in head}
    known = sorted({name.rpartition(".")[2] for name in linear})
    kind = type(inner).__name__
    require(bool(known), f"lora_rank: {argument} ({kind}) has no linear map that PEFT could adapt; use --lora-rank 0")
    if asked == ALL_LINEAR or asked == (ALL_LINEAR,):
        return known
    if isinstance(asked, str):  # a pattern that PEFT matches whole names with, from an adapter's folder
        return known
    for target in asked:
        matched = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not matched:
            near = difflib.get_close_matches(target, known, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"lora_targets: {argument} ({kind}) has no module {target!r}; {hint}there are "
                              f"{', '.join(known)}")  # fmt: skip
        wrong = [name for name in matched if name not in linear]
        require(
            not wrong,
            f"lora_targets: {target!r} ({type(modules[matched[0]]).__name__}) of {argument} cannot be adapted: "
            f"{'it is the head' if id(modules[matched[0]]) in head else 'it is no linear map'}; there are "
            f"{', '.join(known)}",
        )
    return sorted(asked)


def _inject(model: Any, settings: Any, base: str, argument: str) -> None:
    inner = model.inner
    dtype = next(inner.parameters()).dtype
    try:
        if coded(inner):
            settings._register_custom_module({QuantisedLinear: _lora_linear()})
        with _gathering(inner):
            _peft().inject_adapter_in_model(settings, inner, adapter_name=NAME)
    except Exception as error:  # PEFT's own, of many types, for families and modules that it does not know
        reason = " ".join(str(error).split())[:200].strip()
        raise ConfigError(f"lora_rank: PEFT cannot adapt {argument} {base!r} ({type(inner).__name__}): {reason}; use "
                          "other --lora-targets, or --lora-rank 0") from error  # fmt: skip
    if hasattr(inner, HEAD):
        inner.get_submodule(HEAD).requires_grad_(True)
    for parameter in inner.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _gathering(inner: nn.Module) -> Iterator[None]:
    """A context in which PEFT gathers a weight that ZeRO-3 keeps in parts before it reads it (DoRA's norms do)."""
    stage: Any = None
    if any(hasattr(p, "ds_id") for p in inner.parameters()):
        from transformers.integrations import HfDeepSpeedConfig

        stage = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # known to PEFT for as long as it is held
    try:
        yield
    finally:
        del stage


def _lora_linear() -> Any:
    from peft.tuners.lora import Linear

    return Linear


def _layers(inner: nn.Module) -> dict[str, Any]:
    """PEFT's layers by the names of the modules that they stand for."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}


def _of_adapter(name: str, layers: dict[str, Any]) -> bool:
    """Whether a parameter belongs to one of PEFT's layers."""
    parts = name.split(".")
    return any(".".join(parts[:i]) in layers for i in range(1, len(parts)))


def _task(inner: nn.Module) -> str:
    if not hasattr(inner, HEAD):
        return "CAUSAL_LM"
    return "TOKEN_CLS" if "TokenClassification" in type(inner).__name__ else "SEQ_CLS"


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError("lora_rank: adapters need peft; pip install 'rto-fast[train]', or peft alone") from error
    return peft
