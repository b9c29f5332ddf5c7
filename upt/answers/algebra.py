r"""Keys of formulas in symbols: sums and products in one order, 2x = 2\cdot x, x/2 = \frac{x}{2}, b+a = a+b.

A formula is a sum of terms {product of symbols: number}. Numbers are multiplied out and like terms are added, nothing
else is: 2(x+1) = 2x+2, but x(x+1) is not x^2+x, for a question may ask for either. Symbols are letters with their
subscripts, names of points and segments (AB), angles, functions, powers with symbols above, and sums in brackets that
are multiplied. Case counts: R and r are two radii.

What could be read in two ways, as a/bc, and all words, have no key here.
"""

import operator
import re
from decimal import Decimal
from fractions import Fraction
from string import ascii_lowercase

from upt.answers.closed_forms import ClosedForm, NotClosedForm, apply, parse, power, written
from upt.answers.latex import is_number, text_key, tokenize
from upt.answers.units import are_units, is_unit

MAX_EXPONENT = 1000
_GREEK = "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi omega"
_GREEK = {f"\\{name}" for name in (*_GREEK.split(), *_GREEK.title().split())}
_MARKS = {rf"\{name}" for name in "Delta angle triangle vec overrightarrow bar hat odot".split()}  # of a name
_FUNCTIONS = {f"\\{name}" for name in "sin cos tan cot sec csc arcsin arccos arctan ln log lg exp".split()}
_SYMBOLS = _GREEK | _MARKS | _FUNCTIONS
_OPERATORS = {*"+-*/^(", r"\frac", r"\sqrt", r"\pi"}
_WORDS = {name[1:] for name in _FUNCTIONS} | {"max", "gcd", "lcm", "sgn", "and", "by", "at", "an", "as", "all", "any"}
_DIFFERENTIAL = re.compile("d[a-z]$")  # dy/dx is no quotient of products
_CLEAR = re.compile(r"[A-Za-z]+(?:_\{[^{}]*\})?|[0-9]+|\([^()]*\)")

Number = Fraction | Decimal
Sum = dict[tuple[tuple[str, int], ...], Number]  # {((symbol, exponent), …): coefficient}


def algebra_key(tokens: list[str]) -> str | None:
    """Key of a formula with nothing but units behind it; None for what is no formula, or only a name."""
    letters = split_products(tokens)
    if not (any(is_number(token) or token in _OPERATORS for token in tokens) or _are_factors(tokens, letters)):
        return None
    if not _FUNCTIONS & {*letters}:
        letters = [token for token in letters if token != "°"]  # 90° - α
    value, tail = parse(_Algebra(letters)) or (None, [])
    if value is None or not are_units(tail):
        return None
    if not isinstance(value, dict):
        return written(value)
    key = _written(value)
    named = len(value) == 1 and key == next(iter(value))[0][0] and not set(key) & set("^(")
    return text_key(tokenize(key)) if named else key  # as the name by itself, which is text


def split_products(tokens: list[str]) -> list[str]:
    """The tokens with products that are written as one word, ab and xyz, taken apart; other words stay whole."""
    found = []
    for token in tokens:
        short = 2 <= len(token) <= 3 and token.isascii() and token.isalpha() and not token.isupper()
        word = set(token) & set("eiou") or token in _WORDS or is_unit(token) or _DIFFERENTIAL.match(token)
        found += token if short and not word else [token]
    return found


def _are_factors(tokens: list[str], letters: list[str]) -> bool:
    """True for ab, a b, abc and mgh; not for AB and ABC, which are names, nor for cat."""
    small = all((len(token) == 1 and token.islower()) or token in _GREEK for token in letters)
    words = [token for token in tokens if token.isalpha() and len(token) > 1]
    abc = all("a" not in word or len(word) == 2 or "".join(sorted(word)) in ascii_lowercase for word in words)
    return small and abc and len(letters) > 1 and (not words or len(tokens) == 1)


def _is_name(token: str) -> bool:
    return token.isascii() and token.isalpha() and (len(token) == 1 or token.isupper())


def _product(value: Number | Sum) -> tuple[tuple[tuple[str, int], ...], Number]:
    """A value as symbols and a coefficient: of several terms, the sum becomes a symbol whose first coefficient is 1."""
    if not isinstance(value, dict):
        return (), value
    (first, coefficient), *others = sorted(value.items(), key=_place)
    if not others:
        return first, coefficient
    monic = {symbols: apply(operator.truediv, c, coefficient) for symbols, c in value.items()}
    return ((f"({_written(monic)})", 1),), coefficient


def _place(term: tuple) -> tuple:
    return term[0] == (), [(symbol, -n) for symbol, n in term[0]]  # high powers first, what has no symbol last


def _written(value: Number | Sum) -> str:
    """A value so that it reads back as itself, where its numbers are rational."""
    if not isinstance(value, dict):
        return written(value)
    out = ""
    for symbols, coefficient in sorted(value.items(), key=_place):
        product = "*".join(symbol if n == 1 else f"{_base(symbol)}^{{{n}}}" for symbol, n in symbols)
        number = written(coefficient)
        signed = number if number[0] == "-" or not out else "+" + number
        if product and number in ("1", "-1"):
            signed = signed[:-1]
        out += f"{signed}{'*' * bool(product and signed not in ('', '+', '-'))}{product}"
    return out


def _base(text: str) -> str:
    """What a power is taken of, in brackets unless it is clear without."""
    return text if _CLEAR.fullmatch(text) else f"({text})"


class _Algebra(ClosedForm):
    """The descent over numbers and sums of symbols."""

    def apply(self, operation, a: Number | Sum, b: Number | Sum) -> Number | Sum:
        if not isinstance(a, dict) and not isinstance(b, dict):
            return apply(operation, a, b)
        if operation in (operator.add, operator.sub):
            terms = dict(a) if isinstance(a, dict) else {(): a}
            for symbols, coefficient in (b if isinstance(b, dict) else {(): b}).items():
                terms[symbols] = apply(operation, terms.get(symbols, Fraction(0)), coefficient)
            return _reduced(terms)
        if not isinstance(b, dict) or (not isinstance(a, dict) and operation is operator.mul):
            terms, factor = (a, b) if isinstance(a, dict) else (b, a)
            return _reduced({symbols: apply(operation, c, factor) for symbols, c in terms.items()})
        (left, c), (right, d) = _product(a), _product(b)
        exponents = dict(left)
        for symbol, n in right:
            exponents[symbol] = exponents.get(symbol, 0) + (n if operation is operator.mul else -n)
        return _term(exponents, apply(operation, c, d))

    def power(self, base: Number | Sum, exponent: Number | Sum) -> Number | Sum:
        if not isinstance(base, dict) and not isinstance(exponent, dict):
            return power(base, exponent)
        if not isinstance(exponent, Fraction):
            return {((f"{_base(_written(base))}^{{{_written(exponent)}}}", 1),): Fraction(1)}
        n, root = exponent.numerator, exponent.denominator
        if abs(n) > MAX_EXPONENT:
            raise NotClosedForm
        if root > 1:  # √x is a symbol
            return {((f"{_base(_written(base))}^{{1/{root}}}", n),): Fraction(1)}
        if n == 1:
            return base
        symbols, coefficient = _product(base)
        return _term({symbol: k * n for symbol, k in symbols}, power(coefficient, exponent))

    def joins(self) -> bool:
        token = self.peek()
        return super().joins() or token in _SYMBOLS or (_is_name(token) and not is_unit(token))

    def atom(self) -> Number | Sum:
        token = self.peek()
        name = self.symbol() if token in _SYMBOLS or _is_name(token) else None
        return super().atom() if name is None else {((name, 1),): Fraction(1)}

    def symbol(self) -> str:
        name = self.take(self.peek())
        if name in _MARKS and (name != r"\Delta" or _is_name(self.peek()) or self.peek() in _GREEK):
            braced = self.take("{")
            inner = self.take(self.peek())
            if not (_is_name(inner) or inner in _GREEK or is_number(inner)) or (braced and not self.take("}")):
                raise NotClosedForm
            name = f"{name}{{{inner}}}" if braced else f"{name} {inner}"
        if self.take("_"):
            name += f"_{{{self.subscript()}}}"
        while self.take("'"):
            name += "'"
        if name[:1] == "\\" and name.split("_")[0] in _FUNCTIONS:
            return self.function(name)
        if self.peek() == "(":
            single = self.position + 2 < len(self.tokens) and self.tokens[self.position + 2] == ")"
            if name == "f":
                return f"f({_written(self.group())})"
            if single:  # v(t) is a value, or a product
                raise NotClosedForm
        if name == "f" and self.peek() == "^":  # of a function, no power
            raise NotClosedForm
        return name

    def subscript(self) -> str:
        """What stands in the braces behind _, of plain tokens only."""
        inner, closed = [], self.take("{")
        while closed and self.peek() not in ("", "{", "}"):
            inner.append(self.take(self.peek()))
        if not inner or not self.take("}"):
            raise NotClosedForm
        return " ".join(inner)

    def function(self, name: str) -> str:
        """A function with its argument: a bracket, or one symbol or number; of sin 2x it is not clear where it ends."""
        if self.take("^"):
            name += f"^{{{_written(self.argument())}}}"
        bracketed = self.peek() in ("(", "{")
        argument = _written(self.atom()) + self.take("°")
        goes_on = self.joins() and self.peek() not in _FUNCTIONS
        if goes_on or self.peek() == "^" or (self.peek() == "/" and not bracketed):
            raise NotClosedForm
        return f"{name}({argument})"


def _term(exponents: dict[str, int], coefficient: Number) -> Number | Sum:
    symbols = tuple(sorted((symbol, n) for symbol, n in exponents.items() if n))
    if any(abs(n) > MAX_EXPONENT for _, n in symbols):
        raise NotClosedForm
    return _reduced({symbols: coefficient})


def _reduced(terms: Sum) -> Number | Sum:
    """Without terms that cancel; a number where no symbol is left."""
    terms = {symbols: c for symbols, c in terms.items() if c}
    return terms if set(terms) - {()} else terms.get((), Fraction(0))
