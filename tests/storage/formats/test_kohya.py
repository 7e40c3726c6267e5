"""diffusers computes what is computed here from a file of kohya's form, for Stable Diffusion and SDXL."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.storage.formats.test_diffusers import text_encoder
from tests.support.cases import file_names
from tests.support.peft_export import check_equal, trained

diffusers = pytest.importorskip("diffusers", minversion="0.42", exc_type=ImportError)
transformers = pytest.importorskip("transformers")
FILE = "kohya_lora.safetensors"


SIZES: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 2}
SIZES |= {"cross_attention_dim": 8, "attention_head_dim": 4}


def sd_unet() -> Any:
    torch.manual_seed(7)
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return diffusers.UNet2DConditionModel(**SIZES, down_block_types=down, up_block_types=up).eval()


def sdxl_unet() -> Any:
    torch.manual_seed(7)
    return diffusers.UNet2DConditionModel(
        **SIZES, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), transformer_layers_per_block=(1, 2),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32,
    ).eval()  # fmt: skip


def second_text_encoder() -> Any:
    torch.manual_seed(8)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(vocab_size=20, max_position_embeddings=16, projection_dim=8, **sizes)
    return transformers.CLIPTextModelWithProjection(config).eval()


class Sd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = sd_unet()
        self.text_encoder = text_encoder()

    def pipeline(self) -> Any:
        others = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
        scheduler = diffusers.PNDMScheduler(steps_offset=1)
        return diffusers.StableDiffusionPipeline(
            unet=self.unet, text_encoder=self.text_encoder, scheduler=scheduler, **others, requires_safety_checker=False
        )


class Sdxl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = sdxl_unet()
        self.text_encoder = text_encoder()
        self.text_encoder_2 = second_text_encoder()

    def pipeline(self) -> Any:
        others = dict.fromkeys(("vae", "tokenizer", "tokenizer_2"))
        scheduler = diffusers.EulerDiscreteScheduler()
        return diffusers.StableDiffusionXLPipeline(**dict(self.named_children()), scheduler=scheduler, **others)


@torch.no_grad()
def outputs(module: Any) -> dict[str, Tensor]:
    """What each member of a pipeline computes."""
    torch.manual_seed(6)
    x = torch.randn(1, 4, 8, 8)
    words = torch.randn(1, 3, 8)
    added = {"text_embeds": torch.randn(1, 8), "time_ids": torch.randn(1, 6)}
    found = {"unet": module.unet(x, 1, words, added_cond_kwargs=added)[0]}
    for name, member in module.named_children():
        if name != "unet":
            found[name] = member(torch.arange(5)[None])[0]
    return found


ENCODER = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "proj_in", "proj_out", "conv", "conv1", "conv2"]
LAYERS += ["conv_shortcut", "time_emb_proj", "conv_in", "conv_out", "linear_1", "linear_2", *ENCODER]
PARTS: list[tuple[Callable[[], Any], dict[str, Any]]] = [
    (Sd, {"target_modules": LAYERS, "alpha": 5, "rank_pattern": {"to_q": 3, "conv1": 1, "fc1": 3}}),
    (Sdxl, {"target_modules": LAYERS, "use_rslora": True, "alpha_pattern": {"to_v": 7, "conv": 2, "q_proj": 1}}),
    (Sdxl, {"target_modules": ["to_q", "q_proj", "v_proj"]}),
    (Sd, {"target_modules": ["to_v", "q_proj"], "init": "pissa"}),
]


@pytest.mark.filterwarnings("ignore:kohya's own scripts skip")
@pytest.mark.parametrize(("build", "config"), PARTS)
def test_a_pipeline_computes_the_same(build: Callable[[], Any], config: dict[str, Any], tmp_path: Path) -> None:
    module = trained(build(), ll.LoRAConfig(r=2, **config), scale=0.1)
    ll.export_peft(module, tmp_path, format="kohya")
    assert file_names(tmp_path) == [FILE]
    other = build()
    base = outputs(other)
    other.pipeline().load_lora_weights(tmp_path, weight_name=FILE)
    here = outputs(module)
    for name, found in outputs(other).items():
        assert (here[name] - base[name]).norm() > 1e-3 * base[name].norm()
        check_equal(found, here[name])
