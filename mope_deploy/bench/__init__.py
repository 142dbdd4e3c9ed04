"""``mope bench``: what a bundle costs on this device, measured without torch.

``measure`` runs it, ``timing`` is how calls are timed, ``board`` and ``nvml`` read what the board tells about itself,
``energy`` integrates its power, ``chart`` draws, ``command`` is the command line.
"""
