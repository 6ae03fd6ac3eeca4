"""Extracting activations to disk: what a data set holds, and which rows there are."""

import threading

import pytest
import torch
from extracted import RESID, Read, Z, resid, sequences
from models import Poisoned, huggingface, plainly_hooked, tokens
from torch.utils.data import DataLoader, TensorDataset

from actctx import Site
from actctx.extract import extract


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_token_is_a_row(gpt2, out, dtype):
    ids = tokens(20)
    done = extract(gpt2, ids, [RESID, Z], out, dtype=dtype)
    read = Read(out)
    assert done.rows == done.new_rows == len(read) == 140
    assert torch.equal(read[RESID], resid(gpt2, ids).flatten(0, 1).to(dtype))
    assert read["token"] == ids.flatten().tolist()
    assert read["sequence"] == [row for row in range(20) for _ in range(7)]
    assert read["position"] == [*range(7)] * 20
    assert read.layout.rows == "token"
    assert read.layout.finished


def test_a_site_per_head_keeps_its_shape(gpt2, out):
    ids = tokens(4)
    extract(gpt2, ids, [RESID, Z], out)
    wanted = plainly_hooked(gpt2, ids, "blocks.0.attn.o.hook_in")["blocks.0.attn.o.hook_in"][0]
    read = Read(out)
    assert torch.equal(read[Z], wanted.flatten(0, 1))
    assert read.layout.sites[1].axes == ("head", "d_head")
    assert read.layout.sites[1].hook == "blocks.0.attn.o.hook_in"


def test_one_position_makes_a_row_a_sequence(gpt2, out):
    ids = tokens(5)
    extract(gpt2, ids, RESID, out, slice={"pos": -1})
    read = Read(out)
    assert torch.equal(read[RESID], resid(gpt2, ids)[:, -1])
    assert read.layout.rows == "sequence"
    assert read["token"] == ids[:, -1].tolist()
    assert read["position"] == [6] * 5


def test_other_axes_are_selected_from(gpt2, out):
    ids = tokens(4)
    extract(gpt2, ids, Z, out, slice={"head": [3, 1], "pos": slice(1, 3)})
    wanted = plainly_hooked(gpt2, ids, "blocks.0.attn.o.hook_in")["blocks.0.attn.o.hook_in"][0]
    assert torch.equal(Read(out)[Z], wanted[:, 1:3, [3, 1]].flatten(0, 1))


@pytest.mark.parametrize("pos", [slice(None, None, -1), [6, 5, 4, 3, 2, 1, 0]])
def test_rows_are_in_the_order_of_the_slice(gpt2, out, pos):
    ids = tokens(2)
    extract(gpt2, ids, RESID, out, slice={"pos": pos})
    read = Read(out)
    assert read["token"] == ids.flip(1).flatten().tolist()
    assert torch.equal(read[RESID], resid(gpt2, ids).flip(1).flatten(0, 1))


def test_a_position_is_taken_several_times(gpt2, out):
    ids, mask = tokens(2, 3), torch.tensor([[1, 1, 0], [1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    extract(gpt2, [batch], RESID, out, slice={"pos": [0, 0, 0]})
    wanted = resid(gpt2, ids, attention_mask=mask)[:, [0, 0, 0]]
    assert torch.equal(Read(out)[RESID], wanted.flatten(0, 1))


def test_padding_leaves_no_rows(gpt2, out):
    ids = tokens(3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    extract(gpt2, [{"input_ids": ids, "attention_mask": mask}], RESID, out)
    read = Read(out)
    wanted = resid(gpt2, ids, attention_mask=mask)[mask.bool()]
    assert torch.equal(read[RESID], wanted)
    assert read["position"] == [*range(5), *range(7), *range(4)]
    assert read["sequence"] == [0] * 5 + [1] * 7 + [2] * 4


def test_a_mask_by_name_chooses_among_real_tokens(gpt2, out):
    ids = tokens(2)
    real = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    wanted = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 2]])
    batch = {"input_ids": ids, "attention_mask": real, "loss_mask": wanted}
    extract(gpt2, [batch], RESID, out, mask="loss_mask")
    read = Read(out)
    kept = wanted.bool() & real.bool()
    assert torch.equal(read[RESID], resid(gpt2, ids, attention_mask=real)[kept])
    assert read["position"] == [2, 3, 4, 0, 6]
    assert read.layout.input["mask"] == "loss_mask"


def test_the_attention_mask_by_name_still_reaches_the_model(gpt2, out):
    ids = tokens(2)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    extract(gpt2, [batch], RESID, out, mask="attention_mask")
    assert torch.equal(Read(out)[RESID], resid(gpt2, ids, attention_mask=mask)[mask.bool()])


def test_a_mask_goes_along_with_single_sequences(gpt2, out):
    rows = [
        {"input_ids": tokens(1)[0, :size].tolist(), "kept": [0] * (size - 2) + [1, 1]}
        for size in (3, 7, 5)
    ]
    extract(gpt2, rows, RESID, out, mask="kept", batch_size=2)
    read = Read(out)
    found = sorted(zip(read["sequence"], read["position"], strict=True))
    assert found == [(0, 1), (0, 2), (1, 5), (1, 6), (2, 3), (2, 4)]


def test_without_a_mask_padding_leaves_rows_too(gpt2, out):
    ids = tokens(2)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    extract(gpt2, [{"input_ids": ids, "attention_mask": mask}], RESID, out, mask=None)
    assert torch.equal(Read(out)[RESID], resid(gpt2, ids, attention_mask=mask).flatten(0, 1))


def test_the_last_position_is_that_of_a_real_token(gpt2, out):
    ids = tokens(2)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    extract(gpt2, [{"input_ids": ids, "attention_mask": mask}], RESID, out, slice={"pos": -1})
    wanted = resid(gpt2, ids, attention_mask=mask)[[0, 1], [2, 6]]
    assert torch.equal(Read(out)[RESID], wanted)


def test_positions_and_token_ids_are_dropped(gpt2, out):
    ids = tokens(6)
    extract(gpt2, ids, RESID, out, drop={"position": [0], "token": [int(ids[2, 3])]})
    kept = ids != ids[2, 3]
    kept[:, 0] = False
    assert torch.equal(Read(out)[RESID], resid(gpt2, ids)[kept])


@pytest.mark.parametrize("most", [1, 13, 14, 41])
def test_the_number_of_tokens_is_exact(gpt2, out, most):
    ids = tokens(6)
    assert extract(gpt2, ids.split(2), RESID, out, max_tokens=most).rows == most
    assert torch.equal(Read(out)[RESID], resid(gpt2, ids).flatten(0, 1)[:most])


def test_an_input_is_read_no_further_than_the_number_of_tokens(gpt2, out):
    read = []

    def counted():
        for seed in range(20):
            read.append(tokens(2, seed=seed))
            yield read[-1]

    extract(gpt2, counted(), RESID, out, max_tokens=100)
    assert len(read) == 8


@pytest.mark.parametrize("wrap", [list, TensorDataset])
def test_a_dataloader_is_an_input(gpt2, out, wrap):
    ids = tokens(6)
    loader = DataLoader(wrap(ids), batch_size=4)
    extract(gpt2, loader, RESID, out)
    assert torch.equal(Read(out)[RESID], resid(gpt2, ids).flatten(0, 1))


def test_a_dataloader_whose_workers_were_spawned_is_an_input(gpt2, out):
    ids = tokens(6)
    loader = DataLoader(
        TensorDataset(ids), batch_size=4, num_workers=1, multiprocessing_context="spawn"
    )
    extract(gpt2, loader, RESID, out)
    assert torch.equal(Read(out)[RESID], resid(gpt2, ids).flatten(0, 1))


def test_sequences_leave_what_each_leaves_alone(gpt2, out):
    given = sequences()
    extract(gpt2, given, RESID, out, batch_size=4)
    read = Read(out)
    by_sequence = torch.tensor(read["sequence"])
    for number, ids in enumerate(given):
        rows = by_sequence == number
        torch.testing.assert_close(read[RESID][rows], resid(gpt2, ids[None])[0], atol=1e-5, rtol=0)
        assert torch.tensor(read["token"])[rows].tolist() == ids.tolist()


def test_sequences_of_like_length_run_together(gpt2, out):
    seen = []
    hook = gpt2.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    extract(gpt2, sequences(256), RESID, out, batch_size=8)
    hook.remove()
    computed = sum(shape.numel() for shape in seen)
    assert computed < 1.1 * len(Read(out))


def test_packed_sequences_are_one_stream(gpt2, out):
    given = sequences()
    stream = torch.cat(given)
    extract(gpt2, given, RESID, out, pack=True, context=16, batch_size=3)
    read = Read(out)
    assert read["token"] == stream.tolist()
    assert read["position"] == [place % 16 for place in range(len(stream))]
    assert read["sequence"] == [place // 16 for place in range(len(stream))]
    whole = len(stream) // 16 * 16
    wanted = resid(gpt2, stream[:whole].view(-1, 16)).flatten(0, 1)
    torch.testing.assert_close(read[RESID][:whole], wanted, atol=1e-5, rtol=0)


def test_what_is_longer_than_the_context_is_cut_and_counted(gpt2, out):
    done = extract(gpt2, [tokens(1, 20)[0], tokens(1, 6)[0]], RESID, out, context=8)
    assert done.cut == 12
    assert done.rows == 14


def test_labels_and_ids_come_along(gpt2, out):
    rows = [
        {"input_ids": ids.tolist(), "label": n % 2, "id": f"t{n}"}
        for n, ids in enumerate(sequences(9))
    ]
    extract(gpt2, rows, RESID, out, carry=["label", "id"], slice={"pos": -1})
    read = Read(out)
    assert read["label"] == [number % 2 for number in read["sequence"]]
    assert read["id"] == [f"t{number}" for number in read["sequence"]]
    assert read.layout.carried == ("label", "id")


def test_labels_of_a_batch_are_repeated_for_each_token(gpt2, out):
    batch = {"input_ids": tokens(3), "label": torch.tensor([4, 5, 6])}
    extract(gpt2, [batch], RESID, out, carry=["label"])
    assert Read(out)["label"] == [4] * 7 + [5] * 7 + [6] * 7


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hugging_face_dataset_is_an_input(gpt2, out, streaming):
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": ids.tolist(), "label": n} for n, ids in enumerate(sequences(9))]
    given = datasets.Dataset.from_list(rows)
    given = given.to_iterable_dataset() if streaming else given
    extract(gpt2, given, RESID, out, carry=["label"])
    read = Read(out)
    assert sorted(set(read["label"])) == [*range(9)]
    assert read["label"] == read["sequence"]


def test_a_plain_hugging_face_model_is_read_by_hook_names(out):
    ids, llama = tokens(), huggingface("LlamaForCausalLM")  # hidden states leave hooks on it
    extract(llama, ids, {"resid": "blocks.0.hook_resid_post"}, out)
    with torch.no_grad():
        wanted = llama(ids, output_hidden_states=True).hidden_states[1]
    assert torch.equal(Read(out)["resid"], wanted.flatten(0, 1))


def test_a_module_is_captured_whose_axes_are_named(mlp, out):
    ids = tokens()
    extract(mlp, ids, Site("block", axes="batch pos d"), out)
    assert torch.equal(Read(out)["block"], mlp.block(mlp.embed(ids)).detach().flatten(0, 1))


def test_the_memory_of_a_row_is_its_own(gpt2, out):
    extract(gpt2, [tokens(2, seed=n) for n in range(8)], RESID, out)
    wanted = [resid(gpt2, tokens(2, seed=n)).flatten(0, 1) for n in range(8)]
    assert torch.equal(Read(out)[RESID], torch.cat(wanted))


def test_gradients_hooks_and_threads_are_left_as_they_were(gpt2, out):
    before = threading.active_count()
    extract(gpt2, tokens(), RESID, out)
    assert threading.active_count() == before
    assert torch.is_grad_enabled()


def test_an_attention_pattern_has_a_row_for_each_query(gpt2, out):
    ids, pattern = tokens(), "blocks.0.attn.hook_pattern"
    extract(gpt2, ids, pattern, out)
    wanted = plainly_hooked(gpt2, ids, pattern)[pattern][0]
    assert torch.equal(Read(out)[pattern], wanted.movedim(2, 1).flatten(0, 1))


def test_forwards_run_to_their_end_where_that_is_asked_for(gpt2, out):
    ended = []
    hook = gpt2.unembed.register_forward_hook(lambda *_: ended.append(1))
    extract(gpt2, tokens(4).split(2), RESID, out, stop=False)
    hook.remove()
    assert len(ended) == 2
    assert torch.equal(Read(out)[RESID], resid(gpt2, tokens(4)).flatten(0, 1))


def test_a_module_that_takes_no_mask_is_given_none(mlp, out):
    given = sequences(9)
    extract(mlp, given, Site("block", axes="batch pos d"), out)
    assert len(Read(out)) == sum(map(len, given))


@pytest.mark.parametrize("form", [lambda ids: [*ids], lambda ids: [ids], lambda ids: ids])
def test_arrays_are_token_ids(gpt2, out, form):
    ids = tokens()
    extract(gpt2, form(ids.numpy()), RESID, out)
    assert torch.equal(Read(out)[RESID], resid(gpt2, ids).flatten(0, 1))


def test_an_array_runs_in_batches(gpt2, out):
    ids, ran = tokens(5), []
    ids[0, -1] = 0
    hook = gpt2.register_forward_pre_hook(lambda _, args: ran.append(args[0].shape))
    extract(gpt2, ids.numpy(), RESID, out, batch_size=2)
    hook.remove()
    assert ran == [(2, 7), (2, 7), (1, 7)]
    assert Read(out)["sequence"] == [row for row in range(5) for _ in range(7)]


def test_what_is_not_finite_is_written_where_that_is_asked_for(out):
    site = Site("embed", axes="batch pos d")
    ids = torch.tensor([[1, 7]])
    extract(Poisoned(float("nan")), ids, site, out, finite=False)
    assert Read(out)["embed"].isnan().any(1).tolist() == [False, True]


def test_a_tensor_that_the_caller_fills_anew_is_read_as_it_was(gpt2, out):
    batches = [tokens(2, 7, seed) for seed in range(6)]

    def refilled():
        given = torch.empty_like(batches[0])
        for batch in batches:
            yield given.copy_(batch)

    extract(gpt2, refilled(), RESID, out)
    assert torch.equal(Read(out)[RESID], resid(gpt2, torch.cat(batches)).flatten(0, 1))
