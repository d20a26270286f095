"""Servers outside the market: an engine over any OpenAI-compatible server, and platforms jobs may be sent to.

urls (where may be dialled) -> http (one checked server) -> reading (what it says) -> texts (text as exact ids)
-> probe (what it can do, shown by effect) -> engine (the Engine port); sheets (imported prices) -> exchange.
aiohttp's client is this folder's foreign library. Importing this package imports none of it.
"""
