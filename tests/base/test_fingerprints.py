"""A fingerprint says names if its file does, and is found again by the form of its base."""

from lightning_lora.base.fingerprints import (
    Fingerprint,
    StoredFingerprint,
    find_same_form,
    names_in,
    quantised_in,
    says_names,
    without_half_digests,
)

PLAIN: Fingerprint = {"layout": "aa", "dtypes": ["torch.float32"], "digests": [1, 2, 3]}
NAMED: StoredFingerprint = {
    **PLAIN,
    "rounded": {"packed": None, "counts": [], "weight": [4, 5]},
}


def test_a_file_says_the_names_of_a_base_or_none() -> None:
    assert says_names(NAMED)
    assert list(names_in(NAMED)) == ["packed", "counts", "weight"]
    assert not says_names({**PLAIN})
    assert not list(names_in({**PLAIN}))


def test_a_tensor_without_half_digests_is_quantised_and_one_with_none_is_not() -> None:
    assert quantised_in(NAMED) == {"packed"}
    assert not quantised_in({**PLAIN})


def test_a_model_remembers_no_half_digests() -> None:
    assert without_half_digests(NAMED) == PLAIN


def test_a_base_is_found_by_its_layout_and_its_dtypes() -> None:
    half: Fingerprint = {**PLAIN, "dtypes": ["torch.float16"]}
    other: Fingerprint = {**PLAIN, "layout": "bb"}
    changed: Fingerprint = {**PLAIN, "digests": [7, 8, 9]}
    assert find_same_form([half, other, PLAIN], changed) is PLAIN
    assert find_same_form([half, other], PLAIN) is None
