"""Models that differ a little, and data sets of one that are resumed with the other."""

from extracted import Read, refusal
from models import Mlp, tokens
from torch import nn

from actctx import DataError, Site
from actctx._model.fingerprint import describe_model
from actctx._model.same_model import differences
from actctx.extract import extract

SITE = {"x": Site("block", axes="batch pos d")}
RESID = "blocks.1.hook_resid_post"


class Scale(nn.Module):
    """A module without parameters, of somebody's own."""

    def __init__(self, factor=2.0, calls=0, **more):
        super().__init__()
        self.factor, self.calls = factor, calls
        self._log = []
        vars(self).update(more)

    def forward(self, x):
        self.calls += 1
        self._log.append(self.calls)
        return x * self.factor


def mlp(*behind, before=()):
    """An MLP whose block has some more modules."""
    model = Mlp()
    model.block = nn.Sequential(*before, model.block[0], *(behind or (nn.ReLU(),)))
    return model.eval()


def resumed(first, second, out, site=SITE):
    """Extract from one model, and more from another."""
    extract(first, [tokens()], site, out)
    done = extract(second, [tokens(), tokens(seed=1)], site, out)
    assert done.rows == 2 * done.new_rows
    return done


def refused(first, second, out, site=SITE):
    """Extract from one model, refuse another, and return what was said of it."""
    extract(first, [tokens()], site, out)
    rows = Read(out).table
    message = refusal(DataError, second, [tokens(), tokens(seed=1)], site, out)
    assert Read(out).table.equals(rows)
    start, end = f"cannot resume '{out}': its ", "; give the same, or another path"
    assert message.startswith(start)
    return message.removeprefix(start).partition(end)[0]


def differing(first, second, **options):
    options = {"versions_differ": False, **options}
    return [*differences(describe_model(first), describe_model(second), **options)]
