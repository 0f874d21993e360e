"""Typed configuration and its checks. Imports no torch."""
