"""Statistics that a capture computes in place of keeping tensors."""

import copy
import pickle

import pytest
import torch
from jaxtyping import Float
from models import BATCH, POS, Mlp, bridge, huggingface, tokens
from torch import Tensor

import actctx
from actctx import (
    AxisError,
    JoinError,
    NotCapturedError,
    OptionError,
    Schema,
    SeveralFiringsError,
    Site,
    TypedError,
    capture,
    captures,
    site,
)
from actctx.stats import Covariance, LinearCKA, Moments, Observation, TopK

RESID = "blocks.1.hook_resid_post"
ALL = "blocks.*.hook_resid_post"
RIGHT = torch.tensor([[i < n for i in range(POS)] for n in (4, 7, 2)]).long()


class Seen:
    """A statistic that keeps every observation, to look at what a capture gives."""

    def __init__(self):
        self.observations = []

    def empty(self):
        return Seen()

    def update(self, observation):
        values = observation.values.clone()
        self.observations.append(Observation(**{**vars(observation), "values": values}))

    def merge(self, other):
        self.observations += other.observations

    def state_dict(self):
        return {str(number): each.values for number, each in enumerate(self.observations)}

    def load_state_dict(self, state):
        self.observations = [
            Observation(values=each, axes=("_",) * each.dim()) for each in state.values()
        ]


def _assert_moments_of(found, values):
    rows = values.double().flatten(0, -2)
    torch.testing.assert_close(found.mean.double(), rows.mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.var.double(), rows.var(0), rtol=1e-5, atol=1e-9)
    assert found.count == len(rows)


def test_a_statistic_is_that_of_the_tensors_of_all_forwards(gpt2):
    with capture(gpt2, ALL) as kept, capture(gpt2, ALL, reduce=Moments()) as acts:
        for seed in range(3):
            gpt2(tokens(seed=seed))
    assert [*acts] == [*kept]
    for name in acts:
        _assert_moments_of(acts[name], kept[name])


@pytest.mark.parametrize(
    "options",
    [
        {"slice": {"pos": slice(1, None)}},
        {"slice": {"batch": [2, 0]}},
        {"slice": {"d_model": slice(0, 5)}},
        {"mask": RIGHT},
        {"mask": "attention"},
        {"mask": "attention", "slice": {"pos": -1}},
        {"dtype": torch.float64},
        {"stop": True},
        {"device": "cpu"},
        {"map": lambda x: x[..., :3].abs()},
    ],
)
def test_a_statistic_takes_what_a_tensor_would_hold(gpt2, options):
    with (
        capture(gpt2, ALL, **options) as kept,
        capture(gpt2, ALL, reduce=Moments(), **options) as acts,
    ):
        for seed in range(2):
            gpt2(tokens(seed=seed), attention_mask=RIGHT)
    for name in acts:
        _assert_moments_of(acts[name], kept[name])


def test_the_model_computes_what_it_computes_without_it(gpt2, ids):
    with torch.no_grad():
        expected = gpt2(ids)
    with capture(gpt2, "**", reduce=Seen()):
        assert torch.equal(gpt2(ids), expected)


def test_a_forward_that_raised_leaves_no_trace(gpt2, ids):
    def fail(_value, hook):  # noqa: ARG001
        raise RuntimeError("in the middle")

    with capture(gpt2, ALL, reduce=Seen()) as acts:
        gpt2(ids)
        point = gpt2.hook_dict["blocks.1.hook_mlp_out"]
        point.add_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            gpt2(ids)
        point.remove_hooks()
        gpt2(ids)
    for name in acts:
        seen = acts[name].observations
        assert [each.first_sequence for each in seen] == [0, BATCH]
        assert [each.number for each in seen] == [0, 1]


def test_an_observation_says_where_its_rows_are_from(gpt2):
    batches = [tokens(seed=seed) for seed in range(2)]
    with capture(gpt2, RESID, reduce=Seen()) as acts:
        for batch in batches:
            gpt2(batch)
    one, two = acts[RESID].observations
    assert one.axes == two.axes == ("batch", "pos", "d_model")
    assert one.site == RESID
    assert torch.equal(two.sequence, torch.arange(3, 6)[:, None].expand(3, 7))
    assert torch.equal(two.position, torch.arange(7).expand(3, 7))
    assert torch.equal(one.tokens, batches[0])
    assert torch.equal(two.tokens, batches[1])
    assert (two.first_sequence, two.first_position) == (3, 0)


@pytest.mark.parametrize(
    ("selected", "sequence", "position"),
    [
        ({"pos": -1}, [0, 1, 2], [6, 6, 6]),
        ({"pos": [5, 2]}, [[0, 0], [1, 1], [2, 2]], [[5, 2]] * 3),
        ({"pos": slice(None, None, -3)}, [[0] * 3, [1] * 3, [2] * 3], [[6, 3, 0]] * 3),
        ({"batch": 1}, [1] * 7, [0, 1, 2, 3, 4, 5, 6]),
        ({"batch": [2, 0], "pos": 4}, [2, 0], [4, 4]),
        ({"batch": 1, "pos": 4, "d_model": [0]}, 1, 4),
    ],
)
def test_places_are_those_before_a_slice(gpt2, ids, selected, sequence, position):
    with capture(gpt2, RESID, slice=selected, reduce=Seen()) as acts:
        gpt2(ids)
    (seen,) = acts[RESID].observations
    assert seen.sequence.tolist() == sequence
    assert seen.position.tolist() == position
    assert torch.equal(seen.tokens, ids)


def test_places_of_a_pattern_are_those_of_its_queries(gpt2, ids):
    name = "blocks.0.attn.hook_pattern"
    with capture(gpt2, name, reduce=Seen()) as acts:
        gpt2(ids)
    (seen,) = acts[name].observations
    assert seen.axes == ("batch", "head", "query", "key")
    assert torch.equal(seen.position, torch.arange(7).expand(3, 7))


def test_places_of_real_tokens_are_those_that_positions_tells(gpt2):
    options = {"mask": "attention"}
    with (
        capture(gpt2, RESID, **options) as kept,
        capture(gpt2, RESID, reduce=Seen(), **options) as acts,
    ):
        for seed in range(2):
            gpt2(tokens(seed=seed), attention_mask=RIGHT)
    seen = acts[RESID].observations
    found = torch.cat([torch.stack([each.sequence, each.position], 1) for each in seen])
    assert torch.equal(found, kept.positions(RESID))
    assert all(torch.equal(each.real, RIGHT.bool()) for each in seen)
    assert torch.equal(seen[1].tokens, tokens(seed=1))


def test_the_mask_of_a_forward_says_what_is_real_without_a_mask_as_well(gpt2, ids):
    with capture(gpt2, RESID, reduce=Seen()) as acts:
        gpt2(ids, attention_mask=RIGHT)
        gpt2(ids)
    one, two = acts[RESID].observations
    assert torch.equal(one.real, RIGHT.bool())
    assert two.real is None


@pytest.mark.parametrize("mask", [None, "attention"])
def test_steps_of_a_generation_are_of_the_sequences_of_its_prompt(mask):
    model = huggingface("LlamaForCausalLM")
    layer = Site("model.layers.1", axes="batch pos d_model")
    ids, options = tokens(2, 4), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with capture(model, {"resid": layer}, mask=mask, reduce=Seen()) as acts:
        for _ in range(2):
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options
            )
    seen = acts.resid.observations
    assert [each.first_sequence for each in seen] == [0, 0, 0, 2, 2, 2]
    assert [each.first_position for each in seen] == [0, 4, 5] * 2
    assert [each.position.flatten().tolist() for each in seen[:3]] == [
        [0, 1, 2, 3] * 2,
        [4, 4],
        [5, 5],
    ]
    for each in seen[:3]:
        of_text = out[:, each.first_position : each.first_position + each.tokens.shape[1]]
        assert torch.equal(each.tokens, of_text)


@pytest.mark.parametrize(
    ("name", "given"), [("encoder.block.1", "input_ids"), ("decoder.block.1", "decoder_input_ids")]
)
def test_token_ids_are_of_the_side_that_the_site_runs_on(name, given):
    model = huggingface("T5ForConditionalGeneration")
    inputs = {"input_ids": tokens(2, 6), "decoder_input_ids": tokens(2, 6, seed=1)}
    with capture(model, name, reduce=Seen()) as acts:
        model(**inputs)
    (seen,) = acts[name].observations
    assert torch.equal(seen.tokens, inputs[given])
    assert torch.equal(seen.position, torch.arange(6).expand(2, 6))


def test_what_counts_other_things_than_tokens_has_no_positions():
    model = huggingface("LlamaForCausalLM")
    with capture(model, Site("lm_head", axes="batch pos d_vocab"), reduce=Seen()) as acts:
        model(tokens(2, 6), logits_to_keep=2)
    (seen,) = acts["lm_head"].observations
    assert seen.sequence is None or seen.sequence.tolist() == [[0, 0], [1, 1]]
    assert seen.position is None
    assert seen.tokens is None


def test_embeddings_have_no_token_ids():
    model = huggingface("LlamaForCausalLM")
    with capture(model, "model.layers.0", reduce=Seen()) as acts:
        model(inputs_embeds=torch.randn(2, 5, 32))
    (seen,) = acts["model.layers.0"].observations
    assert seen.tokens is None
    assert torch.equal(seen.position, torch.arange(5).expand(2, 5))


def test_the_largest_values_are_found_with_their_tokens(gpt2):
    batches = [tokens(seed=seed) for seed in range(3)]
    with capture(gpt2, RESID) as kept, capture(gpt2, RESID, reduce=TopK(2, context=1)) as acts:
        for batch in batches:
            gpt2(batch)
    top, values = acts[RESID], kept[RESID].flatten(0, 1)
    largest, index = values.topk(2, 0)
    assert torch.equal(top.values, largest.T)
    assert torch.equal(top.sequence, index.T // POS)
    assert torch.equal(top.position, index.T % POS)
    assert torch.equal(top.token, torch.cat(batches).flatten()[index.T])


def test_tensors_and_statistics_in_one_capture(gpt2, ids):
    names = {
        "kept": RESID,
        "mean": Site(RESID, reduce=Moments()),
        "top": Site(RESID, reduce=TopK(1)),
    }
    with capture(gpt2, names) as acts:
        gpt2(ids)
    _assert_moments_of(acts.mean, acts.kept)
    assert torch.equal(acts.top.values[:, 0], acts.kept.flatten(0, 1).amax(0))


def test_the_statistic_that_was_given_stays_as_it_was(gpt2, ids):
    recipe = Moments()
    with capture(gpt2, ALL, reduce=recipe) as acts:
        gpt2(ids)
    assert recipe.count == 0
    one, two = (acts[name] for name in acts)
    assert one is not two


def test_a_decorated_function_gets_statistics(gpt2, ids):
    @captures(RESID, reduce=Moments())
    def mean(acts, model, ids):
        model(ids)
        return acts[RESID].mean

    assert mean(gpt2, ids).shape == (32,)


@pytest.mark.parametrize("firing", [0, -1])
def test_one_firing_is_reduced(ids, firing):
    model = Mlp(twice=True)
    asked = Site("block", firing=firing)
    with capture(model, asked) as kept, capture(model, asked, reduce=Moments()) as acts:
        model(ids)
        model(ids)
    _assert_moments_of(acts["block"], kept["block"])


def test_each_firing_has_a_statistic_of_its_own(ids):
    model = Mlp(twice=True)
    with capture(model, "block") as kept, capture(model, "block", reduce=Moments()) as acts:
        model(ids)
        model(ids)
    for found, values in zip(acts.firings("block"), kept.firings("block"), strict=True):
        _assert_moments_of(found, values)
    with pytest.raises(SeveralFiringsError):
        acts["block"]


def test_clearing_begins_anew_and_leaves_what_was_read(gpt2, ids):
    with capture(gpt2, RESID, reduce=Seen()) as acts:
        gpt2(ids)
        before = acts[RESID]
        acts.clear()
        assert RESID not in acts
        gpt2(ids)
    assert len(before.observations) == 1
    (seen,) = acts[RESID].observations
    assert (seen.first_sequence, seen.number) == (0, 0)


def test_a_capture_that_is_entered_again_begins_anew(gpt2, ids):
    capturing = capture(gpt2, RESID, reduce=Moments())
    for _ in range(2):
        with capturing as acts:
            gpt2(ids)
        assert acts[RESID].count == BATCH * POS


def test_no_memory_of_the_forward_is_kept(gpt2, ids):
    with capture(gpt2, ALL, reduce=Moments()) as acts:
        gpt2(ids)
        first = acts.nbytes
        for _ in range(4):
            gpt2(ids)
        assert acts.nbytes == first
    assert first == sum(
        each.nbytes
        for name in acts
        for each in acts[name].state_dict().values()
        if isinstance(each, Tensor)
    )


def test_its_row_of_the_table(gpt2, ids):
    with capture(gpt2, {"seen": Site(RESID, reduce=Seen())}) as acts:
        gpt2(ids)
    assert repr(acts).splitlines() == [
        "Activations: 1 site, 2.6 KiB, 1 forward",
        "  site  axes               shape  dtype    device  bytes",
        "  seen  batch pos d_model  Seen   float32  cpu     2.6 KiB",
    ]
    with capture(gpt2, RESID, reduce=Moments()) as acts:
        gpt2(ids)
    assert "Moments of 21 rows" in repr(acts)
    assert "Moments of 21 rows" in acts._repr_html_()
    assert acts.axes(RESID) == ("batch", "pos", "d_model")
    assert acts.spec(RESID) is Moments


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda acts: pickle.loads(pickle.dumps(acts)),  # noqa: S301
        lambda acts: acts.to("cpu", torch.float16),
    ],
)
def test_copies_hold_a_statistic_of_their_own(gpt2, ids, copied):
    with capture(gpt2, RESID, reduce=Moments()) as acts:
        gpt2(ids)
        other = copied(acts)
        mean = acts[RESID].mean
        gpt2(tokens(seed=3))
    assert torch.equal(other[RESID].mean, mean)
    assert other[RESID].mean.dtype == torch.float32
    assert other[RESID].count == BATCH * POS < acts[RESID].count


def test_they_are_saved_beside_tensors(gpt2, ids, tmp_path):
    names = {"kept": RESID, "mean": Site(RESID, reduce=Moments()), "top": Site(ALL, reduce=TopK(2))}
    with capture(gpt2, names) as acts:
        gpt2(ids)
    acts.save(tmp_path / "acts.safetensors")
    back = actctx.load(tmp_path / "acts.safetensors")
    assert [*back] == [*acts]
    assert torch.equal(back.kept, acts.kept)
    assert torch.equal(back.mean.var, acts.mean.var)
    top = f"top.{RESID}"
    assert torch.equal(back[top].position, acts[top].position)
    assert back.axes("mean") == acts.axes("mean")
    back.mean.merge(acts.mean)  # it can go on
    assert back.mean.count == 2 * BATCH * POS


def test_a_statistic_of_ones_own_is_not_saved_with_the_others(gpt2, ids, tmp_path):
    with capture(gpt2, RESID, reduce=Seen()) as acts:
        gpt2(ids)
    with pytest.raises(OptionError) as caught:
        acts.save(tmp_path / "acts.safetensors")
    assert str(caught.value) == (
        f"acts.save(path) writes the statistics of actctx.stats, but {RESID!r} is a Seen of your "
        "own; save what its state_dict() returns yourself"
    )


def test_what_is_for_tensors_alone_is_refused(gpt2, ids):
    with capture(gpt2, RESID, reduce=Moments()) as acts:
        gpt2(ids)
    with pytest.raises(OptionError) as caught:
        acts.tensor  # noqa: B018
    assert str(caught.value) == (
        f"acts.tensor is for a tensor, but {RESID!r} is a Moments; read acts[name]"
    )
    with pytest.raises(OptionError) as caught:
        acts.stack("hook_resid_post")
    assert str(caught.value) == (
        f"acts.stack(name) stacks tensors, but {RESID!r} is a Moments; stack what you read of "
        "each, as in torch.stack([acts[name].mean for name in acts])"
    )
    with pytest.raises(NotCapturedError) as caught:
        acts.positions(RESID)
    assert str(caught.value) == (
        f"{RESID!r} is a Moments, which keeps no rows, so there are no positions of rows; capture "
        "it without reduce="
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"reduce": Moments},
            "reduce=Moments of {} is a class; give one of its objects, as in reduce=Moments()",
        ),
        (
            {"reduce": "mean"},
            "reduce='mean' of {} is not a statistic; give one of actctx.stats, such as Moments(), "
            "or an object with the methods of actctx.stats.Statistic",
        ),
        (
            {"reduce": LinearCKA()},
            "reduce=LinearCKA() of {} takes several sites at once, which a capture does not; "
            "capture tensors, and give them to its update_all",
        ),
        (
            {"reduce": Moments(), "join": None},
            "reduce= of {} keeps a statistic of all forwards, and join=None keeps the forwards "
            "apart; leave one of them out",
        ),
        (
            {"reduce": Moments(), "grad": True},
            "reduce= of {} keeps a statistic of all forwards, and grad=True keeps the graph of "
            "tensors; leave one of them out",
        ),
        (
            {"reduce": Moments(), "capacity": 4},
            "reduce= of {} keeps a statistic of all forwards, and capacity= makes room for "
            "tensors; leave one of them out",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_options_that_make_no_sense_are_refused_before_any_forward(gpt2, options, said):
    with pytest.raises(OptionError) as caught:
        capture(gpt2, RESID, **options)
    assert str(caught.value) == said.format(repr(RESID))


def test_forwards_whose_kept_axes_differ_are_refused_and_leave_no_trace(gpt2):
    names = {"each": Site(RESID, reduce=Moments(over="batch")), "all": Site(RESID, reduce=Seen())}
    with capture(gpt2, names) as acts:
        gpt2(tokens(2, 5))
        with pytest.raises(JoinError, match="which do not fit along 'pos'"):
            gpt2(tokens(2, 6))
        gpt2(tokens(4, 5))
    assert acts.each.count == 6
    assert [len(each.values) for each in acts.all.observations] == [2, 4]


def test_a_statistic_that_changes_what_it_is_given_is_refused(ids):
    class Halved(Seen):
        def empty(self):
            return Halved()

        def update(self, observation):
            observation.values.mul_(0.5)

    model = Mlp()
    with capture(model, "block", reduce=Halved()), pytest.raises(OptionError) as caught:
        model(ids)
    assert str(caught.value) == (
        "Halved changed in place what it was given of 'block', which would change the model's own "
        "activation; update it without that"
    )


def test_axes_that_a_name_proposes_and_nothing_confirms_are_refused():
    model = bridge("GPT2LMHeadModel")
    with capture(model, Site(RESID, axes="batch pos d_model"), reduce=Moments()) as acts:
        model(tokens(2, 5))
    assert acts[RESID].axes == ("d_model",)
    with capture(model, Site(RESID, axes="a b c"), reduce=Moments()), pytest.raises(AxisError):
        model(tokens(2, 5))


def test_a_schema_has_statistics(gpt2, ids):
    class Acts(Schema):
        resid: Float[Tensor, "batch pos d_model"] = site(RESID)
        mean: Moments = site(RESID, reduce=Moments())
        layers: dict[str, Covariance] = site(ALL, reduce=Covariance())

    with capture(gpt2, Acts) as acts:
        gpt2(ids)
    _assert_moments_of(acts.mean, acts.resid)
    assert [*acts.layers] == ["blocks.0.hook_resid_post", RESID]
    assert acts.layers[RESID].covariance.shape == (32, 32)


def test_a_field_whose_annotation_is_of_something_else_is_refused(gpt2):
    class Lacks(Schema):
        mean: Moments = site(RESID)

    class Other(Schema):
        mean: Moments = site(RESID, reduce=Covariance())

    class Tensors(Schema):
        resid: Float[Tensor, "batch pos d_model"] = site(RESID)

    class Several(Schema):
        mean: Moments = site(ALL, reduce=Moments())

    for schema, options, error, said in (
        (
            Lacks,
            {},
            TypedError,
            "Lacks.mean is annotated Moments, but tensors are captured there; write "
            f"site({RESID!r}, reduce=Moments())",
        ),
        (
            Other,
            {},
            TypedError,
            "Other.mean is annotated Moments, but reduce= computes a Covariance; annotate it as "
            "Covariance, or give reduce= a Moments",
        ),
        (
            Tensors,
            {"reduce": Moments()},
            TypedError,
            'Tensors.resid is annotated Float[Tensor, "batch pos d_model"], but reduce= computes a '
            "Moments; annotate it as Moments, or leave reduce= out",
        ),
        (
            Several,
            {},
            OptionError,
            f"Several.mean is annotated Moments, but {ALL!r} matches 2 sites; annotate it as "
            "dict[str, Moments]",
        ),
    ):
        with pytest.raises(error) as caught:
            capture(gpt2, schema, **options)
        assert str(caught.value) == said


def test_a_data_set_takes_neither(gpt2, tmp_path):
    from actctx.extract import extract

    for given in (Site(RESID, reduce=Moments()), Site(RESID, map=torch.abs)):
        with pytest.raises(OptionError, match="a data set"):
            extract(gpt2, [tokens()], given, tmp_path / "out")
