"""What `extract` writes of sequences with padding: what each leaves alone, on whichever side."""

import functools
import json

import pytest
import torch
import transformers
from configs import SIZES, VOCAB
from extracted import Read, lance, refusal
from models import ARCHITECTURES, bart, bridge, huggingface, tokens
from torch import nn

from actctx import DataError, OptionError, Site
from actctx._extract.batching import Batch, in_equal_lengths, with_padding_behind
from actctx._extract.leaks import one_alone
from actctx.dataset import ActivationDataset
from actctx.extract import extract

LENGTHS = (5, 2, 7)
MASK = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
IDS = tokens(3)
FIRST = "blocks.0.hook_resid_post"


def left(entries, padding=0):
    """Put the entries of real tokens at the end of each sequence."""
    moved = torch.full_like(entries, padding)
    for row, length in enumerate(LENGTHS):
        moved[row, 7 - length :] = entries[row, :length]
    return moved


def in_order(read, name):
    order = sorted(range(len(read)), key=lambda row: (read["sequence"][row], read["position"][row]))
    return read[name][order]


def alone(model, module, **given):
    """Run each sequence by itself, and keep what a module leaves of it."""
    kept = []
    handle = module.register_forward_hook(lambda *args: kept.append(args[2]))
    with torch.no_grad():
        for row, length in enumerate(LENGTHS):
            own = {name: value[row : row + 1, :length] for name, value in given.items()}
            model(IDS[row : row + 1, :length], **own)
    handle.remove()
    return torch.cat([(each[0] if isinstance(each, tuple) else each)[0] for each in kept])


def first_block(model):
    inner = getattr(model, "original_model", model)
    return next(
        module[0] for _, module in inner.named_modules() if isinstance(module, nn.ModuleList)
    )


ONE_SIDED = [name for name in ARCHITECTURES if not name.startswith("T5")]


@pytest.mark.parametrize("build", [huggingface, bridge], ids=["plain", "bridge"])
@pytest.mark.parametrize("architecture", ONE_SIDED)
def test_rows_of_left_padded_batches_are_those_of_the_sequences_alone(out, architecture, build):
    model = build(architecture)
    batch = {"input_ids": left(IDS), "attention_mask": left(MASK).long()}
    extract(model, [batch], FIRST, out)
    read = Read(out)
    wanted = alone(model, first_block(model))
    torch.testing.assert_close(read[FIRST], wanted, atol=1e-5, rtol=1e-5)
    assert read["token"] == IDS[MASK].tolist()
    assert read["sequence"] == [0] * 5 + [1] * 2 + [2] * 7
    assert read["position"] == [*range(5), *range(2), *range(7)]


def test_rows_of_a_left_padded_encoder_are_those_of_the_sequences_alone(out):
    model = bart()
    batch = {"input_ids": left(IDS), "attention_mask": left(MASK).long()}
    site = Site("model.encoder.layers.0", axes="batch pos d")
    extract(model, [batch], site, out)
    wanted = alone(model, model.model.encoder.layers[0])
    torch.testing.assert_close(Read(out)[site.name], wanted, atol=1e-5, rtol=1e-5)


def test_what_has_an_entry_for_each_token_moves_along(out):
    model = huggingface("BertForMaskedLM")
    types = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1, 1]])
    positions = torch.arange(7).flip(0).expand(3, 7)
    given = {"token_type_ids": types, "position_ids": positions}
    moved = {name: left(entries) for name, entries in given.items()}
    batch = {"input_ids": left(IDS), "attention_mask": left(MASK).long(), **moved}
    extract(model, [batch], FIRST, out)
    wanted = alone(model, first_block(model), **given)
    torch.testing.assert_close(Read(out)[FIRST], wanted, atol=1e-5, rtol=1e-5)


def test_a_mask_of_rows_chooses_the_tokens_that_it_did(out):
    kept = torch.tensor([[1, 0, 1, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 1]])
    masks = {"attention_mask": left(MASK).long(), "loss_mask": left(kept)}
    model = huggingface("GPT2LMHeadModel")
    extract(model, [{"input_ids": left(IDS), **masks}], FIRST, out, mask="loss_mask")
    wanted = alone(model, first_block(model))[kept[MASK].bool()]
    torch.testing.assert_close(Read(out)[FIRST], wanted, atol=1e-5, rtol=1e-5)
    assert Read(out)["position"] == [0, 2, 4, 1, 0, 1, 6]


def test_rows_of_padding_that_are_asked_for_do_not_change_those_of_tokens(out):
    model = huggingface("GPT2LMHeadModel")
    batch = {"input_ids": left(IDS), "attention_mask": left(MASK).long()}
    extract(model, [batch], FIRST, out, mask=None)
    read = Read(out)
    assert read["token"] == left(IDS).flatten().tolist()
    assert read["position"] == [*range(7)] * 3
    real = left(MASK).flatten()
    wanted = alone(model, first_block(model))
    torch.testing.assert_close(read[FIRST][real], wanted, atol=1e-5, rtol=1e-5)


def test_a_hole_in_a_mask_stays_where_it_is(out):
    model = huggingface("GPT2LMHeadModel")
    mask = torch.tensor([[0, 0, 1, 0, 1, 1, 1]])
    extract(model, [{"input_ids": tokens(1), "attention_mask": mask}], FIRST, out)
    with torch.no_grad():
        states = model(
            tokens(1)[:, 2:], attention_mask=mask[:, 2:], output_hidden_states=True
        ).hidden_states[1]
    wanted = states[0, mask[0, 2:].bool()]
    torch.testing.assert_close(Read(out)[FIRST], wanted, atol=1e-5, rtol=1e-5)


def test_a_data_set_of_one_side_of_padding_is_resumed_with_the_other(out):
    model = huggingface("GPT2LMHeadModel")
    behind = {"input_ids": IDS, "attention_mask": MASK.long()}
    before = {"input_ids": left(IDS), "attention_mask": left(MASK).long()}
    extract(model, [behind], FIRST, out, max_tokens=6)
    assert extract(model, [before], FIRST, out).rows == 14
    wanted = alone(model, first_block(model))
    torch.testing.assert_close(Read(out)[FIRST], wanted, atol=1e-5, rtol=1e-5)


def as_written_before_padding_was_moved(out):
    """Take out of the metadata what versions that ran padding as it is did not write."""
    dataset = lance.dataset(str(out))
    (key,) = dataset.schema.metadata
    described = json.loads(dataset.schema.metadata[key])
    del described["input"]["equal_lengths"]
    dataset.update_schema_metadata({key.decode(): json.dumps(described)})


PADDED = {"input_ids": left(IDS), "attention_mask": left(MASK).long()}
UNPADDED = {"input_ids": IDS, "attention_mask": MASK.long()}
PLACED = {**PADDED, "position_ids": (left(MASK).cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("add", [False, True])
def test_rows_of_left_padding_by_an_older_version_are_not_joined_by_others(out, add):
    model = huggingface("GPT2LMHeadModel")
    extract(model, [PADDED], FIRST, out, max_tokens=None if add else 6)
    as_written_before_padding_was_moved(out)
    site = "blocks.1.hook_resid_post" if add else FIRST
    assert refusal(DataError, model, [PADDED], site, out, add=add) == (
        f"cannot resume '{out}': an older version of actctx wrote it, which did not move padding "
        "behind the tokens, and this model may count padding as positions, so its rows may be "
        "wrong; give another path"
    )


@pytest.mark.parametrize(
    ("architecture", "written", "more"),
    [
        ("GPT2LMHeadModel", UNPADDED, [PADDED]),
        ("GPT2LMHeadModel", PLACED, []),
        ("LlamaForCausalLM", PADDED, []),
    ],
    ids=["unpadded so far", "with positions", "without a table"],
)
def test_right_rows_of_an_older_version_are_joined_by_others(out, architecture, written, more):
    model = huggingface(architecture)
    extract(model, [written], FIRST, out, max_tokens=None if more else 6)
    as_written_before_padding_was_moved(out)
    assert extract(model, [written, *more], FIRST, out).rows == 14 * (1 + len(more))


def test_padding_moves_wherever_new_tensors_are_made():
    batch = Batch(left(IDS), left(MASK), torch.arange(3))
    places = left(MASK).nonzero()
    with torch.device("meta"):
        moved, where = with_padding_behind(batch, places)
        parts = [tuple(part.tokens.shape) for part in in_equal_lengths(batch)]
        chosen = one_alone(moved, where)
    assert torch.equal(moved.tokens, IDS.where(MASK, 0))
    assert torch.equal(where, MASK.nonzero())
    assert parts == [(1, 5), (1, 2), (1, 7)]
    assert torch.equal(chosen.batch.tokens, IDS[1:2, :2])


def test_positions_that_go_with_the_batch_as_it_is_keep_it_so(out):
    model, places = huggingface("GPT2LMHeadModel"), torch.arange(7)[None]
    mask = left(MASK).long()
    batch = {"input_ids": left(IDS), "attention_mask": mask, "position_ids": places}
    extract(model, [batch], FIRST, out)
    with torch.no_grad():
        states = model(
            left(IDS), attention_mask=mask, position_ids=places, output_hidden_states=True
        ).hidden_states[1]
    torch.testing.assert_close(Read(out)[FIRST], states[mask.bool()], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_moved_along_is_refused(out):
    batch = {"input_ids": left(IDS), "attention_mask": left(MASK).long()}
    types = torch.zeros(1, 7, dtype=torch.long)
    model = huggingface("BertForMaskedLM")
    assert refusal(DataError, model, [{**batch, "token_type_ids": types}], FIRST, out) == (
        "from sequence 0 on, the input has padding, and 'token_type_ids' of the shape (1, 7), and "
        "it is not known which of its entries belong to which token; give single sequences, or "
        "batches without padding before the tokens"
    )


def test_what_is_of_no_token_stays_as_it_is(out):
    class Pictured(Told):
        def forward(self, ids, attention_mask=None, pixel_values=None, scale=None):
            assert pixel_values.shape == (5, 7)
            return super().forward(ids, attention_mask) * scale[:, None, None]

    given = {"pixel_values": torch.zeros(5, 7), "scale": torch.tensor([1.0, 2.0, 3.0])}
    model = Pictured()
    batch = {"input_ids": left(IDS), "attention_mask": left(MASK).long(), **given}
    extract(model, [batch], Site("block", axes="batch pos d"), out)
    told = Told()
    torch.testing.assert_close(Read(out)["block"], alone(told, told.block))


# What a forward is told.


class Mean(nn.Module):
    """Adds the mean of what is not masked, so that each token sees all others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        self.block = nn.Identity()

    def mixed(self, ids, mask=None):
        weights = torch.ones_like(ids) if mask is None else mask
        found = self.embed(ids) * weights[..., None]
        mean = found.sum(1, keepdim=True) / weights.sum(1)[:, None, None]
        return self.block(self.embed(ids) + mean)


class Anything(Mean):
    """Takes anything, and makes nothing of it."""

    def forward(self, ids, **_):
        return self.mixed(ids)


class Told(Mean):
    def forward(self, ids, attention_mask=None):
        return self.mixed(ids, attention_mask)


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Wrapped(Told):
    """Says what it takes by the function that its forward wraps."""

    def _plain(self, ids, attention_mask=None):
        return self.mixed(ids, attention_mask)

    @functools.wraps(_plain)
    def forward(self, *args, **kwargs):
        return self._plain(*args, **kwargs)


BLOCK = Site("block", axes="batch pos d")


@pytest.mark.parametrize("build", [Anything, lambda: Wrapper(Anything())], ids=["own", "wrapped"])
def test_a_mask_that_no_parameter_names_is_not_taken_for_known(out, build):
    model = build()
    name = next(name for name, _ in model.named_modules() if name.endswith("block"))
    sequences = [IDS[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    extract(model, sequences, Site(name, axes="batch pos d"), out)
    module = model.get_submodule(name)
    wanted = alone(model, module)
    torch.testing.assert_close(in_order(Read(out), name), wanted)
    batch = {"input_ids": left(IDS), "attention_mask": left(MASK).long()}
    site = Site(name, axes="batch pos d")
    message = refusal(DataError, model, [batch], site, out.with_name("left.lance"))
    assert "takes no attention mask" in message
    extract(model, [batch], site, out.with_name("equal.lance"), equal_lengths=True)
    torch.testing.assert_close(in_order(Read(out.with_name("equal.lance")), name), wanted)


def test_padding_is_not_let_in_by_keeping_its_rows(out):
    batch = {"input_ids": left(IDS), "attention_mask": left(MASK).long()}
    message = refusal(DataError, Anything(), [batch], BLOCK, out, mask=None)
    assert "takes no attention mask" in message


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        nn.DataParallel,
        Wrapper,
        lambda model: Wrapper(nn.DataParallel(model)),
        lambda _: Wrapped(),
        lambda model: pytest.importorskip("accelerate").cpu_offload(model, torch.device("cpu")),
    ],
    ids=["compiled", "parallel", "wrapped", "twice", "functools", "offloaded"],
)
def test_the_forward_within_a_wrapper_tells_what_it_takes(out, wrap):
    plain, model = Told(), wrap(Told())
    name = next(name for name, _ in model.named_modules() if name.endswith("block"))
    site = Site(name.removeprefix("_orig_mod."), axes="batch pos d")
    batch = {"input_ids": left(IDS), "attention_mask": left(MASK).long()}
    extract(model, [batch], site, out)
    assert Read(out).layout.sites[0].name == site.name
    torch.testing.assert_close(Read(out)[site.name], alone(plain, plain.block))


def test_a_mask_under_another_name_tells_no_padding(out):
    class Other(Mean):
        def forward(self, ids, padding_mask=None):
            return self.mixed(ids, padding_mask)

    batch = {"input_ids": left(IDS), "padding_mask": left(MASK).long()}
    assert refusal(DataError, Other(), [batch], BLOCK, out) == (
        "data holds 'padding_mask', which the model's forward takes, but no 'attention_mask', so "
        "it is not known which tokens are padding; also give an 'attention_mask', or "
        "mask='padding_mask' if it is not 0 for the tokens that become rows"
    )
    model = Other()
    extract(model, [{**batch, "attention_mask": left(MASK).long()}], BLOCK, out)
    torch.testing.assert_close(Read(out)["block"], alone(model, model.block))
    whole = {"input_ids": IDS, "padding_mask": torch.ones_like(IDS)}
    assert extract(model, [whole], BLOCK, out.with_name("whole.lance")).rows == 21


def test_a_model_that_guesses_its_mask_by_a_token_id_is_given_one(out):
    config = transformers.XLMConfig(vocab_size=50, emb_dim=32, n_layers=2, n_heads=4)
    torch.manual_seed(0)
    model = transformers.XLMModel(config).eval()
    ids = tokens(2)
    ids[:, 3] = config.pad_index
    with torch.no_grad():
        wanted = model(
            ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
        ).hidden_states[1]
    site = Site("layer_norm2.0", axes="batch pos d")
    for number, data in enumerate(([{"input_ids": ids}], ids.tolist(), ids)):
        path = out.with_name(f"{number}.lance")
        extract(model, data, site, path)
        torch.testing.assert_close(Read(path)[site.name], wanted.flatten(0, 1))


# Models that let padding in.


LEAKY = {
    "ConvBert": {"embedding_size": 32, "head_ratio": 2},
    "MobileBert": {"embedding_size": 16, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "Yoso": {},
    "Nystromformer": {},
}


def leaky(architecture):
    options = {**SIZES, "vocab_size": VOCAB, **LEAKY[architecture]}
    config = getattr(transformers, f"{architecture}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}Model")(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:  # such that each token matters
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return model


LAYER = Site("encoder.layer.1", axes="batch pos d")
SEQUENCES = [IDS[row, :length].tolist() for row, length in enumerate(LENGTHS)]


@pytest.mark.parametrize(
    "data",
    [SEQUENCES, [{"input_ids": left(IDS), "attention_mask": left(MASK).long()}]],
    ids=["sequences", "batch"],
)
@pytest.mark.parametrize("architecture", LEAKY)
def test_padding_that_reaches_tokens_is_warned_of_and_left_out_by_an_option(
    out, architecture, data
):
    model = leaky(architecture)
    with pytest.warns(UserWarning, match="padding changes") as caught:
        extract(model, data, LAYER, out)
    (message,) = {str(each.message) for each in caught}
    assert message.startswith(
        "padding changes the tokens next to it: 'encoder.layer.1' of sequence 1 differs by "
    )
    assert message.endswith("; give equal_lengths=True, so that no forward has padding")
    equal = out.with_name("equal.lance")
    extract(model, data, LAYER, equal, equal_lengths=True)
    wanted = alone(model, model.encoder.layer[1])
    found = in_order(Read(equal), LAYER.name)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    worse = in_order(Read(out), LAYER.name)
    assert not torch.allclose(worse, wanted, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_not_taken_for_padding_that_reaches_tokens(out, dtype):
    model = huggingface("LlamaForCausalLM").to(dtype)
    assert extract(model, SEQUENCES, FIRST, out).rows == 14  # warnings are errors
    half = out.with_name("half.lance")
    assert extract(huggingface("LlamaForCausalLM"), SEQUENCES, FIRST, half, dtype=dtype).rows == 14


def test_what_does_not_run_alone_is_not_compared(out):
    class Pairs(Told):
        def forward(self, ids, attention_mask=None):
            if len(ids) < 2:
                raise ValueError
            return super().forward(ids, attention_mask)

    model, told = Pairs(), Told()
    batch = {"input_ids": IDS, "attention_mask": MASK.long()}
    extract(model, [batch], BLOCK, out)
    torch.testing.assert_close(Read(out)["block"], alone(told, told.block))


def test_batches_are_divided_by_length_in_the_order_of_their_first_sequence(out):
    seen = []
    model = Told()
    model.embed.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    ids = torch.cat([IDS, IDS])
    mask = torch.cat([left(MASK), MASK]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "label": [*"abcdef"]}
    extract(model, [batch], BLOCK, out, equal_lengths=True, carry="label")
    assert sorted({*seen}) == [(2, 2), (2, 5), (2, 7)]
    read = Read(out)
    assert [*dict.fromkeys(read["sequence"])] == [0, 3, 1, 4, 2, 5]
    assert [*dict.fromkeys(ActivationDataset(out)[:]["label"])] == [*"adbecf"]


def test_equal_lengths_do_not_go_with_rows_of_padding(out):
    batch = {"input_ids": IDS, "attention_mask": MASK.long()}
    options = {"mask": None, "equal_lengths": True}
    assert refusal(OptionError, Told(), [batch], BLOCK, out, **options) == (
        "equal_lengths=True runs without padding, but mask=None keeps its rows; leave one of them "
        "out"
    )


def test_a_data_set_is_not_resumed_with_other_lengths_together(out):
    extract(Told(), SEQUENCES, BLOCK, out, max_tokens=3)
    assert refusal(DataError, Told(), SEQUENCES, BLOCK, out, equal_lengths=True) == (
        f"cannot resume '{out}': its equal_lengths is False, not True; give the same, or another "
        "path"
    )
