"""Several forwards of one capture, and sites that never fire."""

import pytest
import torch
from models import HAS_T5, OLD_CACHE, Mlp, bridge, huggingface, plainly_hooked, tokens
from torch import nn

from actctx import (
    NeverFiredError,
    OutputError,
    Site,
    capture,
)

RESID = "blocks.1.hook_resid_post"


class Boom(Exception):
    pass


# Several forwards.


def test_forwards_are_joined_along_the_batch(gpt2):
    batches = [tokens(batch, seed=batch) for batch in (3, 1, 2)]
    with capture(gpt2, RESID, slice={"pos": -1}) as acts:
        for batch in batches:
            gpt2(batch)
    expected = [plainly_hooked(gpt2, batch, RESID)[RESID][0][:, -1] for batch in batches]
    assert torch.equal(acts.tensor, torch.cat(expected))


def test_a_pattern_is_joined_along_its_batch_too(gpt2, ids):
    with capture(gpt2, "blocks.0.attn.hook_pattern") as acts:
        gpt2(ids)
        gpt2(ids)
    assert acts.tensor.shape == (6, 4, 7, 7)


def test_forwards_are_joined_along_pos(gpt2):
    with capture(gpt2, RESID, join="pos") as acts:
        gpt2(tokens(2, 5))
        gpt2(tokens(2, 3))
    assert acts.tensor.shape == (2, 8, 32)


def test_a_list_is_kept_of_forwards_that_are_not_joined(gpt2):
    with capture(gpt2, RESID, join=None) as acts:
        gpt2(tokens(2, 5))
        gpt2(tokens(3, 4))
    assert [tuple(each.shape) for each in acts[RESID]] == [(2, 5, 32), (3, 4, 32)]


def test_the_buffer_is_read_between_forwards(gpt2, ids):
    with capture(gpt2, RESID) as acts:
        gpt2(ids)
        first = acts.tensor
        gpt2(ids)
        second = acts.tensor
        gpt2(ids)
    assert [len(first), len(second), len(acts.tensor)] == [3, 6, 9]
    assert torch.equal(acts.tensor[:3], first)


def test_nothing_is_kept_of_a_forward_that_raised(gpt2, ids):
    def fail(activation, hook):  # noqa: ARG001
        raise Boom

    with capture(gpt2, RESID) as acts:
        gpt2(ids)
        gpt2.hook_dict["ln_final.hook_out"].add_hook(fail)
        with pytest.raises(Boom):
            gpt2(ids)
        gpt2.hook_dict["ln_final.hook_out"].remove_hooks()
        gpt2(ids[:1])
    assert acts.tensor.shape == (4, 7, 32)


def test_a_site_that_fires_twice_keeps_both_firings(ids):
    model = Mlp(twice=True)
    with capture(model, "block") as acts:
        model(ids)
        model(ids)
    first, second = acts.firings("block")
    assert first.shape == second.shape == (6, 7, 8)
    assert torch.equal(model.block(first), second)


def test_a_part_called_by_itself_is_captured(llama, ids):
    with capture(llama, "model.layers.0") as acts:
        llama.model(ids)
    assert acts.tensor.shape == (3, 7, 32)


@pytest.mark.skipif(not HAS_T5, reason="this TransformerLens cannot run T5")
@pytest.mark.filterwarnings("ignore:.*loses the KV cache")  # with transformers 5.24
def test_the_encoder_that_generate_calls_is_captured(ids):
    model = bridge("T5ForConditionalGeneration").original_model
    with capture(model, "encoder.block.0", join=None) as acts:
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert len(acts["encoder.block.0"]) == 1


@pytest.mark.parametrize("firing", [0, -1])
def test_each_firing_in_a_part_called_by_itself_is_the_first_and_the_last(ids, firing):
    model = Mlp(twice=True)
    with capture(model, Site("block.0", firing=firing)) as acts:
        model.block(torch.zeros(1, 7, 8))
        model.block(torch.ones(1, 7, 8))
        model(ids)
    assert acts.forwards == 3
    assert acts.tensor.shape == (1 + 1 + 3, 7, 8)


def test_a_part_called_by_itself_has_no_second_firing(ids):
    model = Mlp(twice=True)
    with capture(model, Site("block.0", firing=1)) as acts:
        model.block(torch.zeros(3, 7, 8))
        assert len(acts) == 0
        model(ids)
    with capture(model, Site("block.0", firing=-1)) as last:
        model(ids)
    assert torch.equal(acts.tensor, last.tensor)


def test_a_capture_from_the_encoder_that_generate_calls_is_of_its_forwards(ids):
    model = huggingface("T5ForConditionalGeneration")
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7, [1, 1, 0, 0, 0, 0, 0]])
    site = Site("block.1", axes="batch pos d_model")
    kept = []
    handle = model.encoder.block[1].register_forward_hook(lambda *args: kept.append(args[2][0]))
    with capture(model.encoder, site, mask="attention") as acts:
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    handle.remove()
    assert acts.forwards == len(kept) == 1
    assert torch.equal(acts.tensor, kept[0][mask.bool()])


def test_generate_of_hugging_face_is_captured_step_by_step(llama, ids):
    with capture(llama, Site("model.layers.1", axes="batch pos d_model"), join="pos") as acts:
        llama.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert acts.tensor.shape == (3, 7 + 3, 32)


@pytest.mark.skipif(not OLD_CACHE, reason="bridges do not run right with this transformers")
def test_generate_of_a_bridge_is_captured_step_by_step(gpt2, ids):
    with capture(gpt2, RESID, join="pos") as acts:
        out = gpt2.generate(
            ids, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False
        )
    whole = plainly_hooked(gpt2, out[:, :-1], RESID)[RESID][0]
    assert acts.tensor.shape == whole.shape
    assert torch.allclose(acts.tensor, whole, atol=1e-5)


# Never fired.


def test_a_site_that_never_fired_is_an_error_and_the_others_can_be_read(mlp, ids):
    mlp.spare = nn.Linear(1, 1)
    with pytest.raises(NeverFiredError, match="'spare'"), capture(mlp, ["spare", "block"]) as acts:
        mlp(ids)
    assert acts["block"].shape == (3, 7, 8)


def test_a_block_without_a_forward_ends_well(gpt2):
    with capture(gpt2, RESID) as acts:
        pass
    assert len(acts) == 0


def test_a_block_that_raised_does_not_speak_of_sites_that_never_fired(mlp, ids):
    mlp.spare = nn.Linear(1, 1)
    with pytest.raises(Boom), capture(mlp, "spare"):
        mlp(ids)
        raise Boom


def test_a_hook_point_that_is_switched_off_is_refused_before_any_forward(gpt2):
    with (
        pytest.raises(NeverFiredError, match="set_use_attn_result"),
        capture(gpt2, "blocks.0.attn.hook_result"),
    ):
        pytest.fail("the block ran")


def test_a_hook_point_that_is_switched_on_is_captured(gpt2, ids):
    gpt2.set_use_attn_result(True)
    try:
        with capture(gpt2, "blocks.0.attn.hook_result") as acts:
            gpt2(ids)
    finally:
        gpt2.set_use_attn_result(False)
    assert acts.axes("blocks.0.attn.hook_result") == ("batch", "pos", "head", "d_model")
    assert acts.tensor.shape == (3, 7, 4, 32)


def test_what_a_pattern_matched_but_never_fired_is_listed(mlp, ids):
    mlp.block_spare = nn.Linear(1, 1)
    with capture(mlp, "block*") as acts:
        mlp(ids)
    assert list(acts) == ["block"]
    assert acts.missing == ("block_spare",)


def test_a_site_that_yields_no_tensor_is_an_error(mlp, ids):
    class Pair(nn.Module):
        def forward(self, ids):
            return None, ids

    mlp.embed, embed = Pair(), mlp.embed
    mlp.block = nn.Sequential()
    mlp.block.forward = lambda pair: embed(pair[1])
    with pytest.raises(OutputError, match=r"tuple\(NoneType, Tensor\)"), capture(mlp, "embed"):
        mlp(ids)
