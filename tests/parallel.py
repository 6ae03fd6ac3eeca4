"""What each of two processes captures of models that are cut over both; the tests start them."""

import os
from functools import partial

import torch
import torch.distributed as dist
from models import GENERATION, bridge_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from actctx import ActctxError, Site, capture, hook_names


class Attention(nn.Module):
    """Two heads beside each other, as in Hugging Face's models."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.head_norm = nn.LayerNorm(width // heads)
        self.dropout = nn.Dropout(0.1)

    def forward(self, given):
        batch, length, _ = given.shape
        split = partial(torch.Tensor.unflatten, dim=-1, sizes=(-1, self.head_norm.weight.numel()))
        query, key, value = (split(layer(given)) for layer in (self.query, self.key, self.value))
        pattern = torch.einsum("bqhd,bkhd->bhqk", self.head_norm(query), key).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", pattern, value).reshape(batch, length, -1)
        return self.dropout(self.out(mixed)), pattern


class Mlp(nn.Module):
    def __init__(self, width, wide):
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, wide)
        self.act, self.down = nn.GELU(), nn.Linear(wide, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, given):
        return self.dropout(self.down(self.act(self.up(self.norm(given)))))


class Block(nn.Module):
    def __init__(self, width=8, wide=24, heads=4):
        super().__init__()
        self.norm, self.attn, self.mlp = (
            nn.LayerNorm(width),
            Attention(width, heads),
            Mlp(width, wide),
        )

    def forward(self, given):
        given = given + self.attn(self.norm(given))[0]
        return given + self.mlp(given)


SITES = {
    **{name: name for name, _ in Block().named_modules() if name},
    "": Site("", output=None),
    "pattern": Site("attn", output=1),
    "query in": Site("attn.query", io="in"),
    "out in": Site("attn.out", io="in"),
    "up in": Site("mlp.up", io="in"),
    "down in": Site("mlp.down", io="in"),
    "act in": Site("mlp.act", io="in"),
    "mlp in": Site("mlp", io="in"),
}


LENS = [
    *(f"blocks.0.{name}" for name in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")),
    *(f"blocks.0.attn.hook_{name}" for name in ("q", "k", "v", "z", "pattern")),
    *(f"blocks.0.{name}" for name in ("hook_attn_out", "hook_mlp_out", "mlp.hook_pre")),
    *(f"blocks.0.{name}" for name in ("mlp.hook_post",)),
]


def block():
    torch.manual_seed(0)
    return Block().eval()


COLWISE = ["attn.query", "attn.key", "attn.value", "mlp.up"]
PLAN = {
    **dict.fromkeys(COLWISE, ColwiseParallel()),
    **dict.fromkeys(["attn.out", "mlp.down"], RowwiseParallel()),
}


def mlp():
    torch.manual_seed(0)
    return Mlp(8, 24).eval()


def found(model, whole, sites, *inputs, stop=False):
    """Compare each site with that of the whole model: right, refused, or wrong."""
    result = {}
    for name, site in sites.items():
        try:
            with torch.no_grad(), capture(whole, site, stop=stop) as expected:
                whole(*inputs)
        except ActctxError:
            continue  # there is none, or it never fires
        try:
            with capture(model, site, stop=stop) as acts:
                model(*inputs)
        except ActctxError as error:
            result[name] = f"{type(error).__name__}: {error}"
            continue
        alike = acts.tensor.shape == expected.tensor.shape
        alike = alike and torch.allclose(acts.tensor, expected.tensor, atol=1e-5)
        result[name] = "right" if alike else "wrong"
    return result


def torch_cases(mesh):
    given = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    yield "plain tensors", parallelize_module(block(), mesh, PLAN), block(), SITES, given
    parts = {name: name for name in ("norm", "up", "act", "down", "dropout")}
    kept = {
        "up": ColwiseParallel(use_local_output=False),
        "down": RowwiseParallel(use_local_output=False),
    }
    yield "DTensors", parallelize_module(mlp(), mesh, kept), mlp(), parts, given
    cut = {"up": ColwiseParallel(), "down": RowwiseParallel(output_layouts=Shard(1))}
    yield "sequences", parallelize_module(mlp(), mesh, cut), mlp(), parts, given
    sharded = block()
    fully_shard(sharded.mlp, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    yield "FSDP", sharded, block(), SITES, given
    meshes = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("data", "tensor"))
    both = parallelize_module(block(), meshes["tensor"], PLAN)
    fully_shard(both.mlp, mesh=meshes["data"])
    fully_shard(both, mesh=meshes["data"])
    yield "both", both, block(), SITES, given


def plain_llama(path, **options):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path, **options)
    model.set_attn_implementation("eager")
    return model.eval()


def cases(mesh, path):
    yield from torch_cases(mesh)
    from transformers.distributed import DistributedConfig

    whole = plain_llama(path)
    names = ["model.norm", "lm_head", *hook_names(whole, "model.**.0.**"), *LENS]
    sites = {name: name for name in names}
    model = plain_llama(path, distributed_config=DistributedConfig(tp_plan="auto"))
    yield "llama", model, whole, sites, torch.arange(1, 9)[None]
    if GENERATION >= 4:
        bridges = bridge_of(model), bridge_of(whole)  # which take them over
        names = hook_names(bridges[0], "blocks.0.**")
        yield "bridge", *bridges, {name: name for name in names}, torch.arange(1, 9)[None]


def work(rank, world, port, path):
    """Run a process of two."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    # The head of TransformerLens' bridges has a bias that is not cut, so they only run as far as
    # they are stopped.
    outcome = {name: found(*case, stop=name == "bridge") for name, *case in cases(mesh, path)}
    torch.save(outcome, f"{path}/outcome{rank}")
    dist.destroy_process_group()
