"""What `bench_sdxl` is measured against: the same work in PyTorch, as well as one writes it there.

    python benches/peer/torch_peer.py [attention] [unet] [training] [--batch 1,4,8]

Measures all parts where none is named. Needs a CUDA GPU, torch and diffusers (2.11.0+cu130 and 0.42.1 when written).
Weights are random, shapes SDXL's, dtype bf16; every time is the median of several runs, taken between CUDA events.

attention  Extended self-attention as the authors' code does it, with the best kernels PyTorch has: own and reference keys
           concatenated, then scaled_dot_product_attention by cuDNN and by FlashAttention; forward, and with backward.
unet       diffusers' U-Net, forward, 1024 pixels: eager (NCHW and channels last), and torch.compile at batch 2.
training   One joint iteration of the paper, leaner than the authors' code: one resident base for all passes, one pass
           of the KV encoder for both losses, checkpointing, fused AdamW. Frozen encoders and data are not part of it.
"""

import argparse
import gc

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE, DTYPE = "cuda", torch.bfloat16
TEXT_TOKENS, IMAGE_TOKENS, LORA_RANK, LCM_RANK = 77, 16, 4, 64


def median_ms(function, warm=3, repeats=10):
    for _ in range(warm):
        function()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def random(*shape, **options):
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE, **options)


def ceilings():
    """The limits of the GPU that all else can be divided by."""
    a = random(8192, 8192)
    print(f"ceiling: bf16 matrix product 8192^3 at {2 * 8192**3 / median_ms(lambda: a @ a) / 1e9:.0f} TFLOP/s")
    x = random(1 << 30)
    y = torch.empty_like(x)
    print(f"ceiling: copy at {2 * x.nbytes / median_ms(lambda: y.copy_(x)) / 1e6:.0f} GB/s")


def attention():
    for batch, heads, tokens in [(4, 10, 4096), (4, 20, 1024), (2, 10, 4096), (2, 20, 1024)]:
        q, k, v, k2, v2 = (random(batch, heads, tokens, 64, requires_grad=True) for _ in range(5))
        work = 4 * batch * heads * tokens * 2 * tokens * 64

        def attend():
            return F.scaled_dot_product_attention(q, torch.cat([k, k2], 2), torch.cat([v, v2], 2))

        def forward():
            with torch.no_grad():
                attend()

        def both():
            out = attend()
            torch.autograd.grad(out, [q, k, v, k2, v2], torch.ones_like(out))

        for name, backend in [("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)]:
            with sdpa_kernel(backend):
                for what, function, factor in [("forward", forward, 1), ("forward and backward", both, 3.5)]:
                    ms = median_ms(function)
                    rate = factor * work / ms / 1e9
                    what = f"extended attention B{batch} H{heads} N{tokens} M{2 * tokens} {what}"
                    print(f"{what}, {name}: {ms:.3f} ms, {rate:.0f} TFLOP/s")


def sdxl_unet():
    with torch.device(DEVICE):
        unet = UNet2DConditionModel(
            sample_size=128, in_channels=4, out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280), layers_per_block=2, transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20], cross_attention_dim=2048, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    return unet.to(DTYPE)


def inputs(batch):
    """Latents, timesteps, text embeddings, and SDXL's other conditions."""
    added = {"text_embeds": random(batch, 1280), "time_ids": torch.full((batch, 6), 1024.0, device=DEVICE, dtype=DTYPE)}
    timesteps = torch.randint(0, 1000, (batch,), device=DEVICE)
    return random(batch, 4, 128, 128), timesteps, random(batch, TEXT_TOKENS, 2048), added


def unet():
    network = sdxl_unet().eval()

    def measure(what, run, batch, memory_format):
        latents, timesteps, text, added = inputs(batch)
        latents = latents.to(memory_format=memory_format)
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            ms = median_ms(lambda: run(latents, timesteps, text, added_cond_kwargs=added, return_dict=False))
        print(f"U-Net forward B{batch}, {what}: {ms:.2f} ms, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")

    formats = {"eager": torch.contiguous_format, "eager, channels last": torch.channels_last}
    for what, memory_format in formats.items():
        network.to(memory_format=memory_format)
        for batch in (1, 2, 4):
            measure(what, network, batch, memory_format)
    measure("torch.compile", torch.compile(network, fullgraph=True), 2, torch.channels_last)


class Mode:
    """How the pass under way differs from the plain base: which LoRA at which scale, whose keys and values are attended
    to besides the own ones, and where to record the own ones."""

    lora, scale, reference, record = None, 1.0, None, None


def add_lora(layer, name, rank, trainable):
    """Lets a frozen layer add `scale * up(down(x))` while `Mode.lora` is `name`; returns the two weights."""
    convolution = isinstance(layer, nn.Conv2d)
    dtype = torch.float32 if trainable else DTYPE
    shape = layer.weight.shape
    down = torch.randn(rank, *shape[1:], device=DEVICE, dtype=dtype).div_(rank).requires_grad_(trainable)
    up = torch.zeros(shape[0], rank, *(1 for _ in shape[2:]), device=DEVICE, dtype=dtype).requires_grad_(trainable)
    if not hasattr(layer, "loras"):
        layer.loras = {}
        plain = layer.forward

        def forward(x):
            y = plain(x)
            if Mode.lora not in layer.loras:
                return y
            down, up = (weight.to(x.dtype) for weight in layer.loras[Mode.lora])
            if convolution:
                low = F.conv2d(x, down, stride=layer.stride, padding=layer.padding)
                return y + F.conv2d(low, up) * Mode.scale
            return y + F.linear(F.linear(x, down), up) * Mode.scale

        layer.forward = forward
    layer.loras[name] = (down, up)
    return [down, up]


class Processor(nn.Module):
    """Self-attention that reads Mode, or cross-attention with image tokens (IP-Adapter) behind the text tokens."""

    def __init__(self, name, image_channels=None):
        super().__init__()
        self.name = name
        self.is_self = image_channels is None
        if not self.is_self:
            options = {"bias": False, "device": DEVICE, "dtype": torch.float32}
            self.to_k_ip, self.to_v_ip = (nn.Linear(2048, image_channels, **options) for _ in range(2))

    def __call__(self, attn, x, encoder_hidden_states=None, **_):
        batch, tokens, channels = x.shape

        def attend(k, v):
            heads = (batch, -1, attn.heads, channels // attn.heads)
            q, k, v = (t.view(heads).transpose(1, 2) for t in (attn.to_q(x), k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, channels)

        if self.is_self:
            k, v = attn.to_k(x), attn.to_v(x)
            if Mode.record is not None:
                Mode.record[self.name] = (k, v)
            if Mode.reference is not None:
                k2, v2 = Mode.reference[self.name]
                k, v = torch.cat([k, k2], 1), torch.cat([v, v2], 1)
            out = attend(k, v)
        else:
            text, image = encoder_hidden_states[:, :TEXT_TOKENS], encoder_hidden_states[:, TEXT_TOKENS:]
            out = attend(attn.to_k(text), attn.to_v(text))
            if image.shape[1]:
                k, v = (F.linear(image, layer.weight.to(image.dtype)) for layer in (self.to_k_ip, self.to_v_ip))
                out = out + attend(k, v)
        return attn.to_out[1](attn.to_out[0](out))


def iresnet_50():
    """The shape of ArcFace's recogniser."""

    class Block(nn.Module):
        def __init__(self, channels, out, stride):
            super().__init__()
            self.body = nn.Sequential(
                nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 3, 1, 1, bias=False),
                nn.BatchNorm2d(out), nn.PReLU(out), nn.Conv2d(out, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out),
            )  # fmt: skip
            self.shortcut = nn.Identity()
            if stride > 1 or channels != out:
                self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

        def forward(self, x):
            return self.body(x) + self.shortcut(x)

    layers, channels = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)], 64
    for blocks, out in zip((3, 4, 14, 3), (64, 128, 256, 512)):
        for block in range(blocks):
            layers.append(Block(channels, out, 2 if block == 0 else 1))
            channels = out
    layers += [nn.BatchNorm2d(512), nn.Flatten(), nn.Linear(512 * 49, 512), nn.BatchNorm1d(512)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


class Training:
    """The networks of one joint iteration, and what is trained."""

    def __init__(self):
        self.unet = sdxl_unet().requires_grad_(False).to(memory_format=torch.channels_last).train()
        processors = {}
        for name in self.unet.attn_processors:
            attn = self.unet.get_submodule(name.removesuffix(".processor"))
            processors[name] = Processor(name, None if "attn1" in name else attn.to_k.out_features)
        self.unet.set_attn_processor(processors)
        adapter = [parameter for processor in processors.values() for parameter in processor.parameters()]
        kv_lora = []
        for name, layer in list(self.unet.named_modules()):
            if "processor" in name or not isinstance(layer, (nn.Linear, nn.Conv2d)):
                continue
            if "attn" in name and name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
                kv_lora += add_lora(layer, "kv", LORA_RANK, trainable=True)
            if any(part in name for part in ("attn", "ff", "proj", "resnets", "samplers")):
                add_lora(layer, "lcm", LCM_RANK, trainable=False)
        self.decoder = AutoencoderTiny(latent_channels=4).to(DEVICE, DTYPE).requires_grad_(False)
        self.identity = iresnet_50().to(DEVICE, DTYPE)
        self.projection = nn.Sequential(nn.Linear(1280, 2048), nn.LayerNorm(2048)).to(DEVICE)
        adapter += list(self.projection.parameters())
        groups = [{"params": adapter, "lr": 1e-5}, {"params": kv_lora, "lr": 5e-6}]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        count = sum(parameter.numel() for parameter in adapter + kv_lora)
        print(f"trainable parameters: {count}")

    def batch(self, size):
        noised, timesteps, text, added = inputs(size)
        return {
            "noised": noised.to(memory_format=torch.channels_last),
            "conditioning": torch.randn_like(noised).to(memory_format=torch.channels_last),
            "noise": torch.randn_like(noised).float(),
            "timesteps": timesteps,
            "text": text,
            "added": added,
            "features": torch.randn(size, IMAGE_TOKENS, 1280, device=DEVICE),
            "identity": F.normalize(torch.randn(size, 512, device=DEVICE), dim=-1),
        }

    def predict(self, batch, latents, text):
        return self.unet(latents, batch["timesteps"], text, added_cond_kwargs=batch["added"], return_dict=False)[0]

    def text_and_image(self, batch):
        return torch.cat([batch["text"], self.projection(batch["features"]).to(DTYPE)], 1)

    def iteration(self, batch):
        # The KV encoder's pass keeps its activations: keys and values are outputs that checkpointing would not return.
        recorded = {}
        Mode.lora, Mode.scale, Mode.reference, Mode.record = "kv", 1.0, None, recorded
        self.unet.disable_gradient_checkpointing()
        self.predict(batch, batch["conditioning"], batch["text"])
        self.unet.enable_gradient_checkpointing()
        # Both losses propagate to the keys and values, and only their sum through the KV encoder.
        leaves = {name: tuple(t.detach().requires_grad_() for t in pair) for name, pair in recorded.items()}

        Mode.lora, Mode.reference, Mode.record = None, leaves, None
        prediction = self.predict(batch, batch["noised"], self.text_and_image(batch))
        F.mse_loss(prediction.float(), batch["noise"]).backward()

        Mode.lora, Mode.scale = "lcm", 0.5
        prediction = self.predict(batch, batch["noised"], self.text_and_image(batch))
        preview = self.decoder.decode((batch["noised"] - 0.7 * prediction) / 0.7).sample
        crop = F.interpolate(preview, (112, 112), mode="bilinear", antialias=True)
        found = F.normalize(self.identity(crop).float(), dim=-1)
        (1 - (found * batch["identity"]).sum(-1)).mean().backward()

        pairs = [pair for name in recorded for pair in zip(recorded[name], leaves[name])]
        pairs = [(output, leaf.grad) for output, leaf in pairs if leaf.grad is not None and output.requires_grad]
        torch.autograd.backward(*map(list, zip(*pairs)))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def training(sizes):
    networks = Training()
    for size in sizes:
        batch = networks.batch(size)
        torch.cuda.reset_peak_memory_stats()
        try:
            ms = median_ms(lambda: networks.iteration(batch), warm=2, repeats=5)
        except torch.OutOfMemoryError:
            print(f"joint iteration B{size}: out of memory")
        else:
            print(f"joint iteration B{size}: {ms:.1f} ms, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        networks.optimizer.zero_grad(set_to_none=True)
        del batch
        gc.collect()
        torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="attention, unet, training")
    parser.add_argument("--batch", default="1,4,8", help="batch sizes of the training iteration")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.batch.split(",")]
    measures = {"attention": attention, "unet": unet, "training": lambda: training(sizes)}
    if unknown := set(arguments.parts) - set(measures):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    ceilings()
    for name, measure in measures.items():
        if not arguments.parts or name in arguments.parts:
            measure()
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
