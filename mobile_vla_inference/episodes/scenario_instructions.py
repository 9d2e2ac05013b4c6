"""The scenarios of the original data and their instructions: the original gives a scenario by the episode's name."""

from __future__ import annotations

from pathlib import Path

from mobile_vla_inference.episodes.episode import EpisodeError
from mobile_vla_inference.instructions import check_instruction
from mobile_vla_inference.outside_files import read_json

#: What the robot was instructed to do in each scenario of the original data.
SCENARIO_INSTRUCTIONS = {
    "1box_vert_left": "박스를 왼쪽으로 돌아서 컵까지 가세요",
    "1box_vert_right": "박스를 오른쪽으로 돌아서 컵까지 가세요",
    "1box_hori_left": "박스를 왼쪽으로 피해서 컵까지 가세요",
    "1box_hori_right": "박스를 오른쪽으로 피해서 컵까지 가세요",
    "2box_vert_left": "두 박스 사이 왼쪽 경로로 컵까지 가세요",
    "2box_vert_right": "두 박스 사이 오른쪽 경로로 컵까지 가세요",
    "2box_hori_left": "두 박스를 왼쪽으로 우회해서 컵까지 가세요",
    "2box_hori_right": "두 박스를 오른쪽으로 우회해서 컵까지 가세요",
}

NO_SCENARIO = "no scenario"

#: Largest JSON file of instructions, bytes.
_MAX_FILE_BYTES = 1 << 20


def scenario_in(*names: str) -> str:
    """Return the scenario that the first matching name contains, else NO_SCENARIO."""
    for name in names:
        for scenario in SCENARIO_INSTRUCTIONS:
            if scenario in name:
                return scenario
    return NO_SCENARIO


def read_instructions(path: Path) -> dict[str, str]:
    """Read a JSON file {scenario: text}; raise EpisodeError where it is something else."""
    content = read_json(path, "scenarios and texts", _MAX_FILE_BYTES, error=EpisodeError)
    if not isinstance(content, dict) or not all(isinstance(text, str) and text.strip() for text in content.values()):
        raise EpisodeError(
            f'{path} is not a table of scenarios and texts, expected {{"1box_vert_left": "go ..."}}; correct it'
        )
    return {scenario: check_instruction(text) for scenario, text in content.items()}
