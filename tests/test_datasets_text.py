"""The text at hand: from a data folder, or what every Python has."""

from __future__ import annotations

from bayesgn import datasets


def test_the_folder_comes_first_and_every_python_has_the_other(monkeypatch, tmp_path):
    (tmp_path / "shakespeare_12plays.txt").write_text("To be, or not to be", encoding="utf-8")
    monkeypatch.setenv("BAYESGN_DATA", str(tmp_path))
    assert datasets.text().text == "To be, or not to be" and datasets.text().name == "shakespeare"
    monkeypatch.setattr(datasets.lookup, "folders", list)
    found = datasets.text()
    assert found == datasets.python_docs() and found.name == "python_docs"
