import matplotlib as mpl
import pytest
from models import shared, tokens
from pictures import PATTERN, RESID

from actctx import capture

mpl.use("agg")


@pytest.fixture(scope="module")
def acts():
    model = shared()
    with capture(model, [RESID, PATTERN]) as acts:
        model(tokens())
    return acts


@pytest.fixture(autouse=True)
def _close():
    yield
    from matplotlib import pyplot as plt

    plt.close("all")
