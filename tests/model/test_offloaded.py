"""Models whose weights accelerate has offloaded: they are extracted from as any."""

import pytest
import torch
from extracted import Read, refusal
from models import huggingface, tokens

from actctx import OptionError, capture, hook_names
from actctx._model.fingerprint import fingerprint
from actctx._model.offloaded import input_device
from actctx.extract import extract

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.thorough

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


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "OPTForCausalLM"])
def test_looking_at_a_model_leaves_its_hooks_as_they_were(tmp_path, architecture):
    model = to_both(huggingface(architecture), tmp_path / "weights")
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    tied = [hook.tied_params_map for hook in hooks if getattr(hook, "tied_params_map", None)]
    assert tied
    before = [[*each] for each in tied]
    hook_names(model)
    assert [[*each] for each in tied] == before
    with capture(model, RESID, slice={"pos": -1}), torch.no_grad():
        logits = model(tokens(4)).logits
    assert torch.equal(logits, huggingface(architecture)(tokens(4)).logits)


def test_another_model_that_is_offloaded_has_another_fingerprint():
    found = {
        fingerprint(to_cpu(huggingface("GPT2LMHeadModel", seed=seed), None)) for seed in (0, 1)
    }
    assert len(found) == 2


@pytest.mark.parametrize("buffers", [False, True])
def test_buffers_that_are_offloaded_are_those_of_the_loaded_model(buffers):
    def model(mean):
        torch.manual_seed(0)
        norm = torch.nn.BatchNorm1d(4)
        norm.running_mean += mean
        return torch.nn.Sequential(torch.nn.Linear(4, 4), norm).eval()

    whole, other = (fingerprint(model(mean)) for mean in (0, 1))
    offloaded = accelerate.cpu_offload(model(0), CPU, offload_buffers=buffers)
    assert offloaded[1].running_mean.is_meta == buffers
    assert fingerprint(offloaded) == whole != other


def test_tokens_go_to_the_device_that_the_first_hook_runs_on():
    model = accelerate.cpu_offload(huggingface("GPT2LMHeadModel"), torch.device("meta"))
    assert input_device(model) == torch.device("meta")
    assert input_device(huggingface("GPT2LMHeadModel")) == CPU
    assert input_device(torch.nn.Identity()) == CPU


def test_a_model_whose_weights_are_nowhere_is_refused(out):
    with torch.device("meta"):
        model = huggingface("GPT2LMHeadModel")
    assert refusal(OptionError, model, tokens(2), RESID, out) == (
        "the weights of 'transformer.wte.weight' are on the meta device, so it cannot run, and "
        "data sets cannot identify it; load them first, or offload the model with accelerate, "
        "which keeps them"
    )
