import os

import jaxtyping
import pytest
import torch
from models import Mlp, hooks_of, huggingface, shared, tokens

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network; none shall wait for it
torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes and kernels that tests start, too


@pytest.fixture(autouse=True)
def _gradients_are_left_as_they_were():
    assert torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled(), "a test, or what it tested, left gradients off"


@pytest.fixture
def gpt2():
    """A tiny GPT-2 bridge, which each test must leave as it was."""
    model = shared()
    yield model
    left = [name for name, point in model.hook_dict.items() if point.has_hooks()]
    assert not left, f"hooks were left on {left}"
    assert "forward" not in model.__dict__


@pytest.fixture(scope="session")
def _shared_llama():
    return huggingface("LlamaForCausalLM")


@pytest.fixture
def llama(_shared_llama):
    """A tiny plain Hugging Face Llama, which each test must leave as it was."""
    before = hooks_of(_shared_llama)
    yield _shared_llama
    assert hooks_of(_shared_llama) == before
    assert not _shared_llama.training


@pytest.fixture
def mlp():
    return Mlp()


@pytest.fixture
def linear():
    """A module of features, which no axes are known of."""
    return torch.nn.Sequential(torch.nn.Linear(4, 5))


@pytest.fixture
def ids():
    return tokens()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The directory of a tiny GPT-2 with a tokenizer."""
    from commands import save_gpt2

    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_gpt2(directory)
    return str(directory)


@pytest.fixture(scope="session")
def loaded(tiny):
    from actctx._cli.load_model import load

    return load(tiny)


@pytest.fixture
def out(tmp_path):
    """Where a data set is to be written."""
    return tmp_path / "acts.lance"


@pytest.fixture
def unchecked():
    """Switch off the type checks that the tests add, to see what users see who pass nonsense."""
    jaxtyping.config.update("jaxtyping_disable", True)  # noqa: FBT003  its own way of saying so
    yield
    jaxtyping.config.update("jaxtyping_disable", False)  # noqa: FBT003
