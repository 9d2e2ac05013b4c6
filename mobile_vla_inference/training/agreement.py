"""Settings of a policy that follow from its training episodes: step period, axes, scale. A contradiction is an error.

Nothing is assumed. The settings that a training stores as confirmed come from the recording, from an option, or, where
the recording agrees, from the policy that the training begins with.
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
from mobile_vla_inference.training.dataset import TrainingEpisode, TrainingError

#: Largest share of samples beyond the scale of an axis: they are clipped, and teach another speed than was driven.
MAX_CLIPPED_SHARE = 0.01

#: A recording uses an axis if it is ever faster than this, m/s or rad/s; less comes from a joystick at rest.
_AT_REST = 1e-3
#: Faster values are in another unit (mm/s, degrees/s, pulse widths): m/s, m/s, rad/s.
_PLAUSIBLE = (10.0, 10.0, 20.0)
_SCALE_DIGITS = 2


@dataclass(frozen=True)
class Start:
    """The policy that a training begins with.

    Attributes:
        settings: of the policy.
        learned: whether its weights were trained with these settings; False: they are random.
        name: for messages.
    """

    settings: PolicySettings
    learned: bool
    name: str


@dataclass(frozen=True)
class Options:
    """Options of the command line; None: by the recording.

    Attributes:
        step_period_s: seconds between steps.
        action_scale: m/s or rad/s of one normalised unit, per axis of the policy.
        axes_given: whether the axes were chosen; other axes of the recording are then left out.
        max_clipped: largest share of the samples beyond the scale, per axis.
    """

    step_period_s: float | None = None
    action_scale: tuple[float, ...] | None = None
    axes_given: bool = False
    max_clipped: float = MAX_CLIPPED_SHARE


@dataclass(frozen=True)
class Agreement:
    """The settings that a training gives a policy.

    Attributes:
        settings: with a confirmed step period and scale: they were read or given.
        notes: sentences with their values and sources.
        warnings: sentences about possible mistakes.
    """

    settings: PolicySettings
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()


def agreed_settings(episodes: Sequence[TrainingEpisode], start: Start, options: Options) -> Agreement:
    """Return the settings that training on these episodes gives a policy.

    Raises:
        TrainingError, StepPeriodError: episodes, options and the start contradict each other, or none gives a value.
    """
    period_s, period_sentence = _agreed_period(episodes, start, options)
    commands = np.concatenate([episode.commands for episode in episodes]).astype(np.float64)
    warnings = _check_axes(commands, start.settings.action_axes, options)
    scale, scale_sentences = _agreed_scale(commands, start, options)
    settings = replace(
        start.settings,
        step_period_s=period_s,
        action_scale=scale,
        assumed=tuple(name for name in start.settings.assumed if name not in ("step_period_s", "action_scale")),
    )
    return Agreement(settings, (period_sentence, *scale_sentences), tuple(warnings))


def check_world(start: Start, options: Options) -> Agreement:
    """Return the settings of a training in the simulated world, which is stepped at the policy's own period.

    Raises:
        TrainingError: another period is given, or the policy's axes or scale can't represent the expert's commands.
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
                "start from another policy"
            )
        index = settings.action_axes.index(axis)
        one, zero = settings.action_scale[index], settings.action_offset[index]
        if clipped_shares(np.array([[speed], [-speed]]), [one], [zero]).any() or one == 0.0:
            raise TrainingError(
                f"one normalised unit of {axis} is {one:g} {unit}, but the world's expert drives up to "
                f"{speed:g} {unit}, which would be clipped; give --action-scale with {speed:g} or more for it"
            )
    scales = ", ".join(_with_unit(axis, value) for axis, value in zip(settings.action_axes, settings.action_scale))
    period = f"step period: {settings.step_period_s:g} s, as the world is stepped"
    return Agreement(settings, (period, f"action scale: {scales}"))


# ---- step period -----------------------------------------------------------------------------------------------------


def _agreed_period(episodes: Sequence[TrainingEpisode], start: Start, options: Options) -> tuple[float, str]:
    given_s = options.step_period_s
    untimed = [episode for episode in episodes if episode.period is None and len(episode.frames) > 1]
    # Parts of one recording have the same period: it counts once.
    periods = list({episode.where: episode.period for episode in episodes if episode.period is not None}.values())
    if given_s is None and (untimed or not periods):
        which = untimed[0].where if untimed else episodes[0].where
        more = f" (and {len(untimed) - 1} more)" if len(untimed) > 1 else ""
        raise StepPeriodError(
            f"{which}{more} has neither stamps_s nor total_duration, expected the time between steps, with which "
            "the robot will run the policy; give --step-period-s"
        )
    if not periods:
        period_s, source = given_s, "--step-period-s; the episodes have no times"
    else:
        common = common_period(periods)
        source = _source(common, len(periods))
        if given_s is not None and not common.agrees(given_s):
            raise StepPeriodError(
                f"--step-period-s is {given_s:g}, but {common.where} has {common.period_s:g} s between steps by "
                f"its {common.by}; leave the option out, or {resample_advice(given_s, common.period_s)}"
            )
        period_s = common.period_s if given_s is None else given_s
    learned_s = start.settings.step_period_s if start.learned and _known(start, "step_period_s") else None
    if learned_s is not None and not StepPeriod("", learned_s, 0).agrees(period_s):
        if given_s is None:
            raise StepPeriodError(
                f"{start.name} was trained with {learned_s:g} s per step, but {periods[0].where} has {period_s:g} s; "
                f"{resample_advice(learned_s, period_s)}, or give --step-period-s {period_s:g} to train it for "
                "that period"
            )
        source += f"; {start.name} had {learned_s:g} s"
    elif learned_s is not None and given_s is None:
        period_s = learned_s  # the same value, without the stamps' rounding
    return period_s, f"step period: {period_s:g} s, from {source}"


def _source(common: StepPeriod, episodes: int) -> str:
    source = f"the {common.by} of {episodes} episode{'s' if episodes != 1 else ''}"
    return f"{source}, {common.uneven} of {common.steps} steps uneven" if common.by == "stamps" else source


def _known(start: Start, setting: str) -> bool:
    return setting not in start.settings.assumed


# ---- axes and scale --------------------------------------------------------------------------------------------------


def _check_axes(commands: np.ndarray, axes: Sequence[str], options: Options) -> list[str]:
    """Refuse motion that the policy has no axis for, and values that can't be m/s or rad/s; return the warnings."""
    warnings = []
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
                warnings.append(f"{share:.1%} of the samples move along {axis}, which is left out (--action-axes)")
            continue
        if fastest > most and options.action_scale is None:
            raise TrainingError(
                f"{axis} reaches {fastest:.4g} in the episodes, expected {unit} and at most {most:g}; convert the "
                "units, or give --action-scale if the robot is that fast"
            )
        if fastest <= _AT_REST:
            if options.action_scale is None:
                raise TrainingError(
                    f"{axis} is 0 in all {len(values)} samples, expected a recording that uses it: the policy "
                    "would learn never to use it; record it, or give --action-scale to train without it"
                )
            warnings.append(f"{axis} is 0 in every sample: the policy learns never to use it")
        elif np.ptp(values) <= _AT_REST:
            warnings.append(f"{axis} is {values[0]:.4g} {unit} in every sample: the policy will learn only this value")
        elif axis == "linear.x" and values.max() <= _AT_REST:
            warnings.append(f"{axis} is never positive: the robot only drives backward; check the sign (REP-103)")
        elif axis == "angular.z" and (values.max() <= _AT_REST or values.min() >= -_AT_REST):
            way = "right" if values.max() <= _AT_REST else "left"
            warnings.append(f"{axis} only turns {way} (REP-103: positive is left); check the sign")
    return warnings


def _agreed_scale(commands: np.ndarray, start: Start, options: Options) -> tuple[tuple[float, ...], list[str]]:
    """Return the scale, and sentences about it; raise TrainingError where too many samples are beyond it."""
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
        scale, source = tuple(_rounded_up(value) for value in needed), "the fastest command in the episodes"
    clipped = clipped_shares(driven, scale, offset)
    suggested = ",".join(f"{max(abs(one), _rounded_up(most)):g}" for one, most in zip(scale, needed))
    for axis, one, most, share in zip(axes, scale, needed, clipped):
        if one == 0.0:
            raise TrainingError(
                f"the scale of {axis} is 0 ({source}), expected m/s or rad/s of one normalised unit: the axis "
                f"could not move; give --action-scale, such as {suggested}"
            )
        if share > options.max_clipped:
            raise TrainingError(
                f"{share:.1%} of the samples are beyond one normalised unit of {axis}, "
                f"{_with_unit('', one, axis)} from {source}, and the fastest is {_with_unit('', most, axis)} "
                f"({most / abs(one):.2f} times), expected at most "
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
    """Round up to two digits, except for what float32 itself rounded up."""
    if value <= 0.0:
        return 0.0
    digit = 10.0 ** (math.floor(math.log10(value)) - _SCALE_DIGITS + 1)
    return float(f"{math.ceil(value / digit - 1e-4) * digit:.{_SCALE_DIGITS + 1}g}")
