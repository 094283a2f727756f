"""Train the byte-level Llama that `experiments/quickstart.yaml` tunes, and save it beside this file.

    python experiments/models/train_tiny_llama.py --steps 6000

It needs a few minutes on a data-centre GPU and hours on a CPU; the result is in the repository, so nobody has to.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from stdlib_text import read_split
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent


def config() -> LlamaConfig:
    """5.9 million parameters: under 12 MB of bf16."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )


def batches(text: torch.Tensor, length: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random windows of the text as int64 of shape [size, length]."""
    starts = torch.randint(0, len(text) - length, (size,), generator=generator, device=text.device)
    return text[starts[:, None] + torch.arange(length, device=text.device)[None, :]].long()


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, text: torch.Tensor, length: int) -> float:
    """Mean cross entropy in bits over non-overlapping windows of the text."""
    windows = text[: len(text) // length * length].view(-1, length)
    total, count = 0.0, 0
    for chunk in windows.split(64):
        ids = chunk.long()
        logits = model(input_ids=ids).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return total / count / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stdlib", type=Path, default=None, help="default: this Python's own library")
    parser.add_argument("--out", type=Path, default=HERE / "tiny_llama")
    parser.add_argument("--max-seconds", type=float, default=float("inf"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(args.seed)
    train = torch.frombuffer(bytearray(read_split(False, args.stdlib)), dtype=torch.uint8).to(device)
    held_out = torch.frombuffer(bytearray(read_split(True, args.stdlib)), dtype=torch.uint8).to(device)
    model = LlamaForCausalLM(config()).to(device)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters:,} parameters, {len(train):,} bytes to train on, {len(held_out):,} held out, on {device}")

    decay = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")
    step_fn = torch.compile(model) if device == "cuda" else model
    start = time.monotonic()
    progress = 0.0
    for step in range(args.steps):
        # time is a budget as much as steps are: the schedule follows whichever is further along
        progress = max(step / args.steps, (time.monotonic() - start) / args.max_seconds)
        if progress >= 1:
            break
        warm = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        ids = batches(train, args.length, args.batch, generator)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = step_fn(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0:
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits per byte, {time.monotonic() - start:.0f} s", flush=True)

    model.eval().to(torch.bfloat16)
    score = bits_per_byte(model, held_out, args.length)
    print(f"held out: {score:.4f} bits per byte after {step + 1} steps")
    model.save_pretrained(args.out)
    facts = {
        "bits_per_byte_held_out": round(score, 4),
        "steps": step + 1,
        "batch": args.batch,
        "length": args.length,
        "seed": args.seed,
        "num_parameters": num_parameters,
        "num_train_bytes": len(train),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
