"""Names of `anemoi_ckpt` that are looked up when they are first imported."""
