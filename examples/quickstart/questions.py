"""Choose the concepts that the quickstart asks about."""

import json
from pathlib import Path
from typing import NamedTuple

from megatron_jam.config.cli import run_command
from megatron_jam.config.files import write_text_atomically

NUM_TRAINED, NUM_HELD_OUT = 20, 8


class Probe(NamedTuple):
    """A concept that is asked about."""

    key: str
    question: str
    held_out: bool


def choose(data: Path) -> list[Probe]:
    """Every n-th concept in the order of their keys: chosen by position, not by result."""
    probes = []
    for file, count in (("interleaved", NUM_TRAINED), ("interleaved_heldout", NUM_HELD_OUT)):
        lines = (data / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        records = sorted(map(json.loads, lines), key=lambda record: record["id"])
        for i in range(count):
            record = records[i * len(records) // count]
            probes.append(Probe(record["id"], record["question"], file.endswith("heldout")))
    return probes


def main(data: Path, output: Path) -> None:
    """Write the questions, one a line.

    Args:
        data: the quickstart's data folder.
        output: text file to write.
    """
    questions = [probe.question for probe in choose(data)]
    write_text_atomically(output, "\n".join(questions) + "\n")


if __name__ == "__main__":
    run_command(main)
