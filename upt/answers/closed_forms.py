"""Exact values of closed forms: sums, products and powers of numbers, fractions, roots and π, from LaTeX tokens.

A value is a fraction as long as it is rational, else a decimal of 90 digits. Everything is bounded in size and depth,
and nothing is evaluated but by the descent below, so hostile text costs little and can't run.
"""

import operator
from decimal import Context, Decimal, localcontext
from fractions import Fraction

from upt.answers.latex import is_number
from upt.answers.units import are_units, is_unit

MAX_DEPTH = 30  # nesting of lists, brackets, fractions and roots
MAX_DIGITS = 1000  # of a plain number that is reduced; 1e1000 is the largest power of ten
MAX_BITS = 4096  # numerator and denominator of every intermediate fraction

_PI = Decimal("3.141592653589793238462643383279502884197169399375105820974944592307816406286208998628034825")
_CONTEXT = Context(prec=90)
Number = Fraction | Decimal  # exact while rational


class NotClosedForm(ArithmeticError):
    """The tokens are no number, or one too large to compute with."""


def _checked(value: Number) -> Number:
    """Bound a result, and turn an approximation back into the fraction it stands for.

    Decimals carry 90 digits and lie within 1e±25, so their error is far below 1e-50. A number that close to a fraction
    with a denominator of 12 digits is that fraction: an irrational one comes so close with a probability of 1e-25.
    """
    if isinstance(value, Decimal):
        if not -25 <= value.adjusted() < 25 and abs(value) > Decimal("1e-50"):
            raise NotClosedForm
        nearest = Fraction(value).limit_denominator(10**12)
        return nearest if abs(_decimal(nearest) - value) < Decimal("1e-50") else value
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise NotClosedForm
    return value


def _decimal(value: Number) -> Decimal:
    return Decimal(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def apply(operation, a: Number, b: Number) -> Number:
    exact = isinstance(a, Fraction) and isinstance(b, Fraction)
    return _checked(operation(a, b) if exact else operation(_decimal(a), _decimal(b)))


def _literal(token: str) -> Fraction:
    """Value of 12, 1.5, .5 or 1e3. The exponent is bounded first: Fraction("1e999999999") would build the integer."""
    mantissa, _, exponent = token.lower().partition("e")
    if abs(int(exponent or 0)) > MAX_DIGITS:
        raise NotClosedForm
    return _checked(Fraction(mantissa) * Fraction(10) ** int(exponent or 0))


def power(base: Number, exponent: Number) -> Number:
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) if isinstance(base, Fraction) else 4
    if isinstance(exponent, Decimal) or (base == 0 and exponent <= 0) or abs(exponent.numerator) * bits > MAX_BITS:
        raise NotClosedForm
    power, k = _checked(base**exponent.numerator), exponent.denominator
    if k == 1 or power == 0:
        return power
    sign = -1 if power < 0 else 1
    if sign < 0 and k % 2 == 0:
        raise NotClosedForm
    power = _decimal(abs(power))
    return sign * _checked(power.sqrt() if k == 2 else power ** (1 / Decimal(k)))  # the real root


class ClosedForm:
    """Recursive descent: sums of products of powers of numbers, fractions, roots, π and brackets.

    `apply` and `power` compute; a subclass may know more values than numbers and more atoms.
    """

    apply, power = staticmethod(apply), staticmethod(power)

    def __init__(self, tokens: list[str]):
        self.tokens, self.position, self.depth = [*tokens, ""], 0, 0

    def peek(self) -> str:
        return self.tokens[self.position]

    def take(self, *wanted: str) -> str:
        """Step over the next token and return it if it is wanted; otherwise return ''."""
        token = self.peek() if self.peek() in wanted else ""
        self.position += bool(token)
        return token

    def group(self):
        closing = {"(": ")", "{": "}", "[": "]"}.get(self.take("(", "{", "["))
        self.depth += 1
        if closing is None or self.depth > MAX_DEPTH:
            raise NotClosedForm
        value = self.sum()
        if not self.take(closing):
            raise NotClosedForm
        self.depth -= 1
        return value

    def argument(self):
        if is_number(self.peek()) and len(self.peek()) > 1:  # \frac{1}{2}34: whose digits?
            raise NotClosedForm
        return self.atom()

    def sum(self):
        total = self.product()
        while sign := self.take("+", "-"):
            total = self.apply(operator.add if sign == "+" else operator.sub, total, self.product())
        return total

    def joins(self) -> bool:
        """Whether the next token may be a factor without a sign before it."""
        token = self.peek()
        return token in (r"\pi", r"\sqrt", r"\frac") or (token == "(" and not is_unit(self.tokens[self.position + 1]))

    def product(self):
        total, divided = self.signed_power(), False
        while (sign := self.take("*", "/")) or self.joins():
            if not sign and divided:  # 1/2π: is π below the line?
                raise NotClosedForm
            divided = sign == "/"
            total = self.apply(operator.truediv if divided else operator.mul, total, self.signed_power())
        return total

    def signed_power(self):
        sign = -1 if self.take("+", "-") == "-" else 1
        base = self.atom()
        if self.take("^"):
            base = self.power(base, self.argument())  # of a^b^c a second ^ is left over, and it stays text
        return base if sign > 0 else self.apply(operator.mul, Fraction(-1), base)

    def atom(self):
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
            raise NotClosedForm
        if token == r"\frac":
            value = self.apply(operator.truediv, self.argument(), self.argument())
        else:
            index = self.group() if self.peek() == "[" else Fraction(2)
            value = self.power(self.argument(), self.apply(operator.truediv, Fraction(1), index))
        self.depth -= 1
        return value


def parse(form: ClosedForm):
    """Value of the longest form that its tokens begin with and the tokens behind it; None if they begin with none."""
    try:
        with localcontext(_CONTEXT):
            value = form.sum()
    except (ArithmeticError, RecursionError):  # too large, x/0, √-1, or no number at all
        return None
    return value, form.tokens[form.position : -1]


def value_of(tokens: list[str], rest: str | None = None) -> Number | None:
    """Value of a number or closed form. What follows it must begin with `rest`; None: nothing may follow."""
    value, tail = parse(ClosedForm(tokens)) or (None, [])
    return value if not tail or tail[0] == rest else None


def number_key(tokens: list[str], letters: bool = False) -> str | None:
    """Key of a number or closed form with nothing but units behind it, else None; `letters` as in are_units."""
    value, tail = parse(ClosedForm(tokens)) or (None, [])
    return None if value is None or not are_units(tail, letters) else written(value)


def unit_of(tokens: list[str]) -> str:
    """What follows the number that the tokens begin with, '' where there is neither."""
    return " ".join((parse(ClosedForm(tokens)) or (None, []))[1])


def written(value: Number) -> str:
    """A fraction as it is, any other value to 12 significant digits."""
    if isinstance(value, Fraction):
        return str(value)
    digits = format(value, ".12g")
    return digits if "." in digits else digits + "."  # 123456789012. is no integer
