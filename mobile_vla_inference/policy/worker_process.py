"""The worker process: loads the policy and answers the node's PolicyWorker, one message at a time.

Started as `python -m mobile_vla_inference.policy.worker_process SOCKET_FD MEMORY_FD PARENT_PID`; the protocol is
in control/worker_session.py. If memory runs out, the kernel kills this process first, not the node. It ends with the
node.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mobile_vla_inference.errors import MobileVlaError
from mobile_vla_inference.gpu_memory import gpu_memory_mib
from mobile_vla_inference.policy_facts import MAX_MESSAGE_BYTES
from mobile_vla_inference.process_lifetime import kill_on_parent_exit

if TYPE_CHECKING:
    from mobile_vla_inference.policy.vla_policy import VlaPolicy

#: Above the node's 0: if memory runs out, the kernel kills the worker, and the node stops the robot.
_OOM_SCORE_ADJ = "800"
#: Longest error that is sent to the node, in characters; a library can put a whole file into one.
_MAX_SENTENCE = 4000
_NO_GPU_MEMORY = {"gpu_allocated_mib": 0.0, "gpu_reserved_mib": 0.0}


class PolicyServer:
    """Answer the messages of one PolicyWorker until it closes the socket."""

    def __init__(self, connection: socket.socket, memory_fd: int, load: Callable[..., Any]) -> None:
        self._connection = connection
        self._load = load
        self._memory_fd = memory_fd
        self._shared: mmap.mmap | None = None
        self._policy: VlaPolicy | None = None

    def serve(self) -> int:
        """Run until the node closes the connection (exit status 0) or the policy fails (1)."""
        while True:
            data = self._connection.recv(MAX_MESSAGE_BYTES)
            if not data:
                return 0
            message = json.loads(data)
            try:
                getattr(self, f"on_{message.pop('op')}")(**message)
            except MobileVlaError as error:
                self._fail(str(error), final=self._policy is None)
                return 1
            except Exception as error:  # the process boundary: the node must receive every error
                traceback.print_exc()
                sentence = (
                    f"worker failed with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                )
                self._fail(sentence, final=False)
                return 1

    def on_load(self, policy: dict[str, Any]) -> None:
        """Load and warm up the policy with the keyword arguments of VlaPolicy.load."""
        self._report("starting the policy's libraries")
        loaded = self._load(Path(policy.pop("path")), progress=self._report, **policy)
        self._report("warming up")
        loaded.warm_up()
        self._send({"op": "ready", "info": loaded.describe().to_json(), "memory": gpu_memory_mib() or _NO_GPU_MEMORY})
        self._policy = loaded

    def on_context(self, generation: int, instruction: str) -> None:
        """Reset the hidden state and put an instruction in force; an empty one means none."""
        error = ""
        try:
            self._policy.set_instruction(instruction)
        except MobileVlaError as refused:
            error = str(refused)
        self._policy.reset()
        self._send({"op": "context", "generation": generation, "error": error})

    def on_step(self, generation: int) -> None:
        """Step on the frame in shared memory."""
        size_px = self._policy.config.image_size
        if self._shared is None:
            self._shared = mmap.mmap(self._memory_fd, size_px * size_px * 3, prot=mmap.PROT_READ)
        frame = np.frombuffer(self._shared, dtype=np.uint8).reshape(size_px, size_px, 3)
        try:
            action = self._policy.step(frame)
        except MobileVlaError as error:
            self._policy.reset()  # the hidden state is not trusted any more
            self._send({"op": "step_failed", "generation": generation, "message": str(error)})
            return
        self._send(
            {
                "op": "result",
                "generation": generation,
                "values": list(action.values),
                "step_s": action.step_s,
                "memory": gpu_memory_mib() or _NO_GPU_MEMORY,
            }
        )

    def _fail(self, sentence: str, final: bool) -> None:
        self._send({"op": "failed", "message": sentence[:_MAX_SENTENCE], "final": final})

    def _report(self, text: str) -> None:
        self._send({"op": "progress", "text": text})

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            raise MobileVlaError(
                f"the policy's message ({message['op']}) has {len(data)} bytes, expected at most "
                f"{MAX_MESSAGE_BYTES}; shorten its settings"
            )
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the node has exited: `serve` ends next
            self._connection.send(data)


def _tie_to_parent(parent_pid: int) -> None:
    """End with the node, whatever ends it, and ignore Ctrl-C, which the node handles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not kill_on_parent_exit(parent_pid):
        raise SystemExit(0)
    with contextlib.suppress(OSError):  # a container can forbid it; then the kernel chooses the process
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE_ADJ)


def _load_policy(path: Path, **options: Any) -> VlaPolicy:
    from mobile_vla_inference.policy.vla_policy import VlaPolicy  # torch takes seconds: imported after the first report

    return VlaPolicy.load(path, **options)


def main(load: Callable[..., Any] = _load_policy) -> int:
    """Serve on the descriptors that the command line names; `load(path, progress=..., **options)` makes the policy."""
    socket_fd, memory_fd, parent_pid = (int(argument) for argument in sys.argv[1:4])
    _tie_to_parent(parent_pid)
    with socket.socket(fileno=socket_fd) as connection:
        return PolicyServer(connection, memory_fd, load).serve()


if __name__ == "__main__":
    raise SystemExit(main())
