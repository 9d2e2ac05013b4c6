"""PolicyLink: the worker follows the newest instruction, whenever it arrives."""

from __future__ import annotations

import pytest

from mobile_vla_inference.control.worker_options import WorkerOptions
from mobile_vla_inference.ros import policy_link
from mobile_vla_inference.ros.policy_link import PolicyLink


class Worker:
    """A worker that is loaded at once; `arriving` are instructions that another thread sets while one is passed on."""

    link: PolicyLink
    arriving: list[str]

    def __init__(self, *_: object) -> None:
        self.instruction = ""

    def set_instruction(self, text: str) -> None:
        if self.arriving:
            self.link.set_instruction(self.arriving.pop(0))
        self.instruction = text

    def start(self) -> None:
        pass

    def wait_until_loaded(self) -> None:
        pass


@pytest.mark.parametrize("arriving", [[], ["go left"], ["go left", "go right"], [""], ["go left", "go ahead"]])
def test_an_instruction_that_arrives_while_an_older_one_is_passed_on_is_followed(monkeypatch, arriving):
    monkeypatch.setattr(policy_link, "PolicyWorker", Worker)
    link = Worker.link = PolicyLink(lambda: None, lambda _: None)
    link.set_instruction("go ahead")
    Worker.arriving = list(arriving)
    worker = link.load(WorkerOptions())
    assert worker.instruction == link.instruction == (arriving or ["go ahead"])[-1]
