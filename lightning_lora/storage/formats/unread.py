"""Tools whose files are not read. The names of their tensors tell the tool, and an error says how to go on."""

from lightning_lora.storage.formats.format import Format

KOHYA = Format(
    name="kohya",
    tool="kohya's sd-scripts or ComfyUI",
    unread_names=r".+\.lora_down\.weight|diffusion_model\..+\.lora_[AB]\.weight",
    remedy="Let diffusers read it: pipe.load_lora_weights(file, adapter_name='default'), then pipe.unet (or "
    "pipe.transformer).save_lora_adapter(folder), then load_adapter(model, folder)",
)

PEFT_STATE = Format(
    name="PEFT's state",
    tool="PEFT, as state_dict() gives them, without their scaling",
    unread_names=r".+\.lora_(embedding_)?[AB]\.[^.]+(\.weight)?",
    remedy="Call save_pretrained(folder) of PEFT's model, and load the folder",
)

OTHERS = Format(
    name="others",
    tool="another tool",
    unread_names=r".*(\blora_|\bhada_w|\blokr_w|adapter\.linear_).*",
    remedy="Use the merged model, or a folder of PEFT",
)
