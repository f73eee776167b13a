"""A match against many entries at once: its answer is that of every pair by itself."""

from __future__ import annotations

import itertools
import random

import pytest
from pilotbed.frontend.config import DEFAULT_MATCH
from pilotbed.pool.expression import Expression
from pilotbed.pool.values import Ad, Expr, Value

#: What an attribute of either side may be, in forms that ClassAd, Python and an index could each take differently.
VALUES: tuple[Value, ...] = (
    "alpha", "ALPHA", "beta", "alpha,beta", "alpha beta", " gamma , Alpha ", "alpha,,beta", "", " ", ",", "a\tb",
    "a\nb", "a\\b", 'a"b', "ä", "Ä", "\u017f", "\u212a", "k", "S", "true", "5",
    0, 1, 5, -1, 2**40, 0.0, 1.0, 5.5, True, False,
    Expr('{ "alpha", "b,c" }'), Expr('{"BETA"}'), Expr("{ }"), Expr('{ 5, "alpha" }'), Expr('{ "alpha", error }'),
    Expr('{ TARGET.Other, "beta" }'), Expr("[ x = 1 ]"), Expr("error"), Expr("undefined", open=True),
    # A list that leads to itself ends HTCondor's library where a member of it is asked for (TARGET.A.x, 25.x).
    Expr("TARGET.B", open=True), Expr("MY.A + 1", open=True), Expr("A", open=True),
)  # fmt: skip
OPERANDS = (
    "MY.A", "TARGET.A", "A", "MY.B", "TARGET.B", "b", "true", "false", "undefined", "error", "5", "0", '"alpha"',
    '"a && b"', "MY.A is undefined", "MY.A == TARGET.A", "TARGET.B == MY.A", "MY.a =?= target.B", "TARGET.A =!= MY.B",
    "MY.A >= TARGET.B", "TARGET.A > 1", "A == B", "stringListMember(TARGET.A, MY.B)",
    "stringListIMember(TARGET.B, MY.A)", "stringListIMember(MY.A, TARGET.B)", 'stringListMember(TARGET.A, MY.A, ";")',
    "member(TARGET.A, MY.A)", "member(MY.B, TARGET.A)", "isList(MY.A)", "size(TARGET.A) > 4",
    'regexp("^al", TARGET.A)', "TARGET.A.x == 1", "(MY.A ?: TARGET.B) == 5", "MY.A + 1 == TARGET.B", "!MY.B",
    "toLower(MY.A) == toLower(TARGET.A)", '{ "x", "alpha" }[1] == TARGET.A',
)  # fmt: skip


def ads(chance: random.Random, count: int) -> list[Ad]:
    names = ("A", "B", "a")
    return [{name: chance.choice(VALUES) for name in chance.sample(names, chance.randint(0, 2))} for _ in range(count)]


def expression(chance: random.Random, depth: int = 3) -> str:
    if not depth or chance.random() < 0.2:
        return chance.choice(OPERANDS)
    one, two, three = (expression(chance, depth - 1) for _ in range(3))
    return chance.choice(
        (f"({one}) && {two}", f"{one} || ({two})", f"{one} || {two} && {three}", f"!({one})", f"({one})",
         f"ifThenElse({one}, {two}, {three})", f"{one} ? {two} : {three}", f"(({one}) && ({two})) || {three}")
    )  # fmt: skip


def pairs(match: Expression, mine: Ad, targets: list[Ad]) -> int:
    return sum(match(mine, target) << at for at, target in enumerate(targets))


@pytest.mark.parametrize("seed", range(150))
def test_many_at_once_are_what_each_pair_is(seed: int) -> None:
    chance = random.Random(seed)
    match, targets = Expression(expression(chance)), ads(chance, 25)
    against = match.against(targets)
    for mine in ads(chance, 12):
        assert against(mine) == pairs(match, mine, targets), (match.text, mine)


@pytest.mark.parametrize("text", [DEFAULT_MATCH, *OPERANDS])
def test_every_value_on_either_side(text: str) -> None:
    match = Expression(text)
    targets: list[Ad] = [{}, *({name: value} for name, value in itertools.product("AB", VALUES))]
    if "DESIRED_Sites" in text:
        targets = [{"GLIDEIN_Site" if name == "A" else name: one for name, one in target.items()} for target in targets]
    against = match.against(targets)
    for value in VALUES:
        mine = {"A": value, "B": value, "DESIRED_Sites": value}
        assert against(mine) == pairs(match, mine, targets), value


def test_what_was_found_is_kept_as_long_as_the_targets_are_the_same() -> None:
    match = Expression("TARGET.A >= MY.A")
    small, large = {"A": 1, "Other": 1}, {"A": 5}
    assert match.against([small, large])({"A": 3}) == 0b10
    evaluated: list[Ad] = []
    again = match.against([small | {"Other": 2}, large])
    again.truth = lambda mine: evaluated.append(mine) or pytest.fail("evaluated again")  # type: ignore[attr-defined]
    assert again({"A": 3}) == 0b10
    assert match.against([large, small])({"A": 3}) == 0b01
    assert match.against([small, {"A": 5.0}, {"A": True}])({"A": 1.0}) == pairs(
        match, {"A": 1.0}, [small, {"A": 5.0}, {"A": True}]
    )


def test_what_is_not_asked_for_again_is_forgotten() -> None:
    match = Expression("TARGET.A >= MY.A")
    for turn in range(5):
        against = match.against([{"A": 1}])
        for value in (turn, float("nan")):
            against({"A": value})
    assert len(match._last.found) == 2  # type: ignore[union-attr]


def test_a_time_is_not_kept() -> None:
    match = Expression("random(1.0) < MY.A")
    answers = {match.against([{}])({"A": 0.5}) for _ in range(64)}
    assert answers == {0, 1}
