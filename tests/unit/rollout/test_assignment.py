"""Requests dealt out to engines, quotas of whole prompts, and which prompts are kept."""

from __future__ import annotations

import random

import pytest

from rto_fast.contract import Request
from rto_fast.rollout.assignment import Tally, quotas_of, share_out


def requests_of(prompts: int, each: int, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    lens = [rng.randint(1, 40) for _ in range(prompts)]
    return [Request((1,) * lens[p], p, 100 + p, j, 0) for p in range(prompts) for j in range(each)]


@pytest.mark.parametrize("keep", [None, 5, 11])
@pytest.mark.parametrize("engines", [1, 2, 3, 16])
def test_every_request_goes_to_one_engine(engines, keep):
    requests = requests_of(11, 2)
    shares = share_out(requests, 30, engines, keep)
    assert len(shares) == engines
    assert sorted(place for share in shares for place in share.places) == list(range(22))
    for share in shares:
        assert share.places == sorted(share.places)
        assert share.requests == [requests[place] for place in share.places]


def test_without_a_quota_responses_to_a_prompt_may_part():
    """Two engines and one prompt: neither is idle."""
    assert [len(s.places) for s in share_out(requests_of(1, 8), 30, 2)] == [4, 4]


@pytest.mark.parametrize("engines", [1, 2, 3, 16])
def test_quotas_are_of_whole_prompts_and_add_up(engines):
    shares = share_out(requests_of(11, 3), 30, engines, 7)
    assert sum(share.keep for share in shares) == 7
    prompts = [{q.sample_index for q in share.requests} for share in shares]
    assert all(len(share.requests) == 3 * len(own) for share, own in zip(shares, prompts, strict=True))
    assert all(share.keep <= len(own) for share, own in zip(shares, prompts, strict=True))


def test_quotas_are_in_proportion():
    assert quotas_of([6, 3, 3], 8) == [4, 2, 2]
    assert quotas_of([1, 1, 1], 2) == [1, 1, 0]
    assert quotas_of([5, 4], 9) == [5, 4]
    assert quotas_of([0, 3], 1) == [0, 1]


def test_prompts_with_the_shortest_longest_response_are_kept():
    requests = requests_of(4, 2)
    lens = [9, 1, 5, 5, 4, 5, 0, 2]  # the longest: 9, 5, 5, and one that has not ended
    tally = Tally(requests, 2)
    for i in (1, 7, 4, 2, 3):
        assert not tally.enough
        tally.end(requests[i])
    assert not tally.enough
    tally.end(requests[5])
    assert tally.enough
    assert tally.kept(lens) == [2, 3, 4, 5]
    tally.end(requests[0])
    assert tally.kept(lens) == [2, 3, 4, 5]


def test_a_share_knows_the_places_of_what_was_kept():
    requests = requests_of(5, 2)
    for share in share_out(requests, 30, 2, 3):
        own = share.requests[-1].sample_index
        assert share.kept([own, own]) == [i for i, q in enumerate(requests) if q.sample_index == own]


def test_all_is_enough_only_when_all_have_ended():
    requests = requests_of(2, 1)
    tally = Tally(requests, None)
    tally.end(requests[1])
    assert not tally.enough
    tally.end(requests[0])
    assert tally.enough
    assert tally.kept([3, 1]) == [0, 1]
    assert Tally(requests, 0).enough
    assert Tally([], None).enough
