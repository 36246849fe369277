"""The sections of the report page."""

from __future__ import annotations

from dataclasses import replace

from phatgoose.apps.report.page import write_report
from routing_samples import make_analysis


def test_an_analysis_without_scores_or_oracle_has_a_page_too(tmp_path):
    analysis = make_analysis(3, layers=2)
    bare = {
        name: replace(router, scores={}, findings=(), traces={})
        for name, router in analysis.routers.items()
    }
    found = replace(analysis, routers=bare, oracle={}, effects=(), agreements={})
    page = write_report(found, tmp_path / "new" / "folder").read_text(encoding="utf-8")
    assert "How far from Oracle" not in page
    assert "Token by token" not in page
    assert "Experts by layer" in page
