import torch
from engine_cases import K, new_engine, words

from megacontext.runtime.row_layout import RowLayout
from megacontext.runtime.working_context import WorkingContext


def window(cursor=K * K + 3 * K + 5, slots=3):
    context = WorkingContext.initial(
        cursor, block_size=K, gist_cost=slots, budget=512, tail_tokens=40
    )
    return context.reveal(K + 1)


def test_rows_stand_for_what_the_entries_hold():
    context = window()
    layout = RowLayout.of(context, 2, "packed", 500)
    rows, position = [], 0
    for level, start, end in context.spans().tolist():
        here = (
            [(level, start, slot) for slot in range(3)]
            if level
            else [(0, token, 0) for token in range(start, end)]
        )
        rows += here
        position += len(here)
    rows += [(0, context.cursor, 0), (0, context.cursor + 1, 0)]
    columns = (layout.levels, layout.starts, layout.slots)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == rows
    assert layout.positions.tolist() == list(range(len(rows)))


def test_gists_first_are_the_same_rows_in_another_order():
    context = window().reveal(1)
    packed = RowLayout.of(context, 2, "packed", 500)
    layout = RowLayout.of(context, 2, "gists_first", 500)
    gists = packed.levels > 0
    n_gists = int(gists.sum())
    assert not bool(gists[:n_gists].all()), "raw rows stand among gists"
    assert torch.equal(layout.ids, torch.cat((packed.ids[gists], packed.ids[~gists])))
    assert layout.positions.tolist() == list(range(len(packed)))
    assert layout.slots[:n_gists].tolist() == [0, 1, 2] * (n_gists // 3)


def test_ids_tell_rows_apart_and_stay_while_the_window_changes():
    context = window()
    names = {}
    for changed in (context, context.reveal(3), context.extend(9), window(slots=3).reveal(K)):
        layout = RowLayout.of(changed, 3, "timeline", 500)
        rows = zip(
            layout.levels.tolist(), layout.starts.tolist(), layout.slots.tolist(), strict=True
        )
        for name, row in zip(layout.ids.tolist(), rows, strict=True):
            assert names.setdefault(name, row) == row
    assert len(set(names.values())) == len(names)


def test_a_token_keeps_its_id_when_it_joins_the_history(tmp_path):
    engine = new_engine(tmp_path)
    engine.ingest(words(70))
    pending = engine.base.encode("so?")
    before = engine.reader.layout(engine.context, 3).ids
    engine.ingestor.append(pending)
    engine.focus.advance(73)
    assert torch.equal(engine.reader.layout(engine.context, 0).ids, before)


def test_chosen_rows():
    layout = RowLayout.of(window(), 0, "packed", 500)
    gists = layout[layout.levels > 0]
    assert bool((gists.levels > 0).all())
    assert torch.equal(gists.ids, layout.ids[layout.levels > 0])
    assert len(gists) == 3 * len(set(gists.starts.tolist()))
