"""Embed the catalogue, publish releases, open them on replicas."""
