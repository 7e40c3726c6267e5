"""The files of kohya's sd-scripts, which ComfyUI, A1111 and diffusers read: one for a whole pipeline.

Stable Diffusion, SDXL and their text encoders are written and read. Flux is only
written: such a file has larger layers than diffusers' model, and nothing here takes
them apart again.
"""

from lightning_lora.storage.formats.format import WrittenFormat
from lightning_lora.storage.formats.pipelines import kohya_read, kohya_write

KOHYA = WrittenFormat(
    name=kohya_write.NAME,
    tool="kohya's sd-scripts",
    recognise=kohya_read.recognise,
    write=kohya_write.write,
    files=(kohya_write.FILE,),
)
