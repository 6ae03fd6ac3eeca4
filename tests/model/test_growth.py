"""Where axes lie: told by names where sizes leave no doubt, else by a run of the model."""

import gc
import logging
import random
import threading

import numpy as np
import pytest
import torch
import transformers
from configs import SIZES, TWO_SIDED, VISION
from models import GENERATION, HAS_T5, Mlp, bridge, hooks_of, huggingface, tokens
from torch import nn

from actctx import AxisError, SelectionError, Site, capture
from actctx._capture.axis_layout import numbers_of
from actctx._capture.growth import grown, growth_at
from actctx._model.axes import grown_axes
from actctx._model.stand_in import undisturbed

BATCH, POS, BOTH, ROWS = (
    frozenset(each) for each in (["batch"], ["pos"], ["rows", "pos"], ["rows"])
)
NONE = frozenset[str]()


class Swapped(nn.Module):
    """A model of somebody's own, whose layer runs on `pos batch d`, as fairseq's do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, ids):
        return self.layer(self.embed(ids).transpose(0, 1)).transpose(0, 1)


def hidden_of(model, name, ids):
    found = []
    handle = model.get_submodule(name).register_forward_hook(lambda *call: found.append(call[2]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return found[0]


@pytest.mark.parametrize(
    ("growth", "proposed", "shape", "axes"),
    [
        ((BATCH, POS, NONE), ("batch", "pos", "d_model"), (4, 4, 8), "batch pos d_model"),
        ((BATCH, POS, NONE), None, (4, 4, 8), "batch pos _"),
        ((POS, BATCH, NONE), None, (4, 4, 8), "pos batch _"),
        (
            (NONE, BATCH, POS, NONE),
            ("batch", "pos", "d_model"),
            (4, 4, 4, 8),
            "_ batch pos d_model",
        ),
        (
            (BATCH, POS, NONE, NONE),
            ("batch", "head", "pos", "d_head"),
            (4, 4, 4, 8),
            "batch pos head d_head",
        ),
        ((BATCH, NONE, POS, POS), None, (4, 4, 7, 7), "batch _ query key"),
        ((BATCH, NONE), ("batch", "pos", "d_vocab"), (4, 8), "batch _"),
        ((BATCH, POS, NONE), ("query", "key", "head"), (4, 4, 8), "batch pos _"),
        ((NONE, POS, NONE), ("batch", "pos", "d_rotary"), (1, 7, 8), "batch pos d_rotary"),
        ((BOTH, NONE), ("token", "expert"), (28, 4), "token expert"),
        ((ROWS, POS, POS), None, (16, 7, 7), "_ query key"),
    ],
)
def test_axes_are_named_by_what_grows(growth, proposed, shape, axes):
    assert grown_axes(growth, proposed, shape) == tuple(axes.split())


def test_more_axes_than_can_be_told_apart_are_not_named():
    assert grown_axes((BATCH, POS, POS, POS), None, (2, 7, 7, 7)) is None
    assert grown_axes((BATCH, BATCH, POS), None, (2, 2, 7)) is None


@pytest.mark.parametrize("pos", [4, 7])
def test_a_position_of_any_module_is_selected_where_it_lies(pos):
    model, ids = Swapped(), tokens(4, pos)
    with capture(model, "layer", slice={"pos": -1}) as acts:
        model(ids)
    assert torch.equal(acts.tensor, hidden_of(model, "layer", ids)[-1])
    assert acts.axes("layer") == ("batch", "_")


def test_forwards_join_along_the_sequences_wherever_they_lie():
    model, ids = Swapped(), (tokens(4), tokens(2))
    with capture(model, "layer") as acts:
        for each in ids:
            model(each)
    expected = torch.cat([hidden_of(model, "layer", each) for each in ids], 1)
    assert torch.equal(acts.tensor, expected)


def test_forwards_join_where_their_axis_lies_once_the_model_is_gone():
    model, ids = Swapped(), (tokens(4), tokens(2))
    with capture(model, "layer") as acts:
        for each in ids:
            model(each)
    expected = torch.cat([hidden_of(model, "layer", each) for each in ids], 1)
    del model
    gc.collect()
    assert torch.equal(acts.tensor, expected)


@pytest.mark.parametrize("before", [[], [5]])
def test_a_layout_that_only_long_texts_have_is_refused(before):
    class Chunked(Mlp):
        def forward(self, ids):
            hidden = self.embed(ids)
            is_long = ids.shape[1] > 16
            return self.block(hidden.transpose(0, 1) if is_long else hidden)

    model = Chunked()
    with (
        pytest.raises(AxisError, match="cannot be determined from the sizes of the forward"),
        capture(model, "block", slice={"pos": -1}),
    ):
        for pos in (*before, 20):
            model(tokens(3, pos))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.MultiheadAttention])
@pytest.mark.parametrize("is_batch_first", [False, True])
def test_ids_that_a_model_takes_to_be_positions_first_are_not_taken_for_sequences(
    kind, is_batch_first
):
    class Mixing(Mlp):
        def __init__(self):
            super().__init__()
            self.mix = kind(8, 8, batch_first=is_batch_first)

        def forward(self, ids):
            hidden = self.block(self.embed(ids))
            given = (hidden,) if kind is nn.LSTM else (hidden, hidden, hidden)
            return self.head(self.mix(*given)[0])

    model = Mixing()
    assert (growth_at(model, model.head, "out", lambda value: value) is None) != is_batch_first


@pytest.mark.parametrize("as_one", [False, True])
def test_tokens_are_found_in_what_a_wrapper_is_given(as_one, ids):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = huggingface("LlamaForCausalLM")

        def forward(self, *batch):
            return self.inner(**batch[0]) if as_one else self.inner(*batch)

    model = Wrapper()
    with capture(model, "inner.model.norm", slice={"pos": -1}) as acts:
        model({"input_ids": ids} if as_one else ids)
    assert acts.tensor.shape == (3, 32)


@pytest.mark.parametrize("by_glob", [False, True])
def test_what_cannot_be_told_is_refused(by_glob):
    linear = nn.Sequential(nn.Linear(4, 4))
    names = (lambda name: name == "0") if by_glob else "0"
    with pytest.raises(AxisError, match="are not known"):
        capture(linear, names, slice={"pos": -1})


def test_a_module_that_runs_on_features_is_not_taken_to_read_tokens():
    model = nn.Sequential(nn.ReLU())  # which runs on token ids as well
    with (
        pytest.raises(AxisError, match="cannot be determined from the sizes of the forward"),
        capture(model, "0", slice={"pos": -1}),
    ):
        model(torch.ones(2, 3, 4))


def test_a_position_outside_of_an_axis_is_refused_before_any_forward_where_the_model_tells():
    with pytest.raises(SelectionError, match="has the size 4 along 'head'"):
        capture(bridge(), "blocks.0.attn.hook_z", slice={"head": 4})


def test_a_size_that_only_the_config_has_is_no_reason_to_refuse(ids):
    model = bridge()
    model.cfg.d_mlp = 16
    with capture(model, "blocks.0.mlp.hook_post", slice={"d_mlp": 100}) as acts:
        model(ids)
    assert acts.tensor.shape == (3, 7)


def test_the_model_runs_once_however_many_captures_ask():
    model = huggingface("LlamaForCausalLM")
    assert grown(model) is grown(model)
    first = grown(model)
    model.model.layers[0].mlp = nn.Identity()
    assert grown(model) is not first


def test_a_model_of_few_positions_is_run_on_as_many():
    model = huggingface("BertForMaskedLM", max_position_embeddings=8)
    with capture(model, "bert.encoder.layer.0", slice={"pos": -1}) as acts:
        model(tokens(4, 4))
    assert torch.equal(acts.tensor, hidden_of(model, "bert.encoder.layer.0", tokens(4, 4))[:, -1])


def test_the_run_touches_nothing():
    model = bridge()
    fired = []
    model.hook_dict["blocks.0.hook_resid_post"].add_hook(lambda value, hook: fired.append(value))  # noqa: ARG005  so named by TransformerLens
    model.blocks[0].register_forward_hook(lambda *_: fired.append(0))
    before, weights = hooks_of(model), [*model.parameters()]
    state = torch.get_rng_state()
    assert grown(model) is not None
    assert fired == []
    assert hooks_of(model) == before
    assert all(one is other for one, other in zip(model.parameters(), weights, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_model_keeps_of_its_forwards_is_not_added_to(ids):
    class Noted(Mlp):
        def __init__(self):
            super().__init__()
            self.kept = {"losses": [], "of": self.head}

        def forward(self, ids):
            hidden = super().forward(ids)
            self.kept["losses"].append(hidden.mean())
            return hidden

    model = Noted()
    model(ids)  # whose graph keeps torch from copying the list
    assert grown(model) is not None
    assert len(model.kept["losses"]) == 1


def test_a_module_that_a_patched_forward_has_as_a_default_does_not_run():
    model, fired = Mlp(), []
    model.head.forward = lambda value, other=model.block: other(value)
    model.block.register_forward_hook(lambda *_: fired.append(0))
    assert grown(model) is not None
    assert fired == []


def test_random_numbers_go_on_as_without_the_run():
    class Drawing(Mlp):
        def forward(self, ids):
            return super().forward(ids) + random.random() + np.random.rand()  # noqa: NPY002, S311  as older code draws

    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002  as above
    assert grown(Drawing()) is not None
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002  as above


@pytest.mark.parametrize("in_place", [False, True])
def test_parts_that_are_compiled_run_as_they_are_written(in_place):
    def compiled(*_):
        raise AssertionError

    model = Mlp()
    if in_place:
        model.block.compile(backend=compiled)
    else:
        model.block = torch.compile(model.block, backend=compiled)
    grew = growth_at(model, model.head, "out", lambda value: value)
    assert grew.growth == (BATCH, POS, NONE)


def test_runs_in_two_threads_leave_the_levels_of_loggers_as_they_were():
    logger, before = logging.getLogger("transformers"), logging.getLogger("transformers").level
    entered, left = threading.Event(), threading.Event()

    def run():
        with undisturbed(Mlp()):
            entered.set()
            left.wait()

    beside = threading.Thread(target=run)
    with undisturbed(Mlp()):
        beside.start()
        entered.wait(0.2)  # in vain, as it has to wait itself
    left.set()
    beside.join()
    assert logger.level == before


def test_sequences_are_counted_by_tokens_and_not_by_sizes_of_pictures(ids):
    sizes = torch.tensor([[1, 4, 4]])
    assert numbers_of([{"image_grid_thw": sizes, "input_ids": ids}]) == (3, {7})


def test_nothing_of_the_run_stays_in_a_capture_that_is_open(ids):
    model = bridge()
    with capture(model, "blocks.*.hook_resid_post", slice={"pos": -1}) as acts:
        model(ids[:, :3])  # as many positions as sequences
        model(ids[:, :3])
    assert acts.forwards == 2
    assert acts["blocks.0.hook_resid_post"].shape == (6, 32)


def test_a_run_in_inference_mode_makes_no_inference_tensors_of_weights(ids):
    model = huggingface("LlamaForCausalLM")
    with torch.inference_mode(), capture(model, "model.norm", slice={"pos": -1}) as acts:
        model(ids)
    assert acts.tensor.shape == (3, 32)
    assert not any(weight.is_inference() for weight in model.parameters())


def test_a_thread_beside_the_run_keeps_its_hooks(ids):
    model = bridge()
    counted = []

    def run():
        with capture(model, "blocks.0.hook_resid_post") as acts, torch.no_grad():
            for _ in range(20):
                model(ids)
        counted.append(acts.forwards)

    beside = threading.Thread(target=run)
    beside.start()
    assert grown(model) is not None
    beside.join()
    assert counted == [20]


def test_sizes_that_depend_on_values_are_told_by_a_run_on_a_few_tokens():
    class Sized(Mlp):
        def forward(self, ids):
            kept = [row[: int((row > 0).sum())] for row in ids]
            return super().forward(torch.stack(kept))

    model = Sized()
    grew = growth_at(model, model.head, "out", lambda value: value)
    assert grew.growth == (BATCH, POS, NONE)
    assert model.training


def test_rows_that_are_not_sequences_are_not_called_so():
    class Heads(Mlp):
        def __init__(self):
            super().__init__()
            self.scores = nn.Identity()

        def forward(self, ids):
            hidden = self.embed(ids).unflatten(-1, (2, 4)).transpose(1, 2).flatten(0, 1)
            return self.scores(hidden @ hidden.mT)

    model = Heads()
    with capture(model, "scores") as acts:
        model(tokens())
    assert acts.axes("scores") == ("_", "query", "key")


@pytest.mark.skipif(GENERATION < 4, reason="4.3 tells where the positions of such points lie")
def test_a_site_that_the_user_names_is_not_asked_of_the_model(ids):
    model = bridge()
    with capture(model, Site("blocks.0", axes="pos batch d_model"), slice={"pos": 0}) as acts:
        model(ids)
    assert acts.axes("blocks.0") == ("batch", "d_model")


def test_a_mask_is_refused_where_there_are_no_sequences_without_advice_that_is_wrong():
    class Table(Swapped):
        def forward(self, ids):
            return self.embed(ids) + self.layer(self.embed.weight[: ids.shape[1]])

    with pytest.raises(AxisError) as refused:
        capture(Table(), "layer", mask="attention")
    assert str(refused.value) == (
        "mask= keeps real tokens, but 'layer' has no axis 'batch': its axes are 'pos _'; capture "
        "it without mask="
    )


def test_the_model_itself_is_selected_from_with_a_head_as_without(ids):
    model = huggingface("LlamaForCausalLM")
    with torch.no_grad():
        logits = model(ids).logits
    with capture(model, "", slice={"pos": -1}) as acts:
        model(ids)
    assert torch.equal(acts.tensor, logits[:, -1])


def whisper():
    config = transformers.WhisperConfig(**TWO_SIDED, num_mel_bins=16, max_source_positions=16)
    return transformers.WhisperModel(config).eval()


@pytest.mark.parametrize("name", ["encoder.layers.1", "decoder.layers.1"])
def test_positions_are_told_where_a_table_fixes_how_many_there_are(name):
    model, ids = whisper(), tokens(4, 4)
    given = {"input_features": torch.randn(4, 16, 32), "decoder_input_ids": ids}
    with capture(model, name) as whole:
        model(**given)
    with capture(model, name, slice={"pos": -1}) as acts:
        model(**given)
    assert torch.equal(acts.tensor, whole.tensor[:, -1])


def test_height_and_width_of_an_image_are_not_called_positions():
    config = transformers.ViTConfig(**{**VISION, "patch_size": 4})
    model = transformers.ViTModel(config).eval()
    with capture(model, "embeddings.patch_embeddings.projection") as acts:
        model(torch.randn(2, 3, 16, 16))
    assert acts.axes("embeddings.patch_embeddings.projection") == ("batch", "_", "_", "_")


def test_a_slice_of_a_site_with_other_positions_than_tokens_warns_once(ids):
    sizes = {**SIZES, "vocab_size": 50, "attention_window": [4, 4], "max_position_embeddings": 64}
    model = transformers.LongformerModel(transformers.LongformerConfig(**sizes)).eval()
    given = {"input_ids": ids[:, :6], "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    with capture(model, "encoder.layer.*", slice=-1):
        with pytest.warns(UserWarning, match="does not have one position per token of the forward"):
            model(**given)
        model(**given)
    with capture(model, "encoder.layer.1", slice=-1):
        model(ids[:, :4], attention_mask=given["attention_mask"][:, :4])  # a whole window


def test_a_slice_of_the_logits_that_were_kept_warns(ids):
    model = huggingface("LlamaForCausalLM")
    with (
        pytest.warns(UserWarning, match="'lm_head' does not have one position per token"),
        capture(model, "lm_head", slice=0),
    ):
        model(ids, logits_to_keep=2)


def test_a_layout_that_depends_on_the_sizes_is_refused_where_they_coincide():
    class Sorted(Swapped):
        def forward(self, ids):
            hidden = self.embed(ids)
            is_long = hidden.shape[1] > hidden.shape[0]
            return self.layer(hidden.transpose(0, 1) if is_long else hidden)

    model = Sorted()
    for ids in (tokens(4, 4), tokens(3, 7)):
        with (
            pytest.raises(AxisError, match=r"cannot be told|are not known"),
            capture(model, "layer", slice={"pos": -1}),
        ):
            model(ids)


@pytest.mark.skipif(not HAS_T5, reason="its bridge does not run")
def test_both_sides_of_a_bridge_are_counted(ids):
    model = bridge("T5ForConditionalGeneration")
    names = ["encoder_blocks.0.hook_in", "decoder_blocks.0.hook_in"]
    with capture(model, names, slice=-1) as acts:  # without a warning
        model(ids, decoder_input_ids=ids[:, :5])
    assert [acts[name].shape for name in names] == [(3, 32), (3, 32)]
