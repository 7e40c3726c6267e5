"""Tell one base model from another: the names, shapes and contents of everything that training does not change."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import BaseMismatchError
from lightning_lora.layers import quantised_entries, repacks
from lightning_lora.model.record import base_parameters, base_values, record_of
from lightning_lora.tensors.names import named_modules, named_parameters
from lightning_lora.tensors.values import digest


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return what identifies the base of an adapted model, in plain types; it costs one pass over the weights.

    Args:
        model: A model with adapters, merged or not; the base is what lies under them.

    Returns:
        ``layout``, a hash of the names and shapes; ``dtypes``; and ``digests``, one number for each tensor in order.
        Tensors on the meta device have no contents: their digest is 0.

    Raises:
        AdapterStateError: ``model`` has no adapters.
    """
    tensors = base_tensors(model)
    layout = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    known: dict[int, int] = {}
    for tensor in tensors.values():
        if id(tensor) not in known:  # tied weights are hashed once
            known[id(tensor)] = 0 if tensor.is_meta else digest(tensor)
    seen = {name: known[id(tensor)] for name, tensor in tensors.items()}
    base = {name: was for name, (changed, was) in record_of(model).changed.items() if seen.get(name) == changed}
    return {
        "layout": hashlib.sha256(layout.encode()).hexdigest(),
        "dtypes": base_dtypes(model),
        "digests": list({**seen, **base}.values()),
    }


def note_changed(model: nn.Module) -> list[dict[str, Any]]:
    """Note which frozen weights are not those that the run began with: files must hold them from now on.

    Returns:
        The forms in which the base was seen, as :func:`check_base` takes them.
    """
    record, now = record_of(model), fingerprint(model)
    if now in record.fingerprints:
        return record.fingerprints
    same_form = [form for form in record.fingerprints if _shape(form) == _shape(now)]
    if not same_form:
        return [now]
    for name, was, changed in zip(base_tensors(model), same_form[0]["digests"], now["digests"], strict=True):
        if was != changed:
            record.changed[name] = (changed, was)
    return record.fingerprints


def _shape(form: Mapping[str, Any]) -> tuple[Any, ...]:
    return form["layout"], form["dtypes"], len(form["digests"])


def base_dtypes(model: nn.Module) -> list[str]:
    """Return the names of the dtypes that the base is in."""
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in base_tensors(model).values()})


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that make the base, by name: frozen parameters as they were, and buffers as they began.

    An embedding with ``max_norm`` is left out: its own forward rescales its rows, always to the same ones. So are the
    scales of four-bit weights: bitsandbytes may round them when it lays a weight out for inference and back.
    """
    rewritten = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m.max_norm is not None}
    left_out = {name for name, p in base_parameters(model).items() if id(p) in rewritten}
    for name, module in named_modules(model, remove_duplicate=False).items():
        if repacks(module):
            left_out |= {f"{name}.{entry}" for entry in quantised_entries(module)}
    return {name: value for name, value in base_values(model).items() if name not in left_out}


def check_base(model: nn.Module, stored: Sequence[Mapping[str, Any]], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse adapters that were trained on another base.

    Args:
        model: The adapted model that is to receive them.
        stored: The forms of their base, as :func:`fingerprint` gives them: as loaded, and as a Trainer converted it.
        shapes: Those of what was trained, by name.

    Raises:
        BaseMismatchError: the base of ``model`` is none of them.
    """
    here, known = fingerprint(model), record_of(model).fingerprints
    if here in stored or (here in known and any(form in stored for form in known)):
        return
    title = type(model).__name__
    theirs = next((form for form in stored if form["dtypes"] == here["dtypes"]), stored[0])
    if theirs["layout"] != here["layout"] or len(theirs["digests"]) != len(here["digests"]):
        here_is = {name: tensor.shape for name, tensor in named_parameters(model).items()}
        differ = (name for name, shape in shapes.items() if name in here_is and here_is[name] != shape)
        such = "".join(
            f" {name!r}, for one, is {tuple(shapes[name])} there and {tuple(here_is[name])} here."
            for name in islice(differ, 1)
        )
        raise BaseMismatchError(
            f"These adapters were trained on another architecture: their base has {len(theirs['digests'])} frozen "
            f"tensors, {title} has {len(here['digests'])}, and names or shapes differ.{such} Build the model as it was "
            "built for training, with the same modules_to_save and bias."
        )
    if theirs["dtypes"] != here["dtypes"]:
        raise BaseMismatchError(
            f"These adapters were trained on a base in {theirs['dtypes']}, but {title} is in {here['dtypes']}. "
            "Convert the model before loading, for example model.to(torch.float32)."
        )
    names = list(base_tensors(model))
    other = [name for name, a, b in zip(names, theirs["digests"], here["digests"], strict=True) if a != b]
    raise BaseMismatchError(
        f"These adapters were trained on another base: {len(other)} of {len(names)} frozen tensors of {title} differ, "
        f"such as {', '.join(map(repr, other[:3]))}. Load the pretrained weights that they were trained on; if these "
        "are new layers with random weights, train them whole with modules_to_save. A model whose adapters were "
        "merged is another base too."
    )


def is_fingerprints(stored: object) -> bool:
    """Whether ``stored`` is a list of what :func:`fingerprint` returns, and no longer than the forms of one base."""
    return isinstance(stored, list) and 0 < len(stored) <= _MOST_FORMS and all(map(_is_fingerprint, stored))


_MOST_FORMS = 8


def _is_fingerprint(form: object) -> bool:
    return (
        isinstance(form, dict)
        and form.keys() == {"layout", "dtypes", "digests"}
        and isinstance(form["layout"], str)
        and isinstance(form["dtypes"], list)
        and all(isinstance(dtype, str) for dtype in form["dtypes"])
        and isinstance(form["digests"], list)
        and all(type(number) is int and 0 <= number < 1 << 63 for number in form["digests"])
    )
