"""Files of every release are read by this version, and give the outputs that they gave then."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import load_adapter, load_from_checkpoint, merge_adapters
from tests.support.kept import FOLDER, SETTINGS, Kept, outputs, quiet

# by a later Lightning
pytestmark = pytest.mark.filterwarnings(
    "ignore:The loaded checkpoint was produced with"
)

RELEASES = sorted(path for path in FOLDER.iterdir() if path.is_dir())


@pytest.fixture(params=RELEASES, ids=[path.name for path in RELEASES])
def release(request: pytest.FixtureRequest) -> Path:
    return request.param  # type: ignore[no-any-return]


def check(found: Any, release: Path, name: str) -> None:
    expected = json.loads((release / "outputs.json").read_text())[name]
    torch.testing.assert_close(
        torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_a_file_gives_the_outputs_that_it_gave(release: Path, name: str) -> None:
    model = Kept()
    before = outputs(model)
    load_adapter(model, release / name)
    assert outputs(model) != before
    check(outputs(model), release, name)
    merge_adapters(model)
    check(outputs(model), release, name)


@pytest.mark.parametrize("merge", [False, True])
def test_a_checkpoint_gives_the_outputs_that_it_gave(
    release: Path, merge: bool
) -> None:
    model = load_from_checkpoint(Kept, release / "run.ckpt", merge=merge)
    check(outputs(model), release, "run.ckpt")


def test_a_run_goes_on_as_it_went_on(release: Path) -> None:
    model = Kept()
    quiet(2).fit(model, ckpt_path=release / "run.ckpt")
    check(outputs(model), release, "the run, gone on")


PLACES = re.compile(rb"/tmp|/home|/root|/work")


def test_files_are_small_and_name_no_place(release: Path) -> None:
    files = [path for path in release.rglob("*") if path.is_file()]
    assert len(files) >= 6
    content = b"".join(path.read_bytes() for path in files)
    assert len(content) < 60_000
    assert not PLACES.search(content)
