"""Transitions: what the node does in its lifecycle: load the policy, allow motion, stop, end the policy."""

from __future__ import annotations

from mobile_vla_inference.control.exit_request import ExitRequest
from mobile_vla_inference.control.gate import ADVICE, Reason
from mobile_vla_inference.control.worker_events import WorkerState
from mobile_vla_inference.control.worker_options import WorkerOptions
from mobile_vla_inference.ros.live_parameters import LiveParameters
from mobile_vla_inference.ros.motion import MotionControl
from mobile_vla_inference.ros.node_log import NodeLog
from mobile_vla_inference.ros.parameter_declarations import ParameterError
from mobile_vla_inference.ros.parameters import NodeParameters
from mobile_vla_inference.ros.policy_link import PolicyLink


class Transitions:
    """Load and end the policy, allow and forbid motion. `configure` blocks while the worker loads."""

    def __init__(
        self,
        parameters: LiveParameters[NodeParameters],
        motion: MotionControl,
        policy: PolicyLink,
        exit_request: ExitRequest,
        log: NodeLog,
        worker_module: str,
    ) -> None:
        self._parameters = parameters
        self._motion = motion
        self._policy = policy
        self._exit_request = exit_request
        self._log = log
        self._worker_module = worker_module

    def configure(self) -> bool:
        """Load and warm up the policy in the worker process; return whether it is ready, else log why not."""
        if not self._parameters.values.checkpoint:
            self._log.say("error", "parameter checkpoint is empty, expected a file or folder; set checkpoint:=PATH")
            return False
        with self._motion.gate() as gate:
            gate.worker_changed = False
        worker = self._policy.load(self._worker_options())
        if worker.state is not WorkerState.READY:
            return self._fail_configure(worker.last_error or "the worker was stopped")
        facts = worker.facts
        try:
            self._motion.use_policy(facts)
        except ParameterError as error:
            return self._fail_configure(str(error))
        with self._motion.gate() as gate:
            gate.settings_confirmed = not facts.assumed_settings
            gate.worker_ready = worker.state is WorkerState.READY  # it may have died meanwhile
        for warning in filter(None, (*facts.warnings, facts.engine_fallback)):
            self._log.say("warning", warning)
        self._log.say(
            "info",
            f"policy ready: {facts.variant}, {facts.parameters:,} parameters, {facts.dtype} on {facts.device}",
        )
        return True

    def _worker_options(self) -> WorkerOptions:
        parameters = self._parameters.values
        return WorkerOptions(
            policy={
                "path": parameters.checkpoint,
                "processors": parameters.processors or None,
                "device": parameters.device,
                "dtype": parameters.dtype,
                "engine": parameters.engine,
                "force": parameters.force_load,
            },
            load_timeout_s=parameters.load_timeout_s,
            step_timeout_s=parameters.step_timeout_s,
            state_gap_s=parameters.state_gap_s,
            max_restarts=parameters.max_restarts,
            module=self._worker_module,
        )

    def _fail_configure(self, sentence: str) -> bool:
        self._log.say("error", f"configure failed: {sentence}")
        self.release()
        return False

    def activate(self) -> bool:
        """Allow motion; return False, and log why, while a setting is only assumed or the node exits."""
        assumed = self._policy.facts.assumed_settings
        if assumed:
            self._log.say(
                "error",
                f"activation refused: settings {', '.join(assumed)} are assumed, expected confirmed ones; "
                f"{ADVICE[Reason.SETTINGS_ASSUMED]}",
            )
            return False
        if self._exit_request.is_set():
            self._log.say("error", "activation refused: the node is exiting, expected one that runs; start it again")
            return False
        with self._motion.gate() as gate:
            gate.forget_action()
            gate.active = True
        self._policy.allow_steps(True)
        return True

    def stop(self) -> None:
        """Publish standstill, then forbid motion and steps."""
        self._motion.stop()
        self._policy.allow_steps(False)

    def release(self) -> None:
        """End the worker process; safe to call more than once."""
        self._motion.forget_policy()
        self._policy.release()

    def close(self) -> None:
        """Stop the robot, then end the worker process; safe to call more than once."""
        self.stop()
        self.release()
