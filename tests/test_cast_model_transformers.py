"""The step of `test_cast_model_zoo` for models of transformers, built small without a download.

transformers is no dependency: without it these are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpcore_testing.steps_in_16_bits import GRADIENTS, HALF, check, of_torch
from mpcore_testing.zoo import Row, pulled

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "intermediate_size": 64}
IDS = torch.arange(16).view(2, 8) % 30 + 1
PADDED = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
WIDE = torch.randn(2, 80, 32, generator=torch.Generator().manual_seed(0))


def build_gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def build_llama() -> Any:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=16)
    return transformers.LlamaForCausalLM(config)


def build_t5() -> Any:
    config = transformers.T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def build_bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def build_vit() -> Any:
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=5)
    return transformers.ViTForImageClassification(config)


def build_whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=32,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return transformers.WhisperForConditionalGeneration(config)


TEXT = {"input_ids": IDS, "attention_mask": PADDED}
ROWS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "GPT-2": (build_gpt2, TEXT),
    "Llama": (build_llama, TEXT),
    "T5": (build_t5, {**TEXT, "decoder_input_ids": IDS}),
    "BERT": (build_bert, TEXT),
    "ViT": (build_vit, {"pixel_values": WIDE[:, :48].reshape(2, 3, 16, 32)[..., :16]}),
    "Whisper": (build_whisper, {"input_features": WIDE, "decoder_input_ids": IDS}),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rehearsed", [False, True], ids=["", "batch"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_a_step_is_that_of_fp32_but_for_roundings(
    name: str, dtype: torch.dtype, rehearsed: bool, attention: str
) -> None:
    build, batch = ROWS[name]

    def row() -> Row:
        model = build()
        model.set_attn_implementation(attention)
        configs = [m.config for m in model.modules() if hasattr(m, "config")]
        for part in (*model.modules(), *configs):
            for key, value in vars(part).items():
                if ("drop" in key or key == "p") and isinstance(value, float):
                    setattr(part, key, 0.0)
        model.train()
        return Row(model, batch, lambda result: pulled(result.logits))

    # it scales no attention scores, and how well torch's own attention takes that depends on the
    # CPU: 1.5 to 9.4 roundings, to the digit as far off as what torch alone has cast
    bound = max(GRADIENTS, 1.1 * of_torch(row, dtype)) if name == "T5" else GRADIENTS
    check(row, dtype, rehearsed, bound)
