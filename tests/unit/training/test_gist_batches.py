from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import tiny_base_model, tiny_tokenizer

from megacontext.errors import ConfigError, DataError
from megacontext.tasks.recall_documents import Prose
from megacontext.training.gist_batches import (
    GistPhase,
    GistRows,
    GistStep,
    check_prepared,
    gist_batches,
)
from megacontext.training.lm_batches import END_OF_TEXT, MixtureConfig, RowSampler
from megacontext.training.prepare_dataset import PrepareDatasetConfig, prepare_dataset
from megacontext.training.prepared_dataset import PreparedDataset

K = 8
SAMPLER = RowSampler(
    tiny_tokenizer().backend_tokenizer,
    Prose([" ".join(f"The fox saw {n} ships on day {n * n}." for n in range(200))]),
    MixtureConfig(copy_share=0.0),
    seed=0,
    end="<|end|>",
)


def phase_of(**values):
    return GistPhase.parse({"length": 96, "rows": 3, "steps": 4, "replaced": [1, 3]} | values)


def rows_of(phase=None, steps=6, **values):
    plan = [GistStep(phase or phase_of(), SAMPLER)] * steps
    return GistRows(plan, **({"block_size": K, "seed": 0} | values))


def fields(batch):
    return batch.ids, batch.weights, batch.levels


def alike(left, right):
    return all(torch.equal(*pair) for pair in zip(fields(left), fields(right), strict=True))


def prepare(folder, base, **changes):
    """Slices of 64 tokens, except the last of each document, which is shorter."""
    text = "".join(f"{number} little birds sat on a wall. " for number in range(20))
    (folder / "corpus.txt").write_text(END_OF_TEXT.join([text, text[:150]]))
    values = {
        "output": folder / "slices",
        "corpus": [str(folder / "corpus.txt")],
        "slices": {"context_tokens": 64, "horizon": 32},
        "teacher": {"dtype": "float32"},
    }
    config = PrepareDatasetConfig.parse(values | changes)
    prepare_dataset(config, base=base)
    return PreparedDataset.open(config.output, base)


@pytest.fixture(scope="module")
def base():
    return tiny_base_model()


@pytest.fixture(scope="module")
def slices(tmp_path_factory, base):
    return prepare(tmp_path_factory.mktemp("slices"), base)


def test_a_batch_is_a_function_of_seed_step_and_process():
    kept = {}
    for seed, rank, step in itertools.product((0, 1), (0, 1), range(3)):
        batch = rows_of(seed=seed, rank=rank, world=2)[step]
        assert alike(batch, rows_of(seed=seed, rank=rank, world=2)[step])
        kept[seed, rank, step] = batch
    for one, other in itertools.combinations(kept, 2):
        assert not alike(kept[one], kept[other])


def test_a_batch_has_the_promised_shapes():
    batch = rows_of()[0]
    assert (batch.ids.shape, batch.ids.dtype) == ((3, 96), torch.int64)
    assert (batch.weights.shape, batch.weights.dtype) == ((3, 96), torch.float32)
    assert (batch.levels.shape, batch.levels.dtype) == ((3, 12), torch.int64)
    assert (batch.slots, batch.teacher) == (None, None)


def test_rows_are_those_of_the_sampler_and_never_come_twice():
    seen = [
        tuple(row)
        for rank in (0, 1)
        for step in range(3)
        for row in rows_of(rank=rank, world=2)[step].ids.tolist()
    ]
    assert len(set(seen)) == len(seen) == 18
    ids, weights = SAMPLER.row(0, 96)
    assert rows_of()[0].ids[0].tolist() == ids.tolist()
    assert rows_of()[0].weights[0].tolist() == weights.tolist()


def test_a_resumed_run_goes_on_at_its_step():
    resumed, whole = rows_of(first=4), rows_of()
    assert (len(resumed), len(whole)) == (2, 6)
    assert alike(resumed[1], whole[5])


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_come_in_order(workers):
    rows = rows_of(first=1, steps=4)
    found = list(gist_batches(rows, workers=workers))
    assert len(found) == 3
    assert all(alike(batch, rows[index]) for index, batch in enumerate(found))


def test_windows_of_a_step_have_equally_many_gists_in_every_process():
    phase = phase_of(replaced=[1, 3, 6], keep_last=2, slots=[1, 2, 4])
    counts, slots, placed = set(), set(), 0
    for step in range(30):
        batches = [rows_of(phase, steps=30, rank=rank, world=2)[step] for rank in (0, 1)]
        per_window = {int(n) for batch in batches for n in (batch.levels == 1).sum(1)}
        assert len(per_window) == len({batch.slots for batch in batches}) == 1
        placed += not torch.equal(batches[0].levels, batches[1].levels)
        assert all((batch.levels[:, -2:] == 0).all() for batch in batches)
        assert all(set(batch.levels.flatten().tolist()) <= {0, 1} for batch in batches)
        counts |= per_window
        slots.add(batches[0].slots)
    assert (counts, slots) == ({1, 3, 6}, {1, 2, 4})
    # The places differ from process to process, apart from what chance puts alike.
    assert placed >= 28


def runs_of(levels):
    return [sum(1 for _ in group) for value, group in itertools.groupby(levels) if value == 1]


def test_replaced_blocks_may_be_neighbours():
    def shares(run_share):
        phase = phase_of(replaced=[4], run_share=run_share)
        rows = [row for step in range(12) for row in rows_of(phase, steps=12)[step].levels.tolist()]
        assert all(sum(row) == 4 for row in rows)
        return sum(runs_of(row) == [4] for row in rows) / len(rows), rows

    always, rows = shares(1.0)
    assert always == 1.0
    # Every place that leaves the last block raw.
    assert {row.index(1) for row in rows} == set(range(8))
    assert shares(0.0)[0] < 0.3
    assert 0.3 < shares(0.5)[0] < 0.9


def test_spans_are_read_as_level_2_gists():
    phase = phase_of(length=160, spans=2, replaced=[0, 2])
    counts = set()
    for step in range(8):
        levels = rows_of(phase, steps=8)[step].levels
        assert (levels[:, :16] == 2).all()
        assert (levels[:, 16:] != 2).all()
        counts.add(int((levels == 1).sum()) // 3)
    assert counts == {0, 2}


def test_teacher_states_are_the_final_ones_of_the_base(base, slices):
    phase = phase_of(length=64, slots=[2])
    rows = rows_of(phase, prepared=[slices], prepared_share=1.0)
    starts = set()
    for step in range(4):
        batch = rows[step]
        assert batch.teacher.shape == (3, 64, base.d_model)
        assert batch.slots == 2
        assert (batch.weights == 1).all()
        for ids, states in zip(batch.ids, batch.teacher, strict=True):
            torch.testing.assert_close(states, base.features(ids), rtol=1e-5, atol=1e-5)
            starts.add(tuple(ids.tolist()))
    # Only whole slices: the rest of a document is shorter than the window.
    whole = {
        tuple(piece.context_tokens.tolist())
        for piece in (slices[index] for index in range(len(slices)))
        if piece.context_mask.all()
    }
    assert 1 < len(starts) <= len(whole) < len(slices)
    assert starts <= whole


def test_a_short_window_is_the_beginning_of_a_slice(tmp_path, base):
    data = prepare(tmp_path, base, slices={"context_tokens": 96, "horizon": 32})
    batch = rows_of(phase_of(length=64), prepared=[data], prepared_share=1.0)[0]
    beginnings = [data[index].context_tokens[:64].tolist() for index in range(len(data))]
    for ids, states in zip(batch.ids, batch.teacher, strict=True):
        assert ids.tolist() in beginnings
        torch.testing.assert_close(states, base.features(ids), rtol=1e-5, atol=1e-5)


def test_final_states_are_found_among_others(tmp_path, base):
    data = prepare(tmp_path, base, teacher={"dtype": "float32", "layers": [-1, 0]})
    batch = rows_of(phase_of(length=64), prepared=[data], prepared_share=1.0)[0]
    for ids, states in zip(batch.ids, batch.teacher, strict=True):
        torch.testing.assert_close(states, base.features(ids), rtol=1e-5, atol=1e-5)


def test_a_share_of_the_batches_is_prepared(slices):
    def count(**values):
        rows = rows_of(phase_of(length=64), steps=60, **values)
        return sum(rows[step].teacher is not None for step in range(60))

    assert 20 <= count(prepared=[slices], prepared_share=0.5) <= 40
    assert count(prepared=[slices], prepared_share=0.0) == 0
    assert count(prepared=[], prepared_share=1.0) == 0


def test_slices_that_fit_are_taken(base, slices):
    check_prepared(slices, [phase_of(length=64)], base.n_layers)


def test_slices_that_do_not_fit_are_refused(tmp_path, base, slices):
    with pytest.raises(DataError, match=r"no slice holds 96 tokens, .* raise `slices.context"):
        check_prepared(slices, [phase_of(length=64), phase_of(length=96)], base.n_layers)
    (tmp_path / "inner").mkdir()
    inner = prepare(tmp_path / "inner", base, teacher={"layers": [0, 2]})
    with pytest.raises(DataError, match=r"states \[0, 2\], not the final ones \(3\); prepare"):
        check_prepared(inner, [phase_of(length=64)], base.n_layers)
    (tmp_path / "none").mkdir()
    none = prepare(tmp_path / "none", base, teacher={"enabled": False})
    with pytest.raises(DataError, match="has no teacher states; prepare it with `teacher"):
        check_prepared(none, [phase_of(length=64)], base.n_layers)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 100}, "length 100 is not a multiple of 8 tokens"),
        ({"replaced": [1, 12]}, "replaced is 12, but a window of 96 tokens with 0 spans and 1 "
                                "blocks kept has room for 11"),
        ({"replaced": [8], "keep_last": 5}, "replaced is 8, .* 5 blocks kept has room for 7"),
        ({"spans": 1, "replaced": [4]}, "with 1 spans and 1 blocks kept has room for 3"),
        ({"spans": 2, "replaced": [0]}, "with 2 spans and 1 blocks kept has room for -5"),
    ],
)  # fmt: skip
def test_phases_that_do_not_fit_their_blocks_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        phase_of(**values).check(K)


def test_a_phase_that_just_fits_is_taken():
    for values in ({"replaced": [11]}, {"spans": 1, "replaced": [0, 3]}):
        phase = phase_of(**values)
        phase.check(K)
        assert (rows_of(phase)[0].levels[:, -1] == 0).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 32}, "'length' has value 32: .*equal to 64"),
        ({"rows": 0}, "'rows' has value 0: .*equal to 1"),
        ({"rows": 5000}, "'rows' has value 5000: .*equal to 4096"),
        ({"steps": 0}, "'steps' has value 0: .*equal to 1"),
        ({"replaced": []}, "'replaced' has value .*at least 1 item"),
        ({"replaced": [0, 1]}, r"replaced is \(0, 1\), expected at least 1 \(0 with spans\)"),
        ({"replaced": [-1], "spans": 1}, r"replaced is \(-1,\), expected at least 1"),
        ({"spans": -1}, "'spans' has value -1: .*equal to 0"),
        ({"keep_last": 0}, "'keep_last' has value 0: .*equal to 1"),
        ({"run_share": 1.5}, "'run_share' has value 1.5: .*equal to 1"),
        ({"blocks": 3}, "unknown key 'blocks'"),
    ],
)
def test_phases_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        phase_of(**values)
