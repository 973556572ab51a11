"""Memory of `scalefl convert`, on files of random weights in the released formats.

    python benchmarks/convert_memory.py [--small] [--kind safetensors|bin]

Peak of resident memory, pages of mapped files included, beyond what the process has before it reads any
file; against the largest file that is read and the part of a file that is gathered before it is written.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import sentencepiece
import torch
from measuring import MIB, Row, forget_peak, memory_now, peak_memory, show
from safetensors.torch import save_file
from torch import Tensor

from scalefl.config.convertoptions import ConvertOptions
from scalefl.conversion.command import convert
from scalefl.models.files import SHARD_BYTES

VOCABULARY, PATCH, RANK = 300, 14, 64


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a model of no weight, to try this script out")
    parser.add_argument("--kind", choices=("safetensors", "bin"), default="safetensors")
    arguments = parser.parse_args()
    hidden, layers, files = (64, 4, 2) if arguments.small else (2048, 16, 8)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        largest = write_released(folder, hidden, layers, files, arguments.kind)
        options = ConvertOptions(
            llama=str(folder / "llama"),
            vit=str(folder / "vit.pth"),
            ckpt=str(folder / "ckpt.pth"),
            out=str(folder / "warm"),
            image_size=56,
            vit_heads=hidden // 64,
        )
        if not arguments.small:  # imports and allocators are no memory of files
            small = Path(name) / "small"
            small.mkdir()
            write_released(small, 64, 2, 1, arguments.kind)
            paths = {"llama": small / "llama", "vit": small / "vit.pth", "ckpt": small / "ckpt.pth"}
            typed = {key: str(path) for key, path in paths.items()}
            convert(ConvertOptions(**typed, out=str(small / "out"), image_size=56, vit_heads=1))
        forget_peak()
        before = memory_now().resident
        convert(options)
        peak = peak_memory().resident - before
        total = sum(path.stat().st_size for path in (folder / "warm").iterdir())
    limit = largest + SHARD_BYTES
    what = f"{total / MIB:.0f} MiB converted, from {arguments.kind}"
    row = Row(cells=(what, f"{peak / MIB:.0f}", f"{limit / MIB:.0f}"), ratio=peak / limit, limit=1.0)
    return show("Memory of a conversion", ("what", "peak MiB", "largest file and part MiB"), [row])


def write_released(folder: Path, hidden: int, layers: int, files: int, kind: str) -> int:
    """Bytes of the largest file."""
    llama = folder / "llama"
    llama.mkdir()
    write_tokenizer(llama)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (llama / "config.json").write_text(json.dumps(config))
    write_language(llama, hidden, layers, files, kind)
    torch.save(tower(hidden, layers // 2), folder / "vit.pth")
    torch.save({"model": trained(hidden, layers)}, folder / "ckpt.pth")
    return max(path.stat().st_size for path in (*llama.iterdir(), folder / "vit.pth", folder / "ckpt.pth"))


def half(*shape: int) -> Tensor:
    return torch.randn(shape).half()


def write_language(folder: Path, hidden: int, layers: int, files: int, kind: str) -> None:
    of_name: dict[str, str] = {}
    stem = "model" if kind == "safetensors" else "pytorch_model"
    for number in range(files):
        part: dict[str, Tensor] = {}
        for layer in range(number, layers, files):
            at = f"model.layers.{layer}"
            part |= {f"{at}.self_attn.{x}_proj.weight": half(hidden, hidden) for x in "qkvo"}
            part |= {f"{at}.mlp.{x}_proj.weight": half(2 * hidden, hidden) for x in ("gate", "up")}
            part[f"{at}.mlp.down_proj.weight"] = half(hidden, 2 * hidden)
            part |= {f"{at}.{x}_layernorm.weight": half(hidden) for x in ("input", "post_attention")}
        if number == 0:
            part |= {x: half(VOCABULARY, hidden) for x in ("model.embed_tokens.weight", "lm_head.weight")}
            part["model.norm.weight"] = half(hidden)
        file = f"{stem}-{number}.{kind}"
        if kind == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
        of_name |= dict.fromkeys(part, file)
    index = f"{stem}.{kind}.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": of_name}))


def tower(hidden: int, layers: int) -> dict[str, Tensor]:
    state = {
        "cls_token": half(1, 1, hidden),
        "pos_embed": half(1, 17, hidden),
        "patch_embed.proj.weight": half(hidden, 3, PATCH, PATCH),
        "patch_embed.proj.bias": half(hidden),
    }
    for layer in range(layers):
        at = f"blocks.{layer}"
        state |= {f"{at}.norm{n}.{x}": half(hidden) for n in (1, 2) for x in ("weight", "bias")}
        state |= {f"{at}.attn.{x}_bias": half(hidden) for x in "qv"}
        state |= {f"{at}.attn.qkv.weight": half(3 * hidden, hidden)}
        state |= {f"{at}.attn.proj.weight": half(hidden, hidden), f"{at}.attn.proj.bias": half(hidden)}
        state |= {f"{at}.mlp.fc1.weight": half(4 * hidden, hidden), f"{at}.mlp.fc1.bias": half(4 * hidden)}
        state |= {f"{at}.mlp.fc2.weight": half(hidden, 4 * hidden), f"{at}.mlp.fc2.bias": half(hidden)}
    return state


def trained(hidden: int, layers: int) -> dict[str, Tensor]:
    state = {"llama_proj.weight": torch.randn(hidden, 4 * hidden), "llama_proj.bias": torch.randn(hidden)}
    for layer in range(layers):
        for target in ("q_proj", "v_proj"):
            at = f"llama_model.base_model.model.model.layers.{layer}.self_attn.{target}"
            state |= {f"{at}.lora_A.weight": torch.randn(RANK, hidden)}
            state |= {f"{at}.lora_B.weight": torch.randn(hidden, RANK)}
    return state


def write_tokenizer(folder: Path) -> None:
    """A small one of Llama's kind."""
    text = [f"what is the grade of knee {number} ?" for number in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["$$"],
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


if __name__ == "__main__":
    sys.exit(main())
