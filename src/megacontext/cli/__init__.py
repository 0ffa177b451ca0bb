"""The ``megacontext`` command."""

__all__: list[str] = []
