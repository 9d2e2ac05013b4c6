"""What an HDF5 file of episodes contains, and how a file of another layout becomes one.

An episode is `images` [steps, height, width, 3] uint8, `actions` [steps, 3] float32 (linear x, linear y in m/s, angular
z in rad/s) and `action_event_types` [steps] strings, at the root of a file or in groups of it, with the attributes
`episode_name`, `num_frames` and `total_duration`. The original gives the scenario in the episode's name
(`episode_20250808_123136_1box_vert_left`) and the instruction by the scenario. Files of this package also have the
attributes `scenario` and `instruction`, and `stamps_s` [steps] float64. Episodes of the simulated world add the
attributes `seed` and `outcome`, and `sight` [steps, numbers]: the auxiliary targets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mobile_vla_inference.episodes.episode import EpisodeError
from mobile_vla_inference.episodes.hdf5.bounded import h5py, member

SUFFIXES = (".h5", ".hdf5")

#: Orders of an image's channels in a file: documented as RGB, but the original's camera published bgr8.
CHANNEL_ORDERS = ("rgb", "bgr")

#: Data sets without which a group is not an episode.
REQUIRED = ("images", "actions")

#: Data set of auxiliary targets.
AUXILIARY_TARGETS = "sight"

#: Values of `action_event_types`.
EVENT_START, EVENT_ACTION, EVENT_STOP = "episode_start", "start_action", "stop_action"

#: How many names of a file with another layout are read, how deep, and how many of them a message lists.
_MAX_NAMES_SEEN, _MAX_NAMES_DEEP, _MAX_NAMES_LISTED = 200, 4, 8


def event_types(commands: np.ndarray) -> list[str]:
    """Return `action_event_types` of commands [steps, 3]: the start, then whether the robot is commanded to move."""
    events = [EVENT_ACTION if command.any() else EVENT_STOP for command in commands]
    if events:
        events[0] = EVENT_START
    return events


def place(path: Path, group: str) -> str:
    """Return a file, and the group in it that is not its root, for messages."""
    return str(path) if group == "/" else f"{path}{group}"


def type_name(data: h5py.Dataset) -> str:
    """Return the name of a data set's type, `text` for strings."""
    return "text" if h5py.check_string_dtype(data.dtype) is not None else str(data.dtype)


def shortened(names: Sequence[str]) -> str:
    """Return the first names as a list, and how many more there are."""
    more = len(names) - _MAX_NAMES_LISTED
    return ", ".join(names[:_MAX_NAMES_LISTED]) + (f" and {more} more" if more > 0 else "")


def layout_error(
    path: Path, where: str, group: h5py.Group | h5py.Dataset | None, missing: Sequence[str]
) -> EpisodeError:
    """Return the error about a group that is not an episode: what it contains, and how to copy that."""
    found = _datasets_below(group, where) if isinstance(group, h5py.Group) else {}
    listed = shortened([f"{name} {type_name(data)} {list(data.shape or ())}" for name, data in found.items()])
    holds = f" (it contains {listed})" if listed else ""
    image_names = [name for name, data in found.items() if len(data.shape or ()) == 4]
    advice = "leave it out, or copy its data to these names"
    if "images" in missing and image_names:
        source = f"{group.name.rstrip('/')}/{image_names[0]}"
        advice = (
            f"copy the images with `h5copy -i {path} -o OUT.h5 -s {source} -d /images`, and write the velocities next "
            "to them as actions"
        )
    lacking = f"the data set{'s' * (len(missing) > 1)} {' and '.join(missing)}"
    return EpisodeError(
        f"{where} lacks {lacking}{holds}, expected an episode: images uint8 [steps, height, width, 3] and actions "
        f"[steps, 3] (m/s, m/s, rad/s); {advice}"
    )


def shape_advice(images: h5py.Dataset, sizes: Sequence[int], numbers: Sequence[int]) -> str:
    """Return how to convert images (of shape `sizes`) and actions (of shape `numbers`) to those of an episode."""
    ways = []
    if len(sizes) == 4 and sizes[3] != 3 and sizes[1] == 3:
        ways.append("transpose the images with numpy.moveaxis(images, 1, -1)")
    elif len(sizes) == 4 and sizes[3] == 4:
        ways.append("leave out the images' fourth channel, images[..., :3]")
    elif (len(sizes) == 4 and sizes[3] == 1) or len(sizes) == 3:
        ways.append("repeat the images' one channel three times")
    if images.dtype != np.uint8 and images.dtype.kind in "iuf":
        ways.append("convert the images to uint8, 0 to 255")
    if len(numbers) == 2 and numbers[1] > 3:
        ways.append(f"keep the 3 of {numbers[1]} columns that are linear x, linear y and angular z")
    elif len(numbers) == 2 and 0 < numbers[1] < 3:
        ways.append("add the columns that are not driven as zeros: linear x, linear y, angular z")
    elif len(numbers) == 1 and sizes and numbers[0] == 3 * sizes[0]:
        ways.append("reshape the actions to [steps, 3]")
    if sizes and numbers and sizes[0] and numbers[0] and sizes[0] != numbers[0] and not ways:
        ways.append("leave out the steps that have only one of the two")
    return ", and ".join(ways) or "record it again"


def _datasets_below(group: h5py.Group, where: str) -> dict[str, h5py.Dataset]:
    """Return the data sets below a group by their paths, as far as they can be read, of a bounded number of names."""
    found: dict[str, h5py.Dataset] = {}
    waiting, seen = [("", group, 0)], 0
    while waiting:
        prefix, each, depth = waiting.pop(0)
        for name in each:
            seen += 1
            if seen > _MAX_NAMES_SEEN:
                return found
            with contextlib.suppress(EpisodeError):
                entry = member(each, name, where)
                if isinstance(entry, h5py.Dataset):
                    found[f"{prefix}{name}"] = entry
                elif isinstance(entry, h5py.Group) and depth < _MAX_NAMES_DEEP:
                    waiting.append((f"{prefix}{name}/", entry, depth + 1))
    return found
