"""Files that open but can't be decoded: their questions are left out, and named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from vtprune.errors import DamagedError
from vtprune.evaluation.records import Record
from vtprune.inference.questions_file import Asked, list_number
from vtprune.inference.wording import counted
from vtprune.media import AskedMedia

MOST_NAMED = 5  # files named one by one


@dataclass
class DamagedFiles:
    """The files that were found damaged when they were decoded.

    Args:
        errors: what is wrong with each.
    """

    errors: dict[AskedMedia, DamagedError] = field(default_factory=dict)

    @contextmanager
    def leaving_out(self, file: AskedMedia) -> Iterator[None]:
        """Take the error of a file that can't be decoded; what follows in the block is not run."""
        try:
            yield
        except DamagedError as error:
            self.errors[file] = error

    def without_damaged(
        self, asked: Sequence[Asked], records: Mapping[tuple[int, str], Record]
    ) -> tuple[list[Asked], dict[tuple[int, str], Record]]:
        """Return the questions about all other files, and their records by their new numbers.

        Args:
            records: by number and key of a variant.

        Raises:
            DamagedError: none of their files can be decoded.
        """
        kept = [index for index, each in enumerate(asked) if each.file not in self.errors]
        if asked and not kept:
            raise self.errors[asked[0].file]
        new_number = {index: place for place, index in enumerate(kept)}
        return (
            [replace(asked[index], number=list_number(asked, index)) for index in kept],
            {
                (new_number[number], key): replace(record, question=new_number[number])
                for (number, key), record in records.items()
                if number in new_number
            },
        )

    def warnings(self, asked: Sequence[Asked], noun: str = "question") -> list[str]:
        """Return a warning for each fault, with how many questions are left out for it.

        Args:
            asked: all questions.
            noun: what one is called.
        """
        lost: dict[str, int] = {}
        for each in asked:
            if each.file in self.errors:
                message = self.errors[each.file].message
                lost[message] = lost.get(message, 0) + 1
        named = list(lost.items())
        notes = [f"{text}: {counted(count, noun)} left out" for text, count in named[:MOST_NAMED]]
        more = [count for _, count in named[MOST_NAMED:]]
        if more:
            notes.append(f"{counted(len(more), 'more file')} can't be decoded: "
                         f"{counted(sum(more), noun)} left out")  # fmt: skip
        return notes
