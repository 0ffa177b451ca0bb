from __future__ import annotations

import pytest

from megacontext.errors import DataError
from megacontext.tasks.corpus import END_OF_TEXT, held_out_documents, split_corpus


@pytest.mark.parametrize("every", [2, 3, 5])
@pytest.mark.parametrize("sizes", [(7,), (4, 3), (1, 1, 5), (0, 6, 2)])
def test_held_out_documents_are_those_that_training_never_sees(tmp_path, every, sizes):
    paths = []
    for number, size in enumerate(sizes):
        path = tmp_path / f"{number}.txt"
        path.write_text(END_OF_TEXT.join(f"text {number}.{i}\n" for i in range(size)))
        paths.append(path)
    training, held_out = split_corpus(paths, every)
    assert held_out_documents(paths, every) == held_out.texts
    assert not set(training.texts) & set(held_out.texts)
    assert len(training.texts) + len(held_out.texts) == sum(sizes)


def test_too_few_documents_are_refused(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("only one")
    with pytest.raises(DataError, match="has 1 documents, too few to hold out one in 16"):
        held_out_documents([path])
    with pytest.raises(DataError, match="no such file"):
        held_out_documents([tmp_path / "none.txt"])
