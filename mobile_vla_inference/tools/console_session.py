"""The state of a console: a policy, its source of images, and the memory of process, machine and GPU.

No prompt and no colours here; tools/console.py reads the commands and prints the answers.
"""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import cv2
import numpy as np
import psutil

from mobile_vla_inference.action import ActionMapping, VelocityCommand
from mobile_vla_inference.errors import FrameError, MobileVlaError
from mobile_vla_inference.frames import list_frames, read_image
from mobile_vla_inference.gpu_memory import gpu_memory_mib
from mobile_vla_inference.sim.camera import WORLD_M, SimulatedCamera
from mobile_vla_inference.sim.robot import Pose
from mobile_vla_inference.units import MIB

if TYPE_CHECKING:
    from mobile_vla_inference.policy.vla_policy import VlaPolicy

_BAG_SUFFIXES = (".mcap", ".db3")
#: Distance that the simulated camera moves along its lane from one image to the next, metres.
_STRIDE_M = 0.1
_LANE_SWING_M = 0.8


class Frames(Protocol):
    """A source of images.

    Attributes:
        title: its name for people.
        count: number of images; None: endless.
    """

    title: str
    count: int | None

    def read(self, index: int) -> tuple[str, np.ndarray]:
        """Return an image's name and pixels, uint8 RGB [height, width, 3]; raise FrameError if there is none."""

    def close(self) -> None:
        """Close what is open."""


class SimulatedFrames:
    """Images of a drawn world on a drive along its lane; the same number gives the same image."""

    def __init__(self) -> None:
        self.title = "the simulated camera"
        self.count = None
        self._camera = SimulatedCamera()

    def read(self, index: int) -> tuple[str, np.ndarray]:
        """Return the image after `index` strides."""
        x_m = index * _STRIDE_M
        turn = math.tau / WORLD_M
        yaw_rad = math.atan(_LANE_SWING_M * turn * math.cos(turn * x_m))
        return f"simulated {index}", self._camera.frame(Pose(x_m, _LANE_SWING_M * math.sin(turn * x_m), yaw_rad))

    def close(self) -> None:
        """Nothing is open."""


class FolderFrames:
    """The images of a folder in the numeric order of their names."""

    def __init__(self, folder: Path) -> None:
        self._paths = list_frames(folder)
        self.title = str(folder)
        self.count = len(self._paths)

    def read(self, index: int) -> tuple[str, np.ndarray]:
        """Read an image file."""
        return self._paths[index].name, read_image(self._paths[index])

    def close(self) -> None:
        """Nothing is open."""


class BagFrames:
    """The images of a bag; for an earlier image, the bag is read again from its beginning."""

    def __init__(self, path: Path) -> None:
        from mobile_vla_inference.bags.reader import BagReader
        from mobile_vla_inference.bags.topics import choose_topics

        self._bag = BagReader(path)
        try:
            self._topic = choose_topics(self._bag, None, None, instruction_wanted=False).image
        except MobileVlaError:
            self._bag.close()
            raise
        self.title = f"{path}, {self._topic.name}"
        self.count = self._topic.count
        self._images = iter(())
        self._next = self.count

    def read(self, index: int) -> tuple[str, np.ndarray]:
        """Read an image message."""
        from mobile_vla_inference.bags.images import CONVERSIONS

        if index < self._next:
            self._images, self._next = self._bag.messages((self._topic.name,)), 0
        for message in self._images:
            self._next += 1
            if self._next > index:
                rgb = CONVERSIONS[self._topic.type_name][1](self._bag.decode(message))
                return f"image {index} of {self.count}", rgb
        raise FrameError(f"{self.title} has no image {index}, expected 0 to {self._next - 1}; choose another number")

    def close(self) -> None:
        """Close the bag."""
        self._bag.close()


class CameraFrames:
    """A camera of this machine; each read takes a new image."""

    def __init__(self, device: int) -> None:
        self.title = f"camera {device}"
        self.count = None
        self._capture = cv2.VideoCapture(device)
        if not self._capture.isOpened():
            self._capture.release()
            raise FrameError(
                f"camera {device} can't be opened, expected one that is connected and not in use; "
                "see /dev/video*, or give --frames a folder or a bag"
            )

    def read(self, index: int) -> tuple[str, np.ndarray]:
        """Take an image; the number is used for its name only."""
        taken, bgr = self._capture.read()
        if not taken:
            raise FrameError(f"{self.title} gives no image, expected one; reconnect it")
        return f"{self.title}, image {index}", cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)

    def close(self) -> None:
        """Release the camera."""
        self._capture.release()


def open_frames(source: str | None) -> Frames:
    """Open a folder of images, a bag or a camera by its number; None: the simulated camera.

    Raises:
        MobileVlaError: there are no images, or they can't be read.
    """
    if source is None:
        return SimulatedFrames()
    path = Path(source).expanduser()
    if source.isascii() and source.isdigit() and not path.exists():
        return CameraFrames(int(source))
    is_bag = path.suffix in _BAG_SUFFIXES or (
        path.is_dir() and any(file.suffix in _BAG_SUFFIXES or file.name == "metadata.yaml" for file in path.iterdir())
    )
    return BagFrames(path) if is_bag else FolderFrames(path)


@dataclass(frozen=True)
class Inference:
    """One step: name of the image, action (normalised), its velocity, and time of the step in seconds."""

    frame: str
    action: tuple[float, ...]
    velocity: VelocityCommand
    step_s: float


@dataclass(frozen=True)
class MemoryFigures:
    """Memory in MiB; the figures of the GPU are None if there is none."""

    process_mib: float
    system_available_mib: float
    system_total_mib: float
    gpu_allocated_mib: float | None = None
    gpu_reserved_mib: float | None = None
    gpu_free_mib: float | None = None
    gpu_total_mib: float | None = None


class ConsoleSession:
    """A policy with a current image.

    Attributes:
        policy: the policy.
        frames: source of the images.
        instruction: what the robot is instructed to do.
        index: number of the current image.
        steps: steps since the LSTM state was reset.
    """

    def __init__(self, policy: VlaPolicy, frames: Frames, instruction: str) -> None:
        """Start at the first image; raise MobileVlaError if it can't be read."""
        self.policy = policy
        self.frames = frames
        self.index = 0
        self.steps = 0
        self.instruction = instruction
        policy.set_instruction(instruction)
        settings = policy.settings
        self._mapping = ActionMapping(settings.action_axes, settings.action_scale, settings.action_offset)
        self._name, self._image = frames.read(0)

    @property
    def frame_name(self) -> str:
        """Name of the current image."""
        return self._name

    @property
    def frame_size_px(self) -> tuple[int, int]:
        """Width and height of the current image."""
        height, width = self._image.shape[:2]
        return width, height

    def set_instruction(self, instruction: str) -> None:
        """Follow an instruction; a different one resets the LSTM state."""
        self.policy.set_instruction(instruction)
        if instruction != self.instruction:
            self.instruction, self.steps = instruction, 0

    def next_frame(self) -> None:
        """Go to the next image; the first one follows the last one."""
        following = self.index + 1
        self.show_frame(following if self.frames.count is None else following % self.frames.count)

    def show_frame(self, index: int) -> None:
        """Go to an image by its number; raise FrameError if there is none."""
        if self.frames.count is not None and not 0 <= index < self.frames.count:
            raise FrameError(f"{self.frames.title} has no image {index}, expected 0 to {self.frames.count - 1}")
        self.index = index  # even if this image can't be read: the next one can be good
        self._name, self._image = self.frames.read(index)

    def show_file(self, path: Path) -> None:
        """Take an image file as the current image; `next_frame` continues with the source."""
        self._image = read_image(path)
        self._name = path.name

    def infer(self) -> Inference:
        """Run one step on the current image; the LSTM state is kept."""
        action = self.policy.step(self._image)
        self.steps += 1
        return Inference(self._name, action.values, self._mapping.velocity(action.values), action.step_s)

    def measure(self, count: int) -> Iterator[float]:
        """Run `count` steps on the current image and yield the seconds of each; the LSTM state is reset around them."""
        self.reset()
        try:
            for _ in range(count):
                yield self.policy.step(self._image).step_s
        finally:
            self.reset()

    def reset(self) -> None:
        """Reset the LSTM state."""
        self.policy.reset()
        self.steps = 0

    def memory(self) -> MemoryFigures:
        """Read the memory of the process, the machine and the GPU."""
        system = psutil.virtual_memory()
        return MemoryFigures(
            psutil.Process().memory_info().rss / MIB, system.available / MIB, system.total / MIB, **_gpu_figures()
        )

    def clear(self) -> tuple[MemoryFigures, MemoryFigures]:
        """Free unused memory; return the figures before and after."""
        before = self.memory()
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        _trim_heap()
        return before, self.memory()


def _gpu_figures() -> dict[str, float]:
    """Return the figures of the GPU by the names in MemoryFigures; empty if there is no GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()  # begins to use the GPU, so the next call reports it
    return {**(gpu_memory_mib() or {}), "gpu_free_mib": free / MIB, "gpu_total_mib": total / MIB}


def _trim_heap() -> None:
    """Have glibc return free pages to the kernel; other C libraries do so by themselves."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
