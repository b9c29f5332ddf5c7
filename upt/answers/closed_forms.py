"""Exact values of closed forms: sums, products and powers of numbers, fractions, roots and π, from LaTeX tokens.

A value is a fraction as long as it is rational, else a decimal of 90 digits. Everything is bounded in size and depth,
and nothing is evaluated but by the descent below, so hostile text costs little and can't run.
"""

import operator
import re
from decimal import Context, Decimal, localcontext
from fractions import Fraction

MAX_DEPTH = 30  # nesting of lists, brackets, fractions and roots
MAX_DIGITS = 1000  # of a plain number that is reduced; 1e1000 is the largest power of ten
MAX_BITS = 4096  # numerator and denominator of every intermediate fraction

_PI = Decimal("3.141592653589793238462643383279502884197169399375105820974944592307816406286208998628034825")
_UNIT = (
    r"(?i:(?:(?:square|sq|cubic|cu) ?)?(?:%|°(?: [cf])?|percent|deg(?:ree)?s?|rad(?:ian)?s?|units?|[mcdk]?m|[mk]?g|"
    r"[mc]?l|(?:centi|milli|kilo)?met(?:er|re)s?|in(?:ch(?:es)?)?|ft|foot|feet|yd|yards?|mi|miles?|(?:kilo)?grams?|lbs?|"
    r"pounds?|oz|ounces?|ton(?:ne)?s?|lit(?:er|re)s?|gallons?|s|secs?|seconds?|mins?|minutes?|h|hrs?|hours?|days?|weeks?|"
    r"months?|years?|ms|mph|km?ph|n|newtons?|j|joules?|k?w|watts?|v|volts?|amps?|ohms?|k?hz|k?pa|mol|dollars?|usd|cents?|"
    r"euros?|yuan|yen|people|students|ways|times|pieces|sides)(?:(?: \^)? (?:- )?[1-4])?(?: squared| cubed)?)"
)
_UNITS = re.compile(rf"{_UNIT}(?: (?:(?:/|\*|per) )?{_UNIT})*")
_CONTEXT = Context(prec=90)
_Number = Fraction | Decimal  # exact while rational


def is_number(token: str) -> bool:
    return token[:1] in tuple("0123456789") or (token[:1] == "." and len(token) > 1)


class _NotClosedForm(ArithmeticError):
    """The tokens are no number, or one too large to compute with."""


def _checked(value: _Number) -> _Number:
    """Bound a result, and turn an approximation back into the fraction it stands for.

    Decimals carry 90 digits and lie within 1e±25, so their error is far below 1e-50. A number that close to a fraction
    with a denominator of 12 digits is that fraction: an irrational one comes so close with a probability of 1e-25.
    """
    if isinstance(value, Decimal):
        if not -25 <= value.adjusted() < 25 and abs(value) > Decimal("1e-50"):
            raise _NotClosedForm
        nearest = Fraction(value).limit_denominator(10**12)
        return nearest if abs(_decimal(nearest) - value) < Decimal("1e-50") else value
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _NotClosedForm
    return value


def _decimal(value: _Number) -> Decimal:
    return Decimal(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _apply(operation, a: _Number, b: _Number) -> _Number:
    exact = isinstance(a, Fraction) and isinstance(b, Fraction)
    return _checked(operation(a, b) if exact else operation(_decimal(a), _decimal(b)))


def _literal(token: str) -> Fraction:
    """Value of 12, 1.5, .5 or 1e3. The exponent is bounded first: Fraction("1e999999999") would build the integer."""
    mantissa, _, exponent = token.lower().partition("e")
    if abs(int(exponent or 0)) > MAX_DIGITS:
        raise _NotClosedForm
    return _checked(Fraction(mantissa) * Fraction(10) ** int(exponent or 0))


def _power(base: _Number, exponent: _Number) -> _Number:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) if isinstance(base, Fraction) else 4
    if isinstance(exponent, Decimal) or (base == 0 and exponent <= 0) or abs(exponent.numerator) * bits > MAX_BITS:
        raise _NotClosedForm
    power, k = _checked(base**exponent.numerator), exponent.denominator
    if k == 1 or power == 0:
        return power
    sign = -1 if power < 0 else 1
    if sign < 0 and k % 2 == 0:
        raise _NotClosedForm
    power = _decimal(abs(power))
    return sign * _checked(power.sqrt() if k == 2 else power ** (1 / Decimal(k)))  # the real root


class _ClosedForm:
    """Recursive descent: sums of products of powers of numbers, fractions, roots, π and brackets."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.position, self.depth = [*tokens, ""], 0, 0

    def peek(self) -> str:
        return self.tokens[self.position]

    def take(self, *wanted: str) -> str:
        """Step over the next token and return it if it is wanted; otherwise return ''."""
        token = self.peek() if self.peek() in wanted else ""
        self.position += bool(token)
        return token

    def group(self) -> _Number:
        closing = {"(": ")", "{": "}", "[": "]"}.get(self.take("(", "{", "["))
        self.depth += 1
        if closing is None or self.depth > MAX_DEPTH:
            raise _NotClosedForm
        value = self.sum()
        if not self.take(closing):
            raise _NotClosedForm
        self.depth -= 1
        return value

    def argument(self) -> _Number:
        if is_number(self.peek()) and len(self.peek()) > 1:  # \frac{1}{2}34: whose digits?
            raise _NotClosedForm
        return self.atom()

    def sum(self) -> _Number:
        total = self.product()
        while sign := self.take("+", "-"):
            total = _apply(operator.add if sign == "+" else operator.sub, total, self.product())
        return total

    def product(self) -> _Number:
        total = self.signed_power()
        while (sign := self.take("*", "/")) or self.peek() in (r"\pi", r"\sqrt", r"\frac", "("):
            total = _apply(operator.truediv if sign == "/" else operator.mul, total, self.signed_power())
        return total

    def signed_power(self) -> _Number:
        sign = -1 if self.take("+", "-") == "-" else 1
        base = self.atom()
        if self.take("^"):
            base = _power(base, self.argument())  # of a^b^c a second ^ is left over, and it stays text: readers differ
        return sign * base

    def atom(self) -> _Number:
        token = self.peek()
        if token in ("(", "{"):
            return self.group()
        self.position += 1
        if is_number(token):
            return _literal(token)
        if token == r"\pi":
            return _PI
        self.depth += 1  # \sqrt\sqrt\sqrt…
        if token not in (r"\frac", r"\sqrt") or self.depth > MAX_DEPTH:
            raise _NotClosedForm
        if token == r"\frac":
            value = _apply(operator.truediv, self.argument(), self.argument())
        else:
            index = self.group() if self.peek() == "[" else Fraction(2)
            value = _power(self.argument(), _apply(operator.truediv, Fraction(1), index))
        self.depth -= 1
        return value


def leading_value(tokens: list[str]) -> tuple[Fraction | Decimal | None, list[str]]:
    """Value of the longest closed form that the tokens begin with, None if they begin with none, and the rest."""
    form = _ClosedForm(tokens)
    try:
        with localcontext(_CONTEXT):
            value = form.sum()
    except (ArithmeticError, RecursionError):  # too large, x/0, √-1, or no number at all
        return None, tokens
    return value, tokens[form.position :]


def number_key(tokens: list[str]) -> str | None:
    """Key of a number or closed form with nothing but units behind it, else None."""
    value, tail = leading_value(tokens)
    if value is None or len(tail) > 20:
        return None
    if tail and not _UNITS.fullmatch(" ".join(token for token in tail if token not in "{}().")):
        return None
    if isinstance(value, Fraction):
        return str(value)
    digits = format(value, ".12g")
    return digits if "." in digits else digits + "."  # 123456789012. is no integer
