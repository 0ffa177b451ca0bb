"""``megacontext bench cost``: every ratio that it promises, at sizes that take seconds."""

from __future__ import annotations

NAMES = {
    "decode_ratio",
    "decode_ratio.exact",
    "decode_ratio.incremental",
    "decode_ratio.remembered",
    "time_flatness",
    "rss_flatness",
    "refocus_incremental_ratio",
    "refocus_incremental_ratio.question",
    "incremental_delta_nll",
    "incremental_delta_nll.prose",
    "incremental_delta_nll.recall",
    "incremental_answers_lost",
    "ingest_ratio",
    "reopen_ratio",
    "bytes_per_token",
    "bytes_per_token.tokens",
    "bytes_per_token.gists",
    "bytes_per_token.catalog",
}


def test_bench_cost(megacontext, tmp_path):
    done = megacontext(
        "bench", "cost", "--quick", "--set", "lengths=[2048, 4096]",
        f"folder={tmp_path / 'kept'}", "repeats=2", "decode_blocks=1", "approach_blocks=2",
        "engine.budget=512", "engine.tail_tokens=128", "reopenings=1", "answer_tokens=4",
        "ingest_repeats=2", "ingest_tokens=2048", "prefill_windows=2", "prefill_batches=[2]",
        "refocuses=8", "refocus_edits=2", "prose_history=1024", "prose_blocks=3",
        "recall_answers=2", "recall_history=4096",
    )  # fmt: skip
    assert done.status == 0, done.err
    results = {result["name"]: result for result in done.result["results"]}
    assert set(results) >= NAMES
    for result in results.values():
        assert result["n"] >= 1
        assert result["ci95"][0] <= result["value"] <= result["ci95"][1]
    for name in NAMES - {name for name in NAMES if name.startswith("incremental_")}:
        assert results[name]["value"] > 0, name
    parts = [
        result["value"] for name, result in results.items() if name.startswith("bytes_per_token.")
    ]
    assert abs(sum(parts) - results["bytes_per_token"]["value"]) < 1e-4
    assert results["decode_ratio"]["value"] == results["decode_ratio.incremental"]["value"]
    kept = sorted(path.name.split("-")[0] for path in (tmp_path / "kept").iterdir())
    assert kept == ["2048", "4096"]


def test_lengths_that_cannot_be_compared_are_one_line(megacontext):
    done = megacontext("bench", "cost", "--set", "lengths=[10000]")
    assert "name at least two" in done.complaint
