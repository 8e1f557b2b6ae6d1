"""SDXL's U-Net in diffusers with random weights: writes the weights and what they compute, for `bench_sdxl --compare`.

    python examples/bench_sdxl/reference.py FOLDER
    cargo run --release --features cuda --example bench_sdxl -- --compare FOLDER

Needs a CUDA GPU, torch and diffusers (0.42 when written). The folder (a RAM disk is best: 5.2 GB) gets
unet.safetensors   the weights, bf16
lora.safetensors   a LoRA on every linear layer and convolution of blocks and samplers, peft's names
cases.safetensors  inputs, and the noise predictions in f32 and bf16: plain; with that LoRA; with the self-attention
                   extended by the keys and values of a pass over reference latents.
"""
import os
import sys

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

RANK, SCALE, BATCH = 8, 0.7, 2
folder = sys.argv[1]
os.makedirs(folder, exist_ok=True)
torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False

with torch.device("cuda"):
    unet = UNet2DConditionModel(
        sample_size=128, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280), layers_per_block=2, transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20], cross_attention_dim=2048, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    ).eval().requires_grad_(False)
# The values that bf16 has, also for the run in f32.
for parameter in unet.parameters():
    parameter.copy_(parameter.bfloat16())
save_file({name: tensor.bfloat16() for name, tensor in unet.state_dict().items()}, f"{folder}/unet.safetensors")

lora, state = {"on": False}, {"record": None, "extend": None}
tensors = {}


def adapt(name, layer):
    """Adds `SCALE * up(down(x))` to a layer while lora["on"]."""
    shape = layer.weight.shape
    down = torch.randn(RANK, *shape[1:], device="cuda").mul_(shape[1:].numel() ** -0.5).bfloat16()
    up = torch.randn(shape[0], RANK, *(1 for _ in shape[2:]), device="cuda").mul_(0.3 * RANK**-0.5).bfloat16()
    tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up
    plain = layer.forward

    def forward(x, *rest, **more):
        y = plain(x, *rest, **more)
        if not lora["on"]:
            return y
        if len(shape) == 2:
            return y + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)) * SCALE
        low = F.conv2d(x, down.to(x.dtype), stride=layer.stride, padding=layer.padding)
        return y + F.conv2d(low, up.to(x.dtype)) * SCALE

    layer.forward = forward


for name, module in list(unet.named_modules()):
    if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and "block" in name:
        adapt(name, module)
save_file(tensors, f"{folder}/lora.safetensors")


class Extended:
    """Self-attention that records its keys and values, or attends to recorded ones besides its own."""

    def __init__(self, name):
        self.name = name

    def __call__(self, attn, x, encoder_hidden_states=None, **_):
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        if "attn1" in self.name:
            if state["record"] is not None:
                state["record"][self.name] = (k, v)
            if state["extend"] is not None:
                k, v = (torch.cat(pair, 1) for pair in zip((k, v), state["extend"][self.name]))
        heads = lambda t: t.unflatten(2, (attn.heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


unet.set_attn_processor({name: Extended(name) for name in unet.attn_processors})
random = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()
cases = {
    "latents": random(BATCH, 4, 128, 128), "reference_latents": random(BATCH, 4, 128, 128),
    "text": random(BATCH, 77, 2048), "pooled": random(BATCH, 1280),
}
timesteps = torch.tensor([801, 41], device="cuda")
time_ids = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]] * BATCH, device="cuda")


@torch.no_grad()
def run(latents, dtype):
    added = {"text_embeds": cases["pooled"].to(dtype), "time_ids": time_ids.to(dtype)}
    text = cases["text"].to(dtype)
    return unet(cases[latents].to(dtype), timesteps, text, added_cond_kwargs=added, return_dict=False)[0]


for dtype, suffix in ((torch.float32, "f32"), (torch.bfloat16, "bf16")):
    unet.to(dtype)
    cases[f"plain_{suffix}"] = run("latents", dtype)
    lora["on"] = True
    cases[f"lora_{suffix}"] = run("latents", dtype)
    lora["on"] = False
    state["record"] = {}
    run("reference_latents", dtype)
    state["extend"], state["record"] = state["record"], None
    cases[f"extended_{suffix}"] = run("latents", dtype)
    state["extend"] = None
save_file({name: tensor.contiguous() for name, tensor in cases.items()}, f"{folder}/cases.safetensors")
for case in ("plain", "lora", "extended"):
    exact, rounded = cases[f"{case}_f32"], cases[f"{case}_bf16"].float()
    print(f"{case}: norm {exact.norm():.4g}, diffusers bf16 against f32: {(rounded - exact).norm() / exact.norm():.2e}")
