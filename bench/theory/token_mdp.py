"""Token MDPs small enough to enumerate.

Exact optima, exact policy iteration on token rewards, exact preferences.

    A   actions (the vocabulary)          S   sequences = A^H, in the order of their base-A digits
    H   tokens of every response          tables[h]   [A^h, A]: one row for each prefix of h tokens

One prompt, a fixed horizon, transitions that append the token: the paper's MDP (arXiv 2404.18922, Sec. 3). All fp64.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import rto_kernels
import torch
from torch import Tensor

from rto_fast.algo.credit import CREDIT
from rto_fast.algo.preference import dpo_loss

Tables = list[Tensor]


@dataclass(frozen=True)
class TokenMDP:
    """Sizes, and the walk between tables and sequences."""

    actions: int
    horizon: int

    @property
    def sequences(self) -> Tensor:
        """[S, H] int64: every response."""
        return torch.tensor(list(itertools.product(range(self.actions), repeat=self.horizon)))

    @property
    def cu(self) -> Tensor:
        """[S + 1] boundaries of all responses laid end to end."""
        return torch.arange(self.actions**self.horizon + 1) * self.horizon

    def random_tables(self, seed: int, scale: float = 1.0) -> Tables:
        """Normal numbers of deviation `scale`."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [(self.actions**h, self.actions) for h in range(self.horizon)]
        return [scale * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    def along(self, tables: Tables) -> Tensor:
        """[S, H]: the entry that each response reads at each token."""
        repeats = [self.actions ** (self.horizon - h - 1) for h in range(self.horizon)]
        return torch.stack([t.reshape(-1).repeat_interleave(n) for t, n in zip(tables, repeats, strict=True)], 1)

    def policy(self, logits: Tables) -> Tables:
        """Log-probs of each action after each prefix."""
        return [t.log_softmax(-1) for t in logits]

    def conditionals(self, sequence_logp: Tensor) -> Tables:
        """Tables of the policy whose responses have the log-probs [S] (normalised here)."""
        out, joint = [], sequence_logp.log_softmax(0)
        for h in reversed(range(self.horizon)):
            joint = joint.view(self.actions**h, self.actions)
            out.append(joint.log_softmax(-1))
            joint = joint.logsumexp(-1)
        return out[::-1]


@dataclass(frozen=True)
class Coefficients:
    """Of Eq. 4.7; clip 0 = off."""

    beta1: float
    beta2: float
    beta3: float
    clip: float = 0.0


def optimum(ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    """[S] log of the KL-regularised optimum, pi_ref * exp(reward / beta), of responses' log-probs and rewards [S]."""
    return (ref + reward / beta).log_softmax(0)


def soft_values(mdp: TokenMDP, ref: Tables, reward: Tables, beta: float) -> Tables:
    """V*(s) after 0 .. H tokens, [A^h] each: V(s) = beta * log sum_a pi_ref(a|s) exp((r + V(s')) / beta)."""
    values = [torch.zeros(mdp.actions**mdp.horizon, dtype=torch.float64)]
    for h in reversed(range(mdp.horizon)):
        q = reward[h] + values[0].view(-1, mdp.actions)
        values.insert(0, beta * (ref[h] + q / beta).logsumexp(-1))
    return values


def shaped_reward(mdp: TokenMDP, ref: Tables, reward: Tables, beta: float) -> Tables:
    """r(s, a) + V*(s') - V*(s): what beta * log(pi* / pi_ref) must equal token by token (the paper's Eq. 3.3)."""
    values = soft_values(mdp, ref, reward, beta)
    return [
        reward[h] + values[h + 1].view(-1, mdp.actions) - values[h][:, None] for h in range(mdp.horizon)
    ]  # fmt: skip


def token_rewards(
    mdp: TokenMDP, policy: Tables, ref: Tables, dpo: Tables, score: Tensor, c: Coefficients, credit: str
) -> Tensor:
    """[S, H]: what the trainer pays every token of every response (its own functions), for score [S].

    The last action ends a sentence.
    """
    flat = [mdp.along(t).reshape(-1) for t in (policy, ref, dpo)]
    out = rto_kernels.token_rewards(
        *flat, score, beta1=c.beta1, beta2=c.beta2, beta3=c.beta3, dpo_clip=c.clip, score_clip=0.0, cu_seqlens=mdp.cu,
        backend="torch",
    )  # fmt: skip
    dense = CREDIT[credit](out.dpo_reward, mdp.cu, mdp.sequences.reshape(-1) == mdp.actions - 1)
    return (out.rewards + (dense - out.dpo_reward)).view(-1, mdp.horizon)


def natural_gradient(mdp: TokenMDP, policy: Tables, rewards: Tensor) -> Tables:
    """Natural policy gradient of softmax tables: the advantage of each action after each prefix.

    Means of returns-to-go over all responses, weighted by the policy, with rewards [S, H] taken as constants.
    """
    weight = mdp.along(policy).sum(1).exp()
    to_go = rewards.flip(1).cumsum(1).flip(1)
    out = []
    for h, table in enumerate(policy):
        share = weight.view(-1, mdp.actions ** (mdp.horizon - h - 1))
        q = (share * to_go[:, h].view(share.shape)).sum(1) / share.sum(1)
        q = q.view(table.shape)
        out.append(q - (table.exp() * q).sum(1, keepdim=True))
    return out


def optimise(
    mdp: TokenMDP, ref: Tables, dpo: Tables, score: Tensor, c: Coefficients, credit: str, steps: int = 200
) -> Tables:
    """Policy of RTO (or the variant `credit`) from pi_ref by exact natural policy gradients of size 1 / (2 beta2)."""
    policy = mdp.policy(ref)
    for _ in range(steps):
        rewards = token_rewards(mdp, policy, ref, dpo, score, c, credit)
        move = natural_gradient(mdp, policy, rewards)
        policy = mdp.policy([t + g / (2 * c.beta2) for t, g in zip(policy, move, strict=True)])
    return policy


def sample_preferences(mdp: TokenMDP, ref: Tables, reward: Tables, pairs: int, seed: int) -> Tensor:
    """[S, S] fp64: how often response i (row) was preferred to j, of `pairs` drawn from pi_ref x pi_ref.

    Bradley-Terry on the sums of token rewards. Pairs of equal responses count as drawn and teach nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    weight, total = mdp.along(ref).sum(1).exp(), mdp.along(reward).sum(1)
    first, second = (torch.multinomial(weight, pairs, replacement=True, generator=generator) for _ in range(2))
    wins = torch.rand(pairs, generator=generator, dtype=torch.float64) < torch.sigmoid(total[first] - total[second])
    better, worse = torch.where(wins, first, second), torch.where(wins, second, first)
    counts = torch.zeros(len(weight), len(weight), dtype=torch.float64)
    counts.index_put_((better, worse), torch.ones(pairs, dtype=torch.float64), accumulate=True)
    return counts.fill_diagonal_(0)


def fit_dpo(mdp: TokenMDP, ref: Tables, counts: Tensor, beta: float, iterations: int = 200) -> Tables:
    """The policy that minimises the DPO loss on counted preferences [S, S]; L-BFGS from pi_ref."""
    logits = [t.clone().requires_grad_() for t in ref]
    ref_logp = mdp.along(ref).sum(1)
    better, worse = counts.nonzero(as_tuple=True)
    share = counts[better, worse] / counts.sum()
    solver = torch.optim.LBFGS(
        logits, max_iter=iterations, history_size=30, tolerance_grad=1e-10, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        solver.zero_grad()
        logp = mdp.along(mdp.policy(logits)).sum(1)
        value = (share * dpo_loss(logp[better], logp[worse], ref_logp[better], ref_logp[worse], beta=beta)).sum()
        value.backward()
        return value

    solver.step(loss)
    return mdp.policy([t.detach() for t in logits])


def reward_error(mdp: TokenMDP, ref: Tables, found: Tables, truth: Tables) -> float:
    """Root mean square difference of two token-reward tables, over the tokens that pi_ref visits."""
    visits = mdp.along(ref).sum(1).exp()
    gap = (mdp.along(found) - mdp.along(truth)).square().mean(1)
    return float((visits * gap).sum().sqrt())


# How many questions it takes to find the best response


def tokenwise_queries(best: Sequence[int], actions: int, delay: int) -> int:
    """Queries of a plain search that sees token rewards, until it holds `best`.

    A run of delay + 1 right tokens earns 1 at its last token, nothing else earns anything. The search asks for the
    reward of one token after one prefix at a time (memorising answers), run by run, in lexical order.
    """
    queries = 0
    for start in range(0, len(best), delay + 1):
        run = tuple(best[start : start + delay + 1])
        asked: set[tuple[int, ...]] = set()
        for guess in itertools.product(range(actions), repeat=len(run)):
            asked |= {guess[: i + 1] for i in range(len(run))}
            if guess == run:
                break
        queries += len(asked)
    return queries


def sentencewise_queries(best: Sequence[int], actions: int) -> int:
    """Queries of a search that sees only whether a whole response is the best one, in lexical order."""
    place = 0
    for token in best:
        place = place * actions + token
    return place + 1


def mean_queries(actions: int, horizon: int, delay: int, trials: int, seed: int) -> tuple[float, float]:
    """(token-wise, sentence-wise) mean queries over random best responses."""
    rng = random.Random(seed)
    drawn = [[rng.randrange(actions) for _ in range(horizon)] for _ in range(trials)]
    token = sum(tokenwise_queries(b, actions, delay) for b in drawn) / trials
    return token, sum(sentencewise_queries(b, actions) for b in drawn) / trials


# Stochastic transitions: a policy that looks at the state against a sequence fixed in advance


def best_policy_value(transition: Tensor, reward: Tensor) -> float:
    """Value from state 0 of the best policy that sees each state (the paper's Prop. C.2: autoregressive).

    transition: [H - 1, states, A, states]; reward: [H, states, A].
    """
    value = reward[-1].amax(-1)
    for step in reversed(range(len(transition))):
        value = (reward[step] + transition[step] @ value).amax(-1)
    return float(value[0])


def best_sequence_value(transition: Tensor, reward: Tensor) -> float:
    """Value from state 0 of the best sequence of actions fixed in advance."""
    horizon, states, actions = reward.shape
    best = -float("inf")
    for sequence in itertools.product(range(actions), repeat=horizon):
        at = torch.zeros(states, dtype=torch.float64)
        at[0], value = 1.0, 0.0
        for step, action in enumerate(sequence):
            value += float(at @ reward[step, :, action])
            if step < horizon - 1:
                at = at @ transition[step, :, action]
        best = max(best, value)
    return best
