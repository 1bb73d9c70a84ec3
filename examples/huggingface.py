"""A causal language model in the Trainer of Hugging Face, with the gradient-norm penalty and without.

    python examples/huggingface.py                   (a small Llama from scratch, on this project's own pages, a minute)

For a model of your own, replace ``model`` and ``pages``: what belongs to fastreg is the class of the trainer and its
last two arguments.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

import fastreg
from fastreg.integrations.transformers import RegularizedTrainer

DOCS = Path(__file__).resolve().parent.parent / "docs"


def pages(length: int = 64) -> list[dict[str, torch.Tensor]]:
    """Pieces of the documentation as bytes, in the form that a Trainer takes."""
    text = b"".join(path.read_bytes() for path in sorted(DOCS.glob("*.md")))
    tokens = torch.tensor(list(text[: len(text) // length * length])).view(-1, length)
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(weight: float, steps: int, folder: str) -> list[dict[str, float]]:
    """The log of one run."""
    set_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, num_key_value_heads=2, **sizes))
    args = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=max(1, steps // 4),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RegularizedTrainer(
        model=model, args=args, train_dataset=pages(), penalty=fastreg.GradNorm(weight), micro_batch_size=4
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main(steps: int = 60, weights: tuple[float, ...] = (0.0, 0.1)) -> dict[float, list[dict[str, float]]]:
    """Logs by weight of the penalty; the Trainer prints them."""
    found = {}
    for weight in weights:
        print(f"weight {weight}")
        with tempfile.TemporaryDirectory() as folder:
            found[weight] = train(weight, steps, folder)
    return found


if __name__ == "__main__":
    main()
