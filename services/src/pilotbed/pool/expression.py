"""Match expressions: ClassAd, as everywhere in the field; a Python expression from a file would be code."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .door import PoolError, classad
from .values import Ad, Expr, Value

#: Whether MY and TARGET match.
Match = Callable[[Ad, Ad], bool]


def against(match: Match, targets: Sequence[Ad]) -> Callable[[Ad], int]:
    """Return what tells for MY which of many ``targets`` match, as `Expression.against`; any ``match`` pair by pair."""
    if isinstance(match, Expression):
        return match.against(targets)
    return lambda my: sum(1 << at for at, target in enumerate(targets) if match(my, target))


class Expression:
    """A ClassAd expression over MY (the job) and TARGET (the entry).

    Raises:
        PoolError: it cannot be parsed.
    """

    def __init__(self, text: str) -> None:
        import classad2
        import htcondor2  # noqa: F401  # brings stringListIMember and the like; without it they evaluate to error

        self.text = text
        try:
            self._tree = classad2.ExprTree(text)
        except classad2.ClassAdException as error:
            raise PoolError(f"not a ClassAd expression: {text!r}: {error}") from error
        self._last: _Many | None = None

    def __str__(self) -> str:
        """Return it as ClassAd writes it."""
        return str(self._tree).strip()

    def __call__(self, my: Ad, target: Ad) -> bool:
        """Return whether it is true; undefined, an error or a number is no match."""
        # Value.Undefined and Value.Error are the integers 2 and 1, and so true in Python: only True itself counts.
        return self._tree.eval(classad(my), classad(target)) is True

    def against(self, targets: Sequence[Ad]) -> Callable[[Ad], int]:
        """Return what tells for MY which of many ``targets`` match, as a number: bit n stands for target n.

        The answer is that of every pair, and comes much sooner: what depends on one side is evaluated once a side, a
        membership or an equality is looked up, anything else is evaluated once for each pair of different values. What
        was found is kept for the next call, as long as the targets are the same.
        """
        many = _Many(self, targets)
        if self._last is not None and self._last.key == many.key:
            many.known = self._last.found
        self._last = many
        return many


#: ClassAd's words that are no attribute's name.
_WORDS = frozenset({"true", "false", "undefined", "error", "is", "isnt"})
#: What has not the same value twice, or looks at more than the attributes that are named.
_UNSTEADY = re.compile(
    r"(?i)\b(currenttime|time|random|daytime|abstime|formattime|getenv|eval|usermap\w*|parent|toplevel|root|self)\b"
    r"|\b(my|target)\b(?!\.)|[\['`@]|(?<![\w.])\.[a-z_]"
)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_NAME = re.compile(r"(?<![\w.])(?:(my|target)\.)?([a-z_]\w*)(?!\w*\()", re.IGNORECASE)
#: One attribute of each side, as an operand or an argument.
_SIDES = r"(my|target)\.(\w+)"
_MEMBER = re.compile(rf"(?i)(stringlistmember|stringlistimember|member)\({_SIDES},{_SIDES}\)")
_EQUAL = re.compile(rf"(?i){_SIDES} (==|is) {_SIDES}")
#: Strings of which member, equality and lists of strings have one notion, which is Python's, too.
_PLAIN = re.compile(r"[!#-+\--\[\]-~]+")
_LIST = re.compile(r'\s*\{\s*("[!#-\[\]-~]*"(\s*,\s*"[!#-\[\]-~]*")*)?\s*\}')


def _blank(text: str) -> str:
    """Return ``text`` with the contents of its strings blanked, as long as it was."""
    return _STRING.sub(lambda found: '"' + " " * (len(found[0]) - 2) + '"', text)


def _parts(text: str, separator: str) -> list[str]:
    """Return the parts of ``text`` between the separators that stand in no parentheses and no string."""
    blank, depth, start, parts = _blank(text), 0, 0, []
    for at, character in enumerate(blank):
        depth += (character in "({") - (character in ")}")
        if not depth and blank.startswith(separator, at) and at >= start:
            parts.append(text[start:at].strip())
            start = at + len(separator)
    return [*parts, text[start:].strip()]


def _enclosed(text: str) -> bool:
    """Whether the parenthesis that begins ``text`` is closed by its last character."""
    depth = 0
    for at, character in enumerate(_blank(text)):
        depth += (character == "(") - (character == ")")
        if not depth:
            return at == len(text) - 1
    return False


@dataclass(frozen=True)
class _Truth:
    """For which targets something is true, false, an error; for the rest it is undefined."""

    true: int = 0
    false: int = 0
    error: int = 0


#: Tells the truth of a part of an expression, for what MY has.
_Part = Callable[[Mapping[str, Value]], _Truth]


class _Names:
    """What an expression's part looks at: names of attributes, in lower case; one without a side is on both."""

    def __init__(self, text: str) -> None:
        sides: dict[str, set[str]] = {"my": set(), "target": set()}
        for side, name in _NAME.findall(_blank(text)):
            if side or name.lower() not in _WORDS:
                for one in [side.lower()] if side else sides:
                    sides[one].add(name.lower())
        self.my, self.target = (tuple(sorted(names)) for names in sides.values())


def _lower(ad: Ad) -> dict[str, Value]:
    return {name.lower(): value for name, value in ad.items()}


def _key(values: Mapping[str, Value], names: Sequence[str]) -> Hashable:
    # With the types: 1 and true are equal in Python, and not to a match.
    return tuple((type(value), value) for value in (values.get(name) for name in names))


def _steady(values: Mapping[str, Value], names: Sequence[str]) -> bool:
    """Whether nothing that is looked at is an expression that may look further."""
    found = [values.get(name) for name in names]
    return not any(isinstance(value, Expr) and not _LIST.fullmatch(value.text) for value in found)


class _Targets:
    """Targets, as one part of the expression sees them: those that are the same to it are one."""

    def __init__(self, targets: Sequence[Mapping[str, Value]], names: Sequence[str]) -> None:
        groups: dict[Hashable, tuple[dict[str, Value], int]] = {}
        for at, target in enumerate(targets):
            key = _key(target, names)
            seen, mask = groups.get(key) or ({name: target[name] for name in names if name in target}, 0)
            groups[key] = seen, mask | 1 << at
        self.groups = [(classad(seen), seen, mask) for seen, mask in groups.values()]


@dataclass
class _Leaf:
    """A part that is evaluated as it stands."""

    targets: _Targets
    names: _Names
    tree: Any
    index: _Index | None = None
    found: dict[Hashable, _Truth] = field(default_factory=dict)

    def truth(self, my: Mapping[str, Value]) -> _Truth:
        key = _key(my, self.names.my)
        if key not in self.found:
            self.found[key] = self._evaluate(my)
        return self.found[key]

    def _evaluate(self, my: Mapping[str, Value]) -> _Truth:
        true = false = error = 0
        groups = self.targets.groups
        if self.index is not None and (matching := self.index.lookup(my)) is not None:
            true, false, groups = matching, self.index.plain & ~matching, self.index.others
        mine = classad({name: my[name] for name in self.names.my if name in my}) if groups else None
        for target, _, mask in groups:
            value = self.tree.eval(mine, target)
            if value is True:
                true |= mask
            elif value is False:
                false |= mask
            elif int(value) == 1:  # classad2.Value.Error
                error |= mask
        return _Truth(true, false, error)


class _Index:
    """Targets by a plain string, for a membership or an equality; the ``others`` have to be evaluated."""

    def __init__(self, targets: _Targets, name: str, other: str, kind: str) -> None:
        self.other, self.kind = other, kind
        self.exact = kind in ("is", "stringlistmember")
        self.by_value: dict[str, int] = {}
        self.plain = 0
        self.others = []
        for group in targets.groups:
            _, seen, mask = group
            value = seen.get(name)
            if isinstance(value, str) and _PLAIN.fullmatch(value):
                word = value if self.exact else value.lower()
                self.by_value[word] = self.by_value.get(word, 0) | mask
                self.plain |= mask
            else:
                self.others.append(group)

    def lookup(self, my: Mapping[str, Value]) -> int | None:
        """Return which plain targets match; None if they have to be evaluated, too."""
        value = my.get(self.other)
        if self.kind == "member" and isinstance(value, Expr) and _LIST.fullmatch(value.text):
            words = [word[1:-1] for word in _STRING.findall(value.text.lower())]
        elif self.kind == "member" or not isinstance(value, str) or not (value.isascii() and value.isprintable()):
            return None
        else:
            text = value if self.exact else value.lower()
            if self.kind.startswith("stringlist"):
                words = re.split("[, ]+", text)
            elif _PLAIN.fullmatch(text):
                words = [text]
            else:
                return None
        found = 0
        for word in words:
            if mask := self.by_value.get(word):
                found |= mask
        return found


def _index(text: str, targets: _Targets) -> _Index | None:
    """Return an index for a part of a form that has one."""
    if found := _MEMBER.fullmatch(text):
        kind, side, name, other_side, other = (word.lower() for word in found.groups())
    elif found := _EQUAL.fullmatch(text):
        side, name, kind, other_side, other = (word.lower() for word in found.groups())
        if side == "my":
            side, name, other_side, other = other_side, other, side, name
    else:
        return None
    return _Index(targets, name, other, kind) if (side, other_side) == ("target", "my") else None


class _Many:
    """An expression and many targets."""

    def __init__(self, expression: Expression, targets: Sequence[Ad]) -> None:
        self.expression, self.plain_targets = expression, list(targets)
        text = str(expression)
        self.names = _Names(text)
        self.targets = [_lower(target) for target in targets]
        self.all = (1 << len(targets)) - 1
        #: Targets that have to be evaluated one by one.
        self.odd = self.all if _UNSTEADY.search(_blank(text)) else 0
        for at, target in enumerate(self.targets):
            if not _steady(target, self.names.target):
                self.odd |= 1 << at
        self.key = [_key(target, self.names.target) for target in self.targets]
        #: Answers of the call before, and of this one; what is not asked for again is forgotten.
        self.known: dict[Hashable, int] = {}
        self.found: dict[Hashable, int] = {}

    @cached_property
    def truth(self) -> _Part:
        """What tells the truth of the whole."""
        return self._compile(str(self.expression), exactly=True)

    def __call__(self, my: Ad) -> int:
        mine = _lower(my)
        if self.odd == self.all or not _steady(mine, self.names.my):
            return self._one_by_one(my, self.all)
        key = _key(mine, self.names.my)
        if key not in self.found:
            known = self.known.get(key)
            self.found[key] = self.truth(mine).true & self.all & ~self.odd if known is None else known
        return self.found[key] | (self._one_by_one(my, self.odd) if self.odd else 0)

    def _one_by_one(self, my: Ad, which: int) -> int:
        return sum(1 << at for at, target in enumerate(self.plain_targets)
                   if which >> at & 1 and self.expression(my, target))  # fmt: skip

    def _compile(self, text: str, *, exactly: bool = False) -> _Part:
        """Return what tells the truth of ``text``: as an operand, or ``exactly``, where a number is not true."""
        if len(_parts(text, "?")) == 1:
            for separator, join in (("||", _either), ("&&", _both)):
                parts = _parts(text, separator)
                if parts[1:]:
                    operands = [self._compile(part) for part in parts]
                    return lambda my: join(operands, my, self.all)
            if text.startswith("(") and _enclosed(text):
                return self._compile(text[1:-1].strip(), exactly=exactly)
            if text.startswith("!(") and _enclosed(text[1:]):
                operand = self._compile(text[2:-1].strip())
                return lambda my: _not(operand(my))
            if text.lower().startswith("ifthenelse(") and _enclosed(text[len("ifthenelse") :]):
                arguments = _parts(text[len("ifthenelse(") : -1], ",")
                if len(arguments) == 3:
                    condition = self._compile(arguments[0])
                    then, otherwise = (self._compile(one, exactly=exactly) for one in arguments[1:])
                    return lambda my: _if(condition(my), then, otherwise, my, self.all)
        import classad2

        names = _Names(text)
        targets = _Targets(self.targets, names.target)
        tree = classad2.ExprTree(f"({text}) is true" if exactly else f"({text}) && true")
        return _Leaf(targets, names, tree, _index(text, targets)).truth


def _both(operands: Sequence[_Part], my: Mapping[str, Value], everywhere: int) -> _Truth:
    """ClassAd's &&: the first that is false or an error decides, and undefined only where nothing later does."""
    found = _Truth(true=everywhere)
    for operand in operands:
        one = operand(my)
        open_ = everywhere & ~(found.false | found.error)
        found = _Truth(found.true & one.true, found.false | open_ & one.false, found.error | open_ & one.error)
        if not everywhere & ~(found.false | found.error):
            break
    return found


def _either(operands: Sequence[_Part], my: Mapping[str, Value], everywhere: int) -> _Truth:
    """ClassAd's ||: it is false where all are, which is && of what they are not."""

    def negated(operand: _Part) -> _Part:
        return lambda my: _not(operand(my))

    return _not(_both([negated(operand) for operand in operands], my, everywhere))


def _not(one: _Truth) -> _Truth:
    return _Truth(one.false, one.true, one.error)


def _if(condition: _Truth, then: _Part, otherwise: _Part, my: Mapping[str, Value], everywhere: int) -> _Truth:
    nothing = _Truth()
    yes, no = condition.true & everywhere, condition.false & everywhere
    one, other = then(my) if yes else nothing, otherwise(my) if no else nothing
    return _Truth(
        yes & one.true | no & other.true, yes & one.false | no & other.false,
        condition.error | yes & one.error | no & other.error,
    )  # fmt: skip
