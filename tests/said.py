"""Calls that are refused, and what their errors say."""

import pytest
from models import tokens

from actctx import ActctxError, capture


def message_of(function, *args, **kwargs):
    """Return what the error of a call says."""
    with pytest.raises(ActctxError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def run(model, names, *forwards, read=None, **options):
    with capture(model, names, **options) as acts:
        for forward in forwards or (tokens(),):
            model(forward)
    return acts if read is None else read(acts)
