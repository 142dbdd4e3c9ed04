"""Boards without sensors, or with made-up ones."""

from __future__ import annotations

from pathlib import Path

from mope_deploy.bench.board import Board, Reading

NOWHERE = Path("/nonexistent")


def bare_board() -> Board:
    return Board(NOWHERE, gpus_here=[])


def lay(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


class Steady(Board):
    """6 W at one rail, and a counter that gains 2 J with every look."""

    def __init__(self) -> None:
        super().__init__(NOWHERE, gpus_here=[])
        self.looks = 0

    def watts(self) -> dict[str, float]:
        return {"VDD_IN": 6.0}

    def read(self) -> Reading:
        self.looks += 1
        return Reading({"cpu": 40.0 + self.looks}, {"CPU": 1000.0}, {"package-0": 2.0 * self.looks}, self.watts())
