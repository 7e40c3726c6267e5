"""The module ``enc`` is not around ``encoder``: wherever names are compared with a prefix, it ends with its dot."""

import re
from pathlib import Path

from torch import nn

import lightning_lora as ll
from lightning_lora.model.view import view_of
from lightning_lora.storage.fingerprint import forms_of_base
from lightning_lora.storage.renaming import find_renamings, is_inside
from lightning_lora.storage.stored import StoredAdapters


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.head = nn.Linear(4, 4), nn.Linear(4, 4)


def both() -> nn.ModuleDict:
    return nn.ModuleDict({"enc": Part(), "encoder": Part()})


def test_a_file_says_what_is_in_a_module_and_not_in_another() -> None:
    model = both()
    ll.inject_adapters(model, ll.LoRAConfig(target_modules=["encoder.q"], modules_to_save=["enc"], r=1))
    view = view_of(model)
    stored = StoredAdapters.from_view(view, ll.adapter_state_dict(model), forms_of_base(view))
    assert set(stored.saved["enc"]) == {"enc.q.weight", "enc.q.bias", "enc.head.weight", "enc.head.bias"}


def test_what_trains_in_a_part_is_compared_with_that_part_alone() -> None:
    model = both()
    ll.inject_adapters(model["enc"], ll.LoRAConfig(target_modules=["q"], modules_to_save=["head"], r=1))
    saved = ["enc.head", "encoder.head"]
    names = ll.inject_adapters(model, ll.LoRAConfig(target_modules=["q"], modules_to_save=saved, r=1))
    assert names == ("enc.q", "encoder.q")


def test_a_prefix_is_exchanged_where_all_names_have_it() -> None:
    assert is_inside("enc.q", "enc") and not is_inside("encoder.q", "enc")
    names = ["enc.q", "encoder.q"]
    assert [way.there for way in find_renamings(names, [f"model.{name}" for name in names])] == [""]


def test_no_prefix_in_the_code_is_without_its_dot() -> None:
    files = Path(ll.__file__).parent.rglob("*.py")
    assert [found for file in files for found in re.findall(r'startswith\(f"[^"]*\}"\)', file.read_text())] == []
