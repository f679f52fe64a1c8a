"""What a command puts on the screen while it works."""

from __future__ import annotations

from tomexport import terminal


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.progressing() as progress:
        for now[0] in (1, 59, 61, 90, 130):
            progress(f"at {now[0]} s")
    assert capsys.readouterr() == ("", "at 61 s\nat 130 s\n")
