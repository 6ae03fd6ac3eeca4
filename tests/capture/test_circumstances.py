"""Wherever users stand: compilers, other precisions, other tools' hooks."""

import copy
import subprocess
import sys

import pytest
import torch
from models import Mlp, bridge, hooked, hooks_of, huggingface, plainly_hooked
from torch import nn

from actctx import Site, Stopped, capture

RESID = "blocks.1.hook_resid_post"


# torch.compile. The compiler warns about itself.

compiler = pytest.mark.filterwarnings("ignore")


@pytest.mark.thorough
@compiler
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("stop", [False, True])
def test_a_model_that_was_compiled_and_run_is_captured(backend, ids, stop):
    model = Mlp()
    fast = torch.compile(model, backend=backend)
    expected = hooked(model, "block", ids)
    before = fast(ids)
    for root in (model, fast):
        with capture(root, "block", stop=stop) as acts:
            output = fast(ids)
        assert isinstance(output, Stopped) is stop
        assert torch.equal(acts.tensor, expected)
    assert torch.equal(fast(ids), before)


@compiler
def test_a_model_that_is_compiled_in_the_block_is_captured(ids):
    model = Mlp()
    with capture(model, "block") as acts:
        torch.compile(model, backend="eager")(ids)
    assert torch.equal(acts.tensor, hooked(model, "block", ids))


@compiler
def test_a_model_that_is_compiled_in_place_is_captured(ids):
    model = Mlp()
    expected = hooked(model, "block", ids)
    model.compile(backend="eager")
    model(ids)
    with capture(model, "block") as acts:
        model(ids)
    assert torch.equal(acts.tensor, expected)


@compiler
def test_a_compiled_part_is_captured(ids):
    model = Mlp()
    expected = hooked(model, "block.0", ids)
    model.block = torch.compile(model.block, backend="eager")
    model(ids)
    with capture(model, "block._orig_mod.0") as acts:
        model(ids)
    assert torch.equal(acts.tensor, expected)


@compiler
def test_compiled_models_run_compiled_again_afterwards(ids):
    ran = []

    def backend(graph, inputs):  # noqa: ARG001
        def run(*args):
            ran.append(args)
            return graph(*args)

        return run

    model = Mlp()
    fast = torch.compile(model, backend=backend)
    outer, inner = capture(model, "block"), capture(model, "head")
    fast(ids)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    fast(ids)
    assert len(ran) == 1
    inner.__exit__(None, None, None)
    fast(ids)
    assert len(ran) == 2


def test_a_capture_does_not_import_the_compiler():
    code = """
import sys, torch
from actctx import capture
model = torch.nn.Sequential(torch.nn.Linear(1, 1))
with capture(model, "0"):
    model(torch.zeros(1))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Precisions.


def test_bfloat16_is_captured_as_it_is(ids):
    model = huggingface("LlamaForCausalLM").bfloat16()
    with capture(model, "model.layers.1") as acts:
        model(ids)
    assert acts.tensor.dtype == torch.bfloat16
    assert torch.equal(acts.tensor, hooked(model, "model.layers.1", ids))


def test_autocast_is_captured_as_it_is(mlp, ids):
    with capture(mlp, "block.0") as acts, torch.autocast("cpu", torch.bfloat16):
        mlp(ids)
    assert acts.tensor.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")  # torch deprecates its own quantisation
def test_quantised_linear_layers_are_captured(mlp, ids):
    quantised = torch.ao.quantization.quantize_dynamic(mlp, {nn.Linear}, torch.qint8)
    with capture(quantised, ["block", "head"], stop=True) as acts:
        quantised(ids)
    assert torch.equal(acts["block"], hooked(quantised, "block", ids))


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_activation_is_captured(ids):
    class Quantising(Mlp):
        def __init__(self):
            super().__init__()
            self.quantise = nn.Identity()

        def forward(self, ids):
            hidden = torch.quantize_per_tensor(self.embed(ids), 0.1, 0, torch.qint8)
            return self.head(self.quantise(hidden).dequantize())

    model = Quantising()
    with capture(model, "quantise", slice=(slice(None), 0)) as acts:
        model(ids)
    assert acts.tensor.is_quantized
    assert acts.tensor.shape == (3, 8)


# Others at work on the model.


def test_training_mode_and_dropout_are_left_alone(ids):
    model = huggingface("GPT2LMHeadModel").train()
    torch.manual_seed(0)
    expected = hooked(model, "transformer.h.1", ids)
    torch.manual_seed(0)
    with capture(model, "transformer.h.1") as acts:
        model(ids)
    assert model.training
    assert torch.equal(acts.tensor, expected)


def test_hooks_that_others_add_and_remove_inside_the_block_are_theirs(gpt2, ids):
    ran = []
    point = gpt2.hook_dict[RESID]
    with capture(gpt2, RESID) as acts:
        handle = point.register_forward_hook(lambda *args: ran.append(args))
        gpt2(ids)
        handle.remove()
        point.add_hook(lambda activation, hook: activation * 0)  # noqa: ARG005
        gpt2(ids)
        kept = [lens for lens in point.fwd_hooks if "actctx" not in repr(lens.user_hook)]
        assert len(kept) == 1
    assert len(ran) == 1
    assert len(point.fwd_hooks) == 1
    point.remove_hooks()
    assert acts.forwards == 2


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_lora_model_is_captured(ids):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        huggingface("LlamaForCausalLM"),
        peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    )
    name = "base_model.model.model.layers.1"
    expected = hooked(model, name, ids)
    with capture(model, name, stop=True) as acts:
        model(ids)
        with model.disable_adapter():
            model(ids)
    assert torch.equal(acts.tensor[:3], expected)
    assert not torch.equal(acts.tensor[3:], expected)


@pytest.mark.filterwarnings("ignore:.*pytree.*")
def test_offloaded_weights_are_captured(ids):
    accelerate = pytest.importorskip("accelerate")
    model = huggingface("LlamaForCausalLM")
    expected = hooked(model, "model.layers.1", ids)
    logits = model(ids).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    for stop in (False, True):
        with capture(model, "model.layers.1", stop=stop) as acts:
            model(ids)
            model(ids)
        assert torch.equal(acts.tensor, torch.cat([expected] * 2))
    assert torch.equal(model(ids).logits, logits)


def test_a_dispatched_model_is_captured(ids):
    accelerate = pytest.importorskip("accelerate")
    model = huggingface("LlamaForCausalLM")
    expected = hooked(model, "model.layers.1", ids)
    device_map = {"model": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(model, device_map=device_map, force_hooks=True)
    with capture(model, "model.layers.1") as acts:
        assert model(ids).logits.shape == (3, 7, 50)
    assert torch.equal(acts.tensor, expected)


def test_one_capture_spans_devices(ids):
    class Split(Mlp):
        def forward(self, ids):
            hidden = self.block(self.embed(ids))
            return self.head(hidden.to("meta"))

    model = Split()
    model.head.to("meta")
    with capture(model, ["block", "head"]) as acts:
        model(ids)
    assert [acts[name].device.type for name in acts] == ["cpu", "meta"]
    with capture(model, ["block", "head"], device="meta") as acts:
        model(ids)
        model(ids)
    assert {acts[name].device.type for name in acts} == {"meta"}
    assert acts["head"].shape == (6, 7, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_copy_to_the_host_is_pinned_and_waited_for(ids):
    model = huggingface("LlamaForCausalLM").cuda()
    for options in ({}, {"capacity": 6}):
        with capture(model, "model.layers.1", device="cpu", **options) as acts:
            model(ids.cuda())
            model(ids.cuda())
        with capture(model, "model.layers.1") as expected:
            model(ids.cuda())
            model(ids.cuda())
        assert acts.tensor.device.type == "cpu"
        assert torch.equal(acts.tensor, expected.tensor.cpu())


def test_a_model_that_is_freed_while_a_capture_is_open_does_no_harm(ids):
    model = Mlp()
    opened = capture(model, "block")
    acts = opened.__enter__()
    model(ids)
    del model
    opened.__exit__(None, None, None)
    assert acts.tensor.shape == (3, 7, 8)


def test_a_model_that_is_copied_while_a_capture_is_open_can_be_captured_itself(ids):
    model = bridge()
    with capture(model, RESID) as acts:
        twin = copy.deepcopy(model)
        with capture(twin, RESID) as other:
            twin(ids)
            model(ids)
    assert torch.equal(acts.tensor, other.tensor)
    assert acts.forwards == other.forwards == 1


def test_gradients_of_a_bridge_equal_those_of_a_bare_hook(gpt2, ids):
    name = "blocks.0.attn.hook_z"
    site = Site(name, slice={"head": [1, 3], "pos": -1}, dtype=torch.float64)
    with capture(gpt2, site, grad=True) as acts:
        gpt2(ids)
    weight = gpt2.blocks[0].attn.v.original_component.weight
    (found,) = torch.autograd.grad(acts.tensor.square().sum(), weight)
    kept = []
    gpt2.hook_dict[name].add_hook(lambda activation, hook: kept.append(activation))  # noqa: ARG005
    gpt2(ids)
    gpt2.hook_dict[name].remove_hooks()
    (expected,) = torch.autograd.grad(kept[0][:, -1, [1, 3]].double().square().sum(), weight)
    assert torch.equal(found, expected)


def test_a_capture_with_grad_inside_one_without_keeps_the_graph(gpt2, ids):
    with capture(gpt2, RESID) as outer, capture(gpt2, RESID, grad=True) as inner:
        assert torch.is_grad_enabled()
        gpt2(ids)
    assert not outer.tensor.requires_grad
    assert inner.tensor.requires_grad
    assert torch.equal(outer.tensor, plainly_hooked(gpt2, ids, RESID)[RESID][0])


def test_forwards_of_gradients_are_joined_in_the_graph(gpt2, ids):
    with capture(gpt2, RESID, grad=True, slice=-1) as acts:
        gpt2(ids)
        gpt2(ids)
    acts.tensor.sum().backward()
    gpt2.zero_grad()


def test_the_graph_of_several_forwards_survives_a_reader_without_gradients(mlp, ids):
    with capture(mlp, "block", grad=True) as acts:
        mlp(ids)
        mlp(ids)
    with torch.no_grad():
        assert acts.tensor.requires_grad
    acts.tensor.sum().backward()


def test_a_capture_that_could_not_be_entered_can_be_entered_later(mlp, ids):
    class Refusing(nn.Linear):
        refuses = True

        def register_forward_hook(self, *args, **kwargs):
            if self.refuses:
                raise KeyboardInterrupt
            return super().register_forward_hook(*args, **kwargs)

    mlp.head = Refusing(8, 4)
    before = hooks_of(mlp)
    opened = capture(mlp, ["block", "head"])
    with pytest.raises(KeyboardInterrupt):
        opened.__enter__()
    assert hooks_of(mlp) == before
    assert torch.is_grad_enabled()
    Refusing.refuses = False
    with opened as acts:
        mlp(ids)
    assert len(acts) == 2
