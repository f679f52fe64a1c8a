"""The page of the trained model says what its results file has. No speeds."""

from __future__ import annotations

import json

import pytest

from benchmarks.trained import page
from benchmarks.trained.__main__ import PARTS, main


def test_the_page_is_that_of_the_results():
    found = json.loads(page.RESULTS.read_text(encoding="utf-8"))
    assert set(found) == set(PARTS) == set(page._PARTS)
    assert page.PAGE.read_text(encoding="utf-8") == page.page(found)


@pytest.mark.parametrize("part", ["lists", "nearby"])
def test_lists_keep_to_their_budgets(part):
    rows = json.loads(page.RESULTS.read_text(encoding="utf-8"))[part]["rows"]
    assert {row["budget"] for row in rows} == set(page.BUDGETS)
    assert all(row["gmac"] <= row["budget"] for row in rows)


def test_unknown_parts_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["model.pth", "speed", "--images", str(tmp_path), "--others", str(tmp_path)])
    assert "no part speed; there are lists, nearby" in capsys.readouterr().err
