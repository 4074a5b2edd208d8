"""Bulk conversion. `convert` and `commit` are its stages, for a pipeline of one's own; `job` is `d2l convert`."""

from pipelines.convert.actor import ConversionConfig, convert
from pipelines.convert.journal import commit

__all__ = ["ConversionConfig", "commit", "convert"]
