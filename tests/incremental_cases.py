"""A slow plain reference of the KV mode ``incremental``: one row at a time, from unrotated keys."""

from __future__ import annotations

from typing import Any

import torch

from megacontext.runtime.context_input import ContextInput


class SlowReading:
    """Keys and values by what they stand for: a token's place, or (level, start, slot) of a gist.

    A row is computed as a context of its own, in which everything at a lower position is a gist.
    """

    def __init__(self, engine: Any, *, halo: int = 0) -> None:
        self.engine = engine
        self.base = engine.base
        self.halo = halo
        self.known: dict[Any, tuple[Any, Any]] = {}
        self.places: dict[Any, int] = {}
        self.spans: list[Any] | None = None
        self.computed = 0

    def read(self, window: Any, pending: Any, *, asking: int = 0) -> Any:
        layout = self._layout(window, len(pending))
        fresh = self._fresh(layout, window, len(pending), asking)
        known, self.places = self.known, {}
        self.known, self.computed, logits = {}, 0, None
        for name, position in layout:
            self.places[name] = position
            if self._is_gist(name) and self._kv():
                self.known[name] = self._gist(name)
            elif name in fresh:
                logits = self._compute(name, self._embed(name, window.cursor, pending), position)
                self.computed += 1
            else:
                self.known[name] = known[name]
        self.spans = window.spans().tolist()
        return logits

    def step(self, token: Any) -> Any:
        name = max(n for n in self.places if not self._is_gist(n)) + 1
        self.places[name] = max(self.places.values()) + 1
        return self._compute(name, self.base.embed(token)[0], self.places[name])

    def _layout(self, window: Any, n_pending: int) -> list[tuple[Any, int]]:
        engine, rows = self.engine, []
        last = engine.base.max_positions - n_pending - window.block_size
        for (level, start, end), position in zip(
            window.spans().tolist(),
            window.positions(engine.config.positions, last).tolist(),
            strict=True,
        ):
            if level:
                slots = range(window.gist_cost)
                rows += [((level, start, slot), position + slot) for slot in slots]
            else:
                rows += [(token, position + token - start) for token in range(start, end)]
        rows.sort(key=lambda row: row[1])
        after = rows[-1][1] + 1 if rows else 0
        return rows + [(window.cursor + i, after + i) for i in range(n_pending)]

    def _fresh(self, layout: Any, window: Any, n_pending: int, asking: int) -> set[Any]:
        rows = [n for n, _ in layout if not (self._is_gist(n) and self._kv())]
        fresh = {name for name in rows if name not in self.known} | {rows[-1]}
        if self.spans is None or self._only_grew(window):
            return fresh
        if self._shows_more(window):
            newest = min(max(n_pending, asking), self.engine.config.query_tokens)
            fresh |= set(rows[max(0, len(rows) - newest) :])
        for index, name in enumerate(rows):
            before = rows[max(0, index - self.halo) : index]
            if any(other not in self.known for other in before):
                fresh.add(name)
        return fresh

    def _only_grew(self, window: Any) -> bool:
        now = [(level, start) for level, start, _ in window.spans().tolist()]
        then = [(level, start) for level, start, _ in self.spans or []]
        return now[: len(then)] == then

    def _shows_more(self, window: Any) -> bool:
        return any(
            level < old_level and old_start <= start < old_end
            for level, start, _ in window.spans().tolist()
            for old_level, old_start, old_end in self.spans or []
        )

    def _embed(self, name: Any, cursor: int, pending: Any) -> Any:
        if self._is_gist(name):
            level, _, slot = name
            gist = self._vector(name)
            return self.engine.gistnet.read_embeddings(gist, torch.tensor([level]))[0, slot]
        if name < cursor:
            return self.base.embed(self.engine.memory.tokens(name, name + 1).long())[0]
        return self.base.embed(pending[name - cursor : name - cursor + 1])[0]

    def _gist(self, name: Any) -> tuple[Any, Any]:
        level, _, slot = name
        with torch.no_grad():
            keys, values = self.engine.gistnet.read_kv(self._vector(name), torch.tensor([level]))
        return keys[:, 0, slot], values[:, 0, slot]

    def _vector(self, name: Any) -> Any:
        level, start, _ = name
        index = start // self.engine.memory.identity.block_size**level
        return self.engine.memory.gists(level, index, index + 1).float()

    def _compute(self, name: Any, embedding: Any, position: int) -> Any:
        base = self.base
        seen = [other for other in self.known if self.places[other] < position]
        seen.sort(key=self.places.__getitem__)
        gists: tuple[Any, ...] = ()
        if seen:
            keys, values = (
                torch.stack(parts, dim=1)
                for parts in zip(*(self.known[other] for other in seen), strict=True)
            )
            gists = (keys, values, torch.tensor([self.places[other] for other in seen]))
        at = torch.tensor([position])
        read = base.prefill(ContextInput(embedding[None].to(base.dtype), at, *gists))
        layers = [
            (layer.keys[0, :, -1:], layer.values[0, :, -1]) for layer in read.cache.entries.layers
        ]
        rotated = torch.stack([keys.transpose(0, 1) for keys, _ in layers])
        self.known[name] = (
            base.rotation.unrotate(rotated, at)[:, 0],
            torch.stack([values for _, values in layers]),
        )
        return read.logits[-1]

    def _kv(self) -> bool:
        return self.engine.gistnet.config.reader == "kv"

    @staticmethod
    def _is_gist(name: Any) -> bool:
        return isinstance(name, tuple)


def held(reading: Any, layout: Any, reader: Any) -> dict[Any, tuple[int, Any, Any]]:
    """What a reading's cache holds by name: position, keys unrotated, values.

    The names are those of the layout that was read, so that a wrong one shows as a wrong vector.
    """
    cache = reading.cache
    positions = torch.cat((cache.gist_positions, cache.positions))
    keys = torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.entries.layers])
    values = torch.stack([layer.values[0].transpose(0, 1) for layer in cache.entries.layers])
    keys = reading.base.rotation.unrotate(keys, positions)
    names = {
        position: (level, start, slot) if level else start
        for level, start, slot, position in zip(
            layout.levels.tolist(),
            layout.starts.tolist(),
            layout.slots.tolist(),
            layout.positions.tolist(),
            strict=True,
        )
    }
    found: dict[Any, tuple[int, Any, Any]] = {}
    for index, position in enumerate(positions.tolist()):
        name = names.get(position, ("stepped", position))
        assert name not in found, "one entry for every row"
        found[name] = (position, keys[:, index], values[:, index])
    return found
