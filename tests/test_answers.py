r"""Answers: every rule of the vote key, by cases that a person can check."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

from upt.answers import Grade, answer_key, extract_answer, grade, is_correct, is_well_formed, vote_key
from upt.answers.verifier import verifier

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------------------------------------ extraction


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed {7}.", "7"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} cm", r"\frac{1}{2}"),
        (r"\boxed{\frac{1}{2}}, no, \boxed{\frac{3}{4}}", r"\frac{3}{4}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),  # escaped braces don't count
        (r"\boxed{\{1}", r"\{1"),
        (r"\boxed{5} and then \boxed{\frac{1}{2", "5"),  # cut off: the last balanced one
        (r"{ \boxed{5} and }} \boxed{", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{a \boxed{5}", "5"),
        ("<answer> 7 </answer>", "7"),
        ("<answer>1</answer> <ANSWER>2</ANSWER> <answer>3", "2"),
        (r"<answer>8</answer> \boxed{9} <answer>10</answer>", "9"),  # a box wins
        (r"<answer>8</answer> \boxed{9", "8"),
        ("the answer is 7", None),
        (r"\boxed{}", None),
        (r"\boxed{1} \boxed{ }", None),  # the last one counts, and it is empty
        ("<answer></answer>", None),
        ("", None),
        (None, None),
        (7, None),
        (b"\\boxed{7}", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer
    if answer is None:
        assert vote_key(text) is None


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>a</think>\\boxed{1}", True),
        ("<think>a\nb</think>\nso\n\\boxed{1}\n.", True),
        ("<think></think>\\boxed{}", True),
        ("<think>\\boxed{1}</think> 1", False),
        (" <think>a</think>\\boxed{1}", False),
        ("<think>a\\boxed{1}", False),
        ("<think>a</think>\\boxed{1", False),
        ("a</think>\\boxed{1}", False),
        ("<think></think", False),
        (None, False),
    ],
)
def test_is_well_formed(text, expected):
    assert is_well_formed(text) is expected
    if isinstance(text, str):
        assert expected == bool(re.fullmatch(r"<think>.*</think>.*\\boxed\{.*\}.*", text, re.DOTALL))


# ------------------------------------------------------------------------------------------------ keys

CLASSES = {
    # exact fractions
    "7": [
        "7", "$7$", "7.", "7.0", "07", "+7", r"\text{7}", r"\mathbf{7}", "７", r"\frac{14}{2}", "(7)", "\x007", r"\$7",
        "**7**",
    ],
    "-5": ["-5", "−5", "-5.00", r"-\frac{10}{2}", r"\frac{-10}{2}", "- 5"],
    "0": ["0", "-0", "0.0", "0/5", r"\pi-\pi", r"\sqrt{2}-\sqrt2"],
    "1/2": [
        "1/2", "0.5", ".5", r"\frac12", r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac12", r"\frac1{2}", r"\frac{1}2",
        r"\frac 1 2", r"\displaystyle\frac{1}{2}", r"\left(\frac{1}{2}\right)", "½", "2/4", "1⁄2", r"$\boxed{\frac12}$",
        "2^{-1}", r"\( \frac{1}{2} \)", "<answer>1/2</answer>", "\x0crac{1}{2}",
    ],
    "3/2": ["3/2", "1.5", r"1\frac{1}{2}", r"1\frac12", "1 1/2", "1½", r"1 \frac { 1 } { 2 }"],
    "-3/2": ["-3/2", r"-1\frac12", r"-1 \frac{1}{2}", "-1 1/2"],
    "1000": [
        "1000", "1,000", "1{,}000", r"1\,000", "1e3", "10^3", r"10^{3}", r"1.0\times 10^3", "1×10^{3}", "10**3",
        "2*500",
    ],
    "2000001/2": ["1,000,000.50", "1000000.5"],
    "3/1000": ["0.003", r"3\times10^{-3}", r"3 \cdot 10^-3", "3e-3"],
    "72": ["2^{3}3^{2}", r"2^3 \cdot 3^2", "72"],
    # units, percent, degrees
    "50": [
        "50", "50%", "50 %", r"50\circ", r"y = 50 \%", "50" + " " * 3000 + "degrees", r"50\%",
        "50度", "50 percent", "50^\\circ", "50°", r"50^{\circ}", r"50\degree", "50 degrees", "50º",
    ],
    "12": [
        "12 square units", "12 cm", "12cm", r"12\text{ cm}", r"12\mathrm{~cm}^{2}", "12 cm^2", "12 cm²", "12 m/s",
        "12 m/s^2", "12 kilometers per hour", "$12", r"\$12", "12 dollars", "12 sq. cm", "12{inches}",
        r"12\ \text{meters}", "12 °C", "12 (cm)", "12元", "12厘米", "12 平方厘米", "12cm2", "12 (cm^2)", "12 km/h",
        r"12\text{ m}", r"12\,\mathrm{m}^2", r"12\text{ N}", r"12\text{ m/s}", "12 g/cm^3", "12 yd", "12 in.",
        "12 L/min", "12 mg", "12 sq cm", "12 (square inches)", r"12\text{ h}",
    ],
    # names in front
    "145": [
        "145", "x = 145", r"\angle ABC = 145^\circ", r"m\angle A=145°", "f(x) = 145", "x_1 = 145", r"\theta=145",
        "AB=145 cm", r"\angle 1 = 145°", "f(2)=145", "f(-2) = 145", "P(X=2)=145", "145 = x", r"\approx 145", "≈145",
        "about 145", "约145", r"\therefore x = 145", "a_{10} = 145", "So x = 145", r"\sin A = 145", r"\\frac{290}{2}",
        "The area is 145", "Area: 145", "面积为145", "145.", "x is 145", "答案：145", "答案是145。",
        r"\text{Area} = 145", "x = y = 145", "The answer is 145.", "100+45 = 145", r"x \approx 145",
    ],
    # roots and π
    "2": [r"\sqrt{4}", r"\sqrt[3]{8}", r"\sqrt{2}\sqrt{2}", r"\sqrt2^2", "8^{1/3}", "4^{0.5}", r"\frac{2\pi}{\pi}"],
    "-1": [r"(1+\sqrt{2})(1-\sqrt{2})", r"\sqrt[3]{-1}"],
    "1": [r"\sqrt{3+2\sqrt{2}}-\sqrt{2}", r"\frac{\sqrt{12}}{2\sqrt{3}}", r"(\sqrt{2}+\sqrt{3})^2-2\sqrt{6}-4"],
    "7/3": [
        r"2\frac{1}{3}", r"2\,\frac{1}{3}", r"2\ \frac13", r"2~\frac13", r"2\;\frac{1}{3}", r"2$\frac{1}{3}$",
        "2 1/3", "2 1/3.",
    ],
    "300000000": ["3x10^8", "3 x 10^8", r"3\times10^8", "3×10⁸", "3e8", "300,000,000", "300,000,000 m/s"],
    "1/1000": ["10⁻³", "10^{-3}", "0.001", r"10^{-3}\text{ A}", "10^-3 kg", r"10^{-3}\ \mathrm{V}"],
    "1.41421356237": [
        r"\sqrt2", r"\sqrt{2}", "√2", "√(2)", "sqrt(2)", "2^{1/2}", "2^(1/2)", r"\frac{2}{\sqrt{2}}", r"2^\frac12",
        r"\sqrt{2} \approx 1.41",
    ],
    "3.46410161514": [
        r"2\sqrt{3}", r"\sqrt{12}", r"\sqrt12", r"\frac{6}{\sqrt3}", r"2\cdot 3^{1/2}", r"2\sqrt{3}\text{ cm}",
    ],
    "0.707106781187": [
        r"\frac{\sqrt{2}}{2}", r"1/\sqrt{2}", r"\sqrt{\frac12}", r"\sqrt{0.5}", r"\frac1{\sqrt2}", "√2/2",
    ],
    "9.42477796077": [r"3\pi", "3π", "3 pi", r"\frac{6\pi}{2}", r"3 \times \pi", r"\pi+\pi+\pi"],
    "1.57079632679": [r"\pi/2", r"\frac{\pi}{2}", r"\frac\pi2", r"\frac{1}{2}\pi", r"0.5\pi"],
    "31.1769145362": [r"18\sqrt{3}", r"\frac{54}{\sqrt{3}}", r"6\sqrt{27}"],
    # lists, tuples, sets, intervals
    "(1, 1/2)": ["(1, 1/2)", "(1,0.5)", r"\left(1, \frac{1}{2}\right)", "(x, y) = (1, .5)", "(1;0.5)"],
    "(2, 1)": ["(2,1)", "( 2 , 1 )"],
    "{1, 2}": [r"\{1,2\}", r"\{2, 1\}", "{2,1}", r"\left\{ 1, 2.0 \right\}", r"\{1,2,2\}", r"x \in \{1,2\}"],
    "{2, 3}": [
        "2, 3", "3,2", "2; 3", "2、3", r"\{2, 3\}", "{3,2}", "x=2 or x=3", "2 and 3", "x = 3, x = 2", "x_1=2, x_2=3",
        "x₁=3，x₂=2", "x=2, 3", r"x=2\text{ or }x=3", "x=2或x=3", "2, and 3", "both 2 and 3", r"x \in \{2, 3\}",
        "2 cm and 3 cm", r"x=2 \quad\text{or}\quad x=3", r"x=3 \lor x=2", "either 2 or 3", r"x=2 \text{ or } 3",
    ],
    "{-2, 2}": [r"\pm 2", "±2", "x=±2", "2, -2", "x=-2 or x=2", r"x = \pm\sqrt{4}"],
    "(1, 2)": [
        "(1,2)", "x=1, y=2", "y=2, x=1", "(x,y)=(1,2)", "(y,x)=(2,1)", "x=1 and y=2",
        r"\begin{cases}x=1\\y=2\end{cases}", r"\begin{cases} x = 1, \\ y = 2 \end{cases}",
        r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right.", r"\{x=1, y=2\}",
    ],
    "{(1, 2), (3, 4)}": ["(1,2),(3,4)", "(3,4) and (1,2)", "x=1,y=2 or x=3,y=4", "(x,y)=(1,2) or (x,y)=(3,4)"],
    "2, 2": ["2, 2", "2 and 2"],
    "{1, 3, 4}": ["(1)(3)(4)", "①③④", "①、③、④", "(1), (3) and (4)"],  # statements
    "{-1, -2, 1, 2}": ["±1, ±2", r"\pm 1, \pm 2", "1, -1, 2, -2"],
    "b=2, k=3": ["k=3, b=2", "b=2, k=3", "b=2 and k=3"],
    "red, blue": ["red, blue", "Red, Blue."],  # words may be in order
    "black and white": ["white and black", "black and white", "White and Black"],
    "[1, 2)": ["[1,2)", r"\left[1, \frac{4}{2}\right)"],
    "(100, 200)": ["(100,200)", "(100, 200)"],
    # text
    "ABC": ["ABC", r"\text{ABC}", r"\mathrm{ABC}", "A B C", "ABC."],
    "only green": ["only green", "Only  Green.", r"\text{only green}", r"\textbf{Only green}"],
    "AB": ["AB", r"\overline{AB}"],
    r"\angle ABC": [r"\angle ABC", "∠ABC"],
    "B": ["B", "(B)", r"\text{(B)}", r"\textbf{B}"],
    # formulas
    "a^{2}+3*a*b": ["3ab+a^2", "3 a b + a^{2}", "3ab+a²", r"a^2+3\cdot b\cdot a", "a**2 + 3*b*a", "f(x)=a^2+3ba"],
    "5*x": ["5x", "5 x", r"5\cdot x", "x*5", r"5\times x", "2x+3x", "y=5x", r"\frac{10x}{2}", "(5x)", r"5x\text{ cm}"],
    "1/2*x": [r"\frac{x}{2}", "x/2", r"\frac12 x", "0.5x", ".5x", r"\frac{1}{2}\cdot x", "x/(2)", r"x \div 2"],
    "a+b": ["a+b", "b+a", "b + a", "(a+b)", "a+(b)", r"\left(b+a\right)"],
    "a*b": ["ab", "ba", r"a\cdot b", "a b", "b*a"],
    "x^{2}+2*x+1": ["x^2+2x+1", "1+2x+x^2", "x²+2x+1", "y = x^{2} + 2x + 1"],
    "1/2*a+1/2*b": [r"\frac{a+b}{2}", "(a+b)/2", r"\frac{1}{2}(b+a)", r"\frac{a}{2}+\frac{b}{2}", r"\frac{b}{2}+0.5a"],
    "(x+1)*(x-1)": ["(x+1)(x-1)", "(x-1)(x+1)", r"(x-1) \cdot (1+x)", "-(1-x)(x+1)"],
    "x*y^{-1}": [r"\frac{x}{y}", "x/y", "xy^{-1}", r"\frac{2x}{2y}"],
    "-x+2": ["2-x", "-x+2", "-(x-2)", "y=2-x"],
    "3.14159265359*r^{2}": [r"\pi r^2", "πr²", r"S=\pi r^2", r"r^2 \pi", r"\text{Area}=\pi r^{2}"],
    r"-\alpha+90": [r"90-\alpha", r"90^\circ-\alpha", "-α+90°", r"(90-\alpha)^\circ", r"\angle B = 90° - α"],
    r"2*\sin(x)+1": [r"1+2\sin x", r"2 \sin(x) + 1", r"2\sin{x}+1"],
    "AB+2*CD": ["AB+2CD", "2CD+AB", r"2 \cdot CD + AB", r"\overline{AB}+2\overline{CD}"],
    # relations
    r"3 \le x": [r"x \ge 3", "x>=3", "x ≥ 3", r"3 \leq x", "3<=x", r"x\geqslant 3"],
    "1 < x < 3": ["1<x<3", "3>x>1", r"1 \lt x \lt 3"],
    r"3 \ne x": ["x≠3", r"x \neq 3", "x != 3", r"3 \ne x"],
    "AB=CD": ["AB=CD", "CD = AB"],
    "5=x+y": ["x+y=5", "5=x+y", "y+x=5"],
    r"\begin{matrix}1 \\ -2\end{matrix}": [
        r"\begin{pmatrix}1\\-2\end{pmatrix}", r"\begin{bmatrix} 1.0 \\ -2 \\ \end{bmatrix}",
        r"\left(\begin{array}{c}1\\-2\end{array}\right)", r"\left[\begin{array}{c}1\\-2\end{array}\right]",
    ],
    r"10^{30}\sqrt{2}": [r"10^{30}\sqrt{2}", r"10^30\sqrt2"],  # beyond what is computed: text
    "1:2": ["1:2", "1 : 2"],
    "3:4": ["3:4", "3 : 4", "3：4", "3:4.", "3∶4"],
    r"(-\infty, 3) \cup (5, \infty)": [
        r"(-\infty,3)\cup(5,\infty)", r"(5,+\infty) \cup (-\infty,3)", "(-∞,3)∪(5,+∞)", 
        r"x\in(-\infty,3)\cup(5,\infty)",
    ],
    "(2, -3)": ["(2,-3)", "P(2,-3)", "点P(2，-3)", "P'(2, -3)"],
    r"\triangle ABC\sim\triangle DEF": [
        "△ABC∽△DEF", r"\triangle ABC \sim \triangle DEF", r"\triangle{ABC}\sim\triangle{DEF}",
    ],
    r"AB\parallel CD": [r"AB \parallel CD", "AB∥CD", "AB//CD"],
    "g*h*m": ["mgh", "m g h", r"m \cdot g \cdot h", "ghm"],
    r"\infty": [r"\infty", "∞", r"+\infty"],
}  # fmt: skip


@pytest.mark.parametrize("key", CLASSES)
def test_equivalence_class(key):
    assert {spelling: answer_key(spelling) for spelling in CLASSES[key]} == dict.fromkeys(CLASSES[key], key)
    for spelling in CLASSES[key]:
        assert "boxed" in spelling or vote_key(f"<think>hm</think> \\boxed{{{spelling}}}") == key


DIFFERENT = [  # in each list, no two mean the same
    ["1,00", "100"],
    ["1,0000", "10000"],
    ["1,000,00", "100000"],
    ["0^0", "1", "0"],
    ["1/3 = 0.33", "1/3", "0.33"],  # a false equation has no value
    [r"\frac{\sqrt{3}}12", r"\frac{\sqrt{3}}{12}", r"\frac{\sqrt{3}}{1}"],  # whose digits?
    ["2^3^2", "512", "64"],
    [r"10^{30}\sqrt{2}", r"10^{30}\sqrt{3}", "0"],
    ["50", "0.5", "50/10"],  # percent is a unit, not a factor
    ["ABC", "BCA", "CBA"],
    ["(1,2)", "(2,1)", "[1,2]", "[1,2)", r"\{1,2\}"],
    ["1", "-1", r"\pm 1", "x"],
    ["5", "5x", "x", "cm"],  # units are dropped behind a number only
    ["x^{2y}", "x^2y"],
    [r"\frac{a}{bc}", r"\frac{ab}{c}"],
    ["1 2", "12", "1, 2"],
    ["12,34", "1234", "1234,5"],
    [r"\sqrt{2}", "1.41421356237", "1.414"],  # a rounded decimal is that decimal
    ["1/0", "2/0", "0"],
    [r"\sqrt{-4}", "2", "-2"],
    ["2x+1", "2x-1", "2x"],
    # letters are no units
    ["2n-1", "2n-2", "2m-3", "2h", "2", "2n", "2m", "2g", "2L", "2V", "2s"],
    ["6s^2", "6s^3", "6s", "6", "6h^2"],
    ["2l+2w", "2l", "2w", "2lw", "2"],
    ["3 in 4", "3", "4", "3 in 5"],
    ["2mg", "2", "2m"],
    ["3CM", "3"],
    [r"\frac{1}{2}bh", r"\frac{1}{2}", r"\frac{1}{2}b"],
    [r"2\pi rh", r"2\pi r", r"2\pi"],
    ["5 ft 2 in", "5 ft", "5 ft 3 in", "5 ft 2"],
    ["2 hours 30 minutes", "30 hours 2 minutes", "2 hours", "2 hours and 30 minutes", "30 hours and 2 minutes"],
    ["5 dollars and 20 cents", "20 dollars and 5 cents", "5, 20"],
    # R and r are two radii
    ["(1)(2)(4)", "(2)(4)", "8", "(1)(4)"],
    [r"2\,\frac{1}{3}", r"\frac{2}{3}"],
    ["AB:CD=1:2", "CD:AB=1:2"],
    ["a:b=2:3", "b:a=2:3"],
    ["x>1 and x<3", "x>1 or x<3"],
    ["x=1 or y=2", "x=2 or y=1", "1, 2"],
    [r"p\land q", r"p\lor q", "p", "q"],
    ["either red or blue", "both red and blue"],
    ["x=1,2; y=3,4", "x=3,4; y=1,2", "x=1,3; y=2,4"],
    ["m_1=2, m_2=3", "m_1=3, m_2=2"],
    ["x_1=1, x_2=2, x_3=3", "x_1=3, x_2=2, x_3=1"],
    ["k=3, b=2", "k=2, b=3", "(2,3)"],
    [r"x\not=1", "x=1"],
    [r"x\not\in[1,3]", r"x\in[1,3]"],
    ["0,180", "180"],
    ["(-2,100)", "-2100", "(2,100)"],
    [r"(\sqrt2,100)", r"\sqrt{2100}"],
    [r"\frac{\Delta v}{\Delta t}", r"\frac{v}{t}"],
    [r"\frac{dy}{dx}", r"\frac{y}{x}"],
    [r"\ln x^2", r"(\ln x)^2"],
    [r"\cos\theta/2", r"\frac{\cos\theta}{2}"],
    [r"\vec a\times\vec b", r"\vec b\times\vec a", r"\vec a\cdot\vec b"],
    ["xy=6", "x=6", "y=7"],
    ["x y=6", "6"],
    ["AB CD = 6", "6"],
    ["sin x=1", "log x=1.0", "1", "max x = 1", "arcsin x=1"],
    ["sin x is 1", "half of x is 1", "x squared is 1", "x is 1"],
    ["不为0", "0", "不能为0", "下降为0", "上升为0"],
    ["false: 5", "5", "wrong: 5"],
    ["A(1,2), B(3,4)", "A(3,4), B(1,2)", "(1,2), (3,4)"],
    ["30°-60°-90°", "-120", "45°-45°-60°"],
    ["3~5", "3, 5", "-10~-5", "-15"],
    ["4/8/2020", "1/2/2020"],
    [r"(f\circ g)(x)", r"(g\circ f)(x)"],
    ["~p", "p"],
    ["1, 3, 5, ...", "1, 3, 5"],
    ["2.5...", "2.5"],
    ["f(2)", "f(3)", "2f", "3f"],
    ["v(t)", "vt"],
    ["5!=120", r"5 \ne 120"],
    ["a rat", "a tar"],
    ["y''", "y'", "y"],
    [r"5\text{ x}", "5"],
    [r"\sin 2x", r"x\sin 2"],
    [r"\begin{pmatrix}1\\pi\end{pmatrix}", r"\begin{pmatrix}1\pi\end{pmatrix}"],
    ["R>r", "r>R", "R<r<1"],
    ["R=r", "R", "r"],
    ["mgH", "mgh"],
    ["AA", "Aa", "aa"],
    [r"\frac{GMm}{R^2}", r"\frac{GMm}{r^2}"],
    ["2R", "2r"],
    ["R-r", "r-R", "0"],
    ["T^2", "t^2"],
    # relations
    ["AB=CD", "EF=CD", "CD"],
    ["AB=2CD", "EF=2CD", "2CD"],
    [r"\angle A=\angle B", r"\angle C=\angle B", r"\angle B"],
    [r"\angle A = 2\angle B", r"\angle C = 2\angle B"],
    ["a=2b", "c=2b"],
    ["x=2y", "z=2y", "y=2z"],
    ["y=x", "x", "y"],
    ["|x|=5", "5", "-5", "x^2=5", "2x=5", "-x=5", r"\sqrt{x}=5", r"\lfloor x\rfloor=5", r"\ln x=5"],
    [r"\sin x=1/2", "x=1/2"],
    ["x>3", "x<3", r"x \ge 3", r"x \ne 3", "3"],
    ["|x|<5", "x<5"],
    [r"AB\parallel CD", r"EF\parallel CD", r"AB \perp CD"],
    # matrices
    [
        r"\begin{pmatrix}1\\-2\end{pmatrix}",
        r"\begin{pmatrix}1-2\end{pmatrix}",
        r"\pmatrix{1\\-2}",
        r"\pmatrix{1-2}",
        "-1",
        r"\begin{vmatrix}1\\-2\end{vmatrix}",
        r"\begin{pmatrix}1&-2\end{pmatrix}",
        "(1,-2)",
    ],
    [
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        r"\begin{pmatrix}1&3\\2&4\end{pmatrix}",
        "1234",
        r"\begin{pmatrix}1&2&3&4\end{pmatrix}",
    ],
    # values of several unknowns
    ["x=1, y=2", "x=2, y=1", "1, 2"],
    ["x=1,y=2 or x=3,y=4", "x=1,y=4 or x=3,y=2", "1, 2, 3, 4"],
    ["a_1=2, a_2=3", "a_1=3, a_2=2"],
    [r"\angle 1=30°, \angle 2=60°", r"\angle 1=60°, \angle 2=30°"],
    ["red, blue", "blue, red"],
    ["A->B->C", "C->B->A"],
    # dashes that are no differences
    ["10-12", "-2", "11-13"],
    ["1-2-3", "1-3-2", "-4"],
    ["A-B-C", "A-C-B"],
    # formulas
    ["a-b", "b-a", "a+b", "ab", r"\frac{a}{b}", r"\frac{b}{a}"],
    ["x/2y", r"\frac{x}{2y}", r"\frac{xy}{2}"],
    [r"1/2\pi", r"\frac{\pi}{2}", r"\frac{1}{2\pi}"],
    ["x(x+1)", "x^2+x"],  # one of them may be what "factor" asks for
    ["(x+1)^2", "x^2+1", "(x-1)^2", "(x+1)^3", "x^2+2x+2"],
    ["2^n", "2n", "n^2", "2^{n+1}", "2^{2n}"],
    [r"\sqrt{x}", "x", "x^2", r"\sqrt{2x}", r"\sqrt{2}x"],
    ["f(2)", "2f", "f(3)", "g(2)"],
    ["3+4i", "3-4i", "4+3i"],
    [r"\sin 2x", r"2\sin x", r"\sin x", r"\cos 2x"],
    ["x_1", "x_2", "x", "x^2"],
    [r"\vec{a}+\vec{b}", "a+b", r"\vec{a}-\vec{b}"],
    ["cat", "act"],
    ["n!", "n"],
    ["5'", "5"],
    [r"0.\overline{3}", "0.3", "0.33"],
    ["x:y=2:3", "x:y=3:2"],
    ["H_2O", "H_2O_2", "CO_2"],
    ["9**9**9", "9^{9^9}", "9"],
    ["1" * 5000, "1" * 5001, "-" + "1" * 5000],
    ["9" * 100_000, "9" * 99_999 + "8"],
    ["a" * 3000 + "b", "a" * 3000 + "c"],
    [r"\sqrt{2}", r"\sqrt{2}+10^{-9}"],
    ["no", "yes", "not"],
]  # fmt: skip


@pytest.mark.parametrize("answers_", DIFFERENT)
def test_distinct(answers_):
    keys = [answer_key(answer) for answer in answers_]
    assert None not in keys and len(set(keys)) == len(keys), keys


def test_an_irrational_value_is_no_integer():
    """√(n²+1) agrees with n in all 12 digits; its key must still be another."""
    n = 123456789012
    assert answer_key(rf"\sqrt{{{n * n + 1}}}") == f"{n}." != answer_key(str(n))


@pytest.mark.parametrize(
    "nothing", ["", " ", ".", "...", "…", "$$", "\x00", "\ud800", r"\boxed{}", r"\text{}", None, [7], b"7", {}, True]
)
def test_nothing_is_an_abstention(nothing):
    assert answer_key(nothing) is None


def test_numbers_are_read_as_they_print():
    assert [answer_key(x) for x in (7, -7, 0.5, 0.1, 1e22)] == ["7", "-7", "1/2", "1/10", "1" + "0" * 22]


def test_integers_of_any_length_are_exact():
    nines = "9" * 6000
    assert answer_key("+00" + nines) == nines == answer_key(",".join(["999"] * 2000))
    assert answer_key("-" + nines) == "-" + nines
    assert answer_key("-" + "0" * 6000) == "0"


def test_random_fractions_have_one_key_in_every_spelling():
    rng = random.Random(0)
    for _ in range(300):
        n, d = rng.randint(-9999, 9999), rng.randint(1, 9999)
        sign, top, k = "-" if n < 0 else "", abs(n), rng.randint(1, 9)
        key = str(Fraction(n, d))
        spellings = [
            f"{n}/{d}", f"{sign}\\frac{{{top}}}{{{d}}}", f"\\frac{{{n}}}{{{d}}}", f"\\dfrac{{{n * k}}}{{{d * k}}}",
            f"${n}/{d}$",
            f"x = {n} / {d}", f"{n}/{d} cm", f"\\frac{{{n}\\sqrt{{2}}}}{{{d}\\sqrt2}}", f"\\frac{{{n}\\pi}}{{{d}\\pi}}",
        ]  # fmt: skip
        if top > d:
            spellings.append(f"{sign}{top // d}\\frac{{{top % d}}}{{{d}}}")
        assert {spelling: answer_key(spelling) for spelling in spellings} == dict.fromkeys(spellings, key)
        assert answer_key(key) == key
        assert answer_key(f"{n * 1000:,}.250") == answer_key(f"{n * 1000}.25") == str(Fraction(f"{n * 1000}.25"))


def test_random_surds_agree_with_their_value():
    """a√b + cπ by key against floating point, in spellings that compute it by different routes."""
    rng = random.Random(1)
    for _ in range(100):
        a, b, c = rng.randint(1, 30), rng.choice([2, 3, 5, 6, 7, 10, 11]), rng.randint(1, 30)
        spellings = [
            rf"{a}\sqrt{{{b}}}+{c}\pi",
            rf"{c}π + \sqrt{{{a * a * b}}}",
            rf"\frac{{{a * b}}}{{\sqrt{{{b}}}}}+{c}\pi",
        ]
        keys = {answer_key(spelling) for spelling in spellings}
        assert len(keys) == 1
        assert float(keys.pop()) == pytest.approx(a * b**0.5 + c * 3.141592653589793, rel=1e-11)


@pytest.mark.parametrize("key", [key for key in CLASSES if not re.search(r"\d\.\d{5}", key)])
def test_keys_are_their_own_keys(key):
    """But for decimals that stand for roots."""
    assert answer_key(key) == key


# ------------------------------------------------------------------------------------------------ choices

COLOURS = ["only green", "only blue", "either blue or red"]
NUMBERS = ["5", r"$\frac{7}{2}$", "9 cm", r"2\sqrt{3}"]


@pytest.mark.parametrize(
    "answer, choices, letter",
    [
        ("B", COLOURS, "B"),
        ("b", COLOURS, "B"),
        ("(b)", COLOURS, "B"),
        ("[B]", COLOURS, "B"),
        ("B.", COLOURS, "B"),
        ("B)", COLOURS, "B"),
        (r"\text{B}", COLOURS, "B"),
        (r"\textbf{(B)}", COLOURS, "B"),
        ("Option B", COLOURS, "B"),
        ("The answer is (B)", COLOURS, "B"),
        ("the option B", COLOURS, "B"),
        ("B. only blue", COLOURS, "B"),
        ("(B) whatever", COLOURS, "B"),
        ("B: only blue", COLOURS, "B"),
        (r"\text{(B) } \frac{7}{2}", NUMBERS, "B"),
        ("B.5", NUMBERS, "B"),
        ("only blue", COLOURS, "B"),
        (r"\text{Only  Blue.}", COLOURS, "B"),
        ("7/2", NUMBERS, "B"),
        # letter and text
        ("B (7/2)", NUMBERS, "B"),
        ("7/2 (B)", NUMBERS, "B"),
        ("B 3.5", NUMBERS, "B"),
        ("C - 9 cm", NUMBERS, "C"),
        ("C, 9 cm", NUMBERS, "C"),
        ("C = 9cm", NUMBERS, "C"),
        ("C、9 cm", NUMBERS, "C"),
        ("only blue (B)", COLOURS, "B"),
        ("B only blue", COLOURS, "B"),
        ("B (because it is)", COLOURS, "B"),
        ("B (only green)", COLOURS, None),  # letter and text speak for two options
        ("B only green", COLOURS, None),
        ("only green (B)", COLOURS, None),
        ("B 9 cm", NUMBERS, None),
        # around the letter
        ('"B"', COLOURS, "B"),
        ("“B”", COLOURS, "B"),
        ("'B'", COLOURS, "B"),
        ("**B**", COLOURS, "B"),
        ("**Answer: B**", COLOURS, "B"),
        ("选项B", COLOURS, "B"),
        ("B选项", COLOURS, "B"),
        ("选B", COLOURS, "B"),
        ("故选：B", COLOURS, "B"),
        ("答案：B", COLOURS, "B"),
        ("答案是B。", COLOURS, "B"),
        ("（B）", COLOURS, "B"),
        ("The correct answer is B", COLOURS, "B"),
        ("The correct option is (B).", COLOURS, "B"),
        ("B is correct", COLOURS, "B"),
        ("正确选项是B", COLOURS, "B"),
        ("本题选B", COLOURS, "B"),
        ("B项", COLOURS, "B"),
        ("Therefore, B", COLOURS, "B"),
        ("It is B", COLOURS, "B"),
        ("only blue, B", COLOURS, "B"),
        ("B — only blue", COLOURS, "B"),
        ("B. only green", COLOURS, None),
        ("C=5", NUMBERS, None),
        ("Option B is not correct", COLOURS, None),
        ("B. incorrect", COLOURS, None),
        ("B (wrong)", COLOURS, None),
        ("A. only green or B. only blue", COLOURS, None),
        ("B (not A)", COLOURS, None),
        ("not B", COLOURS, None),
        ("B is incorrect", COLOURS, None),
        ("neither A nor B", COLOURS, None),
        ("3.5", NUMBERS, "B"),
        ("x = 3.50", NUMBERS, "B"),
        ("5", NUMBERS, "A"),
        ("9", NUMBERS, "C"),
        (r"\sqrt{12}", NUMBERS, "D"),
        ("7", ["5", "7"], "B"),
        ("7.0", ["5", "7"], "B"),
        (r"\frac{14}{2}", ["5", "7"], "B"),
        ("5", ["A. 4", "B. 5"], "B"),  # options that carry their own label
        ("AC", ["AD", "AC", "AB"], "B"),  # a segment, not two letters
        ("A and C", ["I", "A and C", "none"], "B"),
        ("b", ["b", "a", "c"], "A"),  # small letters: the text before the label
        ("B", ["b", "a", "c"], "B"),
        ("5 m", ["5 cm", "5 m"], "B"),
        ("mgH", ["mgh", "mgH"], "B"),
        ("aa", ["AA", "Aa", "aa"], "C"),
        (r"5\text{ m}", ["5 cm", "6 cm"], None),
        ("5 centimetres", ["5 cm", "6 cm"], "A"),
        ("①和③", ["①②", "①③"], "B"),
        ("B. False", ["True", "False"], "B"),
        ("x>1 and x<3", ["x>1 or x<3", "none"], None),
        ("2h", ["2", "3", "4"], None),
        ("2 kg", ["2 m", "3 m"], None),
        ("2 m^2", ["2 m", "3 m"], None),
        ("2 days", ["2 hours", "3 hours"], None),
        ("2 square meters", ["2 m^2", "3 m^2"], "A"),
        ("Only B", COLOURS, "B"),
        ("5.0 m", ["4 m", "5 m"], "B"),  # where all options are quantities, a letter is a unit
        ("5", ["4 m", "5 m"], "B"),
        ("2", ["2n-1", "2n", "3"], None),
        ("5", ["5 cm", "5 m"], None),  # fits both
        ("D", COLOURS, None),  # beyond the options
        ("6", NUMBERS, None),
        ("A and C", COLOURS, None),
        ("A, C", COLOURS, None),
        ("(A) and (C)", COLOURS, None),
        ("(A) and (C) are right", COLOURS, None),
        ("A or B", COLOURS, None),
        ("AC", COLOURS, None),
        ("a dog", COLOURS, None),  # an article is no label
        ("", COLOURS, None),
    ],
)
def test_choices(answer, choices, letter):
    assert answer_key(answer, choices) == letter
    assert vote_key(f"\\boxed{{{answer}}}", tuple(choices)) == letter


def test_neighbouring_letters_are_no_letter():
    assert answer_key("ABC", ["1", "2", "3", "4"]) is None and answer_key("ABC", list("1234"), multi=True) == "ABC"


@pytest.mark.parametrize(
    "answer, key",
    [
        ("A and C", "AC"), ("C, A", "AC"), ("(C) and (A)", "AC"), ("AC", "AC"), ("CA", "AC"), ("A, B & C", "ABC"),
        (r"\text{A and C}", "AC"), (r"\{C, A\}", "AC"),
        ("Both A and C are correct.", "AC"), ("**A** and **C**", "AC"), ("*A* and *C*", "AC"), ("A、C", "AC"),
        ("A和C", "AC"), ("选AC", "AC"), ("答案：AC", "AC"), ("A;C", "AC"), ("(A)(C)", "AC"), ("Options A and C", "AC"),
        ("A/C", "AC"), ("A+C", "AC"), ("A and C are incorrect", None), ("neither A nor C", None), ("not A", None),
        ("A. only green, C. either blue or red", "AC"), ("A (only green), B (only blue)", "AB"), ("A or B", None),
        ("A: true, B: false", None), ("only blue; only green", "AB"), ("正确的有AC", "AC"),
 ("A, A", "A"), ("B", "B"), ("A and D", None), ("only blue",
        "B"),
    ],
)  # fmt: skip
def test_multi(answer, key):
    assert answer_key(answer, COLOURS, multi=True) == key


def test_multi_without_options():
    assert answer_key("C and A", multi=True) == "AC"
    assert answer_key("C and A") == "A and C"
    assert answer_key("A or C", multi=True) == "A or C"
    assert answer_key("12", None, multi=True) == "12"
    assert answer_key("B", []) == "B"  # an empty list of options is none


# ------------------------------------------------------------------------------------------------ properties

REWRITINGS = [  # of any answer
    "${}$", r"\({}\)", "{}.", "  {}  ", r"\boxed{{{}}}", "<answer>{}</answer>", "The answer is {}", "Answer: {}",
    "**{}**", r"\left({}\right)", "$ {} $.", r"\displaystyle {}", "答案：{}", '"{}"', "final answer: {}",
]  # fmt: skip
VALUES = [  # values, which may have a name, a unit or a degree sign about them
    "7", "-7", "0.25", r"\frac{3}{4}", "1200.5", r"2\sqrt{3}", r"\frac{\pi}{6}", "1e3", "2^{10}", r"\sqrt[3]{9}",
    "3 1/2", r"\frac{1+\sqrt5}{2}",
]  # fmt: skip
AROUND_VALUES = [
    "x = {}", "{} = x", r"\angle ABC = {}", r"\angle 2 = {}^\circ", "f(3) = {}", r"S_{{\triangle ABC}} = {}",
    "AB = {}", r"{}\text{{ cm}}", "{} cm", "{}°", "{} %", r"\approx {}", r"\text{{Area}} = {}\text{{ m}}^2",
    "P(A) = {}", "x = y = {}", r"{}\,\mathrm{{kg}}", "{} square units", "x_1 = {}", "{}元", r"\therefore x={}",
]  # fmt: skip
FORMULAS = ["2x+1", r"\frac{a}{b}", "x^2-3x", "(x+1)(x-2)", r"\pi r^2", "2^n", r"AB+CD", r"\sqrt{x+1}", "3ab"]
AROUND_FORMULAS = [
    "f(x) = {}",
    "a_n = {}",
    "0+{}",
    "1*({})",
    r"({})\cdot 1",
    r"\frac{{{}}}{{1}}",
    "2({})/2",
    "-(-({}))",
]


def test_keys_do_not_change_under_rewritings():
    tried = [(answer, rewriting) for answer in VALUES + FORMULAS for rewriting in REWRITINGS]
    tried += [(value, rewriting) for value in VALUES for rewriting in AROUND_VALUES]
    tried += [(formula, rewriting) for formula in FORMULAS for rewriting in AROUND_FORMULAS]
    changed = {(a, r): answer_key(r.format(a)) for a, r in tried if answer_key(r.format(a)) != answer_key(a)}
    assert len(tried) >= 400 and not changed, changed


def test_keys_of_different_answers_differ():
    """All pairs of the lists above, and of the classes: each is tried there spelling by spelling."""
    keys = [answer_key(spellings[0]) for spellings in CLASSES.values()]
    lists = [*([answer_key(answer) for answer in answers] for answers in DIFFERENT), keys]
    merged = [sorted(keys) for keys in lists if len(set(keys)) < len(keys)]
    assert sum(len(keys) * (len(keys) - 1) // 2 for keys in lists[:-1]) >= 300 and not merged, merged


class _Formula:
    """A random formula in a, b, x: its value at a point and, each time anew, a spelling."""

    def __init__(self, rng: random.Random, depth: int = 3):
        self.kind = rng.choice(["number", "letter"] if depth == 0 else ["sum", "product", "quotient", "power"])
        self.n, self.letter = rng.randint(1, 9), rng.choice("abx")
        self.parts = [] if depth == 0 else [_Formula(rng, rng.randint(0, depth - 1)) for _ in range(2)]

    def value(self, at: dict[str, float]) -> float:
        a, b = (part.value(at) for part in self.parts) if self.parts else (0, 0)
        found = {"number": self.n, "letter": at[self.letter], "sum": a + b, "product": a * b}
        return found[self.kind] if self.kind in found else a / b if self.kind == "quotient" else a ** (1 + self.n % 3)

    def spelled(self, rng: random.Random) -> str:
        if self.kind in ("number", "letter"):
            return str(self.n) if self.kind == "number" else self.letter
        a, b = (part.spelled(rng) for part in self.parts)
        if self.kind == "quotient":
            return rng.choice([rf"\frac{{{a}}}{{{b}}}", f"({a})/({b})"])
        if self.kind == "power":
            return f"({a})^{{{1 + self.n % 3}}}"
        first, second = (a, b) if rng.random() < 0.5 else (b, a)
        if self.kind == "sum":
            return rng.choice([f"{first}+{second}", f"({first})+{second}", f"{first} + ({second})"])
        return rng.choice([f"({first})({second})", rf"({first})\cdot({second})", rf"({first}) \times ({second})"])


def test_random_formulas_have_one_key_and_share_it_only_with_equals():
    rng = random.Random(3)
    points = [{letter: rng.uniform(0.5, 2) for letter in "abx"} for _ in range(3)]
    values = {}
    for _ in range(400):
        formula = _Formula(rng)
        (key,) = {answer_key(formula.spelled(rng)) for _ in range(4)}
        value = [formula.value(at) for at in points]
        assert values.setdefault(key, value) == pytest.approx(value), key
    assert len(values) > 200


# ------------------------------------------------------------------------------------------------ hostile text

N = 100_000
HOSTILE = {
    "digits": "9" * N, "braces": "{" * N + "5" + "}" * N, "brackets": "(" * N + ")" * N, "sqrt": "\\sqrt" * N,
    "frac": "\\frac{" * N, "open boxes": "\\boxed{" * N, "nested boxes": "\\boxed{" * N + "}" * N,
    "open tags": "<answer>" * N, "backslashes": "\\" * 10 * N, "spaces": "x" + " " * 10 * N + "y",
    "digit and spaces": "$5" + " " * N + "x",
    "commas": "1," * 5 * N, "thousands": "1" + ",000" * N, "fonts": "\\text{" * N, "tower": "9**9**9",
    "tower2": "2^{2^{100}}", "tower3": "10^{10^{10}}", "exponent": "1e999999999", "tiny": "1e-999999999",
    "long exponent": "1e" + "9" * N, "product": "1e1000*" * 250 + "1", "root": "\\sqrt[1000000000]{2}",
    "zeroth root": "\\sqrt[0]{2}", "zero": "0^{-1}", "zero2": "0^0", "division": "\\frac{1}{0}",
    "hidden zero": "\\frac{1}{\\sqrt{2}-\\sqrt{2}}", "π power": "\\pi^{10000}", "roots": "\\sqrt2*" * 280 + "1",
    "root of roots": "\\sqrt{" * 90 + "2" + "}" * 90, "nul": "\x00" * 10 * N, "surrogates": "\ud800" * N,
    "marks": "\u0315\u0300" * 5 * N, "equals": "x=" * N + "5", "units": "5" + " square m" * N,
    "units2": "5" + " square" * 200, "letters": "A," * N, "mixed": "1 1/" * N, "signs": "-" * N + "1",
    "powers": "2^" * N + "2", "stars": "*" * 10 * N, "degrees": "^\\circ" * N, "megabyte": "ab c" * 250_000,
    "near bound": "(1," * 25 + "2" + ")" * 25, "past bound": "(1," * 490 + "2" + ")" * 490,
    "long decimals": "1." + "3" * N, "nan": "nan", "well-formed": "<think>" + "</think>" * N + "\\boxed{" * N,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text(name):
    """Neither an exception nor much work. The bound is wide for slow machines: super-linear work would take minutes."""
    text = HOSTILE[name]
    begin = time.process_time()
    for candidate in (text, f"\\boxed{{{text}}}", f"<answer>{text}</answer>"):
        for choices in (None, ["5", "7"]):
            for key in (
                vote_key(candidate, choices),
                answer_key(candidate, choices),
                answer_key(candidate, choices, True),
            ):
                assert key is None or (isinstance(key, str) and key)
                if key:
                    key.encode()  # goes into a JSON file
        is_well_formed(candidate)
    assert time.process_time() - begin < 20


def test_random_garbage_never_raises():
    words = (
        r"\frac \sqrt \text{ \left( \right) { } \boxed{ [ ] ( ) ^ _ 1 22 1.5 1,000 , = \approx \pi x ABC cm % ° ^\circ"
    )
    words += r" + - * / \{ \} \ and B. e5 $ ½ √ \overline{AB} ** <answer> </answer> : option"
    rng, words = random.Random(2), [*words.split(), " ", "\n", "\\"]
    for _ in range(3000):
        text = "".join(rng.choice(words) for _ in range(rng.randint(1, 30)))
        for key in (answer_key(text), vote_key(f"\\boxed{{{text}}}", ["5", "x"], multi=rng.random() < 0.5)):
            assert key is None or (isinstance(key, str) and key)


def test_plain_numbers_are_fast():
    """50 µs each; the best of several runs, since the machine may be shared."""
    for text in (
        "\\boxed{42}",
        "\\boxed{-3.5}",
        "\\boxed{1,000}",
        "\\boxed{50\\%}",
        "\\boxed{3/4}",
        "so x^2. " * 300 + "\\boxed{42}",
    ):
        best = float("inf")
        for _ in range(20):
            begin = time.perf_counter()
            for _ in range(20):
                vote_key(text)
            best = min(best, (time.perf_counter() - begin) / 20)
        assert best < 50e-6, text


# ------------------------------------------------------------------------------------------------ grading


@pytest.mark.parametrize(
    "text, gold, choices, expected",
    [
        (r"\boxed{\frac{14}{2}}", "7", None, Grade(True, True)),
        (r"\boxed{8}", "7", None, Grade(False, False)),
        (r"\boxed{7}", r"$\boxed{7}$", None, Grade(True, True)),
        (r"\boxed{1+2x}", "2x+1", None, Grade(True, True)),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", None, Grade(False, True)),  # algebra is the verifier's
        (r"\boxed{\log_2 8}", "3", None, Grade(False, True)),
        # It is not asked about what it gets wrong: letters for units, the case of letters, words, lists, relations.
        (r"\boxed{2}", "2n-1", None, Grade(False, None)),
        (r"\boxed{4g}", "4", None, Grade(False, None)),
        (r"\boxed{1.6\times10^{-19}}", r"9.1\times10^{-31}", None, Grade(False, None)),
        (r"\boxed{5:12:13}", "5:13:12", None, Grade(False, None)),
        (r"\boxed{10:30}", "1:3", None, Grade(False, None)),
        (r"\boxed{1101_2}", "1101", None, Grade(False, None)),
        (r"\boxed{f^{-1}(x)}", "1/f(x)", None, Grade(False, None)),
        (r"\boxed{\sin 30}", r"\sin 30^\circ", None, Grade(False, None)),
        (r"\boxed{(1,2)}", r"\{1,2\}", None, Grade(False, None)),
        (r"\boxed{R-r}", "r-R", None, Grade(False, None)),
        (r"\boxed{ABC}", "BCA", None, Grade(False, None)),
        (r"\boxed{act}", "cat", None, Grade(False, None)),
        (r"\boxed{2, 2}", "2", None, Grade(False, None)),
        (r"\boxed{x=1,y=4 or x=3,y=2}", "x=1,y=2 or x=3,y=4", None, Grade(False, None)),
        (r"\boxed{\lfloor x\rfloor=5}", "5", None, Grade(False, None)),
        (r"\boxed{10-12}", "-2", None, Grade(False, None)),
        (r"\boxed{1/2\pi}", r"\frac{1}{2\pi}", None, Grade(False, None)),
        (r"\boxed{30 hours 2 minutes}", "2 hours 30 minutes", None, Grade(False, None)),
        (r"\boxed{0.5}", "50\\%", None, Grade(False, True)),  # percent too
        ("7", "7", None, Grade(False, None)),  # an abstention is wrong
        (r"\boxed{7}", "", None, Grade(False, None)),
        ("7", "", None, Grade(False, None)),  # two abstentions don't agree
        (r"\boxed{7}", None, None, Grade(False, None)),
        (r"\boxed{7}", "B", ["5", "7"], Grade(True, None)),  # with choices only keys count
        (r"\boxed{5}", "B", ["5", "7"], Grade(False, None)),
        (r"\boxed{A}", "7", ["5", "7"], Grade(False, None)),
        (r"\boxed{" + "7" * 300 + "}", "7", None, Grade(False, None)),  # too long for the verifier
    ],
)
def test_grade(text, gold, choices, expected):
    verdict = grade(text, gold, choices)
    assert verdict == expected
    assert is_correct(text, gold, choices) is verdict.correct is (expected.key or bool(expected.verifier))
    assert verdict.disagree is (expected.verifier is not None and expected.key != expected.verifier)


def bring_up():
    """The verifier's process is up, and is asked: it remembers nothing of other tests."""
    verifier.verdicts.clear()
    assert grade(r"\boxed{7}", "7").verifier is True


def test_grade_survives_a_verifier_that_hangs(monkeypatch):
    bring_up()
    monkeypatch.setattr("upt.answers.verifier.VERIFY_SECONDS", 1e-4)
    begin = time.perf_counter()
    assert grade(r"\boxed{\frac{x^2-1}{x-1}}", "x+1") == Grade(False, None)
    assert time.perf_counter() - begin < 20
    monkeypatch.undo()
    assert grade(r"\boxed{8}", "8") == Grade(True, True)  # a fresh one answers


def test_a_verifier_that_was_ended_is_started_again():
    bring_up()
    assert os.getsid(verifier.process.pid) != os.getsid(0)  # Ctrl-C in a terminal or a notebook does not reach it
    os.kill(verifier.process.pid, signal.SIGKILL)
    verifier.process.wait()
    assert grade(r"\boxed{0.125}", "1/8") == Grade(True, True)


def test_an_interrupted_question_leaves_no_verdict_for_the_next(monkeypatch):
    bring_up()

    def interrupted(line, seconds):
        verifier.process.stdin.write(line)
        verifier.process.stdin.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(verifier, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grade(r"\boxed{x+1}", "1+x")
    monkeypatch.undo()
    assert grade(r"\boxed{x+2}", "x+3") == Grade(False, False)


@pytest.mark.parametrize("power", ["9^{9^{9^{9}}}", "(10^{10})!", "x^{10^{9}}"])
def test_grade_never_hangs(power):
    begin = time.perf_counter()
    assert not is_correct(rf"\boxed{{{power}}}", "7")
    assert time.perf_counter() - begin < 60


def test_in_threads():
    """The verifier's signals don't work off the main thread; its process must."""
    verdicts = {}

    def work(i):
        verdicts[i] = (vote_key(rf"\boxed{{\frac{{{2 * i}}}{{2}}}}"), grade(rf"\boxed{{{i}}}", f"{i}.0"))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    assert verdicts == {i: (str(i), Grade(True, True)) for i in range(8)}


def test_import_is_light():
    """Keys are needed in data workers: importing the file must not load sympy or start a process."""
    code = "import upt.answers, sys; assert not {'sympy', 'math_verify', 'torch'} & set(sys.modules)"
    code += "; assert upt.answers.verifier.verifier.process is None"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
