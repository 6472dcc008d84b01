"""What a run keeps in its output: attempts, ledger, checkpoints, record, fingerprint, published files, compile caches.

Knows the formats on the store and who may write when; nothing of models in memory, of rows or of the training loop.
"""
