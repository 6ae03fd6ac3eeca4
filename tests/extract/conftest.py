import pytest
from models import huggingface


@pytest.fixture
def small_commits(monkeypatch):
    """Commit every few rows, and sort and join every few sequences."""
    monkeypatch.setattr("actctx._extract.writer._COMMIT_BYTES", 20_000)
    monkeypatch.setattr("actctx._extract.inputs._WINDOW", 4)
    monkeypatch.setattr("actctx._extract.inputs._AT_ONCE", 16)


@pytest.fixture(scope="module")
def model():
    return huggingface("GPT2LMHeadModel")
