from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacontext.errors import ConfigError
from megacontext.training.lm_batches import END_OF_TEXT
from megacontext.training.slices import Place, SliceConfig, cut_corpus, cut_document
from megacontext.training.texts import TextFile

BLOCK = 32


def reference(n_tokens: int, config: SliceConfig) -> list[tuple[int, int]]:
    """(offset, length of the context) of every slice, from the definition alone."""
    size, horizon, step = config.context_tokens, config.horizon, config.step
    whole = [o for o in range(0, n_tokens, step) if o + size + horizon <= n_tokens]
    slices = [(offset, size) for offset in whole]
    rest = len(whole) * step
    length = (n_tokens - horizon - rest) // BLOCK * BLOCK
    covered = whole[-1] + size if whole else 0
    if config.short_documents == "pad" and length > 0 and rest + length > covered:
        slices.append((rest, length))
    return slices


@given(
    n_tokens=st.integers(0, 700),
    blocks=st.integers(1, 5),
    horizon=st.integers(32, 128),
    stride=st.none() | st.integers(1, 12),
    short=st.sampled_from(["pad", "skip"]),
    chunk=st.integers(1, 300),
)
def test_slices_are_those_of_the_definition(n_tokens, blocks, horizon, stride, short, chunk):
    config = SliceConfig(
        context_tokens=blocks * BLOCK,
        horizon=horizon,
        stride=None if stride is None else stride * BLOCK,
        short_documents=short,
    )
    document = torch.arange(n_tokens)
    windows = list(cut_document(document.split(chunk), config))
    assert [(w.offset, len(w.context)) for w in windows] == reference(n_tokens, config)
    for window in windows:
        end = window.offset + len(window.context)
        assert torch.equal(window.context, document[window.offset : end])
        assert torch.equal(window.future, document[end : end + horizon])


def test_without_a_stride_contexts_lie_side_by_side():
    config = SliceConfig(context_tokens=64, horizon=32, short_documents="skip")
    windows = list(cut_document([torch.arange(300)], config))
    assert [window.offset for window in windows] == [0, 64, 128, 192]


def encode(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.int64)


@pytest.fixture
def corpus(tmp_path) -> list[TextFile]:
    lengths = ([200, 10, 130], [5], [64, 97, 300])
    texts = []
    for number, file in enumerate(lengths):
        path = tmp_path / f"{number}.txt"
        path.write_text(END_OF_TEXT.join("abcdefghij" * (n // 10) + "x" * (n % 10) for n in file))
        texts.append(TextFile(path.name, path))
    return texts


CONFIG = SliceConfig(context_tokens=64, horizon=32)


def test_places_are_counted_from_each_file_and_document(corpus):
    cuts = list(cut_corpus(corpus, encode, CONFIG))
    assert [(c.place.source, c.place.document, c.place.offset, c.window is None) for c in cuts] == [
        (0, 0, 0, False),
        (0, 0, 64, False),
        (0, 0, 128, False),
        (0, 1, 0, True),
        (0, 2, 0, False),
        (0, 2, 64, False),
        (1, 0, 0, True),
        (2, 0, 0, False),
        (2, 1, 0, False),
        (2, 2, 0, False),
        (2, 2, 64, False),
        (2, 2, 128, False),
        (2, 2, 192, False),
    ]


def test_cutting_goes_on_after_any_slice(corpus):
    cuts = list(cut_corpus(corpus, encode, CONFIG))
    for index, cut in enumerate(cuts):
        if cut.window is None:
            continue
        rest = list(cut_corpus(corpus, encode, CONFIG, after=cut.place))
        assert [c.place for c in rest] == [c.place for c in cuts[index + 1 :]]


def test_nothing_before_the_place_is_tokenized(corpus):
    seen: list[str] = []

    def watched(text: str) -> torch.Tensor:
        seen.append(text)
        return encode(text)

    list(cut_corpus(corpus, watched, CONFIG, after=Place(2, 2, 64)))
    assert [len(text) for text in seen] == [300]


def test_progress_ends_at_the_size_of_the_corpus_wherever_it_began(corpus):
    size = sum(text.path.stat().st_size for text in corpus)
    for after in (None, Place(2, 0, 0)):
        read: list[int] = []
        list(cut_corpus(corpus, encode, CONFIG, after=after, on_read=read.append))
        assert sum(read) == size


@pytest.mark.parametrize(
    "values",
    [
        {"context_tokens": 100},
        {"context_tokens": 0},
        {"horizon": 31},
        {"horizon": 129},
        {"stride": 33},
        {"stride": 0},
        {"short_documents": "drop"},
        {"overlap": 3},
    ],
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        SliceConfig.parse(values)
