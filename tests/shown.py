"""What pages and notebooks show, beside what is made today."""

import math
import re

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def alike(text, other):
    """Whether two texts are the same, but for numbers that are close: to a tenth, or two digits."""
    numbers = zip(NUMBER.findall(text), NUMBER.findall(other), strict=False)
    return NUMBER.split(text) == NUMBER.split(other) and all(_close(*pair) for pair in numbers)


def _close(one, two):
    decimals = len(one.partition(".")[2])
    rounding = min(2 * 10**-decimals, 0.05) if decimals else 0
    return math.isclose(float(one), float(two), rel_tol=0.1, abs_tol=rounding)
