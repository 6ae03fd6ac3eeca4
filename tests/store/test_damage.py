"""Data sets whose manifest is damaged."""

import pytest
from stored import write

from actctx import DataError
from actctx._store.destination import Destination
from actctx.dataset import ActivationDataset


def damaged(manifest):
    """Give damages to a manifest, of which Lance says its own, panics, and says nothing."""
    length = len(manifest)
    yield b""
    yield manifest[: length // 2]
    yield manifest[:-16] + b"\xff" * 8 + manifest[-8:]
    yield manifest[:-16] + (length - 30).to_bytes(8, "little") + manifest[-8:]
    yield b"\xff\xff\xff\x7f" + manifest[4:]
    yield manifest.replace(b"fixed_size_list:halffloat", b"fired_size_list:halffloat")
    yield manifest.replace(b'{"format"', b'["format"')
    yield manifest.replace(b'"sites"', b'"sitez"')
    yield manifest.replace(b'"axes"', b'"axez"')


def test_a_damaged_manifest_is_said(tmp_path):
    path = write(tmp_path / "a.lance", 4)
    (file,) = (path / "_versions").glob("*.manifest")
    for manifest in damaged(file.read_bytes()):
        file.write_bytes(manifest)
        with pytest.raises(DataError) as caught:
            ActivationDataset(path)
        assert str(caught.value).startswith(f"the data set at '{path}' cannot be read: ")
        assert str(caught.value).endswith(
            "; put a copy of it in its place, or extract it again to another path"
        )


def test_whoever_writes_is_told_of_damage_as_whoever_reads(tmp_path):
    path = write(tmp_path / "a.lance", 4)
    (file,) = (path / "_versions").glob("*.manifest")
    for manifest in damaged(file.read_bytes()):
        file.write_bytes(manifest)
        said = []
        for move in (ActivationDataset, Destination):
            with pytest.raises(DataError) as caught:
                move(path)
            said.append(str(caught.value))
        assert said[0] == said[1]
