"""Benchmarks: what the marketplace costs over the bare engine, over bare signatures, and on a chain.

Ratios are taken within one run on one machine, its two sides in turn, so that they mean something on a busy one.
"""
