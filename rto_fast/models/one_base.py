"""Models of one run on the same frozen weights, each with its own adapter.

Nothing is switched between forwards, and a gradient of one cannot reach another: they share tensors that are never
trained, and no module.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from rto_fast.config import Lora
from rto_fast.data.adapter_folder import AdapterFolder, base_of, read_adapter
from rto_fast.models.adapters import bare, check_adapter, contents_of_base, put_back, put_on
from rto_fast.models.heads import PolicyModel, ScalarModel, backbone
from rto_fast.models.load import check_reward_head, is_reward_model


class OneBase:
    """The policy's base, and the models that stand on it: those whose folders name the same weights.

    Weights are the same where the fingerprints of their files are, whatever they are called.
    """

    def __init__(self, policy: PolicyModel, path: str) -> None:
        """policy: with an adapter, not seen by DeepSpeed yet; path: its folder or Hub id."""
        self.base, self.path = bare(policy), base_of(path, "policy")
        self.contents = contents_of_base(self.path)
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
        if not self._same(path, argument) or (not new and (adapter is None or is_reward_model(adapter.base, argument))):
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

    def said(self) -> str:
        """Which models share the base and which do not, for the log."""
        others = f"; weights of their own: {', '.join(self.own)}" if self.own else ""
        return f"one base: {self.path} is held once for {', '.join(dict.fromkeys(self.standing))}{others}"

    def _same(self, path: str, argument: str) -> bool:
        base = base_of(path, argument)
        same = base == self.path or (bool(self.contents) and contents_of_base(base) == self.contents)
        if not same:
            self.own.append(f"{argument} {path}")
        return same

    def _put(
        self, model: PolicyModel | ScalarModel, adapter: AdapterFolder | None, lora: Lora | None, name: str
    ) -> None:
        if adapter:
            put_back(model, adapter, name)
        elif lora:
            put_on(model, lora, self.path, name)
        self.standing.append(name)


def _scalar_on(base: PolicyModel) -> ScalarModel | None:
    """A scalar model with a head of zeros on a language model's backbone; None where its family has another."""
    under = backbone(bare(base).inner)
    config = copy.deepcopy(base.inner.config)
    config.num_labels = 1
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        classifier = AutoModelForSequenceClassification.from_config(config)
    name, like = classifier.base_model_prefix, next(base.parameters())
    if type(getattr(classifier, name, None)) is not type(under) or not isinstance(classifier.score, nn.Linear):
        return None
    setattr(classifier, name, under)
    head = nn.Linear(classifier.score.in_features, 1, bias=False, device=like.device, dtype=like.dtype)
    classifier.score = head
    nn.init.zeros_(head.weight)
    if any(p.is_meta for p in classifier.parameters()):
        return None
    classifier.config.mean, classifier.config.std = 0.0, 1.0
    return ScalarModel(classifier)
