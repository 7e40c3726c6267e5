"""What would bypass adapted layers is off while there are adapters, and no longer."""

from torch import nn

import lightning_lora as ll


def test_an_inference_path_is_on_again_where_a_part_was_adapted_before_the_whole() -> None:
    part = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(part)
    assert part.activation_relu_or_gelu == 1
    ll.inject_adapters(part, ll.LoRAConfig(r=2, target_modules=["linear1"]))
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["linear1", "linear2"]))
    assert part.activation_relu_or_gelu == 0
    ll.remove_adapters(model)
    assert part.activation_relu_or_gelu == 1
