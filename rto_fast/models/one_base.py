"""Models of one run on the same frozen weights, each with its own adapter.

Nothing is switched between forwards, and a gradient of one cannot reach another: they share tensors that are never
trained, and no module.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from rto_fast.config import Lora
from rto_fast.data.adapter_folder import AdapterFolder, base_of, read_adapter
from rto_fast.models.adapters import bare, check_adapter, contents_of_base, put_back, put_on
from rto_fast.models.heads import PolicyModel, ScalarModel, backbone
from rto_fast.models.load import check_reward_head, is_reward_model


class BaseFiles:
    """The files of the policy's base, and whether another model's weights are the same.

    They are where the fingerprints of their files are, whatever they are called.
    """

    def __init__(self, path: str) -> None:
        """path: of the policy, a folder or Hub id."""
        self.path = base_of(path, "policy")
        self.contents = contents_of_base(self.path)

    def hold(self, path: str, argument: str) -> bool:
        """Whether the model at `path` has the base's weights, under its adapter where it has one."""
        base = base_of(path, argument)
        return base == self.path or (bool(self.contents) and contents_of_base(base) == self.contents)

    def hold_reward_model(self, path: str, argument: str) -> bool:
        """Whether the reward model at `path` is an adapter with a head on the base."""
        adapter = read_adapter(path, argument)
        return self.hold(path, argument) and adapter is not None and not is_reward_model(adapter.base, argument)


class OneBase:
    """The policy's base, and the models that stand on it: those whose folders name the same weights."""

    def __init__(self, policy: PolicyModel, path: str) -> None:
        """policy: with an adapter, not seen by DeepSpeed yet; path: its folder or Hub id."""
        self.base, self.files = bare(policy), BaseFiles(path)
        self.standing: list[str] = ["policy"]
        """The settings whose models stand on it."""
        self.own: list[str] = []
        """Those, with their paths, that have weights of their own."""

    def language(self, path: str, argument: str, lora: Lora | None = None) -> PolicyModel | None:
        """A causal LM on the base, with the adapter of its folder; None where it has other weights.

        lora: its adapter is trained, a new one where the folder holds none.
        """
        if not self._same(path, argument):
            return None
        check_adapter(path, lora, argument)
        model, adapter = bare(self.base), read_adapter(path, argument)
        self._put(model, adapter, lora, argument)
        return model

    def scalar(self, path: str, argument: str, lora: Lora | None = None, *, new: bool = False) -> ScalarModel | None:
        """A reward model on the base, its head beside the adapter of its folder; None where it has other weights.

        new: with a head of zeros, where `path` is a language model's.
        """
        adapter = read_adapter(path, argument)
        if not self._same(path, argument) or (not new and not self.files.hold_reward_model(path, argument)):
            return None
        model = _scalar_on(self.base)
        if model is None:
            return None
        check_adapter(path, lora, argument)
        if adapter and not new:
            check_reward_head(path, argument)
            model.mean, model.std = (float(adapter.record.get(k, v)) for k, v in (("mean", 0.0), ("std", 1.0)))
        self._put(model, adapter, lora, argument)
        return model

    def apart(self, path: str, argument: str) -> None:
        """Notes that a model has weights of its own whatever they are."""
        self.own.append(f"{argument} {path}")

    def said(self) -> str:
        """Which models share the base and which do not, for the log."""
        others = f"; weights of their own: {', '.join(self.own)}" if self.own else ""
        return f"one base: {self.files.path} is held once for {', '.join(dict.fromkeys(self.standing))}{others}"

    def _same(self, path: str, argument: str) -> bool:
        same = self.files.hold(path, argument)
        if not same:
            self.apart(path, argument)
        return same

    def _put(
        self, model: PolicyModel | ScalarModel, adapter: AdapterFolder | None, lora: Lora | None, name: str
    ) -> None:
        if adapter:
            put_back(model, adapter, name)
        elif lora:
            put_on(model, lora, self.files.path, name)
        self.standing.append(name)


def _scalar_on(base: PolicyModel) -> ScalarModel | None:
    """A scalar model with a head of zeros on a language model's backbone; None where its family has another."""
    under, like = backbone(bare(base).inner), next(base.parameters())
    classifier = classifier_over(under, base.inner.config)
    if classifier is None:
        return None
    setattr(classifier, classifier.base_model_prefix, under)
    head = nn.Linear(classifier.score.in_features, 1, bias=False, device=like.device, dtype=like.dtype)
    classifier.score = head
    nn.init.zeros_(head.weight)
    if any(p.is_meta for p in classifier.parameters()):
        return None
    classifier.config.mean, classifier.config.std = 0.0, 1.0
    return ScalarModel(classifier)


def classifier_over(under: nn.Module, config: PretrainedConfig) -> Any:
    """A classifier without storage whose backbone could be `under`; None where its family has another, or no head."""
    config = copy.deepcopy(config)
    config.num_labels = 1
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        classifier: Any = AutoModelForSequenceClassification.from_config(config)
    found = getattr(classifier, classifier.base_model_prefix, None)
    return (
        classifier if type(found) is type(under) and isinstance(getattr(classifier, "score", None), nn.Linear) else None
    )
