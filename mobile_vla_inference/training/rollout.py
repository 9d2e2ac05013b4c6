"""Record episodes of the simulated world: the expert or the policy drives, and each step gets the expert's command.

With the policy as the driver this is DAgger (Ross et al., 2011): the policy reaches the states that its own mistakes
lead to, and learns the expert's way out of them. Many worlds are stepped together, so that the network runs on batches.
An episode depends on its scenario, seed and driver only, not on the others of its batch.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobile_vla_inference.action import ActionMapping, VelocityCommand
from mobile_vla_inference.bags.step_period import StepPeriod
from mobile_vla_inference.frames import reduce_frame
from mobile_vla_inference.policy.architecture import HybridModel
from mobile_vla_inference.policy.preprocess import InstructionEncoder
from mobile_vla_inference.policy.storage.checkpoint_files import processor_folders
from mobile_vla_inference.policy.storage.config import HybridConfig
from mobile_vla_inference.policy.storage.settings import PolicySettings
from mobile_vla_inference.sim.auxiliary_targets import auxiliary_targets
from mobile_vla_inference.sim.expert import Expert
from mobile_vla_inference.sim.layout import draw_layout
from mobile_vla_inference.sim.phrases import instruction, with_unknown_word
from mobile_vla_inference.sim.renderer import Renderer
from mobile_vla_inference.sim.scenarios import SCENARIOS
from mobile_vla_inference.sim.world import MAX_ANGULAR_RADPS, MAX_LINEAR_MPS, World
from mobile_vla_inference.training.dataset import TrainingEpisode
from mobile_vla_inference.training.network import SequenceModel

#: Steps that are recorded after the cup is reached, so that a policy learns to stop there.
_PARKING_STEPS = 3
_MAX_EPISODE_S = 19.2  # 64 steps of 0.3 s
_WORLDS_AT_ONCE = 32

# Disturbances while an episode is recorded: at random, another command replaces the driver's for a few steps.
_PUSH_PROBABILITY = 0.08
_PUSH_STEPS = 4
_NOISE_STD = 0.1
#: How often the instruction contains a made-up word.
_UNKNOWN_WORD_PROBABILITY = 0.3


@dataclass(frozen=True)
class Task:
    """One episode to record.

    Attributes:
        scenario: one of SCENARIOS.
        seed: of the world, the instruction and the disturbances.
        expert_steps: how long the expert drives before the policy takes over; None: to the end.
        disturbed: whether commands are changed at random before the base gets them.
    """

    scenario: str
    seed: int
    expert_steps: int | None = None
    disturbed: bool = True


def draw_tasks(count: int, first_seed: int, expert_drives: bool) -> list[Task]:
    """Return tasks over all scenarios; where a policy drives, the expert begins two episodes in five."""
    tasks = []
    for index in range(count):
        seed = first_seed + index
        scenario = SCENARIOS[index % len(SCENARIOS)]
        rng = np.random.default_rng([seed, 3])
        begins = int(rng.integers(1, 20)) if rng.uniform() < 0.4 else 0
        tasks.append(Task(scenario, seed, None if expert_drives else begins))
    return tasks


class Recorder:
    """Record episodes with its own network: one recorder for each process."""

    def __init__(self, config: HybridConfig, settings: PolicySettings, processors: Path) -> None:
        self._settings = settings
        self._side_px = config.image_size
        model = HybridModel(config, settings)
        encoder = InstructionEncoder(processor_folders(processors, config), config, settings)
        self._network = SequenceModel(model, encoder)
        self._mapping = ActionMapping.of(settings)
        self._renderer = Renderer()

    @torch.inference_mode()
    def record(
        self, tasks: Sequence[Task], weights: dict[str, torch.Tensor] | None, memory: bool
    ) -> list[TrainingEpisode]:
        """Run the tasks together; `weights` of the policy that drives, None where the expert drives."""
        if weights is not None:
            self._network.model.load_state_dict(weights)
        period_s = self._settings.step_period_s
        runs = [_Run(task, self._renderer, self._side_px, period_s) for task in tasks]
        texts = self._network.texts([run.instruction for run in runs])
        state = None
        while any(run.is_going for run in runs):
            frames = np.stack([run.see() for run in runs])
            actions = np.zeros((len(runs), len(self._settings.action_axes)))
            if weights is not None:
                features = self._network.features(torch.from_numpy(frames), texts, torch.arange(len(runs)))
                values, state = self._network.act(features.unsqueeze(1), state if memory else None)
                actions = values[:, 0].numpy()
            for run, action in zip(runs, actions):
                run.drive(self._mapping.velocity(action) if weights is not None else None)
        return [run.episode() for run in runs]


class _Run:
    """One world while it is recorded."""

    def __init__(self, task: Task, renderer: Renderer, side_px: int, period_s: float) -> None:
        self._task = task
        self._rng = np.random.default_rng([task.seed, 4])
        layout = draw_layout(task.scenario, task.seed)
        self.instruction = instruction(task.scenario, task.seed)
        if self._rng.uniform() < _UNKNOWN_WORD_PROBABILITY:
            self.instruction = with_unknown_word(self.instruction, self._rng)
        self._world = World(layout, timeout_s=float("inf"))
        self._expert = Expert(self._world)
        self._scene = renderer.scene(layout)
        self._side_px = side_px
        self._period_s = period_s
        self._max_steps = round(_MAX_EPISODE_S / period_s)
        self._frames: list[np.ndarray] = []
        self._labels: list[tuple[float, float, float]] = []
        self._auxiliary_targets: list[np.ndarray] = []
        self._parked = 0
        self._push = VelocityCommand()
        self._push_left = 0
        self.is_going = True

    def see(self) -> np.ndarray:
        """Return the policy's input frame, [side, side, 3]; after the end of the episode, its last frame."""
        if self.is_going:
            self._frames.append(reduce_frame(self._scene.frame(self._world.pose), self._side_px))
        return self._frames[-1]

    def drive(self, policy_command: VelocityCommand | None) -> None:
        """Record the expert's command as the label, and execute the driver's command."""
        if not self.is_going:
            return
        label = self._expert.command()
        self._labels.append(label.values)
        self._auxiliary_targets.append(auxiliary_targets(self._world))
        expert_steps = self._task.expert_steps
        expert_drives = policy_command is None or expert_steps is None or len(self._labels) <= expert_steps
        self._world.command(self._disturbed(label if expert_drives else policy_command, expert_drives))
        self._world.step(self._period_s)
        outcome = self._world.outcome
        self._parked += outcome == "success"
        lost = outcome in ("collision", "wrong side")
        if lost or self._parked > _PARKING_STEPS or len(self._labels) >= self._max_steps:
            self.is_going = False
            self._scene.close()

    def episode(self) -> TrainingEpisode:
        """Return the recorded episode."""
        return TrainingEpisode(
            np.stack(self._frames),
            np.array(self._labels, dtype=np.float32),
            self.instruction,
            self._task.scenario,
            self._task.seed,
            self._world.outcome or "timeout",
            np.stack(self._auxiliary_targets),
            StepPeriod(f"{self._task.scenario} {self._task.seed}", self._period_s, len(self._frames) - 1),
        )

    def _disturbed(self, command: VelocityCommand, pushed: bool) -> VelocityCommand:
        rng = self._rng
        if not self._task.disturbed:
            return command
        if self._push_left == 0 and pushed and not self._parked and rng.uniform() < _PUSH_PROBABILITY:
            self._push_left = int(rng.integers(1, _PUSH_STEPS + 1))
            turn = rng.uniform(-1.0, 1.0) * MAX_ANGULAR_RADPS
            self._push = VelocityCommand(rng.uniform(0.0, 0.8) * MAX_LINEAR_MPS, 0.0, turn)
        if self._push_left:
            self._push_left -= 1
            return self._push
        x, y, z = command.values
        noise = rng.normal(0.0, _NOISE_STD, 2)
        return VelocityCommand(x + noise[0] * MAX_LINEAR_MPS, y, z + noise[1] * MAX_ANGULAR_RADPS)


# ---- several processes -----------------------------------------------------------------------------------------------

_recorder: Recorder | None = None


def _start_worker(config: HybridConfig, settings: PolicySettings, processors: Path) -> None:
    global _recorder
    torch.set_num_threads(1)
    _recorder = Recorder(config, settings, processors)


def _work(job: tuple[Sequence[Task], dict[str, Any] | None, bool]) -> list[TrainingEpisode]:
    tasks, weights, memory = job
    if weights is not None:
        weights = {name: torch.from_numpy(values) for name, values in weights.items()}
    return _recorder.record(tasks, weights, memory)


class RecorderPool:
    """Record in several processes; a context manager."""

    def __init__(self, config: HybridConfig, settings: PolicySettings, processors: Path, workers: int) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("spawn")
        self._pool = context.Pool(workers, _start_worker, (config, settings, processors))

    def __enter__(self) -> RecorderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()
        self._pool.join()

    def start(self, tasks: Sequence[Task], model: HybridModel | None, memory: bool) -> Iterator[list[TrainingEpisode]]:
        """Begin to record, and return at once; the iterator waits for the episodes, in the order of the tasks."""
        weights = None
        if model is not None:
            weights = {name: value.detach().cpu().numpy().copy() for name, value in model.state_dict().items()}
        jobs = [
            (tasks[first : first + _WORLDS_AT_ONCE], weights, memory) for first in range(0, len(tasks), _WORLDS_AT_ONCE)
        ]
        return self._pool.imap(_work, jobs)
