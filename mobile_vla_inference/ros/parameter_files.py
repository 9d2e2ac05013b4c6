"""Parameter files: the parameters that a file contains for a node; rcl ignores a file that contains none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mobile_vla_inference.errors import MobileVlaError

_SECTION = "ros__parameters"


def file_parameters(path: str | Path, node: str) -> dict[str, Any]:
    """Return the parameters of a file for a node, by name.

    Args:
        path: the YAML file.
        node: the node's full name, such as `/lab/vla_node`.

    Raises:
        MobileVlaError: the file can't be read, is not a parameter file, or contains nothing for the node.
    """
    sections = list(_sections(path))
    if not sections:
        raise MobileVlaError(
            f"parameter file {path} is empty, expected parameters under {_section_for(node)}; fill it or leave it out"
        )
    own = [parameters for name, parameters in sections if is_for(name, node)]
    if not own:
        found = ", ".join(dict.fromkeys(name or "no node" for name, _ in sections))
        raise MobileVlaError(
            f"parameter file {path} contains nothing for {node}, only for {found}; "
            f"write the parameters under {_section_for(node)}"
        )
    given = {name: value for parameters in own for name, value in _flat(parameters)}
    if not given:
        raise MobileVlaError(
            f"parameter file {path} contains no parameter of {node}, expected NAME: VALUE under {_SECTION}; "
            "write one or leave the file out"
        )
    return given


def expand_home(path: str) -> str:
    """Return a path with the home folder in place of a leading `~`, which a shell does not expand after `:=`."""
    return str(Path(path).expanduser()) if path == "~" or path.startswith("~/") else path


def is_for(section: str, node: str) -> bool:
    """Whether a name in a file or before a parameter, such as `/**/vla_node`, matches a node's full name."""
    # The rule of rclpy and rclcpp: `/*` matches one part of a name, `/**` any number.
    return re.fullmatch(f"/{section.lstrip('/')}".replace("/*", r"(/\w+)"), node) is not None


def _section_for(node: str) -> str:
    return f"/**/{node.rpartition('/')[2]}: {_SECTION}:"


def _sections(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Read a file and return its sections: the node's name (`/lab/vla_node`) and the parameters of each."""
    try:
        documents = list(yaml.safe_load_all(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise MobileVlaError(f"parameter file {path} does not exist, expected a YAML file; correct the path") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise MobileVlaError(
            f"parameter file {path} can't be read ({reason}), expected a YAML file; correct the path or the file"
        ) from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise MobileVlaError(f"parameter file {path} is not YAML ({reason}); correct it") from error
    for document in documents:
        if document is not None:
            yield from _sections_below(path, "", document)


def _sections_below(path: str | Path, above: str, content: Any) -> Iterator[tuple[str, dict]]:
    if not isinstance(content, dict):
        where = f"{content!r} under {above}" if above else repr(content)
        raise MobileVlaError(
            f"parameter file {path} contains {where}, expected NODE: {_SECTION}: NAME: VALUE; correct it"
        )
    for name, below in content.items():
        if name == _SECTION:
            if below is not None and not isinstance(below, dict):
                raise MobileVlaError(
                    f"parameter file {path} contains {below!r} under {above}: {_SECTION}, expected NAME: VALUE; "
                    "correct it"
                )
            yield above, below or {}
        else:
            yield from _sections_below(path, f"{above}/{str(name).strip('/')}", below)


def _flat(parameters: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Return parameters with nested names joined by dots."""
    for name, value in parameters.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
