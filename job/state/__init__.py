"""What a run keeps in its output: attempts, ledger, checkpoints, record, fingerprint, published files, caches.

The ledger decides which attempt may still commit and publish (fencing); `record` writes `run.json`, `inputs.json` and
`done.json`. Knows formats on the store; nothing of models in memory, of rows or of the training loop.
"""
