"""Charts: drawn whole, refused early."""

from __future__ import annotations

import os
import sys

import pytest

from tests import made_up_search
from tests.made_up_profile import report
from tomexport import chart
from tomexport.errors import ExportError, MissingExtraError


def test_a_chart_is_a_picture_of_some_size(tmp_path):
    path = tmp_path / "chart.png"
    chart.draw(report(), path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert width > 1000
    assert height > 200
    assert os.listdir(tmp_path) == ["chart.png"]


@pytest.mark.parametrize("chosen", [1, None])
def test_a_front_is_a_picture_too(tmp_path, chosen):
    chart.draw_front(made_up_search.report(chosen), tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert os.listdir(tmp_path) == ["front.png"]


def test_what_was_found_stands_beside_the_bars():
    fused, none, _ = report().runs[0].variants
    assert chart._found(fused) == "8.00 ms,  1.25× (1.23–1.27),  3.0% (2.0–4.0) over bound"
    assert chart._found(none) == "10.00 ms"


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tomexport\[chart\]'"):
        chart.check(tmp_path / "chart.png", force=False)


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"a chart is a \.png, not"):
        chart.check(tmp_path / "chart.pdf", force=False)
    with pytest.raises(ExportError, match="There is no folder"):
        chart.check(tmp_path / "gone" / "chart.png", force=False)
    (tmp_path / "old.png").touch()
    with pytest.raises(ExportError, match="exists already; --force replaces it"):
        chart.check(tmp_path / "old.png", force=False)
    chart.check(tmp_path / "old.png", force=True)


def test_a_full_disk_leaves_the_older_chart(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    path = tmp_path / "chart.png"
    path.write_text("precious")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(ExportError, match=r"could not be written in .*: No space left"):
        chart.draw(report(), path)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["chart.png"]
