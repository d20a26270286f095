"""Models of a chosen size with random weights, for measuring how a ratio depends on what a token costs.

What they write is noise; what they cost to run is what a trained model of their shape costs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

from devnet.cluster import MODEL_DIR

SHAPES: Final[dict[str, dict[str, int]]] = {
    "15m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6},
    "100m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 12},
}
"""Name -> Llama shape, about that many parameters with the shipped model's vocabulary."""


def random_model(name: str, folder: Path) -> Path:
    """Write the model of a name in SHAPES into `folder`, with the shipped model's tokenizer."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    folder.mkdir(parents=True)
    shape = SHAPES[name]
    shipped: dict[str, Any] = json.loads((MODEL_DIR / "config.json").read_text())
    kept = {key: shipped[key] for key in ("vocab_size", "max_position_embeddings", "bos_token_id", "pad_token_id")}
    config = transformers.LlamaConfig(
        **kept, **shape, num_key_value_heads=shape["num_attention_heads"], eos_token_id=None, tie_word_embeddings=True
    )
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (MODEL_DIR / file).exists():
            shutil.copy(MODEL_DIR / file, folder / file)
    return folder
