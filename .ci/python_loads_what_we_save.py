"""Loads in Python what the crate writes: with peft, with diffusers, and with a strict comparison of every name.

Run with: pip install -r tests/fixtures/requirements.txt
          python .ci/python_loads_what_we_save.py target/release/examples
"""

import hashlib
import http.server
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
FORMATS = FIXTURES / "formats"
sys.path.insert(0, str(FIXTURES))

from formats import Sinusoids  # noqa: E402
from official_layout import OfficialModule, Resampler  # noqa: E402

PROGRAMS = Path(sys.argv[1])
GIVEN = load_file(FORMATS / "outputs.safetensors")


def convert(source, target, form, *more):
    command = [PROGRAMS / "convert", str(source), str(target), "--to", form, *map(str, more)]
    subprocess.run(command, check=True)
    return target


def unet(folder):
    return UNet2DConditionModel.from_pretrained(FORMATS / folder / "unet", variant="fp16", torch_dtype=torch.float32)


def run(network, **more):
    """What the fixtures were computed with, in f64."""
    base = network.get_base_model() if hasattr(network, "get_base_model") else network
    network = network.double()
    base.time_proj, base.add_time_proj = Sinusoids(4), Sinusoids(4)
    conditions = {
        "text_embeds": GIVEN["pooled"],
        "time_ids": torch.tensor([[8.0, 8.0, 0.0, 0.0, 8.0, 8.0]] * 2).double(),
    } | more
    with torch.no_grad():
        timesteps = torch.tensor([3, 801])
        return network(GIVEN["latents"], timesteps, GIVEN["text"], added_cond_kwargs=conditions).sample


def close(what, found, expected, limit=1e-6):
    error = ((found - expected).norm() / expected.norm()).item()
    print(f"{what}: relative error {error:.1e}")
    assert error < limit, what


def same(what, found, expected):
    assert found.keys() == expected.keys(), f"{what}: {sorted(found.keys() ^ expected.keys())[:5]}"
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape, f"{what}: {name}"
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), f"{what}: {name}"
    print(f"{what}: {len(found)} tensors equal")


def lora(out):
    base = ("--unet", FORMATS / "base" / "unet")
    for source in ("lora_kohya_stability.safetensors", "lora_old.safetensors", "lora_peft"):
        adapted = PeftModel.from_pretrained(unet("base"), convert(FORMATS / source, out / f"{source}-peft", "peft", *base))
        close(f"{source} by peft", run(adapted), GIVEN["lora"])
        for form in ("diffusers", "diffusers-old", "kohya", "kohya-stability"):
            path = convert(FORMATS / source, out / f"{source}-{form}.safetensors", form, *base)
            network = unet("base")
            state, alphas, notes = StableDiffusionXLPipeline.lora_state_dict(
                str(path), unet_config=network.config, return_lora_metadata=True
            )
            StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, network, metadata=notes)
            close(f"{source} as {form} by diffusers", run(network), GIVEN["lora"])


def adapter(out):
    for ending in ("bin", "safetensors"):
        path = convert(
            FORMATS / "ip_adapter.safetensors", out / f"adapter.{ending}", "ip-adapter", "--unet", FORMATS / "base"
        )
        if ending == "bin":
            state = torch.load(path, weights_only=True)
        else:
            flat = load_file(path)
            state = {
                part: {name.removeprefix(f"{part}."): value for name, value in flat.items() if name.startswith(part)}
                for part in ("image_proj", "ip_adapter")
            }
        network = unet("base")
        network._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
        for processor in network.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [0.6]
        found = run(network, image_embeds=[GIVEN["features"][:, None]])
        close(f"IP-Adapter as .{ending} by diffusers", found, GIVEN["ip_adapter"])


def official(out):
    original = torch.load(FORMATS / "official.bin", weights_only=True)
    base = ("--unet", FORMATS / "small")
    encoder = convert(FORMATS / "official.bin", out / "encoder", "encoder", *base)
    for folder, source, target in (("encoder", "", ""), ("export", ".extract_kv1.", ".attn1.")):
        adapted = PeftModel.from_pretrained(unet("small"), encoder / "kv_encoder" / folder)
        found = {
            name.removeprefix("base_model.model."): value for name, value in get_peft_model_state_dict(adapted).items()
        }
        expected = {
            name.removeprefix("encoder_unet.")
            .replace(source or "\0", target)
            .replace(".lora_layer.down.", ".lora_A.")
            .replace(".lora_layer.up.", ".lora_B."): value
            for name, value in original.items()
            if ".lora_layer." in name
            and "source_attention_block" not in name
            and (".extract_kv1." in name) == (folder == "export")
        }
        same(f"KV LoRA `{folder}` by peft", found, expected)

    image_encoder = FORMATS / "base" / "image_encoder"
    path = convert(encoder, out / "export.bin", "official", *base, "--image-encoder", image_encoder)
    written = torch.load(path, weights_only=True)
    same("official layout", written, original)
    module = OfficialModule(
        unet("small"),
        CLIPVisionModelWithProjection.from_pretrained(image_encoder),
        Resampler(dim=8, depth=4, heads=1, queries=3, embedding_dim=6, output_dim=8),
        cross_attention_dim=8,
        lora_rank=3,
        kv_rank=2,
    )
    module.load_state_dict(written, strict=True)
    shared = [name for name in written if "source_attention_block" in name]
    for name in shared:
        attention = "attn1" if "extract_kv1" in name else "attn2"
        alias = name.split(".extract_kv")[0] + f".{attention}." + name.split("source_attention_block.")[1]
        assert written[name].data_ptr() == written[alias].data_ptr(), name
    print(f"official layout: loaded strictly; {len(shared)} aliases share their storage")


def tensors(out):
    expected = load_file(FORMATS / "tensors.safetensors")
    same(".pth to .safetensors", load_file(convert(FORMATS / "tensors.pth", out / "t.safetensors", "tensors")), expected)
    path = convert(FORMATS / "tensors.safetensors", out / "t.bin", "tensors")
    same(".safetensors to .bin", torch.load(path, weights_only=True), expected)


class HubPaths(http.server.BaseHTTPRequestHandler):
    """One file, at the path and with the headers of the hub."""

    content = bytes(range(256)) * 100

    def do_HEAD(self, send=False):
        known = self.path == "/owner/model/resolve/main/folder/model.bin"
        self.send_response(200 if known else 404)
        if known:
            self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(self.content).hexdigest()}"')
            self.send_header("X-Linked-Size", str(len(self.content)))
            self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("Content-Length", str(len(self.content) if known else 0))
        self.end_headers()
        if send and known:
            self.wfile.write(self.content)

    def do_GET(self):
        self.do_HEAD(send=True)

    def log_message(self, *_):
        pass


def cache(out):
    """What the crate downloads, huggingface_hub finds without a network, and the reverse."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubPaths)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    python = """
import sys
from huggingface_hub import hf_hub_download
print(hf_hub_download("owner/model", "folder/model.bin", local_files_only=sys.argv[1] == "offline"))
"""
    ours = [PROGRAMS / "weights", "owner/model", "folder/model.bin"]

    def get(command, home, **more):
        # huggingface_hub reads the variables when it is imported, so it runs in a process of its own.
        variables = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        variables |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"} | more
        return subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout.strip()

    first = get(ours, out / "ours")
    assert get([sys.executable, "-c", python, "offline"], out / "ours") == first
    second = get([sys.executable, "-c", python, "online"], out / "theirs")
    assert get(ours, out / "theirs", HF_HUB_OFFLINE="1") == second
    assert Path(first).read_bytes() == Path(second).read_bytes() == HubPaths.content
    server.shutdown()
    print("cache: shared in both directions")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for part in (cache, tensors, lora, adapter, official):
            part(Path(folder))
    print("Python loads all that was saved")
