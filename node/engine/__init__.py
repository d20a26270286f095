"""The engine: tokens in, tokens and fingerprints out, no text. Importing this package does not import torch.

`profile.profile_of(model_dir, dtype)` says what a model directory computes; `engine.TorchEngine` computes it.
spec (config.json) -> weights (safetensors) -> decoder (forward, KV slots) -> sampler (next tokens, fingerprints)
-> scheduler (who runs in a step) -> engine (the thread, the asyncio side).
"""
