"""Tools whose files are not read.

The names of their tensors tell the tool, and an error says how to go on.
"""

from lightning_lora.storage.formats.format import UnreadTool

KOHYA_REMEDY = (
    "Let diffusers read it: pipe.load_lora_weights(file, adapter_name='default'), then "
    "pipe.unet (or pipe.transformer).save_lora_adapter(folder), then "
    "load_adapter(model, folder)"
)

# files with kohya's or ComfyUI's names that are not of the format "kohya": they are for
# other models, or hold other things too
OTHER_KOHYA = UnreadTool(
    tool="kohya's sd-scripts or ComfyUI",
    tensor_names=r".+\.lora_down\.weight|diffusion_model\..+\.lora_[AB]\.weight",
    remedy=KOHYA_REMEDY,
)

PEFT_STATE = UnreadTool(
    tool="PEFT, as state_dict() gives them, without their scaling",
    tensor_names=r".+\.lora_(embedding_)?[AB]\.[^.]+(\.weight)?",
    remedy="Call save_pretrained(folder) of PEFT's model, and load the folder",
)

OTHERS = UnreadTool(
    tool="another tool",
    tensor_names=r".*(\blora_|\bhada_w|\blokr_w|adapter\.linear_).*",
    remedy="Use the merged model, or a folder of PEFT",
)

UNREAD_TOOLS = (OTHER_KOHYA, PEFT_STATE, OTHERS)
"""All of them, in the order in which they are asked: the last one after all that are more exact."""
