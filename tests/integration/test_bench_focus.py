"""``megacontext bench focus``, as typed."""

from __future__ import annotations

from focus_cases import lexical_lens, write_babi

SMALL = ["groups=1", "asked=1", "prose_streams=1", "prose_history=1500", "prose_blocks=3"]
SMALL += ["cost_samples=2", "max_new_tokens=24", "gistnet=mean"]


def test_bench_focus_measures_and_reports(megacontext, tmp_path):
    lens = lexical_lens(tmp_path / "lens", 192)
    babi = write_babi(tmp_path / "babi")
    words = ["--lengths", "4k,6k", "--policies", "lexical,lens", "--report", tmp_path / "report"]
    settings = [f"lens={lens}", f"babi={babi}", "kinds=same_words,two_hop,none", *SMALL]
    done = megacontext("bench", "focus", "--quick", *words, "--json", "-", "--set", *settings)
    assert done.status == 0, done.err
    line = done.result
    assert line["suite"] == "focus"
    results = {result["name"]: result for result in line["results"]}
    published = {
        "evidence_at_L0.same_words.6k",
        "relative_accuracy.same_words.6k",
        "lens_minus_lexical.two_hop.6k",
        "swap_rate.prose_calm",
        "length_retention.6k_over_4k",
        "refocus_cost_ratio",
        "false_answers.no_evidence",
    }
    assert published <= set(results)
    assert "regret.prose" not in results, "there is no oracle to regret"
    for result in results.values():
        assert set(result) == {"name", "value", "n", "ci95"}
        assert result["n"] >= 1
    page = (tmp_path / "report" / "focus.md").read_text()
    assert "| same words | 6k | 1 |" in page
    assert "lexical" in (tmp_path / "report" / "focus.svg").read_text()


def test_bench_focus_says_what_it_leaves_out(megacontext, tmp_path):
    settings = ["lens=none", f"babi={tmp_path / 'none'}", "prose_streams=0", "cost_samples=0"]
    settings += ["groups=1", "asked=1", "kinds=none,babi_qa2", "gistnet=mean"]
    done = megacontext(
        "bench", "focus", "--lengths", "4k", "--policies", "recency,lens", "--set", *settings
    )
    assert done.status == 0, done.err
    assert "lens is left out" in done.err.replace("\n", " ")
    assert "babi_qa2" in done.err
    names = [result["name"] for result in done.result["results"]]
    assert "false_answers.none.4k.recency" in names
    assert not any(name.endswith(".lens") for name in names)


def test_bench_focus_refuses_what_is_no_length(megacontext):
    assert "lengths" in megacontext("bench", "focus", "--lengths", "4x").complaint


def test_bench_focus_refuses_histories_too_short_for_a_group(megacontext):
    settings = ["groups=1", "asked=4", "babi=null", "kinds=codes"]
    done = megacontext(
        "bench", "focus", "--lengths", "1k", "--policies", "recency", "--set", *settings
    )
    assert "asked" in done.complaint
