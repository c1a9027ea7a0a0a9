"""Samples of the world that the embedded model knows, to ask about."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write"]


def write(
    directory: str | Path, num: int = 24, seed: int = 0, split: str = "test"
) -> list[dict[str, str]]:
    """Write clips, pictures and `questions.jsonl` of the embedded model's world.

    The same seed gives the same files, byte for byte. Either everything is written or nothing.

    Args:
        directory: the folder to write to; made where it is missing.
        num: the number of questions, at most 4 a file.
        seed: of the scenes and the questions.
        split: test, or dev for what is calibrated or chosen.

    Returns:
        The lines of `questions.jsonl`: file (relative to the folder), question, answer, kind.

    Raises:
        VtpruneError: the folder is a file or can't be written to, or `num` is less than 1.
    """
    from vtprune.demo.samples import write_samples

    return write_samples(Path(directory), num, seed, split)
