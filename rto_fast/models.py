"""Policy, critic and reward model: transformers backbones on packed tokens, heads on chosen positions only."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rto_kernels import token_kl, token_logprobs
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from rto_fast.errors import ConfigError
from rto_fast.packing import PackedBatch

SCORE_HEADS = ("score", "value_head")  # transformers' name, OpenRLHF's name
# Families that rescale their logits in a way the log-prob head does not know.
_LOGIT_SCALES = ("logits_scaling", "logit_scale")


Read = Callable[..., Any]
"""What an lm_head is asked for in place of logits, on R positions: a function of

    hidden [R, H], weight [V, H], targets [R] int64, *, bias [V] or None, softcap

such as a kernel, or one with its other arguments filled in."""


class LMHead(nn.Linear):
    """The lm_head that lends its weight to a kernel: [N, V] logits never exist.

    Called as a module, so that DeepSpeed's ZeRO-3 hooks gather and release its weight.
    """

    softcap: float | None

    @classmethod
    def share(cls, linear: nn.Linear, softcap: float | None) -> LMHead:
        """A head on the same parameters (a tied embedding stays tied)."""
        head = cls(1, 1, bias=False, device="meta")
        head.in_features, head.out_features = linear.in_features, linear.out_features
        head.weight, head.bias, head.softcap = linear.weight, linear.bias, softcap
        return head

    def forward(self, hidden: Tensor, targets: Tensor, read: Read) -> Any:
        return read(hidden, self.weight, targets, bias=self.bias, softcap=self.softcap)


def logps_at(temperatures: Sequence[float]) -> Read:
    """A read of the targets' log-probs (nats) at each temperature, [len(temperatures), R] fp32."""

    def read(*args: Tensor, **head: Any) -> Tensor:
        return torch.stack([token_logprobs(*args, temperature=t, **head) for t in temperatures])

    return read


def logp_and_kl(ref_hidden: Tensor, ref_head: LMHead) -> Read:
    """A read of log-probs [R] and of KL(pi_ref || pi) [R], fp32, nats; ref_hidden [R, H] and its head: `states`."""

    def read(hidden: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
        logp = token_logprobs(hidden, weight, targets, **head)
        kl = token_kl(
            hidden, weight, ref_hidden, ref_head.weight,
            ref_bias=ref_head.bias, ref_softcap=ref_head.softcap, **head,
        )  # fmt: skip
        return logp, kl

    return read


class PolicyModel(nn.Module):
    """A causal language model that answers with what a kernel reads at the positions before given tokens."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        head = lm.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ConfigError(f"model: {type(lm).__name__} has no linear lm_head; it is not supported")
        for name in _LOGIT_SCALES:
            if getattr(lm.config, name, None) not in (None, 1, 1.0):
                raise ConfigError(f"model: {type(lm).__name__} scales its logits ({name}); it is not supported")
        lm.set_output_embeddings(LMHead.share(head, getattr(lm.config, "final_logit_softcapping", None)))
        self.lm = lm

    def forward(self, batch: PackedBatch, read: Read | None = None) -> Any:
        """What `read` finds at the R response tokens; by default their log-probs (nats), [R] fp32."""
        hidden = _hidden(self.lm.base_model, batch)[batch.state_positions]
        return self.lm.get_output_embeddings()(hidden, batch.response_tokens, read or token_logprobs)

    def states(self, batch: PackedBatch) -> tuple[Tensor, LMHead, Tensor]:
        """Hidden states [R, H] before the response tokens, the head that reads them, and the log-probs [R] fp32.

        For a model whose weights are whole on this rank.
        """
        hidden, head = _hidden(self.lm.base_model, batch)[batch.state_positions], self.lm.get_output_embeddings()
        return hidden, head, head(hidden, batch.response_tokens, token_logprobs)


class ScalarHead(nn.Linear):
    """A bias-free linear map to one number, in fp32 whatever the backbone's dtype."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R] fp32."""
        return F.linear(hidden.float(), self.weight.float()).squeeze(-1)


class ScalarModel(nn.Module):
    """A backbone with one number a position: reward model and critic.

    The number is normalised, (v - mean) / std, by the statistics that the reward model's recipe stored, so that
    critic and reward speak the same units.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        weight = classifier.score.weight
        head = ScalarHead(weight.shape[1], 1, bias=False, device="meta")
        head.weight = weight
        classifier.score = head
        self.classifier = classifier
        self.mean = float(getattr(classifier.config, "mean", 0.0))
        self.std = float(getattr(classifier.config, "std", 1.0))

    def forward(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """The numbers at `positions` [P] int64 of the packed row -> [P] fp32."""
        hidden = _hidden(self.classifier.base_model, batch)[positions]
        return (self.classifier.score(hidden) - self.mean) / self.std


def _hidden(backbone: nn.Module, batch: PackedBatch) -> Tensor:
    """Final hidden states of all N packed tokens, [N, H]."""
    out = backbone(input_ids=batch.tokens[None], use_cache=False, **batch.layout.model_kwargs())
    return out.last_hidden_state[0]


def load_config(path: str, argument: str) -> PretrainedConfig:
    """The model's config, or a ConfigError that names the argument."""
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{argument}: no model at {path!r} ({reason})") from error


def _load(auto: type, path: str, argument: str, **settings: object) -> tuple[nn.Module, dict[str, Any]]:
    """(model without dropout, loading info) of a folder or Hub id; ConfigError where its weights cannot be read.

    With dropout PPO's first ratio would not be 1, and packed attention has none.
    """
    load_config(path, argument)
    try:
        model, info = auto.from_pretrained(path, output_loading_info=True, **settings)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300].strip()
        raise ConfigError(f"{argument}: {path!r} does not load: {reason}") from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):  # applied by a function, not a module
            module.attention_dropout = 0.0
    return model, info


def load_policy(path: str, *, dtype: torch.dtype, attention: str, argument: str) -> PolicyModel:
    """A causal LM folder or Hub id as a PolicyModel; ConfigError where weights are missing."""
    lm, info = _load(AutoModelForCausalLM, path, argument, dtype=dtype, attn_implementation=attention)
    if info["missing_keys"]:
        raise ConfigError(f"{argument}: {path!r} lacks weights of a {type(lm).__name__}: {_some(info['missing_keys'])}")
    return PolicyModel(lm)


def load_scalar(path: str, *, dtype: torch.dtype, attention: str, argument: str) -> ScalarModel:
    """A reward model with its stored head; a missing head is an error, never random weights."""
    classifier, info = _load(
        AutoModelForSequenceClassification, path, argument, num_labels=1, dtype=dtype, attn_implementation=attention,
        key_mapping={rf"^{SCORE_HEADS[1]}\.": f"{SCORE_HEADS[0]}."}, ignore_mismatched_sizes=True,
    )  # fmt: skip
    if any(k.startswith("score.") for k in info["missing_keys"]):
        raise _no_head(path, argument)
    mismatched = [str(key) for key in info.get("mismatched_keys", ())]
    if info["missing_keys"] or mismatched:
        raise ConfigError(f"{argument}: {path!r} does not fit a one-output {type(classifier).__name__}: "
                          f"{_some([*info['missing_keys'], *mismatched])}")  # fmt: skip
    return ScalarModel(classifier)


def check_weights(path: str, argument: str) -> set[str]:
    """Names of the tensors in a folder's safetensors, read from their headers, before any model is loaded.

    Raises ConfigError where the folder has no weights, or a file of them is missing or torn. A Hub id, or weights in
    another format, give no names; loading judges them.
    """
    folder = Path(path)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = set(folder.glob("*.safetensors"))
    if folder.is_dir() and not files and not index.exists() and not any(folder.glob("*.bin")):
        raise ConfigError(f"{argument}: {path!r} holds no weights (*.safetensors or *.bin)")
    if index.exists():
        shards = {folder / name for name in json.loads(index.read_text())["weight_map"].values()}
        if lost := sorted(shards - files):
            raise ConfigError(f"{argument}: {path!r} lacks {_some(p.name for p in lost)}, which its index names")
    names: set[str] = set()
    for file in sorted(files):
        try:
            with safe_open(file, "pt") as tensors:
                names |= set(tensors.keys())
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{argument}: {str(file)!r} is no readable safetensors file ({error})") from error
    return names


def check_reward_head(path: str, argument: str) -> None:
    """ConfigError when the folder's safetensors name no reward head; see `check_weights`."""
    names = check_weights(path, argument)
    if names and not any(f"{head}.weight" in names for head in SCORE_HEADS):
        raise _no_head(path, argument)


def _no_head(path: str, argument: str) -> ConfigError:
    return ConfigError(
        f"{argument}: {path!r} has no reward head (looked for {' and '.join(SCORE_HEADS)}); "
        "train one with recipes/rm_llama3.py"
    )


def new_scalar(path: str, *, dtype: torch.dtype, attention: str, argument: str, head_std: float = 0.0) -> ScalarModel:
    """A backbone from a causal LM with a new head: zeros, or normal with `head_std` (torch's current seed)."""
    classifier, info = _load(
        AutoModelForSequenceClassification, path, argument, num_labels=1, dtype=dtype, attn_implementation=attention
    )
    missing = [k for k in info["missing_keys"] if not k.startswith("score.")]
    if missing:
        raise ConfigError(f"{argument}: {path!r} lacks weights of a {type(classifier).__name__}: {_some(missing)}")
    with torch.no_grad():
        weight = classifier.score.weight
        weight.copy_(torch.randn(weight.shape) * head_std if head_std else torch.zeros(weight.shape))
    classifier.config.mean, classifier.config.std = 0.0, 1.0
    return ScalarModel(classifier)


def full_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, full tensor) one at a time; collective under ZeRO-3, which gathers one parameter a step.

    A tensor is valid until the next one is asked for. Tied parameters come once.
    """
    inner = getattr(model, "lm", None) or getattr(model, "classifier", model)
    for name, parameter in inner.named_parameters():
        if hasattr(parameter, "ds_id"):
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters([parameter])
        else:
            gathered = nullcontext()
        with gathered:
            yield name, parameter.data


def export(model: PolicyModel | ScalarModel, folder: str | Path, *, write: bool) -> None:
    """Writes a Hugging Face folder; every rank must call it, only the one with `write` writes.

    The weights are those of the model's dtype. Reward models carry `mean` and `std` in their config.
    """
    inner = model.lm if isinstance(model, PolicyModel) else model.classifier
    state = {}
    for name, tensor in full_parameters(model):
        if write:
            state[name] = tensor.detach().to("cpu", copy=True)
    if not write:
        return
    if isinstance(model, ScalarModel):
        inner.config.mean, inner.config.std = model.mean, model.std
    inner.save_pretrained(folder, state_dict=state)
    # transformers leaves the class name of the head's subclass out, but not its own attention's name.
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config.pop("attn_implementation", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _some(names: object, limit: int = 4) -> str:
    names = sorted(str(n) for n in names)  # type: ignore[attr-defined]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
