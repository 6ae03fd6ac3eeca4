"""Models whose weights accelerate has offloaded: they are extracted from as any."""

import pytest
import torch
from models import huggingface, tokens
from test_extract import Read, refusal

from actctx import OptionError
from actctx._fingerprint import fingerprint
from actctx._offloaded import input_device
from actctx.extract import extract

accelerate = pytest.importorskip("accelerate")

RESID = "blocks.1.hook_resid_post"
CPU = torch.device("cpu")


def to_cpu(model, _):
    return accelerate.cpu_offload(model, CPU)


def to_disk(model, path):
    return accelerate.disk_offload(model, str(path), CPU)


def to_both(model, path):
    names = [name for name, module in model.named_modules() if not [*module.children()]]
    names = [name for name in names if not name.startswith("cls.")] + ["cls"] * hasattr(
        model, "cls"
    )
    places = {name: "disk" if number % 2 else "cpu" for number, name in enumerate(names)}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(path), force_hooks=True
    )


@pytest.fixture
def out(tmp_path):
    return tmp_path / "acts.lance"


@pytest.mark.parametrize("offload", [to_cpu, to_disk, to_both])
@pytest.mark.parametrize(
    "architecture", ["GPT2LMHeadModel", "LlamaForCausalLM", "BertForMaskedLM", "OPTForCausalLM"]
)
def test_rows_and_fingerprints_are_those_of_the_loaded_model(out, tmp_path, architecture, offload):
    whole = huggingface(architecture)
    model = offload(huggingface(architecture), tmp_path / "weights")
    known = [each.is_meta for each in model.parameters()]
    assert any(known)
    extract(whole, tokens(4), RESID, out, max_tokens=9)
    extract(model, tokens(4), RESID, out)  # which compares fingerprints
    other = out.with_name("whole.lance")
    extract(whole, tokens(4), RESID, other)
    assert torch.equal(Read(out)[RESID], Read(other)[RESID])
    assert [each.is_meta for each in model.parameters()] == known


def test_another_model_that_is_offloaded_has_another_fingerprint():
    found = {
        fingerprint(to_cpu(huggingface("GPT2LMHeadModel", seed=seed), None)) for seed in (0, 1)
    }
    assert len(found) == 2


def test_tokens_go_to_the_device_that_the_first_hook_runs_on():
    model = accelerate.cpu_offload(huggingface("GPT2LMHeadModel"), torch.device("meta"))
    assert input_device(model) == torch.device("meta")
    assert input_device(huggingface("GPT2LMHeadModel")) == CPU
    assert input_device(torch.nn.Identity()) == CPU


def test_a_model_whose_weights_are_nowhere_is_refused(out):
    with torch.device("meta"):
        model = huggingface("GPT2LMHeadModel")
    assert refusal(OptionError, model, tokens(2), RESID, out) == (
        "the weights of 'transformer.wte.weight' are on the meta device, so there is nothing to "
        "run, nor to tell the model by; load them first, or offload the model with accelerate, "
        "which keeps them"
    )
