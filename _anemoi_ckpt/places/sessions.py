"""Sessions of requests whose reads a stop can end: Azure's and Google's SDKs take one, too."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from _anemoi_ckpt.places import CONNECTIONS
from _anemoi_ckpt.places.interrupts import interruptible


def mounted(session: Any, requests: ModuleType) -> Any:
    """Give a session of requests connections that register their sockets, and no retries.

    An adapter that the SDK has mounted for a reason of its own (a client's certificate) stays.
    """

    class Adapter(requests.adapters.HTTPAdapter):  # type: ignore[misc, name-defined] # imported by the caller
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            _register(self.poolmanager)

        def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
            manager = super().proxy_manager_for(*args, **kwargs)
            _register(manager)
            return manager

    for scheme, adapter in list(session.adapters.items()):
        if type(adapter) is requests.adapters.HTTPAdapter:
            session.mount(scheme, Adapter(CONNECTIONS, CONNECTIONS, max_retries=0))
        else:
            _register(adapter.poolmanager)
    return session


def _register(manager: Any) -> None:
    manager.pool_classes_by_scheme = interruptible(manager.pool_classes_by_scheme)
