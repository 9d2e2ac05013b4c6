"""A policy on recorded episodes: its predictions, and the notes that a reader of the figures needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mobile_vla_inference.action import AXES, clipped_shares
from mobile_vla_inference.bags.step_period import resample_advice
from mobile_vla_inference.episodes.figures import Prediction

if TYPE_CHECKING:
    from mobile_vla_inference.episodes.episode import Episode
    from mobile_vla_inference.policy.vla_policy import VlaPolicy
    from mobile_vla_inference.policy_facts import PolicyFacts

#: A value this near to a pressed key's, as a share, was driven by a key.
_KEY_TOLERANCE = 0.2
#: A recording was driven by keys if at least this share of its values was.
_KEY_SHARE = 0.5


def predict(
    policy: VlaPolicy, episodes: Sequence[Episode], progress: Callable[[int], object] | None = None
) -> list[Prediction]:
    """Run a policy on episodes; the LSTM state is reset at the start of each.

    Args:
        policy: a loaded one.
        episodes: each with an instruction.
        progress: called with the number of new steps.
    """
    settings = policy.settings
    columns = [AXES.index(axis) for axis in settings.action_axes]
    scale, offset = np.array(settings.action_scale), np.array(settings.action_offset)
    predictions = []
    for episode in episodes:
        policy.set_instruction(episode.instruction)
        policy.reset()
        actions = []
        for frame in episode.frames():
            actions.append(policy.step(frame).values)
            if progress is not None:
                progress(1)
        predictions.append(
            Prediction(episode.scenario, np.array(actions) * scale + offset, episode.commands[:, columns])
        )
    return predictions


def evaluation_notes(policy: PolicyFacts, episodes: Sequence[Episode], key_speed: float) -> list[str]:
    """Return what makes the figures of an evaluation doubtful, a sentence each.

    Args:
        policy: the facts of the policy.
        episodes: what it was run on.
        key_speed: speed of a pressed key, m/s and rad/s.
    """
    notes = list(policy.warnings)
    if policy.assumed_settings:
        notes.append(
            f"settings {', '.join(policy.assumed_settings)} are assumed: if one is wrong, so are the figures; see "
            "--calibrate"
        )
    for column, axis in enumerate(AXES):
        moving = sum(int(np.count_nonzero(each.commands[:, column])) for each in episodes)
        if moving and axis not in policy.action_axes:
            notes.append(
                f"{moving} recorded steps move along {axis}, which the policy does not drive (action_axes): they are "
                "not compared"
            )
    axes = policy.action_axes
    driven = np.concatenate([each.commands for each in episodes])[:, [AXES.index(axis) for axis in axes]]
    shares = clipped_shares(driven, policy.action_scale, policy.action_offset)
    notes += [
        f"{share:.1%} of the recorded {axis} is beyond the {scale:g} of action_scale: clipped in normalised units"
        for axis, scale, share in zip(axes, policy.action_scale, shares)
        if share > 0.0
    ]
    return [*notes, *_period_notes(policy.step_period_s, episodes), *_key_notes(driven, key_speed)]


def _period_notes(period_s: float, episodes: Sequence[Episode]) -> list[str]:
    """Return a note if the time between the episodes' steps is not the policy's step period."""
    notes = []
    known = [period for each in episodes if (period := each.period()) is not None]
    other = [each for each in known if not each.agrees(period_s)]
    if other:
        notes.append(
            f"{len(other)} of {len(episodes)} episodes have another step period ({other[0].where}: "
            f"{other[0].period_s:g} s) than the policy, {period_s:g} s: its LSTM runs at another rate than in "
            f"training; {resample_advice(period_s, other[0].period_s)}"
        )
    if len(known) < len(episodes):
        notes.append(
            f"{len(episodes) - len(known)} of {len(episodes)} episodes contain neither stamps_s nor total_duration: "
            f"it is unknown whether their steps are the policy's {period_s:g} s apart"
        )
    return notes


def _key_notes(driven: np.ndarray, key_speed: float) -> list[str]:
    """Return a note if the recording was not driven by keys of this speed, from which the directions are computed."""
    moving = np.abs(driven[driven != 0.0])
    share = float((np.abs(moving / key_speed - 1.0) < _KEY_TOLERANCE).mean()) if moving.size else 1.0
    if share >= _KEY_SHARE:
        return []
    return [
        f"{share:.0%} of the recorded values that are not 0 are near the speed of a pressed key, {key_speed:g} "
        "m/s or rad/s: the figures by direction mean little; give --key-speed"
    ]
