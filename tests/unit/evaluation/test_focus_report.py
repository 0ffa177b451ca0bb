from __future__ import annotations

from megacontext.evaluation.focus_report import write_focus_report
from megacontext.evaluation.metrics import Estimate
from megacontext.evaluation.report import suite_line

KINDS, POLICIES, LENGTHS = ("same_words", "two_hop"), ("lexical", "lens"), ("4k", "1m")


def line():
    results = {"accuracy.same_words.in_window": Estimate(0.95, 0.9, 0.98, 200)}
    for number, policy in enumerate(POLICIES):
        for length in LENGTHS:
            for kind in KINDS:
                value = 0.5 + 0.25 * number
                results[f"accuracy.{kind}.{length}.{policy}"] = Estimate(value, 0.4, 0.9, 200)
            results[f"refocus_ms.same_words.{length}.{policy}"] = Estimate(12.34, 11, 13, 200)
            results[f"false_answers.none.{length}.{policy}"] = Estimate(0.1, 0.05, 0.2, 200)
            results[f"accuracy.none.{length}.{policy}"] = Estimate(0.9, 0.8, 0.95, 200)
    results["lens_minus_lexical.two_hop.256k"] = Estimate(25.0, 20.0, 30.0, 200)
    results["regret.prose.lens"] = Estimate(0.01, 0.0, 0.02, 200)
    return suite_line("focus", results, model="m", seed=3, command="megacontext bench focus …")


def test_the_page_tells_every_number_with_its_interval(tmp_path):
    page, picture = write_focus_report(line(), tmp_path / "docs")
    text = page.read_text()
    assert "megacontext bench focus …" in text
    assert (
        "| same words | 4k | 200 | 0.500 (0.400 to 0.900) | 0.750 (0.400 to 0.900) "
        "| 0.950 (0.900 to 0.980) |" in text
    )
    assert "| two facts | 1m | 200 | 0.500 (0.400 to 0.900) | 0.750 (0.400 to 0.900) |  |" in text
    assert "| `lens_minus_lexical.two_hop.256k` | 200 | 25.0 (20.0 to 30.0) | at least 20" in text
    assert "| `regret.prose.lens` | 200 | 0.010 (0.000 to 0.020) |" in text
    assert "12.3 (11.0 to 13.0)" in text
    assert f"]({picture.name})" in text


def test_the_picture_has_a_panel_a_kind_and_is_the_same_on_every_run(tmp_path):
    first = write_focus_report(line(), tmp_path / "a")[1].read_text()
    assert first == write_focus_report(line(), tmp_path / "b")[1].read_text()
    for text in ("same words", "two facts", "false answers", *POLICIES, *LENGTHS):
        assert text in first
