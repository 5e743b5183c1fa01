import explain_and_prune_vit
import pytest


@pytest.mark.slow
def test_it_is_explained_before_and_after_pruning(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["explain_and_prune_vit.py", "--steps", "3", "--output", str(tmp_path)])
    monkeypatch.setattr(explain_and_prune_vit, "SEARCHED", 6)
    found = explain_and_prune_vit.main()
    assert set(found) == {"dense", "pruned", "alike"} and -1 <= found["alike"] <= 1
    printed = capsys.readouterr().out
    assert "heads" in printed and "neurons" in printed and "samples" in printed
    for name in ("before.png", "after.png", "heads.png", "curve.png", "samples.png", "concept.png", "before.html"):
        assert (tmp_path / name).stat().st_size > 5000
