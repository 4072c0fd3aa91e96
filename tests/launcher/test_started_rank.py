"""A process that is started as a rank runs functions of this package alone."""

import pytest

from colonnade.launcher.cluster import ranks


@pytest.mark.parametrize("function", ["builtins:print", "colonnades.kernels:print"])
def test_functions_of_other_packages_are_refused(
    function: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "end_with_launcher", lambda: None)  # this process has none
    with pytest.raises(ValueError, match="a rank runs functions of colonnade alone"):
        ranks.run_as_rank(function, "{}")
    assert capsys.readouterr().out == ""
