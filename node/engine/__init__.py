"""The engine: tokens in, tokens and fingerprints out, no text. Importing this package does not import torch.

`profile.profile_of(model_dir, dtype)` says what a model directory computes; `engine.TorchEngine` computes it.
spec (config.json) -> weights (safetensors) -> decoder (forward, KV slots; compiled: the same in C) -> sampler (next
tokens, fingerprints) -> scheduler (who runs in a step) -> engine (the thread, the asyncio side).
Beside the scheduler: generation (one stream), waiting (whose turn it is), pace (measured times), prefix_cache (what is
remembered of whom), adjust and grammar (what a request's options forbid), memory (how the KV budget is split).
declared: a model that another server computes, as its profile and card.
For audits: replay (finished work looked at again), calibration (how far honest work is from its replay), thresholds
(what calibration found, as profile.py reads it).
"""
