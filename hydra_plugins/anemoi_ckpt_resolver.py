"""`${ckpt:s3://bucket/last.ckpt}` in a configuration of Hydra is the path of a local copy.

Hydra imports what lies in the namespace package `hydra_plugins`, so installing `anemoi-ckpt` is
enough. Of a folder, whose name ends with a slash, it is the newest checkpoint.
"""

from omegaconf import OmegaConf


def _local_copy(uri: str) -> str:
    """Bring a checkpoint to this machine's cache, once for all its processes; give its path."""
    from anemoi_ckpt import download, latest  # noqa: PLC0415 - torch, for those who use it

    return str(download(latest(uri) if uri.endswith("/") else uri))


OmegaConf.register_new_resolver("ckpt", _local_copy, replace=True)
