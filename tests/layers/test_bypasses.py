"""What would bypass adapted layers is off while there are adapters, and no longer."""

from torch import nn

import lightning_lora as ll


def test_an_inference_path_is_on_again_where_a_part_was_adapted_before_the_whole() -> (
    None
):
    part = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(part)
    assert part.activation_relu_or_gelu == 1
    ll.inject_adapters(part, ll.LoRAConfig(r=2, target_modules=["linear1"]))
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["linear1", "linear2"]))
    assert part.activation_relu_or_gelu == 0
    ll.remove_adapters(model)
    assert part.activation_relu_or_gelu == 1


class Saves(nn.Sequential):
    """A model of a library with files of its own."""

    def save_pretrained(self, path: str) -> str:
        return f"own files in {path}"


def test_a_model_without_adapters_writes_its_own_files_again() -> None:
    model = Saves(nn.Linear(4, 4))
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    assert "save_pretrained" in vars(model)
    ll.remove_adapters(model)
    assert "save_pretrained" not in vars(model)
    assert model.save_pretrained("here") == "own files in here"
