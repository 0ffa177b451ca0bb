"""bAbI (Weston et al., 2015, arXiv 1502.05698): stories and questions from the published files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megacontext.errors import DataError
from megacontext.tasks.documents import QUESTION_TEMPLATE


@dataclass(frozen=True)
class BabiQuestion:
    """One question with the story told before it.

    Attributes:
        task: ``qa1`` to ``qa20``.
        story: the sentences before the question, in order, other questions left out.
        question: the question.
        answer: the expected answer; several things are joined by commas.
        evidence: indices into ``story`` of the sentences that support the answer.
    """

    task: str
    story: tuple[str, ...]
    question: str
    answer: str
    evidence: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """Story and question as the base model reads them when the story fits its window."""
        return " ".join(self.story) + QUESTION_TEMPLATE.format(question=self.question)


def read_babi(path: Path) -> list[BabiQuestion]:
    """Reads one published task file, for example ``qa1_single-supporting-fact_test.txt``.

    Raises:
        DataError: the file is missing or is not in the bAbI format.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; name a folder with the bAbI task files") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    task = path.name.partition("_")[0]
    questions: list[BabiQuestion] = []
    story: list[str] = []
    places: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        index_text, _, rest = line.strip().partition(" ")
        if not index_text.isdecimal():
            raise DataError(f"{path}: line {number} does not start with a sentence number")
        index = int(index_text)
        if index == 1:
            story, places = [], {}
        fields = [part.strip() for part in rest.split("\t")]
        if len(fields) == 1:
            places[index] = len(story)
            story.append(fields[0])
        elif len(fields) == 3:
            try:
                evidence = tuple(places[int(i)] for i in fields[2].split())
            except (KeyError, ValueError):
                raise DataError(
                    f"{path}: line {number} names evidence {fields[2]!r}, expected numbers of "
                    "sentences told before"
                ) from None
            questions.append(BabiQuestion(task, tuple(story), fields[0], fields[1], evidence))
        else:
            raise DataError(f"{path}: line {number} has {len(fields)} fields, expected 1 or 3")
    return questions


def find_babi(folder: Path, task: str, split: str = "test") -> Path:
    """The file of a task (``qa1`` …) and split in a folder.

    Raises:
        DataError: there is none.
    """
    found = sorted(folder.glob(f"{task}_*_{split}.txt"))
    if not found:
        raise DataError(f"{folder}: no file {task}_*_{split}.txt; get bAbI v1.1 (en) and name it")
    return found[0]
