"""pilotbed-renew asks one MyProxy server after the other."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from pilotbed.factory import renew
from pilotbed.gridtools import ToolError
from test_absurd import pilot_proxy


@pytest.fixture
def renewal(tmp_path: Path) -> renew.Renewal:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("")
    (tmp_path / "old.pem").write_text(pilot_proxy())
    return renew.Renewal(("one", "two", "three"), {"pilot": "vo:/vo"}, 12, tmp_path / "cert.pem", tmp_path / "key.pem")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """MyProxy servers that were asked, and those that are away."""
    seen: dict[str, list[str]] = {"asked": [], "away": []}

    def run(command: Sequence[str | Path], _environment: Mapping[str, str | Path]) -> str:
        if command[0] == "myproxy-logon":
            server = str(command[command.index("-s") + 1])
            seen["asked"].append(server)
            if server in seen["away"]:
                raise ToolError(f"myproxy-logon: unable to connect to {server}")
        else:
            Path(command[command.index("-out") + 1]).write_text(pilot_proxy())
        return ""

    monkeypatch.setattr(renew, "run", run)
    return seen


@pytest.mark.parametrize(
    ("away", "tried"), [([], ["one"]), (["one"], ["one", "two"]), (["one", "two"], ["one", "two", "three"])]
)
def test_one_that_answers_is_enough(
    renewal: renew.Renewal, asked: dict[str, list[str]], tmp_path: Path, away: list[str], tried: list[str]
) -> None:
    asked["away"] = away
    assert renewal.renew(tmp_path / "old.pem", "pilot") == pilot_proxy()
    assert asked["asked"] == tried


def test_all_that_refused_are_named(renewal: renew.Renewal, asked: dict[str, list[str]], tmp_path: Path) -> None:
    asked["away"] = ["one", "two", "three"]
    with pytest.raises(ToolError, match=r"unable to connect to one; two: .* unable to connect to two; three: "):
        renewal.renew(tmp_path / "old.pem", "pilot")
