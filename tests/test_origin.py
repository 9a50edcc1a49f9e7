"""Which checkpoint an engine computes with: one version of it on all ranks."""

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError
from engine.models import DecoderSpec, load_spec
from engine.rank_model import check_same
from engine.weights.origin import Origin, settings_files
from tests.tiny_models import tiny_model


class Neighbour:
    """A group of two whose other rank gives these values in turn."""

    def __init__(self, *values: int) -> None:
        self._values = list(values)

    def min(self, value: int) -> int:
        return min(value, self._values.pop(0))


def digest(value: object) -> int:
    return zlib.crc32(value.encode() if isinstance(value, str) else json.dumps(value).encode())


@pytest.fixture(scope="module")
def spec() -> DecoderSpec:
    return load_spec(tiny_model("llama").path)


@pytest.mark.parametrize(
    ("ours_here", "theirs_here", "same", "starts"),
    [
        (True, False, True, True),
        (False, True, True, True),
        (True, False, False, False),
        (False, True, False, False),
        (False, False, False, False),
        (True, True, False, True),  # each read its own; only the times of change differ
    ],
)
def test_ranks_without_a_checkpoint_must_have_the_others_version(
    ours_here: bool, theirs_here: bool, same: bool, starts: bool, spec: DecoderSpec
) -> None:
    ours = Origin("/model", [["model.safetensors", 10, 20]], Path("/model"), "id", "", ours_here)
    theirs = digest(ours.files) if same else digest(ours.files) + 1
    group: Any = Neighbour(digest(repr(spec)), -digest(repr(spec)), theirs_here, theirs, -theirs)
    if starts:
        check_same(ours, spec, group)
    else:
        with pytest.raises(CheckpointError, match="different versions of /model"):
            check_same(ours, spec, group)


def test_all_ranks_must_have_one_config(spec: DecoderSpec) -> None:
    ours = Origin("/model", [["model.safetensors", 10, 20]], Path("/model"), "id", "", here=True)
    theirs = digest(repr(replace(spec, rms_norm_eps=1.0)))
    group: Any = Neighbour(theirs, -theirs)
    with pytest.raises(CheckpointError, match=r"different settings in config\.json of /model"):
        check_same(ours, spec, group)


def test_an_index_alone_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").touch()
    (tmp_path / "config.json").touch()
    assert not Origin.at(tmp_path).has_weights
    assert [path.name for path in settings_files(tmp_path)] == ["config.json"]
    before = Origin.at(tmp_path)
    (tmp_path / "model-00001-of-00001.safetensors").touch()
    after = Origin.at(tmp_path)
    assert after.has_weights
    assert before.settings_id == after.settings_id
