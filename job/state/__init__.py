"""What a run keeps in its output: attempts, ledger, checkpoints, record, fingerprint, results, caches.

The ledger decides which attempt may still commit and publish (fencing), and whether a run is finished. `record` writes
`run.json` and `inputs.json`, `publication` the results, `done.json` and `latest.json`. Knows formats on the store;
nothing of models in memory, of rows or of the training loop.
"""
