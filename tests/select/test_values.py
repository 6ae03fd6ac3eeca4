"""Whatever dtype, layout or device a tensor has, it is handled, or refused in our own words."""

import contextlib
import copy
import pickle
import warnings

import matplotlib as mpl
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from actctx import ActctxError, DataError, JoinError, OptionError, OutputError, Site, capture
from actctx.plot import colour_tokens, layer_similarity, plot_norms, plot_pattern, plot_similarity

mpl.use("agg")
SHAPE = (2, 3, 4)
DTYPES = sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str)
WHOLE = Site("layers.*", axes="batch pos feature")
PATTERN = Site("layers.*", axes="batch query key")


class Layers(nn.Module):
    """Two layers that give on what they are given."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Identity(), nn.Identity())

    def forward(self, given):
        return self.layers(given)


def of(dtype, shape=SHAPE):
    """A tensor of any dtype, in whatever way torch makes one of it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dtypes that torch calls experimental
        if str(dtype).startswith("torch.q"):
            return torch.quantize_per_tensor(torch.rand(shape), 0.1, 0, dtype)
        try:
            return torch.rand(shape).to(dtype)
        except (RuntimeError, NotImplementedError):
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            return torch.zeros(nbytes, dtype=torch.uint8).view(dtype).reshape(shape)


def _nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.rand(2, 4), torch.rand(3, 4)])


def _compressed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.rand(3, 4).to_sparse_csr()


KINDS = {
    **{str(dtype): lambda dtype=dtype: of(dtype) for dtype in DTYPES},
    "on meta": lambda: torch.empty(SHAPE, device="meta"),
    "int8 on meta": lambda: torch.empty(SHAPE, dtype=torch.int8, device="meta"),
    "float8 on meta": lambda: torch.empty(SHAPE, dtype=torch.float8_e5m2, device="meta"),
    "complex on meta": lambda: torch.empty(SHAPE, dtype=torch.complex64, device="meta"),
    "no sequences": lambda: torch.empty(0, 3, 4),
    "no positions": lambda: torch.empty(2, 0, 4),
    "no features": lambda: torch.empty(2, 3, 0),
    "0-d": lambda: torch.tensor(1.0),
    "0-d int": lambda: torch.tensor(1),
    "0-d on meta": lambda: torch.tensor(1.0, device="meta"),
    "NaN": lambda: torch.full(SHAPE, torch.nan),
    "infinite": lambda: torch.full(SHAPE, torch.inf),
    "some finite": lambda: torch.tensor([1, torch.inf, torch.nan, -torch.inf]).expand(SHAPE),
    "huge": lambda: of(torch.float64) * 1e300,
    "subnormal": lambda: of(torch.float64) * 1e-320,
    "sparse": lambda: torch.rand(SHAPE).to_sparse(),
    "compressed": _compressed,
    "nested": _nested,
    "conjugate": lambda: of(torch.complex64).conj(),
}


def kept(given, site=WHOLE, *, times=1, **options):
    model = Layers()
    with capture(model, site, **options) as acts:
        for _ in range(times):
            model(given)
    return acts


def _saved(given, path):
    acts = kept(given)
    acts.save(path)
    (found, *_) = load_file(path).values()
    assert found.dtype == given.dtype
    bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (found, acts["layers.0"])]
    assert torch.equal(*bits)


def _first(given):
    is_dense = given.layout == torch.strided and not given.is_nested
    return given.flatten()[:1] if is_dense else given


LANES = {
    "repr": lambda given, _: repr(kept(given)),
    "table": lambda given, _: kept(given)._repr_html_(),
    "save": _saved,
    "stack": lambda given, _: kept(given).stack("layers.*"),
    "copy": lambda given, _: copy.deepcopy(kept(given)),
    "pickle": lambda given, _: pickle.dumps(kept(given)),
    "spec": lambda given, _: kept(given).spec("layers.0"),
    "to cpu": lambda given, _: repr(kept(given).to("cpu")),
    "to meta": lambda given, _: kept(given).to("meta")._repr_html_(),
    "to float16": lambda given, _: kept(given).to(torch.float16)._repr_html_(),
    "to float8": lambda given, _: kept(given).to(torch.float8_e5m2)._repr_html_(),
    "capture as float16": lambda given, _: kept(given, dtype=torch.float16)._repr_html_(),
    "capture to cpu": lambda given, _: kept(given, device="cpu"),
    "capture to meta": lambda given, _: kept(given, device="meta")._repr_html_(),
    "join": lambda given, _: kept(given, times=2)["layers.0"],
    "join pos": lambda given, _: kept(given, times=2, join="pos")["layers.0"],
    "list": lambda given, _: kept(given, times=2, join=None)._repr_html_(),
    "capacity": lambda given, _: kept(given, times=2, capacity=4)["layers.0"],
    "slice": lambda given, _: kept(given, slice={"pos": -1}),
    "slices": lambda given, _: kept(given, slice={"pos": [0, 2]}),
    "mask": lambda given, _: kept(given, mask=torch.tensor([[1, 1, 0], [1, 1, 1]])),
    "norms": lambda given, _: plot_norms(kept(given), "layers.*"),
    "norms of rows": lambda given, _: plot_norms(kept(given, "layers.*"), "layers.*"),
    "similarity": lambda given, _: plot_similarity(kept(given), "layers.*"),
    "numbers of similarity": lambda given, _: layer_similarity(kept(given), "layers.*"),
    "pattern": lambda given, _: plot_pattern(kept(given, PATTERN), "layers.0"),
    "colours": lambda given, _: colour_tokens(["a", "b", "c"], given)._repr_html_(),
    "colours of some": lambda given, _: repr(colour_tokens(["a"], _first(given))),
}


@pytest.fixture(autouse=True)
def _pictures_are_closed():
    yield
    mpl.pyplot.close("all")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("kind", KINDS)
def test_it_works_or_is_refused_in_words(kind, tmp_path):
    given = KINDS[kind]()
    for lane in LANES.values():
        with contextlib.suppress(ActctxError):
            lane(given, tmp_path / "acts")


NORMED = [
    torch.bool,
    torch.int8,
    torch.uint16,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float16,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


@pytest.mark.parametrize("dtype", NORMED, ids=str)
def test_norms_of_any_numbers_are_drawn(dtype):
    given = (of(torch.float64) * 9).to(dtype)
    exact = given.to(torch.complex128 if dtype.is_complex else torch.float64)
    (image,) = plot_norms(kept(given), "layers.*").images
    expected = exact.abs().square().sum(-1).sqrt().mean(0)
    assert torch.allclose(torch.from_numpy(image.get_array().data[0]).double(), expected)
    line = plot_norms(kept(given, "layers.*"), "layers.*").lines[0]
    middle = exact.abs().square().sum(-1).sqrt().flatten().quantile(0.5).item()
    assert line.get_ydata()[0] == pytest.approx(middle)


def _refusal(kind, lane, path="acts"):
    with pytest.raises(ActctxError) as refused:
        LANES[lane](KINDS[kind](), path)
    return type(refused.value), str(refused.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("kind", "lane", "error", "message"),
    [
        (
            "sparse",
            "repr",
            OutputError,
            "'layers.0' yields a tensor that cannot be captured: it is sparse (sparse_coo); "
            "capture from a module whose output is an ordinary tensor",
        ),
        (
            "nested",
            "repr",
            OutputError,
            "'layers.0' yields a tensor that cannot be captured: it is a nested tensor; "
            "capture from a module whose output is an ordinary tensor",
        ),
        (
            "torch.quint4x2",
            "repr",
            OutputError,
            "'layers.0' yields a tensor that cannot be captured: it is quint4x2, which torch "
            "cannot copy; capture from a module whose output is an ordinary tensor",
        ),
        (
            "torch.qint8",
            "join",
            JoinError,
            "'layers.0' is quantized (qint8), and torch does not join such tensors; capture with "
            "join=None, without capacity=, and dequantize them",
        ),
        (
            "on meta",
            "to cpu",
            OptionError,
            "captured tensors cannot be copied on cpu: it has no values, on the meta device; load "
            "the model's weights",
        ),
        (
            "on meta",
            "capture to cpu",
            OptionError,
            "'layers.0' cannot be captured on cpu: it has no values, on the meta device; load the "
            "model's weights",
        ),
        (
            "on meta",
            "norms",
            OptionError,
            "'layers.0' cannot be drawn or compared: it has no values, on the meta device; capture "
            "a site of an ordinary dtype from a model with weights, or convert it yourself",
        ),
        (
            "torch.complex64",
            "similarity",
            OptionError,
            "'layers.0' cannot be drawn or compared: it is complex64, but real numbers are needed; "
            "capture a site of an ordinary dtype from a model with weights, or convert it yourself",
        ),
        (
            "torch.bits8",
            "norms",
            OptionError,
            "'layers.0' cannot be drawn or compared: it is bits8, which torch cannot compute with; "
            "capture a site of an ordinary dtype from a model with weights, or convert it yourself",
        ),
    ],
)
def test_what_cannot_be_done_is_said(kind, lane, error, message):
    assert _refusal(kind, lane) == (error, message)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("torch.complex128", "it is complex128, which safetensors does not have"),
        ("on meta", "it has no values, on the meta device"),
    ],
)
def test_a_file_that_cannot_hold_it_is_not_written(kind, reason, tmp_path):
    path = tmp_path / "acts"
    assert _refusal(kind, "save", path) == (
        DataError,
        f"cannot write 'layers.0' to '{path}': {reason}; leave it out, or write it with torch.save",
    )
    assert not [*tmp_path.iterdir()]


def test_values_that_cannot_be_drawn_leave_the_table_without_them():
    html = kept(KINDS["on meta"]())._repr_html_()
    assert "meta" in html
    assert "values" not in html


def test_no_positions_are_no_picture():
    with pytest.raises(ActctxError, match=r"'layers\.0' has no rows to draw or to compare"):
        plot_norms(kept(torch.empty(2, 0, 4)), "layers.*")
