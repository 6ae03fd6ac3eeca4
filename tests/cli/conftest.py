import pytest

from actctx._cli.load_model import load


@pytest.fixture(scope="session")
def minilm():
    return load("minilm")
