"""Injection: how a prompt reaches a model's attention, dispatched on the kind of prompt state."""

from ptd.inject.attach import Attachment, check_supported, measure_shape

__all__ = ["Attachment", "check_supported", "measure_shape"]
