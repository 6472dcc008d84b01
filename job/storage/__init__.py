"""Where inputs come from and outputs go: S3 or a directory used like a bucket, behind one interface (`store.Store`)."""
