"""What pages and notebooks show, beside what is made today."""

import math
import re

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def alike(text, other):
    """Whether two texts are the same, but for numbers that are close."""
    numbers = zip(NUMBER.findall(text), NUMBER.findall(other), strict=False)
    return NUMBER.split(text) == NUMBER.split(other) and all(
        math.isclose(float(one), float(two), rel_tol=0.1, abs_tol=0.05) for one, two in numbers
    )
