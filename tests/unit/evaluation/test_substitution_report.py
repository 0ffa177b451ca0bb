from __future__ import annotations

from megacontext.evaluation.metrics import Estimate
from megacontext.evaluation.report import suite_line
from megacontext.evaluation.substitution_report import write_report

SHAPES = ("prose.L1.N1", "recall.L2")
VARIANTS = ("full", "gist", "mean", "dropped", "recency")
MEASURES = ("delta_nll", "degradation", "recovered", "recovered.mean", "recovered.recency")


def line():
    results = {"ingest_ratio": Estimate(6.5, 6.25, 6.75, 5)}
    for number, shape in enumerate(SHAPES):
        for index, name in enumerate((*MEASURES, "substitutability")):
            value = 0.1 * number + 0.01 * index
            results[f"{name}@64.{shape}"] = Estimate(value, value - 0.005, value + 0.005, 40)
        for variant in VARIANTS:
            results[f"nll.{variant}@64.{shape}"] = Estimate(3.0 + number, 2.9, 4.1, 40)
    return suite_line("substitution", results, model="m", seed=3, command="megacontext bench …")


def test_the_page_tells_every_number_with_its_interval(tmp_path):
    page, picture = write_report(line(), tmp_path / "docs")
    text = page.read_text()
    assert "megacontext bench …" in text
    assert "seed 3" in text
    assert "| prose | L1.N1 | 40 | 0.000 (-0.005 to 0.005) | 0.010 (0.005 to 0.015) |" in text
    assert "| recall | L2 | 40 | 0.100 (0.095 to 0.105) |" in text
    assert "| `ingest_ratio` | 5 | 6.500 (6.250 to 6.750) |" in text
    assert f"]({picture.name})" in text


def test_the_picture_names_shapes_and_variants_and_is_the_same_on_every_run(tmp_path):
    first = write_report(line(), tmp_path / "a")[1].read_text()
    assert first == write_report(line(), tmp_path / "b")[1].read_text()
    assert all(variant in first for variant in VARIANTS)
    assert "L1.N1" in first
