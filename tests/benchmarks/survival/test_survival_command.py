from benchmarks.survival import __main__ as survival


def test_cannot_be_measured_where_torchft_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(survival, "why_not", lambda: "torchft is not installed")
    assert survival.main([]) == 2
    assert "Nothing was measured. torchft is not installed" in capsys.readouterr().err


def test_kills_are_shared_among_the_seeds():
    options = survival.parse(["--kills", "100", "--seeds", "3"])
    assert [survival.share(options, place) for place in range(3)] == [34, 33, 33]
