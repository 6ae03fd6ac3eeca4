"""Models that are cut over processes: what is captured is whole, or is refused by name."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import GENERATION
from parallel import LENS, PLAN, SITES, block, found, work
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from actctx import capture

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
PIECES = {"attn.query", "attn.key", "attn.value", "attn.head_norm", "mlp.up", "mlp.act", "act in"}


def _free_port():
    with socket.socket() as found_one:
        found_one.bind(("127.0.0.1", 0))
        return found_one.getsockname()[1]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each of two processes found, by case and site."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 40}
    # Half of the neurons are as many as d_model, so that a width alone does not tell.
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(path)
    mp.spawn(work, args=(2, _free_port(), str(path)), nprocs=2)
    return [torch.load(path / f"outcome{rank}", weights_only=True) for rank in range(2)]


def _split(outcome):
    right = {name for name, what in outcome.items() if what == "right"}
    refused = {name for name, what in outcome.items() if what.startswith("OutputError: ")}
    assert right | refused == {*outcome}, outcome
    return right, refused


@pytest.mark.parametrize("case", ["plain tensors", "both"])
def test_pieces_that_are_plain_tensors_are_refused_and_nothing_else_is(outcomes, case):
    for outcome in outcomes:
        right, refused = _split(outcome[case])
        assert refused == {*PIECES, "pattern"}
        assert right == {*SITES} - refused


def test_the_refusal_names_the_module_whose_output_is_whole(outcomes):
    assert outcomes[0]["plain tensors"]["mlp.act"] == (
        "OutputError: 'mlp.act' is, or may be, only this process's shard of the features or heads, "
        "since the model is tensor-parallel; capture 'mlp', whose output is whole, or capture from "
        "a model on one device"
    )


@pytest.mark.parametrize("case", ["DTensors", "FSDP"])
def test_what_is_or_can_be_made_whole_is_captured(outcomes, case):
    for outcome in outcomes:
        assert _split(outcome[case])[1] == set()


def test_plain_pieces_of_the_positions_are_refused(outcomes):
    for outcome in outcomes:
        right, refused = _split(outcome["sequences"])
        assert right == set()
        assert "it with use_local_output=False" in outcome["sequences"]["down"]
        assert refused == {"norm", "up", "act", "down", "dropout"}


def test_a_tensor_parallel_hugging_face_model_gives_no_half(outcomes):
    pieces = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    pieces |= {"mlp.gate_proj", "mlp.up_proj", "mlp.act_fn"}
    lens = {f"attn.hook_{name}" for name in ("q", "k", "v", "z", "pattern")}
    lens |= {"mlp.hook_pre", "mlp.hook_post"}
    expected = {f"model.layers.0.{name}" for name in pieces} | {f"blocks.0.{name}" for name in lens}
    for outcome in outcomes:
        right, refused = _split(outcome["llama"])
        assert refused == expected & {*outcome["llama"]}
        assert {"model.layers.0", "model.layers.0.mlp", "lm_head", "blocks.0.hook_mlp_out"} <= right
        assert GENERATION < 4 or {*LENS} <= right | refused


@pytest.mark.skipif(GENERATION < 4, reason="bridges of TransformerLens 4")
def test_a_bridge_of_a_tensor_parallel_model_gives_no_half(outcomes):
    for outcome in outcomes:
        right, refused = _split(outcome["bridge"])
        assert {"blocks.0.hook_in", "blocks.0.hook_out", "blocks.0.attn.hook_out"} <= right
        assert {"blocks.0.mlp.hook_in", "blocks.0.mlp.hook_out", "blocks.0.ln1.hook_out"} <= right
        assert {"blocks.0.attn.hook_pattern", "blocks.0.mlp.in.hook_out"} <= refused


@pytest.fixture
def mesh(monkeypatch):
    """The mesh of a group of this process alone."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    monkeypatch.setitem(os.environ, "MASTER_PORT", str(_free_port()))
    dist.init_process_group("gloo")
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def _given():
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


def test_one_process_has_all_of_a_parallel_model(mesh):
    result = found(parallelize_module(block(), mesh, PLAN), block(), SITES, _given())
    assert set(result.values()) == {"right"}


def test_one_process_has_all_of_a_sharded_model(mesh):
    model = block()
    fully_shard(model, mesh=mesh)
    assert set(found(model, block(), SITES, _given()).values()) == {"right"}


def test_what_is_captured_of_a_distributed_tensor_is_a_plain_one(mesh):
    given = distribute_tensor(_given().requires_grad_(), mesh, [Shard(1)])
    model = torch.nn.Sequential(torch.nn.Identity())
    with capture(model, "0", grad=True) as acts:
        model(given)
    assert type(acts.tensor) is torch.Tensor
    assert acts.tensor.requires_grad
    acts.tensor.sum().backward()
