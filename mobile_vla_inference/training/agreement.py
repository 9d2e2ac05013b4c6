"""What the episodes say about a policy's settings, and what contradicts it: step period, axes, scale.

Nothing here is assumed in silence. The settings that a training stores as confirmed come from the recording, from an
option, or from the policy that it begins with where the recording agrees; anything else is an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mobile_vla_inference.action import AXES, AXIS_UNITS, clipped_shares
from mobile_vla_inference.bags.step_period import StepPeriod, StepPeriodError, common_period, resample_advice
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.sim.world import MAX_ANGULAR_RADPS, MAX_LINEAR_MPS
from mobile_vla_inference.training.dataset import Lesson, TrainingError

#: More samples than this share beyond the scale of an axis are an error: clipped, they would teach another speed.
MAX_CLIPPED_SHARE = 0.01

#: A recording moves along an axis where it is ever faster than this, m/s or rad/s: less is a stick at rest.
_AT_REST = 1e-3
#: Faster than this is no robot, but another unit (mm/s, degrees/s, pulse widths): m/s, m/s, rad/s.
_PLAUSIBLE = (10.0, 10.0, 20.0)
_SCALE_DIGITS = 2


@dataclass(frozen=True)
class Start:
    """What a training begins with.

    Attributes:
        settings: of the policy.
        learned: whether its weights have learned by these settings, or are random.
        name: for messages.
    """

    settings: PolicySettings
    learned: bool
    name: str


@dataclass(frozen=True)
class Options:
    """What the person says; None: as the recording says.

    Attributes:
        step_period_s: seconds from step to step.
        action_scale: m/s or rad/s of one unit, per axis of the policy.
        axes_given: whether the axes were chosen, so that the recording's others are left out.
        max_clipped: share of the samples that may be beyond the scale, per axis.
    """

    step_period_s: float | None = None
    action_scale: tuple[float, ...] | None = None
    axes_given: bool = False
    max_clipped: float = MAX_CLIPPED_SHARE


@dataclass(frozen=True)
class Agreement:
    """What a training gives a policy.

    Attributes:
        settings: step period and scale count as confirmed: they were read or given.
        told: sentences that tell what they are and where they are from.
        warnings: sentences that tell what is odd.
    """

    settings: PolicySettings
    told: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def agreed_settings(lessons: Sequence[Lesson], start: Start, options: Options) -> Agreement:
    """Return the settings that training on these episodes gives a policy.

    Raises:
        TrainingError, StepPeriodError: episodes, options and the start contradict each other, or nothing tells.
    """
    period_s, told_period = _agreed_period(lessons, start, options)
    commands = np.concatenate([lesson.commands for lesson in lessons]).astype(np.float64)
    warnings = _check_axes(commands, start.settings.action_axes, options)
    scale, told_scale = _agreed_scale(commands, start, options)
    settings = replace(
        start.settings,
        step_period_s=period_s,
        action_scale=scale,
        assumed=tuple(name for name in start.settings.assumed if name not in ("step_period_s", "action_scale")),
    )
    return Agreement(settings, (told_period, *told_scale), tuple(warnings))


def check_world(start: Start, options: Options) -> Agreement:
    """Return the settings of a training in the simulated world, which is stepped at the policy's own period.

    Raises:
        TrainingError: another period is given, or the policy can't say what the expert does.
    """
    settings = start.settings
    if options.step_period_s is not None and options.step_period_s != settings.step_period_s:
        raise TrainingError(
            f"--step-period-s is {options.step_period_s:g}, but the simulated world is stepped at the policy's own "
            f"{settings.step_period_s:g} s; leave it out"
        )
    if options.action_scale is not None:
        settings = replace(settings, action_scale=options.action_scale)
    for axis, speed in (("linear.x", MAX_LINEAR_MPS), ("angular.z", MAX_ANGULAR_RADPS)):
        unit = AXIS_UNITS[AXES.index(axis)]
        if axis not in settings.action_axes:
            raise TrainingError(
                f"{start.name} drives {', '.join(settings.action_axes)}, but the world's expert moves along {axis}; "
                "begin with another policy"
            )
        index = settings.action_axes.index(axis)
        one, zero = settings.action_scale[index], settings.action_offset[index]
        if clipped_shares(np.array([[speed], [-speed]]), [one], [zero]).any() or one == 0.0:
            raise TrainingError(
                f"one unit of {axis} is {one:g} {unit}, but the world's expert drives up to {speed:g} {unit}, which "
                f"would be clipped; give --action-scale with {speed:g} or more for it"
            )
    scales = ", ".join(_with_unit(axis, value) for axis, value in zip(settings.action_axes, settings.action_scale))
    period = f"step period: {settings.step_period_s:g} s, as the world is stepped"
    return Agreement(settings, (period, f"action scale: {scales}"))


# ---- step period -----------------------------------------------------------------------------------------------------


def _agreed_period(lessons: Sequence[Lesson], start: Start, options: Options) -> tuple[float, str]:
    given_s = options.step_period_s
    silent = [lesson for lesson in lessons if lesson.period is None and len(lesson.frames) > 1]
    # Parts of one recording tell the same time: it counts once.
    told = list({lesson.where: lesson.period for lesson in lessons if lesson.period is not None}.values())
    if given_s is None and (silent or not told):
        which = silent[0].where if silent else lessons[0].where
        more = f" (and {len(silent) - 1} more)" if len(silent) > 1 else ""
        raise StepPeriodError(
            f"{which}{more} tells neither stamps_s nor total_duration, expected the time from step to step, by which "
            "the robot will run the policy; give --step-period-s"
        )
    if not told:
        period_s, source = given_s, "--step-period-s; the episodes tell no time"
    else:
        common = common_period(told)
        source = _source(common, len(told))
        if given_s is not None and not common.agrees(given_s):
            raise StepPeriodError(
                f"--step-period-s is {given_s:g}, but {common.where} has {common.period_s:g} s from step to step by "
                f"its {common.by}; leave the option out, or {resample_advice(given_s, common.period_s)}"
            )
        period_s = common.period_s if given_s is None else given_s
    learned_s = start.settings.step_period_s if start.learned and _known(start, "step_period_s") else None
    if learned_s is not None and not StepPeriod("", learned_s, 0).agrees(period_s):
        if given_s is None:
            raise StepPeriodError(
                f"{start.name} has learned at {learned_s:g} s a step, but {told[0].where} has {period_s:g} s; "
                f"{resample_advice(learned_s, period_s)}, or give --step-period-s {period_s:g} to train it to that"
            )
        source += f"; {start.name} had {learned_s:g} s"
    elif learned_s is not None and given_s is None:
        period_s = learned_s  # the same, without the rounding of the stamps
    return period_s, f"step period: {period_s:g} s, by {source}"


def _source(common: StepPeriod, episodes: int) -> str:
    told = f"the {common.by} of {episodes} episode{'s' if episodes != 1 else ''}"
    return f"{told}, {common.uneven} of {common.steps} steps uneven" if common.by == "stamps" else told


def _known(start: Start, setting: str) -> bool:
    return setting not in start.settings.assumed


# ---- axes and scale --------------------------------------------------------------------------------------------------


def _check_axes(commands: np.ndarray, axes: Sequence[str], options: Options) -> list[str]:
    """Refuse what the policy's axes can't say and what can't be m/s or rad/s; return what is odd."""
    notes = []
    for axis, unit, values, most in zip(AXES, AXIS_UNITS, commands.T, _PLAUSIBLE):
        fastest = float(np.abs(values).max())
        share = float((np.abs(values) > _AT_REST).mean())
        if axis not in axes:
            if fastest > _AT_REST and not options.axes_given:
                raise TrainingError(
                    f"{share:.1%} of the samples move along {axis} (up to {fastest:.3g} {unit}), but the policy drives "
                    f"{', '.join(axes)} only; give --action-axes with {axis} to learn it, or --action-axes "
                    f"{','.join(axes)} to leave it out"
                )
            if fastest > _AT_REST:
                notes.append(f"{share:.1%} of the samples move along {axis}, which is left out (--action-axes)")
            continue
        if fastest > most and options.action_scale is None:
            raise TrainingError(
                f"{axis} reaches {fastest:.4g} in the episodes, expected {unit} and at most {most:g}; convert the "
                "units, or give --action-scale if that is its speed"
            )
        if fastest <= _AT_REST:
            if options.action_scale is None:
                raise TrainingError(
                    f"{axis} is 0 in all {len(values)} samples, expected a recording that uses it: the policy would "
                    "learn never to; record it, or give --action-scale to train on it all the same"
                )
            notes.append(f"{axis} is 0 in every sample: the policy learns never to use it")
        elif np.ptp(values) <= _AT_REST:
            notes.append(f"{axis} is {values[0]:.4g} {unit} in every sample: the policy learns nothing else")
        elif axis == "linear.x" and values.max() <= _AT_REST:
            notes.append(f"{axis} is never positive: the robot only drives backward; check the sign (REP-103)")
        elif axis == "angular.z" and (values.max() <= _AT_REST or values.min() >= -_AT_REST):
            way = "right" if values.max() <= _AT_REST else "left"
            notes.append(f"{axis} only ever turns {way} (REP-103: positive is left); check the sign")
    return notes


def _agreed_scale(commands: np.ndarray, start: Start, options: Options) -> tuple[tuple[float, ...], list[str]]:
    """Return the scale and a sentence for each axis; raise TrainingError where too much of the recording is beyond."""
    settings = start.settings
    axes = settings.action_axes
    driven = commands[:, [AXES.index(axis) for axis in axes]]
    offset = np.asarray(settings.action_offset)
    needed = np.abs(driven - offset).max(axis=0)
    if options.action_scale is not None:
        scale, source = options.action_scale, "--action-scale"
    elif start.learned:
        scale, source = settings.action_scale, start.name
    else:
        scale, source = tuple(_rounded_up(value) for value in needed), "the fastest of the episodes"
    clipped = clipped_shares(driven, scale, offset)
    suggested = ",".join(f"{max(abs(one), _rounded_up(most)):g}" for one, most in zip(scale, needed))
    for axis, one, most, share in zip(axes, scale, needed, clipped):
        if one == 0.0:
            raise TrainingError(
                f"the scale of {axis} is 0 ({source}), expected m/s or rad/s of one unit: nothing could be said by it; "
                f"give --action-scale, such as {suggested}"
            )
        if share > options.max_clipped:
            raise TrainingError(
                f"{share:.1%} of the samples are beyond one unit of {axis}, {_with_unit('', one, axis)} by {source}, "
                f"and the fastest is {_with_unit('', most, axis)} ({most / abs(one):.2f} times), expected at most "
                f"{options.max_clipped:.1%}; give --action-scale {suggested} to train in those units, or --max-clipped "
                f"{math.ceil(share * 1000) / 1000:g} to clip them"
            )
    lines = [f"action scale: {', '.join(_with_unit(axis, one) for axis, one in zip(axes, scale))}, by {source}"]
    if start.learned and tuple(scale) != settings.action_scale:
        before = ", ".join(_with_unit(axis, one) for axis, one in zip(axes, settings.action_scale))
        lines[0] += f"; {start.name} had {before}"
    lines += [
        f"  {axis}: {values.min():.4g} to {values.max():.4g} in the episodes, {share:.1%} of {len(values)} samples "
        "clipped"
        for axis, values, share in zip(axes, driven.T, clipped)
    ]
    return tuple(float(one) for one in scale), lines


def _with_unit(name: str, value: float, axis: str = "") -> str:
    unit = AXIS_UNITS[AXES.index(axis or name)]
    return f"{name} {value:.4g} {unit}".strip()


def _rounded_up(value: float) -> float:
    """Return a value of two digits that is not smaller, but for the rounding of float32."""
    if value <= 0.0:
        return 0.0
    digit = 10.0 ** (math.floor(math.log10(value)) - _SCALE_DIGITS + 1)
    return float(f"{math.ceil(value / digit - 1e-4) * digit:.{_SCALE_DIGITS + 1}g}")
