"""Guest images, kernels and sandboxes' default root under a data directory.

    image/<digest>/root.erofs, image.json                     digest: SHA-256 of root.erofs
    kernel/<version>/vmlinuz or vmlinux, [initramfs.cpio], kernel.json
    root/<digest>/rootfs/, root.json                          sandboxes' default root; digest: of all in it
    cache/<recipe>/                                           downloads of builds

``guest`` says which images and kernels there are and which one is booted, ``root`` the same of the default root,
``asset`` is what they have in common, ``store`` adds and removes them. How they are made is another matter
(``image_build``, guest-kernel/).

Nothing is imported here: a start finds what it boots, and adds nothing.
"""
