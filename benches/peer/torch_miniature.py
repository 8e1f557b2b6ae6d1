"""What `bench_miniature` is measured against: the same work on the CPU in PyTorch, as well as one writes it there.

    cargo run --release --example bench_miniature && python benches/peer/torch_miniature.py

Needs torch, diffusers and transformers (2.11.0, 0.42.1 and 5.23.0 when written). Takes the networks of the crate's
weights and the inputs that `bench_miniature` wrote, computes in f32 with scaled_dot_product_attention, compares the
results with those of `bench_miniature`, and prints times: median and least of several runs, and the CPU time of a run.

unet      diffusers' U-Net, forward.
training  One joint iteration of the paper: frozen encoders, one pass of the KV encoder, which ends at the last keys and
          values, denoiser, preview through the LCM-LoRA, both losses, backward pass, clipping, fused AdamW.
picture   30 steps of DPM-Solver++(2M) with plain guidance, both predictions in one batch, and the decoder.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

ROOT = Path(__file__).parents[2]


def report(what, run, repeats):
    run()
    times, before = [], time.process_time()
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    busy = (time.process_time() - before) * 1e3 / repeats
    median = statistics.median(times)
    print(f"{what}: median {median:.1f} ms, least {min(times):.1f} ms, CPU time {busy:.1f} ms", flush=True)


def compare(what, found, expected, limit=1e-3):
    """Ours and PyTorch's rounding differ, nothing else may."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    error = ((found - expected).norm() / expected.norm()).item()
    print(f"  {what}: relative difference {error:.1e}")
    assert error < limit, what


class Mode:
    """How the pass under way differs from the plain base: which LoRA at which scale, whose keys and values are attended
    to besides the own ones, the image tokens' keys and values, where to record the own keys and values, and whether a
    frozen LoRA is added to a layer's weight rather than to its result."""

    lora, scale, reference, image, record = None, 1.0, None, None, None
    merge = False


class Finished(Exception):
    """The last keys and values are recorded."""


def low_rank(layer, x, down, up):
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(F.conv2d(x, down, stride=layer.stride, padding=layer.padding), up)
    return F.linear(F.linear(x, down), up)


def add_lora(layer, name, down, up):
    """Lets a frozen layer add `scale * up(down(x))` while `Mode.lora` is `name`."""
    if not hasattr(layer, "loras"):
        layer.loras = {}
        plain = layer.forward

        def forward(x):
            if Mode.lora not in layer.loras:
                return plain(x)
            down, up = layer.loras[Mode.lora]
            if Mode.merge and Mode.lora == "lcm":
                flat = torch.addmm(layer.weight.flatten(1), up.flatten(1), down.flatten(1), alpha=Mode.scale)
                weight = flat.view(layer.weight.shape)
                if isinstance(layer, nn.Conv2d):
                    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
                return F.linear(x, weight, layer.bias)
            return torch.add(plain(x), low_rank(layer, x, down, up), alpha=Mode.scale)

        layer.forward = forward
    layer.loras[name] = (down, up)


class Processor:
    """Self-attention that reads Mode, or cross-attention with image tokens (IP-Adapter)."""

    def __init__(self, block, is_self, export=None):
        self.block, self.is_self, self.export, self.last = block, is_self, export, False

    def __call__(self, attn, x, encoder_hidden_states=None, **_):
        batch, tokens, channels = x.shape

        def heads(t):
            return t.view(batch, -1, attn.heads, channels // attn.heads).transpose(1, 2)

        if self.is_self and Mode.record is not None:
            layers = (attn.to_k, attn.to_v)
            pairs = zip(layers, self.export)
            Mode.record[self.block] = tuple(F.linear(x, y.weight) + low_rank(y, x, *lora) for y, lora in pairs)
            if self.last:
                raise Finished
        context = x if self.is_self else encoder_hidden_states
        q, k, v = heads(attn.to_q(x)), attn.to_k(context), attn.to_v(context)
        if self.is_self and Mode.reference is not None:
            k, v = (torch.cat(pair, 1) for pair in zip((k, v), Mode.reference[self.block]))
        out = F.scaled_dot_product_attention(q, heads(k), heads(v))
        if not self.is_self and Mode.image is not None:
            out = out + F.scaled_dot_product_attention(q, *map(heads, Mode.image[self.block]))
        return attn.to_out[0](out.transpose(1, 2).reshape(batch, tokens, channels))


class Resampler:
    """IP-Adapter Plus's projection of image features to image tokens."""

    def __init__(self, weights):
        self.w = weights

    def norm(self, x, name):
        weight = self.w[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self.w[f"{name}.bias"])

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def __call__(self, features, heads=4, depth=2):
        image = self.linear(features, "proj_in")
        x = self.w["latents"].expand(len(image), -1, -1)
        for i in range(depth):
            at, ff = f"layers.{i}.0", f"layers.{i}.1"
            queries = self.norm(x, f"{at}.norm2")
            both = torch.cat([self.norm(image, f"{at}.norm1"), queries], 1)
            q, k, v = self.linear(queries, f"{at}.to_q"), *self.linear(both, f"{at}.to_kv").chunk(2, -1)
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = self.linear(attended, f"{at}.to_out") + x
            x = self.linear(F.gelu(self.linear(self.norm(x, f"{ff}.0"), f"{ff}.1")), f"{ff}.3") + x
        return self.norm(self.linear(x, "proj_out"), "norm_out")


class Faces:
    """The miniature's face locator and identity network, and the aligned crop between them."""

    TEMPLATE = [[38.29459953, 51.69630051], [72.53179932, 51.50139999], [56.02519989, 71.73660278],
                [41.54930115, 92.3655014], [70.72990036, 92.20410156]]  # fmt: skip
    CROP = 64

    def __init__(self, weights):
        self.w = weights
        self.template = torch.tensor(self.TEMPLATE, dtype=torch.float64) * (self.CROP / 112)

    def conv(self, x, name, **options):
        return F.conv2d(x, self.w[f"{name}.weight"], **options)

    def norm(self, x, name):
        weight = self.w[f"{name}.weight"]
        return F.relu(F.group_norm(x, len(weight) // 8, weight, self.w[f"{name}.bias"]))

    def locate(self, images):
        """Landmarks in pixels, `(batch, 5, 2)`, and in which images there is a face."""
        with torch.no_grad():
            x = F.interpolate(images, (64, 64), mode="bilinear", antialias=True)
            for i in range(4):
                at = f"face_locator.stages.{i}"
                x = self.norm(self.conv(x, f"{at}.conv", stride=2, padding=1), f"{at}.norm")
            x = x.permute(0, 2, 3, 1).flatten(1)
            for name, act in (("hidden", F.relu), ("output", lambda x: x)):
                x = act(F.linear(x, self.w[f"face_locator.{name}.weight"], self.w[f"face_locator.{name}.bias"]))
            points = (x[:, :10].double().view(-1, 5, 2) + 0.5) * images.shape[-1] - 0.5
            return points, x[:, 10] >= 0

    def crop(self, images, points):
        """The faces, on the template; those much larger than the crop are made smaller with a filter first."""
        p, q = (torch.view_as_complex(t.contiguous()) for t in (points, self.template.expand_as(points)))
        p0, q0 = p.mean(1, keepdim=True), q.mean(1, keepdim=True)
        turn = ((p - p0).conj() * (q - q0)).sum(1, keepdim=True) / (p - p0).abs().square().sum(1, keepdim=True)
        scale, shift = 1 / turn, p0 - q0 / turn  # from the crop to the image
        factors = scale.abs().round().clamp(min=1).squeeze(1)
        side, crops = images.shape[-1], [None] * len(images)
        line = torch.arange(self.CROP, dtype=torch.float64)
        grid = torch.complex(*torch.meshgrid(line, line, indexing="xy"))
        for factor in factors.unique().tolist():
            chosen = (factors == factor).nonzero().squeeze(1)
            small, source = round(side / factor), images[chosen]
            if small != side:
                source = F.interpolate(source, (small, small), mode="bilinear", antialias=True)
            at = torch.view_as_real(grid * scale[chosen, :, None] + shift[chosen, :, None])
            at = ((at + 0.5) * (small / side) - 0.5) * (2 / (small - 1)) - 1
            found = F.grid_sample(source, at.to(images.dtype), align_corners=True)
            for place, face in zip(chosen.tolist(), found):
                crops[place] = face
        return torch.stack(crops)

    def embed(self, faces):
        x = self.conv(faces, "identity_network.conv_in", stride=2, padding=1)
        for i in range(4):
            at, stride = f"identity_network.blocks.{i}", 1 if i == 0 else 2
            y = self.conv(self.norm(x, f"{at}.norm1"), f"{at}.conv1", stride=stride, padding=1)
            y = self.conv(self.norm(y, f"{at}.norm2"), f"{at}.conv2", padding=1)
            x = y + (x if i == 0 else self.conv(x, f"{at}.shortcut", stride=stride))
        x = self.norm(x, "identity_network.norm_out").permute(0, 2, 3, 1).flatten(1)
        at = "identity_network.linear_out"
        return F.normalize(F.linear(x, self.w[f"{at}.weight"], self.w[f"{at}.bias"]), dim=-1)

    def loss(self, previews, references):
        (points, present), (their_points, theirs) = self.locate(previews), self.locate(references)
        chosen = (present & theirs).nonzero().squeeze(1)
        with torch.no_grad():
            target = self.embed(self.crop(references[chosen], their_points[chosen]))
        found = self.embed(self.crop(previews[chosen], points[chosen]))
        return (1 - (found * target).sum(-1)).mean(), len(chosen)


class Miniature:
    """All networks."""

    def __init__(self, memory_format):
        weights = {name: t.float() for name, t in load_file(ROOT / "assets/mini.safetensors").items()}
        self.format = memory_format

        def below(prefix):
            return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}

        def loaded(network, prefix, ignore=()):
            own = {name: t for name, t in below(prefix).items() if name not in ignore}
            missing, unexpected = network.load_state_dict(own, strict=False)
            missing = [name for name in missing if "position_ids" not in name]
            assert not missing and not unexpected, (missing, unexpected)
            return network.eval().requires_grad_(False)

        self.unet = loaded(
            UNet2DConditionModel(
                sample_size=32, in_channels=4, out_channels=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(32, 64, 80), layers_per_block=1, transformer_layers_per_block=[1, 1, 2],
                attention_head_dim=[1, 4, 5], cross_attention_dim=64, use_linear_projection=True, norm_num_groups=8,
                addition_embed_type="text_time", addition_time_embed_dim=16, projection_class_embeddings_input_dim=160,
            ), "unet.",
        ).to(memory_format=memory_format)  # fmt: skip
        self.autoencoder = loaded(
            AutoencoderTiny(
                encoder_block_out_channels=(24,) * 3, decoder_block_out_channels=(24,) * 3, latent_channels=4,
                num_encoder_blocks=(1, 2, 2), num_decoder_blocks=(2, 2, 1),
            ), "autoencoder.", ("scaling_factor", "shift"),
        ).to(memory_format=memory_format)  # fmt: skip
        self.scaling, self.shift = (weights[f"autoencoder.{name}"].item() for name in ("scaling_factor", "shift"))
        vocabulary, width = weights["text_encoder.text_model.embeddings.token_embedding.weight"].shape
        length = len(weights["text_encoder.text_model.embeddings.position_embedding.weight"])
        self.text_encoder = loaded(
            CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=vocabulary, hidden_size=width, intermediate_size=256, num_hidden_layers=2,
                    num_attention_heads=2, max_position_embeddings=length, projection_dim=64, hidden_act="gelu",
                    bos_token_id=0, eos_token_id=1, pad_token_id=1,
                )
            ), "text_encoder.",
        )  # fmt: skip
        self.image_encoder = loaded(
            CLIPVisionModelWithProjection(
                CLIPVisionConfig(
                    hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=3, image_size=128,
                    patch_size=16, projection_dim=64, hidden_act="gelu",
                )
            ), "image_encoder.",
        )  # fmt: skip
        self.faces = Faces(weights)
        self.adapter = below("adapter.")
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        self.alphas = torch.cumprod(1 - betas, 0)
        self.add_lcm_lora(below("lcm_lora."))
        # IP-Adapter numbers the attention layers in the order of `attn_processors`.
        blocks = [name.removesuffix(".attn2.processor") for name in self.unet.attn_processors if "attn2" in name]
        self.index = {block: 2 * i + 1 for i, block in enumerate(blocks)}

    def add_lcm_lora(self, tensors):
        for name, down in tensors.items():
            if name.endswith(".lora_A.weight"):
                path = name.removesuffix(".lora_A.weight")
                add_lora(self.unet.get_submodule(path), "lcm", down, tensors[f"{path}.lora_B.weight"])

    def set_processors(self, parameters):
        """Hooks for LoRAs, references and image tokens; those of the KV encoder, where there are parameters of one."""
        processors = {}
        for name in list(self.unet.attn_processors):
            path = name.removesuffix(".processor")
            block, attn = path.rsplit(".", 1)

            def pair(prefix):
                found = (parameters.get(f"kv_encoder.{prefix}.lora_{part}.weight") for part in "AB")
                return tuple(found)

            for layer in ("to_q", "to_k", "to_v", "to_out.0"):
                down, up = pair(f"encoder.{path}.{layer}")
                if down is not None:
                    add_lora(self.unet.get_submodule(f"{path}.{layer}"), "kv", down, up)
            export = [pair(f"export.{path}.{layer}") for layer in ("to_k", "to_v")] if attn == "attn1" else None
            processors[name] = Processor(block, attn == "attn1", export)
        self.unet.set_attn_processor(dict(processors))
        # The order of a run, unlike that of the names: down, middle, up.
        last = [name for name in processors if name.startswith("up_blocks") and "attn1" in name][-1]
        processors[last].last = True

    def image_tokens(self, parameters, tokens):
        return {
            block: tuple(F.linear(tokens, parameters[f"ip_adapter.{i}.{p}.weight"]) for p in ("to_k_ip", "to_v_ip"))
            for block, i in self.index.items()
        }

    @torch.no_grad()
    def text(self, ids):
        found = self.text_encoder(ids.long(), output_hidden_states=True)
        return found.hidden_states[-2], found.text_embeds

    @torch.no_grad()
    def features(self, images):
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round() / 255
        return self.image_encoder((pixels - mean) / std, output_hidden_states=True).hidden_states[-2]

    @torch.no_grad()
    def null_features(self):
        return self.image_encoder(torch.zeros(1, 3, 128, 128), output_hidden_states=True).hidden_states[-2]

    @torch.no_grad()
    def encode(self, images):
        latents = self.autoencoder.encode(images.to(memory_format=self.format)).latents
        return (latents - self.shift) * self.scaling

    def decode(self, latents):
        return self.autoencoder.decode((latents / self.scaling + self.shift).to(memory_format=self.format)).sample

    def predict(self, latents, timesteps, text, pooled):
        sizes = torch.tensor([[128.0, 128, 0, 0, 128, 128]]).expand(len(latents), -1)
        added = {"text_embeds": pooled, "time_ids": sizes}
        latents = latents.to(memory_format=self.format)
        return self.unet(latents, timesteps, text, added_cond_kwargs=added, return_dict=False)[0]

    def add_noise(self, latents, noise, timesteps):
        alphas = self.alphas[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt().float() * latents + (1 - alphas).sqrt().float() * noise


def unet(network, inputs, repeats):
    for batch in (1, 8):
        latents, hidden, pooled, timesteps, expected = (
            inputs[f"unet.{batch}.{name}"] for name in ("latents", "hidden_states", "pooled", "timesteps", "prediction")
        )

        @torch.inference_mode()
        def run():
            return network.predict(latents, timesteps, hidden, pooled)

        compare(f"U-Net's prediction B{batch}", run(), expected, 1e-4)
        report(f"U-Net forward B{batch}", run, 10 * repeats)


def training(network, inputs, repeats):
    def below(prefix):
        return {name.removeprefix(prefix): t for name, t in inputs.items() if name.startswith(prefix)}

    parameters = {name: t.clone().requires_grad_() for name, t in below("parameters.").items()}
    network.set_processors(parameters)
    resampler = Resampler({k.removeprefix("image_proj."): t for k, t in parameters.items() if "image_proj." in k})
    groups = [
        {"params": [t for name, t in parameters.items() if name.startswith("kv_encoder.")], "lr": 1e-4},
        {"params": [t for name, t in parameters.items() if not name.startswith("kv_encoder.")], "lr": 2e-4},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    given = below("training.")
    lora_scale, weight, *expected = given["numbers"].tolist()
    timesteps, noise = given["timesteps"], given["noise"]
    alphas = network.alphas[timesteps].view(-1, 1, 1, 1)

    def iteration():
        target, conditioning = network.encode(given["pixel_values"]), network.encode(given["encoder_pixel_values"])
        text, encoder_text = network.text(given["input_ids"]), network.text(given["encoder_input_ids"])
        features = network.features(given["encoder_pixel_values"])
        null_features = network.null_features()

        tokens, _ = resampler(features), resampler(null_features)
        Mode.lora, Mode.scale, Mode.reference, Mode.image, Mode.record = "kv", 1.0, None, None, {}
        try:
            network.predict(network.add_noise(conditioning, noise, timesteps), timesteps, *encoder_text)
        except Finished:
            pass
        Mode.lora, Mode.reference, Mode.record = None, Mode.record, None
        Mode.image = network.image_tokens(parameters, tokens)
        noised = network.add_noise(target, noise, timesteps)
        diffusion = F.mse_loss(network.predict(noised, timesteps, *text), noise)

        Mode.lora, Mode.scale = "lcm", lora_scale
        prediction = network.predict(noised, timesteps, *text)
        latents = (noised - (1 - alphas).sqrt().float() * prediction) / alphas.sqrt().float()
        identity, counted = network.faces.loss(network.decode(latents), given["encoder_pixel_values"])
        (diffusion + weight * identity).backward()
        norm = nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return diffusion.item(), identity.item(), counted, norm.item()

    names = ("diffusion loss", "identity loss", "faces", "gradient norm")
    for name, found, wanted in zip(names, iteration(), expected):
        compare(name, found, wanted)
    names = sorted(parameters)
    change = [torch.cat([(new[n] - inputs[f"parameters.{n}"]).flatten() for n in names]) for new in
              (parameters, below("updated."))]  # fmt: skip
    compare("change of the parameters", change[0].detach(), change[1], 0.1)
    report(f"training iteration B{len(noise)}", iteration, repeats)
    Mode.lora = Mode.reference = Mode.image = None


def picture(network, inputs, repeats):
    parameters = network.adapter
    network.set_processors({})
    resampler = Resampler({k.removeprefix("image_proj."): t for k, t in parameters.items() if "image_proj." in k})
    features = torch.cat([network.features(inputs["picture.portrait"]), network.null_features()])
    tokens, steps, scale = resampler(features), 30, 5.0
    timesteps = torch.arange(steps, 0, -1) * (1000 // (steps + 1))
    timesteps = timesteps + 1 if timesteps[0] + 1 < 1000 else timesteps
    sigmas = ((1 - network.alphas) / network.alphas).sqrt()
    sigmas = sigmas[torch.cat([timesteps, torch.zeros(1, dtype=torch.long)])]

    @torch.inference_mode()
    def run():
        Mode.image = network.image_tokens(parameters, tokens)
        hidden, pooled = network.text(inputs["picture.input_ids"])
        hidden, pooled = torch.cat([hidden, hidden * 0]), torch.cat([pooled, pooled * 0])
        latents, previous = inputs["picture.noise"], None
        for i, timestep in enumerate(timesteps):
            alpha, next_alpha = (1 / (1 + s * s).sqrt() for s in (sigmas[i], sigmas[i + 1]))
            both = network.predict(torch.cat([latents, latents]), timestep, hidden, pooled)
            prediction = both[1:] + scale * (both[:1] - both[1:])
            x0 = (latents - (sigmas[i] * alpha).float() * prediction) / alpha.float()
            interval, direction = (sigmas[i] / sigmas[i + 1]).log(), x0
            if i > 0:
                slope = 0.5 * interval / (sigmas[i - 1] / sigmas[i]).log()
                direction = x0 + slope.float() * (x0 - previous)
            ratio, weight = sigmas[i + 1] * next_alpha / (sigmas[i] * alpha), -next_alpha * torch.expm1(-interval)
            latents, previous = ratio.float() * latents + weight.float() * direction, x0
        return network.decode(latents)

    compare("picture", run(), inputs["picture.image"], 1e-2)
    report("one picture, 30 steps", run, repeats)
    Mode.image = None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="unet, training, picture")
    parser.add_argument("--inputs", default="out/bench_miniature", help="the folder that bench_miniature wrote")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5, help="the forward pass is run ten times as often")
    parser.add_argument("--channels-last", action="store_true", help="convolutions on channels-last pictures")
    parser.add_argument("--merge-lora", action="store_true", help="add the LCM-LoRA to the weights, not to the results")
    arguments = parser.parse_args()
    Mode.merge = arguments.merge_lora
    parts = {"unet": unet, "training": training, "picture": picture}
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    network = Miniature(torch.channels_last if arguments.channels_last else torch.contiguous_format)
    settings = f"channels last: {arguments.channels_last}, LoRA merged: {arguments.merge_lora}"
    print(f"torch {torch.__version__}, {arguments.threads} threads, {settings}")
    for name, measure in parts.items():
        if not arguments.parts or name in arguments.parts:
            inputs = load_file(Path(arguments.inputs) / f"{name}.safetensors")
            measure(network, inputs, arguments.repeats)


if __name__ == "__main__":
    main()
