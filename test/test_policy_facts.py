"""PolicyFacts: what crosses the process boundary comes back equal, and what is not a description is refused."""

from __future__ import annotations

import json

import pytest
from made_up_facts import FACTS, made_up_facts

from mobile_vla_inference.action import ActionMapping
from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.policy_facts import PolicyFacts


def test_json_keeps_every_fact():
    assert PolicyFacts.from_json(json.loads(json.dumps(FACTS.to_json()))) == FACTS


def test_what_is_missing_is_named():
    content = FACTS.to_json()
    del content["image_size"], content["settings"]
    with pytest.raises(MobileVlaError, match="lacks image_size, settings, expected checkpoint,"):
        PolicyFacts.from_json(content)


def test_what_is_unknown_is_named():
    with pytest.raises(MobileVlaError, match="contains the unknown colour, expected checkpoint,"):
        PolicyFacts.from_json({**FACTS.to_json(), "colour": "red"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"action_scale": (-1.0, 1.0)}, "action_scale is [-1.0, 1.0], expected [1.0, 1.0]"),
        ({"checkpoint_id": "another"}, "checkpoint_id is 'another', expected 'scripted'"),
        ({"settings": {"a": 1}}, "settings is {'a': 1}, expected {}"),
        ({"engine": "graph", "device": "cuda", "warnings": ("slow",)}, ""),  # the same policy, run in another way
    ],
)
def test_another_policy_is_told_from_the_same_one(change, sentence):
    assert FACTS.difference(made_up_facts(**change)) == sentence


def test_the_action_mapping_is_the_policys_own():
    facts = made_up_facts(action_scale=(2.0, 0.5), action_offset=(0.1, 0.0))
    assert facts.action_mapping == ActionMapping(("linear.x", "angular.z"), (2.0, 0.5), (0.1, 0.0))
