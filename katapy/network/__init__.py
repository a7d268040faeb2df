"""Connects a pod's network namespace to its virtual machine.

What the namespace has was made by somebody else: a CNI plugin, docker, podman, a hook. A short-lived helper process
(``helper``) looks at it, makes a tap beside each interface and has the kernel hand every frame over, both ways; the
supervisor (``pod``) keeps the descriptors, learns of changes, and undoes all of it.
"""
