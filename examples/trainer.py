"""Float16 in Hugging Face's Trainer: clipped, scheduled, resumable; saved in float32.

    python examples/trainer.py FOLDER STEPS

The model is tiny, random and made of a configuration, so that nothing is downloaded. It saves every
30 steps, and goes on from the last checkpoint in FOLDER: 30 and then 60 steps give the bits of 60.
"""

import os
import sys

import mpcore
import torch
from mpcore.migration import float32_state_dict
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

LENGTH, LAST = 16, 60


def counting(rows: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that count up from anywhere, modulo 32."""
    draw = torch.Generator().manual_seed(1)
    starts = torch.randint(32, (rows,), generator=draw)
    tokens = [(start + torch.arange(LENGTH)) % 32 for start in starts]
    return [{"input_ids": each, "labels": each} for each in tokens]


def main(folder: str, steps: int) -> None:
    """Trains a GPT-2 of two layers to count."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32,
            n_positions=LENGTH,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    optimizer = mpcore.MixedPrecisionOptimizer(
        torch.optim.AdamW(model.named_parameters(), lr=3e-3, weight_decay=0.1)
    )
    mpcore.cast_model(model, torch.float16, optimizer)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            folder,
            fp16=True,  # Accelerate unscales before it clips only then
            max_grad_norm=1.0,
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            logging_steps=20,
            disable_tqdm=True,
            save_steps=30,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
        ),
        train_dataset=counting(8 * 2 * LAST),
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1 - step / LAST)),
    )
    trainer.accelerator.scaler = mpcore.GradScaler(trainer.accelerator.device.type)
    if not torch.cuda.is_available():
        trainer.accelerator.native_amp = True  # which Accelerate leaves off on a CPU

    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    trainer.train(resume_from_checkpoint=last)
    full = os.path.join(folder, "float32")
    model.save_pretrained(full, state_dict=float32_state_dict(model, optimizer))
    norm = torch.nn.utils.get_total_norm(list(float32_state_dict(model, optimizer).values()))
    print(f"step {trainer.state.global_step}, norm of the masters {norm.item():.8g}")
    print(f"loss scale {trainer.accelerator.scaler.get_scale():g}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
