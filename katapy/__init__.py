"""katapy: every pod in its own virtual machine, behind the interface of an OCI runtime."""

__version__ = "0.1.0"
