"""The guest agent of katapy: pid 1 of every sandbox VM.

It does inside the VM what the host asks over gRPC: it builds containers, starts processes in them, joins their
standard streams to the host's, and reports how they end. It runs on the guest image's own Python; the host package
never imports it.
"""

__version__ = "0.1.0"
