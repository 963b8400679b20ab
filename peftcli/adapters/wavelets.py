"""Orthogonal wavelets by their low-pass filters, under the names PyWavelets gives them.

A filter with N vanishing moments is (1 + z)^N times the product of (z - z_k). Each z_k is one of the two zeros, one the other's inverse,
of z^2 + (4 y - 2) z + 1, where y solves sum_k C(N - 1 + k, k) y^k = 0 (Daubechies 1988, section 4). Daubechies' takes the
zeros within the unit circle; symlets take some of the others, so that the filter is nearly symmetric.
"""

from __future__ import annotations

import math
import re

from peftcli.lazy import numpy

FAMILIES = r"^(db([1-9]|10)|sym([2-9]|10)|coif[123])$"

SYMLETS = {2: "0", 3: "0", 4: "01", 5: "10", 6: "101", 7: "100", 8: "0101", 9: "0110", 10: "10101"}
"""By N, whether the zero outside the unit circle is taken for each y (of a conjugate pair one counts), by its real part."""

COIFLETS = {
    1: "-0.07273261951252645 0.3378976624574818 0.8525720202116004 0.3848648468648578 -0.07273261951252645 "
    "-0.01565572813579199",
    2: "0.01638733646320364 -0.04146493678687178 -0.0673725547237256 0.3861100668227629 0.8127236354494135 "
    "0.4170051844232391 -0.07648859907828076 -0.05943441864643109 0.02368017194684777 0.005611434819368834 "
    "-0.001823208870911032 -0.000720549445520347",
    3: "-0.003793512864380802 0.007782596425672746 0.02345269614207717 -0.06577191128146936 -0.06112339000297255 "
    "0.4051769024091182 0.7937772226260872 0.42848347637737 -0.07179982161915484 -0.08230192710629983 "
    "0.03455502757329774 0.01588054486366945 -0.009007976136730624 -0.002574517688136797 0.00111751877083063 "
    "0.0004662169598204029 -7.0983302506379e-05 -3.459977319727278e-05",
}
"""Coiflets of 2 K vanishing moments have no such formula: the published numbers, by K."""


def low_pass(family: str) -> list[float]:
    """The filter's numbers, which sum to sqrt(2).

    Args:
        family: `db1` (Haar's) to `db10`, `sym2` to `sym10`, `coif1` to `coif3`. PEFT's `coif4` and `coif5` are no wavelets: they sum to
            1.448 and 1.422.
    """
    kind, number = re.fullmatch(r"([a-z]+)(\d+)", family).groups()  # type: ignore[union-attr]
    moments = int(number)
    if kind == "coif":
        return [float(value) for value in COIFLETS[moments].split()]
    series = [math.comb(moments - 1 + k, k) for k in reversed(range(moments))]
    upper = sorted((y for y in numpy.roots(series) if y.imag > -1e-9), key=lambda y: y.real)
    outside = SYMLETS[moments] if kind == "sym" else "0" * len(upper)
    zeros = [-1.0] * moments
    for y, taken in zip(upper, outside, strict=True):
        zero = sorted(numpy.roots([1, 4 * y - 2, 1]), key=abs)[int(taken)]
        zeros += [zero] if abs(y.imag) < 1e-9 else [zero, zero.conjugate()]
    values = numpy.real(numpy.poly(zeros))
    return [float(value) for value in values / values.sum() * math.sqrt(2)]
